"""The config of a study: which networks are trained, over which seeds, and which is whose control."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from .config import Config, Natural, Section, load, read_yaml, validate
from .errors import UserError, did_you_mean


def plain_dir(value: str) -> str:
    """A folder's path that can stand in YAML texts and in file names. Raises ValueError for another."""
    if not value or re.search(r"[^\w ./\\:+~-]|: | $", value):
        raise ValueError("use letters, digits, spaces, and . _ - + ~ /")
    return value


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
    pictures: Natural = 3
    """Validation images in the picture that compares the networks."""

    @field_validator("dir")
    @classmethod
    def _dir_is_plain(cls, value: str) -> str:
        return plain_dir(value)

    @model_validator(mode="after")
    def _controls_exist(self) -> Study:
        for name, run in self.runs.items():
            for control in run.controls:
                if control not in self.runs:
                    raise ValueError(f"runs.{name}.against: there is no run '{control}'; {did_you_mean(control, self.runs)}")
        return self


def load_study(path: str | Path) -> tuple[Study, dict[str, dict[int, Config]]]:
    """A study and, by name and seed, the config of each of its runs."""
    path = Path(path)
    study = validate(Study, read_yaml(path), str(path))
    configs: dict[str, dict[int, Config]] = {}
    slugs: dict[str, str] = {}
    for name, run in study.runs.items():
        seeds = run.seeds or study.seeds
        configs[name] = {}
        slug = re.sub(r"[^\w.+-]+", "_", name).strip("_.")
        if not slug:
            raise UserError(f"{path}: runs: '{name}' has no letter or digit to name its folder by; rename it")
        if slugs.setdefault(slug, name) != name:
            raise UserError(f"{path}: runs: '{slugs[slug]}' and '{name}' would both be in the folder {slug}; rename one")
        for seed in seeds:
            folder = f"{study.dir}/{slug}" if len(seeds) == 1 else f"{study.dir}/{slug}/seed{seed}"
            given = [text.replace("{dir}", study.dir) for text in run.overrides]
            over = [path.parent / text for text in run.over]
            configs[name][seed] = load(path.parent / run.config, [*given, f"run.dir={folder}", f"run.seed={seed}"], over=over)
    return study, configs
