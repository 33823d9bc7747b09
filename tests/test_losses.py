import math
import re

import pytest
import torch

from multitask_kd.batch import IGNORE
from multitask_kd.errors import UserError
from multitask_kd.losses.base import LOSSES
from multitask_kd.losses.depth_l1 import DepthL1
from multitask_kd.losses.det_mse import DetMSE
from multitask_kd.losses.kl import KL
from multitask_kd.tasks.base import KINDS

LN2, LN3 = math.log(2), math.log(3)
# Teacher probabilities (3/4, 1/4), student (1/2, 1/2):
# KL(t || s) = 3/4 ln(3/2) + 1/4 ln(1/2) = .304099 - .173287. (The other way round, KL(s || t) = .143841.)
HAND = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


def two_classes(teacher_logit, shape):
    """Student logits (0, 0) and teacher logits (teacher_logit, 0) at every place of [B,2,*shape[1:]]."""
    student = torch.zeros(shape[0], 2, *shape[1:])
    teacher = student.clone()
    teacher[:, 0] = teacher_logit
    return student, teacher


def random(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- KL


def test_kl_hand_value_is_what_the_comment_says():
    assert pytest.approx(0.130812, abs=1e-6) == HAND


@pytest.mark.parametrize(
    ("reduction", "factor"),
    [("pixel", 1.0), ("mean", 1 / 2), ("batchmean", 6.0)],  # 2 classes; 2 images of 2x3 = 6 pixels
)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_kl_by_hand(reduction, factor, temperature):
    # softmax((T ln 3, 0) / T) = (3/4, 1/4), and T^2 stands before the divergence
    student, teacher = two_classes(temperature * LN3, (2, 2, 3))
    loss = KL(temperature=temperature, reduction=reduction)(student, teacher)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(temperature**2 * HAND * factor, rel=1e-5)


def test_kl_of_plain_classification():
    student, teacher = two_classes(LN3, (4,))  # [B,C] = [4,2]: every image is one "pixel"
    assert KL()(student, teacher).item() == pytest.approx(HAND, rel=1e-5)
    assert KL(reduction="batchmean")(student, teacher).item() == pytest.approx(HAND, rel=1e-5)
    assert KL(reduction="mean")(student, teacher).item() == pytest.approx(HAND / 2, rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (6, 5)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_against_the_formula_in_float64(shape, temperature):
    student, teacher = random(*shape, seed=1), random(*shape, seed=2)
    p = torch.exp(teacher.double() / temperature)
    p = p / p.sum(1, keepdim=True)
    q = torch.exp(student.double() / temperature)
    q = q / q.sum(1, keepdim=True)
    total = temperature**2 * (p * (p / q).log()).sum()
    pixels = student.numel() // shape[1]
    for reduction, divisor in (("pixel", pixels), ("mean", student.numel()), ("batchmean", shape[0])):
        loss = KL(temperature=temperature, reduction=reduction)(student, teacher)
        assert loss.item() == pytest.approx(total.item() / divisor, rel=1e-5)


def test_kl_is_zero_with_zero_gradient_at_equality_and_above_elsewhere():
    teacher = random(2, 4, 3, 3)
    student = (teacher + 7.0).requires_grad_()  # a constant on all classes changes no probability
    loss = KL(temperature=2.0)(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6
    assert KL(temperature=2.0)(random(2, 4, 3, 3, seed=9), teacher) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_kl_gradient_by_hand(temperature):
    # d/ds T^2 KL = T (softmax(s/T) - softmax(t/T)) = T (1/2 - 3/4) for class 0, over 6 pixels.
    student, teacher = two_classes(temperature * LN3, (1, 2, 3))
    student.requires_grad_()
    KL(temperature=temperature)(student, teacher).backward()
    assert torch.allclose(student.grad[:, 0], torch.tensor(-temperature / 4 / 6))
    assert torch.allclose(student.grad[:, 1], torch.tensor(temperature / 4 / 6))


def test_kl_keeps_the_gradient_as_the_temperature_grows():
    # For T far above the logits the gradient tends to (s - t) / C, centred, whatever T is: what T^2 is for.
    student, teacher = random(1, 3, 2, 2, seed=1, scale=1.0), random(1, 3, 2, 2, seed=2, scale=1.0)
    norms = []
    for temperature in (20.0, 40.0):
        own = student.clone().requires_grad_()
        KL(temperature=temperature)(own, teacher).backward()
        norms.append(own.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_kl_skips_what_labelled_images_ignore():
    student, teacher = two_classes(LN3, (2, 2, 2))
    teacher[:, 0, 0, 0] = 0.0  # at the first pixel the two agree: it counts 0
    mask = torch.zeros(2, 4, 4, dtype=torch.uint8)  # twice the logits' size: a cell is 2x2 pixels
    mask[:, :2, :2] = IGNORE  # the whole cell (0, 0), where the two agree
    mask[:, 2, 2] = IGNORE  # a quarter of cell (1, 1)
    target = {"mask": mask, "labelled": torch.tensor([True, False])}
    # image 0, labelled: 2.75 cells of 2.75; image 1, not labelled: 3 of all its 4
    skip = {
        r: KL(reduction=r, skip_ignored=True)(student, teacher, target).item()
        for r in ("pixel", "mean", "batchmean")
    }
    assert skip["pixel"] == pytest.approx(5.75 * HAND / 6.75, rel=1e-5)
    assert skip["mean"] == pytest.approx(5.75 * HAND / 13.5, rel=1e-5)
    # "batchmean" is 4 pixels an image times "pixel": what is left out counts in no divisor
    assert skip["batchmean"] == pytest.approx(4 * 5.75 * HAND / 6.75, rel=1e-5)
    # not asked for, or no label at all: everything counts
    assert KL()(student, teacher, target).item() == pytest.approx(6 * HAND / 8, rel=1e-5)
    assert KL(skip_ignored=True)(student, teacher, None).item() == pytest.approx(6 * HAND / 8, rel=1e-5)


def test_kl_gives_ignored_pixels_no_gradient_and_survives_none_left():
    student, teacher = random(1, 3, 2, 2, seed=1).requires_grad_(), random(1, 3, 2, 2, seed=2)
    mask = torch.full((1, 2, 2), IGNORE)
    mask[0, 0, 0] = 1
    target = {"mask": mask, "labelled": torch.tensor([True])}
    KL(skip_ignored=True)(student, teacher, target).backward()
    assert student.grad[0, :, 0, 0].abs().min() > 0
    assert student.grad.abs().sum((0, 1)).flatten()[1:].eq(0).all()
    target["mask"] = torch.full((1, 2, 2), IGNORE)
    assert KL(skip_ignored=True)(student, teacher, target).item() == 0


@pytest.mark.parametrize("reduction", ["pixel", "mean", "batchmean"])
@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (6, 5)])
def test_kl_with_a_mask_is_that_of_what_is_left_alone(reduction, shape):
    student, teacher = random(*shape, seed=1).requires_grad_(), random(*shape, seed=2)
    mask = random(shape[0], *shape[2:], seed=3) > 0
    assert mask.any() and not mask.all()
    loss = KL(temperature=2.0, reduction=reduction)(student, teacher, None, mask)
    loss.backward()
    p, q = (x.detach().double().movedim(1, -1)[mask].div(2.0).softmax(-1) for x in (teacher, student))
    each = 4 * (p * (p / q).log()).sum(-1).mean()
    pixels = math.prod(shape[2:])
    expected = each * {"pixel": 1.0, "mean": 1 / shape[1], "batchmean": pixels}[reduction]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = student.grad.movedim(1, -1)
    assert grads[~mask].eq(0).all() and grads[mask].ne(0).any(-1).all()
    other = torch.where(mask.unsqueeze(1), teacher, 9.0)  # nor does it matter what the teacher has there
    assert KL(temperature=2.0, reduction=reduction)(student, other, None, mask).item() == loss.item()
    assert KL(reduction=reduction)(student, teacher, None, torch.zeros_like(mask)).item() == 0
    full = KL(reduction=reduction)(student, teacher, None, torch.ones_like(mask)).item()
    assert full == pytest.approx(KL(reduction=reduction)(student, teacher).item(), rel=1e-6)


def test_kl_of_half_of_the_pixels_by_hand():
    """Masked out: the half where the two agree. Left: HAND a pixel, not half of it."""
    student, teacher = two_classes(LN3, (1, 2, 4))
    teacher[..., 2:] = 0.0
    mask = torch.tensor([[[True, True, False, False]] * 2])
    assert KL()(student, teacher, None, mask).item() == pytest.approx(HAND, rel=1e-5)
    assert KL(reduction="mean")(student, teacher, None, mask).item() == pytest.approx(HAND / 2, rel=1e-5)
    assert KL(reduction="batchmean")(student, teacher, None, mask).item() == pytest.approx(8 * HAND, rel=1e-5)
    assert KL()(student, teacher).item() == pytest.approx(HAND / 2, rel=1e-5)


def test_kl_confidence_leaves_out_where_the_teacher_is_unsure():
    student, teacher = two_classes(LN3, (1, 2, 2))  # 3/4
    teacher[0, 0, 0, 0] = math.log(1.5)  # 3/5
    teacher[0, :, 1, 1] = torch.tensor([0.0, math.log(9)])  # 9/10, of the other class
    of = lambda p: p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))  # noqa: E731
    values = {c: KL(confidence=c)(student, teacher).item() for c in (0.0, 0.59, 0.7, 0.8, 0.95)}
    assert values[0.0] == pytest.approx((2 * of(0.75) + of(0.6) + of(0.9)) / 4, rel=1e-5)
    assert values[0.59] == pytest.approx(values[0.0], rel=1e-6)
    assert values[0.7] == pytest.approx((2 * of(0.75) + of(0.9)) / 3, rel=1e-5)
    assert values[0.8] == pytest.approx(of(0.9), rel=1e-5) and values[0.95] == 0
    # it is the teacher's own probability, whatever the temperature
    assert KL(confidence=0.8, temperature=9.0)(student, teacher) > 0
    student.requires_grad_()
    KL(confidence=0.8)(student, teacher).backward()
    assert student.grad.abs().sum(1).nonzero().tolist() == [[0, 1, 1]]


def test_kl_confidence_mask_and_ignored_labels_together():
    student, teacher = two_classes(LN3, (1, 1, 4))
    teacher[0, 0, 0, 0] = 0.1  # unsure
    mask = torch.tensor([[[True, False, True, True]]])
    target = {
        "mask": torch.tensor([[[0, 0, IGNORE, 0]]], dtype=torch.uint8),
        "labelled": torch.tensor([True]),
    }
    loss = KL(confidence=0.7, skip_ignored=True)
    student.requires_grad_()
    value = loss(student, teacher, target, mask)
    value.backward()
    assert value.item() == pytest.approx(HAND, rel=1e-5)
    assert student.grad.abs().sum(1).nonzero().tolist() == [[0, 0, 3]]


def test_kl_of_images_with_confidence():
    student, teacher = two_classes(LN3, (3,))
    teacher[1] = 0.0
    target = {"class": torch.tensor([0, 1, 0]), "labelled": torch.tensor([True, True, False])}
    assert KL(confidence=0.6, skip_ignored=True)(student, teacher, target).item() == pytest.approx(
        HAND, rel=1e-5
    )
    assert KL()(student, teacher, target).item() == pytest.approx(2 * HAND / 3, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_of_large_low_precision_logits_is_finite(dtype):
    # Both are as sure as can be of different classes: KL = ln(1 / softmax(s)_1) = 60000 (59904 in bfloat16)
    student = torch.tensor([[60000.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, 60000.0]], dtype=dtype)
    loss = KL()(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(student[0, 0].item(), rel=1e-6)
    assert student.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_of_low_precision_logits_is_computed_in_float32(dtype):
    student, teacher = random(2, 5, 3, 3, seed=1).to(dtype), random(2, 5, 3, 3, seed=2).to(dtype)
    assert torch.equal(
        KL(temperature=3.0)(student, teacher), KL(temperature=3.0)(student.float(), teacher.float())
    )


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 2, 2, 2), (2, 2, 4, 4)])
def test_kl_refuses_other_shapes(shape):
    with pytest.raises(
        ValueError, match=re.escape(f"logits [1, 2, 4, 4] and the teacher's {list(shape)} differ")
    ):
        KL()(torch.zeros(1, 2, 4, 4), torch.zeros(shape))


BAD_KL = [
    {"temperature": 0.0},
    {"temperature": -1.0},
    {"reduction": "sum"},
    {"confidence": 1.0},
    {"confidence": -0.1},
]


@pytest.mark.parametrize("options", BAD_KL)
def test_kl_refuses_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        KL(**options)


# --- detection MSE. A cell is dx, dy, log w, log h, objectness, classes.


def test_det_mse_raw_by_hand():
    student = torch.zeros(1, 2, 6)
    teacher = torch.tensor([[[1.0, 2, 0, 0, 3, 4], [0, 0, 0, 0, 0, 0]]])
    # 1 + 4 + 9 + 16 = 30 over 2 cells of 6 numbers
    assert DetMSE()(student, teacher).item() == pytest.approx(2.5)
    assert DetMSE(temperature=4.0)(student, teacher).item() == pytest.approx(10.0)  # times T


def test_det_mse_probability_by_hand():
    student = torch.zeros(1, 1, 6)
    teacher = torch.tensor([[[1.0, 0, 0, 1, LN3, -LN3]]])
    # offset and log size as they are: 1 + 1; sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4: twice (1/4)^2. Over
    # 6.
    assert DetMSE(form="probability")(student, teacher).item() == pytest.approx((2 + 2 / 16) / 6)


def test_det_mse_decoded_by_hand():
    student = torch.zeros(1, 1, 6)
    teacher = torch.tensor([[[1.0, 0, LN2, 0, LN3, 0]]])
    # offset 1; width 2 against 1 strides: 1; objectness 3/4 against 1/2: 1/16. Over 6.
    assert DetMSE(form="decoded")(student, teacher).item() == pytest.approx((1 + 1 + 1 / 16) / 6)


def test_det_mse_decoded_caps_sizes():
    student, teacher = torch.zeros(1, 1, 6), torch.zeros(1, 1, 6)
    teacher[..., 2] = 500.0  # e^500 would overflow; e^6 is the cap
    assert DetMSE(form="decoded")(student, teacher).item() == pytest.approx(
        (math.exp(6) - 1) ** 2 / 6, rel=1e-5
    )


def test_det_mse_teacher_weighting_by_hand():
    student = torch.zeros(1, 2, 7)
    teacher = torch.zeros(1, 2, 7)
    teacher[0, 0, 4], teacher[0, 0, 5:] = LN3, torch.tensor([-LN3, LN3])  # weight 3/4 * 3/4 = 9/16
    teacher[0, 1, 4], teacher[0, 1, 5:] = -LN3, torch.tensor([-LN3, -LN3])  # weight 1/4 * 1/4 = 1/16
    teacher[0, 0, 0] = (
        2.0  # squares: 4 + 3 (ln 3)^2 in the first cell, 3 (ln 3)^2 in the second; 7 numbers a cell
    )
    first, second = (4 + 3 * LN3**2) / 7, 3 * LN3**2 / 7
    expected = (9 * first + 1 * second) / 10
    assert DetMSE(weighting="teacher")(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert DetMSE(weighting="teacher", temperature=3.0)(student, teacher).item() == pytest.approx(
        3 * expected, rel=1e-5
    )


def test_det_mse_teacher_weighting_passes_over_background():
    student, teacher = random(1, 50, 7, seed=1), random(1, 50, 7, seed=2)
    teacher[:, 1:, 4] = -30.0  # the teacher finds an object in the first cell alone
    loss = DetMSE(weighting="teacher")(student, teacher)
    alone = DetMSE()(student[:, :1], teacher[:, :1])
    assert loss.item() == pytest.approx(alone.item(), rel=1e-4)
    assert DetMSE()(student, teacher) > 10 * alone  # the plain mean is mostly background
    # a teacher that finds nothing anywhere: almost nothing to learn, and nothing infinite
    teacher[..., 4] = -60.0
    assert DetMSE(weighting="teacher")(student, teacher).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["raw", "probability", "decoded"])
@pytest.mark.parametrize("weighting", ["none", "teacher"])
def test_det_mse_against_the_formula_in_float64(form, weighting):
    student, teacher = random(2, 9, 8, seed=1, scale=1.0), random(2, 9, 8, seed=2, scale=1.0)

    def shown(raw):
        raw = raw.double().clone()
        if form != "raw":
            raw[..., 4:] = 1 / (1 + torch.exp(-raw[..., 4:]))
        if form == "decoded":
            raw[..., 2:4] = torch.exp(raw[..., 2:4])
        return raw

    numerator = denominator = 0.0
    for image in range(2):
        for cell in range(9):
            own, other = shown(student[image, cell]), shown(teacher[image, cell])
            raw = teacher[image, cell].double()
            weight = 1.0
            if weighting == "teacher":
                weight = float(torch.sigmoid(raw[4]) * max(torch.sigmoid(c) for c in raw[5:]))
            numerator += weight * float(((own - other) ** 2).sum()) / 8
            denominator += weight
    loss = DetMSE(form=form, weighting=weighting, temperature=1.5)(student, teacher)
    assert loss.item() == pytest.approx(1.5 * numerator / denominator, rel=1e-5)


@pytest.mark.parametrize("form", ["raw", "probability", "decoded"])
@pytest.mark.parametrize("weighting", ["none", "teacher"])
def test_det_mse_is_zero_with_zero_gradient_at_equality(form, weighting):
    teacher = random(2, 5, 7)
    student = teacher.clone().requires_grad_()
    loss = DetMSE(form=form, weighting=weighting)(student, teacher)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


def test_det_mse_of_separate_parts_by_hand():
    student = torch.zeros(1, 1, 9)
    teacher = torch.tensor([[[1.0, 0, 3, 0, 2, 1, 0, 0, 0]]])
    # boxes (1 + 9) / 4 = 2.5, objectness 4, classes 1 / 4: 6.75 in the place of (10 + 4 + 1) / 9
    assert DetMSE(parts="separate")(student, teacher).item() == pytest.approx(6.75)
    assert DetMSE()(student, teacher).item() == pytest.approx(15 / 9)
    assert DetMSE(parts="separate", temperature=2.0)(student, teacher).item() == pytest.approx(13.5)
    # a second cell without any difference halves each mean; weighed by the teacher it counts 1/2 * 1/2
    both = torch.cat([teacher, torch.zeros(1, 1, 9)], dim=1)
    assert DetMSE(parts="separate")(torch.zeros(1, 2, 9), both).item() == pytest.approx(6.75 / 2)
    sure, unsure = torch.sigmoid(torch.tensor(2.0)) * torch.sigmoid(torch.tensor(1.0)), 1 / 4
    expected = (6.75 * sure / (sure + unsure)).item()
    found = DetMSE(parts="separate", weighting="teacher")(torch.zeros(1, 2, 9), both)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_det_mse_of_separate_parts_does_not_let_80_classes_drown_the_boxes():
    student = torch.zeros(1, 1, 85, requires_grad=True)
    teacher = torch.zeros(1, 1, 85)
    teacher[..., :4] = 2.0
    # 4 * 4 / 85 in one mean; 4 in that of the boxes, where each value has 1/4 and not 1/85 of the gradient
    assert DetMSE()(student, teacher).item() == pytest.approx(16 / 85)
    loss = DetMSE(parts="separate")(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(4.0)
    assert student.grad[0, 0, :4].tolist() == pytest.approx([2 * -2 / 4] * 4)
    teacher = torch.zeros(1, 1, 85)
    teacher[..., 5:] = 3.0
    assert DetMSE(parts="separate")(student, teacher).item() == pytest.approx(9.0)
    assert DetMSE()(student, teacher).item() == pytest.approx(9 * 80 / 85)


@pytest.mark.parametrize("form", ["raw", "probability", "decoded"])
@pytest.mark.parametrize("weighting", ["none", "teacher"])
@pytest.mark.parametrize("parts", ["together", "separate"])
def test_det_mse_with_a_mask_is_that_of_what_is_left_alone(form, weighting, parts):
    student, teacher = random(2, 9, 8, seed=1, scale=1.0).requires_grad_(), random(2, 9, 8, seed=2, scale=1.0)
    mask = random(2, 9, seed=3) > 0
    loss = DetMSE(form=form, weighting=weighting, parts=parts)
    value = loss(student, teacher, None, mask)
    value.backward()
    own, other = (x.detach().double()[mask] for x in (student, teacher))
    weight = torch.ones(len(own)).double()
    if weighting == "teacher":
        weight = other[:, 4].sigmoid() * other[:, 5:].sigmoid().amax(1)
    if form != "raw":
        own[:, 4:], other[:, 4:] = own[:, 4:].sigmoid(), other[:, 4:].sigmoid()
    if form == "decoded":
        own[:, 2:4], other[:, 2:4] = own[:, 2:4].exp(), other[:, 2:4].exp()
    squares = (own - other) ** 2
    each = squares.mean(1)
    if parts == "separate":
        each = squares[:, :4].mean(1) + squares[:, 4] + squares[:, 5:].mean(1)
    assert value.item() == pytest.approx(((each * weight).sum() / weight.sum()).item(), rel=1e-5)
    assert student.grad[~mask].eq(0).all() and student.grad[mask].ne(0).any(-1).all()
    none = loss(student, teacher, None, torch.zeros_like(mask))
    assert none.item() == 0 and torch.autograd.grad(none, student)[0].eq(0).all()


def test_det_mse_gradient_by_hand():
    student = torch.zeros(1, 2, 6, requires_grad=True)
    teacher = torch.zeros(1, 2, 6)
    teacher[0, 1, 4] = 3.0
    DetMSE(temperature=2.0)(student, teacher).backward()
    # d/ds 2 (s - t)^2 / 12 = 2 * 2 * (0 - 3) / 12 = -1, for that number alone
    assert student.grad[0, 1, 4].item() == pytest.approx(-1.0)
    assert student.grad.count_nonzero() == 1


def test_det_mse_computes_in_float32():
    student, teacher = random(1, 4, 6, seed=1), random(1, 4, 6, seed=2)
    loss = DetMSE(weighting="teacher")(
        student.half() + 300, teacher.half() - 300
    )  # 600^2 is above float16's largest
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_det_mse_refuses_other_cells():
    with pytest.raises(ValueError, match=r"cells \[1, 8, 7\] and the teacher's \[1, 10, 7\] differ"):
        DetMSE()(torch.zeros(1, 8, 7), torch.zeros(1, 10, 7))
    with pytest.raises(ValueError, match=r"cells \[1, 8, 7\] and the teacher's \[1, 8, 8\] differ"):
        DetMSE()(torch.zeros(1, 8, 7), torch.zeros(1, 8, 8))


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"form": "boxes"}, {"weighting": "student"}, {"parts": "three"}]
)
def test_det_mse_refuses_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DetMSE(**options)


# --- depth


def test_depth_l1_by_hand():
    student = torch.tensor([[[[0.0, 1.0], [2.0, -1.0]]]])
    teacher = torch.tensor([[[[LN2, 1.0], [0.0, 1.0]]]])
    assert DepthL1()(student, teacher).item() == pytest.approx((LN2 + 0 + 2 + 2) / 4)
    mask = torch.tensor([[[True, True], [True, False]]])
    student.requires_grad_()
    loss = DepthL1()(student, teacher, None, mask)
    loss.backward()
    assert loss.item() == pytest.approx((LN2 + 2) / 3)
    assert student.grad.flatten().tolist() == pytest.approx([-1 / 3, 0, 1 / 3, 0])
    assert DepthL1()(student, teacher, None, torch.zeros_like(mask)).item() == 0


def test_depth_l1_computes_in_float32_and_refuses_other_shapes():
    assert DepthL1()(torch.zeros(1, 1, 2, 2).half(), torch.ones(1, 1, 2, 2).bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"depth \[1, 1, 2, 2\] and the teacher's \[1, 1, 2, 3\] differ"):
        DepthL1()(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3))


# --- names


def test_losses_are_found_by_name_with_their_options():
    loss = LOSSES.build("kl", {"temperature": 3.0}, "tasks.seg.soft.options")
    assert isinstance(loss, KL) and loss.temperature == 3.0
    with pytest.raises(
        UserError, match=r"tasks.seg.soft.options.temprature: no such option; did you mean 'temperature'\?"
    ):
        LOSSES.build("kl", {"temprature": 3.0}, "tasks.seg.soft.options")
    with pytest.raises(UserError, match="did you mean 'det_mse'"):
        LOSSES.get("det-mse", "tasks.det.soft.loss")


@pytest.mark.parametrize("name", LOSSES.names())
def test_the_attributes_of_a_loss(name):
    made = LOSSES.get(name, "x")
    assert set(made.kinds) <= set(KINDS.names()) and (made.kinds or made.maps)
    forms = {form for kind in made.kinds for form in KINDS.get(kind, "x").forms}
    assert made.form == "" or made.form in forms
    loss = made(4) if made.learns else made()
    assert all(isinstance(getattr(loss, option), float) for option in made.scheduled)
    assert made.learns == any(True for _ in loss.parameters())


def test_every_kind_has_a_soft_loss():
    assert {kind for name in LOSSES.names() for kind in LOSSES.get(name, "x").kinds} == set(KINDS.names())
