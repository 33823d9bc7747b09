import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from multitask_kd.batch import IGNORE
from multitask_kd.data.loader import Truth
from multitask_kd.data.transforms import Geometry
from multitask_kd.tasks.segmentation import SegHead, Segmentation, class_counts

CLASSES = ("sky", "road", "tree")
LN3 = math.log(3)


def target(mask, labelled=None):
    mask = torch.as_tensor(mask)
    return {"mask": mask, "labelled": torch.tensor([True] * len(mask) if labelled is None else labelled)}


def ce(pred, goal, size=None, **options):
    task = Segmentation(CLASSES[: pred.shape[1]], (4,), **options)
    losses = task.losses(pred, goal, size or tuple(goal["mask"].shape[1:]))
    assert set(losses) == {"ce"}
    return losses["ce"]


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
    # two cells of 2x2: the left one holds three 0 and one 1, the right one three 1 and an ignored pixel; then only 2s
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
    logits, mask = noise(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(ce(logits, target(mask)), ce(logits, target(mask), resolution="image"))


def test_label_smoothing_by_hand():
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 0] = LN3
    # smoothing .2 over 2 classes: .9 of -ln 3/4 and .1 of -ln 1/4; the ignored pixel stays out
    expected = -0.9 * math.log(0.75) - 0.1 * math.log(0.25)
    assert ce(logits, target([[[0, IGNORE]]]), label_smoothing=0.2).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits(dtype):
    logits = (noise(1, 3, 4, 4) * 1000).to(dtype).requires_grad_()
    mask = torch.randint(0, 3, (1, 8, 8), generator=torch.Generator().manual_seed(2))
    loss = ce(logits, target(mask), resolution="image") + ce(logits, target(mask))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("options", [{"resolution": "full"}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Segmentation(CLASSES, (4,), **options)


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
    task = Segmentation(CLASSES, (4,))
    metric = task.metric()
    task.score(metric, prediction, Truth(0, geometry, truth, None, None, None, None))
    return metric.compute()


def blocks(height, width, side):
    """A mask of ``side`` pixel squares of the three classes."""
    rows, columns = np.arange(height) // side, np.arange(width) // side
    return ((rows[:, None] + columns) % 3).astype(np.uint8)


def test_perfect_prediction_scores_the_floor_and_full_marks():
    mask = torch.from_numpy(blocks(16, 24, 4)).long()[None]
    logits = sure(mask)
    assert ce(logits, target(mask)).item() < 1e-6
    task = Segmentation(CLASSES, (1,))
    geometry = Geometry((16, 24), (16, 24))
    prediction = task.restore(task.decode(logits, (16, 24))[0], geometry)
    assert prediction.dtype == torch.uint8 and prediction.shape == (16, 24)
    result = score(prediction, blocks(16, 24, 4), geometry)
    assert result["mIoU"] == 100 and result["pixel_accuracy"] == 100


def test_logits_of_the_heads_stride_come_back_at_the_original_size():
    # Original 64x96, letterboxed to 32x48 of an input of 32x64 (padded at the right), logits of stride 4.
    original, content, size = (64, 96), (32, 48), (32, 64)
    truth = blocks(*original, 32)
    small = np.full((8, 16), 1, np.uint8)
    small[:, :12] = truth[4::8, 4::8]
    task = Segmentation(CLASSES, (4,))
    decoded = task.decode(sure(torch.from_numpy(small).long()[None]), size)
    assert decoded.shape == (1, 3, 32, 64)
    prediction = task.restore(decoded[0], Geometry(original, content))
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
    prediction = Segmentation(CLASSES, (4,)).restore(logits, Geometry((6, 8), (6, 8)))  # two rows of padding
    assert torch.equal(prediction, logits[:, :6].argmax(0).to(torch.uint8))


def test_an_unlabelled_image_is_not_scored():
    assert score(torch.zeros(4, 4, dtype=torch.uint8), None, Geometry((4, 4), (4, 4)))["mIoU"] is None
