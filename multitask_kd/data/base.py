"""The interface of a data layout: ``Sample`` by index, names of labels and classes, counts of the faults it
dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..registry import Registry

LAYOUTS = Registry("data layout")


@dataclass
class Sample:
    """One image and its labels; a layout gives them at the original size.

    image: uint8 [H,W,3] RGB.
    labels: by the label's name; a name that is missing is not labelled in this image. What a label is depends
    on its kind:
        semantic: uint8 [H,W] class indices, ``IGNORE`` where nothing is known;
        detection: ``BoxLabels`` (without rows: labelled, and the image has no object);
        classification: int, the class index;
        depth: float32 [H,W] in metres, 0 where it is not known.
    known: by the label's name, bool [C]: the classes that are labelled in this image at all; missing: all of
    them.
    """

    image: np.ndarray
    labels: dict[str, Any] = field(default_factory=dict)
    known: dict[str, np.ndarray] = field(default_factory=dict)


class Layout:
    """A data set on disk. A subclass is one file in layouts/, registered with ``@LAYOUTS.register("name")``.

    Its keyword-only parameters are its options in YAML; a UserError of its ``__init__`` begins with the
    option's name.
    ``classes``: by the name of each label that the set gives, its class names in index order (empty for a
    kind without classes);
    ``kinds``: the kind of each. ``add_label`` fills both. ``faults`` counts what was dropped or repaired, by
    a description in the plural. ``seen``: by label, int64 [C], how often each class occurs in the set, where
    that is known without reading images. ``wanted``: names of the labels that a run uses, None for all;
    ``read`` need not return others.
    """

    def __init__(self) -> None:
        self.classes: dict[str, tuple[str, ...]] = {}
        self.kinds: dict[str, str] = {}
        self.faults: Counter[str] = Counter()
        self.seen: dict[str, np.ndarray] = {}
        self.wanted: frozenset[str] | None = None

    def add_label(self, name: str, kind: str, classes: Sequence[str] = ()) -> None:
        """Declare that the set gives the label ``name`` of a kind, with these class names in index order."""
        self.classes[name], self.kinds[name] = tuple(classes), kind

    def gives(self, name: str) -> bool:
        """Whether the set has the label ``name`` and the run uses it."""
        return name in self.classes and (self.wanted is None or name in self.wanted)

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

    boxes: [M,4] x1,y1,x2,y2 in pixels. Returns the clipped boxes [M,4], ``keep`` bool [M], and counts of the
    faults (outside the image, or of no size, or not finite).
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
