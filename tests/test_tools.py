import builtins
import json
import sys

import pytest
import torch
import yaml

from multitask_kd import checkpoint, cli
from multitask_kd.errors import UserError
from multitask_kd.experiments import runs, study

SCHEDULE = {"train.steps": 2, "eval.pictures": 1}


@pytest.fixture
def put(raw, tmp_path):
    """put("cfg.yaml", folder, changes) -> the path of that config."""

    def write(name, folder, changes=()):
        (tmp_path / name).write_text(yaml.safe_dump(raw(folder, changes), sort_keys=False), encoding="utf-8")
        return tmp_path / name

    return write


def test_train_then_eval(put, tool, tmp_path):
    config = put("cfg.yaml", tmp_path / "run", SCHEDULE)
    status, out, err = tool("train", "--config", config, "train.optimizer.lr=1e-3", "run.seed=3")
    assert status == 0 and "Traceback" not in err
    assert "labelled images" in out and "mIoU" in out and f"result: {tmp_path / 'run/best.pt'}" in out
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["train"]["optimizer"]["lr"] == 1e-3 and written["run"]["seed"] == 3

    figures = tmp_path / "deep/er/figures.json"
    status, out, _ = tool(
        "eval",
        "--config",
        config,
        "--checkpoint",
        tmp_path / "run/best.pt",
        "--json",
        figures,
        "eval.batch_size=2",
    )
    assert status == 0 and "mIoU" in out and "mAP50" in out
    found = json.loads(figures.read_text())
    assert set(found) == {"images", "skipped", "seg", "det"} and (found["images"], found["skipped"]) == (5, 0)
    assert set(found["seg"]) == {"mIoU", "pixel_accuracy", "IoU"}
    sizes = ("small", "medium", "large")
    assert set(found["det"]) == {"mAP", "mAP50", "mAP75", "AR1", "AR10", "AR100", "AP"} | {
        f"{k}_{s}" for k in ("mAP", "AR") for s in sizes
    }
    classes = checkpoint.load(tmp_path / "run/best.pt", "x")["arch"]["tasks"]
    assert (
        list(found["seg"]["IoU"]) == classes["seg"]["classes"]
        and list(found["det"]["AP"]) == classes["det"]["classes"]
    )
    trained = json.loads((tmp_path / "run/metrics.json").read_text())
    assert trained["images"] == 5 and set(trained) == set(found)
    assert trained["seg"]["mIoU"] == pytest.approx(found["seg"]["mIoU"], abs=0.05)  # batches of another size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.stesp=3"], "train.stesp: unknown key; did you mean 'steps'?"),
        (["model.encoder=tu-test_resnt"], "did you mean 'tu-test_resnet'?"),
        (["train.steps"], "write it as key=value"),
        (["tasks.det.decode.score_threshold=low"], "tasks.det.decode.score_threshold: needs a number"),
        (["data.train.split=trian"], "data.train.split: unknown split 'trian'"),
        (["data.labelled=99", "data.unlabelled=false"], "data.labelled: 99"),
        (
            ["teacher.path=/nowhere/best.pt", "tasks.seg.alpha=0.5", "tasks.seg.soft.loss=kl"],
            "there is no checkpoint /nowhere/best.pt",
        ),
        (["train.amp=fp16"], "fp16 needs a CUDA device"),
        (["run.device=cuda:99"], "run.device: cuda:99 is not there"),
        (["--resume"], "leave --resume out to start"),
    ],
)
def test_train_tells_faults_in_a_line_and_exits_with_2(put, tool, tmp_path, arguments, said):
    status, out, err = tool("train", "--config", put("cfg.yaml", tmp_path / "run"), *arguments)
    assert status == 2 and err.startswith("error: ") and said in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_train_stops_on_a_loss_that_is_not_finite(put, tool, tmp_path):
    config = put(
        "cfg.yaml",
        tmp_path / "run",
        {"train.optimizer": {"name": "sgd", "lr": 1e30, "warmup": 0}, "train.clip": 0},
    )
    status, _, err = tool("train", "--config", config)
    assert (
        status == 2 and "error: step 2: the loss" in err and "is not finite" in err and "Traceback" not in err
    )


def test_a_config_that_is_not_there(tool, tmp_path):
    for name, more in (("train", []), ("eval", ["--checkpoint", "x.pt"])):
        status, _, err = tool(name, "--config", tmp_path / "none.yaml", *more)
        assert status == 2 and f"error: {tmp_path / 'none.yaml'}: there is no such config file" in err


def test_eval_tells_faults_and_exits_with_2(put, tool, tmp_path, teacher_run):
    config = put("cfg.yaml", tmp_path / "run")
    status, _, err = tool("eval", "--config", config, "--checkpoint", tmp_path / "none.pt")
    assert status == 2 and "--checkpoint: there is no checkpoint" in err
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pt")
    status, _, err = tool("eval", "--config", config, "--checkpoint", tmp_path / "other.pt")
    assert status == 2 and "is not a checkpoint written by tools/train.py" in err
    status, _, err = tool(
        "eval", "--config", config, "--checkpoint", teacher_run / "best.pt", "data.val.cuont=3"
    )
    assert status == 2 and "data.val.cuont: no such option; did you mean 'count'?" in err
    status, _, err = tool(
        "eval", "--config", config, "--checkpoint", tmp_path / "none.pt", "--json", tmp_path
    )
    assert (
        status == 2 and f"--json: {tmp_path} is a folder; name a file in it" in err
    )  # before anything is evaluated
    assert "Traceback" not in err


def test_wrong_usage_is_argparses(tool, put, tmp_path):
    status, _, err = tool("train")
    assert status == 2 and "--config" in err
    status, _, err = tool("train", "--config", put("cfg.yaml", tmp_path / "run"), "--resume", "--overwrite")
    assert status == 2 and "not allowed with" in err


@pytest.mark.parametrize("name", ["train", "eval", "demo"])
def test_help(tool, name):
    status, out, _ = tool(name, "--help")
    assert status == 0 and "usage" in out


@pytest.fixture
def broken_torchvision(monkeypatch):
    """Importing torchvision.ops raises the given error."""

    def breaks(error):
        really = builtins.__import__

        def fails(name, *args, **kwargs):
            if name == "torchvision.ops":
                raise error
            return really(name, *args, **kwargs)

        monkeypatch.delitem(sys.modules, "torchvision.ops")
        monkeypatch.setattr(builtins, "__import__", fails)

    return breaks


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist\nmore"),
        OSError("undefined symbol: _ZN3c10"),
        ImportError("x.so"),
    ],
)
def test_a_torchvision_of_another_torch_is_explained(broken_torchvision, put, tool, tmp_path, error):
    config = put("cfg.yaml", tmp_path / "run")
    broken_torchvision(error)
    status, _, err = tool("train", "--config", config)
    assert (
        status == 2
        and "torch and torchvision do not match" in err
        and "pip install --force-reinstall torch torchvision" in err
    )
    assert f"torchvision says: {str(error).splitlines()[0]}" in err and "Traceback" not in err


def test_a_torchvision_that_is_not_installed(broken_torchvision):
    broken_torchvision(ModuleNotFoundError("No module named 'torchvision'"))
    with pytest.raises(UserError, match="No module named 'torchvision': install the project first"):
        cli.check_torchvision()


# demo


@pytest.fixture(scope="module")
def demo_study(raw, tmp_path_factory):
    """A study of three networks, like the one that is shipped, of seconds."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "student.yaml").write_text(
        yaml.safe_dump(raw("unused", SCHEDULE), sort_keys=False), encoding="utf-8"
    )
    soft = {"seg": {"alpha": 0.5, "soft": {"loss": "kl"}}, "det": {"alpha": 0.5, "soft": {"loss": "det_mse"}}}
    (folder / "taught.yaml").write_text(
        yaml.safe_dump({"base": "student.yaml", "tasks": soft, "teacher": {"path": "unset"}})
    )
    plans = {
        "teacher": {"config": "student.yaml", "overrides": ["model.width=16"]},
        "scratch": {"config": "student.yaml", "overrides": ["data.labelled=4", "data.unlabelled=false"]},
        "distilled": {
            "config": "taught.yaml",
            "overrides": ["data.labelled=4", "teacher.path={dir}/teacher/best.pt"], "against": "scratch",
        },
    }  # fmt: skip
    plan = {"title": "Tiny", "dir": str(folder / "out"), "runs": plans, "pictures": 2}
    (folder / "study.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    return folder


def test_demo(demo_study, tool):
    status, out, err = tool("demo", "--study", demo_study / "study.yaml")
    assert status == 0, err
    folder = demo_study / "out"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["teacher", "scratch", "distilled", "seconds", "peak_memory_mb"]
    assert 100 < summary["peak_memory_mb"]["training"] < 3000
    for name in ("teacher", "scratch", "distilled"):
        row = summary[name]
        assert set(row) == {"mIoU", "mAP", "mAP50", "labelled_images", "params"}
        metrics = json.loads((folder / name / "metrics.json").read_text())
        assert (row["mIoU"], row["mAP"], row["mAP50"]) == (
            metrics["seg"]["mIoU"],
            metrics["det"]["mAP"],
            metrics["det"]["mAP50"],
        )
        assert f"{name} saw " in out
    assert [summary[n]["labelled_images"] for n in ("teacher", "scratch", "distilled")] == [12, 4, 4]
    assert summary["scratch"]["params"] == summary["distilled"]["params"] < summary["teacher"]["params"]
    seconds = summary["seconds"]
    assert set(seconds) == {"teacher", "scratch", "distilled", "total"} and all(
        s >= 0 for s in seconds.values()
    )
    assert "distilled saw 4 labelled and 8 unlabelled images" in out and "distilled - scratch" in out
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "Tiny" in (folder / "results.md").read_text()
        and len(json.loads((folder / "results.json").read_text())["rows"]) == 3
    )


def test_demo_again_trains_nothing(demo_study, tool, monkeypatch):
    if not (demo_study / "out/summary.json").exists():
        assert tool("demo", "--study", demo_study / "study.yaml")[0] == 0
    before = json.loads((demo_study / "out/summary.json").read_text())
    monkeypatch.setattr(runs, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    status, out, _ = tool("demo", "--study", demo_study / "study.yaml")
    assert status == 0 and out.count("already done") == 3
    after = json.loads((demo_study / "out/summary.json").read_text())
    for summary in (before, after):
        del summary["seconds"]["total"], summary["peak_memory_mb"]
    assert after == before


def test_demo_of_a_faulty_study_trains_nothing(demo_study, tool, tmp_path):
    plan = yaml.safe_load((demo_study / "study.yaml").read_text())
    plan["dir"] = str(tmp_path / "out")
    for run in plan["runs"].values():
        run["config"] = str(demo_study / run["config"])
    plan["runs"]["distilled"]["overrides"].append("tasks.seg.soft.loss=kll")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    status, _, err = tool("demo", "--study", tmp_path / "study.yaml")
    assert (
        status == 2
        and "unknown soft loss 'kll'; did you mean 'kl'?" in err
        and not (tmp_path / "out").exists()
    )


def test_a_signal_ends_the_demo_with_130(demo_study, tool, monkeypatch):
    monkeypatch.setattr(study, "run_study", lambda *args, **kwargs: None)
    assert tool("demo", "--study", demo_study / "study.yaml")[0] == 130

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_study", interrupted)
    status, _, err = tool("demo", "--study", demo_study / "study.yaml")
    assert status == 130 and "stopped" in err and "Traceback" not in err


def test_a_full_disk_and_too_little_memory_are_told_in_a_line(tool, monkeypatch, raw, tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text(yaml.safe_dump(raw(tmp_path / "run")), encoding="utf-8")
    for error, said in (
        (OSError(28, "No space left on device", "/x/last.pt"), "error: /x/last.pt: No space left on device"),
        (MemoryError(), "error: out of memory; lower train.batch_size"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("multitask_kd.engine.train.train", fail)
        status, _, err = tool("train", "--config", path)
        assert status == 2 and said in err and "Traceback" not in err
