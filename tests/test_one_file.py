"""A kind of task and a soft loss, each added as one file: everything else works without knowing them."""

import sys
import textwrap

import numpy as np
import pytest
import yaml

from multitask_kd import config as configs
from multitask_kd.data.base import LAYOUTS
from multitask_kd.engine.evaluate import evaluate_checkpoint
from multitask_kd.engine.train import check, train
from multitask_kd.losses.base import LOSSES
from multitask_kd.tasks.base import KINDS

KIND = '''
"""Edges of objects: a head on the finest level, weighted cross-entropy, F1 of edge pixels."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from multitask_kd.data.labels import Spatial
from multitask_kd.report.layers import InsetLayer
from multitask_kd.report.tables import Column
from multitask_kd.tasks.base import KINDS, Comparable, Saved, Task
from multitask_kd.models.external import pick
from multitask_kd.tasks.maps import letterboxed_map, restored_map


class EdgeHead(nn.Module):
    def __init__(self, width, levels, classes):
        super().__init__()
        self.strides = (min(levels),)
        self.edge = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, levels):
        return self.edge(levels[self.strides[0]])


class EdgeOutput:
    """at: where the map of logits [B,1,h,w] is."""

    def __init__(self, *, at=None):
        self.at = at

    def read(self, returned, classes, size):
        return pick(returned, self.at, lambda x: isinstance(x, torch.Tensor) and x.dim() == 4, "a map")

    def fault(self, pred):
        return None


class EdgeF1:
    def __init__(self):
        self.right = self.found = self.there = 0

    def update(self, edge, truth):
        self.right += int((edge & (truth == 1)).sum())
        self.found += int((edge & (truth < 2)).sum())
        self.there += int((truth == 1).sum())

    def compute(self):
        return {"F1_edge": 200 * self.right / (self.found + self.there) if self.found + self.there else None}


@KINDS.register("edges")
class Edges(Task):
    """Cross-entropy; positive: weight of edge pixels."""

    Head = EdgeHead
    Output = EdgeOutput
    has_classes = False
    is_map = True
    label_word = "edges"
    main_metric = "F1_edge"
    headline = ("F1_edge",)
    columns = ((Column("F1_edge", "F1 of edges", 1, 1, "harmonic mean of precision and recall of edge pixels"),),)

    def __init__(self, name, classes, strides, *, positive: float = 5.0):
        super().__init__(name, (), strides)
        self.positive, self.weights = positive, {"bce": 1.0}

    @staticmethod
    def to_spatial(label, geometry, size):
        return Spatial([letterboxed_map(label, geometry, size, 255)])

    @staticmethod
    def from_spatial(moved, size, min_visible):
        return moved.maps[0]

    @staticmethod
    def packed(labels, size):
        maps = np.stack([np.full(size, 255, np.uint8) if one is None else one for one in labels])
        return {"edges": torch.from_numpy(maps), "labelled": torch.tensor([one is not None for one in labels])}

    def losses(self, pred, target, size):
        truth = target["edges"].masked_fill(~target["labelled"][:, None, None], 255)
        logits = F.interpolate(pred.float(), size=size, mode="bilinear")[:, 0]
        weight = (truth != 255).float() * torch.where(truth == 1, self.positive, 1.0)
        loss = F.binary_cross_entropy_with_logits(logits, (truth == 1).float(), weight=weight, reduction="sum")
        return {"bce": loss / weight.sum().clamp(min=1)}

    def decode(self, pred, size):
        return F.interpolate(pred.float(), size=size, mode="bilinear")

    def restore(self, decoded, geometry):
        return restored_map(decoded, geometry)[0] > 0

    def metric(self):
        return EdgeF1()

    def score(self, metric, prediction, truth):
        if self.name in truth.labels:
            metric.update(prediction.cpu().numpy(), truth.labels[self.name])

    def label_layer(self, label):
        return InsetLayer(np.repeat((label == 1)[..., None] * np.uint8(255), 3, axis=2), self.name)

    def prediction_layer(self, prediction, least_score):
        return self.label_layer(prediction.cpu().numpy().astype(np.uint8))

    def saved(self, prediction):
        return Saved(image=prediction.cpu().numpy().astype(np.uint8))

    def average(self, preds, ignore_masks, known, form):
        return torch.stack(list(preds)).sigmoid().mean(0).logit(eps=1e-6), None
'''

LOSS = '''
"""Squared error between two edge maps."""

from multitask_kd.losses.base import LOSSES, SoftLoss


@LOSSES.register("edge_mse")
class EdgeMSE(SoftLoss):
    """mean (sigmoid s - sigmoid t)^2."""

    kinds = ("edges",)

    def forward(self, student, teacher, target=None, mask=None):
        error = (student.float().sigmoid() - teacher.float().sigmoid()).square()[:, 0]
        return error.mean() if mask is None else (error * mask).sum() / mask.sum().clamp(min=1)
'''

LAYOUT = """
import numpy as np

from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.layouts.scenes import Scenes


@LAYOUTS.register("scenes_with_edges")
class ScenesWithEdges(Scenes):
    def __init__(self, *, split: str, count: int, size=(96, 128), root: str = "data/cache"):
        super().__init__(split=split, count=count, size=size, root=root)
        self.add_label("edges", "edges")

    def read(self, index):
        sample = super().read(index)
        mask, edge = sample.labels["seg"], np.zeros(sample.image.shape[:2], np.uint8)
        edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        if self.gives("edges") and index % 3:  # partial labels: every third image has none
            sample.labels["edges"] = edge
        return sample

    def gives(self, name):
        return name == "seg" or super().gives(name)
"""


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """One file each, imported as a file in the packages would be; taken out of the registries again."""
    before = [dict(registry._entries) for registry in (KINDS, LOSSES, LAYOUTS)]
    folder = tmp_path_factory.mktemp("one_file")
    sys.path.insert(0, str(folder))
    try:
        for name, source in (("edges_kind", KIND), ("edges_loss", LOSS), ("edges_layout", LAYOUT)):
            (folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
            __import__(name)
        yield
    finally:
        sys.path.remove(str(folder))
        for registry, entries in zip((KINDS, LOSSES, LAYOUTS), before, strict=True):
            registry._entries.clear()
            registry._entries.update(entries)


@pytest.fixture
def edges(raw, added):
    """edges(folder, changes) -> Config of a run with detection and edges."""

    def make(folder, changes=()):
        plain = raw(folder, {"train.eval_every": 2, **dict(changes)})
        for split in ("train", "val"):
            plain["data"][split]["layout"] = "scenes_with_edges"
        del plain["tasks"]["seg"]
        plain["tasks"]["edges"] = {"kind": "edges", **plain["tasks"].get("edges", {})}
        return configs.parse(plain, "edges.yaml")

    return make


def test_training_evaluation_and_pictures(edges, tmp_path, read_lines, capsys):
    metrics = train(edges(tmp_path / "run"))
    assert 0 <= metrics["edges"]["F1_edge"] <= 100 and "mAP" in metrics["det"]
    assert "F1 of edges" in capsys.readouterr().out
    lines = read_lines(tmp_path / "run", "train")
    assert all(np.isfinite(line["raw/edges.hard.bce"]) for line in lines)
    again = evaluate_checkpoint(edges(tmp_path / "again"), str(tmp_path / "run" / "best.pt"))
    assert again["edges"] == metrics["edges"]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["tasks"]["edges"]["kind"] == "edges"


def test_two_averaged_teachers_and_a_soft_loss(edges, tmp_path, read_lines):
    for k in (1, 2):
        train(edges(tmp_path / f"t{k}", {"run.seed": k, "train.ema": 0, "eval.pictures": 0}))
    teachers = {
        f"t{k}": {"path": str(tmp_path / f"t{k}" / "best.pt"), "amp": "none", "tasks": ["edges"]}
        for k in (1, 2)
    }
    taught = {"teachers": teachers, "tasks.edges": {"alpha": 0.5, "soft": {"loss": "edge_mse"}}}
    proof, closing = check(edges(tmp_path / "checked", taught))
    assert not proof.failed and "passed" in closing
    train(edges(tmp_path / "student", taught))
    assert read_lines(tmp_path / "student", "train")[-1]["raw/edges.soft.edge_mse"] > 0


def test_what_the_kind_does_not_have_is_refused_by_name(edges, tmp_path, teacher_run):
    from multitask_kd.errors import UserError

    given = {"teacher": {"path": str(teacher_run / "best.pt"), "map": {"edges": {"a": "b"}}}}
    taught = given | {"tasks.edges": {"alpha": 0.5, "soft": {"loss": "edge_mse"}}}
    with pytest.raises(UserError, match="teacher.map.edges: a task of kind 'edges' has no classes"):
        train(edges(tmp_path / "run", taught))
