"""model.start: training that begins from a checkpoint's network, also from one that was cut."""

import shutil

import pytest
import torch

from multitask_kd import build, checkpoint
from multitask_kd.compress.profile import WHOLE, parameters
from multitask_kd.compress.prune import Cutter
from multitask_kd.engine.prune import cut_content
from multitask_kd.engine.run import build_run, prepare
from multitask_kd.engine.train import check, train
from multitask_kd.errors import UserError

QUIET = {"eval.pictures": 0, "train.ema": 0.9, "train.eval_every": 2}


def ready(config):
    """The run of a config, and its optimizer."""
    return prepare(build.resolve_init(config))


@pytest.fixture(scope="module")
def cut(teacher_run, tmp_path_factory):
    """The teacher's network, a third of its backbone's and neck's bites taken."""
    kept = checkpoint.load(teacher_run / "best.pt", "x")
    net = build.from_checkpoint(kept, "x")
    order = Cutter(net, (48, 64), method="group", local=True, round_to=2)
    path = tmp_path_factory.mktemp("cut") / "cut.pt"
    checkpoint.save(path, cut_content(kept, net, order.after(len(order.bites) // 3), {}))
    return path


@pytest.fixture(scope="module")
def begun(tiny, cut):
    """begun(folder, changes) -> the config of a run from the cut network: of the model only the file is
    given."""

    def make(folder, changes=()):
        config = tiny(folder, {**QUIET, "model": {}, "tasks.det.head": {}, **dict(changes)})
        model = type(config.model)(start=changes.get("model.start", str(cut)) if changes else str(cut))
        tasks = {name: task.model_copy(update={"head": {}}) for name, task in config.tasks.items()}
        return config.model_copy(update={"model": model, "tasks": tasks})

    return make


def test_training_begins_with_the_files_network(begun, cut, tmp_path, same_weights):
    run, _ = ready(begun(tmp_path))
    kept = checkpoint.load(cut, "x")
    same_weights(run.student.state_dict(), kept["model"])
    assert (
        run.arch == kept["arch"]
        and run.config.model.encoder == "tu-test_resnet"
        and run.config.model.strides == (4, 8, 16)
    )


def test_the_result_is_cut_and_loads_alone(begun, cut, tmp_path):
    train(begun(tmp_path / "run"))
    best = checkpoint.load(tmp_path / "run/best.pt", "x")
    kept = checkpoint.load(cut, "x")
    assert best["arch"]["widths"] == kept["arch"]["widths"] != {}
    net = build.from_checkpoint(best, "x")
    assert parameters(net)[WHOLE] == best["params"] == kept["params"]
    assert any(not torch.equal(value, kept["model"][name]) for name, value in best["model"].items())


def test_resume_is_exact_and_refuses_another_file(begun, cut, tmp_path, same_weights):
    file = tmp_path / "start.pt"
    shutil.copy(cut, file)
    config = begun(tmp_path / "whole", {"model.start": str(file)})
    train(config)
    part = begun(tmp_path / "part", {"model.start": str(file)})
    train(part, judge=lambda step, metrics: step == 2)
    content = checkpoint.load(file, "x")
    other = {
        **content,
        "model": {
            name: value + 0 if "seg" not in name else value * 2 for name, value in content["model"].items()
        },
    }
    checkpoint.save(file, other)
    with pytest.raises(UserError, match="--resume: .*start.pt holds other weights than when the run began"):
        train(part, resume=True)
    shutil.copy(cut, file)
    train(part, resume=True)
    same_weights(
        checkpoint.load(tmp_path / "whole/last.pt", "x")["model"],
        checkpoint.load(tmp_path / "part/last.pt", "x")["model"],
    )


def test_the_uncut_network_teaches(begun, distilled, tmp_path, tiny, cut):
    """All logit terms and the feature terms; adapters as wide as the taps."""
    terms = {
        "cwd": {"student": "neck.p3", "loss": "cwd"}, "mgd": {"student": "neck.p2", "loss": "mgd"},
        "pkd": {"student": "neck.p4", "loss": "pkd"},
    }  # fmt: skip
    soft = {"loss": "det_soft"}
    changes = {**distilled, "distill": terms, "train.steps": 1, "train.log_every": 1}
    config = begun(tmp_path / "run", changes)
    det = config.tasks["det"].model_copy(update={"soft": type(config.tasks["det"].soft)(**soft)})
    config = config.model_copy(update={"tasks": {**config.tasks, "det": det}})
    run, _ = ready(config)
    own = {s: run.student.neck.width_at(s) for s in (4, 8, 16)}
    assert all(width < 16 for width in own.values()), "the pyramid was meant to be cut"
    assert {
        p.shape[:2] for n, p in run.distiller.terms["cwd"].named_parameters() if n.endswith("weight")
    } == {(16, own[8])}
    assert run.distiller.terms["mgd"].align.weight.shape[:2] == (16, own[4])
    assert train(config) is not None


def test_the_file_is_read_once(begun, distilled, cut, tmp_path, monkeypatch):
    read, load = [], torch.load

    def counted(path, *args, **kwargs):
        read.append(str(path))
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, "load", counted)
    train(begun(tmp_path / "run", {**distilled, "train.steps": 1}))
    assert read.count(str(cut)) == 1
    read.clear()
    check(begun(tmp_path / "checked", distilled))
    assert read.count(str(cut)) == 1


# --- what is refused


def refused(config, says):
    with pytest.raises(UserError, match=says):
        build.check(config)


def test_keys_that_contradict(tiny, cut, tmp_path):
    base = {"model.start": str(cut), "model.width": 16}
    build.check(tiny(tmp_path, base))  # the same as the file's
    refused(
        tiny(tmp_path, {**base, "model.width": 8}),
        r"model.width: 8, but the network of model.start \(.*\) has 16; leave it out",
    )
    refused(tiny(tmp_path, {**base, "model.encoder": "resnet18"}), "model.encoder: resnet18, but the network")
    refused(
        tiny(tmp_path, {**base, "tasks.det.head": {"depth": 2}}),
        "tasks.det.head.depth: 2, but the network .* has 1",
    )
    refused(
        tiny(tmp_path, {**base, "data.input_size": [48, 72]}),
        r"data.input_size: \[48, 72\] are not multiples .* model.start, 16",
    )
    with pytest.raises(UserError, match="model.*weights: model.start has weights of its own"):
        tiny(tmp_path, {**base, "model.weights": "x.pt"})


def test_tasks_and_classes_that_do_not_fit(tiny, cut, tmp_path):
    base = {"model.start": str(cut), "model.width": 16}
    refused(
        tiny(tmp_path, {**base, "tasks.det": None}),
        "model.start: .* has heads for seg and det, the config tasks seg",
    )
    content = checkpoint.load(cut, "x")
    content["arch"]["tasks"]["seg"]["classes"].reverse()
    checkpoint.save(tmp_path / "other.pt", content)
    with pytest.raises(
        UserError, match=r"model.start: .*other.pt: the classes of 'seg' are in another order"
    ):
        build_run(build.resolve_init(tiny(tmp_path, {**base, "model.start": str(tmp_path / "other.pt")})))


def test_files_that_are_none(tiny, tmp_path):
    base = {"model.start": str(tmp_path / "none.pt"), "model.width": 16}
    refused(tiny(tmp_path, base), "model.start: there is no checkpoint .*none.pt")
    with pytest.raises(UserError, match="model.start: .* lies in run.dir"):
        folder = tmp_path / "run"
        folder.mkdir()
        (tmp_path / "x").mkdir()
        config = tiny(folder, {"model.width": 16})
        train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})}))
        train(tiny(folder, {"model.start": str(folder / "best.pt"), "model.width": 16}), overwrite=True)


def test_a_cut_network_is_no_encoder_weights(tiny, cut, tmp_path):
    with pytest.raises(
        UserError,
        match=r"model\.weights: .*lacks .* its network was cut: train on with model\.start=.*cut\.pt",
    ):
        ready(tiny(tmp_path, {"model.weights": str(cut)}))
