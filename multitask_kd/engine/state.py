"""All that a run is at a step, on disk and back; and the signal that asks it to stop."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..config import dump
from ..errors import UserError
from ..models.multitask import count_parameters
from .evaluate import main_score
from .log import LossMeter
from .optim import Ema
from .run import Run


class State:
    """All that a run is at a step, on disk and back. The sampler has no state: batch i is a function of i."""

    def __init__(
        self, run: Run, optimizer: Any, scaler: Any, ema: Ema | None, meter: LossMeter, folder: Path
    ):
        self.run, self.optimizer, self.scaler, self.ema = run, optimizer, scaler, ema
        self.meter, self.folder = meter, folder
        self.best = float("-inf")
        self.teacher, self.start = teachers_digest(run), run.start_digest
        self.metrics: dict[str, Any] = {}

    def result(self) -> torch.nn.Module:
        """The network that is evaluated and saved: the average of weights where there is one."""
        return self.ema.net if self.ema else self.run.student

    def _content(self, step: int) -> dict[str, Any]:
        return {
            "arch": self.run.arch,
            "params": count_parameters(self.run.student),
            "labelled_images": sum(len(p.indices) for p in self.run.pools if p.labelled),
            "unlabelled_images": sum(len(p.indices) for p in self.run.pools if not p.labelled),
            "model": self.result().state_dict(),
            "metrics": self.metrics,
            "step": step,
            "config": dump(self.run.config),
        }

    def keep_best(self, metrics: dict[str, Any], step: int) -> None:
        """Write best.pt when the mean of the tasks' main metrics is the highest so far."""
        self.metrics = metrics
        score = main_score(metrics, self.run.tasks)
        if score > self.best:
            self.best = score
            checkpoint.save(self.folder / "best.pt", self._content(step))

    def save(self, step: int) -> None:
        resume = {
            "distiller": self.run.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "meter": self.meter.state(),
            "best": self.best,
            "random": checkpoint.random_state(),
            "teacher": self.teacher,
            "start": self.start,
        }
        checkpoint.save(self.folder / "last.pt", self._content(step) | {"resume": resume})

    def load(self) -> int:
        """Restore last.pt; returns its step."""
        path = self.folder / "last.pt"
        content = checkpoint.load(path, "--resume")
        if "resume" not in content:
            raise UserError(f"--resume: {path} holds a network but no state of training")
        resume = content["resume"]
        if resume.get("teacher") != self.teacher:
            files = " or ".join(t.path or t.source for t in self.run.config.named_teachers.values())
            raise UserError(
                f"--resume: {files} holds other weights than when the run began; put the teacher back, or "
                f"start again with "
                "--overwrite"
            )
        if resume.get("start") != self.start:
            raise UserError(
                f"--resume: {self.run.config.model.start} holds other weights than when the run began; put "
                f"the file back, or "
                "start again with --overwrite"
            )
        self._check_classes(content["arch"])
        checkpoint.load_weights(self.run.distiller, resume["distiller"], "--resume")
        self.optimizer.load_state_dict(resume["optimizer"])
        self.scaler.load_state_dict(resume["scaler"])
        if self.ema:
            checkpoint.load_weights(self.ema.net, content["model"], "--resume")
            self.ema.updates = resume["ema_updates"]
        self.meter.restore(resume["meter"])
        self.best, self.metrics = resume["best"], content["metrics"]
        checkpoint.restore_random_state(resume["random"])
        return content["step"]

    def _check_classes(self, before: dict[str, Any]) -> None:
        """Raise UserError where a task's classes are others, or in another order, than when the run began:
        the same weights would then say other classes."""
        for name, task in self.run.arch["tasks"].items():
            was, now = before["tasks"].get(name, {}).get("classes"), task["classes"]
            if was is not None and list(was) != list(now):
                raise UserError(
                    f"--resume: the classes of '{name}' were {', '.join(was)} when the run began, and the data "
                    f"has {', '.join(now)}; put the data back, or start again with --overwrite"
                )


def teachers_digest(run: Run) -> str | None:
    """A fingerprint of what teaches, where it comes from files: of a checkpoint's weights; else of the file,
    which may hold a program besides, and of the weights where it is a folder or none."""
    if run.teachers is None or run.config.taught_by_average:
        return None
    found = []
    for (place, section), member in zip(
        run.config.named_teachers.items(), run.teachers.members.values(), strict=True
    ):
        whole = section.source != "checkpoint" and section.path is not None and Path(section.path).is_file()
        found.append(checkpoint.file_digest(section.path, place) if whole else checkpoint.digest(member.net))
    return found[0] if len(found) == 1 else ",".join(found)


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop; the second stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
