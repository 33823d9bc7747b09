"""A checkpoint of a network with two tasks of some kinds and one of others: random weights, written in no
time."""

import torch
import yaml

from multitask_kd import build, checkpoint
from multitask_kd.models.multitask import count_parameters

TASKS = {
    "seg": {"kind": "semantic", "classes": ["sky", "road", "car"], "head": {}},
    "lane": {"kind": "semantic", "classes": ["background", "line"], "head": {"depth": 0}},
    "det": {
        "kind": "detection",
        "classes": ["car", "person"],
        "head": {"strides": [8, 16], "depth": 1, "prior": 0.3},
    },
    "sign": {
        "kind": "detection",
        "classes": ["stop", "go", "turn"],
        "head": {"strides": [8], "depth": 0, "prior": 0.3},
    },
    "weather": {"kind": "classification", "classes": ["dry", "rain"], "head": {}},
    "distance": {"kind": "depth", "classes": [], "head": {}},
}
SIZE = (48, 64)


def write(path, tasks=TASKS, config=None):
    """Save the network of ``tasks`` at ``path``; returns it in eval. config: of the run that trained it."""
    torch.manual_seed(0)
    arch = {
        "encoder": "tu-test_resnet",
        "strides": [4, 8, 16],
        "width": 8,
        "mean": [0.5] * 3,
        "std": [0.1] * 3,
    }
    arch |= {"tasks": tasks, "input_size": list(SIZE)}
    net = build.network(arch).eval()
    with torch.no_grad():
        for name, weights in net.heads.named_parameters():  # so that pixels and cells differ
            weights.mul_(2.5 if "weight" in name and weights.dim() > 1 else 1)
    params = count_parameters(net)
    none = {"metrics": {}, "step": 0, "labelled_images": 0, "unlabelled_images": 0}
    text = yaml.safe_dump(config or {})
    checkpoint.save(path, {"arch": arch, "params": params, "model": net.state_dict(), "config": text, **none})
    return net
