"""Names in a config -> classes, checked before anything is built.

A component's keyword-only parameters are its YAML schema; the arguments that code passes are positional.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from .errors import UserError, did_you_mean

T = TypeVar("T", bound=type)


# What a YAML value must be, by the type of an option's default.
_KINDS = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a text"),
}


def options_of(component: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a class or function: its options in YAML."""
    function = component.__init__ if inspect.isclass(component) else component
    parameters = inspect.signature(function).parameters
    return {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def check_options(
    component: Callable, options: Mapping[str, Any], where: str, beside: Iterable[str] = ()
) -> None:
    """Raise UserError for an option that ``component`` does not have, one of the wrong type, or a missing
    one.

    beside: other keys that are allowed at the same level, for the suggestion of the nearest known name.
    """
    known = options_of(component)
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{where}.{key}: no such option; {did_you_mean(key, [*known, *beside])}")
        kind = _KINDS.get(type(known[key].default))
        if kind is not None and not (
            isinstance(value, kind[0]) and isinstance(value, bool) == (kind[0] is bool)
        ):
            raise UserError(f"{where}.{key}: needs {kind[1]}, not {value!r}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in options]
    if missing:
        raise UserError(f"{where}: needs {', '.join(missing)}")


class Registry:
    """A named set of classes of one kind, filled by the ``@registry.register("name")`` decorator."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, type] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(cls: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._entries[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        return sorted(self._entries)

    def get(self, name: str, where: str) -> type:
        """The class behind ``name``. Raises UserError naming ``where`` and the nearest known name."""
        if name not in self._entries:
            raise UserError(f"{where}: unknown {self.kind} '{name}'; {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def check(self, name: str, options: Mapping[str, Any], where: str, beside: Iterable[str] = ()) -> None:
        """Raise UserError for an unknown component, an unknown option or a missing one (see
        ``check_options``)."""
        check_options(self.get(name, where), options, where, beside)

    def build(self, name: str, options: Mapping[str, Any], where: str, *args: Any) -> Any:
        self.check(name, options, where)
        return self.get(name, where)(*args, **options)
