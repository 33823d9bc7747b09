"""docs/config.md, made from the typed config and the registries."""

from __future__ import annotations

import inspect
from typing import Any, get_args, get_origin

from pydantic import JsonValue

from . import build  # noqa: F401  (fills the registries)
from .config import SCHEDULES, Config, DataSet, Section
from .data.base import LAYOUTS
from .distill.balance import BALANCES
from .experiments.pipeline_config import Pipeline
from .experiments.search_config import Search
from .experiments.study_config import Study
from .losses.base import LOSSES
from .registry import options_of
from .sources.base import SOURCES
from .tasks.base import KINDS

HEAD = """# Configuration

Made by `make docs` from the typed config; a test keeps it up to date. A run is one YAML file. `base: other.yaml` reads that file
first and merges this one over it; `key=value` on the command line changes single keys (`train.steps=200`). An unknown key, name
or option stops the run before any data is read. The resolved config, defaults included, is written into the run's folder.
"""


def config_page() -> str:
    """The whole page, Markdown."""
    parts = [HEAD, *_sections(Config, ""), *_sections(DataSet, "data.train[]", hidden=("layout",))]
    parts += ["## Names and their options", ""]
    registries = {
        "`data.train.layout`, `data.val.layout`": LAYOUTS,
        "`teacher.source`": SOURCES,
        "`tasks.<name>.soft.loss`, `distill.<name>.loss`": LOSSES,
        "`balance.method`": BALANCES,
    }
    for title, registry in registries.items():
        parts += [f"### {title}", ""]
        for name in registry.names():
            kind = registry.get(name, "")
            parts += _component(name, kind, _fits(kind) if registry is LOSSES else "")
    parts += ["### `teacher.outputs.<task>`, by the task's kind", ""]
    for name in KINDS.names():
        parts += _component(name, KINDS.get(name, "").Output)
    parts += ["### `tasks.<name>.kind`", ""]
    for name in KINDS.names():
        kind = KINDS.get(name, "")
        for part, owner in (("hard", kind), ("head", kind.Head), ("decode", kind.decode)):
            parts += _component(f"{name}.{part}", owner)
    parts += _schedules()
    parts += [
        "## Studies",
        "",
        "Several runs over seeds and one table: `python benchmarks/study.py STUDY.yaml`.",
        "",
    ]
    parts += _sections(Study, "")
    parts += [
        "## Searches",
        "",
        "One config under many settings: `python tools/search.py --config CONFIG.yaml --space SEARCH.yaml`.",
        "",
    ]
    parts += _sections(Search, "")
    parts += [
        "## Pipelines",
        "",
        "From a trained network to a small one: `python tools/pipeline.py --config PIPELINE.yaml`.",
        "",
    ]
    return "\n".join([*parts, *_sections(Pipeline, "")]).rstrip() + "\n"


def _schedules() -> list[str]:
    """The section on schedules, which a key takes in place of a number."""
    parts = ["## Schedules", "", "Where the tables say schedule, a number or one of these, e.g.", ""]
    parts += [
        "`alpha: {schedule: linear, start: 0.2, end: 0.8}`; progress runs from 0 to 1 over `train.steps`.",
        "",
    ]
    for kind in dict.fromkeys(SCHEDULES.values()):
        names = ", ".join(f"`{name}`" for name, section in SCHEDULES.items() if section is kind)
        rows = [_row(key, field) for key, field in kind.model_fields.items() if key != "schedule"]
        parts += [f"### {names}", "", inspect.cleandoc(kind.__doc__), "", *TABLE, *rows, ""]
    return parts


TABLE = ("| key | type | default | |", "|---|---|---|---|")


def _row(key: str, field: Any) -> str:
    text = " ".join((field.description or "").split())
    return f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {text} |"


def _sections(section: type[Section], path: str, hidden: tuple[str, ...] = ()) -> list[str]:
    """A table for ``section`` and one for each section inside it."""
    rows, inner = [], []
    for key, field in section.model_fields.items():
        if key in hidden:
            continue
        nested = _nested(field.annotation)
        where = f"{path}.{key}" if path else key
        if nested:
            inner.append((nested, f"{where}.<name>" if get_origin(field.annotation) is dict else where))
        if not nested or field.description:
            rows.append(_row(key, field))
    title = f"## `{path}`" if path else f"## {section.__name__}"
    lines = [title, "", inspect.cleandoc(section.__doc__ or ""), ""]
    if rows:
        lines += [*TABLE, *rows, ""]
    return lines + [line for nested, where in inner for line in _sections(nested, where)]


def _nested(annotation: Any) -> type[Section] | None:
    found = [annotation, *get_args(annotation)]
    return next(
        (a for a in found if isinstance(a, type) and issubclass(a, Section) and a not in SCHEDULES.values()),
        None,
    )


def _type(annotation: Any) -> str:
    args = [a for a in get_args(annotation) if a is not Ellipsis]
    if annotation in SCHEDULES.values():
        return "schedule"
    if annotation is JsonValue:
        return "any value"
    origin = get_origin(annotation)
    if origin is None:
        return {
            "NoneType": "null",
            "str": "text",
            "int": "whole number",
            "float": "number",
            "bool": "true or false",
        }.get(getattr(annotation, "__name__", str(annotation)), "section")
    if origin is dict:
        return "mapping"
    if origin in (tuple, list):
        return "list of " + " and ".join(dict.fromkeys(_type(a) for a in args))
    if hasattr(annotation, "__metadata__"):
        return _type(args[0])
    if all(isinstance(a, str) for a in args):
        return ", ".join(f"`{a}`" for a in args)
    return " or ".join(dict.fromkeys(_type(a) for a in args))


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, dict) and any(isinstance(v, Section) for v in value.values()):
        return ", ".join(f"`{k}`" for k in value)
    if isinstance(value, Section):
        return ""
    text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def _fits(loss: Any) -> str:
    """Where a loss may be used, in one line."""
    where = [
        f"`tasks.<name>.soft` of kind {kind}, `distill` between the heads of such a task"
        for kind in loss.kinds
    ]
    where += ["`distill` between feature maps"] if loss.maps else []
    scheduled = (
        f" A schedule may change {', '.join(f'`{o}`' for o in loss.scheduled)}." if loss.scheduled else ""
    )
    return f"For {'; '.join(where)}.{scheduled}\n\n"


def _component(name: str, owner: Any, before: str = "") -> list[str]:
    text = before + inspect.cleandoc(owner.__doc__ or "").replace("``", "`")
    options = [
        f"`{key}`" + ("" if p.default is p.empty else f" = `{'null' if p.default is None else p.default}`")
        for key, p in options_of(owner).items()
    ]
    return [f"#### {name}", "", text, "", "Options: " + (", ".join(options) or "none") + ".", ""]
