"""The Pascal VOC layout: a folder of images, an XML of boxes for each, masks as palette PNGs for all or some."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np

from ...batch import IGNORE
from ...errors import UserError, did_you_mean
from ..base import LAYOUTS, Listed, Sample, clean_boxes
from ..classes import occurrences
from ..files import (
    Files,
    class_names,
    expand,
    image_size,
    list_files,
    list_images,
    read_bytes,
    read_lines,
    require_same_size,
    size_text,
)
from ..labels import BoxLabels

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
DIFFICULT = ("ignore", "keep", "drop")
_FAR = 1e9  # pixels; a coordinate or size beyond is damaged


@LAYOUTS.register("voc")
class Voc(Listed):
    """Images, boxes and masks in the folders of a Pascal VOC development kit.

    An image without an XML in Annotations has no boxes, one without a PNG in SegmentationClass no mask: it is
    not labelled for that task. Mask indices are the values of the palette PNG, 255 is void.

    root: the folder that holds JPEGImages, Annotations, SegmentationClass and ImageSets, e.g.
    ``VOCdevkit/VOC2012``.
    split: a list in ImageSets, e.g. ``Main/train`` or ``Segmentation/val``; a name alone is one of Main, or
        of Segmentation where ``boxes`` is false. None: every image in JPEGImages.
    boxes: False for masks only. Boxes outside their image or of no size are dropped and counted.
    masks: False for boxes only.
    det_classes: object names to detect, in this order, as a list or the path of a file with a name a line
        (.txt) or of a JSON file. A leading ``background`` is passed over, so that one file names masks and
        boxes. Objects of other names are left out and counted. Default: the 20 of VOC, and another name is an
        error.
    seg_classes: segmentation names by index, in the same forms; ``_background_`` is read as ``background``.
        Default: ``background`` and the 20 of VOC.
    difficult: objects marked as such are to ``ignore`` (finding one is neither right nor wrong, as VOC
        evaluates), ``keep`` like others, or ``drop`` (there, all is background).
    one_based: coordinates count pixels from 1 and the last one is inside the box, as in VOC. False for tools
        that write edges in pixels from 0 (labelme): they are used as they stand.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    Paths may hold ``$VAR``, ``${VAR}`` and ``~``; class files are relative to ``root``. Raises UserError for
    whatever is wrong in options or files; an XML with a DOCTYPE is refused, since its entities may fill the
    memory.
    """

    def __init__(
        self,
        *,
        root: str,
        split: str | None = None,
        boxes: bool = True,
        masks: bool = True,
        det_classes: Sequence[str] | str | None = None,
        seg_classes: Sequence[str] | Mapping[int, str] | str | None = None,
        difficult: str = "ignore",
        one_based: bool = True,
        cache: str | None = None,
    ):
        super().__init__()
        _check_options(boxes, masks, det_classes, seg_classes, difficult)
        self.root = expand(root, "root")
        self.files = Files(None if cache is None else expand(cache, "cache"))
        image_of = self._images()
        keys = list(image_of) if split is None else self._listed(split, boxes, image_of)
        self.names = [image_of[key] for key in keys]
        if boxes:
            names = CLASSES if det_classes is None else _det_names(det_classes, self.root)
            self.add_label("det", "detection", names)
            self._xmls = self._labels("boxes", "Annotations", ".xml", keys)
            self._pack_boxes(difficult, one_based, closed=det_classes is None)
        if masks:
            usual = ("background", *CLASSES)
            names = usual if seg_classes is None else _names(seg_classes, (), self.root, "seg_classes")
            self.add_label("seg", "semantic", names)
            self._pngs = self._labels("masks", "SegmentationClass", ".png", keys)

    def read(self, index: int) -> Sample:
        self._check_index(index)
        path = self._path("JPEGImages", self.names[index])
        sample = Sample(self.files.image(path))
        if self.gives("seg") and self._pngs[index]:
            mask_path = self._path("SegmentationClass", self._pngs[index])
            sample.labels["seg"] = self._mask(mask_path, path, sample.image)
        if self.gives("det") and self._xmls[index]:
            sample.labels["det"] = self._objects(index, path, sample.image)
        return sample

    def _objects(self, index: int, image_path: str, image: np.ndarray) -> BoxLabels:
        width, height = self._sizes[index].tolist()
        if image.shape[:2] != (height, width):
            xml = self._path("Annotations", self._xmls[index])
            raise UserError(
                f"image '{image_path}' is {size_text(image)}, but '{xml}' says {width}x{height} (width x "
                "height); correct the XML, or undo the resizing or rotation of the image"
            )
        rows = slice(self._first[index], self._first[index + 1])
        return BoxLabels(*(array[rows].copy() for array in (self._boxes, self._classes, self._crowd)))

    def _path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    def _mask(self, path: str, image_path: str, image: np.ndarray) -> np.ndarray:
        mask = self.files.mask(path)
        require_same_size(mask, path, image, image_path, kind="labels")
        unknown = (mask >= len(self.classes["seg"])) & (mask != IGNORE)
        if unknown.any():
            raise UserError(
                f"mask '{path}' has index {mask[unknown].min()}, but the segmentation classes are 0 to "
                f"{len(self.classes['seg']) - 1}; name it in `seg_classes`, or make it 255 to ignore it"
            )
        return mask

    def _images(self) -> dict[str, str]:
        """The images' names by what their labels are called: the name without its ending."""
        if not os.path.isdir(folder := self._path("JPEGImages")):
            hint = "`root` is the folder that holds JPEGImages, e.g. VOCdevkit/VOC2012"
            raise UserError(f"root: folder '{folder}' does not exist; {hint}")
        return _by_key(list_images(folder, "root"), folder, "root")

    def _listed(self, split: str, boxes: bool, known: Mapping[str, str]) -> list[str]:
        """The keys in a list of ImageSets. Raises UserError naming the line of one that is not known."""
        if not isinstance(split, str) or not split:
            raise UserError(
                f"split: the name of a list in ImageSets is needed, e.g. Main/train, not {split!r}"
            )
        sets = Path(self._path("ImageSets"))
        name = split if "/" in split else f"{'Main' if boxes else 'Segmentation'}/{split}"
        path = str(sets / f"{name}.txt")
        if not os.path.isfile(path):
            there = [found.relative_to(sets).with_suffix("").as_posix() for found in sets.glob("*/*.txt")]
            raise UserError(f"split: file '{path}' does not exist; {did_you_mean(name, there)}")
        line_of: dict[str, int] = {}
        for number, key in enumerate(read_lines(path, "split"), 1):
            if key and key not in known:
                images = self._path("JPEGImages")
                raise UserError(
                    f"split: '{path}', line {number}: '{key}' has no image in '{images}'; restore the image "
                    f"or "
                    "remove the line (needed is a name a line, without ending)"
                )
            if key and line_of.setdefault(key, number) != number:
                raise UserError(
                    f"split: '{path}', line {number}: '{key}' is in line {line_of[key]} already; remove one"
                )
        if not line_of:
            raise UserError(f"split: '{path}' lists no images")
        return list(line_of)

    def _labels(self, option: str, folder: str, ending: str, keys: list[str]) -> list[str]:
        """For each key its file in ``folder``, "" where there is none. Raises UserError when there is none at
        all."""
        where = self._path(folder)
        file_of = _by_key(list_files(where, option, (ending,), "labels"), where, option)
        found = [file_of.get(key, "") for key in keys]
        if not any(found):
            raise UserError(
                f"{option}: none of the {len(keys)} images has a file in '{where}' (a label is named like "
                f"its image: "
                f"'{self.names[0]}' -> '{keys[0]}{ending}'); choose another `split`, or set `{option}: false`"
            )
        return found

    def _pack_boxes(self, difficult: str, one_based: bool, closed: bool) -> None:
        """All boxes as arrays; those of image i are rows first[i] to first[i+1].

        closed: a name that is not among the classes is an error.
        """
        class_of = {name: index for index, name in enumerate(self.classes["det"])}
        sizes, boxes, classes, crowd, first, others = [], [np.zeros((0, 4), np.float32)], [], [], [0], set()
        for image, name in zip(self.names, self._xmls, strict=True):
            path, mine = self._path("Annotations", name), []
            top = read_xml(path) if name else None
            for thing in _objects(top, path) if top else ():
                if thing.name not in class_of:
                    if closed:
                        raise UserError(
                            f"root: '{path}', line {thing.line}: '{thing.name}' is no VOC class; "
                            f"{did_you_mean(thing.name, CLASSES)} (a set's own classes are given by "
                            f"`det_classes`)"
                        )
                    others.add(thing.name)
                    self.faults["objects of classes that det_classes does not name (left out)"] += 1
                elif not (thing.difficult and difficult == "drop"):
                    mine.append(thing)
            sizes.append(self._image_size(top, path, self._path("JPEGImages", image)) if top else (0, 0))
            corners = np.array([thing.corners for thing in mine]).reshape(-1, 4) - np.array(
                [one_based, one_based, 0, 0]
            )
            clipped, keep, faults = clean_boxes(corners, *sizes[-1])
            self.faults += faults
            boxes.append(clipped[keep])
            classes += [class_of[thing.name] for thing, good in zip(mine, keep, strict=True) if good]
            crowd += [
                thing.difficult and difficult == "ignore"
                for thing, good in zip(mine, keep, strict=True)
                if good
            ]
            first.append(len(classes))
        if others and not classes:
            name = self.classes["det"][0]
            raise UserError(
                f"det_classes: no object is called '{name}' or another of these names; "
                f"{did_you_mean(name, others)}"
            )
        self._sizes, self._first, self._boxes = np.array(sizes), np.array(first), np.concatenate(boxes)
        self._classes, self._crowd = np.array(classes, dtype=np.int64), np.array(crowd, dtype=bool)
        self.seen["det"] = occurrences(self._classes, len(class_of), self._crowd)

    def _image_size(self, top: Element, path: str, image: str) -> tuple[int, int]:
        """Width and height as the XML says; from the image's header where it says nothing or 0, as some tools
        write."""
        said = top.child("size")
        texts = [
            side.text.strip() if said and (side := said.child(tag)) else "" for tag in ("width", "height")
        ]
        if any(text in ("", "0") for text in texts):
            self.faults["XMLs without the size of their image (read from the image)"] += 1
            return image_size(image)
        width, height = (_number(said, tag, path) for tag in ("width", "height"))
        if not (width.is_integer() and height.is_integer() and min(width, height) > 0):
            raise UserError(
                f"root: '{path}', line {said.line}: width and height must be whole numbers of pixels; "
                f"correct them"
            )
        return int(width), int(height)


@dataclass
class Element:
    """An element of an XML: its text (without that of its children) and the line it begins in."""

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def child(self, tag: str) -> Element | None:
        return next((element for element in self.children if element.tag == tag), None)


def read_xml(path: str) -> Element:
    """The top element of an XML file. Raises UserError naming file and line for what is no XML, or has a
    DOCTYPE."""
    # expat and not ElementTree, which keeps no line numbers. Without a DOCTYPE there are no entities to
    # expand.
    parser = expat.ParserCreate()
    parser.buffer_text = True
    stack = [Element("", 0)]

    def start(tag: str, _: Mapping[str, str]) -> None:
        stack.append(Element(tag, parser.CurrentLineNumber))
        stack[-2].children.append(stack[-1])

    def text(data: str) -> None:
        stack[-1].text += data

    def doctype(*_: object) -> None:
        raise UserError(
            f"root: '{path}', line {parser.CurrentLineNumber}: has a DOCTYPE, which no annotation needs; "
            f"remove it"
        )

    parser.StartElementHandler, parser.CharacterDataHandler = start, text
    parser.EndElementHandler = lambda _: stack.pop()
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(read_bytes(path, "root"), True)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise UserError(
            f"root: '{path}', line {error.lineno}: not valid XML: {reason}; mend or replace the file"
        ) from None
    except (ValueError, LookupError) as error:  # an encoding that Python does not have, or has no table for
        raise UserError(f"root: '{path}' cannot be read: {error}; save it in UTF-8") from None
    return stack[0].children[0]


@dataclass
class _Object:
    name: str
    line: int
    corners: tuple[float, ...]  # as the file says
    difficult: bool


def _objects(top: Element, path: str) -> Iterator[_Object]:
    if top.tag != "annotation":
        raise UserError(
            f"root: '{path}', line {top.line}: <annotation> is needed, not <{top.tag}>; this is no VOC "
            f"annotation"
        )
    for entry in top.children:
        if entry.tag != "object":
            continue
        name, box, mark = (entry.child(tag) for tag in ("name", "bndbox", "difficult"))
        if name is None or not name.text.strip() or box is None:
            lacking = "bndbox" if box is None else "name"
            raise UserError(
                f"root: '{path}', line {entry.line}: an object without a <{lacking}>; add it or remove the "
                f"object"
            )
        marked = mark.text.strip() if mark else ""
        if marked not in ("", "0", "1"):
            raise UserError(f"root: '{path}', line {mark.line}: <difficult> is {marked!r}; it must be 0 or 1")
        corners = tuple(_number(box, tag, path) for tag in ("xmin", "ymin", "xmax", "ymax"))
        yield _Object(name.text.strip(), entry.line, corners, marked == "1")


def _number(parent: Element, tag: str, path: str) -> float:
    element = parent.child(tag)
    if element is None:
        raise UserError(f"root: '{path}', line {parent.line}: <{parent.tag}> has no <{tag}>; add it")
    try:
        value = float(element.text)
    except ValueError:
        value = float("nan")
    if not abs(value) < _FAR:
        raise UserError(
            f"root: '{path}', line {element.line}: <{tag}> is {element.text.strip()!r}, not a number of "
            f"pixels; correct it"
        )
    return value


def _by_key(names: list[str], folder: str, option: str) -> dict[str, str]:
    """Files by their names without ending. Raises UserError when two differ only by that."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(os.path.splitext(name)[0], name)) != name:
            raise UserError(
                f"{option}: '{other}' and '{name}' in '{folder}' differ by their ending only; remove or "
                f"rename one"
            )
    return found


def _names(
    given: Sequence[str] | Mapping[int, str] | str, void: tuple | None, root: str, option: str
) -> tuple[str, ...]:
    """Class names; tools' spellings of the background become the one that pictures leave uncoloured."""
    first, *rest = class_names(given, void, root, option)
    return ("background" if first.strip("_") == "background" else first, *rest)


def _det_names(given: Sequence[str] | str, root: str) -> tuple[str, ...]:
    names = _names(given, None, root, "det_classes")
    if not (names := names[names[0] == "background" :]):
        raise UserError(
            "det_classes: names only the background; add the classes to detect, or set `boxes: false`"
        )
    return names


def _check_options(
    boxes: bool, masks: bool, det_classes: object, seg_classes: object, difficult: str
) -> None:
    if not boxes and not masks:
        raise UserError(
            "masks: without boxes and masks nothing is labelled; use the layout `images` for that"
        )
    for option, given, used, by in (
        ("det_classes", det_classes, boxes, "boxes"),
        ("seg_classes", seg_classes, masks, "masks"),
    ):
        if given is not None and not used:
            raise UserError(f"{option}: without use where `{by}` is false; remove one")
    if difficult not in DIFFICULT:
        raise UserError(
            f"difficult: '{difficult}' is none of {', '.join(DIFFICULT)}; "
            f"{did_you_mean(difficult, DIFFICULT)}"
        )
