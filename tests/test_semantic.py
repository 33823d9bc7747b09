import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expect import says

from multitask_kd import build
from multitask_kd.batch import IGNORE
from multitask_kd.data.labels import Geometry
from multitask_kd.data.loader import Truth
from multitask_kd.models.multitask import count_parameters
from multitask_kd.report.layers import MaskLayer
from multitask_kd.tasks.base import KINDS, build_task
from multitask_kd.tasks.semantic import SegHead, Semantic, class_counts, dice_loss

CLASSES = ("sky", "road", "tree")
LN3 = math.log(3)


def task(classes=CLASSES, strides=(4,), **options):
    return Semantic("seg", classes, strides, **options)


def target(mask, labelled=None):
    mask = torch.as_tensor(mask)
    return {"mask": mask, "labelled": torch.tensor([True] * len(mask) if labelled is None else labelled)}


def losses(pred, goal, size=None, **options):
    own = task(CLASSES[: pred.shape[1]], **options)
    found = own.losses(pred, goal, size or tuple(goal["mask"].shape[1:]))
    assert set(found) == set(own.weights)
    return found


def ce(pred, goal, size=None, **options):
    found = losses(pred, goal, size, **options)
    assert set(found) == {"ce"}
    return found["ce"]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy_by_hand():
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 0] = LN3  # probabilities 3/4, 1/4
    # -ln 3/4 where the truth is 0, -ln 1/4 where it is 1; the third pixel does not count
    expected = (-math.log(0.75) - math.log(0.25)) / 2
    assert ce(logits, target([[[0, 1, IGNORE]]])).item() == pytest.approx(expected, rel=1e-6)


def test_ignored_pixels_have_no_gradient():
    logits = noise(1, 3, 2, 2).requires_grad_()
    ce(logits, target([[[0, IGNORE], [2, 1]]])).backward()
    assert logits.grad[0, :, 0, 1].eq(0).all()
    assert logits.grad[0].abs().sum(0).gt(0).sum() == 3


def test_unlabelled_images_contribute_nothing():
    logits = noise(3, 3, 4, 4).requires_grad_()
    mask = torch.randint(0, 3, (3, 4, 4), generator=torch.Generator().manual_seed(1))
    loss = ce(logits, target(mask, [True, False, True]))
    loss.backward()
    assert logits.grad[1].eq(0).all()
    assert logits.grad[0].ne(0).all() and logits.grad[2].ne(0).all()
    # ... neither to the sum nor to what it is divided by
    assert loss.item() == pytest.approx(ce(logits[[0, 2]], target(mask[[0, 2]])).item(), rel=1e-6)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[[0, 2]], mask[[0, 2]]).item(), rel=1e-6)


def test_the_mean_is_over_pixels_of_the_batch_not_over_images():
    logits = torch.zeros(2, 2, 1, 4)
    logits[0, 0], logits[1, 0] = LN3, 0.0
    # image 0: one pixel of -ln 3/4; image 1: four of ln 2
    mask = [[[0, IGNORE, IGNORE, IGNORE]], [[0, 0, 0, 0]]]
    assert ce(logits, target(mask)).item() == pytest.approx((-math.log(0.75) + 4 * math.log(2)) / 5, rel=1e-6)


@pytest.mark.parametrize("resolution", ["head", "image"])
@pytest.mark.parametrize("mask", [torch.zeros(2, 8, 8, dtype=torch.long), torch.full((2, 8, 8), IGNORE)])
def test_nothing_labelled_is_zero_with_zero_gradient(resolution, mask):
    logits = noise(2, 3, 2, 2).requires_grad_()
    loss = ce(logits, target(mask, [False, False]), resolution=resolution)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.eq(0).all()
    ignored = ce(logits, target(torch.full((2, 8, 8), IGNORE)), resolution=resolution)
    assert ignored.item() == 0


def test_the_labels_of_the_batch_are_left_as_they_were():
    mask = torch.zeros(2, 2, 2, dtype=torch.long)
    ce(noise(2, 3, 2, 2), target(mask, [True, False]))
    assert mask.eq(0).all()


def test_class_counts_by_hand():
    mask = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, IGNORE]], [[2, 2, 2, 2], [2, 2, IGNORE, IGNORE]]])
    counts = class_counts(mask, 3, 1, 2)
    # two cells of 2x2: the left one holds three 0 and one 1, the right one three 1 and an ignored pixel; then
    # only 2s
    assert counts[0, :, 0].tolist() == [[3, 0], [1, 3], [0, 0]]
    assert counts[1, :, 0].tolist() == [[0, 0], [0, 0], [4, 2]]
    # 5 columns in 2 cells: pixels 0 to 2 and 3 to 4
    assert class_counts(torch.zeros(1, 1, 5, dtype=torch.long), 1, 1, 2).flatten().tolist() == [3, 2]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_resolution_head_holds_every_pixel_against_its_cell_and_image_against_the_upsampled_logits(smoothing):
    logits = noise(1, 3, 2, 2)
    mask = torch.randint(0, 3, (1, 8, 8), generator=torch.Generator().manual_seed(2))
    mask[0, :2, 3] = IGNORE
    options = {"ignore_index": IGNORE, "label_smoothing": smoothing}
    repeated = logits.double().repeat_interleave(4, 2).repeat_interleave(4, 3)
    own = ce(logits, target(mask), label_smoothing=smoothing)
    assert own.item() == pytest.approx(F.cross_entropy(repeated, mask, **options).item(), rel=1e-6)
    large = F.interpolate(logits.double(), size=(8, 8), mode="bilinear", align_corners=False)
    full = ce(logits, target(mask), resolution="image", label_smoothing=smoothing)
    assert full.item() == pytest.approx(F.cross_entropy(large, mask, **options).item(), rel=1e-6)
    assert own != full


def test_resolution_is_the_same_thing_for_logits_at_full_size():
    logits, mask = (
        noise(1, 3, 4, 4),
        torch.randint(0, 3, (1, 4, 4), generator=torch.Generator().manual_seed(2)),
    )
    assert torch.allclose(ce(logits, target(mask)), ce(logits, target(mask), resolution="image"))


def test_label_smoothing_by_hand():
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 0] = LN3
    # smoothing .2 over 2 classes: .9 of -ln 3/4 and .1 of -ln 1/4; the ignored pixel stays out
    expected = -0.9 * math.log(0.75) - 0.1 * math.log(0.25)
    assert ce(logits, target([[[0, IGNORE]]]), label_smoothing=0.2).item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits(dtype):
    logits = (noise(1, 3, 4, 4) * 1000).to(dtype).requires_grad_()
    mask = torch.randint(0, 3, (1, 8, 8), generator=torch.Generator().manual_seed(2))
    loss = ce(logits, target(mask), resolution="image") + ce(logits, target(mask))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": "full"},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"focal": -0.5},
        {"focal": float("nan")},
        {"dice": -1.0},
        {"dice": float("inf")},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        task(**options)


# --- head, decode, restore, score


def test_head_predicts_at_the_finest_level():
    head = SegHead(8, (8, 4, 16), 3, depth=2)
    assert head.strides == (4,)
    levels = {s: noise(2, 8, 32 // s, 64 // s) for s in (4, 8, 16)}
    assert head(levels).shape == (2, 3, 8, 16)


def sure(mask, classes=3):
    """Logits [B,C,H,W] that are certain of ``mask``."""
    return 20.0 * F.one_hot(torch.as_tensor(mask), classes).permute(0, 3, 1, 2).float()


def score(prediction, truth, geometry):
    own, labels = task(), {} if truth is None else {"seg": truth}
    metric = own.metric()
    own.score(metric, prediction, Truth(0, geometry, labels))
    return metric.compute()


def blocks(height, width, side):
    """A mask of ``side`` pixel squares of the three classes."""
    rows, columns = np.arange(height) // side, np.arange(width) // side
    return ((rows[:, None] + columns) % 3).astype(np.uint8)


def test_perfect_prediction_scores_the_floor_and_full_marks():
    mask = torch.from_numpy(blocks(16, 24, 4)).long()[None]
    logits = sure(mask)
    assert ce(logits, target(mask)).item() < 1e-6
    own = task(strides=(1,))
    geometry = Geometry((16, 24), (16, 24))
    prediction = own.restore(own.decode(logits, (16, 24))[0], geometry)
    assert prediction.dtype == torch.uint8 and prediction.shape == (16, 24)
    result = score(prediction, blocks(16, 24, 4), geometry)
    assert result["mIoU"] == 100 and result["pixel_accuracy"] == 100


def test_logits_of_the_heads_stride_come_back_at_the_original_size():
    # Original 64x96, letterboxed to 32x48 of an input of 32x64 (padded at the right), logits of stride 4.
    original, content, size = (64, 96), (32, 48), (32, 64)
    truth = blocks(*original, 32)
    small = np.full((8, 16), 1, np.uint8)
    small[:, :12] = truth[4::8, 4::8]
    decoded = task().decode(sure(torch.from_numpy(small).long()[None]), size)
    assert decoded.shape == (1, 3, 32, 64)
    prediction = task().restore(decoded[0], Geometry(original, content))
    assert prediction.shape == original
    wrong = prediction.numpy() != truth
    # Bilinear upsampling may move an edge between blocks by half a cell of 8 pixels, and nothing else.
    near_edge = np.zeros(original, bool)
    for row in (32,):
        near_edge[row - 4 : row + 4] = True
    for column in (32, 64):
        near_edge[:, column - 4 : column + 4] = True
    assert not wrong[~near_edge].any()
    assert wrong.mean() < 0.02


def test_restore_without_a_change_of_size_is_the_argmax():
    logits = noise(3, 8, 8)
    prediction = task().restore(logits, Geometry((6, 8), (6, 8)))  # two rows of padding
    assert torch.equal(prediction, logits[:, :6].argmax(0).to(torch.uint8))


def test_an_unlabelled_image_is_not_scored():
    assert score(torch.zeros(4, 4, dtype=torch.uint8), None, Geometry((4, 4), (4, 4)))["mIoU"] is None


def test_the_label_of_another_task_is_not_scored():
    own = task()
    metric = own.metric()
    own.score(
        metric,
        torch.zeros(4, 4, dtype=torch.uint8),
        Truth(0, Geometry((4, 4), (4, 4)), {"lane": np.ones((4, 4), np.uint8)}),
    )
    assert metric.compute()["mIoU"] is None


# --- weights of classes, focal loss, dice


@pytest.mark.parametrize("resolution", ["head", "image"])
def test_class_weights_against_torch(resolution):
    logits, mask = (
        noise(2, 3, 8, 8),
        torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(2)),
    )
    mask[0, :2, 3] = IGNORE
    given = {"tree": 5.0, "sky": 0.25}
    found = ce(logits, target(mask, [True, True]), resolution=resolution, class_weights=given)
    weight = torch.tensor([0.25, 1.0, 5.0], dtype=torch.float64)  # road, which is not named, has 1
    assert found.item() == pytest.approx(
        F.cross_entropy(logits.double(), mask, weight, ignore_index=IGNORE).item(), rel=1e-6
    )
    assert found.item() != pytest.approx(ce(logits, target(mask), resolution=resolution).item(), rel=1e-2)


def test_class_weights_by_hand():
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 0] = LN3  # probabilities 3/4, 1/4
    # twice -ln 3/4 with weight 1 and once -ln 1/4 with weight 3, over the sum of the weights
    expected = (-2 * math.log(0.75) - 3 * math.log(0.25)) / 5
    goal = target([[[0, 0, 1]]])
    assert ce(logits, goal, class_weights={"road": 3.0}).item() == pytest.approx(expected, rel=1e-6)
    # label smoothing keeps the pixel's weight: .9 and .1 for a pixel of class 0, .1 and .9 for one of class 1
    own, other = -0.9 * math.log(0.75) - 0.1 * math.log(0.25), -0.1 * math.log(0.75) - 0.9 * math.log(0.25)
    found = ce(logits, goal, class_weights={"road": 3.0}, label_smoothing=0.2)
    assert found.item() == pytest.approx((2 * own + 3 * other) / 5, rel=1e-6)
    # weights of 1 change nothing, and a class of weight 0 is not learnt
    assert ce(logits, goal, class_weights={}).item() == pytest.approx(ce(logits, goal).item(), rel=1e-6)
    assert ce(logits, goal, class_weights={"road": 0}).item() == pytest.approx(-math.log(0.75), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 2.0], r"class_weights: a mapping of class name -> weight is needed, not \[1.0, 2.0\]"),
        ({"sky": -1.0}, "class_weights.sky: -1.0 is no weight"),
        ({"sky": float("inf")}, "class_weights.sky: inf is no weight"),
        ({"sky": True}, "class_weights.sky: True is no weight"),
        ({"sky": "2"}, "class_weights.sky: '2' is no weight"),
    ],
)
def test_what_is_no_weight_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        task(class_weights=given)


def test_a_weight_of_a_class_that_the_task_does_not_have_is_refused():
    task(class_weights={"sky": 2.0, "tree": 1}).check_names()
    unknown = task(class_weights={"sky": 2.0, "sea": 1})
    with pytest.raises(
        ValueError, match="class_weights.sea: the task has no class 'sea'; it has sky, road, tree"
    ):
        unknown.check_names()


def test_a_network_with_a_weight_of_an_unknown_class_is_not_built():
    plan = {"encoder": "tu-test_resnet", "strides": [4, 8], "width": 8, "mean": [0.5] * 3, "std": [0.2] * 3}
    plan["tasks"] = {"lane": {"kind": "semantic", "classes": ["line", "kerb"], "head": {}}}
    net = build.network(plan)
    built = build.tasks(plan, net, {"lane": {"class_weights": {"line": 4.0}}})
    assert built["lane"].class_weights == [4.0, 1.0]
    with says("tasks.lane.hard: class_weights.lime: the task has no class 'lime'; it has line, kerb"):
        build.tasks(plan, net, {"lane": {"class_weights": {"lime": 4.0}}})
    assert count_parameters(net.heads) > 0


def test_focal_by_hand():
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 0] = LN3
    goal = target([[[0, 1]]])
    # (1 - 3/4)^2 of -ln 3/4, (1 - 1/4)^2 of -ln 1/4
    expected = (-math.log(0.75) / 16 - 9 / 16 * math.log(0.25)) / 2
    assert ce(logits, goal, focal=2.0).item() == pytest.approx(expected, rel=1e-5)
    assert ce(logits, goal, focal=2.0, resolution="image").item() == pytest.approx(expected, rel=1e-5)
    # with weights of classes: 1 and 3, over their sum
    expected = (-math.log(0.75) / 16 - 3 * 9 / 16 * math.log(0.25)) / 4
    assert ce(logits, goal, focal=2.0, class_weights={"road": 3.0}).item() == pytest.approx(
        expected, rel=1e-5
    )
    assert ce(logits, goal, focal=0.0).item() == ce(logits, goal).item()


@pytest.mark.parametrize("focal", [0.5, 1.0, 2.0])
def test_focal_of_a_certain_prediction_has_a_finite_gradient(focal):
    logits = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).repeat(1, 1, 1, 2).requires_grad_()
    loss = ce(logits, target([[[0, 1]]]), focal=focal)
    loss.backward()
    assert loss.item() == pytest.approx(200.0) and logits.grad.isfinite().all()  # (0 + 400) / 2
    assert logits.grad[0, :, 0, 1].tolist() == pytest.approx([0.5, -0.5])


def test_dice_by_hand():
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, 0] = math.log(2)  # probabilities 1/2, 1/4, 1/4
    found = losses(logits, target([[[0, 0, 1, IGNORE]]]), dice=0.5)
    # class 0: 2 * (1/2 + 1/2) / (3/2 + 2); class 1: 2 * 1/4 / (3/4 + 1); class 2 does not occur, and the
    # last pixel does not count
    expected = (1 - 2 / 3.5 + 1 - 0.5 / 1.75) / 2
    assert found["dice"].item() == pytest.approx(expected, rel=1e-6)
    assert found["ce"].item() == pytest.approx((2 * math.log(2) + math.log(4)) / 3, rel=1e-6)
    assert task(dice=0.5).weights == {"ce": 1.0, "dice": 0.5} and task().weights == {"ce": 1.0}
    assert losses(logits, target([[[0, 0, 1, IGNORE]]]), dice=0.5, resolution="image")[
        "dice"
    ].item() == pytest.approx(expected)


def test_dice_is_over_the_batch_and_not_a_mean_of_images():
    logits = torch.zeros(2, 2, 1, 2)
    logits[0, 0], logits[1, 1] = LN3, LN3
    # image 0: p 3/4 of class 0 at two pixels of class 0; image 1: 1/4 at one of class 0 and at one of class 1
    found = losses(logits, target([[[0, 0]], [[0, 1]]]), dice=1.0)["dice"]
    first = 1 - 2 * (0.75 + 0.75 + 0.25) / (2 * 0.75 + 2 * 0.25 + 3)
    second = 1 - 2 * 0.75 / (2 * 0.25 + 2 * 0.75 + 1)
    assert found.item() == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("resolution", ["head", "image"])
def test_dice_of_a_perfect_prediction_is_nothing_and_of_a_wrong_one_all(resolution):
    mask = torch.from_numpy(blocks(8, 8, 2)).long()[None]
    right = losses(sure(mask), target(mask), dice=1.0, resolution=resolution)["dice"]
    wrong = losses(sure((mask + 1) % 3), target(mask), dice=1.0, resolution=resolution)["dice"]
    assert right.item() == pytest.approx(0, abs=1e-6) and wrong.item() == pytest.approx(1, abs=1e-6)


def test_dice_counts_labelled_pixels_alone():
    logits = noise(2, 3, 4, 4).requires_grad_()
    mask = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    mask[0, 0, 0] = IGNORE
    found = losses(logits, target(mask, [True, False]), dice=1.0)["dice"]
    found.backward()
    assert logits.grad[1].eq(0).all() and logits.grad[0, :, 0, 0].eq(0).all()
    assert logits.grad[0].abs().sum(0).gt(0).sum() == 15
    assert found.item() == pytest.approx(
        losses(logits[:1], target(mask[:1]), dice=1.0)["dice"].item(), rel=1e-6
    )
    none = losses(logits, target(mask, [False, False]), dice=1.0)["dice"]
    assert none.item() == 0 and dice_loss(logits, torch.zeros(2, 3, 4, 4)).item() == 0


# --- labels


def test_masks_are_numbered_anew():
    table = Semantic.class_table(["road", None, "sky"], ["sky", "road"])
    label = np.array([[0, 1, 2, 3, IGNORE]], np.uint8)
    moved = Semantic.renumbered(label, table)
    assert moved.tolist() == [[1, IGNORE, 0, IGNORE, IGNORE]] and moved.dtype == np.uint8


def test_pixels_of_classes_that_the_set_does_not_label_are_ignored():
    label = np.array([[0, 1, 2, IGNORE]], np.uint8)
    assert Semantic.only_known(label, np.array([True, False, True])).tolist() == [[0, IGNORE, 2, IGNORE]]
    assert Semantic.only_known(label, np.zeros(3, bool)).tolist() == [[IGNORE] * 4]


def test_a_mask_is_letterboxed_by_nearest_neighbour_and_ignored_in_the_padding():
    label = np.array([[0, 1], [2, IGNORE]], np.uint8)
    moved = Semantic.to_spatial(label, Geometry((2, 2), (4, 4)), (4, 6))
    assert moved.points.shape == (0, 2) and len(moved.maps) == 1
    rows = [[0, 0, 1, 1, IGNORE, IGNORE]] * 2 + [[2, 2, IGNORE, IGNORE, IGNORE, IGNORE]] * 2
    assert moved.maps[0].tolist() == rows
    assert Semantic.from_spatial(moved, (4, 6), 0.1).tolist() == rows


def test_masks_are_packed_with_what_is_not_labelled():
    packed = Semantic.packed([np.array([[0, 1]], np.uint8), None], (1, 2))
    assert packed["mask"].tolist() == [[[0, 1]], [[IGNORE, IGNORE]]] and packed["mask"].dtype == torch.uint8
    assert packed["labelled"].tolist() == [True, False]


# --- names, drawings and files


def test_its_kind_and_its_names():
    own, lane = (
        build_task("seg", None, CLASSES, (4,)),
        build_task("lane", "semantic", CLASSES, (4,), {"dice": 2.0}),
    )
    assert KINDS.get(Semantic.kind, "x") is Semantic is type(own) and lane.weights == {"ce": 1.0, "dice": 2.0}
    assert (
        own.called("IoU") == "IoU"
        and lane.called("IoU") == "lane IoU"
        and lane.called("mask", "_") == "lane_mask"
    )
    assert own.output_names() == {"mask": "mask"} and lane.output_names() == {"mask": "lane_mask"}


def test_the_main_score_of_some_classes_is_the_mean_of_their_iou():
    figures = {"mIoU": 50.0, "IoU": {"sky": 30.0, "road": 80.0, "tree": None}}
    assert task().main_score(figures) == task().main_score(figures, [0, 1, 2]) == 50.0
    assert task().main_score(figures, [0, 1]) == 55.0 and task().main_score(figures, [1, 2]) == 80.0
    assert task().main_score(figures, [2]) is None


def test_what_is_drawn_and_saved():
    prediction = torch.tensor([[0, 2]], dtype=torch.uint8)
    drawn = task().prediction_layer(prediction, 0.5)
    assert isinstance(drawn, MaskLayer) and drawn.mask.tolist() == [[0, 2]] and drawn.names == CLASSES
    label = np.array([[1, IGNORE]], np.uint8)
    assert task().label_layer(label).mask.tolist() == [[1, IGNORE]]
    saved = task().saved(prediction)
    assert saved.image.tolist() == [[0, 2]] and saved.boxes is None and saved.value is None


def test_a_decoded_mask_is_a_prediction_of_that_mask():
    mask = torch.tensor([[[0, 1], [2, 2]]], dtype=torch.uint8)
    pred = task().from_decoded({"mask": mask})
    assert pred.shape == (1, 3, 2, 2) and torch.equal(pred.argmax(1), mask.long())
    assert task().decoded_gap(pred, {"mask": mask}, (2, 2), {})[:2] == (0, 4)
    other = mask.clone()
    other[0, 0, 1] = 0
    assert task().decoded_gap(pred, {"mask": other}, (2, 2), {})[:2] == (1, 4)
    assert task().decoded_gap(pred, {"mask": mask[:, :1]}, (2, 2), {})[:2] == (4, 4)


def test_more_classes_than_a_mask_can_tell_apart_are_refused():
    build_task("lane", "semantic", [str(k) for k in range(255)], (4,))
    with says("data.classes.lane: 256 classes are more than the 255", "merge some with rename"):
        build_task("lane", "semantic", [str(k) for k in range(256)], (4,))


def test_weights_of_which_none_counts_are_refused():
    with pytest.raises(ValueError, match="class_weights: every weight is 0, so nothing would be learnt"):
        build_task("lane", "semantic", ("a", "b"), (4,), {"class_weights": {"a": 0, "b": 0}})
    build_task("lane", "semantic", ("a", "b"), (4,), {"class_weights": {"a": 0}})
