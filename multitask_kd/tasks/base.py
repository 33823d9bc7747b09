"""What a kind of task is: everything that differs between segmentation, detection, classification, ... in one
class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from ..data.labels import Geometry, Spatial
from ..errors import UserError, did_you_mean
from ..registry import Registry
from ..report.layers import Layer
from ..report.tables import Column


class Kinds(Registry):
    """The kinds of task by name; one that lacks what every kind must have is refused when it is registered."""

    # what there is nothing sensible to inherit for; a map's label moves with the image besides
    needed = (
        "Head", "Output", "main_metric", "headline", "columns", "packed", "losses", "decode", "metric", "score",
        "label_layer", "prediction_layer", "saved",
    )  # fmt: skip
    needed_of_maps = ("to_spatial", "from_spatial")

    def register(self, name: str) -> Callable[[type[Task]], type[Task]]:
        """A decorator; it sets ``kind``. TypeError names what the class lacks."""
        add = super().register(name)

        def checked(cls: type[Task]) -> type[Task]:
            names = (*self.needed, *(self.needed_of_maps if cls.is_map else ()))
            if lacks := [n for n in names if getattr(cls, n, None) is getattr(Task, n, None)]:
                raise TypeError(f"kind of task '{name}' lacks {', '.join(lacks)}; see tasks/base.py")
            cls.kind = name
            return add(cls)

        return checked


KINDS = Kinds("kind of task")
DEFAULT_KINDS = {"seg": "semantic", "det": "detection"}  # tasks of these names need no `kind`


class TeacherPrediction(NamedTuple):
    """What a teacher predicts for one task, brought to the student's pixels (and cells).

    ignore_mask: bool, where its prediction is ignored; None: nowhere. relocated: whether its cells were others
    than the student's.
    """

    pred: Any
    ignore_mask: Tensor | None = None
    relocated: bool = False


class Comparable(NamedTuple):
    """The parts of two predictions that a soft loss compares. mask: bool, where they may be compared; None:
    everywhere."""

    student: Any
    teacher: Any
    mask: Tensor | None = None


class Saved(NamedTuple):
    """A prediction as ``tools/predict.py`` writes it: an index or 16-bit image [H,W] or one of RGB [H,W,3], a value for the JSON,
    rows of boxes [K,6] x1,y1,x2,y2,score,class; None where the kind has none."""

    image: np.ndarray | None = None
    value: Any = None
    boxes: np.ndarray | None = None


class Tally:
    """Counts what a set labels for one task, for ``tools/data.py``. A kind may say more than this one: see
    its methods.

    classes: names in index order. input_size: (H, W) of the network's input. cell: the finest stride that
    reads it, in pixels.
    """

    def __init__(self, classes: Sequence[str], input_size: tuple[int, int], cell: int | None):
        self.classes, self.input_size, self.cell, self.labelled = tuple(classes), input_size, cell, 0

    def look(self, label: Any, image_size: tuple[int, int]) -> Any:
        """What ``add`` counts of one label; called from several threads. image_size: (h, w) of the original."""
        return None

    def add(self, looked: Any) -> None:
        """Count one labelled image."""
        self.labelled += 1

    def figures(self) -> dict[str, Any]:
        """Plain data for the JSON."""
        return {}

    def summary(self) -> str:
        """What follows "5 of 9 labelled, 3 classes" in the head of the report; empty or beginning with a
        comma."""
        return ""

    def class_columns(self) -> dict[str, str]:
        """Columns of the table by class: key -> heading."""
        return {}

    def class_row(self, name: str) -> dict[str, Any]:
        """The cells of one class; empty for a class that is not its own."""
        return {}

    def never(self) -> list[str]:
        """Classes that occur in no label."""
        return []

    def sections(self) -> list[str]:
        """More paragraphs of the report."""
        return []


class Task:
    """One task of a network, by name. A kind of task is one file here: a subclass under
    ``@KINDS.register("<kind>")``.

    Keyword-only parameters of ``__init__`` are the options of the hard loss (``tasks.<name>.hard`` in YAML),
    those of ``Head`` the architecture (``.head``), those of ``decode`` the post-processing (``.decode``),
    those of ``Output`` how the prediction of a network from elsewhere is read (``teacher.outputs.<name>``).
    ``Kinds.needed`` lists what a kind must have; an operation that it may lack (mapping of classes, averaging,
    decoding in a file) is refused by name in a run that asks for it.
    """

    kind: str  # set by ``KINDS.register``
    # Head(width of the pyramid, strides of its levels, number of classes, *, options), with .strides (of its
    # output) and forward({stride: map [B,width,h,w]}) -> a tensor [B,...]; one with ``reads_encoder = True`` is
    # given the encoder's channels by stride in the place of the width, and its maps
    Head: type[nn.Module]
    # Output(*, options) with .at (which part of what a network returns; None: found), .read(returned,
    # classes, size) -> a prediction, and .fault(pred) -> what is wrong with its values: "<key>: <what>", or
    # None
    Output: type
    Tally: type[Tally] = Tally
    has_classes: bool = True  # whether its labels are classes with names
    is_map: bool = False  # whether its prediction is a map [B,C,h,w]
    coloured: bool = True  # whether its classes have colours in pictures
    # forms of a teacher's prediction that a soft loss may ask for besides the kind's own
    forms: tuple[str, ...] = ()
    label_word: str = "labels"  # what an unlabelled picture lacks
    title: str = ""  # of its figures in tables, where the task has the kind's default name

    # hard loss -> its weight inside the task; the keys are what ``losses`` returns
    weights: Mapping[str, float]
    main_metric: str  # key in the metric's result, in percent, higher is better
    headline: tuple[str, ...]  # keys shown in one line of progress
    columns: tuple[tuple[Column, ...], ...]  # the figures of an evaluation, a tuple a row of the table
    row_titles: tuple[str, ...] = ()  # of the rows after the first
    by_class: tuple[str, ...] = ()  # keys whose value is a mapping from class to figure

    def __init__(self, name: str, classes: Sequence[str], strides: Sequence[int]):
        """name: the key in configs, in ``Batch.targets`` and in ``ModelOutput.preds``; strides: of the head's
        output."""
        self.name, self.classes, self.strides = name, tuple(classes), tuple(strides)

    @property
    def is_default(self) -> bool:
        """Whether it has the name that needs no ``kind``: its files, columns and outputs then carry no name
        either."""
        return DEFAULT_KINDS.get(self.name) == self.kind

    def called(self, what: str, sep: str = " ") -> str:
        """``what`` with the task's name before it, unless the task has the default name of its kind."""
        return what if self.is_default else f"{self.name}{sep}{what}"

    def check_names(self) -> None:
        """Raise ValueError for a class that the options name and the task does not have."""

    def _refuse(self, operation: str) -> UserError:
        return UserError(f"tasks.{self.name}: a task of kind '{self.kind}' cannot {operation}")

    # --- labels: static, see data.labels.LabelKind

    @staticmethod
    def class_table(names: Sequence[str | None], known: Sequence[str]) -> np.ndarray:
        """int64 [C]: the run's class by the set's, -1 for one that is left out."""
        return np.array([-1 if name is None else list(known).index(name) for name in names], dtype=np.int64)

    @staticmethod
    def renumbered(label: Any, table: np.ndarray) -> Any:
        return label

    @staticmethod
    def only_known(label: Any, known: np.ndarray) -> Any:
        return label

    @staticmethod
    def to_spatial(label: Any, geometry: Geometry, size: tuple[int, int]) -> Spatial:
        """The label's parts that move with the image. This one is for labels without a place in it."""
        return Spatial(rest=label)

    @staticmethod
    def from_spatial(moved: Spatial, size: tuple[int, int], min_visible: float) -> Any:
        """The label after letterbox and augmentation, of the parts that ``to_spatial`` gave."""
        return moved.rest

    @staticmethod
    def packed(labels: Sequence[Any | None], size: tuple[int, int]) -> dict[str, Tensor]:
        raise NotImplementedError

    # --- training and evaluation

    def losses(self, pred: Any, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Unweighted hard losses (scalars), averaged over what is labelled; ``size`` is the batch's (H, W) in
        pixels.

        target: what ``packed`` gave, on the device; where some images' sets label only some classes,
        ``known`` bool [B,C] besides.
        """
        raise NotImplementedError

    def decode(self, pred: Any, size: tuple[int, int]) -> Any:
        """Predictions a person can use, at the batch's size; indexed by image."""
        raise NotImplementedError

    def restore(self, decoded: Any, geometry: Geometry) -> Any:
        """Decoded predictions of one image, moved to the original image's size."""
        return decoded

    def metric(self) -> Any:
        """A fresh metric, whose ``compute()`` gives the figures by key, None for what has no truth."""
        raise NotImplementedError

    def score(self, metric: Any, prediction: Any, truth: Any) -> None:
        """Add one image's restored prediction and its ``Truth`` to ``metric``, unless the image has no label
        here.

        truth: ``labels`` by task name, ``known`` (bool [C] by task name, missing: all), ``index``,
        ``geometry``.
        """
        raise NotImplementedError

    def main_score(self, figures: Mapping[str, Any], known: Sequence[int] | None = None) -> float | None:
        """The main metric, over the classes of these indices alone where they are not all and it has figures
        by class."""
        if known is None or len(known) == len(self.classes) or not self.by_class:
            return figures[self.main_metric]
        by_class = figures[self.by_class[0]]
        found = [by_class[self.classes[i]] for i in known if by_class.get(self.classes[i]) is not None]
        return sum(found) / len(found) if found else None

    def more_figures(self, metric: Any, confidence: float | None) -> dict[str, Any]:
        """What ``tools/compare.py`` shows besides ``metric.compute()``, by the keys of ``more_columns``.

        ``classes``, where it is there: by class, a mapping of the same keys.
        """
        return {}

    def more_columns(self, confidence: float | None) -> tuple[Column, ...]:
        """The columns of ``more_figures``. confidence: from which score a prediction counts; None: the best
        one."""
        return ()

    def more_note(self, confidence: float | None) -> str:
        """A sentence that has to be known to read ``more_figures``; empty: none."""
        return ""

    # --- pictures and files

    def label_layer(self, label: Any) -> Layer:
        """A label at the original size, to be drawn."""
        raise NotImplementedError

    def prediction_layer(self, prediction: Any, least_score: float) -> Layer:
        """A restored prediction, to be drawn; what has a score below ``least_score`` is left out."""
        raise NotImplementedError

    def saved(self, prediction: Any) -> Saved:
        """A restored prediction as it is written to files."""
        raise NotImplementedError

    # --- export

    raw_output: str = "raw output"  # what the head's output is, in a file's description
    decoded_outputs: Mapping[str, str] = {}  # outputs after decoding, by name: what they are

    def output_names(self) -> dict[str, str]:
        """The names of the decoded outputs in a file, by their names here: with the task's before them unless
        it is the default."""
        return {name: self.called(name, "_") for name in self.decoded_outputs}

    def decoder(self, size: tuple[int, int], *, in_onnx: bool, options: Mapping[str, Any]) -> nn.Module:
        """A module from the raw output to a tuple of the ``decoded_outputs``. size: (H, W) of the input;
        options: of ``decode``."""
        raise self._refuse("be decoded inside an exported file; leave --decode out")

    def from_decoded(self, outputs: Mapping[str, Tensor]) -> Any:
        """The decoded outputs of a file -> a prediction that ``decode`` takes."""
        raise self._refuse("be decoded inside an exported file")

    def expected_shape(self, size: tuple[int, int]) -> dict[int, int]:
        """Axis of the raw output -> its length for images of ``size`` (H, W); axes of free length are left
        out."""
        return {1: len(self.classes)} if self.has_classes else {}

    def decoded_gap(
        self, raw: Tensor, outputs: Mapping[str, Tensor], size: tuple[int, int], options: Mapping[str, Any]
    ) -> tuple[int, int, float, str]:
        """Of what a file decodes from its own ``raw`` output: how many things differ from ``decode``, of how
        many, the share that may, and what is counted."""
        raise self._refuse("be decoded inside an exported file")

    # --- teachers

    def output_reader(self, options: Mapping[str, Any]) -> Any:
        """``Output`` with these options of the config; what they leave open is taken from this, the
        student's, task."""
        return self.Output(**options)

    def mapped(self, pred: Any, mapping: Any) -> tuple[Any, Tensor | None]:
        """A teacher's prediction in the student's classes, and where it is ignored (None: nowhere).

        mapping: a ``ClassMapping`` that changes something.
        """
        raise self._refuse("map classes: it has none")

    def to_student(
        self, pred: Any, ignore_mask: Tensor | None, geometry: Any, teacher: Task, form: str
    ) -> TeacherPrediction:
        """A teacher's prediction -> the student's pixels, and cells or ``form``. A map loses the teacher's
        padding; anything else is handed on, which suits a prediction without a place in the image.

        geometry: the teacher's ``TeacherGeometry``; teacher: the teacher's own task, with its strides.
        """
        if not self.is_map:
            return TeacherPrediction(pred, ignore_mask)
        cropped = None if ignore_mask is None else geometry.cropped(ignore_mask[:, None])[:, 0]
        return TeacherPrediction(geometry.cropped(pred), cropped)

    def why_not(self, pred: Any, form: str, key_path: str) -> str | None:
        """Why a teacher's prediction cannot be compared in ``form``, and what to do; None: it can. key_path:
        of the teacher."""
        return None

    def average(
        self,
        preds: Sequence[Any],
        ignore_masks: Sequence[Tensor | None],
        known: Sequence[Sequence[int]],
        form: str,
    ) -> tuple[Any, Tensor | None]:
        """The predictions of several teachers together, each class over those that know it; and where all
        are ignored."""
        raise self._refuse("average several teachers; let one of them teach it (teachers.<name>.tasks)")

    def comparable(
        self,
        student: Any,
        teacher: Any,
        *,
        ignore_mask: Tensor | None,
        target: Mapping[str, Tensor] | None,
        size: tuple[int, int],
        known: Sequence[int] | None,
        form: str,
    ) -> Comparable:
        """The two predictions as a soft loss compares them, and where.

        known: the student's classes that the teachers know, rising, None for all. size: the batch's (H, W).
        """
        return Comparable(student, teacher, None if ignore_mask is None else ~ignore_mask)

    @staticmethod
    def select(pred: Any, rows: Tensor) -> Any:
        """The predictions of the images ``rows`` (long) alone."""
        return pred[rows]


def kind_of(name: str, given: str | None, key_path: str) -> type[Task]:
    """The kind of the task ``name``. Raises UserError for one that is unknown, or not given where the name
    does not say it."""
    if given is None and name not in DEFAULT_KINDS:
        names = " and ".join(DEFAULT_KINDS)
        near = did_you_mean(name, DEFAULT_KINDS)
        raise UserError(
            f"{key_path}: needs kind; known: {', '.join(KINDS.names())} (only tasks called {names} need none)"
            + (f"; {near}" if near.startswith("did") else "")
        )
    return KINDS.get(given or DEFAULT_KINDS[name], f"{key_path}.kind")


def build_task(
    name: str, kind: str | None, classes: Sequence[str], strides: Sequence[int], hard: Mapping[str, Any] | None = None,
    key_path: str = "tasks",
) -> Task:  # fmt: skip
    """A task; ``hard``: the options of its hard loss. Raises UserError."""
    found = kind_of(name, kind, f"{key_path}.{name}")
    return KINDS.build(found.kind, hard or {}, f"{key_path}.{name}.hard", name, classes, strides)


def figure_names(tasks: Mapping[str, Task]) -> dict[tuple[str, str], str]:
    """(task, key of its headline) -> the figure's name in tables: the key alone where no other task has it."""
    keys = [key for task in tasks.values() for key in task.headline]
    return {
        (name, key): key if keys.count(key) == 1 or task.is_default else f"{name} {key}"
        for name, task in tasks.items()
        for key in task.headline
    }
