"""COCO's average precision and recall of boxes, by pycocotools or faster_coco_eval (the same figures)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

try:
    import faster_coco_eval
except ImportError:
    faster_coco_eval = None

MAX_DETECTIONS = 100  # an image, as in COCO
BACKENDS = ("auto", "pycocotools", "faster")
AREAS = ("all", "small", "medium", "large")  # COCO's order; split at 32^2 and 96^2 pixels
IOU_50, IOU_75 = 0, 5  # indices into COCO's IoU thresholds .50, .55, ..., .95


class MeanAP:
    """Gathers boxes of a whole set, then evaluates them as COCO does.

    classes: names in index order.
    backend: "faster" (faster_coco_eval), "pycocotools", or "auto": the first where installed, else the
    second. Raises ValueError for another backend, ImportError when the one asked for is not installed.
    """

    def __init__(self, classes: Sequence[str], *, backend: str = "auto"):
        if not classes:
            raise ValueError("MeanAP needs at least one class")
        if backend not in BACKENDS:
            raise ValueError(f"unknown mAP backend '{backend}'; known: {', '.join(BACKENDS)}")
        self.classes = tuple(classes)
        self._coco, self._evaluator = _load(backend)
        self._images: dict[int, tuple[int, int]] = {}
        # One float32 array an image: Python dicts for half a million detections exist in compute() only.
        self._detections: list[np.ndarray] = []  # [K,6] x1,y1,x2,y2,score,class
        self._truths: list[np.ndarray] = []  # [M,7] x1,y1,x2,y2,class,crowd,area

    def update(
        self, image_id: int, size: tuple[int, int], detections: Sequence[Any], truth: Sequence[Any]
    ) -> None:
        """Add one labelled image.

        size: height, width in pixels.
        detections: boxes [K,4] x1,y1,x2,y2 in pixels, scores [K], classes [K]; the best 100 are kept.
        truth: boxes [M,4], classes [M], crowd bool [M] (a detection there is neither right nor wrong),
            area [M] in pixels (COCO's size bins use it).
        Arrays or tensors. Raises ValueError on other shapes, values that are not finite, a class index out of
        range,
        or an image that was added before.
        """
        image_id = int(image_id)
        if image_id in self._images:
            raise ValueError(f"image {image_id} was added twice")
        detected = _rows(detections, ("boxes", "scores", "classes"), "detections")
        annotated = _rows(truth, ("boxes", "classes", "crowd", "area"), "truth")
        self._check_classes(detected[:, 5], "detections")
        self._check_classes(annotated[:, 4], "truth")
        best = np.argsort(-detected[:, 4], kind="stable")[:MAX_DETECTIONS]
        self._images[image_id] = (int(size[0]), int(size[1]))
        self._detections.append(detected[best])
        self._truths.append(annotated)

    def compute(self) -> dict[str, Any]:
        """Figures in percent; None where there is no such truth (COCO's -1).

        ``mAP`` is over IoU .50:.95 and ``AP`` the same by class; ``AR1``, ``AR10``, ``AR100`` are recalls
        with so many detections an image; small, medium and large are split at 32^2 and 96^2 pixels.
        """
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            precision, recall = self._evaluate()
        figures: dict[str, Any] = {
            "mAP": _percent(precision[..., 0, -1]),
            "mAP50": _percent(precision[IOU_50, ..., 0, -1]),
            "mAP75": _percent(precision[IOU_75, ..., 0, -1]),
        }
        figures |= {f"mAP_{AREAS[a]}": _percent(precision[..., a, -1]) for a in (1, 2, 3)}
        figures |= {f"AR{most}": _percent(recall[..., 0, m]) for m, most in enumerate((1, 10, 100))}
        figures |= {f"AR_{AREAS[a]}": _percent(recall[..., a, -1]) for a in (1, 2, 3)}
        figures["AP"] = {name: _percent(precision[:, :, c, 0, -1]) for c, name in enumerate(self.classes)}
        return figures

    def datasets(self, kind: type) -> tuple[Any, Any]:
        """The gathered truths and detections, each as an object of the COCO class ``kind``; a category's id
        is the class index."""
        return self._dataset(self._truth_rows(), kind), self._dataset(self._detection_rows(), kind)

    def _evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        """COCO's precision [IoU, recall, class, area, most detections] and recall [IoU, class, area, most
        detections].

        -1 where there is no truth.
        """
        if not self._images:
            return -np.ones((10, 101, len(self.classes), 4, 3)), -np.ones((10, len(self.classes), 4, 3))
        truths, detections = self.datasets(self._coco)
        evaluation = self._evaluator(truths, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])

    def _check_classes(self, indices: np.ndarray, what: str) -> None:
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self.classes)):
            raise ValueError(
                f"{what} hold classes {indices.min():.0f}..{indices.max():.0f}, outside "
                f"0..{len(self.classes) - 1}"
            )

    def _dataset(self, annotations: list[dict[str, Any]], kind: type) -> Any:
        """A COCO object without a file. (``loadRes`` fails on no detections and gives each a polygon.)"""
        coco = kind()
        coco.dataset = {
            "images": [{"id": i, "height": h, "width": w} for i, (h, w) in self._images.items()],
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.classes)],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    def _truth_rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for image_id, truth in zip(self._images, self._truths, strict=True):
            for x, y, width, height, label, crowd, area in _corner_and_size(truth).tolist():
                rows.append(_annotation(rows, image_id, [x, y, width, height], label, area, int(crowd)))
        return rows

    def _detection_rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for image_id, detected in zip(self._images, self._detections, strict=True):
            for x, y, width, height, score, label in _corner_and_size(detected).tolist():
                row = _annotation(rows, image_id, [x, y, width, height], label, width * height, 0)
                row["score"] = score
                rows.append(row)
        return rows


def _load(backend: str) -> tuple[type, type]:
    """The classes COCO and COCOeval of a backend."""
    if backend == "pycocotools" or (backend == "auto" and faster_coco_eval is None):
        return COCO, COCOeval
    if faster_coco_eval is None:
        raise ImportError("mAP backend 'faster' needs the package faster-coco-eval")
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def _rows(parts: Sequence[Any], names: tuple[str, ...], what: str) -> np.ndarray:
    """Boxes [N,4] and columns [N] side by side: float32 [N, 4 + columns]."""
    if len(parts) != len(names):
        raise ValueError(f"{what} must be ({', '.join(names)}), not {len(parts)} arrays")
    arrays = [
        np.asarray(p.detach().cpu() if isinstance(p, Tensor) else p, dtype=np.float32).reshape(
            -1, 4 if i == 0 else 1
        )
        for i, p in enumerate(parts)
    ]
    if len({len(a) for a in arrays}) > 1:
        lengths = ", ".join(f"{len(a)} {n}" for a, n in zip(arrays, names, strict=True))
        raise ValueError(f"{what} differ in length: {lengths}")
    rows = np.concatenate(arrays, axis=1)
    if not np.isfinite(rows).all():
        raise ValueError(f"{what} hold values that are not finite")
    return rows


def _corner_and_size(rows: np.ndarray) -> np.ndarray:
    """x1,y1,x2,y2,... -> x,y,width,height,... in float64."""
    rows = rows.astype(np.float64)
    rows[:, 2:4] -= rows[:, 0:2]
    return rows


def _annotation(
    rows: list[dict[str, Any]], image_id: int, bbox: list[float], label: float, area: float, crowd: int
) -> dict[str, Any]:
    # Ids start at 1: the evaluation takes a match with id 0 for no match.
    return {
        "id": len(rows) + 1,
        "image_id": image_id,
        "category_id": int(label),
        "bbox": bbox,
        "area": area,
        "iscrowd": crowd,
    }


def _percent(values: np.ndarray) -> float | None:
    """The mean of the values that COCO could compute (not -1), in percent."""
    values = values[values > -1]
    # COCO's precision of a perfect result is 1 - 2e-16; six decimals make it 100.
    return round(100 * float(values.mean()), 6) if values.size else None
