"""Semantic segmentation: a light head on the finest pyramid level, cross-entropy, mIoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import IGNORE
from ..metrics.miou import MeanIoU
from .base import TASKS, Task


class SegHead(nn.Module):
    """Pyramid levels -> logits [B,classes,H/s,W/s] at the finest stride s.

    depth: 3x3 convolutions before the classifier.
    """

    def __init__(self, width: int, levels: Sequence[int], classes: int, *, depth: int = 1):
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth: {depth} is below 0")
        self.strides = (min(levels),)
        block = lambda: nn.Sequential(  # noqa: E731
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.tower = nn.Sequential(*(block() for _ in range(depth)))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, levels: Mapping[int, Tensor]) -> Tensor:
        return self.classifier(self.tower(levels[self.strides[0]]))


def class_counts(mask: Tensor, classes: int, height: int, width: int) -> Tensor:
    """How many pixels of each class lie in each cell: mask long [B,H,W], IGNORE not counted -> float [B,classes,height,width]."""
    rows = torch.arange(mask.shape[1], device=mask.device) * height // mask.shape[1]
    columns = torch.arange(mask.shape[2], device=mask.device) * width // mask.shape[2]
    cell = rows[:, None] * width + columns
    kind = mask.masked_fill(mask == IGNORE, classes)
    counts = torch.zeros(len(mask), (classes + 1) * height * width, device=mask.device)
    counts.scatter_add_(
        1, (kind * (height * width) + cell).flatten(1), torch.ones((), device=mask.device).expand(mask.shape).flatten(1)
    )
    return counts.view(len(mask), classes + 1, height, width)[:, :classes]


@TASKS.register("seg")
class Segmentation(Task):
    """Cross-entropy over labelled pixels.

    resolution: "head" holds every pixel against the logits of the cell it lies in, at the cost of the head's stride; "image"
    upsamples the logits first (tens of times the cost and memory).
    label_smoothing: in [0, 1).
    """

    name = "seg"
    Head = SegHead
    weights = {"ce": 1.0}
    main_metric = "mIoU"
    headline = ("mIoU",)

    def __init__(
        self,
        classes: tuple[str, ...],
        strides: tuple[int, ...],
        *,
        resolution: str = "head",
        label_smoothing: float = 0.0,
    ):
        super().__init__(classes, strides)
        if resolution not in ("head", "image"):
            raise ValueError(f"resolution: '{resolution}' is neither 'head' nor 'image'")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not in [0, 1)")
        self.resolution = resolution
        self.label_smoothing = label_smoothing

    def losses(self, pred: Tensor, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """pred: logits [B,C,h,w]; target: ``mask`` uint8 [B,H,W], ``labelled`` [B]. Zero when nothing is labelled."""
        logits = pred.float()
        mask = target["mask"].long().masked_fill(~target["labelled"][:, None, None], IGNORE)
        if self.resolution == "image":
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            total = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="sum", label_smoothing=self.label_smoothing)
            return {"ce": total / (mask != IGNORE).sum().clamp(min=1)}
        counts = class_counts(mask, logits.shape[1], *logits.shape[2:])
        pixels = counts.sum(1, keepdim=True)
        targets = (1 - self.label_smoothing) * counts + self.label_smoothing * pixels / logits.shape[1]
        total = -(targets * F.log_softmax(logits, dim=1)).sum()
        return {"ce": total / pixels.sum().clamp(min=1)}

    def decode(self, pred: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [B,C,h,w] -> logits [B,C,H,W]; the class is chosen after ``restore``, at the original size."""
        return F.interpolate(pred.float(), size=size, mode="bilinear", align_corners=False)

    def restore(self, decoded: Tensor, geometry: Any) -> Tensor:
        """Logits [C,H,W] of a letterboxed image -> class indices uint8 [h,w] at the original size."""
        height, width = geometry.content
        logits = decoded[None, :, :height, :width]
        if (height, width) != geometry.original:
            logits = F.interpolate(logits, size=geometry.original, mode="bilinear", align_corners=False)
        return logits[0].max(0).indices.to(torch.uint8)  # as argmax, four times faster on CPU

    def metric(self) -> MeanIoU:
        return MeanIoU(self.classes)

    def score(self, metric: MeanIoU, prediction: Tensor, truth: Any) -> None:
        if truth.mask is not None:
            metric.update(prediction.cpu().numpy(), truth.mask)
