"""The Cityscapes layout: images, masks of the 19 training classes, boxes from instance images, and depth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from ...batch import IGNORE
from ...errors import UserError, did_you_mean
from ..base import LAYOUTS, Listed, Sample
from ..files import (
    Files,
    expand,
    list_files,
    missing_files,
    read_json,
    require_files,
    require_same_size,
    unique_names,
)
from ..labels import BoxLabels

# Label id of each training class, in the order of the training ids (cityscapesScripts, helpers/labels.py).
LABEL_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19, "traffic sign": 20,
    "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31,
    "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
LABELS = ("labelIds", "labelTrainIds")
_LAST_ID = 33  # of the labels; from 24 on they may have instances (29 and 30, caravan and trailer, are void)
_IMAGE = "_leftImg8bit.png"
_BAD = 254  # what a value that the format does not have becomes in a mask
BASELINE, FX = 0.209313, 2262.52  # where no camera is given: metres between the pair, focal length in pixels


@LAYOUTS.register("cityscapes")
class Cityscapes(Listed):
    """Cityscapes' leftImg8bit and gtFine: masks of the 19 training classes, boxes of 8 of them, depth.

    The labels are ``seg``, ``det`` and, from the stereo pairs' disparity, ``depth``.

    A box spans what is visible of its instance, and its area is that of the visible pixels. Objects that the
    set labels as a group only (an instance id below 1000) are crowds, one for each connected region of a
    class.

    root: the folder that holds leftImg8bit and gtFine.
    split: a folder of leftImg8bit, e.g. ``train`` or ``val``. The official labels of ``test`` are blank.
    labels: the files that masks are read from, ``labelIds`` or ``labelTrainIds``; whatever is no training
        class is void.
    boxes: False for no boxes; the instanceIds files are then not needed.
    det_classes: classes to detect, in this order. Default: person, rider, car, truck, bus, train, motorcycle,
        bicycle.
    depth: True for depth in metres from the folder disparity; an image without a disparity file is not
        labelled for it. A value v of a disparity image is 0 where nothing was measured; else the disparity is
        d = (v - 1) / 256 pixels (README of cityscapesScripts, under ``disparity``), and the depth is
        ``baseline * fx / d``, as for every rectified pair of cameras; none where d is 0.
        ``extrinsic.baseline`` (metres) and ``intrinsic.fx`` (pixels) are those of
        camera/<split>/<city>/*_camera.json; without a folder camera, 0.209313 m and 2262.52 px.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    Paths may hold ``$VAR``, ``${VAR}`` and ``~``. Raises UserError for whatever is wrong in options or files.
    """

    def __init__(
        self,
        *,
        root: str,
        split: str,
        labels: str = "labelIds",
        boxes: bool = True,
        det_classes: Sequence[str] | None = None,
        depth: bool = False,
        cache: str | None = None,
    ):
        super().__init__()
        if labels not in LABELS:
            raise UserError(
                f"labels: '{labels}' is none of {', '.join(LABELS)}; {did_you_mean(labels, LABELS)}"
            )
        self.kind = labels
        self.add_label("seg", "semantic", tuple(LABEL_IDS))
        if boxes:
            self.add_label("det", "detection", THINGS if det_classes is None else _det_names(det_classes))
        elif det_classes is not None:
            raise UserError("det_classes: without use where `boxes` is false; remove one")
        self.files = Files(None if cache is None else expand(cache, "cache"))
        root = expand(root, "root")
        self.images, self.annotations = _folders(root, split)
        self.names = list_files(self.images, "split", (_IMAGE.lower(),), "images")
        made = (
            "csCreateTrainIdLabelImgs of cityscapesscripts makes them"
            if labels == "labelTrainIds"
            else "restore them"
        )
        self._require(labels, "labels", f"{made}, or choose other `labels`")
        if boxes:
            self._require("instanceIds", "boxes", "restore them, or set `boxes: false`")
        self._value_of = _mask_values(labels)
        self._class_of = _instance_classes(self.classes.get("det", ()))
        if depth:
            self.add_label("depth", "depth")
            self.disparities = os.path.join(root, "disparity", split)
            self._base_times_fx = self._measured(
                os.path.join(root, "camera", split), os.path.join(root, "camera")
            )

    def read(self, index: int) -> Sample:
        self._check_index(index)
        image_path = os.path.join(self.images, self.names[index])
        sample = Sample(self.files.image(image_path))
        if self.gives("seg"):
            sample.labels["seg"] = self._mask(index, image_path, sample.image)
        if self.gives("det"):
            sample.labels["det"] = self._objects(index, image_path, sample.image)
        if self.gives("depth") and self._base_times_fx[index]:
            sample.labels["depth"] = self._depth(index, image_path, sample.image)
        return sample

    def _mask(self, index: int, image_path: str, image: np.ndarray) -> np.ndarray:
        path = os.path.join(self.annotations, self._label(index, self.kind))
        stored = self.files.mask(path)
        require_same_size(stored, path, image, image_path, kind="labels")
        mask = np.take(self._value_of, stored)
        if (bad := mask == _BAD).any():
            known = (
                f"0 to {_LAST_ID}" if self.kind == "labelIds" else f"0 to {len(LABEL_IDS) - 1} and {IGNORE}"
            )
            raise UserError(
                f"mask '{path}' has index {stored[bad][0]}, but {self.kind} are {known}; correct `labels` or "
                "the file"
            )
        return mask

    def _objects(self, index: int, image_path: str, image: np.ndarray) -> BoxLabels:
        path = os.path.join(self.annotations, self._label(index, "instanceIds"))
        ids = self.files.ids(path)
        require_same_size(ids, path, image, image_path, "id image", "labels")
        class_at = np.take(self._class_of, ids)
        if (bad := class_at == -2).any():
            raise UserError(
                f"id image '{path}' has id {ids[bad][0]}, but instanceIds are label ids up to {_LAST_ID}, or "
                "1000 times one that has instances plus a number; make it anew"
            )
        return BoxLabels(*instance_boxes(ids, class_at))

    def _depth(self, index: int, image_path: str, image: np.ndarray) -> np.ndarray:
        """float32 [H,W] in metres, 0 where nothing was measured."""
        path = os.path.join(self.disparities, self._beside(index, "_disparity.png"))
        stored = self.files.disparity(path)
        require_same_size(stored, path, image, image_path, "disparity image", "labels")
        disparity = (stored.astype(np.float32) - 1) / 256
        depth = np.zeros(stored.shape, np.float32)
        return np.divide(np.float32(self._base_times_fx[index]), disparity, out=depth, where=disparity > 0)

    def _measured(self, cameras: str, all_cameras: str) -> np.ndarray:
        """float64 [N]: by image, baseline times fx (metres times pixels), 0 where it has no disparity file.

        cameras: the split's folder of cameras, in the folder ``all_cameras``.
        """
        names = [self._beside(i, "_disparity.png") for i in range(len(self))]
        if not os.path.isdir(self.disparities):
            raise UserError(
                f"depth: folder '{self.disparities}' does not exist; unpack the set's disparity there, or "
                "set `depth: false`"
            )
        missing = set(missing_files(self.disparities, names, "depth"))
        if len(missing) == len(names):
            raise UserError(
                f"depth: '{names[0]}' and all others are missing from '{self.disparities}'; unpack them, or "
                "set `depth: false`"
            )
        if missing:
            self.faults["images without a disparity file (not labelled with depth)"] += len(missing)
        there = [i for i, name in enumerate(names) if name not in missing]
        found = np.zeros(len(names))
        found[there] = BASELINE * FX
        if os.path.isdir(all_cameras):
            files = [self._beside(i, "_camera.json") for i in there]
            require_files(
                cameras, files, "depth", "unpack the set's cameras there, or move the folder camera away"
            )
            found[there] = [_base_times_fx(os.path.join(cameras, name)) for name in files]
        return found

    def _beside(self, index: int, ending: str) -> str:
        """What a file of the image is called in the set's other folders."""
        return self.names[index][: -len(_IMAGE)] + ending

    def _label(self, index: int, kind: str) -> str:
        return self._beside(index, f"_gtFine_{kind}.png")

    def _require(self, kind: str, option: str, hint: str) -> None:
        require_files(self.annotations, [self._label(i, kind) for i in range(len(self))], option, hint)


def _base_times_fx(path: str) -> float:
    """The baseline in metres times the focal length in pixels, of a camera's JSON."""
    content = read_json(path, "depth")
    baseline, fx = (
        _positive(content, "extrinsic", "baseline", path),
        _positive(content, "intrinsic", "fx", path),
    )
    return baseline * fx


def _positive(content: Any, section: str, key: str, path: str) -> float:
    part = content.get(section) if isinstance(content, dict) else None
    value = part.get(key) if isinstance(part, dict) else None
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise UserError(
            f"depth: '{path}' needs a positive number at {section}.{key}, not {value!r}; restore the file"
        )
    return float(value)


def instance_boxes(
    ids: np.ndarray, class_at: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [M,4] x1,y1,x2,y2 in pixels, classes [M], crowd [M] and visible areas [M] in pixels, by id.

    ids: uint16 [H,W]; below 1000, a group, which gives one box a connected region. class_at: int8 [H,W], the
    class of each pixel, negative where there is none.
    """
    height, width = ids.shape
    flat = np.flatnonzero(class_at >= 0)
    values = ids.ravel()[flat]
    counts = np.bincount(values)
    found = np.flatnonzero(counts)
    slot = np.zeros(len(counts), np.intp)
    slot[found] = np.arange(len(found))
    rows, columns = np.divmod(flat, width)
    x1, x2 = _extent(slot[values], columns, len(found), width)
    y1, y2 = _extent(slot[values], rows, len(found), height)
    class_of = np.zeros(len(counts), np.int64)
    class_of[values] = class_at.ravel()[flat]
    objects = []  # x1, y1, x2, y2, class, crowd, area
    for key, left, top, right, bottom in zip(*(a.tolist() for a in (found, x1, y1, x2, y2)), strict=True):
        if key >= 1000:
            objects.append((left, top, right, bottom, class_of[key], False, counts[key]))
            continue
        region = (ids[top:bottom, left:right] == key).astype(np.uint8)
        for x, y, w, h, area in cv2.connectedComponentsWithStats(region)[2][1:].tolist():
            objects.append((left + x, top + y, left + x + w, top + y + h, class_of[key], True, area))
    table = np.array(objects, dtype=np.float64).reshape(-1, 7)
    boxes, areas = table[:, :4].astype(np.float32), table[:, 6].astype(np.float32)
    return boxes, table[:, 4].astype(np.int64), table[:, 5].astype(bool), areas


def _extent(slots: np.ndarray, places: np.ndarray, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First place, and last + 1, of each of ``count`` slots along an axis of ``size`` pixels."""
    seen = np.zeros((count, size), bool)
    seen[slots, places] = True
    return seen.argmax(axis=1), size - seen[:, ::-1].argmax(axis=1)


def _mask_values(labels: str) -> np.ndarray:
    """uint8 [256]: stored value -> mask value."""
    values = np.full(256, _BAD, np.uint8)
    if labels == "labelTrainIds":
        values[: len(LABEL_IDS)] = np.arange(len(LABEL_IDS))
        values[IGNORE] = IGNORE
        return values
    values[: _LAST_ID + 1] = IGNORE
    values[list(LABEL_IDS.values())] = np.arange(len(LABEL_IDS))
    return values


def _instance_classes(names: Sequence[str]) -> np.ndarray:
    """int8 [65536]: instance id -> index of its class in ``names``, -1 for other classes, -2 for what is no
    instance id."""
    classes = np.full(65536, -2, np.int8)
    classes[: _LAST_ID + 1] = -1
    classes[LABEL_IDS[THINGS[0]] * 1000 : (_LAST_ID + 1) * 1000] = -1
    for index, name in enumerate(names):
        key = LABEL_IDS[name]
        classes[key] = index
        classes[key * 1000 : (key + 1) * 1000] = index
    return classes


def _det_names(given: Sequence[str]) -> tuple[str, ...]:
    for name in unique_names(given, "det_classes"):
        if name not in THINGS:
            raise UserError(f"det_classes: '{name}' has no instances; {did_you_mean(name, THINGS)}")
    return tuple(given)


def _folders(root: str, split: str) -> tuple[str, str]:
    """The split's folders of images and of labels."""
    top = os.path.join(root, "leftImg8bit")
    if not os.path.isdir(top):
        raise UserError(
            f"root: folder '{top}' does not exist; `root` is the folder that holds leftImg8bit and gtFine"
        )
    if not isinstance(split, str) or not os.path.isdir(os.path.join(top, split)) or not split:
        there = [entry.name for entry in os.scandir(top) if entry.is_dir()]
        raise UserError(f"split: '{split}' is no folder of '{top}'; {did_you_mean(split, there)}")
    labels = os.path.join(root, "gtFine", split)
    if not os.path.isdir(labels):
        raise UserError(
            f"split: '{split}' has no labels ('{labels}' does not exist); unpack gtFine there. Those of the "
            f"official test "
            "split are withheld: use train or val, or the layout `images` for images without labels"
        )
    return os.path.join(top, split), labels
