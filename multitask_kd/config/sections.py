"""The config's sections: typed, strict, frozen."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from ..errors import did_you_mean
from .base import Count, Fraction, Natural, NonNegative, Number, PathText, Positive, Section
from .schedules import ScheduledFraction, ScheduledRatio, ScheduledWeight, extremes


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


class Augment(Section):
    """Training augmentation (albumentations; image, mask and boxes move together)."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    scale: tuple[Positive, Positive] = (0.75, 1.5)
    """Zoom range; above 1 crops, below 1 pads."""
    translate: Fraction = 0.1
    """Largest shift, as a fraction of the image's side."""
    rotate: Annotated[float, Field(ge=0, le=45)] = 0.0
    """Largest rotation in degrees; boxes grow to hold the turned ones."""
    brightness: Fraction = 0.25
    """Largest relative change of brightness and of contrast."""
    color: Fraction = 0.15
    """Largest relative change of saturation; hue moves by a tenth of it."""
    min_visible: Fraction = 0.2
    """A box whose visible share falls below this is dropped."""

    @model_validator(mode="after")
    def _scale_rises(self) -> Augment:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: {list(self.scale)} is [largest, smallest]; give [smallest, largest]")
        return self


def _set_name(text: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*", text):
        raise ValueError(f"'{text}' is no name; use letters, digits and _, and a letter first")
    return text


def _is_part(value: Any) -> Any:
    k, _, n = str(value).partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise ValueError(f"{value} is no part; write e.g. 1/2 and 2/2 for the two halves")
    return value


class DataSet(Section):
    """What may stand beside `layout` and its options in every set of `data.train` and `data.val`."""

    name: Annotated[str, AfterValidator(_set_name)] | None = None
    """What the set is called in logs, curves and overrides (`data.train.<name>.weight=2`); null: its layout and place, from 0."""
    weight: Positive = 1.0
    """Its share of every batch is weight / sum of weights. Training only."""
    tasks: tuple[str, ...] | None = None
    """The tasks whose labels are used; null: all that it labels, []: none."""
    labelled: Count | Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """As `data.labelled`, for this set alone. Training only."""
    rename: dict[str, dict[str, Annotated[str, Field(min_length=1)] | None]] = Field(default_factory=dict)
    """By task: its class names -> those of the run; several may become one, null leaves a class out (boxes: not there, pixels:
    ignored). A name that the set lacks is an error."""
    part: Annotated[str, BeforeValidator(_is_part)] | None = None
    """Only a part of its images, e.g. 1/2 or 2/2: the first or second of two disjoint random halves, the same in every run."""
    layout: dict[str, Any]
    """The layout's name (`layout`) and its options."""


SET_KEYS = tuple(key for key in DataSet.model_fields if key != "layout")
TRAINING_ONLY = ("weight", "labelled")  # of SET_KEYS


def _data_set(raw: dict[str, Any]) -> DataSet:
    own = {key: value for key, value in raw.items() if key in SET_KEYS}
    return DataSet.model_validate(own | {"layout": {key: value for key, value in raw.items() if key not in SET_KEYS}})


def _set_as_given(raw: dict[str, Any]) -> dict[str, Any]:
    _data_set(raw)  # its faults become those of the key, with their place
    return raw


def called(one: dict[str, Any], number: int | str = "") -> str:
    """The name of a set; number: its place among several."""
    layout = one.get("layout")
    return str(one.get("name") or f"{layout if isinstance(layout, str) else 'set'}{number}")


def _fault_at(place: tuple[str | int, ...], message: str) -> ValidationError:
    """A fault of a value within the one that is validated."""
    fault = InitErrorDetails(type=PydanticCustomError("value_error", message), loc=place, input=None)
    return ValidationError.from_exception_data("", [fault])


def _named_apart(sets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = [called(one, number) for number, one in enumerate(sets)]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise _fault_at((number, "name"), f"there are two sets '{name}'; name them apart")
    return sets


def _of_validation(sets: Any) -> Any:
    several = isinstance(sets, list)
    for number, one in enumerate(sets if several else [sets]):
        if used := [key for key in TRAINING_ONLY if key in one]:
            raise _fault_at((number, used[0]) if several else (used[0],), "belongs to training; leave it out of data.val")
    return sets


ONE_SET, SEVERAL_SETS = "one set", "several sets"  # pydantic's names of the alternatives
_Set = Annotated[dict[str, Any], AfterValidator(_set_as_given)]
OneOrSeveral = Annotated[
    Annotated[_Set, Tag(ONE_SET)] | Annotated[list[_Set], Field(min_length=1), AfterValidator(_named_apart), Tag(SEVERAL_SETS)],
    Discriminator(lambda value: SEVERAL_SETS if isinstance(value, (list, tuple)) else ONE_SET),
]


class Data(Section):
    """Which images, and how they reach the network."""

    train: OneOrSeveral = Field(default_factory=lambda: {"layout": "scenes", "split": "train", "count": 1600})
    """Training set: `layout` (a registered name) and its options; or a list of sets, of which every batch holds all."""
    val: Annotated[OneOrSeveral, AfterValidator(_of_validation)] = Field(
        default_factory=lambda: {"layout": "scenes", "split": "val", "count": 200}
    )
    """Validation set, or list of sets, likewise; each task is measured on the images that have labels for it."""
    input_size: tuple[Count, Count] = (96, 128)
    """Height and width of the network's input in pixels, multiples of its largest stride; images are letterboxed to it."""
    labelled: Count | Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """How many training images, of every set, keep their labels: a number of images, a fraction written with a point (1.0 is all),
    null is all."""
    labelled_seed: Natural = 0
    """Seed of the choice which images keep their labels."""
    unlabelled: bool = True
    """Whether the images beyond `labelled`, and sets without labels, are used (distillation only) or left out."""
    labelled_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a set's places in the batch drawn from its labelled images, where it has unlabelled ones too."""
    augment: Augment = Augment()
    workers: Natural = 2
    """Loader processes; 0 loads in the training process."""
    on_error: Literal["raise", "skip"] = "raise"
    """What an image that cannot be read does: stop the run, or be replaced by the next one and be counted."""

    def sets(self, split: Literal["train", "val"]) -> dict[str, DataSet]:
        """The sets of a split, by a name for each."""
        raw = getattr(self, split)
        if isinstance(raw, list):
            return {called(one, number): _data_set(one) for number, one in enumerate(raw)}
        return {called(raw): _data_set(raw)}


class Model(Section):
    """The network: encoder, feature pyramid; the heads are in `tasks`."""

    start: PathText | None = None
    """A checkpoint of ours (a trained network, or what tools/prune.py made of one) whose architecture, with its heads, and weights
    the training begins from; the keys below and `tasks.*.head` are then its own: leave them out, or give what it has."""
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


class Soft(Section):
    """A soft loss: what the student learns from the teacher's predictions."""

    loss: str
    """A registered name; each is described below."""
    weight: ScheduledWeight = 1.0
    """Factor of the loss inside soft_k."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loss, e.g. temperature, which may be a schedule."""
    through: Literal["student", "teacher"] = "student"
    """Whose head makes the prediction that is compared with the teacher's: the student's own, or the teacher's frozen one on the
    student's pyramid (CrossKD, Wang et al., 2024)."""


class Task(Section):
    """One task: ratio * [(1 - alpha) * hard + alpha * soft]."""

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
        """Whether the teacher's predictions count in it."""
        return max(extremes(self.alpha)) > 0

    @model_validator(mode="after")
    def _soft_is_used(self) -> Task:
        if self.taught and self.soft is None:
            raise ValueError("alpha is above 0 but there is no soft loss: give soft.loss, or set alpha to 0")
        return self


class Term(Section):
    """A loss between a module of the student and one of the teacher, added to the total with its weight."""

    student: str
    """Module of the student whose output is compared, by dotted path as in named_modules(): neck.p3 (the level of stride 8),
    heads.seg (logits), heads.det.box_tower, backbone.<as the encoder names it>; a wrong one is answered with the nearest."""
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
    """conv: a learnt 1x1 convolution from the student's channels to the teacher's; auto: that, except between outputs of heads,
    whose channels are classes."""
    norm: Literal["auto", "batch", "none"] = "auto"
    """batch: both maps are normalised, each channel over the batch, without learnt weights; auto: for features where the loss is
    defined so (cwd)."""
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


def _without_null(terms: Any) -> Any:
    return {k: v for k, v in terms.items() if v is not None} if isinstance(terms, dict) else {} if terms is None else terms


Side = Annotated[int, Field(ge=16, strict=True)]


class TeacherInput(Section):
    """What a teacher expects of an image. A checkpoint of ours knows all of it but the size that it is to see."""

    size: tuple[Side, Side] | None = None
    """Height and width in pixels, at least 16; null: `data.input_size`. Images are letterboxed to it; where it is larger than the
    student's, the teacher sees each image of a batch at its own resolution, moved and coloured as the student's."""
    scale: Positive = 1.0
    """The largest value of a pixel as the network knows it: 1 or 255."""
    mean: tuple[Number, Number, Number] | None = None
    """Mean of red, green, blue in that range; null: what the source knows, else ImageNet's (0.485, 0.456, 0.406 times scale)."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation, likewise; null: what the source knows, else ImageNet's (0.229, 0.224, 0.225 times scale)."""
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
                raise ValueError(f"{key}: {values} does not fit {pixels}; is scale {'255' if self.scale == 1 else 'right'}?")
            if self.scale >= 100 and any(0 < abs(v) < 1 for v in values):
                raise ValueError(f"{key}: {values} is of pixels of 0 to 1, not {pixels}; give mean and std in the range of scale")
        return self


def _names_by_task(value: Any) -> Any:
    """Class names of a teacher as YAML has them. Raises ValueError for what is no list of names, once a task."""
    if not isinstance(value, dict):
        return value
    for task, names in value.items():
        if not isinstance(names, (list, tuple)) or not names:
            raise ValueError(f"{task}: a list of class names, in the network's order, is needed, not {names!r}")
        if odd := [n for n in names if not isinstance(n, str)]:
            raise ValueError(f"{task}: {odd[0]!r} is no name; write names, in quotes where YAML takes them for something else")
    return value


class Teacher(Section):
    """A frozen network that teaches."""

    source: str = "checkpoint"
    """Where the teacher comes from; checkpoint: a file of ours; ema: the average of the student's own weights (train.ema);
    self: the student itself, whose deeper taps teach shallower ones in `distill`; the others are described below."""
    path: PathText | None = None
    """The file, where the source reads one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the source."""
    trust_pickle: bool = False
    """Whether code in the file may run, as in any pickle. Only for files that you made yourself."""
    tasks: tuple[str, ...] | None = None
    """What it teaches; null: every task with an alpha above 0 that it knows."""
    input: TeacherInput = TeacherInput()
    classes: Annotated[dict[str, tuple[str, ...]], BeforeValidator(_names_by_task), BeforeValidator(_without_null)] = Field(
        default_factory=dict
    )
    """By task: its class names in its order; needed unless the source knows them. They meet the student's by name."""
    map: Annotated[dict[str, dict[str, str | None]], BeforeValidator(_without_null)] = Field(default_factory=dict)
    """By task: its class names -> the student's, where they differ; several may become one, null leaves a class out."""
    outputs: Annotated[dict[str, dict[str, Any]], BeforeValidator(_without_null)] = Field(default_factory=dict)
    """By task: where in what the network returns its prediction is, and in which form; null: seen from the shape."""
    amp: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """Precision of the teacher's forward; auto: bf16 where the hardware multiplies it natively, else none."""
    floor: Annotated[dict[str, Annotated[float, Field(ge=0, le=100)]], BeforeValidator(_without_null)] = Field(default_factory=dict)
    """By task: the least main metric (mIoU, mAP, in percent) on `check_images` validation images; a worse teacher stops the run."""
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
            raise ValueError("input: a checkpoint of ours knows its mean, std, order and scale; only size can be given")
        return self


class Balance(Section):
    """What changes the weights of tasks and terms while training."""

    method: str = "fixed"
    """fixed keeps the weights as they are given; the others are described below."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method."""


class Optimizer(Section):
    """AdamW or SGD with linear warm-up and cosine decay."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The method; SGD is with Nesterov momentum."""
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
    """Sparse training: a penalty that draws channels towards zero, so that tools/prune.py finds some that hardly matter. A trained
    network (`model.start`) and a low learning rate are what it is for; TensorBoard's sparse/scales shows the scales it acts on."""

    method: Literal["scale", "group"] = "scale"
    """scale: the sum of the absolute weights of BatchNorm and GroupNorm (Network Slimming, Liu et al., 2017); group: of all weights
    that make, scale and read a channel together, the weaker the channel the more (DepGraph, Fang et al., 2023; needs
    torch-pruning)."""
    weight: ScheduledWeight = 1e-4
    """Weight of the penalty in the total."""


class Train(Section):
    """The loop."""

    steps: Count = 600
    """Optimizer steps."""
    batch_size: Count = 16
    """Images a forward pass."""
    accumulate: Count = 1
    """Forward passes an optimizer step; the effective batch is batch_size * accumulate."""
    clip: NonNegative = 10.0
    """Largest gradient norm; 0 does not clip."""
    amp: Literal["auto", "none", "bf16", "fp16"] = "none"
    """Precision of the student's forward; fp16 (CUDA only) scales the loss. bf16 slows narrow networks on most CPUs."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the average of weights that is evaluated and saved as the result; 0 is none."""
    optimizer: Optimizer = Optimizer()
    log_every: Count = 20
    """Steps between lines of metrics.jsonl and TensorBoard scalars."""
    log_gradients: bool = False
    """Whether each line has the gradient's norm of every task and term at the encoder's maps, and the cosine between every two."""
    check: bool = True
    """Whether a run that distils first proves on one batch that every part of it works, as tools/check.py does."""
    eval_every: Count | None = None
    """Steps between evaluations; null evaluates at the end only."""
    save_every: Count = 100
    """Steps between saves of last.pt, which --resume continues from."""


class Eval(Section):
    """Evaluation."""

    batch_size: Count = 32
    """Images a forward pass."""
    images: Count | None = None
    """Evaluate only the first so many validation images while training; null is all."""
    pictures: Natural = 4
    """Validation images drawn in TensorBoard: truth, teacher, student."""


def _named_sections(teachers: Any) -> Any:
    """Without those that are null. Raises ValueError for a teacher where a mapping of them is needed."""
    teachers = _without_null(teachers)
    if isinstance(teachers, dict) and any(isinstance(teachers.get(key), str) for key in ("source", "path")):
        raise ValueError("every teacher has a name of your choice before its keys, as in teachers.a.path; use teacher for one")
    return teachers


def _without_null_tasks(tasks: Any) -> Any:
    return tasks if tasks is None else _without_null(tasks)


class Config(Section):
    """One run of training."""

    run: RunSection = RunSection()
    data: Data = Data()
    model: Model = Model()
    tasks: Annotated[dict[str, Task], BeforeValidator(_without_null_tasks)] = Field(
        default_factory=lambda: {"seg": Task(), "det": Task()}, min_length=1
    )
    """By task name (seg, det): both heads on one backbone; null takes out a task of a base file."""
    distill: Annotated[dict[str, Term], BeforeValidator(_without_null)] = Field(default_factory=dict)
    """By a name of your choice: terms between the inner features of student and teacher. null takes out a term of a base file,
    `distill: null` all of them."""
    balance: Balance = Balance()
    teacher: Teacher | None = None
    """Needed where an alpha is above 0 or `distill` has a term; never loaded otherwise."""
    teachers: Annotated[dict[str, Teacher], BeforeValidator(_named_sections)] = Field(default_factory=dict)
    """By a name of your choice: several teachers instead of the one, for a task each or for the same task (averaged)."""
    sparse: Sparse | None = None
    """Null: off."""
    train: Train = Train()
    eval: Eval = Eval()

    @property
    def distils(self) -> bool:
        """Whether anything is learnt from a teacher."""
        return bool(self.distill) or any(task.taught for task in self.tasks.values())

    @property
    def named_teachers(self) -> dict[str, Teacher]:
        """Every teacher by its place in the config, "teacher" or "teachers.<name>"; none where nothing is learnt from them."""
        if not self.distils:
            return {}
        return {"teacher": self.teacher} if self.teacher else {f"teachers.{name}": t for name, t in self.teachers.items()}

    @property
    def taught_by_average(self) -> bool:
        """Whether the teacher is the average of the student's own weights."""
        return self.distils and self.teacher is not None and self.teacher.source == "ema"

    @property
    def taught_by_itself(self) -> bool:
        """Whether the student's own deeper layers teach."""
        return self.distils and self.teacher is not None and self.teacher.source == "self"

    def tapped_teacher(self, term: Term) -> str:
        """The place of the teacher that ``term`` taps."""
        return f"teachers.{term.of}" if term.of else next(iter(self.named_teachers))

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if not any(max(extremes(t.ratio)) for t in self.tasks.values()):
            raise ValueError("tasks: every ratio is 0, so nothing would be learnt")
        if self.teacher and self.teachers:
            raise ValueError("teachers: there is a teacher besides; move it into teachers, under a name of its own")
        if self.distils and not self.named_teachers:
            what = "distill has terms" if self.distill else "an alpha is above 0"
            raise ValueError(f"{what} but there is no teacher: give teacher.path, or set every alpha to 0 and leave distill out")
        if bad := [name for name in (*self.distill, *self.teachers) if not re.fullmatch(r"\w+", name)]:
            where = "distill" if bad[0] in self.distill else "teachers"
            raise ValueError(f"{where}.{bad[0]}: use letters, digits and _ in the name")
        if own := [name for name, t in self.teachers.items() if t.is_own]:
            raise ValueError(f"teachers.{own[0]}.source: '{self.teachers[own[0]].source}' stands alone, as teacher")
        if self.taught_by_average and not self.train.ema:
            raise ValueError("teacher.source: ema needs the average of weights; set train.ema above 0")
        if self.taught_by_itself:
            if taught := [name for name, task in self.tasks.items() if task.taught]:
                raise ValueError(f"tasks.{taught[0]}.alpha: a student is not taught by its own predictions; set it to 0")
            if own := [n for n, t in self.distill.items() if t.teacher in (None, t.student)]:
                raise ValueError(f"distill.{own[0]}.teacher: with teacher.source self, name another module of the student")
        for name, term in self.distill.items():
            if (len(self.teachers) > 1) if term.of is None else (term.of not in self.teachers):
                known = did_you_mean(term.of or "", self.teachers) if self.teachers else "there is only one; leave it out"
                raise ValueError(
                    f"distill.{name}.of: " + (f"no teacher '{term.of}'; {known}" if term.of else f"which teacher? {known}")
                )
        for place, teacher in {"teacher": self.teacher, **{f"teachers.{n}": t for n, t in self.teachers.items()}}.items():
            if teacher is not None:
                self._teacher_fits(place, teacher)
        stride = max(self.model.strides)
        if self.model.start is None and any(n % stride for n in self.data.input_size):
            raise ValueError(f"data.input_size: {list(self.data.input_size)} are not multiples of the largest stride, {stride}")
        return self

    def _teacher_fits(self, place: str, teacher: Teacher) -> None:
        """What of a teacher speaks of tasks speaks of tasks that there are; and nothing of it is left unused."""
        for key in ("floor", "tasks", "map"):
            if unknown := set(getattr(teacher, key) or ()) - set(self.tasks):
                raise ValueError(f"{place}.{key}.{min(unknown)}: there is no such task; {did_you_mean(min(unknown), self.tasks)}")
        for key in ("floor", "map", "outputs"):
            if unused := [name for name in getattr(teacher, key) if teacher.tasks is not None and name not in teacher.tasks]:
                raise ValueError(f"{place}.{key}.{unused[0]}: {place}.tasks leaves '{unused[0]}' out; change one of them")
        if teacher.floor and teacher.is_own:
            raise ValueError(f"{place}.floor: the source '{teacher.source}' has nothing to measure before training; leave it out")
        if teacher.floor and not self.train.check:
            raise ValueError(f"{place}.floor: train.check is false, so it would not be looked at; set one of them otherwise")
