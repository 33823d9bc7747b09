"""Soft targets for dense detection. A cell is dx, dy, log w, log h, objectness, classes."""

import math

import pytest
import torch

from multitask_kd.losses.det_soft import DetSoft

LN2, LN3 = math.log(2), math.log(3)
# Teacher 3/4, student 1/2: 3/4 ln(3/2) + 1/4 ln(1/2) = .130812, the divergence of one Bernoulli variable
HAND = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
ONLY = {
    "objectness": {"classification": 0.0, "box": 0.0},
    "classification": {"objectness": 0.0, "box": 0.0},
    "box": {"objectness": 0.0, "classification": 0.0, "box": 1.0},
}


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cell(*numbers):
    return torch.tensor([[numbers]], dtype=torch.float32)


def plain_formula(
    student, teacher, *, objectness=1.0, classification=1.0, box=2.0, confidence=0.05, temperature=1.0
):
    """The documented formula in Python's float64, cell by cell."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731

    def divergence(s, t):
        p, q = sigmoid(t / temperature), sigmoid(s / temperature)
        return temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))

    def corners(raw):
        x, y, w, h = raw[0], raw[1], math.exp(min(raw[2], 6.0)), math.exp(min(raw[3], 6.0))
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2

    def giou(a, b):
        a, b = corners(a), corners(b)
        area = lambda c: (c[2] - c[0]) * (c[3] - c[1])  # noqa: E731
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inter = max(0.0, width) * max(0.0, height)
        union = area(a) + area(b) - inter
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        return inter / union - (hull - union) / hull

    parts = weights = 0.0
    for s, t in zip(
        student.double().flatten(0, 1).tolist(), teacher.double().flatten(0, 1).tolist(), strict=True
    ):
        sure = sigmoid(t[4]) * max(map(sigmoid, t[5:]))
        sure = sure if sure >= confidence else 0.0
        weights += sure
        parts += objectness * divergence(s[4], t[4])
        parts += classification * sure * sum(divergence(a, b) for a, b in zip(s[5:], t[5:], strict=True))
        parts += box * sure * (1 - giou(s, t))
    return parts / max(1.0, weights)


def test_objectness_of_one_cell_by_hand():
    # c = 3/4 * 1/2 is below 1, so the sum is divided by 1
    loss = DetSoft(**ONLY["objectness"])(cell(0, 0, 0, 0, 0, 0), cell(9, 9, 1, 1, LN3, 0))
    assert loss.shape == () and loss.item() == pytest.approx(HAND, rel=1e-5)
    loss = DetSoft(**ONLY["objectness"] | {"objectness": 3.0})(
        cell(0, 0, 0, 0, 0, 0), cell(9, 9, 1, 1, LN3, 0)
    )
    assert loss.item() == pytest.approx(3 * HAND, rel=1e-5)


def test_classes_of_one_cell_by_hand():
    # c = 1/2 * 3/4 = 3/8 by the best class; both classes are a quarter from the student's 1/2: 3/8 * 2 HAND
    loss = DetSoft(**ONLY["classification"])(cell(0, 0, 0, 0, 0, 0, 0), cell(0, 0, 0, 0, 0, LN3, -LN3))
    assert loss.item() == pytest.approx(3 / 8 * 2 * HAND, rel=1e-5)


def test_box_of_one_cell_by_hand():
    # Student [-1/2, 1/2]^2, teacher [-1, 1] x [-1/2, 1/2]: IoU 1/2, the hull is the teacher's box. c = 3/4 *
    # 3/4.
    loss = DetSoft(**ONLY["box"])(cell(0, 0, 0, 0, 0, 0), cell(0, 0, LN2, 0, LN3, LN3))
    assert loss.item() == pytest.approx(9 / 16 * 1 / 2, rel=1e-5)
    # One stride apart: IoU 0, hull 3 x 1, union 2: GIoU = -1/3
    loss = DetSoft(**ONLY["box"])(cell(2, 0, 0, 0, 0, 0), cell(0, 0, 0, 0, LN3, LN3))
    assert loss.item() == pytest.approx(9 / 16 * 4 / 3, rel=1e-5)


def test_every_part_is_divided_by_the_sum_of_the_weights_where_it_is_above_1():
    # Four cells of c = 9/16: divided by 9/4. Objectness and the class HAND each, the box 1/2 as above, times
    # 2.
    student, teacher = cell(0, 0, 0, 0, 0, 0).repeat(2, 2, 1), cell(0, 0, LN2, 0, LN3, LN3).repeat(2, 2, 1)
    expected = 4 * (HAND + 9 / 16 * HAND + 2 * 9 / 16 * 1 / 2) / (9 / 4)
    assert DetSoft()(student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 3.0},
        {"confidence": 0.4},
        {"confidence": 0.0},
        {"objectness": 0.5, "classification": 2.0, "box": 0.0},
    ],
)
def test_against_the_formula_in_float64(options):
    student, teacher = random(2, 9, 8, seed=1), random(2, 9, 8, seed=2)
    teacher[0, 0, 2] = 7.0  # beyond the cap of the decoded size
    assert DetSoft(**options)(student, teacher).item() == pytest.approx(
        plain_formula(student, teacher, **options), rel=1e-4
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_zero_with_zero_gradient_at_equality_and_above_elsewhere(temperature):
    teacher = random(2, 9, 8, scale=2.0)
    student = teacher.clone().requires_grad_()
    loss = DetSoft(temperature=temperature)(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert student.grad.abs().max() < 1e-5
    other = random(2, 9, 8, seed=5, scale=2.0).requires_grad_()
    loss = DetSoft(temperature=temperature)(other, teacher)
    loss.backward()
    assert loss > 0.1
    assert other.grad[..., 4].ne(0).all()  # objectness counts on every cell


def test_a_step_down_the_gradient_goes_to_the_teacher():
    teacher = random(1, 20, 7, seed=1)
    teacher[..., 4:] += 2.0
    student = (teacher + random(1, 20, 7, seed=2, scale=0.7)).requires_grad_()
    loss = DetSoft()
    first = loss(student, teacher).item()
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    assert loss(student, teacher).item() < 0.05 * first
    assert (student - teacher).abs().max() < 0.2


def test_the_box_part_does_not_depend_on_the_place_of_a_box():
    """Both boxes moved by the same offset, or the cells in another order: the same loss."""
    student, teacher = random(1, 6, 7, seed=1), random(1, 6, 7, seed=2)
    loss = DetSoft(**ONLY["box"], confidence=0.0)
    expected = loss(student, teacher).item()
    moved = torch.zeros(7)
    moved[:2] = torch.tensor([2.5, -1.25])
    assert expected > 0.1
    assert loss(student + moved, teacher + moved).item() == pytest.approx(expected, rel=1e-5)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert loss(student[:, order], teacher[:, order]).item() == pytest.approx(expected, rel=1e-5)
    bigger = torch.zeros(7)
    bigger[2:4] = LN2  # and both twice as big, with twice the offsets: the measure of a stride cancels
    scaled = [torch.cat([2 * x[..., :2], x[..., 2:]], dim=-1) + bigger for x in (student, teacher)]
    assert loss(*scaled).item() == pytest.approx(expected, rel=1e-4)


def test_cells_below_the_confidence_teach_objectness_alone():
    # c = 3/4 * 3/4 = .5625 in the first cell, 1/4 * 3/4 = .1875 in the second
    teacher = torch.cat([cell(0, 0, 1, 0, LN3, LN3), cell(0, 0, 1, 0, -LN3, LN3)], dim=1)
    grads = {}
    for confidence in (0.1, 0.3, 0.6):
        student = torch.zeros(1, 2, 6, requires_grad=True)
        DetSoft(confidence=confidence)(student, teacher).backward()
        grads[confidence] = student.grad[0]
    assert grads[0.1][:, [2, 4, 5]].ne(0).all()
    assert grads[0.3][0, [2, 4, 5]].ne(0).all()
    for unsure in (grads[0.3][1], *grads[0.6]):
        assert unsure[[0, 1, 2, 3, 5]].eq(0).all() and unsure[4] != 0
    # at the threshold itself a cell still counts: 1/2 * 1/2
    student = torch.zeros(1, 1, 6, requires_grad=True)
    DetSoft(confidence=0.25)(student, cell(0, 0, 1, 0, 0, 0)).backward()
    assert student.grad[0, 0, 2] != 0


def test_a_teacher_that_finds_nothing_teaches_objectness_alone():
    teacher, student = random(1, 8, 7, seed=1), torch.zeros(1, 8, 7, requires_grad=True)
    teacher[..., 4] = -40.0
    loss = DetSoft()(student, teacher)
    loss.backward()
    # 8 cells of ln 2: the teacher's own entropy is 0; divided by 1, for no weight is left
    assert loss.item() == pytest.approx(8 * LN2, rel=1e-5)
    assert student.grad[..., :4].eq(0).all() and student.grad[..., 5:].eq(0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_temperature_scales_logits_and_stands_squared_before_the_parts(temperature):
    # Objectness: T ln 3 / T is 3/4 again, and T^2 stands before the divergence
    student, teacher = cell(0, 0, 0, 0, 0, 0), cell(0, 0, 0, 0, temperature * LN3, 0)
    loss = DetSoft(**ONLY["objectness"], temperature=temperature)
    assert loss(student, teacher).item() == pytest.approx(temperature**2 * HAND, rel=1e-5)
    # d/ds T^2 KL = T (sigmoid(s/T) - sigmoid(t/T)) = T (1/2 - 3/4)
    student.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad[0, 0, 4].item() == pytest.approx(-temperature / 4, rel=1e-5)
    # The weight c is the teacher's own belief, without temperature, and the box part knows none
    box = [
        DetSoft(**ONLY["box"], temperature=t)(cell(0, 0, 0, 0, 0, 0), cell(0, 0, LN2, 0, LN3, LN3))
        for t in (1.0, temperature)
    ]
    assert box[0] == box[1]


def test_large_low_precision_outputs_are_finite():
    student = torch.tensor([[[300.0, 0, 50, 50, -60000, 60000]]], dtype=torch.float16, requires_grad=True)
    teacher = torch.tensor([[[-300.0, 0, -50, 50, 60000, 60000]]], dtype=torch.float16)
    loss = DetSoft()(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()


def test_other_cells_are_refused():
    for shape in ((1, 10, 7), (1, 8, 8), (2, 8, 7)):
        with pytest.raises(ValueError, match=r"the student's cells \[1, 8, 7\] and the teacher's .* differ"):
            DetSoft()(torch.zeros(1, 8, 7), torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectness": -1.0}, "objectness: -1.0 is no weight"),
        ({"box": float("inf")}, "box: inf is no weight"),
        ({"objectness": 0.0, "classification": 0.0, "box": 0.0}, "every weight is 0"),
        ({"confidence": 1.0}, r"confidence: 1.0 is not in \[0, 1\)"),
        ({"temperature": 0.0}, "temperature: 0.0 is not above 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DetSoft(**options)


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"confidence": 0.0}, {"box": 0.0}])
def test_with_a_mask_it_is_that_of_what_is_left_alone(options):
    student, teacher = random(2, 9, 8, seed=1).requires_grad_(), random(2, 9, 8, seed=2)
    teacher[..., 4:] += 1.0
    mask = random(2, 9, seed=3) > 0
    loss = DetSoft(**options)
    value = loss(student, teacher, None, mask)
    value.backward()
    expected = plain_formula(student.detach()[mask][None], teacher[mask][None], **options)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert student.grad[~mask].eq(0).all() and student.grad[mask][:, 4].ne(0).all()
    wild = torch.where(mask[..., None], teacher, 30.0)  # the teacher's values there do not matter
    assert loss(student, wild, None, mask).item() == pytest.approx(value.item(), rel=1e-6)
    assert loss(student, teacher, None, torch.ones_like(mask)).item() == pytest.approx(
        loss(student, teacher).item(), rel=1e-6
    )


def test_with_nothing_left_it_is_nothing():
    student, teacher = random(2, 9, 8, seed=1).requires_grad_(), random(2, 9, 8, seed=2)
    loss = DetSoft()(student, teacher, None, torch.zeros(2, 9, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and student.grad.eq(0).all()


def test_a_mask_by_hand():
    # Four cells of c = 9/16, one of them masked out: divided by 27/16
    student, teacher = cell(0, 0, 0, 0, 0, 0).repeat(2, 2, 1), cell(0, 0, LN2, 0, LN3, LN3).repeat(2, 2, 1)
    mask = torch.tensor([[True, False], [True, True]])
    expected = 3 * (HAND + 9 / 16 * HAND + 2 * 9 / 16 * 1 / 2) / (27 / 16)
    assert DetSoft()(student, teacher, None, mask).item() == pytest.approx(expected, rel=1e-5)
