"""One step: what training, the check and the benchmark all run."""

import pytest
import torch

from multitask_kd import build
from multitask_kd.engine import bench as benches
from multitask_kd.engine import check as checks
from multitask_kd.engine import train as loop
from multitask_kd.engine.run import prepare
from multitask_kd.engine.step import compute_step
from multitask_kd.engine.train import train

TERMS = {
    "cwd": {"student": "neck.p3", "loss": "cwd", "weight": 0.5},
    "logits": {"student": "heads.seg", "loss": "cwd"},
}
SHORT = {"train.steps": 4, "train.log_every": 1, "eval.pictures": 0}


def ready(config):
    """The run of a config, in training, and its first batch on the device."""
    run, _ = prepare(build.resolve_init(config))
    run.distiller.train()
    return run, run.first_batch().to(run.device, channels_last=config.run.channels_last)


@pytest.fixture
def config(tiny, distilled, tmp_path):
    """config({key: value}) -> that of a run with both tasks taught and two terms, not begun."""
    return lambda changes=(): tiny(
        tmp_path / "run", {**distilled, **SHORT, "distill": TERMS, **dict(changes)}
    )


def values(losses):
    return {name: float(loss.detach()) for name, loss in losses.items()}


# --- the losses of a short run before the step was one function: raw, by step

PINNED = {
    1: {
        "loss/total": 10.84875, "raw/seg.hard.ce": 2.478253, "raw/seg.soft.kl": 0.1921753,
        "raw/det.hard.box": 0.8275671, "raw/det.hard.objectness": 4.230545, "raw/det.hard.class": 1.526642,
        "raw/det.soft.det_mse": 0.3841241,
        "raw/distill.cwd": 0.8063737, "raw/distill.logits": 0.06577475, "train/gradient_norm": 29.07976,
    },
    4: {
        "loss/total": 10.81477, "raw/seg.hard.ce": 2.532536, "raw/seg.soft.kl": 0.1778049,
        "raw/det.hard.box": 0.7589693, "raw/det.hard.objectness": 4.333234, "raw/det.hard.class": 1.680759,
        "raw/det.soft.det_mse": 0.3343753,
        "raw/distill.cwd": 0.8679770, "raw/distill.logits": 0.06302706, "train/gradient_norm": 10.86684,
    },
}  # fmt: skip


def test_the_losses_of_a_short_run_are_what_they_always_were(config, tmp_path, read_lines):
    train(config({"data.labelled": 8}))
    lines = {line["step"]: line for line in read_lines(tmp_path / "run", "train")}
    for step, pinned in PINNED.items():
        assert {key: lines[step][key] for key in pinned} == pytest.approx(pinned, rel=1e-3)


# --- the same function everywhere


def recorded(monkeypatch, module):
    """The results of every step that ``module`` runs."""
    found = []

    def step(*args, **kwargs):
        found.append(compute_step(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(module, "compute_step", step)
    return found


def test_train_check_and_bench_run_the_same_step(config, monkeypatch):
    run, batch = ready(config())
    expected = values(compute_step(run, batch, 0.0).raw)
    assert set(expected) == set(run.distiller.loss_names()) and all(loss > 0 for loss in expected.values())

    trained = recorded(monkeypatch, loop)
    train(config({"train.check": False, "train.steps": 2}))
    assert len(trained) == 2 and values(trained[0].raw) == expected

    checked = recorded(monkeypatch, checks)
    run, optimizer = prepare(build.resolve_init(config()))
    assert not checks.check_run(run, optimizer).failed
    assert values(checked[0].raw) == expected

    timed = recorded(monkeypatch, benches)
    run, batch = ready(config())
    benches._BareLoop(run, [batch]).step()
    assert len(timed) == 1 and values(timed[0].raw) == expected


def test_a_step_by_hand(config):
    run, batch = ready(config())
    result = compute_step(run, batch, 0.0)
    weights = run.objective.weights_at(0.0)
    assert set(result.raw) == set(result.weighted) == set(weights)
    for name, loss in result.raw.items():
        assert result.weighted[name].item() == pytest.approx(weights[name] * loss.item())
    assert result.total.item() == pytest.approx(sum(values(result.weighted).values()))
    assert set(result.preds) == set(result.soft_preds) == {"seg", "det"} == set(result.teacher.preds)
    assert {"neck.p3", "heads.seg"} == set(result.taps) == set(result.teacher.taps)
    assert result.shared[0].shape[2:] == (12, 16) and result.factors == {}
    teacher = run.teachers(batch)
    assert torch.equal(teacher.preds["seg"], result.teacher.preds["seg"])
    kl = run.distiller.soft["seg"](result.preds["seg"], teacher.preds["seg"])
    assert kl.item() == pytest.approx(result.raw["seg.soft.kl"].item())


def test_what_a_step_keeps_for_later_has_no_gradient(config):
    run, batch = ready(config())
    result = compute_step(run, batch, 0.0)
    assert not any(pred.requires_grad for pred in (*result.preds.values(), *result.soft_preds.values()))
    assert not any(
        pred.requires_grad for pred in (*result.teacher.preds.values(), *result.teacher.taps.values())
    )
    assert all(loss.requires_grad for loss in result.raw.values()) and result.shared[0].requires_grad


def test_without_a_teacher_there_is_none(tiny, tmp_path):
    run, batch = ready(tiny(tmp_path / "run"))
    result = compute_step(run, batch, 0.0)
    assert (
        result.teacher is None
        and set(result.raw) == set(run.distiller.hard_names())
        and result.soft_preds == {}
    )


def test_weights_follow_the_progress_or_are_given(config):
    alpha = {"schedule": "linear", "start": 0, "end": 0.5}
    temperature = {"schedule": "staged", "values": [8, 1]}
    seg = {"alpha": alpha, "soft": {"loss": "kl", "options": {"temperature": temperature}}}
    run, batch = ready(config({"tasks.seg": seg}))
    begin, end = (compute_step(run, batch, progress) for progress in (0.0, 1.0))
    assert begin.weighted["seg.soft.kl"] == 0 and begin.raw["seg.soft.kl"] > 0
    # ratio 2, alpha .5 at the end
    assert end.weighted["seg.soft.kl"].item() == pytest.approx(2 * 0.5 * end.raw["seg.soft.kl"].item())
    assert run.distiller.soft["seg"].temperature == 1 and begin.raw["seg.soft.kl"] != end.raw["seg.soft.kl"]
    given = dict.fromkeys(run.distiller.loss_names(), 3.0)
    found = compute_step(run, batch, 1.0, weights=given)
    assert found.total.item() == pytest.approx(3 * sum(values(end.raw).values()), rel=1e-5)


def test_the_penalty_of_sparse_training_is_in_the_total_or_left_out(tiny, tmp_path):
    run, batch = ready(tiny(tmp_path / "run", {"sparse": {"weight": 0.01}}))
    plain, whole = compute_step(run, batch, 0.0, penalty=False), compute_step(run, batch, 0.0)
    assert "sparse" not in plain.weighted and "sparse" not in whole.raw
    assert whole.weighted["sparse"].item() == pytest.approx(0.01 * run.sparse.penalty().item())
    assert (whole.total - plain.total).item() == pytest.approx(whole.weighted["sparse"].item(), rel=1e-3)


def test_factors_of_a_balance_are_in_the_result(config):
    run, batch = ready(config({"balance": {"method": "gradient", "options": {"share": {"seg.soft": 0.5}}}}))
    result = compute_step(run, batch, 0.0)
    weight = run.objective.weights_at(0.0)["seg.soft.kl"]
    factor = float(result.factors["seg.soft"])
    assert factor > 0 and factor != 1 and result.factors["hard"] == 1.0
    assert result.weighted["seg.soft.kl"].item() == pytest.approx(
        factor * weight * result.raw["seg.soft.kl"].item()
    )


# --- nothing is left behind


def attributes(thing):
    """What an object holds, with plain containers opened: tensors and other objects by identity."""
    if isinstance(thing, dict):
        return {key: attributes(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, set)):
        return [attributes(value) for value in thing]
    return thing if isinstance(thing, (str, int, float, bool, type(None))) else id(thing)


def test_no_state_is_left_between_steps(config):
    run, batch = ready(config({"balance": {"method": "dwa", "options": {"every": 1}}}))
    owners = [run.distiller, run.objective, run.teachers, *run.teachers.members.values(), run]
    owners += [*run.distiller.terms.values(), *run.distiller.soft.values(), *run.tasks.values()]
    before = [attributes(vars(owner)) for owner in owners]
    for progress in (0.0, 0.5):
        compute_step(run, batch, progress).total.backward()
    assert [attributes(vars(owner)) for owner in owners] == before


def test_a_step_is_the_same_again(config):
    """Nothing of one step reaches the next, without an optimizer between."""
    run, batch = ready(config())
    first, second = (compute_step(run, batch, 0.0) for _ in range(2))
    assert values(first.raw) == values(second.raw) and first.total.item() == second.total.item()
