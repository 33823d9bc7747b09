"""Schedules: functions of the progress of training, in [0, 1], for weights, alphas and temperatures."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

Schedule = Callable[[float], float]


def constant(value: float) -> Schedule:
    return lambda progress: value


def linear(start: float, end: float, over: tuple[float, float] = (0.0, 1.0)) -> Schedule:
    """From ``start`` to ``end`` in a straight line while progress goes through ``over``; flat before and
    after."""
    return lambda progress: start + (end - start) * _within(progress, over)


def cosine(start: float, end: float, over: tuple[float, float] = (0.0, 1.0)) -> Schedule:
    """start + (end - start) * (1 - cos(pi * p)) / 2, p the progress through ``over``; flat before and after."""
    return lambda progress: start + (end - start) * (1 - math.cos(math.pi * _within(progress, over))) / 2


def staged(values: Sequence[float], at: Sequence[float] | None = None) -> Schedule:
    """One value after the other: values[i + 1] from progress at[i] on; without ``at`` in equal parts."""
    bounds = list(at) if at is not None else [i / len(values) for i in range(1, len(values))]
    return lambda progress: values[bisect_right(bounds, progress)]


def warmup(value: float, until: float) -> Schedule:
    """From 0 to ``value`` in a straight line until progress ``until``, then ``value``."""
    return linear(0.0, value, (0.0, until))


def _within(progress: float, over: tuple[float, float]) -> float:
    """How far ``progress`` is through ``over``, in [0, 1]."""
    begin, end = over
    return min(1.0, max(0.0, (progress - begin) / (end - begin)))


KINDS: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "staged": staged,
    "warmup": warmup,
}
