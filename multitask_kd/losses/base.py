"""What a soft loss is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..registry import Registry

LOSSES = Registry("soft loss")


class SoftLoss(nn.Module):
    """What a student learns from a teacher's tensors. A subclass is one file here, under ``@LOSSES.register("name")``.

    Keyword-only parameters of ``__init__`` are its options (``tasks.<name>.soft.options`` and ``distill.<name>.options`` in YAML);
    a ValueError it raises is told with its place in the config. The class docstring becomes its part of docs/config.md.
    """

    tasks: tuple[str, ...] = ()  # for whose predictions it is written
    maps: bool = False  # whether it compares feature maps [B,C,H,W] too, brought to one size and to the same channels
    same_channels: bool = True  # False: it compares maps of any channels, and a term aligns sizes only
    norm: bool = False  # whether feature maps are normalised, each channel over the batch, before it sees them
    scheduled: tuple[str, ...] = ()  # options that a schedule may change while training; attributes of the same names
    takes_found: bool = False  # whether it is given a teacher's finished detections (``PaddedDetections``) and not its cells

    # of the student's images and head, for losses that need them; set by ``place``
    size: tuple[int, int]
    strides: tuple[int, ...]
    known: tuple[int, ...] | None = None

    def place(self, size: tuple[int, int], strides: tuple[int, ...], known: tuple[int, ...] | None) -> None:
        """Tell where it stands: (H, W) of the student's images, the strides of its head, and the classes that the teachers know.

        known: rising indices, None for all. Where some are missing, both predictions have the known classes alone, except where
        ``takes_found``: then the student's has all, and ``PaddedDetections`` is numbered by all.
        """
        self.size, self.strides, self.known = tuple(size), tuple(strides), known

    def prepare(self, channels: int) -> None:
        """Make what the loss itself learns, for feature maps of so many channels. Most learn nothing."""

    def forward(self, student: Tensor, teacher: Tensor, target: Mapping[str, Tensor] | None = None) -> Tensor:
        """Two predictions or maps of equal shape -> unweighted scalar, float32.

        teacher: ``PaddedDetections`` where the loss ``takes_found``, in pixels of the student's images. target: for predictions, the task's
        part of ``Batch.targets``; None where no image of the batch is labelled, and for features.
        """
        raise NotImplementedError


def check_temperature(name: str, value: float) -> None:
    """Raise ValueError where a temperature is not a number above 0 that can be squared."""
    if not 0 < value <= 1e6:
        raise ValueError(f"{name}: {value} is not above 0" if not value > 0 else f"{name}: {value} is above 1e6")


def check_weights(**weights: float) -> None:
    """Raise ValueError where the weight of a part of a loss is below 0 or not finite, or every one is 0."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name}: {weight} is no weight; give a number of at least 0")
    if not any(weights.values()):
        raise ValueError(f"{', '.join(weights)}: every weight is 0, so nothing would be learnt")


def same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    """Raise ValueError where two tensors do not lie over one another."""
    if student.shape != teacher.shape:
        raise ValueError(f"the student's {what} {list(student.shape)} and the teacher's {list(teacher.shape)} differ")
