"""Lesson: what a teacher says of one task, in the student's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import PAD, Dense, Found

UNKNOWN = -1e4  # logit of a class that the teacher does not know
SURE = 1e-4  # probabilities are kept so far from 0 and 1 when they become logits


def logit(p: Tensor) -> Tensor:
    return p.clamp(SURE, 1 - SURE).logit()


class Lesson:
    """Class names of a teacher -> those of the student, by name or by an explicit map; several may become one.

    known: the student's classes that the teacher knows, rising. silent: where it says nothing, because what it sees is none of
    the student's classes. Raises ValueError for a name in the map that is no class, and where no class meets.
    """

    def __init__(self, theirs: Sequence[str], ours: Sequence[str], names: Mapping[str, str | None] | None = None):
        names = dict(names or {})
        if unknown := [n for n in names if n not in theirs]:
            raise ValueError(f"the teacher has no class '{unknown[0]}'; it has {', '.join(theirs)}")
        if unknown := [n for n in names.values() if n is not None and n not in ours]:
            raise ValueError(f"the student has no class '{unknown[0]}'; it has {', '.join(ours)}")
        told = [names.get(n, n) for n in theirs]
        self.theirs, self.ours = tuple(theirs), tuple(ours)
        self.sources = [[i for i, n in enumerate(told) if n == own] for own in ours]
        self.known = tuple(i for i, found in enumerate(self.sources) if found)
        self.extra = [i for i, n in enumerate(told) if n not in ours]
        self.same = self.sources == [[i] for i in range(len(theirs))] and not self.extra
        if not self.known:
            raise ValueError(f"none of the teacher's classes ({', '.join(theirs)}) is one of the student's ({', '.join(ours)})")

    def __call__(self, said: Any) -> tuple[Any, Tensor | None]:
        """seg logits [B,C,h,w], det cells [B,N,4+1+C], ``Dense`` or ``Found`` -> the same in the student's classes, and ``silent``.

        Merged classes have the sum of their probabilities.
        """
        if self.same:
            return said, None
        if isinstance(said, Found):
            return self._found(said), None
        if isinstance(said, Dense):
            return said._replace(scores=self._summed(said.scores)), None
        if said.dim() == 4:
            return self._map(said)
        return self._cells(said), None

    def _map(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits.float()
        parts = [logits[:, found].logsumexp(1) if found else torch.full_like(logits[:, 0], UNKNOWN) for found in self.sources]
        best = logits.argmax(1)
        silent = torch.isin(best, torch.tensor(self.extra, device=best.device)) if self.extra else None
        return torch.stack(parts, dim=1), silent

    def _cells(self, raw: Tensor) -> Tensor:
        """An object of a class that the student does not have is none for it: objectness falls with that class's share."""
        raw = raw.float()
        p = raw[..., 5:].sigmoid()
        ours = logit(self._summed(p))
        ours[..., [i for i, found in enumerate(self.sources) if not found]] = UNKNOWN
        objectness = raw[..., 4:5]
        if self.extra:
            best = p[..., [i for found in self.sources for i in found]].amax(-1, keepdim=True)
            objectness = logit(objectness.sigmoid() * best / p.amax(-1, keepdim=True).clamp(min=SURE))
        return torch.cat([raw[..., :4], objectness, ours], dim=-1)

    def _summed(self, p: Tensor) -> Tensor:
        """Probabilities [...,theirs] -> [...,ours]."""
        return torch.stack([p[..., found].sum(-1) if found else torch.zeros_like(p[..., 0]) for found in self.sources], -1).clamp(
            max=1
        )

    def _found(self, said: Found) -> Found:
        table = torch.full((len(self.theirs) + 1,), PAD, dtype=torch.long, device=said.classes.device)
        for own, found in enumerate(self.sources):
            table[found] = own
        classes = table[torch.where(said.classes < 0, len(self.theirs), said.classes)]
        return Found(said.boxes, said.scores * (classes >= 0), classes)
