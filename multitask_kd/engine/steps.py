"""Work that is done once: again only where its settings, or the files that it reads, have changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..checkpoint import file_digest


class Steps:
    """Steps in ``folder``, each with a marker, <name>.json, of what it was made of: the files that it reads and its settings."""

    def __init__(self, folder: Path):
        self.folder = folder

    def made_of(self, files: Sequence[Path], settings: str) -> dict[str, Any]:
        """What a marker holds. Raises UserError where a file cannot be read."""
        return {"files": {str(file): file_digest(file, str(file)) for file in files}, "settings": settings}

    def marker(self, name: str) -> Any:
        """What a step was made of; None where it was never done."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def mark(self, name: str, content: dict[str, Any]) -> None:
        """Write a step's marker."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / f"{name}.json", json.dumps(content) + "\n")

    def is_done(self, name: str, files: Sequence[Path], settings: str, outputs: Sequence[Path]) -> bool:
        """Are the ``outputs`` there, made of these ``files`` as they are now?"""
        there = all(file.is_file() for file in (*files, *outputs))
        return there and self.marker(name) == self.made_of(files, settings)

    def once(self, name: str, files: Sequence[Path], settings: str, outputs: Sequence[Path], work: Callable[[], Any]) -> None:
        """Do ``work``, which makes ``outputs`` of ``files``, unless it was done with the same."""
        print(f"\n== {name}: {', '.join(map(str, outputs))}", flush=True)
        if self.is_done(name, files, settings, outputs):
            print("already done")
            return
        made_of = self.made_of(files, settings)
        for old in (self.folder / f"{name}.json", *outputs):
            old.unlink(missing_ok=True)
        work()
        self.mark(name, made_of)
