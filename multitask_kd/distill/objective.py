"""Objective: named losses -> total = sum_k ratio_k * [(1 - alpha_k) * hard_k + alpha_k * soft_k] + sum_f
weight_f * feature_f."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, did_you_mean
from .balance import Balance, by_part, gradients, grouped
from .schedules import Schedule, constant

Weight = float | Schedule


def scheduled(weight: Weight) -> Schedule:
    """A number as a constant schedule; a schedule as it is."""
    return weight if callable(weight) else constant(float(weight))


def task_weights(
    task: str, hard: Mapping[str, float], soft: tuple[str, Weight] | None, *, ratio: Weight, alpha: Weight
) -> dict[str, Schedule]:
    """The weight in the total of each loss of one task; ``soft`` is the loss's name and its factor, None
    where alpha is 0."""
    ratio, alpha = scheduled(ratio), scheduled(alpha)
    weights: dict[str, Schedule] = {
        f"{task}.hard.{name}": lambda p, w=weight: ratio(p) * (1 - alpha(p)) * w
        for name, weight in hard.items()
    }
    if soft is not None:
        factor = scheduled(soft[1])
        weights[f"{task}.soft.{soft[0]}"] = lambda p: ratio(p) * alpha(p) * factor(p)
    return weights


class Weighed(NamedTuple):
    """The weighted losses of a step: their sum, each of them, and the factor of each group where there is a
    balance."""

    total: Tensor
    weighted: dict[str, Tensor]
    factors: dict[str, Tensor | float]


class Objective:
    """Weights named losses: by their weights at the current progress, then by the factors of a ``balance``,
    if any.

    Raises UserError at construction for a loss without a weight and for a weight without a loss.
    """

    def __init__(self, weights: Mapping[str, Weight], losses: Iterable[str], balance: Balance | None = None):
        losses = set(losses)
        for name in sorted(losses - set(weights)):
            raise UserError(f"the loss '{name}' has no weight; {did_you_mean(name, weights)}")
        for name in sorted(set(weights) - losses):
            raise UserError(f"the weight '{name}' belongs to no loss; {did_you_mean(name, losses)}")
        self.weights = {name: scheduled(weight) for name, weight in weights.items()}
        self.balance = balance

    def weights_at(self, progress: float) -> dict[str, float]:
        """The weight of each loss at ``progress`` of training in [0, 1], without the factors of a balance."""
        return {name: weight(progress) for name, weight in self.weights.items()}

    def __call__(
        self, losses: Mapping[str, Tensor], progress: float = 0.0, shared: Sequence[Tensor] = ()
    ) -> Weighed:
        """Unweighted scalars -> their weighted sum, and each weighted loss.

        progress of training in [0, 1]; shared: the tensors at which a balance measures gradients.
        """
        return self.weigh(losses, self.weights_at(progress), shared)

    def weigh(
        self, losses: Mapping[str, Tensor], weights: Mapping[str, float], shared: Sequence[Tensor]
    ) -> Weighed:
        """As ``__call__``, with given ``weights``."""
        weighted = {name: weights[name] * loss for name, loss in losses.items()}
        factors: Mapping[str, Tensor | float] = {}
        if self.balance is not None:
            group = self.balance.group
            counted = {name: loss for name, loss in weighted.items() if weights[name] > 0}
            factors = self.balance.factors(grouped(counted, group), shared)
            weighted = {name: factors.get(group(name), 1.0) * loss for name, loss in weighted.items()}
            if (penalty := self.balance.penalty(factors)) is not None:
                weighted["balance"] = penalty
        plain = {name: f.detach() if isinstance(f, Tensor) else f for name, f in factors.items()}
        return Weighed(sum(weighted.values()), weighted, plain)


def parts(weighted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of the weighted losses of each ``<task>.hard``, ``<task>.soft``, ``distill.<term>``, without
    the balance's own term and the penalty of sparse training."""
    return grouped(
        {name: loss for name, loss in weighted.items() if name not in ("balance", "sparse")}, by_part
    )


def gradient_report(weighted: Mapping[str, Tensor], shared: Sequence[Tensor]) -> dict[str, float]:
    """For the hard losses of each task, each soft loss and each term: the norm of the gradient at ``shared``,
    its share of the sum of all norms in percent, and the cosine between every two gradients."""
    sums = parts(weighted)
    vectors = gradients({g: s for g, s in sums.items() if s.requires_grad}, shared)
    norms = {g: float(v.norm()) for g, v in vectors.items()}
    total = sum(norms.values())
    found = {f"gradient/norm/{g}": n for g, n in norms.items()}
    found |= {f"gradient/share/{g}": 100 * n / total if total else 0.0 for g, n in norms.items()}
    names = list(vectors)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            found[f"gradient/cosine/{a}~{b}"] = float(torch.cosine_similarity(vectors[a], vectors[b], dim=0))
    return found
