"""The config of a pipeline: from a trained network to a smaller one on the device, each step with its own
settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator

from ..config import Config, Count, Fraction, Natural, PathText, Section, load, read_yaml, validate
from .study_config import CutSettings, plain_dir


class Step(Section):
    """A training of the pipeline: the recipe of `config`, changed."""

    over: tuple[str, ...] = ()
    """YAML files merged over the recipe, relative to the pipeline's file."""
    overrides: tuple[str, ...] = ()
    """key=value changes; {dir} stands for the pipeline's folder."""


class ExportStep(Section):
    """The files for the device, made of the distilled network."""

    int8: bool = False
    """Whether a quantised file is made too, calibrated on images of data.train."""
    images: Count = 128
    """Images that it is calibrated on."""
    decode: bool = False
    """Whether the files hold decoding and suppression too."""


class CompareStep(Section):
    """The table and the page at the end."""

    batch: Count = 8
    """Images in the second timing."""
    runs: Count = 20
    """Timed runs of each network."""
    pictures: Natural = 6
    """Images on the page."""
    confidence: Fraction | None = None
    """Score from which a box counts; null: where each network's F1 is highest."""


class Pipeline(Section):
    """Train, train sparsely, prune, fine-tune (the control), distil from the whole network, export, compare."""

    dir: str
    """Folder of the pipeline, relative to where the command runs."""
    config: str
    """The recipe of the whole network, relative to the pipeline's file."""
    checkpoint: PathText | None = None
    """The whole network, already trained; null trains it by the recipe."""
    train: Step = Step()
    """Of the whole network, where no checkpoint is given."""
    sparse: Step | None = Step(overrides=("sparse.weight=1.0e-4",))
    """Training on with a penalty before pruning; null leaves it out."""
    prune: CutSettings
    finetune: Step = Step()
    """Of the pruned network, by labels alone: the control."""
    distil: Step
    """Of the pruned network, by the whole one besides. The schedule has to be that of `finetune`."""
    export: ExportStep = ExportStep()
    compare: CompareStep = CompareStep()

    @field_validator("dir")
    @classmethod
    def _dir_is_plain(cls, value: str) -> str:
        return plain_dir(value)


def load_pipeline(path: str | Path) -> tuple[Pipeline, dict[str, Config]]:
    """A pipeline and, by step, the config of each of its trainings. Raises UserError."""
    path = Path(path)
    plan = validate(Pipeline, read_yaml(path), str(path))
    whole = plan.checkpoint or f"{plan.dir}/whole/best.pt"
    pruned = f"{plan.dir}/cut.pt"
    settings: dict[str, tuple[Step, list[str]]] = {}
    if plan.checkpoint is None:
        settings["train"] = (plan.train, [f"run.dir={plan.dir}/whole"])
    if plan.sparse is not None:
        settings["sparse"] = (plan.sparse, [f"run.dir={plan.dir}/sparse", f"model.start={whole}"])
    settings["finetune"] = (plan.finetune, [f"run.dir={plan.dir}/finetuned", f"model.start={pruned}"])
    settings["distil"] = (
        plan.distil,
        [f"run.dir={plan.dir}/distilled", f"model.start={pruned}", f"teacher.path={whole}"],
    )
    return plan, {name: _config(path, plan, step, last) for name, (step, last) in settings.items()}


def _config(path: Path, plan: Pipeline, step: Step, last: list[str]) -> Config:
    given = [text.replace("{dir}", plan.dir) for text in step.overrides]
    over = [path.parent / text for text in step.over]
    return load(path.parent / plan.config, [*given, *last], over=over)
