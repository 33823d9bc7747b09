"""A search: one config trained under many settings, the table of them, and the best one as a config."""

from __future__ import annotations

import contextlib
import importlib
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import dump
from ..engine.columns import tasks_of
from ..engine.evaluate import headline
from ..engine.train import train
from ..errors import UserError
from .search_config import load_search
from .search_report import write_results
from .search_space import Plan, Values, distributions, propose, score, setting, values_of
from .search_store import close_left_over, latest, open_study, remember, row_of, settled, sole_owner

GIVE_UP = 3  # trials that fail before any succeeds: the cause is then not their settings


def run_search(config: str | Path, space: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any] | None:
    """Train the config in ``config`` with ``overrides`` under the settings of the search in ``space``; what
    was done by an earlier call is kept.

    Writes into the search's folder, after every trial: results.json, results.md, best.yaml, plot.png;
    journal.log is what a later call goes on from. Returns the results, or None when a signal stopped it.
    Raises UserError.
    """
    check_installed()
    plan = Plan(load_search(space), str(space), str(config), tuple(overrides))
    plan.check()
    folder = Path(plan.search.dir)
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / "journal.log"
    with sole_owner(journal), Signals() as signals:
        study = open_study(journal, plan.search)
        remember(study, plan)
        close_left_over(study, plan.search)
        done, failed = settled(study), 0
        for place in range(1, plan.search.total() + 1):
            if place in done:
                continue
            remember(study, plan)  # the files may have been changed meanwhile
            row = run_trial(study, plan, place)
            write_results(study, plan)
            if row["state"] != "interrupted":
                done.add(place)
            if signals.came() or place not in done:
                print(
                    f"stopped; {len(done)} of {plan.search.total()} trials are done; the same command goes on"
                )
                return None
            failed += row["state"] == "failed"
            if failed == GIVE_UP and not settled(study):
                raise UserError(
                    f"the first {GIVE_UP} trials failed, so the search stops; "
                    f"the last one said: {row['error']}"
                )
        results = write_results(study, plan)
    if results["best"] is None:
        raise UserError(f"no trial was complete; {folder / 'results.md'} says why")
    return results


def check_installed() -> None:
    """Raise UserError, with the remedy, when what only a search needs is missing."""
    for name in ("optuna", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"a search needs {name} ({error}): run make install, or pip install -e '.[search]'"
            ) from None


class Signals:
    """Whether Ctrl-C or SIGTERM came, also where ``train`` answers it: at its last step, it returns as if
    none had."""

    def __enter__(self) -> Signals:
        self._numbers: set[int] = set()
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        self._before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._read.close()
        self._write.close()

    def came(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._numbers |= set(self._read.recv(4096))
        return not self._numbers.isdisjoint((signal.SIGINT, signal.SIGTERM))


class Judge:
    """What ``train`` asks at every evaluation: notes the objective, and says whether the trial is poor."""

    def __init__(self, trial: Any, objective: str, tasks: Mapping[str, Any]):
        self.trial, self.objective, self.tasks = trial, objective, tasks
        self.metrics: dict[str, Any] | None = None
        self.stopped = False

    def __call__(self, step: int, metrics: dict[str, Any]) -> bool:
        self.metrics = metrics
        self.trial.report(score(self.objective, metrics, self.tasks), step)
        self.stopped = self.trial.should_prune()
        return self.stopped


def run_trial(study: Any, plan: Plan, place: int) -> dict[str, Any]:
    """Train the setting at ``place``; returns its row. A trial that cannot be trained is noted as failed with
    what was wrong."""
    search = plan.search
    before = latest(study)
    params = before[place].params if place in before else propose(search, place, list(before.values()))
    study.enqueue_trial(params, user_attrs={"place": place})
    trial = study.ask(distributions(search))
    values = values_of(search, trial.params)
    text = setting(values)
    print(f"\n== trial {place} of {search.total()}: {text}", flush=True)
    began = time.perf_counter()
    ending = _train(plan, trial, values, f"{search.dir}/trials/{place:03d}")
    trial.set_user_attr("seconds", round(time.perf_counter() - began, 1))
    study.tell(trial, **ending)
    row = row_of(latest(study)[place], search)
    figure = "-" if row["objective"] is None else f"{row['objective']:.2f}"
    print(
        f"trial {place}: {text}: {search.objective} {figure}, {row['state']}"
        + (f": {row['error']}" if row["error"] else "")
    )
    return row


def _train(plan: Plan, trial: Any, values: Values, folder: str) -> dict[str, Any]:
    """How the trial ended, as the arguments of ``study.tell``."""
    from optuna.trial import TrialState

    objective = plan.search.objective
    try:
        config = plan.configure(values, folder)
        trial.set_user_attr("config", dump(config))
        tasks = tasks_of(config)
        judge = Judge(trial, objective, tasks)
        metrics = train(config, overwrite=True, judge=judge)
    except (
        Exception
    ) as error:  # one setting's fault must not end the search: others may need less memory, or may work
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        trial.set_user_attr("error", "out of memory" if memory else text)
        return {"state": TrialState.FAIL}
    if (measured := metrics or judge.metrics) is not None:
        trial.set_user_attr("metrics", headline(measured, tasks))
    if metrics is None:
        return {"state": TrialState.PRUNED if judge.stopped else TrialState.FAIL}
    return {"values": score(objective, metrics, tasks)}
