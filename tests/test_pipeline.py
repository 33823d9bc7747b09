"""A pipeline from a trained network to a file for the device, on a network of seconds."""

import copy

import pytest
import yaml

from multitask_kd import checkpoint
from multitask_kd.errors import UserError
from multitask_kd.experiments.pipeline import run_pipeline
from multitask_kd.experiments.pipeline_config import load_pipeline

pytest.importorskip("torch_pruning")
pytest.importorskip("onnxruntime")

PLAN = {
    "config": "recipe.yaml",
    "sparse": {"overrides": ["sparse.weight=0.01", "train.steps=2"]},
    "prune": {"ratio": 0.3, "round_to": 1},
    "finetune": {"overrides": ["train.steps=2"]},
    "distil": {"over": ["taught.yaml"], "overrides": ["train.steps=2"]},
    "compare": {"batch": 2, "runs": 2, "pictures": 1},
}
TAUGHT = {
    "tasks": {
        "seg": {"alpha": 0.5, "soft": {"loss": "kl"}},
        "det": {"alpha": 0.5, "soft": {"loss": "det_soft"}},
    },
    "distill": {"p3": {"student": "neck.p3", "loss": "cwd"}},
}


@pytest.fixture
def plan(tmp_path, raw):
    """plan({"prune": ...}) -> the file of a pipeline with these changes."""
    recipe = raw(tmp_path / "unused", {"train.steps": 2, "eval.pictures": 0, "model.width": 16})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "taught.yaml").write_text(yaml.safe_dump(TAUGHT))

    def make(changes=()):
        content = copy.deepcopy(PLAN) | {"dir": str(tmp_path / "run")} | dict(changes)
        (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "pipeline.yaml"

    return make


def stamps(folder):
    runs = [f"{run}/best.pt" for run in ("whole", "sparse", "finetuned", "distilled")]
    return {
        name: (folder / name).stat().st_mtime_ns
        for name in (*runs, "cut.pt", "student.onnx", "comparison.json")
    }


def test_every_step_is_done_once_and_again_where_it_changed(plan, tmp_path, capsys):
    path = plan()
    results = run_pipeline(path)
    assert [row["name"] for row in results["networks"]] == [
        *("whole", "cut, fine-tuned", "cut, distilled", "whole.onnx", "student.onnx")
    ]
    whole, tuned, taught, _, exported = results["networks"]
    assert tuned["parameters"] == taught["parameters"] == exported["parameters"] < whole["parameters"]
    assert tuned["macs"] < 0.75 * whole["macs"]
    first = stamps(tmp_path / "run")
    pruned = checkpoint.load(tmp_path / "run/cut.pt", "x")
    assert pruned["pruned"]["from"].endswith("sparse/best.pt") and "widths" in pruned["arch"]

    capsys.readouterr()
    assert run_pipeline(plan()) == results
    assert capsys.readouterr().out.count("already done") == 8 and stamps(tmp_path / "run") == first

    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["data"]["workers"], recipe["train"]["log_every"] = 1, 1  # these cannot change a result
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_pipeline(path) == results
    assert capsys.readouterr().out.count("already done") == 8 and stamps(tmp_path / "run") == first

    changed = {"distil": PLAN["distil"] | {"overrides": ["train.steps=3"]}}
    assert run_pipeline(plan(changed)) is not None
    out = capsys.readouterr().out
    assert "trained again: train.steps was 2, is 3" in out
    assert f"done again: {tmp_path / 'run/distilled/best.pt'} has changed" in out
    again = {name for name, stamp in stamps(tmp_path / "run").items() if stamp != first[name]}
    assert again == {"distilled/best.pt", "student.onnx", "comparison.json"}


def test_a_network_that_is_there_is_not_trained(plan, teacher_run, tmp_path):
    path = plan({"checkpoint": str(teacher_run / "best.pt"), "sparse": None})
    _, configs = load_pipeline(path)
    assert list(configs) == ["finetune", "distil"]
    assert configs["distil"].teacher.path == str(teacher_run / "best.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"ratio": 1.5}}, "prune.ratio"),
        ({"prune": {"ratio": 0.5, "by": "flop"}}, "prune: --by: there is no 'flop'; did you mean 'flops'"),
        ({"prune": {"ratio": 0.5, "bye": "flops"}}, "prune.bye: unknown key; did you mean 'by'?"),
        ({"distil": {"overrides": ["train.stepps=3"]}}, "train.stepps: unknown key; did you mean 'steps'?"),
        ({"sparse": {"overrides": ["sparse.wait=3"]}}, "sparse.wait: unknown key"),
        ({"export": {"int4": True}}, "export.int4: unknown key; did you mean 'int8'?"),
    ],
)
def test_faults_are_told_before_anything_is_trained(plan, tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        run_pipeline(plan(changes))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()
