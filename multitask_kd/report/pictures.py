"""Pictures of labels and predictions: masks and boxes over images, side by side, with a legend.

Images are uint8 [H,W,3] RGB. ``class_names`` is everywhere what ``Layout.classes`` holds, names by task ("seg",
"det"), or one list that serves both. A name has one colour in all pictures of one ``class_names``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..atomic import replacing
from ..batch import IGNORE

ClassNames = Mapping[str, Sequence[str]] | Sequence[str]
Colour = tuple[int, int, int]

ALPHA = 0.5  # of the mask over the image
BACKGROUND = "background"  # a class of this name is left uncoloured
INK, PAPER, DARK = (30, 30, 30), (255, 255, 255), (45, 45, 48)
HATCH = (235, 235, 235)  # stripes over pixels that do not count
FONT_SIZE, LABEL_SIZE = 13, 11
MARGIN = 8
LONGEST = 16384  # pixels of a panel's side; JPEG ends at 65500

# Okabe and Ito's colours, told apart with any colour vision; the palette continues them. Their orange is left out:
# over a photograph, at half strength, it reads as their yellow.
OKABE_ITO = ((86, 180, 233), (213, 94, 0), (0, 158, 115), (240, 228, 66), (0, 114, 178), (204, 121, 167))
# Linear RGB as seen with protanopia and deuteranopia: Machado, Oliveira and Fernandes 2009, severity 1.
PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))


def panel(
    image: np.ndarray,
    *,
    mask: Any = None,
    boxes: Any = None,
    classes: Any = None,
    scores: Any = None,
    class_names: ClassNames,
    title: str = "",
    alpha: float = ALPHA,
    min_width: int = 320,
    max_width: int = 640,
) -> np.ndarray:
    """One image with its mask and boxes drawn over it.

    image: uint8 [H,W,3]. mask: integers [H,W], IGNORE is hatched. boxes: [M,4] x1,y1,x2,y2 in pixels of ``image``, with
    ``classes`` [M] and, of predictions, ``scores`` [M]. None: not labelled, which a corner of the picture then says.
    alpha: how much the mask hides of the image, 0 to 1.
    The image is brought to a width of ``min_width`` to ``max_width`` pixels before anything is written on it,
    less where a side would be longer than LONGEST.
    Returns uint8 [H',W',3]; a title adds a strip above. Raises ValueError on other shapes or an unknown class.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}")
    tasks, colours = _by_task(class_names), palette(class_names)
    height, width = image.shape[:2]
    scale = min(float(np.clip(width, min_width, max_width)) / width, LONGEST / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != image.shape[:2]:
            raise ValueError(f"mask {list(mask.shape)} does not fit the image {list(image.shape)}")
        enlarged = cv2.resize(mask.astype(np.uint16), size, interpolation=cv2.INTER_NEAREST)
        canvas = _overlay(canvas, enlarged, tasks.get("seg", ()), colours, alpha)
    picture = Image.fromarray(canvas)
    if boxes is not None:
        _draw_boxes(picture, np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale, classes, scores, tasks, colours)
    if missing := _missing(mask, boxes, tasks):
        _tag(ImageDraw.Draw(picture), (4, size[1] - LABEL_SIZE - 11), missing, DARK)
    if title:
        picture = _stack([_strip(title, picture.width), picture])
    return np.array(picture)


def side_by_side(
    rows: Sequence[Sequence[np.ndarray]], column_titles: Sequence[str], *, class_names: ClassNames | None = None
) -> np.ndarray:
    """Panels in a grid, e.g. a row an image and the columns truth, teacher, student.

    class_names: adds a legend of these underneath. Panels may differ in size. Returns uint8 [H,W,3].
    Raises ValueError when a row has not one panel for each title.
    """
    if not rows or any(len(row) != len(column_titles) for row in rows):
        raise ValueError(f"{len(column_titles)} titles need rows of as many panels, not {[len(r) for r in rows]}")
    widths = [max(row[c].shape[1] for row in rows) for c in range(len(column_titles))]
    total = sum(widths) + MARGIN * (len(widths) + 1)
    titles = Image.new("RGB", (total, FONT_SIZE + 8), PAPER)
    strips = [titles]
    for row in rows:
        strips.append(Image.new("RGB", (total, max(p.shape[0] for p in row) + MARGIN), PAPER))
    left = MARGIN
    for c, (title, width) in enumerate(zip(column_titles, widths, strict=True)):
        font = _font(FONT_SIZE)
        text = _fit(title, font, width)
        offset = int(width - font.getlength(text)) // 2
        ImageDraw.Draw(titles).text((left + offset, titles.height // 2), text, INK, font, anchor="lm")
        for strip, row in zip(strips[1:], rows, strict=True):
            strip.paste(Image.fromarray(row[c]), (left, 0))
        left += width + MARGIN
    if class_names is not None:
        strips.append(Image.fromarray(legend(class_names, total)))
    return np.array(_stack(strips))


def legend(class_names: ClassNames, width: int = 640) -> np.ndarray:
    """Every class name beside its colour, in columns. Returns uint8 [H,width,3]."""
    font, swatch, line = _font(FONT_SIZE), FONT_SIZE, FONT_SIZE + 7
    entries = [(name, _swatch(colour, swatch)) for name, colour in palette(class_names).items() if not _hidden(name)]
    if "seg" in _by_task(class_names):
        entries.append(("not counted", _hatched_swatch(swatch)))
    room = max(width - 2 * MARGIN, 1)
    column = min(room, int(max((font.getlength(name) for name, _ in entries), default=0)) + swatch + 6 + 2 * MARGIN)
    columns = max(1, room // column)
    picture = Image.new("RGB", (width, -(-len(entries) // columns) * line + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (name, patch) in enumerate(entries):
        x, y = MARGIN + i % columns * column, MARGIN // 2 + i // columns * line
        picture.paste(patch, (x, y + (line - swatch) // 2))
        text = _fit(name, font, column - swatch - 6)
        draw.text((x + swatch + 6, y + line // 2), text, INK, font, anchor="lm")
    return np.array(picture)


def save_png(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 [H,W,3] as PNG: the whole file or none. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        Image.fromarray(array).save(file, format="PNG")


def palette(class_names: ClassNames) -> dict[str, Colour]:
    """A colour for each name, in the order in which segmentation, then detection, first has it."""
    names = list(dict.fromkeys(name for task in _by_task(class_names).values() for name in task))
    shown = [name for name in names if not _hidden(name)]
    colours = dict(zip(shown, separated_colours(len(shown)), strict=True))
    return {name: colours.get(name, (128, 128, 128)) for name in names}


@lru_cache(maxsize=8)
def separated_colours(count: int) -> tuple[Colour, ...]:
    """``count`` colours, each as far as can be from those before it, to normal vision and to two colour blindnesses.

    The first colours do not depend on ``count``.
    """
    levels = np.arange(0, 256, 36)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _lab(grid / 255)
    # Neither near black or white, where a mask reads as shadow or glare, nor near grey.
    grid = grid[(lab[:, 0] > 34) & (lab[:, 0] < 92) & (np.hypot(lab[:, 1], lab[:, 2]) > 25)]
    seen, chosen = _as_seen(grid), list(OKABE_ITO[:count])
    nearest = np.full(len(grid), np.inf)
    for colour in chosen:
        nearest = np.minimum(nearest, _difference(seen, _as_seen(np.array([colour]))))
    while len(chosen) < min(count, len(OKABE_ITO) + len(grid)):
        best = int(nearest.argmax())
        chosen.append(tuple(int(v) for v in grid[best]))
        nearest = np.minimum(nearest, _difference(seen, seen[:, best : best + 1]))
        nearest[best] = -1  # even where two colours look the same to someone, none is given twice
    return tuple(chosen[i % len(chosen)] for i in range(count))


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [N,3] in [0,1] -> CIELAB [N,3]."""
    return cv2.cvtColor(rgb.astype(np.float32)[None], cv2.COLOR_RGB2LAB)[0]


def _as_seen(rgb: np.ndarray) -> np.ndarray:
    """Colours [N,3] in 0..255 -> CIELAB [3,N,3] with normal vision, protanopia and deuteranopia."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    views = [_lab(srgb)]
    for matrix in (PROTANOPIA, DEUTERANOPIA):
        shifted = np.clip(linear @ np.array(matrix).T, 0, 1)
        views.append(_lab(np.where(shifted <= 0.0031308, shifted * 12.92, 1.055 * shifted ** (1 / 2.4) - 0.055)))
    return np.stack(views)


def _difference(some: np.ndarray, one: np.ndarray) -> np.ndarray:
    """[3,N,3] against [3,1,3]: how far apart the colours [N] are, half for most viewers, half for the worst off."""
    distances = np.linalg.norm(some - one, axis=-1)
    return (distances[0] + distances.min(axis=0)) / 2


def _by_task(class_names: ClassNames) -> dict[str, Sequence[str]]:
    if isinstance(class_names, Mapping):
        return dict(sorted(class_names.items(), key=lambda item: item[0] != "seg"))
    return {"seg": class_names, "det": class_names}


def _hidden(name: str) -> bool:
    return name.lower() == BACKGROUND


def _missing(mask: Any, boxes: Any, tasks: Mapping[str, Any]) -> str:
    absent = [word for word, labels, task in (("mask", mask, "seg"), ("boxes", boxes, "det")) if task in tasks and labels is None]
    if mask is None and boxes is None:
        return "no labels"
    return f"no {absent[0]}" if absent else ""


def _overlay(canvas: np.ndarray, mask: np.ndarray, names: Sequence[str], colours: Mapping[str, Colour], alpha: float) -> np.ndarray:
    ignored = mask == IGNORE
    if (wrong := mask[~ignored]).size and wrong.max() >= len(names):
        raise ValueError(f"mask holds class {wrong.max()}; there are {len(names)} classes and IGNORE is {IGNORE}")
    table = np.zeros((max(len(names), IGNORE + 1), 3), dtype=np.uint8)
    shown = np.zeros(len(table), dtype=bool)
    for i, name in enumerate(names):
        table[i], shown[i] = colours[name], not _hidden(name)
    blended = cv2.addWeighted(canvas, 1 - alpha, table[mask], alpha, 0)
    result = np.where(shown[mask][..., None], blended, canvas)
    edges = np.zeros(mask.shape, dtype=bool)
    edges[:, 1:] = mask[:, 1:] != mask[:, :-1]
    edges[1:] |= mask[1:] != mask[:-1]
    result[edges] //= 2
    result[ignored & _stripes(*mask.shape)] = HATCH
    result[ignored] = (0.55 * canvas[ignored] + 0.45 * result[ignored]).astype(np.uint8)
    return result


def _stripes(height: int, width: int) -> np.ndarray:
    """Diagonal stripes [H,W]: true on 2 of 6 pixels."""
    return (np.add.outer(np.arange(height), np.arange(width)) % 6) < 2


def _draw_boxes(
    picture: Image.Image,
    boxes: np.ndarray,
    classes: Any,
    scores: Any,
    tasks: Mapping[str, Sequence[str]],
    colours: Mapping[str, Colour],
) -> None:
    """Outlines first, then names, the best first: a name that would cover another moves, or gives way."""
    if classes is None:
        raise ValueError("boxes need their classes")
    classes = np.asarray(classes, dtype=np.int64).reshape(-1)
    ranks = np.ones(len(boxes)) if scores is None else np.asarray(scores, dtype=np.float64).reshape(-1)
    if not len(boxes) == len(classes) == len(ranks):
        raise ValueError(f"{len(boxes)} boxes, {len(classes)} classes and {len(ranks)} scores")
    names = tasks.get("det", ())
    if len(classes) and (classes.min() < 0 or classes.max() >= len(names)):
        raise ValueError(f"boxes hold classes {classes.min()}..{classes.max()}, outside 0..{len(names) - 1}")
    draw, order = ImageDraw.Draw(picture), np.argsort(-ranks, kind="stable")
    limit = np.array([picture.width, picture.height] * 2) - 1
    # An untrained model's boxes may be inside out or not finite; a picture must not end its training.
    boxes = np.nan_to_num(boxes, nan=0)
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    corners = [tuple(box) for box in np.clip(boxes.round(), 0, limit).astype(int).tolist()]
    for i in order[::-1]:
        x1, y1, x2, y2 = corners[i]
        colour = colours[names[classes[i]]]
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_readable_on(colour), width=4)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=2)
    taken: list[tuple[int, int, int, int]] = []
    for i in order:
        name = names[classes[i]]
        text = name if scores is None else f"{name} {ranks[i]:.2f}"
        place = _free_place(draw, text, corners[i], picture.size, taken)
        if place is not None:
            taken.append(_tag(draw, place, text, colours[name]))


def _free_place(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int] | None:
    """Where a name goes: above its box, below it or within it; None where all of these are taken."""
    width, height = _tag_size(text)
    x1, y1, x2, y2 = box
    for x, y in (
        (x1 - 1, y1 - height),
        (x1 - 1, y2 + 1),
        (x1 - 1, y1 + 1),
        (x2 - width, y1 - height),
        (x2 - width, y2 + 1),
    ):
        x = min(max(x, 0), max(size[0] - width, 0))
        if y < 0 or y + height > size[1]:
            continue
        if all(x >= t[2] or t[0] >= x + width or y >= t[3] or t[1] >= y + height for t in taken):
            return x, y
    return None


def _tag_size(text: str) -> tuple[int, int]:
    return int(np.ceil(_font(LABEL_SIZE).getlength(text))) + 6, LABEL_SIZE + 4


def _tag(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: Colour) -> tuple[int, int, int, int]:
    """Text on a coloured ground; returns the corners x1,y1,x2,y2 that it covers."""
    (x, y), (width, height) = place, _tag_size(text)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    draw.text((x + 3, y + height / 2), text, _readable_on(colour), _font(LABEL_SIZE), anchor="lm")
    return x, y, x + width, y + height


def _readable_on(colour: Colour) -> Colour:
    return INK if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 120 else PAPER


def _strip(title: str, width: int) -> Image.Image:
    strip = Image.new("RGB", (width, FONT_SIZE + 9), DARK)
    font = _font(FONT_SIZE)
    ImageDraw.Draw(strip).text((6, strip.height / 2), _fit(title, font, width - 12), PAPER, font, anchor="lm")
    return strip


def _swatch(colour: Colour, size: int) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def _hatched_swatch(size: int) -> Image.Image:
    pixels = np.full((size, size, 3), 150, dtype=np.uint8)
    pixels[_stripes(size, size)] = HATCH
    return Image.fromarray(pixels)


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def _fit(text: str, font: Any, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


@lru_cache(maxsize=4)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
