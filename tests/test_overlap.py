"""Where student and teacher can be compared."""

import pytest
import torch

from multitask_kd.batch import IGNORE, PAD
from multitask_kd.distill.class_mapping import UNKNOWN
from multitask_kd.distill.overlap import Comparable
from multitask_kd.losses.cwd import CWD
from multitask_kd.losses.det_mse import DetMSE
from multitask_kd.losses.det_soft import DetSoft
from multitask_kd.losses.kl import KL
from multitask_kd.models.dense_head import cells

SIZE, STRIDES = (24, 40), (8,)  # 3 x 5 cells
MAPS = [KL(), KL(temperature=3.0, reduction="mean"), CWD(), CWD(tau=4.0)]
CELLS = [DetMSE(), DetMSE(form="decoded", weighting="teacher"), DetSoft(confidence=0.0), DetSoft(temperature=2.0)]


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(losses):
    return [f"{type(loss).__name__}{i}" for i, loss in enumerate(losses)]


def seg_target(*rows, labelled=True):
    """One image of 6 x 10 pixels: 2 x 2 pixels a cell."""
    mask = torch.tensor(rows, dtype=torch.uint8).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return {"mask": mask[None], "labelled": torch.tensor([labelled])}


def test_with_every_class_known_and_nobody_silent_both_stay_as_they_are():
    for own, other in ((random(2, 3, 3, 5), random(2, 3, 3, 5, seed=1)), (random(2, 15, 8), random(2, 15, 8, seed=1))):
        s, t = Comparable(None, STRIDES)(own, other, None, None, SIZE)
        assert s is own and t is other


def test_only_the_known_classes_are_compared():
    own, other = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1)
    s, t = Comparable((0, 2), (8,))(own, other, None, None, SIZE)
    assert torch.equal(s, own[:, [0, 2]]) and torch.equal(t, other[:, [0, 2]])
    own, other = random(2, 15, 9), random(2, 15, 9, seed=1)
    own[..., 5] = 50.0  # the student takes every cell for class 0
    s, t = Comparable((0, 2), (8,))(own, other, None, None, SIZE)
    assert torch.equal(s, own[..., [0, 1, 2, 3, 4, 5, 7]]) and torch.equal(t, other[..., [0, 1, 2, 3, 4, 5, 7]])


@pytest.mark.parametrize("loss", MAPS, ids=ids(MAPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_no_gradient_where_the_teacher_is_silent_nor_to_classes_it_lacks(loss, dtype):
    own, other = random(2, 4, 3, 5).requires_grad_(), random(2, 4, 3, 5, seed=1)
    other[:, 1] = UNKNOWN
    silent = random(2, 3, 5, seed=2) > 0.5
    assert silent.any() and not silent.all()
    s, t = Comparable((0, 2, 3), (8,))(own, other.to(dtype), silent, None, SIZE)
    loss(s, t).backward()
    assert own.grad[:, 1].eq(0).all()
    assert torch.equal(s.movedim(1, -1)[silent], t.movedim(1, -1)[silent])  # not rounded to the teacher's precision
    assert own.grad.movedim(1, -1)[silent].eq(0).all()
    assert own.grad.movedim(1, -1)[~silent][:, [0, 2, 3]].ne(0).any(-1).all()
    everywhere = own.detach().clone().requires_grad_()
    loss(*Comparable(None, (8,))(everywhere, other.to(dtype), torch.ones_like(silent), None, SIZE)).backward()
    assert everywhere.grad.eq(0).all()


@pytest.mark.parametrize("loss", CELLS, ids=ids(CELLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cells_no_gradient_where_the_teacher_is_silent_nor_to_classes_it_lacks(loss, dtype):
    own, other = random(2, 15, 9), random(2, 15, 9, seed=1)
    other[..., 6] = UNKNOWN
    silent = random(2, 15, seed=2) > 0.5
    own.requires_grad_()
    s, t = Comparable((0, 2, 3), (8,))(own, other.to(dtype), silent, None, SIZE)
    loss(s, t).backward()
    unspoken = silent | (own[..., 5:].argmax(-1) == 1)
    assert silent.any() and (unspoken & ~silent).any() and not unspoken.all()
    assert own.grad[..., 6].eq(0).all() and own.grad[unspoken].eq(0).all()
    assert own.grad[~unspoken][:, [4, 5, 7, 8]].ne(0).any(-1).all()
    # the value of what is silent is 0 too: the rest alone has the same sum
    if isinstance(loss, DetMSE) and loss.weighting == "none":
        alone = (own - other.to(dtype))[..., [0, 1, 2, 3, 4, 5, 7, 8]][~unspoken].square().sum() / (2 * 15 * 8)
        assert loss(s, t).item() == pytest.approx(alone.item(), rel=1e-5)


def test_the_gradient_elsewhere_is_that_of_the_loss_alone():
    own, other = random(1, 3, 3, 5).requires_grad_(), random(1, 3, 3, 5, seed=1)
    silent = torch.zeros(1, 3, 5, dtype=torch.bool)
    silent[0, 1, 2] = True
    (grad,) = torch.autograd.grad(KL()(*Comparable(None, (8,))(own, other, silent, None, SIZE)), own)
    (full,) = torch.autograd.grad(KL()(own, other), own)
    assert torch.allclose(grad[:, :, ~silent[0]], full[:, :, ~silent[0]], atol=1e-8) and full[0, :, 1, 2].ne(0).all()


def test_maps_labels_of_a_class_that_the_teacher_lacks_silence_it():
    own, other = random(1, 4, 3, 5).requires_grad_(), random(1, 4, 3, 5, seed=1)
    target = seg_target([0, 1, 2, 3, IGNORE], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0])
    target["mask"][0, 3, 7] = 1  # one pixel of the four of row 1, column 3
    s, t = Comparable((0, 2, 3), (8,))(own, other, None, target, SIZE)
    expected = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal((s == t).all(1)[0], expected)
    s, t = Comparable((0, 2, 3), (8,))(own, other, None, {**target, "labelled": torch.tensor([False])}, SIZE)
    assert not (s == t).any()


def test_what_is_silent_adds_to_what_the_labels_say():
    own, other = random(1, 4, 3, 5), random(1, 4, 3, 5, seed=1)
    target = seg_target([1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0])
    silent = torch.zeros(1, 3, 5, dtype=torch.bool)
    silent[0, 2, 4] = True
    s, t = Comparable((0, 2, 3), (8,))(own, other, silent, target, SIZE)
    assert (s == t).all(1)[0].nonzero().tolist() == [[0, 0], [2, 4]]


def test_cells_in_a_labelled_box_of_a_class_that_the_teacher_lacks_are_silent():
    own, other = random(2, 15, 8), random(2, 15, 8, seed=1)
    own[..., 5] = 50.0
    boxes = torch.tensor([[[0.0, 0, 16, 8], [24, 8, 40, 24]]]).repeat(2, 1, 1)
    target = {"boxes": boxes, "classes": torch.tensor([[1, 0], [1, PAD]]), "labelled": torch.tensor([True, False])}
    s, t = Comparable((0, 2), STRIDES)(own, other, None, target, SIZE)
    # the first box holds the centres (4, 4) and (12, 4); the second image is not labelled
    assert (s == t).all(-1).nonzero().tolist() == [[0, 0], [0, 1]]
    centres, _ = cells(SIZE, STRIDES, torch.device("cpu"))
    assert centres[:2].tolist() == [[4, 4], [12, 4]]
    none = {"boxes": torch.zeros(2, 0, 4), "classes": torch.zeros(2, 0, dtype=torch.long), "labelled": target["labelled"]}
    s, t = Comparable((0, 2), STRIDES)(own, other, None, none, SIZE)
    assert not (s == t).all(-1).any()


def test_the_teachers_map_is_brought_to_the_students():
    own, other = random(2, 3, 3, 5), random(2, 3, 6, 10, seed=1)
    s, t = Comparable(None, (8,))(own, other, None, None, SIZE)
    assert s is own and torch.allclose(t, other.unflatten(3, (5, 2)).unflatten(2, (3, 2)).mean((3, 5)), atol=1e-6)
    silent = torch.zeros(2, 6, 10, dtype=torch.bool)
    silent[0, 3, 8] = True  # a cell is silent where any of it is
    s, t = Comparable(None, (8,))(own, other, silent, None, SIZE)
    assert (s == t).all(1).nonzero().tolist() == [[0, 1, 4]]
    small = torch.zeros(2, 3, 5, dtype=torch.bool)
    small[1, 2, 4] = True
    s, t = Comparable(None, (8,))(other, own, small, None, SIZE)
    assert t.shape == other.shape
    assert (s == t).all(1).nonzero().tolist() == [[1, 4, 8], [1, 4, 9], [1, 5, 8], [1, 5, 9]]


def test_the_teacher_gets_no_gradient_from_the_student_nor_the_student_through_it():
    own, other = random(1, 3, 3, 5).requires_grad_(), random(1, 3, 3, 5, seed=1)
    silent = torch.ones(1, 3, 5, dtype=torch.bool)
    s, t = Comparable(None, (8,))(own, other, silent, None, SIZE)
    assert not t.requires_grad and torch.equal(s, t)
