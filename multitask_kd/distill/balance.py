"""Balancing: factors that change the weights of tasks and terms while training.

A balance is a module, so that its parameters and buffers are in the optimizer and the checkpoint with all
others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..registry import Registry

BALANCES = Registry("balance")


def by_part(loss: str) -> str:
    """``<task>.hard``, ``<task>.soft`` or ``distill.<term>``: the first two parts of a loss's name."""
    return ".".join(loss.split(".")[:2])


def by_task(loss: str) -> str:
    """The task, for terms ``distill.<term>``."""
    return loss if loss.startswith("distill.") else loss.split(".")[0]


def hard_together(loss: str) -> str:
    """``hard`` for the hard losses of all tasks, else as ``by_part``."""
    return "hard" if loss.split(".")[1] == "hard" else by_part(loss)


def grouped(weighted: Mapping[str, Tensor], group: Callable[[str], str]) -> dict[str, Tensor]:
    """The sum of the weighted losses of each group."""
    sums: dict[str, Tensor] = {}
    for name, loss in weighted.items():
        sums[group(name)] = sums[group(name)] + loss if group(name) in sums else loss
    return sums


class Balance(nn.Module):
    """Multiplies the weighted losses by one factor per group. A subclass is registered with
    ``@BALANCES.register("name")``.

    groups: the names of all groups. Keyword-only parameters are its YAML options.
    """

    group = staticmethod(by_task)  # from a loss's name to its group's

    def __init__(self, groups: Sequence[str]):
        super().__init__()
        self.groups = tuple(groups)

    def factors(self, sums: Mapping[str, Tensor], shared: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """The factor of each group. sums: the weighted loss of each group of this step; shared: the tensors
        that all tasks read (the encoder's maps)."""
        raise NotImplementedError

    def penalty(self, groups: Iterable[str]) -> Tensor | None:
        """A term that the balance itself adds to the total for the groups of this step; None: nothing."""
        return None


@BALANCES.register("uncertainty")
class Uncertainty(Balance):
    """total = sum_g exp(-s_g) * loss_g + s_g, where the s_g are learnt, from 0 on (Kendall et al., CVPR 2018,
    with s = log sigma^2, times 2)."""

    def __init__(self, groups: Sequence[str]):
        super().__init__(groups)
        self.log_variance = nn.ParameterDict({_key(g): nn.Parameter(torch.zeros(())) for g in self.groups})

    def factors(self, sums: Mapping[str, Tensor], shared: Sequence[Tensor]) -> dict[str, Tensor | float]:
        return {g: torch.exp(-self.log_variance[_key(g)]) for g in sums}

    def penalty(self, groups: Iterable[str]) -> Tensor | None:
        return torch.stack([self.log_variance[_key(g)] for g in groups]).sum()


@BALANCES.register("dwa")
class DWA(Balance):
    """Dynamic weight average (Liu et al., CVPR 2019): factor_g = G * softmax over the G groups of r_g /
    temperature.

    r_g = mean weighted loss_g of the last window divided by that of the window before it: a loss that falls
    slowly gets more weight. every: forward passes per window (the paper's epoch). Factors are 1 in the first
    two windows.
    """

    def __init__(self, groups: Sequence[str], *, temperature: float = 2.0, every: int = 50):
        super().__init__(groups)
        if not 0 < temperature <= 1e6 or not 1 <= every <= 10**9:
            raise ValueError(f"temperature: {temperature} must be in (0, 1e6], every: {every} at least 1")
        self.temperature, self.every = temperature, every
        for name in ("sums", "last", "before"):
            self.register_buffer(name, torch.zeros(len(self.groups)))
        self.register_buffer("counts", torch.zeros(len(self.groups)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def factors(self, sums: Mapping[str, Tensor], shared: Sequence[Tensor]) -> dict[str, Tensor | float]:
        if self.steps and self.steps % self.every == 0:
            self.before.copy_(self.last)
            self.last.copy_(self.sums / self.counts.clamp(min=1))
            self.sums.zero_()
            self.counts.zero_()
        self.steps += 1
        for name, loss in sums.items():
            index = self.groups.index(name)
            self.sums[index] += loss.detach()
            self.counts[index] += 1
        known = (self.before > 0) & (self.last > 0)  # a group may be absent from the batches of a window
        if not known.any():
            return dict.fromkeys(sums, 1.0)
        ratio = torch.where(known, self.last / self.before / self.temperature, -torch.inf)
        factor = torch.where(known, known.sum() * torch.softmax(ratio, dim=0), 1.0)
        return {name: factor[self.groups.index(name)] for name in sums}


@BALANCES.register("gradient")
class GradientNorm(Balance):
    """Gives every soft loss and every term a gradient at the encoder's maps of ``share`` times the norm of
    the gradient of all hard losses together.

    factor_g = share * |gradient of the hard losses| / |gradient of loss_g|, gradients at the maps that the
    encoder passes to the neck, measured in the first forward pass and in every ``every``-th, then averaged
    exponentially with ``momentum``; the weights in the config cancel out.
    share: one number for all groups, or a mapping from group (``seg.soft``, ``distill.<term>``) to number;
    groups that it does not name keep their weights.
    """

    group = staticmethod(hard_together)

    def __init__(
        self,
        groups: Sequence[str],
        *,
        share: float | dict[str, float] | None = None,
        every: int = 20,
        momentum: float = 0.8,
    ):
        super().__init__(groups)
        balanced = [g for g in self.groups if g != "hard"]
        if share is None or share == {}:
            raise ValueError("share: give a number for all groups, or a mapping from group to number")
        shares = dict(share) if isinstance(share, dict) else dict.fromkeys(balanced, share)
        if not balanced:
            raise ValueError("there is no soft loss and no term to balance")
        for name, value in shares.items():
            if name not in balanced:
                raise ValueError(f"share: there is no group '{name}'; known: {', '.join(balanced) or 'none'}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e6:
                raise ValueError(f"share.{name}: {value!r} is not a number above 0 (and at most 1e6)")
        if not 1 <= every <= 10**9 or not 0 <= momentum < 1:
            raise ValueError(
                f"every: {every} must be at least 1 (and at most 1e9), momentum: {momentum} in [0, 1)"
            )
        if "hard" not in self.groups:
            raise ValueError("there is no hard loss to measure the others against; use fixed weights")
        self.shares, self.every, self.momentum = shares, every, momentum
        self.register_buffer("factor", torch.zeros(len(self.groups)))  # 0: not measured yet
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def factors(self, sums: Mapping[str, Tensor], shared: Sequence[Tensor]) -> dict[str, Tensor | float]:
        if torch.is_grad_enabled():
            if self.steps % self.every == 0 and "hard" in sums:
                self._measure(sums, shared)
            self.steps += 1
        return {
            g: self.factor[self.groups.index(g)] if g in self.shares and self._known(g) else 1.0 for g in sums
        }

    def _known(self, group: str) -> bool:
        return bool(self.factor[self.groups.index(group)] > 0)

    def _measure(self, sums: Mapping[str, Tensor], shared: Sequence[Tensor]) -> None:
        norms = {g: vector.norm() for g, vector in gradients(sums, shared).items()}
        if still := [
            g for g in ("hard", *self.shares) if g in norms and norms[g] == 0 and not self._known(g)
        ]:
            raise UserError(
                f"balance.options.share: the gradient of '{still[0]}' does not reach the maps that the "
                f"encoder gives the neck (it "
                "acts before them, or its weight is 0), so no share of it can be had; give shares by name "
                "and leave it out"
            )
        if not 0 < float(norms["hard"]) < math.inf:
            return
        for group, share in self.shares.items():
            if group not in norms or not norms[group] > 0 or not math.isfinite(norms[group]):
                continue
            index = self.groups.index(group)
            fresh = share * norms["hard"] / norms[group]
            old = self.factor[index]
            self.factor[index] = fresh if old == 0 else self.momentum * old + (1 - self.momentum) * fresh


def gradients(sums: Mapping[str, Tensor], shared: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gradient of each group at the ``shared`` tensors, as one vector; zeros where it does not reach
    them."""
    found = {}
    for name, loss in sums.items():
        parts = torch.autograd.grad(loss, list(shared), retain_graph=True, allow_unused=True)
        flat = [
            (torch.zeros_like(s) if p is None else p).flatten().float()
            for p, s in zip(parts, shared, strict=True)
        ]
        found[name] = torch.cat(flat)
    return found


def _key(group: str) -> str:
    return group.replace(".", "/")  # a ParameterDict takes no dots
