"""What stands in a procedural street: objects that are labelled one by one, and greenery, posts and walls
before them."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator

from .background import BUILDING, FOLIAGE, MASONRY, VEGETATION, shades
from .pen import Pen
from .vehicles import DARK, STEEL, TYRE, cloth, draw_bus, draw_car, draw_truck, dress, high_visibility

OBJECTS = ("car", "truck", "pedestrian", "cyclist", "sign", "bus")
CAR, TRUCK, PEDESTRIAN, CYCLIST, SIGN, BUS = range(len(OBJECTS))
IGNORE = 255  # as multitask_kd.batch.IGNORE, which would load torch into every worker
TYPICAL_HEIGHT = (1.55, 3.1, 1.7, 1.75, 1.3, 3.0)  # metres, by object class


def draw_object(pen: Pen, rng: Generator, kind: int, turn: float) -> None:
    """Draw an object of class ``kind`` seen at ``turn`` radians from straight ahead (0: end on, pi/2: from
    the side)."""
    if rng.random() < 0.5:
        pen = pen.part(0, -1)
    (draw_car, draw_truck, _pedestrian, _cyclist, _sign, draw_bus)[kind](pen, rng, turn)


def skin(rng: Generator) -> np.ndarray:
    return np.array([224, 172, 140]) * rng.uniform(0.35, 1.08)


def _pedestrian(pen: Pen, rng: Generator, turn: float) -> None:
    tall = rng.uniform(1.55, 1.92) if rng.random() < 0.82 else rng.uniform(1.0, 1.4)
    top, trousers, shade = dress(rng), cloth(rng), skin(rng)
    hip, neck = tall * 0.48, tall * 0.84
    step = rng.uniform(0.03, 0.24) * tall * (0.35 + 0.65 * abs(math.sin(turn)))
    girth = tall * (0.10 + 0.035 * abs(math.cos(turn))) * rng.uniform(0.85, 1.35)
    for foot in (-step, step):
        knee = (foot * 0.45 + 0.03, hip * 0.5)
        pen.stroke([(0, hip), knee, (foot, 0.06)], tall * 0.085, trousers * (1 if foot > 0 else 0.8))
        pen.rect(foot - 0.06, 0, foot + 0.14, 0.08, np.array(DARK))
    lean = rng.normal(0, 0.02)
    pen.fill(
        [
            (-girth * 0.85, hip * 0.95),
            (girth * 0.85, hip * 0.95),
            (girth + lean, neck * 0.96),
            (girth * 0.5 + lean, neck),
            (-girth * 0.5 + lean, neck),
            (-girth + lean, neck * 0.96),
        ],
        top,
    )
    if rng.random() < 0.25:  # a coat or a skirt
        pen.fill(
            [
                (-girth * 0.8, hip * 1.1),
                (girth * 0.8, hip * 1.1),
                (girth * 1.25, hip * 0.5),
                (-girth * 1.25, hip * 0.5),
            ],
            top * 0.9,
        )
    for side in (-1, 1):
        swing = side * rng.uniform(0.3, 1.0) * step + side * girth * 0.6
        pen.stroke(
            [
                (side * girth * 0.9 + lean, neck * 0.94),
                (swing + side * 0.05, hip * 1.3),
                (swing + 0.04, hip * 0.98),
            ],
            tall * 0.055,
            top * 0.82,
        )
    head = tall * rng.uniform(0.066, 0.08)
    pen.disc(lean, tall - head, head, shade)
    pen.fill(
        [
            (lean - head, tall - head),
            (lean - head * 0.8, tall),
            (lean + head * 0.8, tall),
            (lean + head, tall - head * 0.8),
        ],
        cloth(rng) * 0.5,
    )
    _carried(pen, rng, girth, hip, neck, tall)


def _carried(pen: Pen, rng: Generator, girth: float, hip: float, neck: float, tall: float) -> None:
    """A backpack, a bag, an umbrella, or most often nothing."""
    extra = rng.random()
    if extra < 0.2:
        pen.rect(-girth - 0.14, neck * 0.68, -girth * 0.6, neck * 0.95, cloth(rng))  # backpack
    elif extra < 0.32:
        pen.rect(girth, hip * 0.45, girth + 0.28, hip * 0.85, cloth(rng))  # bag
    elif extra < 0.38:
        pen.stroke([(girth, hip * 1.3), (girth * 0.6, tall * 1.1)], 0.03, STEEL)
        pen.fill(
            [
                (-0.5, tall * 1.04),
                (0.6, tall * 1.04),
                (0.35, tall * 1.18),
                (0.05, tall * 1.24),
                (-0.25, tall * 1.18),
            ],
            cloth(rng),
        )


def _cyclist(pen: Pen, rng: Generator, turn: float) -> None:
    squeeze = max(abs(math.sin(turn)), 0.16)
    bike = pen.part(0, squeeze)
    frame, top, trousers = cloth(rng), high_visibility(rng), cloth(rng)
    wheel, hub = rng.uniform(0.31, 0.36), rng.uniform(0.5, 0.56)
    for x in (-hub, hub):
        bike.wheel(x, wheel, wheel, np.array(TYRE) * rng.uniform(0.8, 1.8))
    crank, seat, bars = (-0.05, 0.3), (-0.2, rng.uniform(0.86, 0.98)), (0.4, rng.uniform(0.92, 1.1))
    bike.stroke([(-hub, wheel), crank, seat, (-hub, wheel)], 0.05, frame)
    bike.stroke([crank, (0.36, 0.8), seat], 0.05, frame)
    bike.stroke([(hub, wheel), bars], 0.05, frame)
    pen.stroke(
        [
            (bars[0] * squeeze - 0.25 * (1 - squeeze), bars[1]),
            (bars[0] * squeeze + 0.25 * (1 - squeeze) + 0.05, bars[1]),
        ],
        0.05,
        np.array(DARK),
    )
    up = rng.uniform(-0.14, 0.14)
    for pedal in (crank[1] + up, crank[1] - up):
        bike.stroke(
            [seat, (0.18, (seat[1] + pedal) / 2 + 0.14), (crank[0] + 0.04, pedal)],
            0.13,
            trousers * (1 if pedal > 0.3 else 0.8),
        )
    neck = (rng.uniform(0.0, 0.26), seat[1] + rng.uniform(0.42, 0.58))
    girth = 0.12 + 0.1 * abs(math.cos(turn))
    at = (seat[0] * squeeze, neck[0] * squeeze)
    pen.fill(
        [
            (at[0] - girth * 0.8, seat[1]),
            (at[0] + girth * 0.8, seat[1]),
            (at[1] + girth, neck[1] - 0.06),
            (at[1] + girth * 0.4, neck[1]),
            (at[1] - girth, neck[1] - 0.04),
        ],
        top,
    )
    bike.stroke([(neck[0], neck[1] - 0.08), (0.3, (neck[1] + bars[1]) / 2 - 0.08), bars], 0.09, top * 0.82)
    head = rng.uniform(0.105, 0.13)
    pen.disc(at[1] + 0.06 * squeeze, neck[1] + head, head, skin(rng))
    if rng.random() < 0.6:
        x, y = at[1] + 0.06 * squeeze, neck[1] + head
        pen.fill(
            [
                (x - head * 1.2, y + 0.02),
                (x + head * 1.2, y + 0.02),
                (x + head * 0.7, y + head * 1.2),
                (x - head * 0.7, y + head * 1.2),
            ],
            cloth(rng),
        )


SIGN_COLOURS = np.array(
    [(196, 34, 40), (36, 80, 170), (236, 192, 40), (232, 232, 228), (30, 120, 70)], np.float32
)


def _sign(pen: Pen, rng: Generator, turn: float) -> None:
    plate, border, symbol = (
        np.clip(SIGN_COLOURS[i] * rng.uniform(0.6, 1.08), 0, 255) for i in rng.permutation(5)[:3]
    )
    if rng.random() < 0.12:
        plate = border = symbol = np.array(STEEL) * rng.uniform(0.7, 1.3)  # seen from behind
    radius, middle = rng.uniform(0.42, 0.8), rng.uniform(1.9, 2.7)
    post = pen.support()  # no object of its own, and no background either
    grey = np.array(STEEL) * rng.uniform(0.4, 1.3)
    style = int(rng.integers(6))
    if style == 5:  # a board on two legs
        for x in (-radius, radius):
            post.rect(x - 0.06, 0, x + 0.06, middle, grey)
        high = radius * rng.uniform(0.6, 1.0)
        pen.rect(-radius * 1.7, middle - high, radius * 1.7, middle + high, border)
        pen.inner(-radius * 1.58, middle - high * 0.86, radius * 1.58, middle + high * 0.86, plate)
        for y in (-0.35, 0.3):
            pen.inner(
                -radius * 1.2,
                middle + high * y,
                radius * rng.uniform(0, 1.3),
                middle + high * (y + 0.25),
                symbol,
            )
        return
    post.rect(-0.05, 0, 0.05, middle, grey)
    corners = (14, 3, 3, 4, 8)[style]
    start = (0, math.pi / 2, -math.pi / 2, rng.choice((0, math.pi / 4)), math.pi / 8)[style]
    shape = [
        (math.cos(start + 2 * math.pi * i / corners), math.sin(start + 2 * math.pi * i / corners))
        for i in range(corners)
    ]
    face = pen.part(0, rng.uniform(0.6, 1))
    for size, colour in ((radius * 1.12, border), (radius * 0.86, plate)):
        face.fill([(size * x, middle + size * y) for x, y in shape], colour)
    if rng.random() < 0.5:
        face.inner(-radius * 0.5, middle - radius * 0.14, radius * 0.5, middle + radius * 0.14, symbol)
    else:
        face.inner(-radius * 0.12, middle - radius * 0.35, radius * 0.12, middle + radius * 0.4, symbol)


def draw_cover(pen: Pen, rng: Generator, kind: str) -> None:
    """Something that may hide objects, by its name in COVER_LABEL; the pen has its label."""
    if kind in ("tree", "bush"):
        _greenery(pen, rng, trunk=rng.uniform(1.2, 3.2) if kind == "tree" else 0.0)
    elif kind == "wall":
        stone, half = shades(rng, MASONRY, 1)[0], rng.uniform(0.6, 2.2)
        high = rng.uniform(0.7, 1.6)
        pen.rect(-half, 0, half, high, stone)
        for y in np.arange(0.2, high, 0.25):
            pen.stroke([(-half, y), (half, y)], 0.03, stone * 0.8)
    else:
        grey = np.array(STEEL) * rng.uniform(0.3, 1.2)
        pen.rect(-0.07, 0, 0.07, rng.uniform(3, 7), grey)


COVER_LABEL = {"tree": VEGETATION, "bush": VEGETATION, "wall": BUILDING, "post": IGNORE}


def _greenery(pen: Pen, rng: Generator, trunk: float) -> None:
    """A crown of overlapping tufts, lighter towards the top, on a trunk of ``trunk`` metres."""
    leaf = shades(rng, FOLIAGE, 1)[0]
    radius = rng.uniform(0.9, 2.2) if trunk else rng.uniform(0.35, 0.9)
    if trunk:
        wide = rng.uniform(0.08, 0.2)
        pen.rect(-wide, 0, wide, trunk + radius, np.array([78, 62, 48]) * rng.uniform(0.6, 1.3))
    tufts = int(np.clip(radius * pen.scale, 5, 16))
    angles, reach = rng.uniform(0, 2 * math.pi, tufts), np.sqrt(rng.random(tufts)) * radius
    ys = np.sin(angles) * reach
    for i in np.argsort(ys):
        y = trunk + radius * 0.9 + ys[i]
        tone = leaf * (0.85 + 0.25 * ys[i] / radius + rng.uniform(-0.12, 0.12))
        size = radius * rng.uniform(0.25, 0.5)
        pen.disc(math.cos(angles[i]) * reach[i], max(y, size * 0.8), size, tone)
