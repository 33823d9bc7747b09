"""What kinds of task whose label is a map [H,W] have in common."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.labels import Geometry


def conv_block(width: int) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def packed_maps(key: str, labels: Sequence[np.ndarray | None], blank: np.ndarray) -> dict[str, Tensor]:
    """``key``: the labels [B,H,W], ``blank`` [H,W] where an image has none; ``labelled`` bool [B]."""
    maps = np.stack([blank if label is None else label for label in labels])
    return {
        key: torch.from_numpy(maps),
        "labelled": torch.tensor([label is not None for label in labels]),
    }


def letterboxed_map(
    label: np.ndarray, geometry: Geometry, size: tuple[int, int], outside: float
) -> np.ndarray:
    """A map [h,w] letterboxed to ``size`` by nearest neighbour, ``outside`` in the padding."""
    height, width = geometry.content
    if label.shape != (height, width):
        label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    if label.shape == tuple(size):
        return label
    padded = np.full(size, outside, dtype=label.dtype)
    padded[:height, :width] = label
    return padded


def restored_map(decoded: Tensor, geometry: Geometry) -> Tensor:
    """A map [C,H,W] of a letterboxed image -> [C,h,w] at the original size, bilinear."""
    height, width = geometry.content
    maps = decoded[None, :, :height, :width]
    if (height, width) != geometry.original:
        maps = F.interpolate(maps, size=geometry.original, mode="bilinear", align_corners=False)
    return maps[0]
