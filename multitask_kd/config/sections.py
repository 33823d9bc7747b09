"""The config: run, data, network, tasks, teachers, training, evaluation; typed, strict, frozen."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..errors import did_you_mean
from .base import Count, Fraction, Natural, NonNegative, PathText, Positive, Section, without_null
from .data_sets import Data
from .schedules import ScheduledWeight, extremes
from .teaching import Balance, Task, Teacher, Term


class RunSection(Section):
    """Where a run writes and what it runs on."""

    dir: PathText = "runs/default"
    """Folder of the run: resolved config, checkpoints, TensorBoard, metrics.jsonl."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)] = 0
    """Seed of weights, sample order and augmentation."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:N."""
    threads: Annotated[int, Field(ge=1, le=1024, strict=True)] | None = None
    """CPU threads of torch; null leaves the choice to torch."""
    channels_last: bool = True
    """Memory layout of images and convolutions; faster on CPU and on GPU with AMP."""


class Model(Section):
    """The network: encoder, feature pyramid; the heads are in `tasks`."""

    start: PathText | None = None
    """A checkpoint written by this package (by tools/train.py, or pruned by tools/prune.py) whose
    architecture, heads included, and weights training begins from. The keys below and `tasks.*.head` are then
    the checkpoint's: leave them out, or give the same values."""
    encoder: str = "tu-mobilenetv4_conv_small_035"
    """An encoder of segmentation-models-pytorch, or tu-<name> for one of timm."""
    weights: str | None = None
    """Starting weights of the encoder: null (random), imagenet (downloaded), or the path of a state dict."""
    strides: Annotated[tuple[Count, ...], Field(min_length=1)] = (4, 8, 16, 32)
    """Pyramid levels, finest first; powers of two."""
    width: Count = 48
    """Channels of the pyramid and the heads."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Input mean, RGB in [0,1]."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Input standard deviation, RGB in [0,1]."""

    @model_validator(mode="after")
    def _one_start(self) -> Model:
        if self.start is not None and self.weights is not None:
            raise ValueError("weights: model.start has weights of its own; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _strides_rise(self) -> Model:
        if list(self.strides) != sorted(set(self.strides)) or any(s & (s - 1) or s < 2 for s in self.strides):
            raise ValueError(f"strides: {list(self.strides)} are not rising powers of two from 2")
        return self


class Optimizer(Section):
    """AdamW or SGD with linear warm-up and cosine decay."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The method; sgd uses Nesterov momentum."""
    lr: Positive = 2e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.02
    """Decay of weights; normalisation and biases are not decayed."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's Nesterov momentum, AdamW's beta1."""
    warmup: Natural = 50
    """Steps of linear warm-up."""
    final_lr: Fraction = 0.01
    """Learning rate at the end, as a fraction of the peak."""


class Sparse(Section):
    """Sparse training: a penalty that draws channels towards zero, so that tools/prune.py finds channels of
    little importance. It is meant for a trained network (`model.start`) and a low learning rate;
    TensorBoard's sparse/scales shows the scales that it acts on."""

    method: Literal["scale", "group"] = "scale"
    """scale: the sum of the absolute weights of BatchNorm and GroupNorm (Network Slimming, Liu et al., 2017);
    group: the squared norm of all weights that make, scale or read a channel, with a stronger penalty on
    weaker channels (DepGraph, Fang et al., 2023; needs torch-pruning)."""
    weight: ScheduledWeight = 1e-4
    """Weight of the penalty in the total."""


class Train(Section):
    """The training loop."""

    steps: Count = 600
    """Optimizer steps."""
    batch_size: Count = 16
    """Images per forward pass."""
    accumulate: Count = 1
    """Forward passes per optimizer step; the effective batch is batch_size * accumulate."""
    clip: NonNegative = 10.0
    """Largest gradient norm; 0 does not clip."""
    amp: Literal["auto", "none", "bf16", "fp16"] = "none"
    """Precision of the student's forward; fp16 (CUDA only) scales the loss. bf16 slows narrow networks on
    most CPUs."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the average of weights that is evaluated and saved as the result; 0: no average."""
    optimizer: Optimizer = Optimizer()
    log_every: Count = 20
    """Steps between lines of metrics.jsonl and TensorBoard scalars."""
    log_gradients: bool = False
    """Whether each line has, for every task and term, the norm of its gradient at the encoder's maps, and the
    cosine between every two gradients."""
    check: bool = True
    """Whether a run with a teacher first checks on one batch that every part of it works, as tools/check.py
    does."""
    eval_every: Count | None = None
    """Steps between evaluations; null evaluates at the end only."""
    save_every: Count = 100
    """Steps between saves of last.pt, which --resume continues from."""


class Eval(Section):
    """Evaluation."""

    batch_size: Count = 32
    """Images per forward pass."""
    images: Count | None = None
    """Evaluate only the first so many validation images while training; null is all."""
    pictures: Natural = 4
    """Validation images drawn in TensorBoard: truth, teacher, student."""


def _named_sections(teachers: Any) -> Any:
    """``teachers`` without those that are null. Raises ValueError for one teacher's keys in place of named
    teachers."""
    teachers = without_null(teachers)
    if isinstance(teachers, dict) and any(isinstance(teachers.get(key), str) for key in ("source", "path")):
        raise ValueError(
            "every teacher has a name of your choice before its keys, as in teachers.a.path; use teacher for "
            "one"
        )
    return teachers


def _without_null_tasks(tasks: Any) -> Any:
    return tasks if tasks is None else without_null(tasks)


class Config(Section):
    """One run of training."""

    run: RunSection = RunSection()
    data: Data = Data()
    model: Model = Model()
    tasks: Annotated[dict[str, Task], BeforeValidator(_without_null_tasks)] = Field(
        default_factory=lambda: {"seg": Task(), "det": Task()}, min_length=1
    )
    """By a name of your choice (seg and det need no kind): one head each on one backbone; null removes a task
    of a base file."""
    distill: Annotated[dict[str, Term], BeforeValidator(without_null)] = Field(default_factory=dict)
    """By a name of your choice: terms between the inner features of student and teacher. null removes a term
    of a base file, `distill: null` all of them."""
    balance: Balance = Balance()
    teacher: Teacher | None = None
    """Needed where an alpha is above 0 or `distill` has a term; never loaded otherwise."""
    teachers: Annotated[dict[str, Teacher], BeforeValidator(_named_sections)] = Field(default_factory=dict)
    """By a name of your choice: several teachers instead of one, for different tasks or for the same task
    (averaged)."""
    sparse: Sparse | None = None
    """null: no sparse training."""
    train: Train = Train()
    eval: Eval = Eval()

    @property
    def distils(self) -> bool:
        """Whether anything is learnt from a teacher."""
        return bool(self.distill) or any(task.taught for task in self.tasks.values())

    @property
    def named_teachers(self) -> dict[str, Teacher]:
        """Every teacher by its key path, "teacher" or "teachers.<name>"; none where nothing is learnt from
        them."""
        if not self.distils:
            return {}
        return (
            {"teacher": self.teacher}
            if self.teacher
            else {f"teachers.{name}": t for name, t in self.teachers.items()}
        )

    @property
    def taught_by_average(self) -> bool:
        """Whether the teacher is the average of the student's own weights."""
        return self.distils and self.teacher is not None and self.teacher.source == "ema"

    @property
    def taught_by_itself(self) -> bool:
        """Whether the student's own deeper layers teach."""
        return self.distils and self.teacher is not None and self.teacher.source == "self"

    def tapped_teacher(self, term: Term) -> str:
        """The key path of the teacher that ``term`` taps."""
        return f"teachers.{term.of}" if term.of else next(iter(self.named_teachers))

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if not any(max(extremes(t.ratio)) for t in self.tasks.values()):
            raise ValueError("tasks: every ratio is 0, so nothing would be learnt")
        if self.teacher and self.teachers:
            raise ValueError(
                "teachers: there is a teacher besides; move it into teachers, under a name of its own"
            )
        if self.distils and not self.named_teachers:
            what = "distill has terms" if self.distill else "an alpha is above 0"
            raise ValueError(
                f"{what} but there is no teacher: give teacher.path, or set every alpha to 0 and leave "
                f"distill out"
            )
        if bad := [
            name for name in (*self.distill, *self.teachers, *self.tasks) if not re.fullmatch(r"\w+", name)
        ]:
            where = (
                "distill" if bad[0] in self.distill else "teachers" if bad[0] in self.teachers else "tasks"
            )
            raise ValueError(f"{where}.{bad[0]}: use letters, digits and _ in the name")
        if own := [name for name, t in self.teachers.items() if t.is_own]:
            raise ValueError(
                f"teachers.{own[0]}.source: '{self.teachers[own[0]].source}' stands alone, as teacher"
            )
        if self.taught_by_average and not self.train.ema:
            raise ValueError("teacher.source: ema needs the average of weights; set train.ema above 0")
        if self.taught_by_itself:
            if taught := [name for name, task in self.tasks.items() if task.taught]:
                raise ValueError(
                    f"tasks.{taught[0]}.alpha: a student is not taught by its own predictions; set it to 0"
                )
            if own := [n for n, t in self.distill.items() if t.teacher in (None, t.student)]:
                raise ValueError(
                    f"distill.{own[0]}.teacher: with teacher.source self, name another module of the student"
                )
        for name, term in self.distill.items():
            if (len(self.teachers) > 1) if term.of is None else (term.of not in self.teachers):
                known = (
                    did_you_mean(term.of or "", self.teachers)
                    if self.teachers
                    else "there is only one; leave it out"
                )
                raise ValueError(
                    f"distill.{name}.of: "
                    + (f"no teacher '{term.of}'; {known}" if term.of else f"which teacher? {known}")
                )
        for key_path, teacher in {
            "teacher": self.teacher,
            **{f"teachers.{n}": t for n, t in self.teachers.items()},
        }.items():
            if teacher is not None:
                self._teacher_fits(key_path, teacher)
        stride = max(self.model.strides)
        if self.model.start is None and any(n % stride for n in self.data.input_size):
            raise ValueError(
                f"data.input_size: {list(self.data.input_size)} are not multiples of the largest stride, "
                f"{stride}"
            )
        return self

    def _teacher_fits(self, key_path: str, teacher: Teacher) -> None:
        """Raise ValueError where a teacher's section names a task that does not exist, or has a key that is
        not used."""
        for key in ("floor", "tasks", "map"):
            if unknown := set(getattr(teacher, key) or ()) - set(self.tasks):
                raise ValueError(
                    f"{key_path}.{key}.{min(unknown)}: there is no such task; "
                    f"{did_you_mean(min(unknown), self.tasks)}"
                )
        for key in ("floor", "map", "outputs"):
            if unused := [
                name
                for name in getattr(teacher, key)
                if teacher.tasks is not None and name not in teacher.tasks
            ]:
                raise ValueError(
                    f"{key_path}.{key}.{unused[0]}: {key_path}.tasks leaves '{unused[0]}' out; change one of "
                    f"them"
                )
        if teacher.floor and teacher.is_own:
            raise ValueError(
                f"{key_path}.floor: the source '{teacher.source}' has nothing to measure before training; "
                f"leave it out"
            )
        if teacher.floor and not self.train.check:
            raise ValueError(
                f"{key_path}.floor: train.check is false, so it would not be looked at; set one of them "
                f"otherwise"
            )
