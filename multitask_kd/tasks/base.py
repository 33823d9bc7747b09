"""What a task is: its head, its hard loss, its decoding and its metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..registry import Registry

TASKS = Registry("task")


class Task:
    """One task of the network. A subclass is one file here, registered with ``@TASKS.register("name")``.

    Keyword-only parameters of ``__init__`` are the options of the hard loss (``tasks.<name>.hard`` in YAML), those of
    ``Head`` the architecture (``tasks.<name>.head``), those of ``decode`` the post-processing (``tasks.<name>.decode``).
    """

    name: str  # the key in configs, in ``Batch.targets`` and in ``ModelOutput.preds``
    Head: type[nn.Module]  # Head(width of the pyramid, strides of its levels, number of classes, *, options); has .strides
    weights: Mapping[str, float]  # hard loss -> its weight inside the task; the keys are what ``losses`` returns
    main_metric: str  # key in the metric's result, higher is better
    headline: tuple[str, ...]  # keys shown in one line of progress

    def __init__(self, classes: tuple[str, ...], strides: tuple[int, ...]):
        self.classes = tuple(classes)
        self.strides = tuple(strides)  # of the head's output

    def losses(self, pred: Tensor, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Unweighted hard losses (scalars), averaged over what is labelled; ``size`` is the batch's (H, W) in pixels."""
        raise NotImplementedError

    def decode(self, pred: Tensor, size: tuple[int, int]) -> Any:
        """Predictions a person can use, at the batch's size."""
        raise NotImplementedError

    def restore(self, decoded: Any, geometry: Any) -> Any:
        """Decoded predictions of one image, moved to the original image's size."""
        raise NotImplementedError

    def metric(self) -> Any:
        """A fresh metric."""
        raise NotImplementedError

    def score(self, metric: Any, prediction: Any, truth: Any) -> None:
        """Add one image's restored prediction and its ``Truth`` to ``metric``, unless the image has no label here."""
        raise NotImplementedError
