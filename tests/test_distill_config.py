"""Terms, schedules and balances from the config to the end of a run."""

import copy
import os
import signal

import pytest
import torch
import yaml

from multitask_kd import build, checkpoint
from multitask_kd import config as configs
from multitask_kd.distill.crosshead import CrossHead
from multitask_kd.engine import train as loop
from multitask_kd.engine.optim import make_optimizer
from multitask_kd.engine.run import build_run
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError

TERMS = {
    "cwd": {
        "student": "neck.p3",
        "loss": "cwd",
        "weight": 0.5,
        "options": {"tau": {"schedule": "linear", "start": 4, "end": 1}},
    },
    "mgd": {"student": "neck.p4", "loss": "mgd", "weight": {"schedule": "cosine", "start": 100, "end": 10}},
    "pkd": {"student": "backbone.model.layer2", "teacher": "neck.p2", "loss": "pkd", "size": "teacher"},
}
ADAPTERS = {
    "distill.cwd": {"align.weight"},
    "distill.mgd": {
        "align.weight",
        *(f"loss.generator.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    },
    "distill.pkd": {"align.weight"},
}
SHORT = {"train.steps": 3, "train.log_every": 1, "train.save_every": 1, "eval.pictures": 0, "eval.images": 2}


def built(config):
    """The run of a config."""
    return build_run(build.resolve_init(config))


# --- what the config refuses, before anything is read


def refused(raw):
    with pytest.raises(UserError) as error:
        build.check(configs.parse(raw, "x.yaml"))
    return str(error.value)


def with_seg(**section):
    return {
        "tasks": {"seg": {"alpha": 0.5, "soft": {"loss": "kl"}, **section}, "det": {}},
        "teacher": {"path": "somewhere/best.pt"},
    }


def with_option(name, value, loss="kl"):
    return with_seg(soft={"loss": loss, "options": {name: value}})


def with_term(**section):
    return with_seg() | {"distill": {"x": {"student": "neck.p3", "loss": "cwd", **section}}}


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (
            {"schedule": "linaer", "start": 0, "end": 1},
            ".schedule: unknown schedule 'linaer'; did you mean 'linear'?",
        ),
        (
            {"start": 0, "end": 1},
            ".schedule: unknown schedule ''; known: constant, cosine, linear, staged, warmup",
        ),
        ({"schedule": "linear", "start": 0, "end": 1.5}, ": 1.5 is above 1"),
        ({"schedule": "staged", "values": [0.5, 2]}, ": 2.0 is above 1"),
        ({"schedule": "warmup", "value": 3, "until": 0.5}, ": 3.0 is above 1"),
        ({"schedule": "cosine", "start": -0.5, "end": 1}, ": -0.5 is below 0"),
        (
            {"schedule": "linear", "start": 0, "end": 0.5, "ovr": [0, 1]},
            ".ovr: unknown key; did you mean 'over'?",
        ),
        ({"schedule": "linear", "start": 0}, ".end: Field required"),
        ({"schedule": "linear", "start": 0, "end": 0.5, "over": [0.5, 0.5]}, ": over: [0.5, 0.5] must rise"),
        (
            {"schedule": "staged", "values": [0, 0.5, 1], "at": [0.5]},
            ": at: [0.5] must rise and have one place for each value but",
        ),
        (
            {"schedule": "staged", "values": [0, 0.5, 1], "at": [0.5, 0.2]},
            ": at: [0.5, 0.2] must rise and have one place for",
        ),
        (
            {"schedule": "warmup", "value": 0.5, "until": 0},
            ".until: Input should be greater than 0 (given: 0)",
        ),
        ("much", ": Input should be a valid number, unable to parse string as a number (given: 'much')"),
    ],
)
def test_a_fault_in_a_schedule_is_told_with_its_place(alpha, message):
    assert refused(with_seg(alpha=alpha)).startswith(f"x.yaml: tasks.seg.alpha{message}")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            with_seg(soft={"loss": "kl", "weight": {"schedule": "constant", "value": 0}}),
            "tasks.seg.soft.weight: 0 from beginning to",
        ),
        (with_seg(ratio={"schedule": "linear", "start": -1, "end": 1}), "tasks.seg.ratio: -1.0 is below 0"),
        (
            with_term(weight={"schedule": "linear", "start": 1, "end": -2}),
            "distill.x.weight: -2.0 is below 0",
        ),
        (with_term(weight=0), "distill.x.weight: 0 from beginning to end: leave the part out instead"),
        (with_term(studnt="neck.p3"), "distill.x.studnt: unknown key; did you mean 'student'?"),
        (
            with_seg() | {"distill": {"a.b": {"student": "neck.p3", "loss": "cwd"}}},
            "distill.a.b: use letters, digits and _",
        ),
        (
            with_seg(soft={"loss": "kl", "through": "nobody"}),
            "tasks.seg.soft.through: Input should be 'student' or 'teacher'",
        ),
        (
            {"distill": {"x": {"student": "neck.p3", "loss": "cwd"}}},
            "distill has terms but there is no teacher",
        ),
        ({"teacher": {"source": "self", "path": "a.pt"}}, "teacher: path: the source 'self' reads no file"),
        ({"teacher": {}}, "teacher: path: the source 'checkpoint' needs one"),
        (
            with_seg() | {"teacher": {"source": "ema"}, "train": {"ema": 0}},
            "teacher.source: ema needs the average of weights",
        ),
        (
            with_seg() | {"teacher": {"source": "self"}},
            "tasks.seg.alpha: a student is not taught by its own predictions",
        ),
        (
            {"distill": {"x": {"student": "neck.p3", "loss": "cwd"}}, "teacher": {"source": "self"}},
            "distill.x.teacher: with teacher.source self, name another module of the student",
        ),
    ],
)
def test_a_section_that_makes_no_sense_is_told_with_its_place(raw, message):
    assert refused(raw).startswith(f"x.yaml: {message}")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            with_option("reduction", {"schedule": "linear", "start": 1, "end": 2}),
            "tasks.seg.soft.options.reduction: takes no schedule; of 'kl' temperature may change",
        ),
        (
            with_term(loss="mgd", options={"masked": {"schedule": "warmup", "value": 0.5, "until": 1}}),
            "distill.x.options.masked: takes no schedule; of 'mgd' nothing may change",
        ),
        (
            with_option("temperature", {"schedule": "linear", "start": 4, "end": 0}),
            "tasks.seg.soft.options.temperature: temperature: 0.0 is not above 0",
        ),
        (
            with_term(options={"tau": {"schedule": "warmup", "value": 2, "until": 0.5}}),
            "distill.x.options.tau: tau: 0.0 is not above",
        ),
        (
            with_option("temperature", {"schedule": "staged", "values": [4, 2, 1], "at": [0.5]}),
            "tasks.seg.soft.options.temperature.at: [0.5] must rise and have one place for each value but "
            "the first",
        ),
        (
            with_option("temperature", {"schedule": "linear", "start": 4}),
            "tasks.seg.soft.options.temperature.end: Field required",
        ),
        (with_term(options={"tua": 1.0}), "distill.x.options.tua: no such option; did you mean 'tau'?"),
        (with_term(loss="cwdd"), "distill.x.loss: unknown soft loss 'cwdd'; did you mean 'cwd'?"),
        (
            with_term(student="neck.q3"),
            "distill.x.student: the network has no module 'neck.q3'; did you mean 'neck.p",
        ),
        (with_seg(soft={"loss": "mgd"}), "tasks.seg.soft.loss: 'mgd' does not fit this task; known: cwd, "),
    ],
)
def test_a_fault_in_a_component_is_told_before_anything_is_read(raw, message):
    assert refused(raw).startswith(message)


def test_an_unknown_schedule_among_options_is_told_with_its_place():
    told = refused(with_option("temperature", {"schedule": "linea", "start": 4, "end": 1}))
    assert (
        told
        == "tasks.seg.soft.options.temperature.schedule: unknown schedule 'linea'; did you mean 'linear'?"
    )


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"method": "gradent"}, "balance.method: unknown method 'gradent'; did you mean 'gradient'?"),
        (
            {"method": "fixed", "options": {"every": 1}},
            "balance.options: the method 'fixed' has none (given: every)",
        ),
        ({"options": {"every": 1}}, "balance.options: the method 'fixed' has none (given: every)"),
        (
            {"method": "dwa", "options": {"evry": 1}},
            "balance.options.evry: no such option; did you mean 'every'?",
        ),
        (
            {"method": "dwa", "options": {"every": 0}},
            "balance.options: temperature: 2.0 must be in (0, 1e6], every: 0 at least 1",
        ),
        ({"method": "gradient"}, "balance.options: share: give a number for all groups"),
        (
            {"method": "gradient", "options": {"share": {"seg.sft": 1}}},
            "balance.options: share: there is no group 'seg.sft'; known: ",
        ),
        (
            {"method": "gradient", "options": {"share": -1}},
            "balance.options: share.seg.soft: -1 is not a number above 0",
        ),
    ],
)
def test_a_fault_in_the_balance_is_told_before_anything_is_read(balance, message):
    assert refused(with_term() | {"balance": balance}).startswith(message)


def test_a_gradient_balance_refuses_a_schedule_that_it_would_cancel(tmp_path):
    raw = with_seg(alpha={"schedule": "linear", "start": 0, "end": 0.5})
    raw["balance"] = {"method": "gradient", "options": {"share": 1}}
    assert refused(raw).startswith("tasks.seg.alpha: a schedule, which balance.method gradient would cancel")


def test_a_gradient_balance_with_nothing_to_balance_is_refused():
    told = refused({"balance": {"method": "gradient", "options": {"share": 0.5}}})
    assert told.startswith("balance")


def test_numbers_and_sections_become_functions_of_progress(tiny, distilled, tmp_path):
    seg = {
        "alpha": {"schedule": "warmup", "value": 0.5, "until": 0.5},
        "ratio": 3,
        "soft": {"loss": "kl", "weight": {"schedule": "staged", "values": [2, 1], "at": [0.75]}},
    }
    config = tiny(tmp_path, {**distilled, "tasks.seg": seg})
    assert config.tasks["seg"].taught
    run = built(config)
    weights = {
        name: [run.objective.weights[name](p) for p in (0.0, 0.25, 0.5, 1.0)]
        for name in ("seg.hard.ce", "seg.soft.kl")
    }
    # alpha 0, .25, .5, .5; the soft loss's own weight 2, 2, 2, 1
    assert weights == {"seg.hard.ce": [3.0, 2.25, 1.5, 1.5], "seg.soft.kl": [0.0, 1.5, 3.0, 1.5]}
    assert set(run.schedules) == {"tasks.seg.alpha", "tasks.seg.soft.weight"}
    assert configs.parse(yaml.safe_load(configs.dump(config)), "y.yaml") == config


def test_scheduled_options_start_at_their_first_value_and_are_moved(tiny, distilled, tmp_path):
    soft = {"loss": "kl", "options": {"temperature": {"schedule": "staged", "values": [10, 5, 1]}}}
    run = built(tiny(tmp_path, {**distilled, "tasks.seg": {"alpha": 0.5, "soft": soft}, "distill": TERMS}))
    kl, cwd = run.distiller.soft["seg"], run.distiller.terms["cwd"].loss
    assert kl.temperature == 10 and cwd.tau == 4
    seen = []
    for progress in (0.0, 0.5, 1.0):
        run.distiller.set_progress(progress)
        seen.append((kl.temperature, cwd.tau))
    assert seen == [(10, 4.0), (5, 2.5), (1, 1.0)]
    places = {"tasks.seg.soft.options.temperature", "distill.cwd.options.tau", "distill.mgd.weight"}
    assert set(run.schedules) == places


# --- what a term refuses once both networks are there


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"student": "heads", "loss": "pkd"},
            r"distill\.x\.student: the module 'heads' is never called, so nothing can be learnt there",
        ),
        (
            {"student": "neck.p3", "teacher": "neck.fpn.inner_blocks", "loss": "pkd"},
            r"distill\.x\.teacher: the module 'neck\.fpn\.inner_blocks' is never called",
        ),
        (
            {"student": "heads.det.box", "loss": "pkd"},
            r"distill\.x\.student: the module 'heads\.det\.box' is called 2 times in one pass",
        ),
        (
            {"student": "neck.p3", "loss": "pkd", "align": "none"},
            r"distill\.x\.align: none, but the student has 8 channels there and the teacher 16; use conv",
        ),
        (
            {"student": "neck.p3", "teacher": "neck.q3", "loss": "pkd"},
            r"distill\.x\.teacher: the network has no module 'neck\.q3'; did you mean 'neck\.p",
        ),
        (
            {"student": "neck", "loss": "pkd"},
            r"distill\.x\.student: 'neck': gives a dict, not one tensor; tap a module inside it",
        ),
        (
            {"student": "neck.p3", "loss": "kl"},
            r"distill\.x\.loss: 'kl' compares predictions; tap heads\.seg",
        ),
        (
            {"student": "heads.seg", "loss": "det_mse"},
            r"distill\.x\.loss: 'det_mse' compares predictions; tap heads\.det",
        ),
    ],
)
def test_a_term_that_cannot_be_computed_is_refused_before_the_first_step(
    tiny, distilled, tmp_path, term, message
):
    with pytest.raises(UserError, match=message):
        built(tiny(tmp_path, {**distilled, "distill": {"x": term}}))


def test_cells_of_several_strides_are_not_taken_for_tokens(tiny, distilled, tmp_path):
    """60 cells: 48 of stride 8, then 12 of stride 16. As a map it would be cells 12 to 59 in rows of 8."""
    with pytest.raises(UserError, match=r"distill\.x\.student: 'heads\.det'"):
        built(tiny(tmp_path, {**distilled, "distill": {"x": {"student": "heads.det", "loss": "pkd"}}}))


@pytest.fixture(scope="module")
def teacher_of_other_classes(teacher_run, tmp_path_factory):
    """Changes: a teacher whose classes of seg are in another order, for a student that it teaches through
    terms alone."""
    content = checkpoint.load(teacher_run / "best.pt", "x")
    content["arch"]["tasks"]["seg"]["classes"] = content["arch"]["tasks"]["seg"]["classes"][::-1]
    path = tmp_path_factory.mktemp("other") / "best.pt"
    checkpoint.save(path, content)
    return {**SHORT, "teacher": {"path": str(path), "amp": "none"}}


def test_a_term_between_predictions_of_other_classes_is_refused(tiny, teacher_of_other_classes, tmp_path):
    """Classes are compared by name for a term too, not only where an alpha is above 0."""
    term = {"student": "heads.seg", "loss": "kl"}
    with pytest.raises(UserError, match="classes of"):
        train(tiny(tmp_path / "run", {**teacher_of_other_classes, "distill": {"x": term}}))


@pytest.mark.parametrize(
    ("term", "checked"),
    [({"loss": "kl"}, False), ({"loss": "cwd", "align": "none"}, True)],
    ids=["without the check", "heads compared as maps"],
)
def test_a_term_between_predictions_of_other_classes_is_always_refused(
    tiny, teacher_of_other_classes, tmp_path, term, checked
):
    changes = {
        **teacher_of_other_classes,
        "distill": {"x": {"student": "heads.seg", **term}},
        "train.check": checked,
    }
    with pytest.raises(UserError, match="classes of"):
        train(tiny(tmp_path / "run", changes))


# --- whole runs


@pytest.fixture(scope="module")
def with_terms(tiny, distilled, tmp_path_factory):
    """A run with three terms: (config, folder)."""
    folder = tmp_path_factory.mktemp("terms") / "run"
    config = tiny(folder, {**distilled, **SHORT, "distill": TERMS})
    train(config)
    return config, folder


def test_every_term_is_logged(with_terms, read_lines):
    lines = read_lines(with_terms[1], "train")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        shares = [v for k, v in line.items() if k.startswith("share/")]
        assert sum(shares) == pytest.approx(100)
        for name in TERMS:
            assert line[f"raw/distill.{name}"] > 0 and line[f"share/distill.{name}"] > 0
        assert line["weighted/distill.cwd"] == pytest.approx(0.5 * line["raw/distill.cwd"])
        assert line["weighted/distill.pkd"] == pytest.approx(line["raw/distill.pkd"])
    # 100 to 10 as half a wave: 55 in the middle; tau 4 to 1 in a line
    assert [line["schedule/distill.mgd.weight"] for line in lines] == pytest.approx([100.0, 55.0, 10.0])
    assert [line["schedule/distill.cwd.options.tau"] for line in lines] == pytest.approx([4.0, 2.5, 1.0])
    weights = [line["weighted/distill.mgd"] / line["raw/distill.mgd"] for line in lines]
    assert weights == pytest.approx([100.0, 55.0, 10.0], rel=1e-5)


def test_adapters_learn(with_terms):
    config, folder = with_terms
    checkpoint.seed_everything(config.run.seed)
    run = built(config)
    own = {
        name: {k for k, _ in module.named_parameters()} for name, module in run.distiller.adapters().items()
    }
    assert own == ADAPTERS
    learnt = checkpoint.load(folder / "last.pt", "x")["resume"]["distiller"]
    for name, keys in ADAPTERS.items():
        for key in keys:
            place = f"terms.{name.removeprefix('distill.')}.{key}"
            assert not torch.equal(run.distiller.state_dict()[place], learnt[place]), place


def test_adapters_are_in_the_optimizer(with_terms):
    run = built(with_terms[0])
    optimizer = make_optimizer(run.distiller, name="adamw", lr=1.0, weight_decay=0.0, momentum=0.9)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    learning = {id(p) for module in run.distiller.adapters().values() for p in module.parameters()}
    assert learning <= held and held == {id(p) for p in run.distiller.parameters()}


def test_the_result_is_the_student_alone(with_terms):
    config, folder = with_terms
    for name in ("best.pt", "last.pt"):
        content = checkpoint.load(folder / name, "x")
        net = build.from_checkpoint(content, "x")  # strict: nothing missing, nothing besides
        assert set(content["model"]) == set(net.state_dict())
        assert content["params"] == sum(p.numel() for p in net.parameters())
    resume = checkpoint.load(folder / "last.pt", "x")["resume"]["distiller"]
    assert {k.split(".")[0] for k in resume} == {"student", "terms"}  # no tensor of the teacher
    assert "resume" not in checkpoint.load(folder / "best.pt", "x")


def test_terms_do_not_change_the_students_start(tiny, distilled, tmp_path, same_weights):
    states, drawn = [], []
    for changes in ({}, distilled, {**distilled, "distill": TERMS}):
        checkpoint.seed_everything(0)
        states.append(built(tiny(tmp_path, changes)).student.state_dict())
        drawn.append(torch.rand(1).item())
    same_weights(states[1], states[0])
    same_weights(states[2], states[0])
    assert drawn[2] == drawn[1]  # nor what is drawn while training


def signal_after(monkeypatch, step):
    done, count = loop.Progress.step, [0]

    def wrapped(self):
        count[0] += 1
        done(self)
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Progress, "step", wrapped)


def broken_and_resumed(tiny, changes, folder, monkeypatch, at=3, again=()):
    with monkeypatch.context() as patch:
        signal_after(patch, at)
        assert train(tiny(folder, changes)) is None
    assert checkpoint.load(folder / "last.pt", "x")["step"] == at
    torch.manual_seed(99)  # the random state comes from the file, not from here
    assert train(tiny(folder, {**changes, **dict(again)}), resume=True) is not None


def check_same(unbroken, broken, read_lines, same_weights):
    a, b = (checkpoint.load(f / "last.pt", "x") for f in (unbroken, broken))
    same_weights(a["resume"]["distiller"], b["resume"]["distiller"])
    same_weights(a["model"], b["model"])
    for key, state in a["resume"]["optimizer"]["state"].items():
        same_weights(state, b["resume"]["optimizer"]["state"][key])
    assert a["metrics"] == b["metrics"]
    plain = lambda lines: [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]  # noqa: E731
    assert plain(read_lines(unbroken)) == plain(read_lines(broken))


@pytest.mark.parametrize(
    "balance",
    [
        {"method": "gradient", "options": {"share": 0.3, "every": 2}},
        {"method": "dwa", "options": {"every": 1}},
        {"method": "uncertainty"},
    ],
    ids=lambda b: b["method"],
)
def test_a_resumed_run_with_terms_and_a_balance_is_the_unbroken_one(
    tiny, distilled, tmp_path, monkeypatch, read_lines, same_weights, balance
):
    terms = copy.deepcopy(TERMS)
    if balance["method"] != "uncertainty":
        terms["mgd"]["weight"] = 100  # the others refuse a schedule
    changes = {
        **distilled,
        **SHORT,
        "distill": terms,
        "balance": balance,
        "train.steps": 5,
        "train.log_every": 2,
        "train.ema": 0.9,
    }
    train(tiny(tmp_path / "unbroken", changes))
    broken_and_resumed(tiny, changes, tmp_path / "broken", monkeypatch)
    check_same(tmp_path / "unbroken", tmp_path / "broken", read_lines, same_weights)
    last = read_lines(tmp_path / "unbroken", "train")[-1]
    factor = last["weighted/distill.cwd"] / last["raw/distill.cwd"] / TERMS["cwd"]["weight"]
    assert abs(factor - 1) > 1e-3  # the balance did something
    if balance["method"] == "uncertainty":
        assert last["weighted/balance"] != 0


# an activation that works in place follows this normalisation
IN_PLACE = {"x": {"student": "backbone.model.layer1.0.bn1", "loss": "feature_mse", "weight": 5}}


def test_a_tap_that_is_written_over_is_copied_from_the_first_step_on(tiny, distilled, tmp_path):
    run = built(tiny(tmp_path, {**distilled, "distill": IN_PLACE}))
    assert (
        run.distiller.tapped.copied
        == run.teachers.members["teacher"].tapped.copied
        == {IN_PLACE["x"]["student"]}
    )
    batch = run.first_batch()
    run.distiller(batch, run.teachers(batch))
    assert run.distiller.tapped.overwritten() == run.teachers.members["teacher"].tapped.overwritten() == []


def test_a_resumed_run_copies_a_tap_that_is_written_over(
    tiny, distilled, tmp_path, monkeypatch, read_lines, same_weights
):
    changes = {**distilled, **SHORT, "distill": IN_PLACE, "train.steps": 4}
    train(tiny(tmp_path / "unbroken", changes))
    broken_and_resumed(tiny, changes, tmp_path / "broken", monkeypatch, at=2)
    check_same(tmp_path / "unbroken", tmp_path / "broken", read_lines, same_weights)


def test_a_tap_that_is_written_over_is_copied_without_the_check_too(tiny, distilled, tmp_path, same_weights):
    changes = {**distilled, **SHORT, "distill": IN_PLACE, "train.steps": 2}
    for checked in (True, False):
        train(tiny(tmp_path / str(checked), {**changes, "train.check": checked}))
    same_weights(*(checkpoint.load(tmp_path / name / "last.pt", "x")["model"] for name in ("True", "False")))


def test_the_last_line_has_gradients_of_its_own_step(tiny, distilled, tmp_path, read_lines):
    """Steps 2 and 3 are logged, the latter because it is the last."""
    changes = {**distilled, **SHORT, "train.log_every": 2, "train.log_gradients": True}
    train(tiny(tmp_path / "run", changes))
    lines = read_lines(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == [2, 3]
    norms = [{k: v for k, v in line.items() if k.startswith("gradient/norm/")} for line in lines]
    assert set(norms[0]) == {
        f"gradient/norm/{task}.{kind}" for task in ("seg", "det") for kind in ("hard", "soft")
    }
    assert all(v > 0 for v in norms[0].values())
    assert norms[1] != norms[0]


def test_a_student_that_learns_from_its_own_deeper_layers(
    tiny, tmp_path, monkeypatch, read_lines, same_weights
):
    term = {
        "student": "backbone.model.layer1",
        "teacher": "backbone.model.layer3",
        "loss": "pkd",
        "weight": 2,
    }
    changes = {
        **SHORT,
        "teacher": {"source": "self"},
        "distill": {"own": term},
        "eval.pictures": 1,
        "train.steps": 4,
    }
    assert train(tiny(tmp_path / "unbroken", changes)) is not None
    lines = read_lines(tmp_path / "unbroken", "train")
    assert all(line["weighted/distill.own"] == pytest.approx(2 * line["raw/distill.own"]) for line in lines)
    assert all(line["raw/distill.own"] > 0 for line in lines)
    broken_and_resumed(tiny, changes, tmp_path / "broken", monkeypatch, at=2)
    check_same(tmp_path / "unbroken", tmp_path / "broken", read_lines, same_weights)


def test_the_deeper_layer_is_not_pulled_to_the_shallower(tiny, tmp_path):
    term = {"student": "backbone.model.layer1", "teacher": "backbone.model.layer3", "loss": "pkd"}
    run = built(tiny(tmp_path, {"teacher": {"source": "self"}, "distill": {"own": term}}))
    assert run.teachers is None and run.distiller.own_teacher
    run.distiller.train()
    run.distiller(run.first_batch()).losses["distill.own"].backward()
    reached = {n for n, p in run.student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(".layer1." in n for n in reached)
    assert not any(part in n for n in reached for part in (".layer2.", ".layer3.", "neck.", "heads."))


def test_a_student_that_is_taught_by_its_own_average(
    tiny, distilled, tmp_path, monkeypatch, read_lines, same_weights
):
    changes = {**distilled, **SHORT, "distill": TERMS, "train.steps": 4, "train.ema": 0.9, "eval.pictures": 1}
    changes["teacher"] = {"source": "ema", "amp": "none"}
    assert train(tiny(tmp_path / "unbroken", changes)) is not None
    lines = read_lines(tmp_path / "unbroken", "train")
    # before the first step the average is the student: only statistics of batches tell them apart
    assert all(
        line[f"raw/{name}"] > 0
        for line in lines
        for name in ("seg.soft.kl", "det.soft.det_mse", "distill.mgd")
    )
    broken_and_resumed(tiny, changes, tmp_path / "broken", monkeypatch, at=2)
    check_same(tmp_path / "unbroken", tmp_path / "broken", read_lines, same_weights)
    content = checkpoint.load(tmp_path / "unbroken/last.pt", "x")
    live = {
        k.removeprefix("student."): v
        for k, v in content["resume"]["distiller"].items()
        if k.startswith("student.")
    }
    assert set(live) == set(content["model"])
    assert any(not torch.equal(live[k], content["model"][k]) for k in live)


def test_the_average_that_teaches_is_the_one_that_is_evaluated(tiny, distilled, tmp_path):
    changes = {**distilled, "teacher": {"source": "ema", "amp": "none"}, "train.ema": 0.9}
    run = built(tiny(tmp_path, changes))
    before = {k: v.clone() for k, v in run.teachers.members["teacher"].net.state_dict().items()}
    average = loop.Ema(run.student, 0.9, run.teachers.members["teacher"].net)
    assert average.net is run.teachers.members["teacher"].net
    with torch.no_grad():
        for p in run.student.parameters():
            p += 1
    assert all(
        torch.equal(v, before[k]) for k, v in run.teachers.members["teacher"].net.state_dict().items()
    )  # a copy of its own
    average.update()
    # the first decay is (1 + 0) / (10 + 0) = .1: nine tenths of the way
    for name, p in run.teachers.members["teacher"].net.named_parameters():
        assert torch.allclose(p, before[name] + 0.9, atol=1e-5) and not p.requires_grad


CROSS = {"alpha": 0.5, "soft": {"loss": "det_soft", "through": "teacher", "options": {"confidence": 0.0}}}
CROSS_SEG = {"alpha": 0.5, "soft": {"loss": "kl", "through": "teacher"}}


def test_a_run_that_is_judged_by_the_teachers_heads(tiny, distilled, tmp_path, read_lines):
    train(tiny(tmp_path / "run", {**distilled, **SHORT, "tasks.det": CROSS, "tasks.seg": CROSS_SEG}))
    lines = read_lines(tmp_path / "run", "train")
    assert all(line["raw/det.soft.det_soft"] > 0 and line["raw/seg.soft.kl"] > 0 for line in lines)
    content = checkpoint.load(tmp_path / "run/last.pt", "x")
    assert set(content["model"]) == set(build.from_checkpoint(content, "x").state_dict())
    resume = content["resume"]["distiller"]
    extra = {k for k in resume if not k.startswith("student.")}
    aligned = [("det", 8), ("det", 16), ("seg", 4)]
    assert extra == {f"through.{task}.align.{s}.{kind}" for task, s in aligned for kind in ("weight", "bias")}


def test_through_the_teachers_head_the_students_own_learns_nothing(tiny, distilled, tmp_path):
    run = built(tiny(tmp_path, {**distilled, "tasks.det": CROSS}))
    run.distiller.train()
    batch = run.first_batch()
    run.distiller(batch, run.teachers(batch)).losses["det.soft.det_soft"].backward()
    grads = {n for n, p in run.distiller.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(n.startswith("student.heads.") for n in grads)
    assert any(n.startswith("student.neck.") for n in grads) and any(
        n.startswith("student.backbone.") for n in grads
    )
    assert {n for n in grads if n.startswith("through.")} == {
        f"through.det.align.{s}.{kind}" for s in (8, 16) for kind in ("weight", "bias")
    }
    assert all(
        p.grad is None and not p.requires_grad for p in run.teachers.members["teacher"].net.parameters()
    )
    assert set(run.distiller.adapters()) == {"det.soft.through"}


def test_the_teachers_pyramid_through_its_own_head_is_the_teachers_prediction(tiny, distilled, tmp_path):
    run = built(tiny(tmp_path, distilled))
    net = run.teachers.members["teacher"].net
    cross = CrossHead(net.heads["det"], {8: "fine", 16: "coarse"}, {8: (16, 16), 16: (16, 16)})
    with torch.no_grad():
        for conv in cross.align.values():
            conv.weight.copy_(torch.eye(16)[:, :, None, None])
            conv.bias.zero_()
        images = torch.rand(2, 3, 48, 64)
        levels = net.neck([net.backbone((images - net.mean) / net.std)[i] for i in (2, 3, 4)])
        found = cross({"fine": levels[8], "coarse": levels[16]})
    assert torch.allclose(found, run.teachers.members["teacher"](images).preds["det"], atol=1e-5)
    assert not any(k.startswith("_head") or "tower" in k for k in cross.state_dict())


def test_an_alpha_that_starts_at_0_still_distils(tiny, distilled, tmp_path, read_lines):
    alpha = {"schedule": "linear", "start": 0, "end": 0.5}
    train(
        tiny(
            tmp_path / "run", {**distilled, **SHORT, "tasks.seg": {**distilled["tasks.seg"], "alpha": alpha}}
        )
    )
    lines = read_lines(tmp_path / "run", "train")
    assert [line["schedule/tasks.seg.alpha"] for line in lines] == [0.0, 0.25, 0.5]
    assert all(line["raw/seg.soft.kl"] > 0 for line in lines)
    # ratio 2, alpha 0, .25, .5
    soft = [line["weighted/seg.soft.kl"] / line["raw/seg.soft.kl"] for line in lines]
    hard = [line["weighted/seg.hard.ce"] / line["raw/seg.hard.ce"] for line in lines]
    assert soft == pytest.approx([0.0, 0.5, 1.0], rel=1e-5) and hard == pytest.approx(
        [2.0, 1.5, 1.0], rel=1e-5
    )


def test_a_run_in_low_precision_on_both_sides(tiny, distilled, tmp_path, read_lines):
    teacher = distilled["teacher"] | {"amp": "bf16"}
    changes = {
        **distilled,
        **SHORT,
        "distill": TERMS,
        "teacher": teacher,
        "train.amp": "bf16",
        "train.steps": 2,
    }
    train(tiny(tmp_path / "run", changes))
    train(tiny(tmp_path / "exact", {**distilled, **SHORT, "distill": TERMS, "train.steps": 2}))
    low, exact = (read_lines(tmp_path / name, "train")[0] for name in ("run", "exact"))
    for name in TERMS:
        assert low[f"raw/distill.{name}"] == pytest.approx(exact[f"raw/distill.{name}"], rel=0.15), name


@pytest.mark.parametrize("key", ["balance", "alpha"])
def test_another_kind_of_balance_or_schedule_replaces_the_base_files(tmp_path, key):
    before = {
        "balance": {"method": "uncertainty"},
        "alpha": {"schedule": "linear", "start": 0, "end": 0.5},
    }
    after = {"balance": {"method": "fixed"}, "alpha": {"schedule": "warmup", "value": 0.5, "until": 0.5}}
    raw = lambda part: with_seg(alpha=part["alpha"]) | {"balance": part["balance"]}  # noqa: E731
    below, above = raw(before), raw(before | {key: after[key]})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(below), encoding="utf-8")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(above | {"base": "base.yaml"}), encoding="utf-8")
    config = configs.load(tmp_path / "own.yaml")
    build.check(config)
    assert config == configs.parse(above, "x.yaml")


def test_a_loss_named_after_its_options_does_not_wipe_them(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("{}", encoding="utf-8")
    given = ["tasks.seg.soft.weight=7", "tasks.seg.soft.options.tau=4", "tasks.seg.soft.loss=cwd"]
    for overrides in (given, given[::-1]):
        soft = configs.load(path, overrides).tasks["seg"].soft
        assert (soft.loss, soft.weight, soft.options) == ("cwd", 7, {"tau": 4})


def test_null_takes_a_term_of_a_base_file_out(tmp_path):
    term = {"student": "neck.p3", "loss": "cwd"}
    base = {"distill": {"a": term, "b": term}, "teacher": {"path": "t.pt"}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    for text, left in (("distill: {a: null}", ["b"]), ("distill: null", [])):
        (tmp_path / "own.yaml").write_text(f"base: base.yaml\n{text}\n", encoding="utf-8")
        assert list(configs.load(tmp_path / "own.yaml").distill) == left


def test_a_base_that_two_bases_share_does_not_undo_the_first(tmp_path):
    files = {
        "common": "train: {steps: 100}",
        "a": "base: common.yaml\ntrain: {steps: 7}",
        "b": "base: common.yaml\nrun: {seed: 3}",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "own.yaml").write_text("base: [a.yaml, b.yaml]", encoding="utf-8")
    config = configs.load(tmp_path / "own.yaml")
    assert (config.train.steps, config.run.seed) == (7, 3)


def test_a_term_named_as_something_of_torch_is_refused():
    raw = with_term() | {"distill": {"values": {"student": "neck.p3", "loss": "cwd"}}}
    assert refused(raw).startswith("distill.values: PyTorch has its own use of this name")


def test_a_share_of_a_gradient_that_does_not_reach_the_maps_is_refused(tiny, distilled, tmp_path):
    terms = {"stem": {"student": "backbone.model.conv1.0", "loss": "feature_mse"}}
    config = tiny(
        tmp_path,
        {**distilled, "distill": terms, "balance": {"method": "gradient", "options": {"share": 0.5}}},
    )
    run = built(config)
    batch = run.first_batch()
    found = run.distiller(batch, run.teachers(batch))
    with pytest.raises(UserError, match="gradient of 'distill.stem' does not reach the maps"):
        run.objective(found.losses, 0.0, found.shared)


def test_a_group_of_weight_zero_is_left_out_of_the_balance(tiny, distilled, tmp_path):
    changes = {**distilled, "tasks.det.ratio": 0.0, "balance": {"method": "uncertainty"}}
    run = built(tiny(tmp_path, changes))
    batch = run.first_batch()
    run.objective(run.distiller(batch, run.teachers(batch)).losses, 0.0).total.backward()
    grads = {name: p.grad for name, p in run.distiller.balance.log_variance.items()}
    assert grads["det"] is None and grads["seg"] is not None


def test_resume_refuses_another_teacher_behind_the_same_path(tiny, distilled, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher.pt"
    content = torch.load(distilled["teacher"]["path"], weights_only=True)
    torch.save(content, teacher)
    changes = {
        **distilled,
        "teacher": {"path": str(teacher), "amp": "none"},
        "train.steps": 2,
        "eval.pictures": 0,
    }
    train(tiny(tmp_path / "run", changes))
    train(tiny(tmp_path / "run", changes), resume=True)
    content["model"]["heads.seg.classifier.bias"] += 1
    torch.save(content, teacher)
    with pytest.raises(UserError, match="holds other weights than when the run began"):
        train(tiny(tmp_path / "run", changes), resume=True)


@pytest.mark.parametrize("task", ["seg", "det"])
def test_a_run_of_one_task_draws_its_pictures(tiny, tmp_path, task):
    config = tiny(tmp_path / "run", {"train.steps": 1, "eval.pictures": 2})
    config = config.model_copy(update={"tasks": {task: config.tasks[task]}})
    assert task in train(config) and (tmp_path / "run/best.pt").is_file()
