"""A run that was killed or stopped and then resumed is, to the bit, the run that was never broken."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from multitask_kd import checkpoint
from multitask_kd.engine import train as loop
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError
from multitask_kd.tasks.semantic import Semantic

TRAIN = Path(__file__).parents[1] / "tools/train.py"
STEPS, SAVE_EVERY, BREAK_AT = 7, 3, 4

# tools/train.py in a process that signals its own group (or itself) once a step is done, at an exact place
BROKEN = """
import os, runpy, signal, sys
from multitask_kd.engine import log
step_done = log.Progress.step
count = 0
def step(self):
    global count
    count += 1
    step_done(self)
    if count == {at}:
        {send}
log.Progress.step = step
sys.argv = ["train.py", "--config", {config!r}]
runpy.run_path({tool!r}, run_name="__main__")
"""


def changes_of(distilled):
    """Everything that has a state: two loader processes, augmentation, teacher, average, unlabelled images,
    warm-up."""
    return {
        **distilled, "data.workers": 2, "data.labelled": 4, "data.augment.scale": [0.8, 1.2], "data.augment.translate": 0.1,
        "train.steps": STEPS, "train.save_every": SAVE_EVERY, "train.log_every": 2, "train.eval_every": 3, "train.ema": 0.9,
        "train.optimizer": {"lr": 5e-3, "warmup": 2}, "eval.pictures": 0, "eval.images": 3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tiny, distilled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(tiny(folder, changes_of(distilled))) is not None
    return folder


def broken_in_a_process(raw, distilled, folder, send):
    """Exit status and output of a run in a process group of its own that is sent a signal after step
    BREAK_AT."""
    config = folder.parent / "cfg.yaml"
    config.write_text(yaml.safe_dump(raw(folder, changes_of(distilled)), sort_keys=False), encoding="utf-8")
    code = BROKEN.format(at=BREAK_AT, send=send, config=str(config), tool=str(TRAIN))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder.parent, start_new_session=True,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def resumed(tiny, distilled, folder):
    torch.manual_seed(99)  # the random state comes from the file, not from here
    return train(tiny(folder, changes_of(distilled)), resume=True)


def check_same_run(unbroken, folder, read_lines, same_weights):
    a, b = (checkpoint.load(f / "last.pt", "x") for f in (unbroken, folder))
    same_weights(a["model"], b["model"])
    same_weights(a["resume"]["distiller"], b["resume"]["distiller"])
    assert a["step"] == b["step"] == STEPS and a["metrics"] == b["metrics"]
    assert a["resume"]["ema_updates"] == b["resume"]["ema_updates"] == STEPS
    for key, state in a["resume"]["optimizer"]["state"].items():
        same_weights(state, b["resume"]["optimizer"]["state"][key])
    assert torch.equal(a["resume"]["random"]["torch"], b["resume"]["random"]["torch"])
    same_weights(
        checkpoint.load(unbroken / "best.pt", "x")["model"], checkpoint.load(folder / "best.pt", "x")["model"]
    )
    plain = lambda lines: [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]  # noqa: E731
    assert plain(read_lines(unbroken)) == plain(read_lines(folder))
    assert (unbroken / "metrics.json").read_text() == (folder / "metrics.json").read_text()


def test_the_unbroken_run_saves_between_its_ends(unbroken, read_lines):
    assert [line["step"] for line in read_lines(unbroken, "train")] == [2, 4, 6, 7]
    assert BREAK_AT % SAVE_EVERY and SAVE_EVERY < BREAK_AT < STEPS


def test_killed_and_resumed(raw, tiny, distilled, unbroken, tmp_path, read_lines, same_weights):
    folder = tmp_path / "run"
    status, _, err = broken_in_a_process(raw, distilled, folder, "os.kill(os.getpid(), signal.SIGKILL)")
    assert status == -signal.SIGKILL, err
    assert (
        checkpoint.load(folder / "last.pt", "x")["step"] == SAVE_EVERY
        and not (folder / "metrics.json").exists()
    )
    assert resumed(tiny, distilled, folder) is not None
    check_same_run(unbroken, folder, read_lines, same_weights)


def test_sigterm_to_the_group_saves_and_ends_with_130(
    raw, tiny, distilled, unbroken, tmp_path, read_lines, same_weights
):
    folder = tmp_path / "run"
    status, out, err = broken_in_a_process(raw, distilled, folder, "os.killpg(os.getpgid(0), signal.SIGTERM)")
    assert status == 130 and "Traceback" not in err, err
    assert f"stopped at step {BREAK_AT}; go on with --config " in out and "resumed at step" not in out
    assert checkpoint.load(folder / "last.pt", "x")["step"] == BREAK_AT
    assert resumed(tiny, distilled, folder) is not None
    check_same_run(unbroken, folder, read_lines, same_weights)


def signal_after(monkeypatch, step, numbers):
    done, count = loop.Progress.step, [0]

    def wrapped(self):
        count[0] += 1
        done(self)
        if count[0] == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Progress, "step", wrapped)


def test_ctrl_c_saves_and_ends_with_130(
    raw, tiny, distilled, unbroken, tmp_path, read_lines, same_weights, tool, monkeypatch
):
    folder, config = tmp_path / "run", tmp_path / "cfg.yaml"
    before = signal.getsignal(signal.SIGINT)  # not Python's own where the tests run in the background
    config.write_text(yaml.safe_dump(raw(folder, changes_of(distilled)), sort_keys=False), encoding="utf-8")
    with monkeypatch.context() as patch:
        signal_after(patch, BREAK_AT + 1, [signal.SIGINT])
        status, out, _ = tool("train", "--config", config)
    assert status == 130 and f"stopped at step {BREAK_AT + 1}" in out
    assert checkpoint.load(folder / "last.pt", "x")["step"] == BREAK_AT + 1
    assert signal.getsignal(signal.SIGINT) == before
    assert tool("train", "--config", config, "--resume")[0] == 0
    check_same_run(unbroken, folder, read_lines, same_weights)


def test_every_random_state_is_resumed(tiny, tmp_path, monkeypatch, read_lines, same_weights):
    """With a loss that draws from torch, numpy and Python, as dropout would."""
    losses = Semantic.losses

    def noisy(self, *args):
        noise = torch.rand(()).item() + np.random.rand() + random.random()
        return {"ce": losses(self, *args)["ce"] * (0.5 + noise)}

    monkeypatch.setattr(Semantic, "losses", noisy)
    make = lambda name: tiny(tmp_path / name, {"train.steps": 4, "train.log_every": 1, "eval.pictures": 0})  # noqa: E731
    train(make("unbroken"))
    with monkeypatch.context() as patch:
        signal_after(patch, 2, [signal.SIGTERM])
        assert train(make("broken")) is None
    assert train(make("broken"), resume=True) is not None
    a, b = (checkpoint.load(tmp_path / name / "last.pt", "x") for name in ("unbroken", "broken"))
    same_weights(a["model"], b["model"])
    raw = [
        [line["raw/seg.hard.ce"] for line in read_lines(tmp_path / name, "train")]
        for name in ("unbroken", "broken")
    ]
    assert raw[0] == raw[1] and len(raw[0]) == 4


def test_a_second_ctrl_c_stops_at_once(tiny, tmp_path, monkeypatch):
    signal_after(monkeypatch, 3, [signal.SIGINT, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path / "run", {"train.save_every": 2}))
    assert checkpoint.load(tmp_path / "run/last.pt", "x")["step"] == 2


def test_a_signal_at_the_last_step_finishes_the_run(tiny, tmp_path, monkeypatch):
    signal_after(monkeypatch, 2, [signal.SIGTERM])
    assert train(tiny(tmp_path / "run", {"train.steps": 2, "eval.pictures": 0})) is not None


def test_a_folder_that_was_moved_is_resumed_where_it_is(tiny, distilled, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "moved")
    config = tiny(tmp_path / "moved", changes_of(distilled))
    assert train(config, resume=True) == loop.json.loads((unbroken / "metrics.json").read_text())


def test_classes_in_another_order_are_not_resumed(tiny, unbroken, distilled, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=False)
    classes = content["arch"]["tasks"]["seg"]["classes"]
    content["arch"]["tasks"]["seg"]["classes"] = classes[1:] + classes[:1]
    torch.save(content, tmp_path / "run" / "last.pt")
    with pytest.raises(
        UserError, match=r"^--resume: the classes of 'seg' were .* put the data back, or start again"
    ):
        train(tiny(tmp_path / "run", changes_of(distilled)), resume=True)
