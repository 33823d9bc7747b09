import math

import numpy as np
import pytest
import torch
from torch import nn

from multitask_kd.batch import CROWD, PAD, CellPredictions, DensePredictions, PaddedDetections
from multitask_kd.data.labels import BoxLabels, Geometry
from multitask_kd.data.loader import Truth
from multitask_kd.data.transforms import fit
from multitask_kd.models.assign import simota
from multitask_kd.models.dense_head import DenseHead, cells, centres_inside, decode_boxes
from multitask_kd.models.teacher_geometry import TeacherGeometry
from multitask_kd.report.layers import BoxLayer
from multitask_kd.tasks.base import KINDS, build_task
from multitask_kd.tasks.detection import Detection, Detections, without_counterpart

CPU = torch.device("cpu")
SIZE, STRIDES = (64, 96), (8, 16)
CLASSES = ("cat", "dog", "owl")
SURE = 12.0  # a logit of probability 1 - 6e-6


def task(**options):
    return Detection("det", CLASSES, STRIDES, **options)


def target(boxes, classes, labelled=None, known=None):
    """Lists by image, padded. known: the classes that the image's set labels, by image."""
    most = max((len(b) for b in boxes), default=0)
    padded = torch.zeros(len(boxes), most, 4)
    kinds = torch.full((len(boxes), most), PAD)
    for i, (b, c) in enumerate(zip(boxes, classes, strict=True)):
        if len(b):
            padded[i, : len(b)], kinds[i, : len(b)] = torch.tensor(b, dtype=torch.float32), torch.tensor(c)
    marks = torch.ones(len(boxes), dtype=torch.bool) if labelled is None else torch.tensor(labelled)
    found = {"boxes": padded, "classes": kinds, "labelled": marks}
    return (
        found
        if known is None
        else found | {"known": torch.tensor([[i in k for i in range(3)] for k in known])}
    )


def noise(images=2, seed=0, scale=1.0):
    count = len(cells(SIZE, STRIDES, CPU)[0])
    return scale * torch.randn(images, count, 5 + len(CLASSES), generator=torch.Generator().manual_seed(seed))


TRUTH_BOXES = [[[8.0, 6, 40, 44], [50, 20, 90, 60]], [[30.0, 10, 52, 30]]]
TRUTH_CLASSES = [[0, 2], [1]]


def perfect(boxes, classes):
    """Raw outputs whose matched cells decode to their boxes, surely, and whose other cells are surely
    background."""
    truth = target(boxes, classes)
    centres, scales = cells(SIZE, STRIDES, CPU)
    raw = torch.full((len(boxes), len(centres), 5 + len(CLASSES)), -SURE)
    raw[..., :4] = 0
    for i, (own, kinds) in enumerate(zip(boxes, classes, strict=True)):
        for box, kind in zip(torch.tensor(own).reshape(-1, 4), kinds, strict=True):
            inside = ((centres > box[:2]) & (centres < box[2:])).all(-1)
            raw[i, inside, 0:2] = ((box[:2] + box[2:]) / 2 - centres[inside]) / scales[inside, None]
            raw[i, inside, 2:4] = ((box[2:] - box[:2]) / scales[inside, None]).log()
            raw[i, inside, 4] = SURE
            raw[i, inside, 5 + kind] = SURE
    match = simota(
        truth["boxes"],
        truth["classes"],
        decode_boxes(raw, centres, scales),
        raw[..., 4],
        raw[..., 5:],
        centres,
        scales,
    )
    raw[..., 4] = torch.where(match.positive, SURE, -SURE)
    return raw, truth


# --- cells and their boxes


def test_cells_by_hand():
    centres, scales = cells((16, 24), (8, 16), CPU)
    assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert scales.tolist() == [8.0] * 6 + [16.0] * 2  # 24 / 16 rounds up to two columns


def test_decode_boxes_by_hand():
    centres, scales = torch.tensor([[12.0, 20.0], [24.0, 8.0]]), torch.tensor([8.0, 16.0])
    raw = torch.tensor([[[0.5, -1.0, math.log(2), math.log(3), 9.0, 9.0], [0, 0, 0, 0, 9, 9]]])
    # centre (12 + 8/2, 20 - 8) = (16, 12), size (2 * 8, 3 * 8); centre (24, 8), size 16 x 16
    assert torch.allclose(
        decode_boxes(raw, centres, scales), torch.tensor([[[8.0, 0, 24, 24], [16, 0, 32, 16]]])
    )


def test_decode_boxes_does_not_overflow():
    raw = torch.zeros(1, 2, 6)
    raw[..., 2:4] = torch.tensor([[500.0], [-500.0]])
    boxes = decode_boxes(raw, torch.zeros(2, 2), torch.tensor([8.0, 8.0]))
    assert torch.isfinite(boxes).all()
    assert boxes[0, 0, 2].item() == pytest.approx(4 * math.exp(6), rel=1e-6)
    assert boxes[0, 1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (96, 160)])
@pytest.mark.parametrize("strides", [(8, 16, 32), (32, 8), (16,)])
def test_the_heads_cells_come_in_the_order_of_cells(size, strides):
    # Every feature cell holds the place of its own centre, and the box branch passes it on.
    head = DenseHead(8, (8, 16, 32), 2, strides=strides)
    head.box_tower, head.class_tower = nn.Identity(), nn.Identity()
    with torch.no_grad():
        head.box.weight.zero_()
        head.box.weight[0, 0] = head.box.weight[1, 1] = 1.0
    levels = {}
    for stride in (8, 16, 32):
        feature = torch.zeros(2, 8, size[0] // stride, size[1] // stride)
        feature[:, 0] = (torch.arange(size[1] // stride) + 0.5) * stride
        feature[:, 1] = ((torch.arange(size[0] // stride) + 0.5) * stride)[:, None]
        levels[stride] = feature
    raw = head(levels)
    centres, scales = cells(size, head.strides, CPU)
    assert raw.shape == (2, len(centres), 4 + 1 + 2)
    assert torch.equal(raw[0, :, :2], centres) and torch.equal(raw[1, :, :2], centres)
    assert len(scales) == len(centres)


def test_head_starts_at_its_prior_and_learns_a_size_by_level():
    head = DenseHead(16, (8, 16), 2, prior=0.1)
    assert head.objectness.bias.sigmoid().item() == pytest.approx(0.1)
    assert head.classifier.bias.sigmoid().tolist() == pytest.approx([0.1, 0.1])
    with torch.no_grad():
        head.box.weight.zero_()
        head.size_bias[1] = 2.0
    raw = head({8: torch.zeros(1, 16, 2, 2), 16: torch.zeros(1, 16, 1, 1)})
    assert raw[0, :, 2:4].tolist() == [[0, 0]] * 4 + [[2, 2]]


def test_head_refuses_a_stride_that_the_pyramid_lacks():
    with pytest.raises(ValueError, match=r"no stride 64; it has \[8, 16\]"):
        DenseHead(8, (8, 16), 2, strides=(8, 64))


# --- losses


def test_perfect_prediction_scores_the_floor():
    raw, truth = perfect(TRUTH_BOXES, TRUTH_CLASSES)
    losses = task().losses(raw, truth, SIZE)
    assert losses["box"].item() == pytest.approx(0, abs=1e-4)
    # every cell costs ln(1 + e^-12) = 6.1e-6; 120 cells an image, more than 1 cell matched
    assert losses["objectness"].item() < 2 * 120 * 6.2e-6
    assert losses["class"].item() < 1e-3  # 3 classes of 6.1e-6, and the IoU target is 1 less rounding


def test_any_step_away_from_the_perfect_prediction_costs():
    raw, truth = perfect(TRUTH_BOXES, TRUTH_CLASSES)
    floor = sum(task().losses(raw, truth, SIZE).values())
    matched = raw[0, :, 4].argmax()
    for channel, change in ((0, 0.3), (1, -0.3), (2, 0.3), (3, -0.3), (4, -SURE), (5, -SURE)):
        worse = raw.clone()
        worse[0, matched, channel] += change
        assert sum(task().losses(worse, truth, SIZE).values()) > floor + 1e-2, channel
    background = raw[0, :, 4].argmin()
    worse = raw.clone()
    worse[0, background, 4] = SURE
    assert sum(task().losses(worse, truth, SIZE).values()) > floor + 1e-2


def test_losses_by_hand():
    # One cell of stride 32 in the middle of a 32x32 image; it predicts [0,0,32,32]; the truth is [0,0,32,16].
    det = Detection("det", ("a", "b"), (32,))
    raw = torch.zeros(1, 1, 7)
    raw[0, 0, 4:] = torch.tensor([1.0, 2.0, -3.0])
    losses = det.losses(raw, target([[[0.0, 0, 32, 16]]], [[0]]), (32, 32))
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    # IoU 1/2, and the hull is the larger box, so GIoU = 1/2 too
    assert losses["box"].item() == pytest.approx(0.5, abs=1e-5)
    assert losses["objectness"].item() == pytest.approx(softplus(-1.0), rel=1e-5)
    # class a has the target IoU = 1/2: softplus(2) - 2/2; class b the target 0: softplus(-3)
    assert losses["class"].item() == pytest.approx(softplus(2.0) - 1.0 + softplus(-3.0), rel=1e-5)


def test_weights_are_the_options():
    assert task().weights == {"box": 5.0, "objectness": 1.0, "class": 1.0}
    chosen = task(box=2.0, objectness=3.0, classification=4.0)
    assert chosen.weights == {"box": 2.0, "objectness": 3.0, "class": 4.0}
    assert set(chosen.losses(noise(), target(TRUTH_BOXES, TRUTH_CLASSES), SIZE)) == set(chosen.weights)


def test_losses_are_averaged_over_matched_cells_of_the_whole_batch():
    raw, truth = noise(1), target(TRUTH_BOXES[:1], TRUTH_CLASSES[:1])
    once = task().losses(raw, truth, SIZE)
    twice = task().losses(
        raw.repeat(2, 1, 1), {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in truth.items()}, SIZE
    )
    for name in once:
        assert twice[name].item() == pytest.approx(once[name].item(), rel=1e-5)


def test_rows_of_padding_change_nothing():
    raw, truth = noise(), target(TRUTH_BOXES, TRUTH_CLASSES)
    padded = target(TRUTH_BOXES, TRUTH_CLASSES)
    padded["boxes"] = torch.cat([truth["boxes"], torch.full((2, 3, 4), 30.0)], dim=1)
    padded["classes"] = torch.cat([truth["classes"], torch.full((2, 3), PAD)], dim=1)
    first, second = task().losses(raw, truth, SIZE), task().losses(raw, padded, SIZE)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_unlabelled_images_contribute_nothing():
    truth = target(TRUTH_BOXES, TRUTH_CLASSES, labelled=[True, False])
    raw = noise().requires_grad_()
    losses = task().losses(raw, truth, SIZE)
    sum(losses.values()).backward()
    assert raw.grad[1].eq(0).all()
    assert raw.grad[0, :, 4].ne(0).all()  # objectness is trained in every cell of the labelled one
    # neither the labels nor the outputs of the unlabelled image matter, nor that it is there
    truth["boxes"][1], truth["classes"][1] = 1.0, CROWD
    other = raw.detach().clone()
    other[1] = 5.0
    alone = {k: v[:1] for k, v in truth.items()}
    for again in (task().losses(other, truth, SIZE), task().losses(raw[:1], alone, SIZE)):
        for name in losses:
            assert again[name].item() == pytest.approx(losses[name].item(), rel=1e-6)


@pytest.mark.parametrize("most", [0, 2])
def test_nothing_labelled_is_zero_with_zero_gradient(most):
    truth = target([[[1.0, 1, 20, 20]] * most] * 2, [[0] * most] * 2, labelled=[False, False])
    raw = noise().requires_grad_()
    losses = task().losses(raw, truth, SIZE)
    sum(losses.values()).backward()
    assert all(v.item() == 0 for v in losses.values())
    assert raw.grad.eq(0).all()


@pytest.mark.parametrize("rows", [0, 1])  # no row at all, or a row of padding
def test_labelled_images_without_boxes_train_the_background(rows):
    truth = target([[], []], [[], []])
    if rows:
        truth["boxes"], truth["classes"] = torch.zeros(2, 1, 4), torch.full((2, 1), PAD)
    raw = noise().requires_grad_()
    losses = task().losses(raw, truth, SIZE)
    sum(losses.values()).backward()
    assert losses["box"].item() == 0 and losses["class"].item() == 0
    assert torch.isfinite(losses["objectness"]) and losses["objectness"] > 0
    assert raw.grad[..., 4].gt(0).all()  # towards background everywhere
    assert raw.grad[..., :4].eq(0).all() and raw.grad[..., 5:].eq(0).all()


def test_crowds_are_neither_object_nor_background():
    crowd = [40.0, 0, 96, 64]
    boxes, kinds = [[crowd, [10.0, 10, 38, 38], [60, 20, 84, 44]]], [[CROWD, 0, 1]]
    raw = noise(1).requires_grad_()
    losses = task().losses(raw, target(boxes, kinds), SIZE)
    sum(losses.values()).backward()
    centres, scales = cells(SIZE, STRIDES, CPU)
    inside = centres_inside(torch.tensor([[crowd]]), centres)[0, 0]
    trained = raw.grad[0, :, 4] != 0
    matched = raw.grad[0, :, 5:].ne(0).any(-1)  # cells of either object
    assert trained[~inside].all()  # background and object outside the crowd
    assert (inside & matched).any(), "the object inside the crowd has no cell"
    assert torch.equal(trained[inside], matched[inside])  # inside only the object's own cells
    # without the crowd the cells there are background
    plain = noise(1).requires_grad_()
    sum(task().losses(plain, target([boxes[0][1:]], [kinds[0][1:]]), SIZE).values()).backward()
    assert plain.grad[0, :, 4].ne(0).all()
    assert len(scales) == len(trained)


def test_the_edge_of_a_crowd_is_not_in_it():
    # Stride 8: the centres of the first column have x = 4, those of the second x = 12
    boxes, kinds = [[[4.0, 0, 12, 64]], [[3.9, 0, 12.1, 64]]], [[CROWD], [CROWD]]
    raw = noise().requires_grad_()
    sum(task().losses(raw, target(boxes, kinds), SIZE).values()).backward()
    centres, scales = cells(SIZE, STRIDES, CPU)
    of_columns = (centres[:, 0] <= 12) & (scales == 8)
    assert of_columns.sum() == 16
    assert raw.grad[0, of_columns, 4].ne(0).all() and raw.grad[1, of_columns, 4].eq(0).all()


def test_a_crowd_reaches_its_own_image_only():
    boxes, kinds = [[[0.0, 0, 96, 64]], [[10.0, 10, 38, 38]]], [[CROWD], [0]]
    raw = noise().requires_grad_()
    sum(task().losses(raw, target(boxes, kinds), SIZE).values()).backward()
    assert raw.grad[0].eq(0).all()
    assert raw.grad[1, :, 4].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_predictions(dtype):
    raw, truth = noise(seed=3).to(dtype), target(TRUTH_BOXES, TRUTH_CLASSES)
    exact = task().losses(raw.float(), truth, SIZE)
    losses = task().losses(raw.requires_grad_(), truth, SIZE)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=1e-6)
    sum(losses.values()).backward()
    assert torch.isfinite(raw.grad).all()
    assert all(d.boxes.dtype == torch.float32 for d in task().decode(raw, SIZE))


def test_wild_predictions_give_finite_gradients():
    raw = noise(scale=200.0).requires_grad_()
    losses = task().losses(raw, target(TRUTH_BOXES, TRUTH_CLASSES), SIZE)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert torch.isfinite(raw.grad).all()


def test_descent_on_raw_outputs_finds_the_boxes():
    raw = noise(scale=0.1).requires_grad_()
    truth = target(TRUTH_BOXES, TRUTH_CLASSES)
    optimizer = torch.optim.Adam([raw], lr=0.2)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        optimizer.zero_grad()
        losses = task().losses(raw, truth, SIZE)
        sum(losses[k] * w for k, w in task().weights.items()).backward()
        optimizer.step()
    assert losses["box"] < 0.05
    assert evaluate(raw.detach())["mAP50"] == 100


# --- images whose set labels only some classes


def test_a_set_that_labels_every_class_changes_nothing():
    raw = noise(seed=4)
    grads = []
    for known in (None, [(0, 1, 2), (0, 1, 2)]):
        own = raw.clone().requires_grad_()
        losses = task().losses(own, target(TRUTH_BOXES, TRUTH_CLASSES, known=known), SIZE)
        sum(losses.values()).backward()
        grads.append((losses, own.grad))
    (plain, plain_grad), (complete, complete_grad) = grads
    assert all(torch.equal(plain[name], complete[name]) for name in plain)
    assert torch.equal(plain_grad, complete_grad)


def test_logits_of_classes_that_the_set_does_not_label_learn_nothing():
    # the first image's set labels cats alone, the second's all
    truth = target([TRUTH_BOXES[0][:1], TRUTH_BOXES[1]], [[0], [1]], known=[(0,), (0, 1, 2)])
    raw = noise(seed=4).requires_grad_()
    losses = task().losses(raw, truth, SIZE)
    sum(losses.values()).backward()
    assert raw.grad[0, :, 6:].eq(0).all() and raw.grad[0, :, 5].ne(0).all()
    matched = raw.grad[1, :, 5:].ne(0).any(-1)
    assert matched.any() and raw.grad[1, matched][:, 5:].ne(0).all()
    # nor do they matter to the losses, as long as no box is matched by them
    none = truth | {"classes": torch.full_like(truth["classes"], PAD)}
    other = raw.detach().clone()
    other[0, :, 6:] -= 30.0
    first, second = task().losses(raw, none, SIZE), task().losses(other, none, SIZE)
    assert all(first[name].item() == pytest.approx(second[name].item(), rel=1e-6) for name in first)


def test_partial_labels_by_hand():
    # One cell of stride 32: objectness 3/4, class a (labelled) 1/2, class b (not labelled in this set) 3/4.
    det = Detection("det", ("a", "b"), (32,))
    raw = torch.zeros(1, 1, 7)
    raw[0, 0, 4:] = torch.tensor([math.log(3), 0.0, math.log(3)])
    nothing = {
        "boxes": torch.zeros(1, 0, 4),
        "classes": torch.zeros(1, 0, dtype=torch.long),
        "labelled": torch.tensor([True]),
    }
    losses = det.losses(raw, nothing | {"known": torch.tensor([[True, False]])}, (32, 32))
    # all that is certain is that it is no a: -ln(1 - 3/4 * 1/2)
    assert losses["objectness"].item() == pytest.approx(-math.log(1 - 3 / 8), rel=1e-5)
    assert losses["box"].item() == losses["class"].item() == 0
    # of two labelled classes the likelier counts
    three = Detection("det", ("a", "b", "c"), (32,))
    wide = torch.cat([raw, torch.full((1, 1, 1), -math.log(3))], dim=-1)
    losses = three.losses(wide, nothing | {"known": torch.tensor([[True, False, True]])}, (32, 32))
    assert losses["objectness"].item() == pytest.approx(-math.log(1 - 3 / 8), rel=1e-5)
    # with an a there, the cell learns it as ever, and of b nothing: IoU 1/2, softplus(0) - 0 / 2 = ln 2
    there = target([[[0.0, 0, 32, 16]]], [[0]]) | {"known": torch.tensor([[True, False]])}
    losses = det.losses(raw, there, (32, 32))
    assert losses["objectness"].item() == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert losses["class"].item() == pytest.approx(math.log(2), rel=1e-5)
    # a set that labels none of the classes leaves an empty cell alone
    losses = det.losses(raw, nothing | {"known": torch.tensor([[False, False]])}, (32, 32))
    assert losses["objectness"].item() == pytest.approx(0, abs=1e-6)


def test_an_unmatched_cell_that_is_taken_for_a_class_without_labels_is_left_alone():
    """Three cells, surely objects: of a labelled class, of one without labels, of neither surely."""
    det = Detection("det", ("a", "b"), (32,))
    raw = torch.zeros(1, 3, 7)
    raw[..., 4] = 4.0
    raw[0, :, 5:] = torch.tensor([[4.0, -9.0], [-9.0, 4.0], [0.0, 0.0]])
    raw.requires_grad_()
    nothing = {
        "boxes": torch.zeros(1, 0, 4),
        "classes": torch.zeros(1, 0, dtype=torch.long),
        "labelled": torch.tensor([True]),
    }
    losses = det.losses(raw, nothing | {"known": torch.tensor([[True, False]])}, (32, 96))
    losses["objectness"].backward()
    objectness, a, b = raw.grad[0, :, 4], raw.grad[0, :, 5], raw.grad[0, :, 6]
    assert objectness[0] > 0.3 and abs(objectness[1]) < 1e-4 and 0.01 < objectness[2] < objectness[0]
    assert a[0] > 0.3 and abs(a[1]) < 2e-4 and b.eq(0).all()
    plain = raw.detach().clone().requires_grad_()
    det.losses(plain, nothing, (32, 96))["objectness"].backward()
    assert plain.grad[0, 1, 4] > 0.9  # where all classes are labelled the same cell is background


@pytest.mark.parametrize("sure", [10.0, 20.0, 60.0, 300.0])
def test_a_certain_object_where_there_is_none_is_unlearnt_however_certain(sure):
    det = Detection("det", ("a", "b"), (32,))
    raw = torch.full((1, 1, 7), sure)
    raw[..., :4], raw[..., 6] = 0.0, -sure
    raw.requires_grad_()
    nothing = {
        "boxes": torch.zeros(1, 0, 4),
        "classes": torch.zeros(1, 0, dtype=torch.long),
        "labelled": torch.tensor([True]),
    }
    loss = det.losses(raw, nothing | {"known": torch.tensor([[True, False]])}, (32, 32))["objectness"]
    loss.backward()
    # 1 - p q of p = q = 1 - e^-sure is 2 e^-sure: the loss is sure - ln 2, half of its slope is each one's
    assert loss.item() == pytest.approx(sure - math.log(2), rel=1e-4)
    assert raw.grad[0, 0, 4:].tolist() == pytest.approx([0.5, 0.5, 0.0], rel=1e-3)


def test_a_crowd_in_an_image_with_some_classes_counts_as_nothing_too():
    raw = noise(1).requires_grad_()
    truth = target([[[0.0, 0, 96, 64]]], [[CROWD]], known=[(0, 2)])
    sum(task().losses(raw, truth, SIZE).values()).backward()
    assert raw.grad.eq(0).all()


# --- decode, restore, score


def evaluate(raw, geometries=None):
    det, metric = task(), task().metric()
    for i, found in enumerate(det.decode(raw, SIZE)):
        geometry = geometries[i] if geometries else Geometry(SIZE, SIZE)
        ratio = np.array(
            [geometry.original[1] / geometry.content[1], geometry.original[0] / geometry.content[0]] * 2
        )
        boxes = (np.array(TRUTH_BOXES[i]) * ratio).astype(np.float32)
        truth = Truth(i, geometry, {"det": BoxLabels(boxes, np.array(TRUTH_CLASSES[i]))})
        det.score(metric, det.restore(found, geometry), truth)
    return metric.compute()


def test_perfect_prediction_has_perfect_ap():
    raw, _ = perfect(TRUTH_BOXES, TRUTH_CLASSES)
    result = evaluate(raw)
    assert result["mAP"] == 100 and result["mAP75"] == 100
    assert result["AP"] == {"cat": 100, "dog": 100, "owl": 100}


def test_perfect_prediction_has_perfect_ap_at_the_original_size():
    raw, _ = perfect(TRUTH_BOXES, TRUTH_CLASSES)
    assert evaluate(raw, [Geometry((128, 192), (64, 96)), Geometry((45, 77), (56, 96))])["mAP"] == 100


def test_a_shifted_or_unsure_prediction_scores_less():
    raw, _ = perfect(TRUTH_BOXES, TRUTH_CLASSES)
    shifted = raw.clone()
    shifted[..., 0] += 0.5
    assert evaluate(shifted)["mAP"] < 90
    wrong = raw.clone()
    wrong[..., 5:] = wrong[..., 5:].roll(1, -1)
    assert evaluate(wrong)["mAP"] == 0


def test_an_unlabelled_image_is_not_scored():
    metric = task().metric()
    found = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    task().score(metric, found, Truth(0, Geometry(SIZE, SIZE)))
    assert metric.compute()["mAP"] is None


def sparse(*entries):
    """Raw outputs that are background but for (cell, objectness logit, class, class logit)."""
    raw = torch.full((1, len(cells(SIZE, STRIDES, CPU)[0]), 5 + len(CLASSES)), -30.0)
    raw[..., :4] = 0
    for cell, objectness, kind, logit in entries:
        raw[0, cell, 4], raw[0, cell, 5 + kind] = objectness, logit
    return raw


def test_decode_by_hand():
    # cell 0 is [0,0,8,8], cell 1 is [8,0,16,8]; scores: sigmoid(ln 3) = 3/4 times sigmoid(0) or sigmoid(ln 3)
    raw = sparse((0, math.log(3), 1, 0.0), (1, math.log(3), 2, math.log(3)))
    (found,) = task().decode(raw, SIZE)
    assert found.scores.tolist() == pytest.approx([9 / 16, 3 / 8])
    assert found.classes.tolist() == [2, 1]
    assert found.boxes.tolist() == [[8, 0, 16, 8], [0, 0, 8, 8]]


def test_decode_suppresses_within_a_class_only():
    raw = sparse((0, 9.0, 1, 2.0), (1, 9.0, 1, 1.0), (12, 9.0, 2, 3.0))
    raw[0, 1, 0] = -1.0  # cell 1 one stride to the left, cell 12 one stride up: both are cell 0's box now
    raw[0, 12, 1] = -1.0
    (found,) = task().decode(raw, SIZE)
    assert found.classes.tolist() == [2, 1]
    assert found.scores[1].item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), rel=1e-3)
    (all_three,) = task().decode(raw, SIZE, nms_iou=1.0)
    assert len(all_three.boxes) == 3


def test_decode_options():
    raw = sparse(*((cell, 9.0, 0, 4.0 - cell) for cell in range(6)))
    assert len(task().decode(raw, SIZE, max_detections=2)[0].scores) == 2
    assert len(task().decode(raw, SIZE, before_nms=4)[0].scores) == 4
    (sure,) = task().decode(raw, SIZE, score_threshold=0.6)  # sigmoid of 4, 3, 2, 1 is above .6; of 0 not
    assert sure.scores.min() > 0.6 and len(sure.scores) == 4
    (none,) = task().decode(sparse(), SIZE)
    assert none.boxes.shape == (0, 4) and none.scores.shape == none.classes.shape == (0,)


def test_decode_gives_one_cell_several_classes_and_clips_to_the_image():
    raw = sparse((0, 9.0, 0, 3.0), (0, 9.0, 2, 1.0))
    raw[0, 0, 2:4] = 2.0  # 8 e^2 = 59 pixels wide round (4, 4)
    (found,) = task().decode(raw, SIZE)
    assert found.classes.tolist() == [0, 2]
    reach = 4 + 4 * math.exp(2)
    assert found.boxes[0].tolist() == pytest.approx([0, 0, reach, reach], rel=1e-5)
    raw[0, 0, 2:4] = 5.0
    assert task().decode(raw, SIZE)[0].boxes[0].tolist() == [0, 0, 96, 64]


@pytest.mark.parametrize("original", [(480, 640), (100, 30), (33, 250)])
def test_restore_is_the_way_back_from_the_letterbox(original):
    geometry = fit(original, SIZE)
    boxes = torch.tensor([[1.0, 2, 20, 30], [0, 0, original[1], original[0]]])
    ratio = torch.tensor([geometry.content[1] / original[1], geometry.content[0] / original[0]] * 2)
    found = Detections(boxes * ratio, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))
    back = task().restore(found, geometry)
    assert torch.allclose(back.boxes, boxes, atol=1e-3)
    assert torch.equal(back.scores, found.scores) and torch.equal(back.classes, found.classes)


def test_restore_clips_what_lies_in_the_padding():
    geometry = Geometry((100, 100), (64, 64))  # in 64 x 96: columns from 64 are padding
    found = Detections(torch.tensor([[32.0, 0, 90, 64]]), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert task().restore(found, geometry).boxes.tolist() == [[50, 0, 100, 100]]


def test_what_lies_in_the_padding_alone_is_no_detection():
    geometry = Geometry((100, 100), (64, 64))
    boxes = torch.tensor([[70.0, 0, 90, 64], [32, 0, 48, 64]])
    back = task().restore(Detections(boxes, torch.tensor([0.9, 0.5]), torch.tensor([1, 0])), geometry)
    assert (
        back.boxes.tolist() == [[50, 0, 75, 100]]
        and back.scores.tolist() == [0.5]
        and back.classes.tolist() == [0]
    )


def test_detections_of_classes_that_the_images_set_does_not_label_are_not_scored():
    """A cat is there and found; a dog that is found in a set without dogs is neither right nor wrong."""
    boxes = torch.tensor([[60.0, 0, 80, 20], [8, 6, 40, 44], [8, 6, 40, 44]])
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 1]))
    label = BoxLabels(np.array([[8.0, 6, 40, 44]], np.float32), np.array([0]))
    results = []
    for known in (None, np.array([True, False, True]), np.array([True, True, True])):
        metric = task().metric()
        task().score(
            metric,
            found,
            Truth(3, Geometry(SIZE, SIZE), {"det": label}, {} if known is None else {"det": known}),
        )
        assert len(metric._detections[0]) == (3 if known is None or known.all() else 1)
        # a second image, with a dog that is found in the third place
        dog = BoxLabels(np.array([[8.0, 6, 40, 44]], np.float32), np.array([1]))
        task().score(
            metric,
            Detections(boxes[1:2], torch.tensor([0.6]), torch.tensor([1])),
            Truth(4, Geometry(SIZE, SIZE), {"det": dog}),
        )
        results.append(metric.compute()["AP"])
    assert results[0] == results[2] and results[0]["cat"] == results[1]["cat"] == 100
    assert results[0]["dog"] < 40 and results[1]["dog"] == 100


# --- finished detections and predictions of networks from elsewhere


def padded(*images):
    """Rows of x1, y1, x2, y2, score, class by image."""
    most = max(map(len, images))
    rows = torch.tensor(
        [[*image, *[(0, 0, 0, 0, 0, PAD)] * (most - len(image))] for image in images], dtype=torch.float32
    )
    return PaddedDetections(rows[..., :4], rows[..., 4], rows[..., 5].long())


def test_finished_detections_are_sorted_and_those_that_are_none_left_out():
    found = padded(
        [(0, 0, 9, 9, 0.3, 1), (0, 0, 9, 8, 0.9, 2), (0, 0, 9, 7, 0.005, 0)], [(1, 1, 5, 5, 0.5, 0)]
    )
    first, second = task().decode(found, SIZE)
    assert first.classes.tolist() == [2, 1] and first.scores.tolist() == pytest.approx(
        [0.9, 0.3]
    )  # no suppression again
    assert second.boxes.tolist() == [[1, 1, 5, 5]] and second.classes.tolist() == [0]
    assert len(task().decode(found, SIZE, max_detections=1)[0].scores) == 1


def test_dense_predictions_are_suppressed_as_cells_are():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [-5, 50, 200, 60]]])
    scores = torch.tensor([[[0.5, 0.0, 0.0], [0.6, 0.2, 0.0], [0.0, 0.0, 0.9]]])
    (found,) = task().decode(DensePredictions(boxes, scores), SIZE)
    assert found.classes.tolist() == [2, 0, 1] and found.scores.tolist() == pytest.approx([0.9, 0.6, 0.2])
    assert found.boxes.tolist() == [[0, 50, 96, 60], [0, 0, 10, 9], [0, 0, 10, 9]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"nms_iou": -0.1}, "nms_iou"),
        ({"max_detections": 0}, "max_detections"),
        ({"before_nms": 0}, "before_nms"),
    ],
)
def test_bad_options_of_decoding_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        task().decode(sparse(), SIZE, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": -1.0}, "box: -1.0 is no weight"),
        ({"classification": float("nan")}, "class: nan is no weight"),
        ({"box": 0.0, "objectness": 0.0, "classification": 0.0}, "every weight is 0"),
        ({"radius": 0.0}, "radius: 0.0 is not a number of strides above 0"),
    ],
)
def test_bad_options_of_the_loss_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


# --- labels


def labels(boxes, classes, crowd=None):
    return BoxLabels(np.array(boxes, np.float32).reshape(-1, 4), np.array(classes, np.int64), crowd)


def test_boxes_are_numbered_anew_and_those_of_other_classes_left_out():
    table = Detection.class_table(["owl", None, "cat"], CLASSES)
    label = labels([[0, 0, 4, 4], [0, 0, 5, 5], [0, 0, 6, 6]], [2, 1, 0], np.array([True, False, False]))
    moved = Detection.renumbered(label, table)
    assert (
        moved.classes.tolist() == [0, 2]
        and moved.crowd.tolist() == [True, False]
        and moved.area.tolist() == [16, 36]
    )
    # an image of which nothing is left is labelled all the same: there is none of the known classes
    assert len(Detection.renumbered(label.chosen(np.array([1])), table)) == 0
    known = Detection.only_known(label, np.array([False, True, True]))
    assert known.classes.tolist() == [2, 1] and known.boxes[:, 2].tolist() == [4, 5]


def test_boxes_move_as_corners_and_come_back_as_frames():
    geometry = Geometry((20, 40), (10, 20))
    label = labels([[4, 2, 24, 12], [0, 0, 3, 3], [8, 8, 16, 16]], [0, 1, 2], np.array([False, False, True]))
    moved = Detection.to_spatial(label, geometry, (10, 24))
    # halved; the second has 2.25 square pixels and is left out; the crowd is marked
    assert moved.points.tolist()[:4] == [[2, 1], [12, 1], [12, 6], [2, 6]]
    assert moved.rest.tolist() == [0, CROWD] and moved.maps == [] and len(moved.points) == 8
    moved.points += np.float32(
        [-6, 0]
    )  # six pixels to the left: of the first box 3/5 are inside, of the crowd 1/2
    back = Detection.from_spatial(moved, (10, 24), 0.55)
    assert back.boxes.tolist() == [[0, 1, 6, 6]] and back.classes.tolist() == [0]
    assert Detection.from_spatial(moved, (10, 24), 0.7).boxes.shape == (0, 4)
    both = Detection.from_spatial(moved, (10, 24), 0.4)
    assert both.classes.tolist() == [0, CROWD] and both.crowd.tolist() == [False, True]
    assert Detection.to_spatial(labels([], []), geometry, (10, 24)).points.shape == (0, 2)


def test_boxes_are_packed_and_padded():
    packed = Detection.packed([labels([[0, 0, 4, 4], [1, 1, 9, 9]], [1, CROWD]), None, labels([], [])], SIZE)
    assert packed["boxes"].shape == (3, 2, 4) and packed["boxes"][0, 1].tolist() == [1, 1, 9, 9]
    assert packed["classes"].tolist() == [[1, CROWD], [PAD, PAD], [PAD, PAD]]
    assert packed["labelled"].tolist() == [True, False, True]
    assert Detection.packed([None], SIZE)["boxes"].shape == (1, 0, 4)


# --- names, drawings and files


def test_its_kind_and_its_names():
    own, sign = (
        build_task("det", None, CLASSES, STRIDES),
        build_task("sign", "detection", CLASSES, STRIDES, {"radius": 1.5}),
    )
    assert KINDS.get(Detection.kind, "x") is Detection is type(own) and sign.radius == 1.5
    assert own.called("AR") == "AR" and sign.called("AR") == "sign AR"
    assert own.output_names() == {"boxes": "boxes", "scores": "scores", "classes": "classes"}
    assert sign.output_names() == {"boxes": "sign_boxes", "scores": "sign_scores", "classes": "sign_classes"}
    assert own.expected_shape((64, 90)) == {1: 8 * 12 + 4 * 6, 2: 8}


def test_what_is_drawn_and_saved():
    found = Detections(
        torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([0.75, 0.25]), torch.tensor([2, 0])
    )
    drawn = task().prediction_layer(found, 0.5)
    assert (
        isinstance(drawn, BoxLayer)
        and drawn.boxes.tolist() == [[1, 2, 3, 4]]
        and drawn.classes.tolist() == [2]
    )
    assert drawn.scores.tolist() == [0.75] and drawn.names == CLASSES
    label = task().label_layer(labels([[0, 0, 4, 4]], [1], np.array([True])))
    assert label.crowd.tolist() == [True] and label.scores is None
    assert task().saved(found).boxes.tolist() == [[1, 2, 3, 4, 0.75, 2], [5, 6, 7, 8, 0.25, 0]]


def test_more_figures_are_at_a_confidence_and_at_the_best():
    det, metric = task(), task().metric()
    boxes = torch.tensor([[8.0, 6, 40, 44], [60, 0, 80, 20], [60, 30, 80, 60]])
    found = Detections(boxes, torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0, 0, 0]))
    truth = labels([[8, 6, 40, 44], [60, 30, 80, 60]], [0, 0])
    det.score(metric, found, Truth(0, Geometry(SIZE, SIZE), {"det": truth}))
    figures = det.more_figures(metric, 0.5)
    assert (figures["right"], figures["wrong"], figures["missed"]) == (1, 1, 1)
    assert figures["precision"] == figures["recall"] == figures["F1"] == 50 and figures["confidence"] == 0.5
    # from .3 on: 2 right of 3, F1 4/5; from .9 on: F1 2/3
    assert figures["best_F1"] == pytest.approx(80) and figures["best_confidence"] == pytest.approx(0.3)
    assert figures["classes"]["cat"]["right"] == 1 and figures["classes"]["dog"]["F1"] is None
    best = det.more_figures(metric, None)
    assert (
        best["F1"] == best["best_F1"] == pytest.approx(80) and best["confidence"] == best["best_confidence"]
    )
    assert [c.key for c in det.more_columns(None)] == ["precision", "recall", "F1", "confidence"]
    assert [c.key for c in det.more_columns(0.5)][4:] == ["best_F1", "best_confidence"]
    nothing = det.more_figures(task().metric(), None)
    assert nothing == dict.fromkeys(c.key for c in det.more_columns(0.5))
    assert "chosen on these same images" in det.more_note(None) and "0.25" in det.more_note(0.25)


def test_detections_without_a_counterpart():
    def found(*rows):
        rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        return Detections(rows[:, :4], rows[:, 4], rows[:, 5].long())

    a = found((0, 0, 50, 50, 0.9, 1), (0, 0, 90, 90, 0.5, 0))
    same = found((0, 0, 90.008, 90, 0.50005, 0), (0, 0, 50, 50, 0.9, 1))
    assert without_counterpart([a], [same], 1e-4) == (0, 4)  # 1e-4 of 90 pixels
    assert without_counterpart([a], [found((0, 0, 90.1, 90, 0.5, 0), (0, 0, 50, 50, 0.9, 1))], 1e-4) == (2, 4)
    assert without_counterpart([a], [found((0, 0, 90, 90, 0.5, 2), (0, 0, 50, 50, 0.9, 1))], 1e-4) == (2, 4)
    assert without_counterpart([a, found()], [a, same], 1e-4) == (2, 6)


# --- teachers


def test_cells_of_the_same_strides_and_size_are_taken_as_they_are():
    raw, ignored = noise(), torch.zeros(2, 120, dtype=torch.bool)
    given = task().to_student(raw, ignored, TeacherGeometry(SIZE, SIZE), task(), "")
    assert given.pred is raw and given.ignore_mask is ignored and not given.relocated
    coarse = Detection("det", CLASSES, (16,))
    given = task().to_student(noise()[:, :24], None, TeacherGeometry(SIZE, SIZE), coarse, "")
    assert given.relocated and given.pred.shape == (2, 120, 8)
    assert given.ignore_mask[:, :96].all() and not given.ignore_mask[:, 96:].any()


def test_cells_are_decoded_with_the_teachers_own_strides_where_detections_are_compared():
    raw, _ = perfect(TRUTH_BOXES, TRUTH_CLASSES)
    given = task().to_student(raw, None, TeacherGeometry(SIZE, SIZE), task(), "detections")
    assert isinstance(given.pred, PaddedDetections) and not given.relocated and given.ignore_mask is None
    assert given.pred.classes[0, :2].sort().values.tolist() == [0, 2] and given.pred.classes[1, 0] == 1
    half = task().to_student(raw, None, TeacherGeometry((32, 48), SIZE), task(), "detections")
    assert torch.allclose(half.pred.boxes * 2, given.pred.boxes, atol=1e-4)


def test_why_a_prediction_cannot_be_compared_as_cells():
    found, dense = (
        padded([(0, 0, 9, 9, 0.3, 1)]),
        DensePredictions(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)),
    )
    located = dense._replace(anchor_points=torch.zeros(2, 2), strides=torch.ones(2))
    assert task().why_not(noise(), "", "teacher") is None and task().why_not(located, "", "teacher") is None
    assert all(
        task().why_not(pred, "detections", "teacher") is None for pred in (found, dense, located, noise())
    )
    why = task().why_not(dense, "", "teachers.big")
    assert why.startswith("teachers.big predicts at unknown locations: give teachers.big.outputs.det.strides")
    assert "after suppression" in task().why_not(found, "", "teacher") and "use det_boxes" in task().why_not(
        found, "", "teacher"
    )


def test_the_reader_of_a_teachers_cells_has_the_students_strides_where_none_are_given():
    assert (
        task().output_reader({}).strides == STRIDES
        and task().output_reader({"form": "cells"}).strides == STRIDES
    )
    assert task().output_reader({"form": "predictions"}).strides is None
    assert task().output_reader({"strides": [4]}).strides == (4,)


def test_the_rows_of_a_prediction_are_selected_in_any_form():
    rows = torch.tensor([1])
    assert torch.equal(task().select(noise(), rows), noise()[1:])
    found = task().select(padded([(0, 0, 9, 9, 0.3, 1)], [(0, 0, 9, 9, 0.3, 2)]), rows)
    assert isinstance(found, PaddedDetections) and found.classes.tolist() == [[2]]


def test_the_student_is_given_as_cells_with_their_centres_where_detections_are_compared():
    raw, found = noise(), padded([(0, 0, 9, 9, 0.3, 2)], [(0, 0, 9, 9, 0.4, 1)])
    shared = {"ignore_mask": None, "target": None, "size": SIZE, "form": "detections"}
    pair = task().comparable(raw, found, known=None, **shared)
    assert (
        isinstance(pair.student, CellPredictions)
        and pair.student.raw is raw
        and pair.mask is None
        and pair.teacher is found
    )
    assert torch.equal(pair.student.centres, cells(SIZE, STRIDES, CPU)[0])
    pair = task().comparable(raw, found, known=(0, 2), **shared)
    # numbered among the known classes; what is of another is none
    assert pair.student.raw.shape == (2, 120, 7) and pair.teacher.classes.tolist() == [[1], [PAD]]
    assert pair.teacher.scores.tolist() == [[pytest.approx(0.3)], [0]]
    assert torch.equal(~pair.mask, raw[..., 5:].argmax(-1) == 1)
