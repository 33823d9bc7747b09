"""Errors of monocular depth over a whole set (Eigen et al., 2014, section 4.1)."""

from __future__ import annotations

from typing import Any

import numpy as np


class DepthErrors:
    """Sums over all labelled pixels of all images: every pixel counts alike, whatever image it is of."""

    def __init__(self) -> None:
        self.pixels, self.relative, self.squared, self.within = 0, 0.0, 0.0, 0

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Count one image. prediction: [H,W] metres; truth: [H,W] metres, 0 where it is not known. Raises
        ValueError on other shapes."""
        if prediction.shape != truth.shape:
            raise ValueError(
                f"prediction {list(prediction.shape)} and truth {list(truth.shape)} must be equal, [H,W]"
            )
        known = truth > 0
        p, t = prediction[known].astype(np.float64), truth[known].astype(np.float64)
        self.pixels += len(t)
        self.relative += float((np.abs(p - t) / t).sum())
        self.squared += float(np.square(p - t).sum())
        self.within += int((np.maximum(p / t, t / np.maximum(p, 1e-9)) < 1.25).sum())

    def compute(self) -> dict[str, Any]:
        """``delta1``: percent of the pixels within a factor of 1.25; ``AbsRel``: a ratio; ``RMSE``: metres.
        None without pixels."""
        n = self.pixels
        return {
            "delta1": 100 * self.within / n if n else None,
            "AbsRel": self.relative / n if n else None,
            "RMSE": (self.squared / n) ** 0.5 if n else None,
        }
