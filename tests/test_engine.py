import math
import random
import re
import signal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from multitask_kd import build, checkpoint
from multitask_kd.engine import evaluate, state
from multitask_kd.engine import run as runs
from multitask_kd.engine import train as loop
from multitask_kd.engine.log import LossMeter, RunLog, clock, flatten
from multitask_kd.engine.optim import Ema, lr_factor, make_optimizer
from multitask_kd.engine.run import build_run
from multitask_kd.engine.state import StopSignal
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError
from multitask_kd.tasks.semantic import Semantic

HARD = {"seg.hard.ce", "det.hard.box", "det.hard.objectness", "det.hard.class"}
SOFT = {"seg.soft.kl", "det.soft.det_mse"}
# one plain gradient step: what it does can be said in a line
PLAIN_SGD = {
    "train.steps": 1, "train.log_every": 1, "train.clip": 0, "train.ema": 0, "eval.pictures": 0,
    "train.optimizer": {"name": "sgd", "lr": 0.25, "momentum": 0, "weight_decay": 0, "warmup": 0},
}  # fmt: skip


def built(config):
    """The run of a config."""
    return build_run(build.resolve_init(config))


@pytest.fixture(scope="module")
def plain_run(tiny, tmp_path_factory):
    """A run without teacher: (config, folder, what train returned)."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    still = {"data.augment.brightness": 0, "data.augment.flip": 0, "data.train.count": 4}
    config = tiny(
        folder,
        still
        | {"train.steps": 30, "train.log_every": 3, "train.optimizer": {"lr": 0.02}, "eval.pictures": 2},
    )
    return config, folder, train(config)


@pytest.fixture(scope="module")
def distilled_run(tiny, distilled, tmp_path_factory):
    """A distilled run: (config, folder, what was built for it)."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    config = tiny(folder, {**distilled, "data.labelled": 4, "train.steps": 5, "train.eval_every": 2})
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "build_run", lambda init: kept.append(build_run(init)) or kept[0])
        train(config)
    return config, folder, kept[0]


# a run


def test_a_run_leaves_its_files(plain_run):
    _, folder, _ = plain_run
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.yaml", "best.pt", "last.pt", "metrics.jsonl", "metrics.json", "tensorboard"}


def test_the_resolved_config_is_the_run(plain_run):
    config, folder, _ = plain_run
    assert (
        loop.dump(config)
        == (folder / "config.yaml").read_text()
        == checkpoint.load(folder / "best.pt", "x")["config"]
    )


def test_the_loss_falls(plain_run, read_lines):
    lines = read_lines(plain_run[1], "train")
    for name in ("loss/total", "raw/seg.hard.ce", "raw/det.hard.objectness"):
        assert lines[-1][name] < 0.8 * lines[0][name], name


def test_metrics_are_those_of_the_file_they_stand_beside(plain_run):
    config, folder, metrics = plain_run
    again = evaluate.evaluate_checkpoint(config, str(folder / "best.pt"))
    assert again == metrics == loop.json.loads((folder / "metrics.json").read_text())
    assert metrics["images"] == 5 and metrics["seg"]["pixel_accuracy"] > 0


def test_metrics_are_those_of_best_also_when_it_is_not_the_last(tiny, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(state, "main_score", lambda *args: next(scores))
    config = tiny(
        tmp_path / "run",
        {"train.steps": 3, "train.eval_every": 1, "train.ema": 0, "eval.images": 2, "eval.pictures": 0},
    )
    metrics = train(config)
    assert checkpoint.load(tmp_path / "run/best.pt", "x")["step"] == 1
    assert metrics == evaluate.evaluate_checkpoint(config, str(tmp_path / "run/best.pt"))
    assert metrics["images"] == 5  # eval.images is for the evaluations during training


def test_best_is_the_highest_mean_of_the_main_metrics(plain_run, tiny, tmp_path, monkeypatch):
    metrics = {"seg": {"mIoU": 40.0}, "det": {"mAP": 10.0}}
    run = built(tiny(tmp_path / "run"))
    assert evaluate.main_score(metrics, run.tasks) == 25.0
    assert evaluate.main_score({"seg": {"mIoU": 40.0}, "det": {"mAP": None}}, run.tasks) == 20.0
    assert evaluate.headline({"seg": {"mIoU": 1}, "det": {"mAP": 2, "mAP50": 3}}, run.tasks) == {
        "mIoU": 1,
        "mAP": 2,
        "mAP50": 3,
    }


def test_one_seed_one_run(tiny, tmp_path, same_weights):
    for name in "ab":
        train(tiny(tmp_path / name, {"train.steps": 2, "eval.pictures": 0}))
    train(tiny(tmp_path / "c", {"train.steps": 2, "eval.pictures": 0, "run.seed": 1}))
    a, b, c = (checkpoint.load(tmp_path / name / "last.pt", "x")["model"] for name in "abc")
    same_weights(a, b)
    assert any(not torch.equal(a[k], c[k]) for k in a)


# the log


def test_every_loss_is_logged_raw_weighted_and_as_a_share(distilled_run, read_lines):
    config, folder, run = distilled_run
    lines = read_lines(folder, "train")
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        for kind in ("raw", "weighted", "share"):
            assert {k.partition("/")[2] for k in line if k.startswith(f"{kind}/")} == HARD | SOFT
        for name, weight in run.objective.weights_at(0.0).items():
            assert line[f"weighted/{name}"] == pytest.approx(weight * line[f"raw/{name}"])
            assert line[f"share/{name}"] == pytest.approx(100 * line[f"weighted/{name}"] / line["loss/total"])
        assert line["loss/total"] == pytest.approx(
            sum(v for k, v in line.items() if k.startswith("weighted/"))
        )
        assert sum(v for k, v in line.items() if k.startswith("share/")) == pytest.approx(100)
        assert line["train/gradient_norm"] > 0 and line["speed/images_per_second"] > 0
        assert 0 <= line["speed/data_wait_percent"] <= 100 and line["data/skipped"] == 0
        assert line["train/lr"] == pytest.approx(5e-3 * lr_factor(line["step"] - 1, 5, 0, 0.01))


def test_validation_lines(distilled_run, read_lines):
    _, folder, run = distilled_run
    lines = read_lines(folder, "val")
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        assert {
            "val/seg/mIoU",
            "val/det/mAP",
            "val/det/mAP50",
            "val/seg/IoU/road",
            "val/det/AP/car",
            "val/images",
        } <= set(line)


def test_tensorboard_shows_the_same_numbers_and_pictures(distilled_run, read_lines):
    _, folder, _ = distilled_run
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    written = {}
    for line in read_lines(folder):
        for name, value in line.items():
            if name not in ("kind", "step") and value is not None:
                written.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    shown = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert shown == written
    assert sorted(board.Tags()["images"]) == ["pictures/00", "teacher on unlabelled images/00"]
    assert [p.step for p in board.Images("teacher on unlabelled images/00")] == [0]
    pictures = board.Images("pictures/00")
    assert [p.step for p in pictures] == [2, 4, 5] and pictures[0].encoded_image_string.startswith(b"\x89PNG")
    assert pictures[0].width > 3 * 64  # truth, teacher and student side by side


def test_meter_by_hand():
    meter = LossMeter()
    one, four, two = torch.tensor(1.0), torch.tensor(4.0), torch.tensor(2.0)
    meter.add({"a": one, "b": four}, {"a": 2 * one, "b": four / 2})
    meter.add({"a": two}, {"a": 2 * two})
    # a: (1 + 2) / 2 = 1.5, times 2 = 3; b: 4, times .5 = 2 (it was there once); total 5
    assert meter.summary() == {
        "loss/total": 5.0, "raw/a": 1.5, "weighted/a": 3.0, "share/a": 60.0,
        "raw/b": 4.0, "weighted/b": 2.0, "share/b": 40.0,
    }  # fmt: skip
    again = LossMeter()
    again.restore(meter.state())
    assert again.summary() == meter.summary()
    meter.reset()
    meter.add({"a": torch.tensor(0.0)}, {"a": torch.tensor(0.0)})
    assert meter.summary()["share/a"] == 0.0


def test_losses_follow_weights_that_change_and_what_a_balance_adds():
    meter = LossMeter()
    meter.add({"a": torch.tensor(3.0)}, {"a": torch.tensor(3.0), "balance": torch.tensor(-1.0)})
    meter.add({"a": torch.tensor(1.0)}, {"a": torch.tensor(5.0), "balance": torch.tensor(1.0)})
    # a: raw (3 + 1) / 2, weighted (3 + 5) / 2; the balance's own part has no raw value: (-1 + 1) / 2
    assert meter.summary() == {
        "loss/total": 4.0, "raw/a": 2.0, "weighted/a": 4.0, "share/a": 100.0, "weighted/balance": 0.0, "share/balance": 0.0,
    }  # fmt: skip
    state = meter.state()
    again = LossMeter()
    again.restore(state)
    for each in (meter, again):
        each.add({"a": torch.tensor(2.0)}, {"a": torch.tensor(1.0), "balance": torch.tensor(3.0)})
    assert again.summary() == meter.summary() and meter.summary()["weighted/a"] == 3.0


def test_a_loss_that_is_not_finite_is_named_by_what_stands_in_the_total():
    meter = LossMeter()
    meter.add(
        {"a": torch.tensor(1.0), "b": torch.tensor(1.0)},
        {"a": torch.tensor(1.0), "b": torch.tensor(float("inf"))},
    )
    with pytest.raises(UserError, match=r"step 7: the loss b is not finite"):
        meter.check_finite(7)


def test_images_per_second_counts_the_images_since_the_clock_was_set(tiny, tmp_path, monkeypatch, read_lines):
    """An evaluation between two lines sets the clock anew: the steps before it are not counted either."""
    clocked = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clocked[0])
    update = Ema.update
    monkeypatch.setattr(
        Ema, "update", lambda self: (update(self), clocked.__setitem__(0, clocked[0] + 2.0))[0]
    )
    train(
        tiny(
            tmp_path / "run",
            {"train.steps": 6, "train.log_every": 4, "train.eval_every": 3, "eval.pictures": 0},
        )
    )
    line = read_lines(tmp_path / "run", "train")[0]
    assert line["speed/images_per_second"] == pytest.approx(4 / 2)  # a batch of 4 in every 2 seconds


def test_log_drops_what_is_past_the_step_it_goes_on_from(tmp_path, read_lines):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.scalars("train", step, {"x": float(step), "none": None})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut short by a crash
    log = RunLog(tmp_path, 2)
    log.scalars("train", 3, {"x": 30.0})
    log.close()
    assert [(line["step"], line["x"]) for line in read_lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    RunLog(tmp_path).close()
    assert read_lines(tmp_path) == []


def test_flatten_and_clock():
    metrics = {"images": 2, "seg": {"mIoU": 1.0, "IoU": {"car": 2.0, "a/b": None}}}
    assert flatten(metrics, "val") == {
        "val/images": 2,
        "val/seg/mIoU": 1.0,
        "val/seg/IoU/car": 2.0,
        "val/seg/IoU/a/b": None,
    }
    assert [clock(s) for s in (0, 59.6, 75, 3661)] == ["0:00", "1:00", "1:15", "1:01:01"]


# teacher and student


def test_a_teacher_of_one_task_is_drawn_with_that_task(tiny, tmp_path):
    seg_only = tiny(tmp_path / "teacher", {"train.steps": 1, "eval.pictures": 0})
    train(seg_only.model_copy(update={"tasks": {"seg": seg_only.tasks["seg"]}}))
    changes = {
        "tasks.seg": {"alpha": 0.5, "soft": {"loss": "kl"}},
        "teacher.path": str(tmp_path / "teacher/best.pt"),
        "train.steps": 1,
        "eval.pictures": 1,
    }
    assert train(tiny(tmp_path / "run", changes))["det"]


def test_the_teacher_is_the_same_to_the_bit_after_training(distilled_run, same_weights):
    config, _, run = distilled_run
    same_weights(
        run.teachers.members["teacher"].net.state_dict(), checkpoint.load(config.teacher.path, "x")["model"]
    )
    assert not run.teachers.members["teacher"].net.training and all(
        p.grad is None for p in run.teachers.members["teacher"].net.parameters()
    )


def test_the_teacher_is_in_no_file(distilled_run):
    _, folder, run = distilled_run
    student = run.student.state_dict()
    teacher = {tuple(v.shape) for v in run.teachers.members["teacher"].net.state_dict().values()} - {
        tuple(v.shape) for v in student.values()
    }
    assert teacher  # it is wider, so its tensors can be told by their shapes

    def tensors(node):
        if isinstance(node, torch.Tensor):
            yield node
        for child in (
            node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
        ):
            yield from tensors(child)

    for name in ("best.pt", "last.pt"):
        content = checkpoint.load(folder / name, "x")
        assert list(content["model"]) == list(student)
        assert not teacher & {tuple(t.shape) for t in tensors(content)}
    assert set(content["resume"]["distiller"]) == {f"student.{name}" for name in student}
    assert len(content["resume"]["optimizer"]["state"]) == len(list(run.student.parameters()))
    assert "resume" not in checkpoint.load(folder / "best.pt", "x")


def test_the_student_loads_alone(distilled_run, teacher_run, tmp_path, same_weights):
    _, folder, _ = distilled_run
    (tmp_path / "alone.pt").write_bytes((folder / "best.pt").read_bytes())
    content = checkpoint.load(tmp_path / "alone.pt", "x")
    net = build.from_checkpoint(content, "x").eval()
    same_weights(net.state_dict(), content["model"])
    with torch.no_grad():
        preds = net(torch.rand(1, 3, 48, 64)).preds
    assert preds["seg"].shape == (1, len(content["arch"]["tasks"]["seg"]["classes"]), 12, 16)
    assert (content["labelled_images"], content["unlabelled_images"]) == (4, 8)


def test_the_saved_network_is_the_average_and_the_resumed_one_the_live(plain_run):
    content = checkpoint.load(plain_run[1] / "last.pt", "x")
    live, average = content["resume"]["distiller"], content["model"]
    assert content["resume"]["ema_updates"] == 30
    assert not torch.equal(
        live["student.heads.seg.classifier.weight"], average["heads.seg.classifier.weight"]
    )


def test_without_average_the_saved_network_is_the_live_one(teacher_run, same_weights):
    content = checkpoint.load(teacher_run / "last.pt", "x")
    live = {k.removeprefix("student."): v for k, v in content["resume"]["distiller"].items()}
    same_weights(live, content["model"])


# optimizer, learning rate, average


def test_lr_by_hand():
    # 4 steps of warm-up to the peak in fifths; then 7 steps of cosine, of which the middle one is half-way
    # between 1 and .2
    assert [lr_factor(s, 11, 4, 0.2) for s in range(4)] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5])
    assert lr_factor(4, 11, 4, 0.2) == pytest.approx(1.0)
    assert lr_factor(7, 11, 4, 0.2) == pytest.approx(0.6)
    assert lr_factor(10, 11, 4, 0.2) == pytest.approx(0.2)
    assert lr_factor(5, 7, 4, 0.0) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert [lr_factor(s, 3, 0, 0.0) for s in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert lr_factor(0, 1, 0, 0.01) == 1.0
    assert [lr_factor(s, 2, 50, 0.01) for s in range(2)] == pytest.approx([1 / 51, 2 / 51])


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_norms_and_biases_are_not_decayed(tiny, tmp_path, name, kind):
    net = built(tiny(tmp_path / "run")).distiller
    net.student.neck.fpn.requires_grad_(False)
    optimizer = make_optimizer(net, name=name, lr=0.1, weight_decay=0.3, momentum=0.8)
    assert isinstance(optimizer, kind)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norms = {
        id(p)
        for m in net.modules()
        if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))
        for p in m.parameters(recurse=False)
    }
    expected = {
        id(p): 0.0 if id(p) in norms or re.search(r"bias\b", n) else 0.3
        for n, p in net.named_parameters()
        if p.requires_grad
    }
    named = {id(p): n for n, p in net.named_parameters()}
    assert {named[k]: v for k, v in decay.items()} == {named[k]: v for k, v in expected.items()}
    momentum = [g["betas"][0] if name == "adamw" else g["momentum"] for g in optimizer.param_groups]
    assert momentum == [0.8, 0.8] and (name == "adamw" or all(g["nesterov"] for g in optimizer.param_groups))


def test_average_by_hand():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    linear, norm = net
    with torch.no_grad():
        linear.weight.fill_(1.0)
    ema = Ema(net, 0.15)
    with torch.no_grad():
        linear.weight.fill_(11.0)
        norm.running_mean.fill_(10.0)
        norm.num_batches_tracked.fill_(7)
    ema.update()  # decay min(.15, 1/10) = .1: .1 * 1 + .9 * 11 = 10, .1 * 0 + .9 * 10 = 9
    own = ema.net.state_dict()
    assert own["0.weight"].item() == pytest.approx(10.0) and own["1.running_mean"].item() == pytest.approx(
        9.0
    )
    assert own["1.num_batches_tracked"].item() == 7
    norm.num_batches_tracked.fill_(8)
    with torch.no_grad():
        linear.weight.fill_(0.0)
    ema.update()  # decay min(.15, 2/11) = .15: .15 * 10 + .85 * 0 = 1.5, .15 * 9 + .85 * 10 = 9.85
    assert own["0.weight"].item() == pytest.approx(1.5) and own["1.running_mean"].item() == pytest.approx(
        9.85
    )
    assert own["1.num_batches_tracked"].item() == 8 and ema.updates == 2
    assert linear.weight.item() == 0.0  # the live network is left alone
    assert not ema.net.training and not any(p.requires_grad for p in ema.net.parameters())


def start_of(config):
    """A run as train() starts from it."""
    checkpoint.seed_everything(config.run.seed)
    return built(config)


def step_taken(config):
    """Weight change of a run of one step, by name: (change, the run before it)."""
    run = start_of(config)
    before = {n: p.detach().clone() for n, p in run.student.named_parameters()}
    train(config)
    after = checkpoint.load(f"{config.run.dir}/last.pt", "x")["model"]
    return {n: after[n] - before[n] for n in before}, run


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_follows_the_mean_gradient_of_its_batches(tiny, tmp_path, accumulate):
    config = tiny(tmp_path / "run", PLAIN_SGD | {"train.batch_size": 2, "train.accumulate": accumulate})
    change, run = step_taken(config)
    run.distiller.to(memory_format=torch.channels_last).train()
    batches = list(run.train_batches(0))
    assert len(batches) == accumulate
    for batch, _ in batches:  # by hand: each batch's gradient, summed by autograd
        run.objective(run.distiller(batch.to(run.device, channels_last=True), None).losses).total.backward()
    for name, p in run.student.named_parameters():
        torch.testing.assert_close(change[name], -0.25 * p.grad / accumulate, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulated_batches_are_all_different_images(tiny, tmp_path):
    run = start_of(tiny(tmp_path / "run", {"train.batch_size": 2, "train.accumulate": 3, "train.steps": 2}))
    seen = [i for batch, _ in run.train_batches(0) for i in batch.indices.tolist()]
    assert sorted(seen) == list(range(12))
    rest = [i for batch, _ in run.train_batches(1) for i in batch.indices.tolist()]
    assert rest == seen[6:]


@pytest.mark.parametrize("clip", [0.01, 0])
def test_clip_is_the_largest_gradient_norm(tiny, tmp_path, read_lines, clip):
    change, _ = step_taken(tiny(tmp_path / "run", PLAIN_SGD | {"train.clip": clip}))
    length = torch.stack([c.norm() for c in change.values()]).norm().item()
    norm = read_lines(tmp_path / "run", "train")[0]["train/gradient_norm"]
    assert norm > 0.1  # logged as it was before clipping
    assert length == pytest.approx(0.25 * (clip or norm), rel=1e-3)


def test_bf16_trains_and_stays_finite(tiny, tmp_path, distilled):
    changes = {"train.amp": "bf16", "train.steps": 2, "eval.pictures": 0}
    train(tiny(tmp_path / "run", {**distilled, **changes, "teacher": distilled["teacher"] | {"amp": "bf16"}}))
    weights = checkpoint.load(tmp_path / "run/last.pt", "x")["model"]
    assert all(v.isfinite().all() and v.dtype in (torch.float32, torch.int64) for v in weights.values())


def test_fp16_on_a_cpu_is_refused(tiny, tmp_path, distilled):
    with pytest.raises(UserError, match="train.amp: fp16 needs a CUDA device; use bf16 or none on cpu"):
        train(tiny(tmp_path / "run", {"train.amp": "fp16"}))
    with pytest.raises(UserError, match="teacher.amp: fp16 needs a CUDA device"):
        train(tiny(tmp_path / "run", distilled | {"teacher": distilled["teacher"] | {"amp": "fp16"}}))


# what goes wrong


def spoil(monkeypatch, at, spoiler):
    """Cross-entropy goes through ``spoiler`` from the ``at``-th batch on."""
    calls, losses = [], Semantic.losses

    def spoilt(self, *args):
        calls.append(1)
        found = losses(self, *args)
        return {"ce": spoiler(found["ce"])} if len(calls) >= at else found

    monkeypatch.setattr(Semantic, "losses", spoilt)


@pytest.mark.parametrize(
    ("spoiler", "said"),
    [
        (lambda ce: ce * float("nan"), "step 3: the loss seg.hard.ce is not finite"),
        (lambda ce: ce + float("inf"), "step 3: the loss seg.hard.ce is not finite"),
        (
            lambda ce: ce + (ce - ce.detach()).sqrt(),
            "step 3: the gradient is not finite though every loss is",
        ),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_its_files(
    tiny, tmp_path, monkeypatch, spoiler, said
):
    spoil(monkeypatch, 3, spoiler)
    with pytest.raises(UserError) as error:
        train(tiny(tmp_path / "run", {"train.save_every": 1, "train.log_every": 10}))
    assert str(error.value).startswith(said) and "train.optimizer.lr" in str(error.value)
    content = checkpoint.load(tmp_path / "run/last.pt", "x")
    assert content["step"] == 2
    assert all(
        v.isfinite().all() for v in [*content["model"].values(), *content["resume"]["distiller"].values()]
    )
    assert not (tmp_path / "run/metrics.json").exists()


@pytest.fixture
def finished(tiny, tmp_path):
    """A run of one step, its config maker, and the bytes of its files."""
    make = lambda **changes: tiny(tmp_path / "run", {"train.steps": 1, "eval.pictures": 0, **changes})  # noqa: E731
    train(make())
    names = ("best.pt", "last.pt", "config.yaml", "metrics.json", "metrics.jsonl")
    return make, lambda: {n: (tmp_path / "run" / n).read_bytes() for n in names}


def test_a_folder_in_use_is_refused(finished):
    make, files = finished
    before = files()
    with pytest.raises(
        UserError,
        match="run.dir: .* holds a run already; continue it with --resume, replace it with --overwrite",
    ):
        train(make())
    assert files() == before


def test_overwrite_replaces_the_run(finished, tmp_path, read_lines):
    make, files = finished
    train(make(**{"run.seed": 5, "train.log_every": 1}), overwrite=True)
    assert "seed: 5" in files()["config.yaml"].decode()
    assert [line["kind"] for line in read_lines(tmp_path / "run")] == ["train", "val"]
    assert len(list((tmp_path / "run/tensorboard").glob("events.*"))) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"model.encoder": "tu-nothing"},
        {"data.train.split": "trian"},
        {"data.labelled": 99, "data.unlabelled": False},
    ],
)
def test_overwrite_with_a_faulty_config_destroys_nothing(finished, fault):
    make, files = finished
    before = files()
    with pytest.raises(UserError):
        train(make(**fault), overwrite=True)
    assert files() == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train.optimizer.lr": 0.1}, "train.optimizer.lr"),
        ({"train.steps": 9}, "train.steps"),
        ({"data.train.count": 11}, "data.train.count"),
        ({"data.val.count": 4}, "data.val.count"),
        ({"data.input_size": [64, 64]}, "data.input_size"),
        ({"model.strides": [4, 8, 16, 32], "data.input_size": [64, 64]}, "model.strides"),
        ({"tasks.det.hard": {"box": 1.0}}, "tasks.det.hard"),
        ({"teacher": {"path": "x.pt"}}, "teacher"),
        ({"train.ema": 0}, "train.ema"),
    ],
)
def test_resume_with_another_config_names_the_key(finished, change, key):
    make, files = finished
    before = files()
    with pytest.raises(UserError) as error:
        train(make(**change), resume=True)
    assert str(error.value).startswith("--resume: the config is not the run's: ") and key in str(error.value)
    assert files() == before


def test_resume_may_change_what_cannot_change_the_result(finished):
    make, _ = finished
    free = {
        "data.workers": 1,
        "train.log_every": 1,
        "train.save_every": 1,
        "eval.pictures": 1,
        "run.threads": 2,
    }
    assert train(make(**free), resume=True) is not None


def test_resume_of_nothing(tiny, tmp_path):
    with pytest.raises(UserError) as error:
        train(tiny(tmp_path / "run"), resume=True)
    assert str(tmp_path / "run/last.pt") in str(error.value) and "leave --resume out" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_resume_of_a_finished_run_gives_its_metrics_again(plain_run):
    config, folder, metrics = plain_run
    before = (folder / "best.pt").read_bytes()
    assert train(config, resume=True) == metrics
    assert (folder / "best.pt").read_bytes() == before


def test_resume_from_a_file_without_the_state_of_training(finished, tmp_path):
    make, _ = finished
    (tmp_path / "run/last.pt").write_bytes((tmp_path / "run/best.pt").read_bytes())
    with pytest.raises(UserError, match="holds a network but no state of training"):
        train(make(), resume=True)


# checkpoints


def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    whole = dict.fromkeys(checkpoint.NEEDED, 1)
    checkpoint.save(path, whole)

    def crash(content, file):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(UserError, match="last.pt cannot be written .the disk is full.; free space"):
        checkpoint.save(path, whole | {"step": 2})
    assert checkpoint.load(path, "x")["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_saved_file_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    checkpoint.save(tmp_path / "best.pt", {"step": 1})
    assert (tmp_path / "best.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_weights_are_loaded_strictly():
    net = nn.Linear(2, 3)
    state = net.state_dict()
    for wrong, said in (
        ({"weight": state["weight"]}, "where: the tensor 'bias' is missing"),
        (state | {"more": state["bias"]}, "where: the tensor 'more' is not in the network"),
        (state | {"weight": torch.zeros(3, 4)}, r"where: 'weight' is \[3, 4\], the network has \[3, 2\]"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoint.load_weights(net, wrong, "where")


def test_random_state_goes_to_disk_and_back(tmp_path):
    draw = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))  # noqa: E731
    checkpoint.seed_everything(5)
    draw()
    torch.save({"random": checkpoint.random_state()}, tmp_path / "x.pt")
    expected = draw()
    assert draw() != expected
    checkpoint.restore_random_state(torch.load(tmp_path / "x.pt", weights_only=True)["random"])
    assert draw() == expected


def test_the_first_signal_asks_the_second_stops():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_evaluating_puts_the_mode_back():
    net = nn.Dropout()
    for training in (True, False):
        net.train(training)
        with pytest.raises(ValueError), evaluate.evaluating(net):
            assert not net.training
            raise ValueError
        assert net.training is training


def test_evaluation_of_a_checkpoint_with_other_classes(tiny, tmp_path, plain_run):
    content = checkpoint.load(plain_run[1] / "best.pt", "x")
    content.pop("format")
    content["arch"]["tasks"]["det"]["classes"][0] = "tram"
    checkpoint.save(tmp_path / "other.pt", content)
    with pytest.raises(UserError, match="--checkpoint: .*other.pt: the classes of 'det' differ"):
        evaluate.evaluate_checkpoint(plain_run[0], str(tmp_path / "other.pt"))
