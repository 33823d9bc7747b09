"""The losses between feature maps: cwd, mgd, pkd, feature_mse."""

import math

import numpy as np
import pytest
import torch

from multitask_kd.losses.base import LOSSES
from multitask_kd.losses.cwd import CWD
from multitask_kd.losses.feature_mse import FeatureMSE
from multitask_kd.losses.mgd import MGD
from multitask_kd.losses.pkd import PKD

LN3 = math.log(3)
SHAPES = [(2, 5, 4, 3), (1, 1, 2, 2), (3, 2, 1, 6)]


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def identity_mgd(channels, **options):
    """Both convolutions hand every channel on as it is: 1 at the kernel's centre, for maps of at least 0
    (ReLU)."""
    loss = MGD(channels, **options)
    with torch.no_grad():
        for conv in (loss.generator[0], loss.generator[2]):
            conv.weight.zero_()
            conv.bias.zero_()
            for channel in range(channels):
                conv.weight[channel, channel, 1, 1] = 1.0
    return loss


def test_the_losses_that_compare_maps():
    assert {name for name in LOSSES.names() if LOSSES.get(name, "x").maps} >= {
        "cwd",
        "feature_mse",
        "mgd",
        "pkd",
    }
    assert [name for name in LOSSES.names() if LOSSES.get(name, "x").norm] == ["cwd"]


@pytest.mark.parametrize("make", [CWD, FeatureMSE, PKD, lambda: MGD(3)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (1, 3, 4, 4), (2, 2, 4, 4), (2, 3, 4, 1)])
def test_other_shapes_are_refused(make, shape):
    with pytest.raises(ValueError, match=r"the student's map \[2, 3, 4, 4\] and the teacher's .* differ"):
        make()(torch.zeros(2, 3, 4, 4), torch.zeros(shape))


@pytest.mark.parametrize("make", [CWD, FeatureMSE, PKD, lambda: MGD(3)])
def test_the_result_is_a_float32_scalar_with_a_gradient_for_the_student(make):
    student = random(2, 3, 4, 4, seed=1).to(torch.bfloat16).requires_grad_()
    loss = make()
    if isinstance(loss, MGD):
        loss.to(torch.bfloat16)
    value = loss(student, random(2, 3, 4, 4, seed=2).to(torch.bfloat16))
    value.backward()
    assert value.shape == () and value.dtype == torch.float32 and value > 0
    assert student.grad.isfinite().all() and student.grad.ne(0).any()


def some_places(seed=7, shape=(2, 4, 5)):
    """bool [B,H,W] in which both images have places and lack some."""
    mask = random(*shape, seed=seed) > 0.2
    assert mask.flatten(1).any(1).all() and not mask.flatten(1).all(1).any()
    return mask


# what each is of one image's places alone, [C,n] each in float64
ALONE = {
    "cwd": lambda s, t: (
        9 * ((t / 3).softmax(1) * ((t / 3).log_softmax(1) - (s / 3).log_softmax(1))).sum(1).mean()
    ),
    "feature_mse": lambda s, t: ((s - t) ** 2).mean(),
}


@pytest.mark.parametrize(("name", "loss"), [("cwd", CWD(tau=3.0)), ("feature_mse", FeatureMSE())])
def test_with_a_mask_it_is_that_of_what_is_left_alone(name, loss):
    student, teacher, mask = (
        random(2, 3, 4, 5, seed=1).requires_grad_(),
        random(2, 3, 4, 5, seed=2),
        some_places(),
    )
    value = loss(student, teacher, None, mask)
    value.backward()
    each = [[x[i, :, mask[i]].detach().double() for x in (student, teacher)] for i in range(2)]
    counts = (
        mask.flatten(1).sum(1).double() if name == "feature_mse" else torch.ones(2)
    )  # an image, or its places, count
    expected = sum(ALONE[name](*pair) * n for pair, n in zip(each, counts, strict=True)) / counts.sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    places = student.grad.movedim(1, -1)
    assert places[~mask].eq(0).all() and places[mask].ne(0).any(-1).all()


@pytest.mark.parametrize(
    "loss", [CWD(), FeatureMSE(), PKD(), MGD(3)], ids=["cwd", "feature_mse", "pkd", "mgd"]
)
def test_what_is_masked_out_counts_in_neither_sum_nor_divisor(loss):
    student, teacher, mask = (
        random(2, 3, 4, 5, seed=1).requires_grad_(),
        random(2, 3, 4, 5, seed=2),
        some_places(),
    )

    def value(*args):
        torch.manual_seed(0)  # what mgd hides
        return loss(*args)

    # the teacher's values there do not matter
    wild = torch.where(mask[:, None], teacher, 50.0)
    assert value(student, teacher, None, mask).item() == pytest.approx(
        value(student, wild, None, mask).item(), rel=1e-6
    )
    # a mask of everything is no mask; with nothing left the loss is 0, and so is its gradient
    everything = value(student, teacher, None, torch.ones_like(mask))
    assert everything.item() == pytest.approx(value(student, teacher).item(), rel=1e-5)
    nothing = value(student, teacher, None, torch.zeros_like(mask))
    assert nothing.item() == 0 and torch.autograd.grad(nothing, student)[0].eq(0).all()
    # of an image without any place the rest is not diluted
    one = mask & torch.tensor([True, False])[:, None, None]
    alone = value(student[:1], teacher[:1], None, mask[:1])
    assert value(student, teacher, None, one).item() == pytest.approx(alone.item(), rel=1e-5)


# --- feature_mse


def test_feature_mse_by_hand():
    student = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]])
    teacher = torch.tensor([[[[1.0, 5.0]], [[-1.0, 2.0]]]])
    # squares 0, 9, 1, 4 over 4 numbers
    assert FeatureMSE()(student, teacher).item() == 3.5
    student.requires_grad_()
    FeatureMSE()(student, teacher).backward()
    # 2 (s - t) / 4
    assert student.grad.flatten().tolist() == [0.0, -1.5, 0.5, -1.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_feature_mse_against_the_formula_in_float64(shape):
    student, teacher = random(*shape, seed=1), random(*shape, seed=2)
    expected = np.mean((student.double().numpy() - teacher.double().numpy()) ** 2)
    assert FeatureMSE()(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_feature_mse_is_zero_with_zero_gradient_at_equality():
    teacher = random(2, 3, 4, 4)
    student = teacher.clone().requires_grad_()
    loss = FeatureMSE()(student, teacher)
    loss.backward()
    assert loss.item() == 0 and student.grad.eq(0).all()


def test_feature_mse_computes_in_float32():
    student, teacher = torch.full((1, 2, 2, 2), 300.0).half(), torch.full((1, 2, 2, 2), -300.0).half()
    assert FeatureMSE()(student, teacher).item() == 600.0**2  # above float16's largest, 65504


# --- cwd


def test_cwd_by_hand():
    # One image, two channels of two places. Channel 0: teacher (ln 3, 0) is (3/4, 1/4), student (0, 0) is
    # (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2) = .130812. Channel 1: both constant, so 0. Over B*C = 2.
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[LN3, 0.0]], [[7.0, 7.0]]]])
    hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert hand == pytest.approx(0.130812, abs=1e-6)
    assert CWD()(student, teacher).item() == pytest.approx(hand / 2, rel=1e-6)
    # The other way round is KL of (1/2, 1/2) to (3/4, 1/4): 1/2 ln(2/3) + 1/2 ln 2 = .143841
    assert CWD()(teacher, student).item() == pytest.approx(0.143841 / 2, abs=1e-6)
    # With tau the logits T ln 3 give the same probabilities, and tau^2 stands before them
    assert CWD(tau=4.0)(student, 4 * teacher).item() == pytest.approx(16 * hand / 2, rel=1e-6)


def test_cwd_gradient_by_hand():
    # d/ds tau^2 KL = tau (softmax(s/tau) - softmax(t/tau)) = 3 (1/2 - 3/4) at the first place, over B*C = 1
    student = torch.zeros(1, 1, 1, 2, requires_grad=True)
    CWD(tau=3.0)(student, torch.tensor([[[[3 * LN3, 0.0]]]])).backward()
    assert student.grad.flatten().tolist() == pytest.approx([-0.75, 0.75], rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_cwd_against_the_formula_in_float64(shape, tau):
    student, teacher = random(*shape, seed=1, scale=3.0), random(*shape, seed=2, scale=3.0)
    total = 0.0
    for image in range(shape[0]):
        for channel in range(shape[1]):
            s, t = (np.exp(x[image, channel].double().numpy() / tau) for x in (student, teacher))
            p, q = t / t.sum(), s / s.sum()
            total += float((p * np.log(p / q)).sum())
    expected = tau**2 * total / (shape[0] * shape[1])
    assert CWD(tau=tau)(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_cwd_is_zero_with_zero_gradient_at_equality_up_to_a_constant_a_channel():
    teacher = random(2, 3, 4, 4)
    student = (teacher + random(2, 3, 1, 1, seed=5)).requires_grad_()
    loss = CWD(tau=2.0)(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6
    assert CWD(tau=2.0)(random(2, 3, 4, 4, seed=9), teacher) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cwd_of_large_low_precision_maps_is_finite(dtype):
    # All of the teacher's mass lies on the first place, all of the student's on the second: KL = ln(1 /
    # e^-60000)
    student = torch.tensor([[[[0.0, 60000.0]]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[[60000.0, 0.0]]]], dtype=dtype)
    loss = CWD()(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(teacher.max().item(), rel=1e-6)
    assert student.grad.flatten().tolist() == [-1.0, 1.0]


def test_cwd_of_low_precision_maps_is_computed_in_float32():
    student, teacher = random(2, 3, 4, 4, seed=1).bfloat16(), random(2, 3, 4, 4, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = CWD(tau=3.0)(student, teacher)
    assert torch.equal(low, CWD(tau=3.0)(student.float(), teacher.float()))


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_cwd_refuses_a_tau_that_is_not_above_0(tau):
    with pytest.raises(ValueError, match="tau"):
        CWD(tau=tau)


def test_cwd_with_a_mask_by_hand():
    # Of three places the last is masked out: (3/4, 1/4) against (1/2, 1/2), as if it were not there
    student, teacher = torch.zeros(1, 1, 1, 3), torch.tensor([[[[LN3, 0.0, 9.0]]]])
    mask = torch.tensor([[[True, True, False]]])
    assert CWD()(student, teacher, None, mask).item() == pytest.approx(0.130812, abs=1e-6)
    # a second image without any place counts in neither sum nor divisor
    both = [x.repeat(2, 1, 1, 1) for x in (student, teacher)]
    two = torch.cat([mask, torch.zeros_like(mask)])
    assert CWD()(*both, None, two).item() == pytest.approx(0.130812, abs=1e-6)


# --- mgd


def test_mgd_by_hand_with_an_identity_generator_and_nothing_hidden():
    student, teacher = random(3, 2, 4, 5, seed=1).abs(), random(3, 2, 4, 5, seed=2)
    squares = float((student.double() - teacher.double()).square().sum())
    assert identity_mgd(2, masked=0.0)(student, teacher).item() == pytest.approx(squares / 3 * 2e-5, rel=1e-5)
    assert identity_mgd(2, masked=0.0, factor=0.5)(student, teacher).item() == pytest.approx(
        squares / 3 * 0.5, rel=1e-5
    )
    assert identity_mgd(2, masked=0.0)(teacher.abs(), teacher.abs()).item() == 0


def test_mgd_counts_by_the_sum_over_channels_and_places():
    """[1,C,H,W] of 1 against 0: C*H*W squares of 1. Twice as many places are twice the loss, twice the images
    are not."""
    for shape, count in (((1, 2, 3, 4), 24), ((1, 4, 6, 4), 96), ((5, 2, 3, 4), 24)):
        loss = identity_mgd(shape[1], masked=0.0, factor=1.0)
        assert loss(torch.ones(shape), torch.zeros(shape)).item() == pytest.approx(count)


@pytest.mark.parametrize("masked", [0.0, 0.25, 0.65, 0.9])
def test_mgd_hides_a_share_of_the_places(masked):
    # Ones against ones: a hidden place costs 1 a channel, one that is kept costs nothing. 40000 places: three
    # standard deviations of the share are at most 3 * sqrt(.25 / 40000) = .0075.
    torch.manual_seed(0)
    ones = torch.ones(4, 2, 100, 100)
    hidden = identity_mgd(2, masked=masked, factor=1.0)(ones, ones).item() * 4 / ones.numel()
    assert hidden == pytest.approx(masked, abs=0.0075)


def test_mgd_hides_places_in_all_channels_and_anew_for_every_image_and_step():
    masks = []
    loss = identity_mgd(3, masked=0.5)
    loss.generator.register_forward_hook(lambda module, inputs, output: masks.append(inputs[0]))
    torch.manual_seed(0)
    for _ in range(2):
        loss(torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8))
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(mask[:, 0], mask[:, 1]) and torch.equal(mask[:, 0], mask[:, 2])
        assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(masks[0], masks[1])


def test_mgd_generator_is_two_convolutions_of_the_given_channels():
    loss = MGD(6)
    # 3x3, 6 to 6 channels, with bias, twice: 2 * (6 * 6 * 9 + 6)
    assert sum(p.numel() for p in loss.parameters()) == 2 * (6 * 6 * 9 + 6)
    assert all(p.requires_grad for p in loss.parameters())
    assert not MGD(6)(random(2, 6, 5, 7), random(2, 6, 5, 7)).isnan()


def test_mgd_generator_learns_to_make_the_teachers_map():
    torch.manual_seed(0)
    loss = MGD(3, masked=0.3, factor=1.0)
    student = random(2, 3, 6, 6, seed=1)
    teacher = 2 * student.roll(1, dims=1) + 1
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert all(p.grad.ne(0).any() for p in loss.parameters())
    assert sum(values[-10:]) < 0.6 * sum(values[:10])


def test_mgd_with_a_mask_by_hand():
    """Ones against zeros in 3 of 8 places of one image and in all of another: each counts 2 * 8 squares."""
    loss = identity_mgd(2, masked=0.0, factor=1.0)
    mask = torch.zeros(3, 2, 4, dtype=torch.bool)
    mask[0, 0, :3], mask[1] = True, True
    student = torch.ones(3, 2, 2, 4, requires_grad=True)
    value = loss(student, torch.zeros(3, 2, 2, 4), None, mask)
    value.backward()
    assert value.item() == pytest.approx(16)  # 6 * 8 / 3 and 16, over the 2 images that have places
    assert student.grad.movedim(1, -1)[~mask].eq(0).all()
    assert student.grad[0, :, 0, :3].flatten().tolist() == pytest.approx([2 * 8 / 3 / 2] * 6)


def test_mgd_reads_masked_out_places_only_to_make_those_that_are_not():
    """Two convolutions of 3x3 read two places far; from further away no gradient comes."""
    torch.manual_seed(0)
    student = random(1, 2, 9, 9, seed=1).requires_grad_()
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 4, 4] = True
    MGD(2, masked=0.0)(student, random(1, 2, 9, 9, seed=2), None, mask).backward()
    reached = student.grad[0].ne(0).any(0)
    assert (
        reached[2:7, 2:7].any()
        and not reached[:2].any()
        and not reached[:, 7:].any()
        and not reached[7:].any()
    )


@pytest.mark.parametrize(
    "options", [{"masked": 1.0}, {"masked": -0.1}, {"factor": 0.0}, {"factor": float("inf")}]
)
def test_mgd_refuses_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MGD(3, **options)


# --- pkd


def test_pkd_by_hand():
    # One channel over two images of two places: student (1, -1, 1, -1), teacher (1, 1, -1, -1), both of mean
    # 0 and variance 1. They are uncorrelated: (0 + 4 + 4 + 0) / 4 / 2 = 1 = 1 - r.
    student = torch.tensor([1.0, -1, 1, -1]).view(2, 1, 1, 2)
    teacher = torch.tensor([1.0, 1, -1, -1]).view(2, 1, 1, 2)
    assert PKD()(student, teacher).item() == pytest.approx(1.0, rel=1e-5)
    assert PKD()(student, -student).item() == pytest.approx(2.0, rel=1e-5)  # r = -1
    # Two channels, r = 1 and r = 0: (0 + 1) / 2
    both = torch.cat([student, student], dim=1)
    assert PKD()(both, torch.cat([student, teacher], dim=1)).item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 1, 2, 2), (3, 2, 1, 6)])
def test_pkd_is_one_less_the_pearson_correlation_of_each_channel(shape):
    student, teacher = random(*shape, seed=1), 5 * random(*shape, seed=2) - 3
    teacher = teacher + 2 * student
    flat = [x.double().transpose(0, 1).flatten(1).numpy() for x in (student, teacher)]
    correlations = [np.corrcoef(flat[0][c], flat[1][c])[0, 1] for c in range(shape[1])]
    assert PKD()(student, teacher).item() == pytest.approx(1 - np.mean(correlations), abs=2e-5)


def test_pkd_is_zero_at_equality_up_to_scale_and_shift_of_each_channel():
    teacher = random(2, 3, 4, 4)
    same = teacher.clone().requires_grad_()
    loss = PKD()(same, teacher)
    loss.backward()
    assert loss.item() == 0 and same.grad.eq(0).all()
    scale = torch.tensor([0.5, 3.0, 100.0]).view(1, 3, 1, 1)
    shift = torch.tensor([-7.0, 0.0, 20.0]).view(1, 3, 1, 1)
    other = (teacher * scale + shift).requires_grad_()
    loss = PKD()(other, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert other.grad.abs().max() < 1e-4
    assert PKD()(-teacher, teacher).item() == pytest.approx(2.0, abs=1e-4)


def test_pkd_of_a_constant_channel_is_finite():
    # A constant has no correlation: it becomes 0, and the other, of variance 1, gives 1/2
    student = torch.full((2, 1, 4, 4), 3.0, requires_grad=True)
    loss = PKD()(student, random(2, 1, 4, 4))
    loss.backward()
    assert loss.item() == pytest.approx(0.5, abs=1e-5) and student.grad.isfinite().all()
    assert PKD()(student, torch.ones(2, 1, 4, 4)).item() == 0


def test_pkd_computes_in_float32():
    student, teacher = random(2, 3, 4, 4, seed=1).half() + 300, random(2, 3, 4, 4, seed=2).half() - 300
    with torch.autocast("cpu", torch.bfloat16):
        low = PKD()(student, teacher)
    assert torch.equal(low, PKD()(student.float(), teacher.float()))


def test_pkd_with_a_mask_is_one_less_the_correlation_of_what_is_left():
    student, teacher, mask = (
        random(2, 3, 4, 5, seed=1).requires_grad_(),
        random(2, 3, 4, 5, seed=2),
        some_places(),
    )
    value = PKD()(student, teacher, None, mask)
    value.backward()
    s, t = (x.detach().double().movedim(1, -1)[mask].T.numpy() for x in (student, teacher))
    correlations = [np.corrcoef(s[c], t[c])[0, 1] for c in range(3)]
    assert value.item() == pytest.approx(1 - np.mean(correlations), abs=2e-5)
    places = student.grad.movedim(1, -1)
    assert places[~mask].eq(0).all() and places[mask].ne(0).any(-1).all()
