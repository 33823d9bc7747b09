"""What every data layout gives: ``Sample`` by index, class names, and the faults it passed over."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..registry import Registry

LAYOUTS = Registry("data layout")


@dataclass
class Sample:
    """One image and its labels; a layout gives them at the original size.

    image: uint8 [H,W,3] RGB.
    mask: uint8 [H,W] class indices, ``IGNORE`` where nothing is known; None: not labelled.
    boxes: float32 [M,4] x1,y1,x2,y2 in pixels; None: not labelled (an empty array: labelled, nothing there).
    classes: int64 [M] indices into the layout's ``classes["det"]``.
    crowd: bool [M], COCO's ``iscrowd``; where boxes are given without it, none is a crowd.
    area: float32 [M], object area in pixels as the annotation gives it (COCO's size bins use it); else the boxes'.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    boxes: np.ndarray | None = None
    classes: np.ndarray | None = None
    crowd: np.ndarray | None = None
    area: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.boxes is None:
            return
        if self.crowd is None:
            self.crowd = np.zeros(len(self.boxes), bool)
        if self.area is None:
            self.area = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1, dtype=np.float32)


class Layout:
    """A data set on disk. A subclass is one file here, registered with ``@LAYOUTS.register("name")``.

    Its keyword-only parameters are its options in YAML; a UserError of its ``__init__`` begins with the option's name.
    ``classes`` maps each task that the set labels ("seg", "det") to its class names in index order. ``faults`` counts what
    was dropped or mended, by a description in the plural.
    """

    def __init__(self) -> None:
        self.classes: dict[str, tuple[str, ...]] = {}
        self.faults: Counter[str] = Counter()

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call the image in messages and result files, e.g. its file name."""
        raise NotImplementedError

    def read(self, index: int) -> Sample:
        """Decode one sample. Raises UserError naming the file when it cannot be read."""
        raise NotImplementedError

    def _check_index(self, index: int) -> None:
        """Raise IndexError where there is no such image."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")


class Listed(Layout):
    """A layout with a list of its images: ``names``, in the order of their indices."""

    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]


def clean_boxes(boxes: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Clip boxes to the image and find the ones to keep.

    boxes: [M,4] x1,y1,x2,y2 in pixels. Returns the clipped boxes [M,4], ``keep`` bool [M], and counts of
    what was wrong (outside the image, or of no size, or not finite).
    """
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    limit = np.array([width, height, width, height], dtype=np.float32)
    clipped = np.clip(np.where(np.isfinite(boxes), boxes, 0), 0, limit)
    sized = finite & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    faults: Counter[str] = Counter()
    if n := int((~sized).sum()):
        faults["boxes of zero or negative size (dropped)"] = n
    if n := int((sized & ~inside).sum()):
        faults["boxes outside the image (dropped)"] = n
    return clipped, sized & inside, faults
