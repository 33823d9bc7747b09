"""The memory that one network takes, measured in a process that does nothing else: see ``cost.peak_memory``."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from .networks import open_network


def main(asked: str) -> None:
    """asked: JSON with the arguments of ``footprint``. Prints {"peak_mb": megabytes}."""
    print(json.dumps({"peak_mb": footprint(json.loads(asked))}))


def footprint(asked: dict[str, Any]) -> float:
    """asked: path, device, threads, channels_last. What the network added to this process at the most, in MB
    of 2^20 bytes."""
    device = torch.device(asked["device"])
    torch.set_num_threads(asked["threads"])
    with contextlib.suppress(
        ImportError
    ):  # libraries first, whatever the file is: a network does not pay for them
        import onnxruntime  # noqa: F401
    with torch.no_grad():
        _warm(device)
        before = _resident_mb("VmRSS")
        network = open_network(asked["path"], "path", device, channels_last=asked["channels_last"])
        images = torch.rand(1, 3, *network.size, device=device)
        gc.collect()
        _forget_peak(device)
        for _ in range(2):
            network.run(images)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return max(0.0, _resident_mb("VmHWM") - before)


def _warm(device: torch.device) -> None:
    """What torch sets up once, on the first convolution."""
    torch.nn.Conv2d(3, 8, 3).to(device)(torch.zeros(1, 3, 16, 16, device=device))


def _forget_peak(device: torch.device) -> None:
    """So that what opening took for a moment (a copy of the weights) does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux; "5" sets the peak to what is resident now
        Path("/proc/self/clear_refs").write_text("5")


def _resident_mb(key: str) -> float:
    """VmRSS: resident now; VmHWM: at the most so far. Where there is no /proc, the most so far for both.

    (getrusage's figure would not do on Linux: a process inherits there what its parent had resident.)
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines[key].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
