"""What a search tries: the config under a setting, and which setting comes next."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import build
from ..config import NAMES, Config, load
from ..engine.columns import tasks_of
from ..engine.evaluate import main_score
from ..errors import UserError, did_you_mean
from .search_config import Axis, Search, encode
from .steps import Digests, digest, files_read

Values = dict[str, Any]  # key of the config -> value


@dataclass(frozen=True)
class Plan:
    """What is searched, in which config."""

    search: Search
    origin: str  # the search's file
    config: str
    overrides: tuple[str, ...]

    def configure(self, values: Values, folder: str) -> Config:
        """The config under a setting, for a run in ``folder``. Raises UserError."""
        keys = sorted(
            values, key=lambda key: key.rpartition(".")[2] not in NAMES
        )  # setting a name clears what stands beside it
        given = [f"{key}={encode(values[key])}" for key in keys]
        return load(self.config, [*self.overrides, *given, f"run.dir={encode(folder)}"])

    def first(self) -> Values:
        """Every key at its first value."""
        return {key: axis.probes()[0] for key, axis in self.search.space.items()}

    def first_config(self) -> Config:
        """That of the first setting. Raises UserError."""
        return self.configure(self.first(), self.search.dir)

    def probes(self) -> Iterator[tuple[Values, str]]:
        """The settings that are looked at before a search begins, and where each stands: the first; then
        every value of a list and both ends of a range, the other keys at their first."""
        first = self.first()
        yield first, ""
        for key, axis in self.search.space.items():
            for value in axis.probes()[1:]:
                yield first | {key: value}, f".{key}: {shown(value)}"

    def files(self) -> Digests:
        """Digests of the files that trials read, see ``steps``."""
        paths: dict[str, Path] = {}
        for values, _ in self.probes():
            paths |= files_read(self.configure(values, self.search.dir))
        return {name: digest(path) for name, path in paths.items()}

    def check(self) -> Config:
        """Look at every probe; returns the first setting's config.

        Raises UserError for an unknown key, a value that its key cannot have, and what is not in the config.
        """
        for text in self.overrides:
            key = text.partition("=")[0].strip()
            if fixed := [k for k in self.search.space if f"{key}.".startswith(f"{k}.")]:
                raise UserError(
                    f"override '{text}': the search chooses {fixed[0]}; "
                    f"leave it out here, or in {self.origin}"
                )
        for values, where in self.probes():
            self._check(values, where)
        return self.first_config()

    def _check(self, values: Values, where: str) -> None:
        try:
            config = self.configure(values, self.search.dir)
            build.check(config)
        except UserError as error:
            raise UserError(f"{self.origin}: space{where}: {error}") from None
        check_objective(self.search.objective, config, self.origin)
        every, steps = config.train.eval_every, config.train.steps
        if self.search.prune and (every is None or every >= steps):
            raise UserError(
                f"{self.origin}: prune: a trial can be stopped only at an evaluation; set train.eval_every "
                f"below train.steps, {steps}, in {self.config}"
            )


def check_objective(name: str, config: Config, origin: str) -> None:
    """Raise UserError where the evaluation of the config's tasks has no such figure, or a low one would be
    good."""
    known = ["mean"]
    for task in tasks_of(config).values():
        columns = {column.key: column for row in task.columns for column in row}
        low = [key for key, column in columns.items() if column.better < 0]
        if name in (f"{task.name}.{key}" for key in low):
            raise UserError(
                f"{origin}: objective: '{name}' is good where it is low, and a search looks for what is "
                f"high; use {task.name}.{task.main_metric}"
            )
        empty = task.metric().compute()
        known += [
            f"{task.name}.{key}"
            for key, figure in empty.items()
            if not isinstance(figure, dict) and key not in low
        ]
    if name not in known:
        raise UserError(f"{origin}: objective: there is no figure '{name}'; {did_you_mean(name, known)}")


def score(objective: str, metrics: Mapping[str, Any], tasks: Mapping[str, Any]) -> float:
    """The objective of one evaluation, in percent; a figure without truth counts as 0."""
    if objective == "mean":
        return main_score(metrics, tasks)
    task, _, metric = objective.partition(".")
    return metrics[task][metric] or 0.0


def distributions(search: Search) -> dict[str, Any]:
    """The space as Optuna takes it. A value of a list is its text, since Optuna chooses among scalars
    alone."""
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
    """Optuna's parameters for the trial at ``place``, none that was tried. The same ones after the same
    ``past`` trials, however often the search was interrupted."""
    import optuna

    if search.method == "grid":
        every = itertools.product(
            *([encode(value) for value in axis.choices()] for axis in search.space.values())
        )
        return dict(zip(search.space, next(itertools.islice(every, place - 1, None)), strict=True))
    tried = {encode(values_of(search, trial.params)) for trial in past}
    study = optuna.create_study(direction="maximize")  # in memory: what is drawn twice leaves no trace
    study.add_trials(past)
    for attempt in itertools.count():
        seed = int(np.random.SeedSequence([search.seed, place, attempt]).generate_state(1)[0])
        informed = search.method == "tpe" and attempt < 20  # where all that is good was tried, anything new
        study.sampler = (
            optuna.samplers.TPESampler(seed=seed) if informed else optuna.samplers.RandomSampler(seed=seed)
        )
        params = study.ask(distributions(search)).params
        if encode(values_of(search, params)) not in tried:
            return params


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
        found[key] = next(
            (ending(key, n) for n in lengths if sum(ending(k, n) == ending(key, n) for k in keys) == 1), key
        )
    return found
