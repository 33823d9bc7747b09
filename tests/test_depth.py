"""Monocular depth."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expect import says

from multitask_kd.batch import GREY, IGNORE
from multitask_kd.data.base import Sample
from multitask_kd.data.labels import BoxLabels, Geometry
from multitask_kd.data.loader import Item, Packing, Truth, collate_train
from multitask_kd.data.transforms import TrainTransform, fit
from multitask_kd.losses.depth_l1 import DepthL1
from multitask_kd.models.class_mapping import ClassMapping
from multitask_kd.report.layers import InsetLayer
from multitask_kd.tasks.base import build_task
from multitask_kd.tasks.depth import FARTHEST, NEAREST, TYPICAL, Depth, DepthHead, DepthOutput
from multitask_kd.tasks.detection import Detection
from multitask_kd.tasks.semantic import Semantic

SIZE = (2, 3)
STILL = {"flip": 0.0, "scale": (1.0, 1.0), "translate": 0.0, "rotate": 0.0, "brightness": 0.0, "color": 0.0}


def task(**options):
    return Depth("distance", (), (4,), **options)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def target(depth, labelled=None):
    depth = torch.as_tensor(depth, dtype=torch.float32)
    return {"depth": depth, "labelled": torch.tensor([True] * len(depth) if labelled is None else labelled)}


def loss(pred, goal, **options):
    found = task(**options).losses(pred, goal, tuple(goal["depth"].shape[1:]))
    assert set(found) == set(task(**options).weights)
    return next(iter(found.values()))


def log(*rows):
    """Log metres [1,1,h,w] of a picture in metres."""
    return torch.tensor([[rows]], dtype=torch.float32).log()


# --- losses


def test_losses_by_hand():
    # log ratios ln 2, -ln 4 and 0; the last pixel is not known
    pred, goal = log([4.0, 1.0, 5.0, 3.0]), target([[[2.0, 4.0, 5.0, 0.0]]])
    ln2 = math.log(2)
    assert loss(pred, goal).item() == pytest.approx(3 * ln2 / 3, rel=1e-5)
    assert loss(pred, goal, loss="metres").item() == pytest.approx((2 + 3 + 0) / 3, rel=1e-5)
    # mean d^2 = (1 + 4) ln2^2 / 3, mean d = -ln 2 / 3
    for focus in (0.0, 0.5, 0.85, 1.0):
        expected = 5 * ln2**2 / 3 - focus * ln2**2 / 9
        assert loss(pred, goal, loss="silog", focus=focus).item() == pytest.approx(expected, rel=1e-5)


def test_silog_with_full_focus_does_not_care_for_the_scale():
    truth = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)) + 1
    pred = (truth * 7).log()[:, None].requires_grad_()
    value = loss(pred, target(truth), loss="silog", focus=1.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5) and pred.grad.abs().max() < 1e-5
    assert loss(pred, target(truth), loss="silog", focus=0.5).item() == pytest.approx(
        0.5 * math.log(7) ** 2, rel=1e-4
    )


def test_the_gradient_of_l1_is_the_same_at_every_known_pixel_and_none_elsewhere():
    pred = log([4.0, 1.0], [5.0, 3.0]).requires_grad_()
    loss(pred, target([[[2.0, 4.0], [0.0, 2.0]]])).backward()
    assert pred.grad.flatten().tolist() == pytest.approx([1 / 3, -1 / 3, 0, 1 / 3])


@pytest.mark.parametrize("name", ["l1", "silog", "metres"])
def test_unlabelled_images_and_unknown_pixels_contribute_nothing(name):
    pred, truth = random(3, 1, 4, 5).requires_grad_(), random(3, 4, 5, seed=1).exp()
    truth[0, 0, :2] = 0.0
    value = loss(pred, target(truth, [True, False, True]), loss=name)
    value.backward()
    assert pred.grad[1].eq(0).all() and pred.grad[0, 0, 0, :2].eq(0).all()
    assert pred.grad[[0, 2]].ne(0).sum() == 2 * 20 - 2
    # in float64, over what is known alone
    known = (truth > 0) & torch.tensor([True, False, True])[:, None, None]
    s, t = pred.detach()[:, 0][known].double(), truth[known].double()
    d = s - t.log()
    expected = {
        "l1": d.abs().mean(),
        "silog": d.square().mean() - 0.5 * d.mean() ** 2,
        "metres": (s.exp() - t).abs().mean(),
    }
    assert value.item() == pytest.approx(expected[name].item(), rel=1e-5)
    for goal in (target(truth, [False] * 3), target(torch.zeros_like(truth))):
        none = loss(pred, goal, loss=name)
        assert none.item() == 0 and torch.autograd.grad(none, pred)[0].eq(0).all()


def test_the_prediction_is_brought_to_the_labels_pixels():
    pred, truth = random(1, 1, 2, 3), random(1, 8, 12, seed=1).exp()
    large = F.interpolate(pred.double(), size=(8, 12), mode="bilinear", align_corners=False)[:, 0]
    assert loss(pred, target(truth)).item() == pytest.approx(
        (large - truth.log().double()).abs().mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("name", ["l1", "silog", "metres"])
def test_wild_low_precision_predictions_have_finite_losses(name):
    pred = torch.tensor([[[[60000.0, -60000.0]]]], dtype=torch.float16).requires_grad_()
    value = loss(pred, target([[[2.0, 1e-9]]]), loss=name)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and pred.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"loss": "l2"}, {"focus": 1.5}, {"focus": -0.1}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        task(**options)


# --- labels: 0 where the depth is not known


def test_a_label_is_letterboxed_by_nearest_neighbour_and_unknown_in_the_padding():
    label = np.array([[1.5, 0.0], [300.0, 255.0]], np.float32)  # 255 metres are a depth too
    geometry = fit((2, 2), (4, 6))
    moved = Depth.from_spatial(Depth.to_spatial(label, geometry, (4, 6)), (4, 6), 0.5)
    assert moved.dtype == np.float32
    assert moved.tolist() == [[1.5, 1.5, 0, 0, 0, 0]] * 2 + [[300, 300, 255, 255, 0, 0]] * 2


def test_a_label_flips_with_its_image():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, :4] = 200
    depth = np.tile(np.arange(8, dtype=np.float32), (4, 1))
    moved = TrainTransform((4, 8), {"distance": Depth}, **STILL | {"flip": 1.0}, min_visible=0.5)
    sample = moved(Sample(image, {"distance": depth, "other": depth}), seed=3)
    assert sample.labels["distance"].tolist() == [[7, 6, 5, 4, 3, 2, 1, 0]] * 4
    assert list(sample.labels) == ["distance"] and sample.image[0, :, 0].tolist() == [0] * 4 + [200] * 4


def test_what_comes_in_from_outside_is_unknown():
    image, depth = np.full((40, 60, 3), 200, np.uint8), np.full((40, 60), 7.0, np.float32)
    depth[:, 30:] = 500.0
    away = STILL | {"scale": (0.5, 0.5), "rotate": 20.0, "translate": 0.1}
    moved = TrainTransform((40, 60), {"distance": Depth}, **away, min_visible=0.5)
    for seed in range(4):
        sample = moved(Sample(image, {"distance": depth}), seed)
        found = sample.labels["distance"]
        assert set(np.unique(found).tolist()) == {0.0, 7.0, 500.0}  # never a mean of two, never 255
        assert 0.1 < (found > 0).mean() < 0.4  # a quarter of the area
        grey = (sample.image == GREY).all(-1)
        assert (found[grey] == 0).mean() > 0.99 and (found[(sample.image == 200).all(-1)] > 0).mean() > 0.98


def test_labels_of_several_tasks_move_together():
    depth = np.tile(np.arange(1, 9, dtype=np.float32), (4, 1))
    mask = np.tile(np.array([0, 0, 1, 1, 2, 2, IGNORE, IGNORE], np.uint8), (4, 1))
    boxes = BoxLabels(np.array([[0.0, 0, 4, 2]], np.float32), np.array([1]))
    kinds = {"lane": Semantic, "distance": Depth, "det": Detection}
    moved = TrainTransform((4, 8), kinds, **STILL | {"flip": 1.0}, min_visible=0.5)
    image = np.zeros((4, 8, 3), np.uint8)
    sample = moved(Sample(image, {"distance": depth, "det": boxes, "lane": mask}), seed=0)
    assert sample.labels["distance"][0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert sample.labels["lane"][0].tolist() == [IGNORE, IGNORE, 2, 2, 1, 1, 0, 0]
    assert sample.labels["det"].boxes.tolist() == [[4, 0, 8, 2]] and sample.labels[
        "det"
    ].classes.tolist() == [1]


def test_labels_are_packed_with_what_is_not_labelled():
    labels = [{"distance": np.full(SIZE, 2.5, np.float32)}, {}]
    items = [Item(Sample(np.zeros((*SIZE, 3), np.uint8), one), i, None) for i, one in enumerate(labels)]
    batch, _ = collate_train(items, {"distance": Packing(Depth, 0)})
    found = batch.targets["distance"]
    assert set(found) == {"depth", "labelled"} and found["labelled"].tolist() == [True, False]
    assert (
        found["depth"].tolist() == [[[2.5] * 3] * 2, [[0.0] * 3] * 2]
        and found["depth"].dtype == torch.float32
    )


# --- head


def test_the_head_predicts_log_metres_at_the_finest_level():
    head = DepthHead(8, (8, 4, 16), 0, depth=2)
    assert head.strides == (4,)
    assert head({s: random(2, 8, 32 // s, 64 // s) for s in (4, 8, 16)}).shape == (2, 1, 8, 16)
    with torch.no_grad():
        head.log_depth.weight.zero_()
    assert head({4: random(1, 8, 2, 2)}).exp().flatten().tolist() == pytest.approx([TYPICAL] * 4)
    with pytest.raises(ValueError, match="depth: -1 is below 0"):
        DepthHead(8, (4,), 0, depth=-1)


# --- evaluation


def scored(*pairs):
    own = task()
    metric = own.metric()
    for index, (metres, truth) in enumerate(pairs):
        size = np.shape(metres)
        prediction = own.restore(own.decode(log(*metres), size)[0], Geometry(size, size))
        label = {} if truth is None else {"distance": np.array(truth, np.float32)}
        own.score(metric, prediction, Truth(index, Geometry(size, size), label))
    return metric.compute()


def test_errors_by_hand():
    # off by .8 of 4, by 3 of 2, by nothing; one pixel and one image have no truth
    found = scored(([[4.8, 9.0], [5.0, 6.0]], [[4.0, 0.0], [2.0, 6.0]]), ([[1.0]], None))
    assert found["AbsRel"] == pytest.approx((0.2 + 1.5 + 0) / 3, rel=1e-5)
    assert found["RMSE"] == pytest.approx(math.sqrt((0.64 + 9 + 0) / 3), rel=1e-5)
    assert found["delta1"] == pytest.approx(200 / 3)  # factors of 1.2, 2.5 and 1
    assert json.dumps(found)
    assert scored(([[1.0]], [[0.0]])) == {"delta1": None, "AbsRel": None, "RMSE": None}


def test_within_a_factor_of_a_quarter_on_either_side():
    found = scored(([[4.99, 5.01, 4.0, 4.0]], [[4.0, 4.0, 4.99, 5.01]]))
    assert found["delta1"] == pytest.approx(50.0)


def test_every_pixel_counts_alike_whatever_image_it_is_of():
    found = scored(([[2.0, 2.0, 2.0]], [[1.0, 1.0, 1.0]]), ([[3.0]], [[3.0]]))
    assert found["AbsRel"] == pytest.approx(3 / 4, rel=1e-5) and found["delta1"] == pytest.approx(25.0)


def test_decoding_interpolates_logarithms_and_holds_them_in_bounds():
    decoded = task().decode(log([1.0, 100.0]), (1, 3))
    assert decoded.shape == (1, 1, 1, 3) and decoded.flatten().tolist() == pytest.approx(
        [1, 10, 100], rel=1e-4
    )
    wild = task().decode(torch.tensor([[[[-90.0, 90.0]]]]), (1, 2))
    assert wild.flatten().tolist() == pytest.approx([NEAREST, FARTHEST], rel=1e-4)


def test_a_perfect_prediction_scores_full_marks_at_the_original_size():
    # original 8x12, letterboxed to 4x6 of an input of 4x8
    geometry = Geometry((8, 12), (4, 6))
    pred = torch.full((1, 1, 4, 8), math.log(5.0))
    pred[..., 6:] = 8.0  # padding
    prediction = task().restore(task().decode(pred, (4, 8))[0], geometry)
    assert prediction.shape == (8, 12) and prediction.sub(5).abs().max() < 1e-4
    metric = task().metric()
    task().score(metric, prediction, Truth(0, geometry, {"distance": np.full((8, 12), 5.0, np.float32)}))
    figures = metric.compute()
    assert figures["delta1"] == 100 and figures["AbsRel"] == pytest.approx(0, abs=1e-5)
    assert task().main_score(figures) == task().main_score(figures, []) == 100


def test_what_is_drawn_and_saved():
    metres = torch.tensor([[1.0, 2.5], [0.001, 300.0]])
    saved = task().saved(metres)
    assert saved.image.tolist() == [[256, 640], [1, 65535]] and saved.image.dtype == np.uint16
    drawn = task().prediction_layer(metres, 0.5)
    assert isinstance(drawn, InsetLayer) and drawn.title == "distance" and drawn.picture.shape == (2, 2, 3)
    label = task().label_layer(np.array([[1.0, 0.0]], np.float32))
    same = task().prediction_layer(torch.tensor([[1.0, 1.0]]), 0.5).picture
    assert label.picture[0, 0].tolist() == same[0, 0].tolist() != label.picture[0, 1].tolist()


def test_what_a_file_decodes_is_a_prediction():
    pred = random(1, 1, 2, 3)
    (metres,) = task().decoder((4, 6), in_onnx=False, options={})(pred)
    assert metres.shape == (1, 4, 6) and torch.allclose(metres, task().decode(pred, (4, 6))[:, 0])
    back = task().from_decoded({"depth": metres})
    assert back.shape == (1, 1, 4, 6) and torch.allclose(back.exp()[:, 0], metres, rtol=1e-5)
    assert task().decoded_gap(pred, {"depth": metres}, (4, 6), {})[:2] == (0, 24)
    metres[0, 0, 0] *= 1.01
    assert task().decoded_gap(pred, {"depth": metres}, (4, 6), {})[:2] == (1, 24)
    assert task().decoded_gap(pred, {"depth": metres[:, :2]}, (4, 6), {})[0] == 24


def test_its_names():
    own = build_task("distance", "depth", (), (4,), {"loss": "silog", "focus": 0.85})
    assert (
        isinstance(own, Depth) and own.weights == {"silog": 1.0} and own.focus == 0.85 and own.classes == ()
    )
    assert own.output_names() == {"depth": "distance_depth"} and own.expected_shape(SIZE) == {1: 1}
    assert not own.has_classes and own.is_map and own.by_class == ()


# --- teachers


def test_two_teachers_have_the_mean_of_their_log_depths():
    a, b = log([2.0, 1.0]), log([8.0, 1.0])
    mean, ignored = task().average([a, b], [None, None], [(), ()], "")
    assert ignored is None and mean.exp().flatten().tolist() == pytest.approx([4.0, 1.0])  # sqrt(2 * 8)


@pytest.mark.parametrize("many", [1, 2, 3])
def test_identical_teachers_have_the_depth_of_one(many):
    pred = random(2, 1, 4, 5) + 3.0
    mean, ignored = task().average([pred] * many, [None] * many, [()] * many, "")
    assert ignored is None and torch.allclose(mean, pred, atol=1e-5) and mean.std() > 0.5


def test_where_one_is_ignored_the_other_counts_alone():
    a, b = log([2.0, 2.0, 2.0]), log([8.0, 8.0, 8.0])
    one, other = torch.tensor([[[True, False, True]]]), torch.tensor([[[False, False, True]]])
    mean, ignored = task().average([a, b], [one, other], [(), ()], "")
    assert mean[0, 0, 0, :2].exp().tolist() == pytest.approx([8.0, 4.0]) and mean.isfinite().all()
    assert ignored.tolist() == [[[False, False, True]]]
    mean, ignored = task().average([a, b], [one, None], [(), ()], "")
    assert mean.exp().flatten().tolist() == pytest.approx([8.0, 4.0, 8.0]) and not ignored.any()


def test_maps_of_other_sizes_are_brought_to_the_finest():
    coarse, fine = torch.full((1, 1, 2, 3), math.log(2.0)), random(1, 1, 4, 6)
    ignored = torch.zeros(1, 2, 3, dtype=torch.bool)
    ignored[0, 1, 2] = True
    for preds, masks in (([coarse, fine], [ignored, None]), ([fine, coarse], [None, ignored])):
        mean, together = task().average(preds, masks, [(), ()], "")
        assert mean.shape == fine.shape and not together.any()
        assert torch.allclose(mean[..., 2:, 4:], fine[..., 2:, 4:], atol=1e-6)  # the fine one alone
        assert torch.allclose(mean[..., :2, :], (fine[..., :2, :] + math.log(2.0)) / 2, atol=1e-6)


def test_the_teachers_map_is_brought_to_the_students():
    student, teacher = random(1, 1, 2, 2), random(1, 1, 4, 4, seed=1)
    shared = {"target": None, "size": (8, 8), "known": None, "form": ""}
    pair = task().comparable(student, teacher, ignore_mask=None, **shared)
    assert pair.student is student and pair.mask is None
    assert torch.allclose(pair.teacher, F.avg_pool2d(teacher, 2), atol=1e-6)
    ignored = torch.zeros(1, 4, 4, dtype=torch.bool)
    ignored[0, 3, 0] = True
    pair = task().comparable(student, teacher, ignore_mask=ignored, **shared)
    assert pair.mask.tolist() == [[[True, True], [False, True]]]
    own = student.clone().requires_grad_()
    pair = task().comparable(own, teacher, ignore_mask=ignored, **shared)
    value = DepthL1()(pair.student, pair.teacher, None, pair.mask)
    value.backward()
    d = (student - F.avg_pool2d(teacher, 2)).abs().flatten()
    assert value.item() == pytest.approx((d.sum() - d[2]).item() / 3, rel=1e-5)
    assert own.grad.flatten().ne(0).tolist() == [True, True, False, True]


def test_classes_are_refused_by_name():
    with says("tasks.distance: a task of kind 'depth' cannot map classes: it has none"):
        task().mapped(random(1, 1, 2, 2), ClassMapping("ab", "ba"))


# --- networks from elsewhere


@pytest.mark.parametrize(
    ("options", "values", "metres"),
    [
        ({}, [2.0, 8.0], [2, 8]),
        ({"form": "metres", "scale": 80.0}, [0.5, 1.0], [40, 80]),
        ({"form": "log"}, [0.0, math.log(5)], [1, 5]),
        ({"form": "inverse"}, [0.5, 0.1], [2, 10]),
        ({"form": "inverse", "scale": 0.01}, [50.0, 1.0], [2, 100]),
        ({}, [0.0, 1e9], [NEAREST, FARTHEST]),
        ({"form": "inverse"}, [0.0, 1e9], [FARTHEST, NEAREST]),
    ],
)
def test_forms_of_depth(options, values, metres):
    returned = torch.tensor([[values]])
    for shape in (returned, returned[:, None]):  # [B,h,w] and [B,1,h,w]
        read = DepthOutput(**options).read(shape, 0, SIZE)
        assert read.shape == (1, 1, 1, 2) and read.exp().flatten().tolist() == pytest.approx(metres, rel=1e-4)
    assert DepthOutput().read(returned.half(), 0, SIZE).dtype == torch.float32


def test_depth_is_found_in_what_a_network_returns():
    depth, other = torch.ones(1, 4, 5), torch.zeros(1, 3, 4, 5)
    for returned in (
        {"x": depth, "depth": 2 * depth},
        {"predicted_depth": 2 * depth, "x": depth},
        (other, 2 * depth),
    ):
        assert DepthOutput().read(returned, 0, SIZE).exp().mean().item() == pytest.approx(2)
    assert DepthOutput(at="out.0").read({"out": [2 * depth]}, 0, SIZE).exp().mean().item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("returned", "options", "message"),
    [
        (torch.ones(1, 3, 4, 5), {}, "no part of what the network returns can be a map of depth"),
        ((torch.ones(1, 4, 5), torch.ones(1, 4, 5)), {}, "several parts"),
        ({"a": torch.ones(1, 2, 4, 5)}, {"at": "a"}, r"\[1, 2, 4, 5\] is no map of depth"),
        ({"a": torch.ones(1, 4, 5)}, {"at": "b"}, "there is no 'b'"),
    ],
)
def test_what_is_no_depth_is_refused(returned, options, message):
    with pytest.raises(ValueError, match=message):
        DepthOutput(**options).read(returned, 0, SIZE)


@pytest.mark.parametrize("options", [{"form": "disparity"}, {"scale": 0.0}, {"scale": float("inf")}])
def test_bad_options_of_reading_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DepthOutput(**options)


def test_depths_that_are_no_metres_of_a_scene_are_found():
    assert DepthOutput().fault(log([2.0, 80.0])) is None
    near = DepthOutput().fault(log([0.001, 0.01]))
    assert near == ".form: the network's depths go from 0.001 to 0.01 metres; correct form or scale"
    far = DepthOutput(form="log").fault(torch.tensor([[[[0.0, 20.0]]]]))
    assert far.startswith(".form: the network's depths go from 1 to 4.85e+08 metres")
    # metres that are read as logarithms, and relative inverse depths that are read as metres
    assert (
        DepthOutput(form="log").fault(DepthOutput(form="log").read(torch.tensor([[[30.0]]]), 0, SIZE))
        is not None
    )
    assert DepthOutput().fault(DepthOutput().read(torch.tensor([[[0.0, 0.01]]]), 0, SIZE)) is not None


def test_a_depth_beyond_what_a_network_can_say_is_not_known():
    """A disparity of a fraction of a pixel is an error of stereo; one such pixel would be all of an RMSE."""
    label = np.full((4, 6), 3, np.float32)
    label[0, :3] = [121235, np.inf, FARTHEST]
    moved = Depth.from_spatial(Depth.to_spatial(label, Geometry((4, 6), (4, 6)), (4, 6)), (4, 6), 0.5)
    assert moved[0].tolist()[:4] == [0, 0, FARTHEST, 3]
    own = build_task("depth", "depth", (), (4,))
    metric = own.metric()
    own.score(
        metric,
        torch.full((4, 6), 3.0),
        Truth(0, Geometry((4, 6), (4, 6)), {"depth": np.where(label == FARTHEST, 3, label)}),
    )
    assert metric.compute() == {"delta1": 100.0, "AbsRel": 0.0, "RMSE": 0.0} and metric.pixels == 22


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_teacher_that_says_no_depth_somewhere_is_told(value):
    net = torch.full((1, 1, 10, 10), 4.0)
    net[..., :1] = value
    assert "correct form or scale, or let it say a depth everywhere" in DepthOutput().fault(
        DepthOutput().read(net, 0, SIZE)
    )
