"""A term: two taps, what brings them together, and the loss between them."""

import pytest
import torch
import torch.nn.functional as F

from multitask_kd.distill.term import Term, as_map, grid
from multitask_kd.losses.cwd import CWD
from multitask_kd.losses.feature_mse import FeatureMSE
from multitask_kd.losses.kl import KL
from multitask_kd.losses.mgd import MGD
from multitask_kd.losses.pkd import PKD
from multitask_kd.models.maps import resized

SIZE = (48, 64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- maps


def test_a_map_stays_as_it_is():
    x = random(2, 5, 6, 8)
    assert as_map(x, SIZE) is x
    odd = random(2, 5, 7, 7)  # a grid of no square patches either way
    assert as_map(odd, SIZE) is odd


def test_a_map_with_channels_last_is_turned():
    x = random(2, 6, 8, 5)  # stride 8 of 48 x 64, 5 channels
    found = as_map(x, SIZE)
    assert found.shape == (2, 5, 6, 8)
    assert found[1, 4, 2, 7] == x[1, 2, 7, 4]


def test_where_both_readings_fit_channels_come_first():
    x = random(2, 8, 8, 8)
    assert as_map(x, (64, 64)) is x
    y = random(2, 3, 4, 16)  # 3 x 4 is a grid of 48 x 64, 4 x 16 is none: channels last
    assert as_map(y, SIZE).shape == (2, 16, 3, 4)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_become_a_map_without_class_and_register_tokens(prefix):
    places = random(2, 12, 7)  # 3 x 4 patches of 16 pixels, row by row
    tokens = torch.cat([torch.full((2, prefix, 7), 99.0), places], dim=1)
    found = as_map(tokens, SIZE)
    assert found.shape == (2, 7, 3, 4) and found.max() < 99
    for row in range(3):
        for column in range(4):
            assert torch.equal(found[:, :, row, column], places[:, row * 4 + column])


def test_the_grid_of_tokens():
    assert grid(12, SIZE) == grid(13, SIZE) == (3, 4)
    assert grid(48, SIZE) == grid(49, SIZE) == (6, 8)  # patches of 8
    assert grid(197, (224, 224)) == (14, 14)  # a ViT of patches of 16 and its class token
    assert grid(261, (224, 224)) == (16, 16)  # patches of 14, a class and four register tokens


@pytest.mark.parametrize("tokens", [11, 29, 47, 100])  # 3 x 4 = 12 and at most 16 more; 6 x 8 = 48
def test_tokens_that_make_no_grid_are_refused(tokens):
    with pytest.raises(
        ValueError, match=rf"gives {tokens} tokens, which are no grid of square patches of 48x64 pixels"
    ):
        as_map(random(1, tokens, 3), SIZE)


def test_what_is_neither_map_nor_tokens_is_refused():
    with pytest.raises(ValueError, match=r"gives \[2, 5\]: neither a map"):
        as_map(random(2, 5), SIZE)
    with pytest.raises(ValueError, match="gives a tuple, not one tensor; tap a module inside it"):
        as_map((random(2, 5, 6, 8),), SIZE)
    with pytest.raises(ValueError, match="gives a dict"):
        as_map({"a": random(2, 5, 6, 8)}, SIZE)


# --- sizes


@pytest.mark.parametrize(
    ("student", "teacher", "size", "goal"),
    [
        ((12, 16), (6, 8), "smaller", (6, 8)),
        ((6, 8), (12, 16), "smaller", (6, 8)),
        ((12, 16), (6, 8), "student", (12, 16)),
        ((12, 16), (6, 8), "teacher", (6, 8)),
        ((6, 8), (12, 16), "student", (6, 8)),
        ((6, 8), (12, 16), "teacher", (12, 16)),
        ((5, 9), (7, 7), "smaller", (5, 9)),
    ],
)
def test_both_maps_get_one_size(student, teacher, size, goal):
    s, t = resized(random(2, 3, *student), random(2, 4, *teacher), size)
    assert s.shape == (2, 3, *goal) and t.shape == (2, 4, *goal)


@pytest.mark.parametrize("size", ["smaller", "student", "teacher"])
def test_maps_of_one_size_are_not_touched(size):
    s, t = random(2, 3, 6, 8), random(2, 4, 6, 8)
    assert resized(s, t, size)[0] is s and resized(s, t, size)[1] is t


def test_what_shrinks_is_averaged_and_what_grows_is_bilinear():
    x = random(1, 2, 4, 4)
    small = random(1, 2, 2, 2)
    averaged = resized(x, small, "smaller")[0]
    by_hand = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    assert torch.allclose(averaged, by_hand, atol=1e-6)
    grown = resized(x, small, "student")[1]
    assert torch.equal(grown, F.interpolate(small, size=(4, 4), mode="bilinear", align_corners=False))
    assert torch.allclose(
        resized(x, torch.full((1, 2, 2, 2), 3.0), "student")[1], torch.full((1, 2, 4, 4), 3.0)
    )


# --- the term


def mse_term(channels=(3, 4), **options):
    torch.manual_seed(0)
    return Term("a", "b", FeatureMSE(), channels, **options)


def test_a_term_is_its_loss_between_aligned_and_resized_maps():
    term = mse_term()
    student, teacher = random(2, 3, 12, 16, seed=1), random(2, 4, 6, 8, seed=2)
    aligned = torch.einsum("oi,bihw->bohw", term.align.weight[:, :, 0, 0], student)
    expected = (F.avg_pool2d(aligned, 2) - teacher).square().mean()
    assert term(student, teacher, SIZE).item() == pytest.approx(expected.item(), rel=1e-5)
    expected = (
        (aligned - F.interpolate(teacher, size=(12, 16), mode="bilinear", align_corners=False))
        .square()
        .mean()
    )
    assert mse_term(size="student")(student, teacher, SIZE).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_term_compares_tokens_with_maps():
    term = mse_term((3, 3), align=False)
    student = random(2, 3, 3, 4)
    tokens = torch.cat([torch.full((2, 1, 3), 50.0), student.flatten(2).transpose(1, 2)], dim=1)
    assert term(student, tokens, SIZE).item() == 0
    assert term(tokens, student, SIZE).item() == 0
    assert term(student, student.permute(0, 2, 3, 1), SIZE).item() == 0


@pytest.mark.parametrize("size", ["smaller", "student", "teacher"])
@pytest.mark.parametrize("loss", [CWD, FeatureMSE, PKD, MGD])
def test_the_teachers_side_gets_no_gradient(loss, size):
    made = loss(4) if loss.learns else loss()
    term = Term("a", "b", made, (3, 4), norm=loss is CWD, size=size)
    student, teacher = (
        random(2, 3, 12, 16, seed=1).requires_grad_(),
        random(2, 4, 6, 8, seed=2).requires_grad_(),
    )
    term(student, teacher, SIZE).backward()
    assert teacher.grad is None
    assert student.grad.ne(0).any() and all(p.grad.ne(0).any() for p in term.parameters())


def test_the_teachers_side_of_a_prediction_gets_no_gradient():
    term = Term("heads.seg", "heads.seg", KL(), None, align=False, task="seg")
    student, teacher = (
        random(2, 3, 6, 8, seed=1).requires_grad_(),
        random(2, 3, 6, 8, seed=2).requires_grad_(),
    )
    value = term(student, teacher, SIZE)
    value.backward()
    assert value.item() == pytest.approx(KL()(student, teacher).item())
    assert teacher.grad is None and student.grad.ne(0).any()


def test_a_term_between_predictions_hands_the_labels_on():
    term = Term("heads.seg", "heads.seg", KL(skip_ignored=True), None, align=False, task="seg")
    student, teacher = random(1, 3, 2, 2, seed=1), random(1, 3, 2, 2, seed=2)
    target = {"mask": torch.full((1, 2, 2), 255), "labelled": torch.tensor([True])}
    assert term(student, teacher, (2, 2), target).item() == 0
    assert term(student, teacher, (2, 2)).item() > 0


def test_alignment_learns_to_bring_the_students_channels_to_the_teachers():
    term = mse_term()
    student = random(2, 3, 6, 8, seed=1)
    truth = random(4, 3, seed=3)
    teacher = torch.einsum("oi,bihw->bohw", truth, student)
    optimizer = torch.optim.Adam(term.parameters(), lr=0.05)
    first = term(student, teacher, SIZE).item()
    for _ in range(200):
        optimizer.zero_grad()
        term(student, teacher, SIZE).backward()
        optimizer.step()
    assert term(student, teacher, SIZE).item() < 1e-3 * first
    assert torch.allclose(term.align.weight[:, :, 0, 0], truth, atol=0.02)


def test_what_learns():
    assert list(mse_term().parameters()) and not list(mse_term((4, 4), align=False).parameters())
    assert [n for n, _ in mse_term().named_parameters()] == ["align.weight"]
    assert list(Term("a", "b", MGD(4), (4, 4), align=False).parameters())
    # what normalises has statistics and no weights
    assert not list(mse_term((4, 4), align=False, norm=True).parameters())


def test_normalised_maps_do_not_depend_on_the_scale_of_either_network():
    term = Term("a", "b", FeatureMSE(), (3, 3), align=False, norm=True)
    student, teacher = random(4, 3, 6, 8, seed=1), random(4, 3, 6, 8, seed=2)
    value = term(student, teacher, SIZE).item()
    assert term(100 * student + 7, teacher / 4 - 3, SIZE).item() == pytest.approx(value, rel=2e-3)
    # mean 0 and variance 1 in each channel over the batch: the same as PKD twice
    assert value == pytest.approx(2 * PKD()(student, teacher).item(), rel=1e-3)
    # outside training the statistics that were gathered stand in for the batch's
    term.eval()
    before = {k: v.clone() for k, v in term.state_dict().items()}
    term(student, teacher, SIZE)
    assert all(torch.equal(v, before[k]) for k, v in term.state_dict().items())
