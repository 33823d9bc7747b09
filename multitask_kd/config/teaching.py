"""The config's sections on tasks, soft losses, terms, teachers and their balance."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .base import Count, Number, PathText, Positive, Section, without_null
from .schedules import ScheduledFraction, ScheduledRatio, ScheduledWeight, extremes


class Soft(Section):
    """A soft loss: what the student learns from the teacher's predictions."""

    loss: str
    """A registered name; each is described below."""
    weight: ScheduledWeight = 1.0
    """Factor of the loss inside soft_k."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loss, e.g. temperature, which may be a schedule."""
    through: Literal["student", "teacher"] = "student"
    """Whose head makes the prediction that is compared with the teacher's: the student's own, or the
    teacher's frozen one on the student's pyramid (CrossKD, Wang et al., 2024)."""


class Task(Section):
    """One task: ratio * [(1 - alpha) * hard + alpha * soft]."""

    kind: str | None = None
    """The kind of the task: semantic, detection, classification, depth; null: semantic for a task called seg,
    detection for one called det."""
    ratio: ScheduledRatio = 1.0
    """Weight of the task in the total."""
    alpha: ScheduledFraction = 0.0
    """Share of the soft loss; 0 is plain supervised training."""
    soft: Soft | None = None
    head: dict[str, Any] = Field(default_factory=dict)
    """Architecture options of the head, e.g. depth."""
    hard: dict[str, Any] = Field(default_factory=dict)
    """Options of the hard loss."""
    decode: dict[str, Any] = Field(default_factory=dict)
    """Options of the post-processing, e.g. score_threshold."""

    @property
    def taught(self) -> bool:
        """Whether the teacher's predictions have a weight in it."""
        return max(extremes(self.alpha)) > 0

    @model_validator(mode="after")
    def _soft_is_used(self) -> Task:
        if self.taught and self.soft is None:
            raise ValueError("alpha is above 0 but there is no soft loss: give soft.loss, or set alpha to 0")
        return self


class Term(Section):
    """A loss between a module of the student and one of the teacher, added to the total with its weight."""

    student: str
    """Module of the student whose output is compared, by dotted path as in named_modules(): neck.p3 (the
    level of stride 8), heads.seg (logits), heads.det.box_tower, backbone.<as the encoder names it>; the error
    for an unknown path names the nearest one."""
    teacher: str | None = None
    """Module of the teacher; null is the same path."""
    of: str | None = None
    """Which of several `teachers` is tapped."""
    loss: str
    """A registered name; each is described below."""
    weight: ScheduledWeight = 1.0
    """Weight of the term in the total."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loss, e.g. tau, which may be a schedule."""
    align: Literal["auto", "conv", "none"] = "auto"
    """conv: a learnt 1x1 convolution from the student's channels to the teacher's; auto: conv, except between
    outputs of heads, whose channels are classes."""
    norm: Literal["auto", "batch", "none"] = "auto"
    """batch: both maps are normalised, each channel over the batch, without learnt weights; auto: batch for
    features where the loss is defined on normalised maps (cwd)."""
    size: Literal["smaller", "student", "teacher"] = "smaller"
    """Whose height and width both maps get where they differ."""

    @property
    def teacher_path(self) -> str:
        return self.teacher or self.student

    @property
    def head(self) -> str | None:
        """The task whose head is tapped on both sides; None where anything else is."""
        same = self.student.startswith("heads.") and self.teacher_path == self.student
        return self.student.removeprefix("heads.") if same else None


Side = Annotated[int, Field(ge=16, strict=True)]


class TeacherInput(Section):
    """The form of image that a teacher expects. A checkpoint written by this package knows all of it but the
    size."""

    size: tuple[Side, Side] | None = None
    """Height and width in pixels, at least 16; null: `data.input_size`. Images are letterboxed to it; where
    it is larger than the student's, the teacher gets each image of a batch at its own resolution, with the
    same augmentation as the student."""
    scale: Positive = 1.0
    """The largest pixel value that the network expects: 1 or 255."""
    mean: tuple[Number, Number, Number] | None = None
    """Mean of red, green, blue in that range; null: what the source knows, else ImageNet's (0.485, 0.456,
    0.406 times scale)."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation, likewise; null: what the source knows, else ImageNet's (0.229, 0.224, 0.225 times
    scale)."""
    order: Literal["rgb", "bgr"] = "rgb"
    """Order of the colours."""

    @model_validator(mode="after")
    def _of_one_range(self) -> TeacherInput:
        if (self.mean is None) != (self.std is None):
            given, other = ("mean", "std") if self.std is None else ("std", "mean")
            raise ValueError(f"{other}: {given} is given; give both, in the range of scale")
        for key in ("mean", "std"):
            values, pixels = list(getattr(self, key) or ()), f"pixels of 0 to {self.scale:g}"
            if any(abs(v) > self.scale for v in values):
                raise ValueError(
                    f"{key}: {values} does not fit {pixels}; is scale "
                    f"{'255' if self.scale == 1 else 'right'}?"
                )
            if self.scale >= 100 and any(0 < abs(v) < 1 for v in values):
                raise ValueError(
                    f"{key}: {values} is of pixels of 0 to 1, not {pixels}; give mean and std in the range "
                    f"of scale"
                )
        return self


def _names_by_task(value: Any) -> Any:
    """The class names of a teacher as read from YAML, checked. Raises ValueError where a task's are no list
    of names."""
    if not isinstance(value, dict):
        return value
    for task, names in value.items():
        if not isinstance(names, (list, tuple)) or not names:
            raise ValueError(
                f"{task}: a list of class names, in the network's order, is needed, not {names!r}"
            )
        if odd := [n for n in names if not isinstance(n, str)]:
            raise ValueError(
                f"{task}: {odd[0]!r} is no name; write names, in quotes where YAML takes them for something "
                f"else"
            )
    return value


class Teacher(Section):
    """A frozen network that teaches."""

    source: str = "checkpoint"
    """Where the teacher comes from; checkpoint: a file of this package; ema: the average of the student's own
    weights (train.ema); self: the student itself, whose deeper taps teach shallower ones in `distill`; the
    others are described below."""
    path: PathText | None = None
    """The file, where the source reads one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the source."""
    trust_pickle: bool = False
    """Whether code in the file may run, as in any pickle. Only for files that you made yourself."""
    tasks: tuple[str, ...] | None = None
    """The tasks that it teaches; null: every task with an alpha above 0 that it predicts."""
    input: TeacherInput = TeacherInput()
    classes: Annotated[
        dict[str, tuple[str, ...]], BeforeValidator(_names_by_task), BeforeValidator(without_null)
    ] = Field(default_factory=dict)
    """By task: its class names in its order; needed unless the source knows them. They are matched to the
    student's by name."""
    map: Annotated[dict[str, dict[str, str | None]], BeforeValidator(without_null)] = Field(
        default_factory=dict
    )
    """By task: its class names -> the student's, where they differ; several may become one, null leaves a
    class out."""
    outputs: Annotated[dict[str, dict[str, Any]], BeforeValidator(without_null)] = Field(default_factory=dict)
    """By task: which part of the network's return value is the prediction, and in which form; null:
    recognised by its shape."""
    amp: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """Precision of the teacher's forward; auto: bf16 where the hardware multiplies it natively, else none."""
    floor: Annotated[dict[str, Annotated[float, Field(ge=0, le=100)]], BeforeValidator(without_null)] = Field(
        default_factory=dict
    )
    """By task: the least main metric (mIoU, mAP, ..., in percent) on `check_images` validation images; a
    worse teacher stops the run."""
    check_images: Count = 32
    """Validation images on which the check before a run measures the teacher."""

    @property
    def is_own(self) -> bool:
        """Whether it is the student itself, or its average."""
        return self.source in ("ema", "self")

    @model_validator(mode="after")
    def _path_fits_source(self) -> Teacher:
        if self.path is None and self.source == "checkpoint":
            raise ValueError("path: the source 'checkpoint' needs one")
        if self.is_own and self.path is not None:
            raise ValueError(f"path: the source '{self.source}' reads no file")
        unused = {"checkpoint": ("options", "trust_pickle", "outputs", "classes")}
        own = ("options", "trust_pickle", "outputs", "input", "classes", "tasks", "map")
        for key in unused.get(self.source, own if self.is_own else ()):
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                why = "knows its own" if key in ("input", "classes") else "has no use for it"
                raise ValueError(f"{key}: the source '{self.source}' {why}; leave it out")
        if self.source == "checkpoint" and self.input != TeacherInput(size=self.input.size):
            raise ValueError(
                "input: a checkpoint of this package knows its mean, std, order and scale; only size can be "
                "given"
            )
        return self


class Balance(Section):
    """How the weights of tasks and terms change while training."""

    method: str = "fixed"
    """fixed keeps the weights as they are given; the others are described below."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method."""
