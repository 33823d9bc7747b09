"""The BDD100K layout: the official tree, and the tree of one label file an image that driving networks are trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import numpy as np

from ...batch import IGNORE
from ...errors import UserError, did_you_mean
from ..base import LAYOUTS, Listed, Sample, clean_boxes
from ..files import Files, decode_image, expand, list_images, read_json, require_same_size, size_text, unique_names

CLASSES = (
    "pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle", "traffic light", "traffic sign"
)  # fmt: skip
# Names of older releases, and of kinds that the detection benchmark counts among a class (bdd100k/configs/det.toml).
RENAMED = {"person": "pedestrian", "motor": "motorcycle", "bike": "bicycle", "van": "car", "caravan": "car"}
# What the benchmark leaves out of the count: neither hit nor miss, which here is a crowd of the class.
IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}

SEM_SEG = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
LANES = (
    "crosswalk", "double other", "double white", "double yellow", "road curb", "single other", "single white",
    "single yellow", "background",
)  # fmt: skip
_UNKNOWN = 254  # of a stored value without a meaning; no kind has so many classes


def _table(values: Iterable[int]) -> np.ndarray:
    """uint8 [256]: stored value -> mask value, for stored values 0, 1, 2, ...; 255 is ignored, others are unknown."""
    table = np.full(256, _UNKNOWN, np.uint8)
    table[255] = IGNORE
    for stored, value in enumerate(values):
        table[stored] = value
    return table


class Kind(NamedTuple):
    """A kind of masks: its folder, class names, and the meaning of stored values (uint8 [256])."""

    folder: str
    names: tuple[str, ...]
    table: np.ndarray


# YOLOP takes stored values above 1 for the area or line, HybridNets those above 0; both by brightness.
_BINARY = _table([0] + [1] * 255)
KINDS: dict[str, dict[str, Kind]] = {
    "official": {
        "drivable": Kind("labels/drivable/masks/{split}", ("direct", "alternative", "background"), _table(range(3))),
        "sem_seg": Kind("labels/sem_seg/masks/{split}", SEM_SEG, _table(range(19))),
        # Bits, least first: 3 of category, background, style, direction.
        "lane": Kind("labels/lane/masks/{split}", LANES, _table(8 if byte & 8 else byte & 7 for byte in range(256))),
    },
    "per_image": {
        "drivable": Kind("da_seg_annotations/{split}", ("background", "drivable"), _BINARY),
        "lane": Kind("ll_seg_annotations/{split}", ("background", "lane"), _BINARY),
    },
}
_LABELS = {
    "official": ("labels/det_20/det_{split}.json", "labels/bdd100k_labels_images_{split}.json"),
    "per_image": ("det_annotations/{split}",),
}


class _Label(NamedTuple):
    """A labelled object as the JSON has it, less what is not used."""

    category: Any
    box: Any
    crowd: Any


@LAYOUTS.register("bdd100k")
class BDD100K(Listed):
    """BDD100K: driving frames with boxes, and masks of one kind.

    root: the folder of the set.
    split: ``train`` or ``val``.
    tree: ``official`` (``images/100k/<split>``, ``labels/det_20/det_<split>.json`` or the older
        ``labels/bdd100k_labels_images_<split>.json``, ``labels/<kind>/masks/<split>``), ``per_image`` (``images/<split>``,
        ``det_annotations/<split>/*.json``, ``da_seg_annotations/<split>``, ``ll_seg_annotations/<split>``, as YOLOP and
        HybridNets have them), or ``auto``: what the root looks like.
    masks: the kind of masks. ``drivable``: direct, alternative, background; of ``per_image`` background, drivable (every
        value but 0, as the named networks read them). ``lane``: eight kinds of markings and background; of ``per_image``
        background, lane. ``sem_seg`` (``official``, images of ``images/10k``): 19 classes, 255 is ignored. None: no masks.
    boxes: False for masks alone.
    det_classes: classes to detect, in this order; others are left out. Default: the ten of the benchmark, merged.
    det_merge: detection class -> the name it goes under, e.g. ``{car: vehicle, bus: vehicle, truck: vehicle}``.
    seg_merge: the same for the classes of the masks, e.g. ``{direct: drivable, alternative: drivable}``.
    size: width and height in pixels of the images that the boxes refer to. An image of another size with boxes is an error.
    images, labels, mask_files: paths instead of those of ``tree``, relative to ``root``; ``{split}`` in them is filled in.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    Older category names count as the new ones: person: pedestrian, motor: motorcycle, bike: bicycle, van and caravan:
    car. Crowds are marked as such, and so are other person (as pedestrian), other vehicle (car) and trailer (truck),
    which the benchmark ignores, unless ``det_merge`` names them. Other categories are left out unless ``det_classes``
    or ``det_merge`` name them.
    An image that the labels do not name, or without a mask file, is not labelled for that task; one that they name
    without objects is labelled and empty. Raises UserError for whatever is wrong in options, labels or files.
    """

    def __init__(
        self,
        *,
        root: str,
        split: str = "train",
        tree: str = "auto",
        masks: str | None = None,
        boxes: bool = True,
        det_classes: Sequence[str] | None = None,
        det_merge: Mapping[str, str] | None = None,
        seg_merge: Mapping[str, str] | None = None,
        size: Sequence[int] = (1280, 720),
        images: str | None = None,
        labels: str | None = None,
        mask_files: str | None = None,
        cache: str | None = None,
    ):
        super().__init__()
        self.root = expand(root, "root")
        if not os.path.isdir(self.root):
            raise UserError(f"root: folder '{self.root}' does not exist; check the path")
        tree = _tree(tree, self.root)
        _check_options(masks, boxes, size, det_classes or det_merge or labels, seg_merge or mask_files, tree)
        self.size = tuple(size)

        def place(given: str | None, option: str, *usual: str) -> str:
            paths = [expand(path.replace("{split}", split), option, self.root) for path in ([given] if given else usual)]
            return next((path for path in paths if os.path.exists(path)), paths[0])

        usual = "images/{split}" if tree == "per_image" else f"images/{'10k' if masks == 'sem_seg' else '100k'}/{{split}}"
        self.images = place(images, "images", usual)
        kind = None if masks is None else KINDS[tree][masks]
        self._binary = kind is not None and kind.table is _BINARY
        self.files = (_GreyFiles if self._binary else Files)(None if cache is None else expand(cache, "cache"))
        self.names = list_images(self.images, "images")
        stems = [os.path.splitext(name)[0] for name in self.names]
        self._labelled = np.zeros(len(stems), bool)
        if boxes:
            path = place(labels, "labels", *_LABELS[tree])
            found = self._frames(path, stems) if tree == "official" else self._label_files(path, stems)
            self._pack(found, stems, path, det_classes, _merging(det_merge, "det_merge"))
        if kind is not None:
            self.masks = place(mask_files, "mask_files", kind.folder)
            self._name_masks(masks, kind, _merging(seg_merge, "seg_merge"))
            present = _stems(self.masks, ".png", "mask_files")
            self._masked = np.array([stem in present for stem in stems])
            if not self._masked.any():
                raise UserError(
                    f"mask_files: none of the images of '{self.images}' has a mask in '{self.masks}'; a mask is named like "
                    f"its image ('{self.names[0]}' -> '{stems[0]}.png')"
                )
            self._count("images without a mask (not labelled)", (~self._masked).sum())

    def read(self, index: int) -> Sample:
        self._check_index(index)
        path = os.path.join(self.images, self.names[index])
        image = self.files.image(path)
        mask = self._mask(index, path, image) if "seg" in self.classes else None
        if not self._labelled[index]:
            return Sample(image, mask)
        if image.shape[1::-1] != self.size:
            raise UserError(
                f"image '{path}' is {size_text(image)}, but its boxes are of images of {self.size[0]}x{self.size[1]} pixels "
                "(width x height); undo the resizing, or set `size` to what the labels refer to"
            )
        rows = slice(self._first[index], self._first[index + 1])
        return Sample(image, mask, self._boxes[rows].copy(), self._classes[rows].copy(), self._crowd[rows].copy())

    def _mask(self, index: int, image_path: str, image: np.ndarray) -> np.ndarray | None:
        if not self._masked[index]:
            return None
        path = os.path.join(self.masks, os.path.splitext(self.names[index])[0] + ".png")
        stored = self.files.mask(path)
        require_same_size(stored, path, image, image_path)
        if self._binary and stored.max() == 2:
            raise UserError(
                f"mask '{path}' holds indices up to 2 and no brightness: official masks, where 2 is the background; set "
                "`tree: official` with `images`, `labels` and `mask_files`, or make the masks 0 and 255"
            )
        mask = np.take(self._table, stored)
        if (unknown := mask == _UNKNOWN).any():
            raise UserError(f"mask '{path}' has value {stored[unknown].min()}, but {self._meaning}; check `masks` and `mask_files`")
        return mask

    def _name_masks(self, masks: str, kind: Kind, merge: Mapping[str, str]) -> None:
        _check_known(merge, kind.names, "seg_merge")
        merged = [merge.get(name, name) for name in kind.names]
        names = tuple(dict.fromkeys(merged))
        index = np.arange(256, dtype=np.uint8)
        index[: len(merged)] = [names.index(name) for name in merged]
        self.classes["seg"], self._table = names, index[kind.table]
        self._meaning = f"{masks} masks hold 0 to {len(kind.names) - 1} (255: ignored)"

    def _frames(self, path: str, stems: list[str]) -> Iterator[list[Any] | None]:
        """For each image its labels in a JSON of frames, None where it is not named."""
        frames = _read_slim(path)
        if isinstance(frames, dict) and "frames" in frames:
            frames = frames["frames"]
        if not isinstance(frames, list):
            raise UserError(f"labels: '{path}' is not a list of frames; a Scalabel JSON such as det_train.json is needed")
        of_name: dict[str, list[Any]] = {}
        for place, frame in enumerate(frames):
            name = frame.get("name") if isinstance(frame, dict) else None
            if not isinstance(name, str):
                raise UserError(f"labels: frame {place} in '{path}' has no 'name'; add the file name of its image")
            labels = _list(frame.get("labels"), f"'labels' of frame '{name}' in '{path}'")
            if of_name.setdefault(os.path.splitext(name)[0], labels) is not labels:
                raise UserError(f"labels: frame '{name}' is in '{path}' twice; remove one")
        found = [of_name.pop(stem, None) for stem in stems]
        self._count("frames without an image (passed over)", len(of_name))
        return iter(found)

    def _label_files(self, folder: str, stems: list[str]) -> Iterator[list[Any] | None]:
        """For each image the objects of its JSON, None where there is none."""
        present = _stems(folder, ".json", "labels")
        for stem in stems:
            if stem not in present:
                yield None
                continue
            path = os.path.join(folder, stem + ".json")
            content = _read_slim(path)
            frames = content.get("frames") if isinstance(content, dict) else None
            if not isinstance(frames, list) or not frames or not isinstance(frames[0], dict):
                raise UserError(f"labels: '{path}' has no frames[0]; one JSON an image with frames[0].objects is needed")
            yield _list(frames[0].get("objects"), f"'objects' of frames[0] in '{path}'")

    def _pack(
        self, found: Iterable[list[Any] | None], stems: list[str], path: str, wanted: Sequence[str] | None, merge: Mapping[str, str]
    ) -> None:
        """All boxes as arrays; those of image i are rows first[i] to first[i+1]."""
        corners: list[tuple[float, ...]] = []
        categories: list[str] = []
        crowds: list[bool] = []
        first = [0]
        for image, labels in enumerate(found):
            self._labelled[image] = labels is not None
            for place, label in enumerate(labels or ()):
                if not isinstance(label, _Label) or not isinstance(label.category, str):
                    raise UserError(f"labels: object {place} of '{stems[image]}' in '{path}' has no 'category'; add it")
                if label.box is None:  # a lane or an area
                    continue
                if type(label.box) is not tuple:
                    raise UserError(
                        f"labels: object {place} of '{stems[image]}' in '{path}': box2d needs the numbers x1, y1, x2, y2 "
                        "in pixels; correct it"
                    )
                corners.append(label.box)
                categories.append(label.category)
                crowds.append(bool(label.crowd) or (label.category in IGNORED and label.category not in merge))
            first.append(len(corners))
        if not self._labelled.any():
            raise UserError(
                f"labels: '{path}' has none of the images of '{self.images}' ('{self.names[0]}', ...); check `split`, "
                "`images` and `labels`, or set `boxes: false`"
            )
        self._count("images without labels of boxes (not labelled)", (~self._labelled).sum())
        self.classes["det"], class_of = _detected(set(categories), wanted, merge)
        classes = np.array([class_of.get(name, -1) for name in categories], dtype=np.int64)
        strange = set(categories) - class_of.keys() - {*CLASSES, *RENAMED, *IGNORED, *merge}
        self._count("boxes of categories that are not of BDD100K (left out)", sum(name in strange for name in categories))
        chosen = classes >= 0
        boxes = np.array(corners, dtype=np.float32).reshape(-1, 4)
        clipped, keep, faults = clean_boxes(boxes[chosen], *self.size)
        self.faults += faults
        chosen[chosen] = keep
        self._first = np.concatenate([[0], np.cumsum(chosen)])[first]
        self._boxes, self._classes, self._crowd = clipped[keep], classes[chosen], np.array(crowds, dtype=bool)[chosen]

    def _count(self, fault: str, count: int) -> None:
        if count:
            self.faults[fault] += int(count)


def _tree(tree: str, root: str) -> str:
    if tree in KINDS:
        return tree
    if tree != "auto":
        raise UserError(f"tree: '{tree}' is unknown; {did_you_mean(tree, [*KINDS, 'auto'])}")
    marks = {
        "official": ("labels", "images/100k", "images/10k"),
        "per_image": ("det_annotations", "da_seg_annotations", "ll_seg_annotations"),
    }
    found = [name for name, places in marks.items() if any(os.path.isdir(os.path.join(root, place)) for place in places)]
    if len(found) == 1:
        return found[0]
    what = "both trees" if found else "neither 'labels' and 'images/100k' nor 'det_annotations' or 'da_seg_annotations'"
    raise UserError(f"tree: '{root}' has {what}; set `tree` to official or per_image, or correct `root`")


def _check_options(masks: Any, boxes: bool, size: Any, of_boxes: Any, of_masks: Any, tree: str) -> None:
    if masks is not None and masks not in [*KINDS[tree]]:
        raise UserError(f"masks: the {tree} tree has no '{masks}' masks; known: {', '.join(KINDS[tree])}, and null for none")
    if masks is None and not boxes:
        raise UserError("masks: with `boxes: false` and no masks nothing is labelled; set `masks`")
    if masks is None and of_masks:
        raise UserError("masks: `seg_merge` and `mask_files` have no use without it; set `masks`, or remove them")
    if not boxes and of_boxes:
        raise UserError("boxes: false leaves `det_classes`, `det_merge` and `labels` without use; remove them")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise UserError(f"size: width and height in whole pixels are needed, e.g. [1280, 720], not {size!r}")


def _merging(given: Any, option: str) -> Mapping[str, str]:
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(isinstance(n, str) and n for pair in given.items() for n in pair):
        raise UserError(f"{option}: a mapping of class name -> class name is needed, not {given!r}")
    return given


def _check_known(names: Iterable[str], known: Iterable[str], option: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{option}: no class is called '{name}'; {did_you_mean(name, known)}")


def _detected(seen: set[str], wanted: Sequence[str] | None, merge: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names, and category of the labels -> class; what is left out is not in it."""
    known = {*CLASSES, *RENAMED, *IGNORED, *seen}
    _check_known(merge, known, "det_merge")
    usual = [merge.get(name, name) for name in CLASSES] + list(merge.values())
    name_of = {}
    for category in known:
        current = (RENAMED | IGNORED).get(category, category)
        name_of[category] = merge.get(category, merge.get(current, current))
    names = unique_names(list(dict.fromkeys(usual)) if wanted is None else wanted, "det_classes")
    _check_known(names, set(name_of.values()), "det_classes")
    return names, {category: names.index(name) for category, name in name_of.items() if name in names}


def _list(value: Any, what: str) -> list[Any]:
    """A list, empty where the JSON has null or nothing."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"labels: {what} is not a list; correct it")
    return value


def _stems(folder: str, ending: str, option: str) -> set[str]:
    """Files under ``folder`` with this ending, relative to it and without the ending: one listing a folder, no stat."""
    if not os.path.isdir(folder):
        raise UserError(f"{option}: folder '{folder}' does not exist; check `root`, `split` and `{option}`")
    found = set()
    for parent, _, files in os.walk(folder, followlinks=True):
        place = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if place == "." else place + "/"
        found.update(prefix + name[: -len(ending)] for name in files if name.endswith(ending))
    return found


def _slim(entry: dict[str, Any]) -> Any:
    """A JSON object as it is parsed: a label becomes a ``_Label``, its box a tuple, its outlines are gone at once.

    The labels of 70,000 frames with their outlines would take gigabytes as dictionaries.
    """
    if "category" in entry:
        category, attributes = entry["category"], entry.get("attributes")
        crowd = attributes.get("crowd") if isinstance(attributes, dict) else None
        return _Label(intern(category) if isinstance(category, str) else category, entry.get("box2d"), crowd)
    if "x1" in entry:
        box = entry["x1"], entry.get("y1"), entry.get("x2"), entry.get("y2")
        return box if all(type(value) in (int, float) and abs(value) < 1e9 for value in box) else entry
    return entry


def _read_slim(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes(), object_hook=_slim)
    except (OSError, ValueError):
        read_json(path, "labels")  # says what is wrong
        raise


class _GreyFiles(Files):
    """Masks by brightness, as the networks of the per-image tree read them."""

    def mask(self, path: str) -> np.ndarray:
        return self._read(path, "grey", _decode_grey, 2, np.uint8)


def _decode_grey(path: str) -> np.ndarray:
    """uint8 [H,W]: brightness of a mask without colour, whatever its file holds (grey, palette, RGB, RGBA)."""
    pixels = decode_image(path)
    if (pixels != pixels[..., :1]).any():
        raise UserError(f"mask '{path}' is in colour, but brightness tells area from background; make it 0 and 255")
    return np.ascontiguousarray(pixels[..., 0])
