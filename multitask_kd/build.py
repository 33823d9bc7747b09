"""Config -> objects: with build_distill.py the only file that knows every package."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .batch import Batch
from .build_distill import (
    build_balance,
    build_distiller,
    build_objective,
    build_soft,
    compared_heads,
    show_nothing,
    soft_loss,
    teacher_taps,
)
from .checkpoint import load as load_checkpoint
from .checkpoint import load_weights
from .config import Config
from .data import loader as data_loader
from .data.base import LAYOUTS, Layout
from .data.transforms import TrainTransform
from .distill.distiller import Distiller
from .distill.objective import Objective
from .distill.schedules import Schedule
from .distill.taps import Tapped
from .distill.teacher import Teacher
from .errors import UserError, told
from .models.backbones import build_encoder, check_encoder
from .models.multitask import MultiTaskNet
from .precision import resolve_amp
from .registry import check_options
from .tasks.base import TASKS, Task

log = logging.getLogger(__name__)


def check(config: Config) -> None:
    """Every name and option of the config, before anything is read. Raises UserError naming the key."""
    for key in ("train", "val"):
        section = dict(getattr(config.data, key))
        if not isinstance(section.get("layout"), str):
            raise UserError(f"data.{key}: needs layout; known: {', '.join(LAYOUTS.names())}")
        LAYOUTS.check(section.pop("layout"), section, f"data.{key}")
    check_encoder(config.model.encoder)
    for name, section in config.tasks.items():
        _check_task(name, section, config.model.width, config.model.strides)
    for name, section in config.distill.items():
        if hasattr(nn.ModuleDict(), name):
            raise UserError(f"distill.{name}: PyTorch has its own use of this name; choose another")
        soft_loss(section, f"distill.{name}")
    build_balance(config, [])
    if config.distill:
        _check_paths(config)


def _check_task(name: str, section: Any, width: int, strides: Sequence[int]) -> None:
    """Every option of a task, by using it: the head on an image of nothing, its output decoded."""
    where = f"tasks.{name}"
    kind = TASKS.get(name, where)
    check_options(kind.Head, section.head, f"{where}.head")
    check_options(kind.decode, section.decode, f"{where}.decode")
    head = told(f"{where}.head", kind.Head, width, strides, 2, **section.head)
    task = told(f"{where}.hard", TASKS.build, name, section.hard, f"{where}.hard", ("a", "b"), head.strides)
    side = 2 * max(strides)
    with torch.no_grad():
        pred = head.eval()({s: torch.zeros(1, width, side // s, side // s) for s in strides})
    told(f"{where}.decode", task.decode, pred, (side, side), **section.decode)
    if section.soft:
        build_soft(name, section)


def _check_paths(config: Config) -> None:
    """The modules of the student that ``distill`` names, in a network of its architecture."""
    with torch.random.fork_rng(devices=[]):  # the student's start must not depend on whether this is done
        net = network(arch(config, {name: ("a", "b") for name in config.tasks}))
    for name, section in config.distill.items():
        Tapped(net, [section.student], f"distill.{name}.student")
        if config.teacher.source != "checkpoint":
            Tapped(net, [section.teacher_path], f"distill.{name}.teacher")


def device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N -> device. Raises UserError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"run.device: '{name}' is none of auto, cpu, cuda, cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"run.device: {name} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def layout(section: Mapping[str, Any], where: str) -> Layout:
    options = dict(section)
    kind = LAYOUTS.get(options.pop("layout"), where)
    check_options(kind, options, where)
    try:
        found = kind(**options)
    except UserError as error:  # begins with the option's name
        raise UserError(f"{where}.{error}") from None
    if len(found) == 0:
        raise UserError(f"{where}: the data set has no images")
    for fault, count in found.faults.items():
        log.warning("%s: %d %s", where, count, fault)
    return found


def check_classes(own: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]], tasks: Sequence[str], who: str) -> None:
    """Raise UserError where ``other`` does not have, for every task, the same classes in the same order."""
    for task in tasks:
        mine, theirs = list(own[task]), list(other.get(task, ()))
        if mine == theirs:
            continue
        if not theirs:
            raise UserError(f"{who} has no classes for the task '{task}'")
        if sorted(mine) == sorted(theirs):
            raise UserError(f"{who}: the classes of '{task}' are in another order: {theirs}, expected {mine}")
        lacking = [c for c in mine if c not in theirs]
        extra = [c for c in theirs if c not in mine]
        raise UserError(
            f"{who}: the classes of '{task}' differ: "
            + "; ".join(filter(None, [f"lacks {lacking}" if lacking else "", f"has {extra} besides" if extra else ""]))
        )


def arch(config: Config, classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The student's architecture as plain data: what a checkpoint needs to build it again."""
    model = config.model.model_dump(mode="json")
    model.pop("weights")
    for task in config.tasks:
        if task not in classes:
            raise UserError(f"tasks.{task}: the training data has no labels for it; it has {', '.join(classes)}")
    tasks = {name: {"classes": list(classes[name]), "head": dict(t.head)} for name, t in config.tasks.items()}
    return {**model, "tasks": tasks, "input_size": list(config.data.input_size)}


def network(arch: Mapping[str, Any], weights: str | None = None) -> MultiTaskNet:
    """The network of an ``arch``; ``weights`` are the encoder's starting ones."""
    strides = arch["strides"]
    backbone = build_encoder(arch["encoder"], max_stride=max(strides), weights=weights)
    if empty := [s for s in strides if not backbone.out_channels[s.bit_length() - 1]]:
        raise UserError(f"model.strides: the encoder '{arch['encoder']}' has no features at stride {empty[0]}; leave it out")
    heads = {
        name: TASKS.get(name, "arch").Head(arch["width"], strides, len(task["classes"]), **task["head"])
        for name, task in arch["tasks"].items()
    }
    return MultiTaskNet(backbone, heads, strides, arch["width"], arch["mean"], arch["std"])


def tasks(arch: Mapping[str, Any], net: MultiTaskNet, hard: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Task]:
    """The tasks of a network; ``hard`` are the options of their hard losses."""
    return {
        name: TASKS.build(name, (hard or {}).get(name, {}), f"tasks.{name}.hard", part["classes"], net.heads[name].strides)
        for name, part in arch["tasks"].items()
    }


def from_checkpoint(content: Mapping[str, Any], where: str) -> MultiTaskNet:
    """The network that a checkpoint holds, with its weights."""
    net = told(where, network, content["arch"])
    load_weights(net, content["model"], where)
    return net


def teacher_file(config: Config) -> dict[str, Any] | None:
    """The teacher's checkpoint, or None where nothing is learnt from one: the file is then not even opened."""
    return load_checkpoint(config.teacher.path, "teacher.path") if config.reads_teacher else None


def own_average(config: Config, student: MultiTaskNet, parts: Mapping[str, Task], on: torch.device) -> Teacher:
    """A teacher whose weights start as the student's; the loop averages the student's into them."""
    net = copy.deepcopy(student)
    return Teacher(net, parts, on, resolve_amp(config.teacher.amp, on, "teacher.amp"), teacher_taps(config))


def teacher(config: Config, content: Mapping[str, Any], classes: Mapping[str, Sequence[str]], on: torch.device) -> Teacher:
    """The frozen teacher that ``content``, its checkpoint, holds.

    New sources of teachers belong here: whatever gives a View for images in [0,1].
    Raises UserError when its classes or cells are not the student's.
    """
    taught = [name for name, task in config.tasks.items() if task.taught or name in compared_heads(config)]
    where = "teacher.path"
    who = f"{where}: the teacher {config.teacher.path}"
    check_classes(classes, {k: t["classes"] for k, t in content["arch"]["tasks"].items()}, taught, who)
    net = from_checkpoint(content, where)
    for name in (name for name, task in config.tasks.items() if task.taught):
        own = TASKS.get(name, where).Head(8, config.model.strides, 2, **config.tasks[name].head).strides
        if tuple(net.heads[name].strides) != tuple(own):
            raise UserError(
                f"{who}: its head '{name}' has strides {list(net.heads[name].strides)}, the student's has {list(own)}; "
                f"set model.strides or tasks.{name}.head.strides so that both have the same cells"
            )
    stride = max(net.strides)
    if any(n % stride for n in config.data.input_size):
        raise UserError(f"{who} needs a data.input_size in multiples of {stride}, not {list(config.data.input_size)}")
    for name, section in config.distill.items():
        Tapped(net, [section.teacher_path], f"distill.{name}.teacher")
    amp = resolve_amp(config.teacher.amp, on, "teacher.amp")
    alike = {name: task for name, task in tasks(content["arch"], net).items() if task.classes == tuple(classes.get(name, ()))}
    return Teacher(net, alike, on, amp, teacher_taps(config))


@dataclass
class Recipe:
    """Everything a run of training needs, built from its config."""

    config: Config
    device: torch.device
    arch: dict[str, Any]
    tasks: dict[str, Task]
    distiller: Distiller
    objective: Objective
    teacher: Teacher | None
    train_layout: Layout
    val_layout: Layout
    pools: list[data_loader.Pool]
    schedules: dict[str, Schedule]

    @property
    def student(self) -> MultiTaskNet:
        return self.distiller.student

    def train_batches(self, start: int) -> DataLoader:
        """Batches from optimizer step ``start`` to the end of the run."""
        config, loops = self.config, self.config.train.accumulate
        return self._batches(start * loops, config.train.steps * loops, config.data.workers)

    def first_batch(self) -> Batch:
        """The batch of the first step, read in this process."""
        return next(iter(self._batches(0, 1, 0)))[0]

    def _batches(self, start: int, stop: int, workers: int) -> DataLoader:
        config = self.config
        stream = data_loader.BatchStream(self.pools, config.run.seed, start, stop)
        augment = TrainTransform(config.data.input_size, **config.data.augment.model_dump())
        skip = config.data.on_error == "skip"
        images = data_loader.TrainSet(self.train_layout, augment, config.run.seed, pools=self.pools, skip_errors=skip)
        pin = self.device.type == "cuda"
        return data_loader.train_loader(images, stream, list(self.tasks), workers=workers, pin=pin)

    def val_batches(self, count: int | None = None, workers: int | None = None) -> DataLoader:
        """The validation images that an evaluation while training sees; or the first ``count``."""
        config = self.config
        number = config.eval.images if count is None else count
        return val_loader(config, self.val_layout, config.data.input_size, number, self.device, workers)


def decode_options(config: Config) -> dict[str, dict[str, Any]]:
    """The post-processing options of each task."""
    return {name: dict(task.decode) for name, task in config.tasks.items()}


def val_loader(
    config: Config, found: Layout, size: Sequence[int], count: int | None, on: torch.device, workers: int | None = None
) -> DataLoader:
    images = data_loader.EvalSet(found, tuple(size), count, skip_errors=config.data.on_error == "skip")
    pin = on.type == "cuda"
    return data_loader.eval_loader(
        images, config.eval.batch_size, workers=config.data.workers if workers is None else workers, pin=pin
    )


def recipe(config: Config) -> Recipe:
    """Build a run: names and options first, then data, teacher and student. Raises UserError."""
    check(config)
    on = device(config.run.device)
    resolve_amp(config.train.amp, on, "train.amp")
    if config.teacher:
        resolve_amp(config.teacher.amp, on, "teacher.amp")
    taught_from = teacher_file(config)  # a missing one is told before data is read
    train_layout = layout(config.data.train, "data.train")
    val_layout = layout(config.data.val, "data.val")
    plan = arch(config, train_layout.classes)
    check_classes(train_layout.classes, val_layout.classes, list(config.tasks), "data.val")
    pools = data_loader.make_pools(
        len(train_layout),
        config.train.batch_size,
        labelled=config.data.labelled,
        seed=config.data.labelled_seed,
        unlabelled=config.data.unlabelled,
        share=config.data.labelled_share,
    )
    net = network(plan, config.model.weights)  # before the teacher: the same seed gives the same start without one
    show_nothing(net, config.data.input_size, "network")
    parts = tasks(plan, net, {name: t.hard for name, t in config.tasks.items()})
    if not config.distils and not all(pool.labelled for pool in pools):
        raise UserError("data.unlabelled: without a teacher nothing learns from unlabelled images; set it to false")
    taught_by = None
    with torch.random.fork_rng(devices=[]):  # teacher and terms must not change which random numbers the student's training sees
        if taught_from:
            taught_by = teacher(config, taught_from, train_layout.classes, on)
        elif config.taught_by_average:
            taught_by = own_average(config, net, parts, on)
        distiller, schedules = build_distiller(config, net.to(on), parts, taught_by)
    objective = build_objective(config, distiller, schedules)
    return Recipe(config, on, plan, parts, distiller.to(on), objective, taught_by, train_layout, val_layout, pools, schedules)
