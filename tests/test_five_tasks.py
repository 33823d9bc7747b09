"""Five tasks of four kinds in one network, from the labels to the end of a distilled run."""

import json

import pytest
import several_tasks
import torch
import torch.nn.functional as F
from torch import nn

from multitask_kd import build, checkpoint
from multitask_kd import config as configs
from multitask_kd.engine.announce import by_set
from multitask_kd.engine.bench import _BareLoop
from multitask_kd.engine.check import LOOK, PASS, check_run
from multitask_kd.engine.run import prepare
from multitask_kd.engine.step import compute_step
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError
from multitask_kd.tasks.base import Task
from multitask_kd.tasks.depth import Depth

TASKS = {
    "det": {"head": {"strides": [8, 16], "depth": 1}},
    "drivable": {"kind": "semantic"},
    "lane": {"kind": "semantic", "hard": {"dice": 1.0, "class_weights": {"lane": 3}}},
    "weather": {"kind": "classification"},
    "depth": {"kind": "depth"},
}
SOFT = {"det": "det_soft", "drivable": "kl", "lane": "kl", "weather": "kl", "depth": "depth_l1"}
HARD = {
    "det.hard.box", "det.hard.objectness", "det.hard.class", "drivable.hard.ce", "lane.hard.ce", "lane.hard.dice",
    "weather.hard.ce", "depth.hard.l1",
}  # fmt: skip
LOSSES = HARD | {f"{task}.soft.{loss}" for task, loss in SOFT.items()}
WEATHER = ["clear", "overcast", "dark"]
FACTORY = f"{__name__}:make"


@pytest.fixture(scope="module")
def five(raw):
    """five(folder, {key: value}) -> the plain mapping of a run of the five tasks, without a teacher."""

    def make(folder, changes=()):
        short = {"train.log_every": 1, "train.eval_every": 2, "eval.pictures": 0}
        plain = raw(folder, {"tasks.seg": None, **{f"tasks.{name}": task for name, task in TASKS.items()}})
        del plain["tasks"]["seg"]
        plain["tasks"] = {name: plain["tasks"][name] for name in TASKS}
        for key, value in {**short, **dict(changes)}.items():
            *parents, last = key.split(".")
            node = plain
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = node[last] | value if isinstance(value, dict) and last in node else value
        return plain

    return make


@pytest.fixture(scope="module")
def teacher(five, tmp_path_factory):
    """A trained checkpoint of the five tasks, wider than the student, whose predictions are of a sane size."""
    folder = tmp_path_factory.mktemp("five")
    train(
        configs.parse(
            five(folder / "run", {"model.width": 16, "train.steps": 2, "run.seed": 7, "train.ema": 0}), "x"
        )
    )
    content = checkpoint.load(folder / "run/best.pt", "x")
    for layer in ("depth.log_depth", "weather.classifier", "lane.classifier"):
        content["model"][f"heads.{layer}.weight"] *= (
            1e-2  # statistics of two steps make the maps before it large
        )
    checkpoint.save(folder / "teacher.pt", content)
    return folder / "teacher.pt"


@pytest.fixture(scope="module")
def taught(five, teacher):
    """taught(folder, {key: value}) -> the config of a student whose five tasks are all taught by the
    checkpoint."""

    def make(folder, changes=()):
        own = {f"tasks.{name}": {"alpha": 0.5, "soft": {"loss": loss}} for name, loss in SOFT.items()}
        if not {"teacher", "teachers"} & set(changes):
            own["teacher"] = {"path": str(teacher), "amp": "none"}
        merged = {key: own[key] | value if key in own else value for key, value in dict(changes).items()}
        return configs.parse(five(folder, own | merged), "x")

    return make


def ready(config):
    """The run of a config, in training, and its optimizer."""
    run, optimizer = prepare(build.resolve_init(config))
    run.distiller.train()
    return run, optimizer


@torch.no_grad()
def first_losses(config):
    """Of a run's first batch."""
    run, _ = ready(config)
    return {name: float(loss) for name, loss in compute_step(run, run.first_batch(), 0.0).raw.items()}


@pytest.fixture(scope="module")
def from_checkpoint(taught, tmp_path_factory):
    """The losses of the first batch with the checkpoint as the teacher."""
    return first_losses(taught(tmp_path_factory.mktemp("reference")))


# --- a whole run


@pytest.fixture(scope="module")
def unbroken(taught, tmp_path_factory):
    """A distilled run: (its folder, what train returned)."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return folder, train(taught(folder, {"eval.pictures": 1}))


def test_every_task_is_trained_logged_and_measured(unbroken, read_lines):
    folder, metrics = unbroken
    lines = read_lines(folder, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {key.partition("/")[2] for key in line if key.startswith("raw/")} == LOSSES
        assert all(line[f"raw/{name}"] > 0 for name in LOSSES - {"det.hard.class"})
        # ratio 1, alpha .5, the soft losses' own weight 1
        assert line["weighted/weather.soft.kl"] == pytest.approx(0.5 * line["raw/weather.soft.kl"])
        assert line["weighted/depth.hard.l1"] == pytest.approx(0.5 * line["raw/depth.hard.l1"])
        assert line["loss/total"] == pytest.approx(
            sum(v for k, v in line.items() if k.startswith("weighted/"))
        )
    for task, figures in {
        "det": {"mAP", "mAP50"},
        "drivable": {"mIoU", "IoU"},
        "lane": {"mIoU"},
        "weather": {"top1", "accuracy"},
        "depth": {"delta1", "AbsRel", "RMSE"},
    }.items():
        assert figures <= set(metrics[task])
    assert metrics["depth"]["AbsRel"] > 0 and 0 < metrics["depth"]["delta1"] < 100
    assert list(metrics["weather"]["accuracy"]) == WEATHER
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    val = read_lines(folder, "val")[-1]
    assert {"val/lane/IoU/lane", "val/weather/accuracy/dark", "val/depth/RMSE", "val/det/AP/car"} <= set(val)


def test_the_checkpoint_names_every_task_and_kind_and_loads_alone(unbroken):
    content = checkpoint.load(unbroken[0] / "best.pt", "x")
    kinds = {name: part["kind"] for name, part in content["arch"]["tasks"].items()}
    assert kinds == {
        "det": "detection", "drivable": "semantic", "lane": "semantic", "weather": "classification", "depth": "depth",
    }  # fmt: skip
    assert (
        content["arch"]["tasks"]["weather"]["classes"] == WEATHER
        and content["arch"]["tasks"]["depth"]["classes"] == []
    )
    net = build.from_checkpoint(content, "x").eval()
    preds = net(torch.rand(2, 3, 48, 64)).preds
    assert {name: tuple(pred.shape) for name, pred in preds.items()} == {
        "det": (2, 60, 11), "drivable": (2, 2, 12, 16), "lane": (2, 2, 12, 16), "weather": (2, 3), "depth": (2, 1, 12, 16),
    }  # fmt: skip


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(taught, unbroken, tmp_path, read_lines, same_weights):
    folder = tmp_path / "run"
    assert train(taught(folder, {"eval.pictures": 1}), judge=lambda step, metrics: step == 2) is None
    assert checkpoint.load(folder / "last.pt", "x")["step"] == 2
    torch.manual_seed(99)  # the random state comes from the file, not from here
    assert train(taught(folder, {"eval.pictures": 1}), resume=True) == unbroken[1]
    a, b = (checkpoint.load(f / "last.pt", "x") for f in (unbroken[0], folder))
    same_weights(a["model"], b["model"])
    same_weights(a["resume"]["distiller"], b["resume"]["distiller"])
    for key, state in a["resume"]["optimizer"]["state"].items():
        same_weights(state, b["resume"]["optimizer"]["state"][key])

    def plain(run):
        return [
            {key: v for key, v in line.items() if not key.startswith("speed/")} for line in read_lines(run)
        ]

    assert plain(unbroken[0]) == plain(folder)


def test_the_check_passes_with_a_line_for_every_task(taught, tmp_path):
    proof = check_run(*ready(taught(tmp_path / "run", {"teacher.floor": {"weather": 0, "depth": 0}})))
    found = {line.what: line for line in proof.lines}
    assert not proof.failed
    for task in TASKS:
        assert (
            found[f"{task}.soft"].verdict in (PASS, LOOK) and "% of the total" in found[f"{task}.soft"].detail
        )
        assert f"{task}.hard" in found and found[f"teacher's {task}"].verdict == PASS
    assert found["classes of weather"].detail == "3, the same names in the same order"
    assert found["classes of depth"].detail == "a task of kind depth has none"
    assert (
        found["teacher's weather"].detail.startswith("top1 ")
        and "teacher.floor.weather asks 0" in found["teacher's weather"].detail
    )
    assert found["teacher's depth"].detail.startswith("delta1 ")


def test_a_floor_on_any_kind_of_task(taught, tmp_path):
    proof = check_run(*ready(taught(tmp_path / "run", {"teacher.floor": {"depth": 99.5}})))
    assert [line.what for line in proof.failed] == ["teacher's depth"]


def test_a_student_that_learns_from_its_own_average(taught, tmp_path, read_lines):
    train(
        taught(
            tmp_path / "run",
            {"teacher": {"source": "ema", "amp": "none"}, "train.ema": 0.9, "train.steps": 2},
        )
    )
    assert {
        k.removeprefix("raw/") for k in read_lines(tmp_path / "run", "train")[-1] if k.startswith("raw/")
    } == LOSSES


# --- several sets, missing labels


def sets(plain):
    """One set with the labels of three tasks, one with those of two in half of its images."""
    one = plain["data"]["train"]
    roads = {**one, "name": "roads", "tasks": ["drivable", "lane", "weather"]}
    return [roads, {**one, "name": "boxes", "count": 8, "tasks": ["det", "depth"], "labelled": 4}]


ROADS = {"drivable.hard.ce", "lane.hard.ce", "lane.hard.dice", "weather.hard.ce"}


def test_losses_by_set(five, taught, tmp_path, read_lines):
    config = taught(tmp_path / "run", {"data.train": sets(five(tmp_path))})
    train(config)
    for line in read_lines(tmp_path / "run", "train"):
        names = {key for key in line if key.startswith("set/")}
        soft = {f"{task}.soft.{loss}" for task, loss in SOFT.items()}
        assert {
            key.removeprefix("set/roads/") for key in names if key.startswith("set/roads/")
        } == ROADS | soft
        assert {key.removeprefix("set/boxes/") for key in names if key.startswith("set/boxes/")} >= soft
        assert not {f"set/boxes/{name}" for name in ROADS} & names
    boxes = [
        name
        for line in read_lines(tmp_path / "run", "train")
        for name in line
        if name.startswith("set/boxes/")
    ]
    assert {"set/boxes/det.hard.box", "set/boxes/depth.hard.l1"} <= set(boxes)


def test_losses_by_set_by_hand(five, taught, tmp_path):
    run, _ = ready(taught(tmp_path / "run", {"data.train": sets(five(tmp_path))}))
    batch = run.first_batch()
    result = compute_step(run, batch, 0.0)
    before = {name: loss.item() for name, loss in result.raw.items()}
    found = by_set(run, batch, result)
    rows = [
        row for row, index in enumerate(batch.indices.tolist()) if run.train_layout.set_of(index) == "roads"
    ]
    assert 0 < len(rows) < len(batch.indices)
    own, other = (
        {task: pred[rows] for task, pred in preds.items()} for preds in (result.preds, result.teacher.preds)
    )
    target = batch.targets["weather"]["class"][rows]
    assert found["set/roads/weather.hard.ce"] == pytest.approx(
        F.cross_entropy(own["weather"], target).item(), rel=1e-5
    )
    by_hand = F.kl_div(
        own["weather"].log_softmax(1), other["weather"].softmax(1), reduction="batchmean"
    ).item()
    assert found["set/roads/weather.soft.kl"] == pytest.approx(by_hand, rel=1e-4)
    by_hand = (own["depth"] - other["depth"]).abs().mean().item()
    assert found["set/roads/depth.soft.depth_l1"] == pytest.approx(by_hand, rel=1e-5)
    assert {name: loss.item() for name, loss in result.raw.items()} == before


@pytest.mark.parametrize(
    ("task", "classes"), [("weather", WEATHER), ("depth", None), ("det", ["car", "bus"])]
)
def test_a_task_that_only_the_teacher_knows(task, classes, five, taught, tmp_path, read_lines):
    """No image has a label for it: no hard loss is announced, weighed or logged, and the soft one is learnt."""
    plain = five(tmp_path)["data"]
    left = [name for name in TASKS if name != task]
    changes = {"data.train": {**plain["train"], "tasks": left}, "data.val": {**plain["val"], "tasks": left}}
    changes |= {"data.classes": {task: classes}} if classes else {}
    run, _ = ready(taught(tmp_path / "run", changes))
    hard = {name for name in HARD if name.startswith(f"{task}.")}
    assert hard and set(run.distiller.loss_names()) == set(run.objective.weights) == LOSSES - hard
    assert run.distiller.unlabelled == (task,) and task not in run.first_batch().targets
    metrics = train(taught(tmp_path / "run", changes))
    for line in read_lines(tmp_path / "run", "train"):
        assert {key.removeprefix("raw/") for key in line if key.startswith("raw/")} == LOSSES - hard
        assert line[f"raw/{task}.soft.{SOFT[task]}"] > 0
    assert metrics[task][run.tasks[task].main_metric] is None  # nothing to measure it on
    with pytest.raises(
        UserError, match=f"tasks.{task}.alpha: 0, but no training image has a label for the task"
    ):
        ready(taught(tmp_path / "none", {**changes, f"tasks.{task}": {"alpha": 0}}))


def test_a_student_of_one_task_without_any_label(five, taught, tmp_path, read_lines):
    plain = taught(tmp_path / "run").model_dump(mode="json")
    plain["tasks"] = {"depth": plain["tasks"]["depth"]}
    plain["data"]["train"]["tasks"] = []
    config = configs.parse(plain, "x")
    run, optimizer = ready(config)
    assert run.distiller.loss_names() == ["depth.soft.depth_l1"] and run.first_batch().targets == {}
    assert all(line.verdict == PASS for line in check_run(run, optimizer).lines)
    _BareLoop(run, [run.first_batch()]).student_step()
    metrics = train(config)
    assert metrics["depth"]["AbsRel"] > 0  # the validation set has labels
    assert all(line["raw/depth.soft.depth_l1"] > 0 for line in read_lines(tmp_path / "run", "train"))


# --- teachers from elsewhere


class Other(nn.Module):
    """The network of a checkpoint of ours in other hands: probabilities, metres, and names of its own."""

    def __init__(self, arch):
        super().__init__()
        self.net = build.network(arch)

    def forward(self, images):
        preds = self.net(images).preds
        road, lines = preds["drivable"], preds["lane"].softmax(1)
        return {
            "boxes": preds["det"],
            "maps": [road, lines],
            "sky": preds["weather"].softmax(1),
            "metres": preds["depth"].exp()[:, 0],
            "near": 2 / preds["depth"].exp(),
        }


def make(arch):
    return Other(arch)


OUTPUTS = {
    "det": {"at": "boxes", "strides": [8, 16]},
    "drivable": {"at": "maps.0"},
    "lane": {"at": "maps.1", "form": "probability"},
    "weather": {"at": "sky", "form": "probability"},
    "depth": {"at": "metres"},
}
INVERSE = {"depth": {"at": "near", "form": "inverse", "scale": 0.5}}


@pytest.fixture(scope="module")
def elsewhere(teacher, tmp_path_factory):
    """The section of the checkpoint's network as a state dict with a factory."""
    content = checkpoint.load(teacher, "x")
    path = tmp_path_factory.mktemp("elsewhere") / "net.pt"
    torch.save({f"net.{name}": value for name, value in content["model"].items()}, path)
    classes = {name: part["classes"] for name, part in content["arch"]["tasks"].items() if part["classes"]}
    options = {"factory": FACTORY, "arguments": {"arch": content["arch"]}}
    bare = {"mean": [0, 0, 0], "std": [1, 1, 1]}  # it normalises by itself
    section = {
        "source": "state_dict",
        "path": str(path),
        "options": options,
        "classes": classes,
        "input": bare,
    }
    return section | {"outputs": OUTPUTS, "amp": "none"}


@pytest.mark.parametrize("outputs", [{}, INVERSE], ids=["metres", "inverse"])
def test_the_same_weights_from_elsewhere_teach_the_same(
    outputs, elsewhere, taught, from_checkpoint, tmp_path
):
    section = elsewhere | {"outputs": OUTPUTS | outputs}
    found = first_losses(taught(tmp_path, {"teacher": section}))
    assert set(found) == LOSSES and found == pytest.approx(from_checkpoint, rel=1e-3)


def test_a_run_with_teachers_of_their_own_for_some_tasks(
    elsewhere, teacher, taught, tmp_path, from_checkpoint
):
    """One for the attribute and the depth from elsewhere, a checkpoint for the rest."""
    there = {
        "sky": {
            **elsewhere,
            "tasks": ["weather", "depth"],
            "outputs": {k: OUTPUTS[k] for k in ("weather", "depth")},
        }
    }
    teachers = there | {"own": {"path": str(teacher), "amp": "none", "tasks": ["det", "drivable", "lane"]}}
    assert first_losses(taught(tmp_path, {"teachers": teachers})) == pytest.approx(from_checkpoint, rel=1e-3)
    assert train(taught(tmp_path / "run", {"teachers": teachers, "train.steps": 2})) is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"outputs": {"weather": {"at": "sky"}}},
            "teacher.outputs.weather.form: the network's values are probabilities",
        ),
        (
            {"outputs": {"depth": {"at": "metres", "form": "log"}}},
            "teacher.outputs.depth.form: the network's depths go from",
        ),
        (
            {"outputs": {"depth": {"at": "sky"}}},
            "teacher.outputs.depth: [2, 3] is no map of depth [B,1,h,w] or [B,h,w]",
        ),
        ({"outputs": {"weather": {"at": "metres"}}}, "teacher.outputs.weather: [2, 12, 16] is no [B,C]"),
        ({"outputs": {"depth": {"scale": 0}}}, "teacher.outputs.depth: scale: 0 is not a number above 0"),
        (
            {"classes": {"depth": ["near"]}},
            "teacher.classes.depth: a task of kind 'depth' has no classes to name; leave it out",
        ),
        (
            {"map": {"depth": {"a": "b"}}},
            "teacher.map.depth: a task of kind 'depth' has no classes to name; leave it out",
        ),
        (
            {"classes": {"weather": ["clear", "dark"]}},
            "teacher.outputs.weather: the network gives 3 classes, but 2 are named",
        ),
        (
            {"outputs": {"depth": None}},
            "tasks.depth.alpha: it is above 0, but no teacher knows 'depth'; set it to 0, or add a teacher, "
            "or say how to read it "
            "in teacher.outputs.depth",
        ),
    ],
)
def test_faults_of_a_teacher_are_told_before_training(change, said, elsewhere, taught, tmp_path):
    section = {
        key: value | change.get(key, {}) if isinstance(value, dict) else value
        for key, value in elsewhere.items()
    }
    section |= {key: value for key, value in change.items() if key not in section}
    section["outputs"] = {name: given for name, given in section["outputs"].items() if given is not None}
    with pytest.raises(UserError) as error:
        train(taught(tmp_path / "run", {"teacher": section}))
    assert str(error.value).startswith(said), str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_network_of_which_nothing_is_named(elsewhere, five, tmp_path):
    nameless = {key: value for key, value in elsewhere.items() if key not in ("classes", "outputs")}
    depth = {"tasks.depth": {"alpha": 0.5, "soft": {"loss": "depth_l1"}}, "teacher": nameless}
    plain = five(tmp_path / "run", depth)
    for tasks, said in (
        (
            TASKS,
            "teacher.classes: the class names of det or drivable or lane or weather, in the network's order, "
            "are needed",
        ),
        (["depth"], "teacher.tasks: which of the tasks it predicts is needed: depth"),
    ):
        raw = {**plain, "tasks": {name: plain["tasks"][name] for name in tasks}}
        with pytest.raises(UserError) as error:
            train(configs.parse(raw, "x"))
        assert str(error.value) == said


def test_a_checkpoint_whose_task_is_of_another_kind(taught, tmp_path):
    arch = {**several_tasks.TASKS, "weather": {"kind": "semantic", "classes": WEATHER, "head": {}}}
    several_tasks.write(tmp_path / "other.pt", arch)
    with pytest.raises(
        UserError,
        match="teacher.path: the teacher's task 'weather' is of kind semantic, the student's classif",
    ):
        ready(taught(tmp_path / "run", {"teacher": {"path": str(tmp_path / "other.pt"), "amp": "none"}}))


# --- several teachers of one task


def test_two_equal_teachers_teach_what_one_teaches(taught, teacher, from_checkpoint, tmp_path):
    section = {"path": str(teacher), "amp": "none"}
    found = first_losses(taught(tmp_path, {"teachers": {"a": section, "b": section}}))
    assert found == pytest.approx(from_checkpoint, rel=2e-2) and set(found) == LOSSES
    boxes = {
        "tasks.det": {
            "alpha": 0.5,
            "soft": {"loss": "det_boxes", "options": {"confidence": 0.01, "doubt": 0.0}},
        }
    }
    assert (
        first_losses(taught(tmp_path, {"teachers": {"a": section, "b": section}, **boxes}))[
            "det.soft.det_boxes"
        ]
        > 0
    )


def test_two_teachers_of_a_kind_that_cannot_average_are_refused_before_training(
    taught, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(Depth, "average", Task.average)
    section = {"path": str(teacher), "amp": "none"}
    with pytest.raises(
        UserError,
        match=r"^tasks\.depth: a task of kind 'depth' cannot average several teachers; let one of them",
    ):
        train(taught(tmp_path / "run", {"teachers": {"a": section, "b": section}}))
    assert not (tmp_path / "run").exists()
    others = {"a": section, "b": {**section, "tasks": [name for name in TASKS if name != "depth"]}}
    ready(taught(tmp_path / "run", {"teachers": others}))


# --- losses and terms that fit no task of that kind


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"tasks.depth": {"soft": {"loss": "kl"}}},
            "tasks.depth.soft.loss: 'kl' does not fit this task; known: depth_l1",
        ),
        (
            {"tasks.weather": {"soft": {"loss": "cwd"}}},
            "tasks.weather.soft.loss: 'cwd' does not fit this task; known: kl",
        ),
        (
            {"tasks.weather": {"soft": {"loss": "kl", "through": "teacher"}}},
            "tasks.weather.soft.through: teacher needs a head that reads the pyramid, not the encoder; use "
            "student",
        ),
        (
            {"distill": {"x": {"student": "heads.weather", "loss": "pkd"}}},
            "distill.x.student: 'heads.weather' gives predictions that are no map; tap neck.* or inside the "
            "head",
        ),
        (
            {"distill": {"x": {"student": "heads.lane", "loss": "depth_l1"}}},
            "distill.x.loss: 'depth_l1' compares predictions; tap heads.depth",
        ),
        (
            {"data.classes": {"depth": ["near"]}},
            "data.classes.depth: a task of kind 'depth' has no classes; leave it out",
        ),
    ],
)
def test_what_does_not_fit_a_kind_is_told_before_training(changes, said, taught, tmp_path):
    with pytest.raises(UserError) as error:
        ready(taught(tmp_path / "run", changes))
    assert str(error.value).startswith(said), str(error.value)


def test_terms_between_the_predictions_of_every_kind(taught, tmp_path):
    terms = {
        "attribute": {"student": "heads.weather", "loss": "kl"},
        "metres": {"student": "heads.depth", "loss": "depth_l1"},
        "map": {"student": "heads.depth", "loss": "feature_mse", "align": "none"},
        "lane": {"student": "heads.lane", "loss": "cwd"},
    }
    found = first_losses(taught(tmp_path, {"distill": terms}))
    assert found["distill.attribute"] == pytest.approx(found["weather.soft.kl"])
    assert found["distill.metres"] == pytest.approx(found["depth.soft.depth_l1"])
    assert found["distill.map"] > 0 and found["distill.lane"] > 0


def test_a_depth_through_the_teachers_head(taught, tmp_path):
    run, _ = ready(taught(tmp_path, {"tasks.depth": {"soft": {"loss": "depth_l1", "through": "teacher"}}}))
    compute_step(run, run.first_batch(), 0.0).raw["depth.soft.depth_l1"].backward()
    moved = {name for name, p in run.distiller.named_parameters() if p.grad is not None and p.grad.any()}
    assert "through.depth.align.4.weight" in moved and not any(
        name.startswith("student.heads.") for name in moved
    )
