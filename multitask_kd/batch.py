"""What flows through a step: ``Batch`` (images and labels) and ``ModelOutput`` (what a model shows a loss)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = 255  # mask value that no loss and no metric counts
PAD = -1  # class of a row of boxes that is only padding
CROWD = -2  # class of a box that marks a crowd: neither object nor background

Targets = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """One padded batch; nothing downstream loops over images.

    images: float [B,3,H,W], RGB in [0,1]; each model normalises for itself.
    targets: by task; a task that is missing is labelled in no image of the batch.
        seg: ``mask`` uint8 [B,H,W] (IGNORE is not counted), ``labelled`` bool [B];
        det: ``boxes`` float [B,M,4] x1,y1,x2,y2 in pixels of the batch, ``classes`` long [B,M] (PAD, CROWD), ``labelled`` bool [B].
    indices: long [B], the images' places in their data set.
    truths: evaluation only: one ``Truth`` an image, labels at the original size. Stays on the host.
    views: by (H, W), the same images at the sizes of teachers that see more than the student does.
    """

    images: Tensor
    targets: Targets = field(default_factory=dict)
    indices: Tensor | None = None
    truths: list[Any] | None = None
    views: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, *, channels_last: bool = False) -> Batch:
        """The batch on ``device``. uint8 images travel as bytes and become float [0,1] there."""
        # images leave the loader as [B,H,W,C] in memory, which is channels_last: the other layout needs a copy
        memory = torch.channels_last if channels_last else torch.contiguous_format

        def moved(images: Tensor) -> Tensor:
            images = images.to(device, non_blocking=True)
            images = images.float().div_(255) if images.dtype == torch.uint8 else images
            return images.contiguous(memory_format=memory)

        views = {size: moved(images) for size, images in self.views.items()}
        targets = _each(self.targets, lambda t: t.to(device, non_blocking=True))
        return replace(self, images=moved(self.images), targets=targets, views=views)

    def of(self, rows: Tensor) -> Batch:
        """The images of ``rows`` (long) alone, with their targets; without truths and views."""
        targets = _each(self.targets, lambda t: t[rows])
        return Batch(self.images[rows], targets, None if self.indices is None else self.indices[rows.to(self.indices.device)])

    def __getstate__(self) -> dict[str, Any]:
        """What leaves a loader process. Small tensors go in the message itself: each shared one costs a question and answer
        between the processes, which on busy cores is milliseconds of waiting."""
        return {**vars(self), "indices": _packed(self.indices), "targets": _each(self.targets, _packed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, indices=_unpacked(state["indices"]), targets=_each(state["targets"], _unpacked))

    def pin_memory(self) -> Batch:
        """In page-locked memory. The loader's pinning thread leaves classes without this method as they are."""
        views = {size: images.pin_memory() for size, images in self.views.items()}
        return replace(self, images=self.images.pin_memory(), targets=_each(self.targets, Tensor.pin_memory), views=views)


SMALL = 2**14  # bytes


def _packed(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) and value.device.type == "cpu" and value.nbytes < SMALL else value


def _unpacked(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _each(targets: dict[str, dict[str, Any]], change: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
    return {task: {key: change(value) for key, value in target.items()} for task, target in targets.items()}


class PaddedDetections(NamedTuple):
    """A detector's finished detections, padded, best first.

    boxes [B,M,4] x1,y1,x2,y2 in pixels, scores [B,M] in [0,1], classes long [B,M] (PAD where there is none).
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    @classmethod
    def padded(cls, images: Sequence[Any]) -> PaddedDetections:
        """Each image's own boxes [K,4], scores [K] and classes [K] (a ``PaddedDetections`` or ``Detections``) -> all in one."""
        return cls(
            pad_sequence([image.boxes for image in images], batch_first=True),
            pad_sequence([image.scores for image in images], batch_first=True),
            pad_sequence([image.classes for image in images], batch_first=True, padding_value=PAD),
        )


class DensePredictions(NamedTuple):
    """A detector's predictions at its own places, before suppression.

    boxes [B,A,4] x1,y1,x2,y2 in pixels, scores [B,A,C] in [0,1]; where they come from, None where that is not known: places [A,2]
    x,y in pixels, strides [A].
    """

    boxes: Tensor
    scores: Tensor
    places: Tensor | None = None
    strides: Tensor | None = None


@dataclass(frozen=True)
class ModelOutput:
    """What any model, teacher or student, shows a loss.

    preds: ``seg`` logits [B,C,h,w]; ``det`` raw outputs [B,N,4+1+C]. Of one teacher, in its own pixels, ``det`` may be ``DensePredictions`` or
        ``PaddedDetections``; of all together (``Teachers``) ``PaddedDetections`` where the soft loss takes it, else raw outputs of the student's cells.
    taps: features by dotted module path.
    shared: the encoder's maps that the neck, and so every task, reads.
    silent: of a teacher, by task: where it says nothing, bool [B,h,w] or [B,N]; a task that is missing is spoken of everywhere.
    """

    preds: dict[str, Any]
    taps: dict[str, Tensor] = field(default_factory=dict)
    shared: tuple[Tensor, ...] = ()
    silent: dict[str, Tensor] = field(default_factory=dict)

    def of(self, rows: Tensor) -> ModelOutput:
        """The predictions for the images of ``rows`` (long) alone, without taps."""
        preds = {k: type(p)(*(t[rows] for t in p)) if isinstance(p, PaddedDetections) else p[rows] for k, p in self.preds.items()}
        return ModelOutput(preds, silent={k: s[rows] for k, s in self.silent.items()})
