"""Masked generative distillation (Yang et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .base import LOSSES, SoftLoss, same_shape


@LOSSES.register("mgd")
class MGD(SoftLoss):
    """sum (G(m * s) - t)^2 / B * 2e-5: a generator makes the teacher's feature out of the places that a random mask leaves.

    G = 3x3 convolution, ReLU, 3x3 convolution; it learns with the student. The factor goes with the sum over C*H*W: on small
    maps the weight of the term has to make up for it.
    masked: share of the places that are hidden, drawn anew for every image (the paper's lambda).
    factor: the paper's alpha.
    """

    maps = True

    def __init__(self, *, masked: float = 0.65, factor: float = 2e-5):
        super().__init__()
        if not 0 <= masked < 1:
            raise ValueError(f"masked: {masked} is not in [0, 1)")
        if not 0 < factor < float("inf"):
            raise ValueError(f"factor: {factor} is not a number above 0")
        self.masked, self.factor = masked, factor
        self.generator: nn.Module | None = None

    def prepare(self, channels: int) -> None:
        self.generator = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, student: Tensor, teacher: Tensor, target: Mapping[str, Tensor] | None = None) -> Tensor:
        """student, teacher: [B,C,H,W]; ``prepare(C)`` comes first. Raises ValueError on other shapes."""
        same_shape(student, teacher, "map")
        batch, _, height, width = student.shape
        kept = torch.rand(batch, 1, height, width, device=student.device) >= self.masked
        made = self.generator(student * kept)
        return (made.float() - teacher.float()).square().sum() / batch * self.factor
