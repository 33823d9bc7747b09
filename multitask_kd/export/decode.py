"""Post-processing as part of the exported graph: masks, and detections after suppression, padded to a fixed number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from ..batch import PAD
from ..models.dense_head import cells, decode_boxes


class Mask(nn.Module):
    """Logits [B,C,h,w] -> (mask uint8 [B,H,W],): the class of every pixel of the input, as Segmentation.decode and argmax."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = tuple(size)

    def forward(self, pred: Tensor) -> tuple[Tensor]:
        return (F.interpolate(pred, size=self.size, mode="bilinear", align_corners=False).argmax(1).to(torch.uint8),)


class Boxes(nn.Module):
    """Raw [B,N,4+1+C] -> (boxes [B,M,4] in pixels, scores [B,M], classes long [B,M]): what Detection.decode gives, best first.

    M = ``max_detections``; places without a detection have zeros, and class -1. in_onnx: whether suppression becomes ONNX's
    NonMaxSuppression; else it is torchvision's.
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
        self.register_buffer("limit", torch.tensor([size[1], size[0]] * 2, dtype=torch.float32), persistent=False)
        self.in_onnx, self.score_threshold, self.nms_iou = in_onnx, float(score_threshold), float(nms_iou)
        self.most, self.before_nms = max_detections, before_nms
        self.reach = float(max(size) + 1)  # further than any box

    def forward(self, pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kinds = pred.shape[2] - 5
        boxes = decode_boxes(pred, self.centres, self.scales).clamp(min=0).minimum(self.limit)
        scores = (pred[..., 4:5].sigmoid() * pred[..., 5:].sigmoid()).flatten(1)
        best, place = scores.topk(min(self.before_nms, scores.shape[1]), dim=1)
        boxes, kind = _rows(boxes, torch.div(place, kinds, rounding_mode="floor")), place % kinds
        if self.in_onnx:
            kept = torch.ops.multitask_kd.unsuppressed(boxes, best, kind, kinds, self.nms_iou, self.score_threshold)
        else:
            kept = unsuppressed(boxes, kind, best, kinds, self.nms_iou, self.reach)
        best = torch.where(kept & (best > self.score_threshold), best, torch.full_like(best, -1.0))
        scores, order = best.topk(min(self.most, best.shape[1]), dim=1)
        there = scores >= 0
        found = _rows(boxes, order) * there[..., None], scores * there, torch.where(there, kind.gather(1, order), PAD)
        lacking = self.most - scores.shape[1]
        if not lacking:
            return found
        return F.pad(found[0], (0, 0, 0, lacking)), F.pad(found[1], (0, lacking)), F.pad(found[2], (0, lacking), value=PAD)


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def unsuppressed(boxes: Tensor, kind: Tensor, scores: Tensor, kinds: int, iou: float, reach: float) -> Tensor:
    """Which boxes [B,K,4] survive non-maximum suppression within their image and their kind [B,K]: bool [B,K].

    In one call for all images, each image and kind moved ``reach`` pixels apart, in float64 so that the move costs no digits.
    """
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    moved = boxes.double() + ((image * kinds + kind) * reach)[..., None]
    kept = nms(moved.flatten(0, 1), scores.flatten().double(), iou)
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, kept, True).view_as(scores)


@torch.library.custom_op("multitask_kd::unsuppressed", mutates_args=())
def _suppression(boxes: Tensor, scores: Tensor, kind: Tensor, kinds: int, iou: float, threshold: float) -> Tensor:
    """One node for the exporter to ONNX, which ``in_onnx`` spells out: ``unsuppressed`` among scores above ``threshold``."""
    reach = float(boxes.max()) + 1 if boxes.numel() else 1.0
    return unsuppressed(boxes, kind, scores, kinds, iou, reach) & (scores > threshold)


@_suppression.register_fake
def _(boxes: Tensor, scores: Tensor, kind: Tensor, kinds: int, iou: float, threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def in_onnx(opset: Any) -> dict[Any, Any]:
    """What torch's exporter writes for the suppression: ONNX's own operator, a score row a class, in ``opset`` of onnxscript."""

    def suppression(boxes, scores, kind, kinds: int, iou: float, threshold: float):
        mine = opset.OneHot(kind, opset.Constant(value_int=kinds), opset.Constant(value_floats=[0.0, 1.0]), axis=1)
        rows = opset.Sub(opset.Mul(mine, opset.Unsqueeze(scores, opset.Constant(value_ints=[1]))), opset.Sub(1.0, mine))
        found = opset.NonMaxSuppression(
            boxes,
            rows,
            opset.Squeeze(opset.Gather(opset.Shape(scores), opset.Constant(value_ints=[1])), opset.Constant(value_ints=[0])),
            opset.Constant(value_float=iou),
            opset.Constant(value_float=threshold),
        )
        place = opset.Gather(found, opset.Constant(value_ints=[0, 2]), axis=1)  # image and box of [image, class, box]
        ones = opset.Expand(opset.Constant(value_float=1.0), opset.Gather(opset.Shape(place), opset.Constant(value_ints=[0])))
        none = opset.Mul(scores, 0.0)
        return opset.Cast(opset.ScatterND(none, place, ones), to=9)

    return {torch.ops.multitask_kd.unsuppressed.default: suppression}


def decoders(
    tasks: Mapping[str, Mapping[str, Any]], size: tuple[int, int], strides: Mapping[str, Sequence[int]], *, in_onnx: bool
) -> nn.ModuleDict:
    """The decoding modules of ``tasks`` (options by task) for images of ``size`` (H, W)."""
    found: dict[str, nn.Module] = {}
    if "seg" in tasks:
        found["seg"] = Mask(size)
    if "det" in tasks:
        found["det"] = Boxes(size, strides["det"], in_onnx=in_onnx, **tasks["det"])
    return nn.ModuleDict(found)
