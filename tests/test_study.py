import json
import signal
from dataclasses import asdict

import pytest
import yaml

from multitask_kd import build, checkpoint
from multitask_kd.engine import train as loop
from multitask_kd.errors import UserError
from multitask_kd.experiments import runs as trainings
from multitask_kd.experiments import steps, study_config
from multitask_kd.experiments import study as studies
from multitask_kd.models.multitask import count_parameters

FIGURES = [{"key": "mIoU", "heading": "mIoU"}, {"key": "mAP", "heading": "mAP", "digits": 1}]
ROWS = [
    {"name": "alone", "against": [], "seeds": [0, 1, 2], "mIoU": [10.0, 20.0, 30.0], "mAP": [1.0, 2.0, 3.0]},
    {"name": "taught", "against": ["alone"], "seeds": [2, 0], "mIoU": [33.0, 14.0], "mAP": [3.5, 1.25]},
    {"name": "seg only", "against": ["taught", "alone"], "seeds": [2], "mIoU": [30.0]},
]


def test_gains_are_differences_of_the_same_seed():
    found = studies.gains(ROWS, ["mIoU", "mAP"])
    # taught - alone, seed 2: 33 - 30 and 3.5 - 3; seed 0: 14 - 10 and 1.25 - 1
    assert found == [
        {"name": "taught", "against": "alone", "mIoU": [3.0, 4.0], "mAP": [0.5, 0.25]},
        {"name": "seg only", "against": "taught", "mIoU": [-3.0]},
        {"name": "seg only", "against": "alone", "mIoU": [0.0]},
    ]


def test_a_figure_that_was_not_measured_leaves_a_gap():
    row = {
        "against": [],
        "seeds": [0, 1],
        "labelled_images": 1,
        "unlabelled_images": 0,
        "params": 1,
        "macs": 1,
        "steps": 1,
        "seconds": [1.0],
        "step_ms": [12.6],
    }
    rows = [
        row | {"name": "a", "mIoU": [50.0, None]},
        row | {"name": "b", "against": "a", "mIoU": [60.0, 70.0]},
    ]
    found = studies.gains(rows, ["mIoU"])
    assert found == [{"name": "b", "against": "a", "mIoU": [10.0, None]}]
    text = studies.report({"title": "t", "machine": "m", "rows": rows, "figures": FIGURES, "gains": found})
    assert text.splitlines()[-1].split() == ["b", "-", "a", "-"]


def test_report_shows_mean_and_spread():
    rows = [
        row
        | {
            "labelled_images": 4,
            "unlabelled_images": 8,
            "params": 1234,
            "macs": 1,
            "steps": 2,
            "seconds": [60.0] * len(row["seeds"]),
            "step_ms": [12.6],
        }
        for row in ROWS
    ]
    gains = studies.gains(rows, ["mIoU", "mAP"])
    results = {"title": "A title", "machine": "a machine", "rows": rows, "figures": FIGURES, "gains": gains}
    text = studies.report(results)
    assert "A title" in text and "a machine" in text
    assert "20.0 +- 10.0" in text and "3.5 +- 0.7" in text and "taught - alone" in text
    assert studies.report(results, markdown=True).startswith("## A title")


@pytest.fixture
def write(raw, tmp_path):
    """write(runs, **study) -> the study's path; student.yaml and taught.yaml lie beside it, its folder is
    tmp_path/out."""

    def make(runs, **changes):
        quick = {"train.steps": 2, "train.save_every": 1, "eval.pictures": 0}
        (tmp_path / "student.yaml").write_text(yaml.safe_dump(raw("unused", quick)))
        soft = {"seg": {"alpha": 0.5, "soft": {"loss": "kl"}}}
        teacher = {"path": str(tmp_path / "out/teacher/best.pt")}
        (tmp_path / "taught.yaml").write_text(
            yaml.safe_dump({"base": "student.yaml", "tasks": soft, "teacher": teacher})
        )
        study = {"title": "t", "dir": str(tmp_path / "out"), "pictures": 0, "runs": runs, **changes}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        return tmp_path / "study.yaml"

    return make


STUDENT, TAUGHT = {"config": "student.yaml"}, {"config": "taught.yaml"}


def test_seeds_get_a_row_and_folders_of_their_own(write, tmp_path):
    results = studies.run_study(write({"a b": STUDENT | {"overrides": ["train.steps=1"]}}, seeds=[0, 3]))
    (row,) = results["rows"]
    assert row["seeds"] == [0, 3] and len(row["mIoU"]) == len(row["mAP"]) == len(row["seconds"]) == 2
    for seed, miou in zip((0, 3), row["mIoU"], strict=True):
        folder = tmp_path / f"out/a_b/seed{seed}"
        assert json.loads((folder / "metrics.json").read_text())["seg"]["mIoU"] == miou
        assert f"seed: {seed}" in (folder / "config.yaml").read_text()
    content = checkpoint.load(folder / "best.pt", "x")
    assert row["params"] == count_parameters(build.from_checkpoint(content, "x"))
    assert (row["labelled_images"], row["unlabelled_images"], row["steps"]) == (12, 0, 1)
    assert not (tmp_path / "out/picture.png").exists()


@pytest.fixture
def trained(monkeypatch):
    """Every call of train that a study makes: (last folder, resume, overwrite)."""
    calls, really = [], trainings.train

    def train(one, *, resume, overwrite):
        calls.append((one.run.dir.rpartition("/")[2], resume, overwrite))
        return really(one, resume=resume, overwrite=overwrite)

    monkeypatch.setattr(trainings, "train", train)
    return calls


def test_what_was_interrupted_goes_on_and_what_is_done_is_kept(write, trained, monkeypatch, tmp_path):
    path = write({"teacher": STUDENT, "pupil": TAUGHT})
    with monkeypatch.context() as patch:
        really = trainings.train

        def stop(one, **kwargs):
            return (really if "teacher" in one.run.dir else interrupted)(one, **kwargs)

        def interrupted(one, **kwargs):
            done = loop.Progress.step
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(
                    loop.Progress, "step", lambda self: (done(self), signal.raise_signal(signal.SIGTERM))
                )
                return really(one, **kwargs)

        patch.setattr(trainings, "train", stop)
        assert studies.run_study(path) is None
    assert not (tmp_path / "out/results.json").exists()
    assert checkpoint.load(tmp_path / "out/pupil/last.pt", "x")["step"] == 1
    spent = json.loads((tmp_path / "out/pupil/seconds.json").read_text())["seconds"]
    trained.clear()
    results = studies.run_study(path)
    assert trained == [("pupil", True, False)]
    assert results["rows"][1]["seconds"][0] >= spent > 0
    trained.clear()
    assert studies.run_study(path)["rows"] == results["rows"] and trained == []
    studies.run_study(path, overwrite=True)
    assert trained == [("teacher", False, True), ("pupil", False, True)]


def test_a_changed_config_is_trained_again_and_so_is_what_it_teaches(write, trained):
    pupil = TAUGHT | {"against": "alone"}
    studies.run_study(write({"teacher": STUDENT, "alone": STUDENT, "pupil": pupil}))
    trained.clear()
    studies.run_study(
        write({"teacher": STUDENT | {"overrides": ["train.steps=1"]}, "alone": STUDENT, "pupil": pupil})
    )
    assert trained == [("teacher", False, True), ("pupil", False, True)]


def test_what_an_old_teacher_taught_is_trained_again_even_after_a_stop(write, trained, monkeypatch):
    studies.run_study(write({"teacher": STUDENT, "pupil": TAUGHT}))
    path = write({"teacher": STUDENT | {"overrides": ["train.steps=1"]}, "pupil": TAUGHT})
    with monkeypatch.context() as patch:
        patch.setattr(studies, "describe", lambda name, *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # the new teacher is done, the pupil is still the old one's
            studies.run_study(path)
    trained.clear()
    studies.run_study(path)
    assert trained == [("pupil", False, True)]


def test_a_teacher_whose_file_has_changed_teaches_again(write, trained, teacher_run, tmp_path, capsys):
    """It was trained elsewhere: its config is none of the study's, and its path stays."""
    given = tmp_path / "given.pt"
    content = checkpoint.load(teacher_run / "best.pt", "x")
    checkpoint.save(given, content)
    path = write({"alone": STUDENT, "pupil": TAUGHT | {"overrides": [f"teacher.path={given}"]}})
    studies.run_study(path)
    trained.clear()
    checkpoint.save(given, content)
    studies.run_study(path)
    assert trained == []
    next(iter(content["model"].values())).mul_(0.5)
    checkpoint.save(given, content)
    capsys.readouterr()
    studies.run_study(path)
    assert trained == [("pupil", False, True)]
    assert f"trained again: teacher.path {given} has changed" in capsys.readouterr().out


def test_what_cannot_change_a_result_trains_nothing_and_seeds_only_what_is_new(write, trained, tmp_path):
    studies.run_study(write({"a": STUDENT}, seeds=[0, 3]))
    trained.clear()
    workers = STUDENT | {"overrides": ["data.workers=3", "run.threads=2"]}
    studies.run_study(write({"a": workers}, seeds=[0, 3]))
    assert trained == []
    (row,) = studies.run_study(write({"a": STUDENT}, seeds=[0, 3, 5]))["rows"]
    assert [folder for folder, _, _ in trained] == ["seed5"] and row["seeds"] == [0, 3, 5]


def test_a_study_of_an_earlier_version_is_kept_and_its_files_are_noted(write, trained, tmp_path):
    """It has no markers. A teacher that is then trained anew teaches its pupils again."""
    path = write({"teacher": STUDENT, "pupil": TAUGHT})
    studies.run_study(path)
    for marker in (tmp_path / "out").rglob("made_of.json"):
        marker.unlink()
    trained.clear()
    studies.run_study(write({"teacher": STUDENT | {"overrides": ["train.steps=1"]}, "pupil": TAUGHT}))
    assert trained == [("teacher", False, True), ("pupil", False, True)]


def test_every_file_is_hashed_once(write, trained, teacher_run, monkeypatch):
    read, really = [], steps.file_digest
    monkeypatch.setattr(steps, "file_digest", lambda path, where: read.append(path) or really(path, where))
    monkeypatch.setattr(steps, "_digests", {})
    taught = TAUGHT | {"overrides": [f"teacher.path={teacher_run / 'best.pt'}", "train.steps=1"]}
    studies.run_study(write({"pupil": taught, "other": taught}, seeds=[0, 1]))
    assert len(trained) == 4 and read == [teacher_run / "best.pt"]


CUT = {"half": {"of": "teacher", "ratio": 0.4, "round_to": 1}}
FROM_CUT = {
    "teacher": STUDENT,
    "alone": STUDENT | {"start": "half"},
    "pupil": TAUGHT | {"start": "half", "against": "alone"},
}


def test_a_cut_is_made_once_and_has_a_row_and_pupils(write, trained, tmp_path):
    pytest.importorskip("torch_pruning")
    results = studies.run_study(write(FROM_CUT, cuts=CUT))
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["teacher", "half", "alone", "pupil"]
    half = checkpoint.load(tmp_path / "out/half.pt", "x")
    assert {row["params"] for name, row in rows.items() if name != "teacher"} == {half["params"]}
    assert half["params"] < rows["teacher"]["params"]
    assert 0.5 < rows["half"]["macs"] / rows["teacher"]["macs"] < 0.7
    assert rows["half"]["steps"] == 0 and len(rows["half"]["mIoU"]) == len(rows["half"]["mAP"]) == 1
    assert checkpoint.load(tmp_path / "out/pupil/best.pt", "x")["arch"]["widths"] == half["arch"]["widths"]
    text = studies.report(results)
    assert "half" in text and f"{rows['half']['macs'] / 1e6:.0f} M" in text

    trained.clear()
    stamp = (tmp_path / "out/half.pt").stat().st_mtime_ns
    assert studies.run_study(write(FROM_CUT, cuts=CUT)) == results
    assert trained == [] and (tmp_path / "out/half.pt").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("runs", "cuts", "again"),
    [
        (FROM_CUT, {"half": CUT["half"] | {"ratio": 0.3}}, ["alone", "pupil"]),
        (
            FROM_CUT | {"teacher": STUDENT | {"overrides": ["train.steps=1"]}},
            CUT,
            ["teacher", "alone", "pupil"],
        ),
        (FROM_CUT | {"alone": STUDENT | {"start": "half", "overrides": ["train.steps=1"]}}, CUT, ["alone"]),
    ],
)
def test_what_started_from_an_old_cut_is_trained_again(write, trained, runs, cuts, again):
    pytest.importorskip("torch_pruning")
    studies.run_study(write(FROM_CUT, cuts=CUT))
    trained.clear()
    studies.run_study(write(runs, cuts=cuts))
    assert [name for name, _, _ in trained] == again


def test_a_run_killed_after_its_metrics_counts_as_done(write, trained, tmp_path):
    path = write({"a": STUDENT})
    studies.run_study(path)
    (tmp_path / "out/a/seconds.json").unlink()
    trained.clear()
    assert studies.run_study(path)["rows"][0]["mIoU"] and trained == []


def test_no_run_starts_where_one_has_a_fault(write, trained, tmp_path):
    path = write({"a": STUDENT, "b": STUDENT | {"overrides": ["model.encoder=tu-test_resnt"]}})
    with pytest.raises(UserError, match="did you mean 'tu-test_resnet'"):
        studies.run_study(path)
    assert trained == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": []}, "seeds: "),
        ({"runs": {"a b": STUDENT, "a_b": STUDENT}}, "a_b"),
        (
            {"runs": {"a b": STUDENT}, "cuts": {"a_b": {"of": "a b", "ratio": 0.5}}},
            "would both be in the folder a_b",
        ),
        ({"cuts": {"half": {"of": "b", "ratio": 0.5}}}, "half.of: there is no run 'b'"),
        ({"cuts": {"a": {"of": "a", "ratio": 0.5}}}, "'a' is the name of a run too"),
        ({"cuts": {"half": {"of": "a", "ratio": 1.5}}}, "cuts.half.ratio: .*less than 1"),
        ({"runs": {"a": STUDENT | {"start": "half"}}}, "runs.a.start: 'half' is not in cuts"),
        (
            {"runs": {"a": STUDENT | {"start": "half"}}, "cuts": {"half": {"of": "a", "ratio": 0.5}}},
            "put that one before",
        ),
    ],
)
def test_studies_that_make_no_sense_are_refused(write, changes, said):
    with pytest.raises(UserError, match=said):
        study_config.load_study(write(**({"runs": {"a": STUDENT}} | changes)))


def test_options_of_a_cut_are_told_before_anything_is_trained(write, trained):
    with pytest.raises(
        UserError, match=r"study.yaml: cuts.half: --method: there is no 'scales'; did you mean 'scale'"
    ):
        studies.run_study(write(FROM_CUT, cuts={"half": CUT["half"] | {"method": "scales"}}))
    assert trained == []


def test_figures_of_several_tasks_of_a_kind_have_their_names(tiny, tmp_path):
    lanes = {"lane": {"kind": "semantic"}, "road": {"kind": "semantic"}, "z": {"kind": "depth"}, "det": {}}
    one = tiny(tmp_path, {f"tasks.{name}": section for name, section in lanes.items()} | {"tasks.seg": None})
    found = studies.figures_of({"a": {0: tiny(tmp_path)}, "b": {0: one}})
    assert [column.key for column in found.values()][:3] == ["mIoU", "lane mIoU", "road mIoU"]
    assert {("lane", "mIoU"), ("det", "mAP"), ("z", "delta1")} <= set(found)
    row = {"name": "b", "labelled_images": 1, "unlabelled_images": 0, "params": 1, "macs": 1, "steps": 1}
    row |= {
        "seconds": [1.0],
        "step_ms": [1.0],
        "seeds": [0],
        "against": [],
        "lane mIoU": [12.34],
        "AbsRel": [0.1234],
    }
    figures = [asdict(column) for column in found.values()]
    text = studies.report({"title": "t", "machine": "m", "rows": [row], "figures": figures, "gains": []})
    assert "lane mIoU" in text and " 12.3 " in text and " 0.123 " in text and "road mIoU" not in text


def test_a_task_that_is_of_two_kinds_in_one_study_is_refused(write, trained, tmp_path):
    path = write({"a": STUDENT | {"overrides": ["tasks.seg=null", "tasks.it={kind: semantic}"]},
                  "b": STUDENT | {"overrides": ["tasks.seg=null", "tasks.it={kind: depth}"]}})  # fmt: skip
    with pytest.raises(UserError, match="'it' is semantic in 'a' and depth in 'b'"):
        studies.run_study(path)
    assert trained == []


def test_picture_has_truth_and_every_network(write, tmp_path):
    path = write({"teacher": STUDENT | {"overrides": ["train.steps=1"]}}, pictures=2)
    assert studies.run_study(path)["rows"]
    study, configs = study_config.load_study(path)
    picture = studies.picture(study, configs)
    assert picture.dtype == "uint8" and picture.shape[2] == 3
    assert picture.shape[1] > 2 * 64 and picture.shape[0] > 2 * 48  # two rows of truth and network


def test_picture_has_networks_of_other_tasks_cells_and_sizes(write, tmp_path):
    other = ["model.strides=[8, 16]", "tasks.det.head.strides=[16]", "data.input_size=[96, 64]"]
    path = write(
        {"other": STUDENT | {"overrides": other}, "seg": {"config": "seg_only.yaml"}, "both": STUDENT},
        pictures=1,
    )
    only = yaml.safe_load((tmp_path / "student.yaml").read_text())
    del only["tasks"]["det"]
    (tmp_path / "seg_only.yaml").write_text(yaml.safe_dump(only))
    rows = studies.run_study(path)["rows"]
    every = {"mIoU", "mAP", "mAP50"}
    assert [every & set(row) for row in rows] == [every, {"mIoU"}, every]
    assert (tmp_path / "out/picture.png").is_file()


def test_a_folder_whose_name_would_be_read_as_something_else_is_refused(write, tmp_path):
    assert (
        study_config.load_study(write({"t": STUDENT}, dir="runs/a b-1.x"))[1]["t"][0].run.dir
        == "runs/a b-1.x/t"
    )
    for folder in ("runs/a #2", "runs/a: b", "{x}", ""):
        with pytest.raises(UserError, match="dir: use letters"):
            study_config.load_study(write({"t": STUDENT}, dir=folder))
    with pytest.raises(UserError, match="'%' has no letter"):
        study_config.load_study(write({"%": STUDENT}))
