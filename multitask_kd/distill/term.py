"""Term: a tap on the student, a tap on the teacher, their alignment, and the loss between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.base import SoftLoss
from ..models.maps import resized
from ..models.teacher_geometry import TeacherGeometry

MOST_PREFIX = 16  # the most class and register tokens before those of patches


class Term(nn.Module):
    """``forward(student tap, teacher tap)`` -> unweighted scalar. Its alignment and a loss's generator are
    trained with the student.

    student, teacher: dotted module paths. channels: of the two taps, as maps. align: a learnt 1x1 convolution
    brings the student's map to the teacher's channels. norm: both maps are normalised (BatchNorm without
    weights) before the loss.
    size: which map's height and width both get: "smaller", "student" or "teacher". build/distill.py resolves
    a config's "auto". task: the task whose predictions the taps are, where they are compared without
    alignment. geometry: how the images are resized for the teacher, where its input size differs from the
    student's.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        loss: SoftLoss,
        channels: tuple[int, int] | None,
        *,
        align: bool = True,
        norm: bool = False,
        size: str = "smaller",
        task: str | None = None,
        geometry: TeacherGeometry | None = None,
    ):
        super().__init__()
        self.geometry = geometry
        self.student, self.teacher, self.size, self.task = student, teacher, size, task
        self.loss = loss
        self.align = nn.Conv2d(*channels, 1, bias=False) if align else nn.Identity()
        self.norms = None
        if norm:
            bare = {"affine": False, "track_running_stats": False}
            self.norms = nn.ModuleList([nn.BatchNorm2d(channels[1], **bare) for _ in range(2)])

    def forward(
        self,
        student: Any,
        teacher: Any,
        image_size: tuple[int, int],
        target: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        if self.task:  # predictions of one task: nothing to align, and the loss may use its labels
            return self.loss(student, teacher.detach(), target)
        s, t = self.maps(student, teacher, image_size)
        s, t = resized(self.align(s), t.detach(), self.size)
        if self.norms is not None:
            s, t = self.norms[0](s), self.norms[1](t)
        return self.loss(s, t)

    def maps(self, student: Tensor, teacher: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Both taps as maps [B,C,H,W] of the same images."""
        if self.geometry is None:
            return as_map(student, image_size), as_map(teacher, image_size)
        return as_map(student, image_size), self.geometry.cropped(as_map(teacher, self.geometry.own))


def as_map(tap: Tensor, image_size: tuple[int, int]) -> Tensor:
    """A tap as a map [B,C,H,W]: a map [B,C,H,W] as it is, a map [B,H,W,C] permuted, tokens [B,N,C] rearranged
    without class and register tokens.

    Raises ValueError for anything else.
    """
    if not isinstance(tap, Tensor):
        raise ValueError(f"gives a {type(tap).__name__}, not one tensor; tap a module inside it")
    if tap.dim() == 4:
        last = _is_grid(tap.shape[1:3], image_size) and not _is_grid(tap.shape[2:4], image_size)
        return tap.permute(0, 3, 1, 2) if last else tap
    if tap.dim() == 3:
        height, width = grid(tap.shape[1], image_size)
        return tap[:, tap.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))
    raise ValueError(f"gives {list(tap.shape)}: neither a map [B,C,H,W] nor tokens [B,N,C]")


def _is_grid(shape: torch.Size, image_size: tuple[int, int]) -> bool:
    """Whether square patches of the image make a map of this height and width."""
    return shape[0] * image_size[1] == shape[1] * image_size[0] and image_size[0] % shape[0] == 0


def grid(tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the patches that ``tokens`` tokens stand for: the finest grid of square patches in
    the image.

    Raises ValueError where no patch size leaves at most 16 tokens over.
    """
    height, width = image_size
    for stride in range(1, math.gcd(height, width) + 1):
        patches = (height // stride) * (width // stride)
        if height % stride == 0 and width % stride == 0 and 0 <= tokens - patches <= MOST_PREFIX:
            return height // stride, width // stride
    raise ValueError(f"gives {tokens} tokens, which are no grid of square patches of {height}x{width} pixels")
