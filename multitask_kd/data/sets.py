"""Several sets as one: each labels some of the tasks, maybe only some of a task's classes; classes are
matched by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UserError, did_you_mean
from .base import Layout, Sample
from .labels import LabelKind


class Member(NamedTuple):
    """One set. key_path: its key path in the config; tasks: those whose labels are used; labels: task -> the
    name of its label in the set's layout, where that is another; rename: by task, its class names -> the
    run's, None leaves one out; classes: by task, the run's classes that it labels, where these are not all;
    part: (k, n), only the k-th of n disjoint random parts of its images."""

    layout: Layout
    key_path: str
    tasks: Sequence[str]
    rename: Mapping[str, Mapping[str, str | None]] = {}
    part: tuple[int, int] = (1, 1)
    classes: Mapping[str, Sequence[str]] = {}
    labels: Mapping[str, str] = {}

    def label(self, task: str) -> str:
        """The layout's name for the label of a task."""
        return self.labels.get(task, task)


class Sets(Layout):
    """Named sets one after the other.

    All sets that label a task must have the same class names for it, in any order, or declare which of them
    they label (``Member.classes``): else an object of a class that a set does not label would be learnt as
    background there. Raises UserError beginning with the key path of the set.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        order: Mapping[str, Sequence[str]] | None = None,
        *,
        kinds: Mapping[str, LabelKind],
        classes: Mapping[str, Sequence[str]] | None = None,
    ):
        """order: by task, the order of its class names where the sets have the same ones; else it is that of
        the first set. kinds: of every task. classes: by task, the run's class names, for tasks of which the
        sets label no class, or not every one."""
        super().__init__()
        self.members, self._names, self._kinds = dict(members), list(members), dict(kinds)
        self._images = [_part(m) for m in self.members.values()]
        self._starts = np.cumsum([0, *map(len, self._images)])
        self._given = {task: tuple(names) for task, names in (classes or {}).items()}
        named = {name: _renamed(m) for name, m in self.members.items()}
        labelled = {name: _labelled(self.members[name], classes) for name, classes in named.items()}
        self._join(labelled, order or {})
        self._known = {name: self._known_of(self.members[name], found) for name, found in labelled.items()}
        self._tables = {
            name: {task: self._table(task, names) for task, names in found.items()}
            for name, found in named.items()
        }
        self._untouched = {
            name for name, m in self.members.items() if self._as_it_is(m, named[name], self._known[name])
        }
        self.faults = sum((m.layout.faults for m in self.members.values()), Counter())

    def _join(
        self, labelled: Mapping[str, Mapping[str, tuple[str, ...]]], order: Mapping[str, Sequence[str]]
    ) -> None:
        """Fill ``classes`` and ``kinds``: of each task, all classes that any set labels."""
        for name, found in labelled.items():
            for task, names in found.items():
                kind = self.members[name].layout.kinds[self.members[name].label(task)]
                if self.kinds.setdefault(task, kind) != kind:
                    raise UserError(
                        f"{self.members[name].key_path}: its label '{task}' is of kind {kind}, but another "
                        f"set's is "
                        f"{self.kinds[task]}; give one of them another name with `labels`"
                    )
                self.classes[task] = tuple(dict.fromkeys([*self.classes.get(task, ()), *names]))
        for task, own in self.classes.items():
            asked = self._given.get(task) or tuple(order.get(task, ()))
            self.classes[task] = asked if task in self._given or set(asked) == set(own) else own
        for task, names in self._given.items():
            self.classes.setdefault(task, names)

    def _known_of(self, member: Member, found: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """By task, bool [C], where a set labels only some classes. Raises UserError where it does not declare
        them."""
        partial = {}
        for task, names in found.items():
            every = self.classes[task]
            if task not in member.classes:
                _require_same(task, member, names, every, self.members.values(), given=task in self._given)
            elif extra := [n for n in names if n not in every]:
                raise UserError(
                    f"{member.key_path}.classes.{task}: '{extra[0]}' is not among the run's classes "
                    f"({', '.join(every)}); leave "
                    f"it out, or name all of them in data.classes.{task}"
                )
            if set(names) != set(every):
                partial[task] = np.isin(np.array(every), np.array(names))
        return partial

    def _table(self, task: str, names: Sequence[str | None]) -> np.ndarray:
        every = self.classes[task]
        return self._kinds[task].class_table([n if n in every else None for n in names], every)

    def _as_it_is(
        self, member: Member, named: Mapping[str, Sequence[str | None]], known: Mapping[str, np.ndarray]
    ) -> bool:
        """Whether the layout's samples need no change for the run."""
        if member.labels or known:
            return False
        return {t: self.classes[t] for t in named} == member.layout.classes == named

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, name: str) -> np.ndarray:
        """The indices of a set's images among those of all sets."""
        at = self._names.index(name)
        return np.arange(self._starts[at], self._starts[at + 1])

    def set_of(self, index: int) -> str:
        """The name of the set that an image is of."""
        return self._names[self._member_of(index)[0]]

    def alone(self, name: str) -> Sets:
        """Only one of the sets, with the same classes as here."""
        member = self.members[name]
        given = {task: names for task, names in self.classes.items() if task in member.tasks}
        return Sets(
            {name: member}, kinds=self._kinds, classes=given if self._known[name] else None, order=given
        )

    def labels(self, name: str) -> tuple[str, ...]:
        """The tasks that a set labels."""
        return tuple(self._tables[name])

    def labelled(self) -> set[str]:
        """The tasks that any set labels."""
        return {task for name in self._names for task in self.labels(name)}

    def offered(self) -> list[str]:
        """The labels that the layouts have, used or not."""
        return list(
            dict.fromkeys(label for member in self.members.values() for label in member.layout.classes)
        )

    def known(self, name: str, task: str) -> np.ndarray | None:
        """The classes of a task that a set labels, bool [C]; None: all."""
        return self._known[name].get(task)

    def want(self, tasks: Iterable[str]) -> None:
        """Let the layouts read only the labels of these tasks."""
        for member in self.members.values():
            member.layout.wanted = frozenset(member.label(task) for task in tasks)

    def never(self) -> list[tuple[str, list[str]]]:
        """Pairs of the key path of the classes that a set labels, and those of them that never occur in it,
        as far as its layout has counted."""
        found = []
        for name, member in self.members.items():
            for task, table in self._tables[name].items():
                seen = member.layout.seen.get(member.label(task))
                if seen is None:
                    continue
                counts = np.zeros(len(self.classes[task]) + 1, np.int64)
                np.add.at(counts, table[: len(seen)].astype(np.int64).clip(-1, len(self.classes[task])), seen)
                known = self._known[name].get(task, np.ones(len(self.classes[task]), bool))
                if lacking := [c for i, c in enumerate(self.classes[task]) if known[i] and not counts[i]]:
                    found.append((f"{member.key_path}.classes.{task}", lacking))
        return found

    def first(self, count: int | None) -> list[int]:
        """The first images of every set, ``count`` in total, shared by the sets' sizes, at least one of each;
        None: all."""
        if count is None or count >= len(self):
            return list(range(len(self)))
        counts = shared_out(max(count, len(self._names)), [len(images) for images in self._images])
        return [int(start) + k for start, n in zip(self._starts, counts, strict=False) for k in range(n)]

    def _member_of(self, index: int) -> tuple[int, int]:
        """The number of an image's set, and its index in that set's layout."""
        self._check_index(index)
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return which, int(self._images[which][index - self._starts[which]])

    def name(self, index: int) -> str:
        which, image = self._member_of(index)
        return self.members[self._names[which]].layout.name(image)

    def read(self, index: int) -> Sample:
        which, image = self._member_of(index)
        name = self._names[which]
        member = self.members[name]
        sample = member.layout.read(image)
        if name in self._untouched:
            return sample
        found = Sample(sample.image)
        for task, table in self._tables[name].items():
            label = sample.labels.get(member.label(task))
            label = None if label is None else self._kinds[task].renumbered(label, table)
            known = self._known[name].get(task)
            if label is not None and known is not None:
                label = self._kinds[task].only_known(label, known)
                found.known[task] = known
            if label is not None:
                found.labels[task] = label
        return found


def shared_out(slots: int, weights: Sequence[float]) -> list[int]:
    """``slots`` shared by weight in whole numbers, each at least 1: by largest remainder, the earlier
    first."""
    exact = np.array(weights) / sum(weights) * slots
    found = np.maximum(np.floor(exact), 1)
    while found.sum() < slots:
        found[np.argmax(exact - found)] += 1
    while found.sum() > slots:
        found[np.argmin(np.where(found > 1, exact - found, np.inf))] -= 1
    return [int(n) for n in found]


def _part(member: Member) -> np.ndarray:
    """The rising indices of the images that are used. The choice depends only on the number of images, so
    that it is the same in all runs."""
    count, (k, n) = len(member.layout), member.part
    order = np.random.default_rng([0, 0x9A27]).permutation(count) if n > 1 else np.arange(count)
    found = np.sort(np.array_split(order, n)[k - 1])
    if not len(found):
        raise UserError(f"{member.key_path}.part: {k}/{n} of {count} images is none; take fewer parts")
    return found


def _renamed(member: Member) -> dict[str, tuple[str | None, ...]]:
    """By task that is used: the run's name of each class of the set, None for one that is left out."""
    known = member.layout.classes
    for key, given in (("tasks", member.tasks), ("rename", member.rename), ("classes", member.classes)):
        if lacking := [task for task in given if member.label(task) not in known]:
            what = f"it labels {', '.join(known)}" if known else "it has no labels"
            raise UserError(f"{member.key_path}.{key}: the set has no '{member.label(lacking[0])}'; {what}")
        if unused := [task for task in given if task not in member.tasks]:
            raise UserError(
                f"{member.key_path}.{key}.{unused[0]}: '{unused[0]}' is not among the set's tasks; leave it "
                f"out"
            )
    found = {}
    for task in member.tasks:
        names, changes = known[member.label(task)], member.rename.get(task, {})
        where = f"{member.key_path}.rename.{task}"
        if unknown := [n for n in changes if n not in names]:
            raise UserError(
                f"{where}: the set has no class '{unknown[0]}'; {did_you_mean(unknown[0], names)}"
            )
        found[task] = tuple(changes.get(n, n) for n in names)
        if names and not any(found[task]):
            raise UserError(
                f"{where}: every class is left out; leave '{task}' out of the set's tasks instead"
            )
    return found


def _labelled(member: Member, named: Mapping[str, Sequence[str | None]]) -> dict[str, tuple[str, ...]]:
    """By task, the classes (by the run's names) that a set labels. Raises UserError for one that it does not
    have."""
    found = {}
    for task, names in named.items():
        own = tuple(dict.fromkeys(n for n in names if n is not None))
        asked = tuple(member.classes.get(task, own))
        if unknown := [n for n in asked if n not in own]:
            where = f"{member.key_path}.classes.{task}"
            raise UserError(f"{where}: the set has no class '{unknown[0]}'; {did_you_mean(unknown[0], own)}")
        if own and not asked:
            raise UserError(
                f"{member.key_path}.classes.{task}: names no class; leave '{task}' out of the set's tasks "
                f"instead"
            )
        found[task] = asked
    return found


def _require_same(
    task: str,
    member: Member,
    own: Sequence[str],
    known: Sequence[str],
    members: Iterable[Member],
    *,
    given: bool,
) -> None:
    """Raise UserError where a set does not have the run's classes and does not declare which of them it
    labels."""
    if set(own) == set(known):
        return
    lacking, extra = sorted(set(known) - set(own)), sorted(set(own) - set(known))
    what = "; ".join(
        filter(None, [f"lacks {lacking}" if lacking else "", f"has {extra} besides" if extra else ""])
    )
    others = [m.key_path for m in members if m is not member and task in m.tasks]
    whose = (
        f"the run's ({', '.join(known)})"
        if given
        else f"those of {' and '.join(others)}{' together' if others[1:] else ''}"
    )
    # the background of a set also holds what the set does not label
    only = [name for name in own if name in known and name.lower() != "background"]
    apart = [name for name in own if name.lower() == "background"]
    note = (
        f". Its {apart[0]} may hold what it does not label and is left out here: without a set or a teacher that "
        f"knows all classes, nothing teaches {apart[0]} then"
        if apart
        else ""
    )
    raise UserError(
        f"{member.key_path}: its classes of '{task}' are not {whose}: it {what}. What a set does not label "
        f"would be taught as "
        f"background there: say which classes it labels ({member.key_path}.classes.{task}: "
        f"[{', '.join(only)}]), make them the "
        f"same with rename, or take '{task}' out of the set's tasks{note}"
    )
