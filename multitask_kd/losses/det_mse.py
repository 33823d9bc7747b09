"""Mean squared error between two dense detection outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.dense_head import box_sizes
from .base import LOSSES, SoftLoss, check_temperature, same_shape


@LOSSES.register("det_mse")
class DetMSE(SoftLoss):
    """temperature * mean (s-t)^2 over cells and over box [...,0:4], objectness [...,4] and classes [...,5:] of [B,N,4+1+C].

    form: "raw" compares the outputs as they are; "probability" objectness and classes after the sigmoid; "decoded" that and
    boxes as offset and size in strides.
    weighting: "none" counts every cell alike, so background dominates; "teacher" weighs a cell by the teacher's
    objectness * best class probability and divides by the sum of the weights.
    """

    tasks = ("det",)
    scheduled = ("temperature",)

    def __init__(self, *, temperature: float = 1.0, form: str = "raw", weighting: str = "none"):
        super().__init__()
        check_temperature("temperature", temperature)
        if form not in ("raw", "probability", "decoded"):
            raise ValueError(f"form: '{form}' is none of raw, probability, decoded")
        if weighting not in ("none", "teacher"):
            raise ValueError(f"weighting: '{weighting}' is neither none nor teacher")
        self.temperature = temperature
        self.form = form
        self.weighting = weighting

    def forward(self, student: Tensor, teacher: Tensor, target: Mapping[str, Tensor] | None = None) -> Tensor:
        """student, teacher: raw outputs of equal shape [B,N,4+1+C]. Raises ValueError on other shapes."""
        same_shape(student, teacher, "cells")
        student, teacher = student.float(), teacher.float()
        error = (self._shown(student) - self._shown(teacher)).square().mean(-1)
        if self.weighting == "none":
            return self.temperature * error.mean()
        weight = teacher[..., 4].sigmoid() * teacher[..., 5:].sigmoid().amax(-1)
        return self.temperature * (error * weight).sum() / weight.sum().clamp(min=1e-6)

    def _shown(self, raw: Tensor) -> Tensor:
        if self.form == "raw":
            return raw
        sizes = box_sizes(raw) if self.form == "decoded" else raw[..., 2:4]
        return torch.cat([raw[..., :2], sizes, raw[..., 4:].sigmoid()], dim=-1)
