"""A teacher's classes -> the student's. A cell is dx, dy, log w, log h, objectness, classes."""

import math

import pytest
import torch
from expect import says

from multitask_kd.batch import CROWD, PAD, DensePredictions, PaddedDetections
from multitask_kd.models.class_mapping import SURE, UNKNOWN, ClassMapping, logit
from multitask_kd.models.detections import (
    mapped_cells,
    mapped_detections,
    renumbered_detections,
    summed_scores,
)
from multitask_kd.models.maps import mapped_logits
from multitask_kd.tasks.classification import Classification
from multitask_kd.tasks.depth import Depth
from multitask_kd.tasks.detection import Detection
from multitask_kd.tasks.semantic import Semantic

THEIRS, OURS = ("car", "sky", "truck", "person"), ("person", "vehicle", "animal")
MERGED = {"car": "vehicle", "truck": "vehicle"}  # sky is none of the student's, the teacher knows no animal


def random(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(*rows):
    """One image of x1, y1, x2, y2, score, class."""
    rows = torch.tensor([rows], dtype=torch.float32)
    return PaddedDetections(rows[..., :4], rows[..., 4], rows[..., 5].long())


def odds(p):
    return math.log(p / (1 - p))


MERGED_MAPPING = ClassMapping(THEIRS, OURS, MERGED)


# --- names


def test_what_is_known_and_what_is_extra():
    mapping = ClassMapping(THEIRS, OURS, MERGED)
    assert mapping.known == (0, 1) and mapping.extra == [1] and not mapping.same
    assert mapping.unknown == ["animal"] and mapping.unused == ["sky"]
    assert mapping.sources == [[3], [0, 2], []]
    # null takes a class out, though the student has one of the same name
    assert ClassMapping(("a", "b"), ("a", "b"), {"b": None}).known == (0,)
    # a class that goes by another's name
    assert ClassMapping(("a", "b"), ("a", "b"), {"a": "b", "b": "a"}).sources == [[1], [0]]


@pytest.mark.parametrize(
    ("theirs", "ours", "names", "message"),
    [
        ("ab", "ab", {"c": "a"}, "the teacher has no class 'c'; it has a, b"),
        ("ab", "ab", {"a": "c"}, "the student has no class 'c'; it has a, b"),
        ("ab", "cd", None, r"none of the teacher's classes \(a, b\) is one of the student's \(c, d\)"),
        ("a", "a", {"a": None}, "none of the teacher's classes"),
    ],
)
def test_names_that_are_no_classes_are_refused(theirs, ours, names, message):
    with pytest.raises(ValueError, match=message):
        ClassMapping(tuple(theirs), tuple(ours), names)


# --- the same classes


def test_the_same_classes_in_the_same_order_change_nothing():
    assert ClassMapping("abc", "abc").same
    assert (
        not ClassMapping("abc", "ab").same
        and not ClassMapping("ab", "abc").same
        and not ClassMapping("abc", "acb").same
    )
    mapping, logits = ClassMapping("abc", "abc"), random(1, 3, 2, 2)
    assert (
        torch.equal(mapped_logits(logits, mapping)[0], logits) and mapped_logits(logits, mapping)[1] is None
    )
    raw, scores, given = random(1, 4, 8), random(1, 4, 3).sigmoid(), found((0, 0, 1, 1, 0.5, 2))
    assert torch.equal(mapped_cells(raw, mapping), raw) and torch.equal(
        summed_scores(scores, mapping), scores
    )
    assert all(torch.equal(a, b) for a, b in zip(mapped_detections(given, mapping), given, strict=True))


def test_another_order_is_a_permutation_exactly():
    mapping, order = ClassMapping("abc", "cab"), [2, 0, 1]
    logits, raw = random(2, 3, 4, 5), random(2, 6, 8, scale=20.0)  # far beyond the logits of SURE
    assert torch.equal(mapped_logits(logits, mapping)[0], logits[:, order])
    assert torch.equal(mapped_logits(logits[:, :, 0, 0], mapping)[0], logits[:, order, 0, 0])
    assert torch.equal(mapped_cells(raw, mapping), raw[..., [0, 1, 2, 3, 4, 7, 5, 6]])
    scores = random(2, 6, 3).sigmoid()
    assert torch.equal(summed_scores(scores, mapping), scores[..., order])
    given = found(
        (0, 0, 9, 9, 0.9, 0), (0, 0, 9, 9, 0.5, 2), (0, 0, 9, 9, 0.5, 1)
    )  # one location, three classes
    turned = mapped_detections(given, mapping)
    assert turned.classes.tolist() == [[1, 0, 2]] and torch.equal(turned.scores, given.scores)
    assert mapped_logits(logits, mapping)[1] is None


def test_every_kind_of_task_applies_it_to_its_own_predictions():
    mapping, size, strides = ClassMapping("abc", "cab"), (8, 8), (8,)
    logits, raw = random(2, 3, 4, 5), random(2, 6, 8)
    semantic, detection = Semantic("seg", "cab", strides), Detection("det", "cab", strides)
    assert torch.equal(semantic.mapped(logits, mapping)[0], mapped_logits(logits, mapping)[0])
    vectors, ignored = Classification("weather", "cab", strides).mapped(logits[:, :, 0, 0], mapping)
    assert torch.equal(vectors, logits[:, [2, 0, 1], 0, 0]) and ignored is None
    assert torch.equal(detection.mapped(raw, mapping)[0], mapped_cells(raw, mapping))
    dense = DensePredictions(random(2, 6, 4), random(2, 6, 3).sigmoid(), random(6, 2), torch.ones(6))
    turned, ignored = detection.mapped(dense, mapping)
    assert torch.equal(turned.scores, dense.scores[..., [2, 0, 1]]) and ignored is None
    assert turned.boxes is dense.boxes and turned.anchor_points is dense.anchor_points
    given = found((0, 0, 9, 9, 0.9, 0), (0, 0, 9, 9, 0.5, 2))
    turned, ignored = detection.mapped(given, mapping)
    assert turned.classes.tolist() == [[1, 0]] and ignored is None
    with says("tasks.distance: a task of kind 'depth' cannot map classes: it has none"):
        Depth("distance", (), strides).mapped(random(1, 1, *size), mapping)


# --- maps


def test_merged_classes_of_a_map_have_the_sum_of_their_probabilities():
    logits = random(2, 4, 3, 5)
    ours, _ = mapped_logits(logits, MERGED_MAPPING)
    p = logits.double().softmax(1)
    person, vehicle = p[:, 3], p[:, 0] + p[:, 2]
    expected = torch.stack([person, vehicle], 1) / (person + vehicle)[:, None]
    assert ours.shape == (2, 3, 3, 5) and torch.equal(ours[:, 2], torch.full((2, 3, 5), UNKNOWN))
    assert torch.allclose(ours.softmax(1)[:, :2].double(), expected, atol=1e-6)
    assert ours.softmax(1)[:, 2].eq(0).all()


def test_merged_classes_of_images_have_the_sum_of_their_probabilities():
    logits = random(5, 4)
    ours, ignored = mapped_logits(logits, MERGED_MAPPING)
    pixels, of_pixels = mapped_logits(logits[..., None, None], MERGED_MAPPING)
    assert (
        torch.equal(ours, pixels[..., 0, 0])
        and torch.equal(ignored, of_pixels[:, 0, 0])
        and ignored.shape == (5,)
    )


def test_a_map_is_ignored_where_its_likeliest_class_is_none_of_the_students():
    # probabilities of car, sky, truck, person at five pixels
    p = torch.tensor(
        [
            [0.1, 0.7, 0.1, 0.1],
            [0.1, 0.2, 0.1, 0.6],
            [0.3, 0.4, 0.25, 0.05],
            [0.2, 0.45, 0.2, 0.15],
            [0.4, 0.4, 0, 0.2],
        ]
    )
    _, ignored = mapped_logits(p.clamp(min=1e-9).log().T[None, :, None], MERGED_MAPPING)
    # car + truck = .55 and .4 against sky's .4 and .45; a tie counts
    assert ignored.tolist() == [[[True, False, False, True, False]]]
    assert (
        mapped_logits(random(1, 2, 2, 2), ClassMapping(("car", "person"), ("person", "car", "dog")))[1]
        is None
    )


# --- cells


def test_merged_classes_of_cells():
    # 1/4 + 1/2 = 3/4; 3/5 + 4/5 is held below 1
    raw = torch.tensor(
        [
            [
                [1.0, 2, 3, 4, 5, odds(0.25), -30, odds(0.5), 7],
                [1.0, 2, 3, 4, 5, odds(0.6), -30, odds(0.8), -20],
            ]
        ]
    )
    ours = mapped_cells(raw, MERGED_MAPPING)
    assert ours.shape == (1, 2, 8)
    assert torch.equal(ours[..., :6], raw[..., [0, 1, 2, 3, 4, 8]])
    assert ours[0, :, 6].tolist() == pytest.approx([odds(0.75), odds(1 - SURE)], rel=1e-3)
    assert ours[..., 7].eq(UNKNOWN).all()


def test_an_object_of_a_class_that_the_student_lacks_is_none():
    objectness = 0.8
    cells = [  # car, sky, truck, person -> the share that is left of the objectness
        ((0.1, 0.8, 0.1, 0.1), 0.2 / 0.8),  # the likeliest of the student's is vehicle with .2
        ((0.1, 0.5, 0.1, 0.4), 0.4 / 0.5),
        ((0.3, 0.5, 0.3, 0.1), 1.0),
        ((0.1, 0.2, 0.1, 0.9), 1.0),
    ]
    raw = torch.tensor([[[0, 0, 0, 0, odds(objectness), *map(odds, p)] for p, _ in cells]])
    ours = mapped_cells(raw, MERGED_MAPPING)
    assert ours[0, :, 4].sigmoid().tolist() == pytest.approx(
        [objectness * share for _, share in cells], rel=1e-4
    )
    none_at_all = torch.tensor(
        [[[0, 0, 0, 0, 9.0, -200, 200, -200, -200]], [[0, 0, 0, 0, 9.0, -200, -200, -200, -200]]]
    )
    ours = mapped_cells(none_at_all, MERGED_MAPPING)
    assert ours.isfinite().all() and ours[:, 0, 4].tolist() == pytest.approx([odds(SURE)] * 2, rel=1e-3)


def test_scores_of_dense_predictions():
    scores = torch.tensor([[[0.2, 0.9, 0.3, 0.1], [0.7, 0.0, 0.6, 0.0]]])
    expected = torch.tensor([[[0.1, 0.5, 0], [0, 1, 0]]])  # .7 + .6 is held at 1
    assert torch.allclose(summed_scores(scores, MERGED_MAPPING), expected)


# --- finished detections


def test_detections_of_unknown_classes_become_padding():
    given = found(
        (0, 0, 9, 9, 0.9, 1),
        (0, 0, 5, 5, 0.8, 3),
        (20, 0, 25, 5, 0.7, 0),
        (0, 0, 0, 0, 0.6, PAD),
        (0, 0, 3, 3, 0.5, CROWD),
    )
    ours = mapped_detections(given, MERGED_MAPPING)
    assert ours.classes.tolist() == [[PAD, 0, 1, PAD, PAD]]
    assert ours.scores[0].tolist() == pytest.approx([0, 0.8, 0.7, 0, 0]) and torch.equal(
        ours.boxes, given.boxes
    )


def test_of_one_object_in_several_merged_classes_the_best_is_left():
    given = found(
        (0, 0, 10, 10, 0.5, 0),  # the truck below is the same object: IoU .9
        (0, 0, 10, 9, 0.6, 2),
        (0, 0, 10, 10, 0.4, 3),  # a person is not
        (20, 0, 30, 10, 0.7, 0),
        (20, 0, 30, 5, 0.6, 2),  # IoU 1/2 is another object
        (50, 0, 60, 10, 0.3, 2),
        (50, 0, 60, 10, 0.3, 0),  # the first of two equals is left
        (70, 0, 80, 10, 0.3, 2),
        (70, 0, 80, 9, 0.2, 2),  # what the teacher itself found twice in one class stays: no merge made it
    )
    ours = mapped_detections(given, MERGED_MAPPING)
    assert ours.classes.tolist() == [[PAD, 1, 0, 1, 1, 1, PAD, 1, 1]]
    assert torch.equal(ours.scores > 0, ours.classes >= 0)
    two = PaddedDetections(*(torch.cat([torch.zeros_like(t), t]) for t in given))  # images do not mix
    assert torch.equal(mapped_detections(two, MERGED_MAPPING).classes[1], ours.classes[0])


def test_no_detections_at_all():
    empty = PaddedDetections(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.long))
    ours = mapped_detections(empty, MERGED_MAPPING)
    assert ours.boxes.shape == (2, 0, 4) and ours.classes.shape == ours.scores.shape == (2, 0)


def test_detections_are_numbered_by_the_known_classes():
    given = found((0, 0, 9, 9, 0.9, 2), (0, 0, 5, 5, 0.8, 1), (20, 0, 25, 5, 0.7, 0), (0, 0, 1, 1, 0.6, PAD))
    ours = renumbered_detections(given, (0, 2), 3)
    assert ours.classes.tolist() == [[1, PAD, 0, PAD]] and torch.equal(ours.boxes, given.boxes)
    assert ours.scores[0].tolist() == pytest.approx([0.9, 0, 0.7, 0])


# --- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(dtype):
    logits, raw = random(1, 4, 3, 3).to(dtype), random(1, 5, 9).to(dtype)
    ours, cells = mapped_logits(logits, MERGED_MAPPING)[0], mapped_cells(raw, MERGED_MAPPING)
    assert ours.dtype == cells.dtype == torch.float32
    assert torch.equal(ours, mapped_logits(logits.float(), MERGED_MAPPING)[0])
    assert torch.equal(cells, mapped_cells(raw.float(), MERGED_MAPPING))
    assert logit(torch.tensor([0.0, 0.5, 1.0], dtype=dtype)).tolist() == pytest.approx(
        [odds(SURE), 0, odds(1 - SURE)], rel=1e-3
    )
