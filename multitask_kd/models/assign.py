"""SimOTA matches cells to boxes (Ge et al., YOLOX, 2021, section 2.1), here without a loop over images or
boxes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense_head import centres_inside

FAR = 1e5  # added to the cost of a cell outside a box or its centre region: matched when no other is left
NEVER = 1e9  # cost of a pair that must not match


class Assignment(NamedTuple):
    """box: long [B,N], index of the matched box (0 where none); positive: bool [B,N]; iou: float [B,N], 0
    where none."""

    box: Tensor
    positive: Tensor
    iou: Tensor


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes a [B,M,4] and b [B,N,4] -> [B,M,N] (torchvision's box_iou takes no batch)."""
    ax1, ay1, ax2, ay2 = a[:, :, None].unbind(
        -1
    )  # planes: a last dimension of 2 is several times slower on CPU
    bx1, by1, bx2, by2 = b[:, None].unbind(-1)
    wide = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    high = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0)
    overlap = wide.mul_(high)
    area_a = (ax2 - ax1).clamp(min=0) * (ay2 - ay1).clamp(min=0)
    area_b = (bx2 - bx1).clamp(min=0) * (by2 - by1).clamp(min=0)
    return overlap / (area_a + area_b - overlap).clamp_(min=1e-9)


@torch.no_grad()
def simota(
    boxes: Tensor,
    classes: Tensor,
    predicted: Tensor,
    objectness: Tensor,
    class_logits: Tensor,
    centres: Tensor,
    scales: Tensor,
    *,
    radius: float = 2.5,
    candidates: int = 10,
) -> Assignment:
    """Match cells to boxes.

    boxes [B,M,4] and classes [B,M] (negative: not an object); predicted boxes [B,N,4] in pixels; objectness
    logits [B,N]; class_logits [B,N,C]; centres [N,2], scales [N] of the cells. The cost of a pair is
    classification BCE + 3 * -log(IoU); a box takes its k cheapest cells, k = the sum of its ``candidates``
    highest IoUs, at least 1; a cell that several boxes take is matched to the one for which it is cheapest.
    ``radius`` of the centre region is in strides.
    """
    number = boxes.shape[1]
    if number == 0:
        return Assignment(
            torch.zeros_like(objectness, dtype=torch.long),
            torch.zeros_like(objectness, dtype=torch.bool),
            torch.zeros_like(objectness),
        )
    real = classes >= 0
    in_box, in_centre = _near(boxes, centres, scales, radius)
    possible = (in_box | in_centre) & real[:, :, None]
    iou = pairwise_iou(boxes, predicted)
    cost = _class_cost(classes, objectness, class_logits) + 3.0 * -torch.log(iou + 1e-8)
    cost = cost + FAR * ~(in_box & in_centre)
    cost = cost.masked_fill(~possible, NEVER)

    taken = _cheapest(cost, iou * possible, candidates)
    best = cost.masked_fill(~taken, 2 * NEVER).argmin(dim=1)
    positive = taken.any(dim=1)
    matched_iou = iou.gather(1, best[:, None]).squeeze(1)
    return Assignment(best * positive, positive, matched_iou * positive)


def _near(boxes: Tensor, centres: Tensor, scales: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Whether a cell's centre is inside the box, and whether it is inside the square of ``radius`` strides
    round the box's centre: bool [B,M,N] each."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(-1)
    x, y = centres.unbind(-1)
    reach = radius * scales
    in_centre = ((x - (x1 + x2) / 2).abs() < reach) & ((y - (y1 + y2) / 2).abs() < reach)
    return centres_inside(boxes, centres), in_centre


def _class_cost(classes: Tensor, objectness: Tensor, class_logits: Tensor) -> Tensor:
    """BCE of sqrt(class probability * objectness) against the one-hot class of each box, summed over classes:
    [B,M,N].

    The terms of the classes other than the box's are the same for all boxes, so they are summed once per
    cell.
    """
    p = (
        (class_logits.float().sigmoid() * objectness.float().sigmoid()[..., None])
        .sqrt()
        .clamp(1e-6, 1 - 1e-6)
    )
    absent = -torch.log1p(-p)
    present = -torch.log(p)
    index = classes.clamp(min=0)[:, :, None].expand(-1, -1, p.shape[1])
    swap = (present - absent).transpose(1, 2).gather(1, index)
    return absent.sum(-1)[:, None, :] + swap


def _cheapest(cost: Tensor, iou: Tensor, candidates: int) -> Tensor:
    """Each box's k cheapest cells (bool [B,M,N]), k = clamp(int(sum of its highest IoUs), min 1)."""
    candidates = min(candidates, cost.shape[2])
    wanted = iou.topk(candidates, dim=2).values.sum(-1).int().clamp(min=1)
    value, index = cost.topk(candidates, dim=2, largest=False)
    rank = torch.arange(candidates, device=cost.device)
    chosen = (rank < wanted[..., None]) & (value < NEVER)
    return torch.zeros_like(cost, dtype=torch.bool).scatter_(2, index, chosen)


def one_hot(classes: Tensor, count: int) -> Tensor:
    """Long [...] (negative rows become zeros) -> float [...,count]."""
    return F.one_hot(classes.clamp(min=0), count).float() * (classes >= 0)[..., None]
