"""COCO-Stuff: index masks with its own numbering of 171 classes, and boxes where COCO's instances JSON is
given."""

from __future__ import annotations

import os

from ...errors import UserError, did_you_mean
from ..base import LAYOUTS, Sample
from ..classes import Choice, IndexMasks, choose
from ..files import Files, expand, list_images
from .coco import Coco
from .masks import Paired

# The names of category ids 1 to 182, as the data set's labels.txt gives them: things to 91, then stuff.
NAMES = tuple(
    name.strip()
    for name in """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack, umbrella, shoe,
    eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, mirror, dining table, window, desk, toilet,
    door, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush, hair brush,
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth,
    clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone,
    floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves,
    light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform,
    playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow,
    solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick,
    wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
    window-other, wood
    """.replace("\n", " ").split(",")
)
# Names that COCO planned and no pixel has.
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
USED = tuple(name for key, name in enumerate(NAMES, start=1) if key not in UNUSED)
THINGS = 91

# form -> stored index by name, void indices, and what ends the name of a mask
FORMS = {
    "stuffthingmaps": ({name: index for index, name in enumerate(NAMES)}, (), ".png"),
    "labelTrainIds": ({name: index for index, name in enumerate(USED)}, (), "_labelTrainIds.png"),
    "pixelmaps": (
        {name: key for key, name in enumerate((*NAMES[THINGS:], "other"), start=THINGS + 1)},
        (0,),
        ".png",
    ),
}


@LAYOUTS.register("coco_stuff")
class CocoStuff(Paired):
    """COCO-Stuff: images and index PNGs with the same names, the classes by COCO-Stuff's own names.

    It is the layout ``masks`` with the class list built in, and boxes besides where ``annotations`` is given.

    images: folder of images. Read without EXIF orientation.
    masks: folder of index PNGs, one for every image.
    form: how the PNGs number the classes. ``stuffthingmaps``: category id less 1, 255 void, 171 classes (of
        182 ids 11 are never used). ``labelTrainIds``: 0 to 170 without gaps, 255 void. ``pixelmaps``:
        category ids 92 to 182, 183 is ``other`` (every thing), 0 void.
    seg_classes: classes to segment, in this order: a list of names; a mapping from the name of a class to the
        name or list of names merged into it; or the path of a JSON file with either. Others are ignored.
        Default: all, by category id.
    unused: keep the 11 unused names at their places, 182 classes as the outputs of some published networks;
        only with ``stuffthingmaps``.
    annotations: COCO's instances JSON for the boxes; the images are then the ones it lists. None: no boxes.
    det_classes: categories of ``annotations`` to detect, in this order. Default: all, by category id.
    mask_suffix: what stands in the mask's name in place of the image's extension. Default:
        ``_labelTrainIds.png`` with that form, else ``.png``.
    root: what relative ``images``, ``masks``, ``annotations`` and ``seg_classes`` are relative to.
    cache: folder for decoded files (see ``Files``); not under ``root``, which is often read-only.

    Paths may hold ``$VAR``, ``${VAR}`` and ``~``. Raises UserError for whatever is wrong in options or files.
    """

    def __init__(
        self,
        *,
        images: str,
        masks: str,
        form: str = "stuffthingmaps",
        seg_classes: Choice | None = None,
        unused: bool = False,
        annotations: str | None = None,
        det_classes: list[str] | None = None,
        mask_suffix: str | None = None,
        root: str = "",
        cache: str | None = None,
    ):
        if form not in FORMS:
            raise UserError(f"form: unknown form '{form}'; {did_you_mean(form, FORMS)}")
        if unused and form != "stuffthingmaps":
            raise UserError(f"unused: only stuffthingmaps number the unused names, not {form}; remove it")
        if annotations is None and det_classes is not None:
            raise UserError(
                "det_classes: there are no boxes without `annotations`; give it, or remove `det_classes`"
            )
        index_of, void, suffix = FORMS[form]
        index_of = {
            name: index for name, index in index_of.items() if unused or name in USED or form == "pixelmaps"
        }
        chosen = choose(seg_classes, list(index_of), "seg_classes", root, what="class of COCO-Stuff")
        indices = {name: [index_of[part] for part in parts] for name, parts in chosen.items()}
        folder = expand(images, "images", root)
        files = Files(None if cache is None else expand(cache, "cache"))
        hint = f"is it of the form {form}? See `form`"
        stored = IndexMasks(expand(masks, "masks", root), files, indices, [*void, *index_of.values()], hint)
        self._boxes = None
        if annotations is not None:
            self._boxes = Coco(
                images=images,
                annotations=annotations,
                segment=False,
                det_classes=det_classes,
                root=root,
                cache=cache,
            )
        names = self._boxes.names if self._boxes else list_images(folder, "images")
        suffixes = "", suffix if mask_suffix is None else mask_suffix
        super().__init__(files, folder, names, {"seg": stored}, suffixes)
        if self._boxes:
            self.add_label("det", "detection", self._boxes.classes["det"])
            self.faults, self.seen = self._boxes.faults, self._boxes.seen

    def read(self, index: int) -> Sample:
        if self._boxes is None:
            return super().read(index)
        self._boxes.wanted = self.wanted
        sample = self._boxes.read(index)
        if self.gives("seg"):
            path = os.path.join(self.images, self.names[index])
            sample.labels["seg"] = self.masks["seg"].read(self.mask_names[index], sample.image, path)
        return sample
