"""How a batch is resized for a teacher with its own input size, and where its predictions lie in the
student's images."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..batch import GREY, Batch


@dataclass(frozen=True)
class TeacherGeometry:
    """student, own: (H, W) in pixels of the student's images and of the teacher's input. The images lie at
    its top left corner."""

    student: tuple[int, int]
    own: tuple[int, int]

    @property
    def same(self) -> bool:
        return self.student == self.own

    @property
    def scale(self) -> float:
        """Pixels of the teacher's input per pixel of the student's."""
        return min(o / s for o, s in zip(self.own, self.student, strict=True))

    @property
    def content(self) -> tuple[int, int]:
        """(H, W) of the images in the teacher's input."""
        return tuple(
            max(1, min(o, round(s * self.scale))) for o, s in zip(self.own, self.student, strict=True)
        )

    @property
    def sharper(self) -> bool:
        """Whether the teacher's input has a higher resolution than the student's images."""
        return self.scale > 1

    def images(self, batch: Batch) -> Tensor:
        """The teacher's input [B,3,*own]: the batch's ``teacher_images`` of that size where it has them, else
        its images resampled."""
        if self.same:
            return batch.images
        images = batch.teacher_images.get(self.content)
        if images is None:
            images = F.interpolate(
                batch.images,
                size=self.content,
                mode="bilinear",
                align_corners=False,
                antialias=self.scale < 1,
            )
        below, right = (o - c for o, c in zip(self.own, self.content, strict=True))
        return F.pad(images, (0, right, 0, below), value=GREY / 255) if below or right else images

    def cropped(self, maps: Tensor) -> Tensor:
        """A map [B,C,h,w] of the teacher's input -> the part of it that covers the images."""
        if self.same:
            return maps
        height, width = (
            max(1, round(n * c / o)) for n, c, o in zip(maps.shape[2:], self.content, self.own, strict=True)
        )
        return maps[:, :, :height, :width]
