"""Object detection: the dense head, SimOTA, IoU and BCE losses, NMS, COCO average precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, generalized_box_iou_loss

from ..batch import CROWD, DensePredictions, PaddedDetections
from ..metrics.mean_ap import MeanAP
from ..models.assign import one_hot, simota
from ..models.dense_head import DenseHead, cells, decode_boxes
from .base import TASKS, Task


class Detections(NamedTuple):
    """boxes [K,4] x1,y1,x2,y2 in pixels, scores [K] in [0,1], classes [K] long; best first."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


@TASKS.register("det")
class Detection(Task):
    """GIoU loss on matched boxes, BCE on objectness (every cell) and on classes (matched cells, target = IoU).

    box, objectness, classification: weights of the three losses inside the task.
    radius: SimOTA's centre region, in strides.
    """

    name = "det"
    Head = DenseHead
    main_metric = "mAP"
    headline = ("mAP", "mAP50")

    def __init__(
        self,
        classes: tuple[str, ...],
        strides: tuple[int, ...],
        *,
        box: float = 5.0,
        objectness: float = 1.0,
        classification: float = 1.0,
        radius: float = 2.5,
    ):
        super().__init__(classes, strides)
        self.weights = {"box": box, "objectness": objectness, "class": classification}
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}: {weight} is no weight; give a number of at least 0")
        if not any(self.weights.values()):
            raise ValueError(
                "box, objectness, classification: every weight is 0, so nothing would be learnt; set ratio to 0 instead"
            )
        if not 0 < radius < float("inf"):
            raise ValueError(f"radius: {radius} is not a number of strides above 0")
        self.radius = radius

    def losses(self, pred: Tensor, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """pred: raw [B,N,4+1+C]; target: ``boxes`` [B,M,4] pixels, ``classes`` [B,M], ``labelled`` [B].

        Each is a sum over labelled images divided by the number of matched cells, or of labelled images where that is
        larger (a batch without objects would otherwise weigh hundreds of times more). Cells whose centre lies in a crowd
        box and that no object claims count neither as object nor as background.
        """
        pred = pred.float()
        centres, scales = cells(size, self.strides, pred.device)
        boxes, objectness, class_logits = decode_boxes(pred, centres, scales), pred[..., 4], pred[..., 5:]
        truth, classes = target["boxes"], target["classes"].masked_fill(~target["labelled"][:, None], -1)
        match = simota(
            truth, classes, boxes.detach(), objectness.detach(), class_logits.detach(), centres, scales, radius=self.radius
        )
        count = torch.maximum(match.positive.sum(), target["labelled"].sum()).clamp(min=1)
        positive = match.positive.float()

        if truth.shape[1]:
            box_target = truth.gather(1, match.box[..., None].expand(-1, -1, 4))
            class_target = classes.gather(1, match.box)
        else:  # no image of the batch has a box
            box_target, class_target = torch.zeros_like(boxes), torch.full_like(match.box, -1)
        # an unmatched cell is compared with itself: GIoU of two far boxes is not needed and may overflow
        box_target = torch.where(match.positive[..., None], box_target, boxes.detach())
        box_loss = (generalized_box_iou_loss(boxes, box_target) * positive).sum() / count

        counted = target["labelled"][:, None] & ~(self._in_crowd(target, centres) & ~match.positive)
        objectness_loss = F.binary_cross_entropy_with_logits(objectness, positive, reduction="none")
        soft_target = one_hot(class_target, len(self.classes)) * match.iou[..., None]
        class_loss = F.binary_cross_entropy_with_logits(class_logits, soft_target, reduction="none").sum(-1)
        return {
            "box": box_loss,
            "objectness": (objectness_loss * counted).sum() / count,
            "class": (class_loss * positive).sum() / count,
        }

    @staticmethod
    def _in_crowd(target: Mapping[str, Tensor], centres: Tensor) -> Tensor:
        """Is a cell's centre inside a crowd box: bool [B,N]."""
        x1, y1, x2, y2 = target["boxes"][:, :, None].unbind(-1)
        x, y = centres.unbind(-1)
        inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
        return (inside & (target["classes"] == CROWD)[..., None]).any(1)

    @torch.no_grad()
    def decode(
        self,
        pred: Tensor | DensePredictions | PaddedDetections,
        size: tuple[int, int],
        *,
        score_threshold: float = 0.01,
        nms_iou: float = 0.6,
        max_detections: int = 100,
        before_nms: int = 1000,
    ) -> list[Detections]:
        """Raw [B,N,4+1+C], or a foreign detector's ``DensePredictions`` or ``PaddedDetections`` -> one Detections an image, in pixels of the batch.

        score = objectness * class probability; a cell may answer for several classes.
        """
        for name, share in (("score_threshold", score_threshold), ("nms_iou", nms_iou)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: {share} is not in [0, 1]")
        for name, number in (("max_detections", max_detections), ("before_nms", before_nms)):
            if number < 1:
                raise ValueError(f"{name}: {number} is not at least 1")
        if isinstance(pred, PaddedDetections):
            return [_sure(*image, score_threshold, max_detections) for image in zip(*pred, strict=True)]
        boxes, scores = (pred.boxes, pred.scores) if isinstance(pred, DensePredictions) else self._scored(pred.float(), size)
        boxes, scores = boxes.float().clamp(min=0), scores.float()
        boxes = boxes.minimum(boxes.new_tensor([size[1], size[0], size[1], size[0]]))
        found = []
        for image_boxes, image_scores in zip(boxes, scores, strict=True):
            cell, kind = (image_scores > score_threshold).nonzero(as_tuple=True)
            score, order = image_scores[cell, kind].sort(descending=True, stable=True)
            order = order[:before_nms]
            box, score, kind = image_boxes[cell[order]], score[:before_nms], kind[order]
            keep = batched_nms(box, score, kind, nms_iou)[:max_detections]
            found.append(Detections(box[keep], score[keep], kind[keep]))
        return found

    def _scored(self, pred: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes [B,N,4] and scores [B,N,C] of raw outputs."""
        centres, scales = cells(size, self.strides, pred.device)
        return decode_boxes(pred, centres, scales), pred[..., 4:5].sigmoid() * pred[..., 5:].sigmoid()

    def restore(self, decoded: Detections, geometry: Any) -> Detections:
        """Boxes of a letterboxed image -> pixels of the original."""
        height, width = geometry.original
        scale = decoded.boxes.new_tensor([width / geometry.content[1], height / geometry.content[0]]).repeat(2)
        boxes = (decoded.boxes * scale).clamp(min=0).minimum(decoded.boxes.new_tensor([width, height, width, height]))
        seen = (boxes[:, 2:] > boxes[:, :2]).all(1)  # the others lie in the padding alone
        return Detections(boxes[seen], decoded.scores[seen], decoded.classes[seen])

    def metric(self) -> MeanAP:
        return MeanAP(self.classes)

    def score(self, metric: MeanAP, prediction: Detections, truth: Any) -> None:
        if truth.boxes is not None:
            detections = tuple(t.cpu().numpy() for t in prediction)
            labels = (truth.boxes, truth.classes, truth.crowd, truth.area)
            metric.update(truth.index, truth.geometry.original, detections, labels)


def _sure(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, most: int) -> Detections:
    """Of an image's finished detections, those that are there, with a score above ``threshold``, best first."""
    kept = (classes >= 0) & (scores > threshold)
    order = scores[kept].argsort(descending=True, stable=True)[:most]
    return Detections(boxes[kept][order].float(), scores[kept][order].float(), classes[kept][order])
