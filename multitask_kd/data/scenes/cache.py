"""The cache of procedural scenes, a folder a set: a file for all maps of a kind, ``rows.npz``, ``meta.json``.

A folder appears under its name only when it is complete, so a reader never sees a half-written set and two
processes may generate the same one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np

from ...errors import UserError
from .draw import scene

log = logging.getLogger(__name__)

VERSION = 12  # raise it with every change to what is drawn or kept: older caches are then not used
MAPS = {  # file -> type, and shape after [N,H,W]; half floats hold a depth to 1/2000 of it, in half the room
    "images.npy": (np.uint8, (3,)),
    "masks.npy": (np.uint8, ()),
    "road.npy": (np.uint8, ()),
    "depth.npy": (np.float16, ()),
}
ROWS = "rows.npz"
FILES = (*MAPS, ROWS)
SCENES_A_WORKER = 100  # fewer are not worth starting a process for

# What a worker runs. It stands empty packages in for ours, whose __init__ would load torch: seconds for each
# worker.
WORKER = """
import sys, types
for name, path in (("multitask_kd", sys.argv[1]), ("multitask_kd.data", sys.argv[1] + "/data")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from multitask_kd.data.scenes.cache import worker
worker(*sys.argv[2:])
"""


class Arrays:
    """A cached set, opened; the maps are read from disk as they are used, the rest is in memory.

    images: uint8 [N,H,W,3]; masks, road: uint8 [N,H,W]; depth: float16 [N,H,W]; weather: uint8 [N].
    Image i has rows offsets[i]:offsets[i+1] of boxes: float32 [K,4], classes: int64 [K], area: float32 [K].
    """

    def __init__(self, folder: Path):
        self.images, self.masks, self.road, self.depth = open_maps(folder, "r")
        with np.load(folder / ROWS) as rows:
            self.boxes, self.classes, self.area = rows["boxes"], rows["classes"], rows["area"]
            self.offsets, self.weather = rows["offsets"], rows["weather"]

    def fit(self, count: int, size: tuple[int, int]) -> bool:
        """Whether all are of ``count`` scenes of ``size``, and of the types that belong there."""
        maps = (self.images, self.masks, self.road, self.depth)
        found = [(array.dtype, array.shape) for array in maps]
        expected = [(np.dtype(kind), (count, *size, *rest)) for kind, rest in MAPS.values()]
        return found == expected and self.offsets.shape == (count + 1,) and self.weather.shape == (count,)


def open_maps(folder: Path, mode: str) -> list[np.ndarray]:
    """The maps of a set in the order of MAPS, none of them read yet."""
    return [np.load(folder / file, mmap_mode=mode) for file in MAPS]


def ensure(root: Path, seed: int, split: str, size: tuple[int, int], count: int) -> Path:
    """The folder of a valid cache that holds at least the first ``count`` scenes; generated if there is none.

    Raises UserError when ``root`` cannot be written.
    """
    stem = f"scenes-v{VERSION}-seed{seed}-{split}-{size[0]}x{size[1]}"
    try:
        for folder in _candidates(root, stem, count):
            fault = find_fault(folder, size)
            if fault is None:
                return folder
            log.warning("%s is damaged (%s) and will be generated again", folder, fault)
            _discard(folder)
        root.mkdir(parents=True, exist_ok=True)
        return _generate(root, stem, seed, split, size, count)
    except OSError as error:
        raise UserError(
            f"root: cannot keep scenes in '{root}' ({error}); give a folder with room that can be written"
        ) from error


def _candidates(root: Path, stem: str, count: int) -> list[Path]:
    """Cached sets of at least ``count`` scenes, smallest first."""
    found = []
    for folder in root.glob(f"{stem}-n*"):
        number = folder.name.removeprefix(f"{stem}-n")
        if number.isdecimal() and int(number) >= count:
            found.append((int(number), folder))
    return [folder for _, folder in sorted(found)]


def find_fault(folder: Path, size: tuple[int, int]) -> str | None:
    """What is wrong with a cached set, or None. Reads every byte once: about a second for a gigabyte."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for file in FILES:
            if _checksum(folder / file) != meta["crc32"][file]:
                return f"{file} has changed"
        arrays, count = Arrays(folder), int(folder.name.rpartition("-n")[2])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        return f"{type(error).__name__}: {error}"
    return None if arrays.fit(count, size) else "its arrays are of other sizes"


def _checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _discard(folder: Path) -> None:
    """Remove a set in one step as others see it. Another process may be doing the same."""
    trash = Path(tempfile.mkdtemp(prefix=".discarded-", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, trash / "set")
    shutil.rmtree(trash, ignore_errors=True)


def _generate(root: Path, stem: str, seed: int, split: str, size: tuple[int, int], count: int) -> Path:
    target = root / f"{stem}-n{count}"
    log.info("generating %d scenes of %dx%d (%s, seed %d) into %s", count, *size, split, seed, target)
    work = Path(tempfile.mkdtemp(prefix=f".{stem}-", dir=root))
    try:
        _fill(work, seed, split, size, count)
        work.chmod(0o755)
        try:
            os.replace(work, target)
        except OSError:
            if not target.is_dir():
                raise
            if fault := find_fault(target, size):  # another process was first, and failed
                log.warning("%s is damaged (%s) and is replaced", target, fault)
                _discard(target)
                os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _reserve(path: Path) -> None:
    """Take a file's room on disk now: writing to a map of a file that the disk has no room for kills the
    process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _fill(work: Path, seed: int, split: str, size: tuple[int, int], count: int) -> None:
    """Generate all files of a set in ``work``, with as many processes as there are cores and work for them."""
    for file, (kind, rest) in MAPS.items():
        np.lib.format.open_memmap(work / file, mode="w+", dtype=kind, shape=(count, *size, *rest)).flush()
        _reserve(work / file)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(cores, count // SCENES_A_WORKER))
    bounds = [count * i // workers for i in range(workers + 1)]
    spans = list(zip(bounds[:-1], bounds[1:], strict=True))
    helpers = [_start(work, seed, split, start, stop) for start, stop in spans[1:]]
    try:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # its threads cost more than they give on images this small
        try:
            draw_span(work, seed, split, *spans[0])
        finally:
            cv2.setNumThreads(threads)
        for (start, stop), helper in zip(spans[1:], helpers, strict=True):
            if helper is None or helper.wait() != 0:
                log.warning("a process for scenes %d to %d failed; generating them here", start, stop - 1)
                draw_span(work, seed, split, start, stop)
    finally:
        for helper in helpers:
            if helper is not None and helper.poll() is None:
                helper.kill()
                helper.wait()
    _finish(work, spans)


def _start(work: Path, seed: int, split: str, start: int, stop: int) -> subprocess.Popen | None:
    """A worker process, or None where none can be started.

    Not multiprocessing: a fork copies the locks of torch's and cv2's threads, a spawn runs the caller's main
    module again, and neither is allowed in a data loader's worker.
    """
    command = [sys.executable, "-c", WORKER, str(Path(__file__).resolve().parents[2]), str(work)]
    command += [str(seed), split, str(start), str(stop)]
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    except OSError:
        return None


def worker(work: str, seed: str, split: str, start: str, stop: str) -> None:
    cv2.setNumThreads(1)
    draw_span(Path(work), int(seed), split, int(start), int(stop))


def draw_span(work: Path, seed: int, split: str, start: int, stop: int) -> None:
    """Generate scenes [start, stop) into the maps in ``work``, boxes and weather into a file of their own."""
    maps = open_maps(work, "r+")
    images, masks, road, depth = maps
    found = []
    for index in range(start, stop):
        images[index], labels = scene(seed, split, index, images.shape[1:3])
        masks[index], road[index], depth[index] = labels.mask, labels.road, labels.depth
        found.append(labels)
    for array in maps:
        array.flush()
    np.savez(
        work / f"part-{start}.npz",
        boxes=np.concatenate([labels.boxes for labels in found]),
        classes=np.concatenate([labels.classes for labels in found]),
        area=np.concatenate([labels.area for labels in found]),
        weather=np.array([labels.weather for labels in found], np.uint8),
        counts=np.array([len(labels.boxes) for labels in found], np.int64),
    )


def _finish(work: Path, spans: list[tuple[int, int]]) -> None:
    """Join the parts' rows and write what tells a whole set from a damaged one."""
    paths = [work / f"part-{start}.npz" for start, _ in spans]
    parts = []
    for path in paths:
        with np.load(path) as part:
            parts.append(dict(part))
        path.unlink()
    rows = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    offsets = np.concatenate([[0], np.cumsum(rows.pop("counts"))]).astype(np.int64)
    np.savez(work / ROWS, **rows, offsets=offsets)
    checksums = {file: _checksum(work / file) for file in FILES}
    (work / "meta.json").write_text(json.dumps({"version": VERSION, "crc32": checksums}))
