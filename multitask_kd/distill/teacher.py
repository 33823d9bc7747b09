"""The teacher: frozen, always in eval, outside optimizer and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..batch import View
from ..tasks.base import Task


class Teacher:
    """Wraps a network so that nothing can train it.

    Not an nn.Module on purpose: assigned to one, it adds no parameters, and no ``train()`` reaches it.
    tasks: what it teaches, by name, with its own classes and strides. amp: dtype of autocast, or None.
    """

    def __init__(self, net: nn.Module, tasks: Mapping[str, Task], device: torch.device, amp: torch.dtype | None = None):
        self.net = net.to(device).eval().requires_grad_(False)
        self.tasks, self.device, self.amp = dict(tasks), device, amp

    @torch.no_grad()
    def __call__(self, images: Tensor) -> View:
        """images float [B,3,H,W] in [0,1] -> View without gradients."""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            return self.net(images)
