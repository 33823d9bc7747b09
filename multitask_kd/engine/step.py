"""One step, up to its total loss: what training, the check and the benchmark all run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, ModelOutput
from .run import Run


@dataclass(frozen=True)
class StepResult:
    """What one step found.

    total: the scalar to be minimised. weighted: each loss as it stands in the total, by name; raw:
    unweighted. preds: the student's predictions by task, soft_preds: those that soft losses compared with the
    teachers', both detached. shared: the encoder's maps, where gradients are compared. factors: of each group
    of losses, where there is a balance. teacher: the teachers' output, None where there is none. taps: the
    student's, by module path.
    """

    total: Tensor
    weighted: dict[str, Tensor]
    raw: dict[str, Tensor]
    preds: Mapping[str, Any]
    soft_preds: Mapping[str, Any]
    shared: tuple[Tensor, ...]
    factors: Mapping[str, Tensor | float]
    teacher: ModelOutput | None
    taps: Mapping[str, Any]


def compute_step(
    run: Run,
    batch: Batch,
    progress: float,
    *,
    weights: Mapping[str, float] | None = None,
    penalty: bool = True,
) -> StepResult:
    """batch -> teachers -> distiller -> objective, at ``progress`` of training in [0, 1]; ``batch`` on the
    run's device.

    weights: of each loss, instead of those of ``progress``. penalty: whether that of sparse training is in
    the total.
    """
    run.distiller.set_progress(progress)
    teacher = run.teachers(batch) if run.teachers else None
    with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
        found = run.distiller(batch, teacher)
    total, weighted, factors = run.objective.weigh(
        found.losses, run.objective.weights_at(progress) if weights is None else weights, found.shared
    )
    if run.sparse and penalty:
        total, weighted = run.sparse(total, weighted, progress)
    return StepResult(
        total,
        weighted,
        found.losses,
        found.preds,
        found.soft_preds,
        found.shared,
        factors,
        teacher,
        found.taps,
    )
