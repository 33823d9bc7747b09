"""Top-1 and top-5 accuracy of a classification, and accuracy by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Accuracy:
    """Counts images. classes: names in index order; ``matrix``: int64 [C,C], images by (truth, likeliest
    class)."""

    def __init__(self, classes: Sequence[str]):
        if not classes:
            raise ValueError("Accuracy needs at least one class")
        self.classes = tuple(classes)
        self.matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
        self.in_top5 = 0

    def update(self, scores: np.ndarray, truth: int) -> None:
        """Count one image. scores: [C], higher is likelier; of equal scores the first wins. Raises ValueError
        on other shapes."""
        scores = np.asarray(scores)
        if scores.shape != (len(self.classes),) or not 0 <= truth < len(self.classes):
            raise ValueError(
                f"scores {list(scores.shape)} and class {truth} do not fit {len(self.classes)} classes"
            )
        order = np.argsort(-scores, kind="stable")
        self.matrix[truth, order[0]] += 1
        self.in_top5 += int(truth in order[:5])

    def compute(self) -> dict[str, Any]:
        """Figures in percent: ``top1``, ``top5`` (None with five classes or fewer), ``accuracy`` by class
        (None where a class has no image). All None without images."""
        images, by_class, right = int(self.matrix.sum()), self.matrix.sum(1), np.diag(self.matrix)
        return {
            "top1": 100 * int(right.sum()) / images if images else None,
            "top5": 100 * self.in_top5 / images if images and len(self.classes) > 5 else None,
            "accuracy": {
                name: 100 * int(right[i]) / int(by_class[i]) if by_class[i] else None
                for i, name in enumerate(self.classes)
            },
        }
