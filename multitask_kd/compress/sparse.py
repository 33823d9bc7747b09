"""Sparse training: a penalty that draws whole channels towards zero, so that they can be pruned with little
loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.multitask import MultiTaskNet
from .graph import Graph, Group

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
ALPHA = 4.0  # of the group penalty: the weakest channel is penalised 2^ALPHA times as much as the strongest


class Sparse:
    """Adds ``weight(progress)`` times the penalty of ``method`` to the total, as the weighted loss "sparse".

    Raises UserError for a network without normalisation (scale), and where torch-pruning is absent or cannot
    follow it (group).
    """

    def __init__(
        self, net: MultiTaskNet, size: Sequence[int], *, method: str, weight: Callable[[float], float]
    ):
        """size: (H, W) of an image in pixels."""
        self.weight, self._net = weight, net
        if method == "scale" and not norm_scales(net):
            raise UserError(
                "sparse.method: the network has no BatchNorm or GroupNorm for scale to act on; use group"
            )
        self._groups = (
            Graph(net, size, who="sparse.method group: the network").groups() if method == "group" else None
        )

    def __call__(
        self, total: Tensor, weighted: Mapping[str, Tensor], progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and the weighted losses, with the penalty."""
        loss = self.weight(progress) * self.penalty()
        return total + loss, {**weighted, "sparse": loss}

    def penalty(self) -> Tensor:
        """The unweighted penalty: a scalar."""
        return (
            scale_penalty(norm_scales(self._net))
            if self._groups is None
            else sum(map(group_penalty, self._groups))
        )

    def scales(self) -> Tensor:
        """Every |weight| of the normalisations, as one vector."""
        return torch.cat(
            [scale.detach().abs().flatten().cpu() for scale in norm_scales(self._net)] or [torch.zeros(1)]
        )


def norm_scales(net: nn.Module) -> list[nn.Parameter]:
    """The weights of every BatchNorm and GroupNorm."""
    return [
        module.weight for module in net.modules() if isinstance(module, NORMS) and module.weight is not None
    ]


def scale_penalty(scales: Sequence[Tensor]) -> Tensor:
    """Sum of |weights| (Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017,
    equation 1)."""
    return sum(scale.float().abs().sum() for scale in scales)


def group_penalty(group: Group) -> Tensor:
    """Sum over the channels k of gamma_k * |w_k|^2 / 2, where w_k are all weights that belong to the channel.

    gamma_k = 2^(ALPHA * (max |w| - |w_k|) / (max |w| - min |w|)), without gradient (Fang et al., DepGraph,
    CVPR 2023, equations 5 and 6, as torch-pruning's GroupNormPruner has them).
    """
    squares = sum(piece.squares(group.count) for piece in group.slices)
    with torch.no_grad():
        norms = squares.sqrt()
        spread = (norms.max() - norms.min()).clamp(min=1e-12)
        gamma = 2 ** (ALPHA * (norms.max() - norms) / spread)
    return (gamma * squares).sum() / 2
