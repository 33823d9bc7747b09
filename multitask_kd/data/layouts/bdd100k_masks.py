"""BDD100K's masks: their kinds in both trees, what their stored values mean, and reading them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...batch import IGNORE
from ...errors import UserError, did_you_mean
from ..files import Files, decode_image, require_same_size
from .bdd100k_labels import stems_in

DRIVABLE = ("direct", "alternative", "background")
SEM_SEG = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
LANES = (
    "crosswalk", "double other", "double white", "double yellow", "road curb", "single other", "single white",
    "single yellow", "background",
)  # fmt: skip
_UNKNOWN = 254  # of a stored value without a meaning; no kind has so many classes


def _table(values: Iterable[int]) -> np.ndarray:
    """uint8 [256]: stored value -> mask value, of 0, 1, 2, ...; 255 is ignored, others are unknown."""
    table = np.full(256, _UNKNOWN, np.uint8)
    table[255] = IGNORE
    for stored, value in enumerate(values):
        table[stored] = value
    return table


class Kind(NamedTuple):
    """A kind of masks: its folder, class names, and the meaning of stored values (uint8 [256])."""

    folder: str
    names: tuple[str, ...]
    table: np.ndarray


# Bits, least first: 3 of category, background, style, direction.
_LANE = _table(8 if bits & 8 else bits & 7 for bits in range(256))
# YOLOP takes stored values above 1 for the area or line, HybridNets those above 0; both by brightness.
_BINARY = _table([0] + [1] * 255)
KINDS: dict[str, dict[str, Kind]] = {
    "official": {
        "drivable": Kind("labels/drivable/masks/{split}", DRIVABLE, _table(range(3))),
        "sem_seg": Kind("labels/sem_seg/masks/{split}", SEM_SEG, _table(range(19))),
        "lane": Kind("labels/lane/masks/{split}", LANES, _LANE),
    },
    "per_image": {
        "drivable": Kind("da_seg_annotations/{split}", ("background", "drivable"), _BINARY),
        "lane": Kind("ll_seg_annotations/{split}", ("background", "lane"), _BINARY),
    },
}


class KindMasks:
    """The masks of one kind. ``names``: of their classes; ``there``: bool [N], whether an image has one.

    name: of the kind. merge: class -> the name it goes under. suffix: of ``mask_files`` and ``seg_merge`` in
    messages.
    """

    there: np.ndarray

    def __init__(self, name: str, kind: Kind, folder: str, merge: Any, suffix: str):
        self.name, self.folder, self.suffix, self.binary = name, folder, suffix, kind.table is _BINARY
        merge = merging(merge, f"seg_merge{suffix}")
        check_known(merge, kind.names, f"seg_merge{suffix}")
        merged = [merge.get(name, name) for name in kind.names]
        self.names = tuple(dict.fromkeys(merged))
        index = np.arange(256, dtype=np.uint8)
        index[: len(merged)] = [self.names.index(name) for name in merged]
        self._table = index[kind.table]
        self._meaning = f"{name} masks hold 0 to {len(kind.names) - 1} (255: ignored)"

    def find(self, names: Sequence[str], images: str) -> int:
        """Fill ``there`` and count the images without a mask. Raises UserError where none has one.

        names: of the images. images: their folder.
        """
        option, stems = f"mask_files{self.suffix}", [os.path.splitext(name)[0] for name in names]
        present = stems_in(self.folder, ".png", option)
        self.there = np.array([stem in present for stem in stems])
        if not self.there.any():
            hint = "; the set has sem_seg masks of images/10k, see `images`" if self.name == "sem_seg" else ""
            raise UserError(
                f"{option}: none of the images of '{images}' has a mask in '{self.folder}'; a mask is named "
                f"like its image ('{names[0]}' -> '{stems[0]}.png'){hint}"
            )
        return int((~self.there).sum())

    def read(self, files: Files, stem: str, image_path: str, image: np.ndarray) -> np.ndarray:
        """uint8 [H,W] class indices, IGNORE where void. stem: the image's name without its ending."""
        path = os.path.join(self.folder, stem + ".png")
        stored = files.mask(path)
        require_same_size(stored, path, image, image_path)
        if self.binary and stored.max() == 2:
            raise UserError(
                f"mask '{path}' holds indices up to 2 and no brightness: official masks, where 2 is the "
                "background; set `tree: official` with `images`, `labels` and `mask_files`, or make the "
                "masks 0 and 255"
            )
        mask = np.take(self._table, stored)
        if (unknown := mask == _UNKNOWN).any():
            raise UserError(
                f"mask '{path}' has value {stored[unknown].min()}, but {self._meaning}; check `masks` and "
                "`mask_files`"
            )
        return mask


def merging(given: Any, option: str) -> Mapping[str, str]:
    """A mapping of class names, empty for None. Raises UserError for anything else."""
    given = {} if given is None else given
    names = [*given, *given.values()] if isinstance(given, Mapping) else [None]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{option}: a mapping of class name -> class name is needed, not {given!r}")
    return given


def check_known(names: Iterable[str], known: Iterable[str], option: str) -> None:
    """Raise UserError for a name that is not known."""
    for name in names:
        if name not in known:
            raise UserError(f"{option}: no class is called '{name}'; {did_you_mean(name, known)}")


class GreyFiles(Files):
    """Masks by brightness, as the networks of the per-image tree read them."""

    def mask(self, path: str) -> np.ndarray:
        return self._read(path, "grey", _decode_grey, 2, np.uint8)


def _decode_grey(path: str) -> np.ndarray:
    """uint8 [H,W]: brightness of a mask without colour, whatever its file holds (grey, palette, RGB, ...)."""
    pixels = decode_image(path)
    if (pixels != pixels[..., :1]).any():
        raise UserError(
            f"mask '{path}' is in colour, but brightness tells area from background; make it 0 and 255"
        )
    return np.ascontiguousarray(pixels[..., 0])
