"""The network: one encoder, one pyramid, one head per task. Teacher and student are this class in different
sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..batch import ModelOutput
from .necks import Pyramid


class MultiTaskNet(nn.Module):
    """images float [B,3,H,W], RGB in [0,1], H and W multiples of ``max(strides)`` -> ModelOutput with one
    prediction per task.

    mean, std: the encoder's input statistics, applied here so that a saved network needs no preprocessing
    beyond a letterbox.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, nn.Module],
        strides: Sequence[int],
        width: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.backbone = backbone
        self._levels = [s.bit_length() - 1 for s in self.strides]
        self.neck = Pyramid([backbone.out_channels[i] for i in self._levels], self.strides, width)
        self.heads = nn.ModuleDict(heads)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> ModelOutput:
        features = self.backbone((images - self.mean) / self.std)
        shared = tuple(features[i] for i in self._levels)
        maps = dict(zip(self.strides, shared, strict=True))
        levels = self.neck(shared)
        return ModelOutput(
            {task: head(maps if reads_encoder(head) else levels) for task, head in self.heads.items()},
            shared=shared,
        )


def reads_encoder(head: nn.Module | type[nn.Module]) -> bool:
    """Whether a head reads the encoder's maps instead of the pyramid's levels."""
    return getattr(head, "reads_encoder", False)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
