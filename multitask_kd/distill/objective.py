"""Objective: named losses -> total = sum_k ratio_k * [(1 - alpha_k) * hard_k + alpha_k * soft_k]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import UserError, did_you_mean


def task_weights(
    task: str, hard: Mapping[str, float], soft: tuple[str, float] | None, *, ratio: float, alpha: float
) -> dict[str, float]:
    """The weight in the total of each loss of one task; ``soft`` is the loss's name and its factor, None where alpha is 0."""
    weights = {f"{task}.hard.{name}": ratio * (1 - alpha) * weight for name, weight in hard.items()}
    if soft is not None:
        weights[f"{task}.soft.{soft[0]}"] = ratio * alpha * soft[1]
    return weights


class Objective:
    """Weighs named losses.

    Raises UserError at construction for a loss without a weight and for a weight without a loss.
    """

    def __init__(self, weights: Mapping[str, float], losses: Iterable[str]):
        losses = set(losses)
        for name in sorted(losses - set(weights)):
            raise UserError(f"the loss '{name}' has no weight; {did_you_mean(name, weights)}")
        for name in sorted(set(weights) - losses):
            raise UserError(f"the weight '{name}' belongs to no loss; {did_you_mean(name, losses)}")
        self.weights = dict(weights)

    def __call__(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Unweighted scalars -> their weighted sum, and each weighted loss."""
        weighted = {name: self.weights[name] * loss for name, loss in losses.items()}
        return sum(weighted.values()), weighted
