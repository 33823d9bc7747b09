"""What a run tells about itself beside its curves: what learns from what, the sets, what could not be read."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ..batch import Batch
from ..models.multitask import count_parameters
from .log import Progress
from .run import Run
from .step import StepResult

log = logging.getLogger(__name__)


def announce(run: Run, progress: Progress) -> None:
    """What learns from what: a line, and one for every set where there are several."""
    labels = sum(len(p.indices) for p in run.pools if p.labelled)
    rest = sum(len(p.indices) for p in run.pools if not p.labelled)
    members = run.teachers.members if run.teachers else {}
    who = "student" if members else "network"
    line = f"{who} {count_parameters(run.student) / 1e6:.2f} M parameters on {run.device}; {labels} labelled images"
    if rest:
        line += f" and {rest} unlabelled"
    for name, member in members.items():
        count = count_parameters(member.net)
        line += f"; {'teacher' if len(members) == 1 else name}" + (f" {count / 1e6:.2f} M" if count else "")
        line += (
            f" ({', '.join(task for task, s in run.teachers.subjects.items() if name in s.teachers)})"
            if len(members) > 1
            else ""
        )
    progress.say(line)
    if len(run.train_layout.members) > 1:
        for line in sets_lines(run):
            progress.say(line)


def sets_lines(run: Run) -> list[str]:
    """By set: its images, what is labelled in them, and its slots in every batch."""
    lines = []
    for name in run.train_layout.members:
        own = [p for p in run.pools if run.train_layout.set_of(p.indices[0]) == name]
        what = " and ".join(task for task in run.train_layout.labels(name) if task in run.tasks)
        counts = [
            f"{len(p.indices)} with {what}" if p.labelled else f"{len(p.indices)} without labels" for p in own
        ]
        slots = sum(p.share for p in own)
        lines.append(
            f"set {name}: " + (f"{', '.join(counts)}; {slots} slots of every batch" if own else "left out")
        )
    return lines


@torch.no_grad()
def by_set(run: Run, batch: Batch, result: StepResult) -> dict[str, float]:
    """Where there are several sets: the hard and soft losses of each set's images in the last batch, before
    the step."""
    if len(run.train_layout.members) == 1:
        return {}
    found = {}
    names = [run.train_layout.set_of(index) for index in batch.indices.tolist()]
    for name in dict.fromkeys(names):
        rows = torch.tensor([row for row, of in enumerate(names) if of == name], device=run.device)
        part = batch.of(rows)
        targets = {task: target for task, target in part.targets.items() if target["labelled"].any()}
        losses = run.distiller.compare(
            result.preds, result.soft_preds, replace(part, targets=targets), result.teacher, rows
        )
        found |= {f"set/{name}/{loss}": float(value) for loss, value in losses.items()}
    return found


def report_skipped(messages: list[str]) -> None:
    broken = sorted(set(messages))
    for message in broken[:10]:
        log.warning("skipped: %s", message)
    if broken:
        log.warning("images that could not be read: %d; replaced %d times", len(broken), len(messages))
