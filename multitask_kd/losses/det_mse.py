"""Mean squared error between two dense detection outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.dense_head import box_sizes
from .base import LOSSES, SoftLoss, check_temperature, same_shape


@LOSSES.register("det_mse")
class DetMSE(SoftLoss):
    """temperature * mean squared error over cells of box [...,0:4], objectness [...,4] and classes [...,5:]
    of [B,N,4+1+C].

    parts: "together" is one mean over all 4+1+C values of a cell; "separate" the sum of three means, over the
    objectness, the 4 box values and the C classes, so that many classes do not drown the boxes (multi-task
    distillation's article).
    form: "raw" compares the outputs as they are; "probability" objectness and classes after the sigmoid;
    "decoded" that and boxes as offset and size in strides.
    weighting: "none" counts every cell alike, so background dominates; "teacher" weighs a cell by the
    teacher's objectness * best class probability and divides by the sum of the weights.
    """

    kinds = ("detection",)
    scheduled = ("temperature",)

    def __init__(
        self, *, temperature: float = 1.0, form: str = "raw", weighting: str = "none", parts: str = "together"
    ):
        super().__init__()
        check_temperature("temperature", temperature)
        if form not in ("raw", "probability", "decoded"):
            raise ValueError(f"form: '{form}' is none of raw, probability, decoded")
        if weighting not in ("none", "teacher"):
            raise ValueError(f"weighting: '{weighting}' is neither none nor teacher")
        if parts not in ("together", "separate"):
            raise ValueError(f"parts: '{parts}' is neither together nor separate")
        self.temperature, self.parts = temperature, parts
        self.form = form
        self.weighting = weighting

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """student, teacher: raw outputs of equal shape [B,N,4+1+C]. Raises ValueError on other shapes."""
        same_shape(student, teacher, "cells")
        student, teacher = student.float(), teacher.float()
        error = self._of_cells((self._compared(student) - self._compared(teacher)).square())
        if self.weighting == "none":
            if mask is None:
                return self.temperature * error.mean()
            return self.temperature * (error * mask).sum() / mask.sum().clamp(min=1)
        weight = teacher[..., 4].sigmoid() * teacher[..., 5:].sigmoid().amax(-1)
        weight = weight if mask is None else weight * mask
        return self.temperature * (error * weight).sum() / weight.sum().clamp(min=1e-6)

    def _of_cells(self, squares: Tensor) -> Tensor:
        """Squares [B,N,4+1+C] -> the error of each cell [B,N]."""
        if self.parts == "together":
            return squares.mean(-1)
        return squares[..., :4].mean(-1) + squares[..., 4] + squares[..., 5:].mean(-1)

    def _compared(self, raw: Tensor) -> Tensor:
        if self.form == "raw":
            return raw
        sizes = box_sizes(raw) if self.form == "decoded" else raw[..., 2:4]
        return torch.cat([raw[..., :2], sizes, raw[..., 4:].sigmoid()], dim=-1)
