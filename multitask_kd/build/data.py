"""Config -> the sets of images and labels, and how batches are drawn from them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..config import Config, DataSet
from ..data import layouts  # noqa: F401  (fills the registry)
from ..data import loader as data_loader
from ..data.base import LAYOUTS, Layout
from ..data.sampling import Draw, Pool, pools
from ..data.sets import Member, Sets
from ..errors import UserError, did_you_mean
from ..registry import check_options
from ..tasks.base import KINDS, kind_of

log = logging.getLogger(__name__)


def set_key_path(config: Config, split: str, name: str) -> str:
    """Where a set stands in the config: data.train, or data.train.<name> where there are several."""
    return f"data.{split}" + (f".{name}" if isinstance(getattr(config.data, split), list) else "")


def open_sets(
    config: Config,
    split: str,
    order: Mapping[str, Sequence[str]] | None = None,
    *,
    only: Collection[str] | None = None,
) -> Sets:
    """The sets of ``data.train`` or ``data.val``, opened. Raises UserError.

    order: by task, class names in the order that the sets are to have, where they have the same. only: the
    tasks whose labels are used and read; None: every label that the sets have.
    """
    sections = config.data.sets(split)
    members = {
        name: _member(section, set_key_path(config, split, name), only) for name, section in sections.items()
    }
    kinds = {task: kind for member in members.values() for task, kind in _kinds(config, member).items()}
    given = {task: names for task, names in config.data.classes.items() if only is None or task in only}
    if any(
        member.classes for member in members.values()
    ):  # a set of validation may label fewer classes than the network has
        given = {
            task: names
            for task, names in (order or {}).items()
            if any(task in m.tasks for m in members.values())
        } | given
    kinds |= {task: _kind_in(config, task) for task in given if task not in kinds}
    found = Sets(members, order, kinds=kinds, classes=given)
    if only is not None:
        found.want(only)
    for fault, count in found.faults.items():
        log.warning("data.%s: %d %s", split, count, fault)
    return found


def _kinds(config: Config, member: Member) -> dict[str, Any]:
    """By task, the kind of the labels of a set. Raises UserError where the config says another one."""
    found = {}
    for task in member.tasks:
        kind = member.layout.kinds.get(member.label(task))
        if kind is None:  # Sets says that the set has no such label
            continue
        found[task] = KINDS.get(kind, member.key_path)
        if task in config.tasks and (asked := _kind_in(config, task)) is not found[task]:
            raise UserError(
                f"tasks.{task}.kind: {asked.kind}, but the label '{member.label(task)}' of {member.key_path} "
                f"is of kind {kind}"
            )
    return found


def _kind_in(config: Config, task: str) -> Any:
    if task not in config.tasks:
        raise UserError(f"data.classes.{task}: there is no such task; {did_you_mean(task, config.tasks)}")
    return kind_of(task, config.tasks[task].kind, f"tasks.{task}")


def _member(section: DataSet, key_path: str, only: Collection[str] | None) -> Member:
    """A set, opened."""
    options = dict(section.layout)
    kind = LAYOUTS.get(options.pop("layout"), key_path)
    check_options(kind, options, key_path)
    try:
        found = kind(**options)
    except UserError as error:  # begins with the option's name
        raise UserError(f"{key_path}.{error}") from None
    if len(found) == 0:
        raise UserError(f"{key_path}: the data set has no images")
    k, n = map(int, (section.part or "1/1").split("/"))
    tasks, labels = _tasks_of(section, key_path, found, () if only is None else only)
    used = [task for task in tasks if only is None or task in only]
    rename = {task: names for task, names in section.rename.items() if task in used or task not in tasks}
    classes = {task: names for task, names in section.classes.items() if task in used or task not in tasks}
    return Member(found, key_path, used, rename, (k, n), classes, labels)


def _tasks_of(
    section: DataSet, key_path: str, layout: Layout, asked: Collection[str]
) -> tuple[list[str], dict[str, str]]:
    """The tasks that a set labels, and by task what its layout calls the label."""
    if unknown := [label for label in section.labels if label not in layout.classes]:
        raise UserError(
            f"{key_path}.labels: the set has no label '{unknown[0]}'; "
            f"{did_you_mean(unknown[0], layout.classes)}"
        )
    for label, task in section.labels.items():
        hint = did_you_mean(task, asked)
        if task not in asked and hint.startswith("did"):
            raise UserError(f"{key_path}.labels.{label}: this run has no task '{task}'; {hint}")
    names = {label: section.labels.get(label, label) for label in layout.classes}
    if twice := [task for task in names.values() if list(names.values()).count(task) > 1]:
        raise UserError(
            f"{key_path}.labels: two labels would become the task '{twice[0]}'; give one another name"
        )
    tasks = list(names.values()) if section.tasks is None else list(section.tasks)
    if lacking := [task for task in tasks if task not in names.values()]:
        what = f"it labels {', '.join(names.values())}" if names else "it has no labels"
        raise UserError(f"{key_path}.tasks: the set has no '{lacking[0]}'; {what}")
    for key, given in (("rename", section.rename), ("classes", section.classes)):
        if wrong := [label for label in given if label in section.labels and label not in names.values()]:
            right = f"{key_path}.{key}.{section.labels[wrong[0]]}"
            raise UserError(
                f"{key_path}.{key}.{wrong[0]}: the set's label '{wrong[0]}' has another name by `labels`; "
                f"write {right}"
            )
    return tasks, {task: label for label, task in names.items() if task != label}


def decode_options(config: Config) -> dict[str, dict[str, Any]]:
    """The post-processing options of each task."""
    return {name: dict(task.decode) for name, task in config.tasks.items()}


def val_loader(
    config: Config,
    found: Sets,
    size: Sequence[int],
    count: int | None,
    on: torch.device,
    workers: int | None = None,
) -> DataLoader:
    """The first ``count`` validation images, of each set its share of them; None: all."""
    images = data_loader.EvalSet(
        found, tuple(size), found.first(count), skip_errors=config.data.on_error == "skip"
    )
    pin = on.type == "cuda"
    return data_loader.eval_loader(
        images, config.eval.batch_size, workers=config.data.workers if workers is None else workers, pin=pin
    )


def build_pools(config: Config, found: Sets) -> list[Pool]:
    """Which images fill which slots of every batch. Raises UserError for images of which nothing would learn."""
    sections, whole = config.data.sets("train"), config.data.labelled
    bare = [name for name in sections if not set(found.labels(name)) & set(config.tasks)]
    if config.taught_by_average and (lacking := [t for t in config.tasks if t not in found.labelled()]):
        raise UserError(
            f"teacher.source: '{lacking[0]}' has no labels, so the average of the student's own weights would be "
            "all that it learns from; give it labels or another teacher, or leave the task out"
        )
    draws = {}
    for name, section in sections.items():
        key = f"{set_key_path(config, 'train', name)}.labelled"
        if section.labelled and name in bare:
            raise UserError(f"{key}: the set has no labels for a task of this run; leave it out")
        draws[name] = (
            Draw(section.weight, section.labelled, key) if section.labelled else Draw(section.weight, whole)
        )
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
        raise UserError(
            f"data.unlabelled: without a teacher nothing learns from unlabelled images{which}; set it to "
            f"false"
        )
    return made


def tell_unseen(found: Sets) -> None:
    """Warn of classes that a set is taken to label and that never occur in it."""
    for key_path, names in found.never():
        task = key_path.rpartition(".")[2]
        log.warning(
            "%s: %s never occurs in the set, so everything there is taught not to be it; if the set does not "
            "label it, say which "
            "classes of '%s' it labels with this key", key_path, ", ".join(names), task,
        )  # fmt: skip
