"""Finished detections as soft labels. A cell is dx, dy, log w, log h, objectness, classes."""

import math

import pytest
import torch

from multitask_kd.batch import PAD, CellPredictions, PaddedDetections
from multitask_kd.losses.det_boxes import DetBoxes
from multitask_kd.models.assign import simota
from multitask_kd.models.dense_head import cells, decode_boxes
from multitask_kd.tasks.detection import Detection

CPU = torch.device("cpu")
SIZE, STRIDES = (48, 64), (8, 16)  # 6 x 8 and 3 x 4 cells
COUNT = 48 + 12
CLASSES = 3
CENTRES, SCALES = cells(SIZE, STRIDES, CPU)
NONE = PaddedDetections(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.long))
LN2 = math.log(2)


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(*images):
    """Rows of x1, y1, x2, y2, score, class by image."""
    most = max(map(len, images))
    rows = torch.tensor(
        [[*image, *[(0, 0, 0, 0, 0, PAD)] * (most - len(image))] for image in images], dtype=torch.float32
    )
    return PaddedDetections(rows[..., :4], rows[..., 4], rows[..., 5].long())


def loss(known=None, **options):
    """(raw outputs, detections, target) -> the loss as a task compares them. known: the teacher's classes."""
    made, task = DetBoxes(**options), Detection("det", ("a", "b", "c"), STRIDES)
    assert made.form in task.forms

    def value(raw, teacher, target=None):
        shared = {"ignore_mask": None, "target": target, "size": SIZE, "form": made.form}
        pair = task.comparable(raw, teacher, known=known, **shared)
        return made(pair.student, pair.teacher, target, pair.mask)

    return value


def compared(raw):
    """The student as the loss itself is given it."""
    return CellPredictions(raw, CENTRES, SCALES)


def perfect(teacher):
    """Raw outputs with the teacher's boxes and classes, and its scores as objectness of matched cells."""
    raw = torch.full((len(teacher.boxes), COUNT, 5 + CLASSES), -12.0)
    raw[..., :4] = 0
    for i, (boxes, scores, classes) in enumerate(zip(*teacher, strict=True)):
        for box, score, kind in zip(boxes, scores, classes.tolist(), strict=True):
            if kind < 0:
                continue
            inside = ((box[:2] < CENTRES) & (box[2:] > CENTRES)).all(-1)
            raw[i, inside, :2] = ((box[:2] + box[2:]) / 2 - CENTRES[inside]) / SCALES[inside, None]
            raw[i, inside, 2:4] = ((box[2:] - box[:2]) / SCALES[inside, None]).log()
            raw[i, inside, 4] = score.clamp(max=1 - 1e-5).logit()
            raw[i, inside, 5 + kind] = 12.0
    match = assigned(raw, teacher)
    raw[..., 4] = torch.where(match.positive, raw[..., 4], -12.0)
    return raw


def assigned(raw, teacher, confidence=0.3):
    classes = torch.where(teacher.scores >= confidence, teacher.classes, PAD)
    return simota(
        teacher.boxes, classes, decode_boxes(raw, CENTRES, SCALES), raw[..., 4], raw[..., 5:], CENTRES, SCALES
    )


TWO = found([(8, 4, 40, 36, 0.9, 0), (40, 20, 60, 44, 0.6, 2)], [(10, 10, 30, 30, 0.5, 1)])


def plain_formula(
    raw, teacher, *, box=5.0, objectness=1.0, classification=1.0, confidence=0.3, doubt=0.1, known=None
):
    """The documented formula in Python's float64, cell by cell, given the assignment."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731

    def bce(x, target):
        return -target * math.log(sigmoid(x)) - (1 - target) * math.log(1 - sigmoid(x))

    def overlap(a, b):
        area = lambda c: (c[2] - c[0]) * (c[3] - c[1])  # noqa: E731
        inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = area(a) + area(b) - inter
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        return inter / union, inter / union - (hull - union) / hull

    # a teacher that lacks classes: both sides have the known ones alone, and are matched by them
    known = list(range(CLASSES) if known is None else known)
    numbers = torch.tensor([*(known.index(k) if k in known else PAD for k in range(CLASSES)), PAD])
    reduced = teacher._replace(classes=numbers[teacher.classes])
    match = assigned(raw[..., [*range(5), *(5 + k for k in known)]], reduced, confidence)
    total = weights = 0.0
    for i in range(len(raw)):
        rows = list(
            zip(
                teacher.boxes[i].tolist(),
                teacher.scores[i].tolist(),
                teacher.classes[i].tolist(),
                strict=True,
            )
        )
        for n in range(COUNT):
            cell = raw[i, n].double().tolist()
            (x, y), s = CENTRES[n].tolist(), SCALES[n].item()
            mx, my, w, h = x + cell[0] * s, y + cell[1] * s, s * math.exp(cell[2]), s * math.exp(cell[3])
            own = (mx - w / 2, my - h / 2, mx + w / 2, my + h / 2)
            if match.positive[i, n]:
                truth, score, kind = rows[match.box[i, n]]
                iou, giou = overlap(own, truth)
                total += score * box * (1 - giou) + objectness * bce(cell[4], score)
                total += (
                    score * classification * sum(bce(cell[5 + k], iou if k == kind else 0.0) for k in known)
                )
                weights += score
            else:
                doubted = any(
                    doubt <= p < confidence and k >= 0 and b[0] < x < b[2] and b[1] < y < b[3]
                    for b, p, k in rows
                )
                lacking = max(range(CLASSES), key=lambda k: cell[5 + k]) not in known
                total += 0.0 if doubted or lacking else objectness * bce(cell[4], 0.0)
    return total / max(weights, len(raw))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"box": 0.0},
        {"objectness": 0.0, "classification": 3.0},
        {"confidence": 0.55},
        {"confidence": 0.7, "doubt": 0.55},
    ],
)
@pytest.mark.parametrize("known", [None, (0, 2)])
def test_against_the_formula_in_float64(options, known):
    raw = random(2, COUNT, 5 + CLASSES, seed=3)
    teacher = found([(8, 4, 40, 36, 0.9, 0), (40, 20, 60, 44, 0.6, 2)], [(10, 10, 30, 30, 0.2, 2)])
    expected = plain_formula(raw, teacher, known=known, **options)
    assert loss(known, **options)(raw, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_sure_detections_weigh_as_labels_do():
    """At score 1 the loss is the hard loss, with its weights."""
    raw = random(2, COUNT, 5 + CLASSES, seed=3)
    teacher = TWO._replace(scores=(TWO.classes >= 0).float())
    task = Detection("det", ("a", "b", "c"), STRIDES)
    target = {"boxes": teacher.boxes, "classes": teacher.classes, "labelled": torch.tensor([True, True])}
    hard = task.losses(raw, target, SIZE)
    expected = sum(task.weights[name] * value for name, value in hard.items())
    assert loss()(raw, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_detections_every_cell_learns_that_there_is_nothing():
    raw = torch.zeros(2, COUNT, 5 + CLASSES, requires_grad=True)
    empty = found([], [(0, 0, 0, 0, 0, PAD)])
    for teacher in (NONE, empty):
        raw.grad = None
        value = loss()(raw, teacher)
        value.backward()
        # ln 2 a cell, 2 * 60 cells, divided by 2 images
        assert value.item() == pytest.approx(COUNT * LN2, rel=1e-5)
        assert raw.grad[..., :4].eq(0).all() and raw.grad[..., 5:].eq(0).all()
        assert torch.allclose(raw.grad[..., 4], torch.tensor(0.5 / 2))
    one = loss()(raw[:1].detach(), PaddedDetections(*(t[:1] for t in NONE)))
    assert one.item() == pytest.approx(COUNT * LN2, rel=1e-5)


def test_padding_adds_nothing():
    raw = random(2, COUNT, 5 + CLASSES, seed=3)
    more = PaddedDetections(*(torch.cat([t, t[:, :1].expand_as(t[:, :1])], 1) for t in TWO))
    more.classes[:, -1] = PAD  # a row with a box and a score, but of no class
    assert loss()(raw, more).item() == loss()(raw, TWO).item()
    unsure = more._replace(scores=more.scores.clone())
    unsure.scores[:, -1] = 0.2
    assert loss()(raw, unsure).item() == loss()(raw, TWO).item()


def test_a_perfect_prediction_scores_less_than_any_other():
    raw = perfect(TWO)
    least = loss()(raw, TWO).item()
    # what is left is the entropy of the scores: objectness .9, .6, .5 on the matched cells
    match = assigned(raw, TWO)
    p = TWO.scores.gather(1, match.box)[match.positive].double()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum() / max(2, p.sum().item())
    assert least == pytest.approx(entropy.item(), rel=5e-3)
    for column in range(4):
        for shift in (-0.3, -0.1, 0.1, 0.3):
            other = raw.clone()
            other[..., column] += shift
            assert loss()(other, TWO).item() > least + 1e-3, (column, shift)
    for change in (-0.5, 0.5):
        other = raw.clone()
        other[..., 4] += change * match.positive
        assert loss()(other, TWO).item() > least + 1e-3
    wrong = raw.clone()
    wrong[..., 5:] = wrong[..., 5:].roll(1, -1)
    assert loss()(wrong, TWO).item() > least + 1
    swapped = perfect(TWO._replace(boxes=TWO.boxes[..., [1, 0, 3, 2]]))
    assert loss()(swapped, TWO).item() > least + 0.1


def test_the_gradient_pulls_box_objectness_and_class_of_a_matched_cell_to_the_teachers():
    raw = perfect(TWO)
    match = assigned(raw, TWO)
    for column, shift in ((0, 0.2), (1, -0.2), (2, 0.2), (3, -0.2)):
        other = raw.clone()
        other[..., column] += shift
        other.requires_grad_()
        loss()(other, TWO).backward()
        same = assigned(other.detach(), TWO).positive & match.positive
        assert same.any() and (other.grad[..., column][same] * shift > 0).all()
    for below, sign in ((-1.0, -1), (1.0, 1)):  # the objectness goes to the score, from below and from above
        other = raw.clone()
        other[..., 4] += below * match.positive
        other.requires_grad_()
        loss()(other, TWO).backward()
        same = assigned(other.detach(), TWO).positive & match.positive
        assert same.any() and (other.grad[..., 4][same] * sign > 0).all()


def test_learning_by_it_finds_the_teachers_boxes():
    raw = torch.zeros(2, COUNT, 5 + CLASSES)
    raw[..., 4:] = -2.0
    raw.requires_grad_()
    made, optimizer = loss(), torch.optim.Adam([raw], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        made(raw, TWO).backward()
        optimizer.step()
    decoded = Detection("det", ("a", "b", "c"), STRIDES).decode(raw, SIZE, score_threshold=0.3)
    for i, image in enumerate(decoded):
        there = TWO.classes[i] >= 0
        assert image.classes.tolist() == TWO.classes[i][there].tolist()
        assert (image.boxes - TWO.boxes[i][there]).abs().max() < 1.0
        assert torch.allclose(image.scores, TWO.scores[i][there], atol=0.08)


def test_doubtful_detections_pull_neither_up_nor_down():
    raw = random(2, COUNT, 5 + CLASSES, seed=3).requires_grad_()
    doubtful = found([(8, 4, 40, 36, 0.2, 0)], [(8, 4, 40, 36, 0.05, 0)])
    loss()(raw, doubtful).backward()
    inside = ((torch.tensor([8.0, 4]) < CENTRES) & (torch.tensor([40.0, 36]) > CENTRES)).all(-1)
    assert raw.grad[0, inside].eq(0).all() and raw.grad[0, ~inside, 4].gt(0).all()
    assert raw.grad[1, :, 4].gt(0).all()  # below doubt there is nothing
    assert raw.grad[..., :4].eq(0).all() and raw.grad[..., 5:].eq(0).all()
    # at the borders: a score of doubt is doubtful, one of confidence is a label
    for score, pulled in ((0.1, False), (0.3, True)):
        raw.grad = None
        loss(doubt=0.1, confidence=0.3)(raw, found([(8, 4, 40, 36, score, 0)], [])).backward()
        assert (
            raw.grad[0, inside, 4].ne(0).any().item() is pulled
            and raw.grad[0, :, :4].ne(0).any().item() is pulled
        )
    # a sure detection in the same place keeps its cells
    raw.grad = None
    loss()(raw, found([(8, 4, 40, 36, 0.2, 0), (8, 4, 40, 36, 0.9, 1)], [])).backward()
    assert raw.grad[0, :, :4].ne(0).any() and raw.grad[0, inside, 4].eq(0).any()


def test_classes_that_the_teacher_lacks_learn_nothing_nor_do_cells_that_may_show_them():
    raw = random(2, COUNT, 5 + CLASSES, seed=3).requires_grad_()
    teacher = found([(8, 4, 40, 36, 0.9, 0)], [])
    target = {
        "boxes": torch.tensor([[[0.0, 32, 24, 48]]] * 2),
        "classes": torch.tensor([[1], [1]]),
        "labelled": torch.tensor([False, True]),
    }
    loss((0, 2))(raw, teacher, target).backward()
    assert raw.grad[..., 6].eq(0).all()
    taken = raw[..., 5:].argmax(-1) == 1
    labelled = ((torch.tensor([0.0, 32]) < CENTRES) & (torch.tensor([24.0, 48]) > CENTRES)).all(-1)
    positive = assigned(
        raw.detach()[..., [0, 1, 2, 3, 4, 5, 7]], teacher
    ).positive  # class 0 is number 0 here too
    ignored = taken | (labelled & torch.tensor([[False], [True]]))
    assert (
        raw.grad[..., 4][ignored & ~positive].eq(0).all()
        and raw.grad[..., 4][~ignored | positive].ne(0).all()
    )
    assert positive.any() and (ignored & ~positive).any()
    assert raw.grad[..., 5][positive].ne(0).all() and raw.grad[..., 7][positive].ne(0).all()


def test_cells_are_matched_by_the_known_classes_alone():
    """The student's probabilities of classes that the teacher lacks change neither match nor loss."""
    raw, teacher = (
        random(2, COUNT, 5 + CLASSES, seed=3),
        found([(8, 4, 40, 36, 0.9, 2)], [(40, 20, 60, 44, 0.6, 0)]),
    )
    raw[..., 6] = -9.0
    other = raw.clone()
    other[..., 6] = raw[..., [5, 7]].amax(-1) - 0.01  # as likely as can be and not the likeliest
    assert loss((0, 2))(other, teacher).item() == loss((0, 2))(raw, teacher).item()
    assert loss()(other, teacher).item() != pytest.approx(loss()(raw, teacher).item(), rel=1e-3)


def test_a_detection_of_a_class_that_no_teacher_knows_is_none():
    raw = random(2, COUNT, 5 + CLASSES, seed=3)
    unknown = found([(8, 4, 40, 36, 0.9, 1), (40, 20, 60, 44, 0.2, 1)], [(10, 10, 30, 30, 0.5, 0)])
    alone = found([], [(10, 10, 30, 30, 0.5, 0)])
    assert loss((0, 2))(raw, unknown).item() == loss((0, 2))(raw, alone).item()


def test_masked_out_cells_do_not_learn_that_there_is_nothing():
    raw = random(2, COUNT, 5 + CLASSES, seed=3).requires_grad_()
    mask = random(2, COUNT, seed=4) > 0
    positive = assigned(raw.detach(), TWO).positive
    value = DetBoxes()(compared(raw), TWO, None, mask)
    value.backward()
    assert raw.grad[~mask & ~positive].eq(0).all() and raw.grad[mask & ~positive][:, 4].ne(0).all()
    # what a detection is matched to learns it all the same
    assert (positive & ~mask).any() and raw.grad[positive & ~mask][:, [0, 4, 5]].ne(0).any(-1).all()
    # in float64: the background that is masked out is missing, and the divisor is the same
    logits, weight = (
        raw.detach()[..., 4].double(),
        TWO.scores.double().gather(1, assigned(raw.detach(), TWO).box) * positive,
    )
    lost = (torch.nn.functional.softplus(logits) * (~mask & ~positive)).sum() / max(2.0, weight.sum().item())
    full = DetBoxes()(compared(raw), TWO, None, torch.ones_like(mask)).item()
    assert full == DetBoxes()(compared(raw), TWO).item() == loss()(raw, TWO).item()
    assert value.item() == pytest.approx(full - lost.item(), rel=1e-4)


def test_with_nothing_found_and_nothing_left_it_is_nothing():
    raw = random(2, COUNT, 5 + CLASSES, seed=3).requires_grad_()
    value = DetBoxes()(compared(raw), NONE, None, torch.zeros(2, COUNT, dtype=torch.bool))
    value.backward()
    assert value.item() == 0 and raw.grad.eq(0).all()


def test_the_weight_of_a_detection_is_its_score():
    """Two images of one object each, with scores .8 and .4, in the same place: gradients 2 to 1."""
    raw = random(1, COUNT, 5 + CLASSES, seed=3).repeat(2, 1, 1).requires_grad_()
    loss(objectness=0.0)(raw, found([(8, 4, 40, 36, 0.8, 0)], [(8, 4, 40, 36, 0.4, 0)])).backward()
    assert raw.grad[0].ne(0).any() and torch.allclose(raw.grad[0], 2 * raw.grad[1], rtol=1e-4, atol=1e-9)


def test_more_detections_do_not_weigh_more():
    """The sum is divided by the scores of the matched cells, where they are more than the images."""
    raw = random(1, COUNT, 5 + CLASSES, seed=3)
    only = {"objectness": 0.0, "classification": 0.0, "box": 1.0}
    teacher = found([(8, 4, 40, 36, 0.9, 0), (40, 20, 60, 44, 0.6, 2)])
    doubled = [PaddedDetections(*(torch.cat([t] * n) for t in teacher)) for n in (1, 4)]
    few, many = (loss(**only)(raw.repeat(n, 1, 1), t).item() for n, t in zip((1, 4), doubled, strict=True))
    assert many == pytest.approx(few, rel=1e-5) and 0 < few < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(dtype):
    raw = random(2, COUNT, 5 + CLASSES, seed=3)
    teacher = PaddedDetections(TWO.boxes.to(dtype), TWO.scores.to(dtype), TWO.classes)
    own = raw.to(dtype).requires_grad_()
    value = loss()(own, teacher)
    value.backward()
    assert value.dtype == torch.float32 and own.grad.isfinite().all()
    exact = PaddedDetections(teacher.boxes.float(), teacher.scores.float(), teacher.classes)
    assert value.item() == loss()(own.detach().float(), exact).item()
    wild = torch.full((2, COUNT, 5 + CLASSES), 300.0).requires_grad_()
    loss()(wild, TWO).backward()
    assert wild.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectness": -1.0}, "objectness: -1.0 is no weight"),
        ({"box": float("nan")}, "box: nan is no weight"),
        ({"objectness": 0.0, "classification": 0.0, "box": 0.0}, "every weight is 0"),
        ({"confidence": 0.05}, "doubt, confidence: 0.1 and 0.05 must rise"),
        ({"confidence": 1.5}, "must rise from 0 to 1"),
        ({"doubt": -0.1}, "must rise from 0 to 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DetBoxes(**options)
