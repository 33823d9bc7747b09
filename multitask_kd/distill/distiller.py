"""Distiller: exactly what learns, and the named losses of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..batch import Batch, ModelOutput
from ..errors import UserError
from ..losses.base import SoftLoss
from ..tasks.base import Task
from .crosshead import CrossHead
from .overlap import Comparable
from .schedules import Schedule
from .taps import Tapped
from .term import Term


class Soft(NamedTuple):
    """A task's soft loss: its registered name, the loss, where the teacher's head judges the way through it, and where the two can
    be compared (None: everywhere, as they are)."""

    name: str
    loss: SoftLoss
    through: CrossHead | None = None
    overlap: Comparable | None = None


class Distiller(nn.Module):
    """Student, soft losses, terms between taps, and what balances them; optimizer and checkpoint see this object alone.

    Losses are named ``<task>.hard.<loss>``, ``<task>.soft.<loss>`` and ``distill.<term>``.
    """

    def __init__(
        self,
        student: nn.Module,
        tasks: Mapping[str, Task],
        soft: Mapping[str, Soft],
        terms: Mapping[str, Term] | None = None,
        *,
        balance: nn.Module | None = None,
        own_teacher: bool = False,
    ):
        """own_teacher: the student's own (deeper) taps teach.

        Raises ValueError for a soft loss of a task that is not there.
        """
        super().__init__()
        if unknown := set(soft) - set(tasks):
            raise ValueError(f"soft loss for '{min(unknown)}', which is not a task of the student")
        self.student = student
        self.tasks = dict(tasks)
        self.soft_names = {task: part.name for task, part in soft.items()}
        self.soft = nn.ModuleDict({task: part.loss for task, part in soft.items()})
        self.through = nn.ModuleDict({task: part.through for task, part in soft.items() if part.through is not None})
        self.overlaps = {task: part.overlap for task, part in soft.items() if part.overlap is not None}
        self.terms = nn.ModuleDict(terms or {})
        self.balance = balance
        self.own_teacher = own_teacher
        self.shared: tuple[Tensor, ...] = ()  # ``ModelOutput.shared`` of the last forward pass: where gradients are compared
        self.said: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})  # its predictions, and those that soft losses judge
        paths = [t.student for t in self.terms.values()] + [path for c in self.through.values() for path in c.levels.values()]
        if own_teacher:
            paths += [t.teacher for t in self.terms.values()]
        self.tapped = Tapped(student, paths)
        self._moving: list[tuple[Any, str, Schedule]] = []

    def move(self, owner: Any, attribute: str, schedule: Schedule) -> None:
        """Let ``schedule`` set an attribute (a loss's temperature) before every step."""
        self._moving.append((owner, attribute, schedule))

    def at(self, progress: float) -> None:
        """Set what schedules set, for a step at ``progress`` in [0, 1]."""
        for owner, attribute, schedule in self._moving:
            setattr(owner, attribute, schedule(progress))

    def loss_names(self) -> list[str]:
        hard = [f"{name}.hard.{loss}" for name, task in self.tasks.items() for loss in task.weights]
        soft = [f"{task}.soft.{loss}" for task, loss in self.soft_names.items()]
        return hard + soft + [f"distill.{name}" for name in self.terms]

    def adapters(self) -> dict[str, nn.Module]:
        """Modules besides the student that learn, by name."""
        found = {f"distill.{name}": term for name, term in self.terms.items()}
        found |= {f"{name}.soft": module for name, module in self.soft.items()}
        found |= {f"{name}.soft.through": module for name, module in self.through.items()}
        if self.balance is not None:
            found["balance"] = self.balance
        return {name: module for name, module in found.items() if any(True for _ in module.parameters())}

    def forward(self, batch: Batch, teacher: ModelOutput | None = None) -> dict[str, Tensor]:
        """Unweighted scalars by name. A task that is missing in the batch's targets has no hard losses.

        Raises ValueError when something is to be learnt from a teacher and the step has none, UserError for a tap that is silent.
        """
        with self.tapped as taps:
            view = self.student(batch.images)
        self.shared = view.shared
        if self.own_teacher:
            teacher = ModelOutput({}, taps)
        if teacher is None and (self.soft or self.terms):
            raise ValueError(f"'{next(iter([*self.soft, *self.terms]))}' is learnt from a teacher, but the step has none")
        size = tuple(batch.images.shape[2:])
        judged = {name: self.through[name](taps) if name in self.through else view.preds[name] for name in self.soft}
        self.said = ({k: v.detach() for k, v in view.preds.items()}, {k: v.detach() for k, v in judged.items()})
        losses = self.compare(view.preds, judged, batch, teacher)
        for name, term in self.terms.items():
            target = batch.targets.get(term.task) if term.task else None
            own = _tap(taps, term.student, f"distill.{name}.student")
            losses[f"distill.{name}"] = term(own, _tap(teacher.taps, term.teacher, f"distill.{name}.teacher"), size, target)
        return losses

    def compare(
        self, preds: Mapping[str, Tensor], judged: Mapping[str, Tensor], batch: Batch, teacher: ModelOutput | None
    ) -> dict[str, Tensor]:
        """The hard and soft losses of predictions. A task that is missing in the batch's targets has no hard losses.

        preds: the student's; judged: those that soft losses compare with the teacher's.
        """
        size = tuple(batch.images.shape[2:])
        losses = {}
        for name, task in self.tasks.items():
            target = batch.targets.get(name)
            if target is not None:
                losses |= {f"{name}.hard.{k}": v for k, v in task.losses(preds[name], target, size).items()}
            if name in self.soft:
                own, other = judged[name], teacher.preds[name]
                if name in self.overlaps:
                    own, other = self.overlaps[name](own, other, teacher.silent.get(name), target, size)
                losses[f"{name}.soft.{self.soft_names[name]}"] = self.soft[name](own, other, target)
        return losses


def _tap(taps: Mapping[str, Any], path: str, where: str) -> Any:
    if path not in taps:
        raise UserError(f"{where}: the module '{path}' was not called in this step; tap one that always is")
    return taps[path]
