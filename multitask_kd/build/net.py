"""Config or checkpoint -> the network and its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint import load, load_weights
from ..compress.widths import resize
from ..config import Config, Model
from ..errors import UserError, as_user_error
from ..models.backbones import build_encoder
from ..models.multitask import MultiTaskNet, reads_encoder
from ..tasks.base import Task, build_task, kind_of


def check_classes(
    own: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]], tasks: Sequence[str], who: str
) -> None:
    """Raise UserError where ``other`` does not have, for every task, the same classes in the same order."""
    for task in tasks:
        if task not in other:
            raise UserError(f"{who} has no classes for the task '{task}'")
        mine, theirs = list(own[task]), list(other[task])
        if mine == theirs:
            continue
        if sorted(mine) == sorted(theirs):
            raise UserError(f"{who}: the classes of '{task}' are in another order: {theirs}, expected {mine}")
        lacking = [c for c in mine if c not in theirs]
        extra = [c for c in theirs if c not in mine]
        raise UserError(
            f"{who}: the classes of '{task}' differ: "
            + "; ".join(
                filter(None, [f"lacks {lacking}" if lacking else "", f"has {extra} besides" if extra else ""])
            )
        )


KEYS = ("encoder", "strides", "width", "mean", "std")  # of ``model``, and of an arch


@dataclass(frozen=True)
class Init:
    """A config, and the checkpoint of its ``model.start``, read once (None: it has none)."""

    config: Config
    content: dict[str, Any] | None = None


def resolve_init(config: Config) -> Init:
    """The config with the architecture of ``model.start`` in ``model`` and ``tasks.*.head``, and the
    checkpoint; the same config where there is none.

    Raises UserError for a file that is no checkpoint, for other tasks, and for a key that is given and says
    something else.
    """
    if config.model.start is None:
        return Init(config)
    content = load(config.model.start, "model.start")
    plan, path = content["arch"], config.model.start
    if set(plan["tasks"]) != set(config.tasks):
        own, other = " and ".join(config.tasks), " and ".join(plan["tasks"])
        raise UserError(
            f"model.start: {path} has heads for {other}, the config tasks {own}; null takes one out "
            f"(tasks.<name>=null)"
        )
    given = config.model.model_dump(mode="json")
    for key in KEYS:
        if key in config.model.model_fields_set and given[key] != plan[key]:
            raise UserError(
                f"model.{key}: {given[key]}, but the network of model.start ({path}) has {plan[key]}; leave "
                f"it out"
            )
    tasks = {
        name: _started_task(name, section, plan["tasks"][name], path)
        for name, section in config.tasks.items()
    }
    stride = max(plan["strides"])
    if any(n % stride for n in config.data.input_size):
        size = list(config.data.input_size)
        raise UserError(
            f"data.input_size: {size} are not multiples of the largest stride of model.start, {stride}"
        )
    model = Model(start=path, **{key: plan[key] for key in KEYS})
    return Init(config.model_copy(update={"model": model, "tasks": tasks}), content)


def _started_task(name: str, section: Any, part: Mapping[str, Any], path: str) -> Any:
    """A task's section with the head of the network that training starts from."""
    own, other = (kind_of(name, kind, f"tasks.{name}").kind for kind in (section.kind, part.get("kind")))
    if own != other:
        raise UserError(f"tasks.{name}.kind: {own}, but the network of model.start ({path}) has {other}")
    head = part["head"]
    for key, value in section.head.items():
        if head.get(key, value) != value or key not in head:
            has = head.get(key, "its default")
            raise UserError(
                f"tasks.{name}.head.{key}: {value}, but the network of model.start ({path}) has {has}; leave "
                f"it out"
            )
    return section.model_copy(update={"head": dict(head)})


def without_start(config: Config) -> Config:
    """The config of the same network with random weights, for a look at a config whose ``model.start`` is not
    there yet."""
    return config.model_copy(update={"model": config.model.model_copy(update={"start": None})})


def initial_student(init: Init, plan: Mapping[str, Any]) -> MultiTaskNet:
    """The network of ``plan`` as training begins: random, with the encoder's weights, or with all of
    ``model.start``."""
    config, content = init.config, init.content
    net = network(plan, config.model.weights)
    if content is not None:
        theirs = {name: task["classes"] for name, task in content["arch"]["tasks"].items()}
        own = {name: task["classes"] for name, task in plan["tasks"].items()}
        check_classes(own, theirs, list(own), f"model.start: {config.model.start}")
        load_weights(net, content["model"], "model.start")
    return net


def arch(init: Init, classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The student's architecture as plain data: what a checkpoint needs to build it again. classes: names by
    task."""
    config, content = init.config, init.content
    model = config.model.model_dump(mode="json", include=set(KEYS))
    if content is not None and "widths" in content["arch"]:
        model["widths"] = content["arch"]["widths"]
    for task in config.tasks:
        if task not in classes:
            raise UserError(
                f"tasks.{task}: the training data has no labels for it; it has "
                f"{', '.join(classes) or 'none at all'}. A task that "
                f"only a teacher knows needs its class names in data.classes.{task}"
            )
    tasks = {
        name: {
            "kind": kind_of(name, t.kind, f"tasks.{name}").kind,
            "classes": list(classes[name]),
            "head": dict(t.head),
        }
        for name, t in config.tasks.items()
    }
    return {**model, "tasks": tasks, "input_size": list(config.data.input_size)}


def network(arch: Mapping[str, Any], weights: str | None = None) -> MultiTaskNet:
    """The network of an ``arch``; ``weights`` are the encoder's starting ones. One that was pruned has
    ``widths`` in its arch.

    Raises UserError, and ValueError for widths that do not fit the network.
    """
    strides = arch["strides"]
    backbone = build_encoder(arch["encoder"], max_stride=max(strides), weights=weights)
    channels = {s: backbone.out_channels[s.bit_length() - 1] for s in strides}
    if empty := [s for s in strides if not channels[s]]:
        raise UserError(
            f"model.strides: the encoder '{arch['encoder']}' has no features at stride {empty[0]}; leave it "
            f"out"
        )
    heads = {}
    for name, task in arch["tasks"].items():
        kind = kind_of(name, task.get("kind"), f"arch.tasks.{name}")
        width = channels if reads_encoder(kind.Head) else arch["width"]
        heads[name] = kind.Head(width, strides, len(task["classes"]), **task["head"])
    net = MultiTaskNet(backbone, heads, strides, arch["width"], arch["mean"], arch["std"])
    resize(net, arch.get("widths", {}))
    return net


def tasks(
    arch: Mapping[str, Any], net: MultiTaskNet, hard: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Task]:
    """The tasks of a network; ``hard`` are the options of their hard losses."""
    found = {
        name: build_task(
            name, part.get("kind"), part["classes"], net.heads[name].strides, (hard or {}).get(name)
        )
        for name, part in arch["tasks"].items()
    }
    for name, task in found.items():
        as_user_error(f"tasks.{name}.hard", task.check_names)
    return found


def task_kinds(arch: Mapping[str, Any]) -> dict[str, type[Task]]:
    """The kind of every task of an ``arch``."""
    return {
        name: kind_of(name, part.get("kind"), f"arch.tasks.{name}") for name, part in arch["tasks"].items()
    }


def from_checkpoint(content: Mapping[str, Any], where: str) -> MultiTaskNet:
    """The network that a checkpoint holds, with its weights."""
    net = as_user_error(where, network, content["arch"])
    load_weights(net, content["model"], where)
    return net
