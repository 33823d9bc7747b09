"""The shipped recipes on real images, a few steps each. Needs MTKD_REAL_DATA: the folder that holds camvid/
and pennfudan/."""

import os
from pathlib import Path

import pytest

from multitask_kd.config import load
from multitask_kd.engine.evaluate import evaluate_checkpoint
from multitask_kd.engine.train import train

ROOT = Path(os.environ.get("MTKD_REAL_DATA", ""))
CONFIGS = Path(__file__).parents[1] / "configs"

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(
        not os.environ.get("MTKD_REAL_DATA"),
        reason="set MTKD_REAL_DATA to the folder of camvid/ and pennfudan/",
    ),
]


@pytest.mark.parametrize("name", ["camvid", "pennfudan"])
def test_teacher_and_distilled_student_run_on_real_images(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name.upper(), str(ROOT / name))
    small = [
        "train.steps=2",
        "train.batch_size=4",
        "run.threads=1",
        "data.workers=0",
        "model.encoder=tu-test_resnet",
        "model.width=8",
        "data.input_size=[64,64]",
        f"data.train.cache={tmp_path}/cache",
        "data.val.cache=null",
        "eval.pictures=1",
    ]
    teacher = load(CONFIGS / f"{name}_teacher.yaml", [*small, f"run.dir={tmp_path}/teacher"])
    train(teacher)
    student = [
        *small,
        f"run.dir={tmp_path}/student",
        f"teacher.path={tmp_path}/teacher/best.pt",
        "data.labelled=0.2",
    ]
    config = load(
        CONFIGS / f"{name}_distilled.yaml", student, over=[CONFIGS / "methods/kl_det_soft_cwd_pkd.yaml"]
    )
    metrics = train(config)
    assert metrics["images"] == {"camvid": 101, "pennfudan": 40}[name]
    assert evaluate_checkpoint(config, f"{tmp_path}/student/best.pt") == metrics
