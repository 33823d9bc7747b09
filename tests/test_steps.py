"""The one rule of what is stale: of trainings and of steps with outputs, on files of a few bytes."""

import json
import os
from pathlib import Path

import pytest

from multitask_kd import build
from multitask_kd.config import dump
from multitask_kd.engine.folder import clear_folder
from multitask_kd.errors import UserError
from multitask_kd.experiments import runs, steps
from multitask_kd.experiments.steps import MadeOf, RunFolder, Steps


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher.pt"
    path.write_text("weights")
    return path


@pytest.fixture
def config(tiny, tmp_path, teacher):
    """config(changes) -> the config of a pupil of ``teacher`` in tmp_path/run."""
    soft = {"alpha": 0.5, "soft": {"loss": "kl"}}
    return lambda changes=(): tiny(
        tmp_path / "run", {"tasks.seg": soft, "teacher": {"path": str(teacher)}} | dict(changes)
    )


@pytest.fixture
def train(monkeypatch):
    """Stands for a training. ``calls``: whether each resumed; ``act``: what the next one does in place of
    ending."""

    def trained(config, *, resume, overwrite):
        trained.calls.append(resume)
        folder, act = Path(config.run.dir), trained.act.pop() if trained.act else None
        if act == "refuse":
            raise UserError("data.train.root: there is no folder")
        if not resume:
            clear_folder(folder)
            (folder / "config.yaml").write_text(dump(build.resolve_init(config).config))
        (folder / "last.pt").write_text("state")
        if act == "stop":
            return None
        (folder / "best.pt").write_text(dump(config))
        (folder / "metrics.json").write_text(json.dumps({"images": 5}))
        if act == "kill":
            raise KeyboardInterrupt
        return {"images": 5}

    trained.calls, trained.act = [], []
    monkeypatch.setattr(runs, "train", trained)
    return trained


def test_a_run_is_done_once_and_again_where_its_teacher_has_changed(config, train, teacher, capsys):
    assert runs.finish(config())["images"] == 5
    assert runs.finish(config())["images"] == 5 and train.calls == [False]
    assert "already done: " in capsys.readouterr().out
    teacher.write_text("other weights")
    assert runs.finish(config())["images"] == 5
    assert f"trained again: teacher.path {teacher} has changed" in capsys.readouterr().out
    runs.finish(config())
    assert train.calls == [False, False]


def test_the_same_file_written_again_changes_nothing(config, train, teacher):
    runs.finish(config())
    teacher.write_text("weights")
    os.utime(teacher, (1, 1))
    runs.finish(config())
    assert train.calls == [False]


@pytest.mark.parametrize(
    "changes",
    [
        {"data.workers": 3},
        {"train.log_every": 1},
        {"train.save_every": 1},
        {"eval.pictures": 0},
        {"run.threads": 2},
    ],
)
def test_keys_that_cannot_change_a_result_change_nothing(config, train, changes):
    runs.finish(config())
    runs.finish(config(changes))
    assert train.calls == [False]


def test_a_changed_key_is_named(config, train, capsys):
    runs.finish(config())
    runs.finish(config({"train.steps": 5}))
    assert (
        train.calls == [False, False] and "trained again: train.steps was 4, is 5" in capsys.readouterr().out
    )


def test_what_is_done_is_trained_again_where_it_is_asked_for(config, train, capsys):
    runs.finish(config())
    runs.finish(config(), overwrite=True)
    assert (
        train.calls == [False, False] and "trained again: overwrite was asked for" in capsys.readouterr().out
    )


def test_an_interrupted_run_is_resumed(config, train):
    train.act = ["stop"]
    assert runs.finish(config()) is None
    assert runs.finish(config())["images"] == 5 and train.calls == [False, True]
    runs.finish(config())
    assert len(train.calls) == 2


def test_an_interrupted_run_whose_teacher_has_changed_begins_anew(config, train, teacher):
    train.act = ["stop"]
    runs.finish(config())
    teacher.write_text("other weights")
    runs.finish(config())
    assert train.calls == [False, False]


def test_a_training_that_never_began_costs_nothing(config, train, teacher):
    """The data was not found: with the old settings, or the old teacher, the run that is there is still done."""
    runs.finish(config())
    train.act = ["refuse"]
    with pytest.raises(UserError, match="no folder"):
        runs.finish(config({"train.steps": 5}))
    assert runs.finish(config())["images"] == 5 and len(train.calls) == 2
    teacher.write_text("other weights")
    train.act = ["refuse"]
    with pytest.raises(UserError, match="no folder"):
        runs.finish(config())
    train.act = ["refuse"]
    with pytest.raises(UserError, match="no folder"):  # it is not taken for a run of the new teacher
        runs.finish(config())
    assert len(train.calls) == 4
    teacher.write_text("weights")
    assert runs.finish(config())["images"] == 5 and len(train.calls) == 4


def test_a_run_killed_after_its_last_file_is_done(config, train, teacher):
    runs.finish(config())
    teacher.write_text("other weights")
    train.act = ["kill"]
    with pytest.raises(KeyboardInterrupt):
        runs.finish(config())
    runs.finish(config())
    assert len(train.calls) == 2


def test_a_run_of_an_earlier_version_counts_as_done_and_is_noted(config, train, teacher, tmp_path):
    runs.finish(config())
    marker = tmp_path / "run/made_of.json"
    marker.unlink()
    RunFolder(config()).adopt()
    assert list(json.loads(marker.read_text())["files"]) == [f"teacher.path {teacher}"]
    runs.finish(config())
    assert train.calls == [False]
    teacher.write_text("other weights")
    runs.finish(config())
    assert train.calls == [False, False]


def test_an_earlier_run_of_other_settings_is_not_adopted(config, train, tmp_path):
    runs.finish(config())
    (tmp_path / "run/made_of.json").unlink()
    RunFolder(config({"train.steps": 5})).adopt()
    assert not (tmp_path / "run/made_of.json").exists()


def test_a_teacher_that_is_gone_has_not_changed(config, train, teacher):
    runs.finish(config())
    teacher.unlink()
    assert runs.finish(config())["images"] == 5 and train.calls == [False]


def test_every_file_that_a_run_reads_is_noted(tiny, tmp_path):
    changes = {
        "tasks.seg": {"alpha": 0.5, "soft": {"loss": "kl"}},
        "teachers": {"a": {"path": "a.pt"}, "b": {"path": "b.pt"}},
        "model.weights": "encoder.pth",
    }
    assert list(steps.files_read(tiny(tmp_path, changes))) == [
        "teachers.a.path a.pt", "teachers.b.path b.pt", "model.weights encoder.pth"
    ]  # fmt: skip
    assert steps.files_read(tiny(tmp_path, {"model.weights": "imagenet"})) == {}
    assert list(steps.files_read(tiny(tmp_path, {"model.start": "s.pt"}))) == ["model.start s.pt"]
    unused = {"teacher": {"path": "a.pt"}}  # nothing is learnt from it
    assert steps.files_read(tiny(tmp_path, unused)) == {}


def test_a_file_is_read_once_while_it_stays(teacher, monkeypatch):
    read, really = [], steps.file_digest
    monkeypatch.setattr(steps, "file_digest", lambda path, where: read.append(path) or really(path, where))
    first = steps.digest(teacher)
    assert steps.digest(teacher) == first and read == [teacher]
    teacher.write_text("weights of another length")
    assert steps.digest(teacher) != first and len(read) == 2


def test_the_digest_of_a_folder_is_that_of_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a").write_text("1")
    first = steps.digest(tmp_path)
    (tmp_path / "deep/b").write_text("")
    second = steps.digest(tmp_path)
    (tmp_path / "deep/a").write_text("22")
    assert len({first, second, steps.digest(tmp_path)}) == 3 and steps.digest(tmp_path / "none") is None


def test_what_has_changed_is_told():
    before = MadeOf("a: 1\nb: {c: 2}", {"x": "1", "y": "2"})
    assert MadeOf("b: {c: 2}\na: 1", {"x": "1", "y": "2"}).change_since(before) == "the order of its keys"
    assert MadeOf("a: 1\nb: {c: 3}", before.files).change_since(before) == "b.c was 2, is 3"
    assert MadeOf(before.settings, {"x": "1", "y": "3"}).change_since(before) == "y has changed"
    assert MadeOf(before.settings, {"x": "1"}).change_since(before) == "y is no longer used"
    assert MadeOf(before.settings, before.files | {"z": "4"}).change_since(before) == "z is newly used"
    assert MadeOf("Cut(ratio=0.3)").change_since(MadeOf("Cut(ratio=0.4)")) == (
        "its settings were Cut(ratio=0.4), are Cut(ratio=0.3)"
    )
    assert (
        MadeOf(before.settings).change_since(before) is before.change_since(MadeOf(before.settings)) is None
    )


def test_a_step_is_done_once(tmp_path, teacher, capsys):
    out, made = tmp_path / "out.txt", []
    step = Steps(tmp_path / "markers")

    def do(settings="Cut(ratio=0.4)"):
        step.once("half", [teacher], settings, [out], lambda: (made.append(settings), out.write_text("x")))
        return len(made), capsys.readouterr().out.strip().splitlines()[-1]

    assert do()[0] == 1
    assert do() == (1, "already done")
    assert do("Cut(ratio=0.3)") == (2, "done again: its settings were Cut(ratio=0.4), are Cut(ratio=0.3)")
    teacher.write_text("other weights")
    assert do("Cut(ratio=0.3)") == (3, f"done again: {teacher} has changed")
    out.unlink()
    assert do("Cut(ratio=0.3)") == (4, f"done again: {out} is not there")
    teacher.unlink()
    assert do("Cut(ratio=0.3)") == (4, "already done")
    with pytest.raises(UserError, match="half: there is no .*teacher.pt; it is needed to make .*out.txt"):
        do("Cut(ratio=0.2)")
    assert out.read_text() == "x"


def test_a_step_that_fails_is_not_done(tmp_path, teacher):
    def fail():
        raise UserError("full")

    for _ in range(2):
        with pytest.raises(UserError, match="full"):
            Steps(tmp_path).once("half", [teacher], "", [tmp_path / "out"], fail)
    assert not (tmp_path / "half.json").exists()


@pytest.mark.parametrize(
    "marker", ["[1]", "3", '"x"', "{", '{"files": 3}', '{"replaces": 3}', '{"replaces": {"stamp": 3}}']
)
def test_a_marker_of_a_training_that_is_none_is_as_if_it_were_not_there(config, train, marker):
    runs.finish(config())
    path = Path(config().run.dir) / "made_of.json"
    path.write_text(marker)
    assert runs.finish(config())["images"] == 5 and len(train.calls) == 1
    folder = RunFolder(config())
    folder.begins()
    path.write_text(marker)
    folder.ended()
    assert json.loads(path.read_text())["files"]


@pytest.mark.parametrize(
    "marker", ['{"settings": 3, "files": {}}', '{"settings": null}', "[]", '{"settings": "s", "files": [1]}']
)
def test_a_marker_of_a_step_that_is_none_is_as_if_it_were_not_there(tmp_path, marker):
    made = tmp_path / "made"
    (tmp_path / "step.json").write_text(marker)
    made.write_text("before")
    Steps(tmp_path).once("step", [], "now", [made], lambda: made.write_text("after"))
    assert made.read_text() == "after"
