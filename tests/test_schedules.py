"""Functions of the progress of training."""

import math

import pytest

from multitask_kd.distill.schedules import KINDS, constant, cosine, linear, staged, warmup


def values(schedule, *moments):
    return [schedule(p) for p in moments]


def test_constant():
    assert values(constant(3.0), 0.0, 0.5, 1.0) == [3.0, 3.0, 3.0]


def test_linear_at_both_ends_and_between():
    assert values(linear(2.0, 6.0), 0.0, 0.25, 0.5, 1.0) == [2.0, 3.0, 4.0, 6.0]
    assert values(linear(6.0, 2.0), 0.0, 0.25, 0.5, 1.0) == [6.0, 5.0, 4.0, 2.0]


def test_linear_is_flat_before_and_after_its_part():
    # from .2 to .6: at .3 a quarter of the way, at .4 half
    found = values(linear(10.0, 2.0, (0.2, 0.6)), 0.0, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    assert found == pytest.approx([10.0, 10.0, 8.0, 6.0, 2.0, 2.0, 2.0])


def test_cosine_at_both_ends_and_between():
    # (1 - cos(pi p)) / 2: 0, (1 - sqrt(1/2)) / 2 = .146447, 1/2, .853553, 1
    found = values(cosine(0.0, 1.0), 0.0, 0.25, 0.5, 0.75, 1.0)
    assert found == pytest.approx([0.0, 0.1464466, 0.5, 0.8535534, 1.0], abs=1e-6)
    assert values(cosine(5.0, 1.0, (0.5, 1.0)), 0.0, 0.5, 0.75, 1.0) == pytest.approx([5.0, 5.0, 3.0, 1.0])
    assert values(cosine(5.0, 1.0, (0.0, 0.5)), 0.25, 0.5, 1.0) == pytest.approx([3.0, 1.0, 1.0])


@pytest.mark.parametrize("end", [0.1, 0.0, 2.0])
def test_cosine_is_the_decay_of_a_feature_weight(end):
    """w(i) = 1 + (end - 1) * (1 - cos(pi i / n)) / 2."""
    decay, n = cosine(1.0, end), 40
    for i in range(n + 1):
        assert decay(i / n) == pytest.approx(1 + (end - 1) * (1 - math.cos(math.pi * i / n)) / 2)


def test_staged_in_equal_parts():
    found = values(staged([10.0, 5.0, 1.0]), 0.0, 0.33, 0.34, 0.66, 0.67, 1.0)
    assert found == [10.0, 10.0, 5.0, 5.0, 1.0, 1.0]
    assert values(staged([10.0, 5.0]), 0.0, 0.4999, 0.5, 1.0) == [
        10.0,
        10.0,
        5.0,
        5.0,
    ]  # a stage begins at its bound
    assert values(staged([7.0]), 0.0, 1.0) == [7.0, 7.0]


def test_staged_at_given_places():
    found = values(staged([10.0, 5.0, 1.0], [0.1, 0.9]), 0.0, 0.0999, 0.1, 0.8999, 0.9, 1.0)
    assert found == [10.0, 10.0, 5.0, 5.0, 1.0, 1.0]
    assert values(staged([10.0, 1.0], [1.0]), 0.999, 1.0) == [10.0, 1.0]


def test_warmup():
    assert values(warmup(4.0, 0.5), 0.0, 0.25, 0.5, 0.75, 1.0) == [0.0, 2.0, 4.0, 4.0, 4.0]
    assert values(warmup(4.0, 1.0), 0.0, 0.5, 1.0) == [0.0, 2.0, 4.0]


def test_all_are_known_by_name():
    assert {
        "constant": constant,
        "linear": linear,
        "cosine": cosine,
        "staged": staged,
        "warmup": warmup,
    } == KINDS
