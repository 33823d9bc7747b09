"""Operations on a detector's predictions: mapping to other classes and pixels, averaging of several
detectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from ..batch import PAD, DensePredictions, PaddedDetections
from .assign import pairwise_iou
from .class_mapping import UNKNOWN, ClassMapping, logit
from .maps import ignored_by_all, ignored_places, knows
from .teacher_geometry import TeacherGeometry

SAME_OBJECT = 0.55  # IoU from which detections of one class are one object (Solovyev et al., 2021)

# --- classes


def mapped_cells(raw: Tensor, mapping: ClassMapping) -> Tensor:
    """Raw outputs [B,N,4+1+C] in the student's classes.

    An object of a class that the student lacks is background for the student: where such a class is the
    likeliest, objectness is multiplied by the ratio of the likeliest class of the student to it. Merged
    classes have the sum of their probabilities.
    """
    raw = raw.float()
    logits, objectness = raw[..., 5:], raw[..., 4]
    p = logits.sigmoid()
    summed = summed_scores(p, mapping)
    mapped = [torch.full_like(objectness, UNKNOWN)] * len(mapping.sources)
    for own, found in enumerate(mapping.sources):
        if found:
            mapped[own] = logits[..., found[0]] if len(found) == 1 else logit(summed[..., own])
    if mapping.extra:
        share = summed.amax(-1) / p[..., mapping.extra].amax(-1).clamp(min=1e-30)
        objectness = torch.where(share < 1, logit(objectness.sigmoid() * share), objectness)
    return torch.cat([raw[..., :4], torch.stack([objectness, *mapped], dim=-1)], dim=-1)


def summed_scores(p: Tensor, mapping: ClassMapping) -> Tensor:
    """Probabilities [...,teacher's classes] -> [...,student's classes]."""
    parts = [p[..., found].sum(-1) if found else torch.zeros_like(p[..., 0]) for found in mapping.sources]
    return torch.stack(parts, dim=-1).clamp(max=1)


def mapped_detections(found: PaddedDetections, mapping: ClassMapping) -> PaddedDetections:
    """Detections in the student's classes; where an object was detected in several merged classes, the best
    is kept."""
    table = torch.full((len(mapping.theirs) + 1,), PAD, dtype=torch.long, device=found.classes.device)
    for own, sources in enumerate(mapping.sources):
        table[sources] = own
    classes = table[torch.where(found.classes < 0, len(mapping.theirs), found.classes)]
    if any(len(sources) > 1 for sources in mapping.sources):
        classes = torch.where(_repeated(found, classes), PAD, classes)
    return PaddedDetections(found.boxes, found.scores * (classes >= 0), classes)


def _repeated(found: PaddedDetections, merged: Tensor) -> Tensor:
    """Detections of an object that a better one from another class merged into the same also covers: bool
    [B,M]."""
    boxes, scores, classes = found.boxes.float(), found.scores, found.classes
    of_one = (merged[:, :, None] == merged[:, None]) & (classes[:, :, None] != classes[:, None])
    earlier = torch.ones(2 * scores.shape[1:], dtype=torch.bool, device=scores.device).tril(-1)
    better = (scores[:, None] > scores[:, :, None]) | ((scores[:, None] == scores[:, :, None]) & earlier)
    return (of_one & better & (pairwise_iou(boxes, boxes) >= SAME_OBJECT)).any(2)


def renumbered_detections(found: PaddedDetections, kept: Sequence[int], classes: int) -> PaddedDetections:
    """Detections with classes renumbered by their position in ``kept``; those of other classes are removed.

    classes: the number of classes before.
    """
    table = torch.full((classes + 1,), PAD, dtype=torch.long, device=found.classes.device)
    table[list(kept)] = torch.arange(len(kept), device=found.classes.device)
    numbers = table[torch.where(found.classes < 0, classes, found.classes)]
    return PaddedDetections(found.boxes, found.scores * (numbers >= 0), numbers)


# --- pixels


def detections_in_student(found: PaddedDetections, geometry: TeacherGeometry) -> PaddedDetections:
    """Detections in the student's pixels, clipped to the images as labels are; one that lies outside is
    removed."""
    height, width = geometry.student
    boxes = found.boxes.float() / geometry.scale
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    inside = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    return PaddedDetections(boxes, found.scores * inside, torch.where(inside, found.classes, PAD))


def dense_in_student(found: DensePredictions, geometry: TeacherGeometry) -> DensePredictions:
    """Dense predictions in the student's pixels."""
    if geometry.same:
        return found
    lengths = {key: getattr(found, key) for key in ("boxes", "anchor_points", "strides")}
    return found._replace(
        **{key: value / geometry.scale for key, value in lengths.items() if value is not None}
    )


# --- several detectors


def mean_cells(
    preds: Sequence[Tensor], ignore_masks: Sequence[Tensor | None], known: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor | None]:
    """Raw outputs [B,N,4+1+C] of the same cells -> raw outputs, and where every teacher ignores the cell,
    bool [B,N].

    Boxes: the mean by confidence. Scores (objectness * class): the mean over the teachers that know the
    class. Objectness: the mean over those that know the class of the highest score; classes: scores divided
    by it. The reason: a teacher predicts background for objects of a class that it lacks, and its class
    scores mean nothing on background.
    """
    ignored = [ignored_places(m, preds[0][..., 0]) for m in ignore_masks]
    counts = torch.stack([~q for q in ignored]).float()  # [T,B,N]
    raw = torch.stack([p.float() for p in preds])
    objectness, classes = raw[..., 4].sigmoid(), raw[..., 5:].sigmoid()
    sure = (objectness * classes.amax(-1) + 1e-6) * counts
    boxes = (raw[..., :4] * sure[..., None]).sum(0) / sure.sum(0).clamp(min=1e-6)[..., None]
    known_to = (
        counts[..., None] * torch.stack([knows(classes.shape[-1], k, raw) for k in known])[:, None, None]
    )
    count = known_to.sum(0).clamp(min=1)
    score = (objectness[..., None] * classes * known_to).sum(0) / count  # [B,N,C]
    there = (objectness[..., None] * known_to).sum(0) / count
    there = there.gather(-1, score.argmax(-1, keepdim=True))
    kinds = torch.where(known_to.any(0), logit(score / there.clamp(min=1e-30)), UNKNOWN)
    return torch.cat([boxes, logit(there), kinds], dim=-1), ignored_by_all(ignore_masks, ignored)


def mean_detections(preds: Sequence[PaddedDetections], known: Sequence[Sequence[int]]) -> PaddedDetections:
    """Detections of each teacher -> one for every object. Boxes: the mean weighted by score; score: the mean
    over the teachers that know the class, with 0 for a teacher that did not detect the object."""
    images = range(len(preds[0].boxes))
    return PaddedDetections.padded(
        [_merged([PaddedDetections(*(t[i] for t in p)) for p in preds], known) for i in images]
    )


def _merged(preds: Sequence[PaddedDetections], known: Sequence[Sequence[int]]) -> PaddedDetections:
    """``mean_detections`` of one image."""
    boxes, scores, classes = (torch.cat([getattr(p, key) for p in preds]) for key in PaddedDetections._fields)
    teacher = torch.cat([torch.full_like(p.classes, k) for k, p in enumerate(preds)])
    there = classes >= 0
    boxes, scores, classes, teacher = (
        boxes[there].float(),
        scores[there].float(),
        classes[there],
        teacher[there],
    )
    if not len(scores):
        return PaddedDetections(boxes, scores, classes)
    keep = batched_nms(boxes, scores, classes, SAME_OBJECT)
    iou = box_iou(boxes[keep], boxes) * (classes[keep][:, None] == classes)
    own = iou.argmax(0)  # the object that each detection is of
    of = own == torch.arange(len(keep), device=own.device)[:, None]
    weight = of * scores
    # a teacher counts once per object
    best = torch.stack([(weight * (teacher == k)).amax(1) for k in range(len(preds))]).sum(0)
    count = torch.tensor(
        [sum(int(c) in k for k in known) for c in classes[keep].tolist()], device=scores.device
    )
    mean = (weight[..., None] * boxes).sum(1) / weight.sum(1, keepdim=True).clamp(min=1e-9)
    score = best / count.clamp(min=1)
    order = score.argsort(descending=True, stable=True)
    return PaddedDetections(mean[order], score[order], classes[keep][order])
