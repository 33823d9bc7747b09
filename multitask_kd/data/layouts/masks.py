"""Images and index masks in folders, without any JSON: a set for segmentation only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError
from ..base import LAYOUTS, Listed, Sample
from ..classes import IndexMasks, check_void, named_indices, named_masks
from ..files import Files, expand, list_images


class Paired(Listed):
    """Images, each with an index PNG for every label.

    masks: by label name. suffixes: what ends an image's name, and what stands there in the mask's. partial:
    an image may lack the mask of a label, and is then not labelled for it.
    """

    def __init__(
        self,
        files: Files,
        images: str,
        names: Sequence[str],
        masks: Mapping[str, IndexMasks],
        suffixes: tuple[str, str],
        partial: bool = False,
    ):
        super().__init__()
        self.files, self.images, self.names, self.masks = files, images, list(names), dict(masks)
        self.mask_names = _mask_names(self.names, *suffixes)
        hint = f"the mask of '{self.names[0]}' is called '{self.mask_names[0]}' (see `mask_suffix`)"
        for label, stored in self.masks.items():
            self.add_label(label, "semantic", stored.classes)
            if not partial:
                stored.require(self.mask_names, hint)
            elif lacking := stored.find(self.mask_names, hint):
                self.faults[f"images without a mask of '{label}' (not labelled)"] += lacking

    def read(self, index: int) -> Sample:
        self._check_index(index)
        path = os.path.join(self.images, self.names[index])
        sample = Sample(self.files.image(path))
        for label, stored in self.masks.items():
            if self.gives(label) and stored.has(index):
                sample.labels[label] = stored.read(self.mask_names[index], sample.image, path)
        return sample


@LAYOUTS.register("masks")
class Masks(Paired):
    """A folder of images and a folder of index PNGs with the same names: segmentation only, no boxes.

    The label is called ``seg``; several folders of masks give several labels, by names of your choice.

    images: folder of images, its subfolders included. Read without EXIF orientation, as masks are.
    masks: folder of index PNGs (greyscale, or a palette's indices) in the same subfolders, one for every
        image. Or a mapping from the names of labels to a folder each, e.g. ``{drivable: masks/drivable, lane:
        masks/lane}``: an image without a mask in one of them is not labelled for that one.
    seg_classes: names by mask index, as a list, a mapping or the path of a file with either (JSON, or .txt
        with a name a line). A mapping may leave indices out and give one name to several, which merges them;
        classes are in the order of their (lowest) index. Where ``masks`` is a mapping, a mapping from its
        names to such a list, mapping or path each.
    void: mask indices that mean "ignore"; 255 always does. Any other index without a name is an error. Where
        ``masks`` is a mapping, a mapping from its names to such indices; names may be left out.
    image_suffix: what ends an image's name, e.g. ``_leftImg8bit.png``; other files are passed over. Empty:
        its extension.
    mask_suffix: what stands in its place in the mask's name, e.g. ``_gtFine_labelIds.png``.
    root: what relative ``images``, ``masks`` and ``seg_classes`` are relative to.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    Paths may hold ``$VAR``, ``${VAR}`` and ``~``. Raises UserError for whatever is wrong in options or files.
    """

    def __init__(
        self,
        *,
        images: str,
        masks: str | Mapping[str, str],
        seg_classes: Sequence[str] | Mapping[int, str] | str | Mapping[str, Any],
        void: Sequence[int] | Mapping[str, Sequence[int]] = (),
        image_suffix: str = "",
        mask_suffix: str = ".png",
        root: str = "",
        cache: str | None = None,
    ):
        files = Files(None if cache is None else expand(cache, "cache"))
        several = isinstance(masks, Mapping)
        if several:
            stored = named_masks(masks, seg_classes, void, root, files)
        else:
            check_void(void)
            indices = named_indices(seg_classes, void, root)
            stored = {"seg": IndexMasks(expand(masks, "masks", root), files, indices, void)}
        folder = expand(images, "images", root)
        names = [name for name in list_images(folder, "images") if name.endswith(image_suffix)]
        if not names:
            raise UserError(
                f"image_suffix: no image under '{folder}' ends with '{image_suffix}'; correct it or `images`"
            )
        super().__init__(files, folder, names, stored, (image_suffix, mask_suffix), partial=several)


def _mask_names(names: Sequence[str], image_suffix: str, mask_suffix: str) -> list[str]:
    """The mask of each image. Raises UserError where two images would have the same one."""
    found = [
        (name.removesuffix(image_suffix) if image_suffix else os.path.splitext(name)[0]) + mask_suffix
        for name in names
    ]
    mask, count = Counter(found).most_common(1)[0]
    if count > 1:
        shared = [name for name, its in zip(names, found, strict=True) if its == mask]
        raise UserError(
            f"image_suffix: '{shared[0]}' and '{shared[1]}' would both have the mask '{mask}'; say how the "
            f"names of images "
            "end, e.g. .jpg, or move other files away"
        )
    return found
