import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

from multitask_kd.batch import CROWD, PAD
from multitask_kd.models.assign import _class_cost, one_hot, pairwise_iou, simota
from multitask_kd.models.dense_head import cells

CPU = torch.device("cpu")
AWAY = (1000.0, 1000.0, 1001.0, 1001.0)  # a predicted box that overlaps nothing


def grid():
    """4x4 cells of stride 8: cell 4 * row + column has its centre at (8 * column + 4, 8 * row + 4)."""
    return cells((32, 32), (8,), CPU)


def match(boxes, predicted, *, classes=None, objectness=None, class_logits=None, **options):
    """simota for one image; ``predicted`` maps cell -> box, other cells predict far away. Logits are equal
    unless given."""
    centres, scales = grid()
    cell_boxes = torch.tensor([[predicted.get(i, AWAY) for i in range(16)]])
    return simota(
        torch.tensor([boxes], dtype=torch.float32).reshape(1, -1, 4),
        torch.tensor([classes if classes is not None else [0] * len(boxes)]).reshape(1, -1),
        cell_boxes,
        torch.full((1, 16), 20.0) if objectness is None else objectness,
        torch.zeros(1, 16, 1) if class_logits is None else class_logits,
        centres,
        scales,
        **options,
    )


def chosen(assignment, image=0):
    return assignment.positive[image].nonzero().flatten().tolist()


# --- pieces


def test_pairwise_iou_against_torchvision():
    generator = torch.Generator().manual_seed(0)
    low = 50 * torch.rand(3, 30, 2, generator=generator)
    boxes = torch.cat([low, low + 1 + 30 * torch.rand(3, 30, 2, generator=generator)], dim=-1)
    a, b = boxes[:, :7], boxes[:, 7:]
    assert torch.allclose(pairwise_iou(a, b), torch.stack([box_iou(x, y) for x, y in zip(a, b, strict=True)]))


def test_pairwise_iou_by_hand_and_of_degenerate_boxes():
    a = torch.tensor([[[0.0, 0, 4, 4], [5, 5, 5, 5]]])
    b = torch.tensor([[[2.0, 0, 6, 4], [4, 0, 8, 4], [5, 5, 5, 5], [3, 3, 1, 1]]])
    # 8 of 16 + 16 - 8; they only touch; a point; a box turned inside out has no area
    assert pairwise_iou(a, b).tolist() == [[[pytest.approx(1 / 3), 0, 0, 0], [0, 0, 0, 0]]]


def test_class_cost_is_the_sum_of_binary_cross_entropies():
    generator = torch.Generator().manual_seed(1)
    objectness, logits = torch.randn(2, 6, generator=generator), 3 * torch.randn(2, 6, 4, generator=generator)
    classes = torch.tensor([[0, 3, 1], [2, 2, PAD]])
    cost = _class_cost(classes, objectness, logits)
    assert cost.shape == (2, 3, 6)
    p = (objectness.sigmoid()[..., None] * logits.sigmoid()).sqrt()
    for image in range(2):
        for box in range(3):
            if classes[image, box] < 0:
                continue
            for cell in range(6):
                truth = F.one_hot(classes[image, box], 4).float()
                expected = F.binary_cross_entropy(p[image, cell], truth, reduction="sum")
                assert cost[image, box, cell].item() == pytest.approx(expected.item(), rel=1e-4)


def test_class_cost_is_finite_for_certain_cells():
    logits = torch.tensor([[[200.0, -200.0]]])
    cost = _class_cost(torch.tensor([[0, 1]]), torch.tensor([[200.0]]), logits)
    assert torch.isfinite(cost).all() and cost[0, 0, 0] < 1e-4 and cost[0, 1, 0] > 20


def test_one_hot_makes_rows_of_zeros_of_padding():
    assert one_hot(torch.tensor([1, PAD, CROWD, 0]), 2).tolist() == [[0, 1], [0, 0], [0, 0], [1, 0]]


# --- whole cases worked by hand

BOX = [8.0, 8, 24, 24]  # holds the centres of cells 5, 6, 9, 10 (12 and 20 in x and y)


def of_iou(share):
    """A box of that IoU with BOX: the upper ``share`` of it."""
    return (8.0, 8.0, 24.0, 8 + 16 * share)


def test_one_box_takes_as_many_cells_as_its_ious_sum_to():
    # IoUs 1 + 3/4 + 1/2 + 1/4 = 2.5, so two cells; with equal class scores the two of highest IoU
    found = match([BOX], {5: of_iou(0.5), 6: of_iou(1.0), 9: of_iou(0.75), 10: of_iou(0.25)})
    assert chosen(found) == [6, 9]
    assert found.iou[0, [6, 9]].tolist() == pytest.approx([1.0, 0.75])
    assert found.iou[0].sum().item() == pytest.approx(1.75)
    assert found.box.eq(0).all()


def test_a_cell_that_scores_the_class_low_costs_more_than_one_that_overlaps_less():
    logits = torch.zeros(1, 16, 1)
    logits[0, 9] = -10.0
    # p = sqrt(sigmoid(0)) = .707 costs .35, p = sqrt(sigmoid(-10)) = .0067 costs 5.0.
    # Cell 9: 5.0 + 3 ln(4/3) = 5.86; cell 5: .35 + 3 ln 2 = 2.43
    predicted = {5: of_iou(0.5), 6: of_iou(1.0), 9: of_iou(0.75), 10: of_iou(0.25)}
    assert chosen(match([BOX], predicted, class_logits=logits)) == [5, 6]


def test_low_objectness_costs_too():
    objectness = torch.full((1, 16), 20.0)
    objectness[0, 9] = -10.0
    predicted = {5: of_iou(0.5), 6: of_iou(1.0), 9: of_iou(0.75), 10: of_iou(0.25)}
    assert chosen(match([BOX], predicted, objectness=objectness)) == [5, 6]


def test_at_least_one_cell_even_without_any_overlap():
    logits = torch.zeros(1, 16, 1)
    logits[0, 10] = 1.0  # the cheapest of four that overlap nothing
    found = match([BOX], {}, class_logits=logits)
    assert chosen(found) == [10]
    assert found.iou.eq(0).all()


def test_a_cell_outside_the_box_waits_until_those_inside_are_taken():
    # Every one of 16 cells predicts the box: IoUs of the best 10 sum to 10. Four lie inside, so six come from
    # outside, all within 2.5 strides of the centre. With candidates=4, only the four inside.
    everywhere = {i: of_iou(1.0) for i in range(16)}
    logits = torch.zeros(1, 16, 1)
    logits[0, 0] = 10.0  # the best score of all does not make up for being outside
    assert chosen(match([BOX], everywhere, class_logits=logits, candidates=4)) == [5, 6, 9, 10]
    ten = chosen(match([BOX], everywhere, class_logits=logits))
    assert len(ten) in (9, 10)  # ten IoUs of 1, less rounding
    assert {0, 5, 6, 9, 10} <= set(ten)


def test_a_cell_in_the_box_but_far_from_its_centre_waits_too():
    box = [
        0.0,
        0,
        32,
        8,
    ]  # cells 0..3; its centre is (16, 4); radius 1 stride = 8 pixels: |4 - 16| = 12 is outside
    found = match([box], {0: tuple(box), 1: (0.0, 0.0, 32.0, 4.0)}, radius=1.0)  # IoUs 1 + 1/2 -> one cell
    assert chosen(found) == [1]


def test_two_boxes_that_want_one_cell():
    # Only the centre (12, 12) of cell 5 lies in either. Cell 5 predicts the first exactly, and overlaps the
    # second by 7 * 7 / (64 + 64 - 49) = .62: it goes to the first, and the second is left without.
    first, second = [8.0, 8, 16, 16], [9.0, 9, 17, 17]
    found = match([first, second], {5: tuple(first)})
    assert chosen(found) == [5] and found.box[0, 5] == 0
    found = match([second, first], {5: tuple(first)})
    assert chosen(found) == [5] and found.box[0, 5] == 1
    assert found.iou[0, 5].item() == pytest.approx(1.0)


def test_two_boxes_of_two_classes_take_the_cells_that_score_their_class():
    logits = torch.full((1, 16, 2), -4.0)
    logits[0, 5, 1] = logits[0, 6, 0] = 4.0
    same = {5: of_iou(1.0), 6: of_iou(1.0)}
    # each box: IoUs 1 + 1 = 2 cells wanted, 5 and 6; each cell goes to the box of its class
    found = match([BOX, BOX], same, classes=[0, 1], class_logits=logits)
    assert chosen(found) == [5, 6]
    assert found.box[0, [5, 6]].tolist() == [1, 0]


def test_a_box_without_any_centre_inside_takes_a_cell_near_its_centre():
    box = [13.0, 13, 19, 19]  # centres lie at 12 and 20
    found = match([box], {10: tuple(box)})
    assert chosen(found) == [10]
    # ... and none when nothing is near: its centre is (16, 16), 4 pixels from the next centre
    assert chosen(match([box], {10: tuple(box)}, radius=0.4)) == []


@pytest.mark.parametrize("filler", [PAD, CROWD])
def test_padding_and_crowds_never_match(filler):
    predicted = {5: of_iou(0.5), 6: of_iou(1.0), 9: of_iou(0.75), 10: of_iou(0.25)}
    plain = match([BOX], predicted)
    found = match([BOX, BOX, [0.0, 0, 0, 0]], predicted, classes=[filler, 0, filler])
    assert chosen(found) == chosen(plain)
    assert found.box[0, chosen(found)].eq(1).all()
    assert torch.equal(found.iou, plain.iou)
    none = match([BOX], predicted, classes=[filler])
    assert not none.positive.any() and none.iou.eq(0).all() and none.box.eq(0).all()


def test_no_boxes_at_all():
    found = match([], {}, classes=[])
    assert found.positive.shape == found.box.shape == found.iou.shape == (1, 16)
    assert found.positive.dtype == torch.bool and found.box.dtype == torch.long
    assert not found.positive.any()


def test_fewer_cells_than_candidates():
    centres, scales = cells((8, 16), (8,), CPU)  # two cells
    box = torch.tensor([[[0.0, 0, 16, 8]]])
    found = simota(
        box,
        torch.tensor([[0]]),
        box.expand(1, 2, 4),
        torch.zeros(1, 2),
        torch.zeros(1, 2, 1),
        centres,
        scales,
    )
    assert found.positive.tolist() == [[True, True]]  # IoUs 1 + 1


# --- against loops

MARGIN = 0.05  # of cost; float32 resolves .008 at FAR


def reference(boxes, classes, predicted, objectness, logits, centres, scales, radius, candidates):
    """One image in plain Python and float64: {cell: box}, and the boxes whose choice hangs on rounding."""

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        overlap = max(w, 0) * max(h, 0)
        return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)

    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    costs, wants, close = {}, {}, set()
    for m, (box, label) in enumerate(zip(boxes, classes, strict=True)):
        if label < 0:
            continue
        pairs = []
        for n, ((x, y), stride) in enumerate(zip(centres, scales, strict=True)):
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            near = abs(x - middle[0]) < radius * stride and abs(y - middle[1]) < radius * stride
            if not (inside or near):
                continue
            overlap, cost = iou(box, predicted[n]), 0.0
            for c, logit in enumerate(logits[n]):
                p = math.sqrt(sigmoid(objectness[n]) * sigmoid(logit))
                cost -= math.log(p if c == label else 1 - p)
            cost += 3 * -math.log(overlap + 1e-8) + (0 if inside and near else 1e5)
            costs[m, n] = cost
            pairs.append((cost, n, overlap))
        total = sum(sorted((p[2] for p in pairs), reverse=True)[:candidates])
        k = max(1, int(total))
        pairs.sort()
        wants[m] = [n for _, n, _ in pairs[:k]]
        if abs(total - round(total)) < 1e-3 or (len(pairs) > k and pairs[k][0] - pairs[k - 1][0] < MARGIN):
            close.add(m)
    result = {}
    for n in range(len(centres)):
        rivals = sorted((costs[m, n], m) for m, cells_of in wants.items() if n in cells_of)
        if rivals:
            result[n] = rivals[0][1]
            if len(rivals) > 1 and rivals[1][0] - rivals[0][0] < MARGIN:
                close |= {rivals[0][1], rivals[1][1]}
    return result, close


@pytest.mark.parametrize(("seed", "most"), [(0, 1), (1, 4), (2, 12), (3, 30)])
def test_against_plain_loops(seed, most):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    count, class_count, strides, size = 3, 3, (8, 16), (64, 80)
    centres, scales = cells(size, strides, CPU)
    middle, side = rand(count, most, 2) * torch.tensor([80.0, 64.0]), 3 + 37 * rand(count, most, 2)
    boxes = torch.cat([middle - side / 2, middle + side / 2], dim=-1)
    classes = (rand(count, most) * class_count).long()
    classes[1, most // 2 :] = PAD
    if most > 2:
        classes[2, 1] = CROWD
    # each cell predicts a shaken copy of a box of its image, most of them the one whose centre is nearest
    distance = (centres[None, :, None] - middle[:, None]).abs().sum(-1)
    source = distance.argmin(-1)
    predicted = boxes.gather(1, source[..., None].expand(-1, -1, 4)).clone()
    wide = predicted[..., 2:] - predicted[..., :2]
    predicted[..., :2] += (rand(count, len(centres), 2) - 0.5) * wide * 0.6
    predicted[..., 2:] = predicted[..., :2] + wide * (0.6 + 0.8 * rand(count, len(centres), 2))
    objectness = 4 * rand(count, len(centres)) - 2
    logits = 6 * rand(count, len(centres), class_count) - 3

    def loops():
        args = (boxes, classes, predicted, objectness, logits)
        double = [[a[i].double().tolist() for a in args] for i in range(count)]
        return [reference(*one, centres.tolist(), scales.tolist(), 2.5, 10) for one in double]

    for _ in range(10):  # leave out the boxes whose outcome float32 cannot tell
        expected = loops()
        if not any(close for _, close in expected):
            break
        for image, (_, close) in enumerate(expected):
            classes[image, list(close)] = PAD
    assert not any(close for _, close in expected)
    real = int((classes >= 0).sum())
    assert real >= min(most, 8), "the case is empty"

    found = simota(boxes, classes, predicted, objectness, logits, centres, scales)
    overlap = pairwise_iou(boxes, predicted)
    for image, (pairs, _) in enumerate(expected):
        assert {n: int(found.box[image, n]) for n in chosen(found, image)} == pairs
        for n, m in pairs.items():
            assert found.iou[image, n] == overlap[image, m, n]
        rest = ~found.positive[image]
        assert found.iou[image, rest].eq(0).all() and found.box[image, rest].eq(0).all()
