"""Config -> the teachers: where each comes from, what it knows of the student's classes, and who teaches what."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import DensePredictions, PaddedDetections, ModelOutput
from .distill import compared_heads, dummy_forward, teacher_name, teacher_taps
from .net import check_classes, from_checkpoint
from ..checkpoint import load as load_checkpoint
from ..config import Config
from ..config import Teacher as Section
from ..distill.class_mapping import ClassMapping
from ..distill.taps import Tapped
from ..distill.teacher import Subject, Teacher, Teachers, has_places
from ..errors import UserError, did_you_mean, as_user_error
from ..losses.base import LOSSES
from ..models.multitask import MultiTaskNet
from ..precision import resolve_amp
from ..registry import check_options
from ..sources import files
from ..sources.base import SOURCES, Source
from ..models.external import IMAGENET, OUTPUTS, ExternalModel
from ..tasks.base import TASKS, Task

log = logging.getLogger(__name__)

_LIKE_OURS = ("torch", "legacy", "pickle", "broken zip")  # kinds of file that a checkpoint, or what was one, may seem to be
OF_OURS = ("checkpoint", "ema", "self")  # sources of networks that this package built; SOURCES has those of all others


def check_teachers(config: Config) -> None:
    """Every name and option of the teachers, before anything is read. Raises UserError naming the key."""
    for place, section in config.named_teachers.items():
        if section.source in OF_OURS:
            continue
        if section.source not in SOURCES.names():
            known = did_you_mean(section.source, [*OF_OURS, *SOURCES.names()])
            raise UserError(f"{place}.source: unknown teacher source '{section.source}'; {known}")
        kind = SOURCES.get(section.source, place)
        check_options(kind, section.options, f"{place}.options")
        if kind.reads_file and section.path is None:
            raise UserError(f"{place}.path: the source '{section.source}' needs one")
        if section.path is not None and not (kind.reads_file or kind.optional_path):
            raise UserError(f"{place}.path: the source '{section.source}' reads no file; leave it out")
        if section.trust_pickle and not kind.may_trust:
            raise UserError(f"{place}.trust_pickle: the source '{section.source}' never runs code from a file; leave it out")
        for key in ("classes", "outputs"):
            if unknown := [task for task in getattr(section, key) if task not in OUTPUTS]:
                raise UserError(f"{place}.{key}.{unknown[0]}: there is no such task; {did_you_mean(unknown[0], OUTPUTS)}")
        for task, options in section.outputs.items():
            check_options(OUTPUTS[task], options, f"{place}.outputs.{task}")
            as_user_error(f"{place}.outputs.{task}", OUTPUTS[task], **options)
        for name, term in config.distill.items():
            if config.tapped_teacher(term) == place and not kind.tappable:
                raise UserError(f"distill.{name}.teacher: modules of a teacher from '{section.source}' cannot be tapped")


Loaded = dict[str, Any]  # by place: a checkpoint's content, or a Source


def read_teachers(config: Config) -> Loaded:
    """Open every teacher's file, so that a missing one is told before data is read. Nothing is opened where nothing is taught."""
    found: Loaded = {}
    for place, section in config.named_teachers.items():
        if section.source == "checkpoint":
            if Path(section.path).is_file():  # else, and where it is damaged, the next line tells
                _at(place, files.expect, section.path, *_LIKE_OURS, for_what="checkpoint of ours")
            found[place] = load_checkpoint(section.path, f"{place}.path")
        elif section.source not in OF_OURS:
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
        name = teacher_name(place)
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
) -> tuple[ExternalModel, dict[str, tuple[str, ...]]]:
    """A network that is no checkpoint of ours, and its classes by task."""
    net = _at(place, source.load, on)
    theirs = {name: tuple(names) for name, names in {**source.classes, **section.classes}.items() if name in parts}
    wanted = tuple(theirs) if section.tasks is None else section.tasks
    if lacking := [name for name in (*wanted, *section.outputs) if name not in theirs and name in parts]:
        raise UserError(f"{place}.classes.{lacking[0]}: the class names of '{lacking[0]}', in the network's order, are needed")
    if not wanted and section.tasks is None and not teacher_taps(config, place):
        raise UserError(f"{place}.classes: the class names of {' or '.join(parts)}, in the network's order, are needed")
    if source.normalises and _normalised_twice(section):
        raise UserError(f"{place}.input: this network scales and normalises by itself; leave mean, std and scale out")
    outputs = {}
    for name in wanted:
        options = dict(section.outputs.get(name, {}))
        if name == "det" and options.get("form", "auto") in ("auto", "cells"):
            options.setdefault("strides", list(parts[name].strides))
        outputs[name] = OUTPUTS[name](**options)
    mean, std = _mean_and_std(section, source)
    classes = {name: theirs[name] for name in outputs}
    counts = {name: len(names) for name, names in classes.items()}
    bgr, scale = section.input.order == "bgr", section.input.scale
    return ExternalModel(net, outputs, counts, mean=mean, std=std, bgr=bgr, scale=scale), classes


def _mean_and_std(section: Section, source: Source) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Of the input, in the range of ``input.scale``: the config's, else the source's, else ImageNet's; None for a network that
    normalises by itself."""
    given, scale = section.input, section.input.scale
    if given.mean is not None:  # and std: the config has both or none
        return given.mean, given.std
    if source.normalises:
        return None, None
    return [scale * x for x in source.mean or IMAGENET[0]], [scale * x for x in source.std or IMAGENET[1]]


def _normalised_twice(section: Section) -> bool:
    """Whether the config asks for a scale, mean or std that changes anything."""
    given = section.input
    return given.scale != 1 or bool(set(given.mean or ()) - {0.0} or set(given.std or ()) - {1.0})


def _own_strides(output: Any, part: Task) -> tuple[int, ...]:
    return getattr(output, "strides", None) or part.strides


def _fits_strides(place: str, section: Section, net: MultiTaskNet, size: Sequence[int]) -> None:
    """Raise UserError where images of ``size`` are no multiples of the largest stride of a checkpoint of ours."""
    stride = max(net.strides)
    if any(n % stride for n in size):
        raise UserError(
            f"{place}.path: the teacher {section.path} needs images in multiples of {stride}, not {list(size)}: "
            f"change data.input_size, or give {place}.input.size"
        )


def _lessons(
    config: Config, place: str, section: Section, theirs: Mapping[str, Sequence[str]], parts: Mapping[str, Task]
) -> dict[str, ClassMapping]:
    """By task: how the teacher's classes become the student's. One without a common class is left out unless it was asked for."""
    found = {}
    for name, names in theirs.items():
        if name not in parts or (section.tasks is not None and name not in section.tasks):
            continue
        _check_names(place, section, name, names, parts[name].classes)
        try:
            found[name] = ClassMapping(names, parts[name].classes, section.map.get(name))
        except ValueError as error:
            asked = (
                name in (section.tasks or ())
                or name in section.map
                or (config.tasks[name].taught and len(config.named_teachers) == 1)
            )
            if asked:
                where = f".map.{name}" if name in section.map else f".classes.{name}" if name in section.classes else ""
                hint = "" if name in section.map else f"; say which is which in {place}.map.{name}"
                raise UserError(f"{place}{where}: {error}{hint}") from None
    for name in section.tasks or ():
        if name not in found:
            raise UserError(f"{place}.tasks: the teacher has no '{name}'; it has {', '.join(theirs)}")
    return found


def _check_names(place: str, section: Section, task: str, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Raise UserError for a name in ``map`` that is no class, and for two classes of one name that is the student's."""
    names = section.map.get(task, {})
    for their, our in names.items():
        if their not in theirs:
            turned = f"; the teacher's name comes first, as in {our}: {their}" if their in ours and our in theirs else ""
            raise UserError(
                f"{place}.map.{task}.{their}: the teacher has no class '{their}'{turned or '; ' + did_you_mean(their, theirs)}"
            )
        if our is not None and our not in ours:
            raise UserError(f"{place}.map.{task}.{their}: the student has no class '{our}'; {did_you_mean(our, ours)}")
    if twice := [n for k, n in enumerate(theirs) if n in theirs[:k] and n in ours and n not in names]:
        raise UserError(f"{place}.classes.{task}: '{twice[0]}' is there twice; a network's classes have names of their own")


def _compared_heads_agree(
    config: Config, place: str, section: Section, theirs: Mapping[str, Sequence[str]], parts: Mapping[str, Task]
) -> None:
    """Raise UserError where heads that a term of ``distill`` compares channel by channel have not the same classes in one order."""
    for task in compared_heads(config, place):
        check_classes({task: parts[task].classes}, theirs, [task], f"{place}.path: the teacher {section.path}")


def _subjects(config: Config, members: Mapping[str, Teacher], parts: Mapping[str, Task]) -> dict[str, Subject]:
    """Who teaches each task that is taught."""
    found = {}
    for name in (name for name, task in config.tasks.items() if task.taught):
        who = [member for member, teacher in members.items() if name in teacher.tasks]
        if not who:
            left_out = [p for p, t in config.named_teachers.items() if t.tasks is not None and name not in t.tasks]
            nameless = [p for p, t in config.named_teachers.items() if t.source in SOURCES.names() and name not in t.classes]
            more = f", or name its classes in {nameless[0]}.classes.{name}" if nameless else ""
            more = f", or add it to {left_out[0]}.tasks" if left_out else more
            raise UserError(
                f"tasks.{name}.alpha: it is above 0, but no teacher knows '{name}'; set it to 0, or add a teacher{more}"
            )
        as_found = LOSSES.get(config.tasks[name].soft.loss, f"tasks.{name}.soft.loss").takes_found
        found[name] = Subject(who, parts[name].strides, as_found)
    used = {member for subject in found.values() for member in subject.teachers}
    used |= {teacher_name(config.tapped_teacher(term)) for term in config.distill.values()}
    if idle := [name for name in members if name not in used]:
        raise UserError(f"teachers.{idle[0]}: teaches nothing: no task with an alpha above 0 that it knows, no term; take it out")
    return found


def _prove(config: Config, teachers: Teachers, parts: Mapping[str, Task], on: torch.device) -> None:
    """An image or two through every teacher: what it returns is what was said of it."""
    for place, section in config.named_teachers.items():
        name = teacher_name(place)
        member, size = teachers.members[name], teachers.sights[name].own
        if isinstance(member.net, MultiTaskNet):
            dummy_forward(member.net, size, f"teacher {section.path if name == 'teacher' else name}")
            view = member(torch.zeros(1, 3, *size, device=on))
        else:
            view = _shown(place, member, size, on)
        for task, subject in teachers.subjects.items():
            if name not in subject.teachers:
                continue
            said = view.preds[task]
            if task == "det" and not subject.as_found and not has_places(said):
                what = (
                    f"{place} predicts at places that are not known: give {place}.outputs.det.strides, and anchors; or"
                    if isinstance(said, DensePredictions)
                    else f"{place} says finished detections, not what it thinks of each place;"
                )
                raise UserError(f"tasks.{task}.soft.loss: {what} use det_boxes")
            if len(member.known(task)) < len(parts[task].classes):
                log.warning("%s %s", place, _unknown_classes(place, task, member.lessons[task]))
    _through_fits(config, teachers, parts)


def _shown(place: str, member: Teacher, size: Sequence[int], on: torch.device) -> ModelOutput:
    """What a foreign network says of two images, one black, one of all brightnesses. Raises UserError where it cannot be so."""
    images = torch.stack([torch.zeros(3, *size), torch.linspace(0, 1, 3 * size[0] * size[1]).view(3, *size)]).to(on)
    try:
        with torch.no_grad(), torch.autocast(on.type, member.amp, enabled=member.amp is not None):
            for task, said in member.net(images).preds.items():
                _check_range(f"{place}.outputs.{task}", member.net.outputs[task], said)
        return member(images)
    except UserError as error:  # of a source: begins with its key
        text = str(error)
        raise UserError(text if text.startswith(place) else f"{place}.{text}") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the network does
        task, colon, what = str(error).partition(": ")
        if isinstance(error, ValueError) and colon and task in OUTPUTS:
            raise UserError(f"{place}.outputs.{task}: {what}") from None
        raise UserError(
            f"{place}.path: the network fails on images of {size[0]} x {size[1]} (height x width; {files.first_line(error)}); "
            f"is {place}.input.size a size that it takes?"
        ) from error


def _check_range(where: str, output: Any, said: Any) -> None:
    """Raise UserError for probabilities that are called logits, and the other way round."""
    if isinstance(said, Tensor) and said.dim() == 4:
        said = said.float()
        likely = bool((said >= 0).all()) and bool(((said.sum(1) - 1).abs() < 1e-3).all())
        if output.form == "logits" and said.shape[1] > 1 and likely:
            raise UserError(f"{where}.form: the network's values are probabilities, which add up to 1; set it to probability")
        if output.form == "probability" and bool((said > 1e-3).any()):  # logarithms here
            raise UserError(f"{where}.form: the network's values reach {float(said.max().exp()):.3g}, so they are no probabilities")
        if output.form == "probability" and bool(((said.exp().sum(1) - 1).abs() > 0.02).any()):
            raise UserError(f"{where}.form: the network's values do not add up to 1: they are no probabilities; set it to logits")
    elif isinstance(said, (DensePredictions, PaddedDetections)) and said.scores.numel():
        low, high = float(said.scores.min()), float(said.scores.max())
        if low < -1e-3 or high > 1 + 1e-3:
            way = "; set scores to logit" if isinstance(said, DensePredictions) else ""
            raise UserError(f"{where}: the network's scores go from {low:.3g} to {high:.3g}, so they are no probabilities{way}")


def _unknown_classes(place: str, task: str, lesson: ClassMapping) -> str:
    """Which of the student's classes a teacher does not know, and whether one of its own looks like one of them."""
    text = f"does not know {', '.join(lesson.unknown)} of '{task}': left to the labels"
    text += f"; it has {', '.join(lesson.unused)} besides" if lesson.unused else ""
    plain = {_plain(name): name for name in lesson.unknown}
    near = [(name, difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.8)) for name in lesson.unused]
    same = ", ".join(f"{name}: {plain[found[0]]}" for name, found in near if found)
    return text + (f". If they are the same, write {place}.map.{task} {{{same}}}" if same else "")


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def _through_fits(config: Config, teachers: Teachers, parts: Mapping[str, Task]) -> None:
    """Raise UserError where CrossKD has not what it needs: one teacher of ours with the student's classes and cells."""
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
