"""The predictions of several teachers together. A cell is dx, dy, log w, log h, objectness, classes."""

import math

import pytest
import torch

from multitask_kd.batch import PAD, PaddedDetections
from multitask_kd.models.class_mapping import UNKNOWN
from multitask_kd.models.detections import mean_cells, mean_detections
from multitask_kd.models.maps import ignored_places, mean_logits
from multitask_kd.tasks.base import KINDS, build_task

ALL = (0, 1, 2)


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def odds(p):
    return math.log(p / (1 - p))


def pixel(*p):
    """Logits of one pixel from its probabilities; None: a class that is not known."""
    return torch.tensor([UNKNOWN if x is None else math.log(x) + 1.7 for x in p]).view(1, -1, 1, 1)


def cell(*numbers):
    return torch.tensor([[numbers]], dtype=torch.float32)


def found(*images):
    """Rows of x1, y1, x2, y2, score, class by image."""
    most = max(map(len, images))
    rows = torch.tensor(
        [[*image, *[(0, 0, 0, 0, 0, PAD)] * (most - len(image))] for image in images], dtype=torch.float32
    )
    rows = rows.view(len(images), most, 6)
    return PaddedDetections(rows[..., :4], rows[..., 4], rows[..., 5].long())


NOTHING = PaddedDetections(torch.zeros(1, 0, 4), torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.long))
YES, NO = torch.tensor([[[True]]]), torch.tensor([[[False]]])


# --- maps


def test_the_mean_of_probabilities_by_hand():
    mean, ignored = mean_logits([pixel(0.7, 0.2, 0.1), pixel(0.1, 0.6, 0.3)], [None, None], [ALL, ALL])
    assert ignored is None and mean.flatten().exp().tolist() == pytest.approx([0.4, 0.4, 0.2], rel=1e-5)


def test_each_class_over_those_that_know_it():
    # class 1: (.6 + .2) / 2 = .4; class 0 of the first alone .4, class 2 of the second alone .8; of 1.6
    # together
    mean, _ = mean_logits([pixel(0.4, 0.6, None), pixel(None, 0.2, 0.8)], [None, None], [(0, 1), (1, 2)])
    assert mean.flatten().exp().tolist() == pytest.approx([0.4 / 1.6, 0.4 / 1.6, 0.8 / 1.6], rel=1e-5)
    # a class that nobody knows
    mean, _ = mean_logits([pixel(0.4, 0.6, None), pixel(0.2, 0.8, None)], [None, None], [(0, 1), (0, 1)])
    assert (
        mean.flatten()[:2].exp().tolist() == pytest.approx([0.3, 0.7], rel=1e-5)
        and mean.flatten()[2] == UNKNOWN
    )


def test_where_one_is_ignored_the_other_counts_alone():
    preds = [pixel(0.7, 0.2, 0.1), pixel(0.1, 0.6, 0.3)]
    for ignored, expected, everywhere in (
        ([YES, None], [0.1, 0.6, 0.3], False),
        ([NO, YES], [0.7, 0.2, 0.1], False),
        ([NO, NO], [0.4, 0.4, 0.2], False),
        ([YES, YES], None, True),
    ):
        mean, together = mean_logits(preds, ignored, [ALL, ALL])
        assert together.shape == (1, 1, 1) and together.item() is everywhere and mean.isfinite().all()
        if expected:
            assert mean.flatten().exp().tolist() == pytest.approx(expected, rel=1e-5)
    mean, _ = mean_logits([pixel(0.4, 0.6, None), pixel(None, 0.2, 0.8)], [None, YES], [(0, 1), (1, 2)])
    assert (
        mean.flatten()[:2].exp().tolist() == pytest.approx([0.4, 0.6], rel=1e-5)
        and mean.flatten()[2] == UNKNOWN
    )


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_teachers_have_the_map_of_one(many, dtype):
    pred = random(2, 3, 4, 5).to(dtype)
    ignored = random(2, 4, 5, seed=1) > 1
    mean, together = mean_logits([pred] * many, [ignored] * many, [ALL] * many)
    assert mean.dtype == torch.float32 and torch.equal(together, ignored)
    away = (mean.softmax(1) - pred.float().softmax(1)).abs().amax(1)
    assert away[~ignored].max() < 1e-3


def test_impossible_classes_have_finite_logits():
    sure = torch.tensor([500.0, 0, -500]).view(1, 3, 1, 1)
    assert mean_logits([sure, sure], [None, None], [ALL, ALL])[0].isfinite().all()


def test_maps_are_brought_to_the_finest_one():
    coarse, fine = random(2, 3, 2, 3), random(2, 3, 4, 6, seed=1)
    ignored = torch.zeros(2, 2, 3, dtype=torch.bool)
    ignored[:, 1, 2] = True
    for preds, masks in (([coarse, fine], [ignored, None]), ([fine, coarse], [None, ignored])):
        mean, together = mean_logits(preds, masks, [ALL, ALL])
        assert mean.shape == fine.shape and together.shape == (2, 4, 6) and not together.any()
        assert torch.allclose(
            mean[:, :, 2:, 4:].softmax(1), fine[:, :, 2:, 4:].softmax(1), atol=1e-5
        )  # the fine one alone
        grown = torch.nn.functional.interpolate(coarse, size=(4, 6), mode="bilinear").softmax(1)
        assert torch.allclose(mean[:, :, :2].softmax(1), (grown + fine.softmax(1))[:, :, :2] / 2, atol=1e-5)


# --- cells


def test_cells_by_hand():
    a = cell(1.0, 0, 2, 0, odds(0.8), odds(0.5), odds(0.1))
    b = cell(4.0, 3, 0, 0, odds(0.2), odds(0.3), odds(0.5))
    mean, ignored = mean_cells([a, b], [None, None], [(0, 1), (0, 1)])
    # confidence .8 * .5 = .4 and .2 * .5 = .1: boxes 4 to 1; objectness .5
    assert ignored is None and mean[0, 0, :4].tolist() == pytest.approx([8 / 5, 3 / 5, 8 / 5, 0], rel=1e-4)
    # scores (.8 * .5 + .2 * .3) / 2 = .23 and (.8 * .1 + .2 * .5) / 2 = .09, divided by .5
    assert mean[0, 0, 4:].sigmoid().tolist() == pytest.approx([0.5, 0.46, 0.18], rel=1e-4)


def test_a_teacher_that_lacks_the_class_does_not_take_its_objects_for_background():
    a = cell(1.0, 0, 2, 0, odds(0.9), UNKNOWN, odds(0.8))
    b = cell(4.0, 3, 0, 0, odds(0.01), odds(0.02), UNKNOWN)
    for preds, known in (([a, b], [(1,), (0,)]), ([b, a], [(0,), (1,)])):
        mean, _ = mean_cells(preds, [None, None], known)
        # cat .01 * .02 = .0002, dog .9 * .8, divided by .9
        assert mean[0, 0, 4:].sigmoid().tolist() == pytest.approx([0.9, 0.0002 / 0.9, 0.8], rel=1e-3)
        assert mean[0, 0, :4].tolist() == pytest.approx([1, 0, 2, 0], abs=2e-3)
    # class 0, which both know, is the likeliest: (.9 * .6 + .1 * .6) / 2 = .3 against .9 * .2 = .18
    a, b = cell(0, 0, 0, 0, odds(0.9), odds(0.6), odds(0.2)), cell(0, 0, 0, 0, odds(0.1), odds(0.6), UNKNOWN)
    mean, _ = mean_cells([a, b], [None, None], [(0, 1), (0,)])
    assert mean[0, 0, 4:].sigmoid().tolist() == pytest.approx([0.5, 0.6, 0.36], rel=1e-3)


def test_a_teachers_classes_on_background_do_not_count():
    """One that knows a single class takes every cell for it, if for anything."""
    cat, dog = (
        cell(0, 0, 0, 0, odds(0.9), odds(0.95), UNKNOWN),
        cell(0, 0, 0, 0, odds(0.01), UNKNOWN, odds(0.999)),
    )
    mean, _ = mean_cells([cat, dog], [None, None], [(0,), (1,)])
    assert mean[0, 0, 4:].sigmoid().tolist() == pytest.approx([0.9, 0.95, 0.01 * 0.999 / 0.9], rel=1e-3)


def test_an_ignored_cell_does_not_count():
    a = cell(1.0, 2, 3, 4, odds(0.001), odds(0.01), odds(0.002))
    b = cell(9e3, 9e3, 9, 9, odds(0.9), odds(0.9), odds(0.9))
    yes, no = torch.tensor([[True]]), torch.tensor([[False]])
    for ignored in ([None, yes], [no, yes]):
        mean, together = mean_cells([a, b], ignored, [(0, 1), (0, 1)])
        assert together.tolist() == [[False]]
        assert torch.allclose(mean, a, rtol=1e-3)
    mean, together = mean_cells([a, b], [yes, yes], [(0, 1), (0, 1)])
    assert together.tolist() == [[True]] and mean.isfinite().all()


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_teachers_have_the_cells_of_one(many, dtype):
    raw = random(2, 9, 8).to(dtype)
    mean, ignored = mean_cells([raw] * many, [None] * many, [ALL] * many)
    assert ignored is None and mean.dtype == torch.float32 and torch.allclose(mean, raw.float(), atol=1e-3)
    partial = raw.float()
    partial[..., 6] = UNKNOWN
    mean, _ = mean_cells([partial] * many, [None] * many, [(0, 2)] * many)
    assert torch.allclose(mean, partial, atol=1e-3)


def test_far_cells_of_the_background_keep_their_boxes():
    """Where no teacher finds anything the boxes still are a mean, not 0."""
    raw = cell(2.0, -3, 1, 1, -40, -40, -40)
    assert torch.allclose(
        mean_cells([raw, raw], [None, None], [(0, 1)] * 2)[0][..., :4], raw[..., :4], atol=1e-3
    )


# --- detections


def test_detections_of_one_object_by_hand():
    # IoU 10 x 8 / 10 x 10 = .8: boxes 3 to 1, the score the mean of the two
    a, b = found([(0, 0, 10, 10, 0.9, 1)]), found([(0, 0, 10, 8, 0.3, 1)])
    mean = mean_detections([a, b], [ALL, ALL])
    assert mean.boxes.tolist()[0][0] == pytest.approx([0, 0, 10, 9.5]) and mean.classes.tolist() == [[1]]
    assert mean.scores.tolist()[0] == pytest.approx([0.6])


@pytest.mark.parametrize(("height", "objects"), [(6, 1), (5, 2)])
def test_from_which_overlap_on_it_is_one_object(height, objects):
    a, b = (
        found([(0, 0, 10, 10, 0.9, 1)]),
        found([(0, 0, 10, height, 0.3, 1)]),
    )  # IoU .6 and .5; .55 is the border
    assert mean_detections([a, b], [ALL, ALL]).classes.shape == (1, objects)


def test_what_one_did_not_find_and_what_one_does_not_know():
    a = found([(0, 0, 10, 10, 0.8, 0), (20, 0, 30, 10, 0.6, 2)])
    mean = mean_detections([a, NOTHING], [ALL, (0, 1)])
    # class 0 was not found by the second: .8 / 2; class 2 it does not know: .6, now the best
    assert mean.classes.tolist() == [[2, 0]] and mean.scores[0].tolist() == pytest.approx([0.6, 0.4])
    assert torch.allclose(mean.boxes[0], torch.tensor([[20.0, 0, 30, 10], [0, 0, 10, 10]]))


def test_other_classes_and_other_locations_are_other_objects():
    a = found([(0, 0, 10, 10, 0.8, 0)])
    for other in ((0, 0, 10, 10, 0.8, 1), (0, 0, 10, 5, 0.8, 0), (20, 20, 30, 30, 0.8, 0)):
        mean = mean_detections([a, found([other])], [ALL, ALL])
        assert mean.scores[0].tolist() == pytest.approx([0.4, 0.4]), other


def test_a_detection_is_of_one_object():
    # two objects, IoU 7 / 13; the second teacher's box is nearer to the first (9 / 11) than to the other (8 /
    # 12)
    a, b = found([(0, 0, 10, 10, 0.9, 0), (3, 0, 13, 10, 0.8, 0)]), found([(1, 0, 11, 10, 0.6, 0)])
    mean = mean_detections([a, b], [ALL, ALL])
    assert mean.scores[0].tolist() == pytest.approx([0.75, 0.4])
    assert mean.boxes[0, :, 0].tolist() == pytest.approx([0.6 / 1.5, 3.0])


def test_a_teacher_counts_once_an_object():
    # both boxes of the first are the object; of its scores .8 and .4 the best counts: (.8 + .6) / 2
    a, b = found([(0, 0, 10, 10, 0.8, 0), (0, 0, 10, 8, 0.4, 0)]), found([(0, 0, 10, 9, 0.6, 0)])
    mean = mean_detections([a, b], [ALL, ALL])
    assert mean.scores[0].tolist() == pytest.approx([0.7])
    assert mean.boxes[0, 0, 3].item() == pytest.approx((0.8 * 10 + 0.4 * 8 + 0.6 * 9) / 1.8)


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_teachers_have_the_detections_of_one(many, dtype):
    pred = found(
        [(0, 0, 10, 10, 0.75, 1), (0, 0, 10, 4, 0.5, 1), (8, 8, 64, 32, 0.25, 0)], [(4, 4, 8, 8, 0.5, 2)], []
    )
    pred = PaddedDetections(pred.boxes.to(dtype), pred.scores.to(dtype), pred.classes)
    mean = mean_detections([pred] * many, [ALL] * many)
    assert mean.boxes.dtype == mean.scores.dtype == torch.float32 and torch.equal(mean.classes, pred.classes)
    assert torch.allclose(mean.boxes, pred.boxes.float(), atol=1e-3) and torch.allclose(
        mean.scores, pred.scores.float(), atol=1e-3
    )


def test_images_without_detections():
    mean = mean_detections([NOTHING, NOTHING], [ALL, ALL])
    assert mean.boxes.shape == (1, 0, 4) and mean.scores.shape == mean.classes.shape == (1, 0)
    only_pads = found([], [(0, 0, 4, 4, 0.5, 0)])
    mean = mean_detections([only_pads, only_pads], [ALL, ALL])
    assert mean.classes.tolist() == [[PAD], [0]] and mean.scores[0].tolist() == [0]
    marked = found([(0, 0, 4, 4, 0.9, PAD)])  # padding is nothing whatever its score
    assert mean_detections([marked, NOTHING], [ALL, ALL]).classes.numel() == 0


def test_detections_come_best_first():
    a = found([(0, 0, 4, 4, 0.9, 0), (10, 0, 14, 4, 0.8, 0), (20, 0, 24, 4, 0.7, 0)])
    b = found([(20, 0, 24, 4, 0.9, 0), (10, 0, 14, 4, 0.6, 0)])
    mean = mean_detections([a, b], [ALL, ALL])
    assert mean.scores[0].tolist() == pytest.approx([0.8, 0.7, 0.45])
    assert mean.boxes[0, :, 0].tolist() == pytest.approx([20, 10, 0])


# --- images


def test_the_mean_of_two_images_classes_by_hand():
    a, b = (
        torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]).log(),
        torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.45, 0.45]]).log(),
    )
    mean, ignored = mean_logits([a, b + 3.0], [None, None], [ALL, ALL])
    assert ignored is None and mean.shape == (2, 3)
    assert mean.exp().flatten().tolist() == pytest.approx([0.4, 0.4, 0.2, 0.3, 0.35, 0.35], rel=1e-5)
    # The second ignores the first image; the first does not know class 2. Of the second image .3, .35 and
    # .45, of 1.1 together
    ignore = torch.tensor([True, False])
    mean, together = mean_logits([a, b], [None, ignore], [(0, 1), ALL])
    assert together.tolist() == [False, False]
    assert mean.softmax(1)[0].tolist() == pytest.approx([0.7 / 0.9, 0.2 / 0.9, 0], abs=1e-5)
    assert mean[1].exp().tolist() == pytest.approx([0.3 / 1.1, 0.35 / 1.1, 0.45 / 1.1], rel=1e-5)


@pytest.mark.parametrize("many", [1, 3])
def test_identical_teachers_have_the_classes_of_one(many):
    pred = random(5, 4)
    mean, _ = mean_logits([pred] * many, [None] * many, [(0, 1, 2, 3)] * many)
    assert torch.allclose(mean.softmax(1), pred.softmax(1), atol=1e-5)


# --- the kinds of task


def test_ignored_places_are_brought_to_the_size_of_the_map():
    mask = torch.tensor([[[True, False]]])
    assert ignored_places(None, torch.zeros(1, 2, 4)).eq(False).all()
    assert ignored_places(mask, torch.zeros(1, 2, 4)).tolist() == [[[True, True, False, False]] * 2]
    assert ignored_places(mask[0], torch.zeros(1, 2)).tolist() == [[True, False]]


@pytest.mark.parametrize("kind", KINDS.names())
def test_two_identical_teachers_of_any_kind_average_to_one(kind):
    """Depth, of one channel, too: a softmax over it would be 1 whatever the teachers predict."""
    task = build_task("some", kind, ("a", "b", "c"), (8,))
    one = {
        "semantic": random(2, 3, 4, 5),
        "detection": random(2, 15, 8),
        "classification": random(2, 3),
        "depth": random(2, 1, 4, 5) + 5.0,
    }[kind]
    mean, ignored = task.average([one, one.clone()], [None, None], [ALL, ALL], "")
    assert ignored is None and mean.shape == one.shape and mean.std() > 0.1
    same = (mean.softmax(1), one.softmax(1)) if kind in ("semantic", "classification") else (mean, one)
    assert torch.allclose(*same, atol=1e-3)


def test_detections_are_averaged_where_a_loss_compares_detections():
    task = build_task("some", "detection", ("a", "b", "c"), (8,))
    a, b = found([(0, 0, 10, 10, 0.9, 1)]), found([(0, 0, 10, 8, 0.3, 1)])
    mean, ignored = task.average([a, b], [None, None], [ALL, ALL], "detections")
    assert ignored is None and mean.scores.tolist() == [[pytest.approx(0.6)]]
