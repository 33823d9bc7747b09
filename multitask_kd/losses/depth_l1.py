"""Difference between two depth maps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import LOSSES, SoftLoss, same_shape


@LOSSES.register("depth_l1")
class DepthL1(SoftLoss):
    """mean |s - t| of the log depths, which is the log of the ratio of the two depths."""

    kinds = ("depth",)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """student, teacher: log metres [B,1,h,w]; mask: bool [B,h,w]. Raises ValueError on other shapes."""
        same_shape(student, teacher, "depth")
        error = (student.float() - teacher.float()).abs()[:, 0]
        return error.mean() if mask is None else (error * mask).sum() / mask.sum().clamp(min=1)
