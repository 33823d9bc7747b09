"""One training of a study or a pipeline: kept where it is done, resumed where it was stopped, else begun."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..config import Config
from ..engine.train import train
from .steps import RunFolder


def finish(config: Config, *, overwrite: bool = False) -> dict[str, Any] | None:
    """The metrics of a run, read where it is finished, and "seconds", which adds up over its parts.

    Prints what it does and why. overwrite: trains also what is finished.
    Returns None when a signal stopped it. Raises UserError.
    """
    run = RunFolder(config)
    timing, done = run.path / "seconds.json", run.path / "metrics.json"
    spent = _read(timing) if timing.is_file() else {"seconds": 0.0}
    found = run.staleness()
    if found.done and not overwrite:
        print(f"already done: {done}", flush=True)
        run.adopt()
        return _read(done) | spent
    resume = found.resumes and not overwrite
    if resume:
        print(f"resumed: {run.path / 'last.pt'}", flush=True)
    else:
        if reason := found.reason or ("overwrite was asked for" if found.done or found.resumes else None):
            print(f"trained again: {reason}", flush=True)
        run.begins()
    before = spent["seconds"] if resume else 0.0
    began = time.perf_counter()
    metrics = train(config, resume=resume, overwrite=not resume)
    spent = {"seconds": round(before + time.perf_counter() - began, 1)}
    write_text(timing, json.dumps(spent) + "\n")
    if metrics is None:
        return None
    run.ended()
    return metrics | spent


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
