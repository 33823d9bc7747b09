"""The data of a step: ``Batch`` (images and labels) and ``ModelOutput`` (what a model returns to the
losses)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = 255  # mask value that no loss and no metric counts
PAD = -1  # class of a row of boxes that is only padding
CROWD = -2  # class of a box that marks a crowd: neither object nor background
GREY = 114  # of 255: the padding of a letterbox

Targets = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """One padded batch; nothing downstream loops over images.

    images: float [B,3,H,W], RGB in [0,1]; each model normalises for itself.
    targets: by task name; a task that is missing is labelled in no image of the batch. Every tensor has B
        rows; ``labelled`` bool [B] is always there, ``known`` bool [B,C] where some images come from sets
        that label only some classes; the other tensors depend on the kind (``Task.packed``).
    indices: long [B], the images' indices in their data set.
    truths: evaluation only: one ``Truth`` per image, labels at the original size. Stays on the host.
    teacher_images: by (H, W), the same images at the sizes of teachers whose input is larger than the
    student's.
    """

    images: Tensor
    targets: Targets = field(default_factory=dict)
    indices: Tensor | None = None
    truths: list[Any] | None = None
    teacher_images: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, *, channels_last: bool = False) -> Batch:
        """The batch on ``device``. uint8 images travel as bytes and become float [0,1] there."""
        # images leave the loader as [B,H,W,C] in memory, which is channels_last: the other layout needs a
        # copy
        memory = torch.channels_last if channels_last else torch.contiguous_format

        def moved(images: Tensor) -> Tensor:
            images = images.to(device, non_blocking=True)
            images = images.float().div_(255) if images.dtype == torch.uint8 else images
            return images.contiguous(memory_format=memory)

        others = {size: moved(images) for size, images in self.teacher_images.items()}
        targets = _each(self.targets, lambda t: t.to(device, non_blocking=True))
        return replace(self, images=moved(self.images), targets=targets, teacher_images=others)

    def of(self, rows: Tensor) -> Batch:
        """A batch of only the images ``rows`` (long), with their targets; without truths and
        teacher_images."""
        targets = _each(self.targets, lambda t: t[rows])
        return Batch(
            self.images[rows],
            targets,
            None if self.indices is None else self.indices[rows.to(self.indices.device)],
        )

    def __getstate__(self) -> dict[str, Any]:
        """The state that a loader process sends. Small tensors are copied into the message: each shared one
        costs a round trip between the processes, which on busy cores is milliseconds of waiting."""
        return {**vars(self), "indices": _packed(self.indices), "targets": _each(self.targets, _packed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            state, indices=_unpacked(state["indices"]), targets=_each(state["targets"], _unpacked)
        )

    def pin_memory(self) -> Batch:
        """In page-locked memory. The loader's pinning thread leaves classes without this method as they are."""
        others = {size: images.pin_memory() for size, images in self.teacher_images.items()}
        targets = _each(self.targets, Tensor.pin_memory)
        return replace(self, images=self.images.pin_memory(), targets=targets, teacher_images=others)


SMALL = 2**14  # bytes


def _packed(value: Any) -> Any:
    return (
        value.numpy()
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.nbytes < SMALL
        else value
    )


def _unpacked(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _each(targets: dict[str, dict[str, Any]], change: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
    return {task: {key: change(value) for key, value in target.items()} for task, target in targets.items()}


class PaddedDetections(NamedTuple):
    """A detector's detections after suppression, padded, best first.

    boxes [B,M,4] x1,y1,x2,y2 in pixels, scores [B,M] in [0,1], classes long [B,M] (PAD where there is none).
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    @classmethod
    def padded(cls, images: Sequence[Any]) -> PaddedDetections:
        """Each image's own boxes [K,4], scores [K] and classes [K] (``PaddedDetections`` or ``Detections``)
        -> all in one."""
        return cls(
            pad_sequence([image.boxes for image in images], batch_first=True),
            pad_sequence([image.scores for image in images], batch_first=True),
            pad_sequence([image.classes for image in images], batch_first=True, padding_value=PAD),
        )


class DensePredictions(NamedTuple):
    """A detector's predictions at its own anchor points, before suppression.

    boxes [B,A,4] x1,y1,x2,y2 in pixels, scores [B,A,C] in [0,1]; where they come from, None where that is not
    known: anchor_points [A,2] x,y in pixels, strides [A].
    """

    boxes: Tensor
    scores: Tensor
    anchor_points: Tensor | None = None
    strides: Tensor | None = None


class CellPredictions(NamedTuple):
    """A detection head's raw outputs [B,N,4+1+C], and where its N cells are: centres [N,2] x,y and strides
    [N] in pixels."""

    raw: Tensor
    centres: Tensor
    strides: Tensor


@dataclass(frozen=True)
class ModelOutput:
    """What any model, teacher or student, returns to the losses.

    preds: by task name, in the form that the task's kind defines. A single teacher's may have the forms of
        external networks too; those of all teachers together (``Teachers``) are in the student's classes,
        pixels and cells.
    taps: features by dotted module path.
    shared: the encoder's maps that the neck, and so every task, reads.
    ignore_mask: of a teacher, by task: bool, True where its prediction is ignored; a task that is missing has
    no mask.
    relocated: of teachers, by task: the names of those whose predictions were moved to the student's cells.
    """

    preds: Mapping[str, Any]
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    shared: tuple[Tensor, ...] = ()
    ignore_mask: Mapping[str, Tensor] = field(default_factory=dict)
    relocated: Mapping[str, set[str]] = field(default_factory=dict)
