"""Truth, teacher and student side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..build import Run, decode_options
from ..data.base import Layout, Sample
from ..data.loader import EvalSet, collate_eval
from ..errors import UserError
from ..report.pictures import panel, side_by_side
from ..tasks.base import Task
from .evaluate import evaluating, predict

SHOWN = 0.3  # detections below this score are not drawn


@dataclass(frozen=True)
class Speaker:
    """A network in a picture, with its own tasks, input (H, W) in pixels and post-processing."""

    net: Callable
    tasks: Mapping[str, Task]
    size: tuple[int, int]
    decode: Mapping[str, Mapping[str, Any]]


def draw(run: Run, student: torch.nn.Module, count: int) -> dict[str, np.ndarray]:
    """One picture for each of ``count`` validation images, spread over the set: uint8 [H,W,3] by name."""
    size, decode = run.config.data.input_size, decode_options(run.config)
    speakers = teacher_speakers(run)
    speakers["student" if speakers else "network"] = Speaker(student, run.tasks, size, decode)
    spread = np.linspace(0, len(run.val_layout) - 1, num=min(count, len(run.val_layout)), dtype=int)
    names = {name: task.classes for name, task in run.tasks.items()}
    rows = compare(run.val_layout, spread, speakers, run.device, names)
    return {f"{k:02d}": side_by_side([row], ["truth", *speakers], class_names=names) for k, row in enumerate(rows)}


def teacher_speakers(run: Run) -> dict[str, Speaker]:
    """Every teacher, with its own input size."""
    members = run.teachers.members if run.teachers else {}
    decode = decode_options(run.config)
    found = {}
    for name, member in members.items():
        shown = "teacher" if len(members) == 1 else f"teacher {name}"
        own = {task: options for task, options in decode.items() if task in member.tasks}
        found[shown] = Speaker(member, member.tasks, run.teachers.sights[name].own, own)
    return found


def draw_taught(run: Run, count: int) -> dict[str, np.ndarray]:
    """What the teachers say of ``count`` training images that lack labels: uint8 [H,W,3] by name."""
    speakers = teacher_speakers(run)
    indices = np.array(run.unlabelled(count), dtype=int)
    names = {name: task.classes for name, task in run.tasks.items()}
    rows = compare(run.train_layout, indices, speakers, run.device, names)
    return {f"{k:02d}": side_by_side([row], ["labels", *speakers], class_names=names) for k, row in enumerate(rows)}


def compare(
    layout: Layout,
    indices: np.ndarray,
    speakers: Mapping[str, Speaker],
    device: torch.device,
    names: Mapping[str, tuple[str, ...]],
) -> list[list[np.ndarray]]:
    """A row of panels an image: the truth, then what each of ``speakers`` says.

    names: class names by task, of all of them, so that a class has one colour in every panel.
    """
    rows = []
    for index in map(int, indices):
        try:
            sample = layout.read(index)
        except UserError:  # the evaluation reports an image that cannot be read
            continue
        said = [_said(speaker, layout, index, sample, device, names) for speaker in speakers.values()]
        rows.append([_truth(sample, names), *said])
    return rows


def _truth(sample: Sample, names: Mapping[str, tuple[str, ...]]) -> np.ndarray:
    shown: dict[str, Any] = {"mask": sample.mask} if "seg" in names else {}
    if "det" in names:
        shown |= {"boxes": sample.boxes, "classes": sample.classes}
    return panel(sample.image, class_names=names, **shown)


def _said(
    speaker: Speaker, layout: Layout, index: int, sample: Sample, device: torch.device, names: Mapping[str, tuple[str, ...]]
) -> np.ndarray:
    batch, _ = collate_eval([EvalSet(layout, speaker.size, [index], skip_errors=False)[0]])
    with evaluating(speaker.net):
        said = predict(speaker.net, speaker.tasks, batch.to(device), speaker.decode)[0]
    shown: dict[str, Any] = {}
    if "seg" in said:
        shown["mask"] = said["seg"].cpu().numpy()
    if "det" in said:
        sure = said["det"].scores > SHOWN
        boxes, scores, classes = (t[sure].cpu().numpy() for t in said["det"])
        shown |= {"boxes": boxes, "scores": scores, "classes": classes}
    return panel(sample.image, class_names=names, **shown)
