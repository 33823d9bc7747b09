"""Precision, recall and F1 of boxes at a confidence, from COCO's matching at one IoU.

A detector's ``Task.more_figures`` returns ``match(metric).figures(confidence)``, its ``more_note`` returns
``note``.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .mean_ap import MAX_DETECTIONS, MeanAP

IOU = 0.5
FIGURES = ("precision", "recall", "F1", "confidence")


@dataclass(frozen=True)
class Matches:
    """Which detections of a whole set match an object.

    scores [N] in [0,1], right bool [N], labels int [N] class indices; detections on a crowd are left out.
    truths int [C]: number of objects by class, without crowds. classes: their names.
    """

    classes: tuple[str, ...]
    scores: np.ndarray
    right: np.ndarray
    labels: np.ndarray
    truths: np.ndarray

    def at(self, confidence: float) -> dict[str, Any]:
        """Counts and figures in percent of the detections with a score of at least ``confidence``, together
        and by class.

        None where there is nothing to divide by: precision without detections, recall and F1 without objects.
        """
        sure = self.scores >= confidence
        right = np.bincount(self.labels[sure & self.right], minlength=len(self.classes))
        wrong = np.bincount(self.labels[sure & ~self.right], minlength=len(self.classes))
        by_class = {
            name: _figures(*map(int, (right[c], wrong[c], self.truths[c])))
            for c, name in enumerate(self.classes)
        }
        together = _figures(int(right.sum()), int(wrong.sum()), int(self.truths.sum()))
        return {"confidence": confidence, **together, "classes": by_class}

    def figures(self, confidence: float | None) -> dict[str, Any]:
        """``at`` the confidence, or at the best one where it is None; and ``best_F1`` at ``best_confidence``.

        All are None where no confidence is given and no detection is right.
        """
        best = self.best_confidence()
        chosen = best if confidence is None else confidence
        counts = dict.fromkeys(FIGURES) if chosen is None else self.at(chosen)
        return counts | {"best_F1": None if best is None else self.at(best)["F1"], "best_confidence": best}

    def best_confidence(self) -> float | None:
        """The confidence of the highest F1 over all classes together, rounded to the fewest decimals that
        give it.

        None where no detection is right.
        """
        if not self.right.any():
            return None
        order = np.argsort(-self.scores, kind="stable")
        scores, right = self.scores[order], np.cumsum(self.right[order])
        f1 = 2 * right / (np.arange(1, len(scores) + 1) + self.truths.sum())
        f1[:-1][scores[:-1] == scores[1:]] = -1  # a confidence keeps all detections of one score or none
        best = int(f1.argmax())
        return _roundest(float(scores[best]), float(scores[best + 1]) if best + 1 < len(scores) else 0.0)


def match(metric: MeanAP, iou: float = IOU) -> Matches:
    """COCO's matching of the boxes that ``metric`` gathered: the best detections first, each with the
    unmatched object that it overlaps most.

    The matches at a confidence therefore do not depend on the detections below it, and one matching serves
    all confidences.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truths, detections = metric.datasets(COCO)
        evaluation = COCOeval(truths, detections, "bbox")
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        if truths.dataset["images"]:
            evaluation.evaluate()
    scores, right, labels = [np.zeros(0)], [np.zeros(0, bool)], [np.zeros(0, np.int64)]
    objects = np.zeros(len(metric.classes), np.int64)
    for found in filter(None, evaluation.evalImgs):
        counted = ~np.asarray(found["dtIgnore"][0], bool)
        scores.append(np.asarray(found["dtScores"], np.float64)[counted])
        right.append(np.asarray(found["dtMatches"][0])[counted] > 0)
        labels.append(np.full(counted.sum(), found["category_id"], np.int64))
        objects[found["category_id"]] += int((~np.asarray(found["gtIgnore"], bool)).sum())
    return Matches(metric.classes, *map(np.concatenate, (scores, right, labels)), objects)


def note(confidence: float | None) -> str:
    """A sentence that explains ``Matches.figures`` to a reader of a table."""
    best = "the confidence at which the network's F1 is highest; it was chosen on these same images"
    where = best if confidence is None else f"a confidence of {confidence:g}"
    return f"Precision, recall and F1: boxes matched at IoU {IOU:g}, at {where}."


def _figures(right: int, wrong: int, truths: int) -> dict[str, Any]:
    return {
        "precision": _percent(right, right + wrong),
        "recall": _percent(right, truths),
        "F1": _percent(2 * right, right + wrong + truths) if truths else None,
        "right": right,
        "wrong": wrong,
        "missed": truths - right,
    }


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _roundest(at_most: float, above: float) -> float:
    """The number of fewest decimals in (above, at_most]."""
    for digits in range(1, 9):
        number = math.floor(at_most * 10**digits) / 10**digits
        if above < number <= at_most:
            return number
    return at_most
