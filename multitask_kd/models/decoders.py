"""Post-processing inside an exported file: modules that turn raw outputs into masks, labels, depths and
boxes.

Every module takes a batch of any size, returns a tuple, and uses only operations that ONNX and torch.export
have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from ..batch import PAD
from .dense_head import cells, decode_boxes


class Mask(nn.Module):
    """Logits [B,C,h,w] -> (mask uint8 [B,H,W],): the likeliest class of every pixel; ``size``: (H, W)."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = tuple(size)

    def forward(self, pred: Tensor) -> tuple[Tensor]:
        logits = F.interpolate(pred, size=self.size, mode="bilinear", align_corners=False)
        return (logits.argmax(1).to(torch.uint8),)


class Label(nn.Module):
    """Logits [B,C] -> (label int64 [B], score float32 [B]): the likeliest class and its probability."""

    def forward(self, pred: Tensor) -> tuple[Tensor, Tensor]:
        score, label = pred.softmax(1).max(1)
        return label, score


class Depth(nn.Module):
    """Log metres [B,1,h,w] -> (depth float32 [B,H,W] in metres,): logarithms are interpolated to ``size`` (H,
    W).

    nearest, farthest: the range in metres to which depths are clamped.
    """

    def __init__(self, size: tuple[int, int], *, nearest: float = 1e-3, farthest: float = 1e4):
        super().__init__()
        self.size, self.least, self.most = tuple(size), math.log(nearest), math.log(farthest)

    def forward(self, pred: Tensor) -> tuple[Tensor]:
        logarithms = F.interpolate(pred, size=self.size, mode="bilinear", align_corners=False)
        return (logarithms[:, 0].clamp(self.least, self.most).exp(),)


class Boxes(nn.Module):
    """Raw [B,N,4+1+C] -> (boxes [B,M,4] in pixels, scores [B,M], classes int64 [B,M]): the detections in
    images of ``size`` (H, W) after suppression, best first.

    M is ``max_detections``; slots without a detection have zeros, and class -1. strides: those of the head,
    in its order. in_onnx: whether suppression is exported as ONNX's NonMaxSuppression (see the function
    ``in_onnx``); else it is torchvision's. The other options are those of a detection task's ``decode``.
    """

    def __init__(
        self,
        size: tuple[int, int],
        strides: Sequence[int],
        *,
        in_onnx: bool,
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        before_nms: int,
    ):
        super().__init__()
        centres, scales = cells(tuple(size), tuple(strides), torch.device("cpu"))
        self.register_buffer("centres", centres.clone(), persistent=False)
        self.register_buffer("scales", scales.clone(), persistent=False)
        limit = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
        self.register_buffer("limit", limit, persistent=False)
        self.in_onnx, self.score_threshold, self.nms_iou = in_onnx, float(score_threshold), float(nms_iou)
        self.max_detections, self.before_nms = max_detections, before_nms
        self.reach = float(max(size) + 1)  # further than any box

    def forward(self, pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = pred.shape[2] - 5
        boxes = decode_boxes(pred, self.centres, self.scales).clamp(min=0).minimum(self.limit)
        scores = (pred[..., 4:5].sigmoid() * pred[..., 5:].sigmoid()).flatten(1)
        # a pair is a cell and a class
        scores, pair = scores.topk(min(self.before_nms, scores.shape[1]), dim=1)
        boxes, classes = _rows(boxes, torch.div(pair, count, rounding_mode="floor")), pair % count
        kept = self._unsuppressed(boxes, scores, classes, count) & (scores > self.score_threshold)
        scores = torch.where(kept, scores, torch.full_like(scores, -1.0))
        scores, order = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        there = scores >= 0
        classes = torch.where(there, classes.gather(1, order), PAD)
        return self._padded(_rows(boxes, order) * there[..., None], scores * there, classes)

    def _unsuppressed(self, boxes: Tensor, scores: Tensor, classes: Tensor, count: int) -> Tensor:
        if self.in_onnx:
            one_node = torch.ops.multitask_kd.unsuppressed
            return one_node(boxes, scores, classes, count, self.nms_iou, self.score_threshold)
        return unsuppressed(boxes, classes, scores, count, self.nms_iou, self.reach)

    def _padded(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pad to ``max_detections`` slots where there are fewer pairs of a cell and a class."""
        lacking = self.max_detections - scores.shape[1]
        if not lacking:
            return boxes, scores, classes
        return (
            F.pad(boxes, (0, 0, 0, lacking)),
            F.pad(scores, (0, lacking)),
            F.pad(classes, (0, lacking), value=PAD),
        )


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


# --- suppression


def unsuppressed(
    boxes: Tensor, classes: Tensor, scores: Tensor, count: int, iou: float, reach: float
) -> Tensor:
    """Which boxes [B,K,4] survive suppression among those of their image and class: bool [B,K].

    classes: [B,K], of ``count``. One call serves all images: boxes of different images and classes are moved
    apart by multiples of ``reach`` pixels, in float64 so that the move loses no precision. iou: the overlap
    above which the lower-scored of two boxes is suppressed.
    """
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    moved = boxes.double() + ((image * count + classes) * reach)[..., None]
    kept = nms(moved.flatten(0, 1), scores.flatten().double(), iou)
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, kept, True).view_as(scores)


@torch.library.custom_op("multitask_kd::unsuppressed", mutates_args=())
def _suppression(
    boxes: Tensor, scores: Tensor, classes: Tensor, count: int, iou: float, threshold: float
) -> Tensor:
    """``unsuppressed`` among scores above a threshold, as one node that ``in_onnx`` translates for the ONNX
    exporter."""
    reach = float(boxes.max()) + 1 if boxes.numel() else 1.0
    return unsuppressed(boxes, classes, scores, count, iou, reach) & (scores > threshold)


@_suppression.register_fake
def _(boxes: Tensor, scores: Tensor, classes: Tensor, count: int, iou: float, threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def in_onnx(opset: Any) -> dict[Any, Any]:
    """The translation of the suppression for torch's ONNX exporter: ONNX's own operator, with one row of
    scores per class.

    opset: the operator set of onnxscript.
    """

    def suppression(boxes, scores, classes, count: int, iou: float, threshold: float):
        first, second = opset.Constant(value_ints=[0]), opset.Constant(value_ints=[1])
        off_on = opset.Constant(value_floats=[0.0, 1.0])
        one_hot = opset.OneHot(classes, opset.Constant(value_int=count), off_on, axis=1)
        rows = opset.Sub(opset.Mul(one_hot, opset.Unsqueeze(scores, second)), opset.Sub(1.0, one_hot))
        found = opset.NonMaxSuppression(
            boxes,
            rows,
            opset.Squeeze(opset.Gather(opset.Shape(scores), second), first),
            opset.Constant(value_float=iou),
            opset.Constant(value_float=threshold),
        )
        # image and box of [image, class, box]
        index = opset.Gather(found, opset.Constant(value_ints=[0, 2]), axis=1)
        ones = opset.Expand(opset.Constant(value_float=1.0), opset.Gather(opset.Shape(index), first))
        none = opset.Mul(scores, 0.0)
        return opset.Cast(opset.ScatterND(none, index, ones), to=9)

    return {torch.ops.multitask_kd.unsuppressed.default: suppression}
