"""Layout ``scenes``: procedural street scenes, generated from a seed and cached on disk; nothing is
downloaded."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, did_you_mean
from ..base import LAYOUTS, Layout, Sample
from ..labels import BoxLabels
from ..scenes import cache as scenes_cache
from ..scenes.cache import Arrays
from ..scenes.draw import SPLITS
from ..scenes.labels import IGNORE, OBJECTS, OTHER, PAINTED, SEG_CLASSES, WEATHER

SMALLEST, LARGEST = 48, 1024  # pixels a side


def _seg(arrays: Arrays, index: int) -> np.ndarray:
    return np.array(arrays.masks[index])


def _det(arrays: Arrays, index: int) -> BoxLabels:
    rows = slice(int(arrays.offsets[index]), int(arrays.offsets[index + 1]))
    boxes, classes, area = (array[rows].copy() for array in (arrays.boxes, arrays.classes, arrays.area))
    return BoxLabels(boxes, classes, area=area)


def _drivable(arrays: Arrays, index: int) -> np.ndarray:
    return (arrays.road[index] != OTHER).astype(np.uint8)


def _lane(arrays: Arrays, index: int) -> np.ndarray:
    return (arrays.road[index] == PAINTED).astype(np.uint8)


def _depth(arrays: Arrays, index: int) -> np.ndarray:
    return arrays.depth[index].astype(np.float32)


def _weather(arrays: Arrays, index: int) -> int | None:
    """None: not labelled."""
    found = int(arrays.weather[index])
    return None if found == IGNORE else found


# By name: kind, classes, and how it is read.
LABELS: dict[str, tuple[str, tuple[str, ...], Callable[[Arrays, int], Any]]] = {
    "seg": ("semantic", SEG_CLASSES, _seg),
    "det": ("detection", OBJECTS, _det),
    "drivable": ("semantic", ("background", "drivable"), _drivable),
    "lane": ("semantic", ("background", "lane"), _lane),
    "depth": ("depth", (), _depth),
    "weather": ("classification", WEATHER, _weather),
}


@LAYOUTS.register("scenes")
class Scenes(Layout):
    """Street scenes with six labels.

    seg (semantic): sky, walls, ground and objects.
    det (detection): the objects.
    drivable (semantic): the road that is seen, where nothing stands on it; known where seg is not, too.
    lane (semantic): the paint that is seen on the road: dashes, edge lines, zebras.
    depth (depth): metres along the camera's axis to the ground, to walls, and to the foot of what stands
        there; 0, unknown, in the sky and beyond 80 m.
    weather (classification): dark at dusk and at night, else clear or overcast, as the sky is blue or grey.
        Fog does not count. A day is not labelled where less than a hundredth of the picture is sky.

    split: "train" or "val": disjoint random streams. count: number of scenes. size: (height, width) in
    pixels.
    seed: a whole number >= 0. root: folder of the caches, created if missing.

    Scene i depends on (seed, split, size, i) alone, so a smaller ``count`` is a prefix of a larger one. The
    first use generates the set with all cores and caches it under ``root``. Raises UserError for an option
    that cannot be honoured.
    """

    def __init__(
        self,
        *,
        split: str,
        count: int,
        size: tuple[int, int] = (96, 128),
        seed: int = 0,
        root: str = "data/cache",
    ) -> None:
        super().__init__()
        if split not in SPLITS:
            raise UserError(f"split: unknown split '{split}'; {did_you_mean(str(split), SPLITS)}")
        self.split = split
        self.count = _whole("count", count, 1, "a number of scenes")
        self.seed = _whole("seed", seed, 0, "a seed")
        self.size = _image_size(size)
        for name, (kind, classes, _) in LABELS.items():
            self.add_label(name, kind, classes)
        self.folder = scenes_cache.ensure(Path(root), self.seed, split, self.size, self.count)
        self._arrays: Arrays | None = None

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.split}-{self.seed}-{index:06d}"

    def read(self, index: int) -> Sample:
        """A copy of scene ``index``. Raises IndexError outside [0, count)."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        if self._arrays is None:
            self._arrays = Arrays(self.folder)
        arrays = self._arrays
        found = {name: read(arrays, index) for name, (_, _, read) in LABELS.items() if self.gives(name)}
        labels = {name: label for name, label in found.items() if label is not None}
        return Sample(np.array(arrays.images[index]), labels)

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
        if (
            isinstance(side, bool)
            or not isinstance(side, numbers.Integral)
            or not SMALLEST <= side <= LARGEST
        ):
            raise UserError(
                f"size: {size!r} cannot be drawn; height and width must be whole, {SMALLEST} to {LARGEST} "
                f"pixels"
            )
    return int(sides[0]), int(sides[1])
