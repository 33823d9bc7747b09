"""Where student and teacher can be compared: the classes that both have, at one height and width, where the teacher speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import IGNORE
from ..models.dense_head import cells, unspoken_cells
from .term import resized


class Comparable:
    """For one task. known: the student's classes that the teachers know, None for all; strides: of the student's head."""

    def __init__(self, known: Sequence[int] | None, strides: tuple[int, ...]):
        self.known, self.strides = None if known is None else list(known), tuple(strides)

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        silent: Tensor | None,
        target: Mapping[str, Tensor] | None,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Predictions [B,C,h,w] or [B,N,4+1+C] of both -> those to compare.

        Where the teacher says nothing, it is given the student's own word, and the student's is held fast: no gradient comes from
        there, even through a softmax over places. A place of a class that it does not know is such a place: by the labels, and for
        cells also by what the student takes them for.
        """
        if student.dim() == 4 and teacher.shape[2:] != student.shape[2:]:
            _, teacher = resized(student, teacher, "student")
        if self.known is not None:
            unspoken = self._unspoken(student, target, size)
            silent = unspoken if silent is None else _like(silent, unspoken) | unspoken
            keep = self.known if student.dim() == 4 else [*range(5), *(5 + k for k in self.known)]
            axis = 1 if student.dim() == 4 else 2
            at = torch.tensor(keep, device=student.device)
            student, teacher = student.index_select(axis, at), teacher.index_select(axis, at)
        if silent is not None:
            silent = _like(silent, student[:, 0])[:, None] if student.dim() == 4 else silent[..., None]
            teacher = torch.where(silent, student.detach(), teacher)
            student = torch.where(silent, student.detach(), student)
        return student, teacher

    def _unspoken(self, student: Tensor, target: Mapping[str, Tensor] | None, size: tuple[int, int]) -> Tensor:
        if student.dim() == 3:
            centres, _ = cells(size, self.strides, student.device)
            return unspoken_cells(student.detach(), target, self.known, centres)
        if target is None:
            return torch.zeros_like(student[:, 0], dtype=torch.bool)
        unknown = torch.ones(256, dtype=torch.bool, device=student.device)
        unknown[[*self.known, IGNORE]] = False
        other = unknown[target["mask"].long()] & target["labelled"][:, None, None]
        return F.adaptive_max_pool2d(other[:, None].float(), student.shape[2:])[:, 0] > 0


def _like(silent: Tensor, other: Tensor) -> Tensor:
    """bool [B,h,w] at another height and width: a cell is silent where any of it is."""
    if silent.dim() == 2 or silent.shape[1:] == other.shape[1:]:
        return silent
    if silent.shape[1] >= other.shape[1]:
        return F.adaptive_max_pool2d(silent[:, None].float(), other.shape[1:])[:, 0] > 0
    return F.interpolate(silent[:, None].float(), size=other.shape[1:], mode="nearest")[:, 0] > 0
