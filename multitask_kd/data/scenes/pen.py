"""A pen that draws upright things in metres, x to the right and y up from their foot, and labels what it
covers."""

from __future__ import annotations

import math

import cv2
import numpy as np

from .background import Camera

OVERSAMPLE = 2  # objects are drawn on a canvas this much larger than the image
SUBPIXEL_BITS = 4
Points = list[tuple[float, float]]


class Pen:
    """Draws one thing into an image and its label into a label map, both uint8 on the same oversampled
    canvas.

    foot: level image coordinates of (0, 0); scale: pixels of the image a metre, horizontally times
    ``squeeze`` (negative: mirrored). haze: RGB to fade to; fade: how far, in [0, 1].
    """

    def __init__(
        self,
        image,
        labels,
        label: int,
        camera: Camera,
        foot,
        scale: float,
        haze,
        fade: float,
        squeeze: float = 1.0,
    ):
        self.image, self.labels, self.label, self.camera = image, labels, label, camera
        self.foot, self.scale, self.haze, self.fade, self.squeeze = (
            foot,
            scale,
            tuple(map(float, haze)),
            fade,
            squeeze,
        )
        fixed = OVERSAMPLE << SUBPIXEL_BITS
        cos, sin = math.cos(camera.roll) * fixed * scale, math.sin(camera.roll) * fixed * scale
        u, v = camera.turn(*foot)
        shift = (OVERSAMPLE - 1) / (2 * OVERSAMPLE)  # from centres of large pixels to centres of small ones
        self.to_fixed = cos * squeeze, sin, (u + shift) * fixed, sin * squeeze, -cos, (v + shift) * fixed

    def part(self, x: float, squeeze: float) -> Pen:
        """A pen for a panel whose middle is at ``x`` metres and that is seen foreshortened by ``squeeze``."""
        foot = self.foot[0] + x * self.scale * self.squeeze, self.foot[1]
        squeeze *= self.squeeze
        return Pen(
            self.image, self.labels, self.label, self.camera, foot, self.scale, self.haze, self.fade, squeeze
        )

    def support(self) -> Pen:
        """The same pen with the next label: that of parts which hold a thing up and are not counted to it."""
        label = self.label + 1
        return Pen(
            self.image,
            self.labels,
            label,
            self.camera,
            self.foot,
            self.scale,
            self.haze,
            self.fade,
            self.squeeze,
        )

    def shows(self, metres: float) -> bool:
        """Whether a detail of this size would cover a pixel of the canvas."""
        return metres * self.scale * OVERSAMPLE >= 1

    def _colour(self, colour) -> tuple[float, float, float]:
        r, g, b = colour.tolist() if isinstance(colour, np.ndarray) else colour
        (hr, hg, hb), f = self.haze, self.fade
        return r + (hr - r) * f, g + (hg - g) * f, b + (hb - b) * f

    def _corners(self, points: Points) -> list[np.ndarray]:
        a, b, c, d, e, f = self.to_fixed
        return [np.array([(int(a * x + b * y + c), int(d * x + e * y + f)) for x, y in points], np.int32)]

    def _round(self, x: float, y: float, radius: float) -> list[np.ndarray]:
        a, b, c, d, e, f = self.to_fixed
        middle = np.array((a * x + b * y + c, d * x + e * y + f))
        return [
            (UNIT_CIRCLE @ np.array(((a * radius, d * radius), (b * radius, e * radius))) + middle).astype(
                np.int32
            )
        ]

    def fill(self, points: Points, colour) -> None:
        """A polygon that adds to the silhouette."""
        corners = self._corners(points)
        cv2.fillPoly(self.image, corners, self._colour(colour), shift=SUBPIXEL_BITS)
        cv2.fillPoly(self.labels, corners, self.label, shift=SUBPIXEL_BITS)

    def detail(self, points: Points, colour) -> None:
        """A polygon inside the silhouette: paint without a label."""
        cv2.fillPoly(self.image, self._corners(points), self._colour(colour), shift=SUBPIXEL_BITS)

    def rect(self, left: float, low: float, right: float, high: float, colour) -> None:
        self.fill([(left, low), (right, low), (right, high), (left, high)], colour)

    def inner(self, left: float, low: float, right: float, high: float, colour) -> None:
        """A rectangle inside the silhouette."""
        self.detail([(left, low), (right, low), (right, high), (left, high)], colour)

    def disc(self, x: float, y: float, radius: float, colour) -> None:
        corners = self._round(x, y, radius)
        cv2.fillPoly(self.image, corners, self._colour(colour), shift=SUBPIXEL_BITS)
        cv2.fillPoly(self.labels, corners, self.label, shift=SUBPIXEL_BITS)

    def stroke(self, points: Points, width: float, colour, *, closed: bool = False) -> None:
        """A line ``width`` metres thick, at least one pixel of the canvas."""
        corners = self._corners(points)
        thickness = max(1, round(width * self.scale * OVERSAMPLE))
        cv2.polylines(self.image, corners, closed, self._colour(colour), thickness, shift=SUBPIXEL_BITS)
        cv2.polylines(self.labels, corners, closed, self.label, thickness, shift=SUBPIXEL_BITS)

    def wheel(self, x: float, y: float, radius: float, colour) -> None:
        """A tyre around spokes one sees through; the label covers the whole disc."""
        corners = self._round(x, y, radius)
        thickness = max(1, round(0.07 * self.scale * OVERSAMPLE))
        cv2.polylines(self.image, corners, True, self._colour(colour), thickness, shift=SUBPIXEL_BITS)
        cv2.fillPoly(self.labels, corners, self.label, shift=SUBPIXEL_BITS)


CIRCLE = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 14, endpoint=False)]
UNIT_CIRCLE = np.array(CIRCLE)
