"""The teachers: frozen, always in eval mode, outside optimizer and checkpoints.

They turn a batch into predictions in the student's classes, pixels and cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Batch, ModelOutput
from ..models.class_mapping import ClassMapping
from ..models.teacher_geometry import TeacherGeometry
from ..tasks.base import Task, TeacherPrediction
from .taps import Tapped


class Teacher:
    """Wraps a network so that nothing can train it.

    Not an nn.Module on purpose: assigned to one, it adds no parameters, and no ``train()`` reaches it.
    tasks: those that it predicts, by name, with the student's classes and its own strides; mappings: by task,
    how its classes become the student's, where they differ. amp: dtype of autocast, or None. taps: module
    paths whose outputs it returns besides its predictions. size: (H, W) of its input, None where it takes the
    student's images as they are. Raises UserError for a module path that the network does not have.
    """

    def __init__(
        self,
        net: nn.Module,
        tasks: Mapping[str, Task],
        device: torch.device,
        amp: torch.dtype | None = None,
        taps: Iterable[str] = (),
        *,
        mappings: Mapping[str, ClassMapping] | None = None,
        size: tuple[int, int] | None = None,
    ):
        self.net = net.to(device).eval().requires_grad_(False)
        self.tasks, self.device, self.amp, self.size = dict(tasks), device, amp, size
        self.mappings = dict(mappings or {})
        self.tapped = Tapped(self.net, taps, "teacher")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ModelOutput:
        """images float [B,3,h,w] in [0,1], of the teacher's input size -> predictions without gradients, in
        the teacher's pixels and the student's classes."""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None), self.tapped as taps:
            output = self.net(images)
        preds, ignore_mask = dict(output.preds), {}
        for name, mapping in self.mappings.items():
            if mapping.same:
                continue
            preds[name], ignored = self.tasks[name].mapped(preds[name], mapping)
            if ignored is not None:
                ignore_mask[name] = ignored
        return replace(output, preds=preds, taps=taps, ignore_mask=ignore_mask)

    def known(self, task: str) -> tuple[int, ...]:
        """The student's classes that it knows."""
        return (
            self.mappings[task].known
            if task in self.mappings
            else tuple(range(len(self.tasks[task].classes)))
        )


class Subject(NamedTuple):
    """A taught task: the student's ``Task``, the names of its teachers, and the form of their predictions
    (``SoftLoss.form``)."""

    task: Task
    teachers: Sequence[str]
    form: str = ""


class Teachers:
    """Every teacher of a run, by name. Called with a batch: one ModelOutput, in the student's classes, pixels
    and cells.

    Where several teach a task, their predictions are averaged, each class over those that know it. The name
    of a tap is its module path, with "<teacher>:" before it where there are several teachers.
    """

    def __init__(
        self, members: Mapping[str, Teacher], subjects: Mapping[str, Subject], size: tuple[int, int]
    ):
        """size: (H, W) of the student's images."""
        self.members, self.subjects, self.size = dict(members), dict(subjects), tuple(size)
        self.geometries = {
            name: TeacherGeometry(self.size, tuple(m.size or size)) for name, m in self.members.items()
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> ModelOutput:
        outputs = {name: member(self.geometries[name].images(batch)) for name, member in self.members.items()}
        preds: dict[str, Any] = {}
        ignore_mask: dict[str, Tensor] = {}
        relocated: dict[str, set[str]] = {}
        for task, subject in self.subjects.items():
            each = [self._in_student(name, outputs[name], task, subject) for name in subject.teachers]
            if moved := {name for name, one in zip(subject.teachers, each, strict=True) if one.relocated}:
                relocated[task] = moved
            preds[task], ignored = each[0][:2] if len(each) == 1 else self._average(task, subject, each)
            if ignored is not None:
                ignore_mask[task] = ignored
        taps = {
            self.tap_name(name, path): tap
            for name, output in outputs.items()
            for path, tap in output.taps.items()
        }
        return ModelOutput(preds, taps, ignore_mask=ignore_mask, relocated=relocated)

    def tap_name(self, teacher: str, path: str) -> str:
        """The name of the tap on a teacher's module."""
        return path if len(self.members) == 1 else f"{teacher}:{path}"

    def tap(self, name: str) -> tuple[Teacher, str]:
        """The teacher and the module path behind a tap's name."""
        teacher, colon, path = name.partition(":")
        return (self.members[teacher], path) if colon else (next(iter(self.members.values())), name)

    def known(self, task: str) -> tuple[int, ...]:
        """The student's classes of a task that any of its teachers knows."""
        return tuple(
            sorted({k for name in self.subjects[task].teachers for k in self.members[name].known(task)})
        )

    def sizes(self) -> list[tuple[int, int]]:
        """The sizes (H, W), other than the student's, at which teachers need the images of a batch."""
        return sorted({geometry.content for geometry in self.geometries.values() if geometry.sharper})

    def _in_student(self, name: str, output: ModelOutput, task: str, subject: Subject) -> TeacherPrediction:
        """One teacher's prediction of one task, in the student's pixels and, in the kind's own form, the
        student's cells."""
        own = self.members[name].tasks[task]
        return subject.task.to_student(
            output.preds[task], output.ignore_mask.get(task), self.geometries[name], own, subject.form
        )

    def _average(
        self, task: str, subject: Subject, each: Sequence[TeacherPrediction]
    ) -> tuple[Any, Tensor | None]:
        known = [self.members[name].known(task) for name in subject.teachers]
        return subject.task.average(
            [one.pred for one in each], [one.ignore_mask for one in each], known, subject.form
        )
