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
from ..distill.overlap import Comparable
from ..distill.schedules import KINDS as SCHEDULES
from ..distill.schedules import Schedule
from ..distill.teacher_geometry import TeacherGeometry
from ..distill.taps import Tapped
from ..distill.teacher import Teachers
from ..distill.term import Term, as_map
from ..errors import UserError, did_you_mean, as_user_error
from ..losses.base import LOSSES, SoftLoss
from ..models.multitask import MultiTaskNet
from ..models.necks import level_name
from ..registry import check_options, options_of
from ..tasks.base import Task

log = logging.getLogger(__name__)

Moving = dict[str, Schedule]  # option of a loss -> the schedule that changes it


def build_soft(task: str, section: Any) -> tuple[SoftLoss, Moving]:
    """The soft loss of a task, and which of its options are scheduled."""
    where = f"tasks.{task}.soft"
    kind = LOSSES.get(section.soft.loss, f"{where}.loss")
    if task not in kind.tasks:
        fitting = [n for n in LOSSES.names() if task in LOSSES.get(n, where).tasks]
        raise UserError(f"{where}.loss: '{section.soft.loss}' does not fit this task; {did_you_mean('', fitting)}")
    return soft_loss(section.soft, where)


def soft_loss(section: Any, where: str) -> tuple[SoftLoss, Moving]:
    """The loss that ``section`` names, with its options' first values, and the options that are scheduled."""
    kind = LOSSES.get(section.loss, f"{where}.loss")
    plain, moving = dict(section.options), {}
    for key, value in section.options.items():
        if not (isinstance(value, dict) and "schedule" in value):
            continue
        place = f"{where}.options.{key}"
        if key not in options_of(kind):
            check_options(kind, {key: value}, f"{where}.options")  # says what it may have meant
        if key not in kind.scheduled:
            raise UserError(f"{place}: takes no schedule; of '{section.loss}' {', '.join(kind.scheduled) or 'nothing'} may change")
        parsed = parse_schedule(value, place)
        for extreme in parsed.extremes():  # each has to be a value that the option may have
            as_user_error(place, LOSSES.build, section.loss, {**_unscheduled(plain), key: extreme}, f"{where}.options")
        moving[key] = schedule(parsed)
        plain[key] = moving[key](0.0)
    loss = as_user_error(f"{where}.options", LOSSES.build, section.loss, plain, f"{where}.options")
    return loss, moving


def _unscheduled(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if not isinstance(v, dict)}


def schedule(value: Any) -> Schedule:
    """A number or a schedule's section -> a function of progress."""
    if not isinstance(value, Section):
        return SCHEDULES["constant"](float(value))
    options = value.model_dump()
    return SCHEDULES[options.pop("schedule")](**options)


def compared_heads(config: Config, place: str | None = None) -> set[str]:
    """Tasks whose heads' outputs a term compares channel by channel, so that the classes have to be the same; with the teacher at
    ``place``, or any."""
    terms = [t for t in config.distill.values() if place is None or config.tapped_teacher(t) == place]
    return {term.head for term in terms if term.head in config.tasks and term.align != "conv"}


def teacher_name(place: str) -> str:
    """What the teacher at ``place`` of the config is called among ``Teachers``: "teacher", or its name in ``teachers``."""
    return place.removeprefix("teachers.")


def teacher_taps(config: Config, place: str) -> list[str]:
    """Modules of the teacher at ``place`` whose outputs ``distill`` compares."""
    return [section.teacher_path for section in config.distill.values() if config.tapped_teacher(section) == place]


def build_distiller(
    config: Config, net: MultiTaskNet, parts: dict[str, Task], teachers: Teachers | None
) -> tuple[Distiller, dict[str, Schedule]]:
    """All that learns, and the schedules of losses' options by their place in the config."""
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
            loss.place(config.data.input_size, parts[name].strides, known)
            overlap = None if loss.takes_found else Comparable(known, parts[name].strides)
            soft[name] = Soft(section.soft.loss, loss, _cross_head(name, section, net, teachers), overlap)
    terms = {}
    shapes, overwritten = _tap_shapes(config, net, teachers)
    for name, section in config.distill.items():
        where = f"distill.{name}"
        loss = note(*soft_loss(section, where), f"{where}.options")
        tap, sight = section.teacher_path, TeacherGeometry(config.data.input_size, config.data.input_size)
        if teachers is not None:
            who = teacher_name(config.tapped_teacher(section))
            tap, sight = teachers.tap_name(who, tap), teachers.sights[who]
        terms[name] = _term(where, section, loss, shapes, tap, sight, list(config.tasks))
    distiller = Distiller(net, parts, soft, terms, own_teacher=bool(terms) and teachers is None)
    distiller.tapped.copied |= overwritten["student"]
    for name, member in teachers.members.items() if teachers else ():
        member.tapped.copied |= overwritten[name]
    distiller.balance = build_balance(config, distiller.loss_names())
    for owner, attribute, change in moving:
        distiller.move(owner, attribute, change)
    return distiller, schedules


def _cross_head(name: str, section: Any, net: MultiTaskNet, teachers: Teachers) -> CrossHead | None:
    if section.soft.through == "student":
        return None
    taught_by = teachers.members[teachers.subjects[name].teachers[0]]
    levels = {s: f"neck.{level_name(s)}" for s in taught_by.net.heads[name].strides}
    widths = {s: (net.neck.width_at(s), taught_by.net.neck.width_at(s)) for s in levels}
    return CrossHead(taught_by.net.heads[name], levels, widths)


def dummy_forward(net: nn.Module, size: Sequence[int], who: str) -> None:
    """One black image of ``size`` through ``net``, in eval. Raises UserError where the network cannot take it."""
    training, image = net.training, torch.zeros(1, 3, *size, device=next(net.parameters()).device)
    with torch.no_grad():
        as_user_error(f"data.input_size: the {who} cannot take {list(size)}", net.eval(), image)
    net.train(training)


Shapes = dict[tuple[str, str], tuple[Any, int]]  # by (side, tap's name): what it puts out for one image, how often in a pass


def _tap_shapes(config: Config, net: MultiTaskNet, teachers: Teachers | None) -> tuple[Shapes, dict[str, set[str]]]:
    """The shapes of every tap of ``distill``; and by "student" or teacher the taps that a module after them writes over."""
    own = [t.student for t in config.distill.values()]
    sides: dict[str, tuple[str, nn.Module, list[str], Any]] = {"student": ("student", net, own, config.data.input_size)}
    if teachers is None:  # its own deeper layers teach, through the same hooks
        other = [t.teacher_path for t in config.distill.values()]
        sides["student"] = ("student", net, [*own, *other], config.data.input_size)
        sides["teacher"] = ("teacher", net, other, config.data.input_size)
    else:
        for name, member in teachers.members.items():
            sides[name] = ("teacher", member.net, list(member.tapped.paths), teachers.sights[name].own)
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
            log.info("distill: the %s's %s is written over by a module after it; it is copied before that", side, path)
        plain = name == "student" or teachers is None
        for path in paths:
            found[side, path if plain else teachers.tap_name(name, path)] = (taps.get(path), tapped.calls[path])
    return found, overwritten


def _term(
    where: str, section: Any, loss: SoftLoss, shapes: Shapes, teacher_tap: str, sight: TeacherGeometry, known_tasks: Sequence[str]
) -> Term:
    """A term of ``distill``. teacher_tap: what its tap on the teacher is called; sight: how that teacher sees the images.

    Raises UserError where its taps do not give what its loss compares.
    """
    paths = {"student": section.student, "teacher": teacher_tap}
    sizes = {"student": sight.student, "teacher": sight.own}
    for side, path in paths.items():
        _, calls = shapes[side, path]
        if not calls:
            raise UserError(
                f"{where}.{side}: the module '{path}' is never called, so nothing can be learnt there; tap one inside it"
            )
        if calls > 1:
            raise UserError(f"{where}.{side}: the module '{path}' is called {calls} times in one pass; tap one around it")
        tap = shapes[side, path][0]
        if isinstance(tap, torch.Tensor) and tap.shape[:1] != (1,):
            raise UserError(f"{where}.{side}: '{path}' puts out {list(tap.shape)} for one image (windows?); tap a module around it")
    if loss.takes_found:
        raise UserError(f"{where}.loss: '{section.loss}' learns from detections, not from taps; use it as tasks.det.soft.loss")
    head = section.head in known_tasks
    if head and section.head in loss.tasks and section.align == section.norm == "auto" and section.size == "smaller":
        own, other = (list(shapes[side, path][0].shape[1:]) for side, path in paths.items())
        if own != other or not sight.same:
            path = section.student
            raise UserError(f"{where}: {path} of the student puts out {own}, of the teacher {other}; both need the same strides")
        return Term(*paths.values(), loss, None, align=False, size=section.size, task=section.head)
    if not loss.maps:
        fits = f"heads.{' or heads.'.join(loss.tasks)}, without align, norm and size,"
        raise UserError(f"{where}.loss: '{section.loss}' compares predictions; tap {fits} on both sides")
    for side, path in paths.items():
        if path.rpartition(":")[2].removeprefix("heads.") in known_tasks and shapes[side, path][0].dim() == 3:
            raise UserError(f"{where}.{side}: '{path}' puts out predictions of cells, no map; tap neck.* or inside the head")
    maps = [as_user_error(f"{where}.{side}: '{path}'", as_map, shapes[side, path][0], sizes[side]) for side, path in paths.items()]
    channels = tuple(m.shape[1] for m in maps)
    align = loss.same_channels and (section.align == "conv" or (section.align == "auto" and not head))
    if section.align == "conv" and not loss.same_channels:
        raise UserError(f"{where}.align: '{section.loss}' compares maps of any channels, so nothing is aligned; use auto or none")
    if loss.same_channels and not align and channels[0] != channels[1]:
        raise UserError(
            f"{where}.align: none, but the student has {channels[0]} channels there and the teacher {channels[1]}; use conv"
        )
    loss.prepare(channels[1])
    if section.norm == "batch" and not loss.same_channels:
        raise UserError(f"{where}.norm: '{section.loss}' compares maps of any channels as they are; use auto or none")
    norm = section.norm == "batch" or (section.norm == "auto" and loss.norm and not head)
    seen = None if sight.same else sight
    return Term(*paths.values(), loss, channels, align=align, norm=norm, size=section.size, sight=seen)


def build_balance(config: Config, losses: Sequence[str]) -> Balance | None:
    """The balance of the config for ``losses``; for none of them only its name and options are checked."""
    method, options = config.balance.method, config.balance.options
    if method == "fixed":
        if options:
            raise UserError(f"balance.options: the method 'fixed' has none (given: {', '.join(options)})")
        return None
    if method not in BALANCES.names():
        raise UserError(f"balance.method: unknown method '{method}'; {did_you_mean(method, ['fixed', *BALANCES.names()])}")
    kind = BALANCES.get(method, "balance.method")
    check_options(kind, options, "balance.options")
    if not losses:
        losses = [f"{k}.{part}.x" for k, t in config.tasks.items() for part in (("hard", "soft") if t.taught else ("hard",))]
        losses += [f"distill.{name}" for name in config.distill]
    if method in ("gradient", "dwa"):
        _refuse_schedules(config, method)
    groups = list(dict.fromkeys(kind.group(name) for name in losses))
    return as_user_error("balance.options", BALANCES.build, method, options, "balance.options", groups)


def _refuse_schedules(config: Config, method: str) -> None:
    """Raise UserError for a scheduled weight, which matching gradients would cancel and DWA take for progress."""
    weights: dict[str, Any] = {f"distill.{name}.weight": term.weight for name, term in config.distill.items()}
    for name, task in config.tasks.items():
        weights |= {f"tasks.{name}.ratio": task.ratio, f"tasks.{name}.alpha": task.alpha}
        weights |= {f"tasks.{name}.soft.weight": task.soft.weight} if task.taught else {}
    for where, value in weights.items():
        if isinstance(value, Section):
            how = "would cancel" if method == "gradient" else "would take for progress"
            raise UserError(f"{where}: a schedule, which balance.method {method} {how}; give a number, or use fixed or uncertainty")


def build_objective(config: Config, distiller: Distiller, schedules: dict[str, Schedule]) -> Objective:
    """The weights of the config; what of them is scheduled is noted in ``schedules``."""

    def noted(value: Any, where: str) -> Schedule:
        made = schedule(value)
        if isinstance(value, Section):
            schedules[where] = made
        return made

    weights: dict[str, Schedule] = {}
    for name, t in config.tasks.items():
        place = f"tasks.{name}"
        soft = (t.soft.loss, noted(t.soft.weight, f"{place}.soft.weight")) if t.taught else None
        ratio, alpha = noted(t.ratio, f"{place}.ratio"), noted(t.alpha, f"{place}.alpha")
        weights |= task_weights(name, distiller.tasks[name].weights, soft, ratio=ratio, alpha=alpha)
    for name, term in config.distill.items():
        weights[f"distill.{name}"] = noted(term.weight, f"distill.{name}.weight")
    return Objective(weights, distiller.loss_names(), distiller.balance)
