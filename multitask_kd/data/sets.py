"""Several sets as one: each labels some of the tasks, and their classes meet by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..batch import IGNORE
from ..errors import UserError, did_you_mean
from .base import Layout, Sample


class Member(NamedTuple):
    """One set. place: where it stands in the config; tasks: those whose labels are used; rename: by task, its class names -> the
    run's, None leaves one out; part: (k, n), only the k-th of n disjoint random parts of its images."""

    layout: Layout
    place: str
    tasks: Sequence[str]
    rename: Mapping[str, Mapping[str, str | None]] = {}
    part: tuple[int, int] = (1, 1)


class Sets(Layout):
    """Named sets one after the other.

    All that label a task must have the same class names for it, in any order: an object that a set does not label is taken for
    background there. Raises UserError beginning with the place of the set.
    """

    def __init__(self, members: Mapping[str, Member], order: Mapping[str, Sequence[str]] | None = None):
        """order: by task, the order of its class names; that of the first set where these are others."""
        super().__init__()
        self.members, self._names = dict(members), list(members)
        self._images = [_part(m) for m in self.members.values()]
        self._starts = np.cumsum([0, *map(len, self._images)])
        named = {name: _renamed(m) for name, m in self.members.items()}
        for name, classes in named.items():
            for task, names in classes.items():
                own = tuple(dict.fromkeys(n for n in names if n is not None))
                asked = tuple((order or {}).get(task, ()))
                known = self.classes.setdefault(task, asked if set(asked) == set(own) else own)
                _require_same(task, self.members[name], own, known, self.members.values())
        self._tables = {
            name: {task: _table(task, names, self.classes[task]) for task, names in classes.items()}
            for name, classes in named.items()
        }
        self._untouched = {
            name for name, m in self.members.items() if {t: self.classes[t] for t in named[name]} == m.layout.classes == named[name]
        }
        self.faults = sum((m.layout.faults for m in self.members.values()), Counter())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, name: str) -> np.ndarray:
        """Where the images of a set lie among all."""
        place = self._names.index(name)
        return np.arange(self._starts[place], self._starts[place + 1])

    def set_of(self, index: int) -> str:
        """The name of the set that an image is of."""
        return self._names[self._place(index)[0]]

    def alone(self, name: str) -> Sets:
        """One of the sets, as it stands here."""
        return Sets({name: self.members[name]}, self.classes)

    def labels(self, name: str) -> tuple[str, ...]:
        """The tasks that a set labels."""
        return tuple(self._tables[name])

    def first(self, count: int | None) -> list[int]:
        """The first images of every set, ``count`` together by the sets' sizes, at least one of each; None: all."""
        if count is None or count >= len(self):
            return list(range(len(self)))
        counts = shared_out(max(count, len(self._names)), [len(images) for images in self._images])
        return [int(start) + k for start, n in zip(self._starts, counts, strict=False) for k in range(n)]

    def _place(self, index: int) -> tuple[int, int]:
        """Which set, and which image of its layout."""
        self._check_index(index)
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return which, int(self._images[which][index - self._starts[which]])

    def name(self, index: int) -> str:
        which, image = self._place(index)
        return self.members[self._names[which]].layout.name(image)

    def read(self, index: int) -> Sample:
        which, image = self._place(index)
        name = self._names[which]
        sample, tables = self.members[name].layout.read(image), self._tables[name]
        if name in self._untouched:
            return sample
        found = Sample(sample.image)
        if "seg" in tables and sample.mask is not None:
            found.mask = tables["seg"][sample.mask]
        if "det" in tables and sample.boxes is not None:
            classes = tables["det"][sample.classes]
            kept = classes >= 0
            found.boxes, found.classes = sample.boxes[kept], classes[kept]
            found.crowd, found.area = sample.crowd[kept], sample.area[kept]
        return found


def shared_out(places: int, weights: Sequence[float]) -> list[int]:
    """``places`` by weight in whole numbers, each at least 1: largest remainders, the earlier first."""
    exact = np.array(weights) / sum(weights) * places
    found = np.maximum(np.floor(exact), 1)
    while found.sum() < places:
        found[np.argmax(exact - found)] += 1
    while found.sum() > places:
        found[np.argmin(np.where(found > 1, exact - found, np.inf))] -= 1
    return [int(n) for n in found]


def _part(member: Member) -> np.ndarray:
    """The rising indices of the images that are used. Which those are hangs on their number alone, so that runs agree on it."""
    count, (k, n) = len(member.layout), member.part
    order = np.random.default_rng([0, 0x9A27]).permutation(count) if n > 1 else np.arange(count)
    found = np.sort(np.array_split(order, n)[k - 1])
    if not len(found):
        raise UserError(f"{member.place}.part: {k}/{n} of {count} images is none; take fewer parts")
    return found


def _renamed(member: Member) -> dict[str, tuple[str | None, ...]]:
    """By task that is used: what each class of the set is called in the run, None for one that is left out."""
    known = member.layout.classes
    for key, given in (("tasks", member.tasks), ("rename", member.rename)):
        if lacking := [task for task in given if task not in known]:
            what = f"it labels {', '.join(known)}" if known else "it has no labels"
            raise UserError(f"{member.place}.{key}: the set has no '{lacking[0]}'; {what}")
    if unused := [task for task in member.rename if task not in member.tasks]:
        raise UserError(f"{member.place}.rename.{unused[0]}: '{unused[0]}' is not among the set's tasks; leave it out")
    found = {}
    for task in member.tasks:
        changes, where = member.rename.get(task, {}), f"{member.place}.rename.{task}"
        if unknown := [n for n in changes if n not in known[task]]:
            raise UserError(f"{where}: the set has no class '{unknown[0]}'; {did_you_mean(unknown[0], known[task])}")
        found[task] = tuple(changes.get(n, n) for n in known[task])
        if not any(found[task]):
            raise UserError(f"{where}: every class is left out; leave '{task}' out of the set's tasks instead")
    return found


def _require_same(task: str, member: Member, own: Sequence[str], known: Sequence[str], members: Iterable[Member]) -> None:
    """Raise UserError where a set has not the class names of the sets before it."""
    if set(own) == set(known):
        return
    first = next(other for other in members if task in other.tasks)
    lacking, extra = sorted(set(known) - set(own)), sorted(set(own) - set(known))
    what = "; ".join(filter(None, [f"lacks {lacking}" if lacking else "", f"has {extra} besides" if extra else ""]))
    raise UserError(
        f"{member.place}: its classes of '{task}' are not those of {first.place}: it {what}. What a set does not label would be "
        f"taught as background there: make them the same with rename, or take '{task}' out of the set's tasks"
    )


def _table(task: str, names: Sequence[str | None], known: Sequence[str]) -> np.ndarray:
    """The run's class by the set's: "seg" uint8 [256], where classes left out and all other values are IGNORE; "det" int64 [C],
    where classes left out are -1."""
    found = [known.index(n) if n is not None else (IGNORE if task == "seg" else -1) for n in names]
    if task == "det":
        return np.array(found, dtype=np.int64)
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[: len(found)] = found
    return table
