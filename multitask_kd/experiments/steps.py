"""Work that is done once, and the one rule of when it has to be done again.

What a step is made of is its settings, without the keys that cannot change a result (``engine.folder.FREE``),
and the files that it reads. It is stale when either is another than when it was done. That is noted in a
marker: for a step with outputs of its own in <name>.json (``Steps``), for a training in made_of.json in the
run's folder (``RunFolder``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import build
from ..atomic import write_text
from ..checkpoint import file_digest
from ..config import Config, dump
from ..engine.folder import differences
from ..errors import UserError

Digests = dict[str, str | None]  # by what a file is called in messages; None: it is not there


@dataclass(frozen=True)
class MadeOf:
    """What a step is made of. settings: YAML, or any text; files: None where they were not noted."""

    settings: str
    files: Digests | None = None

    def change_since(self, before: MadeOf) -> str | None:
        """What has changed, in words; None: nothing that matters. A file that is gone has not changed."""
        if difference := _difference(before.settings, self.settings):
            return difference
        if before.files is None or self.files is None:
            return None
        for name in before.files | self.files:
            was, now = before.files.get(name), self.files.get(name)
            if name not in before.files or name not in self.files:
                return f"{name} is {'no longer' if name in before.files else 'newly'} used"
            if was != now and None not in (was, now):
                return f"{name} has changed"
        return None


def _difference(before: str, now: str) -> str | None:
    """In which keys two settings differ, as text where they are no mappings."""
    if before == now:
        return None
    if isinstance(_parsed(before), dict) and isinstance(_parsed(now), dict):
        return differences(before, now)
    short = len(before + now) < 400
    return f"its settings were {before}, are {now}" if short else "its settings have changed"


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def made_of(config: Config) -> MadeOf:
    """What a training is made of. Raises UserError for a ``model.start`` that is missing or does not fit."""
    digests = {name: digest(path) for name, path in files_read(config).items()}
    return MadeOf(dump(build.resolve_init(config).config), digests)


def settings_text(config: Config, **more: Any) -> str:
    """The settings of a step that reads a config; more: what else decides its result, plain data by name."""
    return dump(config) + yaml.safe_dump(more)


def files_read(config: Config) -> dict[str, Path]:
    """By what messages call them: the files, or folders, whose content decides a training's result."""
    paths = {f"{key_path}.path": teacher.path for key_path, teacher in config.named_teachers.items()}
    paths |= {"model.start": config.model.start}
    paths |= {"model.weights": None if config.model.weights == "imagenet" else config.model.weights}
    return {f"{key} {path}": Path(path) for key, path in paths.items() if path is not None}


_digests: dict[tuple[Any, ...], str] = {}  # by path, inode, time and size: a file that stays is read once


def digest(path: Path) -> str | None:
    """A fingerprint of a file, or of all files in a folder; None where there is none.

    Raises UserError where it cannot be read.
    """
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path)} {digest(file)}" for file in inside]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if not path.is_file():
        return None
    found = path.stat()
    key = (path.resolve(), found.st_ino, found.st_mtime_ns, found.st_size)
    if key not in _digests:
        _digests[key] = file_digest(path, str(path))
    return _digests[key]


@dataclass(frozen=True)
class Staleness:
    """done: whether what is there can be kept. resumes: whether it can be gone on with. reason: why neither
    is so, None where nothing is there."""

    done: bool = False
    resumes: bool = False
    reason: str | None = None


class RunFolder:
    """The folder of a training: what it was made of, and whether that is what its config makes now.

    made_of.json holds the digests of the files (the settings are in the run's own config.yaml). Before a
    training takes the place of another one, it is written with ``replaces``: the earlier digests, which hold
    as long as the earlier config.yaml lies there. So a training that never gets to its first step costs
    nothing of the one before.
    """

    def __init__(self, config: Config):
        self.config, self.path = config, Path(config.run.dir)
        self._marker = self.path / "made_of.json"

    def staleness(self) -> Staleness:
        """Raises UserError where it cannot be told what the config makes now."""
        before = self._before()
        if before is None:
            return Staleness()
        if reason := made_of(self.config).change_since(before):
            return Staleness(reason=reason)
        ended = (self.path / "metrics.json").is_file()
        return Staleness(done=ended, resumes=not ended and (self.path / "last.pt").is_file())

    def adopt(self) -> None:
        """Note the files, as they are now, of a training by an earlier version, which did not note them."""
        if _read_json(self._marker) is not None:
            return
        try:
            found = self.staleness()
            if found.done or found.resumes:
                self._mark({"files": made_of(self.config).files})
        except UserError:  # what it starts from is not there yet; training it tells
            return

    def begins(self) -> None:
        """Before a training that takes the place of what is there."""
        before = self._before()
        replaces = None if before is None else {"stamp": self._stamp(), "files": before.files}
        self._mark({"files": made_of(self.config).files, "replaces": replaces})

    def ended(self) -> None:
        """After the training."""
        files = (_read_json(self._marker) or {}).get("files") or made_of(self.config).files
        self._mark({"files": files})

    def _before(self) -> MadeOf | None:
        """What the training in the folder was made of; None where there is none."""
        written = self.path / "config.yaml"
        if not written.is_file():
            return None
        marker = _read_json(self._marker) or {}
        replaces = marker.get("replaces")
        replaced = isinstance(replaces, dict) and replaces.get("stamp") == self._stamp()
        own = replaces if replaced else marker
        return MadeOf(written.read_text(encoding="utf-8"), _digests_in(own))

    def _stamp(self) -> list[int]:
        """Tells the config.yaml that is there from one that is written later."""
        found = (self.path / "config.yaml").stat()
        return [found.st_mtime_ns, found.st_ino]

    def _mark(self, content: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self._marker, json.dumps(content) + "\n")


class Steps:
    """Steps with outputs of their own, each with a marker, <name>.json in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder

    def once(
        self,
        name: str,
        files: Sequence[Path],
        settings: str,
        outputs: Sequence[Path],
        work: Callable[[], Any],
    ) -> None:
        """Do ``work``, which makes ``outputs`` of ``files``, unless it was done with the same."""
        print(f"\n== {name}: {', '.join(map(str, outputs))}", flush=True)
        now = _of(files, settings)
        reason = self._why_stale(name, now, outputs)
        if reason is None:
            print("already done")
            return
        if missing := [str(file) for file in files if not file.exists()]:
            raise UserError(f"{name}: there is no {missing[0]}; it is needed to make {outputs[0]}")
        if reason:
            print(f"done again: {reason}", flush=True)
        for old in (self._marker(name), *outputs):
            old.unlink(missing_ok=True)
        work()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._marker(name), json.dumps({"files": now.files, "settings": now.settings}) + "\n")

    def _why_stale(self, name: str, now: MadeOf, outputs: Sequence[Path]) -> str | None:
        """None: it is done as it is; empty: it was never done."""
        before = _read_json(self._marker(name))
        if before is None or not isinstance(before.get("settings"), str):
            return ""
        if missing := [str(output) for output in outputs if not output.is_file()]:
            return f"{missing[0]} is not there"
        return now.change_since(MadeOf(before["settings"], _digests_in(before)))

    def _marker(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _of(files: Sequence[Path], settings: str) -> MadeOf:
    return MadeOf(settings, {str(file): digest(file) for file in files})


def _read_json(path: Path) -> dict[str, Any] | None:
    """A marker; None where there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _digests_in(marker: dict[str, Any]) -> Digests | None:
    files = marker.get("files")
    return files if isinstance(files, dict) else None
