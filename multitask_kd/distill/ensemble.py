"""What several teachers of one task say together: the mean of their probabilities, each class over those that know it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from ..batch import PaddedDetections
from .class_mapping import SAME_OBJECT, UNKNOWN, logit

Known = Sequence[Sequence[int]]  # of each teacher, the student's classes that it knows


def mean_maps(words: Sequence[Tensor], silent: Sequence[Tensor | None], known: Known) -> tuple[Tensor, Tensor | None]:
    """Logits [B,C,h,w] of each teacher, at the finest one's height and width -> log of the mean probability, and ``silent``."""
    goal = max((w.shape[2:] for w in words), key=lambda s: s[0] * s[1])
    words = [w if w.shape[2:] == goal else F.interpolate(w.float(), size=goal, mode="bilinear") for w in words]
    quiet = [_quiet(s, words[0][:, 0]) for s in silent]
    speaks = torch.stack(
        [_knows(w.shape[1], k, w)[:, None, None] * ~q[:, None] for w, k, q in zip(words, known, quiet, strict=True)]
    )
    p = torch.stack([w.float().softmax(1) for w in words])
    mean = (p * speaks).sum(0) / speaks.sum(0).clamp(min=1)
    mean = mean / mean.sum(1, keepdim=True).clamp(min=1e-6)
    said = torch.where(speaks.any(0), mean.clamp(min=1e-8).log(), UNKNOWN)
    return said, _all_silent(silent, quiet)


def mean_cells(words: Sequence[Tensor], silent: Sequence[Tensor | None], known: Known) -> tuple[Tensor, Tensor | None]:
    """Raw outputs [B,N,4+1+C] of the same cells -> raw outputs, and ``silent`` bool [B,N].

    Boxes: the mean by confidence. Scores (objectness * class): the mean over the teachers that know the class. Objectness: the
    mean over those that know the class of the highest score; classes: scores divided by it. For a teacher takes objects of a class
    that it lacks for background, and its classes mean nothing on background.
    """
    quiet = [_quiet(s, words[0][..., 0]) for s in silent]
    speaks = torch.stack([~q for q in quiet]).float()  # [T,B,N]
    raw = torch.stack([w.float() for w in words])
    objectness, classes = raw[..., 4].sigmoid(), raw[..., 5:].sigmoid()
    sure = (objectness * classes.amax(-1) + 1e-6) * speaks
    boxes = (raw[..., :4] * sure[..., None]).sum(0) / sure.sum(0).clamp(min=1e-6)[..., None]
    knows = speaks[..., None] * torch.stack([_knows(classes.shape[-1], k, raw) for k in known])[:, None, None]
    count = knows.sum(0).clamp(min=1)
    score = (objectness[..., None] * classes * knows).sum(0) / count  # [B,N,C]
    there = (objectness[..., None] * knows).sum(0) / count
    there = there.gather(-1, score.argmax(-1, keepdim=True))
    kinds = torch.where(knows.any(0), logit(score / there.clamp(min=1e-30)), UNKNOWN)
    return torch.cat([boxes, logit(there), kinds], dim=-1), _all_silent(silent, quiet)


def mean_found(words: Sequence[PaddedDetections], known: Known) -> PaddedDetections:
    """Detections of each teacher -> one for every object: boxes averaged by score; score: the mean over the teachers that know the
    class, 0 for one that did not see it."""
    return PaddedDetections.padded([_merged([PaddedDetections(*(t[i] for t in w)) for w in words], known) for i in range(len(words[0].boxes))])


def _merged(words: Sequence[PaddedDetections], known: Known) -> PaddedDetections:
    """The detections of one image."""
    boxes, scores, classes = (torch.cat([getattr(w, key) for w in words]) for key in PaddedDetections._fields)
    teacher = torch.cat([torch.full_like(w.classes, k) for k, w in enumerate(words)])
    there = classes >= 0
    boxes, scores, classes, teacher = boxes[there].float(), scores[there].float(), classes[there], teacher[there]
    if not len(scores):
        return PaddedDetections(boxes, scores, classes)
    keep = batched_nms(boxes, scores, classes, SAME_OBJECT)
    iou = box_iou(boxes[keep], boxes) * (classes[keep][:, None] == classes)
    own = iou.argmax(0)  # the object that each detection is of
    of = own == torch.arange(len(keep), device=own.device)[:, None]
    weight = of * scores
    best = torch.stack([(weight * (teacher == k)).amax(1) for k in range(len(words))]).sum(0)  # a teacher counts once an object
    count = torch.tensor([sum(int(c) in k for k in known) for c in classes[keep].tolist()], device=scores.device)
    mean = (weight[..., None] * boxes).sum(1) / weight.sum(1, keepdim=True).clamp(min=1e-9)
    score = best / count.clamp(min=1)
    order = score.argsort(descending=True, stable=True)
    return PaddedDetections(mean[order], score[order], classes[keep][order])


def _quiet(silent: Tensor | None, like: Tensor) -> Tensor:
    """Where a teacher says nothing, as bool of the shape of ``like`` [B,h,w] or [B,N]; None: nowhere."""
    if silent is None:
        return torch.zeros_like(like, dtype=torch.bool)
    if silent.shape[1:] != like.shape[1:]:
        silent = F.interpolate(silent[:, None].float(), size=like.shape[1:], mode="nearest")[:, 0] > 0
    return silent


def _all_silent(silent: Sequence[Tensor | None], quiet: Sequence[Tensor]) -> Tensor | None:
    """Where no teacher says anything; None where each of them speaks everywhere. quiet: ``_quiet`` of ``silent``."""
    return torch.stack(list(quiet)).all(0) if any(s is not None for s in silent) else None


def _knows(classes: int, known: Sequence[int], like: Tensor) -> Tensor:
    """bool [C]: the classes that a teacher knows."""
    found = torch.zeros(classes, dtype=torch.bool, device=like.device)
    found[list(known)] = True
    return found
