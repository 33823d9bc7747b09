"""What ``tools/data.py`` counts of the labels of a set, by the form of a label: see ``tasks.base.Tally``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..batch import IGNORE
from ..data.labels import MIN_AREA_PX, BoxLabels
from ..report.tables import table
from .base import Tally

QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "half": 0.5, "75%": 0.75, "95%": 0.95, "most": 1.0}
# pixels of area below which COCO's evaluation says so
COCO_SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": np.inf}


class ClassTally(Tally):
    """Of labels that are one class an image (int): images by class.

    images: int64 [C], labelled images in which each class occurs, which the other tallies here count too.
    """

    def __init__(self, classes: Sequence[str], input_size: tuple[int, int], cell: int | None):
        super().__init__(classes, input_size, cell)
        self.images = np.zeros(len(self.classes), np.int64)

    def look(self, label: Any, image_size: tuple[int, int]) -> Any:
        return np.bincount([int(label)], minlength=len(self.classes))

    def add(self, looked: Any) -> None:
        super().add(looked)
        self.images += looked

    def figures(self) -> dict[str, Any]:
        return {"classes": {name: self._counts(index) for index, name in enumerate(self.classes)}}

    def class_columns(self) -> dict[str, str]:
        return {"images": "images"}

    def class_row(self, name: str) -> dict[str, Any]:
        return self._counts(self.classes.index(name)) if name in self.classes else {}

    def never(self) -> list[str]:
        return [name for name, count in zip(self.classes, self.images, strict=True) if not count]

    def _counts(self, index: int) -> dict[str, Any]:
        """The figures of one class."""
        return {"images": int(self.images[index])}


class MaskTally(ClassTally):
    """Of masks [H,W]: pixels and images by class, and pixels that do not count.

    pixels: int64 [256] by value of the mask.
    """

    def __init__(self, classes: Sequence[str], input_size: tuple[int, int], cell: int | None):
        super().__init__(classes, input_size, cell)
        self.pixels = np.zeros(IGNORE + 1, np.int64)

    @property
    def void(self) -> int:
        """Pixels that do not count."""
        return int(self.pixels[IGNORE])

    def look(self, label: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Pixels by value of the mask: int64 [256]."""
        return np.bincount(label.ravel(), minlength=IGNORE + 1)

    def add(self, looked: np.ndarray) -> None:
        super().add(looked[: len(self.classes)] > 0)
        self.pixels += looked

    def figures(self) -> dict[str, Any]:
        return {"void_percent": percent(self.void, self._counted() + self.void), **super().figures()}

    def summary(self) -> str:
        return f", {percent(self.void, self._counted() + self.void):.1f} % of the pixels void"

    def class_columns(self) -> dict[str, str]:
        return {"percent": "% of pixels", "images": "in masks"}

    def _counted(self) -> int:
        return int(self.pixels[: len(self.classes)].sum())

    def _counts(self, index: int) -> dict[str, Any]:
        pixels = int(self.pixels[index])
        return {"pixels": pixels, **super()._counts(index), "percent": percent(pixels, self._counted())}


class BoxTally(ClassTally):
    """Of boxes: boxes, crowds and images by class, and how large the boxes are.

    boxes, crowds: int64 [C]. empty: labelled images without either.
    """

    def __init__(self, classes: Sequence[str], input_size: tuple[int, int], cell: int | None):
        super().__init__(classes, input_size, cell)
        self.boxes, self.crowds = np.zeros((2, len(self.classes)), np.int64)
        self.empty = 0
        self._sizes: list[np.ndarray] = [np.zeros((2, 0))]

    def look(self, label: BoxLabels, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes and crowds by class, int64 [2,C]; and float64 [2,M] of boxes that are no crowds: sqrt(width x
        height) in pixels of the network's input, and the labelled area in pixels of the image."""
        crowds = [label.classes[label.crowd == crowd] for crowd in (False, True)]
        counts = np.stack([np.bincount(classes, minlength=len(self.classes)) for classes in crowds])
        scale = min(new / old for new, old in zip(self.input_size, image_size, strict=True))
        sides = (label.boxes[~label.crowd, 2:] - label.boxes[~label.crowd, :2]).astype(np.float64)
        return counts, np.stack([scale * np.sqrt(sides.prod(axis=1)), label.area[~label.crowd]])

    def add(self, looked: tuple[np.ndarray, np.ndarray]) -> None:
        counts, sizes = looked
        super().add(counts.any(axis=0))
        self.boxes += counts[0]
        self.crowds += counts[1]
        self.empty += not counts.any()
        self._sizes.append(sizes)

    def figures(self) -> dict[str, Any]:
        plain = {"boxes": int(self.boxes.sum()), "images_without_boxes": self.empty, **super().figures()}
        return plain | self._of_sizes()

    def summary(self) -> str:
        if not self.labelled:
            return ""
        boxes, crowds = int(self.boxes.sum()), int(self.crowds.sum())
        text = f", {counted(boxes, 'box', 'boxes')}" + (f" and {counted(crowds, 'crowd')}" if crowds else "")
        text += f", {boxes / self.labelled:.1f} an image"
        return text + (f", {counted(self.empty, 'image')} without any" if self.empty else "")

    def class_columns(self) -> dict[str, str]:
        crowds = {"crowds": "crowds"} if self.crowds.any() else {}
        return {"boxes": "boxes", **crowds, "images": "in images"}

    def sections(self) -> list[str]:
        found = self._of_sizes()
        if not found:
            return []
        height, width = self.input_size
        lines = [f"box size, sqrt(width x height) in pixels of the input of {width}x{height}"]
        lines.append(table([found["input_px"]], {key: key for key in QUANTILES}))
        if self.cell:
            share = found["below_cell_percent"]
            lines.append(f"{share:.1f} % are smaller than the finest detection cell of {self.cell} pixels")
        if share := found["left_out_percent"]:
            lines.append(
                f"{share:.1f} % cover less than {MIN_AREA_PX} pixels there and are left out in training"
            )
        shares = ", ".join(f"{share:.1f} % {name}" for name, share in found["coco_percent"].items())
        return ["\n".join([*lines, f"by COCO's areas, in original pixels: {shares}"])]

    def _of_sizes(self) -> dict[str, Any]:
        """Figures of the sizes of all boxes that are no crowds; empty where there are none."""
        sizes, areas = np.concatenate(self._sizes, axis=1)
        if not len(sizes):
            return {}
        below = percent((sizes < self.cell).sum(), len(sizes)) if self.cell else None
        return {
            "input_px": _spread(np.quantile(sizes, list(QUANTILES.values()))),
            "below_cell_percent": below,
            "left_out_percent": percent((sizes**2 < MIN_AREA_PX).sum(), len(sizes)),
            "coco_percent": _coco_shares(areas),
        }

    def _counts(self, index: int) -> dict[str, Any]:
        return {"boxes": int(self.boxes[index]), "crowds": int(self.crowds[index]), **super()._counts(index)}


class DepthTally(Tally):
    """Of depth maps [H,W] in metres: how many pixels are known, and how far away they are."""

    LEAST, MOST = 1e-3, 1e4  # metres between which quantiles are told apart,
    STEP = 1e-3  # to this share of their value

    def __init__(self, classes: Sequence[str], input_size: tuple[int, int], cell: int | None):
        super().__init__(classes, input_size, cell)
        self.known = self.pixels = 0
        self._bins = np.zeros(int(np.log(self.MOST / self.LEAST) / self.STEP) + 1, np.int64)
        self._ends = [np.inf, 0.0]

    def look(
        self, label: np.ndarray, image_size: tuple[int, int]
    ) -> tuple[int, np.ndarray, tuple[float, float]]:
        """Pixels; known pixels by the logarithm of their depth, int64 [bins]; the least and most metres."""
        metres = label[np.isfinite(label) & (label > 0)].astype(np.float64)
        place = (np.log(metres / self.LEAST) / self.STEP).clip(0, len(self._bins) - 1).astype(np.int64)
        ends = (metres.min(), metres.max()) if len(metres) else (np.inf, 0.0)
        return label.size, np.bincount(place, minlength=len(self._bins)), ends

    def add(self, looked: tuple[int, np.ndarray, tuple[float, float]]) -> None:
        super().add(looked)
        pixels, bins, (least, most) = looked
        self.pixels += pixels
        self.known += int(bins.sum())
        self._bins += bins
        self._ends = [min(self._ends[0], least), max(self._ends[1], most)]

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {"known_percent": percent(self.known, self.pixels)}
        return found | ({"metres": self._quantiles()} if self.known else {})

    def summary(self) -> str:
        return f", {percent(self.known, self.pixels):.1f} % of the pixels known" if self.labelled else ""

    def sections(self) -> list[str]:
        if not self.known:
            return []
        lines = [
            "metres of the known pixels",
            table([self._quantiles()], {key: key for key in QUANTILES}),
        ]
        return ["\n".join(lines)]

    def _quantiles(self) -> dict[str, float]:
        """Metres by the name of the quantile, of all known pixels of the set."""
        first = np.searchsorted(np.cumsum(self._bins), np.array(list(QUANTILES.values())) * self.known)
        metres = self.LEAST * np.exp((first + 0.5) * self.STEP)
        least, most = self._ends
        metres[0], metres[-1] = least, most
        return _spread(metres.clip(least, most))


def percent(part: float, whole: float) -> float:
    """The share of ``part`` in ``whole``, in percent with three decimals; 0 of nothing."""
    return round(100 * float(part) / float(whole), 3) if whole else 0.0


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 box", "3 boxes": a number and the word for it. many: where it is not ``one`` and an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def _spread(values: np.ndarray) -> dict[str, float]:
    """Values of QUANTILES by their names."""
    return dict(zip(QUANTILES, values.round(2).tolist(), strict=True))


def _coco_shares(areas: np.ndarray) -> Mapping[str, float]:
    """Percent of the areas (pixels) in each of COCO's sizes."""
    found = np.searchsorted(list(COCO_SIZES.values()), areas, side="right").clip(max=len(COCO_SIZES) - 1)
    counts = np.bincount(found, minlength=len(COCO_SIZES))
    return {name: percent(count, len(areas)) for name, count in zip(COCO_SIZES, counts, strict=True)}
