"""The labels of a drawn scene, read off its maps: masks and boxes, the road and its paint, depth, weather."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

from .background import ROAD, SKY, STUFF, Background
from .objects import IGNORE, OBJECTS

SEG_CLASSES = STUFF + OBJECTS
FIRST_INSTANCE = 16  # id of the first object; below are the stuff classes
MIN_VISIBLE = 0.35  # of an object's pixels
MIN_SIDE_PX = 4.0
BAND_SIDE_PX = 14  # objects at least this large may be given an ignored outline

OTHER, BARE, PAINTED = range(3)  # values of a road map
VISIBLE_LEVELS = 10.0  # grey levels: paint that changes the road by less cannot be told from noise
FAR_M = 80.0  # metres; a pixel shows so much ground beyond that its depth says little

WEATHER = ("clear", "overcast", "dark")
CLEAR, OVERCAST, DARK = range(len(WEATHER))
MIN_SKY = 0.01  # of the pixels; a smaller patch of sky does not tell a clear day from an overcast one
BLUE_SKY = 0.15  # by how much of itself the blue of a clear sky exceeds the red; half of all days are above


@dataclass(frozen=True)
class Drawing:
    """A drawn scene. image: uint8 [H,W,3]; ids: uint8 [H,W], stuff class, IGNORE, or FIRST_INSTANCE + object.

    classes: of each object; whole: pixels [objects] each covered before others were drawn over it.
    road: uint8 [H,W], see ``road_map``; depth: float32 [H,W], see ``depth_map``; weather: see ``weather``.
    """

    image: np.ndarray
    ids: np.ndarray
    classes: list[int]
    whole: np.ndarray
    road: np.ndarray
    depth: np.ndarray
    weather: int


@dataclass(frozen=True)
class Labels:
    """mask: uint8 [H,W]; boxes: float32 [M,4] x1,y1,x2,y2 in pixels; classes: int64 [M]; area: float32 [M].

    road, depth, weather: as in ``Drawing``.
    """

    mask: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    area: np.ndarray
    road: np.ndarray
    depth: np.ndarray
    weather: int


def road_map(ids: np.ndarray, paint: np.ndarray) -> np.ndarray:
    """uint8 [H,W]: PAINTED where the road's paint is seen, BARE where the road alone, OTHER elsewhere.

    ids: uint8 [H,W] as in ``Drawing``; paint: float32 [H,W], see ``Background``.
    """
    road = np.where(paint < VISIBLE_LEVELS, np.uint8(BARE), np.uint8(PAINTED))
    road[ids != ROAD] = OTHER
    return road


def depth_map(ground: np.ndarray, values: np.ndarray, feet: np.ndarray) -> np.ndarray:
    """Depth in metres along the camera's axis, float32 [H,W]; 0, unknown: the sky, and what is beyond FAR_M.

    ground: float32 [H,W], depth where nothing stands; values: uint8 [H,W], from FIRST_INSTANCE on a thing;
    feet: float32 [256], depth of the foot of each. A thing is flat: all its pixels have its foot's depth.
    """
    depth = np.where(values < FIRST_INSTANCE, ground, feet[values])
    depth[depth > FAR_M] = 0
    return depth


def weather(back: Background, ids: np.ndarray) -> int:
    """Index in WEATHER: dark at dusk and at night; by day clear or overcast, as the sky seen is blue or grey.

    IGNORE by day where hardly any sky is seen. ids: uint8 [H,W] as in ``Drawing``.
    """
    if back.light != "day":
        return DARK
    sky = (ids == SKY).view(np.uint8)
    if np.count_nonzero(sky) < MIN_SKY * sky.size:
        return IGNORE
    red, _, blue, _ = cv2.mean(back.image, sky)
    return CLEAR if blue - red > BLUE_SKY * blue else OVERCAST


def label(rng: Generator, drawing: Drawing) -> Labels:
    """The labels of what can be seen. Objects too hidden or small are IGNORE in the mask and have no box."""
    to_class = np.full(256, IGNORE, np.uint8)
    to_class[: len(STUFF)] = np.arange(len(STUFF))
    boxes, classes, areas, outlined = [], [], [], []
    for i, kind in enumerate(drawing.classes):
        name = FIRST_INSTANCE + i
        own = drawing.ids == name
        area = int(np.count_nonzero(own))
        if area < MIN_VISIBLE * drawing.whole[i] or area == 0:
            continue
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE_PX:
            continue
        to_class[name] = len(STUFF) + kind
        boxes.append(box)
        classes.append(kind)
        areas.append(area)
        if min(box[2] - box[0], box[3] - box[1]) >= BAND_SIDE_PX and rng.random() < 0.4:
            outlined.append(name)
    mask = to_class[drawing.ids]
    _ignore_outlines(mask, drawing.ids, outlined)
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    kinds, area = np.array(classes, np.int64), np.array(areas, np.float32)
    return Labels(mask, corners, kinds, area, drawing.road, drawing.depth, drawing.weather)


def _ignore_outlines(mask: np.ndarray, ids: np.ndarray, names: list[int]) -> None:
    """Mark stuff that touches these objects IGNORE, as an annotator would who is unsure of outlines."""
    for name in names:
        band = cv2.dilate((ids == name).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        mask[band & (ids < FIRST_INSTANCE)] = IGNORE
