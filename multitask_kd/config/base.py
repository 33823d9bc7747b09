"""What every section of a config is, and the kinds of value that it may hold."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _path(text: str) -> str:
    """With ``~`` and environment variables filled in. Raises ValueError for an empty text and for an unset variable."""
    full = os.path.expanduser(os.path.expandvars(text))
    if not full or "$" in full:
        raise ValueError(f"'{text}' is no path" + (": a variable in it is not set" if "$" in full else ""))
    return full


PathText = Annotated[str, AfterValidator(_path)]


class Section(BaseModel):
    """A mapping with known keys. A text behind a field is its documentation: docs/config.md is made from it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
