"""The dense, anchor-free, decoupled detection head, and where its cells lie in the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from .maps import knows


def conv_block(channels: int) -> nn.Sequential:
    """GroupNorm, because the convolutions are shared across levels whose statistics differ: with a shared
    BatchNorm the head loses most of its AP."""
    groups = math.gcd(channels, 8)
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(groups, channels), nn.ReLU()
    )


class DenseHead(nn.Module):
    """Pyramid levels -> raw outputs [B,N,4+1+C] over the N cells of all ``strides``, in their order.

    The values of a cell are dx, dy (centre, in strides from the cell's centre), log w, log h (in strides),
    objectness logit, C class logits.
    strides: the levels that detect (null: all of the pyramid's); depth: 3x3 convolutions per branch; prior:
    starting probability of objectness and classes.
    """

    def __init__(
        self,
        width: int,
        levels: Sequence[int],
        classes: int,
        *,
        depth: int = 2,
        strides: Sequence[int] | None = None,
        prior: float = 0.01,
    ):
        super().__init__()
        self.strides = tuple(strides or levels)
        if absent := set(self.strides) - set(levels):
            raise ValueError(f"strides: the pyramid has no stride {min(absent)}; it has {list(levels)}")
        if len(self.strides) != len(set(self.strides)) or depth < 0 or not 0 < prior < 1:
            raise ValueError(
                f"strides {list(self.strides)} must differ, depth {depth} be 0 or more, prior {prior} lie in "
                f"(0, 1)"
            )
        self.box_tower = nn.Sequential(*(conv_block(width) for _ in range(depth)))
        self.class_tower = nn.Sequential(*(conv_block(width) for _ in range(depth)))
        self.box = nn.Conv2d(width, 4, 1)
        self.objectness = nn.Conv2d(width, 1, 1)
        self.classifier = nn.Conv2d(width, classes, 1)
        self.size_bias = nn.Parameter(torch.zeros(len(self.strides), 1, 1))
        nn.init.constant_(self.box.bias, 0.0)
        for conv in (self.objectness, self.classifier):
            nn.init.constant_(conv.bias, -math.log((1 - prior) / prior))

    def forward(self, levels: Mapping[int, Tensor]) -> Tensor:
        return torch.cat([self._level(levels[s], i) for i, s in enumerate(self.strides)], dim=1)

    def _level(self, feature: Tensor, level: int) -> Tensor:
        box_feature = self.box_tower(feature)
        centre, size = self.box(box_feature).split(2, dim=1)
        raw = torch.cat(
            [
                centre,
                size + self.size_bias[level],
                self.objectness(box_feature),
                self.classifier(self.class_tower(feature)),
            ],
            dim=1,
        )
        return raw.flatten(2).transpose(1, 2)


@lru_cache(maxsize=64)
def cells(size: tuple[int, int], strides: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres [N,2] (x, y in pixels) and strides [N] of the cells of an image of ``size`` (H, W), in the
    head's order."""
    centres, scales = [], []
    for stride in strides:
        height, width = math.ceil(size[0] / stride), math.ceil(size[1] / stride)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centres.append((torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * stride)
        scales.append(torch.full((height * width,), float(stride)))
    return torch.cat(centres).to(device), torch.cat(scales).to(device)


def decode_boxes(raw: Tensor, centres: Tensor, scales: Tensor) -> Tensor:
    """Raw outputs [...,N,4+] -> boxes [...,N,4] x1,y1,x2,y2 in pixels."""
    middle = centres + raw[..., 0:2] * scales[:, None]
    half = box_sizes(raw) * (scales[:, None] / 2)
    return torch.cat([middle - half, middle + half], dim=-1)


def box_sizes(raw: Tensor) -> Tensor:
    """Raw outputs [...,4+] -> width and height [...,2] in strides, at most e^6: an untrained head would
    otherwise overflow."""
    return raw[..., 2:4].clamp(max=6.0).exp()


def centres_inside(boxes: Tensor, centres: Tensor) -> Tensor:
    """Whether each centre [N,2] is strictly inside each box [B,M,4]: bool [B,M,N]."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(-1)
    x, y = centres.unbind(-1)
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


@torch.no_grad()
def cells_of_unknown_classes(
    raw: Tensor, target: Mapping[str, Tensor] | None, known: Sequence[int], centres: Tensor
) -> Tensor:
    """The cells to ignore for a teacher that knows only the classes ``known``: bool [B,N].

    A cell is ignored where the likeliest class in the student's ``raw`` [B,N,4+1+C] is another one, or where
    a labelled box of another class (``boxes`` [B,M,4], ``classes`` [B,M], ``labelled`` [B] of ``target``)
    contains its centre.
    """
    unknown = ~knows(raw.shape[2] - 5, known, raw)
    ignored = unknown[raw[..., 5:].argmax(-1)]
    if target is not None and target["boxes"].shape[1]:
        classes = target["classes"]
        other = (classes >= 0) & unknown[classes.clamp(min=0)] & target["labelled"][:, None]
        ignored = ignored | (centres_inside(target["boxes"], centres) & other[..., None]).any(1)
    return ignored
