"""Temperature KL between two classifications (Hinton et al., 2015)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import IGNORE
from .base import LOSSES, SoftLoss, check_temperature, same_shape


@LOSSES.register("kl")
class KL(SoftLoss):
    """T^2 * KL(softmax(t/T) || softmax(s/T)), T the temperature, over the class dimension of [B,C,H,W] or
    [B,C].

    reduction: "pixel" divides by the number of counted pixels (the scale of cross-entropy), "mean" by all
    elements B*C*H*W (C times weaker), "batchmean" by B only (H*W times stronger).
    skip_ignored: leave out pixels that the label of a labelled image marks as ignored.
    confidence: leave out pixels (or images) where the teacher's likeliest class has a lower probability, in
    [0, 1).
    """

    kinds = ("semantic", "classification")
    scheduled = ("temperature",)

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        reduction: str = "pixel",
        skip_ignored: bool = False,
        confidence: float = 0.0,
    ):
        super().__init__()
        check_temperature("temperature", temperature)
        if reduction not in ("pixel", "mean", "batchmean"):
            raise ValueError(f"reduction: '{reduction}' is none of pixel, mean, batchmean")
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence: {confidence} is not in [0, 1)")
        self.temperature, self.confidence = temperature, confidence
        self.reduction = reduction
        self.skip_ignored = skip_ignored

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """student, teacher: logits of equal shape. Computed in float32. Raises ValueError on other shapes."""
        same_shape(student, teacher, "logits")
        log_s = F.log_softmax(student.float() / self.temperature, dim=1)
        log_t = F.log_softmax(teacher.float() / self.temperature, dim=1)
        per_pixel = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
        counts = self._counts(per_pixel, teacher, target, mask)
        counted = per_pixel.numel()
        if counts is not None:
            per_pixel = per_pixel * counts
            counted = counts.sum().clamp(min=1)
        pixels = per_pixel[0].numel()
        divisor = {"pixel": counted, "mean": counted * student.shape[1], "batchmean": counted / pixels}[
            self.reduction
        ]
        return per_pixel.sum() / divisor * self.temperature**2

    def _counts(
        self, per_pixel: Tensor, teacher: Tensor, target: Mapping[str, Tensor] | None, mask: Tensor | None
    ) -> Tensor | None:
        """How much of each pixel counts, in [0, 1]; None: all of each."""
        counts = None if mask is None else mask.float()
        if self.confidence:
            sure = (teacher.float().softmax(1).amax(1) >= self.confidence).float()
            counts = sure if counts is None else counts * sure
        if self.skip_ignored and target is not None and "mask" in target:
            known = F.adaptive_avg_pool2d(
                (target["mask"] != IGNORE).float(), per_pixel.shape[1:]
            )  # share of each cell
            known = torch.where(target["labelled"][:, None, None], known, 1.0)
            counts = known if counts is None else counts * known
        return counts
