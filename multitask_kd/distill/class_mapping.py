"""Lesson: what a teacher says of one task, in the student's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import PAD, DensePredictions, PaddedDetections
from ..models.assign import pairwise_iou

UNKNOWN = -1e4  # logit of a class that the teacher does not know
SURE = 1e-4  # probabilities are kept so far from 0 and 1 when they become logits
SAME_OBJECT = 0.55  # IoU from which detections of one class are one object (Solovyev et al., 2021)


def logit(p: Tensor) -> Tensor:
    """Probabilities -> logits, float32: in half precision 1 - SURE is 1."""
    return p.float().clamp(SURE, 1 - SURE).logit()


class ClassMapping:
    """Class names of a teacher -> those of the student, by name or by an explicit map; several may become one.

    sources: of each class of the student, the teacher's that become it. known: the student's classes that have any, rising; extra:
    the teacher's that become none; same: whether nothing changes.
    Raises ValueError for a name in the map that is no class, and where no class meets.
    """

    def __init__(self, theirs: Sequence[str], ours: Sequence[str], names: Mapping[str, str | None] | None = None):
        names = dict(names or {})
        if unknown := [n for n in names if n not in theirs]:
            raise ValueError(f"the teacher has no class '{unknown[0]}'; it has {', '.join(theirs)}")
        if unknown := [n for n in names.values() if n is not None and n not in ours]:
            raise ValueError(f"the student has no class '{unknown[0]}'; it has {', '.join(ours)}")
        ours_of = [names.get(n, n) for n in theirs]
        self.theirs, self.ours = tuple(theirs), tuple(ours)
        self.sources = [[i for i, n in enumerate(ours_of) if n == own] for own in ours]
        self.known = tuple(i for i, found in enumerate(self.sources) if found)
        self.extra = [i for i, n in enumerate(ours_of) if n not in ours]
        self.same = self.sources == [[i] for i in range(len(theirs))] and not self.extra
        if not self.known:
            raise ValueError(f"none of the teacher's classes ({', '.join(theirs)}) is one of the student's ({', '.join(ours)})")

    @property
    def unknown(self) -> list[str]:
        """The student's classes that the teacher does not know."""
        return [name for i, name in enumerate(self.ours) if i not in self.known]

    @property
    def unused(self) -> list[str]:
        """The teacher's classes that become none of the student's."""
        return [self.theirs[i] for i in self.extra]

    def __call__(self, said: Any) -> tuple[Any, Tensor | None]:
        """seg logits [B,C,h,w], det cells [B,N,4+1+C], ``DensePredictions`` or ``PaddedDetections`` -> the same in the student's classes, and ``silent``.

        silent: bool [B,h,w], where the likeliest of the teacher's classes is none of the student's; None: nowhere.
        Merged classes have the sum of their probabilities; of finished detections of one object in several merged classes, the best
        is left.
        """
        if self.same:
            return said, None
        if isinstance(said, PaddedDetections):
            return self._found(said), None
        if isinstance(said, DensePredictions):
            return said._replace(scores=self._summed(said.scores)), None
        if said.dim() == 4:
            return self._map(said)
        return self._cells(said), None

    def _map(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits.float()
        parts = [logits[:, found].logsumexp(1) if found else torch.full_like(logits[:, 0], UNKNOWN) for found in self.sources]
        ours = torch.stack(parts, dim=1)
        return ours, logits[:, self.extra].amax(1) > ours.amax(1) if self.extra else None

    def _cells(self, raw: Tensor) -> Tensor:
        """An object of a class that the student does not have is none for it: where such a class is the likeliest, objectness falls
        by the ratio of the student's likeliest to it."""
        raw = raw.float()
        theirs, objectness = raw[..., 5:], raw[..., 4]
        p = theirs.sigmoid()
        summed = self._summed(p)
        ours = [torch.full_like(objectness, UNKNOWN)] * len(self.sources)
        for own, found in enumerate(self.sources):
            if found:
                ours[own] = theirs[..., found[0]] if len(found) == 1 else logit(summed[..., own])
        if self.extra:
            share = summed.amax(-1) / p[..., self.extra].amax(-1).clamp(min=1e-30)
            objectness = torch.where(share < 1, logit(objectness.sigmoid() * share), objectness)
        return torch.cat([raw[..., :4], torch.stack([objectness, *ours], dim=-1)], dim=-1)

    def _summed(self, p: Tensor) -> Tensor:
        """Probabilities [...,theirs] -> [...,ours]."""
        parts = [p[..., found].sum(-1) if found else torch.zeros_like(p[..., 0]) for found in self.sources]
        return torch.stack(parts, dim=-1).clamp(max=1)

    def _found(self, said: PaddedDetections) -> PaddedDetections:
        table = torch.full((len(self.theirs) + 1,), PAD, dtype=torch.long, device=said.classes.device)
        for own, found in enumerate(self.sources):
            table[found] = own
        classes = table[torch.where(said.classes < 0, len(self.theirs), said.classes)]
        if any(len(found) > 1 for found in self.sources):
            classes = torch.where(_repeated(said, classes), PAD, classes)
        return PaddedDetections(said.boxes, said.scores * (classes >= 0), classes)


def _repeated(said: PaddedDetections, merged: Tensor) -> Tensor:
    """Detections that a better one of another class shows too, now that both are of one class: bool [B,M]."""
    boxes, scores, classes = said.boxes.float(), said.scores, said.classes
    of_one = (merged[:, :, None] == merged[:, None]) & (classes[:, :, None] != classes[:, None])
    earlier = torch.ones(2 * scores.shape[1:], dtype=torch.bool, device=scores.device).tril(-1)
    better = (scores[:, None] > scores[:, :, None]) | ((scores[:, None] == scores[:, :, None]) & earlier)
    return (of_one & better & (pairwise_iou(boxes, boxes) >= SAME_OBJECT)).any(2)
