"""From a layout to batches: the augmentation of an image depends only on (seed, draw, index)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..batch import Batch
from ..errors import UserError
from .base import Layout, Sample
from .labels import Geometry, LabelKind
from .sampling import BatchStream, Pool, Slot
from .transforms import TrainTransform, letterbox

log = logging.getLogger(__name__)


@dataclass
class Truth:
    """Labels of one evaluated image at its original size, and which classes are labelled in it (see
    ``Sample``)."""

    index: int
    geometry: Geometry
    labels: dict[str, Any] = field(default_factory=dict)
    known: dict[str, np.ndarray] = field(default_factory=dict)


class Item(NamedTuple):
    """One training image: its ``sample`` at the network's size, its index in the data set, the error message
    of the file that it replaces (None: none), and by (H, W) the same picture with the same augmentation at
    the sizes of teachers whose input is larger."""

    sample: Sample
    index: int
    skipped: str | None
    teacher_images: dict[tuple[int, int], np.ndarray] = {}


class Packing(NamedTuple):
    """How a task's labels become its target: its kind, and the number of its classes."""

    kind: LabelKind
    classes: int


class TrainSet(Dataset):
    """Slot -> Item.

    pools: a broken image is replaced from its own pool, so that no label is used that should be left out.
    others: transforms to other sizes, which make the same random choices from the same seed.
    """

    def __init__(
        self,
        layout: Layout,
        transform: TrainTransform,
        seed: int,
        *,
        pools: Sequence[Pool],
        skip_errors: bool,
        others: Sequence[TrainTransform] = (),
    ):
        self.layout, self.transform, self.seed, self.skip_errors = layout, transform, seed, skip_errors
        self.pools = list(pools)
        self.others = {other.size: other for other in others}

    def __getitem__(self, slot: Slot) -> Item:
        sample, index, skipped = read_or_next(
            self.layout, slot.index, self.pools[slot.pool].indices, self.skip_errors
        )
        if not slot.labelled:
            sample = Sample(sample.image)
        seed = int(np.random.SeedSequence([self.seed, slot.draw, slot.index]).generate_state(1)[0])
        others = {size: other(Sample(sample.image), seed).image for size, other in self.others.items()}
        return Item(self.transform(sample, seed), index, skipped, others)


def read_or_next(
    layout: Layout, index: int, pool: np.ndarray, skip_errors: bool
) -> tuple[Sample, int, str | None]:
    """Read an image; where it is broken and errors are skipped, the next of ``pool`` (rising indices) that is
    whole."""
    skipped = None
    first = int(np.searchsorted(pool, index))
    for position in range(first, first + len(pool)):
        candidate = int(pool[position % len(pool)])
        try:
            return layout.read(candidate), candidate, skipped
        except UserError as error:
            if not skip_errors:
                raise
            skipped = skipped or str(error)
    raise UserError(f"none of {len(pool)} images can be read; the first error was: {skipped}")


def collate_train(items: list[Item], tasks: Mapping[str, Packing]) -> tuple[Batch, list[str]]:
    """Samples of one size -> padded Batch with targets for ``tasks``, and the messages of skipped files."""
    samples = [item.sample for item in items]
    targets = {name: _target(name, packing, samples) for name, packing in tasks.items()}
    others = {
        size: _images([item.teacher_images[size] for item in items]) for size in items[0].teacher_images
    }
    indices = torch.tensor([item.index for item in items])
    batch = Batch(_images([s.image for s in samples]), targets, indices, teacher_images=others)
    return batch, [item.skipped for item in items if item.skipped]


def _images(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [H,W,3] each -> uint8 [B,3,H,W], in memory as [B,H,W,3]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _target(name: str, packing: Packing, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A task's part of ``Batch.targets``."""
    target = packing.kind.packed([s.labels.get(name) for s in samples], samples[0].image.shape[:2])
    if any(name in s.known for s in samples):
        every = np.ones(packing.classes, bool)
        target["known"] = torch.from_numpy(np.stack([s.known.get(name, every) for s in samples]))
    return target


class EvalSet(Dataset):
    """Number -> letterboxed image and its Truth, or the message of an image that cannot be read."""

    def __init__(self, layout: Layout, size: tuple[int, int], chosen: Sequence[int], *, skip_errors: bool):
        """chosen: the indices of the images, in their order."""
        self.layout, self.size, self.skip_errors = layout, tuple(size), skip_errors
        self.chosen = list(chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[np.ndarray, Truth] | str:
        index = self.chosen[number]
        try:
            sample = self.layout.read(index)
        except UserError as error:
            if not self.skip_errors:
                raise
            return str(error)
        image, geometry = letterbox(sample.image, self.size)
        return image, Truth(index, geometry, sample.labels, sample.known)


def collate_eval(items: list[tuple[np.ndarray, Truth] | str]) -> tuple[Batch | None, list[str]]:
    whole = [item for item in items if not isinstance(item, str)]
    skipped = [item for item in items if isinstance(item, str)]
    if not whole:
        return None, skipped
    images = _images([image for image, _ in whole])
    truths = [truth for _, truth in whole]
    return Batch(images, {}, torch.tensor([t.index for t in truths]), truths), skipped


def _start_worker(_: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # the loader's processes are the parallelism
    torch.set_num_threads(1)
    os.setpgid(
        0, 0
    )  # Ctrl-C and a group's SIGTERM are for the training process, which still needs batches to end its step


def _loader(data: Dataset, workers: int, pin: bool, **kwargs) -> DataLoader:
    return DataLoader(
        data,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=pin,
        generator=torch.Generator(),  # else every new iterator draws from the global random state, and a resume is not exact
        prefetch_factor=4 if workers else None,
        **kwargs,
    )


def train_loader(
    data: TrainSet, stream: BatchStream, tasks: Mapping[str, Packing], *, workers: int, pin: bool
) -> DataLoader:
    """Yields (Batch, messages of skipped files), one for every batch of ``stream``."""
    return _loader(
        data, workers, pin, batch_sampler=stream, collate_fn=partial(collate_train, tasks=dict(tasks))
    )


def eval_loader(data: EvalSet, batch_size: int, *, workers: int, pin: bool) -> DataLoader:
    """Yields (Batch or None, messages of skipped files), in the order of the data set."""
    return _loader(data, workers, pin, batch_size=batch_size, shuffle=False, collate_fn=collate_eval)
