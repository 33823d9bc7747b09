"""A detector's detections, after suppression, as soft labels that the student's own assignment matches to
cells."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from ..batch import PAD, CellPredictions, PaddedDetections
from ..models.assign import one_hot, simota
from ..models.dense_head import centres_inside, decode_boxes
from .base import LOSSES, SoftLoss, check_weights


@LOSSES.register("det_boxes")
class DetBoxes(SoftLoss):
    """Learns the boxes, classes and scores of any detector, whatever its cells or anchors are.

    Detections with a score of at least ``confidence`` are matched to cells by SimOTA as labels are. A matched
    cell learns box (1 - GIoU) and class (cross-entropy to IoU, as from labels) with the score as weight, and
    the score as its objectness. The other cells learn background, except inside detections with a score
    between ``doubt`` and ``confidence``, and where the teacher lacks the class. The sum is divided by the sum
    of the matched scores, or by the number of images where that is larger.
    box, objectness, classification: weights of the three parts.
    It uses only a teacher's detections, even where the teacher has the student's cells.
    """

    kinds = ("detection",)
    form = "detections"

    def __init__(
        self,
        *,
        box: float = 5.0,
        objectness: float = 1.0,
        classification: float = 1.0,
        confidence: float = 0.3,
        doubt: float = 0.1,
    ):
        super().__init__()
        check_weights(objectness=objectness, classification=classification, box=box)
        if not 0 <= doubt <= confidence <= 1:
            raise ValueError(f"doubt, confidence: {doubt} and {confidence} must rise from 0 to 1")
        self.box, self.objectness, self.classification = box, objectness, classification
        self.confidence, self.doubt = confidence, doubt

    def forward(
        self,
        student: CellPredictions,
        teacher: PaddedDetections,
        target: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """student: raw outputs and where the cells are; teacher: detections in pixels of the student's
        images, numbered by the student's classes. mask: bool [B,N], the cells that may learn background."""
        raw, centres, scales = student
        raw = raw.float()
        boxes, objectness, class_logits = decode_boxes(raw, centres, scales), raw[..., 4], raw[..., 5:]
        predicted = (boxes.detach(), objectness.detach(), class_logits.detach())
        positive, weight, box_target, class_target = self._targets(teacher, *predicted, centres, scales)
        class_loss = F.binary_cross_entropy_with_logits(class_logits, class_target, reduction="none")
        background = ~self._doubted(teacher, centres)
        counted = positive | (background if mask is None else background & mask)
        there = F.binary_cross_entropy_with_logits(objectness, weight, reduction="none")
        parts = self.box * (generalized_box_iou_loss(boxes, box_target) * weight).sum()
        parts = parts + self.classification * (class_loss.sum(-1) * weight).sum()
        parts = parts + self.objectness * (there * counted).sum()
        return parts / weight.sum().clamp(min=len(raw))

    def _targets(
        self,
        teacher: PaddedDetections,
        boxes: Tensor,
        objectness: Tensor,
        class_logits: Tensor,
        centres: Tensor,
        scales: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The targets of the student's cells, by SimOTA on their predictions: whether a cell is matched
        [B,N], its weight [B,N] (the score, 0 where not matched), its box [B,N,4] in pixels (the predicted one
        where not matched), its class probabilities [B,N,C]."""
        found, score = teacher.boxes.float(), teacher.scores.float()
        classes = torch.where(score >= self.confidence, teacher.classes, PAD)
        match = simota(found, classes, boxes, objectness, class_logits, centres, scales)
        if not found.shape[1]:  # no image of the batch has a detection
            return match.positive, torch.zeros_like(objectness), boxes, torch.zeros_like(class_logits)
        weight = score.gather(1, match.box) * match.positive
        box_target = found.gather(1, match.box[..., None].expand(-1, -1, 4))
        box_target = torch.where(match.positive[..., None], box_target, boxes)
        class_target = one_hot(classes.gather(1, match.box), class_logits.shape[-1]) * match.iou[..., None]
        return match.positive, weight, box_target, class_target

    def _doubted(self, teacher: PaddedDetections, centres: Tensor) -> Tensor:
        """Cells inside a detection whose score lies between ``doubt`` and ``confidence``: bool [B,N]."""
        doubted = (teacher.classes >= 0) & (teacher.scores >= self.doubt) & (teacher.scores < self.confidence)
        return (centres_inside(teacher.boxes, centres) & doubted[..., None]).any(1)
