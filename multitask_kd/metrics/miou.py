"""Mean intersection over union of a whole set, from one confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..batch import IGNORE


class MeanIoU:
    """Counts pixels over all images; an average of the images' own mIoU would be another number.

    classes: names in index order.
    ``matrix``: int64 [C,C], pixels by (truth, prediction); matrices of several processes may be summed.
    """

    def __init__(self, classes: Sequence[str]):
        if not classes:
            raise ValueError("MeanIoU needs at least one class")
        self.classes = tuple(classes)
        self.matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
        self._labelled = np.zeros(len(classes), bool)  # classes that the set of at least one image labels

    def update(
        self, prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor, known: np.ndarray | None = None
    ) -> None:
        """Count the pixels of one mask [H,W] or of a batch [B,H,W].

        prediction: integers 0..C-1. truth: the same, or IGNORE where the pixel does not count. known: bool
        [C], the classes that the images' set labels; None: all. Raises ValueError on other shapes, types or
        class indices.
        """
        prediction, truth = _host(prediction), _host(truth)
        if prediction.shape != truth.shape or truth.ndim not in (2, 3):
            raise ValueError(
                f"prediction {list(prediction.shape)} and truth {list(truth.shape)} must be equal, [H,W] or "
                f"[B,H,W]"
            )
        count = len(self.classes)
        _check_range(prediction, count, "prediction")
        rows = max(count, IGNORE + 1)
        _check_range(truth, rows, "truth")
        # IGNORE is counted into a row of its own and dropped: faster than picking the valid pixels out first.
        pairs = truth.astype(np.int64) * count + prediction
        counts = np.bincount(pairs.ravel(), minlength=rows * count).reshape(rows, count)
        counts[IGNORE] = 0
        if counts[count:].any():
            wrong = count + int(np.flatnonzero(counts[count:].any(axis=1))[0])
            raise ValueError(f"truth holds class {wrong}; there are {count} classes and IGNORE is {IGNORE}")
        self.matrix += counts[:count]
        self._labelled |= True if known is None else known

    def compute(self) -> dict[str, Any]:
        """Figures in percent: ``mIoU``, ``pixel_accuracy``, and ``IoU`` by class.

        A class is None and left out of the mean where it occurs in neither truth nor prediction, or where the
        set of no image labels it. All are None where no pixel was counted.
        """
        matches = np.diag(self.matrix)
        unions = self.matrix.sum(axis=0) + self.matrix.sum(axis=1) - matches
        present = (unions > 0) & self._labelled
        ious = 100.0 * matches / np.maximum(unions, 1)
        pixels = int(self.matrix.sum())
        return {
            "mIoU": float(ious[present].mean()) if pixels else None,
            "pixel_accuracy": 100.0 * int(matches.sum()) / pixels if pixels else None,
            "IoU": {
                name: float(iou) if there else None
                for name, iou, there in zip(self.classes, ious, present, strict=True)
            },
        }


def _host(mask: np.ndarray | Tensor) -> np.ndarray:
    mask = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if mask.dtype.kind not in "iu":
        raise ValueError(f"a mask of class indices must hold integers, not {mask.dtype}")
    return mask


def _check_range(mask: np.ndarray, limit: int, what: str) -> None:
    if mask.size and (mask.min() < 0 or mask.max() >= limit):
        raise ValueError(f"{what} holds {mask.min()}..{mask.max()}, outside 0..{limit - 1}")
