"""Colours of pictures: one a class name, told apart with any colour vision, and a scale for depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import cv2
import numpy as np

ClassNames = Mapping[str, Sequence[str]] | Sequence[str]
Colour = tuple[int, int, int]

BACKGROUND = "background"  # a class of this name is left uncoloured
GREY = (128, 128, 128)  # what has no colour: the background in a palette, a depth that is not known
INK, PAPER = (30, 30, 30), (255, 255, 255)
NEAREST, FARTHEST = 0.5, 100.0  # metres between which depths have colours of their own

# Okabe and Ito's colours, told apart with any colour vision; the palette continues them. Their orange is left
# out: over a photograph, at half strength, it reads as their yellow.
OKABE_ITO = ((86, 180, 233), (213, 94, 0), (0, 158, 115), (240, 228, 66), (0, 114, 178), (204, 121, 167))
# Linear RGB as seen with protanopia and deuteranopia: Machado, Oliveira and Fernandes 2009, severity 1.
PROTANOPIA = (
    (0.152286, 1.052583, -0.204868),
    (0.114503, 0.786281, 0.099216),
    (-0.003882, -0.048116, 1.051998),
)
DEUTERANOPIA = (
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)


def palette(class_names: ClassNames) -> dict[str, Colour]:
    """A colour for each name, by the place where it first stands.

    class_names: by task, in the order in which the tasks choose their colours; or one list. A name that
    several tasks have has one colour; that of the background is never drawn.
    """
    tasks = class_names.values() if isinstance(class_names, Mapping) else [class_names]
    names = list(dict.fromkeys(name for task in tasks for name in task))
    shown = [name for name in names if not is_background(name)]
    colours = dict(zip(shown, separated_colours(len(shown)), strict=True))
    return {name: colours.get(name, GREY) for name in names}


def is_background(name: str) -> bool:
    """Whether a class of this name is left uncoloured."""
    return name.lower() == BACKGROUND


def readable_on(colour: Colour) -> Colour:
    """Dark or white: the colour of text on a ground of ``colour``."""
    return INK if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 120 else PAPER


def depth_colours(metres: np.ndarray, *, nearest: float = NEAREST, farthest: float = FARTHEST) -> np.ndarray:
    """A depth map [H,W] in metres as colours uint8 [H,W,3]: from yellow (near) over red to dark blue (far).

    The scale is logarithmic and always the same, so that pictures can be compared: what is nearer than
    ``nearest`` or farther than ``farthest`` metres has the colour of that end. Grey where the depth is not
    known: 0 or below, or not finite.
    """
    metres = np.asarray(metres, dtype=np.float32)
    known = np.isfinite(metres) & (metres > 0)
    place = np.log(farthest / np.where(known, metres, farthest)) / np.log(
        farthest / nearest
    )  # 1 nearest, 0 farthest
    levels = (place.clip(0, 1) * 255).round().astype(np.uint8)
    picture = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_PLASMA), cv2.COLOR_BGR2RGB)
    picture[~known] = GREY
    return picture


@lru_cache(maxsize=8)
def separated_colours(count: int) -> tuple[Colour, ...]:
    """``count`` colours, each as far as can be from those before it.

    Distances are as seen with normal vision and with two colour blindnesses.
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
        views.append(
            _lab(np.where(shifted <= 0.0031308, shifted * 12.92, 1.055 * shifted ** (1 / 2.4) - 0.055))
        )
    return np.stack(views)


def _difference(some: np.ndarray, one: np.ndarray) -> np.ndarray:
    """How far apart colours [3,N,3] and one [3,1,3] are: [N], half for most viewers, half for the worst."""
    distances = np.linalg.norm(some - one, axis=-1)
    return (distances[0] + distances.min(axis=0)) / 2
