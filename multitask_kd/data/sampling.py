"""Which images fill which slots of every batch: a function of only (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .sets import Sets, shared_out


@dataclass(frozen=True)
class Pool:
    """Images that fill ``share`` slots of every batch, each pass in a fresh order. ``labelled``: their labels
    are used."""

    indices: np.ndarray
    share: int
    labelled: bool


@dataclass(frozen=True)
class Slot:
    """One slot of a batch: the ``draw``-th pass of its pool over the image ``index``."""

    draw: int
    index: int
    pool: int
    labelled: bool


class Draw(NamedTuple):
    """How a set is sampled: its weight in every batch, and how many of its images keep their labels: a
    number, a fraction, or None for all; key: the key path of that number."""

    weight: float = 1.0
    labelled: int | float | None = None
    key: str = "data.labelled"


def pools(
    sets: Sets,
    batch_size: int,
    *,
    tasks: Sequence[str],
    draws: Mapping[str, Draw],
    seed: int,
    unlabelled: bool,
    share: float,
) -> list[Pool]:
    """The pools of all sets; a set has ``weight / sum of weights`` of the slots of every batch, and at least
    one.

    tasks: those of the run. ``share`` of a set's slots goes to its labelled images. Sets without labels are
    left out unless ``unlabelled``. Raises UserError where the numbers cannot be met.
    """
    bare = [name for name in sets.members if not set(sets.labels(name)) & set(tasks)]
    used = [name for name in sets.members if name not in bare or unlabelled]
    if not used:
        raise UserError(
            "data.train: it has no labels for a task of this run, and data.unlabelled is false; set it to "
            "true"
        )
    if batch_size < len(used):
        raise UserError(
            f"train.batch_size: {batch_size} leaves no slot for each of {len(used)} sets "
            f"({', '.join(used)}); raise it"
        )
    found = []
    for name, slots in zip(used, shared_out(batch_size, [draws[name].weight for name in used]), strict=True):
        rows = sets.rows(name)
        if name in bare:
            found.append(Pool(rows, slots, False))
            continue
        draw = draws[name]
        try:
            own = pools_of_set(
                len(rows),
                slots,
                labelled=draw.labelled,
                seed=seed,
                unlabelled=unlabelled,
                share=share,
                key=draw.key,
            )
        except UserError as error:
            where = (
                f"; this is the set '{name}' with its {slots} of {batch_size} slots"
                if len(sets.members) > 1
                else ""
            )
            raise UserError(f"{error}{where}") from None
        found += [Pool(rows[pool.indices], pool.share, pool.labelled) for pool in own]
    return found


def pools_of_set(
    count: int,
    batch_size: int,
    *,
    labelled: int | float | None,
    seed: int,
    unlabelled: bool,
    share: float,
    key: str = "data.labelled",
) -> list[Pool]:
    """Split ``count`` images into those that keep their labels and those that do not.

    labelled: a number, a fraction, or None for all; ``share`` of the batch goes to the labelled ones. key:
    the key path of ``labelled``. Raises UserError where the numbers cannot be met.
    """
    number = count if labelled is None else labelled
    if isinstance(number, float):
        number = max(1, round(number * count))
    if number > count:
        raise UserError(f"{key}: {number} labelled images asked for, but the training set has {count}")
    order = np.random.default_rng([seed, 0x1ABE1]).permutation(count)
    kept, rest = np.sort(order[:number]), np.sort(order[number:])
    if len(rest) == 0 or not unlabelled:
        return [Pool(kept, batch_size, True)]
    with_labels = round(batch_size * share)
    if not 0 < with_labels < batch_size:
        raise UserError(
            f"data.labelled_share: {share} of a batch of {batch_size} leaves no slot for "
            f"{'unlabelled' if with_labels else 'labelled'} images; change it or train.batch_size"
        )
    return [Pool(kept, with_labels, True), Pool(rest, batch_size - with_labels, False)]


class BatchStream:
    """Batches ``start`` to ``stop`` of an endless stream; batch i is the same however the run got there."""

    def __init__(self, pools: Sequence[Pool], seed: int, start: int, stop: int):
        self.pools, self.seed, self.start, self.stop = list(pools), seed, start, stop
        self._orders: dict[
            int, tuple[int, np.ndarray]
        ] = {}  # by pool: the pass it is in, and that pass's order

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Slot]]:
        for number in range(self.start, self.stop):
            yield [p for k, pool in enumerate(self.pools) for p in self._slots(k, pool, number)]

    def _slots(self, key: int, pool: Pool, batch: int) -> list[Slot]:
        size = len(pool.indices)
        slots = []
        for position in range(batch * pool.share, (batch + 1) * pool.share):
            draw, offset = divmod(position, size)
            index = int(pool.indices[self._order(key, size, draw)[offset]])
            slots.append(Slot(draw, index, key, pool.labelled))
        return slots

    def _order(self, key: int, size: int, draw: int) -> np.ndarray:
        if self._orders.get(key, (None,))[0] != draw:
            self._orders[key] = (draw, np.random.default_rng([self.seed, key, draw]).permutation(size))
        return self._orders[key][1]
