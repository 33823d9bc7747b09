"""The teachers: frozen, always in eval, outside optimizer and checkpoints; a batch -> what they say in the student's terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Batch, DensePredictions, ModelOutput, PaddedDetections
from ..tasks.base import Task
from .class_mapping import ClassMapping
from .ensemble import mean_cells, mean_found, mean_maps
from .places import by_location, to_dense
from .taps import Tapped
from .teacher_geometry import TeacherGeometry


class Teacher:
    """Wraps a network so that nothing can train it.

    Not an nn.Module on purpose: assigned to one, it adds no parameters, and no ``train()`` reaches it.
    tasks: what it knows, by name, with the student's classes and its own strides; lessons: by task, how its classes become the
    student's, where they are others. amp: dtype of autocast, or None. taps: module paths whose outputs it shows besides its
    predictions. size: (H, W) of its input, None where it takes the student's images as they are.
    Raises UserError for a path that the network does not have.
    """

    def __init__(
        self,
        net: nn.Module,
        tasks: Mapping[str, Task],
        device: torch.device,
        amp: torch.dtype | None = None,
        taps: Iterable[str] = (),
        *,
        lessons: Mapping[str, ClassMapping] | None = None,
        size: tuple[int, int] | None = None,
    ):
        self.net = net.to(device).eval().requires_grad_(False)
        self.tasks, self.device, self.amp, self.size = dict(tasks), device, amp, size
        self.lessons = dict(lessons or {})
        self.tapped = Tapped(self.net, taps, "teacher")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ModelOutput:
        """images float [B,3,h,w] in [0,1], of its own size -> ModelOutput without gradients: its own pixels, the student's classes."""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None), self.tapped as taps:
            view = self.net(images)
        preds, silent = dict(view.preds), {}
        for name, lesson in self.lessons.items():
            preds[name], quiet = lesson(preds[name])
            if quiet is not None:
                silent[name] = quiet
        return replace(view, preds=preds, taps=taps, silent=silent)

    def known(self, task: str) -> tuple[int, ...]:
        """The student's classes that it knows."""
        return self.lessons[task].known if task in self.lessons else tuple(range(len(self.tasks[task].classes)))


class Subject(NamedTuple):
    """A task that is taught: by which teachers; the student's head's strides; whether as ``PaddedDetections``, else as its cells."""

    teachers: Sequence[str]
    strides: tuple[int, ...]
    as_found: bool = False


class Teachers:
    """Every teacher of a run, by name. Called with a batch: one ModelOutput, in the student's classes, pixels and cells.

    Where several teach a task, their probabilities are averaged, each class over those that know it. Taps are named as their path,
    with "<teacher>:" before it where there are several teachers.
    """

    def __init__(self, members: Mapping[str, Teacher], subjects: Mapping[str, Subject], size: tuple[int, int]):
        """size: (H, W) of the student's images."""
        self.members, self.subjects, self.size = dict(members), dict(subjects), tuple(size)
        self.located: dict[str, set[str]] = {}  # by task, whose cells were others than the student's in the last batch
        self.sights = {name: TeacherGeometry(self.size, tuple(m.size or size)) for name, m in self.members.items()}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> ModelOutput:
        views = {name: member(self.sights[name].images(batch)) for name, member in self.members.items()}
        self.located = {}
        preds: dict[str, Any] = {}
        silent: dict[str, Tensor] = {}
        for task, subject in self.subjects.items():
            said = [self._said(name, views[name], task, subject) for name in subject.teachers]
            preds[task], quiet = said[0] if len(said) == 1 else self._mean(task, subject, said)
            if quiet is not None:
                silent[task] = quiet
        taps = {self.tap_name(name, path): tap for name, view in views.items() for path, tap in view.taps.items()}
        return ModelOutput(preds, taps, silent=silent)

    def tap_name(self, teacher: str, path: str) -> str:
        """What the tap on a teacher's module is called."""
        return path if len(self.members) == 1 else f"{teacher}:{path}"

    def tap(self, name: str) -> tuple[Teacher, str]:
        """The teacher and the module path behind a tap's name."""
        teacher, colon, path = name.partition(":")
        return (self.members[teacher], path) if colon else (next(iter(self.members.values())), name)

    def known(self, task: str) -> tuple[int, ...]:
        """The student's classes of a task that any of its teachers knows."""
        return tuple(sorted({k for name in self.subjects[task].teachers for k in self.members[name].known(task)}))

    def views(self) -> list[tuple[int, int]]:
        """The sizes (H, W) at which teachers want to see the images of a batch besides the student's."""
        return sorted({sight.content for sight in self.sights.values() if sight.sharper})

    def _said(self, name: str, view: ModelOutput, task: str, subject: Subject) -> tuple[Any, Tensor | None]:
        """What one teacher says of one task, in the student's pixels and, unless as detections, cells."""
        said, sight, member = view.preds[task], self.sights[name], self.members[name]
        silent = view.silent.get(task)
        if isinstance(said, Tensor) and said.dim() == 4:
            return sight.back(said), None if silent is None else sight.back(silent[:, None])[:, 0]
        if subject.as_found:
            if not isinstance(said, PaddedDetections):
                said = PaddedDetections.padded(member.tasks[task].decode(said, sight.own))
            return sight.back(said), None
        if isinstance(said, Tensor):
            if sight.same and member.tasks[task].strides == subject.strides:
                return said, silent
            said = to_dense(said, sight.own, member.tasks[task].strides)
        self.located.setdefault(task, set()).add(name)
        return by_location(sight.back(said), self.size, subject.strides)

    def _mean(self, task: str, subject: Subject, said: list[tuple[Any, Tensor | None]]) -> tuple[Any, Tensor | None]:
        words, silent = [word for word, _ in said], [quiet for _, quiet in said]
        known = [self.members[name].known(task) for name in subject.teachers]
        if subject.as_found:
            return mean_found(words, known), None
        if words[0].dim() == 4:
            return mean_maps(words, silent, known)
        return mean_cells(words, silent, known)


def has_places(said: Any) -> bool:
    """Whether a detector's prediction can be brought to the student's cells."""
    return isinstance(said, Tensor) or (isinstance(said, DensePredictions) and said.places is not None)
