"""One procedural street scene from a seed: composition and light; its labels are read off by labels.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.random import Generator

from .background import PAVEMENT, ROAD, VEGETATION, Background, Camera, draw_background
from .labels import FIRST_INSTANCE, Drawing, Labels, depth_map, label, road_map, weather
from .objects import (
    BUS,
    CAR,
    COVER_LABEL,
    CYCLIST,
    IGNORE,
    OBJECTS,
    PEDESTRIAN,
    SIGN,
    TRUCK,
    TYPICAL_HEIGHT,
    draw_cover,
    draw_object,
)
from .pen import CIRCLE, OVERSAMPLE, Pen

SPLITS = ("train", "val")

# How readily an object stands on road, pavement, vegetation, by object class. The rest is never chosen.
GROUND_ODDS = {
    CAR: {ROAD: 1.0, PAVEMENT: 0.12, VEGETATION: 0.08},
    TRUCK: {ROAD: 1.0, PAVEMENT: 0.08, VEGETATION: 0.05},
    PEDESTRIAN: {ROAD: 0.25, PAVEMENT: 1.0, VEGETATION: 0.4},
    CYCLIST: {ROAD: 1.0, PAVEMENT: 0.5, VEGETATION: 0.15},
    SIGN: {ROAD: 0.08, PAVEMENT: 1.0, VEGETATION: 0.9},
    BUS: {ROAD: 1.0, PAVEMENT: 0.08, VEGETATION: 0.05},
}
FREQUENCY = (0.22, 0.15, 0.2, 0.17, 0.16, 0.1)  # of objects that are placed, by class


@dataclass
class _Standing:
    """What stands in a street. classes: of the objects; whole: pixels of the canvas each covered when drawn;
    lamps: column, row, radius, in pixels of the image.

    Each thing has values of its own on the canvas, from FIRST_INSTANCE on. ids: uint8 [256], what a value is
    in ``Drawing.ids``; feet: float32 [256], the depth of the thing's foot in metres.
    """

    classes: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    lamps: list[tuple[float, float, float]] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.arange(256, dtype=np.uint8))
    feet: np.ndarray = field(default_factory=lambda: np.zeros(256, np.float32))

    def value(self, number: int, kind: int | str, depth: float) -> int:
        """The value of thing ``number``, an object class or a cover; the next is that of its support."""
        value = FIRST_INSTANCE + 2 * number
        self.ids[value] = COVER_LABEL[kind] if isinstance(kind, str) else FIRST_INSTANCE + len(self.classes)
        self.ids[value + 1] = IGNORE
        self.feet[value : value + 2] = depth
        return value


def scene(seed: int, split: str, index: int, size: tuple[int, int]) -> tuple[np.ndarray, Labels]:
    """Scene ``index`` of a split, a function of its arguments alone. size: (height, width) in pixels."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    drawing = draw(rng, size)
    return drawing.image, label(rng, drawing)


def draw(rng: Generator, size: tuple[int, int]) -> Drawing:
    camera = _camera(rng, size)
    back = draw_background(rng, camera)
    canvas = OVERSAMPLE * size[1], OVERSAMPLE * size[0]
    image = cv2.resize(back.image, canvas, interpolation=cv2.INTER_LINEAR)
    values = cv2.resize(back.labels, canvas, interpolation=cv2.INTER_NEAREST)
    things = _populate(rng, camera, back, image, values)
    image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    values = np.ascontiguousarray(values[::OVERSAMPLE, ::OVERSAMPLE])
    ids = things.ids[values]
    return Drawing(
        image=_expose(rng, image, things.lamps, back.light),
        ids=ids,
        classes=things.classes,
        whole=np.array(things.whole) / OVERSAMPLE**2,
        road=road_map(ids, back.paint),
        depth=depth_map(back.depth, values, things.feet),
        weather=weather(back, ids),
    )


def _camera(rng: Generator, size: tuple[int, int]) -> Camera:
    height, width = size
    eye = rng.uniform(1.3, 2.2) if rng.random() < 0.65 else rng.uniform(2.2, 4.0)
    yaw = (
        rng.normal(0, 0.15) if rng.random() < 0.92 else rng.choice((-1, 1)) * rng.uniform(0.9, 1.7)
    )  # along or across
    focal = math.sqrt(height * width) * rng.uniform(1.2, 2.0)
    return Camera(height, width, focal, height * rng.uniform(0.32, 0.5), eye, rng.normal(0, 0.025), yaw)


def _populate(rng, camera: Camera, back: Background, image: np.ndarray, values: np.ndarray) -> _Standing:
    """Draw objects and covers, far ones first, onto a canvas: ``image`` and ``values``, what stands where."""
    things = sorted(_arrange(rng, camera, back.labels), key=lambda thing: -thing[0])
    standing = _Standing()
    for number, (depth, u, kind) in enumerate(things):
        scale, foot = camera.focal / depth, (u, camera.horizon + camera.focal * camera.eye / depth)
        value = standing.value(number, kind, depth)
        pen = Pen(image, values, value, camera, foot, scale, back.haze, 1 - math.exp(-depth / back.fog_m))
        if isinstance(kind, str):
            draw_cover(pen, rng, kind)
            continue
        turn = _turn(rng, camera, kind, u)
        _shadow(rng, pen, back.image, kind, turn)
        draw_object(pen, rng, kind, turn)
        standing.classes.append(kind)
        standing.whole.append(int(np.count_nonzero(values == value)))
        if (
            kind in (CAR, TRUCK, BUS)
            and abs(math.sin(turn)) < 0.5
            and back.light != "day"
            and rng.random() < 0.7
        ):
            lamps = [(*camera.turn(u + x * scale, foot[1] - 0.75 * scale), 0.25 * scale) for x in (-0.6, 0.6)]
            standing.lamps += lamps
    return standing


def _arrange(rng, camera, ground):
    """Where things stand: a list of (depth in metres, level column, object class or cover name)."""
    nearest, things = camera.nearest, []
    wanted = 1 + int(rng.binomial(4, 0.4))
    for attempt in range(wanted + 10):
        if attempt >= wanted and things:
            break  # extra attempts are for scenes that would stay empty
        kind = int(rng.choice(len(OBJECTS), p=FREQUENCY))
        smallest = rng.uniform(8, 14) if rng.random() < 0.08 else rng.uniform(30, 46)
        if kind in (PEDESTRIAN, CYCLIST, SIGN):
            smallest *= 1.5  # narrow ones stand nearer, so that a map of stride 4 still shows them
        farthest = max(camera.focal * TYPICAL_HEIGHT[kind] / smallest, nearest * 1.3)
        place = _place(rng, camera, ground, nearest, farthest, GROUND_ODDS[kind])
        if place is None:
            continue
        things.append((*place, kind))
        if kind in (CAR, PEDESTRIAN, CYCLIST) and rng.random() < 0.18:  # company, often half hidden
            depth, u = place
            step = rng.choice((-1, 1)) * rng.uniform(0.5, 1.2) * TYPICAL_HEIGHT[kind] * camera.focal / depth
            things.append((depth * rng.uniform(1.03, 1.25), u + step, kind))
    covers = ("tree", "bush", "wall", "post")
    for _ in range(int(rng.poisson(0.3))):
        kind = str(rng.choice(covers, p=(0.34, 0.3, 0.12, 0.24)))
        odds = {PAVEMENT: 1.0, VEGETATION: 1.0, ROAD: 0.04}
        place = _place(rng, camera, ground, nearest * 1.1, 25.0, odds)
        if place is not None:
            things.append((*place, kind))
    return things


def _place(rng, camera, ground, nearest, farthest, odds):
    """(depth, level column) of a free spot that suits, or None after a few tries."""
    for _ in range(8):
        depth = nearest * (max(farthest, nearest) / nearest) ** rng.random()
        u = rng.uniform(0.03, 0.97) * camera.width
        v = min(camera.horizon + camera.focal * camera.eye / depth, camera.height - 1)
        column, row = camera.turn(u, v)
        row, column = min(max(int(row), 0), camera.height - 1), min(max(int(column), 0), camera.width - 1)
        if rng.random() < odds.get(int(ground[row, column]), 0.0):
            return depth, u
    return None


def _turn(rng, camera, kind, u) -> float:
    """Angle between the line of sight and an object's heading: traffic keeps to the street, people do not."""
    if kind in (PEDESTRIAN, SIGN):
        return rng.uniform(0, 2 * math.pi)
    sight = math.atan2(u - camera.width / 2, camera.focal)
    stray = math.pi / 2 if rng.random() < 0.2 else 0.0
    return camera.yaw + sight + stray + rng.normal(0, 0.12)


def _shadow(rng, pen: Pen, ground: np.ndarray, kind: int, turn: float) -> None:
    """Darken the ground under an object: a flat ellipse in the colour that ``ground``, uint8 [H,W,3], has at
    its foot."""
    length, width = {CAR: (4.4, 1.8), TRUCK: (7, 2.4), CYCLIST: (1.6, 0.5), BUS: (10, 2.5)}.get(
        kind, (0.7, 0.5)
    )
    half = (length * abs(math.sin(turn)) + width * abs(math.cos(turn))) / 2 * rng.uniform(0.95, 1.15)
    u, v = pen.camera.turn(*pen.foot)
    row, column = min(max(int(v), 0), ground.shape[0] - 1), min(max(int(u), 0), ground.shape[1] - 1)
    colour = ground[row, column] * rng.uniform(0.4, 0.75)
    drift, flat = rng.normal(0, 0.25) * half, rng.uniform(0.12, 0.22)
    pen.detail([(drift + half * x, flat * y) for x, y in CIRCLE], colour)


def _expose(rng, image, lamps, light) -> np.ndarray:
    """What the camera makes of the light: exposure, cast, gradient, glare, blur, noise. uint8 [H,W,3] in and
    out."""
    height, width = image.shape[:2]
    gain = {"day": rng.uniform(0.8, 1.15), "dusk": rng.uniform(0.65, 1.0), "night": rng.uniform(0.6, 0.9)}[
        light
    ]
    cast = rng.normal(1, 0.04, 3)
    contrast = rng.uniform(0.8, 1.15)
    levels = np.arange(256.0)
    if light == "day":
        levels = (levels - 110) * contrast + 110
    curve = np.clip(levels[:, None, None] * gain * cast, 0, 255).astype(np.uint8)
    lit = cv2.LUT(image, curve).astype(np.float32)
    if rng.random() < 0.6:  # one side in shadow, as between houses
        angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.35)
        across, along = (
            np.linspace(-0.5, 0.5, width, dtype=np.float32),
            np.linspace(-0.5, 0.5, height, dtype=np.float32),
        )
        ramp = (1 - depth / 2) - depth * (across * math.cos(angle) + along[:, None] * math.sin(angle))
        lit *= cv2.merge([ramp] * 3)
    for u, v, radius in lamps:
        _glare(lit, u, v, max(radius, 0.8))
    if rng.random() < 0.3:
        lit = cv2.GaussianBlur(lit, (0, 0), rng.uniform(0.3, 0.7))
    grain = rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(0.5, 3.5))
    lit += cv2.merge([grain] * 3)
    lit += (rng.random((height, width, 3), np.float32) - np.float32(0.5)) * np.float32(rng.uniform(2, 7))
    return np.clip(lit, 0, 255).astype(np.uint8)


def _glare(lit, u, v, radius) -> None:
    """Add a lamp's glow around column ``u``, row ``v``."""
    reach = int(radius * 5) + 1
    top, left = max(int(v) - reach, 0), max(int(u) - reach, 0)
    patch = lit[top : max(int(v) + reach + 1, 0), left : max(int(u) + reach + 1, 0)]
    if not patch.size:
        return
    rows = (np.arange(patch.shape[0]) + top - v)[:, None] ** 2
    columns = (np.arange(patch.shape[1]) + left - u)[None] ** 2
    glow = 190 * np.exp(-(rows + columns) / (2.5 * radius**2))
    patch += glow.astype(np.float32)[..., None] * np.float32((1, 0.95, 0.8))
