"""A contact sheet: labelled images side by side, with the classes of larger regions written on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..batch import IGNORE
from .colours import PAPER, is_background
from .layers import BoxLayer, InsetLayer, Layer, MaskLayer, TextLayer
from .pictures import inset_frames, legend, panel, side_by_side, text_frames

FEW = 24  # classes; beyond, only those on the sheet get a colour: more cannot be told apart
WIDTH = 420  # of a panel in pixels
NAMED = 0.02  # share of the picture from which a class is named in it
FONT_SIZE, OUTLINE = 11, (20, 20, 20)
TAG = 16  # pixels around a box in which its own name may stand
APART = 30  # pixels beside the names of one mask in which those of the next do not begin

Names = Mapping[str, Sequence[str]]


@dataclass
class Labelled:
    """An image and what is drawn over it, by task; missing: as ``panel`` takes it."""

    title: str
    image: np.ndarray
    layers: Mapping[str, Layer] = field(default_factory=dict)
    missing: str = ""


def contact_sheet(shown: Sequence[Labelled], class_names: Names, columns: int = 3) -> np.ndarray:
    """The images in rows of ``columns``, with a legend underneath. Returns uint8 [H,W,3].

    class_names: by task, in the order in which tasks choose their colours. Crowds are a class of their own.
    Raises ValueError when there is nothing to show.
    """
    if not shown:
        raise ValueError("a contact sheet needs an image")
    columns = min(columns, len(shown))
    shown, names = _recoded(shown, class_names)
    panels = [_panel(one, names) for one in shown]
    panels += [np.full((1, 1, 3), PAPER, dtype=np.uint8)] * (-len(panels) % columns)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    sheet = side_by_side(rows, [""] * columns)
    masks = any(isinstance(layer, MaskLayer) for one in shown for layer in one.layers.values())
    return np.concatenate([sheet, legend(names, sheet.shape[1], hatched=masks)])


def _recoded(shown: Sequence[Labelled], class_names: Names) -> tuple[list[Labelled], dict[str, list[str]]]:
    """The labels in classes of the sheet, and these by task: of many, those that occur on it; and crowds.

    Tasks without masks and boxes on the sheet have no colours, and so no classes.
    """
    kept: dict[str, list[str]] = {}
    recoded = [replace(one, layers=dict(one.layers)) for one in shown]
    for task, names in class_names.items():
        mine = [one.layers for one in recoded if isinstance(one.layers.get(task), (MaskLayer, BoxLayer))]
        if not mine:
            continue
        values = [_values(layers[task], len(names)) for layers in mine]
        occur = np.unique(np.concatenate([np.unique(found) for found in values])).astype(int)
        crowds = [f"{name} (crowd)" for name in names if isinstance(mine[0][task], BoxLayer)]
        kept[task], table = _kept([*names, *crowds], occur, always=len(names))
        for layers, found in zip(mine, values, strict=True):
            layers[task] = _with_values(layers[task], table[found], kept[task])
    return recoded, kept


def _values(layer: MaskLayer | BoxLayer, count: int) -> np.ndarray:
    """Classes of pixels or boxes as integers; those of crowds stand ``count`` higher."""
    if isinstance(layer, MaskLayer):
        return np.asarray(layer.mask).astype(np.int64)
    classes = np.asarray(layer.classes, dtype=np.int64)
    return classes if layer.crowd is None else classes + count * np.asarray(layer.crowd, dtype=np.int64)


def _with_values(
    layer: MaskLayer | BoxLayer, values: np.ndarray, names: Sequence[str]
) -> MaskLayer | BoxLayer:
    if isinstance(layer, MaskLayer):
        return MaskLayer(values, names)
    return BoxLayer(layer.boxes, values, names, layer.scores)


def _kept(names: Sequence[str], occur: np.ndarray, always: int | None = None) -> tuple[list[str], np.ndarray]:
    """The names to keep, and a table from an index (or IGNORE) to the place among them.

    always: how many stay when they are few.
    """
    always = len(names) if always is None else always
    stay = range(always if always <= FEW else 0)
    places = sorted({*stay, *(int(i) for i in occur if i < len(names))})
    table = np.full(max(len(names), IGNORE + 1), IGNORE, dtype=np.int64)
    table[places] = np.arange(len(places))
    return [names[i] for i in places], table


def _panel(one: Labelled, names: Names) -> np.ndarray:
    """The image under its masks and boxes, then the names of regions, then all else that may cover these."""
    size = {"min_width": WIDTH, "max_width": WIDTH}
    layers = list(one.layers.values())
    under = [layer for layer in layers if isinstance(layer, (MaskLayer, BoxLayer))]
    over = [layer for layer in layers if not isinstance(layer, (MaskLayer, BoxLayer))]
    picture = Image.fromarray(panel(one.image, under, class_names=names, **size))
    _name_regions(picture, one.image.shape[1], layers)
    return panel(np.array(picture), over, class_names=names, title=one.title, missing=one.missing, **size)


def _name_regions(picture: Image.Image, width: int, layers: Sequence[Layer]) -> None:
    """Write the classes of masks on ``picture``, where nothing else stands. width: of the original image."""
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    free = _free(picture.size, picture.width / width, layers)
    for layer in layers:
        if not isinstance(layer, MaskLayer):
            continue
        mask = cv2.resize(layer.mask.astype(np.uint16), picture.size, interpolation=cv2.INTER_NEAREST)
        written = []
        for name, (x, y) in _places(mask, layer.names, free):
            room = font.getlength(name) / 2 + 2
            x = min(max(x, room), mask.shape[1] - room)
            pen.text((x, y), name, PAPER, font, anchor="mm", stroke_width=2, stroke_fill=OUTLINE)
            written.append((int(x - room) - APART, y - FONT_SIZE, int(x + room) + APART, y + FONT_SIZE))
        _take(free, written)


def _free(size: tuple[int, int], scale: float, layers: Sequence[Layer]) -> np.ndarray:
    """Where a name may stand in a picture of ``size`` (width, height), bool [h,w]: not on anything else."""
    free = np.ones(size[::-1], dtype=bool)
    for layer in layers:
        if isinstance(layer, BoxLayer):
            boxes = np.asarray(layer.boxes).reshape(-1, 4) * scale
            _take(free, [(int(x1), int(y1) - TAG, int(x2) + TAG, int(y2) + TAG) for x1, y1, x2, y2 in boxes])
    _take(free, inset_frames([layer for layer in layers if isinstance(layer, InsetLayer)], size))
    _take(free, text_frames([layer for layer in layers if isinstance(layer, TextLayer)], size))
    return free


def _take(free: np.ndarray, frames: Sequence[tuple[int, int, int, int]]) -> None:
    for x1, y1, x2, y2 in frames:
        free[max(0, y1) : max(0, y2), max(0, x1) : max(0, x2)] = False


def _places(
    mask: np.ndarray, names: Sequence[str], free: np.ndarray
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Where each class's name goes: x, y of the pixel furthest from its regions' edge, where ``free``."""
    for value in np.unique(mask):
        if value >= len(names) or is_background(names[value]) or (mask == value).mean() < NAMED:
            continue
        inner = cv2.distanceTransform(np.pad((mask == value) & free, 1).astype(np.uint8), cv2.DIST_L2, 3)
        inner = inner[1:-1, 1:-1]
        if (depth := inner.max()) > FONT_SIZE / 2:
            spots = np.argwhere(inner > depth - 1)  # y, x; of these the one in their middle
            y, x = spots[np.abs(spots - spots.mean(axis=0)).sum(axis=1).argmin()]
            yield names[value], (int(x), int(y))
