"""The teacher: frozen, always in eval, outside optimizer and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..batch import View
from ..tasks.base import Task
from .taps import Tapped


class Teacher:
    """Wraps a network so that nothing can train it.

    Not an nn.Module on purpose: assigned to one, it adds no parameters, and no ``train()`` reaches it.
    tasks: what it teaches, by name, with its own classes and strides. amp: dtype of autocast, or None. taps: module paths whose
    outputs it shows besides its predictions. Raises UserError for a path that the network does not have.
    """

    def __init__(
        self,
        net: nn.Module,
        tasks: Mapping[str, Task],
        device: torch.device,
        amp: torch.dtype | None = None,
        taps: Iterable[str] = (),
    ):
        self.net = net.to(device).eval().requires_grad_(False)
        self.tasks, self.device, self.amp = dict(tasks), device, amp
        self.tapped = Tapped(self.net, taps, "teacher")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> View:
        """images float [B,3,H,W] in [0,1] -> View without gradients."""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None), self.tapped as taps:
            view = self.net(images)
        return replace(view, taps=taps)
