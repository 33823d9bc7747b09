"""A network from a file on images and videos: boxes and labels as COCO JSON, maps as PNGs, and pictures of
them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from itertools import count as counting
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from ..atomic import replacing, write_text
from ..data.files import decode_image
from ..data.footage import Input, Video, VideoFile, find
from ..data.loader import Truth, collate_eval
from ..data.transforms import letterbox
from ..errors import UserError
from ..precision import resolve_device
from ..registry import options_of
from ..report.layers import Layer
from ..report.pictures import legend, panel, save_png
from ..tasks.base import Saved, Task
from .evaluate import evaluating
from .evaluate import predict as restored
from .networks import Network, open_network
from .pictures import class_names, maps_first

log = logging.getLogger(__name__)

MARK = "settings.json"  # by which a folder of predictions is known
DRAWN, MASKS, LISTED, LEGEND = "drawn", "masks", "detections.json", "legend.png"
WRITTEN = (DRAWN, MASKS, LISTED, LEGEND)  # by versions that do not list it in MARK
ENTRY = ("id", "file_name", "width", "height", "video", "frame", "seconds")  # keys of an image in LISTED
MADE_BY = "multitask_kd predict"
JPEG = 92
EVERY_S = 5.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Shot:
    """One image, or one frame of a video: its ``number`` and the video's ``rate`` in frames a second."""

    source: Input
    image: np.ndarray
    number: int | None = None
    rate: float = 0.0

    @property
    def file_name(self) -> str:
        return self.source.name if self.number is None else f"{self.source.name}/{self.number:06d}.png"


def predict(
    path: str,
    inputs: Sequence[str],
    out: str,
    *,
    score: float = 0.3,
    keep: float = 0.01,
    alpha: float = 0.5,
    batch: int = 8,
    device: str = "auto",
    threads: int | None = None,
    draw: bool = True,
    frames: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Predict every image and frame of ``inputs`` with the network in ``path``, as an evaluation does.

    Args:
        out: the folder that is written.
        score: what has a score from it on is drawn.
        keep: what has a score above it is written.
        alpha: of the masks in the pictures, 0 to 1.
        batch: images at once.
        draw: whether pictures are written.
        frames: the pictures of a video are single files.
        overwrite: earlier predictions in ``out`` are replaced; anything else never is.

    Returns:
        Counts: ``images``, ``frames``, ``boxes``, ``skipped``.

    Raises:
        UserError: for a faulty option, and where nothing could be read or ``out`` holds something else.
    """
    _check(score=score, keep=keep, alpha=alpha)
    for option, number in (("--batch", batch), ("--threads", threads)):
        if number is not None and number < 1:
            raise UserError(f"{option}: needs a number from 1, not {number}")
    on = resolve_device(device)
    if threads:
        torch.set_num_threads(threads)
    found = find(inputs)
    _check_folder(Path(out), inputs, overwrite)
    network = open_network(path, "--checkpoint", on)
    settings = {"made_by": MADE_BY, "checkpoint": path, "score": score, "keep": keep, "alpha": alpha}
    drawing = {"score": score, "alpha": alpha, "draw": draw, "frames": frames}

    def new_writer() -> _Writer:
        _clear(Path(out))
        return _Writer(Path(out), network, settings, **drawing)

    return _predict_all(network, found, batch, keep, new_writer)


def _predict_all(
    network: Network, found: Sequence[Input], batch: int, keep: float, new_writer: Callable[[], _Writer]
) -> dict[str, Any]:
    """new_writer: called when something could be read; nothing is made or removed before."""
    decode = {
        name: {"score_threshold": keep}
        for name, task in network.tasks.items()
        if "score_threshold" in options_of(task.decode)
    }
    skipped: list[str] = []
    with evaluating(network.run), ExitStack() as stack:
        shots = _shots(found, skipped)
        writer = None
        progress = _Progress(found)
        while shown := list(islice(shots, batch)):
            if writer is None:
                writer = new_writer()
                stack.callback(writer.close)
            for shot, predictions in zip(shown, _predictions(network, shown, decode), strict=True):
                writer.add(shot, predictions)
            progress.show(writer.count, shown[-1])
        progress.end()
        if writer is None:
            raise UserError(f"none of the {len(found)} files could be read; nothing was written")
        writer.finish()
    return {"images": writer.images, "frames": writer.frames, "boxes": writer.boxes, "skipped": len(skipped)}


def _check(**shares: float) -> None:
    for option, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"--{option}: {share} is not in [0, 1]")


def _check_folder(out: Path, inputs: Sequence[str], overwrite: bool) -> None:
    for given in inputs:
        source, target = Path(given).resolve(), out.resolve()
        inside = source.is_dir() and (target == source or source in target.parents)
        if inside or target in source.parents and _is_ours(out):
            raise UserError(
                f"--out: '{out}' and '{given}' lie in one another; give the predictions a folder of their own"
            )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: '{out}' is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not _is_ours(out):
        raise UserError(
            f"--out: '{out}' holds something else than predictions; name another folder or a new one"
        )
    if not overwrite:
        raise UserError(
            f"--out: '{out}' holds earlier predictions; name another folder, or replace them with --overwrite"
        )


def _settings(out: Path) -> dict[str, Any]:
    """The settings of earlier predictions in a folder; empty where there are none."""
    try:
        found = json.loads((out / MARK).read_text(encoding="utf-8"))
        return found if found.get("made_by") == MADE_BY else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_ours(out: Path) -> bool:
    return bool(_settings(out))


def _clear(out: Path) -> None:
    """Remove earlier predictions, and nothing besides: files and folders that their settings list."""
    if not (settings := _settings(out)):
        return
    listed = settings.get("written", WRITTEN)
    names = [name for name in listed if isinstance(name, str) and name == os.path.basename(name)]
    for name in [*(n for n in names if n not in ("", ".", "..", MARK)), MARK]:  # by the last it is known
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _shots(found: Sequence[Input], skipped: list[str]) -> Iterator[Shot]:
    """Images and frames in order; what cannot be read is named and goes to ``skipped``."""
    for source in found:
        try:
            if source.video:
                yield from _frames(source)
            else:
                yield Shot(source, decode_image(source.path))
        except UserError as error:
            skipped.append(source.name)
            log.warning("skipped: %s", error)


def _frames(source: Input) -> Iterator[Shot]:
    video = Video(source.path)
    number = 0
    for number, image in enumerate(video, 1):
        yield Shot(source, image, number - 1, video.rate)
    if not number:
        raise UserError(f"video '{source.path}' has no frame that can be decoded; convert it")
    if number < video.count:
        log.warning(
            "video '%s' ends after %d of %d frames: truncated or damaged", source.path, number, video.count
        )


def _predictions(network: Network, shots: Sequence[Shot], decode: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By shot, by task: what an evaluation would score."""
    items = []
    for index, shot in enumerate(shots):
        image, geometry = letterbox(shot.image, network.size)
        items.append((image, Truth(index, geometry)))
    batch, _ = collate_eval(items)
    return restored(network.run, network.tasks, batch.to(network.device, channels_last=True), decode)


@dataclass
class _Progress:
    """One line: on a terminal it is rewritten, elsewhere a new one is written now and then."""

    found: Sequence[Input]
    began: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    def show(self, count: int, shot: Shot) -> None:
        """count: of the images and frames that are done; shot: the last of them."""
        number = self.found.index(shot.source) + 1
        rate = count / max(time.monotonic() - self.began, 1e-9)
        text = f"{number} of {len(self.found)} files, {count} predictions, {rate:.1f} a second"
        if sys.stderr.isatty():
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last > EVERY_S:
            self.last = time.monotonic()
            log.info(text)

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Names(NamedTuple):
    """What a task's predictions are called in the folder: where its images lie, and the keys of an image's
    entry in detections.json for their path and for its value."""

    folder: str
    file_key: str
    value_key: str


def names_of(tasks: Mapping[str, Task]) -> dict[str, Names]:
    """By task, names that no other task has, and none of the files and keys that are always there.

    They are made of the task's name, without what not every file system can have in one; the task whose name
    is its kind's default has ``masks`` and ``mask_file``.
    """
    files, keys = {MARK, DRAWN, MASKS, LISTED, LEGEND}, {*ENTRY, "mask_file"}
    found = {}
    for name, task in tasks.items():
        folder = _free(re.sub(r"[^\w-]", "_", name), files)
        file_key, value_key = _free(f"{name}_file", keys), _free(name, keys)
        if task.is_default and task.is_map:
            folder, file_key = MASKS, "mask_file"
        found[name] = Names(folder, file_key, value_key)
    return found


def _free(wanted: str, taken: set[str]) -> str:
    """The name, with a number where it is taken, upper and lower case being the same; it is then in
    ``taken``."""
    numbered = (f"{wanted}_{number}" for number in counting(2))
    found = next(name for name in chain([wanted], numbered) if name.casefold() not in taken)
    taken.add(found.casefold())
    return found


class _Writer:
    """The folder of predictions. Boxes are kept as arrays until ``finish`` writes them all."""

    def __init__(
        self,
        out: Path,
        network: Network,
        settings: Mapping[str, Any],
        *,
        score: float,
        alpha: float,
        draw: bool,
        frames: bool,
    ):
        self.out, self.tasks, self.settings = out, network.tasks, settings
        self.score, self.alpha, self.draw, self.single = score, alpha, draw, frames
        self.names = names_of(network.tasks)
        self.classes = {name: tuple(task.classes) for name, task in network.tasks.items() if task.has_classes}
        self.images = self.frames = self.boxes = 0
        self._written: list[str] = []
        self._listed: list[dict[str, Any]] = []
        self._found: list[list[tuple[int, np.ndarray]]] = []  # by image and task, first category and boxes
        self._first: dict[str, int] = {}  # task with boxes -> the category of its first class
        self._stems: dict[str, str] = {}  # stem -> the input that has it
        self._video: tuple[str, VideoFile] | None = None
        out.mkdir(parents=True, exist_ok=True)
        self._claim(LISTED)
        if draw:
            self._claim(DRAWN)

    @property
    def count(self) -> int:
        return self.images + self.frames

    def _claim(self, name: str) -> Path:
        """The path of a file or folder in ``out``, put down in the settings before it is made. Raises
        UserError where somebody else has one of this name there."""
        path = self.out / name
        if name not in self._written:
            if os.path.lexists(path):
                raise UserError(
                    f"--out: '{path}' is not of earlier predictions; move it, or name another folder"
                )
            self._written.append(name)
            write_text(self.out / MARK, json.dumps(self._settings(), indent=2) + "\n")
        return path

    def _settings(self) -> dict[str, Any]:
        """What MARK holds: options, what the tasks are, and which names in ``out`` are of them."""
        kinds = {name: task.kind for name, task in self.tasks.items()}
        classes = {name: list(classes) for name, classes in self.classes.items()}
        return {**self.settings, "kinds": kinds, "classes": classes, "written": self._written}

    def add(self, shot: Shot, predictions: Mapping[str, Any]) -> None:
        """predictions: by task what ``Task.restore`` gives."""
        self.images += shot.number is None
        self.frames += shot.number is not None
        height, width = shot.image.shape[:2]
        entry: dict[str, Any] = {"id": len(self._listed) + 1, "file_name": shot.file_name}
        entry |= {"width": width, "height": height}
        if shot.number is not None:
            seconds = round(shot.number / shot.rate, 4)
            entry |= {"video": shot.source.name, "frame": shot.number, "seconds": seconds}
        self._found.append([])
        for name, prediction in predictions.items():
            entry |= self._saved(shot, name, self.tasks[name].saved(prediction))
        self._listed.append(entry)
        if self.draw:
            order = maps_first(self.tasks)
            self._draw(shot, [self.tasks[n].prediction_layer(predictions[n], self.score) for n in order])

    def _saved(self, shot: Shot, name: str, saved: Saved) -> dict[str, Any]:
        """Write or keep what a task predicts; returns what the image's entry has of it."""
        names, entry = self.names[name], {}
        if saved.image is not None:
            entry[names.file_key] = f"{names.folder}/{self._stem(shot)}.png"
            self._claim(names.folder)
            image = saved.image if saved.image.ndim == 2 else cv2.cvtColor(saved.image, cv2.COLOR_RGB2BGR)
            _write(self.out / entry[names.file_key], image, ".png")
        if saved.value is not None:
            entry[names.value_key] = saved.value
        if saved.boxes is not None:
            first = self._first.setdefault(name, 1 + sum(len(self.classes[task]) for task in self._first))
            self._found[-1].append((first, saved.boxes))
            self.boxes += len(saved.boxes)
        return entry

    def _stem(self, shot: Shot) -> str:
        """The name without its ending, or with it where another input has the same; a video's name is a
        folder."""
        name = shot.source.name
        if shot.number is not None:
            return f"{name}/{shot.number:06d}"
        others = (f"{name} ({number})" for number in counting(2))
        wanted = chain((os.path.splitext(name)[0], name), others)
        return next(stem for stem in wanted if self._stems.setdefault(stem, name) == name)

    def _draw(self, shot: Shot, layers: Sequence[Layer]) -> None:
        if LEGEND not in self._written:
            has_masks = any(task.is_map and task.has_classes for task in self.tasks.values())
            save_png(self._claim(LEGEND), legend(class_names(self.tasks), hatched=has_masks))
        sizes = {"min_width": 320, "max_width": max(320, shot.image.shape[1])}
        picture = panel(shot.image, layers, class_names=class_names(self.tasks), alpha=self.alpha, **sizes)
        if shot.number is None or self.single:
            path = self.out / DRAWN / f"{self._stem(shot)}.jpg"
            _write(path, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), ".jpg")
            return
        if self._video is None or self._video[0] != shot.source.path:
            self.close()
            target = self.out / DRAWN / (os.path.splitext(shot.source.name)[0] + ".mp4")
            if target.exists():  # a.avi and a.mp4
                target = target.with_name(Path(shot.source.name).name + ".mp4")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._video = shot.source.path, VideoFile(str(target), shot.rate)
        self._video[1].add(picture)

    def close(self) -> None:
        """End the video that is being written."""
        if self._video is not None:
            self._video[1].close()
            self._video = None

    def finish(self) -> None:
        """detections.json: a complete COCO file, of which ``annotations`` are results with a score."""
        head = {"info": {"description": MADE_BY}, "images": self._listed, "categories": self._categories()}
        with replacing(self.out / LISTED) as file:
            file.write(json.dumps(head)[:-1].encode() + b', "annotations": [')
            for number, row in enumerate(self._rows()):
                file.write((b",\n" if number else b"\n") + json.dumps({"id": number + 1, **row}).encode())
            file.write(b"\n]}\n")

    def _categories(self) -> list[dict[str, Any]]:
        """The classes of all tasks with boxes; where these are several, each class names its task."""
        several = len(self._first) > 1
        return [
            {"id": first + index, "name": name} | ({"supercategory": task} if several else {})
            for task, first in self._first.items()
            for index, name in enumerate(self.classes[task])
        ]

    def _rows(self) -> Iterator[dict[str, Any]]:
        for entry, found in zip(self._listed, self._found, strict=True):
            for first, boxes in found:
                for x1, y1, x2, y2, score, index in boxes.astype(np.float64).tolist():
                    box = [_exact(v) for v in (x1, y1, x2 - x1, y2 - y1)]
                    row = {"image_id": entry["id"], "category_id": first + int(index), "bbox": box}
                    yield {**row, "area": _exact(box[2] * box[3]), "iscrowd": 0, "score": _exact(score)}


def _exact(value: float) -> float:
    """With the nine digits that tell any two float32 apart."""
    return float(f"{value:.9g}")


def _write(path: Path, array: np.ndarray, ending: str) -> None:
    """uint8 or uint16 [H,W] or BGR [H,W,3] as an image. (OpenCV's own writing fails on names that are
    not ASCII on some systems.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    coded, data = cv2.imencode(ending, array, [cv2.IMWRITE_JPEG_QUALITY, JPEG] if ending == ".jpg" else [])
    if not coded:
        raise UserError(f"'{path}' cannot be encoded as {ending}")
    path.write_bytes(data.tobytes())
