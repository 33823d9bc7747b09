"""A detector's predictions at anchor points of its own (other strides, several anchors) -> the cells of the
student's head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import DensePredictions
from .class_mapping import logit
from .dense_head import cells, decode_boxes


def to_dense(raw: Tensor, size: tuple[int, int], strides: tuple[int, ...]) -> DensePredictions:
    """Raw outputs [B,N,4+1+C] of a ``DenseHead`` on images of ``size`` -> decoded boxes and scores at its
    cells."""
    raw = raw.float()
    centres, scales = cells(size, strides, raw.device)
    scores = raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()
    return DensePredictions(decode_boxes(raw, centres, scales), scores, centres, scales)


def by_location(
    dense: DensePredictions, size: tuple[int, int], strides: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Predictions in the student's pixels -> raw outputs [B,N,4+1+C] of the student's cells, and which cells
    have no prediction, bool [B,N].

    An anchor point belongs to the level with the nearest stride, and there to the cell that contains it. Of
    several in one cell the one with the highest score is used; a cell without any is ignored. objectness =
    that score, classes in proportion to it.
    """
    centres, scales = cells(size, strides, dense.boxes.device)
    table = _table(dense.anchor_points, dense.strides, size, strides)  # [N,K], -1 pads
    boxes, scores = dense.boxes.float(), dense.scores.float()
    at = table.clamp(min=0)
    score = scores.amax(-1)[:, at].masked_fill(table < 0, -1.0)  # [B,N,K]
    best, which = score.max(-1)
    chosen = at[None].expand(len(score), -1, -1).gather(2, which[..., None]).squeeze(2)  # [B,N]
    boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    classes = scores.gather(1, chosen[..., None].expand(-1, -1, scores.shape[2]))
    middle, extent = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    raw = [
        (middle - centres) / scales[:, None],
        (extent / scales[:, None]).log(),
        logit(best)[..., None],
        logit(classes / best.clamp(min=1e-6)[..., None]),
    ]
    return torch.cat(raw, dim=-1), best < 0


def _table(points: Tensor, own: Tensor, size: tuple[int, int], strides: tuple[int, ...]) -> Tensor:
    """For each cell of the student, the indices of the anchor points that belong to it: long [N,K], -1
    pads."""
    levels = torch.tensor(strides, dtype=torch.float32, device=points.device)
    level = (own.float().log2()[:, None] - levels.log2()).abs().argmin(1)
    shapes = [(-(-size[0] // s), -(-size[1] // s)) for s in strides]
    first = torch.tensor([0, *(h * w for h, w in shapes)], device=points.device).cumsum(0)[:-1]
    wide = torch.tensor([w for _, w in shapes], device=points.device)
    high = torch.tensor([h for h, _ in shapes], device=points.device)
    column, row = (points.float() / levels[level][:, None]).floor().long().unbind(1)
    inside = (column >= 0) & (row >= 0) & (column < wide[level]) & (row < high[level])
    cell = (first[level] + row * wide[level] + column)[inside]
    number = torch.arange(len(points), device=points.device)[inside]
    count = sum(h * w for h, w in shapes)
    cell, order = cell.sort(stable=True)
    start = torch.searchsorted(cell, cell)
    rank = torch.arange(len(cell), device=cell.device) - start
    table = torch.full(
        (count, max(1, int(rank.max()) + 1) if len(cell) else 1), -1, dtype=torch.long, device=points.device
    )
    table[cell, rank] = number[order]
    return table
