"""Labels in the data layer: the form in which a layout gives them, and what a kind of task defines for them.

This package moves, renumbers and packs labels without knowing any kind of task: it is given one ``LabelKind``
per task, which the classes in ``multitask_kd.tasks`` implement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

MIN_AREA_PX = 4  # a smaller box, at the network's size, is left out


@dataclass
class BoxLabels:
    """The labelled objects of one image.

    boxes: float32 [M,4] x1,y1,x2,y2 in pixels. classes: int64 [M]. crowd: bool [M], COCO's ``iscrowd``; None:
    none is one.
    area: float32 [M], object area in pixels as the annotation gives it (COCO's size bins use it); None: the
    boxes' own.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray | None = None
    area: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.crowd is None:
            self.crowd = np.zeros(len(self.boxes), bool)
        if self.area is None:
            self.area = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.boxes)

    def chosen(self, rows: np.ndarray) -> BoxLabels:
        """The objects of ``rows`` (bool or indices [M]) alone."""
        return BoxLabels(self.boxes[rows], self.classes[rows], self.crowd[rows], self.area[rows])


@dataclass(frozen=True)
class Geometry:
    """How an image lies in the network's input: the ``original`` (h, w), resized to ``content`` (h, w), at
    its top left corner."""

    original: tuple[int, int]
    content: tuple[int, int]


@dataclass
class Spatial:
    """The parts of a label that move with the pixels of its image, at the network's size.

    maps: arrays [H,W], resampled by nearest neighbour; pixels from outside the image get the value 255
    (IGNORE). points: float32 [P,2] x,y in pixels, an image's top left corner at 0,0; they are kept also when
    they leave the image. rest: the parts that do not move.
    """

    maps: list[np.ndarray] = field(default_factory=list)
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    rest: Any = None


class LabelKind(Protocol):
    """What a kind of task does with its labels. All methods are static: they are needed before the network's
    classes are known."""

    kind: str
    has_classes: bool

    @staticmethod
    def class_table(names: Sequence[str | None], known: Sequence[str]) -> np.ndarray:
        """The run's class index by the set's: ``names`` are the set's classes as the run calls them, None for
        one left out."""

    @staticmethod
    def renumbered(label: Any, table: np.ndarray) -> Any:
        """A layout's label in the run's classes; None where no labelled part of it is left."""

    @staticmethod
    def only_known(label: Any, known: np.ndarray) -> Any:
        """The label of an image whose set labels only the classes ``known`` (bool [C]), reduced to these;
        None where nothing is left."""

    @staticmethod
    def to_spatial(label: Any, geometry: Geometry, size: tuple[int, int]) -> Spatial:
        """A label at the original size -> letterboxed to ``size`` (H, W)."""

    @staticmethod
    def from_spatial(moved: Spatial, size: tuple[int, int], min_visible: float) -> Any:
        """The label of the augmented image. min_visible: an object with a smaller share left inside the image
        is dropped."""

    @staticmethod
    def packed(labels: Sequence[Any | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """The labels of a batch (None: not labelled), padded; ``labelled`` bool [B] is among the tensors, all
        of which have B rows."""
