"""Config -> a run: its data, student, teachers and objective, ready for the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from .. import build, checkpoint
from ..batch import Batch
from ..build.data import build_pools, tell_unseen
from ..build.distill import build_distiller, build_objective, dummy_forward, schedule
from ..build.net import Init
from ..build.teacher import build_teachers, read_teachers
from ..compress.sparse import Sparse
from ..config import Config
from ..config import Section as Scheduled
from ..data import loader as data_loader
from ..data.sampling import BatchStream, Pool
from ..data.sets import Sets
from ..data.transforms import TrainTransform
from ..distill.distiller import Distiller
from ..distill.objective import Objective
from ..distill.schedules import Schedule
from ..distill.teacher import Teachers
from ..errors import UserError
from ..models.multitask import MultiTaskNet
from ..precision import resolve_amp, resolve_device
from ..tasks.base import Task, kind_of
from .optim import make_optimizer


@dataclass
class Run:
    """Everything a run of training needs, built from its config."""

    config: Config
    device: torch.device
    amp: torch.dtype | None
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
    start_digest: str | None = None

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
        labelled = {name: task for name, task in self.tasks.items() if name not in self.distiller.unlabelled}
        sizes = [config.data.input_size, *(self.teachers.sizes() if self.teachers else ())]
        transform, *others = (
            TrainTransform(size, labelled, **config.data.augment.model_dump()) for size in sizes
        )
        skip = config.data.on_error == "skip"
        images = data_loader.TrainSet(
            self.train_layout, transform, config.run.seed, pools=self.pools, skip_errors=skip, others=others
        )
        packings = {
            name: data_loader.Packing(type(task), len(task.classes)) for name, task in labelled.items()
        }
        return data_loader.train_loader(
            images, stream, packings, workers=workers, pin=self.device.type == "cuda"
        )

    def val_batches(
        self, count: int | None = None, workers: int | None = None, size: tuple[int, int] | None = None
    ) -> DataLoader:
        """The validation images that an evaluation while training uses; or the first ``count``; or those of
        another input size."""
        config = self.config
        number = config.eval.images if count is None else count
        return build.val_loader(
            config, self.val_layout, size or config.data.input_size, number, self.device, workers
        )

    def unlabelled(self, count: int) -> list[int]:
        """Training images that lack a label which the teachers give, spread over them."""
        taught = set(self.teachers.subjects) if self.teachers else set()
        lacking = [
            pool.indices
            for pool in self.pools
            if not pool.labelled
            or taught - set(self.train_layout.labels(self.train_layout.set_of(pool.indices[0])))
        ]
        rows = np.concatenate(lacking).tolist() if lacking else []
        chosen = np.linspace(0, len(rows) - 1, num=min(count, len(rows)), dtype=int)
        return [rows[row] for row in chosen]


def prepare(init: Init) -> tuple[Run, torch.optim.Optimizer]:
    """A run and its optimizer, as they are before the first step. init: as ``build.resolve_init`` gives it.
    Raises UserError."""
    config = init.config
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    checkpoint.seed_everything(config.run.seed)
    run = build_run(init)
    if config.run.channels_last:
        run.distiller.to(memory_format=torch.channels_last)
    o = config.train.optimizer
    return run, make_optimizer(
        run.distiller, name=o.name, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum
    )


def build_run(init: Init) -> Run:
    """Build a run: names and options first, then data, teacher and student. Raises UserError."""
    config = init.config
    build.check(config, init)
    on = resolve_device(config.run.device)
    amp = resolve_amp(config.train.amp, on, "train.amp")
    for key_path, section in config.named_teachers.items():
        resolve_amp(section.amp, on, f"{key_path}.amp")
    loaded = read_teachers(config)  # a missing file is told before data is read
    train_layout, val_layout, unlabelled = _open_data(config)
    plan = build.arch(init, _class_names(config, train_layout))
    found = build_pools(config, train_layout)
    net = build.initial_student(
        init, plan
    )  # before the teacher: the same seed gives the same start without one
    dummy_forward(net, config.data.input_size, "network")
    tasks = build.tasks(plan, net, {name: t.hard for name, t in config.tasks.items()})
    with torch.random.fork_rng(
        devices=[]
    ):  # teacher and terms must not change which random numbers the student's training draws
        teachers = build_teachers(config, loaded, net, tasks, on)
        torch.manual_seed(config.run.seed)  # what a teacher is loaded with must not change how adapters start
        distiller, schedules = build_distiller(config, net.to(on), tasks, teachers, unlabelled)
    objective = build_objective(config, distiller, schedules)
    sparse = _build_sparse(config, distiller.to(on).student, schedules)
    return Run(
        config, on, amp, plan, tasks, distiller, objective, teachers, train_layout, val_layout, found, schedules, sparse,
        _digest(init),
    )  # fmt: skip


def _open_data(config: Config) -> tuple[Sets, Sets, list[str]]:
    """The training and validation sets, and the tasks that no training image has a label for. Raises
    UserError."""
    train_layout = build.open_sets(config, "train", only=config.tasks)
    tell_unseen(train_layout)
    unlabelled = [name for name in config.tasks if name not in train_layout.labelled()]
    names = _class_names(config, train_layout)
    for name in (name for name in unlabelled if name in names):
        if not config.tasks[name].taught:
            raise UserError(
                f"tasks.{name}.alpha: 0, but no training image has a label for the task, so nothing would be "
                f"learnt; raise it, or "
                "give labels"
            )
    val_layout = build.open_sets(config, "val", train_layout.classes, only=config.tasks)
    measured = [name for name in config.tasks if name in val_layout.classes or name not in unlabelled]
    try:
        build.check_classes(
            train_layout.classes,
            val_layout.classes,
            [n for n in measured if n in train_layout.classes],
            "data.val",
        )
    except UserError as error:
        renamed = any(section.rename for section in config.data.sets("train").values())
        raise UserError(f"{error}; rename them as in data.train" if renamed else str(error)) from None
    return train_layout, val_layout, unlabelled


def _class_names(config: Config, train_layout: Sets) -> dict[str, tuple[str, ...]]:
    """By task, those of the sets; none for a task of a kind without classes, which may have no labels at all."""
    kinds = {name: kind_of(name, section.kind, f"tasks.{name}") for name, section in config.tasks.items()}
    return {name: () for name, kind in kinds.items() if not kind.has_classes} | train_layout.classes


def _digest(init: Init) -> str | None:
    """A fingerprint of the weights that training begins from, where they are a whole network's."""
    return None if init.content is None else checkpoint.digest_of(init.content["model"])


def _build_sparse(config: Config, net: MultiTaskNet, schedules: dict[str, Schedule]) -> Sparse | None:
    """The penalty of sparse training; a schedule of its weight is noted in ``schedules``."""
    if config.sparse is None:
        return None
    weight = schedule(config.sparse.weight)
    if isinstance(config.sparse.weight, Scheduled):
        schedules["sparse.weight"] = weight
    return Sparse(net, config.data.input_size, method=config.sparse.method, weight=weight)
