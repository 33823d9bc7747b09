"""YAML files with ``base`` and ``key=value`` overrides -> ``Config``, with errors in terms of the YAML, and
back to YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import UserError, did_you_mean
from .base import Section
from .data_sets import ONE_SET, SET_KEYS, SEVERAL_SETS, called
from .schedules import SCHEDULES, AnySchedule
from .sections import Config

S = TypeVar("S", bound=Section)


def load(path: str | Path, overrides: Sequence[str] = (), *, over: Sequence[str | Path] = ()) -> Config:
    """Read a YAML config, then the files ``over`` it, merged key by key in their order.

    ``base: other.yaml`` in a file, or a list of files, relative to it: these are read before it.

    overrides: ``dotted.key=value`` with a YAML value.
    Raises UserError naming the file and key, with the nearest known key.
    """
    raw = read_yaml(Path(path))
    for more in over:
        raw = merge(raw, read_yaml(Path(more)))
    # names of components first, in any order: another loss drops the options of the one before
    for text in sorted(
        overrides, key=lambda text: text.partition("=")[0].strip().rpartition(".")[2] not in NAMES
    ):
        _override(raw, text)
    return parse(raw, str(path))


def parse(raw: dict[str, Any], origin: str) -> Config:
    """A plain mapping -> Config. Raises UserError with one line per error."""
    return validate(Config, raw, origin)


def validate(section: type[S], raw: dict[str, Any], origin: str) -> S:
    """A plain mapping -> a section. Raises UserError with one line per error, each beginning with
    ``origin``."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(e, section) for e in error.errors()]
        raise UserError("\n".join(f"{origin}: {line}" for line in lines)) from None


def dump(config: Config) -> str:
    """The whole config as YAML, defaults included."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


_SCHEDULE = TypeAdapter(AnySchedule)


def parse_schedule(raw: Any, where: str) -> Section:
    """A schedule that is given as an option of a component. Raises UserError beginning with ``where``."""
    try:
        return _SCHEDULE.validate_python(raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}.{_explain(e, Section)}" for e in error.errors())) from None


class _Loader(yaml.SafeLoader):
    """Plain YAML in which 1e-3 is a number, as in YAML 1.2, and a key that is there twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is there twice", key.start_mark
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back as the same: the text "1e-3" gets quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping merged over its ``base`` files; a file that several of them build on is merged once, the
    first time.

    Raises UserError.
    """
    merged: dict[str, Any] = {}
    for layer in _layers(path, (), set()):
        merged = merge(merged, layer)
    return merged


def _layers(path: Path, above: tuple[Path, ...], done: set[Path]) -> Iterator[dict[str, Any]]:
    """The mappings of a file's bases, lowest first, then its own.

    above: the files whose ``base`` led here; done: the files that were read already.
    """
    if path.resolve() in above:
        raise UserError(f"{path}: base files form a circle")
    if path.resolve() in done:
        return
    raw = _read_one(path)
    done.add(path.resolve())
    base = raw.pop("base", None)
    bases = [base] if isinstance(base, str) else [] if base is None else base
    if (
        not isinstance(bases, list)
        or (base is not None and not bases)
        or not all(isinstance(b, str) for b in bases)
    ):
        raise UserError(f"{path}: base: the path of a YAML file, or a list of paths, is needed, not {base!r}")
    for name in bases:
        yield from _layers(path.parent / name, (*above, path.resolve()), done)
    yield raw


def _read_one(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: there is no such config file; {did_you_mean(str(path), near)}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: a date that does not exist, for one
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if raw is not None and not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of sections, not a {type(raw).__name__}")
    return raw or {}


# Keys that name a component, and the keys beside each that are dropped when its value changes; None: all but
# OF_THE_SET.
NAMES: dict[str, tuple[str, ...] | None] = {
    "layout": None,
    "schedule": None,
    "loss": ("options", "weight"),
    "method": ("options",),
}
# kept when the layout changes
OF_THE_SET = tuple(key for key in SET_KEYS if key not in ("rename", "classes", "labels"))


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, key by key. Where a layout, schedule, loss or method changes, the options of
    the one below are dropped."""
    merged = dict(below)
    for name in NAMES:
        if name in merged and name in above and merged[name] != above[name]:
            _forget(merged, name)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _forget(section: dict[str, Any], name: str) -> None:
    """Remove from ``section`` the options of the layout, schedule, loss or method that it had."""
    for key in [k for k in section if k not in OF_THE_SET] if NAMES[name] is None else NAMES[name]:
        section.pop(key, None)


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override '{text}': write it as key=value, e.g. train.steps=200")
    try:
        parsed = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override '{text}': the value is not valid YAML: {error}") from None
    node = raw
    *parents, last = key.strip().split(".")
    for depth, part in enumerate(parents, start=1):
        if isinstance(node, list):
            node = _one_of(node, part, text)
            continue
        if node.get(part) is None:  # one key of a default task or data set: the rest of the default stays
            node[part] = default if isinstance(default := _default(parents[:depth]), dict) else {}
        node = node[part]
        if not (
            isinstance(node, dict) or (isinstance(node, list) and any(isinstance(one, dict) for one in node))
        ):
            raise UserError(f"override '{text}': '{part}' is a value, not a section")
    if isinstance(node, list):
        raise UserError(
            f"override '{text}': '{parents[-1]}' is a list; write which of it, by name or number, and the key"
        )
    if last in NAMES and node.get(last, parsed) != parsed:
        _forget(node, last)
    node[last] = parsed


def _one_of(sets: list[Any], which: str, text: str) -> dict[str, Any]:
    """The set of a list by its name or number."""
    mappings = {number: one for number, one in enumerate(sets) if isinstance(one, dict)}
    named = {called(one, number): one for number, one in mappings.items()}
    numbered = {str(number): one for number, one in mappings.items()}
    if which not in named and which not in numbered:
        raise UserError(f"override '{text}': there is no '{which}' in the list; {did_you_mean(which, named)}")
    return (numbered | named)[which]


def _default(key_path: list[str]) -> Any:
    """The default at ``key_path`` of the config."""
    node: Any = Config().model_dump(mode="json")
    for part in key_path:
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _explain(error: dict[str, Any], root: type[Section]) -> str:
    """One pydantic error as a line about the YAML."""
    key_path = [str(p) for p in error["loc"] if not str(p).startswith(("constrained-", "function-"))]
    kind = next((SCHEDULES[p] for p in key_path if p in SCHEDULES and "schedule" in key_path), None)
    alternatives = (
        "schedule",
        "number",
        ONE_SET,
        SEVERAL_SETS,
        *SCHEDULES,
    )  # pydantic names the one that it tried
    key_path = [p for p in key_path if p not in alternatives]
    where = ".".join(key_path)
    if error["type"] == "extra_forbidden":
        known = list(kind.model_fields) if kind else _known_keys(key_path[:-1], root)
        return f"{where}: unknown key; {did_you_mean(key_path[-1], known)}"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = error["input"].get("schedule", "") if isinstance(error["input"], dict) else ""
        return f"{where + '.' if where else ''}schedule: unknown schedule '{given}'; {did_you_mean(given, SCHEDULES)}"
    message = _plain(error["msg"].removeprefix("Value error, "))
    given = "" if error["type"] in ("missing", "value_error") else f" (given: {error['input']!r})"
    return f"{where}: {message}{given}" if where else message


def _plain(message: str) -> str:
    """A message of pydantic with YAML's names of types in place of Python's."""
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", message)
    return message.replace("a valid tuple", "a list").replace("a valid list", "a list")


def _known_keys(key_path: list[str], root: type[Section]) -> list[str]:
    """The keys of the section at ``key_path``."""
    section: Any = root
    for part in key_path:
        if not (isinstance(section, type) and issubclass(section, Section)):
            return []
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        candidates = [annotation, *get_args(annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), section)
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else []
