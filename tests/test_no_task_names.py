"""No code outside tasks/ and the layouts names a task, looks at a prediction's type, or tells tasks apart by
the rank of a tensor."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "multitask_kd"
NAMES = {"seg", "det", "semantic", "detection", "classification", "depth"}
TYPES = {"PaddedDetections", "DensePredictions", "CellPredictions", "Detections", "BoxLabels"}
# where a kind, a label's name or a type of prediction is at home; losses name the kinds that they are written
# for
HOMES = ("tasks/", "data/layouts/", "data/scenes/", "losses/")
# components of a kind, each of one form of prediction or label; and what says of a network of a library which
# kind of task it does
PARTS = {
    "batch.py", "data/labels.py", "models/detections.py", "models/detection_reader.py", "models/relocation.py",
    "models/decoders.py", "sources/torchvision.py", "sources/smp.py",
}  # fmt: skip
# the two tasks that a config has where it names none
DEFAULTS = {("config/sections.py", "seg"), ("config/sections.py", "det")}

FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if not p.relative_to(PACKAGE).as_posix().startswith(HOMES)]


def texts(tree):
    """Every string of the code itself: no docstrings, nor those of fields."""
    prose = {id(n.value) for parent in ast.walk(tree) for n in _body(parent) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


def _body(node):
    body = getattr(node, "body", [])
    return body if isinstance(body, list) else []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_task_is_named(path):
    where = path.relative_to(PACKAGE).as_posix()
    named = {
        (line, text) for line, text in texts(ast.parse(path.read_text(encoding="utf-8"))) if text in NAMES
    }
    if where not in PARTS:
        assert not {(line, text) for line, text in named if (where, text) not in DEFAULTS}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_prediction_is_told_by_its_type(path):
    if path.relative_to(PACKAGE).as_posix() not in PARTS:
        used = {
            n.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)
        }
        assert not used & TYPES


# taps are feature maps of unknown networks, whose rank has to be looked at; parameters are sorted by theirs
RANKS = {
    "distill/term.py",
    "engine/optim.py",
    "compress/graph.py",
    "models/maps.py",
    "sources/base.py",
    "sources/files.py",
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_task_is_told_by_the_rank_of_a_tensor(path):
    where = path.relative_to(PACKAGE).as_posix()
    if where not in RANKS | PARTS:
        found = re.findall(r"(?:preds?|pred\[\w+\])\w*\.(?:dim\(\)|ndim)", path.read_text(encoding="utf-8"))
        assert not found


def test_the_test_sees_what_it_is_for():
    source = 'def f(x):\n    """seg"""\n    return x["seg"], "det" in x\n'
    assert sorted(text for _, text in texts(ast.parse(source))) == ["det", "seg"]
