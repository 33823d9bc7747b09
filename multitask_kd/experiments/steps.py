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
        return all(file.is_file() for file in files) and self._holds(name, self.made_of(files, settings), outputs)

    def _holds(self, name: str, made_of: dict[str, Any], outputs: Sequence[Path]) -> bool:
        return all(output.is_file() for output in outputs) and self.marker(name) == made_of

    def once(self, name: str, files: Sequence[Path], settings: str, outputs: Sequence[Path], work: Callable[[], Any]) -> None:
        """Do ``work``, which makes ``outputs`` of ``files``, unless it was done with the same."""
        print(f"\n== {name}: {', '.join(map(str, outputs))}", flush=True)
        made_of = self.made_of(files, settings)
        if self._holds(name, made_of, outputs):
            print("already done")
            return
        for old in (self.folder / f"{name}.json", *outputs):
            old.unlink(missing_ok=True)
        work()
        self.mark(name, made_of)
