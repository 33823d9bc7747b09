"""Evaluation: network and loader -> metrics at the original size."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import build
from ..batch import Batch
from ..data.base import Layout
from ..errors import UserError
from ..precision import resolve_device
from ..tasks.base import Task, figure_names
from .networks import Network, open_network

log = logging.getLogger(__name__)


@contextlib.contextmanager
def evaluating(net: Callable) -> Iterator[None]:
    """``net`` in eval mode, put back as it was. A teacher is no module and always in eval."""
    if not isinstance(net, nn.Module):
        yield
        return
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


@torch.no_grad()
def predict(
    net: Callable, tasks: Mapping[str, Task], batch: Batch, decode: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """By image, by task: what ``Task.restore`` gives, at the original size. ``batch.truths`` tells the
    geometry."""
    output = net(batch.images)
    size = tuple(batch.images.shape[2:])
    decoded = {
        name: task.decode(output.preds[name], size, **decode.get(name, {})) for name, task in tasks.items()
    }
    return [
        {name: task.restore(decoded[name][i], truth.geometry) for name, task in tasks.items()}
        for i, truth in enumerate(batch.truths)
    ]


def evaluate(
    net: Callable,
    tasks: Mapping[str, Task],
    loader: Iterable,
    device: torch.device,
    *,
    decode: Mapping[str, Mapping[str, Any]],
    channels_last: bool = False,
    on_skip: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """{"images": n, "skipped": k, <task>: {metric: percent}}. Of each image only its boxes are kept, 2.4 kB
    at most."""
    return figures(
        *gather(net, tasks, loader, device, decode=decode, channels_last=channels_last, on_skip=on_skip)
    )


def figures(metrics: Mapping[str, Any], images: int, skipped: int) -> dict[str, Any]:
    """What ``evaluate`` returns, of what ``gather`` found."""
    return {
        "images": images,
        "skipped": skipped,
        **{name: metric.compute() for name, metric in metrics.items()},
    }


@torch.no_grad()
def gather(
    net: Callable,
    tasks: Mapping[str, Task],
    loader: Iterable,
    device: torch.device,
    *,
    decode: Mapping[str, Mapping[str, Any]],
    channels_last: bool = False,
    on_skip: Callable[[str], None] = lambda message: None,
) -> tuple[dict[str, Any], int, int]:
    """By task its metric, with every image in it; the number of images, and of those that could not be read."""
    metrics = {name: task.metric() for name, task in tasks.items()}
    images = skipped = 0
    with evaluating(net):
        for batch, messages in loader:
            for message in messages:
                on_skip(message)
            skipped += len(messages)
            if batch is None:
                continue
            batch = batch.to(device, channels_last=channels_last)
            for truth, prediction in zip(batch.truths, predict(net, tasks, batch, decode), strict=True):
                for name, task in tasks.items():
                    task.score(metrics[name], prediction[name], truth)
            images += len(batch.truths)
    if not images:
        raise UserError("data.val: none of its images could be read")
    return metrics, images, skipped


def main_score(metrics: Mapping[str, Any], tasks: Mapping[str, Task]) -> float:
    """Mean of the tasks' main metrics: what "best" means. A metric without truth counts as 0."""
    return sum(metrics[name][task.main_metric] or 0.0 for name, task in tasks.items()) / len(tasks)


def headline(metrics: Mapping[str, Any], tasks: Mapping[str, Task]) -> dict[str, float | None]:
    """The few figures shown in one line of progress, by their names in tables."""
    return {label: metrics[name][key] for (name, key), label in figure_names(tasks).items()}


def evaluate_checkpoint(config: Any, path: str, where: str = "--checkpoint") -> dict[str, Any]:
    """A network from a file on the config's ``data.val``, with the same figures as during its training.

    The network comes from the file alone, a checkpoint or one of tools/export.py; the config gives data,
    decoding and device. Raises UserError for a network whose classes are not the data's.
    """
    build.check(config)
    on = resolve_device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    network = open_network(path, where, on, channels_last=config.run.channels_last)
    found = build.open_sets(config, "val", network.classes, only=network.tasks)
    check_data(found, network.arch, f"{where}: {path}")
    return figures(*gather_network(config, network, found))


def gather_network(
    config: Any, network: Network, found: Layout, images: int | None = None
) -> tuple[dict[str, Any], int, int]:
    """``gather`` of a network on the first ``images`` of ``found``, the config's data.val; None: on all."""
    return gather(
        network.run,
        network.tasks,
        build.val_loader(config, found, network.size, images, network.device),
        network.device,
        decode=build.decode_options(config),
        channels_last=config.run.channels_last,
        on_skip=lambda message: log.warning("skipped: %s", message),
    )


def check_data(found: Any, arch: Mapping[str, Any], who: str) -> None:
    """Raise UserError where the layout ``found`` of data.val has other classes than the network ``who``, or
    none of its tasks."""
    classes = {name: task["classes"] for name, task in arch["tasks"].items()}
    shared = [t for t in classes if t in found.classes]
    if not shared:
        there = ", ".join(found.offered()) or "none at all"
        raise UserError(f"{who} is trained for {', '.join(classes)}, and data.val has labels for {there}")
    build.check_classes(found.classes, classes, shared, who)
