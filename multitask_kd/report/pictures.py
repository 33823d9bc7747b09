"""Pictures of labels and predictions: layers over images, side by side, with a legend.

Images are uint8 [H,W,3] RGB. ``class_names`` is everywhere the class names by task, in the order in which
the tasks choose their colours, or one list. A name has one colour in all pictures of one ``class_names``.
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
from .colours import GREY, INK, PAPER, ClassNames, Colour, is_background, palette, readable_on
from .layers import BoxLayer, InsetLayer, Layer, MaskLayer, TextLayer

__all__ = ["inset_frames", "legend", "palette", "panel", "save_png", "side_by_side", "text_frames"]

ALPHA = 0.5  # of the mask over the image
DARK = (45, 45, 48)
HATCH = (235, 235, 235)  # stripes over pixels that do not count
FONT_SIZE, LABEL_SIZE = 13, 11
MARGIN = 8
LONGEST = 16384  # pixels of a panel's side; JPEG ends at 65500
LINE = 0.004  # width of the outline of a mask over another mask, in widths of the picture
STRIPE = 0.03  # likewise from one stripe of such a mask to the next
INSET, GAP = 0.32, 4  # width of an inset in widths of the picture; pixels around it

Frame = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the picture


def panel(
    image: np.ndarray,
    layers: Sequence[Layer] = (),
    *,
    class_names: ClassNames,
    title: str = "",
    missing: str = "",
    alpha: float = ALPHA,
    min_width: int = 320,
    max_width: int = 640,
) -> np.ndarray:
    """One image with layers drawn over it: masks in their order, then boxes, insets and texts.

    The first mask is filled, and hatched where it is IGNORE. A further one is outlined and striped, so that
    what lies below it can be seen, while thin regions (lanes) are full; where it is IGNORE, nothing is drawn.
    The image is brought to a width of ``min_width`` to ``max_width`` pixels before anything is written on it,
    less where a side would be longer than LONGEST.

    Args:
        image: uint8 [H,W,3].
        layers: masks have the size of the image, boxes are in its pixels.
        class_names: decides the colours, see ``palette``; a class of a layer that is not in it is grey.
        title: stands in a strip above the image.
        missing: written in the lower left corner: what is not labelled here, e.g. "no boxes".
        alpha: how much a mask hides of the image, 0 to 1.

    Returns: uint8 [H',W',3].
    Raises: ValueError for other shapes, or a class that is not among a layer's names.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}")
    colours = palette(class_names)
    height, width = image.shape[:2]
    scale = min(float(np.clip(width, min_width, max_width)) / width, LONGEST / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA)
    picture = Image.fromarray(_with_masks(canvas, image.shape[:2], _of(layers, MaskLayer), colours, alpha))
    taken: list[Frame] = []
    for boxes in _of(layers, BoxLayer):
        _draw_boxes(picture, boxes, scale, colours, taken)
    insets, texts = _of(layers, InsetLayer), _of(layers, TextLayer)
    for inset, frame in zip(insets, inset_frames(insets, size), strict=True):
        _draw_inset(picture, inset, frame)
    for text, frame in zip(texts, text_frames(texts, size), strict=True):
        _tag(ImageDraw.Draw(picture), frame[:2], _fit(text.text, _font(LABEL_SIZE), size[0] - 14), DARK)
    if missing:
        text = _fit(missing, _font(LABEL_SIZE), size[0] - 14)
        _tag(ImageDraw.Draw(picture), (4, size[1] - LABEL_SIZE - 11), text, DARK)
    if title:
        picture = _stack([_strip(title, picture.width), picture])
    return np.array(picture)


def side_by_side(
    rows: Sequence[Sequence[np.ndarray]],
    column_titles: Sequence[str],
    *,
    class_names: ClassNames | None = None,
    hatched: bool = False,
) -> np.ndarray:
    """Panels in a grid, e.g. a row an image and the columns truth, teacher, student.

    class_names, hatched: add a legend underneath, see ``legend``. Panels may differ in size.
    Returns uint8 [H,W,3].
    Raises ValueError when a row has not one panel for each title.
    """
    if not rows or any(len(row) != len(column_titles) for row in rows):
        raise ValueError(
            f"{len(column_titles)} titles need rows of as many panels, not {[len(r) for r in rows]}"
        )
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
        strips.append(Image.fromarray(legend(class_names, total, hatched=hatched)))
    return np.array(_stack(strips))


def legend(class_names: ClassNames, width: int = 640, *, hatched: bool = False) -> np.ndarray:
    """Every class name beside its colour, in columns. Returns uint8 [H,width,3].

    hatched: whether masks are drawn, whose hatching then stands beside "not counted".
    """
    font, swatch, line = _font(FONT_SIZE), FONT_SIZE, FONT_SIZE + 7
    entries = [
        (name, _swatch(colour, swatch))
        for name, colour in palette(class_names).items()
        if not is_background(name)
    ]
    if hatched:
        entries.append(("not counted", _hatched_swatch(swatch)))
    room = max(width - 2 * MARGIN, 1)
    column = min(
        room, int(max((font.getlength(name) for name, _ in entries), default=0)) + swatch + 6 + 2 * MARGIN
    )
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


def inset_frames(insets: Sequence[InsetLayer], size: tuple[int, int]) -> list[Frame]:
    """Where insets lie in a picture of ``size`` (width, height).

    Side by side, the first in the lower right corner; what has no room there stands in a row above.
    """
    width = max(1, round(INSET * size[0]))
    found, right, bottom, row = [], size[0] - GAP, size[1] - GAP, 0
    for inset in insets:
        height, own = inset.picture.shape[:2]
        shrink = min(width / own, size[1] / 2 / height)
        wide, high = max(1, round(own * shrink)), max(1, round(height * shrink))
        if right - wide < 0 and row:
            right, bottom, row = size[0] - GAP, bottom - row - GAP, 0
        found.append((right - wide, bottom - high, right, bottom))
        right, row = right - wide - GAP, max(row, high)
    return found


def text_frames(texts: Sequence[TextLayer], size: tuple[int, int]) -> list[Frame]:
    """Where texts stand in a picture of ``size`` (width, height): in the upper left corner, one a line."""
    sizes = [_tag_size(_fit(text.text, _font(LABEL_SIZE), size[0] - 14)) for text in texts]
    return [
        (4, 4 + i * (high + 1), 4 + wide, 4 + i * (high + 1) + high) for i, (wide, high) in enumerate(sizes)
    ]


def _of(layers: Sequence[Layer], form: type) -> list[Any]:
    return [layer for layer in layers if isinstance(layer, form)]


def _with_masks(
    canvas: np.ndarray,
    shape: tuple[int, int],
    layers: Sequence[MaskLayer],
    colours: Mapping[str, Colour],
    alpha: float,
) -> np.ndarray:
    """``canvas`` [H',W',3] under masks of ``shape`` (h, w)."""
    for number, layer in enumerate(layers):
        mask = np.asarray(layer.mask)
        if mask.shape != shape:
            raise ValueError(f"mask {list(mask.shape)} does not fit the image {list(shape)}")
        mask = cv2.resize(mask.astype(np.uint16), canvas.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        canvas = (_striped if number else _filled)(canvas, mask, layer.names, colours, alpha)
    return canvas


def _colour_table(
    mask: np.ndarray, names: Sequence[str], colours: Mapping[str, Colour]
) -> tuple[np.ndarray, np.ndarray]:
    """By value of the mask: its colour uint8 [N,3], and whether it has one, bool [N].

    Raises ValueError for a class without a name.
    """
    if (wrong := mask[mask != IGNORE]).size and wrong.max() >= len(names):
        raise ValueError(
            f"mask holds class {wrong.max()}; there are {len(names)} classes and IGNORE is {IGNORE}"
        )
    table = np.zeros((max(len(names), IGNORE + 1), 3), dtype=np.uint8)
    shown = np.zeros(len(table), dtype=bool)
    for i, name in enumerate(names):
        table[i], shown[i] = colours.get(name, GREY), not is_background(name)
    return table, shown


def _filled(
    canvas: np.ndarray, mask: np.ndarray, names: Sequence[str], colours: Mapping[str, Colour], alpha: float
) -> np.ndarray:
    """The first mask: full, with dark edges, and hatched where it does not count."""
    table, shown = _colour_table(mask, names, colours)
    ignored = mask == IGNORE
    blended = cv2.addWeighted(canvas, 1 - alpha, table[mask], alpha, 0)
    result = np.where(shown[mask][..., None], blended, canvas)
    edges = np.zeros(mask.shape, dtype=bool)
    edges[:, 1:] = mask[:, 1:] != mask[:, :-1]
    edges[1:] |= mask[1:] != mask[:-1]
    result[edges] //= 2
    result[ignored & _stripes(*mask.shape)] = HATCH
    result[ignored] = (0.55 * canvas[ignored] + 0.45 * result[ignored]).astype(np.uint8)
    return result


def _striped(
    canvas: np.ndarray, mask: np.ndarray, names: Sequence[str], colours: Mapping[str, Colour], alpha: float
) -> np.ndarray:
    """A mask over another: an outline inside each region, and stripes across it."""
    table, shown = _colour_table(mask, names, colours)
    height, width = mask.shape
    drawn = shown[mask] & (mask != IGNORE)
    line = max(2, round(LINE * width))
    inner = np.zeros(mask.shape, dtype=np.uint8)
    for value in np.unique(mask[drawn]):
        inner |= cv2.erode((mask == value).astype(np.uint8), np.ones((2 * line + 1, 2 * line + 1), np.uint8))
    step = max(8, round(STRIPE * width))
    stripes = np.subtract.outer(np.arange(height), np.arange(width)) % step < line
    full = drawn & ((inner == 0) | stripes)
    strength = min(1.0, 1.6 * alpha)  # thin lines need more than a filled region
    result = canvas.copy()
    result[full] = ((1 - strength) * canvas[full] + strength * table[mask[full]]).astype(np.uint8)
    return result


def _stripes(height: int, width: int) -> np.ndarray:
    """Diagonal stripes [H,W]: true on 2 of 6 pixels."""
    return (np.add.outer(np.arange(height), np.arange(width)) % 6) < 2


def _checked(layer: BoxLayer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes float64 [M,4], classes int64 [M], and ranks [M] by which they are drawn. Raises ValueError."""
    if layer.classes is None:
        raise ValueError("boxes need their classes")
    boxes = np.asarray(layer.boxes, dtype=np.float64).reshape(-1, 4)
    classes = np.asarray(layer.classes, dtype=np.int64).reshape(-1)
    ranks = (
        np.ones(len(boxes))
        if layer.scores is None
        else np.asarray(layer.scores, dtype=np.float64).reshape(-1)
    )
    if not len(boxes) == len(classes) == len(ranks):
        raise ValueError(f"{len(boxes)} boxes, {len(classes)} classes and {len(ranks)} scores")
    if len(classes) and (classes.min() < 0 or classes.max() >= len(layer.names)):
        raise ValueError(
            f"boxes hold classes {classes.min()}..{classes.max()}, outside 0..{len(layer.names) - 1}"
        )
    return boxes, classes, ranks


def _draw_boxes(
    picture: Image.Image, layer: BoxLayer, scale: float, colours: Mapping[str, Colour], taken: list[Frame]
) -> None:
    """Outlines first, then names, the best first: a name that would cover another moves, or gives way.

    taken: the frames of names so far; those written here are added.
    """
    boxes, classes, ranks = _checked(layer)
    names = [layer.names[kind] for kind in classes]
    draw, order = ImageDraw.Draw(picture), np.argsort(-ranks, kind="stable")
    limit = np.array([picture.width, picture.height] * 2) - 1
    # An untrained model's boxes may be inside out or not finite; a picture must not end its training.
    boxes = np.nan_to_num(boxes * scale, nan=0)
    boxes = np.concatenate(
        [np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1
    )
    corners = [tuple(box) for box in np.clip(boxes.round(), 0, limit).astype(int).tolist()]
    for i in order[::-1]:
        x1, y1, x2, y2 = corners[i]
        colour = colours.get(names[i], GREY)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=readable_on(colour), width=4)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=2)
    crowd = np.zeros(len(boxes), bool) if layer.crowd is None else np.asarray(layer.crowd, bool)
    for i in order:
        text = (
            names[i] + (" (crowd)" if crowd[i] else "") + ("" if layer.scores is None else f" {ranks[i]:.2f}")
        )
        place = _free_place(draw, text, corners[i], picture.size, taken)
        if place is not None:
            taken.append(_tag(draw, place, text, colours.get(names[i], GREY)))


def _free_place(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: Frame,
    size: tuple[int, int],
    taken: Sequence[Frame],
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


def _tag(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: Colour) -> Frame:
    """Text on a coloured ground; returns the corners x1,y1,x2,y2 that it covers."""
    (x, y), (width, height) = place, _tag_size(text)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    draw.text((x + 3, y + height / 2), text, readable_on(colour), _font(LABEL_SIZE), anchor="lm")
    return x, y, x + width, y + height


def _draw_inset(picture: Image.Image, inset: InsetLayer, frame: Frame) -> None:
    """A small picture in a thin frame, its title in its upper left corner."""
    x1, y1, x2, y2 = frame
    small = cv2.resize(inset.picture, (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA)
    picture.paste(Image.fromarray(small), (x1, y1))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x1 - 1, y1 - 1, x2, y2), outline=PAPER)
    if inset.title:
        _tag(draw, (x1, y1), _fit(inset.title, _font(LABEL_SIZE), x2 - x1 - 6), DARK)


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
