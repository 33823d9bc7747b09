"""The YOLO layout: a data.yaml, folders of images, and a text file of normalised boxes or polygons for each
image."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ...batch import IGNORE
from ...errors import UserError, did_you_mean
from ..base import LAYOUTS, Layout, Sample, clean_boxes
from ..classes import occurrences
from ..files import IMAGE_ENDINGS, Files, decode_image, expand, list_images, require_files, unique_names
from ..labels import BoxLabels
from .coco import draw

_TOLERANCE = 0.01  # beyond 0 to 1 without a word, as Ultralytics has it
_PIXELS = 2.0  # a value from here on is no fraction of an image

# EXIF orientation -> what brings the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@LAYOUTS.register("yolo")
class Yolo(Layout):
    """Images with YOLO labels: boxes, or polygons that boxes and masks are made from.

    data: the data.yaml. ``names`` as a list or by index (or ``nc`` alone), ``path``, and for each split a
        folder, a .txt list of images, or a list of these. Its own ``path`` is relative to its folder or to
        where the command runs.
    split: the key of ``data`` to read, e.g. ``train``, ``val``, ``test``.
    root: the folder of the set, in place of the ``path`` in ``data``; a relative ``data`` is relative to it.
    segment: True: masks are drawn from the polygons, larger ones first so that small ones stay visible, 0
        elsewhere; the box of an object without a polygon is ignored there. False: boxes only. None: True when
        most labels are polygons.
    missing: what an image without a label file is: ``background`` (nothing on it, as YOLO trains it) or
    ``unlabelled``.
    det_classes: classes to detect, in this order; others are left out, of the masks too. Default: all of
        ``names``. Mask classes are ``background`` and then these.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    The labels of ``images/a/b.jpg`` are ``labels/a/b.txt`` (the last folder called images counts; without one
    they lie beside the image), a line an object: ``class cx cy w h``, or ``class x1 y1 x2 y2 x3 y3 ...``,
    fractions of the image's width and height. EXIF orientation is applied, as annotation tools and YOLO do.
    Values a little outside 0 to 1 are clipped, objects given twice or of no size are dropped, and both are
    counted. Raises UserError for whatever is wrong in options, ``data`` or label files, which it names with
    the line.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "train",
        root: str = "",
        segment: bool | None = None,
        missing: str = "background",
        det_classes: Sequence[str] | None = None,
        cache: str | None = None,
    ):
        super().__init__()
        if segment not in (True, False, None):
            raise UserError(f"segment: true, false, or null to go by the labels is needed, not {segment!r}")
        if missing not in ("background", "unlabelled"):
            raise UserError(
                f"missing: '{missing}' is unknown; {did_you_mean(missing, ['background', 'unlabelled'])}"
            )
        self.path = expand(data, "data", root)
        content = _read_yaml(self.path)
        known = _names(content, self.path)
        wanted = known if det_classes is None else unique_names(det_classes, "det_classes")
        for name in wanted:
            if name not in known:
                raise UserError(
                    f"det_classes: '{self.path}' has no class '{name}'; {did_you_mean(name, known)}"
                )
        self.add_label("det", "detection", wanted)
        self.files = _UprightFiles(None if cache is None else expand(cache, "cache"))
        self.base, self.paths = self._images(content, split, expand(root, "root") if root else "")
        labels = [_label_path(path) for path in self.paths]
        present = _present(labels)
        if not any(present):
            raise UserError(
                f"data: none of the {len(labels)} images of '{split}' in '{self.path}' has a label file; "
                f"'{labels[0]}' is "
                f"expected for '{self.paths[0]}'"
            )
        self._labelled = np.array(present) | (missing == "background")
        if n := present.count(False):
            self.faults[f"images without a label file (taken as {missing})"] += n
        self._pack([path if there else None for path, there in zip(labels, present, strict=True)], known)
        self._outline(segment)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        path = self.paths[index]
        return os.path.relpath(path, self.base) if path.startswith(self.base + os.sep) else path

    def read(self, index: int) -> Sample:
        self._check_index(index)
        sample = Sample(self.files.image(self.paths[index]))
        if not self._labelled[index]:
            return sample
        height, width = sample.image.shape[:2]
        rows = slice(self._first[index], self._first[index + 1])
        if self.gives("seg"):
            sample.labels["seg"] = self._mask(range(rows.start, rows.stop), width, height)
        if self.gives("det"):
            scale = np.array([width, height, width, height], np.float32)
            sample.labels["det"] = BoxLabels(self._boxes[rows] * scale, self._classes[rows].copy())
        return sample

    def _mask(self, rows: range, width: int, height: int) -> np.ndarray:
        outlines = []
        for row in rows:
            points = self._points[self._point_at[row] : self._point_at[row + 1]].astype(np.float64)
            value = int(self._classes[row]) + 1
            if not len(points):  # nobody knows which pixels of the box are the object's
                x1, y1, x2, y2 = self._boxes[row].tolist()
                points, value = np.array([x1, y1, x2, y1, x2, y2, x1, y2]).reshape(-1, 2), IGNORE
            outlines.append([value, [(points * (width, height)).ravel().tolist()]])
        return draw(outlines, width, height)

    def _images(self, content: dict[str, Any], split: str, root: str) -> tuple[str, list[str]]:
        """The folder that the set's paths are relative to, and the paths of the split's images."""
        where = {"val": "validation", "validation": "val"}.get(split, split)
        splits = [key for key in ("train", "val", "validation", "test", "minival") if content.get(key)]
        if split not in content and where not in content:
            raise UserError(f"split: '{self.path}' has no '{split}'; {did_you_mean(split, splits)}")
        entries = content.get(split, content.get(where))
        entries = entries if isinstance(entries, list) else [entries]
        if not entries or not all(isinstance(entry, str) and entry for entry in entries):
            raise UserError(
                f"split: '{split}' in '{self.path}' is {entries!r}; a folder, a .txt file or a list of them "
                f"is needed"
            )
        path = content.get("path") or ""
        if not isinstance(path, str):
            raise UserError(f"data: 'path' in '{self.path}' is {path!r}; the folder of the set is needed")
        path, folder = os.path.expanduser(path), os.path.dirname(self.path)
        bases = (
            [root, os.path.join(root, path)]
            if root
            else [os.path.join(folder, path), os.path.abspath(path), folder]
        )
        bases = list(dict.fromkeys(os.path.abspath(base) for base in bases))
        # Some tools write ../train/images beside the images; Ultralytics takes the dots off where they lead
        # nowhere.
        for base in bases:
            found = [next((p for p in _places(base, entry) if os.path.exists(p)), None) for entry in entries]
            if all(found):
                break
        else:
            raise UserError(
                f"data: '{entries[0]}' ('{split}' in '{self.path}') is in none of "
                f"{', '.join(map(repr, bases))}; set `root` to "
                "the folder of the set, or correct 'path'"
            )
        paths: list[str] = []
        for place in found:
            if os.path.isdir(place):
                paths += [os.path.join(place, name) for name in list_images(place, "data")]
            else:
                paths += self._listed(place, base)
        return base, paths

    def _listed(self, path: str, base: str) -> list[str]:
        """The images that a .txt file lists: "./" is its own folder, other relative ones are relative to the
        set's."""
        lines = [line.strip() for line in _read_text(path, "data").splitlines()]
        names = [line for line in lines if line.lower().endswith(IMAGE_ENDINGS)]
        if n := sum(map(bool, lines)) - len(names):
            self.faults["lines of a list of images that name none (passed over)"] += n
        if not names:
            raise UserError(f"data: '{path}' lists no images ({', '.join(IMAGE_ENDINGS)}), one path a line")
        own = os.path.dirname(path)
        found = [
            os.path.normpath(os.path.join(own if name.startswith("./") else base, name)) for name in names
        ]
        require_files(own, found, "data", f"'{path}' lists them: restore them or correct it")
        return found

    def _pack(self, labels: list[str | None], known: tuple[str, ...]) -> None:
        """All objects as arrays, normalised; those of image i are rows first[i] to first[i+1].

        Here and not in ``read``: a wrong line stops a run before it starts, faults are counted once, workers
        share the arrays, and only the whole set tells polygons from boxes. A hundred thousand files take half
        a minute; no image is opened.
        """
        class_of = np.array([self.classes["det"].index(n) if n in self.classes["det"] else -1 for n in known])
        corners: list[tuple[float, ...]] = []
        classes: list[int] = []
        polygons: list[np.ndarray] = []
        first, nothing = [0], np.zeros((0, 2), np.float32)
        for path in labels:
            seen = set()
            for number, line in enumerate(_read_text(path, "data").splitlines() if path else (), 1):
                if not (words := line.split()):
                    continue
                kind, values = _parse(words, len(known), path, number)
                low, high = min(values), max(values)
                if low < -_TOLERANCE or high > 1 + _TOLERANCE:
                    self.faults["objects with values outside 0 to 1 (clipped)"] += 1
                if len(values) == 4:
                    x, y, w, h = values
                    box, points = (x - w / 2, y - h / 2, x + w / 2, y + h / 2), nothing
                else:
                    points = np.clip(np.array(values, np.float32).reshape(-1, 2), 0, 1)
                    box = (*points.min(0).tolist(), *points.max(0).tolist())
                if (kind, box) in seen:
                    self.faults["objects given twice in one file (dropped)"] += 1
                    continue
                seen.add((kind, box))
                corners.append(box)
                classes.append(kind)
                polygons.append(points)
            first.append(len(corners))
        boxes, keep, faults = clean_boxes(np.array(corners), 1, 1)
        self.faults += faults
        mapped = class_of[np.array(classes, dtype=np.int64)]
        keep &= mapped >= 0
        self._first = np.concatenate([[0], np.cumsum(keep)])[first]
        self._boxes, self._classes = boxes[keep], mapped[keep].astype(np.int64)
        self.seen["det"] = occurrences(self._classes, len(self.classes["det"]))
        polygons = [points for points, kept in zip(polygons, keep, strict=True) if kept]
        self._points = np.concatenate([nothing, *polygons])
        self._point_at = np.concatenate(
            [[0], np.cumsum([len(points) for points in polygons], dtype=np.int64)]
        )

    def _outline(self, segment: bool | None) -> None:
        """Decide on masks."""
        sizes = np.diff(self._point_at)
        drawn = int((sizes > 0).sum())
        if segment and len(sizes) and not drawn:
            raise UserError(
                f"segment: the labels of '{self.path}' are boxes, masks need polygons (class x1 y1 x2 y2 x3 "
                f"y3 ...); set "
                "`segment: false` to use the boxes only"
            )
        if segment if segment is not None else 2 * drawn > len(sizes):
            self.add_label("seg", "semantic", ("background", *self.classes["det"]))
            if len(self.classes["seg"]) > IGNORE:
                raise UserError(
                    f"det_classes: {len(self.classes['det'])} classes do not fit in a mask of bytes; name at "
                    f"most "
                    f"{IGNORE - 1}, or set `segment: false`"
                )
            if lost := len(sizes) - drawn:
                self.faults["objects without a polygon (their box is ignored in the mask)"] += lost
            # some of every labelled image is taken to be uncovered
            self.seen["seg"] = occurrences(self._classes + 1, len(self.classes["seg"]), sizes == 0)
            self.seen["seg"][0] = self._labelled.sum()
        else:
            self._points, self._point_at = self._points[:0], np.zeros(1, np.int64)


def _parse(words: list[str], count: int, path: str, number: int) -> tuple[int, list[float]]:
    """Class and values of a line. Raises UserError naming file and line."""
    where = f"data: line {number} of '{path}'"
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise UserError(
            f"{where} is no YOLO label: {error}; numbers are needed: class cx cy w h, or class x1 y1 x2 y2 "
            f"..."
        ) from None
    kind, values = values[0], values[1:]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        hint = "leave out the confidence of a prediction" if len(values) == 5 else "correct it"
        raise UserError(
            f"{where} has {len(values)} values after the class; a box has 4 (cx cy w h), a polygon an even "
            f"number from 6 on: {hint}"
        )
    if not (math.isfinite(kind) and kind == int(kind) and 0 <= kind < count):
        raise UserError(
            f"{where} has class {words[0]}, but `names` has 0 to {count - 1}; correct the line or `names`"
        )
    if not (math.isfinite(sum(values)) and min(values) > 1 - _PIXELS and max(values) < _PIXELS):
        word = next(
            word for word, value in zip(words[1:], values, strict=True) if not 1 - _PIXELS < value < _PIXELS
        )
        raise UserError(
            f"{where} has {word}; fractions of width and height, 0 to 1, are needed: divide pixels by the "
            f"image's size"
        )
    return int(kind), values


def _places(base: str, entry: str) -> list[str]:
    entry = os.path.expanduser(entry)
    found = [os.path.join(base, entry)] + ([os.path.join(base, entry[3:])] if entry.startswith("../") else [])
    return [os.path.normpath(path) for path in found]


def _label_path(image: str) -> str:
    before, folder, after = image.rpartition("/images/")
    stem = os.path.splitext(after)[0]
    return f"{before}/labels/{stem}.txt" if folder else f"{stem}.txt"


def _present(paths: list[str]) -> list[bool]:
    """Whether each file is there: one listing a folder rather than one stat a file."""
    listed: dict[str, set[str]] = {}
    for folder in {os.path.dirname(path) for path in paths}:
        try:
            listed[folder] = set(os.listdir(folder))
        except OSError:
            listed[folder] = set()
    return [os.path.basename(path) in listed[os.path.dirname(path)] for path in paths]


def _read_text(path: str, option: str) -> str:
    try:
        return Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{option}: file '{path}' does not exist; check the path and `root`") from None
    except OSError as error:
        raise UserError(f"{option}: file '{path}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option}: '{path}' is no text, it is not UTF-8 ({error.reason}); replace it"
        ) from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_read_text(path, "data"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(
            f"data: '{path}' is not valid YAML: {getattr(error, 'problem', None) or error}{place}; mend it"
        ) from None
    except (ValueError, RecursionError) as error:  # a date that is none, a thousand brackets
        raise UserError(f"data: '{path}' is not valid YAML: {error}; mend it") from None
    if not isinstance(content, dict):
        raise UserError(
            f"data: '{path}' is no data.yaml; a mapping with 'names', 'train' and 'val' is needed"
        )
    if "kpt_shape" in content:
        raise UserError(f"data: '{path}' is a set of keypoints ('kpt_shape'); boxes or polygons are needed")
    return content


def _names(content: dict[str, Any], path: str) -> tuple[str, ...]:
    names, count = content.get("names"), content.get("nc")
    where = f"data: 'names' in '{path}'"
    if names is None and type(count) is int and count > 0:
        names = [f"class_{i}" for i in range(count)]
    if isinstance(names, dict):
        names = {int(key) if str(key).isdecimal() else key: name for key, name in names.items()}
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(
                f"{where}: the indices must be 0, 1, 2, ... without a gap, not {', '.join(map(str, names))}"
            )
        names = [names[i] for i in range(len(names))]
    if isinstance(names, list):  # 0: 1 and - yes are names too
        names = [str(name) if isinstance(name, (int, float)) else name for name in names]
    found = unique_names(names, where)
    if count is not None and count != len(found):
        raise UserError(f"{where}: {len(found)} names, but 'nc' is {count}; correct one")
    return found


class _UprightFiles(Files):
    """Images as they are shown: YOLO's labels refer to them with EXIF orientation applied."""

    def image(self, path: str) -> np.ndarray:
        return self._read(path, "upright", _decode_upright, 3, np.uint8)


def _decode_upright(path: str) -> np.ndarray:
    pixels = decode_image(path)
    try:
        with Image.open(path) as image:
            turn = _TURNS.get(image.getexif().get(0x0112))
    except Exception:  # damaged EXIF data raises nearly anything, and the pixels are whole
        turn = None
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
