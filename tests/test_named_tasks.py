"""Tasks by name and kind: two of one kind and one of every other in a run, and names that cannot be."""

import pytest
import torch
import yaml

from multitask_kd import build, checkpoint
from multitask_kd import config as configs
from multitask_kd.build.check import RESERVED
from multitask_kd.data.scenes import cache as scenes_cache
from multitask_kd.distill.taps import Tapped
from multitask_kd.engine.evaluate import evaluate_checkpoint
from multitask_kd.engine.networks import open_network
from multitask_kd.engine.run import build_run
from multitask_kd.engine.step import compute_step
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError

SIZE = (48, 64)
HEADS = {
    "drivable": {"kind": "semantic"},
    "lane": {"kind": "semantic", "ratio": 3.0, "hard": {"dice": 0.5}},
    "det": {"head": {"strides": [8, 16], "depth": 1}},
    "weather": {"kind": "classification", "ratio": 0.5, "head": {"dropout": 0.1}},
    "depth": {"kind": "depth", "head": {"depth": 0}},
}
KINDS_OF = {
    "drivable": "semantic",
    "lane": "semantic",
    "det": "detection",
    "weather": "classification",
    "depth": "depth",
}
SOFT = {
    "drivable": {"alpha": 0.5, "soft": {"loss": "kl", "options": {"temperature": 2}}},
    "lane": {"alpha": 0.25, "soft": {"loss": "cwd"}},
    "det": {"alpha": 0.5, "soft": {"loss": "det_mse"}},
    "weather": {"alpha": 0.5, "soft": {"loss": "kl"}},
    "depth": {"alpha": 0.5, "soft": {"loss": "depth_l1"}},
}
HARD = [
    "drivable.hard.ce", "lane.hard.ce", "lane.hard.dice", "det.hard.box", "det.hard.objectness",
    "det.hard.class", "weather.hard.ce", "depth.hard.l1",
]  # fmt: skip


def recipe(config):
    return build_run(build.resolve_init(config))


def said_of(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return str(error.value)


@pytest.fixture(scope="session")
def five(raw):
    """five(folder, {"train.steps": 3, ...}) -> a config of seconds with five heads on the scenes."""

    def make(folder, changes=(), tasks=HEADS):
        plain = raw(folder, {"train.steps": 2, "eval.pictures": 0})
        plain["tasks"] = {name: dict(task) for name, task in tasks.items()}
        for key, value in dict(changes).items():
            *parents, last = key.split(".")
            node = plain
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        return configs.parse(plain, "five.yaml")

    return make


@pytest.fixture(scope="session")
def five_run(five, tmp_path_factory):
    """A folder with a trained network of five heads."""
    folder = tmp_path_factory.mktemp("five") / "run"
    train(
        five(
            folder, {"model.width": 16, "run.seed": 7, "train.ema": 0, "data.workers": 2, "eval.pictures": 1}
        )
    )
    return folder


@pytest.fixture(scope="session")
def taught(five_run):
    """HEADS, every one taught by that network, and the network."""
    heads = {name: {**HEADS[name], **SOFT[name]} for name in HEADS}
    return heads, {"teacher": {"path": str(five_run / "best.pt"), "amp": "none"}}


# --- a run of five heads


def test_five_heads_are_built_by_name(five, tmp_path):
    run = recipe(five(tmp_path / "run"))
    assert {name: task.kind for name, task in run.tasks.items()} == KINDS_OF
    assert run.tasks["lane"].classes == ("background", "lane")
    assert run.tasks["drivable"].classes == ("background", "drivable")
    assert run.tasks["weather"].classes == ("clear", "overcast", "dark") and run.tasks["depth"].classes == ()
    assert list(run.student.heads) == list(HEADS) and run.distiller.loss_names() == HARD
    assert {name: part["kind"] for name, part in run.arch["tasks"].items()} == KINDS_OF
    assert run.train_layout.kinds == KINDS_OF and run.train_layout.labelled() == set(HEADS)
    weights = run.objective.weights_at(0.0)
    assert (weights["lane.hard.ce"], weights["lane.hard.dice"], weights["weather.hard.ce"]) == (3.0, 1.5, 0.5)
    assert weights["drivable.hard.ce"] == weights["depth.hard.l1"] == 1.0 and weights["det.hard.box"] == 5.0


def test_every_head_gives_its_own_prediction(five, tmp_path):
    run = recipe(five(tmp_path / "run"))
    batch = run.first_batch().to(run.device)
    result = compute_step(run, batch, 0.0)
    shapes = {name: tuple(pred.shape) for name, pred in result.preds.items()}
    assert shapes == {
        "drivable": (4, 2, 12, 16), "lane": (4, 2, 12, 16), "det": (4, 6 * 8 + 3 * 4, 4 + 1 + 6),
        "weather": (4, 3), "depth": (4, 1, 12, 16),
    }  # fmt: skip
    assert list(result.raw) == HARD and all(value > 0 for value in result.raw.values())
    assert not torch.equal(result.preds["drivable"], result.preds["lane"])
    assert list(batch.targets) == list(HEADS)


def test_every_loss_reaches_its_own_head_alone(five, tmp_path):
    run = recipe(five(tmp_path / "run"))
    result = compute_step(run, run.first_batch().to(run.device), 0.0)
    for name in HARD:
        task = name.partition(".")[0]
        result.raw[name].backward(retain_graph=True)
        moved = {
            head: any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
            for head, module in run.student.heads.items()
        }
        assert [head for head, found in moved.items() if found] == [task], name
        run.student.zero_grad(set_to_none=True)


def test_five_heads_train_and_are_measured(five, five_run, read_lines):
    metrics = yaml.safe_load((five_run / "metrics.json").read_text())
    assert list(metrics) == ["images", "skipped", *HEADS]
    assert metrics["lane"]["mIoU"] > 0 and set(metrics["lane"]["IoU"]) == {"background", "lane"}
    assert (
        metrics["weather"]["top1"] is not None and metrics["depth"]["AbsRel"] > 0 and "mAP" in metrics["det"]
    )
    (line,) = read_lines(five_run, "train")
    assert {f"raw/{name}" for name in HARD} <= set(line)
    assert evaluate_checkpoint(five(five_run), str(five_run / "best.pt")) == metrics


def test_all_five_are_taught(five, tmp_path, taught):
    heads, teacher = taught
    run = recipe(five(tmp_path / "run", teacher, heads))
    assert list(run.teachers.subjects) == list(HEADS)
    soft = [f"{name}.soft.{SOFT[name]['soft']['loss']}" for name in HEADS]
    assert run.distiller.loss_names() == HARD + soft
    weights = run.objective.weights_at(0.0)
    assert (weights["lane.hard.ce"], weights["lane.soft.cwd"]) == (3 * 0.75, 3 * 0.25)
    assert (weights["weather.hard.ce"], weights["weather.soft.kl"]) == (0.25, 0.25)
    metrics = train(five(tmp_path / "run", {**teacher, "data.labelled": 4, "eval.pictures": 1}, heads))
    assert list(metrics) == ["images", "skipped", *HEADS]


def test_heads_are_taps(five, tmp_path, taught):
    heads, teacher = taught
    run = recipe(five(tmp_path / "run", teacher, heads))
    with Tapped(run.student, [f"heads.{name}" for name in HEADS]) as taps:
        output = run.student(torch.rand(1, 3, *SIZE))
    assert all(torch.equal(taps[f"heads.{name}"], output.preds[name]) for name in HEADS)
    terms = {
        "lane": {"student": "heads.lane", "loss": "kl"},
        "sky": {"student": "heads.weather", "loss": "kl"},
        "far": {"student": "heads.depth", "loss": "feature_mse"},
    }
    run = recipe(five(tmp_path / "run", {**teacher, "distill": terms}))
    assert run.distiller.loss_names() == [*HARD, "distill.lane", "distill.sky", "distill.far"]
    result = compute_step(run, run.first_batch().to(run.device), 0.0)
    assert all(result.raw[f"distill.{name}"].isfinite() for name in terms)
    said = said_of(
        recipe, five(tmp_path / "run", {**teacher, "distill": {"x": {"student": "heads.lnae", "loss": "kl"}}})
    )
    assert said.startswith("distill.x.student: ") and "heads.lane" in said


def test_a_task_without_classes_and_without_labels_is_learnt_from_the_teacher(
    five, tmp_path, taught, read_lines
):
    heads, teacher = taught
    labels = [name for name in HEADS if name != "depth"]
    without = {f"data.{split}.tasks": labels for split in ("train", "val")}
    metrics = train(five(tmp_path / "run", {**teacher, **without}, heads))
    assert metrics["depth"] == {"delta1": None, "AbsRel": None, "RMSE": None} and metrics["lane"]["mIoU"] > 0
    line = read_lines(tmp_path / "run", "train")[-1]
    assert line["raw/depth.soft.depth_l1"] > 0 and "raw/depth.hard.l1" not in line
    said = said_of(recipe, five(tmp_path / "run", {**teacher, **without}, heads | {"depth": HEADS["depth"]}))
    assert said.startswith("tasks.depth.alpha: 0, but no training image has a label for the task")


def test_a_task_taken_out_by_null(five, tmp_path):
    without = {"tasks.lane": None, "tasks.depth": None, "data.classes": {"lane": None}}
    run = recipe(five(tmp_path / "run", without))
    assert list(run.student.heads) == ["drivable", "det", "weather"]


def test_the_order_of_the_config_is_the_order_of_the_heads(five, tmp_path):
    names = list(HEADS)[::-1]
    run = recipe(five(tmp_path / "run", tasks={name: HEADS[name] for name in names}))
    assert list(run.tasks) == list(run.student.heads) == list(run.first_batch().targets) == names


def test_kinds_survive_dump_and_load(five, tmp_path):
    config = five(tmp_path / "run")
    assert configs.parse(yaml.safe_load(configs.dump(config)), "dumped") == config
    assert {name: task.kind for name, task in config.tasks.items()} == KINDS_OF | {"det": None}


# --- names and kinds that cannot be


@pytest.fixture
def no_data(monkeypatch):
    """Reading any data is a failure."""
    monkeypatch.setattr(scenes_cache, "ensure", lambda *_: pytest.fail("data was read"))


NEEDS_KIND = (
    "needs kind; known: classification, depth, detection, semantic (only tasks called seg and det need none)"
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks.lane": {}}, f"tasks.lane: {NEEDS_KIND}"),
        ({"tasks.sge": {}}, f"tasks.sge: {NEEDS_KIND}"),
        (
            {"tasks.lane.kind": "semantc"},
            "tasks.lane.kind: unknown kind of task 'semantc'; did you mean 'semantic'?",
        ),
        (
            {"tasks.det.kind": "boxes"},
            "tasks.det.kind: unknown kind of task 'boxes'; known: classification, depth, detection",
        ),
        ({"tasks.lane.head": {"dpeth": 1}}, "tasks.lane.head.dpeth: no such option; did you mean 'depth'?"),
        ({"tasks.weather.head": {"depth": 1}}, "tasks.weather.head.depth: no such option; known: dropout"),
        ({"tasks.weather.head": {"dropout": 1.0}}, "tasks.weather.head: dropout: 1.0 is not in [0, 1)"),
        ({"tasks.depth.hard": {"loss": "l2"}}, "tasks.depth.hard: loss: 'l2' is none of l1, silog, metres"),
        (
            {"tasks.depth.decode": {"score_threshold": 1}},
            "tasks.depth.decode.score_threshold: no such option",
        ),
        (
            {"tasks.lane.hard": {"class_weights": 3}},
            "tasks.lane.hard: class_weights: a mapping of class name -> weight",
        ),
        ({"tasks.depth.soft": {"loss": "kl"}}, "tasks.depth.soft.loss: 'kl' does not fit this task; known: "),
        (
            {"tasks.weather.soft": {"loss": "cwd"}},
            "tasks.weather.soft.loss: 'cwd' does not fit this task; known: kl",
        ),
        ({"data.classes": {"lnae": ["a"]}}, "data.classes.lnae: there is no such task; did you mean 'lane'?"),
        (
            {"data.classes": {"depth": ["near"]}},
            "data.classes.depth: a task of kind 'depth' has no classes; leave it out",
        ),
    ],
)
def test_a_wrong_name_or_option_of_a_task_is_told_before_data_is_read(no_data, five, tmp_path, changes, said):
    assert said_of(recipe, five(tmp_path / "run", changes)).startswith(said)


@pytest.mark.parametrize("name", [*RESERVED, "train", "keys", "forward"])
def test_names_that_are_used_for_something_else(no_data, five, tmp_path, name):
    said = said_of(recipe, five(tmp_path / "run", {f"tasks.{name}": {"kind": "semantic"}}))
    assert said == f"tasks.{name}: this name is used for something else; choose another"
    assert {"images", "skipped", "hard", "distill"} <= set(RESERVED)


@pytest.mark.parametrize("name", ["a-b", "a b", "", "a/b", "läne!"])
def test_names_that_are_no_names(raw, tmp_path, name):
    plain = raw(tmp_path / "run")
    plain["tasks"][name] = {"kind": "semantic"}
    assert (
        said_of(configs.parse, plain, "x.yaml")
        == f"x.yaml: tasks.{name}: use letters, digits and _ in the name"
    )


def test_names_that_are_unusual(five, tmp_path):
    tasks = {"lane_2": {"kind": "semantic"}, "LANE": {"kind": "semantic"}}
    changes = {f"data.{split}.labels": {"seg": "LANE", "lane": "lane_2"} for split in ("train", "val")}
    run = recipe(five(tmp_path / "run", changes, tasks))
    assert (
        list(run.student.heads) == ["lane_2", "LANE"]
        and len(run.tasks["LANE"].classes) > len(run.tasks["lane_2"].classes) == 2
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"tasks.lane": {"kind": "depth"}},
            "tasks.lane.kind: depth, but the label 'lane' of data.train is of kind semantic",
        ),
        (
            {"tasks.det.kind": "semantic", "tasks.det.head": {}},
            "tasks.det.kind: semantic, but the label 'det' of data.train is of kind detection",
        ),
        (
            {"tasks.curb": {"kind": "semantic"}},
            "tasks.curb: the training data has no labels for it; it has ",
        ),
    ],
)
def test_a_kind_that_is_not_the_labels(five, tmp_path, changes, said):
    assert said_of(recipe, five(tmp_path / "run", changes)).startswith(said)


def test_a_class_weight_of_no_class_is_told_when_the_classes_are_known(five, tmp_path):
    said = said_of(recipe, five(tmp_path / "run", {"tasks.lane.hard": {"class_weights": {"lnae": 2.0}}}))
    assert (
        said == "tasks.lane.hard: class_weights.lnae: the task has no class 'lnae'; it has background, lane"
    )


# --- default names, and files of earlier versions


def test_a_default_name_with_its_kind_is_the_same_run(tiny, tmp_path, same_weights):
    def state(folder, changes):
        metrics = train(tiny(tmp_path / folder, {"train.steps": 2, "eval.pictures": 0, **changes}))
        return checkpoint.load(tmp_path / folder / "best.pt", "x"), metrics

    (plain, metrics), (named, other) = (
        state("a", {}),
        state("b", {"tasks.seg.kind": "semantic", "tasks.det.kind": "detection"}),
    )
    same_weights(plain["model"], named["model"])
    assert metrics == other and plain["arch"] == named["arch"]


def without_kinds(path, to):
    """A checkpoint as earlier versions wrote it."""
    content = checkpoint.load(path, "x")
    content.pop("format")
    for part in content["arch"]["tasks"].values():
        assert part.pop("kind")
    checkpoint.save(to, content)
    return to


def test_a_checkpoint_of_an_earlier_version_predicts_the_same(teacher_run, tmp_path):
    new, old = str(teacher_run / "best.pt"), str(without_kinds(teacher_run / "best.pt", tmp_path / "old.pt"))
    networks = [open_network(path, "x", torch.device("cpu")) for path in (new, old)]
    assert [{n: t.kind for n, t in network.tasks.items()} for network in networks] == [
        {"seg": "semantic", "det": "detection"}
    ] * 2
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (network.run(images).preds for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in ("seg", "det"))
    for name, kind in build.task_kinds(checkpoint.load(old, "x")["arch"]).items():
        assert kind.kind == {"seg": "semantic", "det": "detection"}[name]


def test_a_checkpoint_of_an_earlier_version_is_evaluated_the_same(tiny, teacher_run, tmp_path):
    old, config = without_kinds(teacher_run / "best.pt", tmp_path / "old.pt"), tiny(teacher_run)
    assert evaluate_checkpoint(config, str(old)) == evaluate_checkpoint(config, str(teacher_run / "best.pt"))


def test_a_checkpoint_of_an_earlier_version_teaches(tiny, distilled, teacher_run, tmp_path):
    old = without_kinds(teacher_run / "best.pt", tmp_path / "old.pt")
    runs = [
        recipe(tiny(tmp_path / "run", {**distilled, "teacher": {"path": str(path), "amp": "none"}}))
        for path in (teacher_run / "best.pt", old)
    ]
    batch = runs[0].first_batch().to(runs[0].device)
    first, second = (run.teachers(batch).preds for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in ("seg", "det"))


def test_a_checkpoint_of_an_earlier_version_is_where_training_begins(tiny, teacher_run, tmp_path):
    old = without_kinds(teacher_run / "best.pt", tmp_path / "old.pt")
    starts = []
    for path in (teacher_run / "best.pt", old):
        plain = yaml.safe_load(configs.dump(tiny(tmp_path / "run")))
        plain["model"] = {"start": str(path)}
        plain["tasks"] = {"seg": {}, "det": {}}
        run = recipe(configs.parse(plain, "x"))
        starts.append(run.student.state_dict())
        assert run.arch["tasks"]["seg"]["kind"] == "semantic"
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_a_start_of_another_kind_is_refused(five, five_run, tmp_path):
    path = str(five_run / "best.pt")
    start = {"model": {"start": path}}
    tasks = {
        name: {key: value for key, value in task.items() if key != "head"} for name, task in HEADS.items()
    }
    assert recipe(five(tmp_path / "run", start, tasks)).arch["tasks"]["weather"]["head"] == {"dropout": 0.1}
    tasks["lane"] = {"kind": "depth"}
    said = said_of(recipe, five(tmp_path / "run", start, tasks))
    assert said == f"tasks.lane.kind: depth, but the network of model.start ({path}) has semantic"


def test_a_checkpoint_without_the_kind_of_a_name_says_so(five_run, tmp_path):
    old = str(without_kinds(five_run / "best.pt", tmp_path / "old.pt"))
    assert said_of(open_network, old, "--checkpoint", torch.device("cpu")).endswith(NEEDS_KIND)


def test_a_teachers_task_of_another_kind_is_refused(five, five_run, tmp_path):
    path = str(five_run / "best.pt")
    content = checkpoint.load(path, "x")
    content.pop("format")
    content["arch"]["tasks"]["lane"] = {"kind": "depth", "classes": [], "head": {}}
    net = build.network(content["arch"])
    checkpoint.save(tmp_path / "other.pt", content | {"model": net.state_dict()})
    changes = {
        "tasks.lane": {**HEADS["lane"], **SOFT["lane"]},
        "teacher": {"path": str(tmp_path / "other.pt"), "amp": "none"},
    }
    said = said_of(recipe, five(tmp_path / "run", changes))
    assert said == "teacher.path: the teacher's task 'lane' is of kind depth, the student's semantic"
