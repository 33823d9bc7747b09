"""COCO's panoptic form: every pixel belongs to one segment, a thing or stuff; from it a mask and the things'
boxes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ...batch import IGNORE
from ...errors import UserError
from ..base import LAYOUTS
from ..classes import Choice, choose, occurrences
from ..files import expand, require_files, require_same_size
from ..labels import BoxLabels
from .coco import (
    Described,
    Entry,
    category_entries,
    check_object,
    check_reference,
    entries,
    image_entries,
    sections,
)


@LAYOUTS.register("coco_panoptic")
class CocoPanoptic(Described):
    """Images, boxes and masks from a COCO panoptic JSON and its PNGs.

    A pixel's colour is the id of its segment, R + 256 G + 65536 B; ``segments_info`` gives each id its
    category. Pixels of id 0 are ignored. Segments of things are the boxes, crowds among them as crowds. An
    image without an annotation counts as unlabelled.

    images: folder that the ``file_name`` of ``images`` are relative to. Read without EXIF orientation.
    annotations: the panoptic JSON.
    masks: folder of the panoptic PNGs, which the ``file_name`` of ``annotations`` are relative to.
    seg_classes: categories to segment, things and stuff, in this order: a list of names; a mapping from the
        name of a class to the category or list of categories merged into it; or the path of a JSON file with
        either. Pixels of other categories are ignored. Default: all, by category id.
    det_classes: things to detect, chosen or merged likewise; others are left out. Default: all categories
    with ``isthing``.
    root: what relative ``images``, ``annotations``, ``masks`` and class files are relative to.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    Paths may hold ``$VAR``, ``${VAR}`` and ``~``. Raises UserError for whatever is wrong in options, JSON or
    files.
    """

    def __init__(
        self,
        *,
        images: str,
        annotations: str,
        masks: str,
        seg_classes: Choice | None = None,
        det_classes: Choice | None = None,
        root: str = "",
        cache: str | None = None,
    ):
        super().__init__(images, annotations, root, cache)
        self.masks = expand(masks, "masks", root)
        listed, described, categories = _read_index(self.path)
        names = {key: category["name"] for key, category in categories.items()}
        things = {key: name for key, name in names.items() if categories[key]["isthing"]}
        seg = choose(seg_classes, list(names.values()), "seg_classes", root)
        if len(seg) > IGNORE:
            raise UserError(
                f"seg_classes: {len(seg)} do not fit in a mask of bytes; name or merge to at most {IGNORE}"
            )
        self.add_label("seg", "semantic", tuple(seg))
        det: dict[str, tuple[str, ...]] = {}
        if things or det_classes is not None:
            det = choose(
                det_classes,
                list(things.values()),
                "det_classes",
                root,
                what="thing (a category with isthing: 1)",
            )
            self.add_label("det", "detection", tuple(det))
        self._list(list(listed.values()))
        self._mask_names = [described[key]["file_name"] if key in described else None for key in listed]
        hint = f"'{self.path}' names them: restore them or correct `masks`"
        require_files(self.masks, [name for name in self._mask_names if name], "masks", hint)
        if lacking := self._mask_names.count(None):
            self.faults["images without an annotation (used without labels)"] += lacking
        objects = [described[key]["segments_info"] if key in described else [] for key in listed]
        self._pack_boxes(objects, _values(things, det))
        self._pack_segments(objects, _values(names, seg))

    def _pack_segments(self, objects: list[list[Entry]], value_of: dict[Any, int]) -> None:
        """Segment ids and their mask values as two arrays; those of image i are rows at[i] to at[i+1], by
        rising id, 0 first."""
        ids, values, at = [], [], [0]
        for found in objects:
            mine = sorted((entry["id"], value_of.get(entry["category_id"], IGNORE)) for entry in found)
            ids += [0, *(key for key, _ in mine)]
            values += [IGNORE, *(value for _, value in mine)]
            at.append(len(ids))
        self._ids, self._values, self._at = np.array(ids, np.uint32), np.array(values, np.uint8), np.array(at)
        self.seen["seg"] = occurrences(self._values, len(self.classes["seg"]), self._values == IGNORE)

    def _masks(self, index: int, image_path: str, image: np.ndarray) -> dict[str, np.ndarray]:
        name = self._mask_names[index]
        if name is None or not self.gives("seg"):
            return {}
        path = os.path.join(self.masks, name)
        colours = self.files.image(path)
        require_same_size(colours, path, image, image_path)
        rows = slice(self._at[index], self._at[index + 1])
        ids, values = self._ids[rows], self._values[rows]
        pixels = segment_ids(colours)
        place = np.searchsorted(
            ids[:-1], pixels
        )  # a pixel above all known ids finds the last, which it is not
        unknown = ids[place] != pixels
        if unknown.any():
            raise UserError(
                f"mask '{path}' has segment id {pixels[unknown].min()} (R + 256 G + 65536 B), which the "
                f"segments_info of "
                f"'{self.names[index]}' in '{self.path}' does not have; a panoptic PNG made with this JSON "
                f"is needed"
            )
        return {"seg": values[place]}

    def _objects(self, index: int) -> BoxLabels | None:
        return None if self._mask_names[index] is None else super()._objects(index)


def segment_ids(colours: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3] -> uint32 [H,W]: R + 256 G + 65536 B."""
    padded = np.zeros((*colours.shape[:2], 4), dtype=np.uint8)
    padded[..., :3] = colours
    return padded.view("<u4")[..., 0]


def _values(names: dict[Any, str], classes: dict[str, tuple[str, ...]]) -> dict[Any, int]:
    """Category id -> index of the class that its name is part of; ids of no class are left out."""
    index_of = {part: index for index, parts in enumerate(classes.values()) for part in parts}
    return {key: index_of[name] for key, name in names.items() if name in index_of}


def _read_index(path: str) -> tuple[dict[Any, Entry], dict[Any, Entry], dict[Any, Entry]]:
    """Images by id, their annotations by image id, categories by id. Raises UserError for what the layout
    cannot use."""
    data = sections(path, "panoptic")
    images, categories = image_entries(data, path), category_entries(data, path, "isthing")
    if wrong := [entry for entry in categories.values() if entry["isthing"] not in (0, 1)]:
        raise UserError(
            f"annotations: category '{wrong[0]['name']}' in '{path}': isthing must be 0 or 1; correct it"
        )
    described = entries(data, "annotations", ("image_id", "file_name", "segments_info"), path, key="image_id")
    for key, entry in described.items():
        check_reference(
            entry, "image_id", images, "images", f"annotations: annotation of image id {key} in '{path}'"
        )
        if not isinstance(entry["segments_info"], list):
            raise UserError(
                f"annotations: segments_info of image id {key} in '{path}' is not a list; correct it"
            )
        for segment in entries(
            entry, "segments_info", ("id", "category_id"), path, also=f" of image id {key}"
        ).values():
            where = f"annotations: segment id {segment['id']} of image id {key} in '{path}'"
            if type(segment["id"]) is not int or not 0 < segment["id"] < 1 << 24:
                raise UserError(
                    f"{where}: ids of segments are whole numbers from 1 to {(1 << 24) - 1}; correct it"
                )
            check_reference(segment, "category_id", categories, "categories", where)
            if categories[segment["category_id"]]["isthing"] and "bbox" not in segment:
                raise UserError(f"{where} is a thing and has no 'bbox'; add it")
            check_object({"bbox": [0, 0, 0, 0], **segment}, categories, where)
    return images, described, categories
