"""The config's sections of the data: sets, their labels, augmentation."""

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

from .base import Count, Fraction, Natural, Positive, Section, without_null


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


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"'{twice[0]}' stands there twice; every class has a name of its own")
    return names


def _is_part(value: Any) -> Any:
    k, _, n = str(value).partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise ValueError(f"{value} is no part; write e.g. 1/2 and 2/2 for the two halves")
    return value


class DataSet(Section):
    """The keys of every set of `data.train` and `data.val`, besides `layout` and its options."""

    name: Annotated[str, AfterValidator(_set_name)] | None = None
    """The set's name in logs, curves and overrides (`data.train.<name>.weight=2`); null: its layout and its
    position in the list, from 0."""
    weight: Positive = 1.0
    """Its share of every batch is weight / sum of weights. Training only."""
    tasks: tuple[str, ...] | None = None
    """The tasks whose labels are used; null: all that it labels, []: none."""
    labelled: Count | Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """As `data.labelled`, for this set alone. Training only."""
    rename: dict[str, dict[str, Annotated[str, Field(min_length=1)] | None]] = Field(default_factory=dict)
    """By task: the set's class names -> those of the run; several may become one, null leaves a class out
    (its boxes are removed, its pixels ignored). A name that the set lacks is an error."""
    classes: dict[str, tuple[Annotated[str, Field(min_length=1)], ...]] = Field(default_factory=dict)
    """By task: the classes (by the run's names) that are labelled in this set, where these are not all.
    Objects of the other classes may be in its images without a label, so nothing is learnt about these
    classes from it, and metrics do not count them on it."""
    labels: dict[str, str] = Field(default_factory=dict)
    """The name of a label in the set's layout -> the task that uses it, e.g. {seg: drivable}; a label that is
    not listed keeps its name. A `labels` that is no mapping is an option of the layout."""
    part: Annotated[str, BeforeValidator(_is_part)] | None = None
    """Only a part of its images, e.g. 1/2 or 2/2: the first or second of two disjoint random halves, the same
    in every run."""
    layout: dict[str, Any]
    """The layout's name (`layout`) and its options."""


SET_KEYS = tuple(key for key in DataSet.model_fields if key != "layout")
TRAINING_ONLY = ("weight", "labelled")  # of SET_KEYS
SHARED_KEYS = ("labels",)  # of SET_KEYS: a mapping is the set's, anything else an option of its layout


def _data_set(raw: dict[str, Any]) -> DataSet:
    own = {key: value for key, value in raw.items() if _is_of_set(key, value)}
    return DataSet.model_validate(
        own | {"layout": {key: value for key, value in raw.items() if key not in own}}
    )


def _is_of_set(key: str, value: Any) -> bool:
    """Whether a key of a set is its own; else it is an option of its layout."""
    return key in SET_KEYS and (key not in SHARED_KEYS or isinstance(value, dict))


def _set_as_given(raw: dict[str, Any]) -> dict[str, Any]:
    _data_set(raw)  # pydantic puts its errors under this key
    return raw


def called(one: dict[str, Any], number: int | str = "") -> str:
    """The name of a set; number: its position among several."""
    layout = one.get("layout")
    return str(one.get("name") or f"{layout if isinstance(layout, str) else 'set'}{number}")


def _fault_at(key_path: tuple[str | int, ...], message: str) -> ValidationError:
    """An error about a value inside the one that is validated."""
    fault = InitErrorDetails(type=PydanticCustomError("value_error", message), loc=key_path, input=None)
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
            raise _fault_at(
                (number, used[0]) if several else (used[0],), "belongs to training; leave it out of data.val"
            )
    return sets


ONE_SET, SEVERAL_SETS = "one set", "several sets"  # pydantic's names of the alternatives
_Set = Annotated[dict[str, Any], AfterValidator(_set_as_given)]
OneOrSeveral = Annotated[
    Annotated[_Set, Tag(ONE_SET)]
    | Annotated[list[_Set], Field(min_length=1), AfterValidator(_named_apart), Tag(SEVERAL_SETS)],
    Discriminator(lambda value: SEVERAL_SETS if isinstance(value, (list, tuple)) else ONE_SET),
]


class Data(Section):
    """Which images are used, and how they are brought to the network."""

    train: OneOrSeveral = Field(default_factory=lambda: {"layout": "scenes", "split": "train", "count": 1600})
    """Training set: `layout` (a registered name) and its options; or a list of sets, each of which is in
    every batch."""
    val: Annotated[OneOrSeveral, AfterValidator(_of_validation)] = Field(
        default_factory=lambda: {"layout": "scenes", "split": "val", "count": 200}
    )
    """Validation set, or list of sets, likewise; each task is measured on the images that have labels for it.
    """
    classes: Annotated[
        dict[
            str,
            Annotated[
                tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), AfterValidator(_once)
            ],
        ],
        BeforeValidator(without_null),
    ] = Field(default_factory=dict)
    """By task: its class names, in order. Needed for a task that no set labels (only the teacher predicts
    it); else the sets' own names are the default."""
    input_size: tuple[Count, Count] = (96, 128)
    """Height and width of the network's input in pixels, multiples of its largest stride; images are
    letterboxed to it."""
    labelled: Count | Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """How many training images, of every set, keep their labels: a number of images, a fraction written with
    a point (1.0 is all), null is all."""
    labelled_seed: Natural = 0
    """Seed of the choice of images that keep their labels."""
    unlabelled: bool = True
    """Whether the images beyond `labelled`, and sets without labels, are used (distillation only) or left
    out."""
    labelled_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a set's slots in the batch drawn from its labelled images, where it has unlabelled ones too.
    """
    augment: Augment = Augment()
    workers: Natural = 2
    """Loader processes; 0 loads in the training process."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image that cannot be read stops the run (raise), or is counted and replaced by the next one
    (skip)."""

    def sets(self, split: Literal["train", "val"]) -> dict[str, DataSet]:
        """The sets of a split, by name."""
        raw = getattr(self, split)
        if isinstance(raw, list):
            return {called(one, number): _data_set(one) for number, one in enumerate(raw)}
        return {called(raw): _data_set(raw)}
