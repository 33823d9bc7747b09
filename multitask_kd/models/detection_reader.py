"""Reads the detections that an external network returns, in the forms that detectors commonly use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import PAD, DensePredictions, PaddedDetections
from .dense_head import cells
from .external import pick, shown


class DetectionOutput:
    """Which part of a network's return value its detections are, and in which form.

    at: key or index, or several joined by points (``1.boxes``); null: the only part with the shape of
    detections.
    form: "cells": raw outputs [B,N,4+1+C] of cells like those of this package's own head; "detections":
        detections after suppression, as a list of mappings with boxes, scores, labels (as torchvision returns
        them), or as [B,M,6] of x1,y1,x2,y2,score,class; "predictions": [B,A,4+1+C] or [B,A,4+C] before
        suppression, as the YOLO family returns them, or a mapping of boxes, scores, locations, strides;
        "auto": recognised by the shape.
    strides: of cells and predictions (null: the student's for cells, unknown for predictions). anchors:
        predictions per location; their order is stride, anchor, row, column. Predictions of unknown locations
        can be used only as detections.
    boxes: "cxcywh" or "xyxy" in pixels of the network's input; objectness: whether an objectness column
        follows the boxes; scores: "probability" or "logit"; transposed: whether predictions are [B,4+C,A].
        first_class: the index of the network's first class.
    """

    def __init__(
        self,
        *,
        at: str | int | None = None,
        form: str = "auto",
        strides: Sequence[int] | None = None,
        anchors: int = 1,
        boxes: str = "cxcywh",
        objectness: bool = False,
        scores: str = "probability",
        transposed: bool = False,
        first_class: int = 0,
    ):
        for name, value, known in (
            ("form", form, ("auto", "cells", "detections", "predictions")),
            ("boxes", boxes, ("cxcywh", "xyxy")),
            ("scores", scores, ("probability", "logit")),
        ):
            if value not in known:
                raise ValueError(f"{name}: '{value}' is none of {', '.join(known)}")
        listed = strides is None or (
            isinstance(strides, (list, tuple)) and all(isinstance(s, int) and s > 0 for s in strides)
        )
        if anchors < 1 or not listed:
            raise ValueError(
                f"strides, anchors: whole numbers above 0, a list and one, are needed, not {strides!r} and "
                f"{anchors!r}"
            )
        self.at, self.form, self.anchors = at, form, anchors
        self.strides = None if strides is None else tuple(strides)
        self.boxes, self.objectness, self.scores, self.transposed = boxes, objectness, scores, transposed
        self.first_class = first_class

    def fault(self, pred: Any) -> str | None:
        """What is wrong with the values of a prediction and what to do, as text to follow a key path; None:
        nothing."""
        if isinstance(pred, Tensor) or not pred.scores.numel():
            return None
        low, high = float(pred.scores.min()), float(pred.scores.max())
        if low >= -1e-3 and high <= 1 + 1e-3:
            return None
        way = "; set scores to logit" if isinstance(pred, DensePredictions) else ""
        return f": the network's scores go from {low:.3g} to {high:.3g}, so they are no probabilities{way}"

    def read(
        self, returned: Any, classes: int, size: tuple[int, int]
    ) -> Tensor | DensePredictions | PaddedDetections:
        """The detections in a network's return value, in pixels of its input of ``size`` (H, W).

        Raises ValueError where they are in none of the known forms.
        """
        found = pick(returned, self.at, _like_detections, "detections", also=("detection",))
        if isinstance(found, (list, tuple)) and all(isinstance(x, Mapping) for x in found):
            return self._checked(_from_mappings(found, self.first_class), classes)
        if isinstance(found, Mapping) and {"boxes", "scores", "locations", "strides"} <= set(found):
            return _dense(found, classes)
        if not isinstance(found, Tensor) or found.dim() != 3:
            raise ValueError(f"{shown(found)} is neither [B,N,4+1+C] nor a list of boxes, scores, labels")
        form = self._form(found, classes, size)
        if form == "detections":
            return self._checked(self._rows(found), classes)
        if form == "predictions":
            return self._predictions(found, classes, size)
        if found.shape[2] != 5 + classes or found.shape[1] != self._cells(size):
            raise ValueError(
                f"{list(found.shape)} are not the {self._cells(size)} cells of strides "
                f"{list(self.strides or ())} with "
                f"4 + 1 + {classes} values each; set strides or form"
            )
        return found

    def _form(self, found: Tensor, classes: int, size: tuple[int, int]) -> str:
        if self.form != "auto":
            return self.form
        if found.shape[2] == 5 + classes and found.shape[1] == self._cells(size):
            return "cells"
        if found.shape[2] == 6 and found.shape[1] <= 1000:
            return "detections"
        if found.shape[1] == self._cells(size):
            raise ValueError(
                f"the network's cells have {found.shape[2] - 5} classes, but {classes} are named in `classes`"
            )
        raise ValueError(f"{list(found.shape)} may be many things; say which with form")

    def _cells(self, size: tuple[int, int]) -> int:
        return sum(-(-size[0] // s) * -(-size[1] // s) for s in self.strides or ())

    def _rows(self, found: Tensor) -> PaddedDetections:
        if found.shape[2] != 6:
            raise ValueError(
                f"detections are [B,M,6], x1,y1,x2,y2,score,class; these are {list(found.shape)}"
            )
        score = found[..., 4]
        classes = torch.where(score > 0, found[..., 5].round().long() - self.first_class, PAD)
        return PaddedDetections(found[..., :4], score.clamp(min=0), classes)

    def _checked(self, found: PaddedDetections, classes: int) -> PaddedDetections:
        least, most = (int(x) for x in found.classes.aminmax()) if found.classes.numel() else (PAD, PAD)
        if most >= classes or least < PAD:
            wrong = (most if most >= classes else least) + self.first_class
            raise ValueError(
                f"the network found class {wrong}, but {classes} are named in `classes` from "
                f"{self.first_class} on; "
                "name them all, or correct first_class"
            )
        return found

    def _predictions(self, found: Tensor, classes: int, size: tuple[int, int]) -> DensePredictions:
        found = (found.transpose(1, 2) if self.transposed else found).float()
        wanted = 4 + self.objectness + classes
        if found.shape[2] != wanted:
            parts = f"4 + {'1 + ' if self.objectness else ''}{classes}"
            raise ValueError(
                f"predictions have {found.shape[2]} values, not {parts}; see objectness and transposed"
            )
        boxes = found[..., :4]
        if self.boxes == "cxcywh":
            middle, half = boxes[..., :2], boxes[..., 2:] / 2
            boxes = torch.cat([middle - half, middle + half], dim=-1)
        scores = found[..., 4:].sigmoid() if self.scores == "logit" else found[..., 4:]
        if self.objectness:
            scores = scores[..., :1] * scores[..., 1:]
        if self.strides is None:
            return DensePredictions(boxes, scores)
        if found.shape[1] != self._cells(size) * self.anchors:
            raise ValueError(
                f"{found.shape[1]} predictions are not {self.anchors} for each of the {self._cells(size)} "
                f"locations of strides "
                f"{list(self.strides)}; correct strides and anchors"
            )
        points, strides = _anchor_points(size, self.strides, self.anchors, found.device)
        return DensePredictions(boxes, scores, points, strides)


def _like_detections(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 3
    if isinstance(value, Mapping):
        return {"boxes", "scores"} <= set(value)
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(x, Mapping) and "boxes" in x for x in value)
    )


def _from_mappings(found: Sequence[Mapping[str, Tensor]], first_class: int) -> PaddedDetections:
    """One mapping of boxes [K,4], scores [K], labels [K] per image -> padded detections, sorted by score."""
    if lacking := [key for key in ("boxes", "scores", "labels") if any(key not in one for one in found)]:
        raise ValueError(
            f"detections need boxes, scores, labels; there is no '{lacking[0]}' in {shown(found[0])}"
        )
    orders = [one["scores"].argsort(descending=True, stable=True) for one in found]
    return PaddedDetections.padded(
        [
            PaddedDetections(
                one["boxes"][order].float(),
                one["scores"][order].float(),
                one["labels"][order].long() - first_class,
            )
            for one, order in zip(found, orders, strict=True)
        ]
    )


def _dense(found: Mapping[str, Tensor], classes: int) -> DensePredictions:
    """boxes [B,A,4], scores [B,A,C], locations [A,2] or [B,A,2], strides [A]; the locations of all images are
    the same."""
    dense = DensePredictions(*(found[key] for key in ("boxes", "scores", "locations", "strides")))
    if dense.anchor_points.dim() == 3:
        dense = dense._replace(anchor_points=dense.anchor_points[0])
    images, count = dense.boxes.shape[:2]
    wanted = ((images, count, 4), (images, count, classes), (count, 2), (count,))
    if tuple(tuple(part.shape) for part in dense) != wanted:
        raise ValueError(
            f"{shown(found)} are not boxes [B,A,4], scores [B,A,{classes}], locations [A,2], strides [A]"
        )
    return dense


def _anchor_points(
    size: tuple[int, int], strides: Sequence[int], anchors: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """x, y [A,2] in pixels and strides [A] of predictions, by stride, anchor, row, column."""
    levels = [cells(size, (stride,), device) for stride in strides]
    points = torch.cat([centres.repeat(anchors, 1) for centres, _ in levels])
    return points, torch.cat([scales.repeat(anchors) for _, scales in levels])
