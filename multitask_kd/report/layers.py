"""What ``pictures.panel`` draws over an image: the forms that labels and predictions take in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MaskLayer:
    """mask: integers [H,W], an index into ``names``, or IGNORE, which is hatched."""

    mask: np.ndarray
    names: Sequence[str]


@dataclass(frozen=True)
class BoxLayer:
    """boxes: [M,4] x1,y1,x2,y2 in pixels of the image; classes: [M], indices into ``names``.

    scores: [M], of predictions. crowd: bool [M], whether a box is round many objects; None: none is.
    """

    boxes: np.ndarray
    classes: np.ndarray
    names: Sequence[str]
    scores: np.ndarray | None = None
    crowd: np.ndarray | None = None


@dataclass(frozen=True)
class TextLayer:
    """A line about the whole image, e.g. "weather: rain 0.93"."""

    text: str


@dataclass(frozen=True)
class InsetLayer:
    """picture: uint8 [h,w,3], shown small in a corner, e.g. a depth map in colours; title: a word on it."""

    picture: np.ndarray
    title: str


Layer = MaskLayer | BoxLayer | TextLayer | InsetLayer
