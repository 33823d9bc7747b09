"""A foreign network as a teacher: what it expects of an image, and what it returns read as predictions of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import PAD, DensePredictions, ModelOutput, PaddedDetections
from .dense_head import cells

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std, RGB in [0,1]


class SegOutput:
    """Where a network's segmentation [B,C,h,w] is in what it returns, and in which form.

    at: key or number, or several with a point between (``0.out``); null: the one map that there is.
    form: "logits", "probability" (after softmax), or "binary": one logit, of the second of two classes.
    """

    def __init__(self, *, at: str | int | None = None, form: str = "logits"):
        if form not in ("logits", "probability", "binary"):
            raise ValueError(f"form: '{form}' is none of logits, probability, binary")
        self.at, self.form = at, form

    def read(self, returned: Any, classes: int, size: tuple[int, int]) -> Tensor:
        """Logits [B,C,h,w]. Raises ValueError for anything else."""
        found = pick(returned, self.at, "seg", lambda x: isinstance(x, Tensor) and x.dim() == 4, "a map [B,C,h,w]")
        if not isinstance(found, Tensor) or found.dim() != 4:
            raise ValueError(f"seg: {shown(found)} is no map [B,C,h,w]")
        if self.form == "binary":
            if found.shape[1] != 1:
                raise ValueError(f"seg: binary is one logit, but the network gives {found.shape[1]}; correct outputs.seg.form")

            found = torch.cat([torch.zeros_like(found), found], dim=1)
        elif self.form == "probability":
            found = found.float().clamp(min=1e-8).log()  # 1e-8 is 0 in float16
        if found.shape[1] != classes:
            raise ValueError(f"seg: the network gives {found.shape[1]} classes, but {classes} are named in `classes`")
        return found


class DetOutput:
    """Where a network's detections are in what it returns, and in which form.

    at: key or number, or several with a point between (``1.boxes``); null: the one that looks like it.
    form: "cells": raw outputs [B,N,4+1+C] of cells as our own head's; "detections": finished ones, a list of mappings with boxes,
        scores, labels (torchvision's way), or [B,M,6] of x1,y1,x2,y2,score,class; "predictions": [B,A,4+1+C] or [B,A,4+C] before
        suppression, as the YOLO family gives them, or a mapping of boxes, scores, locations, strides; "auto": by the shape.
    strides: of cells and predictions (null: the student's for cells, unknown for predictions). anchors: predictions a place; their
        order is stride, anchor, row, column. Predictions of unknown places can be used as detections alone.
    boxes: "cxcywh" or "xyxy" in pixels of the network's input; objectness: whether a column of it follows the boxes; scores:
        "probability" or "logit"; transposed: [B,4+C,A] instead. first_class: the number that the first class has.
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
        listed = strides is None or (isinstance(strides, (list, tuple)) and all(isinstance(s, int) and s > 0 for s in strides))
        if anchors < 1 or not listed:
            raise ValueError(
                f"strides, anchors: whole numbers above 0, a list and one, are needed, not {strides!r} and {anchors!r}"
            )
        self.at, self.form, self.anchors = at, form, anchors
        self.strides = None if strides is None else tuple(strides)
        self.boxes, self.objectness, self.scores, self.transposed = boxes, objectness, scores, transposed
        self.first_class = first_class

    def read(self, returned: Any, classes: int, size: tuple[int, int]) -> Tensor | DensePredictions | PaddedDetections:
        """In pixels of the network's input. Raises ValueError for anything else."""
        found = pick(returned, self.at, "det", _like_detections, "detections")
        if isinstance(found, (list, tuple)) and all(isinstance(x, Mapping) for x in found):
            return self._checked(_from_mappings(found, self.first_class), classes)
        if isinstance(found, Mapping) and {"boxes", "scores", "locations", "strides"} <= set(found):
            return _dense(found, classes)
        if not isinstance(found, Tensor) or found.dim() != 3:
            raise ValueError(f"det: {shown(found)} is neither [B,N,4+1+C] nor a list of boxes, scores, labels")
        form = self._form(found, classes, size)
        if form == "detections":
            return self._checked(self._rows(found), classes)
        if form == "predictions":
            return self._predictions(found, classes, size)
        if found.shape[2] != 5 + classes or found.shape[1] != self._cells(size):
            raise ValueError(
                f"det: {list(found.shape)} are not the {self._cells(size)} cells of strides {list(self.strides or ())} with "
                f"4 + 1 + {classes} values each; set outputs.det.strides or outputs.det.form"
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
            raise ValueError(f"det: the network's cells have {found.shape[2] - 5} classes, but {classes} are named in `classes`")
        raise ValueError(f"det: {list(found.shape)} may be many things; say which with outputs.det.form")

    def _cells(self, size: tuple[int, int]) -> int:
        return sum(-(-size[0] // s) * -(-size[1] // s) for s in self.strides or ())

    def _rows(self, found: Tensor) -> PaddedDetections:
        if found.shape[2] != 6:
            raise ValueError(f"det: detections are [B,M,6], x1,y1,x2,y2,score,class; these are {list(found.shape)}")
        score = found[..., 4]
        classes = torch.where(score > 0, found[..., 5].round().long() - self.first_class, PAD)
        return PaddedDetections(found[..., :4], score.clamp(min=0), classes)

    def _checked(self, found: PaddedDetections, classes: int) -> PaddedDetections:
        least, most = (int(x) for x in found.classes.aminmax()) if found.classes.numel() else (PAD, PAD)
        if most >= classes or least < PAD:
            wrong = (most if most >= classes else least) + self.first_class
            raise ValueError(
                f"det: the network found class {wrong}, but {classes} are named in `classes` from {self.first_class} on; "
                "name them all, or correct outputs.det.first_class"
            )
        return found

    def _predictions(self, found: Tensor, classes: int, size: tuple[int, int]) -> DensePredictions:
        found = (found.transpose(1, 2) if self.transposed else found).float()
        wanted = 4 + self.objectness + classes
        if found.shape[2] != wanted:
            parts = f"4 + {'1 + ' if self.objectness else ''}{classes}"
            raise ValueError(
                f"det: predictions have {found.shape[2]} values, not {parts}; see outputs.det.objectness and transposed"
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
                f"det: {found.shape[1]} predictions are not {self.anchors} for each of the {self._cells(size)} places of strides "
                f"{list(self.strides)}; correct outputs.det.strides and anchors"
            )
        places, strides = _places(size, self.strides, self.anchors, found.device)
        return DensePredictions(boxes, scores, places, strides)


OUTPUTS = {"seg": SegOutput, "det": DetOutput}


class ExternalModel(nn.Module):
    """images float [B,3,h,w], RGB in [0,1] -> ModelOutput of the tasks in ``outputs``, in the network's own classes and pixels.

    scale: the largest value of a pixel as the network knows it; mean, std: of R, G, B in that range, None where the network
    normalises; bgr: colours are handed over in that order. classes: how many, by task.
    Raises ValueError where the network does not return what was said.
    """

    def __init__(
        self,
        net: nn.Module,
        outputs: Mapping[str, SegOutput | DetOutput],
        classes: Mapping[str, int],
        *,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        bgr: bool = False,
        scale: float = 1.0,
    ):
        super().__init__()
        self.net, self.outputs, self.classes = net, dict(outputs), dict(classes)
        self.bgr, self.scale = bgr, scale
        self.normalised = mean is not None
        if mean is not None:
            self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def _tap_root(self) -> nn.Module:
        """Taps are named by the network's own paths."""
        return self.net

    def forward(self, images: Tensor) -> ModelOutput:
        size = tuple(images.shape[2:])
        if self.scale != 1:
            images = images * self.scale
        if self.normalised:
            images = (images - self.mean) / self.std
        returned = self.net(images.flip(1) if self.bgr else images)
        if isinstance(returned, ModelOutput):
            returned = returned.preds
        return ModelOutput({task: how.read(returned, self.classes[task], size) for task, how in self.outputs.items()})


def pick(returned: Any, at: str | int | None, task: str, fits: Any, what: str) -> Any:
    """The part of what a network returned that ``at`` names, or the only one that ``fits``. Raises ValueError."""
    if at is not None:
        found = returned
        for step in str(at).split("."):
            try:
                found = found[step] if isinstance(found, Mapping) else found[int(step)]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"{task}: there is no '{at}' in what the network returns: {shown(returned)}") from None
        return found
    if isinstance(returned, Mapping):
        if task in returned:
            return returned[task]
        if task == "seg" and "out" in returned:  # torchvision's name
            return returned["out"]
    if fits(returned):
        return returned
    parts = returned.values() if isinstance(returned, Mapping) else returned if isinstance(returned, (list, tuple)) else ()
    found = [part for part in parts if fits(part)]
    if len(found) != 1:
        which = "several parts" if found else "no part"
        raise ValueError(f"{task}: {which} of what the network returns can be {what}: {shown(returned)}; set outputs.{task}.at")
    return found[0]


def shown(value: Any) -> str:
    """What a network returned, in a few words."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(part)}" for key, part in list(value.items())[:8]) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(shown(part) for part in list(value)[:8]) + ")"
    return type(value).__name__


def _like_detections(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 3
    if isinstance(value, Mapping):
        return {"boxes", "scores"} <= set(value)
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(x, Mapping) and "boxes" in x for x in value)


def _from_mappings(found: Sequence[Mapping[str, Tensor]], first_class: int) -> PaddedDetections:
    """One mapping of boxes [K,4], scores [K], labels [K] an image, sorted by score here."""
    if lacking := [key for key in ("boxes", "scores", "labels") if any(key not in one for one in found)]:
        raise ValueError(f"det: detections need boxes, scores, labels; there is no '{lacking[0]}' in {shown(found[0])}")
    orders = [one["scores"].argsort(descending=True, stable=True) for one in found]
    return PaddedDetections.padded(
        [
            PaddedDetections(one["boxes"][order].float(), one["scores"][order].float(), one["labels"][order].long() - first_class)
            for one, order in zip(found, orders, strict=True)
        ]
    )


def _dense(found: Mapping[str, Tensor], classes: int) -> DensePredictions:
    """boxes [B,A,4], scores [B,A,C], locations [A,2] or [B,A,2], strides [A]; the locations of all images are the same."""
    said = DensePredictions(*(found[key] for key in ("boxes", "scores", "locations", "strides")))
    if said.places.dim() == 3:
        said = said._replace(places=said.places[0])
    images, count = said.boxes.shape[:2]
    wanted = ((images, count, 4), (images, count, classes), (count, 2), (count,))
    if tuple(tuple(part.shape) for part in said) != wanted:
        raise ValueError(f"det: {shown(found)} are not boxes [B,A,4], scores [B,A,{classes}], locations [A,2], strides [A]")
    return said


def _places(size: tuple[int, int], strides: Sequence[int], anchors: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, y [A,2] in pixels and strides [A] of predictions, by stride, anchor, row, column."""
    levels = [cells(size, (stride,), device) for stride in strides]
    places = torch.cat([centres.repeat(anchors, 1) for centres, _ in levels])
    return places, torch.cat([scales.repeat(anchors) for _, scales in levels])
