"""A network from a file, whatever its kind, ready to predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import build
from ..checkpoint import load
from ..models.multitask import count_parameters
from ..tasks.base import Task


@dataclass(frozen=True)
class Network:
    """run: float images [B,3,H,W] in [0,1] on ``device`` -> View with the raw predictions of ``tasks``.

    size: (H, W) of its input in pixels; arch: what it was built from, with the class names; parameters: their number; kind: what
    the file is, "checkpoint" for one of ours.
    """

    path: str
    kind: str
    run: Callable
    tasks: Mapping[str, Task]
    size: tuple[int, int]
    arch: Mapping[str, Any]
    parameters: int
    device: torch.device


def open_network(path: str, where: str, device: torch.device, *, channels_last: bool = True) -> Network:
    """The network in a file, in eval on ``device``. ``where`` names the option that gave it. Raises UserError."""
    content = load(path, where)
    net = build.from_checkpoint(content, where).to(device).eval()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    arch = content["arch"]
    return Network(path, "checkpoint", net, build.tasks(arch, net), tuple(arch["input_size"]), arch, count_parameters(net), device)
