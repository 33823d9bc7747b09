"""The registry of soft losses."""

from __future__ import annotations

from ..registry import Registry

# A loss is an nn.Module, keyword-only parameters = options; forward(student, teacher, target) -> scalar. ``tasks`` says for
# which tasks' predictions it is written; ``target`` is the task's part of ``Batch.targets``, or None.
LOSSES = Registry("soft loss")
