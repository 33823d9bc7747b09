"""A search: one config trained under many settings, the table of them, and the best one as a config."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import itertools
import json
import math
import os
import signal
import socket
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from .. import build
from ..atomic import replacing, write_text
from ..config import NAMES, Config, dump, load, parse
from ..engine.evaluate import headline, main_score
from ..engine.folder import differences
from ..engine.log import clock
from ..engine.train import train
from ..errors import UserError, did_you_mean
from ..report.tables import table
from ..tasks.base import TASKS
from .search_config import Axis, Search, encode, load_search

GIVE_UP = 3  # trials that fail before any succeeds: the cause is then not their settings
STATES = ("complete", "pruned", "failed", "interrupted")  # in the order of the table

Values = dict[str, Any]  # key of the config -> value


def run_search(config: str | Path, space: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any] | None:
    """Train the config in ``config`` with ``overrides`` under the settings of the search in ``space``; what was done by an
    earlier call is kept.

    Writes into the search's folder, after every trial: results.json, results.md, best.yaml, plot.png; journal.log is what
    a later call goes on from. Returns the results, or None when a signal stopped it. Raises UserError.
    """
    check_installed()
    plan = Plan(load_search(space), str(space), str(config), tuple(overrides))
    first = plan.check()
    folder = Path(plan.search.dir)
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / "journal.log"
    with sole_owner(journal), Signals() as signals:
        study = open_study(journal, plan.search)
        remember(study, plan, first)
        close_left_over(study, plan.search)
        done, failed = settled(study), 0
        for place in range(1, plan.search.total() + 1):
            if place in done:
                continue
            remember(study, plan, plan.configure(plan.first(), plan.search.dir))  # the file may have been edited meanwhile
            row = run_trial(study, plan, place)
            write_results(study, plan)
            if row["state"] != "interrupted":
                done.add(place)
            if signals.came() or place not in done:
                print(f"stopped; {len(done)} of {plan.search.total()} trials are done; the same command goes on")
                return None
            failed += row["state"] == "failed"
            if failed == GIVE_UP and not settled(study):
                raise UserError(f"the first {GIVE_UP} trials failed, so the search stops; the last one said: {row['error']}")
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
            raise UserError(f"a search needs {name} ({error}): run make install, or pip install -e '.[search]'") from None


@dataclass(frozen=True)
class Plan:
    """What is searched, in which config."""

    search: Search
    origin: str  # the search's file
    config: str
    overrides: tuple[str, ...]

    def configure(self, values: Values, folder: str) -> Config:
        """The config under a setting, for a run in ``folder``. Raises UserError."""
        keys = sorted(values, key=lambda key: key.rpartition(".")[2] not in NAMES)  # setting a name clears what stands beside it
        given = [f"{key}={encode(values[key])}" for key in keys]
        return load(self.config, [*self.overrides, *given, f"run.dir={encode(folder)}"])

    def first(self) -> Values:
        """Every key at its first value."""
        return {key: axis.probes()[0] for key, axis in self.search.space.items()}

    def check(self) -> Config:
        """Every value of a list and both ends of a range, the other keys at their first; returns the first setting's config.

        Raises UserError for an unknown key, a value that its key cannot have, and what is not in the config.
        """
        for text in self.overrides:
            key = text.partition("=")[0].strip()
            if fixed := [k for k in self.search.space if f"{key}.".startswith(f"{k}.")]:
                raise UserError(f"override '{text}': the search chooses {fixed[0]}; leave it out here, or in {self.origin}")
        first = self.first()
        config = self._check(first)
        for key, axis in self.search.space.items():
            for value in axis.probes()[1:]:
                self._check(first | {key: value}, f".{key}: {shown(value)}")
        return config

    def _check(self, values: Values, where: str = "") -> Config:
        try:
            config = self.configure(values, self.search.dir)
            build.check(config)
        except UserError as error:
            raise UserError(f"{self.origin}: space{where}: {error}") from None
        check_objective(self.search.objective, config, self.origin)
        every, steps = config.train.eval_every, config.train.steps
        if self.search.prune and (every is None or every >= steps):
            raise UserError(
                f"{self.origin}: prune: a trial can be stopped only at an evaluation; set train.eval_every below train.steps, "
                f"{steps}, in {self.config}"
            )
        return config


def check_objective(name: str, config: Config, origin: str) -> None:
    """Raise UserError where the evaluation of the config's tasks has no such figure."""
    known = ["mean"]
    for task in config.tasks:
        empty = TASKS.build(task, {}, f"tasks.{task}", ("a",), config.model.strides).metric().compute()
        known += [f"{task}.{key}" for key, figure in empty.items() if not isinstance(figure, dict)]
    if name not in known:
        raise UserError(f"{origin}: objective: there is no figure '{name}'; {did_you_mean(name, known)}")


def score(objective: str, metrics: Mapping[str, Any], tasks: Mapping[str, Any]) -> float:
    """The objective of one evaluation, in percent; a figure without truth counts as 0."""
    if objective == "mean":
        return main_score(metrics, tasks)
    task, _, metric = objective.partition(".")
    return metrics[task][metric] or 0.0


# ---- storage


@contextlib.contextmanager
def sole_owner(journal: Path) -> Iterator[None]:
    """Holds the journal for this process: another one's running trial must not be taken for an interrupted one."""
    with journal.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"dir: a search is running in {journal.parent}; wait for it, or give another dir") from None
        yield


def open_study(journal: Path, search: Search) -> Any:
    """The Optuna study in ``journal``, which has to be ours alone."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    text = journal.read_bytes()
    if not text.endswith(b"\n"):  # the process died while it wrote the last line
        os.truncate(journal, text.rfind(b"\n") + 1)
    Path(f"{journal}.lock").unlink(missing_ok=True)  # Optuna's, of a process that died
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    pruner = optuna.pruners.NopPruner()
    if search.prune:
        pruner = optuna.pruners.MedianPruner(search.prune.warmup_trials, search.prune.warmup_steps)
    return optuna.create_study(study_name="search", storage=storage, pruner=pruner, direction="maximize", load_if_exists=True)


def remember(study: Any, plan: Plan, first: Config) -> None:
    """Note what the search is of. Raises UserError where the journal is of something else; `trials` may change."""
    given = {"search": encode(plan.search.model_dump(mode="json", exclude={"dir", "trials"})), "config": dump(first)}
    before = study.user_attrs.get("given")
    if before is None:
        study.set_user_attr("given", given)
        return
    for part, file in (("search", plan.origin), ("config", plan.config)):
        if difference := differences(before[part], given[part]):
            raise UserError(
                f"dir: {plan.search.dir} holds a search of something else: in {file}, {difference}; undo that, give another dir, "
                "or delete the folder"
            )


def close_left_over(study: Any, search: Search) -> None:
    """Mark as failed what a process that is gone was training."""
    from optuna.trial import TrialState

    while study.get_trials(states=(TrialState.WAITING,)):
        study.ask(distributions(search))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def latest(study: Any) -> dict[int, Any]:
    """By place, the last trial that was there: an interrupted one is tried again in its place."""
    return {trial.user_attrs["place"]: trial for trial in study.trials}


def state_of(trial: Any) -> str:
    """One of ``STATES``; a trial without an error that did not end was interrupted."""
    name = trial.state.name.lower()
    return name if name in STATES else "failed" if "error" in trial.user_attrs else "interrupted"


def settled(study: Any) -> set[int]:
    """The places that are not tried again. Where nothing has succeeded yet, what failed is: its cause may be gone."""
    states = {place: state_of(trial) for place, trial in latest(study).items()}
    if not {"complete", "pruned"} & set(states.values()):
        return set()
    return {place for place, state in states.items() if state != "interrupted"}


# ---- settings


def distributions(search: Search) -> dict[str, Any]:
    """Optuna's words for the space. A value of a list is its text, since Optuna chooses among scalars alone."""
    return {key: _distribution(axis, grid=search.method == "grid") for key, axis in search.space.items()}


def _distribution(axis: Axis, *, grid: bool) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values is not None or grid:
        return CategoricalDistribution([encode(value) for value in axis.choices()])
    choices = axis.choices()
    if axis.int:
        return IntDistribution(choices[0], choices[-1], log=axis.log, step=choices.step)
    return FloatDistribution(axis.low, choices[-1] if choices else axis.high, log=axis.log, step=axis.step)


def values_of(search: Search, params: Mapping[str, Any]) -> Values:
    """What Optuna chose -> values of the config."""
    return {key: _value(axis, params[key]) for key, axis in search.space.items()}


def _value(axis: Axis, chosen: Any) -> Any:
    if isinstance(chosen, str):
        return json.loads(chosen)
    choices = axis.choices()
    return chosen if choices is None or axis.int else min(choices, key=lambda value: abs(value - chosen))


def propose(search: Search, place: int, past: Sequence[Any]) -> dict[str, Any]:
    """Optuna's parameters for the trial at ``place``, none that was tried. The same ones after the same ``past`` trials, however
    often the search was interrupted."""
    import optuna

    if search.method == "grid":
        every = itertools.product(*([encode(value) for value in axis.choices()] for axis in search.space.values()))
        return dict(zip(search.space, next(itertools.islice(every, place - 1, None)), strict=True))
    tried = {encode(values_of(search, trial.params)) for trial in past}
    study = optuna.create_study(direction="maximize")  # in memory: what is drawn twice leaves no trace
    study.add_trials(past)
    for attempt in itertools.count():
        seed = int(np.random.SeedSequence([search.seed, place, attempt]).generate_state(1)[0])
        informed = search.method == "tpe" and attempt < 20  # where all that is good was tried, anything new
        study.sampler = optuna.samplers.TPESampler(seed=seed) if informed else optuna.samplers.RandomSampler(seed=seed)
        params = study.ask(distributions(search)).params
        if encode(values_of(search, params)) not in tried:
            return params


# ---- one trial


class Signals:
    """Whether Ctrl-C or SIGTERM came, also where ``train`` answers it: at its last step, it returns as if none had."""

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
    """Train the setting at ``place``; returns its row. A trial that cannot be trained is noted as failed with what was wrong."""
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
    print(f"trial {place}: {text}: {search.objective} {figure}, {row['state']}" + (f": {row['error']}" if row["error"] else ""))
    return row


def _train(plan: Plan, trial: Any, values: Values, folder: str) -> dict[str, Any]:
    """How the trial ended, in the words of ``study.tell``."""
    from optuna.trial import TrialState

    objective = plan.search.objective
    try:
        config = plan.configure(values, folder)
        trial.set_user_attr("config", dump(config))
        tasks = {name: TASKS.get(name, f"tasks.{name}") for name in config.tasks}
        judge = Judge(trial, objective, tasks)
        metrics = train(config, overwrite=True, judge=judge)
    except Exception as error:  # one setting's fault must not end the search: others may need less memory, or may work
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        trial.set_user_attr("error", "out of memory" if memory else text)
        return {"state": TrialState.FAIL}
    if (measured := metrics or judge.metrics) is not None:
        trial.set_user_attr("metrics", headline(measured, tasks))
    if metrics is None:
        return {"state": TrialState.PRUNED if judge.stopped else TrialState.FAIL}
    return {"values": score(objective, metrics, tasks)}


# ---- what it says


def write_results(study: Any, plan: Plan) -> dict[str, Any]:
    """results.json, results.md, plot.png and best.yaml of all trials so far; returns what results.json holds."""
    search = plan.search
    folder = Path(search.dir)
    rows = [row_of(trial, search) for trial in latest(study).values()]
    rows.sort(key=lambda row: (STATES.index(row["state"]), -(row["objective"] or 0.0), row["trial"]))
    best = rows[0] if rows and rows[0]["state"] == "complete" else None
    results = {
        **{key: getattr(search, key) for key in ("dir", "method", "objective", "seed")},
        "asked": search.total(),
        "best": best and best["trial"],
        "space": {key: axis.model_dump(mode="json", exclude_defaults=True) for key, axis in search.space.items()},
        "trials": rows,
    }
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "results.md", report(results, markdown=True) + "\n")
    if best:
        config = yaml.safe_load(latest(study)[best["trial"]].user_attrs["config"])
        config["run"]["dir"] = f"{search.dir}/best"
        write_text(folder / "best.yaml", dump(parse(config, "best.yaml")))
        picture = draw(results)
        with replacing(folder / "plot.png") as file:
            file.write(picture)
    return results


def row_of(trial: Any, search: Search) -> dict[str, Any]:
    """One trial as plain data; the objective of a pruned one is that of its last evaluation."""
    noted = trial.user_attrs
    return {
        "trial": noted["place"],
        "state": state_of(trial),
        "objective": trial.value,
        "step": trial.last_step,
        "values": values_of(search, trial.params),
        "metrics": noted.get("metrics", {}),
        "seconds": noted.get("seconds"),
        "error": noted.get("error"),
    }


def report(results: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The table of a search, best first; then the keys, what failed, and where the best config is."""
    names = short_names(list(results["space"]))
    figures = dict.fromkeys(key for row in results["trials"] for key in row["metrics"])
    rows = [
        {
            "trial": row["trial"],
            **{f"value {key}": shown(value) for key, value in row["values"].items()},
            "objective": row["objective"],
            **row["metrics"],
            "state": f"pruned at step {row['step']}" if row["state"] == "pruned" else row["state"],
            "time": None if row["seconds"] is None else clock(row["seconds"]),
        }
        for row in results["trials"]
    ]
    columns = {"trial": "trial", **{f"value {key}": name for key, name in names.items()}, "objective": results["objective"]}
    columns |= {key: key for key in figures} | {"state": "state", "time": "time"}
    done = sum(row["state"] != "interrupted" for row in results["trials"])
    title = f"{results['method']} search in {results['dir']}, {done} of {results['asked']} trials, best first"
    parts = [f"{'## ' if markdown else ''}{title}", table(rows, columns, digits=2, markdown=markdown)]
    bullet = "- " if markdown else ""
    parts.append("\n".join(f"{bullet}{names[key]}: {key}, {_range(axis)}" for key, axis in results["space"].items()))
    if errors := [f"{bullet}trial {row['trial']}: {row['error']}" for row in results["trials"] if row["error"]]:
        parts.append("\n".join(errors))
    if results["best"] is not None:
        folder = results["dir"]
        parts.append(f"best: trial {results['best']}, {folder}/trials/{results['best']:03d}; as a config: {folder}/best.yaml")
    return "\n\n".join(parts)


def _range(axis: Mapping[str, Any]) -> str:
    if "values" in axis:
        return " | ".join(shown(value) for value in axis["values"])
    words = [f"{shown(axis['low'])} to {shown(axis['high'])}"]
    words += [f"in steps of {shown(axis['step'])}"] if "step" in axis else []
    return " ".join([*words, *(word for key, word in (("int", "(whole numbers)"), ("log", "(log)")) if axis.get(key))])


def setting(values: Values) -> str:
    """ "seg.alpha 0.5, temperature 2"."""
    return ", ".join(f"{name} {shown(values[key])}" for key, name in short_names(list(values)).items())


def shown(value: Any) -> str:
    """A YAML value on one line, numbers with four digits."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown(one) for one in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else encode(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """By key, its shortest ending that no other one has: seg.alpha, det.alpha, temperature."""

    def ending(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    found = {}
    for key in keys:
        lengths = range(1, key.count(".") + 2)
        found[key] = next((ending(key, n) for n in lengths if sum(ending(k, n) == ending(key, n) for k in keys) == 1), key)
    return found


def draw(results: Mapping[str, Any]) -> bytes:
    """PNG: the best objective so far over the trials, and the objective against every key. At least one trial is complete.

    A pruned trial is a mark at the bottom: what it had reached when it was stopped cannot be compared with a whole run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted((row for row in results["trials"] if row["state"] in ("complete", "pruned")), key=lambda row: row["trial"])
    names = short_names(list(results["space"]))
    columns = min(3, 1 + len(names))
    lines = math.ceil((1 + len(names)) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * lines + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    _draw_progress(panels[0], rows, results["best"])
    for panel, (key, name) in zip(panels[1:], names.items(), strict=False):
        _draw_key(panel, rows, key, results["space"][key], results["best"])
        panel.set_xlabel(name)
    for i, panel in enumerate(panels):
        panel.set_visible(i <= len(names))
        panel.margins(y=0.12)  # room for the marks of pruned trials
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if i % columns == 0:
            panel.set_ylabel(results["objective"] if results["objective"] != "mean" else "mean of main metrics")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


BLUE, GREY, RED = "#1f5fa8", "#8a8a8a", "#d1495b"
Rows = Sequence[Mapping[str, Any]]


def _draw_progress(panel: Any, rows: Rows, best: int) -> None:
    """Every trial by number, and the best complete one so far."""
    numbers = [row["trial"] for row in rows]
    complete = [row for row in rows if row["state"] == "complete"]
    reached = list(itertools.accumulate((row["objective"] for row in complete), max))
    places = [row["trial"] for row in complete]
    panel.step(
        [*places, numbers[-1]], [*reached, reached[-1]], where="post", color=RED, linewidth=1.3, label="best so far", zorder=1
    )
    _dots(panel, rows, numbers, best)
    panel.set_xlim(0.5, numbers[-1] + 0.5)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("trial")


def _draw_key(panel: Any, rows: Rows, key: str, axis: Mapping[str, Any], best: int) -> None:
    values = [row["values"][key] for row in rows]
    if "values" in axis:
        texts = [encode(value) for value in axis["values"]]
        values = _spread([texts.index(encode(value)) for value in values])
        width = max(6, 48 // len(texts))
        panel.set_xticks(range(len(texts)), [_wrapped(shown(value), width) for value in axis["values"]], fontsize=8)
        panel.set_xlim(-0.5, len(texts) - 0.5)
    else:
        low, high = axis["low"], axis["high"]
        if axis.get("log"):
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter("{x:g}" if high / low < 10 else "")
            panel.tick_params(axis="x", which="both", labelsize=8)
            margin = (high / low) ** 0.04
            panel.set_xlim(low / margin, high * margin)
        else:
            margin = (high - low) * 0.04
            panel.set_xlim(low - margin, high + margin)
    _dots(panel, rows, values, best)


def _spread(places: Sequence[int]) -> list[float]:
    """Equal places side by side, centred on their tick, so that they do not hide one another."""
    seen: dict[int, int] = {}
    found = []
    for place in places:
        found.append((place, seen.get(place, 0)))
        seen[place] = seen.get(place, 0) + 1
    gap = min(0.06, 0.7 / max(seen.values()))
    return [place + gap * (k - (seen[place] - 1) / 2) for place, k in found]


def _dots(panel: Any, rows: Rows, values: Sequence[float], best: int) -> None:
    complete = [(value, row["objective"]) for value, row in zip(values, rows, strict=True) if row["state"] == "complete"]
    panel.plot(*zip(*complete, strict=True), "o", markersize=5, color=BLUE, alpha=0.85, label="complete")
    if pruned := [value for value, row in zip(values, rows, strict=True) if row["state"] == "pruned"]:
        bottom = panel.get_xaxis_transform()
        panel.plot(pruned, [0.03] * len(pruned), "x", transform=bottom, markersize=5, color=GREY, label="pruned")
    top = next(i for i, row in enumerate(rows) if row["trial"] == best)
    look = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": RED, "linestyle": "none"}
    panel.plot(values[top], rows[top]["objective"], "o", label="best", **look)


def _wrapped(text: str, width: int) -> str:
    """At most five lines of ``width`` characters; a section without its braces."""
    lines = textwrap.wrap(text.removeprefix("{").removesuffix("}") or text, width)
    return "\n".join(lines if len(lines) <= 5 else [*lines[:4], ".."])
