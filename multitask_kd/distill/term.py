"""Term: a tap on the student, a tap on the teacher, what brings them together, and the loss between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses.base import SoftLoss
from .teacher_geometry import TeacherGeometry

MOST_PREFIX = 16  # class and register tokens before those of places


class Term(nn.Module):
    """``forward(student tap, teacher tap)`` -> unweighted scalar. What it learns (alignment, a loss's generator) learns with it.

    student, teacher: dotted module paths. channels: of the two taps, as maps. align: a learnt 1x1 convolution brings the student's
    map to the teacher's channels. norm: both maps are normalised (BatchNorm without weights) before the loss.
    size: which map's height and width both get: "smaller", "student" or "teacher". What of it a config means by "auto" is decided
    in build_distill.py. task: whose predictions the taps are, where they are compared as they are. sight: how the teacher sees the
    images, where its input has another size than the student's.
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
        sight: TeacherGeometry | None = None,
    ):
        super().__init__()
        self.sight = sight
        self.student, self.teacher, self.size, self.task = student, teacher, size, task
        self.loss = loss
        self.align = nn.Conv2d(*channels, 1, bias=False) if align else nn.Identity()
        self.norms = None
        if norm:
            bare = {"affine": False, "track_running_stats": False}
            self.norms = nn.ModuleList([nn.BatchNorm2d(channels[1], **bare) for _ in range(2)])

    def forward(
        self, student: Any, teacher: Any, image_size: tuple[int, int], target: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        if self.task:  # predictions of one task: nothing to align, labels may say what to leave out
            return self.loss(student, teacher.detach(), target)
        s, t = self.maps(student, teacher, image_size)
        s, t = resized(self.align(s), t.detach(), self.size)
        if self.norms is not None:
            s, t = self.norms[0](s), self.norms[1](t)
        return self.loss(s, t)

    def maps(self, student: Tensor, teacher: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Both taps as maps [B,C,H,W] of the same images."""
        if self.sight is None:
            return as_map(student, image_size), as_map(teacher, image_size)
        return as_map(student, image_size), self.sight.back(as_map(teacher, self.sight.own))


def as_map(tap: Tensor, image_size: tuple[int, int]) -> Tensor:
    """A map [B,C,H,W] as it is; tokens [B,N,C] (class and register tokens left out) and maps [B,H,W,C] as one.

    Raises ValueError for what is none of them.
    """
    if not isinstance(tap, Tensor):
        raise ValueError(f"puts out a {type(tap).__name__}, not one tensor; tap a module inside it")
    if tap.dim() == 4:
        last = _is_grid(tap.shape[1:3], image_size) and not _is_grid(tap.shape[2:4], image_size)
        return tap.permute(0, 3, 1, 2) if last else tap
    if tap.dim() == 3:
        height, width = grid(tap.shape[1], image_size)
        return tap[:, tap.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))
    raise ValueError(f"puts out {list(tap.shape)}: neither a map [B,C,H,W] nor tokens [B,N,C]")


def _is_grid(shape: torch.Size, image_size: tuple[int, int]) -> bool:
    """Do square patches of the image make a map of this height and width?"""
    return shape[0] * image_size[1] == shape[1] * image_size[0] and image_size[0] % shape[0] == 0


def grid(tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the places that ``tokens`` tokens cover: the finest grid of square patches that fits the image.

    Raises ValueError where no patch size leaves at most 16 tokens over.
    """
    height, width = image_size
    for stride in range(1, math.gcd(height, width) + 1):
        places = (height // stride) * (width // stride)
        if height % stride == 0 and width % stride == 0 and 0 <= tokens - places <= MOST_PREFIX:
            return height // stride, width // stride
    raise ValueError(f"puts out {tokens} tokens, which are no grid of square patches of {height}x{width} pixels")


def resized(student: Tensor, teacher: Tensor, size: str) -> tuple[Tensor, Tensor]:
    """Both maps at one height and width: averaged where they shrink, bilinear where they grow."""
    own, other = student.shape[2:], teacher.shape[2:]
    if own == other:
        return student, teacher
    goal = {"student": own, "teacher": other, "smaller": min(own, other, key=math.prod)}[size]
    return _to(student, goal), _to(teacher, goal)


def _to(x: Tensor, goal: torch.Size) -> Tensor:
    if x.shape[2:] == goal:
        return x
    if x.shape[2] >= goal[0] and x.shape[3] >= goal[1]:
        return F.adaptive_avg_pool2d(x, goal)
    return F.interpolate(x, size=goal, mode="bilinear", align_corners=False)
