"""Object detection: the dense head, SimOTA, IoU and BCE losses, NMS, COCO average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, generalized_box_iou_loss

from ..batch import CROWD, PAD, CellPredictions, DensePredictions, PaddedDetections
from ..data.labels import MIN_AREA_PX, BoxLabels, Geometry, Spatial
from ..metrics.detection_counts import IOU, match, note
from ..metrics.mean_ap import MeanAP
from ..models.assign import one_hot, simota
from ..models.class_mapping import UNKNOWN
from ..models.decoders import Boxes
from ..models.dense_head import DenseHead, cells, cells_of_unknown_classes, centres_inside, decode_boxes
from ..models.detection_reader import DetectionOutput
from ..models.detections import (
    dense_in_student,
    detections_in_student,
    mapped_cells,
    mapped_detections,
    mean_cells,
    mean_detections,
    renumbered_detections,
    summed_scores,
)
from ..models.maps import ignored_by_either
from ..models.relocation import by_location, to_dense
from ..report.layers import BoxLayer
from ..report.tables import Column
from .base import KINDS, Comparable, Saved, Task, TeacherPrediction
from .tallies import BoxTally

BOX_SHARE = 1e-2  # of detections, where rounding decides which box is suppressed


class Detections(NamedTuple):
    """boxes [K,4] x1,y1,x2,y2 in pixels, scores [K] in [0,1], classes [K] long; best first."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


@KINDS.register("detection")
class Detection(Task):
    """GIoU loss on matched boxes, BCE on objectness (every cell) and on classes (matched cells, target =
    IoU).

    box, objectness, classification: weights of the three losses inside the task.
    radius: SimOTA's centre region, in strides.
    """

    Head = DenseHead
    Output = DetectionOutput
    Tally = BoxTally
    forms = ("detections",)  # finished detections, instead of the cells of the student's head
    label_word = "boxes"
    title = "detection"
    main_metric = "mAP"
    headline = ("mAP", "mAP50")
    columns = (
        (
            Column("mAP", "mAP", 1, 1, "COCO average precision over IoU .50:.95"),
            Column("mAP50", "mAP50", 1, 1, "COCO average precision at IoU .50"),
            Column("mAP75", "mAP75", 1, 1, "COCO average precision at IoU .75"),
            *(
                Column(f"mAP_{s}", s, 1, 1, f"COCO average precision of {s} objects")
                for s in ("small", "medium", "large")
            ),
        ),
        (
            *(
                Column(f"AR{n}", f"AR{n}", 1, 1, f"COCO average recall with {n} detections an image")
                for n in (1, 10, 100)
            ),
            *(
                Column(f"AR_{s}", s, 1, 1, f"COCO average recall of {s} objects")
                for s in ("small", "medium", "large")
            ),
        ),
    )
    row_titles = ("recall",)
    by_class = ("AP",)
    raw_output = (
        "raw outputs [batch, cells, 4+1+classes] of the cells of all strides, finest first, row by row: dx, "
        "dy of the centre "
        "(in strides, from the cell's centre), log w, log h (in strides, at most 6), objectness logit, class "
        "logits"
    )
    decoded_outputs = {
        "boxes": "float32 [batch, detections, 4], x1 y1 x2 y2 in pixels of the input, best first, 0 where there is none",
        "scores": "float32 [batch, detections] in [0, 1], 0 where there is none",
        "classes": "int64 [batch, detections], -1 where there is none",
    }

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        strides: Sequence[int],
        *,
        box: float = 5.0,
        objectness: float = 1.0,
        classification: float = 1.0,
        radius: float = 2.5,
    ):
        super().__init__(name, classes, strides)
        self.weights = {"box": box, "objectness": objectness, "class": classification}
        for key, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{key}: {weight} is no weight; give a number of at least 0")
        if not any(self.weights.values()):
            raise ValueError(
                "box, objectness, classification: every weight is 0, so nothing would be learnt; set ratio "
                "to 0 instead"
            )
        if not 0 < radius < float("inf"):
            raise ValueError(f"radius: {radius} is not a number of strides above 0")
        self.radius = radius

    # --- labels

    @staticmethod
    def renumbered(label: BoxLabels, table: np.ndarray) -> BoxLabels:
        classes = table[label.classes]
        kept = classes >= 0
        return BoxLabels(label.boxes[kept], classes[kept], label.crowd[kept], label.area[kept])

    @staticmethod
    def only_known(label: BoxLabels, known: np.ndarray) -> BoxLabels:
        return label.chosen(known[label.classes])

    @staticmethod
    def to_spatial(label: BoxLabels, geometry: Geometry, size: tuple[int, int]) -> Spatial:
        """Boxes as their corners; crowds marked in the classes, slivers left out."""
        (height, width), (rows, columns) = geometry.content, geometry.original
        boxes = label.boxes.reshape(-1, 4) * np.array([width / columns, height / rows] * 2, dtype=np.float32)
        classes = np.where(label.crowd, CROWD, label.classes) if len(boxes) else np.zeros(0, np.int64)
        large = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) >= MIN_AREA_PX
        return Spatial(points=boxes[large][:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2), rest=classes[large])

    @staticmethod
    def from_spatial(moved: Spatial, size: tuple[int, int], min_visible: float) -> BoxLabels:
        """The frames round each four corners, inside the image."""
        corners = moved.points.reshape(-1, 4, 2)
        whole = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        boxes = whole.clip(0, np.array([size[1], size[0]] * 2, np.float32))
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        kept = (area >= MIN_AREA_PX) & (area >= min_visible * (whole[:, 2:] - whole[:, :2]).prod(axis=1))
        return BoxLabels(boxes[kept], moved.rest[kept], moved.rest[kept] == CROWD)

    @staticmethod
    def packed(labels: Sequence[BoxLabels | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """``boxes`` float [B,M,4] x1,y1,x2,y2 in pixels of the batch, ``classes`` long [B,M] (PAD, CROWD),
        ``labelled`` bool [B]."""
        most = max(0 if label is None else len(label) for label in labels)
        boxes = np.zeros((len(labels), most, 4), np.float32)
        classes = np.full((len(labels), most), PAD, np.int64)
        for row, label in enumerate(labels):
            if label is not None:
                boxes[row, : len(label)] = label.boxes
                classes[row, : len(label)] = label.classes
        labelled = torch.tensor([label is not None for label in labels])
        return {"boxes": torch.from_numpy(boxes), "classes": torch.from_numpy(classes), "labelled": labelled}

    # --- training

    def losses(self, pred: Tensor, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """pred: raw [B,N,4+1+C]; target: ``boxes`` [B,M,4] pixels, ``classes`` [B,M], ``labelled`` [B], maybe
        ``known`` [B,C].

        Each is a sum over labelled images divided by the number of matched cells, or of labelled images where
        that is larger (a batch without objects would otherwise weigh hundreds of times more). Cells whose
        centre lies in a crowd box and that no object claims count neither as object nor as background. Where
        a set labels only some classes, see ``_background``; the other classes' logits of its images learn
        nothing.
        """
        pred = pred.float()
        centres, scales = cells(size, self.strides, pred.device)
        boxes, objectness, class_logits = decode_boxes(pred, centres, scales), pred[..., 4], pred[..., 5:]
        truth, classes = target["boxes"], target["classes"].masked_fill(~target["labelled"][:, None], PAD)
        match = simota(
            truth,
            classes,
            boxes.detach(),
            objectness.detach(),
            class_logits.detach(),
            centres,
            scales,
            radius=self.radius,
        )
        count = torch.maximum(match.positive.sum(), target["labelled"].sum()).clamp(min=1)
        positive = match.positive.float()

        if truth.shape[1]:
            box_target = truth.gather(1, match.box[..., None].expand(-1, -1, 4))
            class_target = classes.gather(1, match.box)
        else:  # no image of the batch has a box
            box_target, class_target = torch.zeros_like(boxes), torch.full_like(match.box, PAD)
        # an unmatched cell is compared with itself: GIoU of two far boxes is not needed and may overflow
        box_target = torch.where(match.positive[..., None], box_target, boxes.detach())
        box_loss = (generalized_box_iou_loss(boxes, box_target) * positive).sum() / count

        counted = target["labelled"][:, None] & ~(self._in_crowd(target, centres) & ~match.positive)
        there = self._background(objectness, class_logits, positive, target.get("known"))
        soft_target = one_hot(class_target, len(self.classes)) * match.iou[..., None]
        class_loss = F.binary_cross_entropy_with_logits(class_logits, soft_target, reduction="none")
        if "known" in target:
            class_loss = class_loss * target["known"][:, None]
        return {
            "box": box_loss,
            "objectness": (there * counted).sum() / count,
            "class": (class_loss.sum(-1) * positive).sum() / count,
        }

    @staticmethod
    def _background(
        objectness: Tensor, class_logits: Tensor, positive: Tensor, known: Tensor | None
    ) -> Tensor:
        """BCE of the objectness of every cell [B,N].

        In an image whose set labels only the classes ``known`` (bool [B,C]) an unmatched cell may still show
        an object of another class. All that is certain is that it shows none of the known ones: its loss is
        -log(1 - objectness * max over the known classes of their probability), which leaves alone what the
        network takes for an object of another class.
        """
        plain = F.binary_cross_entropy_with_logits(objectness, positive, reduction="none")
        if known is None:
            return plain
        likeliest = class_logits.masked_fill(~known[:, None], UNKNOWN).amax(-1)
        # 1 - p q = (1 - p) + p (1 - q), in logarithms: a product that rounds to 1 would have no gradient
        free = -torch.logaddexp(
            F.logsigmoid(-objectness), F.logsigmoid(objectness) + F.logsigmoid(-likeliest)
        )
        partial = ~known.all(1)
        return torch.where(partial[:, None] & (positive == 0), free, plain)

    @staticmethod
    def _in_crowd(target: Mapping[str, Tensor], centres: Tensor) -> Tensor:
        """Is a cell's centre inside a crowd box: bool [B,N]."""
        return (centres_inside(target["boxes"], centres) & (target["classes"] == CROWD)[..., None]).any(1)

    # --- evaluation

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
        """Raw [B,N,4+1+C], or the predictions of a detector from elsewhere -> one Detections an image, in
        pixels of the batch.

        score = objectness * class probability; a cell may answer for several classes.
        """
        for key, share in (("score_threshold", score_threshold), ("nms_iou", nms_iou)):
            if not 0 <= share <= 1:
                raise ValueError(f"{key}: {share} is not in [0, 1]")
        for key, number in (("max_detections", max_detections), ("before_nms", before_nms)):
            if number < 1:
                raise ValueError(f"{key}: {number} is not at least 1")
        if isinstance(pred, PaddedDetections):
            return [_above(*image, score_threshold, max_detections) for image in zip(*pred, strict=True)]
        boxes, scores = (
            (pred.boxes, pred.scores)
            if isinstance(pred, DensePredictions)
            else self._scored(pred.float(), size)
        )
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

    def restore(self, decoded: Detections, geometry: Geometry) -> Detections:
        """Boxes of a letterboxed image -> pixels of the original."""
        height, width = geometry.original
        scale = decoded.boxes.new_tensor([width / geometry.content[1], height / geometry.content[0]]).repeat(
            2
        )
        boxes = (
            (decoded.boxes * scale)
            .clamp(min=0)
            .minimum(decoded.boxes.new_tensor([width, height, width, height]))
        )
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)  # the others lie in the padding alone
        return Detections(boxes[inside], decoded.scores[inside], decoded.classes[inside])

    def metric(self) -> MeanAP:
        return MeanAP(self.classes)

    def score(self, metric: MeanAP, prediction: Detections, truth: Any) -> None:
        """Detections of classes that the image's set does not label are neither right nor wrong."""
        label = truth.labels.get(self.name)
        if label is None:
            return
        boxes, scores, classes = (t.cpu().numpy() for t in prediction)
        if (known := truth.known.get(self.name)) is not None:
            kept = known[classes]
            boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
        labels = (label.boxes, label.classes, label.crowd, label.area)
        metric.update(truth.index, truth.geometry.original, (boxes, scores, classes), labels)

    def more_figures(self, metric: MeanAP, confidence: float | None) -> dict[str, Any]:
        """Precision, recall and F1 at a confidence, and at the one where F1 is highest."""
        return match(metric).figures(confidence)

    def more_note(self, confidence: float | None) -> str:
        return note(confidence)

    def more_columns(self, confidence: float | None) -> tuple[Column, ...]:
        iou = f"IoU {IOU:g}"
        columns = (
            Column(
                "precision", "precision", 1, 1, f"right boxes of all boxes from the confidence on, at {iou}"
            ),
            Column("recall", "recall", 1, 1, f"objects found, from the confidence on, at {iou}"),
            Column("F1", "F1", 1, 1, "harmonic mean of precision and recall"),
            Column(
                "confidence",
                "at conf.",
                3,
                0,
                "the score from which a box counts in precision, recall and F1",
            ),
            Column("best_F1", "best F1", 1, 1, "the highest F1 over all confidences, chosen on these images"),
            Column("best_confidence", "best conf.", 3, 0, "the confidence of the best F1"),
        )
        return columns[:4] if confidence is None else columns  # they would say the same twice

    # --- pictures and files

    def label_layer(self, label: BoxLabels) -> BoxLayer:
        return BoxLayer(label.boxes, label.classes, self.classes, crowd=label.crowd)

    def prediction_layer(self, prediction: Detections, least_score: float) -> BoxLayer:
        sure = prediction.scores >= least_score
        boxes, scores, classes = (t[sure].cpu().numpy() for t in prediction)
        return BoxLayer(boxes, classes, self.classes, scores)

    def saved(self, prediction: Detections) -> Saved:
        """One row a box: x1,y1,x2,y2 in pixels, score, class."""
        boxes, scores, classes = (t.cpu().numpy() for t in prediction)
        return Saved(
            boxes=np.concatenate([boxes, scores[:, None], classes[:, None]], axis=1).astype(np.float32)
        )

    # --- export

    def decoder(self, size: tuple[int, int], *, in_onnx: bool, options: Mapping[str, Any]) -> nn.Module:
        return Boxes(size, self.strides, in_onnx=in_onnx, **options)

    def from_decoded(self, outputs: Mapping[str, Tensor]) -> PaddedDetections:
        return PaddedDetections(
            outputs["boxes"].float(), outputs["scores"].float(), outputs["classes"].long()
        )

    def expected_shape(self, size: tuple[int, int]) -> dict[int, int]:
        return {1: sum(-(-size[0] // s) * -(-size[1] // s) for s in self.strides), 2: 5 + len(self.classes)}

    def decoded_gap(
        self, raw: Tensor, outputs: Mapping[str, Tensor], size: tuple[int, int], options: Mapping[str, Any]
    ) -> tuple[int, int, float, str]:
        expected = self.decode(raw, size, **options)
        found = self.decode(self.from_decoded(outputs), size, **options)
        return *without_counterpart(expected, found, 1e-4), BOX_SHARE, "detections without a counterpart"

    # --- teachers

    def output_reader(self, options: Mapping[str, Any]) -> DetectionOutput:
        """Cells are taken to be of the student's strides where nothing is said."""
        options = dict(options)
        if options.get("form", "auto") in ("auto", "cells"):
            options.setdefault("strides", list(self.strides))
        return DetectionOutput(**options)

    def mapped(self, pred: Any, mapping: Any) -> tuple[Any, Tensor | None]:
        """Cells [B,N,4+1+C], ``DensePredictions`` or ``PaddedDetections`` in the student's classes."""
        if isinstance(pred, PaddedDetections):
            return mapped_detections(pred, mapping), None
        if isinstance(pred, DensePredictions):
            return pred._replace(scores=summed_scores(pred.scores, mapping)), None
        return mapped_cells(pred, mapping), None

    def to_student(
        self, pred: Any, ignore_mask: Tensor | None, geometry: Any, teacher: Task, form: str
    ) -> TeacherPrediction:
        if form == "detections":
            if not isinstance(pred, PaddedDetections):
                pred = PaddedDetections.padded(teacher.decode(pred, geometry.own))
            return TeacherPrediction(detections_in_student(pred, geometry))
        if isinstance(pred, Tensor):
            if geometry.same and teacher.strides == self.strides:
                return TeacherPrediction(pred, ignore_mask)
            pred = to_dense(pred, geometry.own, teacher.strides)
        return TeacherPrediction(
            *by_location(dense_in_student(pred, geometry), geometry.student, self.strides), True
        )

    def why_not(self, pred: Any, form: str, key_path: str) -> str | None:
        located = isinstance(pred, Tensor) or (
            isinstance(pred, DensePredictions) and pred.anchor_points is not None
        )
        if form == "detections" or located:
            return None
        if isinstance(pred, DensePredictions):
            outputs = f"{key_path}.outputs.{self.name}"
            return f"{key_path} predicts at unknown locations: give {outputs}.strides, and anchors; or use det_boxes"
        return f"{key_path} gives detections after suppression, not a prediction for each location; use det_boxes"

    def average(
        self,
        preds: Sequence[Any],
        ignore_masks: Sequence[Tensor | None],
        known: Sequence[Sequence[int]],
        form: str,
    ) -> tuple[Any, Tensor | None]:
        return (
            (mean_detections(preds, known), None)
            if form == "detections"
            else mean_cells(preds, ignore_masks, known)
        )

    def comparable(
        self,
        student: Tensor,
        teacher: Any,
        *,
        ignore_mask: Tensor | None,
        target: Mapping[str, Tensor] | None,
        size: tuple[int, int],
        known: Sequence[int] | None,
        form: str,
    ) -> Comparable:
        """Cells of both with the columns of the classes that the teachers know; cells with an object of
        another class, by the labels or by what the student takes them for, are left out. For ``detections``
        the student is a ``CellPredictions``."""
        if known is not None:
            centres, _ = cells(size, self.strides, student.device)
            other = cells_of_unknown_classes(student.detach(), target, known, centres)
            ignore_mask = ignored_by_either(ignore_mask, other)
            columns = torch.tensor([*range(5), *(5 + k for k in known)], device=student.device)
            student = student.index_select(2, columns)
            if form == "detections":
                teacher = renumbered_detections(teacher, known, len(self.classes))
            else:
                teacher = teacher.index_select(2, columns)
        if form == "detections":
            student = CellPredictions(student, *cells(size, self.strides, student.device))
        return Comparable(student, teacher, None if ignore_mask is None else ~ignore_mask)

    @staticmethod
    def select(pred: Any, rows: Tensor) -> Any:
        return (
            PaddedDetections(*(part[rows] for part in pred))
            if isinstance(pred, PaddedDetections)
            else pred[rows]
        )


def without_counterpart(expected: Sequence[Any], found: Sequence[Any], tolerance: float) -> tuple[int, int]:
    """Of the detections of both, by image: how many lack a counterpart of their class, with sides within
    ``tolerance`` of the largest box's coordinate and a score within it; and how many there are. Their order
    is not looked at: equal scores have none."""
    lacking = count = 0
    for a, b in zip(expected, found, strict=True):
        reach = tolerance * max([1.0, *(float(side.abs().max()) for side in (a.boxes, b.boxes) if len(side))])
        near = (a.boxes[:, None] - b.boxes[None]).abs().amax(-1) <= reach
        near &= (a.scores[:, None] - b.scores[None]).abs() <= tolerance
        near &= a.classes[:, None] == b.classes[None]
        lacking += int((~near.any(1)).sum()) + int((~near.any(0)).sum())
        count += len(a.scores) + len(b.scores)
    return lacking, count


def _above(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, most: int) -> Detections:
    """Of an image's finished detections, those that are there, with a score above ``threshold``, best first."""
    kept = (classes >= 0) & (scores > threshold)
    order = scores[kept].argsort(descending=True, stable=True)[:most]
    return Detections(boxes[kept][order].float(), scores[kept][order].float(), classes[kept][order])
