"""What is exported: the network with its input's type and its outputs in a fixed order."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Exported(nn.Module):
    """images [B,3,H,W], float in [0,1] or (``uint8``) bytes -> a tuple: one raw output a task in float32,
    then what ``decode`` makes of them.

    net: a MultiTaskNet in eval; half: whether it computes in fp16 (a copy does, ``net`` stays); decode: by
    task, a module from the raw output to a tuple.
    """

    def __init__(
        self, net: nn.Module, *, uint8: bool = False, half: bool = False, decode: nn.ModuleDict | None = None
    ):
        super().__init__()
        self.net = copy.deepcopy(net).half() if half else net
        self.decode = nn.ModuleDict() if decode is None else decode
        self.uint8, self.half_precision = uint8, half
        self.eval()

    def example(self, size: tuple[int, int]) -> Tensor:
        """Two images of nothing, as they go in."""
        return torch.zeros(2, 3, *size, dtype=torch.uint8 if self.uint8 else torch.float32)

    @staticmethod
    def free_sides(multiple: int | None) -> dict[str, dict[int, Any]]:
        """For torch.export: the batch is free, and where ``multiple`` is given, height and width as multiples
        of it."""
        sides: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
        if multiple:
            sides |= {
                2: multiple * torch.export.Dim("rows", min=1),
                3: multiple * torch.export.Dim("columns", min=1),
            }
        return {"images": sides}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.uint8:
            images = images.float() / 255
        preds = self.net(images.half() if self.half_precision else images).preds
        raw = {task: pred.float() for task, pred in preds.items()}
        return (
            *raw.values(),
            *(output for task, module in self.decode.items() for output in module(raw[task])),
        )


def as_input(images: Tensor, uint8: bool) -> Tensor:
    """Float images in [0,1] as the file takes them."""
    return (images * 255).round().to(torch.uint8) if uint8 else images.float()
