"""Soft targets for dense detection: the teacher's probabilities and boxes, weighted by its confidence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from ..models.dense_head import box_sizes
from .base import LOSSES, SoftLoss, check_temperature, check_weights, same_shape


@LOSSES.register("det_soft")
class DetSoft(SoftLoss):
    """Cross-entropy to the teacher's objectness and class probabilities, minus the teacher's own entropy, and
    GIoU to its boxes.

    objectness, classification, box: weights of the three parts. Objectness counts on every cell; classes and
    boxes count with the teacher's confidence c = its objectness * best class probability, where c is at least
    ``confidence``. Every part is divided by the sum of those c (at least 1), which gives it the scale of the
    hard loss.
    temperature: of the logits of objectness and classes, with T^2 before their parts.
    Classes and objectness: Hinton et al., 2015, with sigmoids; boxes of the same cell need no assignment
    (Zheng et al., LD, 2022, call it the region worth localising).
    """

    kinds = ("detection",)
    scheduled = ("temperature",)

    def __init__(
        self,
        *,
        objectness: float = 1.0,
        classification: float = 1.0,
        box: float = 2.0,
        confidence: float = 0.05,
        temperature: float = 1.0,
    ):
        super().__init__()
        check_weights(objectness=objectness, classification=classification, box=box)
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence: {confidence} is not in [0, 1)")
        check_temperature("temperature", temperature)
        self.objectness, self.classification, self.box = objectness, classification, box
        self.confidence, self.temperature = confidence, temperature

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """student, teacher: raw outputs [B,N,4+1+C] of the same cells. Raises ValueError on other shapes."""
        same_shape(student, teacher, "cells")
        student, teacher = student.float(), teacher.float()
        weight = teacher[..., 4].sigmoid() * teacher[..., 5:].sigmoid().amax(-1)
        weight = weight * (weight >= self.confidence)
        divergence = self._divergence(student[..., 4:], teacher[..., 4:])
        if mask is not None:
            weight, divergence = weight * mask, divergence * mask[..., None]
        parts = self.objectness * divergence[..., 0].sum()
        parts = parts + self.classification * (divergence[..., 1:].sum(-1) * weight).sum()
        if self.box:
            parts = parts + self.box * (_giou_loss(student[..., :4], teacher[..., :4]) * weight).sum()
        return parts / weight.sum().clamp(min=1.0)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T^2 * KL between two Bernoulli variables, by their logits."""
        student, teacher = student / self.temperature, teacher / self.temperature
        probability = teacher.sigmoid()
        cross = F.binary_cross_entropy_with_logits(student, probability, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(teacher, probability, reduction="none")
        return self.temperature**2 * (cross - entropy)


def _giou_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - GIoU of boxes of the same cells: neither the position nor the stride of a cell changes it."""
    return generalized_box_iou_loss(_frame(student), _frame(teacher))


def _frame(raw: Tensor) -> Tensor:
    """dx, dy, log w, log h -> x1, y1, x2, y2 in strides from the cell's centre."""
    half = box_sizes(raw) / 2
    return torch.cat([raw[..., :2] - half, raw[..., :2] + half], dim=-1)
