"""What flows through a step: ``Batch`` (images and labels) and ``View`` (what a model shows a loss)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = 255  # mask value that no loss and no metric counts
PAD = -1  # class of a row of boxes that is only padding
CROWD = -2  # class of a box that marks a crowd: neither object nor background

Targets = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """One padded batch; nothing downstream loops over images.

    images: float [B,3,H,W], RGB in [0,1]; each model normalises for itself.
    targets: by task; a task that is missing is labelled in no image of the batch.
        seg: ``mask`` uint8 [B,H,W] (IGNORE is not counted), ``labelled`` bool [B];
        det: ``boxes`` float [B,M,4] x1,y1,x2,y2 in pixels of the batch, ``classes`` long [B,M] (PAD, CROWD), ``labelled`` bool [B].
    indices: long [B], the images' places in their data set.
    truths: evaluation only: one ``Truth`` an image, labels at the original size. Stays on the host.
    """

    images: Tensor
    targets: Targets = field(default_factory=dict)
    indices: Tensor | None = None
    truths: list[Any] | None = None

    def to(self, device: torch.device, *, channels_last: bool = False) -> Batch:
        """The batch on ``device``. uint8 images travel as bytes and become float [0,1] there."""
        images = self.images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        # images leave the loader as [B,H,W,C] in memory, which is channels_last: the other layout needs a copy
        images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        targets = {task: {k: v.to(device, non_blocking=True) for k, v in target.items()} for task, target in self.targets.items()}
        return replace(self, images=images, targets=targets)

    def pin_memory(self) -> Batch:
        """In page-locked memory. The loader's pinning thread leaves classes without this method as they are."""
        targets = {task: {k: v.pin_memory() for k, v in target.items()} for task, target in self.targets.items()}
        return replace(self, images=self.images.pin_memory(), targets=targets)


@dataclass(frozen=True)
class View:
    """What any model, teacher or student, shows a loss.

    preds: ``seg`` logits [B,C,h,w]; ``det`` raw outputs [B,N,4+1+C].
    taps: features by dotted module path.
    """

    preds: dict[str, Tensor]
    taps: dict[str, Tensor] = field(default_factory=dict)
