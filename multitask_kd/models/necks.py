"""The feature pyramid that every head shares."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork


def level_name(stride: int) -> str:
    """p2 for stride 4, p3 for stride 8, ...: the name of a pyramid level, and its tap's (``neck.p3``)."""
    return f"p{stride.bit_length() - 1}"


class Pyramid(nn.Module):
    """torchvision's feature pyramid with one named output module per level, so that ``neck.p3`` can be
    hooked.

    channels: of the encoder's maps at ``strides``; every level of the pyramid has ``width`` channels.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int):
        super().__init__()
        self.strides, self.width = tuple(strides), width
        self.fpn = FeaturePyramidNetwork(list(channels), width, norm_layer=nn.BatchNorm2d)
        for stride in self.strides:
            self.add_module(level_name(stride), nn.Identity())

    def width_at(self, stride: int) -> int:
        """Channels of the level of ``stride``: ``width``, or fewer in a pruned network."""
        return self.fpn.layer_blocks[self.strides.index(stride)][0].out_channels

    def forward(self, features: Sequence[Tensor]) -> dict[int, Tensor]:
        """Maps at ``strides``, finest first -> {stride: [B,width,H/stride,W/stride]}."""
        levels = self.fpn(OrderedDict((str(s), f) for s, f in zip(self.strides, features, strict=True)))
        return {s: self.get_submodule(level_name(s))(levels[str(s)]) for s in self.strides}
