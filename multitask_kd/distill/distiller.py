"""Distiller: exactly what learns, and the named losses of a batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..batch import Batch, View
from ..tasks.base import Task


class Distiller(nn.Module):
    """Student, and the soft losses of the tasks that have one; optimizer and checkpoint see this object alone.

    Losses are named ``<task>.hard.<loss>`` and ``<task>.soft.<loss>``.
    """

    def __init__(self, student: nn.Module, tasks: Mapping[str, Task], soft: Mapping[str, tuple[str, nn.Module]]):
        """soft: by task, the loss's name and module. Raises ValueError for a soft loss of a task that is not there."""
        super().__init__()
        if unknown := set(soft) - set(tasks):
            raise ValueError(f"soft loss for '{min(unknown)}', which is not a task of the student")
        self.student = student
        self.tasks = dict(tasks)
        self.soft_names = {task: name for task, (name, _) in soft.items()}
        self.soft = nn.ModuleDict({task: module for task, (_, module) in soft.items()})

    def loss_names(self) -> list[str]:
        hard = [f"{name}.hard.{loss}" for name, task in self.tasks.items() for loss in task.weights]
        return hard + [f"{task}.soft.{loss}" for task, loss in self.soft_names.items()]

    def forward(self, batch: Batch, teacher: View | None = None) -> dict[str, Tensor]:
        """Unweighted scalars by name. A task that is missing in the batch's targets has no hard losses.

        Raises ValueError when there are soft losses and no teacher view.
        """
        view = self.student(batch.images)
        size = tuple(batch.images.shape[2:])
        losses = {}
        for name, task in self.tasks.items():
            pred, target = view.preds[name], batch.targets.get(name)
            if target is not None:
                losses |= {f"{name}.hard.{k}": v for k, v in task.losses(pred, target, size).items()}
            if name in self.soft:
                if teacher is None:
                    raise ValueError(f"task '{name}' has a soft loss, but the step has no teacher")
                losses[f"{name}.soft.{self.soft_names[name]}"] = self.soft[name](pred, teacher.preds[name], target)
        return losses
