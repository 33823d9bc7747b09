"""A contact sheet: labelled images side by side, the larger regions of a mask with their class written on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..batch import IGNORE
from .pictures import BACKGROUND, PAPER, legend, panel, side_by_side

FEW = 24  # classes; beyond, only those on the sheet get a colour: more cannot be told apart
WIDTH = 420  # of a panel in pixels
NAMED = 0.02  # share of the picture from which a class is named in it
FONT_SIZE, OUTLINE = 11, (20, 20, 20)
TAG = 16  # pixels around a box in which its own name may stand


@dataclass
class Labelled:
    """An image and its labels, as ``panel`` takes them; crowd: bool [M]."""

    title: str
    image: np.ndarray
    mask: np.ndarray | None = None
    boxes: np.ndarray | None = None
    classes: np.ndarray | None = None
    crowd: np.ndarray | None = None


def contact_sheet(shown: Sequence[Labelled], class_names: Mapping[str, Sequence[str]], columns: int = 3) -> np.ndarray:
    """The images in rows of ``columns``, with a legend underneath. class_names: by task. Returns uint8 [H,W,3].

    Crowds are a class of their own here. Raises ValueError when there is nothing to show.
    """
    if not shown:
        raise ValueError("a contact sheet needs an image")
    columns = min(columns, len(shown))
    shown, names = _recoded(shown, class_names)
    panels = [_panel(one, names) for one in shown]
    panels += [np.full((1, 1, 3), PAPER, dtype=np.uint8)] * (-len(panels) % columns)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    sheet = side_by_side(rows, [""] * columns)
    return np.concatenate([sheet, legend(names, sheet.shape[1])])


def _recoded(shown: Sequence[Labelled], names: Mapping[str, Sequence[str]]) -> tuple[list[Labelled], dict[str, list[str]]]:
    """The labels in classes of the sheet: of many, those that occur on it; and crowds."""
    kept: dict[str, list[str]] = {}
    recoded = [Labelled(**vars(one)) for one in shown]
    if "seg" in names:
        masks = [one.mask for one in shown if one.mask is not None]
        occur = np.unique(np.concatenate([np.unique(mask) for mask in masks] or [[]])).astype(int)
        kept["seg"], table = _kept(names["seg"], occur)
        for one in recoded:
            one.mask = None if one.mask is None else table[one.mask]
    if "det" in names:
        crowds = [f"{name} (crowd)" for name in names["det"]]
        labels = [_labels(one, len(crowds)) for one in shown]
        occur = np.unique(np.concatenate([found for found in labels if found is not None] or [[]])).astype(int)
        kept["det"], table = _kept([*names["det"], *crowds], occur, always=len(crowds))
        for one, found in zip(recoded, labels, strict=True):
            one.classes = None if found is None else table[found]
    return recoded, kept


def _labels(one: Labelled, count: int) -> np.ndarray | None:
    if one.boxes is None:
        return None
    return one.classes if one.crowd is None else one.classes + count * one.crowd


def _kept(names: Sequence[str], occur: np.ndarray, always: int | None = None) -> tuple[list[str], np.ndarray]:
    """The names to keep, and a table from an index (or IGNORE) to the place among them. always: how many stay when few."""
    always = len(names) if always is None else always
    stay = range(always if always <= FEW else 0)
    places = sorted({*stay, *(int(i) for i in occur if i < len(names))})
    table = np.full(max(len(names), IGNORE + 1), IGNORE, dtype=np.int64)
    table[places] = np.arange(len(places))
    return [names[i] for i in places], table


def _panel(one: Labelled, names: Mapping[str, Sequence[str]]) -> np.ndarray:
    labels = {"mask": one.mask} if "seg" in names else {}
    if "det" in names:
        labels |= {"boxes": one.boxes, "classes": one.classes}
    drawn = panel(one.image, class_names=names, title=one.title, min_width=WIDTH, max_width=WIDTH, **labels)
    if one.mask is None:
        return drawn
    height = max(1, round(one.image.shape[0] * WIDTH / one.image.shape[1]))
    mask = cv2.resize(one.mask.astype(np.uint8), (drawn.shape[1], height), interpolation=cv2.INTER_NEAREST)
    free = np.ones(mask.shape, dtype=bool)
    for x1, y1, x2, y2 in np.asarray([] if one.boxes is None else one.boxes) * WIDTH / one.image.shape[1]:
        free[max(0, int(y1) - TAG) : int(y2) + TAG, max(0, int(x1)) : int(x2) + TAG] = False
    picture = Image.fromarray(drawn)
    pen, font, top = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE), drawn.shape[0] - height
    for name, (x, y) in _places(mask, names["seg"], free):
        room = font.getlength(name) / 2 + 2
        x = min(max(x, room), mask.shape[1] - room)
        pen.text((x, y + top), name, PAPER, font, anchor="mm", stroke_width=2, stroke_fill=OUTLINE)
    return np.array(picture)


def _places(mask: np.ndarray, names: Sequence[str], free: np.ndarray) -> Iterator[tuple[str, tuple[int, int]]]:
    """Where the name of each class goes: x, y of the pixel furthest from the edge of its regions, where ``free``."""
    for value in np.unique(mask):
        if value >= len(names) or names[value].lower() == BACKGROUND or (mask == value).mean() < NAMED:
            continue
        inner = cv2.distanceTransform(np.pad((mask == value) & free, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
        if (depth := inner.max()) > FONT_SIZE / 2:
            spots = np.argwhere(inner > depth - 1)  # y, x; of these the one in their middle
            y, x = spots[np.abs(spots - spots.mean(axis=0)).sum(axis=1).argmin()]
            yield names[value], (int(x), int(y))
