"""Truth, teacher and student side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..batch import Batch
from ..build import Recipe, decode_options
from ..data.base import Layout, Sample
from ..data.loader import EvalSet, collate_eval
from ..report.pictures import panel, side_by_side
from ..tasks.base import Task
from .evaluate import evaluating, predict

SHOWN = 0.3  # detections below this score are not drawn


def draw(run: Recipe, student: torch.nn.Module, count: int) -> dict[str, np.ndarray]:
    """One picture for each of ``count`` validation images, spread over the set: uint8 [H,W,3] by name."""
    nets: dict[str, Callable] = {"teacher": run.teacher} if run.teacher else {}
    nets["student"] = student
    spread = np.linspace(0, len(run.val_layout) - 1, num=min(count, len(run.val_layout)), dtype=int)
    rows = compare(run.val_layout, spread, nets, run.tasks, run.config.data.input_size, decode_options(run.config), run.device)
    names = {name: task.classes for name, task in run.tasks.items()}
    return {f"{k:02d}": side_by_side([row], ["truth", *nets], class_names=names) for k, row in enumerate(rows)}


def compare(
    layout: Layout,
    indices: np.ndarray,
    nets: Mapping[str, Callable],
    tasks: Mapping[str, Task],
    size: tuple[int, int],
    decode: Mapping[str, Mapping[str, Any]],
    device: torch.device,
) -> list[list[np.ndarray]]:
    """A row of panels an image: the truth, then what each of ``nets`` says."""
    images = EvalSet(layout, size, None, skip_errors=True)
    names = {name: task.classes for name, task in tasks.items()}
    rows = []
    for index in indices:
        batch, _ = collate_eval([images[int(index)]])
        if batch is None:  # an image that cannot be read is reported by the evaluation
            continue
        sample = layout.read(int(index))
        rows.append([_truth(sample, names)] + [_said(net, tasks, batch.to(device), decode, sample, names) for net in nets.values()])
    return rows


def _truth(sample: Sample, names: Mapping[str, tuple[str, ...]]) -> np.ndarray:
    return panel(sample.image, mask=sample.mask, boxes=sample.boxes, classes=sample.classes, class_names=names)


def _said(
    net: Callable,
    tasks: Mapping[str, Task],
    batch: Batch,
    decode: Mapping[str, Mapping[str, Any]],
    sample: Sample,
    names: Mapping[str, tuple[str, ...]],
) -> np.ndarray:
    if isinstance(net, torch.nn.Module):
        with evaluating(net):
            said = predict(net, tasks, batch, decode)[0]
    else:
        said = predict(net, tasks, batch, decode)[0]
    shown: dict[str, Any] = {}
    if "seg" in said:
        shown["mask"] = said["seg"].cpu().numpy()
    if "det" in said:
        sure = said["det"].scores > SHOWN
        boxes, scores, classes = (t[sure].cpu().numpy() for t in said["det"])
        shown |= {"boxes": boxes, "scores": scores, "classes": classes}
    return panel(sample.image, class_names=names, **shown)
