"""A study: the same networks over several seeds, one table of mean and spread, one picture."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import build
from ..atomic import write_text
from ..checkpoint import load as load_checkpoint
from ..compress.profile import WHOLE, macs
from ..config import Config, dump
from ..engine.evaluate import evaluate_checkpoint
from ..engine.folder import differences
from ..engine.log import clock
from ..engine.machine import machine, peak_memory_mb
from ..engine.pictures import Speaker, compare
from ..engine.prune import Cut, prune_checkpoint
from ..engine.prune import report as prune_report
from ..engine.train import train
from ..report.pictures import save_png, side_by_side
from ..report.tables import mean_and_spread, spread_text, table
from .steps import Steps
from .study_config import Study, load_study

FIGURES = {"mIoU": ("seg", "mIoU"), "mAP": ("det", "mAP"), "mAP50": ("det", "mAP50")}


def run_study(path: str | Path, *, overwrite: bool = False) -> dict[str, Any] | None:
    """Train what is missing of the study in ``path``, then write results.json, results.md and picture.png in its folder.

    A run that is finished is kept, one that was interrupted goes on where it stopped. Returns the results, or None when
    a signal stopped a run. Raises UserError.
    """
    study, configs = load_study(path)
    for name, runs in configs.items():
        for config in runs.values():
            build.check(build.without_start(config) if study.runs[name].start else config)  # a cut may not be there yet
    cuts = {name: Making(study, configs, name, path) for name in study.cuts}
    forget_pupils(configs, cuts, overwrite=overwrite)
    rows: list[dict[str, Any]] = []
    for name, runs in configs.items():
        results = {}
        first = study.runs[name].start
        if first and not any(row["name"] == first for row in rows):
            rows.append(cuts[first].row())
        for seed, config in runs.items():
            print(f"\n== {name}, seed {seed}: {Path(config.run.dir)}", flush=True)
            result = finish(config, overwrite=overwrite)
            if result is None:
                return None
            results[seed] = result
        rows.append(describe(name, study, runs, results))
    results = {"title": study.title, "dir": study.dir, "machine": machine(), "rows": rows, "gains": gains(rows)}
    folder = Path(study.dir)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "results.md", report(results, markdown=True) + "\n")
    if study.pictures:
        save_png(folder / "picture.png", picture(study, configs))
    return results


class Making:
    """How a cut of a study is made, once."""

    def __init__(self, study: Study, configs: Mapping[str, Mapping[int, Config]], name: str, path: str | Path):
        """Raises UserError for options that tools/prune.py would refuse."""
        plan = study.cuts[name]
        self.name, self.seed = name, next(iter(configs[plan.of]))
        self.config = configs[plan.of][self.seed]
        self.source, self.file = Path(self.config.run.dir) / "best.pt", Path(study.cut_file(name))
        self._cut = Cut.of(f"{path}: cuts.{name}", **plan.model_dump(exclude={"of"}))
        self._steps, self._as_made = Steps(self.file.parent), (self.file.stem, [self.source], repr(self._cut), [self.file])

    def is_done(self) -> bool:
        """Is the file there, cut out of the network as it is now?"""
        return self._steps.is_done(*self._as_made)

    def row(self) -> dict[str, Any]:
        """Make it where it is not there; its row, before it learns again."""
        self._steps.once(*self._as_made, self._make)
        content = load_checkpoint(self.file, self.name)
        result = evaluate_checkpoint(self.config, str(self.file))
        return _row(self.name, content, [self.seed], [result]) | {"against": [], "steps": 0, "seconds": [0.0], "step_ms": [None]}

    def _make(self) -> None:
        print(prune_report(prune_checkpoint(self.config, str(self.source), str(self.file), self._cut)))


def forget_pupils(configs: Mapping[str, Mapping[int, Config]], cuts: Mapping[str, Making], *, overwrite: bool) -> None:
    """What learned from a network that will be trained has to learn again, also if this process does not get there."""
    anew: set[Path] = set()  # folders of runs, files of cuts
    sources = {cut.file: cut for cut in cuts.values()}
    for config in (config for runs in configs.values() for config in runs.values()):
        folder = Path(config.run.dir)
        if (cut := sources.get(Path(config.model.start or ""))) and (cut.source.parent in anew or not cut.is_done()):
            anew.add(cut.file)
        needed = [config.model.start, *(teacher.path for teacher in config.named_teachers.values())]
        again = any(file and {Path(file), Path(file).parent} & anew for file in needed)
        if again:
            (folder / "config.yaml").unlink(missing_ok=True)
        if overwrite or again or not is_done(config):
            anew.add(folder)


def is_done(config: Config) -> bool:
    """Has a run of exactly this config ended?"""
    folder = Path(config.run.dir)
    return _is_written(folder, config) and (folder / "metrics.json").is_file()


def _is_written(folder: Path, config: Config) -> bool:
    written = folder / "config.yaml"
    return written.is_file() and not differences(written.read_text(encoding="utf-8"), dump(build.resolve_init(config)))


def finish(config: Config, *, overwrite: bool = False) -> dict[str, Any] | None:
    """The metrics of a run: read where it is finished, else trained or resumed. "seconds" adds up over its parts."""
    folder = Path(config.run.dir)
    timing = folder / "seconds.json"
    spent = json.loads(timing.read_text(encoding="utf-8")) if timing.is_file() else {"seconds": 0.0}
    done = folder / "metrics.json"
    if is_done(config) and not overwrite:
        print(f"already done: {done}")
        return json.loads(done.read_text(encoding="utf-8")) | spent
    resume = _is_written(folder, config) and (folder / "last.pt").is_file() and not overwrite
    before = spent["seconds"] if resume else 0.0
    began = time.perf_counter()
    metrics = train(config, resume=resume, overwrite=not resume)
    spent = {"seconds": round(before + time.perf_counter() - began, 1)}
    write_text(timing, json.dumps(spent) + "\n")
    return None if metrics is None else metrics | spent


def describe(name: str, study: Study, configs: Mapping[int, Config], results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """One row: what the network saw, and its figures by seed."""
    config = next(iter(configs.values()))
    content = load_checkpoint(Path(config.run.dir) / "best.pt", name)
    return _row(name, content, list(configs), list(results.values())) | {
        "against": list(study.runs[name].controls),
        "steps": config.train.steps,
        "seconds": [result["seconds"] for result in results.values()],
        "step_ms": [step_ms(config) for config in configs.values()],
    }


def _row(name: str, content: Mapping[str, Any], seeds: list[int], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a checkpoint says of its network, and its figures by seed."""
    tasks = content["arch"]["tasks"]
    return {
        "name": name,
        "seeds": seeds,
        "labelled_images": content["labelled_images"],
        "unlabelled_images": content["unlabelled_images"],
        "params": content["params"],
        "macs": macs(build.from_checkpoint(content, name), content["arch"]["input_size"])[WHOLE],
        **{key: [result[task][metric] for result in results] for key, (task, metric) in FIGURES.items() if task in tasks},
    }


def step_ms(config: Config) -> float | None:
    """Milliseconds of a training step, the median over the lines of the run's log; None where there are none."""
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [line["speed/images_per_second"] for line in map(json.loads, lines) if line["kind"] == "train"]
    return 1000 * config.train.batch_size * config.train.accumulate / statistics.median(speeds) if speeds else None


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run minus each of its controls, seed by seed."""
    by_name = {row["name"]: row for row in rows}
    return [_gain(row, by_name[name]) for row in rows for name in row["against"]]


def _gain(row: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, Any]:
    pairs = [(row["seeds"].index(s), control["seeds"].index(s)) for s in row["seeds"] if s in control["seeds"]]
    figures = {
        key: [_difference(row[key][i], control[key][j]) for i, j in pairs] for key in FIGURES if key in row and key in control
    }
    return {"name": row["name"], "against": control["name"], **figures}


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def report(results: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The tables of a study: the networks, and each one's gain over its control."""
    rows = [
        {
            "network": row["name"],
            "labels": row["labelled_images"],
            "unlabelled": row["unlabelled_images"],
            "parameters": f"{row['params'] / 1e6:.2f} M",
            "MACs": f"{row['macs'] / 1e6:.0f} M",
            "steps": row["steps"],
            **{key: spread_text(row[key]) for key in FIGURES if key in row},
            "ms/step": round(mean_and_spread(row["step_ms"])[0]) if row["step_ms"][0] is not None else None,
            "time": clock(mean_and_spread(row["seconds"])[0]),
        }
        for row in results["rows"]
    ]
    head = {k: k for k in ("network", "labels", "unlabelled", "parameters", "MACs", "steps")}
    shown = {key: key for key in FIGURES if any(key in row for row in results["rows"])}
    parts = [f"{'## ' if markdown else ''}{results['title']}", results["machine"]]
    parts.append(table(rows, {**head, **shown, "ms/step": "ms/step", "time": "time"}, markdown=markdown))
    if results["gains"]:
        gains = [
            {"gain": f"{gain['name']} - {gain['against']}"} | {k: spread_text(gain[k]) for k in FIGURES if k in gain}
            for gain in results["gains"]
        ]
        parts.append(table(gains, {"gain": "gain", **shown}, markdown=markdown))
    return "\n\n".join(parts)


def write_summary(results: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """summary.json in the study's folder: the first seed's figures by network, and what it all took."""
    keys = ("labelled_images", "params")
    summary: dict[str, Any] = {
        row["name"]: {key: row[key][0] for key in FIGURES if key in row} | {key: row[key] for key in keys}
        for row in results["rows"]
    }
    summary["seconds"] = {row["name"]: row["seconds"][0] for row in results["rows"]} | {"total": round(seconds, 1)}
    summary["peak_memory_mb"] = peak_memory_mb()
    write_text(Path(results["dir"]) / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def picture(study: Study, configs: Mapping[str, Mapping[int, Config]]) -> np.ndarray:
    """Truth and every network of the first seed, on validation images spread over the set: uint8 [H,W,3]."""
    first = {name: next(iter(runs.values())) for name, runs in configs.items()}
    config = next(iter(first.values()))
    on = build.device(config.run.device)
    speakers = {}
    for name, one in first.items():
        content = load_checkpoint(Path(one.run.dir) / "best.pt", name)
        net = build.from_checkpoint(content, name).to(on).eval()
        tasks = build.tasks(content["arch"], net)
        speakers[name] = Speaker(net, tasks, tuple(content["arch"]["input_size"]), build.decode_options(one))
    found = build.layout(config, "val")
    spread = np.linspace(0, len(found) - 1, num=study.pictures + 2, dtype=int)[1:-1]
    names = {name: classes for name, classes in found.classes.items() if any(name in s.tasks for s in speakers.values())}
    rows = compare(found, spread, speakers, on, names)
    return side_by_side(rows, ["truth", *speakers], class_names=names)
