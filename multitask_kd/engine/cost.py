"""What a network costs where it runs: arithmetic, size on disk, time and memory of a prediction."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import build
from ..errors import UserError
from ..models.multitask import count_parameters
from .networks import Network

log = logging.getLogger(__name__)

LIMIT_S = 600  # of the process that measures memory


@torch.no_grad()
def flops(network: Network) -> int | None:
    """Floating-point operations of one image's raw predictions: two a multiply-add, convolutions and matrix
    products alone.

    A file that is no module of torch is counted in the network of its ``arch``; None where that is another
    network.
    """
    net = network.run
    if not isinstance(net, nn.Module):
        try:
            net = build.network(network.arch).eval()
        except (UserError, KeyError, ValueError, TypeError, RuntimeError):
            return None
        if count_parameters(net) != network.parameters:
            return None
    device = next((p.device for p in net.parameters()), network.device)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, *network.size, device=device))
    return counter.get_total_flops() or None


def file_bytes(path: str) -> int:
    """Size on disk, with the weights that an ONNX model keeps beside it in ``<its name>.data``."""
    beside = Path(f"{path}.data")
    return os.path.getsize(path) + (beside.stat().st_size if beside.is_file() else 0)


@torch.no_grad()
def latencies(
    networks: Mapping[str, Network], batch: int, *, runs: int, channels_last: bool, warm_up: int = 3
) -> dict[str, dict[str, float]]:
    """By network: milliseconds of a batch, from float images on the device to raw predictions; no decoding.

    The networks take turns, each after a run that is not timed, so that changes of the machine's load meet
    all alike. Returns ``median`` and the spread ``p10`` to ``p90`` over ``runs`` timed runs.
    """
    memory = torch.channels_last if channels_last else torch.contiguous_format
    images = {
        n.size: torch.rand(batch, 3, *n.size, device=n.device).contiguous(memory_format=memory)
        for n in networks.values()
    }
    for network in networks.values():
        for _ in range(warm_up):
            network.run(images[network.size])
    spent: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(runs):
        for name, network in networks.items():
            given = images[network.size]
            network.run(given)
            _sync(network.device)
            began = time.perf_counter()
            network.run(given)
            _sync(network.device)
            spent[name].append(1000 * (time.perf_counter() - began))
    return {name: _summary(times) for name, times in spent.items()}


def _summary(times: list[float]) -> dict[str, float]:
    low, high = np.quantile(times, [0.1, 0.9]).tolist()
    return {"median": statistics.median(times), "p10": low, "p90": high}


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(path: str, *, device: torch.device, threads: int, channels_last: bool) -> float | None:
    """Megabytes (2^20 bytes) that opening a file leaves and predicting one image takes, in a process of its
    own.

    None, with a warning, where that process fails.
    """
    asked = json.dumps(
        {"path": path, "device": str(device), "threads": threads, "channels_last": channels_last}
    )
    here = str(
        Path(__file__).parents[2]
    )  # in the place of the working folder, which may hold another copy of the project
    start = "import sys; sys.path[0] = sys.argv[1]; from multitask_kd.engine.footprint import main; main(sys.argv[2])"
    try:
        command = [sys.executable, "-c", start, here, asked]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
        return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])
    except (subprocess.SubprocessError, OSError, ValueError, LookupError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning(
            "the memory of %s could not be measured: %s", path, lines[-1] if lines else type(error).__name__
        )
        return None


def software() -> dict[str, Any]:
    """Versions of what the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"Python": sys.version.split()[0]}
    for name in ("multitask_kd", "torch", "torchvision", "onnxruntime", "pycocotools", "numpy"):
        try:
            found[name] = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            continue
    return found
