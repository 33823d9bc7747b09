"""The BDD100K layout: the official tree, and the one with a label file an image, as YOLOP has it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import UserError, did_you_mean
from ..base import LAYOUTS, Listed, Sample, clean_boxes
from ..classes import by_label, occurrences
from ..files import Files, expand, list_images, size_text, unique_names
from ..labels import BoxLabels
from .bdd100k_labels import Boxes, attribute_index, frames_of_folder, frames_of_json
from .bdd100k_masks import KINDS, GreyFiles, KindMasks, check_known, merging

CLASSES = (
    "pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle", "traffic light",
    "traffic sign",
)  # fmt: skip
# Names of older releases, and what the detection benchmark counts among a class (bdd100k/configs/det.toml).
RENAMED = {"person": "pedestrian", "motor": "motorcycle", "bike": "bicycle", "van": "car", "caravan": "car"}
# What the benchmark leaves out of the count: neither hit nor miss, which here is a crowd of the class.
IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
# Attributes of the whole image; "undefined" is the set's word for one that is not labelled.
ATTRIBUTES = {
    "weather": ("rainy", "snowy", "clear", "overcast", "partly cloudy", "foggy"),
    "scene": ("tunnel", "residential", "parking lot", "city street", "gas stations", "highway"),
    "timeofday": ("daytime", "night", "dawn/dusk"),
}
_LABELS = {
    "official": ("labels/det_20/det_{split}.json", "labels/bdd100k_labels_images_{split}.json"),
    "per_image": ("det_annotations/{split}",),
}


@LAYOUTS.register("bdd100k")
class BDD100K(Listed):
    """BDD100K: driving frames with boxes, masks of one kind or several, and attributes of the whole image.

    The labels are ``det`` (boxes); ``seg`` (masks of one kind) or ``drivable``, ``lane``, ``sem_seg`` (a list
    of kinds); ``weather``, ``scene``, ``timeofday`` (attributes). Any image may lack any of them.

    root: the folder of the set.
    split: ``train`` or ``val``.
    tree: ``official`` (``images/100k/<split>``, ``labels/det_20/det_<split>.json`` or the older
        ``labels/bdd100k_labels_images_<split>.json``, ``labels/<kind>/masks/<split>``), ``per_image``
        (``images/<split>``, ``det_annotations/<split>/*.json``, ``da_seg_annotations/<split>``,
        ``ll_seg_annotations/<split>``, as YOLOP and HybridNets have them), or ``auto``: what the root looks
        like.
    masks: the kind of masks. ``drivable``: direct, alternative, background; of ``per_image`` background,
        drivable (every value but 0, as the named networks read them). ``lane``: eight kinds of markings and
        background; of ``per_image`` background, lane. ``sem_seg`` (``official``): 19 classes, 255 is ignored.
        One kind gives the label ``seg``; a list, e.g. ``[drivable, lane]``, gives labels that are called like
        the kinds. None: no masks. ``sem_seg`` is of images of ``images/10k``, the default with it alone;
        beside other kinds the default is ``images/100k``, and its images without a ``sem_seg`` mask are not
        labelled for that (for all of the 10k, list the layout a second time).
    attributes: what of the whole image to classify, as a list: ``weather`` (rainy, snowy, clear, overcast,
        partly cloudy, foggy), ``scene`` (tunnel, residential, parking lot, city street, gas stations,
        highway), ``timeofday`` (daytime, night, dawn/dusk). What the labels call undefined is not labelled.
        Default: none.
    boxes: False for no boxes.
    det_classes: classes to detect, in this order; others are left out. Default: the ten of the benchmark,
        merged.
    det_merge: detection class -> the name it goes under, e.g. ``{car: vehicle, bus: vehicle}``.
    seg_merge: the same for the classes of the masks, e.g. ``{direct: drivable, alternative: drivable}``. With
        a list of ``masks`` by kind: ``{drivable: {direct: drivable, alternative: drivable}}``.
    size: width and height in pixels of the images that the boxes refer to. An image of another size with
        boxes is an error.
    images, labels, mask_files: paths instead of those of ``tree``, relative to ``root``; ``{split}`` in them
        is filled in. With a list of ``masks``, ``mask_files`` is a mapping from kinds to paths.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    Older category names count as the new ones: person: pedestrian, motor: motorcycle, bike: bicycle, van and
    caravan: car. Crowds are marked as such, and so are other person (as pedestrian), other vehicle (car) and
    trailer (truck), which the benchmark ignores, unless ``det_merge`` names them. Other categories are left
    out unless ``det_classes`` or ``det_merge`` name them. An image that the labels do not name, or without a
    mask file, is not labelled for that task; one that they name without objects is labelled and empty. Raises
    UserError for whatever is wrong in options, labels or files.
    """

    def __init__(
        self,
        *,
        root: str,
        split: str = "train",
        tree: str = "auto",
        masks: str | Sequence[str] | None = None,
        attributes: Sequence[str] = (),
        boxes: bool = True,
        det_classes: Sequence[str] | None = None,
        det_merge: Mapping[str, str] | None = None,
        seg_merge: Mapping[str, str] | Mapping[str, Mapping[str, str]] | None = None,
        size: Sequence[int] = (1280, 720),
        images: str | None = None,
        labels: str | None = None,
        mask_files: str | Mapping[str, str] | None = None,
        cache: str | None = None,
    ):
        super().__init__()
        self.root, self.split = expand(root, "root"), split
        if not os.path.isdir(self.root):
            raise UserError(f"root: folder '{self.root}' does not exist; check the path")
        tree = _tree(tree, self.root)
        kinds = _mask_kinds(masks, tree)
        _check_attributes(attributes)
        of_boxes, of_masks = det_classes or det_merge, seg_merge or mask_files
        _check_options(kinds, boxes, size, of_boxes, labels, of_masks, attributes)
        self.size = tuple(size)
        of_10k = set(kinds.values()) == {"sem_seg"}
        usual = "images/{split}" if tree == "per_image" else f"images/{'10k' if of_10k else '100k'}/{{split}}"
        self.images = self._place(images, "images", usual)
        cache = None if cache is None else expand(cache, "cache")
        self.files = (GreyFiles if tree == "per_image" else Files)(cache)
        self.names = list_images(self.images, "images")
        stems = [os.path.splitext(name)[0] for name in self.names]
        self._labelled = np.zeros(len(stems), bool)  # with boxes
        self._attributes: dict[str, np.ndarray] = {}
        if boxes or attributes:
            path = self._place(labels, "labels", *_LABELS[tree])
            found = self._read_labels(path, tree, stems, boxes, attributes)
            if boxes:
                self._pack(found, det_classes, merging(det_merge, "det_merge"))
        self.masks: dict[str, KindMasks] = {}
        self._open_masks(kinds, tree, seg_merge, mask_files)

    def _place(self, given: str | None, option: str, *usual: str) -> str:
        """The first path that is there, of the one given or the usual ones; the first where none is."""
        paths = [expand(path, option, self.root) for path in ([given] if given else usual)]
        paths = [path.replace("{split}", self.split) for path in paths]
        return next((path for path in paths if os.path.exists(path)), paths[0])

    def read(self, index: int) -> Sample:
        self._check_index(index)
        path = os.path.join(self.images, self.names[index])
        sample = Sample(self.files.image(path))
        for label, masks in self.masks.items():
            if self.gives(label) and masks.there[index]:
                stem = os.path.splitext(self.names[index])[0]
                sample.labels[label] = masks.read(self.files, stem, path, sample.image)
        if self.gives("det") and self._labelled[index]:
            sample.labels["det"] = self._objects(index, path, sample.image)
        for label, values in self._attributes.items():
            if self.gives(label) and values[index] >= 0:
                sample.labels[label] = int(values[index])
        return sample

    def _objects(self, index: int, image_path: str, image: np.ndarray) -> BoxLabels:
        if image.shape[1::-1] != self.size:
            raise UserError(
                f"image '{image_path}' is {size_text(image)}, but its boxes are of images of "
                f"{self.size[0]}x{self.size[1]} pixels (width x height); undo the resizing, or set `size` to "
                "what the labels refer to"
            )
        rows = slice(self._first[index], self._first[index + 1])
        return BoxLabels(*(array[rows].copy() for array in (self._boxes, self._classes, self._crowd)))

    def _open_masks(self, kinds: Mapping[str, str], tree: str, seg_merge: Any, mask_files: Any) -> None:
        """Find the masks of every label. Raises UserError for a label of which no image has one."""
        single = "seg" in kinds
        merges = {"seg": seg_merge} if single else by_label(seg_merge or {}, kinds, "seg_merge")
        places = {"seg": mask_files} if single else by_label(mask_files or {}, kinds, "mask_files")
        for label, name in kinds.items():
            kind, suffix = KINDS[tree][name], "" if single else f".{label}"
            folder = self._place(places.get(label), f"mask_files{suffix}", kind.folder)
            masks = KindMasks(name, kind, folder, merges.get(label), suffix)
            what = "a mask" if single else f"a mask of '{label}'"
            self._count(f"images without {what} (not labelled)", masks.find(self.names, self.images))
            self.masks[label] = masks
            self.add_label(label, "semantic", masks.names)

    def _read_labels(
        self, path: str, tree: str, stems: list[str], boxes: bool, attributes: Sequence[str]
    ) -> Boxes:
        """Read what the label files say of each image; the attributes are packed at once."""
        if tree == "official":
            frames, others = frames_of_json(path, stems)
            self._count("frames without an image (passed over)", others)
        else:
            frames = frames_of_folder(path, stems)
        found, named = Boxes(path), np.zeros(len(stems), bool)
        values = {name: np.full(len(stems), -1, np.int8) for name in attributes}
        for image, frame in enumerate(frames):
            named[image] = frame is not None
            if boxes:
                found.add(frame.labels if frame else [], stems[image])
            for name in attributes if frame else ():
                where = f"'{stems[image]}' in '{path}'"
                values[name][image] = attribute_index(frame, name, ATTRIBUTES[name], where)
        if not named.any():
            otherwise = "set `boxes: false`" if boxes else "leave `attributes` out"
            raise UserError(
                f"labels: '{path}' has none of the images of '{self.images}' ('{self.names[0]}', ...); check "
                f"`split`, `images` and `labels`, or {otherwise}"
            )
        if boxes:
            self._labelled = named
            self._count("images without labels of boxes (not labelled)", (~named).sum())
        self._pack_attributes(values, path)
        return found

    def _pack_attributes(self, values: Mapping[str, np.ndarray], path: str) -> None:
        for name, indices in values.items():
            if (indices < 0).all():
                raise UserError(f"attributes: '{path}' says the {name} of no image; leave it out of the list")
            self._count(f"images without '{name}' (not labelled)", (indices < 0).sum())
            self.add_label(name, "classification", ATTRIBUTES[name])
            self.seen[name] = occurrences(indices, len(ATTRIBUTES[name]))
        self._attributes = dict(values)

    def _pack(self, found: Boxes, wanted: Sequence[str] | None, merge: Mapping[str, str]) -> None:
        """All boxes as arrays; those of image i are rows first[i] to first[i+1]."""
        categories = found.categories
        names, class_of = _detected(set(categories), wanted, merge)
        self.add_label("det", "detection", names)
        classes = np.array([class_of.get(name, -1) for name in categories], dtype=np.int64)
        ignored = {name for name in IGNORED if name not in merge}
        crowd = np.array(found.crowds, dtype=bool)
        crowd |= np.array([name in ignored for name in categories], dtype=bool)
        strange = set(categories) - class_of.keys() - {*CLASSES, *RENAMED, *IGNORED, *merge}
        lost = sum(name in strange for name in categories)
        self._count("boxes of categories that are not of BDD100K (left out)", lost)
        chosen = classes >= 0
        boxes = np.array(found.corners, dtype=np.float32).reshape(-1, 4)
        clipped, keep, faults = clean_boxes(boxes[chosen], *self.size)
        self.faults += faults
        chosen[chosen] = keep
        self._first = np.concatenate([[0], np.cumsum(chosen)])[found.first]
        self._boxes, self._classes, self._crowd = clipped[keep], classes[chosen], crowd[chosen]
        self.seen["det"] = occurrences(self._classes, len(names), self._crowd)

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
    there = {place for place in sum(marks.values(), ()) if os.path.isdir(os.path.join(root, place))}
    found = [name for name, places in marks.items() if there.intersection(places)]
    if len(found) == 1:
        return found[0]
    neither = "neither 'labels' and 'images/100k' nor 'det_annotations' or 'da_seg_annotations'"
    what = "both trees" if found else neither
    raise UserError(f"tree: '{root}' has {what}; set `tree` to official or per_image, or correct `root`")


def _mask_kinds(masks: Any, tree: str) -> dict[str, str]:
    """Label name -> the kind of its masks."""
    if masks is None:
        return {}
    kinds = list(masks) if isinstance(masks, (list, tuple)) and masks else [masks]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in KINDS[tree]:
            known = f"{', '.join(KINDS[tree])}, and null for none"
            raise UserError(f"masks: the {tree} tree has no '{kind}' masks; known: {known}")
        if kinds.count(kind) > 1:
            raise UserError(f"masks: '{kind}' is there twice; remove one")
    return {"seg": masks} if isinstance(masks, str) else {kind: kind for kind in kinds}


def _check_attributes(given: Any) -> None:
    if not isinstance(given, (list, tuple)):
        raise UserError(f"attributes: a list of {', '.join(ATTRIBUTES)} is needed, not {given!r}")
    for name in given:
        if not isinstance(name, str) or name not in ATTRIBUTES:
            raise UserError(f"attributes: '{name}' is unknown; {did_you_mean(name, ATTRIBUTES)}")
        if given.count(name) > 1:
            raise UserError(f"attributes: '{name}' is there twice; remove one")


def _check_options(
    kinds: Any, boxes: bool, size: Any, of_boxes: Any, labels: Any, of_masks: Any, attributes: Any
) -> None:
    if not kinds and not boxes and not attributes:
        raise UserError(
            "masks: with `boxes: false` and no masks nothing is labelled; set `masks` or `attributes`"
        )
    if not kinds and of_masks:
        raise UserError(
            "masks: `seg_merge` and `mask_files` have no use without it; set `masks`, or remove them"
        )
    if not boxes and (of_boxes or (labels and not attributes)):
        raise UserError(
            "boxes: false leaves `det_classes`, `det_merge` and `labels` without use; remove them"
        )
    pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not pair or not all(type(n) is int and n > 0 for n in size):
        raise UserError(f"size: width and height in whole pixels are needed, e.g. [1280, 720], not {size!r}")


def _detected(
    seen: set[str], wanted: Sequence[str] | None, merge: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names, and category of the labels -> class; what is left out is not in it."""
    known = {*CLASSES, *RENAMED, *IGNORED, *seen}
    check_known(merge, known, "det_merge")
    usual = [merge.get(name, name) for name in CLASSES] + list(merge.values())
    name_of = {}
    for category in known:
        current = (RENAMED | IGNORED).get(category, category)
        name_of[category] = merge.get(category, merge.get(current, current))
    names = unique_names(list(dict.fromkeys(usual)) if wanted is None else wanted, "det_classes")
    check_known(names, set(name_of.values()), "det_classes")
    return names, {category: names.index(name) for category, name in name_of.items() if name in names}
