"""A network from a file on images and videos: boxes as COCO JSON, masks as index PNGs, and pictures of both."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from itertools import count as counting
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from .. import build
from ..atomic import replacing, write_text
from ..data.files import decode_image
from ..data.footage import Input, Video, VideoFile, find
from ..data.loader import Truth, collate_eval
from ..data.transforms import letterbox
from ..errors import UserError
from ..report.pictures import legend, panel, save_png
from .evaluate import evaluating
from .evaluate import predict as restored
from .networks import Network, open_network

log = logging.getLogger(__name__)

MARK = "settings.json"  # by which a folder of predictions is known
WRITTEN = ("drawn", "masks", "detections.json", "legend.png", MARK)
MADE_BY = "multitask_kd predict"
JPEG = 92
EVERY_S = 5.0  # between two words about the progress where there is no terminal


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
    """Predict every image and frame of ``inputs`` with the network in ``path``, as an evaluation does, into the folder ``out``.

    score: boxes from it on are drawn; keep: boxes above it are written. alpha: of the masks in the pictures. frames: the
    pictures of a video as single files. overwrite: earlier predictions in ``out`` are replaced; anything else never is.
    Returns counts: ``images``, ``frames``, ``boxes``, ``skipped``. Raises UserError.
    """
    _check(score=score, keep=keep, alpha=alpha)
    for option, number in (("--batch", batch), ("--threads", threads)):
        if number is not None and number < 1:
            raise UserError(f"{option}: needs a number from 1, not {number}")
    on = build.device(device)
    if threads:
        torch.set_num_threads(threads)
    found = find(inputs)
    _check_folder(Path(out), inputs, overwrite)
    network = open_network(path, "--checkpoint", on)
    decode = {"det": {"score_threshold": keep}} if "det" in network.tasks else {}
    settings = {"made_by": MADE_BY, "checkpoint": path, "score": score, "keep": keep, "alpha": alpha}
    skipped: list[str] = []
    with evaluating(network.run), ExitStack() as stack:
        shots = _shots(found, skipped)
        writer = None
        progress = _Progress(found)
        while shown := list(islice(shots, batch)):
            if writer is None:  # nothing is made or removed before something can be read
                _clear(Path(out))
                writer = _Writer(Path(out), network, settings, score=score, alpha=alpha, draw=draw, frames=frames)
                stack.callback(writer.close)
            for shot, said in zip(shown, _said(network, shown, decode), strict=True):
                writer.add(shot, said)
            progress.told(writer.count, shown[-1])
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
        place, target = Path(given).resolve(), out.resolve()
        inside = place.is_dir() and (target == place or place in target.parents)
        if inside or target in place.parents and _is_ours(out):
            raise UserError(f"--out: '{out}' and '{given}' lie in one another; give the predictions a folder of their own")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: '{out}' is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not _is_ours(out):
        raise UserError(f"--out: '{out}' holds something else than predictions; name another folder or a new one")
    if not overwrite:
        raise UserError(f"--out: '{out}' holds earlier predictions; name another folder, or replace them with --overwrite")


def _is_ours(out: Path) -> bool:
    try:
        return json.loads((out / MARK).read_text(encoding="utf-8")).get("made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        return False


def _clear(out: Path) -> None:
    """Remove earlier predictions, and nothing besides."""
    if not _is_ours(out):
        return
    for name in WRITTEN:
        place = out / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


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
        log.warning("video '%s' ends after %d of %d frames: truncated or damaged", source.path, number, video.count)


def _said(network: Network, shots: Sequence[Shot], decode: dict[str, Any]) -> list[dict[str, Any]]:
    """By shot, by task: what an evaluation would score."""
    items = []
    for index, shot in enumerate(shots):
        image, geometry = letterbox(shot.image, network.size)
        items.append((image, Truth(index, geometry, None, None, None, None, None)))
    batch, _ = collate_eval(items)
    return restored(network.run, network.tasks, batch.to(network.device, channels_last=True), decode)


@dataclass
class _Progress:
    """One line: on a terminal it is rewritten, elsewhere a new one is written now and then."""

    found: Sequence[Input]
    began: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    def told(self, count: int, shot: Shot) -> None:
        place = self.found.index(shot.source) + 1
        rate = count / max(time.monotonic() - self.began, 1e-9)
        text = f"{place} of {len(self.found)} files, {count} predictions, {rate:.1f} a second"
        if sys.stderr.isatty():
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last > EVERY_S:
            self.last = time.monotonic()
            log.info(text)

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class _Writer:
    """The folder of predictions. Boxes are kept as arrays until ``finish`` writes them all."""

    def __init__(
        self, out: Path, network: Network, settings: dict[str, Any], *, score: float, alpha: float, draw: bool, frames: bool
    ):
        self.out, self.score, self.alpha, self.draw, self.single = out, score, alpha, draw, frames
        self.names = {name: tuple(task.classes) for name, task in network.tasks.items()}
        self.images = self.frames = self.boxes = 0
        self._listed: list[dict[str, Any]] = []
        self._found: list[np.ndarray] = []  # [K,6] x1,y1,x2,y2,score,class an image
        self._stems: dict[str, str] = {}  # stem -> the input that has it
        self._video: tuple[str, VideoFile] | None = None
        out.mkdir(parents=True, exist_ok=True)
        classes = {name: list(names) for name, names in self.names.items()}
        write_text(out / MARK, json.dumps({**settings, "classes": classes}, indent=2) + "\n")
        if draw:
            save_png(out / "legend.png", legend(self.names))

    @property
    def count(self) -> int:
        return self.images + self.frames

    def add(self, shot: Shot, said: dict[str, Any]) -> None:
        """said: by task what ``Task.restore`` gives."""
        self.images += shot.number is None
        self.frames += shot.number is not None
        height, width = shot.image.shape[:2]
        entry: dict[str, Any] = {"id": len(self._listed) + 1, "file_name": shot.file_name, "width": width, "height": height}
        if shot.number is not None:
            entry |= {"video": shot.source.name, "frame": shot.number, "seconds": round(shot.number / shot.rate, 4)}
        shown: dict[str, Any] = {}
        if "seg" in said:
            shown["mask"] = said["seg"].cpu().numpy()
            entry["mask_file"] = f"masks/{self._stem(shot)}.png"
            _write(self.out / entry["mask_file"], shown["mask"], ".png")
        if "det" in said:
            boxes, scores, classes = (t.cpu().numpy() for t in said["det"])
            self._found.append(np.concatenate([boxes, scores[:, None], classes[:, None]], axis=1).astype(np.float32))
            self.boxes += len(boxes)
            sure = scores >= self.score
            shown |= {"boxes": boxes[sure], "scores": scores[sure], "classes": classes[sure]}
        self._listed.append(entry)
        if self.draw:
            self._draw(shot, shown)

    def _stem(self, shot: Shot) -> str:
        """The name without its ending, or with it where another input has the same; a video's name is a folder."""
        name = shot.source.name
        if shot.number is not None:
            return f"{name}/{shot.number:06d}"
        others = (f"{name} ({number})" for number in counting(2))
        return next(s for s in chain((os.path.splitext(name)[0], name), others) if self._stems.setdefault(s, name) == name)

    def _draw(self, shot: Shot, shown: dict[str, Any]) -> None:
        width = max(320, shot.image.shape[1])
        picture = panel(shot.image, class_names=self.names, alpha=self.alpha, min_width=320, max_width=width, **shown)
        if shot.number is None or self.single:
            _write(self.out / "drawn" / f"{self._stem(shot)}.jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), ".jpg")
            return
        if self._video is None or self._video[0] != shot.source.path:
            self.close()
            target = self.out / "drawn" / (os.path.splitext(shot.source.name)[0] + ".mp4")
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
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self.names.get("det", ()))]
        head = {"info": {"description": MADE_BY}, "images": self._listed, "categories": categories}
        with replacing(self.out / "detections.json") as file:
            file.write(json.dumps(head)[:-1].encode() + b', "annotations": [')
            for number, row in enumerate(self._rows()):
                file.write((b",\n" if number else b"\n") + json.dumps({"id": number + 1, **row}).encode())
            file.write(b"\n]}\n")

    def _rows(self) -> Iterator[dict[str, Any]]:
        for entry, found in zip(self._listed, self._found, strict=False):  # no boxes at all without the task
            for x1, y1, x2, y2, score, kind in found.astype(np.float64).tolist():
                box = [_exact(v) for v in (x1, y1, x2 - x1, y2 - y1)]
                row = {"image_id": entry["id"], "category_id": int(kind) + 1, "bbox": box, "area": _exact(box[2] * box[3])}
                yield {**row, "iscrowd": 0, "score": _exact(score)}


def _exact(value: float) -> float:
    """With the nine digits that tell any two float32 apart."""
    return float(f"{value:.9g}")


def _write(path: Path, array: np.ndarray, ending: str) -> None:
    """uint8 [H,W] or [H,W,3] BGR as an image. (OpenCV's own writing fails on names that are not ASCII on some systems.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    coded, data = cv2.imencode(ending, array, [cv2.IMWRITE_JPEG_QUALITY, JPEG] if ending == ".jpg" else [])
    if not coded:
        raise UserError(f"'{path}' cannot be encoded as {ending}")
    path.write_bytes(data.tobytes())
