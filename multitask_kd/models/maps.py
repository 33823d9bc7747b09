"""Operations on class logits [B,C,...] (maps or vectors) and their ignore masks: resizing, mapping of
classes, averaging of several teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .class_mapping import UNKNOWN, ClassMapping


def resized(student: Tensor, teacher: Tensor, size: str) -> tuple[Tensor, Tensor]:
    """Two maps [B,C,h,w] at one height and width: averaged where they shrink, bilinear where they grow.

    size: whose height and width both get: "student", "teacher" or "smaller".
    """
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


def mask_at(ignore_mask: Tensor, size: Sequence[int]) -> Tensor:
    """An ignore mask, bool [B,h,w], at another height and width: a cell is ignored where any part of it
    is."""
    size = tuple(size)
    if tuple(ignore_mask.shape[1:]) == size:
        return ignore_mask
    if ignore_mask.shape[1] >= size[0]:
        return F.adaptive_max_pool2d(ignore_mask[:, None].float(), size)[:, 0] > 0
    return F.interpolate(ignore_mask[:, None].float(), size=size, mode="nearest")[:, 0] > 0


def mapped_logits(logits: Tensor, mapping: ClassMapping) -> tuple[Tensor, Tensor | None]:
    """Logits [B,C,...] of a teacher's classes -> those of the student's, float32, and the ignore mask
    [B,...].

    Merged classes have the sum of their probabilities. A position is ignored where the teacher's likeliest
    class is none of the student's; None: no position is ignored.
    """
    logits = logits.float()
    parts = [
        logits[:, found].logsumexp(1) if found else torch.full_like(logits[:, 0], UNKNOWN)
        for found in mapping.sources
    ]
    mapped = torch.stack(parts, dim=1)
    return mapped, logits[:, mapping.extra].amax(1) > mapped.amax(1) if mapping.extra else None


def mean_logits(
    preds: Sequence[Tensor], ignore_masks: Sequence[Tensor | None], known: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor | None]:
    """Logits [B,C,...] of each teacher -> log of the mean probability, each class over the teachers that know
    it and do not ignore the position; and the mask of positions that all of them ignore. Maps are resized to
    the finest one's height and width."""
    goal = max((p.shape[2:] for p in preds), key=math.prod)
    if len(goal) == 2:
        preds = [
            p if p.shape[2:] == goal else F.interpolate(p.float(), size=goal, mode="bilinear") for p in preds
        ]
    ignored = [ignored_places(m, preds[0][:, 0]) for m in ignore_masks]
    counts = torch.stack(
        [
            knows(p.shape[1], k, p).view(1, -1, *[1] * len(goal)) & ~q[:, None]
            for p, k, q in zip(preds, known, ignored, strict=True)
        ]
    )
    p = torch.stack([p.float().softmax(1) for p in preds])
    mean = (p * counts).sum(0) / counts.sum(0).clamp(min=1)
    mean = mean / mean.sum(1, keepdim=True).clamp(min=1e-6)
    merged = torch.where(counts.any(0), mean.clamp(min=1e-8).log(), UNKNOWN)
    return merged, ignored_by_all(ignore_masks, ignored)


def ignored_places(ignore_mask: Tensor | None, like: Tensor) -> Tensor:
    """An ignore mask as bool of the shape of ``like`` ([B,h,w], [B,N] or [B]); None: nowhere."""
    if ignore_mask is None:
        return torch.zeros_like(like, dtype=torch.bool)
    if ignore_mask.shape[1:] != like.shape[1:]:
        ignore_mask = (
            F.interpolate(ignore_mask[:, None].float(), size=like.shape[1:], mode="nearest")[:, 0] > 0
        )
    return ignore_mask


def ignored_by_all(ignore_masks: Sequence[Tensor | None], ignored: Sequence[Tensor]) -> Tensor | None:
    """Where every teacher ignores the position; None where no teacher has a mask. ignored: ``ignored_places``
    of the masks."""
    return torch.stack(list(ignored)).all(0) if any(m is not None for m in ignore_masks) else None


def ignored_by_either(ignore_mask: Tensor | None, other: Tensor) -> Tensor:
    """Where one of two ignore masks of equal shape ignores the position; None: the first ignores nothing."""
    return other if ignore_mask is None else ignore_mask | other


def of_classes(student: Tensor, teacher: Tensor, known: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The logits [B,C,...] of both of the classes ``known`` alone."""
    at = torch.tensor(list(known), device=student.device)
    return student.index_select(1, at), teacher.index_select(1, at)


def knows(classes: int, known: Sequence[int], like: Tensor) -> Tensor:
    """bool [C]: the classes that a teacher knows, on the device of ``like``."""
    found = torch.zeros(classes, dtype=torch.bool, device=like.device)
    found[list(known)] = True
    return found
