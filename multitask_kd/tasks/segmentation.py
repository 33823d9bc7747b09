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
        self.strides = (min(levels),)
        block = lambda: nn.Sequential(  # noqa: E731
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.tower = nn.Sequential(*(block() for _ in range(depth)))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, levels: Mapping[int, Tensor]) -> Tensor:
        return self.classifier(self.tower(levels[self.strides[0]]))


def mask_at(mask: Tensor, height: int, width: int) -> Tensor:
    """Nearest-neighbour subsampling of mask [B,H,W] to [B,height,width]: the pixel at each cell's centre."""
    if mask.shape[1:] == (height, width):
        return mask
    rows = ((torch.arange(height, device=mask.device) + 0.5) * (mask.shape[1] / height)).long()
    columns = ((torch.arange(width, device=mask.device) + 0.5) * (mask.shape[2] / width)).long()
    return mask[:, rows[:, None], columns]


@TASKS.register("seg")
class Segmentation(Task):
    """Cross-entropy over labelled pixels.

    resolution: "head" computes the loss at the logits' own stride (a 35th of the cost and memory), "image" upsamples the
    logits first.
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
        """pred: logits [B,C,h,w]; target: ``mask`` [B,H,W], ``labelled`` [B]. Zero when nothing is labelled."""
        logits = pred.float()
        if self.resolution == "image":
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        mask = mask_at(target["mask"], *logits.shape[2:])
        mask = mask.masked_fill(~target["labelled"][:, None, None], IGNORE)
        total = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="sum", label_smoothing=self.label_smoothing)
        return {"ce": total / (mask != IGNORE).sum().clamp(min=1)}

    def decode(self, pred: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [B,C,h,w] -> logits [B,C,H,W]; the class is chosen after ``restore``, at the original size."""
        return F.interpolate(pred.float(), size=size, mode="bilinear", align_corners=False)

    def restore(self, decoded: Tensor, geometry: Any) -> Tensor:
        """Logits [C,H,W] of a letterboxed image -> class indices uint8 [h,w] at the original size."""
        height, width = geometry.content
        logits = decoded[None, :, :height, :width]
        if (height, width) != geometry.original:
            logits = F.interpolate(logits, size=geometry.original, mode="bilinear", align_corners=False)
        return logits[0].argmax(0).to(torch.uint8)

    def metric(self) -> MeanIoU:
        return MeanIoU(self.classes)

    def score(self, metric: MeanIoU, prediction: Tensor, truth: Any) -> None:
        if truth.mask is not None:
            metric.update(prediction.cpu().numpy(), truth.mask)
