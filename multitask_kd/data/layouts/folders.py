"""The layout of images sorted into folders, one a class: labels of the whole image."""

from __future__ import annotations

import os

import numpy as np

from ...errors import UserError
from ..base import LAYOUTS, Listed, Sample
from ..classes import Choice, choose, occurrences
from ..files import Files, expand, list_images


@LAYOUTS.register("folders")
class Folders(Listed):
    """One folder of images a class, as torchvision's ImageFolder has them: the label of the whole image.

    folder: the folder of the classes' folders. What lies deeper belongs to the class it is under; hidden
        files and folders are passed over. An image beside the classes' folders is an error.
    label: what the label is called; the task of this name learns it.
    class_folders: the classes in this order: a list of names of folders; a mapping from the name of a class
        to the name or list of names of the folders merged into it, e.g. ``{dry: [clear, cloudy], wet:
        rainy}``; or the path of a JSON file with either. Images in other folders are left out and counted.
        Default: all folders, by name.
    root: what a relative ``folder`` or path of ``class_folders`` is relative to.
    cache: folder for decoded files (see ``Files``); not under ``folder``, where it would be a class.

    Paths may hold ``$VAR``, ``${VAR}`` and ``~``. Raises UserError for whatever is wrong in options or
    folders, and for an image that cannot be read.
    """

    def __init__(
        self,
        *,
        folder: str,
        label: str = "class",
        class_folders: Choice | None = None,
        root: str = "",
        cache: str | None = None,
    ):
        super().__init__()
        if not label:
            raise UserError("label: a name is needed, e.g. weather")
        self.folder, self.label = expand(folder, "folder", root), label
        cache = None if cache is None else expand(cache, "cache")
        if cache is not None and _within(cache, self.folder):
            raise UserError(
                f"cache: '{cache}' lies in '{self.folder}', whose folders are classes; name another"
            )
        names = list_images(self.folder, "folder")
        chosen = choose(class_folders, self._folders(names), "class_folders", root, what="folder of images")
        self.files = Files(cache)
        class_of = {part: index for index, parts in enumerate(chosen.values()) for part in parts}
        self.names = [name for name in names if _top(name) in class_of]
        if not self.names:
            raise UserError(
                f"class_folders: no images are in the folders {', '.join(class_of)} of '{self.folder}'; name "
                f"others"
            )
        if left_out := len(names) - len(self.names):
            self.faults["images in folders that `class_folders` does not name (left out)"] += left_out
        self._values = np.array([class_of[_top(name)] for name in self.names], dtype=np.int64)
        self.add_label(label, "classification", tuple(chosen))
        self.seen[label] = occurrences(self._values, len(chosen))

    def read(self, index: int) -> Sample:
        self._check_index(index)
        sample = Sample(self.files.image(os.path.join(self.folder, self.names[index])))
        if self.gives(self.label):
            sample.labels[self.label] = int(self._values[index])
        return sample

    def _folders(self, names: list[str]) -> list[str]:
        """The names of the folders, sorted, also of empty ones. Raises UserError for an image beside them."""
        if loose := [name for name in names if "/" not in name]:
            raise UserError(
                f"folder: '{loose[0]}' lies in '{self.folder}' itself and has no class (images like it: "
                f"{len(loose)}); move it into the folder of its class, or away (unlabelled images: the "
                "layout `images`)"
            )
        with os.scandir(self.folder) as entries:
            return sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )


def _top(name: str) -> str:
    """The folder of the class that an image is under."""
    return name.split("/", 1)[0]


def _within(path: str, folder: str) -> bool:
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath([path, folder]) == folder
