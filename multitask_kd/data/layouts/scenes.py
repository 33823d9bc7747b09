"""Layout ``scenes``: procedural street scenes, generated from a seed and cached on disk; nothing is downloaded."""

from __future__ import annotations

import numbers
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, did_you_mean
from ..base import LAYOUTS, Layout, Sample
from ..scenes import cache as scenes_cache
from ..scenes.draw import OBJECTS, SEG_CLASSES, SPLITS

SMALLEST, LARGEST = 48, 1024  # pixels a side


@LAYOUTS.register("scenes")
class Scenes(Layout):
    """Street scenes with masks and boxes for segmentation and detection.

    split: "train" or "val": disjoint random streams. count: number of scenes. size: (height, width) in pixels.
    seed: a whole number >= 0. root: folder of the caches, created if missing.

    Scene i depends on (seed, split, size, i) alone, so a smaller ``count`` is a prefix of a larger one. The first use
    generates the set with all cores and caches it under ``root``. Raises UserError for an option that cannot be honoured.
    """

    def __init__(
        self, *, split: str, count: int, size: tuple[int, int] = (96, 128), seed: int = 0, root: str = "data/cache"
    ) -> None:
        super().__init__()
        if split not in SPLITS:
            raise UserError(f"split: unknown split '{split}'; {did_you_mean(str(split), SPLITS)}")
        self.split = split
        self.count = _whole("count", count, 1, "a number of scenes")
        self.seed = _whole("seed", seed, 0, "a seed")
        self.size = _image_size(size)
        self.classes = {"seg": SEG_CLASSES, "det": OBJECTS}
        self.folder = scenes_cache.ensure(Path(root), self.seed, split, self.size, self.count)
        self._arrays: scenes_cache.Arrays | None = None

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.split}-{self.seed}-{index:06d}"

    def read(self, index: int) -> Sample:
        """A copy of scene ``index``. Raises IndexError outside [0, count)."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        if self._arrays is None:
            self._arrays = scenes_cache.Arrays(self.folder)
        arrays = self._arrays
        rows = slice(int(arrays.offsets[index]), int(arrays.offsets[index + 1]))
        boxes = arrays.boxes[rows].copy()
        return Sample(
            image=np.array(arrays.images[index]),
            mask=np.array(arrays.masks[index]),
            boxes=boxes,
            classes=arrays.classes[rows].copy(),
            crowd=np.zeros(len(boxes), bool),
            area=arrays.area[rows].copy(),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the open arrays: every process maps the files for itself."""
        return {**self.__dict__, "_arrays": None}


def _whole(key: str, value: Any, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise UserError(f"{key}: {value!r} is not {what}; give a whole number of at least {least}")
    return int(value)


def _image_size(size: Any) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2:
        raise UserError(f"size: {size!r} is not a size; give [height, width] in pixels, e.g. [96, 128]")
    for side in sides:
        if isinstance(side, bool) or not isinstance(side, numbers.Integral) or not SMALLEST <= side <= LARGEST:
            raise UserError(f"size: {size!r} cannot be drawn; height and width must be whole, {SMALLEST} to {LARGEST} pixels")
    return int(sides[0]), int(sides[1])
