"""A teacher's classes -> the student's. A cell is dx, dy, log w, log h, objectness, classes."""

import math

import pytest
import torch

from multitask_kd.batch import CROWD, PAD, DensePredictions, PaddedDetections
from multitask_kd.distill.class_mapping import SURE, UNKNOWN, ClassMapping, logit

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


# --- names


def test_what_is_known_and_what_is_extra():
    lesson = ClassMapping(THEIRS, OURS, MERGED)
    assert lesson.known == (0, 1) and lesson.extra == [1] and not lesson.same
    assert lesson.unknown == ["animal"] and lesson.unused == ["sky"]
    assert lesson.sources == [[3], [0, 2], []]
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
    lesson = ClassMapping("abc", "abc")
    for said in (random(1, 3, 2, 2), random(1, 4, 8), DensePredictions(random(1, 4, 4), random(1, 4, 3)), found((0, 0, 1, 1, 0.5, 2))):
        assert lesson(said) == (said, None)
    assert not ClassMapping("abc", "ab").same and not ClassMapping("ab", "abc").same and not ClassMapping("abc", "acb").same


def test_another_order_is_a_permutation_exactly():
    lesson, order = ClassMapping("abc", "cab"), [2, 0, 1]
    logits, raw = random(2, 3, 4, 5), random(2, 6, 8, scale=20.0)  # far beyond the logits of SURE
    assert torch.equal(lesson(logits)[0], logits[:, order])
    assert torch.equal(lesson(raw)[0], raw[..., [0, 1, 2, 3, 4, 7, 5, 6]])
    dense = DensePredictions(random(2, 6, 4), random(2, 6, 3).sigmoid(), random(6, 2), torch.ones(6))
    turned = lesson(dense)[0]
    assert torch.equal(turned.scores, dense.scores[..., order]) and turned.boxes is dense.boxes and turned.places is dense.places
    said = found((0, 0, 9, 9, 0.9, 0), (0, 0, 9, 9, 0.5, 2), (0, 0, 9, 9, 0.5, 1))  # one place, three classes
    assert lesson(said)[0].classes.tolist() == [[1, 0, 2]] and torch.equal(lesson(said)[0].scores, said.scores)
    assert all(lesson(x)[1] is None for x in (logits, raw, dense, said))


# --- maps


def test_merged_classes_of_a_map_have_the_sum_of_their_probabilities():
    logits = random(2, 4, 3, 5)
    ours, _ = ClassMapping(THEIRS, OURS, MERGED)(logits)
    p = logits.double().softmax(1)
    person, vehicle = p[:, 3], p[:, 0] + p[:, 2]
    expected = torch.stack([person, vehicle], 1) / (person + vehicle)[:, None]
    assert ours.shape == (2, 3, 3, 5) and torch.equal(ours[:, 2], torch.full((2, 3, 5), UNKNOWN))
    assert torch.allclose(ours.softmax(1)[:, :2].double(), expected, atol=1e-6)
    assert ours.softmax(1)[:, 2].eq(0).all()


def test_a_map_is_silent_where_its_likeliest_class_is_none_of_the_students():
    # probabilities of car, sky, truck, person at five pixels
    p = torch.tensor(
        [[0.1, 0.7, 0.1, 0.1], [0.1, 0.2, 0.1, 0.6], [0.3, 0.4, 0.25, 0.05], [0.2, 0.45, 0.2, 0.15], [0.4, 0.4, 0, 0.2]]
    )
    _, silent = ClassMapping(THEIRS, OURS, MERGED)(p.clamp(min=1e-9).log().T[None, :, None])
    # car + truck = .55 and .4 against sky's .4 and .45; at a tie it speaks
    assert silent.tolist() == [[[True, False, False, True, False]]]
    assert ClassMapping(("car", "person"), ("person", "car", "dog"))(random(1, 2, 2, 2))[1] is None


# --- cells


def test_merged_classes_of_cells():
    # 1/4 + 1/2 = 3/4; 3/5 + 4/5 is held below 1
    raw = torch.tensor([[[1.0, 2, 3, 4, 5, odds(0.25), -30, odds(0.5), 7], [1.0, 2, 3, 4, 5, odds(0.6), -30, odds(0.8), -20]]])
    ours, silent = ClassMapping(THEIRS, OURS, MERGED)(raw)
    assert silent is None and ours.shape == (1, 2, 8)
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
    ours, _ = ClassMapping(THEIRS, OURS, MERGED)(raw)
    assert ours[0, :, 4].sigmoid().tolist() == pytest.approx([objectness * share for _, share in cells], rel=1e-4)
    none_at_all = torch.tensor([[[0, 0, 0, 0, 9.0, -200, 200, -200, -200]], [[0, 0, 0, 0, 9.0, -200, -200, -200, -200]]])
    ours, _ = ClassMapping(THEIRS, OURS, MERGED)(none_at_all)
    assert ours.isfinite().all() and ours[:, 0, 4].tolist() == pytest.approx([odds(SURE)] * 2, rel=1e-3)


def test_scores_of_dense_predictions():
    scores = torch.tensor([[[0.2, 0.9, 0.3, 0.1], [0.7, 0.0, 0.6, 0.0]]])
    ours, silent = ClassMapping(THEIRS, OURS, MERGED)(DensePredictions(random(1, 2, 4), scores))
    expected = torch.tensor([[[0.1, 0.5, 0], [0, 1, 0]]])  # .7 + .6 is held at 1
    assert silent is None and torch.allclose(ours.scores, expected)


# --- finished detections


def test_detections_of_unknown_classes_become_padding():
    said = found(
        (0, 0, 9, 9, 0.9, 1), (0, 0, 5, 5, 0.8, 3), (20, 0, 25, 5, 0.7, 0), (0, 0, 0, 0, 0.6, PAD), (0, 0, 3, 3, 0.5, CROWD)
    )
    ours, silent = ClassMapping(THEIRS, OURS, MERGED)(said)
    assert silent is None and ours.classes.tolist() == [[PAD, 0, 1, PAD, PAD]]
    assert ours.scores[0].tolist() == pytest.approx([0, 0.8, 0.7, 0, 0]) and torch.equal(ours.boxes, said.boxes)


def test_of_one_object_in_several_merged_classes_the_best_is_left():
    said = found(
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
    ours, _ = ClassMapping(THEIRS, OURS, MERGED)(said)
    assert ours.classes.tolist() == [[PAD, 1, 0, 1, 1, 1, PAD, 1, 1]]
    assert torch.equal(ours.scores > 0, ours.classes >= 0)
    two = PaddedDetections(*(torch.cat([torch.zeros_like(t), t]) for t in said))  # images do not mix
    assert torch.equal(ClassMapping(THEIRS, OURS, MERGED)(two)[0].classes[1], ours.classes[0])


def test_no_detections_at_all():
    empty = PaddedDetections(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.long))
    ours, _ = ClassMapping(THEIRS, OURS, MERGED)(empty)
    assert ours.boxes.shape == (2, 0, 4) and ours.classes.shape == ours.scores.shape == (2, 0)


# --- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(dtype):
    lesson = ClassMapping(THEIRS, OURS, MERGED)
    logits, raw = random(1, 4, 3, 3).to(dtype), random(1, 5, 9).to(dtype)
    for said in (logits, raw):
        assert torch.equal(lesson(said)[0], lesson(said.float())[0]) and lesson(said)[0].dtype == torch.float32
    assert logit(torch.tensor([0.0, 0.5, 1.0], dtype=dtype)).tolist() == pytest.approx([odds(SURE), 0, odds(1 - SURE)], rel=1e-3)
