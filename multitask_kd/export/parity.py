"""Whether an exported file says what the network says in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Largest difference that is let through where none is given, as a part of the output's largest value (of 1 where that is less).
# The quantised files' measure is their accuracy.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": float("inf")}
MASK_SHARE = 1e-3  # of pixels, where two classes' logits are the same to rounding
BOX_SHARE = 1e-2  # of detections, likewise for suppression


class Gap(NamedTuple):
    """The largest difference in an output: absolute, and relative to the output's largest value."""

    output: str
    absolute: float
    relative: float

    def within(self, tolerance: float) -> bool:
        least = min(self.absolute, self.relative)
        return math.isfinite(least) and least <= tolerance


def gap(name: str, expected: Tensor, found: Tensor) -> Gap:
    """Infinite where shapes differ, or a value is not finite."""
    if expected.shape != found.shape:
        return Gap(name, float("inf"), float("inf"))
    difference = (expected.double() - found.double()).abs()
    absolute = float(difference.max()) if difference.isfinite().all() else float("inf")
    return Gap(name, absolute, absolute / max(float(expected.abs().max()), 1e-12))


def masks(expected: Tensor, found: Tensor) -> float:
    """Share of pixels whose class differs, 1 where shapes differ."""
    return float((expected.long() != found.long()).float().mean()) if expected.shape == found.shape else 1.0


def detections(expected: Sequence[Any], found: Sequence[Any], tolerance: float) -> tuple[int, int]:
    """Of the detections of both, by image (boxes [K,4] in pixels, scores [K], classes [K]): how many lack a counterpart of their
    class, with sides within ``tolerance`` of the largest box's coordinate and a score within it; and how many there are.

    Their order is not looked at: equal scores have none.
    """
    lacking = count = 0
    for a, b in zip(expected, found, strict=True):
        reach = tolerance * max([1.0, *(float(side.abs().max()) for side in (a.boxes, b.boxes) if len(side))])
        near = (a.boxes[:, None] - b.boxes[None]).abs().amax(-1) <= reach
        near &= (a.scores[:, None] - b.scores[None]).abs() <= tolerance
        near &= a.classes[:, None] == b.classes[None]
        lacking += int((~near.any(1)).sum()) + int((~near.any(0)).sum())
        count += len(a.scores) + len(b.scores)
    return lacking, count


def worst(gaps: Sequence[Gap]) -> list[Gap]:
    """Of several comparisons of the same outputs, the largest difference in each."""
    found: dict[str, Gap] = {}
    for one in gaps:
        found[one.output] = max(one, found.get(one.output, one), key=lambda g: g.absolute)
    return list(found.values())


@torch.no_grad()
def raw_gaps(net: Any, outputs: Mapping[str, Tensor], images: Tensor) -> list[Gap]:
    """Raw outputs of a file against those of ``net`` in PyTorch, in fp32 on the CPU."""
    return [gap(task, pred, outputs[task]) for task, pred in net(images).preds.items()]
