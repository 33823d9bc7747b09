"""A study: the same networks over several seeds, one table of mean and spread, one picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import build
from ..atomic import write_text
from ..checkpoint import load as load_checkpoint
from ..compress.profile import WHOLE, macs
from ..config import Config
from ..engine.columns import headline_columns, merged_tasks, tasks_of
from ..engine.evaluate import evaluate_checkpoint
from ..engine.log import clock
from ..engine.machine import machine, peak_memory_mb
from ..engine.pictures import DrawnNetwork, compare, with_legend
from ..engine.prune import Cut, prune_checkpoint
from ..engine.prune import report as prune_report
from ..precision import resolve_device
from ..report.pictures import save_png
from ..report.tables import Column, mean_and_spread, spread_text, table
from .runs import finish
from .steps import RunFolder, Steps
from .study_config import Study, load_study

Figures = Mapping[tuple[str, str], Column]  # (task, metric) -> its column


def run_study(path: str | Path, *, overwrite: bool = False) -> dict[str, Any] | None:
    """Train what is missing of the study in ``path``, then write results.json, results.md and picture.png in
    its folder.

    A run that is finished is kept, unless its settings or the files that it reads have changed (see
    ``steps``); one that was interrupted goes on where it stopped. Returns the results, or None when a signal
    stopped a run. Raises UserError.
    """
    study, configs = load_study(path)
    for name, runs in configs.items():
        for config in runs.values():
            # a pruned network may not be there yet
            build.check(build.without_start(config) if study.runs[name].start else config)
    figures = figures_of(configs)
    pruned = {name: PrunedNetwork(study, configs, name, path) for name in study.cuts}
    for config in (config for runs in configs.values() for config in runs.values()):
        RunFolder(config).adopt()  # before anything is trained that others learned from
    rows: list[dict[str, Any]] = []
    for name, runs in configs.items():
        results = {}
        first = study.runs[name].start
        if first and not any(row["name"] == first for row in rows):
            rows.append(pruned[first].row(figures))
        for seed, config in runs.items():
            print(f"\n== {name}, seed {seed}: {Path(config.run.dir)}", flush=True)
            result = finish(config, overwrite=overwrite)
            if result is None:
                return None
            results[seed] = result
        rows.append(describe(name, study, runs, results, figures))
    return write_results(study, rows, figures, picture(study, configs) if study.pictures else None)


def write_results(
    study: Study, rows: list[dict[str, Any]], figures: Figures, drawn: np.ndarray | None
) -> dict[str, Any]:
    """results.json, results.md and picture.png of a study; returns what results.json holds."""
    columns = list(figures.values())
    results = {"title": study.title, "dir": study.dir, "machine": machine(), "rows": rows}
    results |= {
        "figures": [asdict(column) for column in columns],
        "gains": gains(rows, [c.key for c in columns]),
    }
    folder = Path(study.dir)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "results.md", report(results, markdown=True) + "\n")
    if drawn is not None:
        save_png(folder / "picture.png", drawn)
    return results


def figures_of(configs: Mapping[str, Mapping[int, Config]]) -> Figures:
    """The figures in a study's table: the headlines of all tasks of its runs. Raises UserError."""
    return headline_columns(
        merged_tasks({name: tasks_of(next(iter(runs.values()))) for name, runs in configs.items()})
    )


class PrunedNetwork:
    """A network of a study that is pruned out of another one, made once."""

    def __init__(
        self, study: Study, configs: Mapping[str, Mapping[int, Config]], name: str, path: str | Path
    ):
        """Raises UserError for options that tools/prune.py would refuse."""
        plan = study.cuts[name]
        self.name, self.seed = name, next(iter(configs[plan.of]))
        self.config = configs[plan.of][self.seed]
        self.source, self.file = Path(self.config.run.dir) / "best.pt", Path(study.cut_file(name))
        self._cut = Cut.of(f"{path}: cuts.{name}", **plan.model_dump(exclude={"of"}))

    def row(self, figures: Figures) -> dict[str, Any]:
        """Make it where it is not there, or stale; its row, before it is fine-tuned."""
        Steps(self.file.parent).once(self.file.stem, [self.source], repr(self._cut), [self.file], self._make)
        content = load_checkpoint(self.file, self.name)
        result = evaluate_checkpoint(self.config, str(self.file))
        row = _row(self.name, content, [self.seed], [result], figures)
        return row | {"against": [], "steps": 0, "seconds": [0.0], "step_ms": [None]}

    def _make(self) -> None:
        print(prune_report(prune_checkpoint(self.config, str(self.source), str(self.file), self._cut)))


def describe(
    name: str,
    study: Study,
    configs: Mapping[int, Config],
    results: Mapping[int, Mapping[str, Any]],
    figures: Figures,
) -> dict[str, Any]:
    """One row: what the network saw, and its figures by seed."""
    config = next(iter(configs.values()))
    content = load_checkpoint(Path(config.run.dir) / "best.pt", name)
    return _row(name, content, list(configs), list(results.values()), figures) | {
        "against": list(study.runs[name].controls),
        "steps": config.train.steps,
        "seconds": [result["seconds"] for result in results.values()],
        "step_ms": [step_ms(config) for config in configs.values()],
    }


def _row(
    name: str,
    content: Mapping[str, Any],
    seeds: list[int],
    results: Sequence[Mapping[str, Any]],
    figures: Figures,
) -> dict[str, Any]:
    """What a checkpoint tells of its network, and its figures by seed."""
    own = {place: column for place, column in figures.items() if place[0] in content["arch"]["tasks"]}
    return {
        "name": name,
        "seeds": seeds,
        "labelled_images": content["labelled_images"],
        "unlabelled_images": content["unlabelled_images"],
        "params": content["params"],
        "macs": macs(build.from_checkpoint(content, name), content["arch"]["input_size"])[WHOLE],
        **{
            column.key: [result[task][metric] for result in results] for (task, metric), column in own.items()
        },
    }


def step_ms(config: Config) -> float | None:
    """Milliseconds of a training step, the median over the lines of the run's log; None where there are
    none."""
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [line["speed/images_per_second"] for line in map(json.loads, lines) if line["kind"] == "train"]
    return (
        1000 * config.train.batch_size * config.train.accumulate / statistics.median(speeds)
        if speeds
        else None
    )


def gains(rows: list[dict[str, Any]], figures: Sequence[str]) -> list[dict[str, Any]]:
    """Each run minus each of its controls, seed by seed. figures: the keys of the rows that are compared."""
    by_name = {row["name"]: row for row in rows}
    return [_gain(row, by_name[name], figures) for row in rows for name in row["against"]]


def _gain(row: Mapping[str, Any], control: Mapping[str, Any], figures: Sequence[str]) -> dict[str, Any]:
    pairs = [
        (row["seeds"].index(s), control["seeds"].index(s)) for s in row["seeds"] if s in control["seeds"]
    ]
    shared = [key for key in figures if key in row and key in control]
    differences = {key: [_difference(row[key][i], control[key][j]) for i, j in pairs] for key in shared}
    return {"name": row["name"], "against": control["name"], **differences}


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def report(results: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The tables of a study: the networks, and each one's gain over its control."""
    columns = [Column(**column) for column in results["figures"]]
    rows = [
        {
            "network": row["name"],
            "labels": row["labelled_images"],
            "unlabelled": row["unlabelled_images"],
            "parameters": f"{row['params'] / 1e6:.2f} M",
            "MACs": f"{row['macs'] / 1e6:.0f} M",
            "steps": row["steps"],
            **_spreads(row, columns),
            "ms/step": round(mean_and_spread(row["step_ms"])[0]) if row["step_ms"][0] is not None else None,
            "time": clock(mean_and_spread(row["seconds"])[0]),
        }
        for row in results["rows"]
    ]
    head = {k: k for k in ("network", "labels", "unlabelled", "parameters", "MACs", "steps")}
    shown = {
        column.key: column.heading for column in columns if any(column.key in row for row in results["rows"])
    }
    parts = [f"{'## ' if markdown else ''}{results['title']}", results["machine"]]
    parts.append(table(rows, {**head, **shown, "ms/step": "ms/step", "time": "time"}, markdown=markdown))
    if results["gains"]:
        lines = [
            {"gain": f"{gain['name']} - {gain['against']}"} | _spreads(gain, columns)
            for gain in results["gains"]
        ]
        parts.append(table(lines, {"gain": "gain", **shown}, markdown=markdown))
    return "\n\n".join(parts)


def _spreads(row: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, str]:
    return {
        column.key: spread_text(row[column.key], column.digits) for column in columns if column.key in row
    }


def write_summary(results: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """summary.json in the study's folder: the first seed's figures by network, and what it all took."""
    keys, figures = ("labelled_images", "params"), [column["key"] for column in results["figures"]]
    summary: dict[str, Any] = {
        row["name"]: {key: row[key][0] for key in figures if key in row} | {key: row[key] for key in keys}
        for row in results["rows"]
    }
    summary["seconds"] = {row["name"]: row["seconds"][0] for row in results["rows"]} | {
        "total": round(seconds, 1)
    }
    summary["peak_memory_mb"] = peak_memory_mb()
    write_text(Path(results["dir"]) / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def picture(study: Study, configs: Mapping[str, Mapping[int, Config]]) -> np.ndarray:
    """Labels and every network of the first seed, on validation images spread over the set: uint8 [H,W,3]."""
    first = {name: next(iter(runs.values())) for name, runs in configs.items()}
    config = next(iter(first.values()))
    on = resolve_device(config.run.device)
    networks = {name: _drawn_network(name, one, on) for name, one in first.items()}
    tasks = merged_tasks({name: network.tasks for name, network in networks.items()})
    found = build.open_sets(config, "val", only=tasks)
    spread = np.linspace(0, len(found) - 1, num=study.pictures + 2, dtype=int)[1:-1]
    rows = compare(found, spread.tolist(), networks, on, tasks)
    return with_legend(rows, ["truth", *networks], tasks)


def _drawn_network(name: str, config: Config, device: torch.device) -> DrawnNetwork:
    content = load_checkpoint(Path(config.run.dir) / "best.pt", name)
    net = build.from_checkpoint(content, name).to(device).eval()
    tasks = build.tasks(content["arch"], net)
    return DrawnNetwork(net, tasks, tuple(content["arch"]["input_size"]), build.decode_options(config))
