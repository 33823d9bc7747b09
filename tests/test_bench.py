"""The benchmark measures what it says: one tiny run of it, with a teacher."""

import pytest

from multitask_kd.config import parse
from multitask_kd.engine.bench import bench, step_times
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError


def config(root, name, **changes):
    scenes = {"layout": "scenes", "count": 8, "size": [64, 64], "root": str(root)}
    raw = {
        "run": {"dir": str(root / name), "threads": 1},
        "data": {
            "train": {**scenes, "split": "train"},
            "val": {**scenes, "split": "val", "count": 2},
            "input_size": [64, 64],
            "workers": 1,
        },
        "model": {"encoder": "tu-test_resnet", "width": 8},
        "tasks": {"seg": {}, "det": {}},
        "train": {"steps": 1, "batch_size": 2},
        "eval": {"pictures": 0},
    }
    return parse({**raw, **changes}, "test")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    train(config(root, "teacher"))
    tasks = {
        "seg": {"alpha": 0.5, "soft": {"loss": "kl"}},
        "det": {"alpha": 0.5, "soft": {"loss": "det_mse"}},
    }
    teacher = {"path": str(root / "teacher/best.pt")}
    terms = {"logits": {"student": "heads.seg", "loss": "cwd"}, "p3": {"student": "neck.p3", "loss": "pkd"}}
    return bench(config(root, "student", tasks=tasks, teacher=teacher, distill=terms), steps=20, rounds=1)


def test_ratios_are_those_of_the_times_beside_them(figures):
    assert figures["step_over_bare_loop"] == pytest.approx(figures["step_ms"] / figures["bare_loop_ms"])
    rates = figures["loader_images_per_second"] / figures["student_images_per_second"]
    assert figures["loader_over_student"] == pytest.approx(rates)
    assert figures["student_images_per_second"] == pytest.approx(2000 / figures["student_step_ms"])


def test_every_part_is_timed(figures):
    parts = figures["parts_ms"]
    expected = {
        "teacher forward",
        "student forward",
        "seg.hard",
        "det.hard",
        "seg.soft.kl",
        "det.soft.det_mse",
    }
    assert expected | {"distill.logits", "distill.p3", "optimizer", "average of weights"} == set(parts)
    assert all(spent > 0 for spent in parts.values())
    assert -0.5 < figures["tapped_step_overhead"] < 0.5 and len(figures["tapped_step_overhead_rounds"]) == 1
    # what a step does cannot cost less than its largest part, by far
    assert figures["bare_loop_ms"] > 0.5 * parts["student forward"]


def test_step_times_are_of_every_config_and_over_the_first(tmp_path):
    alone = config(tmp_path, "alone")
    rows = step_times({"alone": alone, "again": alone}, steps=2, rounds=3)
    assert [row["name"] for row in rows] == ["alone", "again"] and rows[0]["over_first"] == 1.0
    assert all(row["step_ms"] > 0 for row in rows) and 0.1 < rows[1]["over_first"] < 10
    with pytest.raises(UserError, match="both must be at least 1"):
        step_times({"alone": alone}, steps=0)
