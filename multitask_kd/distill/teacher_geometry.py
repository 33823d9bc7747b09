"""Sight: how a teacher with an input size of its own sees a batch, and where what it says lies in the student's images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import PAD, Batch, DensePredictions, PaddedDetections

GREY = 114 / 255  # of padding, as in a letterbox


@dataclass(frozen=True)
class TeacherGeometry:
    """student, own: (H, W) in pixels of the student's images and of the teacher's input. The images lie at its top left corner."""

    student: tuple[int, int]
    own: tuple[int, int]

    @property
    def same(self) -> bool:
        return self.student == self.own

    @property
    def scale(self) -> float:
        """Pixels of the teacher's a pixel of the student's."""
        return min(o / s for o, s in zip(self.own, self.student, strict=True))

    @property
    def content(self) -> tuple[int, int]:
        """(H, W) of the images in the teacher's input."""
        return tuple(max(1, min(o, round(s * self.scale))) for o, s in zip(self.own, self.student, strict=True))

    @property
    def sharper(self) -> bool:
        """Whether the teacher can see more than the student's images hold."""
        return self.scale > 1

    def images(self, batch: Batch) -> Tensor:
        """What the teacher is shown: [B,3,*own], from the batch's views of that size where there are, else resampled."""
        if self.same:
            return batch.images
        images = batch.views.get(self.content)
        if images is None:
            images = F.interpolate(batch.images, size=self.content, mode="bilinear", align_corners=False, antialias=self.scale < 1)
        below, right = (o - c for o, c in zip(self.own, self.content, strict=True))
        return F.pad(images, (0, right, 0, below), value=GREY) if below or right else images

    def back(self, said: Any) -> Any:
        """A prediction in the student's pixels: a map [B,C,h,w] cut to the images, boxes and places scaled.

        Finished detections are cut to the images as labels are; one that lies outside is none.
        """
        if isinstance(said, PaddedDetections):
            height, width = self.student
            boxes = said.boxes.float() / self.scale
            boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
            seen = (boxes[..., 2:] > boxes[..., :2]).all(-1)
            return PaddedDetections(boxes, said.scores * seen, torch.where(seen, said.classes, PAD))
        if self.same:
            return said
        if isinstance(said, DensePredictions):
            lengths = {key: getattr(said, key) for key in ("boxes", "places", "strides")}
            return said._replace(**{key: value / self.scale for key, value in lengths.items() if value is not None})
        height, width = (max(1, round(n * c / o)) for n, c, o in zip(said.shape[2:], self.content, self.own, strict=True))
        return said[:, :, :height, :width]
