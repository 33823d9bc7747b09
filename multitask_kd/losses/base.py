"""What a soft loss is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..registry import Registry

LOSSES = Registry("soft loss")


class SoftLoss(nn.Module):
    """What a student learns from a teacher's predictions. A subclass is one file here, under ``@LOSSES.register("name")``.

    Keyword-only parameters of ``__init__`` are its options (``tasks.<name>.soft.options`` in YAML); a ValueError it raises is
    told with its place in the config. The class docstring becomes its part of docs/config.md.
    """

    tasks: tuple[str, ...] = ()  # for whose predictions it is written

    def forward(self, student: Tensor, teacher: Tensor, target: Mapping[str, Tensor] | None = None) -> Tensor:
        """Predictions of equal shape (``View.preds`` of the task), the task's part of ``Batch.targets`` -> scalar, float32."""
        raise NotImplementedError
