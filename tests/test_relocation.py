"""Predictions at a detector's own anchor points -> the student's cells."""

import math

import pytest
import torch

from multitask_kd.batch import DensePredictions
from multitask_kd.models.class_mapping import SURE
from multitask_kd.models.dense_head import cells, decode_boxes
from multitask_kd.models.relocation import by_location, to_dense

CPU = torch.device("cpu")
SIZE, STRIDES = (
    (20, 40),
    (8, 16),
)  # 3 x 5 cells of stride 8, the last row half outside, and 2 x 3 of stride 16
COUNT = 15 + 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def odds(p):
    return math.log(p / (1 - p))


def decoded(raw, size=SIZE, strides=STRIDES):
    return decode_boxes(raw, *cells(size, strides, CPU))


def dense(*rows, classes=2):
    """Rows of an anchor point's x, y, stride, box of 4, scores: one image."""
    rows = torch.tensor(rows, dtype=torch.float32)
    return DensePredictions(rows[None, :, 3:7], rows[None, :, 7 : 7 + classes], rows[:, :2], rows[:, 2])


def test_raw_outputs_as_boxes_and_scores_by_hand():
    raw = torch.zeros(1, COUNT, 7)
    raw[0, 6] = torch.tensor([0.5, -0.25, math.log(2), math.log(3), odds(0.5), odds(0.8), odds(0.1)])
    found = to_dense(raw, SIZE, STRIDES)
    # cell 6: row 1, column 1 of stride 8, centre (12, 12) + (4, -2), size 16 x 24
    assert torch.allclose(found.boxes[0, 6], torch.tensor([8.0, -2, 24, 22]), atol=1e-5)
    assert found.scores[0, 6].tolist() == pytest.approx([0.4, 0.05])
    assert found.anchor_points[6].tolist() == [12, 12] and found.strides.tolist() == [8.0] * 15 + [16.0] * 6
    assert found.anchor_points[15:].tolist() == [[8, 8], [24, 8], [40, 8], [8, 24], [24, 24], [40, 24]]
    assert torch.equal(
        to_dense(raw.bfloat16(), SIZE, STRIDES).boxes, to_dense(raw.bfloat16().float(), SIZE, STRIDES).boxes
    )


def test_one_anchor_point_by_hand():
    # (13, 9) lies in row 1, column 1 of stride 8: cell 6, centre (12, 12)
    raw, ignored = by_location(dense((13, 9, 8, 8, 4, 24, 12, 0.6, 0.15)), SIZE, STRIDES)
    assert raw.shape == (1, COUNT, 7) and ignored.shape == (1, COUNT)
    assert ignored.sum() == COUNT - 1 and not ignored[0, 6]
    # middle (16, 8), size 16 x 8; classes .6 / .6 (held at 1 - SURE) and .15 / .6
    expected = [0.5, -0.5, math.log(2), 0.0, odds(0.6), odds(1 - SURE), odds(0.25)]
    assert raw[0, 6].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert raw.isfinite().all()


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("size", [SIZE, (40, 20), (16, 16)])
def test_a_head_of_the_same_cells_comes_back(images, size):
    count = len(cells(size, STRIDES, CPU)[0])
    raw = random(images, count, 7)
    back, ignored = by_location(to_dense(raw, size, STRIDES), size, STRIDES)
    assert not ignored.any()
    assert torch.allclose(back[..., :4], raw[..., :4], atol=1e-4)
    score = raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()
    assert torch.allclose(back[..., 4:5].sigmoid() * back[..., 5:].sigmoid(), score, atol=2e-4)
    assert torch.allclose(back[..., 4].sigmoid(), score.amax(-1), atol=1e-5)


def test_twice_the_input_and_twice_the_strides_line_up_cell_for_cell():
    raw = random(2, COUNT, 7)
    own = to_dense(raw, (40, 80), (16, 32))
    scaled = own._replace(boxes=own.boxes / 2, anchor_points=own.anchor_points / 2, strides=own.strides / 2)
    back, ignored = by_location(scaled, SIZE, STRIDES)
    assert not ignored.any() and torch.allclose(back[..., :4], raw[..., :4], atol=1e-4)
    assert torch.allclose(decoded(back), decoded(raw), atol=1e-3)


def test_finer_anchor_points_share_a_cell_and_the_best_counts():
    """Twice the input at stride 8: stride 4 in the student's pixels, four anchor points a cell of stride 8."""
    raw = random(1, len(cells((40, 80), (8,), CPU)[0]), 6)
    own = to_dense(raw, (40, 80), (8,))
    back, ignored = by_location(
        own._replace(boxes=own.boxes / 2, anchor_points=own.anchor_points / 2, strides=own.strides / 2),
        SIZE,
        STRIDES,
    )
    assert ignored[0].tolist() == [False] * 15 + [True] * 6
    score = own.scores[0, :, 0].view(5, 10)
    for row in range(3):
        for column in range(5):
            block = score[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert back[0, 5 * row + column, 4].sigmoid().item() == pytest.approx(
                block.max().item(), rel=1e-4
            )


def test_of_several_anchors_the_best_of_each_image_counts():
    boxes = [(8, 8, 16, 16), (4, 8, 20, 16), (8, 4, 16, 20)]
    points = [(12, 12, 8, *box, 0.0) for box in boxes]
    found = dense(*points, classes=1)
    scores = torch.tensor([[0.2, 0.7, 0.6], [0.9, 0.1, 0.3], [0.0, 0.0, 0.1]])
    found = found._replace(boxes=found.boxes.repeat(3, 1, 1), scores=scores[..., None])
    raw, ignored = by_location(found, SIZE, STRIDES)
    assert not ignored[:, 6].any() and ignored.sum() == 3 * (COUNT - 1)
    assert torch.allclose(
        decoded(raw)[:, 6], torch.tensor([boxes[1], boxes[0], boxes[2]], dtype=torch.float32), atol=1e-4
    )
    assert raw[:, 6, 4].sigmoid().tolist() == pytest.approx([0.7, 0.9, 0.1], rel=1e-4)


@pytest.mark.parametrize(
    ("stride", "cell"),
    [(4, 6), (8, 6), (11, 6), (12, 15), (16, 15), (64, 15)],  # log2: 11.3 is in the middle of 8 and 16
)
def test_an_anchor_point_belongs_to_the_level_of_the_nearest_stride(stride, cell):
    _, ignored = by_location(dense((12, 12, stride, 8, 8, 16, 16, 0.5, 0.5)), SIZE, STRIDES)
    assert (~ignored[0]).nonzero().flatten().tolist() == [cell]


@pytest.mark.parametrize(
    ("x", "y", "cell"),
    [
        (0, 0, 0),
        (7.9, 7.9, 0),
        (8, 0, 1),
        (0, 8, 5),
        (39, 23, 14),
        (40, 0, None),
        (0, 24, None),
        (-0.5, 4, None),
        (4, -0.5, None),
    ],
)
def test_an_anchor_point_belongs_to_the_cell_that_it_lies_in(x, y, cell):
    raw, ignored = by_location(dense((x, y, 8, 8, 8, 16, 16, 0.5, 0.5)), SIZE, STRIDES)
    assert (~ignored[0]).nonzero().flatten().tolist() == ([] if cell is None else [cell])
    assert raw.isfinite().all()


def test_against_a_plain_loop():
    many = 200
    point = torch.rand(many, 2, generator=torch.Generator().manual_seed(1)) * 60 - 5
    stride = torch.tensor([6.0, 8, 10, 14, 20])[torch.arange(many) % 5]
    corner = random(2, many, 2, seed=2) * 10
    boxes = torch.cat(
        [corner, corner + 1 + 20 * torch.rand(2, many, 2, generator=torch.Generator().manual_seed(3))], -1
    )
    scores = torch.rand(2, many, 3, generator=torch.Generator().manual_seed(4))
    raw, ignored = by_location(DensePredictions(boxes, scores, point, stride), SIZE, STRIDES)
    grids = {8: (0, 3, 5), 16: (15, 2, 3)}  # first cell, rows, columns
    for image in range(2):
        best = {}
        for k in range(many):
            level = 8 if stride[k] < math.sqrt(8 * 16) else 16
            first, rows, columns = grids[level]
            column, row = math.floor(point[k, 0] / level), math.floor(point[k, 1] / level)
            if 0 <= row < rows and 0 <= column < columns:
                cell = first + row * columns + column
                if cell not in best or scores[image, k].max() > scores[image, best[cell]].max():
                    best[cell] = k
        assert len(best) > 10 and (~ignored[image]).nonzero().flatten().tolist() == sorted(best)
        for cell, k in best.items():
            assert torch.allclose(decoded(raw)[image, cell], boxes[image, k], atol=1e-3)
            top = scores[image, k].max()
            expected = torch.cat([top[None], scores[image, k] / top])
            assert torch.allclose(raw[image, cell, 4:].sigmoid(), expected.clamp(SURE, 1 - SURE), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_extreme_predictions_are_finite(dtype):
    found = dense(
        (12, 12, 8, 8, 8, 16, 16, 1.0, 0.0), (4, 4, 8, 5, 5, 5, 3, 0.0, 0.0)
    )  # sure; and a box of no width, of score 0
    raw, ignored = by_location(
        DensePredictions(found.boxes.to(dtype), found.scores.to(dtype), found.anchor_points, found.strides),
        SIZE,
        STRIDES,
    )
    assert raw.dtype == torch.float32 and raw.isfinite().all()
    assert not ignored[0, 0] and not ignored[0, 6]
    assert raw[0, 6, 4:].tolist() == pytest.approx([odds(1 - SURE), odds(1 - SURE), odds(SURE)], rel=1e-2)
    assert raw[0, 0, 2].item() == pytest.approx(math.log(1e-3 / 8), rel=1e-4)
    some = dense((12, 12, 8, 8, 8, 16, 16, 0.3, 0.7))
    some = some._replace(boxes=some.boxes.to(dtype), scores=some.scores.to(dtype))
    exact = some._replace(boxes=some.boxes.float(), scores=some.scores.float())
    assert torch.equal(by_location(some, SIZE, STRIDES)[0], by_location(exact, SIZE, STRIDES)[0])
