"""Distiller: everything that is trained, and the named losses of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Batch, ModelOutput
from ..errors import UserError
from ..losses.base import SoftLoss
from ..tasks.base import Task
from .crosshead import CrossHead
from .schedules import Schedule
from .taps import Tapped
from .term import Term


class Soft(NamedTuple):
    """A task's soft loss: its registered name, the loss, the teacher's head through which the student is
    compared (None: its own), and the classes that the teachers know (rising; None: all)."""

    name: str
    loss: SoftLoss
    through: CrossHead | None = None
    known: Sequence[int] | None = None


class Distilled(NamedTuple):
    """The result of ``Distiller`` for a batch. losses: unweighted scalars by name; preds: the student's
    predictions, detached; soft_preds: those that soft losses compared with the teacher's, detached; shared:
    the encoder's maps; taps: the student's, by module path."""

    losses: dict[str, Tensor]
    preds: dict[str, Any]
    soft_preds: dict[str, Any]
    shared: tuple[Tensor, ...]
    taps: Mapping[str, Any]


class Distiller(nn.Module):
    """Student, soft losses, terms between taps, and their balance; optimizer and checkpoint hold only this
    object.

    Losses are named ``<task>.hard.<loss>``, ``<task>.soft.<loss>`` and ``distill.<term>``.
    """

    def __init__(
        self,
        student: nn.Module,
        tasks: Mapping[str, Task],
        soft: Mapping[str, Soft],
        terms: Mapping[str, Term] | None = None,
        *,
        own_teacher: bool = False,
        unlabelled: Sequence[str] = (),
    ):
        """own_teacher: whether the student's own (deeper) taps teach. unlabelled: tasks that no image has a
        label for.

        Raises ValueError for a soft loss of a task that is not there.
        """
        super().__init__()
        if unknown := set(soft) - set(tasks):
            raise ValueError(f"soft loss for '{min(unknown)}', which is not a task of the student")
        self.student = student
        self.tasks = dict(tasks)
        self.soft_names = {task: part.name for task, part in soft.items()}
        self.soft = nn.ModuleDict({task: part.loss for task, part in soft.items()})
        self.through = nn.ModuleDict(
            {task: part.through for task, part in soft.items() if part.through is not None}
        )
        self.known = {task: part.known for task, part in soft.items()}
        self.terms = nn.ModuleDict(terms or {})
        self.balance: nn.Module | None = None  # made of the names of the losses, so set afterwards
        self.own_teacher, self.unlabelled = own_teacher, tuple(unlabelled)
        paths = [t.student for t in self.terms.values()] + [
            path for c in self.through.values() for path in c.levels.values()
        ]
        if own_teacher:
            paths += [t.teacher for t in self.terms.values()]
        self.tapped = Tapped(student, paths)
        self._schedules: list[tuple[Any, str, Schedule]] = []

    def add_schedule(self, owner: Any, attribute: str, schedule: Schedule) -> None:
        """Let ``schedule`` set an attribute (a loss's temperature) before every step."""
        self._schedules.append((owner, attribute, schedule))

    def set_progress(self, progress: float) -> None:
        """Set every scheduled attribute to its value at ``progress`` in [0, 1]."""
        for owner, attribute, schedule in self._schedules:
            setattr(owner, attribute, schedule(progress))

    def hard_names(self) -> list[str]:
        return [
            f"{name}.hard.{loss}"
            for name, t in self.tasks.items()
            if name not in self.unlabelled
            for loss in t.weights
        ]

    def loss_names(self) -> list[str]:
        soft = [f"{task}.soft.{loss}" for task, loss in self.soft_names.items()]
        return self.hard_names() + soft + [f"distill.{name}" for name in self.terms]

    def adapters(self) -> dict[str, nn.Module]:
        """The trained modules other than the student, by name."""
        found = {f"distill.{name}": term for name, term in self.terms.items()}
        found |= {f"{name}.soft": module for name, module in self.soft.items()}
        found |= {f"{name}.soft.through": module for name, module in self.through.items()}
        if self.balance is not None:
            found["balance"] = self.balance
        return {name: module for name, module in found.items() if any(True for _ in module.parameters())}

    def forward(self, batch: Batch, teacher: ModelOutput | None = None) -> Distilled:
        """Run the student on a batch and compute every unweighted loss.

        A task that is missing in the batch's targets has no hard losses. Raises ValueError where a loss needs
        a teacher and there is none, UserError for a tap whose module was not called.
        """
        with self.tapped as taps:
            output = self.student(batch.images)
        if self.own_teacher:
            teacher = ModelOutput({}, taps)
        if teacher is None and (self.soft or self.terms):
            raise ValueError(
                f"'{next(iter([*self.soft, *self.terms]))}' is learnt from a teacher, but the step has none"
            )
        size = tuple(batch.images.shape[2:])
        soft_preds = {
            name: self.through[name](taps) if name in self.through else output.preds[name]
            for name in self.soft
        }
        losses = self.compare(output.preds, soft_preds, batch, teacher)
        for name, term in self.terms.items():
            target = batch.targets.get(term.task) if term.task else None
            own = _tap(taps, term.student, f"distill.{name}.student")
            losses[f"distill.{name}"] = term(
                own, _tap(teacher.taps, term.teacher, f"distill.{name}.teacher"), size, target
            )
        return Distilled(losses, _detached(output.preds), _detached(soft_preds), output.shared, taps)

    def compare(
        self,
        preds: Mapping[str, Any],
        soft_preds: Mapping[str, Any],
        batch: Batch,
        teacher: ModelOutput | None,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The hard and soft losses of predictions. A task that is missing in the batch's targets has no hard
        losses.

        preds: the student's; soft_preds: those that soft losses compare with the teacher's. rows: long, the
        rows of the predictions that belong to the images of ``batch``; None: all rows.
        """
        size = tuple(batch.images.shape[2:])
        losses = {}
        for name, task in self.tasks.items():
            pick = (lambda pred: pred) if rows is None else lambda pred, t=task: t.select(pred, rows)
            target = batch.targets.get(name)
            if target is not None:
                losses |= {
                    f"{name}.hard.{k}": v for k, v in task.losses(pick(preds[name]), target, size).items()
                }
            if name in self.soft:
                losses[f"{name}.soft.{self.soft_names[name]}"] = self.soft_loss(
                    name, pick(soft_preds[name]), teacher, batch, rows
                )
        return losses

    def soft_loss(
        self, name: str, student: Any, teacher: ModelOutput, batch: Batch, rows: Tensor | None = None
    ) -> Tensor:
        """The soft loss of one task. student: its prediction; teacher: the output of all teachers; rows: see
        ``compare``."""
        task, loss = self.tasks[name], self.soft[name]
        pred, ignored = teacher.preds[name], teacher.ignore_mask.get(name)
        if rows is not None:
            pred, ignored = task.select(pred, rows), None if ignored is None else ignored[rows]
        target = batch.targets.get(name)
        pair = task.comparable(
            student,
            pred,
            ignore_mask=ignored,
            target=target,
            size=tuple(batch.images.shape[2:]),
            known=self.known[name],
            form=loss.form,
        )
        return loss(pair.student, pair.teacher, target, pair.mask)


def _detached(preds: Mapping[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        return {name: pred.detach() for name, pred in preds.items()}


def _tap(taps: Mapping[str, Any], path: str, where: str) -> Any:
    if path not in taps:
        raise UserError(f"{where}: the module '{path}' was not called in this step; tap one that always is")
    return taps[path]
