"""Augmentation and letterbox: image, mask and boxes move together (albumentations)."""

from __future__ import annotations

import os
from dataclasses import dataclass

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import otherwise asks the network for a newer version
import albumentations as A
import cv2
import numpy as np

from ..batch import CROWD, IGNORE
from .base import Sample

FILL = 114  # grey of padding
MIN_AREA_PX = 4  # a smaller box, at the network's size, is not learnt from


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
        steps, colours = [], []
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
        if brightness:
            colours.append(A.RandomBrightnessContrast(brightness_limit=brightness, contrast_limit=brightness, p=0.8))
        if color:
            hue, saturation = round(color * 18), round(color * 255)  # in OpenCV's units: 180 and 255 a turn
            colours.append(A.HueSaturationValue(hue, saturation, 0, p=0.5))
        boxes = A.BboxParams(
            format="pascal_voc",
            label_fields=["classes"],
            clip=True,
            min_visibility=min_visible,
            min_area=MIN_AREA_PX,
            check_each_transform=False,
        )
        # apart from each other, because Compose checks the boxes after every step, which costs more than the steps
        self.geometry = A.Compose(steps, bbox_params=boxes)
        self.colour = A.Compose(colours)

    def __call__(self, sample: Sample, seed: int) -> Sample:
        """``sample`` at the network's size. The same seed gives the same result in any process."""
        image, geometry = letterbox(sample.image, self.size)
        height, width = geometry.content
        mask = np.full(self.size, IGNORE, dtype=np.uint8)
        if sample.mask is not None:
            mask[:height, :width] = cv2.resize(sample.mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        boxes = np.zeros((0, 4), np.float32)
        classes = np.zeros(0, np.int64)
        if sample.boxes is not None and len(sample.boxes):
            ratio = np.array([width / geometry.original[1], height / geometry.original[0]] * 2, dtype=np.float32)
            boxes = sample.boxes * ratio
            classes = np.where(sample.crowd, CROWD, sample.classes)
            large = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) >= MIN_AREA_PX
            boxes, classes = boxes[large], classes[large]
        self.geometry.set_random_seed(seed)
        self.colour.set_random_seed(seed)
        moved = self.geometry(image=image, mask=mask, bboxes=boxes, classes=classes)
        return Sample(
            image=self.colour(image=moved["image"])["image"],
            mask=moved["mask"] if sample.mask is not None else None,
            boxes=np.asarray(moved["bboxes"], np.float32).reshape(-1, 4) if sample.boxes is not None else None,
            classes=np.asarray(moved["classes"], np.int64).reshape(-1) if sample.boxes is not None else None,
        )
