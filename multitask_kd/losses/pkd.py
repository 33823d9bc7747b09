"""Pearson correlation between features (Cao et al., PKD, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import LOSSES, SoftLoss, same_shape


@LOSSES.register("pkd")
class PKD(SoftLoss):
    """Half the mean squared error between features of mean 0 and variance 1 in each channel over batch and
    positions.

    That is 1 - r, r the Pearson correlation of a channel, averaged over channels: from 0 (the same up to
    scale and shift) to 2.
    """

    kinds = ("semantic",)
    maps = True

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """student, teacher: [B,C,H,W]. Computed in float32. Raises ValueError on other shapes."""
        same_shape(student, teacher, "map")
        counts = None if mask is None else mask[:, None].float()
        error = (_standard(student, counts) - _standard(teacher, counts)).square()
        return _mean(error, counts).mean() / 2


def _mean(x: Tensor, counts: Tensor | None) -> Tensor:
    """The mean of each channel [1,C,1,1] over batch and positions; only those where ``counts`` [B,1,H,W] is
    1, if given."""
    if counts is None:
        return x.mean((0, 2, 3), keepdim=True)
    return (x * counts).sum((0, 2, 3), keepdim=True) / counts.sum().clamp(min=1)


def _standard(x: Tensor, counts: Tensor | None) -> Tensor:
    """Mean 0 and variance 1 in each channel; a channel that is constant becomes 0."""
    x = x.float()
    x = x - _mean(x, counts)
    return x / (_mean(x.square(), counts) + 1e-6).sqrt()
