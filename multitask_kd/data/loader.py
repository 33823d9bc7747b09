"""From a layout to batches: what an image looks like depends on (seed, draw, index) alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..batch import IGNORE, PAD, Batch, Targets
from ..errors import UserError
from .base import Layout, Sample
from .sampling import BatchStream, Place, Pool
from .transforms import Geometry, TrainTransform, letterbox

log = logging.getLogger(__name__)


@dataclass
class Truth:
    """Labels of one evaluated image at its original size (see ``Sample``); None: not labelled."""

    index: int
    geometry: Geometry
    mask: np.ndarray | None
    boxes: np.ndarray | None
    classes: np.ndarray | None
    crowd: np.ndarray | None
    area: np.ndarray | None


class Item(NamedTuple):
    """One training image: its ``sample`` at the network's size, its place in the data set, the message of a file that was skipped
    for it, and by (H, W) the same picture, moved and coloured alike, at the sizes of teachers that see more."""

    sample: Sample
    index: int
    skipped: str | None
    views: dict[tuple[int, int], np.ndarray] = {}


class TrainSet(Dataset):
    """Place -> Item.

    pools: a broken image is replaced from its own pool, so that no label is used that was to be left out.
    views: transforms to other sizes, which draw the same from the same seed.
    """

    def __init__(
        self,
        layout: Layout,
        transform: TrainTransform,
        seed: int,
        *,
        pools: Sequence[Pool],
        skip_errors: bool,
        views: Sequence[TrainTransform] = (),
    ):
        self.layout, self.transform, self.seed, self.skip_errors = layout, transform, seed, skip_errors
        self.pools = list(pools)
        self.views = {view.size: view for view in views}

    def __getitem__(self, place: Place) -> Item:
        sample, index, skipped = read_or_next(self.layout, place.index, self.pools[place.pool].indices, self.skip_errors)
        if not place.labelled:
            sample = Sample(sample.image)
        seed = int(np.random.SeedSequence([self.seed, place.draw, place.index]).generate_state(1)[0])
        views = {size: view(Sample(sample.image), seed).image for size, view in self.views.items()}
        return Item(self.transform(sample, seed), index, skipped, views)


def read_or_next(layout: Layout, index: int, pool: np.ndarray, skip_errors: bool) -> tuple[Sample, int, str | None]:
    """Read an image; where it is broken and errors are skipped, the next of ``pool`` (rising indices) that is whole."""
    skipped = None
    first = int(np.searchsorted(pool, index))
    for place in range(first, first + len(pool)):
        candidate = int(pool[place % len(pool)])
        try:
            return layout.read(candidate), candidate, skipped
        except UserError as error:
            if not skip_errors:
                raise
            skipped = skipped or str(error)
    raise UserError(f"none of {len(pool)} images can be read; the first error was: {skipped}")


def collate_train(items: list[Item], tasks: Sequence[str]) -> tuple[Batch, list[str]]:
    """Samples of one size -> padded Batch with targets for ``tasks``, and the messages of skipped files."""
    samples = [item.sample for item in items]
    images = _images([s.image for s in samples])
    targets: Targets = {}
    if "seg" in tasks:
        targets["seg"] = _seg_target(samples)
    if "det" in tasks:
        targets["det"] = _det_target(samples)
    views = {size: _images([item.views[size] for item in items]) for size in items[0].views}
    batch = Batch(images, targets, torch.tensor([item.index for item in items]), views=views)
    return batch, [item.skipped for item in items if item.skipped]


def _images(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [H,W,3] each -> uint8 [B,3,H,W], in memory as [B,H,W,3]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _seg_target(samples: list[Sample]) -> dict[str, Tensor]:
    blank = np.full(samples[0].image.shape[:2], IGNORE, np.uint8)
    masks = np.stack([blank if s.mask is None else s.mask for s in samples])
    labelled = torch.tensor([s.mask is not None for s in samples])
    return {"mask": torch.from_numpy(masks), "labelled": labelled}


def _det_target(samples: list[Sample]) -> dict[str, Tensor]:
    most = max(0 if s.boxes is None else len(s.boxes) for s in samples)
    boxes = np.zeros((len(samples), most, 4), np.float32)
    classes = np.full((len(samples), most), PAD, np.int64)
    for row, sample in enumerate(samples):
        if sample.boxes is not None:
            boxes[row, : len(sample.boxes)] = sample.boxes
            classes[row, : len(sample.boxes)] = sample.classes
    labelled = torch.tensor([s.boxes is not None for s in samples])
    return {"boxes": torch.from_numpy(boxes), "classes": torch.from_numpy(classes), "labelled": labelled}


class EvalSet(Dataset):
    """Place -> letterboxed image and its Truth, or the message of an image that cannot be read."""

    def __init__(self, layout: Layout, size: tuple[int, int], chosen: Sequence[int], *, skip_errors: bool):
        """chosen: the indices of the images, in their order."""
        self.layout, self.size, self.skip_errors = layout, tuple(size), skip_errors
        self.chosen = list(chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> tuple[np.ndarray, Truth] | str:
        index = self.chosen[place]
        try:
            sample = self.layout.read(index)
        except UserError as error:
            if not self.skip_errors:
                raise
            return str(error)
        image, geometry = letterbox(sample.image, self.size)
        return image, Truth(index, geometry, sample.mask, sample.boxes, sample.classes, sample.crowd, sample.area)


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
    os.setpgid(0, 0)  # Ctrl-C and a group's SIGTERM are for the training process, which still needs batches to end its step


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


def train_loader(data: TrainSet, stream: BatchStream, tasks: Sequence[str], *, workers: int, pin: bool) -> DataLoader:
    """Yields (Batch, messages of skipped files), one for every batch of ``stream``."""
    return _loader(data, workers, pin, batch_sampler=stream, collate_fn=partial(collate_train, tasks=tuple(tasks)))


def eval_loader(data: EvalSet, batch_size: int, *, workers: int, pin: bool) -> DataLoader:
    """Yields (Batch or None, messages of skipped files), in the order of the data set."""
    return _loader(data, workers, pin, batch_size=batch_size, shuffle=False, collate_fn=collate_eval)
