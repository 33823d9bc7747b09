import itertools
import json
import os
import signal
import sys
from pathlib import Path

import optuna
import pytest
import yaml

from multitask_kd import build, checkpoint
from multitask_kd import config as configs
from multitask_kd.engine import train as loop
from multitask_kd.engine.state import StopSignal
from multitask_kd.errors import UserError
from multitask_kd.experiments import search as searches
from multitask_kd.experiments import search_report, search_space
from multitask_kd.experiments.search_config import Axis, load_search

ROOT = Path(__file__).parents[1]
LR, RATIO, ALPHA = "train.optimizer.lr", "tasks.seg.ratio", "tasks.seg.alpha"
TWO = {RATIO: {"values": [1, 2]}, "model.width": {"values": [8, 16, 24]}}
RANGES = {LR: {"low": 1e-4, "high": 1e-1, "log": True}, RATIO: {"low": 0.5, "high": 2.0, "step": 0.5}}


@pytest.fixture
def write(raw, tmp_path):
    """write(space, changes of the run, **keys of the search) -> the paths of both; the search's folder is
    tmp_path/out."""

    def make(space, changes=(), **search):
        (tmp_path / "run.yaml").write_text(
            yaml.safe_dump(raw("unused", {"eval.pictures": 0, **dict(changes)}))
        )
        whole = {"dir": str(tmp_path / "out"), "method": "grid", **search, "space": space}
        (tmp_path / "space.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
        return tmp_path / "run.yaml", tmp_path / "space.yaml"

    return make


def quality(config):
    """A made-up figure that is best at lr 1e-2 and ratio 1."""
    return (
        100
        - 1000 * abs(config.train.optimizer.lr - 1e-2)
        - 10 * abs(config.tasks["seg"].ratio - 1)
        - config.model.width / 8
    )


def metrics(value):
    return {"images": 5, "seg": {"mIoU": value}, "det": {"mAP": value / 2, "mAP50": None}}


@pytest.fixture
def trained(monkeypatch):
    """Training that takes no time: the configs it was given, and ``act``, by the number of the call, what it
    does instead."""
    calls, act = [], {}

    def train(config, *, overwrite, judge):
        assert overwrite
        calls.append(config)
        if len(calls) in act:
            return act[len(calls)](config, judge)
        if any(judge(step, metrics(quality(config) * step / 4)) for step in (1, 2, 3)):
            return None
        return metrics(quality(config))

    train.calls, train.act = calls, act
    monkeypatch.setattr(searches, "train", train)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(search_report, "draw", lambda results: b"a picture")
    return train


def stopped_by_signal(config, judge):
    with StopSignal():
        signal.raise_signal(signal.SIGTERM)
    return None


def fails(config, judge):
    raise UserError("step 3: the loss is not finite")


def settings(results):
    """[(trial, values)] in the order of the trials."""
    return sorted((row["trial"], tuple(row["values"].values())) for row in results["trials"])


# ---- the space


def test_choices_of_ranges():
    # 0.1 + 2 * 0.1 is 0.30000000000000004 in floating point; 0.35 is not reached
    assert Axis(low=0.1, high=0.35, step=0.1).choices() == (0.1, 0.2, 0.3)
    assert list(Axis(low=2, high=9, step=3, int=True).choices()) == [2, 5, 8]
    assert Axis(low=1, high=2).choices() is None and Axis(low=1, high=2).probes() == (1.0, 2.0)
    assert Axis(low=0.1, high=0.35, step=0.1).probes() == (0.1, 0.3)
    whole = Axis(low=1, high=3, int=True).probes()
    assert whole == (1, 3) and all(type(n) is int for n in whole)


@pytest.mark.parametrize(
    "axis, what",
    [
        ({"value": [1]}, "value: unknown key; did you mean 'values'?"),
        ({"low": 1}, "low and high"),
        ({"values": []}, "at least 1"),
        ({"values": [1, 2, 1]}, "1 is there twice"),
        ({"values": [1], "low": 0}, "values and low"),
        ({"low": 2, "high": 1, "step": 1}, "2 is not below high, 1"),
        ({"low": 0, "high": 1, "log": True}, "begins above 0"),
        ({"low": 1, "high": 3, "log": True, "step": 1}, "has no step"),
        ({"low": 1, "high": 2.5, "int": True}, "whole numbers"),
        ({"low": 1, "high": 2}, "a grid needs a list of values, or a range with a step"),
        ({"low": 1, "high": 4, "int": True}, "a grid needs a list of values, or a range with a step"),
    ],
)
def test_a_bad_axis_is_an_error(write, axis, what):
    with pytest.raises(UserError) as error:
        load_search(write({LR: axis})[1])
    assert "space.yaml" in str(error.value) and LR in str(error.value) and what in str(error.value)


@pytest.mark.parametrize(
    "space, search, what",
    [
        ({"run.dir": {"values": ["a"]}}, {}, "every trial has a folder of its own"),
        (
            {"tasks.seg": {"values": [{}]}, ALPHA: {"values": [0]}},
            {},
            "space.tasks.seg.alpha: lies in tasks.seg",
        ),
        ({"train.steps=3": {"values": [1]}}, {}, "is no key"),
        (TWO, {"method": "tpe"}, "trials: the method 'tpe' needs their number"),
        (TWO, {"method": "tpa", "trials": 1}, "method"),
    ],
)
def test_a_bad_search_is_an_error(write, space, search, what):
    with pytest.raises(UserError, match=what):
        load_search(write(space, **search)[1])


def test_a_key_is_there_once(write):
    _, path = write(TWO)
    path.write_text(path.read_text() + f"  {RATIO}: {{values: [5]}}\n")
    with pytest.raises(UserError, match=f"'{RATIO}' is there twice"):
        load_search(path)


KL = {"loss": "kl", "options": {"temperature": 2}}


@pytest.mark.parametrize(
    "space, what",
    [
        (
            {RATIO: {"values": [1]}, "tasks.seg.alhpa": {"values": [0]}},
            "tasks.seg.alhpa: unknown key; did you mean 'alpha'?",
        ),
        ({"train.optimizer.lrr": {"low": 1, "high": 2, "step": 1}}, "did you mean 'lr'?"),
        ({"data.labelled_share": {"low": 0.5, "high": 1.5, "step": 0.25}}, "space.data.labelled_share: 1.5"),
        ({"train.steps": {"low": 2, "high": 4, "step": 2}}, "train.steps: Input should be a valid integer"),
        ({RATIO: {"values": [1, 2, "much"]}}, "space.tasks.seg.ratio: much"),
        ({"tasks.seg.soft": {"values": [KL, KL | {"loss": "kll"}]}}, "did you mean 'kl'?"),
        (
            {"tasks.seg.soft": {"values": [KL, KL | {"options": {"temprature": 2}}]}},
            "did you mean 'temperature'?",
        ),
    ],
)
def test_every_value_is_checked_before_anything_is_trained(write, trained, tmp_path, space, what):
    with pytest.raises(UserError) as error:
        searches.run_search(*write(space))
    assert what in str(error.value) and "space.yaml" in str(error.value)
    assert not trained.calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{}, {"tasks.seg.soft": {"loss": "cwd", "options": {"tau": 3}}}])
def test_a_key_is_checked_together_with_the_others(write, trained, changes):
    """A weight alone is no soft loss, and a loss clears what stood beside another: the order of the keys does
    not matter."""
    space = {
        "tasks.seg.soft.weight": {"values": [1.5, 3.0]},
        "tasks.seg.soft.options.reduction": {"values": ["pixel"]},
        "tasks.seg.soft.loss": {"values": ["kl"]},
    }
    assert searches.run_search(*write(space, changes))["asked"] == 2
    softs = [config.tasks["seg"].soft for config in trained.calls]
    assert [(s.loss, s.weight, s.options) for s in softs] == [
        ("kl", w, {"reduction": "pixel"}) for w in (1.5, 3.0)
    ]


@pytest.mark.parametrize("every", [None, 4])
def test_pruning_needs_evaluations(write, trained, every):
    with pytest.raises(UserError, match="prune: .* set train.eval_every below train.steps, 4"):
        searches.run_search(*write(TWO, {"train.eval_every": every}, prune={}))


@pytest.mark.parametrize(
    "name, near",
    [("seg.miou", "seg.mIoU"), ("det.map50", "det.mAP50"), ("men", "mean"), ("seg.IoU", "seg.mIoU")],
)
def test_an_unknown_objective_is_an_error(write, trained, name, near):
    with pytest.raises(UserError, match=f"objective: .*did you mean '{near}'"):
        searches.run_search(*write(TWO, objective=name))
    assert not trained.calls


@pytest.mark.parametrize("name, use", [("z.RMSE", "z.delta1"), ("z.AbsRel", "z.delta1")])
def test_an_objective_that_should_be_low_is_refused(write, trained, name, use):
    depth = {"tasks.z": {"kind": "depth"}}
    with pytest.raises(UserError, match=f"'{name}' is good where it is low.*use {use}"):
        searches.run_search(*write(TWO, depth, objective=name))
    assert not trained.calls


def test_the_objective_may_be_a_figure_of_a_task_of_any_kind(tiny, tmp_path):
    config = tiny(tmp_path, {"tasks.lane": {"kind": "semantic"}, "tasks.weather": {"kind": "classification"}})
    for name in ("mean", "lane.mIoU", "weather.top1", "seg.pixel_accuracy", "det.AR10"):
        search_space.check_objective(name, config, "space.yaml")
    with pytest.raises(UserError, match="did you mean 'weather.top5'"):
        search_space.check_objective("weather.top6", config, "space.yaml")


@pytest.mark.parametrize("text", [f"{RATIO}=3", "model.width=8"])
def test_an_override_of_a_searched_key_is_an_error(write, trained, text):
    with pytest.raises(UserError, match="the search chooses"):
        searches.run_search(*write(TWO), [text])


def test_a_missing_package_is_told(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"needs matplotlib .*pip install -e '\.\[search\]'"):
        searches.run_search(*write(TWO))


# ---- methods


def test_a_grid_is_every_combination_in_order(write, trained, tmp_path):
    results = searches.run_search(*write(TWO), ["run.seed=5"])
    assert settings(results) == [
        (i, pair) for i, pair in enumerate(itertools.product([1, 2], [8, 16, 24]), 1)
    ]
    given = [(c.tasks["seg"].ratio, c.model.width) for c in trained.calls]
    assert given == list(itertools.product([1, 2], [8, 16, 24]))
    assert [Path(c.run.dir) for c in trained.calls] == [tmp_path / f"out/trials/{i:03d}" for i in range(1, 7)]
    assert {c.run.seed for c in trained.calls} == {5}
    # the objective falls with ratio and width: (1, 8), and it is the mean of mIoU and half of it
    assert results["best"] == 1 and results["trials"][0]["objective"] == pytest.approx(
        quality(trained.calls[0]) * 0.75
    )
    objectives = [row["objective"] for row in results["trials"]]
    assert objectives == sorted(objectives, reverse=True) and len(set(objectives)) == 6


def test_a_grid_may_be_cut_short_and_lengthened(write, trained):
    paths = write({RATIO: {"low": 0.5, "high": 2.0, "step": 0.5}}, trials=2)
    assert settings(searches.run_search(*paths)) == [(1, (0.5,)), (2, (1.0,))]
    write({RATIO: {"low": 0.5, "high": 2.0, "step": 0.5}}, trials=9)
    assert settings(searches.run_search(*paths)) == [(1, (0.5,)), (2, (1.0,)), (3, (1.5,)), (4, (2.0,))]
    assert len(trained.calls) == 4


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_no_setting_is_tried_twice(write, trained, method):
    """30 trials asked of 6 different settings are those 6."""
    results = searches.run_search(*write(TWO, method=method, trials=30))
    assert {values for _, values in settings(results)} == set(itertools.product([1, 2], [8, 16, 24]))
    assert len(trained.calls) == results["asked"] == 6


def proposals(search, count):
    """The settings of a search whose objective is the learning rate."""
    past = []
    for place in range(1, count + 1):
        params, how = search_space.propose(search, place, past), search_space.distributions(search)
        past.append(optuna.trial.create_trial(params=params, distributions=how, value=params[LR]))
    return [tuple(search_space.values_of(search, trial.params).values()) for trial in past]


def test_values_stay_in_their_ranges_and_depend_on_the_seed(write):
    space = RANGES | {"tasks.det.head.depth": {"low": 1, "high": 3, "int": True}}
    found = {}
    for method, seed in (("random", 0), ("random", 1), ("tpe", 0)):
        found[method, seed] = proposals(load_search(write(space, method=method, trials=30, seed=seed)[1]), 30)
    for lr, ratio, depth in itertools.chain(*found.values()):
        assert (
            1e-4 <= lr <= 1e-1 and ratio in (0.5, 1.0, 1.5, 2.0) and depth in (1, 2, 3) and type(depth) is int
        )
    assert not set(found["random", 0]) & set(found["random", 1])
    high = {method: sum(lr > 1e-2 for lr, _, _ in found[method, 0][10:]) for method in ("random", "tpe")}
    assert (
        high["tpe"] > high["random"] + 5
    )  # it goes where the objective was high; chance alone finds about a third


# ---- going on


@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(write, trained, tmp_path, method):
    space = TWO if method == "grid" else RANGES
    keys = {"method": method, "trials": {"grid": None, "random": 5, "tpe": 12}[method]}
    whole = searches.run_search(*write(space, dir=str(tmp_path / "whole"), **keys))
    count = len(trained.calls)
    paths = write(space, **keys)
    trained.act[count + 3] = stopped_by_signal
    assert searches.run_search(*paths) is None
    assert len(trained.calls) == count + 3
    table = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["state"] for row in table["trials"]] == ["complete", "complete", "interrupted"]
    results = searches.run_search(*paths)
    assert settings(results) == settings(whole) and results["best"] == whole["best"]
    assert len(trained.calls) == 2 * count + 1  # the interrupted one twice, no other
    again = trained.calls[count + 2], trained.calls[count + 3]
    assert again[0] == again[1] and again[0].run.dir.endswith("003")
    assert searches.run_search(*paths)["trials"] == results["trials"] and len(trained.calls) == 2 * count + 1


def test_a_signal_at_the_last_step_keeps_the_trial_and_stops(write, trained):
    trained.act[2] = lambda config, judge: stopped_by_signal(config, judge) or metrics(99.0)
    paths = write(TWO)
    assert searches.run_search(*paths) is None and len(trained.calls) == 2
    results = searches.run_search(*paths)
    assert len(trained.calls) == 6 and results["best"] == 2


def test_a_killed_process_leaves_a_search_that_goes_on(write, trained, tmp_path):
    """It died in a trial, in the middle of a line of the journal, with Optuna's lock in place."""

    def killed(config, judge):
        raise KeyboardInterrupt

    trained.act[3] = killed
    paths = write(RANGES, method="random", trials=4)
    with pytest.raises(KeyboardInterrupt):
        searches.run_search(*paths)
    with (tmp_path / "out/journal.log").open("a") as file:
        file.write('{"op_code":5,"wor')
    (tmp_path / "out/journal.log.lock").symlink_to("nowhere")
    results = searches.run_search(*paths)
    assert [row["state"] for row in results["trials"]] == ["complete"] * 4
    assert trained.calls[2] == trained.calls[3] and len(trained.calls) == 5


def test_a_trial_that_waits_to_be_trained_is_tried_in_its_place(write, trained, monkeypatch):
    """The process died between the choice of a setting and its training."""
    paths = write(RANGES, method="random", trials=3)
    with monkeypatch.context() as patch:
        really = optuna.study.Study.enqueue_trial

        def enqueue(self, *args, **kwargs):
            really(self, *args, **kwargs)
            raise KeyboardInterrupt

        patch.setattr(optuna.study.Study, "enqueue_trial", enqueue)
        with pytest.raises(KeyboardInterrupt):
            searches.run_search(*paths)
    results = searches.run_search(*paths)
    assert [trial for trial, _ in settings(results)] == [1, 2, 3] and len(trained.calls) == 3


@pytest.mark.parametrize(
    "change, what",
    [
        ({"space": {RATIO: {"values": [1, 3]}}}, "space.yaml, .*tasks.seg.ratio"),
        ({"space": TWO, "objective": "seg.mIoU"}, "space.yaml, objective was 'mean', is 'seg.mIoU'"),
        ({"space": TWO, "changes": {"train.steps": 5}}, "run.yaml, train.steps was 4, is 5"),
    ],
)
def test_a_search_of_something_else_is_refused(write, trained, change, what):
    searches.run_search(*write(TWO))
    with pytest.raises(UserError, match=what):
        searches.run_search(*write(**change))
    assert len(trained.calls) == 6


def test_a_search_whose_teacher_has_changed_is_refused(write, trained, tmp_path):
    teacher = tmp_path / "teacher.pt"
    teacher.write_text("weights")
    taught = {"tasks.seg.alpha": 0.5, "tasks.seg.soft": {"loss": "kl"}, "teacher": {"path": str(teacher)}}
    other = tmp_path / "other.pt"
    other.write_text("more weights")
    space = {RATIO: {"values": [1, 2]}, "teacher.path": {"values": [str(teacher), str(other)]}}
    searches.run_search(*write(space, taught))
    assert searches.run_search(*write(space, taught))["best"] and len(trained.calls) == 4
    other.write_text("other weights")  # one that only some trials have
    with pytest.raises(
        UserError, match=f"search of something else: in .*run.yaml, teacher.path {other} has changed"
    ):
        searches.run_search(*write(space, taught))
    assert len(trained.calls) == 4


def test_a_search_of_an_earlier_version_goes_on_and_its_files_are_noted(
    write, trained, tmp_path, monkeypatch
):
    teacher = tmp_path / "teacher.pt"
    teacher.write_text("weights")
    taught = {"tasks.seg.alpha": 0.5, "tasks.seg.soft": {"loss": "kl"}, "teacher": {"path": str(teacher)}}
    with monkeypatch.context() as patch:
        really = optuna.study.Study.set_user_attr
        less = lambda self, key, value: really(self, key, {k: v for k, v in value.items() if k != "files"})  # noqa: E731
        patch.setattr(optuna.study.Study, "set_user_attr", less)
        searches.run_search(*write({RATIO: {"values": [1, 2]}}, taught, trials=1))
    searches.run_search(*write({RATIO: {"values": [1, 2]}}, taught))
    assert len(trained.calls) == 2
    teacher.write_text("other weights")
    with pytest.raises(UserError, match="has changed"):
        searches.run_search(*write({RATIO: {"values": [1, 2]}}, taught))


def test_what_cannot_change_a_result_may_change(write, trained):
    searches.run_search(*write(TWO))
    assert searches.run_search(*write(TWO, {"train.log_every": 1}))["best"] == 1
    assert len(trained.calls) == 6


def test_an_edit_of_the_config_meanwhile_does_not_reach_the_trials(write, trained, tmp_path):
    paths = write(TWO)

    def edit(config, judge):
        paths[0].write_text(paths[0].read_text().replace("steps: 4", "steps: 5"))
        return metrics(quality(config))

    trained.act[2] = edit
    with pytest.raises(UserError, match="run.yaml, train.steps was 4, is 5"):
        searches.run_search(*paths)
    assert len(trained.calls) == 2
    assert configs.load(tmp_path / "out/best.yaml").train.steps == 4


def test_two_searches_in_one_folder_are_refused(write, trained):
    paths = write(TWO)

    def second(config, judge):
        with pytest.raises(UserError, match="a search is running in"):
            searches.run_search(*paths)
        return metrics(1.0)

    trained.act[1] = second
    searches.run_search(*paths)
    assert len(trained.calls) == 6


# ---- trials


def test_a_poor_trial_is_stopped(write, trained, tmp_path):
    """Widths 8, 16, 24 get worse; after two complete trials the third is below their median at its first
    evaluation."""
    space = {"model.width": {"values": [8, 16, 24, 4]}}
    results = searches.run_search(*write(space, {"train.eval_every": 1}, prune={"warmup_trials": 2}))
    assert [(row["trial"], row["state"]) for row in results["trials"]] == [
        (4, "complete"), (1, "complete"), (2, "complete"), (3, "pruned")
    ]  # fmt: skip
    pruned = results["trials"][-1]
    assert pruned["step"] == 1 and pruned["objective"] == pytest.approx(quality(trained.calls[2]) / 4 * 0.75)
    assert "pruned at step 1" in (tmp_path / "out/results.md").read_text()


@pytest.mark.parametrize(
    "prune, step", [({"warmup_trials": 3}, None), ({"warmup_trials": 2, "warmup_steps": 2}, 2)]
)
def test_warm_up_protects_from_pruning(write, trained, prune, step):
    space = {"model.width": {"values": [8, 16, 24]}}
    rows = searches.run_search(*write(space, {"train.eval_every": 1}, prune=prune))["trials"]
    third = next(row for row in rows if row["trial"] == 3)
    assert (third["state"], third["step"]) == (("pruned", step) if step else ("complete", 3))


def test_a_failed_trial_is_recorded_and_the_search_goes_on(write, trained, tmp_path, capsys):
    trained.act[1] = fails
    trained.act[2] = lambda config, judge: (_ for _ in ()).throw(MemoryError())
    paths = write(TWO)
    results = searches.run_search(*paths)
    assert [row["state"] for row in results["trials"]] == ["complete"] * 4 + ["failed"] * 2
    errors = [row["error"] for row in results["trials"][-2:]]
    assert errors == ["step 3: the loss is not finite", "out of memory"]
    assert "trial 1: step 3: the loss is not finite" in (tmp_path / "out/results.md").read_text()
    assert (
        "trial 1: ratio 1, width 8: mean -, failed: step 3: the loss is not finite" in capsys.readouterr().out
    )
    searches.run_search(*paths)
    assert len(trained.calls) == 6


def test_three_failures_stop_a_search_and_are_tried_again(write, trained, tmp_path):
    for number in (1, 2, 3):
        trained.act[number] = fails
    paths = write(TWO)
    with pytest.raises(UserError, match="the first 3 trials failed.*the loss is not finite"):
        searches.run_search(*paths)
    assert len(trained.calls) == 3 and not (tmp_path / "out/best.yaml").exists()
    results = searches.run_search(*paths)  # the cause is gone
    assert [row["state"] for row in results["trials"]] == ["complete"] * 6 and len(trained.calls) == 9


def test_the_objective_may_be_one_figure(write, trained):
    trained.act[2] = lambda config, judge: metrics(10.0) | {"det": {"mAP": 80.0, "mAP50": None}}
    results = searches.run_search(*write(TWO, objective="det.mAP"))
    assert results["best"] == 2 and results["trials"][0]["objective"] == 80.0
    assert search_space.score("det.mAP50", metrics(10.0), {}) == 0.0  # nothing to measure


# ---- what it writes


def test_the_best_config_can_be_trained(write, trained, tmp_path):
    space = {"tasks.seg.soft": {"values": [KL, KL | {"weight": 0.25}]}, RATIO: {"values": [2, 1]}}
    results = searches.run_search(*write(space), ["run.seed=3"])
    best = configs.load(tmp_path / "out/best.yaml")
    assert best.run.dir == str(tmp_path / "out/best") and best.run.seed == 3
    assert best.tasks["seg"].ratio == 1 and best.tasks["seg"].soft.weight == 1.0
    chosen = trained.calls[results["best"] - 1]
    assert best == chosen.model_copy(update={"run": best.run})
    assert "base" not in yaml.safe_load((tmp_path / "out/best.yaml").read_text())
    table = (tmp_path / "out/results.md").read_text()
    assert "{loss: kl, options: {temperature: 2}, weight: 0.25}" in table


def test_short_names():
    found = search_space.short_names([ALPHA, "tasks.det.alpha", "train.optimizer.lr", "alpha"])
    assert list(found.values()) == ["seg.alpha", "det.alpha", "lr", "alpha"]


def test_values_are_shown_on_one_line():
    value = {"loss": "kl", "options": {"t": 0.123456, "on": True, "of": None}, "at": [1, 2.0]}
    assert search_space.shown(value) == "{loss: kl, options: {t: 0.1235, on: true, of: null}, at: [1, 2]}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/search").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_searches_are_sound(path):
    plan = search_space.Plan(
        load_search(path), str(path), str(ROOT / "configs/scenes_distilled.yaml"), ("train.eval_every=140",)
    )
    assert plan.check().distils and plan.search.total() > 10


# ---- the whole


def test_a_real_search(write, tool, tmp_path):
    space = {
        LR: {"low": 1e-4, "high": 1e-2, "log": True},
        "tasks.seg.soft": {"values": [None, KL]},
        RATIO: {"values": [1, 2]},
    }
    changes = {"train.eval_every": 2}
    run, path = write(space, changes, method="tpe", trials=3, prune={"warmup_trials": 1})
    status, out, err = tool("search", "--config", run, "--space", path, "train.log_every=4")
    assert status == 0, err
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["trials"]) == 3 and f"best: trial {results['best']}" in out
    assert [line for line in out.splitlines() if line.startswith("trial 2: lr ")]
    assert "[I " not in out + err and "Warning" not in err  # nothing in Optuna's own words
    for row in results["trials"]:
        folder = tmp_path / f"out/trials/{row['trial']:03d}"
        written = configs.load(folder / "config.yaml")
        assert (
            written.train.optimizer.lr == row["values"][LR]
            and written.tasks["seg"].ratio == row["values"][RATIO]
        )
        if row["state"] == "complete":
            measured = json.loads((folder / "metrics.json").read_text())
            assert row["objective"] == pytest.approx(
                (measured["seg"]["mIoU"] + (measured["det"]["mAP"] or 0)) / 2
            )
        else:
            assert (row["state"], row["step"]) == ("pruned", 2) and checkpoint.load(folder / "last.pt", "x")[
                "step"
            ] == 2
    build.check(configs.load(tmp_path / "out/best.yaml"))
    assert (tmp_path / "out/plot.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "out/results.json").read_text()
    status, out, _ = tool("search", "--config", run, "--space", path)
    assert status == 0 and "== trial" not in out and (tmp_path / "out/results.json").read_text() == before


def test_ctrl_c_stops_a_real_search(write, tool, monkeypatch, tmp_path):
    done = loop.Progress.step
    monkeypatch.setattr(loop.Progress, "step", lambda self: (done(self), signal.raise_signal(signal.SIGINT)))
    run, path = write({RATIO: {"values": [1, 2]}})
    status, out, _ = tool("search", "--config", run, "--space", path)
    assert status == 130 and "stopped; 0 of 2 trials are done; the same command goes on" in out
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["trials"]
    assert row["state"] == "interrupted" and not (tmp_path / "out/best.yaml").exists()


def test_every_state_has_a_place_in_the_plot(tmp_path):
    """Pruned, failed and complete trials; sections, texts and numbers on the axes; one panel for each key and
    one besides."""
    rows = [
        {"trial": 1, "state": "complete", "objective": 5.0, "values": {"a.x": 1.0, "b": KL, "c": None}},
        {"trial": 2, "state": "pruned", "objective": 1.0, "values": {"a.x": 10.0, "b": "text", "c": 3}},
        {"trial": 3, "state": "failed", "objective": None, "values": {"a.x": 10.0, "b": "text", "c": 3}},
    ]
    space = {
        "a.x": {"low": 1.0, "high": 10.0, "log": True},
        "b": {"values": [KL, "text"]},
        "c": {"values": [None, 3]},
    }
    picture = search_report.draw({"objective": "mean", "best": 1, "space": space, "trials": rows})
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
