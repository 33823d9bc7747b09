"""Factors that change the weights of tasks and terms while training."""

import math

import pytest
import torch
from torch import nn

from multitask_kd.distill.balance import (
    BALANCES,
    DWA,
    GradientNorm,
    Uncertainty,
    by_part,
    by_task,
    gradients,
    grouped,
    hard_together,
)
from multitask_kd.distill.objective import Objective, gradient_report

NAMES = ["seg.hard.ce", "det.hard.box", "det.hard.class", "seg.soft.kl", "distill.cwd"]
TASKS = ("seg", "det", "distill.cwd")
KINDS = ("hard", "seg.soft", "distill.cwd")


def numbers(**values):
    return {name.replace("_", "."): torch.tensor(value) for name, value in values.items()}


# --- groups


def test_groups_are_tasks_and_terms():
    assert [by_task(n) for n in NAMES] == ["seg", "det", "det", "seg", "distill.cwd"]
    assert [by_part(n) for n in NAMES] == ["seg.hard", "det.hard", "det.hard", "seg.soft", "distill.cwd"]
    assert [hard_together(n) for n in NAMES] == ["hard", "hard", "hard", "seg.soft", "distill.cwd"]


def test_sums_of_groups():
    losses = {n: torch.tensor(float(2**i)) for i, n in enumerate(NAMES)}
    assert grouped(losses, by_task) == {"seg": 9.0, "det": 6.0, "distill.cwd": 16.0}
    assert grouped(losses, hard_together) == {"hard": 7.0, "seg.soft": 8.0, "distill.cwd": 16.0}


def test_all_are_known_by_name():
    assert BALANCES.names() == ["dwa", "gradient", "uncertainty"]


# --- uncertainty


def test_uncertainty_starts_from_the_weights_as_they_are_given():
    balance = Uncertainty(TASKS)
    weights = dict.fromkeys(NAMES, 2.0)
    losses = {n: torch.tensor(float(i)) for i, n in enumerate(NAMES)}
    total, weighted, _ = Objective(weights, NAMES, balance)(losses)
    assert total.item() == 2 * (0 + 1 + 2 + 3 + 4) and weighted["balance"].item() == 0
    assert [p.shape for p in balance.parameters()] == [torch.Size([])] * 3


def test_uncertainty_by_hand():
    balance = Uncertainty(TASKS)
    with torch.no_grad():
        for name, value in {"seg": math.log(2), "det": -math.log(3), "distill/cwd": 0.5}.items():
            balance.log_variance[name].fill_(value)
    weights = {
        "seg.hard.ce": 4.0,
        "det.hard.box": 1.0,
        "det.hard.class": 0.5,
        "seg.soft.kl": 2.0,
        "distill.cwd": 1.0,
    }
    losses = {
        "seg.hard.ce": 1.0,
        "det.hard.box": 2.0,
        "det.hard.class": 4.0,
        "seg.soft.kl": 3.0,
        "distill.cwd": 7.0,
    }
    total, weighted, _ = Objective(weights, NAMES, balance)({k: torch.tensor(v) for k, v in losses.items()})
    # seg (4 + 6) / 2 + ln 2; det (2 + 2) * 3 - ln 3; the term 7 e^-.5 + .5
    expected = 5 + math.log(2) + 12 - math.log(3) + 7 * math.exp(-0.5) + 0.5
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert {k: v.item() for k, v in weighted.items()} == pytest.approx(
        {
            "seg.hard.ce": 2.0, "seg.soft.kl": 3.0, "det.hard.box": 6.0, "det.hard.class": 6.0,
            "distill.cwd": 7 * math.exp(-0.5), "balance": math.log(2) - math.log(3) + 0.5,
        }
    )  # fmt: skip
    total.backward()
    # d/ds = 1 - exp(-s) * loss: 1 - 5, 1 - 12, 1 - 7 e^-.5
    assert {k: p.grad.item() for k, p in balance.log_variance.items()} == pytest.approx(
        {"seg": -4.0, "det": -11.0, "distill/cwd": 1 - 7 * math.exp(-0.5)}
    )


def test_uncertainty_settles_where_a_group_counts_one():
    """exp(-s) L + s is least at s = ln L, where exp(-s) L = 1."""
    balance = Uncertainty(["seg", "det"])
    objective = Objective({"seg.hard.ce": 1.0, "det.hard.box": 1.0}, ["seg.hard.ce", "det.hard.box"], balance)
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        total, weighted, _ = objective({"seg.hard.ce": torch.tensor(5.0), "det.hard.box": torch.tensor(0.1)})
        total.backward()
        optimizer.step()
    learnt = {k: p.item() for k, p in balance.log_variance.items()}
    assert learnt == pytest.approx({"seg": math.log(5), "det": math.log(0.1)}, abs=0.02)
    assert weighted["seg.hard.ce"].item() == pytest.approx(1, abs=0.02)


def test_uncertainty_keeps_names_with_points():
    balance = Uncertainty(TASKS)
    assert set(balance.state_dict()) == {f"log_variance.{n}" for n in ("seg", "det", "distill/cwd")}
    other = Uncertainty(TASKS)
    with torch.no_grad():
        for i, name in enumerate(("seg", "det", "distill/cwd")):
            balance.log_variance[name].fill_(i + 1.0)
    other.load_state_dict(balance.state_dict())
    sums = numbers(seg=1.0, det=1.0, distill_cwd=1.0)
    found = other.factors(sums, ())
    assert {k: v.item() for k, v in found.items()} == pytest.approx(
        {g: math.exp(-i - 1) for i, g in enumerate(TASKS)}
    )


# --- dynamic weight average

WINDOWS = [(4.0, 1.0), (2.0, 1.0), (3.0, 0.5), (3.0, 0.5), (1.0, 0.5), (2.0, 0.5), (9.0, 9.0)]
HALF, QUARTER = math.exp(0.5), math.exp(0.25)


def dwa_factors(balance, steps=WINDOWS):
    found = []
    for seg, det in steps:
        factors = balance.factors(numbers(seg=seg, det=det), ())
        found.append([float(factors["seg"]), float(factors["det"])])
    return found


def test_dwa_by_hand_over_windows_of_two_steps():
    # Window means: seg 3, 3, 1.5; det 1, .5, .5.
    # Third window: r = (3/3, .5/1), over temperature 2 (.5, .25); 2 * softmax.
    third = [2 * HALF / (HALF + QUARTER), 2 * QUARTER / (HALF + QUARTER)]
    assert third == pytest.approx([1.124353, 0.875647], abs=1e-6)
    # Fourth: r = (1.5/3, .5/.5): the other way round.
    expected = [[1, 1]] * 4 + [third] * 2 + [third[::-1]]
    for own, hand in zip(dwa_factors(DWA(["seg", "det"], every=2)), expected, strict=True):
        assert own == pytest.approx(hand, rel=1e-6)


def test_dwa_of_high_temperature_leaves_the_weights_and_of_low_takes_the_slowest():
    assert dwa_factors(DWA(["seg", "det"], every=2, temperature=1e6))[5] == pytest.approx([1, 1], abs=1e-4)
    assert dwa_factors(DWA(["seg", "det"], every=2, temperature=1e-2))[5] == pytest.approx([2, 0], abs=1e-4)


def test_dwa_factors_enter_the_total_without_gradient_of_their_own():
    balance = DWA(["seg", "det"], every=1)
    objective = Objective({"seg.hard.ce": 2.0, "det.hard.box": 1.0}, ["seg.hard.ce", "det.hard.box"], balance)
    for seg, det in ((2.0, 1.0), (2.0, 0.5)):
        objective({"seg.hard.ce": torch.tensor(seg), "det.hard.box": torch.tensor(det)})
    own = {
        "seg.hard.ce": torch.tensor(3.0, requires_grad=True),
        "det.hard.box": torch.tensor(3.0, requires_grad=True),
    }
    total, weighted, _ = objective(own)
    # r = (1, .5) as above; the weights 2 and 1 stand before the factors
    seg, det = 2 * HALF / (HALF + QUARTER), 2 * QUARTER / (HALF + QUARTER)
    assert total.item() == pytest.approx(2 * 3 * seg + 3 * det, rel=1e-5)
    total.backward()
    assert own["seg.hard.ce"].grad.item() == pytest.approx(2 * seg, rel=1e-5)
    assert own["det.hard.box"].grad.item() == pytest.approx(det, rel=1e-5)
    assert set(weighted) == set(own)  # nothing of its own in the total


def test_dwa_goes_on_from_its_state():
    first = DWA(["seg", "det"], every=2)
    whole = dwa_factors(DWA(["seg", "det"], every=2))
    for cut in range(1, len(WINDOWS)):
        first = DWA(["seg", "det"], every=2)
        dwa_factors(first, WINDOWS[:cut])
        second = DWA(["seg", "det"], every=2)
        second.load_state_dict(first.state_dict())
        assert dwa_factors(second, WINDOWS[cut:]) == whole[cut:]


def test_dwa_averages_a_group_over_the_steps_in_which_it_is_there():
    balance = DWA(["seg", "det"], every=2)
    steps = [(4.0, 1.0), (2.0, None), (3.0, None), (3.0, 0.5)]
    for seg, det in steps:
        found = balance.factors(numbers(seg=seg) | ({} if det is None else numbers(det=det)), ())
        assert set(found) == ({"seg"} if det is None else {"seg", "det"})
    # the same means as above: seg 3, 3; det 1, .5
    assert float(balance.factors(numbers(seg=1.0, det=1.0), ())["seg"]) == pytest.approx(1.124353, abs=1e-6)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"every": 0}])
def test_dwa_refuses_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DWA(["seg"], **options)


# --- gradient


class Three(nn.Module):
    """Losses of very different strength behind two shared maps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, 8)
        self.heads = nn.ModuleDict({n.replace(".", "_"): nn.Linear(8, 1) for n in NAMES})

    def forward(self, scale):
        x = self.encoder(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
        shared = (x[:, :3], x[:, 3:])
        y = torch.cat(shared, dim=1)
        strength = {"seg.soft.kl": 100.0, "distill.cwd": 1e-3 * scale}
        losses = {n: strength.get(n, 1.0) * self.heads[n.replace(".", "_")](y).square().mean() for n in NAMES}
        return losses, shared


def norms(weighted, shared):
    sums = grouped({k: v for k, v in weighted.items() if k != "balance"}, hard_together)
    return {g: v.norm().item() for g, v in gradients(sums, shared).items()}


def pull(balance, scale=1.0, weights=None):
    """Norms of the groups' gradients at the shared maps, after the balance."""
    losses, shared = Three()(scale)
    weighted = Objective(weights or dict.fromkeys(NAMES, 1.0), NAMES, balance)(losses, 0.0, shared)[1]
    return norms(weighted, shared)


def test_the_share_of_the_gradient_is_the_one_that_is_asked_for():
    before = pull(None)
    assert before["seg.soft"] > 5 * before["hard"] and before["distill.cwd"] < 0.01 * before["hard"]
    after = pull(GradientNorm(KINDS, share=0.5, momentum=0.0))
    assert after["hard"] == before["hard"]
    assert after["seg.soft"] == pytest.approx(0.5 * after["hard"], rel=1e-4)
    assert after["distill.cwd"] == pytest.approx(0.5 * after["hard"], rel=1e-4)


def test_shares_by_group_and_others_stay_as_they_are():
    before = pull(None)
    after = pull(GradientNorm(KINDS, share={"seg.soft": 0.2, "distill.cwd": 2.0}, momentum=0.0))
    assert after["seg.soft"] == pytest.approx(0.2 * after["hard"], rel=1e-4)
    assert after["distill.cwd"] == pytest.approx(2 * after["hard"], rel=1e-4)
    after = pull(GradientNorm(KINDS, share={"distill.cwd": 1.0}, momentum=0.0))
    assert after["seg.soft"] == before["seg.soft"]
    assert after["distill.cwd"] == pytest.approx(after["hard"], rel=1e-4)


def test_the_configs_weights_cancel_out():
    weights = dict.fromkeys(NAMES, 1.0) | {"distill.cwd": 40.0, "seg.soft.kl": 0.1}
    a, b = (pull(GradientNorm(KINDS, share=0.5), weights=w) for w in (None, weights))
    assert a == pytest.approx(b, rel=1e-4)


def test_it_is_measured_in_the_first_step_and_every_so_many():
    balance = GradientNorm(KINDS, share=1.0, every=3, momentum=0.0)
    found = []
    for step in range(7):
        after = pull(balance, scale=2.0**step)  # the term's own strength doubles every step
        found.append(after["distill.cwd"] / after["hard"])
    # between two measurements the factor stands while the term doubles
    assert found == pytest.approx([1, 2, 4, 1, 2, 4, 1], rel=1e-4)


def test_measurements_are_averaged():
    balance = GradientNorm(KINDS, share=1.0, every=1, momentum=0.75)
    first = pull(balance)
    assert first["distill.cwd"] == pytest.approx(first["hard"], rel=1e-4)  # the first stands alone
    second = pull(balance, scale=4.0)
    # factor 3/4 * f + 1/4 * f/4 = 13/16 f on a term four times as strong: 13/4
    assert second["distill.cwd"] == pytest.approx(13 / 4 * second["hard"], rel=1e-4)


def test_factors_are_constants_for_the_gradient_and_nothing_is_added():
    model, balance = Three(), GradientNorm(KINDS, share=0.5, momentum=0.0)
    losses, shared = model(1.0)
    total, weighted, _ = Objective(dict.fromkeys(NAMES, 1.0), NAMES, balance)(losses, 0.0, shared)
    assert set(weighted) == set(NAMES) and not list(balance.parameters())
    factor = float(balance.factor[KINDS.index("distill.cwd")])
    total.backward()
    own = model.heads["distill_cwd"].weight.grad.clone()
    again = Three()
    again(1.0)[0]["distill.cwd"].backward()
    assert torch.allclose(own, factor * again.heads["distill_cwd"].weight.grad, rtol=1e-4)


def test_without_gradients_nothing_is_measured_and_no_step_counted():
    balance = GradientNorm(KINDS, share=0.5)
    with torch.no_grad():
        sums = numbers(hard=1.0, seg_soft=1.0, distill_cwd=1.0)
        assert balance.factors(sums, ()) == {"hard": 1.0, "seg.soft": 1.0, "distill.cwd": 1.0}
    assert balance.steps == 0


def test_a_batch_without_hard_losses_or_without_a_group_is_survived():
    balance = GradientNorm(KINDS, share=0.5, every=1, momentum=0.0)
    objective = Objective(dict.fromkeys(NAMES, 1.0), NAMES, balance)
    losses, shared = Three()(1.0)
    soft = {k: v for k, v in losses.items() if ".hard." not in k}
    assert {k: v.item() for k, v in objective(soft, 0.0, shared)[1].items()} == {
        k: v.item() for k, v in soft.items()
    }
    after = norms(objective({k: v for k, v in losses.items() if k != "distill.cwd"}, 0.0, shared)[1], shared)
    assert set(after) == {"hard", "seg.soft"} and after["seg.soft"] == pytest.approx(
        0.5 * after["hard"], rel=1e-4
    )


def test_a_group_whose_weight_is_still_0_is_measured_when_it_counts():
    balance = GradientNorm(KINDS, share=0.5, every=1, momentum=0.9)
    weights = dict.fromkeys(NAMES, 1.0)
    assert pull(balance, weights=weights | {"distill.cwd": 0.0})["distill.cwd"] == 0
    after = pull(balance, weights=weights | {"distill.cwd": 0.25})
    assert after["distill.cwd"] == pytest.approx(0.5 * after["hard"], rel=1e-4)


def test_a_measurement_that_is_not_finite_leaves_the_factor():
    balance = GradientNorm(KINDS, share=0.5, every=1, momentum=0.5)
    for scale in (1.0, float("inf"), float("nan"), 1.0):
        pull(balance, scale=scale)
    after = pull(balance)
    assert after["distill.cwd"] == pytest.approx(0.5 * after["hard"], rel=1e-4)


def test_a_measurement_of_the_hard_losses_that_is_not_finite_leaves_the_factor():
    balance = GradientNorm(KINDS, share=0.5, every=1, momentum=0.5)
    pull(balance)
    losses, shared = Three()(1.0)
    balance.factors(
        grouped(losses | {"seg.hard.ce": losses["seg.hard.ce"] * float("inf")}, hard_together), shared
    )
    for _ in range(2):
        after = pull(balance)
    assert after["distill.cwd"] == pytest.approx(0.5 * after["hard"], rel=1e-4)


def test_it_goes_on_from_its_state():
    def run(cut):
        balance, found = GradientNorm(KINDS, share=0.5, every=2), []
        for step in range(6):
            if step == cut:
                state = {k: v.clone() for k, v in balance.state_dict().items()}
                balance = GradientNorm(KINDS, share=0.5, every=2)
                balance.load_state_dict(state)
            found.append(pull(balance, scale=1.5**step))
        return found

    whole = run(None)
    assert run(3) == whole and run(4) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "share: give a number for all groups"),
        ({"share": {}}, "share: give a number for all groups"),
        ({"share": 0.0}, r"share\.seg\.soft: 0\.0 is not a number above 0"),
        ({"share": {"seg.soft": "much"}}, r"share\.seg\.soft: 'much' is not a number above 0"),
        ({"share": {"seg.soft": True}}, r"share\.seg\.soft: True is not a number above 0"),
        ({"share": {"distill.cw": 1.0}}, r"there is no group 'distill\.cw'; known: seg\.soft, distill\.cwd"),
        ({"share": {"hard": 1.0}}, r"there is no group 'hard'"),
        ({"share": 1.0, "every": 0}, "every: 0 must be at least 1"),
        ({"share": 1.0, "momentum": 1.0}, r"momentum: 1\.0 in \[0, 1\)"),
    ],
)
def test_gradient_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GradientNorm(KINDS, **options)


def test_gradient_needs_hard_losses():
    with pytest.raises(ValueError, match="no hard loss to measure the others against"):
        GradientNorm(["seg.soft"], share=1.0)


# --- gradients at the shared maps


def test_gradients_by_hand():
    x, y, z = (torch.tensor(v, requires_grad=True) for v in ([1.0, 2.0], [[3.0]], [5.0]))
    found = gradients({"a": (x * x).sum() + 4 * y.sum(), "b": 7 * x[1]}, (x, y, z))
    # a: 2x, 4, nothing for z; b: 0, 7, nothing for y and z
    assert found["a"].tolist() == [2.0, 4.0, 4.0, 0.0] and found["b"].tolist() == [0.0, 7.0, 0.0, 0.0]
    assert x.grad is None


def test_gradient_report_by_hand():
    x = torch.tensor([1.0, 1.0], requires_grad=True)
    weighted = {
        "seg.hard.ce": 3 * x[0], "seg.hard.dice": 0 * x[1],  # (3, 0)
        "seg.soft.kl": 4 * x[1],  # (0, 4)
        "distill.cwd": 3 * x[0] + 4 * x[1],  # (3, 4)
        "balance": torch.tensor(9.0),
        "det.hard.box": torch.tensor(0.0),  # reaches nothing
    }  # fmt: skip
    # norms 3, 4, 5 of 12; cosines 0, 3*3/(3*5), 4*4/(4*5)
    assert gradient_report(weighted, (x,)) == pytest.approx(
        {
            "gradient/norm/seg.hard": 3.0, "gradient/norm/seg.soft": 4.0, "gradient/norm/distill.cwd": 5.0,
            "gradient/share/seg.hard": 25.0, "gradient/share/seg.soft": 100 / 3, "gradient/share/distill.cwd": 500 / 12,
            "gradient/cosine/seg.hard~seg.soft": 0.0, "gradient/cosine/seg.hard~distill.cwd": 0.6,
            "gradient/cosine/seg.soft~distill.cwd": 0.8,
        }
    )  # fmt: skip
