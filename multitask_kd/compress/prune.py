"""Structured pruning: which channels are removed from a network until its cost has fallen by a given
share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..models.multitask import MultiTaskNet
from .graph import SCOPES, Graph, Group

METHODS = ("magnitude", "scale", "group")
LEAST = 0.1  # every layer keeps at least this share of its channels


@dataclass(frozen=True)
class Bite:
    """One pruning step of a group: ``channels`` are removed after those of the group's earlier bites.

    score: bites are applied in its rising order.
    """

    root: str
    channels: tuple[int, ...]
    score: tuple[float, float]


def importance(group: Group, method: str) -> Tensor:
    """The importance of each channel of a group, divided by the group's mean: float [count].

    magnitude: norm of the filters that make it (Li et al., Pruning Filters for Efficient ConvNets, 2017);
    scale: mean |weight| of the normalisations that it passes through (Liu et al., Network Slimming, 2017), or
    the magnitude where there is none; group: norm of all weights that make, scale or read it (Fang et al.,
    DepGraph, 2023).
    """
    kinds = {"magnitude": ("out",), "scale": ("scale",), "group": ("out", "in", "scale")}[method]
    used = (
        [s for s in group.slices if s.kind in kinds]
        or [s for s in group.slices if s.kind == "out"]
        or list(group.slices)
    )
    with torch.no_grad():
        if method == "scale":
            worth = sum(s.squares(group.count).sqrt() for s in used) / len(used)
        else:
            worth = sum(s.squares(group.count) for s in used).sqrt()
        return (worth / worth.mean().clamp(min=1e-12)).cpu()


def bites(group: Group, method: str, *, local: bool, round_to: int) -> list[Bite]:
    """The steps by which a group may shrink: its channels are removed in rising order of importance, the same
    number from each of its equal parts.

    local: every group loses the same share; else the least important channels of all groups are removed
    first.
    """
    each = group.count // group.parts
    worth = importance(group, method)
    by_position = worth.view(group.parts, each).mean(0)
    order = by_position.argsort(stable=True)
    found, before, highest = [], group.count, 0.0
    for keep in _widths(group.count, group.parts, round_to):
        removed = order[each - before // group.parts : each - keep // group.parts]
        mean = float(by_position[removed].mean())
        highest = max(highest, mean)
        channels = (removed[None] + each * torch.arange(group.parts)[:, None]).flatten().sort().values
        share = 1 - (before + keep) / 2 / group.count
        found.append(Bite(group.root, tuple(channels.tolist()), (share, mean) if local else (highest, share)))
        before = keep
    return found


def _widths(count: int, parts: int, round_to: int) -> list[int]:
    """The widths below ``count`` that a group may take, falling: multiples of ``round_to``, then its halves
    down to 4.

    All are multiples of ``parts`` and at least ``LEAST * count``.
    """
    steps = [*range(count - 1 - (count - 1) % round_to, 0, -round_to)]
    half = round_to // 2
    while half >= 4:
        steps.append(half)
        half //= 2
    return [n for n in dict.fromkeys(steps) if n < count and n % parts == 0 and n >= LEAST * count]


class Cutter:
    """A network and the order in which its channels are removed."""

    def __init__(
        self,
        net: MultiTaskNet,
        size: Sequence[int],
        *,
        method: str,
        scope: Collection[str] = SCOPES,
        local: bool,
        round_to: int,
        who: str = "the network",
    ):
        """size: (H, W) of an image. Raises UserError where torch-pruning is absent or cannot follow the
        network."""
        self.net, self._size, self._scope, self._who = net, size, scope, who
        groups = Graph(net, size, scope, who).groups()
        self.bites = sorted(
            (b for g in groups for b in bites(g, method, local=local, round_to=round_to)),
            key=lambda b: b.score,
        )
        if not self.bites:
            raise UserError(
                f"{who}: nothing in {', '.join(scope)} is wide enough to be pruned in steps of {round_to}; "
                f"lower --round-to"
            )

    def after(self, count: int) -> MultiTaskNet:
        """A copy of the network without the channels of the first ``count`` bites."""
        removed: dict[str, list[int]] = {}
        for bite in self.bites[:count]:
            removed.setdefault(bite.root, []).extend(bite.channels)
        net = copy.deepcopy(self.net)
        graph = Graph(net, self._size, self._scope, self._who)
        for root, channels in removed.items():
            graph.cut(root, sorted(channels))
        return net

    def reach(
        self, ratio: float, cost: Callable[[MultiTaskNet], float], tolerance: float
    ) -> tuple[MultiTaskNet, float]:
        """The pruned network whose cost has fallen by the share nearest to ``ratio``, and that share.

        Raises UserError where the share differs from ``ratio`` by more than ``tolerance``.
        """
        whole = cost(self.net)
        low, high = 0, len(self.bites)
        best: tuple[float, MultiTaskNet | None, float] = (float("inf"), None, 0.0)
        while low < high:
            middle = (low + high + 1) // 2
            net = self.after(middle)
            share = 1 - cost(net) / whole
            if abs(share - ratio) < best[0]:
                best = (abs(share - ratio), net, share)
            low, high = (middle, high) if share < ratio else (low, middle - 1)
        if best[1] is None or best[0] > tolerance:
            raise UserError(
                f"--ratio {ratio:g}: the nearest that can be reached is {best[2]:.3f}; ask for that, widen "
                f"--scope, "
                "or lower --round-to"
            )
        return best[1], best[2]
