"""Errors that a user can fix: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something in the config, the data or a file is wrong.

    The command-line tools print the message without a traceback and exit with status 2.
    """

    def __str__(self) -> str:
        # torch raises a loader process's error again with that process's traceback as its message
        message = super().__str__()
        if message.startswith("Caught UserError in "):
            message = message.rpartition(f"{__name__}.UserError: ")[2].rstrip()
        return message


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A closing clause for "unknown X": the nearest known name, or the whole list."""
    known = sorted(str(k) for k in known)
    lowered = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=0.6)
    if close:
        return f"did you mean '{lowered[close[0]]}'?"
    if not known:
        return "none is available"
    shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    return f"known: {shown}"


def as_user_error(where: str, make: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``make(*args, **kwargs)``; an error that it raises about a value becomes a UserError that begins with
    ``where``, the key path."""
    try:
        return make(*args, **kwargs)
    except (
        ValueError,
        TypeError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
    ) as error:
        raise UserError(f"{where}: {error}") from None
