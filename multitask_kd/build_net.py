"""Config or checkpoint -> the network and its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .checkpoint import load_weights
from .config import Config
from .errors import UserError, told
from .models.backbones import build_encoder
from .models.multitask import MultiTaskNet
from .tasks.base import TASKS, Task


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
            raise UserError(f"tasks.{task}: the training data has no labels for it; it has {', '.join(classes) or 'none at all'}")
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
