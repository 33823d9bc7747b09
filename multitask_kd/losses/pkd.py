"""Pearson correlation between features (Cao et al., PKD, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import LOSSES, SoftLoss, same_shape


@LOSSES.register("pkd")
class PKD(SoftLoss):
    """Half the mean squared error between features of mean 0 and variance 1 in each channel over batch and places.

    That is 1 - r, r the Pearson correlation of a channel, averaged over channels: from 0 (the same up to scale and shift) to 2.
    """

    tasks = ("seg",)
    maps = True

    def forward(self, student: Tensor, teacher: Tensor, target: Mapping[str, Tensor] | None = None) -> Tensor:
        """student, teacher: [B,C,H,W]. Computed in float32. Raises ValueError on other shapes."""
        same_shape(student, teacher, "map")
        return (_standard(student) - _standard(teacher)).square().mean() / 2


def _standard(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 in each channel; a channel that is constant becomes 0."""
    x = x.float()
    x = x - x.mean((0, 2, 3), keepdim=True)
    return x / (x.square().mean((0, 2, 3), keepdim=True) + 1e-6).sqrt()
