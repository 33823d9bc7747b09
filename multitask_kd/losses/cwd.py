"""Channel-wise distillation (Shu et al., ICCV 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .base import LOSSES, SoftLoss, check_temperature, same_shape

NOWHERE = -1e9  # logit of a position that is masked out: it has no share of a softmax


@LOSSES.register("cwd")
class CWD(SoftLoss):
    """tau^2 / (B*C) * sum over images and channels of KL(softmax(t/tau) || softmax(s/tau)), the softmax over
    the H*W positions.

    On segmentation logits or on features; features are normalised first, each channel over the batch.
    tau: temperature; the higher, the more positions of a channel count.
    """

    kinds = ("semantic",)
    maps = True
    norm = True
    scheduled = ("tau",)

    def __init__(self, *, tau: float = 1.0):
        super().__init__()
        check_temperature("tau", tau)
        self.tau = tau

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """student, teacher: [B,C,H,W]. Computed in float32. Raises ValueError on other shapes."""
        same_shape(student, teacher, "map")
        student, teacher = student.float().flatten(2) / self.tau, teacher.float().flatten(2) / self.tau
        if mask is not None:
            return self._masked(student, teacher, mask.flatten(1)[:, None])
        log_s, log_t = F.log_softmax(student, dim=2), F.log_softmax(teacher, dim=2)
        total = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        return self.tau**2 * total / (student.shape[0] * student.shape[1])

    def _masked(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Softmax over only the positions of ``mask`` [B,1,H*W]; an image without any counts in neither sum
        nor divisor."""
        log_s, log_t = (F.log_softmax(x.masked_fill(~mask, NOWHERE), dim=2) for x in (student, teacher))
        each = (log_t.exp() * (log_t - log_s)).masked_fill(~mask, 0.0).sum((1, 2))
        images = mask.any(2)[:, 0]
        return self.tau**2 * (each * images).sum() / (images.sum().clamp(min=1) * student.shape[1])
