"""Who may import whom, so that a loss can be read without knowing the engine."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "multitask_kd"
LEAVES = {"batch", "registry", "errors"}
COMPONENTS = {"losses", "tasks", "models", "metrics", "data", "sources", "report"} | LEAVES
BUILT = COMPONENTS | {"atomic", "build", "checkpoint", "compress", "config", "distill", "export", "precision"}

# a part of the package -> the parts it may import, besides itself
ALLOWED = {
    "errors": set(),
    "batch": set(),
    "registry": {"errors"},
    "atomic": set(),
    "checkpoint": {"atomic", "errors"},
    "precision": {"errors"},
    "config": {"errors"},
    "cli": {"errors"},
    "data": LEAVES | {"atomic"},
    "metrics": {"batch", "errors"},
    "models": LEAVES,
    "report": {"atomic", "batch", "errors"},
    "compress": {"models"} | LEAVES,
    "sources": {"models"} | LEAVES,
    "losses": {"models"} | LEAVES,
    "tasks": {"models", "metrics", "data", "report"} | LEAVES,
    "distill": {"losses", "tasks", "models", "metrics"} | LEAVES,
    "export": {"__version__", "models", "sources", "tasks"} | LEAVES,
    "build": COMPONENTS | {"compress", "config", "distill", "checkpoint", "precision"},
    "engine": BUILT,
    "experiments": BUILT | {"engine"},
    "docs": COMPONENTS | {"distill", "config", "experiments", "build"},
}

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path, source=None):
    """The parts of the package that a file imports, wherever in it the import stands."""
    here = (
        ("multitask_kd", *path.relative_to(PACKAGE).with_suffix("").parts)
        if path.is_relative_to(PACKAGE)
        else ()
    )
    if here and here[-1] == "__init__":
        here = (*here[:-1], "")
    found = set()
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        found |= {name[1] for name in names if name[0] == "multitask_kd" and len(name) > 1}
    return found


def test_the_reader_of_imports_sees_every_form():
    lines = (
        "import multitask_kd.config",
        "from .. import build, errors",
        "from ..tasks.base import Task",
        "from .log import x",
        "def f():",
        "    from multitask_kd.data import loader",
        "    from multitask_kd import cli",
        "import torch",
    )
    source = "\n".join(lines)
    assert imported(PACKAGE / "engine/x.py", source) == {
        "config",
        "build",
        "errors",
        "tasks",
        "engine",
        "data",
        "cli",
    }
    assert imported(PACKAGE / "x.py", "from . import build\nfrom .data.base import L\n") == {"build", "data"}
    assert imported(PACKAGE / "tasks/__init__.py", "from ..data import x\nfrom .base import y\n") == {
        "data",
        "tasks",
    }


def test_every_part_has_a_rule():
    assert {part_of(p) for p in FILES} <= set(ALLOWED), "say in ALLOWED what the new part may import"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = part_of(path)
    allowed = ALLOWED.get(part, set()) | {part}
    assert not imported(path) - allowed


def test_the_rules_have_no_circle():
    below = {part: set(others) for part, others in ALLOWED.items()}
    while below:
        free = {part for part, others in below.items() if not others & set(below)}
        assert free, f"{sorted(below)} import one another"
        below = {part: others for part, others in below.items() if part not in free}


def test_nothing_imports_the_tools():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) or ""
            assert not module.startswith(("tools", "benchmarks", "tests")), path


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.name)
def test_a_tool_parses_and_calls(path):
    """Everything heavy is imported in main, behind the check of the installation; and what a tool does is short."""
    source = path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert sum(node.end_lineno - node.lineno + 1 for node in functions) <= 32, "more than parsing and a call"
    top = [n for n in ast.parse(source).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {
        name
        for n in top
        for name in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])
    }
    ours = {m for m in modules if m.startswith("multitask_kd")}
    assert ours <= {"multitask_kd.cli"} and not modules & {"torch", "torchvision", "numpy"}


def test_the_package_stays_small_at_its_root():
    assert len(list(PACKAGE.glob("*.py"))) <= 9


def test_functions_stay_short():
    """The loop alone may be longer: it tells the whole story."""
    long = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert long == ["engine/train.py: train"]
