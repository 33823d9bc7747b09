"""What a soft loss compares of two predictions, and where: ``Task.comparable`` of maps and of cells."""

import pytest
import torch

from multitask_kd.batch import IGNORE, PAD
from multitask_kd.losses.cwd import CWD
from multitask_kd.losses.det_mse import DetMSE
from multitask_kd.losses.det_soft import DetSoft
from multitask_kd.losses.kl import KL
from multitask_kd.models.class_mapping import UNKNOWN
from multitask_kd.models.dense_head import cells
from multitask_kd.models.maps import mask_at
from multitask_kd.tasks.detection import Detection
from multitask_kd.tasks.semantic import Semantic

SIZE, STRIDES = (24, 40), (8,)  # 3 x 5 cells
MAPS = [KL(), KL(temperature=3.0, reduction="mean"), CWD(), CWD(tau=4.0)]
CELLS = [
    DetMSE(),
    DetMSE(parts="separate"),
    DetMSE(form="decoded", weighting="teacher"),
    DetSoft(confidence=0.0),
    DetSoft(temperature=2.0),
]


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(losses):
    return [f"{type(loss).__name__}{i}" for i, loss in enumerate(losses)]


def pair(own, other, ignored=None, target=None, known=None):
    """The comparable parts of two maps [B,C,h,w], or of two predictions of cells [B,N,4+1+C]."""
    names = [f"c{i}" for i in range(own.shape[1] if own.dim() == 4 else own.shape[2] - 5)]
    task = Semantic("seg", names, STRIDES) if own.dim() == 4 else Detection("det", names, STRIDES)
    return task.comparable(own, other, ignore_mask=ignored, target=target, size=SIZE, known=known, form="")


def value(loss, found):
    return loss(found.student, found.teacher, None, found.mask)


def seg_target(*rows, labelled=True):
    """One image of 6 x 10 pixels: 2 x 2 pixels a cell."""
    mask = torch.tensor(rows, dtype=torch.uint8).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return {"mask": mask[None], "labelled": torch.tensor([labelled])}


def places(mask):
    """The indices of what is left out."""
    return (~mask).nonzero().tolist()


def test_with_every_class_known_and_nothing_ignored_both_stay_as_they_are():
    maps = random(2, 3, 3, 5), random(2, 3, 3, 5, seed=1)
    for own, other in (maps, (random(2, 15, 8), random(2, 15, 8, seed=1))):
        found = pair(own, other)
        assert found.student is own and found.teacher is other and found.mask is None


def test_only_the_known_classes_are_compared():
    own, other = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1)
    found = pair(own, other, known=(0, 2))
    assert torch.equal(found.student, own[:, [0, 2]]) and torch.equal(found.teacher, other[:, [0, 2]])
    assert found.mask is None  # without labels nothing is known to be of another class
    own, other = random(2, 15, 9), random(2, 15, 9, seed=1)
    own[..., 5] = 50.0  # the student takes every cell for class 0
    found = pair(own, other, known=(0, 2))
    assert torch.equal(found.student, own[..., [0, 1, 2, 3, 4, 5, 7]]) and found.mask.all()
    assert torch.equal(found.teacher, other[..., [0, 1, 2, 3, 4, 5, 7]])


@pytest.mark.parametrize("loss", MAPS, ids=ids(MAPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_no_gradient_where_the_teacher_is_ignored_nor_to_classes_it_lacks(loss, dtype):
    own, other = random(2, 4, 3, 5).requires_grad_(), random(2, 4, 3, 5, seed=1)
    other[:, 1] = UNKNOWN
    ignored = random(2, 3, 5, seed=2) > 0.5
    assert ignored.any() and not ignored.all()
    found = pair(own, other.to(dtype), ignored, known=(0, 2, 3))
    assert torch.equal(found.mask, ~ignored)
    value(loss, found).backward()
    assert own.grad[:, 1].eq(0).all()
    assert own.grad.movedim(1, -1)[ignored].eq(0).all()
    assert own.grad.movedim(1, -1)[~ignored][:, [0, 2, 3]].ne(0).any(-1).all()
    everywhere = own.detach().clone().requires_grad_()
    nothing = value(loss, pair(everywhere, other.to(dtype), torch.ones_like(ignored)))
    nothing.backward()
    assert nothing.item() == 0 and everywhere.grad.eq(0).all()


@pytest.mark.parametrize("loss", CELLS, ids=ids(CELLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cells_no_gradient_where_the_teacher_is_ignored_nor_to_classes_it_lacks(loss, dtype):
    own, other = random(2, 15, 9), random(2, 15, 9, seed=1)
    other[..., 6] = UNKNOWN
    ignored = random(2, 15, seed=2) > 0.5
    own.requires_grad_()
    found = pair(own, other.to(dtype), ignored, known=(0, 2, 3))
    value(loss, found).backward()
    left_out = ignored | (own[..., 5:].argmax(-1) == 1)
    assert ignored.any() and (left_out & ~ignored).any() and not left_out.all()
    assert torch.equal(found.mask, ~left_out)
    assert own.grad[..., 6].eq(0).all() and own.grad[left_out].eq(0).all()
    assert own.grad[~left_out][:, [4, 5, 7, 8]].ne(0).any(-1).all()
    # what is left out is in neither the sum nor the divisor
    if isinstance(loss, DetMSE) and loss.weighting == "none" and loss.parts == "together":
        alone = (own - other.to(dtype))[..., [0, 1, 2, 3, 4, 5, 7, 8]][~left_out].square().mean()
        assert value(loss, found).item() == pytest.approx(alone.item(), rel=1e-5)


def test_the_gradient_elsewhere_is_that_of_the_loss_alone():
    own, other = random(1, 3, 3, 5).requires_grad_(), random(1, 3, 3, 5, seed=1)
    ignored = torch.zeros(1, 3, 5, dtype=torch.bool)
    ignored[0, 1, 2] = True
    (grad,) = torch.autograd.grad(value(KL(), pair(own, other, ignored)), own)
    (full,) = torch.autograd.grad(KL()(own, other), own)
    # 14 of 15 pixels are left: each counts a fourteenth
    assert torch.allclose(grad[:, :, ~ignored[0]], full[:, :, ~ignored[0]] * 15 / 14, atol=1e-8)
    assert full[0, :, 1, 2].ne(0).all()


def test_maps_labels_of_a_class_that_the_teacher_lacks_are_left_out():
    own, other = random(1, 4, 3, 5), random(1, 4, 3, 5, seed=1)
    target = seg_target([0, 1, 2, 3, IGNORE], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0])
    target["mask"][0, 3, 7] = 1  # one pixel of the four of row 1, column 3
    found = pair(own, other, target=target, known=(0, 2, 3))
    expected = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(~found.mask[0], expected)
    found = pair(own, other, target={**target, "labelled": torch.tensor([False])}, known=(0, 2, 3))
    assert found.mask.all()
    # where the teachers know every class the labels are of no matter
    assert pair(own, other, target=target).mask is None


def test_what_is_ignored_adds_to_what_the_labels_leave_out():
    own, other = random(1, 4, 3, 5), random(1, 4, 3, 5, seed=1)
    target = seg_target([1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0])
    ignored = torch.zeros(1, 3, 5, dtype=torch.bool)
    ignored[0, 2, 4] = True
    found = pair(own, other, ignored, target, known=(0, 2, 3))
    assert places(found.mask) == [[0, 0, 0], [0, 2, 4]]


def test_cells_in_a_labelled_box_of_a_class_that_the_teacher_lacks_are_left_out():
    own, other = random(2, 15, 8), random(2, 15, 8, seed=1)
    own[..., 5] = 50.0
    boxes = torch.tensor([[[0.0, 0, 16, 8], [24, 8, 40, 24]]]).repeat(2, 1, 1)
    classes, labelled = torch.tensor([[1, 0], [1, PAD]]), torch.tensor([True, False])
    target = {"boxes": boxes, "classes": classes, "labelled": labelled}
    # the first box holds the centres (4, 4) and (12, 4); the second image is not labelled
    assert places(pair(own, other, target=target, known=(0, 2)).mask) == [[0, 0], [0, 1]]
    centres, _ = cells(SIZE, STRIDES, torch.device("cpu"))
    assert centres[:2].tolist() == [[4, 4], [12, 4]]
    none = {
        "boxes": torch.zeros(2, 0, 4),
        "classes": torch.zeros(2, 0, dtype=torch.long),
        "labelled": labelled,
    }
    assert pair(own, other, target=none, known=(0, 2)).mask.all()


def test_the_teachers_map_is_brought_to_the_students():
    own, other = random(2, 3, 3, 5), random(2, 3, 6, 10, seed=1)
    found = pair(own, other)
    means = other.unflatten(3, (5, 2)).unflatten(2, (3, 2)).mean((3, 5))
    assert found.student is own and torch.allclose(found.teacher, means, atol=1e-6)
    ignored = torch.zeros(2, 6, 10, dtype=torch.bool)
    ignored[0, 3, 8] = True  # a cell is ignored where any of it is
    assert places(pair(own, other, ignored).mask) == [[0, 1, 4]]
    small = torch.zeros(2, 3, 5, dtype=torch.bool)
    small[1, 2, 4] = True
    found = pair(other, own, small)
    assert found.teacher.shape == other.shape
    assert places(found.mask) == [[1, 4, 8], [1, 4, 9], [1, 5, 8], [1, 5, 9]]
    assert mask_at(small, (3, 5)) is small


def test_neither_gets_a_gradient_through_the_other():
    own, other = random(1, 3, 3, 5).requires_grad_(), random(1, 3, 3, 5, seed=1)
    found = pair(own, other, torch.ones(1, 3, 5, dtype=torch.bool), known=(0, 2))
    assert not found.teacher.requires_grad and found.student.requires_grad
    found.student.sum().backward()
    assert own.grad[:, [0, 2]].eq(1).all() and own.grad[:, 1].eq(0).all()
    assert value(KL(), found).item() == 0
