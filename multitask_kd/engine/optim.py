"""Parameter groups, learning rate, average of weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


def make_optimizer(
    module: nn.Module, *, name: str, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """AdamW or SGD over all that learns in ``module``; norms and biases (also those of more dimensions) are
    not decayed."""
    learning = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    bare = {n for n, p in learning if p.dim() <= 1 or n.endswith("bias")}
    groups = [
        {"params": [p for n, p in learning if n not in bare], "weight_decay": weight_decay},
        {"params": [p for n, p in learning if n in bare], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)


def lr_factor(step: int, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then cosine decay from 1 to ``final`` at the last step."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class Ema:
    """An exponential moving average of a network's weights and buffers, in ``net``.

    The decay rises as (1 + n) / (10 + n) over the first updates, so that the random start is soon forgotten.
    into: a copy of ``net`` that is there already (the teacher, where the average teaches).
    """

    def __init__(self, net: nn.Module, decay: float, into: nn.Module | None = None):
        self.decay, self.updates = decay, 0
        self.net = copy.deepcopy(net).eval().requires_grad_(False) if into is None else into
        own, live = list(self.net.state_dict().values()), list(net.state_dict(keep_vars=True).values())
        pairs = list(zip(own, live, strict=True))
        self._own = [a for a, _ in pairs if a.is_floating_point()]
        self._live = [b for a, b in pairs if a.is_floating_point()]
        self._others = [(a, b) for a, b in pairs if not a.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._own, self._live, weight)
        for a, b in self._others:
            a.copy_(b)
