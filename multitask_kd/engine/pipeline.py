"""A pipeline: from a trained network to a smaller one on the device, every step done once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import build
from ..atomic import write_text
from ..checkpoint import file_digest
from ..config import Config, dump
from ..errors import UserError, did_you_mean
from ..pipeline_config import Pipeline, load_pipeline
from ..report.comparison import text
from .compare import compare, prepare, write
from .export import Export, export
from .prune import Cut, prune_checkpoint, report
from .study import finish


def run_pipeline(path: str | Path) -> dict[str, Any] | None:
    """Do what is missing of the pipeline in ``path``; returns the comparison, or None when a signal stopped a training.

    A step is done again only where its settings or the files that it reads have changed; a training that was interrupted goes on.
    Raises UserError.
    """
    plan, configs = load_pipeline(path)
    for config in configs.values():  # the networks that they start from may not be there yet
        build.check(config.model_copy(update={"model": config.model.model_copy(update={"start": None})}))
    known = {field.name for field in fields(Cut)} - {"ratio"}
    if unknown := set(plan.prune.options) - known:
        raise UserError(f"{path}: prune.options.{min(unknown)}: no such option; {did_you_mean(min(unknown), known)}")
    cut = Cut(plan.prune.ratio, **plan.prune.options)
    steps = Steps(Path(plan.dir))
    whole = Path(plan.checkpoint) if plan.checkpoint else Path(configs["train"].run.dir) / "best.pt"
    if "train" in configs and not steps.train("train", configs["train"], []):
        return None
    dense = whole
    if "sparse" in configs:
        if not steps.train("sparse", configs["sparse"], [whole]):
            return None
        dense = Path(configs["sparse"].run.dir) / "best.pt"
    pruned = Path(plan.dir) / "cut.pt"
    steps.once("prune", [dense], repr(cut), [pruned], lambda: print(report(_cut(configs, dense, pruned, cut))))
    for name in ("finetune", "distil"):
        if not steps.train(name, configs[name], [pruned, *([whole] if name == "distil" else [])]):
            return None
    student = Path(configs["distil"].run.dir) / "best.pt"
    exported = _export(steps, plan, configs["distil"], student)
    files = [whole, Path(configs["finetune"].run.dir) / "best.pt", student, *exported]
    return _compare(steps, plan, configs["distil"], files, path)


class Steps:
    """The steps of a pipeline in ``folder``, each with a marker of what it was made of."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _made_of(self, files: Sequence[Path], settings: str) -> dict[str, Any]:
        return {"files": {str(file): file_digest(file, str(file)) for file in files}, "settings": settings}

    def _marker(self, name: str) -> tuple[Path, Any]:
        path = self.folder / f"{name}.json"
        try:
            return path, json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return path, None

    def train(self, name: str, config: Config, files: Sequence[Path]) -> bool:
        """Train, go on, or keep what is there. ``files``: what the training starts from. False when a signal stopped it."""
        print(f"\n== {name}: {config.run.dir}", flush=True)
        path, before = self._marker(name)
        wanted = self._made_of(files, dump(config))
        if before != wanted:
            write_text(path, json.dumps(wanted) + "\n")
        return finish(config, overwrite=before is not None and before != wanted) is not None

    def once(self, name: str, files: Sequence[Path], settings: str, outputs: Sequence[Path], work: Callable[[], Any]) -> None:
        """Do ``work``, which makes ``outputs`` of ``files``, unless it was done with the same."""
        print(f"\n== {name}: {', '.join(map(str, outputs))}", flush=True)
        path, before = self._marker(name)
        wanted = self._made_of(files, settings)
        if before == wanted and all(output.exists() for output in outputs):
            print("already done")
            return
        for old in (path, *outputs):
            old.unlink(missing_ok=True)
        work()
        write_text(path, json.dumps(wanted) + "\n")


def _cut(configs: Mapping[str, Config], dense: Path, pruned: Path, cut: Cut) -> Any:
    return prune_checkpoint(configs["finetune"], str(dense), str(pruned), cut)


def _export(steps: Steps, plan: Pipeline, config: Config, student: Path) -> list[Path]:
    """The files for the device."""
    forms = {"onnx": ("student.onnx", "fp32", None)}
    if plan.export.int8:
        forms["int8"] = ("student.int8.onnx", "int8", plan.export.images)
    made = []
    for form, (name, precision, images) in forms.items():
        out = Path(plan.dir) / name
        decode = () if plan.export.decode else None
        wanted = Export(str(student), str(out), precision=precision, decode=decode, images=images)
        data = config if form == "int8" else None
        steps.once(f"export_{form}", [student], repr(wanted), [out], lambda w=wanted, d=data: print(export(w, d)))
        made.append(out)
    return made


def _compare(steps: Steps, plan: Pipeline, config: Config, files: Sequence[Path], path: str | Path) -> dict[str, Any]:
    """The table, and the page beside it."""
    outputs = {ending: Path(plan.dir) / f"comparison.{ending}" for ending in ("csv", "json", "html")}
    names = ["whole", "cut, fine-tuned", "cut, distilled", *(file.name for file in files[3:])]
    options = plan.compare.model_dump(exclude={"pictures"})

    def work() -> None:
        given = {ending: str(out) for ending, out in outputs.items()}
        prepare(**given)
        results = compare(
            config, [str(f) for f in files], names=names, **options, command=["python", "tools/pipeline.py", str(path)]
        )
        print(text(results))
        for written in write(config, results, pictures=plan.compare.pictures, **given):
            print(f"written: {written}")

    steps.once("compare", files, repr((options, dump(config))), list(outputs.values()), work)
    return json.loads(outputs["json"].read_text(encoding="utf-8"))
