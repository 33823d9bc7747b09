"""The interface of a soft loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..registry import Registry

LOSSES = Registry("soft loss")


class SoftLoss(nn.Module):
    """A loss between a student's and a teacher's tensors. A subclass is one file here, under
    ``@LOSSES.register("name")``.

    Keyword-only parameters of ``__init__`` are its options (``tasks.<name>.soft.options`` and
    ``distill.<name>.options`` in YAML); a ValueError that it raises becomes a UserError with the key path.
    The class docstring becomes its section of docs/config.md.
    """

    kinds: tuple[str, ...] = ()  # the kinds of task whose predictions it compares
    # the form of the teacher's prediction that it compares, of ``Task.forms``; "" is the kind's own
    form: str = ""
    # whether it compares feature maps [B,C,H,W] too, brought to one size and to the same channels
    maps: bool = False
    same_channels: bool = True  # False: it compares maps of any channels, and a term aligns sizes only
    norm: bool = False  # whether feature maps are normalised, each channel over the batch, before the loss
    # whether ``__init__`` takes the number of channels, positional, to build layers that are trained
    learns: bool = False
    # options that a schedule may change while training; attributes of the same names
    scheduled: tuple[str, ...] = ()

    def forward(
        self,
        student: Any,
        teacher: Any,
        target: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Two predictions or maps of equal shape -> unweighted scalar, float32.

        target: for predictions, the task's part of ``Batch.targets``; None where no image of the batch is
        labelled, and for features. mask: bool, where the two may be compared: [B,h,w] for maps, [B,N] for
        cells, [B] for vectors; None: everywhere. What is masked out counts in neither the sum nor its
        divisor, and no gradient comes from there.
        """
        raise NotImplementedError


def check_temperature(name: str, value: float) -> None:
    """Raise ValueError where a temperature is not a number above 0 that can be squared."""
    if not 0 < value <= 1e6:
        raise ValueError(
            f"{name}: {value} is not above 0" if not value > 0 else f"{name}: {value} is above 1e6"
        )


def check_weights(**weights: float) -> None:
    """Raise ValueError where the weight of a part of a loss is below 0 or not finite, or every one is 0."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name}: {weight} is no weight; give a number of at least 0")
    if not any(weights.values()):
        raise ValueError(f"{', '.join(weights)}: every weight is 0, so nothing would be learnt")


def same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    """Raise ValueError where two tensors differ in shape. what: a word for them, for the message."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's {what} {list(student.shape)} and the teacher's {list(teacher.shape)} differ"
        )
