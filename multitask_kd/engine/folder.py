"""A run's folder: whether a run may write there, or go on with what is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..config import Config
from ..errors import UserError

RESULTS = ("config.yaml", "last.pt", "best.pt", "metrics.jsonl", "metrics.json")  # what a run writes


def check_folder(folder: Path, resolved: str, *, resume: bool, overwrite: bool) -> None:
    """Raise UserError where the run would destroy another, or resume something else."""
    if resume:
        if not (folder / "last.pt").is_file():
            raise UserError(
                f"run.dir: there is no {folder / 'last.pt'} to resume from; leave --resume out to start"
            )
        written = (
            (folder / "config.yaml").read_text(encoding="utf-8")
            if (folder / "config.yaml").is_file()
            else resolved
        )
        if difference := differences(written, resolved):
            raise UserError(
                f"--resume: the config is not the run's: {difference}; resume with --config "
                f"{folder / 'config.yaml'}, which is"
            )
    elif not overwrite and any((folder / name).exists() for name in ("config.yaml", "last.pt", "best.pt")):
        raise UserError(
            f"run.dir: {folder} holds a run already; continue it with --resume, replace it with --overwrite, "
            f"or change run.dir"
        )


def clear_folder(folder: Path) -> None:
    """Make the run's folder, without what an earlier run left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    for rest in (*(folder / "tensorboard").glob("events.*"), *folder.glob(".*.part")):
        rest.unlink()


FREE = (
    *(
        "run.dir",
        "run.threads",
        "run.device",
        "data.workers",
        "train.log_every",
        "train.save_every",
        "train.log_gradients",
    ),
    *("train.check", "eval.pictures", "teacher.floor", "teacher.check_images"),
)


def is_free(key: str) -> bool:
    """Whether a key of a config, or one that it lies in, cannot change a result; a teacher of several is like
    the only one."""
    key = re.sub(r"^teachers\.\w+\.", "teacher.", key)
    return any(f"{key}.".startswith(f"{free}.") for free in FREE)


def differences(written: str, resolved: str) -> str:
    """The first keys in which two resolved configs differ; those in ``FREE``, which cannot change a result,
    may."""
    before, now = (_flat(yaml.safe_load(text) or {}) for text in (written, resolved))
    new = {
        k: v for k, v in _flat(Config().model_dump(mode="json")).items() if k not in before
    }  # keys that came after the run
    keys = [k for k in {**before, **now} if not is_free(k)]
    changed = [k for k in keys if before.get(k, new.get(k)) != now.get(k)]
    if not changed and [k for k in before if k in now] != [k for k in now if k in before]:
        return (
            "the order of its keys"  # parameters, and so the optimizer's state, are in the order of the tasks
        )
    more = [f"and {len(changed) - 3} more"] if len(changed) > 3 else []
    return "; ".join([f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in changed[:3]] + more)


def _flat(section: dict[str, Any], place: str = "") -> dict[str, Any]:
    """{"train": {"optimizer": {"lr": 1}}} -> {"train.optimizer.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= (
            _flat(value, f"{place}{key}.") if isinstance(value, dict) and value else {f"{place}{key}": value}
        )
    return flat
