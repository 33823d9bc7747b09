import copy
import json
import logging
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from multitask_kd import config as configs
from multitask_kd.engine.train import train

TOOLS = Path(__file__).parents[1] / "tools"

SEG_SOFT = {"alpha": 0.5, "soft": {"loss": "kl", "options": {"temperature": 2}}}
DET_SOFT = {"alpha": 0.25, "soft": {"loss": "det_mse", "weight": 3, "options": {"weighting": "teacher"}}}


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory):
    """Where every tiny set of scenes is generated, once."""
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="session")
def raw(scenes_root):
    """raw(folder, {"train.steps": 3, ...}) -> the plain mapping of a run of seconds on one thread of the CPU."""

    def make(folder, changes=()):
        scenes = {"layout": "scenes", "size": [48, 64], "root": str(scenes_root)}
        still = {"flip": 0.5, "scale": [1.0, 1.0], "translate": 0.0, "brightness": 0.1, "color": 0.0}
        plain = {
            "run": {"dir": str(folder), "threads": 1, "device": "cpu"},
            "data": {
                "train": {**scenes, "split": "train", "count": 12},
                "val": {**scenes, "split": "val", "count": 5},
                "input_size": [48, 64],
                "workers": 0,
                "augment": still,
            },
            "model": {"encoder": "tu-test_resnet", "strides": [4, 8, 16], "width": 8},
            "tasks": {"seg": {"ratio": 2.0}, "det": {"head": {"strides": [8, 16], "depth": 1}}},
            "train": {
                "steps": 4, "batch_size": 4, "log_every": 2, "save_every": 2,
                "optimizer": {"lr": 5e-3, "warmup": 0},
            },
            "eval": {"batch_size": 3, "pictures": 1},
        }  # fmt: skip
        for key, value in dict(changes).items():
            *parents, last = key.split(".")
            node = plain
            for part in parents:
                node = node.setdefault(part, {})
            if isinstance(value, dict) and isinstance(node.get(last), dict):
                node[last] = node[last] | copy.deepcopy(value)
            else:
                node[last] = copy.deepcopy(value)
        return plain

    return make


@pytest.fixture(scope="session")
def tiny(raw):
    """Likewise, as a Config."""
    return lambda folder, changes=(): configs.parse(raw(folder, changes), "tiny.yaml")


@pytest.fixture(scope="session")
def teacher_run(tiny, tmp_path_factory):
    """A folder with a trained teacher: wider than the student, with the same cells."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(
        tiny(folder, {"model.width": 16, "train.steps": 2, "run.seed": 7, "train.ema": 0, "eval.pictures": 0})
    )
    return folder


@pytest.fixture(scope="session")
def learnt_run(tiny, tmp_path_factory):
    """A folder with a network that finds some of the objects of its validation set."""
    folder = tmp_path_factory.mktemp("learnt") / "run"
    still = {"flip": 0.0, "brightness": 0.0}
    changes = {
        "data.train": {"split": "val", "count": 5},
        "data.augment": still,
        "train.steps": 60,
        "train.log_every": 20,
    }
    more = {"train.save_every": 60, "train.ema": 0, "eval.pictures": 0, "train.optimizer": {"lr": 1e-2}}
    train(tiny(folder, changes | more))
    return folder


@pytest.fixture(scope="session")
def distilled(teacher_run):
    """Changes for ``tiny`` and ``raw``: both tasks taught by the teacher."""
    return {
        "tasks.seg": SEG_SOFT,
        "tasks.det": DET_SOFT,
        "teacher": {"path": str(teacher_run / "best.pt"), "amp": "none"},
    }


@pytest.fixture(scope="session")
def read_lines():
    """read_lines(run folder, kind) -> the lines of its metrics.jsonl."""

    def read(folder, kind=None):
        lines = [json.loads(text) for text in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if kind in (None, line["kind"])]

    return read


@pytest.fixture
def real():
    """real("samples/voc_real") -> that folder of real data; without MTKD_REAL_DATA, or without it there, the
    test is skipped."""

    def folder(name):
        place = os.environ.get("MTKD_REAL_DATA")
        if not place or not (Path(place) / name).is_dir():
            pytest.skip(f"MTKD_REAL_DATA names no folder with {name}/")
        return Path(place) / name

    return folder


@pytest.fixture
def tool(monkeypatch, capsys):
    """tool("train", "--config", ...) -> (exit status, standard output, standard error), in this process."""
    root, package = logging.getLogger(), logging.getLogger("multitask_kd")
    before = root.level, package.level, list(root.handlers)

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    yield run
    root.setLevel(before[0])
    package.setLevel(before[1])
    root.handlers[:] = before[2]


@pytest.fixture(scope="session")
def same_weights():
    """same_weights(a, b): equal keys and bit-equal tensors; names the first that differs."""

    def check(a, b):
        assert list(a) == list(b)
        for name in a:
            assert torch.equal(a[name], b[name]), name

    return check
