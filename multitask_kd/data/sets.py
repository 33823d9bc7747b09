"""Several sets as one: each labels some of the tasks, their classes meet by name, and every batch holds all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..batch import IGNORE
from ..errors import UserError, did_you_mean
from .base import Layout, Sample
from .loader import Pool, make_pools


class Member(NamedTuple):
    """One set. tasks: those whose labels are used; rename: by task, its class names -> the run's, None leaves one out;
    part: (k, n), only the k-th of n disjoint random parts of its images."""

    layout: Layout
    tasks: Sequence[str]
    rename: Mapping[str, Mapping[str, str | None]] = {}
    part: tuple[int, int] = (1, 1)


class Sets(Layout):
    """Named sets one after the other. A UserError of its construction begins with the set's name.

    All that label a task must have the same class names for it, in any order: an object that a set does not label is taken for
    background there.
    """

    def __init__(self, members: Mapping[str, Member], seed: int = 0):
        """seed: of the choice of a set's part."""
        super().__init__()
        self.members, self.seed = dict(members), seed
        self._images = {name: _part(len(m.layout), m.part, seed) for name, m in self.members.items()}
        self._ends = np.cumsum([len(images) for images in self._images.values()])
        named = {name: _renamed(name, m) for name, m in self.members.items()}
        for name, classes in named.items():
            for task, names in classes.items():
                known = self.classes.setdefault(task, tuple(dict.fromkeys(n for n in names if n is not None)))
                _require_same(task, name, {n for n in names if n is not None}, known, self.members)
        self._value = {
            name: {task: _table(names, self.classes[task], task) for task, names in classes.items()}
            for name, classes in named.items()
        }
        self._changes = {
            name: classes != {task: list(self.classes.get(task, ())) for task in self.members[name].layout.classes}
            for name, classes in named.items()
        }
        self.faults = sum((m.layout.faults for m in self.members.values()), Counter())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, name: str) -> np.ndarray:
        """Where the images of a set lie among all."""
        place = list(self.members).index(name)
        return np.arange(self._ends[place] - len(self._images[name]), self._ends[place])

    def set_of(self, index: int) -> str:
        """The name of the set that an image is of."""
        return list(self.members)[int(np.searchsorted(self._ends, index, side="right"))]

    def alone(self, name: str) -> Sets:
        """One of the sets, as it stands here."""
        return Sets({name: self.members[name]}, self.seed)

    def labels(self, name: str) -> tuple[str, ...]:
        """The tasks that a set labels."""
        return tuple(self._value[name])

    def _place(self, index: int) -> tuple[str, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        name = self.set_of(index)
        return name, int(self._images[name][index - int(self.rows(name)[0])])

    def name(self, index: int) -> str:
        name, place = self._place(index)
        return self.members[name].layout.name(place)

    def read(self, index: int) -> Sample:
        name, place = self._place(index)
        sample = self.members[name].layout.read(place)
        tables = self._value[name]
        if not self._changes[name]:
            return sample
        found = Sample(sample.image)
        if "seg" in tables and sample.mask is not None:
            found.mask = np.take(tables["seg"], sample.mask).astype(np.uint8)
        if "det" in tables and sample.boxes is not None:
            classes = tables["det"][sample.classes] if len(sample.boxes) else sample.classes
            kept = classes >= 0
            found.boxes, found.classes = sample.boxes[kept], classes[kept]
            found.crowd, found.area = sample.crowd[kept], sample.area[kept]
        return found


def pools(
    sets: Sets,
    batch_size: int,
    *,
    tasks: Sequence[str],
    weights: Mapping[str, float],
    labelled: Mapping[str, int | float | None],
    seed: int,
    unlabelled: bool,
    share: float,
) -> list[Pool]:
    """The pools of all sets; a set has ``weight / sum of weights`` of the places of every batch, and at least one.

    tasks: those of the run. labelled: by set, a number, a fraction or None for all; ``share`` of a set's places goes to its
    labelled images. Sets without labels are left out unless ``unlabelled``. Raises UserError where the numbers cannot be met.
    """
    bare = [name for name in sets.members if not set(sets.labels(name)) & set(tasks)]
    used = [name for name in sets.members if name not in bare or unlabelled]
    places = _shared_out(batch_size, [weights[name] for name in used], used)
    found = []
    for name, count in zip(used, places, strict=True):
        rows = sets.rows(name)
        if name in bare:
            found.append(Pool(rows, count, False))
            continue
        try:
            own = make_pools(len(rows), count, labelled=labelled[name], seed=seed, unlabelled=unlabelled, share=share)
        except UserError as error:
            raise UserError(f"{error} (the set '{name}')" if len(used) > 1 else str(error)) from None
        found += [Pool(rows[pool.indices], pool.share, pool.labelled) for pool in own]
    return found


def _shared_out(places: int, weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """``places`` by weight in whole numbers, each at least 1: largest remainders, the earlier first."""
    if not names:
        raise UserError("data.train: no set of it has labels for a task of this run, and data.unlabelled is false")
    if places < len(names):
        raise UserError(f"train.batch_size: {places} leaves no place for each of {len(names)} sets: {', '.join(names)}")
    exact = np.array(weights) / sum(weights) * places
    found = np.maximum(np.floor(exact + 1e-9), 1)
    while found.sum() < places:
        found[np.argmax(exact - found)] += 1
    while found.sum() > places:
        found[np.argmin(np.where(found > 1, exact - found, np.inf))] -= 1
    return [int(n) for n in found]


def _part(count: int, part: tuple[int, int], seed: int) -> np.ndarray:
    """The rising indices of the k-th of n disjoint random parts."""
    k, n = part
    order = np.random.default_rng([seed, 0x9A27]).permutation(count) if n > 1 else np.arange(count)
    return np.sort(np.array_split(order, n)[k - 1])


def _renamed(name: str, member: Member) -> dict[str, list[str | None]]:
    """By task that is used: what each class of the set is called in the run, None for one that is left out."""
    known = member.layout.classes
    for task in (*member.tasks, *member.rename):
        if task not in known:
            what = f"it labels {', '.join(known)}" if known else "it has no labels"
            raise UserError(f"{name}.{'tasks' if task in member.tasks else 'rename'}: the set has no '{task}'; {what}")
    found = {}
    for task in member.tasks:
        changes = member.rename.get(task, {})
        if unknown := [n for n in changes if n not in known[task]]:
            raise UserError(f"{name}.rename.{task}: the set has no class '{unknown[0]}'; {did_you_mean(unknown[0], known[task])}")
        found[task] = [changes.get(n, n) for n in known[task]]
        if not any(found[task]):
            raise UserError(f"{name}.rename.{task}: every class is left out; leave the task out of tasks instead")
    return found


def _require_same(task: str, name: str, own: set[str], known: Sequence[str], members: Mapping[str, Member]) -> None:
    if own == set(known):
        return
    first = next(other for other, m in members.items() if task in m.tasks)
    lacking, extra = sorted(set(known) - own), sorted(own - set(known))
    what = "; ".join(filter(None, [f"lacks {lacking}" if lacking else "", f"has {extra} besides" if extra else ""]))
    raise UserError(
        f"{name}: its classes of '{task}' are not those of '{first}': it {what}. What a set does not label would be taught as "
        f"background there: make them the same with rename, or take '{task}' out of the set's tasks"
    )


def _table(names: Sequence[str | None], known: Sequence[str], task: str) -> np.ndarray:
    """The run's class by the set's. Left out: pixels are ignored, boxes are none (-1)."""
    found = [known.index(n) if n is not None else (IGNORE if task == "seg" else -1) for n in names]
    if task == "det":
        return np.array(found, dtype=np.int64)
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[: len(found)] = found
    return table
