"""Config -> a run: its data, student, teachers and objective.

The build*.py are the only files that know every package: build_net.py makes the network, build_teacher.py the teachers,
build_distill.py what teaches (soft losses, terms, balance, weights), and this one the data and the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ..batch import Batch
from .distill import build_balance, build_distiller, build_objective, build_soft, schedule, dummy_forward, soft_loss
from .net import arch, check_classes, from_checkpoint, network, resolve_init, student, tasks, without_start  # noqa: F401  (build is the engine's one door)
from .teacher import build_teachers, check_teachers, read_teachers
from ..compress.graph import torch_pruning
from ..compress.sparse import Sparse
from ..config import SET_KEYS, TRAINING_ONLY, Config, DataSet
from ..config import Section as Scheduled
from ..data import layouts  # noqa: F401  (fills the registry)
from ..data import loader as data_loader
from ..data.base import LAYOUTS
from ..data.sampling import BatchStream, Draw, Pool, pools
from ..data.sets import Member, Sets
from ..data.transforms import TrainTransform
from ..distill.distiller import Distiller
from ..distill.objective import Objective
from ..distill.schedules import Schedule
from ..distill.taps import Tapped
from ..distill.teacher import Teachers
from ..errors import UserError, as_user_error
from ..models.backbones import check_encoder
from ..models.multitask import MultiTaskNet
from ..precision import resolve_amp
from ..registry import check_options
from ..tasks.base import TASKS, Task

log = logging.getLogger(__name__)


def check(config: Config) -> None:
    """Every name and option of the config, before data is read. Raises UserError naming the key."""
    config = resolve_init(config)
    for split in ("train", "val"):
        for name, section in config.data.sets(split).items():
            _check_set(section, set_place(config, split, name), split)
    check_teachers(config)
    check_encoder(config.model.encoder)
    for name, section in config.tasks.items():
        _check_task(name, section, config.model.width, config.model.strides)
    for name, section in config.distill.items():
        if hasattr(nn.ModuleDict(), name):
            raise UserError(f"distill.{name}: PyTorch has its own use of this name; choose another")
        soft_loss(section, f"distill.{name}")
    if config.sparse is not None and config.sparse.method == "group":
        torch_pruning("sparse.method: group")
    build_balance(config, [])
    if config.distill:
        _check_paths(config)


def _check_set(section: DataSet, where: str, split: str) -> None:
    options = dict(section.layout)
    kind = options.pop("layout", None)
    if not isinstance(kind, str):
        raise UserError(f"{where}: needs layout; known: {', '.join(LAYOUTS.names())}")
    LAYOUTS.check(kind, options, where, [key for key in SET_KEYS if split == "train" or key not in TRAINING_ONLY])
    for key, given in (("tasks", section.tasks or ()), ("rename", section.rename)):
        for task in given:
            TASKS.get(task, f"{where}.{key}")


def _check_task(name: str, section: Any, width: int, strides: Sequence[int]) -> None:
    """Every option of a task, by using it: the head on an image of nothing, its output decoded."""
    where = f"tasks.{name}"
    kind = TASKS.get(name, where)
    check_options(kind.Head, section.head, f"{where}.head")
    check_options(kind.decode, section.decode, f"{where}.decode")
    head = as_user_error(f"{where}.head", kind.Head, width, strides, 2, **section.head)
    task = as_user_error(f"{where}.hard", TASKS.build, name, section.hard, f"{where}.hard", ("a", "b"), head.strides)
    side = 2 * max(strides)
    with torch.no_grad():
        pred = head.eval()({s: torch.zeros(1, width, side // s, side // s) for s in strides})
    as_user_error(f"{where}.decode", task.decode, pred, (side, side), **section.decode)
    if section.soft:
        build_soft(name, section)


def _check_paths(config: Config) -> None:
    """The modules of the student that ``distill`` names, in a network of its architecture."""
    with torch.random.fork_rng(devices=[]):  # the student's start must not depend on whether this is done
        net = network(arch(config, {name: ("a", "b") for name in config.tasks}))
    for name, section in config.distill.items():
        Tapped(net, [section.student], f"distill.{name}.student")
        if config.teacher and config.teacher.is_own:
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


def set_place(config: Config, split: str, name: str) -> str:
    """Where a set stands in the config: data.train, or data.train.<name> where there are several."""
    return f"data.{split}" + (f".{name}" if isinstance(getattr(config.data, split), list) else "")


def layout(config: Config, split: str, order: Mapping[str, Sequence[str]] | None = None) -> Sets:
    """The sets of ``data.train`` or ``data.val``, opened. Raises UserError.

    order: by task, class names in the order that the sets are to have, where they have the same.
    """
    sections = config.data.sets(split)
    found = Sets({name: _member(section, set_place(config, split, name)) for name, section in sections.items()}, order)
    for fault, count in found.faults.items():
        log.warning("data.%s: %d %s", split, count, fault)
    return found


def _member(section: DataSet, where: str) -> Member:
    """A set, opened."""
    options = dict(section.layout)
    kind = LAYOUTS.get(options.pop("layout"), where)
    check_options(kind, options, where)
    try:
        found = kind(**options)
    except UserError as error:  # begins with the option's name
        raise UserError(f"{where}.{error}") from None
    if len(found) == 0:
        raise UserError(f"{where}: the data set has no images")
    used = [task for task in found.classes if task in TASKS.names()] if section.tasks is None else section.tasks
    k, n = map(int, (section.part or "1/1").split("/"))
    return Member(found, where, used, section.rename, (k, n))


@dataclass
class Run:
    """Everything a run of training needs, built from its config."""

    config: Config
    device: torch.device
    arch: dict[str, Any]
    tasks: dict[str, Task]
    distiller: Distiller
    objective: Objective
    teachers: Teachers | None
    train_layout: Sets
    val_layout: Sets
    pools: list[Pool]
    schedules: dict[str, Schedule]
    sparse: Sparse | None = None

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
        stream = BatchStream(self.pools, config.run.seed, start, stop)
        sizes = [config.data.input_size, *(self.teachers.views() if self.teachers else ())]
        transform, *views = (TrainTransform(size, **config.data.augment.model_dump()) for size in sizes)
        skip = config.data.on_error == "skip"
        images = data_loader.TrainSet(
            self.train_layout, transform, config.run.seed, pools=self.pools, skip_errors=skip, views=views
        )
        pin = self.device.type == "cuda"
        return data_loader.train_loader(images, stream, list(self.tasks), workers=workers, pin=pin)

    def val_batches(self, count: int | None = None, workers: int | None = None, size: tuple[int, int] | None = None) -> DataLoader:
        """The validation images that an evaluation while training sees; or the first ``count``; or those of another input size."""
        config = self.config
        number = config.eval.images if count is None else count
        return val_loader(config, self.val_layout, size or config.data.input_size, number, self.device, workers)

    def unlabelled(self, count: int) -> list[int]:
        """Training images that lack a label which the teachers give, spread over them."""
        taught = set(self.teachers.subjects) if self.teachers else set()
        lacking = [
            pool.indices
            for pool in self.pools
            if not pool.labelled or taught - set(self.train_layout.labels(self.train_layout.set_of(pool.indices[0])))
        ]
        rows = np.concatenate(lacking).tolist() if lacking else []
        places = np.linspace(0, len(rows) - 1, num=min(count, len(rows)), dtype=int)
        return [rows[place] for place in places]


def decode_options(config: Config) -> dict[str, dict[str, Any]]:
    """The post-processing options of each task."""
    return {name: dict(task.decode) for name, task in config.tasks.items()}


def val_loader(
    config: Config, found: Sets, size: Sequence[int], count: int | None, on: torch.device, workers: int | None = None
) -> DataLoader:
    """The first ``count`` validation images, of each set its share of them; None: all."""
    images = data_loader.EvalSet(found, tuple(size), found.first(count), skip_errors=config.data.on_error == "skip")
    pin = on.type == "cuda"
    return data_loader.eval_loader(
        images, config.eval.batch_size, workers=config.data.workers if workers is None else workers, pin=pin
    )


def recipe(config: Config) -> Run:
    """Build a run: names and options first, then data, teacher and student. Raises UserError."""
    config = resolve_init(config)
    check(config)
    on = device(config.run.device)
    resolve_amp(config.train.amp, on, "train.amp")
    for place, section in config.named_teachers.items():
        resolve_amp(section.amp, on, f"{place}.amp")
    loaded = read_teachers(config)  # a missing file is told before data is read
    train_layout = layout(config, "train")
    val_layout = layout(config, "val", train_layout.classes)
    plan = arch(config, train_layout.classes)
    try:
        check_classes(train_layout.classes, val_layout.classes, list(config.tasks), "data.val")
    except UserError as error:
        renamed = any(section.rename for section in config.data.sets("train").values())
        raise UserError(f"{error}; rename them as in data.train" if renamed else str(error)) from None
    found = build_pools(config, train_layout)
    net = student(config, plan)  # before the teacher: the same seed gives the same start without one
    dummy_forward(net, config.data.input_size, "network")
    parts = tasks(plan, net, {name: t.hard for name, t in config.tasks.items()})
    with torch.random.fork_rng(devices=[]):  # teacher and terms must not change which random numbers the student's training sees
        teachers = build_teachers(config, loaded, net, parts, on)
        torch.manual_seed(config.run.seed)  # what a teacher is loaded with must not change how its pupils' adapters start
        distiller, schedules = build_distiller(config, net.to(on), parts, teachers)
    objective = build_objective(config, distiller, schedules)
    sparse = build_sparse(config, distiller.to(on).student, schedules)
    return Run(config, on, plan, parts, distiller, objective, teachers, train_layout, val_layout, found, schedules, sparse)


def build_sparse(config: Config, net: MultiTaskNet, schedules: dict[str, Schedule]) -> Sparse | None:
    """The penalty of sparse training; a schedule of its weight is noted in ``schedules``."""
    if config.sparse is None:
        return None
    weight = schedule(config.sparse.weight)
    if isinstance(config.sparse.weight, Scheduled):
        schedules["sparse.weight"] = weight
    return Sparse(net, config.data.input_size, method=config.sparse.method, weight=weight)


def build_pools(config: Config, found: Sets) -> list[Pool]:
    """Which images fill which places of every batch. Raises UserError for images of which nothing would learn."""
    sections, whole = config.data.sets("train"), config.data.labelled
    bare = [name for name in sections if not set(found.labels(name)) & set(config.tasks)]
    draws = {}
    for name, section in sections.items():
        key = f"{set_place(config, 'train', name)}.labelled"
        if section.labelled and name in bare:
            raise UserError(f"{key}: the set has no labels for a task of this run; leave it out")
        draws[name] = Draw(section.weight, section.labelled, key) if section.labelled else Draw(section.weight, whole)
    made = pools(
        found,
        config.train.batch_size,
        tasks=list(config.tasks),
        draws=draws,
        seed=config.data.labelled_seed,
        unlabelled=config.data.unlabelled,
        share=config.data.labelled_share,
    )
    if not config.distils and not all(pool.labelled for pool in made):
        which = f" (the set '{bare[0]}')" if bare and len(sections) > 1 else ""
        raise UserError(f"data.unlabelled: without a teacher nothing learns from unlabelled images{which}; set it to false")
    return made
