"""Masked generative distillation (Yang et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .base import LOSSES, SoftLoss, same_shape


@LOSSES.register("mgd")
class MGD(SoftLoss):
    """sum (G(m * s) - t)^2 / B * 2e-5: a generator G makes the teacher's feature from the positions that a
    random mask m keeps.

    G = 3x3 convolution, ReLU, 3x3 convolution; it is trained with the student. The factor belongs to a sum
    over C*H*W: on small maps, which have a smaller sum, the term needs a larger weight.
    channels: of the maps. masked: share of the positions that are hidden, drawn anew for every image (the
    paper's lambda). factor: the paper's alpha.
    """

    maps = True
    learns = True

    def __init__(self, channels: int, *, masked: float = 0.65, factor: float = 2e-5):
        super().__init__()
        if not 0 <= masked < 1:
            raise ValueError(f"masked: {masked} is not in [0, 1)")
        if not 0 < factor < float("inf"):
            raise ValueError(f"factor: {factor} is not a number above 0")
        self.masked, self.factor = masked, factor
        self.generator = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """student, teacher: [B,C,H,W], C the ``channels``. Raises ValueError on other shapes."""
        same_shape(student, teacher, "map")
        batch, _, height, width = student.shape
        kept = torch.rand(batch, 1, height, width, device=student.device) >= self.masked
        made = self.generator(student * kept)
        error = (made.float() - teacher.float()).square()
        if mask is None:
            return error.sum() / batch * self.factor
        counted = mask.sum((1, 2))  # the sum over part of an image's positions is scaled up to all of them
        each = (error * mask[:, None]).sum((1, 2, 3)) / counted.clamp(min=1) * (height * width)
        return each.sum() / (counted > 0).sum().clamp(min=1) * self.factor
