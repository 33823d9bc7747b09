"""Whether an exported file gives what the network gives in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tasks.base import Task
from .describe import decoded_by

# Largest difference that is let through where none is given, as a part of the output's largest value (of 1
# where that is less). The quantised files' measure is their accuracy.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": float("inf")}
MANY = 10_000  # things, from which on a share is shown in place of their number


class Gap(NamedTuple):
    """The largest difference in an output: absolute, and relative to the output's largest value."""

    output: str
    absolute: float
    relative: float

    def within(self, tolerance: float) -> bool:
        least = min(self.absolute, self.relative)
        return math.isfinite(least) and least <= tolerance


class DecodedGap(NamedTuple):
    """Of what a file decodes for a task: how many things differ from PyTorch's, of how many, the share that
    may, and ``what`` they are and how they differ ("pixels have another class")."""

    task: Task
    wrong: int
    count: int
    allowed: float
    what: str

    @property
    def is_close(self) -> bool:
        return self.wrong <= self.allowed * self.count

    def __str__(self) -> str:
        if self.count >= MANY:
            outputs = ", ".join(self.task.output_names().values())
            return f"{outputs}: {100 * self.wrong / self.count:.3f} % of the {self.what}"
        things, _, how = self.what.partition(" ")
        return f"{self.task.called(things)}: {self.wrong} of {self.count} {how}"


def gap(name: str, expected: Tensor, found: Tensor) -> Gap:
    """Infinite where shapes differ, or a value is not finite."""
    if expected.shape != found.shape:
        return Gap(name, float("inf"), float("inf"))
    difference = (expected.double() - found.double()).abs()
    absolute = float(difference.max()) if difference.isfinite().all() else float("inf")
    return Gap(name, absolute, absolute / max(float(expected.abs().max()), 1e-12))


def decoded_gap(
    task: Task, found: Mapping[str, Tensor], size: tuple[int, int], options: Mapping[str, Any]
) -> DecodedGap:
    """What a file decodes for ``task`` against what the task decodes of the file's raw output, so that a
    rounding of a score does not count as another detection.

    found: the outputs of a file by name, for images of ``size`` (H, W); options: of the task's ``decode``.
    """
    return DecodedGap(task, *task.decoded_gap(found[task.name], decoded_by(task, found), size, options))


def together(gaps: Sequence[DecodedGap]) -> list[DecodedGap]:
    """Of several comparisons of the same tasks, by task all things that were compared."""
    found: dict[str, DecodedGap] = {}
    for one in gaps:
        if before := found.get(one.task.name):
            one = one._replace(wrong=before.wrong + one.wrong, count=before.count + one.count)
        found[one.task.name] = one
    return list(found.values())


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
