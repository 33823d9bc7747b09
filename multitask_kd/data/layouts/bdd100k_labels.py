"""BDD100K's label files, one JSON of frames or one an image: what the layout ``bdd100k`` needs of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

from ...errors import UserError, did_you_mean
from ..files import read_json


class Label(NamedTuple):
    """A labelled object as the JSON has it, less what is not used."""

    category: Any
    box: Any
    crowd: Any


class Frame(NamedTuple):
    """What a file says of one image. attributes: of the whole image, as the JSON has them."""

    labels: list[Any]
    attributes: Any


def frames_of_json(path: str, stems: list[str]) -> tuple[list[Frame | None], int]:
    """For each image its frame in a JSON of frames, None where it is not named; and how many frames are left.

    stems: the images' names without their endings. Raises UserError.
    """
    frames = _read_slim(path)
    if isinstance(frames, dict) and "frames" in frames:
        frames = frames["frames"]
    if not isinstance(frames, list):
        raise UserError(
            f"labels: '{path}' is not a list of frames; a Scalabel JSON such as det_train.json is needed"
        )
    of_name: dict[str, Frame] = {}
    for place, frame in enumerate(frames):
        name = frame.get("name") if isinstance(frame, dict) else None
        if not isinstance(name, str):
            raise UserError(
                f"labels: frame {place} in '{path}' has no 'name'; add the file name of its image"
            )
        labels = _list(frame.get("labels"), f"'labels' of frame '{name}' in '{path}'")
        found = Frame(labels, frame.get("attributes"))
        if of_name.setdefault(os.path.splitext(name)[0], found) is not found:
            raise UserError(f"labels: frame '{name}' is in '{path}' twice; remove one")
    return [of_name.pop(stem, None) for stem in stems], len(of_name)


def frames_of_folder(folder: str, stems: list[str]) -> Iterator[Frame | None]:
    """For each image what its own JSON says, None where there is none. Raises UserError."""
    present = stems_in(folder, ".json", "labels")
    for stem in stems:
        if stem not in present:
            yield None
            continue
        path = os.path.join(folder, stem + ".json")
        content = _read_slim(path)
        frames = content.get("frames") if isinstance(content, dict) else None
        if not isinstance(frames, list) or not frames or not isinstance(frames[0], dict):
            raise UserError(
                f"labels: '{path}' has no frames[0]; one JSON an image with frames[0].objects is needed"
            )
        objects = _list(frames[0].get("objects"), f"'objects' of frames[0] in '{path}'")
        yield Frame(objects, content.get("attributes"))


def stems_in(folder: str, ending: str, option: str) -> set[str]:
    """Files under ``folder`` with this ending, relative to it and without the ending. Raises UserError.

    One listing a folder, and no stat.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{option}: folder '{folder}' does not exist; check `root`, `split` and `{option}`")
    found = set()
    for parent, _, files in os.walk(folder, followlinks=True):
        place = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if place == "." else place + "/"
        found.update(prefix + name[: -len(ending)] for name in files if name.endswith(ending))
    return found


class Boxes:
    """The boxes of all images, as the files have them; those of image i are rows first[i] to first[i+1].

    path: of the files, for messages.
    """

    def __init__(self, path: str):
        self.path = path
        self.corners: list[tuple[float, ...]] = []
        self.categories: list[str] = []
        self.crowds: list[bool] = []
        self.first = [0]

    def add(self, labels: list[Any], stem: str) -> None:
        """Add the objects of the next image. Raises UserError for one that is none."""
        for place, label in enumerate(labels):
            if not isinstance(label, Label) or not isinstance(label.category, str):
                raise UserError(
                    f"labels: object {place} of '{stem}' in '{self.path}' has no 'category'; add it"
                )
            if label.box is None:  # a lane or an area
                continue
            if type(label.box) is not tuple:
                raise UserError(
                    f"labels: object {place} of '{stem}' in '{self.path}': box2d needs the numbers x1, y1, "
                    "x2, y2 in pixels; correct it"
                )
            self.corners.append(label.box)
            self.categories.append(label.category)
            self.crowds.append(bool(label.crowd))
        self.first.append(len(self.corners))


def attribute_index(frame: Frame, name: str, values: tuple[str, ...], where: str) -> int:
    """The index of the image's attribute in ``values``; -1 where it is absent or undefined. Raises UserError.

    where: the image in its file, for messages.
    """
    if frame.attributes is None:
        return -1
    if not isinstance(frame.attributes, dict):
        raise UserError(f"labels: 'attributes' of {where} is no mapping; correct it")
    value = frame.attributes.get(name, "undefined")
    if value == "undefined" or value is None:
        return -1
    if value not in values:
        hint = did_you_mean(value, values)
        raise UserError(f"labels: {where} has {name} {value!r}, which is none of BDD100K's; {hint}")
    return values.index(value)


def _list(value: Any, what: str) -> list[Any]:
    """A list, empty where the JSON has null or nothing."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"labels: {what} is not a list; correct it")
    return value


def _slim(entry: dict[str, Any]) -> Any:
    """A JSON object as it is parsed: a label becomes a ``Label``, its box a tuple, its outlines are dropped.

    The labels of 70,000 frames with their outlines would take gigabytes as dictionaries.
    """
    if "category" in entry:
        category, attributes = entry["category"], entry.get("attributes")
        crowd = attributes.get("crowd") if isinstance(attributes, dict) else None
        return Label(intern(category) if isinstance(category, str) else category, entry.get("box2d"), crowd)
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
