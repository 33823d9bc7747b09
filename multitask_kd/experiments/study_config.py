"""The config of a study: which networks are trained, over which seeds, and which is whose control."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..config import Config, Count, Natural, Section, load, read_yaml, validate
from ..errors import UserError, did_you_mean


def plain_dir(value: str) -> str:
    """A folder's path that can stand in YAML texts and in file names. Raises ValueError for another."""
    if not value or re.search(r"[^\w ./\\:+~-]|: | $", value):
        raise ValueError("use letters, digits, spaces, and . _ - + ~ /")
    return value


class CutSettings(Section):
    """What is pruned, as tools/prune.py takes it; null: that tool's default."""

    ratio: Annotated[float, Field(gt=0, lt=1)]
    """The share that is taken away."""
    by: str | None = None
    """Of what: parameters, flops or latency."""
    method: str | None = None
    """What a channel is worth: magnitude, scale or group."""
    scope: tuple[str, ...] | None = None
    """Which parts are pruned: of backbone, neck, heads."""
    local: bool | None = None
    """Whether every layer loses the same share, else the least important channels go, wherever they are."""
    round_to: Count | None = None
    """Layers get multiples of so many channels."""


class StudyCut(CutSettings):
    """A network of a study that is pruned from another one. It has a row of its own, as it is before
    fine-tuning."""

    of: str
    """The run whose network is pruned, trained on its first seed."""


class StudyRun(Section):
    """One network of a study."""

    config: str
    """The run's YAML, relative to the study's file."""
    over: tuple[str, ...] = ()
    """More YAML files, merged over it in their order: a method that several studies try."""
    overrides: tuple[str, ...] = ()
    """key=value changes; {dir} stands for the study's folder."""
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] | None = None
    """Seeds of this network; null takes the study's. A teacher usually has one."""
    start: str | None = None
    """The pruned network, of `cuts`, that it starts from."""
    against: str | tuple[str, ...] | None = None
    """The run that this one is compared with, seed by seed: its control; or several."""

    @property
    def controls(self) -> tuple[str, ...]:
        return (self.against,) if isinstance(self.against, str) else self.against or ()


class Study(Section):
    """Several networks trained one after the other, over seeds, and one table of them."""

    dir: str
    """Folder of the study, relative to where the command runs; the runs are in it."""
    title: str
    """Heading of the table."""
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    """Seeds of every network that does not name its own."""
    runs: Annotated[dict[str, StudyRun], Field(min_length=1)]
    """By name, in the order of training."""
    cuts: dict[str, StudyCut] = Field(default_factory=dict)
    """By name: networks that are pruned from those of `runs`, for others of them to start from."""
    pictures: Natural = 3
    """Validation images in the picture that compares the networks."""

    @field_validator("dir")
    @classmethod
    def _dir_is_plain(cls, value: str) -> str:
        return plain_dir(value)

    @model_validator(mode="after")
    def _names_exist(self) -> Study:
        order = list(self.runs)
        for name, run in self.runs.items():
            for control in run.controls:
                if control not in self.runs:
                    raise ValueError(
                        f"runs.{name}.against: there is no run '{control}'; "
                        f"{did_you_mean(control, self.runs)}"
                    )
            if run.start is not None and run.start not in self.cuts:
                raise ValueError(
                    f"runs.{name}.start: '{run.start}' is not in cuts; {did_you_mean(run.start, self.cuts)}"
                )
            if run.start is not None and order.index(self.cuts[run.start].of) >= order.index(name):
                raise ValueError(
                    f"runs.{name}.start: '{run.start}' is pruned from a run that is trained later; put that "
                    f"one before"
                )
        return self

    @field_validator("cuts")
    @classmethod
    def _cut_out_of_runs(cls, cuts: dict[str, StudyCut], info: ValidationInfo) -> dict[str, StudyCut]:
        runs = info.data.get("runs", {})
        for name, cut in cuts.items():
            if cut.of not in runs:
                raise ValueError(f"{name}.of: there is no run '{cut.of}'; {did_you_mean(cut.of, runs)}")
            if name in runs:
                raise ValueError(f"'{name}' is the name of a run too; choose another")
        return cuts

    def cut_file(self, name: str) -> str:
        """Where the pruned network ``name`` is written."""
        return f"{self.dir}/{slug(name)}.pt"


def load_study(path: str | Path) -> tuple[Study, dict[str, dict[int, Config]]]:
    """A study and, by name and seed, the config of each of its runs."""
    path = Path(path)
    study = validate(Study, read_yaml(path), str(path))
    configs: dict[str, dict[int, Config]] = {}
    _distinct_folders(study, path)
    for name, run in study.runs.items():
        seeds = run.seeds or study.seeds
        configs[name] = {}
        for seed in seeds:
            folder = f"{study.dir}/{slug(name)}" + (f"/seed{seed}" if len(seeds) > 1 else "")
            given = [text.replace("{dir}", study.dir) for text in run.overrides]
            last = [f"run.dir={folder}", f"run.seed={seed}"] + (
                [f"model.start={study.cut_file(run.start)}"] if run.start else []
            )
            over = [path.parent / text for text in run.over]
            configs[name][seed] = load(path.parent / run.config, [*given, *last], over=over)
    return study, configs


def slug(name: str) -> str:
    """What a run's folder, and the file of a pruned network, is called."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_.")


def _distinct_folders(study: Study, path: Path) -> None:
    taken: dict[str, str] = {}
    for kind in ("runs", "cuts"):
        for name in getattr(study, kind):
            if not slug(name):
                raise UserError(
                    f"{path}: {kind}: '{name}' has no letter or digit to name its folder by; rename it"
                )
            if (other := taken.setdefault(slug(name), name)) != name:
                raise UserError(
                    f"{path}: {kind}: '{other}' and '{name}' would both be in the folder {slug(name)}; "
                    f"rename one"
                )
