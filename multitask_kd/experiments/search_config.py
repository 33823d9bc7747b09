"""The config of a search: which keys are tried with which values, how they are chosen, and what counts as
good."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from ..config import Count, Natural, Number, PathText, Positive, Section, read_yaml, validate


class Axis(Section):
    """The values of one key: a list, or a range."""

    values: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = None
    """Values to choose from; any YAML value, also a whole section such as {loss: kl, weight: 2}."""
    low: Number | None = None
    """Smallest value of a range."""
    high: Number | None = None
    """Largest value of a range."""
    log: bool = False
    """Whether a range is searched in equal ratios instead of equal differences; for learning rates and
    weights."""
    step: Positive | None = None
    """Distance between the values of a range, counted from `low`; null tries any number between. A grid needs
    it."""
    int: bool = False
    """Whether the values of a range are whole numbers, as train.steps needs."""

    @model_validator(mode="after")
    def _is_a_list_or_a_range(self) -> Axis:
        of_range = [key for key in ("low", "high", "log", "step", "int") if key in self.model_fields_set]
        if self.values is not None:
            if of_range:
                raise ValueError(
                    f"values and {of_range[0]}: give a list of values, or a range from low to high"
                )
            texts = [encode(value) for value in self.values]
            if twice := [text for text in texts if texts.count(text) > 1]:
                raise ValueError(f"values: {twice[0]} is there twice")
        elif self.low is None or self.high is None:
            raise ValueError("give a list of values, or low and high")
        elif self.low >= self.high:
            raise ValueError(f"low: {self.low:g} is not below high, {self.high:g}")
        elif self.log and (self.step is not None or self.low <= 0):
            raise ValueError("log: such a range has no step and begins above 0")
        elif self.int and any(n != round(n) for n in (self.low, self.high, self.step or 1)):
            raise ValueError("int: low, high and step must be whole numbers")
        return self

    def choices(self) -> Sequence[Any] | None:
        """Every value in order; None of a range without steps."""
        if self.values is not None:
            return self.values
        if self.int:
            return range(round(self.low), round(self.high) + 1, round(self.step or 1))
        if self.step is None:
            return None
        low, step = Decimal(str(self.low)), Decimal(str(self.step))  # so that 0.1 + 0.2 is 0.3
        return tuple(float(low + i * step) for i in range(round((Decimal(str(self.high)) - low) // step) + 1))

    def probes(self) -> tuple[Any, ...]:
        """The values that are checked before a search begins: all of a list, both ends of a range."""
        if self.values is not None:
            return self.values
        choices = self.choices()
        return (self.low, self.high) if choices is None else (choices[0], choices[-1])


class Prune(Section):
    """Stops a trial whose objective is below the median of the earlier trials at the same step (Golovin et
    al., 2017)."""

    warmup_trials: Count = 4
    """Trials that have to be complete before any is stopped."""
    warmup_steps: Natural = 0
    """Optimizer steps of each trial before which it is not stopped."""


class Search(Section):
    """Trains one config under many settings and finds the best of them."""

    dir: PathText
    """Folder of the search, relative to where the command runs; the trials are in it."""
    method: Literal["grid", "random", "tpe"] = "tpe"
    """grid: every combination; random: drawn evenly; tpe: drawn where earlier trials were good (Bergstra et
    al., 2011)."""
    trials: Count | None = None
    """How many settings are tried; of a grid, its first so many, null for all. More may be asked for later.
    """
    seed: Natural = 0
    """Seed of the choice of settings; that of training is run.seed."""
    objective: str = "mean"
    """What should be high: mean (of the tasks' main metrics), or one figure as task.metric, e.g. seg.mIoU,
    det.mAP50. It is that of the run's best.pt, which is chosen by the mean."""
    prune: Prune | None = None
    """When poor trials are stopped early; needs train.eval_every in the config. null stops none."""
    space: Annotated[dict[str, Axis], Field(min_length=1)]
    """By dotted key of the config (tasks.seg.alpha): the values to try."""

    @model_validator(mode="after")
    def _keys_stand_alone(self) -> Search:
        for key in self.space:
            if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
                raise ValueError(f"space: '{key}' is no key; write it with points, e.g. tasks.seg.alpha")
            if key in ("run", "run.dir"):
                raise ValueError(
                    f"space.{key}: every trial has a folder of its own under dir; leave the key out"
                )
            if inside := [other for other in self.space if other.startswith(f"{key}.")]:
                raise ValueError(
                    f"space.{inside[0]}: lies in {key}, which is searched too; leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Search:
        if self.method != "grid" and self.trials is None:
            raise ValueError(f"trials: the method '{self.method}' needs their number")
        for key, axis in self.space.items():
            if self.method == "grid" and axis.values is None and axis.step is None:
                raise ValueError(f"space.{key}: a grid needs a list of values, or a range with a step")
        return self

    def combinations(self) -> int | None:
        """How many different settings there are; None where a range has no steps."""
        total = 1
        for axis in self.space.values():
            choices = axis.choices()
            if choices is None:
                return None
            total *= len(choices)
        return total

    def total(self) -> int:
        """How many trials the whole search has."""
        return min(n for n in (self.trials, self.combinations()) if n is not None)


def encode(value: Any) -> str:
    """A value as text that both JSON and YAML read back as the same."""
    return json.dumps(value, ensure_ascii=False)


def load_search(path: str | Path) -> Search:
    """Read the YAML of a search. Raises UserError with one line a fault."""
    return validate(Search, read_yaml(Path(path)), str(path))
