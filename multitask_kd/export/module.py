"""What is exported: the network with its input's type and its outputs in a fixed order."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Exported(nn.Module):
    """images [B,3,H,W], float in [0,1] or (``uint8``) bytes -> a tuple of float32: one raw output a task.

    net: a MultiTaskNet in eval; half: whether it computes in fp16 (a copy does, ``net`` stays).
    """

    def __init__(self, net: nn.Module, *, uint8: bool = False, half: bool = False):
        super().__init__()
        self.net = copy.deepcopy(net).half() if half else net
        self.uint8, self.half_precision = uint8, half
        self.eval()

    def example(self, size: tuple[int, int]) -> Tensor:
        """Two images of nothing, as they go in."""
        return torch.zeros(2, 3, *size, dtype=torch.uint8 if self.uint8 else torch.float32)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.uint8:
            images = images.float() / 255
        preds = self.net(images.half() if self.half_precision else images).preds
        return tuple(pred.float() for pred in preds.values())


def as_input(images: Tensor, uint8: bool) -> Tensor:
    """Float images in [0,1] as the file takes them."""
    return (images * 255).round().to(torch.uint8) if uint8 else images.float()
