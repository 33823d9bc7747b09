"""The packages of the extra ``export``, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import UserError


def needed(name: str) -> Any:
    """The module ``name``. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"exported files in ONNX need {name} ({error}): pip install 'multitask_kd[export]'"
            + (", or on a GPU onnxruntime-gpu in its place" if name == "onnxruntime" else "")
        ) from None
