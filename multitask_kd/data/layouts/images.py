"""The layout of unlabelled images: one folder or several."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...errors import UserError
from ..base import LAYOUTS, Listed, Sample
from ..files import Files, expand, list_images


@LAYOUTS.register("images")
class Images(Listed):
    """Images without labels: all that lie in a folder, or in several, and in the folders within.

    folder: the path, or a list of paths. Hidden files and folders are passed over. An image is called by its
        path from the folder, or from the nearest one that holds them all.
    root: what a relative ``folder`` is relative to.
    cache: folder for decoded files (see ``Files``); not among the images, where it would be in the way.

    Paths may hold ``$VAR``, ``${VAR}`` and ``~``. Raises UserError for a folder that is absent, holds no
    images, or lies within another one, and for an image that cannot be read.
    """

    def __init__(self, *, folder: str | Sequence[str], root: str = "", cache: str | None = None):
        super().__init__()
        given = [folder] if isinstance(folder, str) else folder
        if not isinstance(given, (list, tuple)) or not given:
            raise UserError(f"folder: a path or a list of paths is needed, not {folder!r}")
        folders = [os.path.abspath(expand(path, "folder", root)) for path in given]
        self.files = Files(None if cache is None else expand(cache, "cache"))
        self.top = os.path.commonpath(folders)
        self.names = []
        for place in folders:
            within = os.path.relpath(place, self.top)
            self.names += [
                os.path.normpath(os.path.join(within, name)) for name in list_images(place, "folder")
            ]
        seen: set[str] = set()
        for name in self.names:
            if name in seen:
                path = os.path.join(self.top, name)
                raise UserError(
                    f"folder: '{path}' is in two of the folders; name each folder once, and none within "
                    f"another"
                )
            seen.add(name)

    def read(self, index: int) -> Sample:
        self._check_index(index)
        return Sample(self.files.image(os.path.join(self.top, self.names[index])))
