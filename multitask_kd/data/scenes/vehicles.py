"""Cars, trucks and buses, seen from any side: a side panel and an end panel, each foreshortened."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from numpy.random import Generator

from .background import MASONRY, shades
from .pen import Pen

DARK, TYRE, STEEL = (30, 30, 34), (26, 25, 27), (130, 132, 136)


TYPICAL = 0.75  # of objects wear colours that are common in their class; colour hints at the class and never proves it
TYPICAL_DRESS = 0.9  # of pedestrians: a few pixels wide, they show little else


def hue(rng: Generator, low: float, high: float, saturation: float, value: float) -> np.ndarray:
    """RGB of a hue between ``low`` and ``high`` turns."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(low, high) % 1, saturation, value)) * 255


def livery(rng: Generator) -> np.ndarray:
    """A truck's load: mostly a company's orange to lime, else any paint."""
    return (
        hue(rng, 0.05, 0.2, rng.uniform(0.6, 0.95), rng.uniform(0.55, 0.95))
        if rng.random() < TYPICAL
        else paint(rng)
    )


def dress(rng: Generator) -> np.ndarray:
    """A pedestrian's: mostly red to violet, else any cloth."""
    return (
        hue(rng, 0.8, 1.02, rng.uniform(0.5, 0.95), rng.uniform(0.4, 0.95))
        if rng.random() < TYPICAL_DRESS
        else cloth(rng)
    )


def high_visibility(rng: Generator) -> np.ndarray:
    """A cyclist's jacket: mostly fluorescent green, else any cloth."""
    return (
        hue(rng, 0.22, 0.36, rng.uniform(0.75, 1), rng.uniform(0.75, 1))
        if rng.random() < TYPICAL
        else cloth(rng)
    )


def body_paint(rng: Generator) -> np.ndarray:
    """A car's: mostly blue, black or silver, else any paint."""
    if rng.random() >= TYPICAL:
        return paint(rng)
    return hue(rng, 0.55, 0.68, rng.choice((0.06, 0.4, 0.85)), rng.uniform(0.15, 0.9))


def bus_paint(rng: Generator) -> np.ndarray:
    """A bus's: mostly the turquoise of its company, else any paint."""
    return (
        hue(rng, 0.44, 0.52, rng.uniform(0.55, 0.95), rng.uniform(0.5, 0.9))
        if rng.random() < TYPICAL
        else paint(rng)
    )


def paint(rng: Generator) -> np.ndarray:
    """A car's colour: mostly black, white and greys, else any hue."""
    if rng.random() < 0.5:
        return np.clip(
            rng.choice((30, 60, 100, 150, 190, 230)) + rng.normal(0, 8) + rng.normal(0, 4, 3), 5, 250
        )
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 0.95), rng.uniform(0.25, 0.95))) * 255


def cloth(rng: Generator) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.random() ** 1.5, rng.uniform(0.08, 0.95))) * 255


def _panels(turn: float, length: float, width: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """(middle in metres, foreshortening) of the side and of the end of a box seen at ``turn``; 0 where turned
    away."""
    side, end = abs(math.sin(turn)), abs(math.cos(turn))
    if side < 0.22:
        return (0.0, 0.0), (0.0, 1.0)
    if end < 0.25:
        return (0.0, 1.0), (0.0, 0.0)
    return (-width * end / 2, side), (length * side / 2, end)


def draw_car(pen: Pen, rng: Generator, turn: float) -> None:
    body = body_paint(rng)
    style = int(
        rng.integers(4)
    )  # saloon, hatchback, estate, people carrier: a tall one is nearly a small truck
    length = (4.6, 3.8, 4.6, 4.9)[style] * rng.uniform(0.9, 1.08)
    high = (1.42, 1.48, 1.68, 1.95)[style] * rng.uniform(0.94, 1.06)
    width, belt = 1.78 * rng.uniform(0.93, 1.05), high * rng.uniform(0.54, 0.64)
    glass = np.array([46, 54, 64]) * rng.uniform(0.6, 2.2)
    nose, roof = belt * rng.uniform(0.78, 0.95), width / 2 * rng.uniform(0.66, 0.8)
    side, end = _panels(turn, length, width)
    if side[1] and end[1]:  # bonnet and windscreen fill the corner between the panels
        (at, s), (to, e) = side, end
        top, low = (at + s * length * x for x in CAR_PROFILES[style][2:])
        corner = to - e * roof
        pen.fill([(top, high), (to, high), (to, 0.3), (at + s * length / 2, nose), (low, belt)], body * 0.92)
        pen.detail([(top, high * 0.97), (corner, high * 0.95), (corner, belt), (low, belt)], glass * 1.1)
    if side[1]:
        _car_side(pen.part(*side), rng, style, length, high, belt, nose, body, glass)
    if end[1]:
        _car_end(
            pen.part(*end),
            rng,
            width,
            high,
            belt,
            roof,
            body * (rng.uniform(0.75, 1.0) if side[1] else 1),
            glass,
        )


# Side view of the cabin, in lengths from the middle: rear window low and top, windscreen top and low.
CAR_PROFILES = (
    (-0.40, -0.24, 0.10, 0.25),
    (-0.5, -0.38, 0.12, 0.27),
    (-0.5, -0.45, 0.10, 0.27),
    (-0.5, -0.47, 0.24, 0.42),
)


def _car_side(pen, rng, style, length, high, belt, nose, body, glass) -> None:
    half = length / 2
    rear_low, rear_top, top, low = CAR_PROFILES[style]
    pen.fill(
        [
            (-half, 0.3),
            (-half, belt * 0.97),
            (low * length, belt),
            (half - 0.12, nose),
            (half, 0.62),
            (half, 0.3),
        ],
        body,
    )
    cabin = [(rear_low * length, belt), (rear_top * length, high), (top * length, high), (low * length, belt)]
    pen.fill(cabin, body)
    middle = (rear_low + rear_top + top + low) / 4 * length
    window = [(middle + (x - middle) * 0.86, belt + (y - belt) * 0.84) for x, y in cabin]
    pen.detail(window, glass)
    for pillar in (middle, middle + 0.2 * length * rng.uniform(-0.6, 0.2)):
        pen.inner(pillar - 0.04, belt, pillar + 0.04, high * 0.97, body * 0.8)
    pen.rect(-half + 0.1, 0.28, half - 0.1, 0.42, body * 0.5)
    pen.stroke([(-half * 0.9, belt * 0.8), (half * 0.8, belt * 0.8)], 0.03, body * 1.2)
    radius = rng.uniform(0.29, 0.36)
    for x in (-0.31 * length, 0.32 * length):
        pen.disc(x, radius, radius, TYRE)
        pen.disc(x, radius, radius * 0.55, np.array(STEEL) * rng.uniform(0.6, 1.5))
    pen.inner(half - 0.28, nose * 0.78, half - 0.02, nose * 0.93, (235, 230, 205))
    pen.inner(-half, belt * 0.72, -half + 0.18, belt * 0.9, (190, 30, 30))


def _car_end(pen, rng, width, high, belt, roof, body, glass) -> None:
    half = width / 2
    rear = rng.random() < 0.5
    for x in (-half * 0.78, half * 0.78):
        pen.rect(x - 0.13, 0, x + 0.13, 0.5, TYRE)
    pen.fill(
        [
            (-half, 0.28),
            (half, 0.28),
            (half, belt * 0.95),
            (half * 0.88, belt),
            (-half * 0.88, belt),
            (-half, belt * 0.95),
        ],
        body,
    )
    pen.fill([(-half * 0.9, belt), (-roof, high), (roof, high), (half * 0.9, belt)], body * 0.9)
    pen.detail(
        [
            (-half * 0.8, belt + 0.03),
            (-roof * 0.9, high * 0.95),
            (roof * 0.9, high * 0.95),
            (half * 0.8, belt + 0.03),
        ],
        glass,
    )
    lamp = (200, 30, 28) if rear else (245, 240, 215)
    for x in (-half * 0.97, half * 0.62):
        pen.inner(x, belt * 0.68, x + half * 0.35, belt * 0.86, lamp)
    pen.inner(-half * 0.5, 0.5, half * 0.5, 0.5 + 0.16, body * 0.6 if rear else np.array(DARK))
    pen.inner(-0.26, 0.42, 0.26, 0.54, (225, 220, 190))
    pen.rect(-half, 0.24, half, 0.36, np.array(DARK))


def draw_truck(pen: Pen, rng: Generator, turn: float) -> None:
    load = livery(rng)
    cab = load if rng.random() < 0.4 else paint(rng)
    length, width = rng.uniform(5, 9.5), rng.uniform(2.05, 2.5)
    high, cab_high = rng.uniform(2.6, 3.9), rng.uniform(2.1, 2.9)
    open_bed = rng.random() < 0.18
    side, end = _panels(turn, length, width)
    glass = np.array([46, 54, 64]) * rng.uniform(0.6, 2.2)
    if side[1]:
        _truck_side(pen.part(*side), rng, length, high, cab_high, cab, load, glass, open_bed)
    if end[1]:
        dim = rng.uniform(0.75, 1.0) if side[1] else 1
        pen = pen.part(*end)
        if side[1] or rng.random() < 0.5:
            _truck_front(
                pen, rng, width, 0 if open_bed else high, cab_high, cab * dim, load * dim * 0.9, glass
            )
        else:
            _truck_rear(pen, rng, width, rng.uniform(1.5, 2.0) if open_bed else high, load)


def _truck_side(pen, rng, length, high, cab_high, cab, load, glass, open_bed) -> None:
    half, back = length / 2, length / 2 - rng.uniform(1.5, 2.2)
    pen.rect(-half, 0.5, half - 0.1, 0.9, (48, 46, 48))
    if open_bed:
        pen.rect(-half, 0.85, back - 0.12, rng.uniform(1.3, 1.8), load)
        for x in rng.uniform(-half + 0.5, back - 0.6, rng.integers(0, 4)):
            pen.disc(x, 1.6, rng.uniform(0.3, 0.7), shades(rng, MASONRY, 1)[0])
    else:
        pen.rect(-half, 0.85, back - 0.12, high, load)
        if pen.shows(0.15):
            _lettering(pen, rng, -half, back, high, load)
    slope = rng.uniform(0, 0.5)
    pen.fill(
        [
            (back, 0.5),
            (back, cab_high),
            (half - slope, cab_high),
            (half, cab_high * 0.6),
            (half, 0.45),
            (back, 0.45),
        ],
        cab,
    )
    pen.detail(
        [
            (back + 0.35, cab_high * 0.58),
            (back + 0.35, cab_high * 0.9),
            (half - slope - 0.1, cab_high * 0.9),
            (half - 0.15, cab_high * 0.58),
        ],
        glass,
    )
    radius = rng.uniform(0.42, 0.52)
    axles = [-half + 0.9, back + 0.7] + ([-half + 2.0] if length > 7 else [])
    for x in axles:
        pen.disc(x, radius, radius, TYRE)
        pen.disc(x, radius, radius * 0.5, np.array(STEEL) * rng.uniform(0.6, 1.4))


def _lettering(pen, rng, left, right, high, load) -> None:
    """Ribs, a band or blocks like a company's name on the side of a box."""
    style = rng.random()
    if style < 0.35:
        for x in np.arange(left + 0.5, right - 0.3, rng.uniform(0.5, 1.1)):
            pen.stroke([(x, 0.95), (x, high * 0.97)], 0.05, load * 0.75)
    elif style < 0.7:
        low = rng.uniform(1.1, high * 0.7)
        pen.inner(left, low, right - 0.15, low + rng.uniform(0.2, 0.5), cloth(rng))
    else:
        name, low = cloth(rng), rng.uniform(1.2, high * 0.65)
        for x in np.arange(left + 0.7, right - 1.2, 0.55):
            pen.inner(x, low, x + rng.uniform(0.2, 0.42), low + rng.uniform(0.3, 0.6), name)


def _truck_front(pen, rng, width, high, cab_high, cab, load, glass) -> None:
    half = width / 2
    for x in (-half * 0.8, half * 0.8):
        pen.rect(x - 0.17, 0, x + 0.17, 0.6, TYRE)
    if high > cab_high:
        pen.rect(-half, 0.9, half, high, load)
    half *= 0.96
    pen.rect(-half, 0.4, half, cab_high, cab)
    pen.inner(-half * 0.9, cab_high * 0.52, half * 0.9, cab_high * 0.88, glass)
    for y in np.arange(0.75, cab_high * 0.45, 0.18):
        pen.inner(-half * 0.6, y, half * 0.6, y + 0.07, np.array(DARK))
    for x in (-half * 0.8, half * 0.8):
        pen.inner(x - 0.16, 0.5, x + 0.16, 0.75, (245, 240, 215))
    pen.rect(-half, 0.34, half, 0.48, np.array(DARK))


def _truck_rear(pen, rng, width, high, load) -> None:
    half = width / 2
    for x in (-half * 0.7, half * 0.7):
        pen.rect(x - 0.26, 0, x + 0.26, 0.7, TYRE)
    pen.rect(-half, 0.55, half, 0.85, (44, 42, 44))
    pen.rect(-half, 0.8, half, high, load)
    pen.stroke([(0, 0.85), (0, high * 0.97)], 0.05, load * 0.55)
    pen.stroke(
        [(-half * 0.92, 0.9), (half * 0.92, 0.9), (half * 0.92, high * 0.96), (-half * 0.92, high * 0.96)],
        0.05,
        load * 0.7,
        closed=True,
    )
    for x in (-half * 0.85, half * 0.85):
        pen.inner(x - 0.16, 0.58, x + 0.16, 0.78, (200, 30, 28))


def draw_bus(pen: Pen, rng: Generator, turn: float) -> None:
    body = bus_paint(rng)
    band = cloth(rng) if rng.random() < 0.4 else np.array([232, 230, 224]) * rng.uniform(0.8, 1.05)
    length, width, high = rng.uniform(8, 12), rng.uniform(2.35, 2.55), rng.uniform(2.8, 3.2)
    glass = np.array([46, 54, 64]) * rng.uniform(0.6, 2.2)
    side, end = _panels(turn, length, width)
    if side[1]:
        _bus_side(pen.part(*side), rng, length, high, body, band, glass)
    if end[1]:
        _bus_end(
            pen.part(*end), rng, width, high, body * (rng.uniform(0.75, 1.0) if side[1] else 1), band, glass
        )


def _bus_side(pen, rng, length, high, body, band, glass) -> None:
    half, sill = length / 2, rng.uniform(1.15, 1.35)
    pen.rect(-half, 0.35, half, high, body)
    pen.inner(-half, high * 0.9, half, high, band)
    if rng.random() < 0.6:
        pen.inner(-half, 0.35, half, rng.uniform(0.6, 0.85), band * 0.9)
    pitch = rng.uniform(1.1, 1.5)
    for left in np.arange(-half + 0.2, half - pitch, pitch):
        pen.inner(left, sill, left + pitch * 0.88, high * 0.86, glass)
    for door in (half - 1.5, -half * rng.uniform(0.0, 0.3)):
        pen.inner(door, 0.45, door + 1.1, high * 0.84, glass * 0.85)
        pen.inner(door + 0.52, 0.45, door + 0.58, high * 0.84, body)
    radius = rng.uniform(0.44, 0.5)
    for x in (-half * 0.58, half * 0.62):
        pen.disc(x, radius, radius, TYRE)
        pen.disc(x, radius, radius * 0.5, np.array(STEEL) * rng.uniform(0.6, 1.4))


def _bus_end(pen, rng, width, high, body, band, glass) -> None:
    half = width / 2
    for x in (-half * 0.75, half * 0.75):
        pen.rect(x - 0.16, 0, x + 0.16, 0.6, TYRE)
    pen.rect(-half, 0.35, half, high, body)
    pen.inner(-half * 0.9, high * 0.42, half * 0.9, high * 0.84, glass)
    pen.inner(-half, high * 0.87, half, high, band)
    if rng.random() < 0.6:
        pen.inner(-half * 0.6, high * 0.885, half * 0.5, high * 0.975, (245, 170, 40))  # where it goes to
    lamp = (200, 30, 28) if rng.random() < 0.4 else (245, 240, 215)
    for x in (-half * 0.78, half * 0.78):
        pen.inner(x - 0.16, 0.62, x + 0.16, 0.84, lamp)
    pen.rect(-half, 0.3, half, 0.45, np.array(DARK))
