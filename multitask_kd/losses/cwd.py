"""Channel-wise distillation (Shu et al., ICCV 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .base import LOSSES, SoftLoss, check_temperature, same_shape


@LOSSES.register("cwd")
class CWD(SoftLoss):
    """tau^2 / (B*C) * sum over images and channels of KL(softmax(t/tau) || softmax(s/tau)), the softmax over the H*W places.

    On segmentation logits or on features; features are normalised first, each channel over the batch.
    tau: temperature; the higher, the more places of a channel count.
    """

    tasks = ("seg",)
    maps = True
    norm = True
    scheduled = ("tau",)

    def __init__(self, *, tau: float = 1.0):
        super().__init__()
        check_temperature("tau", tau)
        self.tau = tau

    def forward(self, student: Tensor, teacher: Tensor, target: Mapping[str, Tensor] | None = None) -> Tensor:
        """student, teacher: [B,C,H,W]. Computed in float32. Raises ValueError on other shapes."""
        same_shape(student, teacher, "map")
        log_s = F.log_softmax(student.float().flatten(2) / self.tau, dim=2)
        log_t = F.log_softmax(teacher.float().flatten(2) / self.tau, dim=2)
        total = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        return self.tau**2 * total / (student.shape[0] * student.shape[1])
