"""The COCO layout: a folder of images, an instances JSON, and masks as index PNGs or drawn from the
instances.

``Described`` and the checks of a JSON's sections serve COCO's other forms too.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from ...batch import IGNORE
from ...errors import UserError, did_you_mean
from ..base import LAYOUTS, Listed, Sample, clean_boxes
from ..classes import IndexMasks, check_void, named_masks, occurrences
from ..files import Files, class_names, expand, read_json, require_files, size_text, unique_names
from ..labels import BoxLabels

Entry = dict[str, Any]  # one object of the JSON
_FAR = 1e6  # pixels; a polygon that reaches further is damaged and would take gigabytes to draw


class Described(Listed):
    """Images that a JSON lists, and their boxes as ``det``; what a subclass adds is ``_masks``."""

    def __init__(self, images: str, annotations: str, root: str, cache: str | None):
        super().__init__()
        self.images = expand(images, "images", root)
        self.path = expand(annotations, "annotations", root)
        self.files = Files(None if cache is None else expand(cache, "cache"))

    def _list(self, entries: Sequence[Entry]) -> None:
        """Take the images of the JSON, all of which must be there."""
        self.names = [entry["file_name"] for entry in entries]
        self.sizes = np.array([(entry["width"], entry["height"]) for entry in entries], dtype=np.int32)
        require_files(
            self.images, self.names, "images", f"'{self.path}' names them: restore them or correct `images`"
        )

    def read(self, index: int) -> Sample:
        self._check_index(index)
        path = os.path.join(self.images, self.names[index])
        image = self.files.image(path)
        width, height = self.sizes[index].tolist()
        if image.shape[:2] != (height, width):
            raise UserError(
                f"image '{path}' is {size_text(image)}, but '{self.path}' says {width}x{height} (width x "
                f"height); correct "
                "the JSON, or undo the resizing or rotation of the image"
            )
        sample = Sample(image, self._masks(index, path, image))
        if self.gives("det") and (objects := self._objects(index)) is not None:
            sample.labels["det"] = objects
        return sample

    def _masks(self, index: int, image_path: str, image: np.ndarray) -> dict[str, np.ndarray]:
        """By label, the masks of the image that there are and the run wants: uint8 [H,W]."""
        raise NotImplementedError

    def _objects(self, index: int) -> BoxLabels | None:
        """The objects of the image; None where it is not labelled with boxes."""
        rows = slice(self._first[index], self._first[index + 1])
        arrays = self._boxes, self._classes, self._crowd, self._area
        return BoxLabels(*(array[rows].copy() for array in arrays))

    def _pack_boxes(self, objects: list[list[Entry]], class_of: dict[Any, int]) -> None:
        """All boxes as four arrays; those of image i are rows first[i] to first[i+1]."""
        boxes, kept, first = [np.zeros((0, 4), np.float32)], [], [0]
        for (width, height), found in zip(self.sizes.tolist(), objects, strict=True):
            mine = [entry for entry in found if entry["category_id"] in class_of]
            if mine:
                clipped, keep, faults = clean_boxes(np.array([_corners(e) for e in mine]), width, height)
                self.faults += faults
                boxes.append(clipped[keep])
                kept += [entry for entry, good in zip(mine, keep, strict=True) if good]
            first.append(len(kept))
        if n := sum("area" not in entry for entry in kept):
            self.faults["boxes without an area (width x height is used)"] += n
        areas = [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in kept]
        self._first = np.array(first)
        self._boxes = np.concatenate(boxes)
        self._classes = np.array([class_of[entry["category_id"]] for entry in kept], dtype=np.int64)
        self._crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in kept], dtype=bool)
        self._area = np.array(areas, dtype=np.float32)
        if "det" in self.classes:
            self.seen["det"] = occurrences(self._classes, len(self.classes["det"]), self._crowd)


@LAYOUTS.register("coco")
class Coco(Described):
    """Images, boxes and masks described by a COCO instances JSON.

    The labels are ``det`` and ``seg``; several folders of masks give several labels, by names of your choice.

    images: folder that the JSON's ``file_name`` are relative to. Read without EXIF orientation (boxes refer
        to the stored order of pixels).
    annotations: the instances JSON. Boxes that lie outside their image or have no size are dropped and
        counted.
    masks: folder of index PNGs named like the images (``a/b.jpg`` -> ``a/b.png``), one for every image. Or a
        mapping from the names of labels to a folder each, e.g. ``{drivable: dir_a, lane: dir_b}``: an
        image without a mask in one of them is not labelled for that one. None: masks are drawn from the
        instances, larger ones first so that small ones stay visible, crowds as their class, 0 elsewhere.
    segment: False for a set with boxes only; then there are no masks.
    seg_classes: segmentation names by index, as a list, a mapping or the path of a JSON file with either.
        Needed with ``masks``. When masks are drawn: index 0 is what no instance covers and the others are
        category names (a category not listed is not drawn); default ``background`` and then the detection
        classes. Where ``masks`` is a mapping, a mapping from its names to the names by index each, which may
        have gaps.
    void: mask indices that mean "ignore"; 255 always does. Names that ``seg_classes`` gives to them are left
        out, which needs them to come after the classes. Where ``masks`` is a mapping, a mapping from its
        names to such indices, which may come anywhere.
    det_classes: category names to detect, in this order; others are left out. Default: all, by category id.
    root: what relative ``images``, ``annotations``, ``masks`` and ``seg_classes`` are relative to.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    Paths may hold ``$VAR``, ``${VAR}`` and ``~``. Raises UserError for whatever is wrong in options, JSON or
    files.
    """

    def __init__(
        self,
        *,
        images: str,
        annotations: str,
        masks: str | Mapping[str, str] | None = None,
        segment: bool = True,
        seg_classes: Sequence[str] | Mapping[int, str] | str | Mapping[str, Any] | None = None,
        void: Sequence[int] | Mapping[str, Sequence[int]] = (),
        det_classes: Sequence[str] | None = None,
        root: str = "",
        cache: str | None = None,
    ):
        _check_options(masks, segment, seg_classes, void)
        super().__init__(images, annotations, root, cache)
        listed, objects, categories = _read_index(self.path)
        det = _det_names(categories, det_classes)
        self.add_label("det", "detection", det)
        self._list(listed)
        self.masks: dict[str, IndexMasks] = {}
        if isinstance(masks, Mapping):
            self._name_masks(named_masks(masks, seg_classes, void, root, self.files))
        elif segment:
            names = ("background", *det) if seg_classes is None else class_names(seg_classes, void, root)
            self._name_mask(names, None if masks is None else expand(masks, "masks", root), void)
        self._pack_boxes(objects, {c["id"]: det.index(c["name"]) for c in categories if c["name"] in det})
        if segment and masks is None:
            self._pack_outlines(objects, _drawn(categories, self.classes["seg"]))

    def _name_mask(self, names: tuple[str, ...], folder: str | None, void: Sequence[int]) -> None:
        """The one label ``seg`` of these classes. folder: of its masks; None: they are drawn."""
        if len(names) > IGNORE:
            raise UserError(
                f"seg_classes: {len(names)} do not fit in a mask of bytes; name at most {IGNORE}, or set "
                "segment: false"
            )
        self.add_label("seg", "semantic", names)
        if folder is not None:
            indices = {name: [index] for index, name in enumerate(names)}
            self.masks["seg"] = IndexMasks(folder, self.files, indices, void)
            self.masks["seg"].require(map(_mask_name, self.names), self._mask_hint())

    def _name_masks(self, masks: dict[str, IndexMasks]) -> None:
        """A label for each of several folders, any of which may lack an image's mask."""
        if "det" in masks:
            raise UserError("masks: 'det' is what the boxes are called; give this folder another name")
        self.masks = masks
        for label, stored in masks.items():
            self.add_label(label, "semantic", stored.classes)
            if lacking := stored.find([_mask_name(name) for name in self.names], self._mask_hint()):
                self.faults[f"images without a mask of '{label}' (not labelled)"] += lacking

    def _mask_hint(self) -> str:
        return f"a mask is named like its image ('{self.names[0]}' -> '{_mask_name(self.names[0])}')"

    def _masks(self, index: int, image_path: str, image: np.ndarray) -> dict[str, np.ndarray]:
        name = _mask_name(self.names[index])
        found = {
            label: stored.read(name, image, image_path)
            for label, stored in self.masks.items()
            if self.gives(label) and stored.has(index)
        }
        if not self.masks and self.gives("seg"):
            text = self._outlines[self._outline_at[index] : self._outline_at[index + 1]]
            found["seg"] = draw(json.loads(text), image.shape[1], image.shape[0])
        return found

    def _pack_outlines(self, objects: list[list[Entry]], class_of: dict[Any, int]) -> None:
        """Every image's [[class, segmentation], ...] as JSON text, in one bytes object.

        Millions of small Python objects would be copied into every loader worker; one block is shared or sent
        whole.
        """
        parts, ends, total, lost = [], [0], 0, 0
        times = np.zeros(len(self.classes["seg"]), np.int64)
        times[0] = len(objects)  # some of every image is taken to be uncovered
        for (width, height), found in zip(self.sizes.tolist(), objects, strict=True):
            drawn: list[list[Any]] = []
            for entry in found:
                if (value := class_of.get(entry["category_id"])) is None:
                    continue
                total += 1
                if (outline := _outline(entry, width, height, self.path, self.faults)) is not None:
                    drawn.append([value, outline])
                    times[value] += 1
                else:
                    lost += 1
                    drawn += _box_outline(entry, width, height)
            parts.append(json.dumps(drawn, separators=(",", ":")).encode())
            ends.append(ends[-1] + len(parts[-1]))
        if total and lost == total:
            raise UserError(
                f"annotations: no object in '{self.path}' has a `segmentation` to draw masks from; give "
                f"`masks`, or "
                "set `segment: false` to use the boxes only"
            )
        if lost:
            self.faults["objects without an outline (their box is ignored in the mask)"] += lost
        self._outlines, self._outline_at = b"".join(parts), np.array(ends)
        self.seen["seg"] = times


def draw(outlines: list[list[Any]], width: int, height: int) -> np.ndarray:
    """uint8 [height,width]: class indices from [[class, segmentation], ...], larger areas first, 0 elsewhere."""
    rles = []
    for value, outline in outlines:
        rle = outline
        if isinstance(outline, list):
            rle = mask_utils.merge(mask_utils.frPyObjects(outline, height, width))
        elif isinstance(outline["counts"], list):
            rle = mask_utils.frPyObjects(outline, height, width)
        rles.append((int(mask_utils.area(rle)), value, rle))
    mask = np.zeros((height, width), dtype=np.uint8, order="F")  # the order of decoded RLE
    for _, value, rle in sorted(rles, key=lambda item: -item[0]):
        np.copyto(mask, np.uint8(value), where=mask_utils.decode(rle).view(bool))
    return np.ascontiguousarray(mask)


def _mask_name(image_name: str) -> str:
    return os.path.splitext(image_name)[0] + ".png"


def _corners(entry: Entry) -> tuple[float, float, float, float]:
    x, y, width, height = entry["bbox"]
    return x, y, x + width, y + height


def _check_options(masks: Any, segment: bool, seg_classes: Any, void: Any) -> None:
    if not segment and (masks is not None or seg_classes is not None or void):
        raise UserError("segment: false leaves `masks`, `seg_classes` and `void` without use; remove them")
    if masks is None and void:
        raise UserError("void: masks drawn from instances have no void index; give `masks`, or remove `void`")
    if masks is not None and seg_classes is None:
        raise UserError(
            "seg_classes: `masks` needs the names of its indices; give a list or the path of a JSON file"
        )
    if not isinstance(masks, Mapping):
        check_void(void)


def _det_names(categories: list[Entry], wanted: Sequence[str] | None) -> tuple[str, ...]:
    known = [category["name"] for category in categories]
    for name in unique_names(known if wanted is None else wanted, "det_classes"):
        if name not in known:
            raise UserError(f"det_classes: no category is called '{name}'; {did_you_mean(name, known)}")
    return tuple(known if wanted is None else wanted)


def _drawn(categories: list[Entry], names: tuple[str, ...]) -> dict[Any, int]:
    """Category id -> the mask index to draw it with. Raises UserError for a name that is no category."""
    known = [category["name"] for category in categories]
    for name in names[1:]:
        if name not in known:
            raise UserError(
                f"seg_classes: masks are drawn from the instances, and no category is called '{name}'; "
                f"{did_you_mean(name, known)} (index 0 is what no instance covers)"
            )
    return {
        category["id"]: names.index(category["name"]) for category in categories if category["name"] in names
    }


def _read_index(path: str) -> tuple[list[Entry], list[list[Entry]], list[Entry]]:
    """Images; for each of them its annotations; categories by id. Raises UserError for what the layout cannot
    use."""
    data = sections(path, "instances")
    images, categories = image_entries(data, path), category_entries(data, path)
    objects = entries(data, "annotations", ("id", "image_id", "category_id", "bbox"), path)
    of_image: dict[Any, list[Entry]] = {key: [] for key in images}
    for key, entry in objects.items():
        where = f"annotations: annotation id {key} in '{path}'"
        check_reference(entry, "image_id", images, "images", where)
        check_object(entry, categories, where)
        of_image[entry["image_id"]].append(entry)
    return list(images.values()), list(of_image.values()), list(categories.values())


def sections(path: str, kind: str) -> Entry:
    """A COCO JSON of some ``kind``, with its three sections. Raises UserError."""
    data = read_json(path, "annotations")
    lacking = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(data, dict) or key not in data
    ]
    if lacking:
        raise UserError(
            f"annotations: '{path}' has no {' and no '.join(map(repr, lacking))}; a COCO {kind} JSON is "
            f"needed"
        )
    for section in ("images", "annotations", "categories"):
        if not isinstance(data[section], list):
            raise UserError(
                f"annotations: '{section}' in '{path}' is not a list; a COCO {kind} JSON is needed"
            )
        if not data[section] and section != "annotations":
            raise UserError(f"annotations: '{path}' lists no {section}")
    return data


def image_entries(data: Entry, path: str) -> dict[Any, Entry]:
    """The images of a COCO JSON by id."""
    images = entries(data, "images", ("id", "file_name", "width", "height"), path)
    for entry in images.values():
        if not all(type(entry[key]) is int and entry[key] > 0 for key in ("width", "height")):
            raise UserError(
                f"annotations: image id {entry['id']} in '{path}': width and height must be whole numbers of "
                f"pixels; correct them"
            )
    return images


def category_entries(data: Entry, path: str, *more: str) -> dict[Any, Entry]:
    """The categories of a COCO JSON by id, in the order of ids; each has the keys ``more`` besides id and
    name."""
    found = entries(data, "categories", ("id", "name", *more), path)
    by_id = sorted(found.values(), key=lambda entry: (isinstance(entry["id"], str), entry["id"]))
    unique_names([entry["name"] for entry in by_id], f"annotations: categories of '{path}'")
    return {entry["id"]: entry for entry in by_id}


def entries(
    data: Entry, section: str, needed: tuple[str, ...], path: str, key: str = "id", also: str = ""
) -> dict[Any, Entry]:
    """A section of the JSON by ``key``, each entry with the ``needed`` keys. also: what else to say of the
    section's place."""
    found: dict[Any, Entry] = {}
    for place, entry in enumerate(data[section]):
        where = f"annotations: {section}[{place}]{also} in '{path}'"
        lacking = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if lacking:
            raise UserError(f"{where} has no '{lacking[0]}'; {_other_kind(entry, lacking[0])}")
        for name in needed:
            if name.endswith(("id", "name")) and not isinstance(
                entry[name], str if name.endswith("name") else int | str
            ):
                raise UserError(
                    f"{where}: '{name}' is {entry[name]!r}; ids are numbers or strings, names are strings"
                )
        if found.setdefault(entry[key], entry) is not entry:
            raise UserError(
                f"{where} has {key} {entry[key]!r} a second time; ids must be unique: renumber or remove one"
            )
    return found


def _other_kind(entry: Any, lacking: str) -> str:
    """What to do about a key that an entry lacks."""
    if isinstance(entry, dict) and "segments_info" in entry:
        return "this is a panoptic JSON, an instances JSON is needed; the layout coco_panoptic reads panoptic ones"
    if lacking in ("segments_info", "isthing"):
        return "a panoptic JSON is needed; the layout coco reads instances JSONs"
    return "add it"


def check_reference(entry: Entry, field: str, known: Mapping[Any, Any], section: str, where: str) -> None:
    """Raise UserError unless the id in ``field`` is in a section of the JSON."""
    if entry[field] not in known:
        raise UserError(
            f"{where} has {field} {entry[field]!r}, which is not in '{section}'; remove the annotation or "
            f"add the entry"
        )


def check_object(entry: Entry, categories: Mapping[Any, Any], where: str) -> None:
    """Raise UserError unless an object's category is known and its box, area and iscrowd are what they should
    be."""
    check_reference(entry, "category_id", categories, "categories", where)
    if not (
        _numbers(entry["bbox"], 4)
        and _numbers([area := entry.get("area", 0)])
        and abs(area) < 1e12
        and entry.get("iscrowd", 0) in (0, 1)
    ):
        raise UserError(
            f"{where}: bbox must be [x, y, width, height], area a finite number, iscrowd 0 or 1; correct it"
        )


def _numbers(values: Any, count: int | None = None) -> bool:
    """Whether ``values`` is a list (of ``count``) numbers, finite or not."""
    if not isinstance(values, list) or count not in (None, len(values)):
        return False
    return all(type(value) in (int, float) for value in values)


def _outline(entry: Entry, width: int, height: int, path: str, faults: Counter[str]) -> Any:
    """The ``segmentation`` as given, less unusable polygons; None when there is none. Raises UserError when
    damaged."""
    outline = entry.get("segmentation")
    where = f"annotations: the segmentation of annotation id {entry['id']} in '{path}'"
    if isinstance(outline, dict):
        if outline.get("size") != [height, width]:
            raise UserError(
                f"{where} has size {outline.get('size')}, its image [{height}, {width}]; correct one"
            )
        if _rle_length(outline.get("counts")) != height * width:
            raise UserError(
                f"{where} is damaged: its run lengths do not add up to {height} x {width}; make it anew"
            )
        return outline
    polygons = [] if outline is None else outline
    if not isinstance(polygons, list) or not all(_numbers(polygon) for polygon in polygons):
        raise UserError(f"{where} is neither polygons [[x, y, x, y, ...], ...] nor RLE; make it anew")
    # pycocotools takes four numbers for a box, not for a polygon of two points.
    usable = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not all(-_FAR < value < _FAR for polygon in usable for value in polygon):
        raise UserError(f"{where} has coordinates that are no pixels; correct them")
    if len(usable) < len(polygons):
        faults["polygons of fewer than three points (dropped)"] += len(polygons) - len(usable)
    return usable or None


def _box_outline(entry: Entry, width: int, height: int) -> list[list[Any]]:
    """The box of an object without an outline, to be ignored: nobody knows which of its pixels are the
    object's."""
    boxes, keep, _ = clean_boxes(np.array([_corners(entry)]), width, height)
    x1, y1, x2, y2 = boxes[0].tolist()
    return [[IGNORE, [[x1, y1, x2, y1, x2, y2, x1, y2]]]] if keep[0] else []


def _rle_length(counts: Any) -> int:
    """Sum of an RLE's run lengths, -1 when they are damaged. pycocotools decodes too few of them to random
    memory.

    Compressed: base-64 digits of 5 bits and a "more" bit, least first; from the fourth run on, the difference
    to the run two before (the format of cocodataset/cocoapi, maskApi.c, rleToString).
    """
    if isinstance(counts, list):
        return sum(counts) if all(type(count) is int and count >= 0 for count in counts) else -1
    if not isinstance(counts, str) or not counts:
        return -1
    digits = np.array([ord(letter) - 48 for letter in counts])
    last = (digits & 32) == 0
    if digits.min() < 0 or digits.max() > 63 or not last[-1]:
        return -1
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:
        return -1
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((digits & 31) << shifts, starts)
    runs -= np.where(digits[ends] & 16, 32 << shifts[ends], 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return int(runs.sum()) if runs.min() >= 0 else -1
