"""Class names of a teacher -> those of the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

UNKNOWN = -1e4  # logit of a class that the teacher does not know
SURE = 1e-4  # probabilities are clamped this far from 0 and 1 before they become logits


def logit(p: Tensor) -> Tensor:
    """Probabilities -> logits, float32: in half precision 1 - SURE is 1."""
    return p.float().clamp(SURE, 1 - SURE).logit()


class ClassMapping:
    """Maps a teacher's classes to the student's, by name or by an explicit map; several may be merged into
    one.

    sources: for each class of the student, the indices of the teacher's classes that are mapped to it. known:
    indices of the student's classes that have a source, rising; extra: indices of the teacher's classes that
    are mapped to none; same: whether both have the same classes in the same order.
    Raises ValueError for a name in the map that is no class, and where no class is shared.
    """

    def __init__(
        self, theirs: Sequence[str], ours: Sequence[str], names: Mapping[str, str | None] | None = None
    ):
        names = dict(names or {})
        if unknown := [n for n in names if n not in theirs]:
            raise ValueError(f"the teacher has no class '{unknown[0]}'; it has {', '.join(theirs)}")
        if unknown := [n for n in names.values() if n is not None and n not in ours]:
            raise ValueError(f"the student has no class '{unknown[0]}'; it has {', '.join(ours)}")
        mapped = [names.get(n, n) for n in theirs]
        self.theirs, self.ours = tuple(theirs), tuple(ours)
        self.sources = [[i for i, n in enumerate(mapped) if n == own] for own in ours]
        self.known = tuple(i for i, found in enumerate(self.sources) if found)
        self.extra = [i for i, n in enumerate(mapped) if n not in ours]
        self.same = self.sources == [[i] for i in range(len(theirs))] and not self.extra
        if not self.known:
            raise ValueError(
                f"none of the teacher's classes ({', '.join(theirs)}) is one of the student's "
                f"({', '.join(ours)})"
            )

    @property
    def unknown(self) -> list[str]:
        """The student's classes that the teacher does not know."""
        return [name for i, name in enumerate(self.ours) if i not in self.known]

    @property
    def unused(self) -> list[str]:
        """The teacher's classes that are mapped to none of the student's."""
        return [self.theirs[i] for i in self.extra]
