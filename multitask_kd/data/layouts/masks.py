"""Images and index masks in two folders, without any JSON: a set for segmentation only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence

from ...errors import UserError
from ..base import LAYOUTS, Listed, Sample
from ..classes import IndexMasks, check_void, named_indices
from ..files import Files, expand, list_images


class Paired(Listed):
    """Images, each with an index PNG."""

    def __init__(self, images: str, names: Sequence[str], masks: IndexMasks, suffixes: tuple[str, str]):
        super().__init__()
        self.images, self.names, self.masks = images, list(names), masks
        self.mask_names = _mask_names(self.names, *suffixes)
        masks.require(self.mask_names, f"the mask of '{self.names[0]}' is called '{self.mask_names[0]}' (see `mask_suffix`)")

    def read(self, index: int) -> Sample:
        self._check_index(index)
        path = os.path.join(self.images, self.names[index])
        image = self.masks.files.image(path)
        return Sample(image=image, mask=self.masks.read(self.mask_names[index], image, path))


@LAYOUTS.register("masks")
class Masks(Paired):
    """A folder of images and a folder of index PNGs with the same names: segmentation only, no boxes.

    images: folder of images, its subfolders included. Read without EXIF orientation, as masks are.
    masks: folder of index PNGs (greyscale, or a palette's indices) in the same subfolders, one for every image.
    seg_classes: names by mask index, as a list, a mapping or the path of a JSON file with either. A mapping may leave
        indices out and give one name to several, which merges them; classes are in the order of their (lowest) index.
    void: mask indices that mean "ignore"; 255 always does. Any other index without a name is an error.
    image_suffix: what ends an image's name, e.g. ``_leftImg8bit.png``; other files are passed over. Empty: its extension.
    mask_suffix: what stands in its place in the mask's name, e.g. ``_gtFine_labelIds.png``.
    root: what relative ``images``, ``masks`` and ``seg_classes`` are relative to.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    Paths may hold ``$VAR``, ``${VAR}`` and ``~``. Raises UserError for whatever is wrong in options or files.
    """

    def __init__(
        self,
        *,
        images: str,
        masks: str,
        seg_classes: Sequence[str] | Mapping[int, str] | str,
        void: Sequence[int] = (),
        image_suffix: str = "",
        mask_suffix: str = ".png",
        root: str = "",
        cache: str | None = None,
    ):
        check_void(void)
        indices = named_indices(seg_classes, void, root)
        folder = expand(images, "images", root)
        names = [name for name in list_images(folder, "images") if name.endswith(image_suffix)]
        if not names:
            raise UserError(f"image_suffix: no image under '{folder}' ends with '{image_suffix}'; correct it or `images`")
        files = Files(None if cache is None else expand(cache, "cache"))
        stored = IndexMasks(expand(masks, "masks", root), files, indices, void)
        super().__init__(folder, names, stored, (image_suffix, mask_suffix))
        self.classes["seg"] = tuple(indices)


def _mask_names(names: Sequence[str], image_suffix: str, mask_suffix: str) -> list[str]:
    """The mask of each image. Raises UserError where two images would have the same one."""
    found = [(name.removesuffix(image_suffix) if image_suffix else os.path.splitext(name)[0]) + mask_suffix for name in names]
    mask, count = Counter(found).most_common(1)[0]
    if count > 1:
        shared = [name for name, its in zip(names, found, strict=True) if its == mask]
        raise UserError(
            f"image_suffix: '{shared[0]}' and '{shared[1]}' would both have the mask '{mask}'; say how the names of images "
            "end, e.g. .jpg, or move other files away"
        )
    return found
