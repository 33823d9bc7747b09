"""A pipeline: from a trained network to a smaller one on the device, every step done once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import build
from ..config import Config
from ..engine.compare import compare, prepare, write
from ..engine.export import Export, export
from ..engine.prune import Cut, prune_checkpoint, report
from ..report.comparison import text
from .pipeline_config import Pipeline, load_pipeline
from .runs import finish
from .steps import RunFolder, Steps, settings_text


def run_pipeline(path: str | Path) -> dict[str, Any] | None:
    """Do what is missing of the pipeline in ``path``; returns the comparison, or None when a signal stopped a
    training.

    A step is done again only where its settings or the files that it reads have changed (see ``steps``); a
    training that was interrupted goes on. Raises UserError.
    """
    plan, configs = load_pipeline(path)
    for config in configs.values():
        build.check(build.without_start(config))  # the networks that they start from may not be there yet
    cut = Cut.of(f"{path}: prune", **plan.prune.model_dump())
    steps = Steps(Path(plan.dir))
    whole = Path(plan.checkpoint) if plan.checkpoint else Path(configs["train"].run.dir) / "best.pt"
    for config in configs.values():
        RunFolder(config).adopt()  # before anything is made that others began from
    if not all(_train(name, configs[name]) for name in ("train", "sparse") if name in configs):
        return None
    dense = Path(configs["sparse"].run.dir) / "best.pt" if "sparse" in configs else whole
    pruned = Path(plan.dir) / "cut.pt"
    steps.once(
        "prune", [dense], repr(cut), [pruned], lambda: print(report(_prune(configs, dense, pruned, cut)))
    )
    if not all(_train(name, configs[name]) for name in ("finetune", "distil")):
        return None
    student = Path(configs["distil"].run.dir) / "best.pt"
    finetuned = Path(configs["finetune"].run.dir) / "best.pt"
    exported = _export(steps, plan, configs["distil"], {"whole": whole, "student": student})
    files = {"whole": whole, "cut, fine-tuned": finetuned, "cut, distilled": student} | {
        file.name: file for file in exported
    }
    return _compare(steps, plan, configs["distil"], files, path)


def _train(name: str, config: Config) -> bool:
    """Train, go on, or keep what is there. False when a signal stopped it."""
    print(f"\n== {name}: {config.run.dir}", flush=True)
    return finish(config) is not None


def _prune(configs: Mapping[str, Config], dense: Path, pruned: Path, cut: Cut) -> Any:
    return prune_checkpoint(configs["finetune"], str(dense), str(pruned), cut)


def _export(steps: Steps, plan: Pipeline, config: Config, networks: Mapping[str, Path]) -> list[Path]:
    """The files for the device; the whole network's too, so that like is compared with like."""
    forms = [(name, "fp32", f"{name}.onnx") for name in networks]
    forms += [("student", "int8", "student.int8.onnx")] if plan.export.int8 else []
    made = []
    for name, precision, file in forms:
        out, data = Path(plan.dir) / file, config if precision == "int8" else None
        decode = () if plan.export.decode else None
        images = plan.export.images if data else None
        wanted = Export(str(networks[name]), str(out), precision=precision, decode=decode, images=images)
        settings = repr(wanted) if data is None else settings_text(data, export=repr(wanted))
        marker = f"export_{Path(file).stem}"
        steps.once(marker, [networks[name]], settings, [out], lambda w=wanted, d=data: print(export(w, d)))
        made.append(out)
    return made


def _compare(
    steps: Steps, plan: Pipeline, config: Config, files: Mapping[str, Path], path: str | Path
) -> dict[str, Any]:
    """The table, and the page beside it."""
    outputs = {ending: Path(plan.dir) / f"comparison.{ending}" for ending in ("csv", "json", "html")}
    options = plan.compare.model_dump(exclude={"pictures"})

    def work() -> None:
        given = {ending: str(out) for ending, out in outputs.items()}
        prepare(**given)
        results = compare(
            config,
            [str(f) for f in files.values()],
            names=list(files),
            **options,
            command=["python", "tools/pipeline.py", str(path)],
        )
        print(text(results))
        for written in write(config, results, pictures=plan.compare.pictures, **given):
            print(f"written: {written}")

    timed_on = {"threads": config.run.threads, "device": config.run.device}
    settings = settings_text(config, compare=plan.compare.model_dump() | timed_on)
    steps.once("compare", list(files.values()), settings, list(outputs.values()), work)
    return json.loads(outputs["json"].read_text(encoding="utf-8"))
