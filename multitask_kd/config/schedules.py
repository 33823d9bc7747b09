"""Sections of values that change while training. What they mean is in distill/schedules.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from .base import Fraction, Number, Section


class Constant(Section):
    """The same from beginning to end; a plain number means this."""

    schedule: Literal["constant"]
    value: Number
    """The value."""

    def extremes(self) -> tuple[float, ...]:
        return (self.value,)


class Ramp(Section):
    """From start to end: linear in a straight line, cosine as half a wave (slow, fast, slow); flat before and
    after `over`."""

    schedule: Literal["linear", "cosine"]
    start: Number
    """The value at the beginning."""
    end: Number
    """The value at the end."""
    over: tuple[Fraction, Fraction] = (0.0, 1.0)
    """The part of training, from 0 to 1, in which it changes."""

    def extremes(self) -> tuple[float, ...]:
        return (self.start, self.end)

    @model_validator(mode="after")
    def _over_rises(self) -> Ramp:
        if self.over[0] >= self.over[1]:
            raise ValueError(f"over: {list(self.over)} must rise")
        return self


class Staged(Section):
    """One value after the other, e.g. a temperature of 10, then 5, then 1."""

    schedule: Literal["staged"]
    values: Annotated[tuple[Number, ...], Field(min_length=1)]
    """The values."""
    at: tuple[Fraction, ...] | None = None
    """Where in training, from 0 to 1, each but the first begins; null makes equal parts."""

    def extremes(self) -> tuple[float, ...]:
        return self.values

    @model_validator(mode="after")
    def _at_fits(self) -> Staged:
        if self.at is not None and (
            len(self.at) != len(self.values) - 1 or list(self.at) != sorted(set(self.at))
        ):
            raise ValueError(f"at: {list(self.at)} must rise and have one place for each value but the first")
        return self


class Warmup(Section):
    """From 0 to a value in a straight line, then that value."""

    schedule: Literal["warmup"]
    value: Number
    """The value after warm-up."""
    until: Annotated[float, Field(gt=0, le=1)]
    """The part of training, from 0 to 1, in which it rises."""

    def extremes(self) -> tuple[float, ...]:
        return (0.0, self.value)


SCHEDULES: dict[str, type[Section]] = {
    "constant": Constant,
    "linear": Ramp,
    "cosine": Ramp,
    "staged": Staged,
    "warmup": Warmup,
}
AnySchedule = Annotated[Constant | Ramp | Staged | Warmup, Field(discriminator="schedule")]


def _number_or_schedule(value: Any) -> str:
    return "schedule" if isinstance(value, (dict, Section)) else "number"


def extremes(value: float | Section) -> tuple[float, ...]:
    """The values between which a number or a schedule stays."""
    return value.extremes() if isinstance(value, Section) else (value,)


def _least_0(value: Any) -> Any:
    if min(extremes(value)) < 0:
        raise ValueError(f"{min(extremes(value))} is below 0")
    return value


def _above_0(value: Any) -> Any:
    if max(extremes(_least_0(value))) == 0:
        raise ValueError("0 from beginning to end: leave the part out instead")
    return value


def _in_0_1(value: Any) -> Any:
    if max(extremes(_least_0(value))) > 1:
        raise ValueError(f"{max(extremes(value))} is above 1")
    return value


Scheduled = Annotated[
    Annotated[Number, Tag("number")] | Annotated[AnySchedule, Tag("schedule")],
    Discriminator(_number_or_schedule),
]
ScheduledWeight = Annotated[Scheduled, AfterValidator(_above_0)]
ScheduledRatio = Annotated[Scheduled, AfterValidator(_least_0)]
ScheduledFraction = Annotated[Scheduled, AfterValidator(_in_0_1)]
