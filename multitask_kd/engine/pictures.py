"""Labels and the predictions of networks side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..build import decode_options
from ..data.base import Layout, Sample
from ..data.loader import EvalSet, collate_eval
from ..errors import UserError
from ..report.layers import Layer
from ..report.pictures import panel, side_by_side
from ..tasks.base import Task
from .evaluate import evaluating, predict
from .run import Run

SHOWN = 0.3  # predictions with a score below this are not drawn


@dataclass(frozen=True)
class DrawnNetwork:
    """A network whose predictions are drawn. size: (H, W) of its input in pixels; decode: options by task."""

    net: Callable
    tasks: Mapping[str, Task]
    size: tuple[int, int]
    decode: Mapping[str, Mapping[str, Any]]


def draw(run: Run, student: torch.nn.Module, count: int) -> dict[str, np.ndarray]:
    """One picture for each of ``count`` validation images, spread over the set: uint8 [H,W,3] by name."""
    networks = drawn_teachers(run)
    own = DrawnNetwork(student, run.tasks, run.config.data.input_size, decode_options(run.config))
    networks["student" if networks else "network"] = own
    spread = np.linspace(0, len(run.val_layout) - 1, num=min(count, len(run.val_layout)), dtype=int)
    rows = compare(run.val_layout, spread, networks, run.device, run.tasks)
    return _pictures(rows, ["truth", *networks], run.tasks)


def draw_taught(run: Run, count: int) -> dict[str, np.ndarray]:
    """The teachers' predictions on ``count`` training images that lack labels: uint8 [H,W,3] by name."""
    networks = drawn_teachers(run)
    rows = compare(run.train_layout, run.unlabelled(count), networks, run.device, run.tasks)
    return _pictures(rows, ["labels", *networks], run.tasks)


def drawn_teachers(run: Run) -> dict[str, DrawnNetwork]:
    """Every teacher, with its own input size."""
    members = run.teachers.members if run.teachers else {}
    decode = decode_options(run.config)
    found = {}
    for name, member in members.items():
        shown = "teacher" if len(members) == 1 else f"teacher {name}"
        own = {task: options for task, options in decode.items() if task in member.tasks}
        found[shown] = DrawnNetwork(member, member.tasks, run.teachers.geometries[name].own, own)
    return found


def compare(
    layout: Layout,
    indices: Iterable[int],
    networks: Mapping[str, DrawnNetwork],
    device: torch.device,
    tasks: Mapping[str, Task],
) -> list[list[np.ndarray]]:
    """A row of panels an image: its labels, then the predictions of each of ``networks``.

    tasks: all that are drawn; a class has one colour in every panel. An image that cannot be read has no row.
    """
    labelled, rows = _labelled_by(layout, tasks), []
    for index in map(int, indices):
        try:
            sample = layout.read(index)
        except UserError:  # the evaluation reports an image that cannot be read
            continue
        drawn = [label_layers(labelled, sample)]
        drawn += [_prediction_layers(network, layout, index, device) for network in networks.values()]
        rows.append([_panel(sample.image, tasks, layers) for layers in drawn])
    return rows


def with_legend(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], tasks: Mapping[str, Task]
) -> np.ndarray:
    """Panels of ``compare`` in one picture uint8 [H,W,3]: titles above the columns, a legend below."""
    hatched = any(task.is_map and task.has_classes for task in tasks.values())
    return side_by_side(rows, titles, class_names=class_names(tasks), hatched=hatched)


def maps_first(tasks: Mapping[str, Task] | Mapping[str, type[Task]]) -> list[str]:
    """Tasks in the order in which they are drawn and choose colours: those of maps before the others."""
    return sorted(tasks, key=lambda name: not tasks[name].is_map)


def class_names(tasks: Mapping[str, Task]) -> dict[str, tuple[str, ...]]:
    """Class names by task, as ``report.pictures`` takes them; none of a kind that is not drawn in colours."""
    found = {name: tasks[name] for name in maps_first(tasks)}
    return {name: task.classes if task.coloured else () for name, task in found.items()}


def label_layers(tasks: Mapping[str, Task], sample: Sample) -> dict[str, Layer]:
    """What an image's labels look like, by task; a task that is not labelled is left out."""
    return {
        name: task.label_layer(sample.labels[name]) for name, task in tasks.items() if name in sample.labels
    }


def missing_text(tasks: Mapping[str, Task], layers: Mapping[str, Layer]) -> str:
    """What a picture says of the ``tasks`` not in ``layers``: "no boxes", "no mask, lane", "no labels"."""
    lacking = [task for name, task in tasks.items() if name not in layers]
    if not lacking:
        return ""
    if len(lacking) == len(tasks):
        return "no labels"
    return "no " + ", ".join(task.label_word if task.is_default else task.name for task in lacking)


def _labelled_by(layout: Layout, tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks that a layout labels, with its class names."""
    return {
        name: task
        if task.classes == layout.classes[name]
        else type(task)(name, layout.classes[name], task.strides)
        for name, task in tasks.items()
        if name in layout.classes
    }


def _prediction_layers(
    network: DrawnNetwork, layout: Layout, index: int, device: torch.device
) -> dict[str, Layer]:
    batch, _ = collate_eval([EvalSet(layout, network.size, [index], skip_errors=False)[0]])
    with evaluating(network.net):
        found = predict(network.net, network.tasks, batch.to(device), network.decode)[0]
    return {name: task.prediction_layer(found[name], SHOWN) for name, task in network.tasks.items()}


def _panel(image: np.ndarray, tasks: Mapping[str, Task], layers: Mapping[str, Layer]) -> np.ndarray:
    ordered = [layers[name] for name in maps_first(tasks) if name in layers]
    return panel(image, ordered, class_names=class_names(tasks), missing=missing_text(tasks, layers))


def _pictures(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], tasks: Mapping[str, Task]
) -> dict[str, np.ndarray]:
    """Each row with its titles and a legend, by its number."""
    return {f"{k:02d}": with_legend([row], titles, tasks) for k, row in enumerate(rows)}
