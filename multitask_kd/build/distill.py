"""Config -> what teaches: soft losses, terms between taps, balance, and the weights of them all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import Config, Section, parse_schedule
from ..distill.balance import BALANCES, Balance
from ..distill.crosshead import CrossHead
from ..distill.distiller import Distiller, Soft
from ..distill.objective import Objective, task_weights
from ..distill.schedules import KINDS as SCHEDULES
from ..distill.schedules import Schedule
from ..distill.taps import Tapped
from ..distill.teacher import Teachers
from ..distill.term import Term, as_map
from ..errors import UserError, as_user_error, did_you_mean
from ..losses.base import LOSSES, SoftLoss
from ..models.multitask import MultiTaskNet
from ..models.necks import level_name
from ..models.teacher_geometry import TeacherGeometry
from ..registry import check_options, options_of
from ..tasks.base import Task, kind_of

log = logging.getLogger(__name__)

Moving = dict[str, Schedule]  # option of a loss -> the schedule that changes it


def build_soft(task: str, section: Any) -> tuple[SoftLoss, Moving]:
    """The soft loss of a task, and which of its options are scheduled."""
    where = f"tasks.{task}.soft"
    kind, of_task = (
        LOSSES.get(section.soft.loss, f"{where}.loss"),
        kind_of(task, section.kind, f"tasks.{task}").kind,
    )
    if of_task not in kind.kinds:
        fitting = [n for n in LOSSES.names() if of_task in LOSSES.get(n, where).kinds]
        raise UserError(
            f"{where}.loss: '{section.soft.loss}' does not fit this task; {did_you_mean('', fitting)}"
        )
    return soft_loss(section.soft, where)


def soft_loss(section: Any, where: str, channels: int = 1) -> tuple[SoftLoss, Moving]:
    """The loss that ``section`` names, with its options' first values, and the options that are scheduled.

    channels: of the maps that it compares, for a loss that learns something of its own.
    """
    kind = LOSSES.get(section.loss, f"{where}.loss")
    plain, moving = dict(section.options), {}
    given = (channels,) if kind.learns else ()
    for key, value in section.options.items():
        if not (isinstance(value, dict) and "schedule" in value):
            continue
        key_path = f"{where}.options.{key}"
        if key not in options_of(kind):
            check_options(kind, {key: value}, f"{where}.options")  # says what it may have meant
        if key not in kind.scheduled:
            raise UserError(
                f"{key_path}: takes no schedule; of '{section.loss}' "
                f"{', '.join(kind.scheduled) or 'nothing'} may change"
            )
        parsed = parse_schedule(value, key_path)
        for extreme in parsed.extremes():  # each has to be a value that the option may have
            as_user_error(
                key_path,
                LOSSES.build,
                section.loss,
                {**_unscheduled(plain), key: extreme},
                f"{where}.options",
                *given,
            )
        moving[key] = schedule(parsed)
        plain[key] = moving[key](0.0)
    loss = as_user_error(f"{where}.options", LOSSES.build, section.loss, plain, f"{where}.options", *given)
    return loss, moving


def _unscheduled(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if not isinstance(v, dict)}


def schedule(value: Any) -> Schedule:
    """A number or a schedule's section -> a function of progress."""
    if not isinstance(value, Section):
        return SCHEDULES["constant"](float(value))
    options = value.model_dump()
    return SCHEDULES[options.pop("schedule")](**options)


def compared_heads(config: Config, key_path: str | None = None) -> set[str]:
    """Tasks whose heads' outputs a term compares channel by channel, so that the classes have to be the same;
    with the teacher at ``key_path``, or any."""
    terms = [t for t in config.distill.values() if key_path is None or config.tapped_teacher(t) == key_path]
    return {term.head for term in terms if term.head in config.tasks and term.align != "conv"}


def teacher_name(key_path: str) -> str:
    """What the teacher at ``key_path`` of the config is called among ``Teachers``: "teacher", or its name in
    ``teachers``."""
    return key_path.removeprefix("teachers.")


def teacher_taps(config: Config, key_path: str) -> list[str]:
    """Modules of the teacher at ``key_path`` whose outputs ``distill`` compares."""
    return [
        section.teacher_path
        for section in config.distill.values()
        if config.tapped_teacher(section) == key_path
    ]


def build_distiller(
    config: Config,
    net: MultiTaskNet,
    parts: dict[str, Task],
    teachers: Teachers | None,
    unlabelled: Sequence[str] = (),
) -> tuple[Distiller, dict[str, Schedule]]:
    """All that learns, and the schedules of losses' options by their key path. unlabelled: tasks without any
    label."""
    moving: list[tuple[Any, str, Schedule]] = []
    schedules: dict[str, Schedule] = {}

    def note(loss: SoftLoss, options: Moving, where: str) -> SoftLoss:
        for key, change in options.items():
            moving.append((loss, key, change))
            schedules[f"{where}.{key}"] = change
        return loss

    soft = {}
    for name, section in config.tasks.items():
        if section.taught:
            loss = note(*build_soft(name, section), f"tasks.{name}.soft.options")
            known = teachers.known(name)
            known = None if len(known) == len(parts[name].classes) else known
            soft[name] = Soft(section.soft.loss, loss, _cross_head(name, section, net, teachers), known)
    terms = {}
    shapes, overwritten = _tap_shapes(config, net, teachers)
    for name, section in config.distill.items():
        where = f"distill.{name}"
        tap, geometry = section.teacher_path, TeacherGeometry(config.data.input_size, config.data.input_size)
        if teachers is not None:
            who = teacher_name(config.tapped_teacher(section))
            tap, geometry = teachers.tap_name(who, tap), teachers.geometries[who]
        terms[name], options = _term(where, section, shapes, tap, geometry, parts)
        note(terms[name].loss, options, f"{where}.options")
    distiller = Distiller(
        net, parts, soft, terms, own_teacher=bool(terms) and teachers is None, unlabelled=unlabelled
    )
    distiller.tapped.copied |= overwritten["student"]
    for name, member in teachers.members.items() if teachers else ():
        member.tapped.copied |= overwritten[name]
    distiller.balance = build_balance(config, distiller.loss_names())
    for owner, attribute, change in moving:
        distiller.add_schedule(owner, attribute, change)
    return distiller, schedules


def _cross_head(name: str, section: Any, net: MultiTaskNet, teachers: Teachers) -> CrossHead | None:
    if section.soft.through == "student":
        return None
    taught_by = teachers.members[teachers.subjects[name].teachers[0]]
    levels = {s: f"neck.{level_name(s)}" for s in taught_by.net.heads[name].strides}
    widths = {s: (net.neck.width_at(s), taught_by.net.neck.width_at(s)) for s in levels}
    return CrossHead(taught_by.net.heads[name], levels, widths)


def dummy_forward(net: nn.Module, size: Sequence[int], who: str) -> None:
    """One black image of ``size`` through ``net``, in eval. Raises UserError where the network cannot take
    it."""
    training, image = net.training, torch.zeros(1, 3, *size, device=next(net.parameters()).device)
    with torch.no_grad():
        as_user_error(f"data.input_size: the {who} cannot take {list(size)}", net.eval(), image)
    net.train(training)


Shapes = dict[
    tuple[str, str], tuple[Any, int]
]  # by (side, tap's name): what it puts out for one image, how often in a pass


def _tap_shapes(
    config: Config, net: MultiTaskNet, teachers: Teachers | None
) -> tuple[Shapes, dict[str, set[str]]]:
    """The shapes of every tap of ``distill``; and by "student" or teacher the taps that a module after them
    writes over."""
    own = [t.student for t in config.distill.values()]
    sides: dict[str, tuple[str, nn.Module, list[str], Any]] = {
        "student": ("student", net, own, config.data.input_size)
    }
    if teachers is None:  # its own deeper layers teach, through the same hooks
        other = [t.teacher_path for t in config.distill.values()]
        sides["student"] = ("student", net, [*own, *other], config.data.input_size)
        sides["teacher"] = ("teacher", net, other, config.data.input_size)
    else:
        for name, member in teachers.members.items():
            sides[name] = ("teacher", member.net, list(member.tapped.paths), teachers.geometries[name].own)
    found: Shapes = {}
    overwritten: dict[str, set[str]] = {name: set() for name in sides}
    for name, (side, model, paths, size) in sides.items():
        if not paths:
            continue
        tapped = Tapped(model, paths)
        with tapped as taps:
            dummy_forward(model, size, side)
        overwritten[name] = set(tapped.overwritten())
        for path in sorted(overwritten[name]):
            log.info(
                "distill: the %s's %s is written over by a module after it; it is copied before that",
                side,
                path,
            )
        plain = name == "student" or teachers is None
        for path in paths:
            found[side, path if plain else teachers.tap_name(name, path)] = (
                taps.get(path),
                tapped.calls[path],
            )
    return found, overwritten


def _term(
    where: str,
    section: Any,
    shapes: Shapes,
    teacher_tap: str,
    geometry: TeacherGeometry,
    tasks: Mapping[str, Task],
) -> tuple[Term, Moving]:
    """A term of ``distill``, and which options of its loss are scheduled. teacher_tap: what its tap on the
    teacher is called;
    geometry: how that teacher is shown the images.

    Raises UserError where its taps do not give what its loss compares.
    """
    kind = LOSSES.get(section.loss, f"{where}.loss")
    paths = {"student": section.student, "teacher": teacher_tap}
    for side, path in paths.items():
        _check_tap(where, side, path, *shapes[side, path])
    if kind.form:
        raise UserError(
            f"{where}.loss: '{section.loss}' learns from {kind.form}, not from taps; use it as "
            f"tasks.<task>.soft.loss"
        )
    if _compares_heads(section, kind, tasks):
        own, other = (list(shapes[side, path][0].shape[1:]) for side, path in paths.items())
        if own != other or not geometry.same:
            path = section.student
            raise UserError(
                f"{where}: {path} of the student gives {own}, of the teacher {other}; both need the same "
                f"strides"
            )
        loss, options = soft_loss(section, where)
        return Term(*paths.values(), loss, None, align=False, size=section.size, task=section.head), options
    return _term_of_maps(where, section, kind, shapes, paths, geometry, tasks)


def _check_tap(where: str, side: str, path: str, tap: Any, calls: int) -> None:
    """Raise UserError for a tap that does not fire once a pass, or not for a whole image."""
    if not calls:
        raise UserError(
            f"{where}.{side}: the module '{path}' is never called, so nothing can be learnt there; tap one "
            f"inside it"
        )
    if calls > 1:
        raise UserError(
            f"{where}.{side}: the module '{path}' is called {calls} times in one pass; tap one around it"
        )
    if isinstance(tap, torch.Tensor) and tap.shape[:1] != (1,):
        raise UserError(
            f"{where}.{side}: '{path}' gives {list(tap.shape)} for one image (windows?); tap a module around "
            f"it"
        )


def _compares_heads(section: Any, kind: type[SoftLoss], tasks: Mapping[str, Task]) -> bool:
    """Whether a term compares the predictions of one task as they are."""
    plain = section.align == section.norm == "auto" and section.size == "smaller"
    return section.head in tasks and tasks[section.head].kind in kind.kinds and plain


def _term_of_maps(
    where: str,
    section: Any,
    kind: type[SoftLoss],
    shapes: Shapes,
    paths: Mapping[str, str],
    geometry: TeacherGeometry,
    tasks: Mapping[str, Task],
) -> tuple[Term, Moving]:
    """A term between feature maps, brought to one size and to the same channels."""
    sizes = {"student": geometry.student, "teacher": geometry.own}
    if not kind.maps:
        heads = [f"heads.{name}" for name, task in tasks.items() if task.kind in kind.kinds] or [
            "a head of its kind"
        ]
        fits = f"{' or '.join(heads)}, without align, norm and size,"
        raise UserError(f"{where}.loss: '{section.loss}' compares predictions; tap {fits} on both sides")
    for side, path in paths.items():
        head = path.rpartition(":")[2].removeprefix("heads.")
        if head in tasks and not tasks[head].is_map:
            raise UserError(
                f"{where}.{side}: '{path}' gives predictions that are no map; tap neck.* or inside the head"
            )
    maps = [
        as_user_error(f"{where}.{side}: '{path}'", as_map, shapes[side, path][0], sizes[side])
        for side, path in paths.items()
    ]
    channels, head = tuple(m.shape[1] for m in maps), section.head in tasks
    align = kind.same_channels and (section.align == "conv" or (section.align == "auto" and not head))
    if section.align == "conv" and not kind.same_channels:
        raise UserError(
            f"{where}.align: '{section.loss}' compares maps of any channels, so nothing is aligned; use auto "
            f"or none"
        )
    if kind.same_channels and not align and channels[0] != channels[1]:
        raise UserError(
            f"{where}.align: none, but the student has {channels[0]} channels there and the teacher "
            f"{channels[1]}; use conv"
        )
    if section.norm == "batch" and not kind.same_channels:
        raise UserError(
            f"{where}.norm: '{section.loss}' compares maps of any channels as they are; use auto or none"
        )
    loss, options = soft_loss(section, where, channels[1])
    norm = section.norm == "batch" or (section.norm == "auto" and kind.norm and not head)
    shown = None if geometry.same else geometry
    return Term(
        *paths.values(), loss, channels, align=align, norm=norm, size=section.size, geometry=shown
    ), options


def build_balance(config: Config, losses: Sequence[str]) -> Balance | None:
    """The balance of the config for ``losses``; for none of them only its name and options are checked."""
    method, options = config.balance.method, config.balance.options
    if method == "fixed":
        if options:
            raise UserError(f"balance.options: the method 'fixed' has none (given: {', '.join(options)})")
        return None
    if method not in BALANCES.names():
        raise UserError(
            f"balance.method: unknown method '{method}'; {did_you_mean(method, ['fixed', *BALANCES.names()])}"
        )
    kind = BALANCES.get(method, "balance.method")
    check_options(kind, options, "balance.options")
    if not losses:
        losses = [
            f"{k}.{part}.x"
            for k, t in config.tasks.items()
            for part in (("hard", "soft") if t.taught else ("hard",))
        ]
        losses += [f"distill.{name}" for name in config.distill]
    if method in ("gradient", "dwa"):
        _refuse_schedules(config, method)
    groups = list(dict.fromkeys(kind.group(name) for name in losses))
    return as_user_error("balance.options", BALANCES.build, method, options, "balance.options", groups)


def _refuse_schedules(config: Config, method: str) -> None:
    """Raise UserError for a scheduled weight, which matching gradients would cancel and DWA take for
    progress."""
    weights: dict[str, Any] = {f"distill.{name}.weight": term.weight for name, term in config.distill.items()}
    for name, task in config.tasks.items():
        weights |= {f"tasks.{name}.ratio": task.ratio, f"tasks.{name}.alpha": task.alpha}
        weights |= {f"tasks.{name}.soft.weight": task.soft.weight} if task.taught else {}
    for where, value in weights.items():
        if isinstance(value, Section):
            how = "would cancel" if method == "gradient" else "would take for progress"
            raise UserError(
                f"{where}: a schedule, which balance.method {method} {how}; give a number, or use fixed or "
                f"uncertainty"
            )


def build_objective(config: Config, distiller: Distiller, schedules: dict[str, Schedule]) -> Objective:
    """The weights of the config; what of them is scheduled is noted in ``schedules``."""

    def noted(value: Any, where: str) -> Schedule:
        made = schedule(value)
        if isinstance(value, Section):
            schedules[where] = made
        return made

    weights: dict[str, Schedule] = {}
    for name, t in config.tasks.items():
        key_path = f"tasks.{name}"
        soft = (t.soft.loss, noted(t.soft.weight, f"{key_path}.soft.weight")) if t.taught else None
        ratio, alpha = noted(t.ratio, f"{key_path}.ratio"), noted(t.alpha, f"{key_path}.alpha")
        hard = {} if name in distiller.unlabelled else distiller.tasks[name].weights
        weights |= task_weights(name, hard, soft, ratio=ratio, alpha=alpha)
    for name, term in config.distill.items():
        weights[f"distill.{name}"] = noted(term.weight, f"distill.{name}.weight")
    return Objective(weights, distiller.loss_names(), distiller.balance)
