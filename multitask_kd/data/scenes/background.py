"""The ground, walls and sky of a procedural street, cast ray by ray: every pixel of a canvas at once.

World frame of the street: X across, Z along, both in metres on the ground, the camera above (0, 0). A street
is a strip of road between two pavements, two verges and two walls of lots (buildings, greenery, gaps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

STUFF = ("sky", "building", "road", "pavement", "vegetation")
SKY, BUILDING, ROAD, PAVEMENT, VEGETATION = range(len(STUFF))

# Anchor colours, RGB. The lists touch each other, and light and shadow shift them, so a colour hints at its
# class only.
MASONRY = np.array(
    [
        (152, 92, 72), (176, 150, 116), (132, 84, 64), (192, 150, 120), (150, 120, 100), (168, 108, 92),
        (120, 84, 78), (112, 88, 70), (190, 128, 96), (140, 104, 84),
    ],
    np.float32,
)  # fmt: skip
PAVING = np.array([(196, 190, 176), (206, 200, 182), (184, 182, 178), (190, 184, 170)], np.float32)
FOLIAGE = np.array(
    [
        (70, 116, 46), (92, 134, 60), (46, 88, 44), (104, 130, 56),
        (72, 110, 56), (60, 102, 40), (116, 146, 76),
    ],
    np.float32,
)  # fmt: skip
LIGHTS = {  # daylight -> sky colours near the horizon, and towards the zenith
    "day": (
        ((196, 214, 232), (214, 216, 218), (176, 186, 200)),
        ((96, 150, 214), (168, 174, 182), (130, 160, 196)),
    ),
    "dusk": (
        ((236, 176, 120), (214, 150, 140), (200, 176, 160)),
        ((110, 110, 150), (90, 84, 120), (140, 130, 140)),
    ),
    "night": (((70, 68, 84), (92, 80, 72), (44, 50, 70)), ((20, 24, 44), (30, 30, 38), (12, 16, 30))),
}
FAR, METRES = (
    160,
    224,
)  # a wall runs from METRES - FAR behind the camera to FAR ahead, one table entry a metre
GAP, HOUSE, GREEN = range(3)  # kinds of lot


@dataclass(frozen=True)
class Camera:
    """A camera over the street. Sizes, ``focal``, ``horizon`` in pixels of the image; angles in radians; eye
    in metres."""

    height: int
    width: int
    focal: float
    horizon: float
    eye: float
    roll: float
    yaw: float

    def rays(self) -> tuple[np.ndarray, np.ndarray]:
        """Directions of all pixels at depth 1: right and down, float32 [h,w] each."""
        u = np.arange(self.width, dtype=np.float32) - (self.width - 1) / 2
        v = (np.arange(self.height, dtype=np.float32) - (self.height - 1) / 2)[:, None]
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        level = self.horizon - (self.height - 1) / 2
        return (cos * u + sin * v) / self.focal, (cos * v - sin * u - level) / self.focal

    @property
    def nearest(self) -> float:
        """Depth in metres of the ground just below the lower edge."""
        return max(2.2, self.focal * self.eye / (1.1 * self.height - self.horizon))

    def turn(self, u: float, v: float) -> tuple[float, float]:
        """Level pixel coordinates -> where they lie on the rolled image."""
        middle_u, middle_v = (self.width - 1) / 2, (self.height - 1) / 2
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        u, v = u - middle_u, v - middle_v
        return cos * u - sin * v + middle_u, sin * u + cos * v + middle_v


@dataclass(frozen=True)
class Background:
    """image uint8 [h,w,3]; labels uint8 [h,w] of STUFF; haze RGB and ``fog_m``, the depth it hides 63 % at.

    depth: float32 [h,w], metres along the camera's axis, 0 for the sky. paint: float32 [h,w], by how many
    grey levels the road's paint, worn and behind haze, changes a pixel; 0 where there is none.
    """

    image: np.ndarray
    labels: np.ndarray
    depth: np.ndarray
    paint: np.ndarray
    haze: np.ndarray
    fog_m: float
    light: str


def shades(rng: Generator, anchors: np.ndarray, count: int, jitter: float = 10.0) -> np.ndarray:
    """``count`` colours [count,3] around randomly chosen anchors."""
    colours = anchors[rng.integers(len(anchors), size=count)] * rng.uniform(0.8, 1.2, (count, 1))
    return np.clip(colours + rng.normal(0, jitter, (count, 3)), 8, 248).astype(np.float32)


def smooth_noise(rng: Generator, height: int, width: int, cells: tuple[int, int]) -> np.ndarray:
    """Noise in about [-1, 1], float32 [height,width], with ``cells`` (rows, columns) bumps."""
    coarse = rng.random((cells[0] + 1, cells[1] + 1), np.float32) * 2 - 1
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def draw_background(rng: Generator, camera: Camera) -> Background:
    """One street without anything standing in it."""
    height, width = camera.height, camera.width
    right, down = camera.rays()
    cos, sin = math.cos(camera.yaw), math.sin(camera.yaw)
    across, along = right * cos + sin, cos - right * sin
    coarse = smooth_noise(rng, height, width, (6, 8)) + 0.6 * smooth_noise(rng, height, width, (24, 32))
    fine = rng.random((height, width), np.float32) - np.float32(0.5)

    light = ("day", "dusk", "night")[int(rng.choice(3, p=(0.9, 0.08, 0.02)))]
    haze, zenith = (
        np.float32(colours[rng.integers(3)]) * np.float32(rng.uniform(0.85, 1.1)) for colours in LIGHTS[light]
    )
    fog_m = float(rng.choice((60, 250, 1200), p=(0.02, 0.13, 0.85)) * rng.uniform(0.8, 1.3))

    image, labels = _sky(rng, right, down, coarse, haze, zenith)
    street = _Street(rng, clearance=2.2 + 1.8 * abs(sin) * camera.nearest)
    depth, paint = street.paint(rng, image, labels, across, along, down, camera.eye, coarse, fine, light)
    clear = np.exp(depth * (-1 / fog_m))
    for plane, colour in zip(image, haze.tolist(), strict=True):
        plane -= colour
        plane *= clear
        plane += colour
    image = cv2.merge([np.clip(plane, 0, 255).astype(np.uint8) for plane in image])
    return Background(image, labels, depth, paint * clear, haze, fog_m, light)


def _sky(rng, right, down, coarse, haze, zenith):
    """Gradient, clouds and, on the horizon, a far row of hills, woods or towers. Image float32 [3,h,w],
    labels [h,w]."""
    up = np.clip(down * -rng.uniform(1.2, 3), 0, 1)
    image = haze[:, None, None] + (zenith - haze)[:, None, None] * up
    if rng.random() < 0.6:
        image += np.clip(coarse - rng.uniform(-0.3, 0.5), 0, 1) * rng.uniform(10, 60)
    labels = np.full(down.shape, SKY, np.uint8)
    if rng.random() < 0.4:
        towers = rng.random() < 0.5
        bumps = rng.random(rng.integers(6, 40)).astype(np.float32)
        knots = (right * rng.uniform(0.3, 0.6) + 0.5) * (len(bumps) - 1)
        profile = bumps[np.clip(knots, 0, len(bumps) - 1).astype(np.int32)] if towers else 0.6 + 0.4 * coarse
        far = -down < profile * rng.uniform(0.05, 0.22)
        colour = shades(rng, MASONRY if towers else FOLIAGE, 1)[0] * 0.8 + haze * 0.2
        labels[far] = BUILDING if towers else VEGETATION
        np.copyto(image, colour[:, None, None] * (1 + 0.2 * coarse), where=far)
    return image, labels


def _put(image: np.ndarray, pixels: np.ndarray, colour: np.ndarray) -> None:
    """Write colour [3,n] at flat places ``pixels`` [n] of image [3,h,w]."""
    for plane, values in zip(image, colour, strict=True):
        plane.ravel()[pixels] = values


class _Street:
    """The plan of one street: widths in metres, lots of both walls and of the wall across the end."""

    def __init__(self, rng: Generator, clearance: float):
        self.half = rng.uniform(2.6, 7.5)
        self.centre = rng.uniform(-1, 1) * (self.half + 1.5)
        self.pavement = rng.uniform(1.5, 5.0, 2) * (rng.random(2) > 0.05)
        setback = rng.exponential(rng.choice((0.6, 5.0)), 2)
        reach = self.half + self.pavement + setback
        self.walls = (
            max(float(reach[0]) - self.centre, clearance),
            max(float(reach[1]) + self.centre, clearance),
        )  # left, right
        self.end = rng.uniform(18, 60) if rng.random() < 0.45 else 400.0
        self.crossing = (0.0, 0.0)
        if rng.random() < 0.3:
            start = rng.uniform(5, 25)
            self.crossing = start, start + rng.uniform(5, 10)
        self._plan_lots(rng)

    def _plan_lots(self, rng: Generator) -> None:
        built = float(rng.choice((0.85, 0.5, 0.15), p=(0.5, 0.3, 0.2)))
        widths = rng.uniform(4, 20, 75)
        count = len(widths)
        self.lot_at = np.minimum(np.searchsorted(np.cumsum(widths), np.arange(3 * METRES)), count - 1).astype(
            np.int32
        )
        draw = rng.random(count)
        self.kind = np.where(
            draw < built, HOUSE, np.where(draw < built + (1 - built) * 0.7, GREEN, GAP)
        ).astype(np.uint8)
        storeys = rng.uniform(2.4, rng.choice((6, 14, 30)), count)
        self.top = np.where(
            self.kind == HOUSE, storeys, np.where(self.kind == GREEN, rng.uniform(0.6, 7, count), 0)
        )
        self.kind[0], self.top[0] = GAP, 0
        for wall in (0, 1):
            first, last = (int(z) + METRES - FAR + wall * METRES for z in self.crossing)
            self.lot_at[first:last] = 0
        self.top = self.top.astype(np.float32)
        self.colour = np.where(
            (self.kind == HOUSE)[:, None], shades(rng, MASONRY, count), shades(rng, FOLIAGE, count)
        )
        glass = np.array([(60, 70, 84), (110, 130, 150), (40, 40, 44), (170, 190, 205)], np.float32)
        self.glass = shades(rng, glass, count)
        self.shop = shades(
            rng, np.concatenate([MASONRY, glass, [(170, 40, 40), (40, 90, 150), (200, 170, 60)]]), count, 20
        )
        self.pitch = rng.uniform((1.4, 2.2), (4.5, 3.8), (count, 2)).astype(
            np.float32
        )  # window period, metres
        self.frame = rng.uniform(0.12, 0.36, (count, 2)).astype(np.float32)
        self.frame[rng.random(count) < 0.08] = 0.6  # a blind wall
        self.bricks = (rng.random(count) < 0.4).astype(np.float32)
        self.shop_top = np.where(rng.random(count) < 0.4, rng.uniform(2.4, 3.6, count), 0).astype(np.float32)

    def paint(self, rng, image, labels, across, along, down, eye, coarse, fine, light):
        """Paint walls and ground onto ``image`` and ``labels`` in place.

        Returns depth in metres, and by how many grey levels paint on the road changes a pixel, float32 [h,w].
        """
        ground = eye / np.maximum(down, 1e-3)
        to_side = np.where(across > 0, self.walls[1], self.walls[0]).astype(np.float32) / np.maximum(
            np.abs(across), 1e-3
        )
        to_end = np.where(along > 1e-3, self.end / np.maximum(along, 1e-3), 1e4).astype(np.float32)
        wall = np.minimum(to_side, to_end)
        at_end = to_end < to_side
        run = np.where(at_end, wall * across + (METRES / 2 + 2 * METRES), wall * along + (METRES - FAR))
        run = np.where(at_end, np.clip(run, 2 * METRES, 3 * METRES - 1), np.clip(run, 0, METRES - 1))
        run += np.where(~at_end & (across > 0), np.float32(METRES), np.float32(0))
        lot = self.lot_at[run.astype(np.int32)]
        rise = eye - wall * down
        kind = self.kind[lot]
        ragged = np.where(kind == GREEN, (coarse + 0.2 * fine) * 0.25 * self.top[lot], 0)
        facing = (wall < ground) & (rise < self.top[lot] + ragged)
        is_ground = (down > 2e-3) & ~facing

        depth = np.where(is_ground, ground, np.where(labels == SKY, np.float32(0), np.float32(400)))
        np.copyto(depth, wall, where=facing)
        np.copyto(labels, np.where(kind == GREEN, np.uint8(VEGETATION), np.uint8(BUILDING)), where=facing)
        self._paint_walls(rng, image, facing, kind, lot, run, rise, wall, coarse, fine, light)
        return depth, self._paint_ground(rng, image, labels, is_ground, across, along, ground, coarse, fine)

    def _paint_walls(self, rng, image, facing, kind, lot, run, rise, wall, coarse, fine, light) -> None:
        pixels = np.flatnonzero(facing)
        if not len(pixels):
            return
        lot, run, rise = lot.ravel()[pixels], run.ravel()[pixels], rise.ravel()[pixels]
        wall, coarse, fine = wall.ravel()[pixels], coarse.ravel()[pixels], fine.ravel()[pixels]
        green = kind.ravel()[pixels] == GREEN
        near = np.clip(1.6 - wall / 25, 0, 1)  # fine structure fades where it would alias

        pitch, frame = self.pitch[lot], self.frame[lot]
        columns, rows = run / pitch[:, 0], rise / pitch[:, 1]
        column, row = np.floor(columns), np.floor(rows)
        x, y = np.abs(columns - column - 0.5), np.abs(rows - row - 0.5)
        is_window = (x < 0.5 - frame[:, 0]) & (y < 0.5 - frame[:, 1]) & (rise > self.shop_top[lot]) & ~green
        colour, glass = (table.T.take(lot, axis=1) for table in (self.colour, self.glass))
        share = {"day": 0.0, "dusk": 0.25, "night": 0.45}[light]
        if share:
            table = rng.random(4096, np.float32) < share
            lit = table[(column * 37 + row * 101 + lot * 7).astype(np.int32) & 4095]
            np.copyto(glass, np.float32([(250,), (216,), (140,)]), where=lit)
        np.copyto(colour, glass, where=is_window)
        shop = (rise < self.shop_top[lot]) & ~green
        np.copyto(
            colour,
            self.shop.T.take(lot, axis=1) * np.where(x < 0.4, np.float32(1), np.float32(0.55)),
            where=shop,
        )

        courses = ((rise * 3.3) % 1 < 0.25) & ~is_window & ~green
        gain = 1 + 0.09 * coarse - 0.22 * near * self.bricks[lot] * courses
        gain = np.where(
            green, 1 + 0.25 * coarse + 1.1 * fine + 0.12 * np.minimum(rise, 2), gain + 0.14 * fine
        )
        eaves = (self.top[lot] - rise < 0.45) & ~green
        gain = np.where(eaves, gain * 0.65, gain)
        _put(image, pixels, colour * gain)

    def _paint_ground(self, rng, image, labels, is_ground, across, along, ground, coarse, fine) -> np.ndarray:
        pixels = np.flatnonzero(is_ground)
        change = np.zeros(is_ground.shape, np.float32)
        if not len(pixels):
            return change
        depth = ground.ravel()[pixels]
        x, z = depth * across.ravel()[pixels] - self.centre, depth * along.ravel()[pixels]
        coarse, fine = coarse.ravel()[pixels], fine.ravel()[pixels]
        off = np.abs(x)
        width = np.where(x < 0, self.pavement[0], self.pavement[1]).astype(np.float32)
        crossing = (z > self.crossing[0]) & (z < self.crossing[1])
        road = (off < self.half) | crossing
        paved = ~road & (off < self.half + width)
        verge = int(rng.choice((VEGETATION, PAVEMENT, ROAD), p=(0.98, 0.01, 0.01)))
        label = np.where(road, np.uint8(ROAD), np.where(paved, np.uint8(PAVEMENT), np.uint8(verge)))
        labels.ravel()[pixels] = label

        grounds = shades(rng, MASONRY, 3, 7)
        if rng.random() < 0.97:  # asphalt is mostly dark and grey, but not always
            grounds[0] = rng.uniform(55, 110) + rng.normal(0, 4, 3)
        if rng.random() < 0.96:  # and pavements mostly lighter
            grounds[1] = shades(rng, PAVING, 1, 7)[0]
        if verge == VEGETATION:
            grounds[2] = shades(rng, FOLIAGE, 1)[0]
        elif verge == ROAD:
            grounds[2] = grounds[0] * rng.uniform(0.85, 1.15)
        colour = grounds.T.take(np.where(road, 0, np.where(paved, 1, 2)), axis=1)

        near = np.clip(1.5 - depth / 14, 0, 1)
        speckle = rng.random(16384, np.float32) - 0.5
        cell = ((x * 7 + 4096).astype(np.int32) * 131 + (z * 7 + 4096).astype(np.int32) * 17) & 16383
        grain = speckle[cell] * near
        grass = label == VEGETATION
        rough = np.where(grass, np.float32(1), np.float32(0.35))
        gain = 1 + rough * (0.22 * coarse + 0.7 * fine + 0.35 * grain)

        slab = rng.uniform(0.35, 1.6), rng.uniform(0.35, 1.6)
        joints = ((x % slab[0]) < 0.07 * slab[0] + 0.02) | ((z % slab[1]) < 0.07 * slab[1] + 0.02)
        if rng.random() < 0.9:
            gain -= rng.uniform(0.15, 0.4) * near * (joints & (label == PAVEMENT))
        kerb = paved & (off < self.half + 0.22)
        gain += kerb * rng.uniform(-0.2, 0.3)
        if rng.random() < 0.3:  # the shadow of one wall
            edge, sign = rng.uniform(-self.half, self.half), 1 if rng.random() < 0.5 else -1
            gain *= np.where(x * sign > edge, np.float32(rng.uniform(0.6, 0.85)), np.float32(1))
        colour *= gain
        marks = self._marks(rng, x, z, off) & road & ~crossing
        paint = shades(rng, np.array([(225, 225, 220), (215, 215, 210), (205, 175, 70)], np.float32), 1)[0]
        wear = np.clip(rng.uniform(0.4, 1.0) + 0.25 * coarse, 0, 1) * marks
        difference = (paint[:, None] * np.clip(gain, 0.3, 1.2) - colour) * wear
        colour += difference
        _put(image, pixels, colour)
        painted = np.flatnonzero(marks)
        change.ravel()[pixels[painted]] = np.abs(difference[:, painted]).mean(0)
        return change

    def _marks(self, rng, x, z, off) -> np.ndarray:
        """Where the road is painted: centre or lane dashes, edge lines, a zebra."""
        period = rng.uniform(3, 9)
        lanes = self.half / 2 if rng.random() < 0.33 else 0.0
        dashed = (np.abs(off - lanes) < 0.09) & ((z % period) < period * rng.uniform(0.4, 1.2))
        marks = dashed if rng.random() < 0.7 else np.zeros(len(x), bool)
        if rng.random() < 0.4:
            marks = marks | (np.abs(off - self.half + 0.35) < 0.07)
        if rng.random() < 0.3:
            start, stripe = rng.uniform(3, 20), rng.uniform(0.7, 1.3)
            marks = marks | ((z > start) & (z < start + 3) & ((x % stripe) < stripe / 2))
        return marks
