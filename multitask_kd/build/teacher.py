"""Config -> the teachers: where each comes from, what it knows of the student's classes, and who teaches
what."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..batch import Batch, ModelOutput
from ..checkpoint import load as load_checkpoint
from ..config import Config
from ..config import Teacher as Section
from ..distill.taps import Tapped
from ..distill.teacher import Subject, Teacher, Teachers
from ..errors import UserError, as_user_error, did_you_mean
from ..losses.base import LOSSES
from ..models.class_mapping import ClassMapping
from ..models.external import IMAGENET, ExternalModel
from ..models.multitask import MultiTaskNet, reads_encoder
from ..precision import resolve_amp
from ..registry import check_options
from ..sources import files
from ..sources.base import SOURCES, Source
from ..tasks.base import DEFAULT_KINDS, Task, build_task, kind_of
from .distill import compared_heads, dummy_forward, teacher_name, teacher_taps
from .net import check_classes, from_checkpoint

log = logging.getLogger(__name__)

_LIKE_NATIVE = (
    "torch",
    "legacy",
    "pickle",
    "broken zip",
)  # kinds of file that a checkpoint, or what was one, may seem to be
NATIVE = (
    "checkpoint",
    "ema",
    "self",
)  # sources of networks that this package built; SOURCES has those of all others


def check_teachers(config: Config) -> None:
    """Every name and option of the teachers, before anything is read. Raises UserError naming the key."""
    for key_path, section in config.named_teachers.items():
        _check_tasks_of(config, key_path, section)
        if section.source in NATIVE:
            continue
        if section.source not in SOURCES.names():
            known = did_you_mean(section.source, [*NATIVE, *SOURCES.names()])
            raise UserError(f"{key_path}.source: unknown teacher source '{section.source}'; {known}")
        kind = SOURCES.get(section.source, key_path)
        check_options(kind, section.options, f"{key_path}.options")
        if kind.reads_file and section.path is None:
            raise UserError(f"{key_path}.path: the source '{section.source}' needs one")
        if section.path is not None and not (kind.reads_file or kind.optional_path):
            raise UserError(f"{key_path}.path: the source '{section.source}' reads no file; leave it out")
        if section.trust_pickle and not kind.may_trust:
            raise UserError(
                f"{key_path}.trust_pickle: the source '{section.source}' never runs code from a file; leave "
                f"it out"
            )
        for name, term in config.distill.items():
            if config.tapped_teacher(term) == key_path and not kind.tappable:
                raise UserError(
                    f"distill.{name}.teacher: modules of a teacher from '{section.source}' cannot be tapped"
                )


def _check_tasks_of(config: Config, key_path: str, section: Section) -> None:
    """What a teacher says about tasks: their names, the options of its outputs, and no classes of a kind that
    has none."""
    known = dict.fromkeys([*config.tasks, *DEFAULT_KINDS])
    for key in ("classes", "outputs", "map"):
        for task in getattr(section, key):
            if task not in known:
                raise UserError(
                    f"{key_path}.{key}.{task}: there is no such task; {did_you_mean(task, known)}"
                )
            kind = kind_of(task, config.tasks[task].kind if task in config.tasks else None, f"tasks.{task}")
            if key != "outputs" and not kind.has_classes:
                raise UserError(
                    f"{key_path}.{key}.{task}: a task of kind '{kind.kind}' has no classes to name; leave it "
                    f"out"
                )
            if key == "outputs":
                check_options(kind.Output, section.outputs[task], f"{key_path}.outputs.{task}")
                as_user_error(f"{key_path}.outputs.{task}", kind.Output, **section.outputs[task])


Loaded = dict[str, Any]  # by key path: a checkpoint's content, or a Source


def read_teachers(config: Config) -> Loaded:
    """Open every teacher's file, so that a missing one is told before data is read. Nothing is opened where
    nothing is taught."""
    found: Loaded = {}
    for key_path, section in config.named_teachers.items():
        if section.source == "checkpoint":
            if Path(section.path).is_file():  # else, and where it is damaged, the next line tells
                _at(
                    key_path, files.expect, section.path, *_LIKE_NATIVE, for_what="checkpoint of this package"
                )
            found[key_path] = load_checkpoint(section.path, f"{key_path}.path")
        elif section.source not in NATIVE:
            found[key_path] = _source(section, key_path)
    return found


def _source(section: Section, key_path: str) -> Source:
    if section.path is not None and not Path(section.path).exists():
        raise UserError(f"{key_path}.path: there is no file {section.path}; correct the path")
    kind = SOURCES.get(section.source, key_path)
    return _at(key_path, kind, section.path, section.trust_pickle, **section.options)


def _at(key_path: str, make: Any, *args: Any, **kwargs: Any) -> Any:
    """What a source says of its keys, with the key path of the section before it."""
    try:
        return make(*args, **kwargs)
    except UserError as error:
        raise UserError(f"{key_path}.{error}") from None
    except ValueError as error:
        raise UserError(f"{key_path}.options: {error}") from None


def build_teachers(
    config: Config, loaded: Loaded, student: MultiTaskNet, parts: Mapping[str, Task], on: torch.device
) -> Teachers | None:
    """The frozen teachers. Raises UserError where what one says cannot be brought to the student's classes,
    pixels or cells."""
    if not config.distils or config.taught_by_itself:
        return None
    members = {}
    for key_path, section in config.named_teachers.items():
        name = teacher_name(key_path)
        if section.source == "ema":
            members[name] = _own_average(
                section, key_path, student, parts, on, teacher_taps(config, key_path)
            )
        else:
            members[name] = _member(config, key_path, section, loaded[key_path], parts, on)
    subjects = _subjects(config, members, parts)
    found = Teachers(members, subjects, config.data.input_size)
    _prove(config, found, parts, on)
    return found


def _own_average(
    section: Section,
    key_path: str,
    student: MultiTaskNet,
    parts: Mapping[str, Task],
    on: torch.device,
    taps: Sequence[str],
) -> Teacher:
    """A teacher whose weights start as the student's; the loop averages the student's into them."""
    return Teacher(copy.deepcopy(student), parts, on, resolve_amp(section.amp, on, f"{key_path}.amp"), taps)


def _member(
    config: Config, key_path: str, section: Section, loaded: Any, parts: Mapping[str, Task], on: torch.device
) -> Teacher:
    """One teacher with a file of its own."""
    if section.source == "checkpoint":
        net = from_checkpoint(loaded, f"{key_path}.path")
        theirs = _of_same_kind(key_path, loaded["arch"], parts)
        strides = {name: tuple(head.strides) for name, head in net.heads.items()}
    else:
        net, theirs = _external(config, key_path, section, loaded, parts, on)
        strides = {
            name: _own_strides(net.outputs[name], part) for name, part in parts.items() if name in theirs
        }
    size = section.input.size
    if isinstance(net, MultiTaskNet):
        _fits_strides(key_path, section, net, size or config.data.input_size)
    mappings = _mappings(config, key_path, section, theirs, parts)
    _compared_heads_agree(config, key_path, section, theirs, parts)
    tasks = {
        name: build_task(name, parts[name].kind, parts[name].classes, strides[name]) for name in mappings
    }
    for name, term in config.distill.items():
        if config.tapped_teacher(term) == key_path:
            Tapped(net, [term.teacher_path], f"distill.{name}.teacher")
    amp = resolve_amp(section.amp, on, f"{key_path}.amp")
    mappings = {name: mapping for name, mapping in mappings.items() if mapping is not None}
    return Teacher(net, tasks, on, amp, teacher_taps(config, key_path), mappings=mappings, size=size)


def _of_same_kind(
    key_path: str, arch: Mapping[str, Any], parts: Mapping[str, Task]
) -> dict[str, tuple[str, ...]]:
    """A checkpoint's classes by task. Raises UserError for a task of the student's that is of another kind
    there."""
    found = {}
    for name, part in arch["tasks"].items():
        kind = kind_of(name, part.get("kind"), f"{key_path}.path: arch.tasks.{name}").kind
        if name in parts and parts[name].kind != kind:
            raise UserError(
                f"{key_path}.path: the teacher's task '{name}' is of kind {kind}, the student's "
                f"{parts[name].kind}"
            )
        found[name] = tuple(part["classes"])
    return found


def _external(
    config: Config,
    key_path: str,
    section: Section,
    source: Source,
    parts: Mapping[str, Task],
    on: torch.device,
) -> tuple[ExternalModel, dict[str, tuple[str, ...]]]:
    """A network that is no checkpoint of this package, and its classes by task."""
    net = _at(key_path, source.load, on)
    theirs = _external_classes(section, source, parts)
    wanted = tuple(theirs) if section.tasks is None else section.tasks
    if lacking := [name for name in (*wanted, *section.outputs) if name not in theirs and name in parts]:
        raise UserError(
            f"{key_path}.classes.{lacking[0]}: the class names of '{lacking[0]}', in the network's order, "
            f"are needed"
        )
    if not wanted and section.tasks is None and not teacher_taps(config, key_path):
        raise UserError(_nothing_named(key_path, parts))
    if source.normalises and _normalised_twice(section):
        raise UserError(
            f"{key_path}.input: this network scales and normalises by itself; leave mean, std and scale out"
        )
    outputs = {name: parts[name].output_reader(section.outputs.get(name, {})) for name in wanted}
    mean, std = _mean_and_std(section, source)
    classes = {name: theirs[name] for name in outputs}
    counts = {name: len(names) for name, names in classes.items()}
    bgr, scale = section.input.order == "bgr", section.input.scale
    return ExternalModel(net, outputs, counts, mean=mean, std=std, bgr=bgr, scale=scale), classes


def _nothing_named(key_path: str, parts: Mapping[str, Task]) -> str:
    """What to say of a network whose tasks are unknown."""
    if named := [name for name, part in parts.items() if part.has_classes]:
        return (
            f"{key_path}.classes: the class names of {' or '.join(named)}, in the network's order, are needed"
        )
    return f"{key_path}.tasks: which of the tasks it predicts is needed: {', '.join(parts)}"


def _external_classes(
    section: Section, source: Source, parts: Mapping[str, Task]
) -> dict[str, tuple[str, ...]]:
    """The classes of a network from elsewhere by task: the config's, else what the source knows of the only
    task of that kind. A task without classes is among them where the config says that the network has it."""
    found: dict[str, tuple[str, ...]] = {}
    asked = section.tasks or tuple(parts)
    for kind, names in source.classes.items():
        if len(of_kind := [name for name in asked if name in parts and parts[name].kind == kind]) == 1:
            found[of_kind[0]] = tuple(names)
    found |= {name: tuple(names) for name, names in section.classes.items() if name in parts}
    classless = [
        name
        for name in (*(section.tasks or ()), *section.outputs)
        if name in parts and not parts[name].has_classes
    ]
    return found | {name: () for name in classless}


def _mean_and_std(section: Section, source: Source) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Of the input, in the range of ``input.scale``: the config's, else the source's, else ImageNet's; None
    for a network that normalises by itself."""
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


def _fits_strides(key_path: str, section: Section, net: MultiTaskNet, size: Sequence[int]) -> None:
    """Raise UserError where images of ``size`` are no multiples of the largest stride of a checkpoint of
    ours."""
    stride = max(net.strides)
    if any(n % stride for n in size):
        raise UserError(
            f"{key_path}.path: the teacher {section.path} needs images in multiples of {stride}, not "
            f"{list(size)}: "
            f"change data.input_size, or give {key_path}.input.size"
        )


def _mappings(
    config: Config,
    key_path: str,
    section: Section,
    theirs: Mapping[str, Sequence[str]],
    parts: Mapping[str, Task],
) -> dict[str, ClassMapping | None]:
    """By task: how the teacher's classes become the student's; None for a kind without classes. A task
    without a common class is left out unless it was asked for."""
    found: dict[str, ClassMapping | None] = {}
    for name, names in theirs.items():
        if name not in parts or (section.tasks is not None and name not in section.tasks):
            continue
        if not parts[name].has_classes:
            found[name] = None
            continue
        _check_names(key_path, section, name, names, parts[name].classes)
        try:
            found[name] = ClassMapping(names, parts[name].classes, section.map.get(name))
        except ValueError as error:
            asked = (
                name in (section.tasks or ())
                or name in section.map
                or (config.tasks[name].taught and len(config.named_teachers) == 1)
            )
            if asked:
                where = (
                    f".map.{name}"
                    if name in section.map
                    else f".classes.{name}"
                    if name in section.classes
                    else ""
                )
                hint = "" if name in section.map else f"; say which is which in {key_path}.map.{name}"
                raise UserError(f"{key_path}{where}: {error}{hint}") from None
    for name in section.tasks or ():
        if name not in found:
            raise UserError(f"{key_path}.tasks: the teacher has no '{name}'; it has {', '.join(theirs)}")
    return found


def _check_names(
    key_path: str, section: Section, task: str, theirs: Sequence[str], ours: Sequence[str]
) -> None:
    """Raise UserError for a name in ``map`` that is no class, and for two classes of one name that is the
    student's."""
    names = section.map.get(task, {})
    for their, our in names.items():
        if their not in theirs:
            turned = (
                f"; the teacher's name comes first, as in {our}: {their}"
                if their in ours and our in theirs
                else ""
            )
            raise UserError(
                f"{key_path}.map.{task}.{their}: the teacher has no class "
                f"'{their}'{turned or '; ' + did_you_mean(their, theirs)}"
            )
        if our is not None and our not in ours:
            raise UserError(
                f"{key_path}.map.{task}.{their}: the student has no class '{our}'; {did_you_mean(our, ours)}"
            )
    if twice := [n for k, n in enumerate(theirs) if n in theirs[:k] and n in ours and n not in names]:
        raise UserError(
            f"{key_path}.classes.{task}: '{twice[0]}' is there twice; a network's classes have names of "
            f"their own"
        )


def _compared_heads_agree(
    config: Config,
    key_path: str,
    section: Section,
    theirs: Mapping[str, Sequence[str]],
    parts: Mapping[str, Task],
) -> None:
    """Raise UserError where heads that a term of ``distill`` compares channel by channel have not the same
    classes in one order."""
    for task in compared_heads(config, key_path):
        check_classes(
            {task: parts[task].classes}, theirs, [task], f"{key_path}.path: the teacher {section.path}"
        )


def _subjects(
    config: Config, members: Mapping[str, Teacher], parts: Mapping[str, Task]
) -> dict[str, Subject]:
    """Who teaches each task that is taught."""
    found = {}
    for name in (name for name, task in config.tasks.items() if task.taught):
        who = [member for member, teacher in members.items() if name in teacher.tasks]
        if not who:
            left_out = [
                p for p, t in config.named_teachers.items() if t.tasks is not None and name not in t.tasks
            ]
            nameless = [
                p
                for p, t in config.named_teachers.items()
                if t.source in SOURCES.names() and name not in t.classes
            ]
            how = "name its classes in {}.classes.{}"
            how = how if parts[name].has_classes else "say how to read it in {}.outputs.{}"
            more = f", or {how.format(nameless[0], name)}" if nameless else ""
            more = f", or add it to {left_out[0]}.tasks" if left_out else more
            raise UserError(
                f"tasks.{name}.alpha: it is above 0, but no teacher knows '{name}'; set it to 0, or add a "
                f"teacher{more}"
            )
        form = LOSSES.get(config.tasks[name].soft.loss, f"tasks.{name}.soft.loss").form
        found[name] = Subject(parts[name], who, form)
    used = {member for subject in found.values() for member in subject.teachers}
    used |= {teacher_name(config.tapped_teacher(term)) for term in config.distill.values()}
    if idle := [name for name in members if name not in used]:
        raise UserError(
            f"teachers.{idle[0]}: teaches nothing: no task with an alpha above 0 that it knows, no term; "
            f"take it out"
        )
    return found


def _prove(config: Config, teachers: Teachers, parts: Mapping[str, Task], on: torch.device) -> None:
    """An image or two through every teacher: what it returns is what the config says of it."""
    for key_path, section in config.named_teachers.items():
        name = teacher_name(key_path)
        member, size = teachers.members[name], teachers.geometries[name].own
        if isinstance(member.net, MultiTaskNet):
            dummy_forward(member.net, size, f"teacher {section.path if name == 'teacher' else name}")
            output = member(torch.zeros(1, 3, *size, device=on))
        else:
            output = _tried(key_path, member, size, on)
        for task, subject in teachers.subjects.items():
            if name not in subject.teachers:
                continue
            if fault := parts[task].why_not(output.preds[task], subject.form, key_path):
                raise UserError(f"tasks.{task}.soft.loss: {fault}")
            if len(member.known(task)) < len(parts[task].classes):
                renamed = section.map.get(task, {})
                log.warning(
                    "%s %s", key_path, _unknown_classes(key_path, task, member.mappings[task], renamed)
                )
    if any(len(subject.teachers) > 1 for subject in teachers.subjects.values()):
        # a kind that cannot average says so now
        teachers(Batch(torch.zeros(1, 3, *config.data.input_size, device=on)))
    _through_fits(config, teachers, parts)


def _tried(key_path: str, member: Teacher, size: Sequence[int], on: torch.device) -> ModelOutput:
    """What a network from elsewhere predicts for two images, one black, one of all brightnesses. Raises
    UserError where that cannot be so."""
    images = torch.stack(
        [torch.zeros(3, *size), torch.linspace(0, 1, 3 * size[0] * size[1]).view(3, *size)]
    ).to(on)
    try:
        with torch.no_grad():  # in float32: probabilities rounded to bf16 do not add up to 1
            for task, pred in member.net(images).preds.items():
                if fault := member.net.outputs[task].fault(pred):
                    raise UserError(f"{key_path}.outputs.{task}{fault}")
        return member(images)
    except UserError as error:  # of a source: begins with its key
        text = str(error)
        raise UserError(text if text.startswith(key_path) else f"{key_path}.{text}") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the network does
        task, colon, what = str(error).partition(": ")
        if isinstance(error, ValueError) and colon and task in member.net.outputs:
            raise UserError(f"{key_path}.outputs.{task}: {what}") from None
        raise UserError(
            f"{key_path}.path: the network fails on images of {size[0]} x {size[1]} (height x width; "
            f"{files.first_line(error)}); "
            f"is {key_path}.input.size a size that it takes?"
        ) from error


def _unknown_classes(
    key_path: str, task: str, mapping: ClassMapping, renamed: Mapping[str, str | None]
) -> str:
    """Which of the student's classes a teacher does not know, and whether one of its own looks like one of
    them. renamed: the names that the config maps already."""
    text = f"does not know {', '.join(mapping.unknown)} of '{task}': left to the labels"
    text += f"; it has {', '.join(mapping.unused)} besides" if mapping.unused else ""
    plain = {_plain(name): name for name in mapping.unknown}
    unmapped = [name for name in mapping.unused if name not in renamed]
    near = [(name, difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.8)) for name in unmapped]
    same = ", ".join(f"{name}: {plain[found[0]]}" for name, found in near if found)
    return text + (f". If they are the same, write {key_path}.map.{task} {{{same}}}" if same else "")


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def _through_fits(config: Config, teachers: Teachers, parts: Mapping[str, Task]) -> None:
    """Raise UserError where CrossKD has not what it needs: one checkpoint of this package with the student's classes and
    cells."""
    for name, section in config.tasks.items():
        if not section.taught or section.soft.through == "student":
            continue
        if reads_encoder(kind_of(name, section.kind, f"tasks.{name}").Head):
            raise UserError(
                f"tasks.{name}.soft.through: teacher needs a head that reads the pyramid, not the encoder; "
                "use student"
            )
        who = teachers.subjects[name].teachers
        member = teachers.members[who[0]]
        fits = len(who) == 1 and isinstance(member.net, MultiTaskNet) and teachers.geometries[who[0]].same
        if not (
            fits
            and member.tasks[name].strides == parts[name].strides
            and (name not in member.mappings or member.mappings[name].same)
        ):
            raise UserError(
                f"tasks.{name}.soft.through: teacher needs one checkpoint of this package with the student's "
                f"classes, input and strides "
                f"{list(parts[name].strides)}; use student"
            )
