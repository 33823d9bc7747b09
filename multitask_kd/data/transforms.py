"""Augmentation and letterbox: an image and all of its labels move together (albumentations)."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import looks online for a newer version
import albumentations as A
import cv2
import numpy as np

from ..batch import GREY, IGNORE
from .base import Sample
from .labels import Geometry, LabelKind


def fit(original: tuple[int, int], size: tuple[int, int]) -> Geometry:
    """The largest letterbox of an ``original`` (h, w) image in ``size`` (h, w)."""
    scale = min(size[0] / original[0], size[1] / original[1])
    content = tuple(max(1, min(s, round(o * scale))) for o, s in zip(original, size, strict=True))
    return Geometry(original, content)


def letterbox(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, Geometry]:
    """Image uint8 [h,w,3] -> uint8 [H,W,3], scaled to fit and padded at the right and bottom."""
    geometry = fit(image.shape[:2], size)
    height, width = geometry.content
    if geometry.content == size == geometry.original:
        return np.ascontiguousarray(image), geometry
    shrinks = height < image.shape[0]
    resized = cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    padded = np.full((*size, 3), GREY, dtype=np.uint8)
    padded[:height, :width] = resized
    return padded, geometry


class TrainTransform:
    """Letterbox, then random flip, zoom, shift, rotation and colour, all drawn from the sample's own seed.

    size: (H, W) in pixels; kinds: by label, its kind, which defines how it moves. The other parameters are
    documented in the config's ``data.augment``.
    """

    def __init__(
        self,
        size: tuple[int, int],
        kinds: Mapping[str, LabelKind],
        *,
        flip: float,
        scale: tuple[float, float],
        translate: float,
        rotate: float,
        brightness: float,
        color: float,
        min_visible: float,
    ):
        self.size, self.kinds = tuple(size), dict(kinds)
        steps = []
        if flip:
            steps.append(A.HorizontalFlip(p=flip))
        if tuple(scale) != (1.0, 1.0) or translate or rotate:
            steps.append(
                A.Affine(
                    scale=tuple(scale),
                    keep_ratio=True,
                    translate_percent=(-translate, translate),
                    rotate=(-rotate, rotate),
                    fill=GREY,
                    fill_mask=IGNORE,
                    p=1.0,
                )
            )
        if not steps:
            steps.append(A.NoOp())  # the corners of boxes need at least one step that takes them
        if brightness:
            steps.append(
                A.RandomBrightnessContrast(brightness_limit=brightness, contrast_limit=brightness, p=0.8)
            )
        if color:
            hue, saturation = round(color * 18), round(color * 255)  # in OpenCV's units: 180 and 255 a turn
            steps.append(A.HueSaturationValue(hue, saturation, 0, p=0.5))
        self.min_visible = min_visible
        # Boxes are passed as corner points: the library's own handling of boxes costs four times as much as
        # the transforms themselves.
        corners = A.KeypointParams(format="xy", remove_invisible=False, check_each_transform=False)
        self.compose = A.Compose(steps, keypoint_params=corners)

    def __call__(self, sample: Sample, seed: int) -> Sample:
        """``sample`` at the network's size, with the labels of ``kinds``. The same seed gives the same result
        in any process, labelled or not."""
        image, geometry = letterbox(sample.image, self.size)
        labels = {name: label for name, label in sample.labels.items() if name in self.kinds}
        spatial = {
            name: self.kinds[name].to_spatial(label, geometry, self.size) for name, label in labels.items()
        }
        given = {"image": image}
        if maps := [m for one in spatial.values() for m in one.maps]:
            given["masks"] = maps
        if points := [one.points for one in spatial.values() if len(one.points)]:
            # keypoints count from the middle of the first pixel
            given["keypoints"] = np.concatenate(points) - np.float32(0.5)
        # One random stream for all steps: with set_random_seed each would draw the same numbers, so that flip
        # and colour would be correlated.
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        moved = self.compose(**given)
        maps, points = (
            iter(moved.get("masks", ())),
            np.asarray(moved.get("keypoints", ()), np.float32).reshape(-1, 2) + 0.5,
        )
        found, at = {}, 0
        for name, one in spatial.items():
            # the library stacks all maps, in the widest of their types
            one.maps = [np.asarray(next(maps), dtype=m.dtype) for m in one.maps]
            one.points, at = points[at : at + len(one.points)], at + len(one.points)
            found[name] = self.kinds[name].from_spatial(one, self.size, self.min_visible)
        return Sample(moved["image"], found, sample.known)
