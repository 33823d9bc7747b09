"""The base class of every section of a config, and the types of value that a section may hold."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _path(text: str) -> str:
    """With ``~`` and environment variables filled in. Raises ValueError for an empty text and for an unset
    variable."""
    full = os.path.expanduser(os.path.expandvars(text))
    if not full or "$" in full:
        raise ValueError(f"'{text}' is no path" + (": a variable in it is not set" if "$" in full else ""))
    return full


def without_null(named: Any) -> Any:
    """A mapping without its null keys, with which a config removes entries of a base file; null becomes an
    empty mapping."""
    return (
        {k: v for k, v in named.items() if v is not None}
        if isinstance(named, dict)
        else {}
        if named is None
        else named
    )


PathText = Annotated[str, AfterValidator(_path)]


class Section(BaseModel):
    """A mapping with known keys. The text below a field documents it; docs/config.md is made from these
    texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
