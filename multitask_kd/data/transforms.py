"""Augmentation and letterbox: image, mask and boxes move together (albumentations)."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import otherwise asks the network for a newer version
import albumentations as A
import cv2
import numpy as np

from ..batch import CROWD, IGNORE
from .base import Sample

FILL = 114  # grey of padding
MIN_AREA_PX = 4  # a smaller box, at the network's size, is left out


@dataclass(frozen=True)
class Geometry:
    """How an image lies in the network's input: ``content`` (h, w) of it, from the top left corner, is the ``original`` (h, w)."""

    original: tuple[int, int]
    content: tuple[int, int]


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
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    padded = np.full((*size, 3), FILL, dtype=np.uint8)
    padded[:height, :width] = resized
    return padded, geometry


class TrainTransform:
    """Letterbox, then random flip, zoom, shift, rotation and colour, all drawn from the sample's own seed.

    size: (H, W) in pixels. The other parameters are documented in the config's ``data.augment``.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        flip: float,
        scale: tuple[float, float],
        translate: float,
        rotate: float,
        brightness: float,
        color: float,
        min_visible: float,
    ):
        self.size = tuple(size)
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
                    fill=FILL,
                    fill_mask=IGNORE,
                    p=1.0,
                )
            )
        if not steps:
            steps.append(A.NoOp())  # something that boxes pass through
        if brightness:
            steps.append(A.RandomBrightnessContrast(brightness_limit=brightness, contrast_limit=brightness, p=0.8))
        if color:
            hue, saturation = round(color * 18), round(color * 255)  # in OpenCV's units: 180 and 255 a turn
            steps.append(A.HueSaturationValue(hue, saturation, 0, p=0.5))
        self.min_visible = min_visible
        # Boxes travel as their corners: the library's books of boxes cost four times the transforms themselves.
        corners = A.KeypointParams(format="xy", remove_invisible=False, check_each_transform=False)
        self.compose = A.Compose(steps, keypoint_params=corners)

    def __call__(self, sample: Sample, seed: int) -> Sample:
        """``sample`` at the network's size. The same seed gives the same result in any process, labelled or not."""
        image, geometry = letterbox(sample.image, self.size)
        given = {"image": image}
        if sample.mask is not None:
            given["mask"] = _mask(sample.mask, self.size, geometry)
        boxes = classes = None
        if sample.boxes is not None:
            boxes, classes = _boxes(sample, geometry)
            given["keypoints"] = _corners(boxes)
        # One stream for all steps: with set_random_seed each step would draw the same numbers, and flip and colour go together.
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        moved = self.compose(**given)
        if boxes is not None:
            boxes, kept = self._frames(moved["keypoints"])
            boxes, classes = boxes[kept], classes[kept]
        return Sample(image=moved["image"], mask=moved.get("mask"), boxes=boxes, classes=classes)

    def _frames(self, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corners [4*M,2] -> the frames round each four, inside the image, float32 [M,4], and which of them to keep [M]."""
        corners = np.asarray(corners, np.float32).reshape(-1, 4, 2) + 0.5
        whole = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        boxes = whole.clip(0, np.array([self.size[1], self.size[0]] * 2, np.float32))
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        return boxes, (area >= MIN_AREA_PX) & (area >= self.min_visible * (whole[:, 2:] - whole[:, :2]).prod(axis=1))


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Boxes [M,4] -> their corners [4*M,2] x,y as keypoints, which count from the middle of the first pixel."""
    return boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2) - 0.5


def _mask(mask: np.ndarray, size: tuple[int, int], geometry: Geometry) -> np.ndarray:
    """Mask uint8 [h,w] letterboxed to ``size``, IGNORE in the padding."""
    height, width = geometry.content
    if mask.shape != (height, width):
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    if mask.shape == size:
        return mask
    padded = np.full(size, IGNORE, dtype=np.uint8)
    padded[:height, :width] = mask
    return padded


def _boxes(sample: Sample, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [M,4] in pixels of the letterbox and their classes, crowds marked, slivers left out."""
    (height, width), (rows, columns) = geometry.content, geometry.original
    boxes = sample.boxes.reshape(-1, 4) * np.array([width / columns, height / rows] * 2, dtype=np.float32)
    classes = np.where(sample.crowd, CROWD, sample.classes) if len(boxes) else np.zeros(0, np.int64)
    large = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) >= MIN_AREA_PX
    return boxes[large], classes[large]
