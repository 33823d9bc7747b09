"""Config -> the teachers: where each comes from, what it knows of the student's classes, and who teaches what."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .build_distill import compared_heads, show_nothing, teacher_taps
from .build_net import check_classes, from_checkpoint
from .checkpoint import load as load_checkpoint
from .config import Config
from .config import Teacher as Section
from .distill.lesson import Lesson
from .distill.taps import Tapped
from .distill.teacher import Subject, Teacher, Teachers, has_places
from .errors import UserError, did_you_mean, told
from .losses.base import LOSSES
from .models.multitask import MultiTaskNet
from .precision import resolve_amp
from .registry import check_options
from .sources.base import SOURCES, Source
from .sources.reading import IMAGENET, OUTPUTS, Foreign
from .tasks.base import TASKS, Task

log = logging.getLogger(__name__)

OWN = ("checkpoint", "ema", "self")  # sources that need no file of SOURCES


def check_teachers(config: Config) -> None:
    """Every name and option of the teachers, before anything is read. Raises UserError naming the key."""
    for place, section in config.named_teachers.items():
        if section.source in OWN:
            continue
        if section.source not in SOURCES.names():
            known = did_you_mean(section.source, [*OWN, *SOURCES.names()])
            raise UserError(f"{place}.source: unknown teacher source '{section.source}'; {known}")
        kind = SOURCES.get(section.source, place)
        check_options(kind, section.options, f"{place}.options")
        if kind.reads_file and section.path is None:
            raise UserError(f"{place}.path: the source '{section.source}' needs one")
        if section.path is not None and not (kind.reads_file or kind.optional_path):
            raise UserError(f"{place}.path: the source '{section.source}' reads no file; leave it out")
        for task, options in section.outputs.items():
            if task not in OUTPUTS:
                raise UserError(f"{place}.outputs.{task}: {did_you_mean(task, OUTPUTS)}")
            check_options(OUTPUTS[task], options, f"{place}.outputs.{task}")
            told(f"{place}.outputs.{task}", OUTPUTS[task], **options)
        for name, term in config.distill.items():
            if config.tapped_teacher(term) == place and not kind.tappable:
                raise UserError(f"distill.{name}.teacher: modules of a teacher from '{section.source}' cannot be tapped")


Loaded = dict[str, Any]  # by place: a checkpoint's content, or a Source


def read_teachers(config: Config) -> Loaded:
    """Open every teacher's file, so that a missing one is told before data is read. Nothing is opened where nothing is taught."""
    found: Loaded = {}
    for place, section in config.named_teachers.items():
        if section.source == "checkpoint":
            found[place] = load_checkpoint(section.path, f"{place}.path")
        elif section.source not in OWN:
            found[place] = _source(section, place)
    return found


def _source(section: Section, place: str) -> Source:
    if section.path is not None and not Path(section.path).exists():
        raise UserError(f"{place}.path: there is no file {section.path}; correct the path")
    kind = SOURCES.get(section.source, place)
    return _at(place, kind, section.path, section.trust_pickle, **section.options)


def _at(place: str, make: Any, *args: Any, **kwargs: Any) -> Any:
    """What a source says of its keys, with the place of the section before it."""
    try:
        return make(*args, **kwargs)
    except UserError as error:
        raise UserError(f"{place}.{error}") from None
    except ValueError as error:
        raise UserError(f"{place}.options: {error}") from None


def build_teachers(
    config: Config, loaded: Loaded, student: MultiTaskNet, parts: Mapping[str, Task], on: torch.device
) -> Teachers | None:
    """The frozen teachers. Raises UserError where what one says cannot be brought to the student's classes, pixels or cells."""
    if not config.distils or config.taught_by_itself:
        return None
    members = {}
    for place, section in config.named_teachers.items():
        name = place.removeprefix("teachers.")
        if section.source == "ema":
            members[name] = _own_average(section, place, student, parts, on, teacher_taps(config, place))
        else:
            members[name] = _member(config, place, section, loaded[place], parts, on)
    subjects = _subjects(config, members, parts)
    found = Teachers(members, subjects, config.data.input_size)
    _prove(config, found, parts, on)
    return found


def _own_average(
    section: Section, place: str, student: MultiTaskNet, parts: Mapping[str, Task], on: torch.device, taps: Sequence[str]
) -> Teacher:
    """A teacher whose weights start as the student's; the loop averages the student's into them."""
    return Teacher(copy.deepcopy(student), parts, on, resolve_amp(section.amp, on, f"{place}.amp"), taps)


def _member(config: Config, place: str, section: Section, loaded: Any, parts: Mapping[str, Task], on: torch.device) -> Teacher:
    """One teacher with a file of its own."""
    if section.source == "checkpoint":
        net = from_checkpoint(loaded, f"{place}.path")
        theirs = {name: tuple(part["classes"]) for name, part in loaded["arch"]["tasks"].items()}
        strides = {name: tuple(head.strides) for name, head in net.heads.items()}
    else:
        net, theirs = _foreign(config, place, section, loaded, parts, on)
        strides = {name: _own_strides(net.outputs[name], part) for name, part in parts.items() if name in theirs}
    size = section.input.size
    if isinstance(net, MultiTaskNet):
        _fits_strides(place, section, net, size or config.data.input_size)
    lessons = _lessons(config, place, section, theirs, parts)
    _compared_heads_agree(config, place, section, theirs, parts)
    tasks = {name: TASKS.build(name, {}, f"tasks.{name}.hard", parts[name].classes, strides[name]) for name in lessons}
    for name, term in config.distill.items():
        if config.tapped_teacher(term) == place:
            Tapped(net, [term.teacher_path], f"distill.{name}.teacher")
    amp = resolve_amp(section.amp, on, f"{place}.amp")
    return Teacher(net, tasks, on, amp, teacher_taps(config, place), lessons=lessons, size=size)


def _foreign(
    config: Config, place: str, section: Section, source: Source, parts: Mapping[str, Task], on: torch.device
) -> tuple[Foreign, dict[str, tuple[str, ...]]]:
    """A network that is no checkpoint of ours, and its classes by task."""
    net = _at(place, source.load, on)
    theirs = {name: tuple(names) for name, names in {**source.classes, **section.classes}.items() if name in parts}
    wanted = section.tasks or tuple(theirs)
    if lacking := [name for name in wanted if name not in theirs]:
        raise UserError(f"{place}.classes: needs {lacking[0]}, its class names in the network's order")
    if not theirs:
        raise UserError(f"{place}.classes: the class names of {' or '.join(parts)}, in the network's order, are needed")
    outputs = {}
    for name in wanted:
        options = dict(section.outputs.get(name, {}))
        if name == "det" and options.get("form", "auto") in ("auto", "cells"):
            options.setdefault("strides", list(parts[name].strides))
        outputs[name] = OUTPUTS[name](**options)
    mean, std = (
        [scale * x for x in default] if given is None else given
        for scale, default, given in (
            (section.input.scale, source.mean or IMAGENET[0], section.input.mean),
            (section.input.scale, source.std or IMAGENET[1], section.input.std),
        )
    )
    if source.normalises and section.input.mean is None and section.input.std is None:
        mean = std = None
    wrapped = Foreign(
        net,
        outputs,
        {name: len(theirs[name]) for name in outputs},
        mean=mean,
        std=std,
        bgr=section.input.order == "bgr",
        scale=section.input.scale,
    )
    return wrapped, {name: theirs[name] for name in outputs}


def _own_strides(output: Any, part: Task) -> tuple[int, ...]:
    return getattr(output, "strides", None) or part.strides


def _fits_strides(place: str, section: Section, net: MultiTaskNet, size: Sequence[int]) -> None:
    stride = max(net.strides)
    if any(n % stride for n in size):
        raise UserError(
            f"{place}.path: the teacher {section.path} needs images in multiples of {stride}, not {list(size)}: "
            f"change data.input_size, or give {place}.input.size"
        )


def _lessons(
    config: Config, place: str, section: Section, theirs: Mapping[str, Sequence[str]], parts: Mapping[str, Task]
) -> dict[str, Lesson]:
    """By task: how the teacher's classes become the student's. One without a common class is left out unless it was asked for."""
    found = {}
    for name, names in theirs.items():
        if name not in parts or (section.tasks is not None and name not in section.tasks):
            continue
        try:
            found[name] = Lesson(names, parts[name].classes, section.map.get(name))
        except ValueError as error:
            asked = (
                name in (section.tasks or ())
                or name in section.map
                or (config.tasks[name].taught and len(config.named_teachers) == 1)
            )
            if asked:
                raise UserError(
                    f"{place}{f'.map.{name}' if name in section.map else ''}: {error}; see {place}.map.{name}"
                ) from None
    for name in section.tasks or ():
        if name not in found:
            raise UserError(f"{place}.tasks: the teacher has no '{name}'; it has {', '.join(theirs)}")
    return found


def _compared_heads_agree(
    config: Config, place: str, section: Section, theirs: Mapping[str, Sequence[str]], parts: Mapping[str, Task]
) -> None:
    """Heads that a term of ``distill`` compares channel by channel need the same classes in the same order."""
    for task in compared_heads(config, place):
        check_classes({task: parts[task].classes}, theirs, [task], f"{place}.path: the teacher {section.path}")


def _subjects(config: Config, members: Mapping[str, Teacher], parts: Mapping[str, Task]) -> dict[str, Subject]:
    """Who teaches each task that is taught."""
    found = {}
    for name in (name for name, task in config.tasks.items() if task.taught):
        who = [member for member, teacher in members.items() if name in teacher.tasks]
        if not who:
            raise UserError(f"tasks.{name}.alpha: it is above 0, but no teacher knows '{name}'; set it to 0, or add a teacher")
        as_found = LOSSES.get(config.tasks[name].soft.loss, f"tasks.{name}.soft.loss").takes_found
        found[name] = Subject(who, parts[name].strides, as_found)
    used = {member for subject in found.values() for member in subject.teachers}
    used |= {config.tapped_teacher(term).removeprefix("teachers.") for term in config.distill.values()}
    if idle := [name for name in members if name not in used]:
        raise UserError(f"teachers.{idle[0]}: teaches nothing: no task with an alpha above 0 that it knows, no term; take it out")
    return found


def _prove(config: Config, teachers: Teachers, parts: Mapping[str, Task], on: torch.device) -> None:
    """One black image through every teacher: what it returns is what was said of it."""
    for name, member in teachers.members.items():
        place = next(p for p in config.named_teachers if p.removeprefix("teachers.") == name)
        size = teachers.sights[name].own
        if isinstance(member.net, MultiTaskNet):
            show_nothing(
                member.net, size, f"teacher {config.named_teachers[place].path}" if name == "teacher" else f"teacher {name}"
            )
            view = member(torch.zeros(1, 3, *size, device=on))
        else:
            view = told(f"{place}.outputs", member, torch.zeros(1, 3, *size, device=on))
        for task, subject in teachers.subjects.items():
            if name not in subject.teachers:
                continue
            if task == "det" and not subject.as_found and not has_places(view.preds[task]):
                raise UserError(
                    f"tasks.{task}.soft.loss: {place} says finished detections, not what it thinks of each place; use det_boxes"
                )
            if len(member.known(task)) < len(parts[task].classes):
                lesson = member.lessons[task]
                unknown = ", ".join(c for i, c in enumerate(parts[task].classes) if i not in lesson.known)
                extra = f"; it has {', '.join(lesson.theirs[i] for i in lesson.extra)} besides" if lesson.extra else ""
                log.warning("%s does not know %s of '%s': left to the labels%s", place, unknown, task, extra)
    _through_fits(config, teachers, parts)


def _through_fits(config: Config, teachers: Teachers, parts: Mapping[str, Task]) -> None:
    """CrossKD needs one teacher of ours with the student's classes and cells."""
    for name, section in config.tasks.items():
        if not section.taught or section.soft.through == "student":
            continue
        who = teachers.subjects[name].teachers
        member = teachers.members[who[0]]
        fits = len(who) == 1 and isinstance(member.net, MultiTaskNet) and teachers.sights[who[0]].same
        if not (
            fits and member.tasks[name].strides == parts[name].strides and (name not in member.lessons or member.lessons[name].same)
        ):
            raise UserError(
                f"tasks.{name}.soft.through: teacher needs one checkpoint of ours with the student's classes, input and strides "
                f"{list(parts[name].strides)}; use student"
            )


def digest_parts(teachers: Teachers) -> dict[str, nn.Module]:
    """The networks whose weights decide what a run learns, by name."""
    return {name: member.net for name, member in teachers.members.items()}


Predictions = Mapping[str, Tensor]
