"""Atomic writes: a file is complete or not there."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_text(path: str | Path, text: str) -> None:
    """Write ``text``, in UTF-8, as the whole content of ``path``."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces ``path`` when the block ends without an error and is deleted otherwise.

    A reader, or a crash at any moment, finds the old file or the new one, never a part.
    """
    path = Path(path)
    temporary = path.with_name(
        f".{path.name}.{uuid.uuid4().hex}.part"
    )  # mkstemp's files can be read by their owner alone
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
