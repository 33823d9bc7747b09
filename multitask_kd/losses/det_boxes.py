"""A detector's finished detections as soft labels, given to cells by the student's own assignment."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from ..batch import PAD, PaddedDetections
from ..models.assign import one_hot, simota
from ..models.dense_head import cells, centres_inside, decode_boxes, unspoken_cells
from .base import LOSSES, SoftLoss, check_weights


@LOSSES.register("det_boxes")
class DetBoxes(SoftLoss):
    """What any detector can teach: its boxes, classes and scores, whatever its cells or anchors are.

    Detections with a score of at least ``confidence`` are matched to cells by SimOTA as labels are. A matched cell learns box
    (1 - GIoU) and class (cross-entropy to IoU, as from labels) with the weight of the score, and the score as its objectness; the
    other cells learn that there is nothing, except inside detections with a score between ``doubt`` and ``confidence``, and where
    the teacher lacks the class. The sum is divided by that of the matched scores, or by the number of images where that is larger.
    box, objectness, classification: weights of the three parts.
    Teachers with cells of our form are taken by their detections too.
    """

    tasks = ("det",)
    takes_found = True

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

    def forward(self, student: Tensor, teacher: PaddedDetections, target: Mapping[str, Tensor] | None = None) -> Tensor:
        """student: raw outputs [B,N,4+1+C]; teacher: detections in pixels of the student's images and numbers of its classes.

        target: the batch's labels, which say of what a teacher that lacks classes has nothing to say. ``place`` comes first.
        """
        student = student.float()
        centres, scales = cells(self.size, self.strides, student.device)
        boxes, objectness, class_logits = decode_boxes(student, centres, scales), student[..., 4], student[..., 5:]
        said = (boxes.detach(), objectness.detach(), class_logits.detach())
        positive, weight, box_target, class_target = self._targets(teacher, *said, centres, scales)
        class_loss = F.binary_cross_entropy_with_logits(class_logits, class_target, reduction="none")
        if self.known is not None:
            class_loss = class_loss[..., list(self.known)]
        counted = positive | ~self._unsure(teacher, target, student.detach(), centres)
        there = F.binary_cross_entropy_with_logits(objectness, weight, reduction="none")
        parts = self.box * (generalized_box_iou_loss(boxes, box_target) * weight).sum()
        parts = parts + self.classification * (class_loss.sum(-1) * weight).sum()
        parts = parts + self.objectness * (there * counted).sum()
        return parts / weight.sum().clamp(min=len(student))

    def _targets(
        self, teacher: PaddedDetections, boxes: Tensor, objectness: Tensor, class_logits: Tensor, centres: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the student's cells are to learn, by SimOTA on what they say: is a cell matched [B,N], with which weight [B,N] (the
        score, 0 where not matched), which box [B,N,4] in pixels (its own where not matched), which class probabilities [B,N,C]."""
        found, score = teacher.boxes.float(), teacher.scores.float()
        classes = torch.where(score >= self.confidence, teacher.classes, PAD)
        match = simota(found, classes, boxes, objectness, class_logits, centres, scales)
        if not found.shape[1]:  # nothing is found in any image of the batch
            return match.positive, torch.zeros_like(objectness), boxes, torch.zeros_like(class_logits)
        weight = score.gather(1, match.box) * match.positive
        box_target = found.gather(1, match.box[..., None].expand(-1, -1, 4))
        box_target = torch.where(match.positive[..., None], box_target, boxes)
        class_target = one_hot(classes.gather(1, match.box), class_logits.shape[-1]) * match.iou[..., None]
        return match.positive, weight, box_target, class_target

    def _unsure(self, teacher: PaddedDetections, target: Mapping[str, Tensor] | None, student: Tensor, centres: Tensor) -> Tensor:
        """Cells that are not to learn that there is nothing: bool [B,N]."""
        doubted = (teacher.classes >= 0) & (teacher.scores >= self.doubt) & (teacher.scores < self.confidence)
        unsure = (centres_inside(teacher.boxes, centres) & doubted[..., None]).any(1)
        return unsure if self.known is None else unsure | unspoken_cells(student, target, self.known, centres)
