"""Config or checkpoint -> the network and its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint import load, load_weights
from ..compress.widths import resize
from ..config import Config, Model
from ..errors import UserError, as_user_error
from ..models.backbones import build_encoder
from ..models.multitask import MultiTaskNet
from ..tasks.base import TASKS, Task


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


KEYS = ("encoder", "strides", "width", "mean", "std")  # of ``model``, and of an arch


def start(config: Config) -> dict[str, Any] | None:
    """The checkpoint that ``model.start`` names. Raises UserError."""
    return None if config.model.start is None else load(config.model.start, "model.start")


def resolve_init(config: Config) -> Config:
    """The config with the architecture of ``model.start`` in ``model`` and ``tasks.*.head``; the same config where there is none.

    Raises UserError for a file that is none of ours, for other tasks, and for a key that is given and says something else.
    """
    content = start(config)
    if content is None:
        return config
    plan, path = content["arch"], config.model.start
    if set(plan["tasks"]) != set(config.tasks):
        own, other = " and ".join(config.tasks), " and ".join(plan["tasks"])
        raise UserError(f"model.start: {path} has heads for {other}, the config tasks {own}; null takes one out (tasks.det=null)")
    given = config.model.model_dump(mode="json")
    for key in KEYS:
        if key in config.model.model_fields_set and given[key] != plan[key]:
            raise UserError(f"model.{key}: {given[key]}, but the network of model.start ({path}) has {plan[key]}; leave it out")
    tasks = {}
    for name, section in config.tasks.items():
        head = plan["tasks"][name]["head"]
        for key, value in section.head.items():
            if head.get(key, value) != value or key not in head:
                has = head.get(key, "its default")
                raise UserError(
                    f"tasks.{name}.head.{key}: {value}, but the network of model.start ({path}) has {has}; leave it out"
                )
        tasks[name] = section.model_copy(update={"head": dict(head)})
    stride = max(plan["strides"])
    if any(n % stride for n in config.data.input_size):
        size = list(config.data.input_size)
        raise UserError(f"data.input_size: {size} are not multiples of the largest stride of model.start, {stride}")
    model = Model(start=path, **{key: plan[key] for key in KEYS})
    return config.model_copy(update={"model": model, "tasks": tasks})


def without_start(config: Config) -> Config:
    """The config of the same network with random weights, for a look at a config whose ``model.start`` is not there yet."""
    return config.model_copy(update={"model": config.model.model_copy(update={"start": None})})


def student(config: Config, plan: Mapping[str, Any]) -> MultiTaskNet:
    """The network of ``plan`` as training begins: random, with the encoder's weights, or with all of ``model.start``."""
    net = network(plan, config.model.weights)
    if (content := start(config)) is not None:
        theirs = {name: task["classes"] for name, task in content["arch"]["tasks"].items()}
        own = {name: task["classes"] for name, task in plan["tasks"].items()}
        check_classes(own, theirs, list(own), f"model.start: {config.model.start}")
        load_weights(net, content["model"], "model.start")
    return net


def arch(config: Config, classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The student's architecture as plain data: what a checkpoint needs to build it again. ``config``: as ``resolve_init`` gives it."""
    model = config.model.model_dump(mode="json", include=set(KEYS))
    if (content := start(config)) is not None and "widths" in content["arch"]:
        model["widths"] = content["arch"]["widths"]
    for task in config.tasks:
        if task not in classes:
            raise UserError(f"tasks.{task}: the training data has no labels for it; it has {', '.join(classes) or 'none at all'}")
    tasks = {name: {"classes": list(classes[name]), "head": dict(t.head)} for name, t in config.tasks.items()}
    return {**model, "tasks": tasks, "input_size": list(config.data.input_size)}


def network(arch: Mapping[str, Any], weights: str | None = None) -> MultiTaskNet:
    """The network of an ``arch``; ``weights`` are the encoder's starting ones. One that was cut has ``widths`` in its arch.

    Raises UserError, and ValueError for widths that do not fit the network.
    """
    strides = arch["strides"]
    backbone = build_encoder(arch["encoder"], max_stride=max(strides), weights=weights)
    if empty := [s for s in strides if not backbone.out_channels[s.bit_length() - 1]]:
        raise UserError(f"model.strides: the encoder '{arch['encoder']}' has no features at stride {empty[0]}; leave it out")
    heads = {
        name: TASKS.get(name, "arch").Head(arch["width"], strides, len(task["classes"]), **task["head"])
        for name, task in arch["tasks"].items()
    }
    net = MultiTaskNet(backbone, heads, strides, arch["width"], arch["mean"], arch["std"])
    resize(net, arch.get("widths", {}))
    return net


def tasks(arch: Mapping[str, Any], net: MultiTaskNet, hard: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Task]:
    """The tasks of a network; ``hard`` are the options of their hard losses."""
    return {
        name: TASKS.build(name, (hard or {}).get(name, {}), f"tasks.{name}.hard", part["classes"], net.heads[name].strides)
        for name, part in arch["tasks"].items()
    }


def from_checkpoint(content: Mapping[str, Any], where: str) -> MultiTaskNet:
    """The network that a checkpoint holds, with its weights."""
    net = as_user_error(where, network, content["arch"])
    load_weights(net, content["model"], where)
    return net
