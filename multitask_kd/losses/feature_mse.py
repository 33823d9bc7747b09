"""Mean squared error between two feature maps (FitNets, Romero et al., 2015)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import LOSSES, SoftLoss, same_shape


@LOSSES.register("feature_mse")
class FeatureMSE(SoftLoss):
    """mean (s-t)^2 over images, channels and positions."""

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
        error = (student.float() - teacher.float()).square()
        if mask is None:
            return error.mean()
        return (error * mask[:, None]).sum() / (mask.sum() * error.shape[1]).clamp(min=1)
