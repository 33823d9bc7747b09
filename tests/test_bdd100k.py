"""The BDD100K layout, on sets of a few pixels in both trees; the official label files where they are present."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expect import begins, says
from PIL import Image

from multitask_kd.batch import IGNORE
from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.layouts.bdd100k import ATTRIBUTES, BDD100K, CLASSES
from multitask_kd.data.layouts.bdd100k_masks import LANES

WIDTH, HEIGHT = 16, 9  # of every image here
CAR, BUS = CLASSES.index("car"), CLASSES.index("bus")


def label(category: str, box: tuple[float, ...] | None = None, **attributes) -> dict:
    entry: dict[str, Any] = {"id": "0", "category": category, "attributes": {"occluded": False, **attributes}}
    if box is not None:
        entry["box2d"] = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
    return entry


def lane() -> dict:
    """As the older JSON has them: outlines among the boxes."""
    outline = {"vertices": [[0, 0], [5, 5]], "types": "LL", "closed": False}
    return label("lane", laneStyle="solid") | {"poly2d": [outline]}


class Tree:
    """A set under ``root`` that a test bends before ``open``. Images a: two boxes, b: none, c: not in the
    labels."""

    def __init__(self, root: Path):
        self.root = root
        self.frames: Any = [
            {"name": "b.jpg", "labels": None},
            {
                "name": "a.jpg",
                "labels": [label("car", (1, 2, 5.5, 6)), lane(), label("bus", (0, 0, 9, 9), crowd=True)],
            },
        ]

    def image(self, path: str, shape=(HEIGHT, WIDTH, 3)) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(shape, 90, np.uint8)).save(self.root / path)

    def mask(self, path: str, *values: int, mode: str = "L") -> None:
        """The first pixels hold the values, the others the last of them."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full(HEIGHT * WIDTH, values[-1], np.uint8)
        pixels[: len(values)] = values
        Image.fromarray(pixels.reshape(HEIGHT, WIDTH)).convert(mode).save(self.root / path)

    def open(self, **options) -> BDD100K:
        return BDD100K(**{"root": str(self.root), "size": [WIDTH, HEIGHT]} | options)


class Official(Tree):
    json = "labels/det_20/det_train.json"

    def open(self, **options) -> BDD100K:
        (self.root / self.json).parent.mkdir(parents=True, exist_ok=True)
        (self.root / self.json).write_text(json.dumps(self.frames))
        return super().open(**options)


class PerImage(Tree):
    def open(self, **options) -> BDD100K:
        for frame in self.frames:
            path = self.root / "det_annotations/train" / frame["name"].replace(".jpg", ".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"name": "a", "frames": [{"timestamp": 10000, "objects": frame["labels"]}]}
            path.write_text(json.dumps(content | {"attributes": frame.get("attributes")}))
        return super().open(**options)


@pytest.fixture
def official(tmp_path: Path) -> Official:
    tree = Official(tmp_path)
    for name in "abc":
        tree.image(f"images/100k/train/{name}.jpg")
    for name in "ab":
        tree.mask(f"labels/drivable/masks/train/{name}.png", 0, 1, 2, 255, 2)
    return tree


@pytest.fixture
def per_image(tmp_path: Path) -> PerImage:
    tree = PerImage(tmp_path)
    for name in "abc":
        tree.image(f"images/train/{name}.jpg")
        tree.mask(f"da_seg_annotations/train/{name}.png", 0, 127, 255, 0)
        tree.mask(f"ll_seg_annotations/train/{name}.png", 255, 0)
    return tree


# --- boxes


@pytest.mark.parametrize("tree", ["official", "per_image"])
def test_boxes_of_both_trees(tree, request):
    data = request.getfixturevalue(tree).open()
    assert LAYOUTS.get("bdd100k", "data") is BDD100K and data.classes == {"det": CLASSES}
    assert [data.name(i) for i in range(len(data))] == ["a.jpg", "b.jpg", "c.jpg"]
    a, b, c = (data.read(i) for i in range(3))
    full, empty = a.labels["det"], b.labels["det"]
    assert full.boxes.tolist() == [[1, 2, 5.5, 6], [0, 0, 9, 9]] and full.boxes.dtype == np.float32
    assert full.classes.tolist() == [CAR, BUS] and full.classes.dtype == np.int64
    assert full.crowd.tolist() == [False, True] and full.area.tolist() == [18, 81] and "seg" not in a.labels
    # named without objects: labelled, empty
    assert empty.boxes.shape == (0, 4) and len(empty.classes) == len(empty.crowd) == 0
    assert "det" not in c.labels  # not named: not labelled
    assert data.kinds == {"det": "detection"}
    assert data.seen["det"].tolist() == [int(name == "car") for name in CLASSES]  # the bus is a crowd
    assert data.faults == {"images without labels of boxes (not labelled)": 1}
    full.boxes += 1
    assert data.read(0).labels["det"].boxes[0, 0] == 1  # the caller's own
    with pytest.raises(IndexError):
        data.read(3)


def test_the_older_json_and_frames_under_a_key(official):
    official.json = "labels/bdd100k_labels_images_train.json"
    assert len(official.open().read(0).labels["det"].boxes) == 2
    official.frames = {"frames": official.frames, "config": {}}
    assert len(official.open().read(0).labels["det"].boxes) == 2
    del official.frames["frames"][0]["labels"]
    assert official.open().read(1).labels["det"].boxes.shape == (0, 4)


def test_older_and_ignored_names(official):
    names = ["person", "motor", "bike", "van", "caravan", "other person", "other vehicle", "trailer", "rider"]
    official.frames[1]["labels"] = [label(name, (0, 0, 3, 3)) for name in names]
    sample = official.open().read(0)
    assert [CLASSES[c] for c in sample.labels["det"].classes] == [
        "pedestrian", "motorcycle", "bicycle", "car", "car", "pedestrian", "car", "truck", "rider"
    ]  # fmt: skip
    assert sample.labels["det"].crowd.tolist() == [False] * 5 + [True] * 3 + [False]


def test_unknown_categories_are_left_out_and_counted(official):
    official.frames[1]["labels"] += [label("drone", (0, 0, 3, 3)), label("drone", (0, 0, 2, 2))]
    data = official.open()
    assert len(data.read(0).labels["det"]) == 2
    assert data.faults["boxes of categories that are not of BDD100K (left out)"] == 2
    data = official.open(det_classes=["drone", "car"])
    assert data.read(0).labels["det"].classes.tolist() == [1, 0, 0] and len(data.faults) == 1


def test_classes_chosen_and_merged(official):
    official.frames[1]["labels"] += [
        label("van", (0, 0, 3, 3)),
        label("trailer", (0, 0, 2, 2)),
        label("rider", (0, 0, 1, 1)),
    ]
    merge = {"car": "vehicle", "bus": "vehicle", "truck": "vehicle", "train": "vehicle"}
    data = official.open(det_merge=merge)
    assert data.classes["det"] == (
        "pedestrian", "rider", "vehicle", "motorcycle", "bicycle", "traffic light", "traffic sign"
    )  # fmt: skip
    merged = data.read(0).labels["det"]
    assert merged.classes.tolist() == [2, 2, 2, 2, 1]
    assert merged.crowd.tolist() == [False, True, False, True, False]
    data = official.open(det_merge=merge, det_classes=["vehicle"])
    assert data.classes["det"] == ("vehicle",) and data.read(0).labels["det"].classes.tolist() == [0, 0, 0, 0]
    data = official.open(
        det_merge={"trailer": "trailer"}, det_classes=["rider", "trailer"]
    )  # named, so not ignored
    named = data.read(0).labels["det"]
    assert named.classes.tolist() == [1, 0] and not named.crowd.any()
    assert official.open(det_classes=["bus", "car"]).read(0).labels["det"].classes.tolist() == [1, 0, 1]
    with says("det_classes", "'bsu'", "did you mean 'bus'"):
        official.open(det_classes=["bsu"])
    with says("det_merge", "'cra'", "did you mean 'car'"):
        official.open(det_merge={"cra": "vehicle"})
    with says("det_merge", "class name -> class name"):
        official.open(det_merge=["car"])


def test_bad_boxes_are_dropped_and_counted(official):
    official.frames[1]["labels"] += [
        label("car", (20, 1, 22, 3)),
        label("car", (3, 3, 3, 5)),
        label("car", (14, 7, 20, 20)),
    ]
    data = official.open()
    assert data.read(0).labels["det"].boxes[2:].tolist() == [[14, 7, WIDTH, HEIGHT]]
    assert (
        data.faults["boxes outside the image (dropped)"]
        == data.faults["boxes of zero or negative size (dropped)"]
        == 1
    )


def test_boxes_of_another_size_than_the_image(official):
    official.image("images/100k/train/a.jpg", (18, 32, 3))
    with says("a.jpg' is 32x18", "16x9", "`size`"):
        official.open().read(0)
    official.image("images/100k/train/c.jpg", (18, 32, 3))
    assert "det" not in official.open().read(2).labels  # nothing refers to its pixels


def test_pickle_is_small_and_reads_the_same(official):
    official.frames[1]["labels"][1]["poly2d"][0]["vertices"] *= 20_000
    packed = pickle.dumps(official.open(masks="drivable"))
    assert len(packed) < 4_000 and len(pickle.loads(packed).read(0).labels["det"].boxes) == 2


# --- masks


def test_drivable_masks(official):
    data = official.open(masks="drivable")
    assert data.classes["seg"] == ("direct", "alternative", "background")
    sample = data.read(0)
    assert sample.labels["seg"].shape == (HEIGHT, WIDTH) and sample.labels["seg"].dtype == np.uint8
    assert sample.labels["seg"].ravel()[:5].tolist() == [0, 1, 2, IGNORE, 2]
    assert len(sample.labels["det"]) == 2
    assert "seg" not in data.read(2).labels and data.faults["images without a mask (not labelled)"] == 1
    merged = official.open(
        masks="drivable", seg_merge={"direct": "drivable", "alternative": "drivable"}, boxes=False
    )
    assert merged.classes == {"seg": ("drivable", "background")} and "det" not in merged.read(0).labels
    assert merged.read(0).labels["seg"].ravel()[:5].tolist() == [0, 0, 1, IGNORE, 1]
    with says("seg_merge", "'direkt'", "did you mean 'direct'"):
        official.open(masks="drivable", seg_merge={"direkt": "drivable"})


def test_sem_seg_masks_belong_to_other_images(official):
    official.image("images/10k/train/a.jpg")
    official.mask("labels/sem_seg/masks/train/a.png", 0, 18, 255)
    data = official.open(masks="sem_seg")
    assert len(data) == 1 and len(data.classes["seg"]) == 19 and data.classes["seg"][11] == "person"
    sample = data.read(0)
    assert sample.labels["seg"].ravel()[:3].tolist() == [0, 18, IGNORE] and len(sample.labels["det"]) == 2
    assert data.faults == {"frames without an image (passed over)": 1}
    official.mask("labels/sem_seg/masks/train/a.png", 0, 19, 0)
    with says("a.png", "value 19", "0 to 18", "`mask_files`"):
        official.open(masks="sem_seg").read(0)


def test_lane_masks_are_bits(official):
    """Category in bits 0 to 2, background in 3, style in 4, direction in 5."""
    official.mask("labels/lane/masks/train/a.png", 0b000110, 0b110110, 0b010000, 0b001110, 255)
    data = official.open(masks="lane")
    assert data.classes["seg"] == LANES
    assert [LANES[v] for v in data.read(0).labels["seg"].ravel()[:5]] == [
        "single white", "single white", "crosswalk", "background", "background"
    ]  # fmt: skip
    data = official.open(masks="lane", seg_merge={"crosswalk": "background", "single white": "lane"})
    assert (
        data.classes["seg"][0] == "background"
        and "lane" in data.classes["seg"]
        and len(data.classes["seg"]) == 8
    )


def test_per_image_masks_are_brightness(per_image):
    data = per_image.open(masks="drivable")
    assert data.classes["seg"] == ("background", "drivable")
    assert data.read(0).labels["seg"].ravel()[:4].tolist() == [0, 1, 1, 0]
    lanes = per_image.open(masks="lane")
    assert lanes.classes["seg"] == ("background", "lane")
    assert lanes.read(2).labels["seg"].ravel()[:2].tolist() == [1, 0]
    for mode in ("RGB", "RGBA", "P", "1"):  # matplotlib saves RGBA; a palette counts by its colours
        per_image.mask("ll_seg_annotations/train/c.png", 255, 0, mode=mode)
        for _ in range(2):
            mask = per_image.open(masks="lane", cache=str(per_image.root / "cache")).read(2).labels["seg"]
            assert mask.ravel()[:2].tolist() == [1, 0] and mask.sum() == 1


def test_per_image_masks_that_are_none(per_image):
    per_image.mask("da_seg_annotations/train/a.png", 0, 1, 2)
    with says("a.png", "official masks", "tree: official"):
        per_image.open(masks="drivable").read(0)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), (200, 0, 0), np.uint8)).save(
        per_image.root / "da_seg_annotations/train/a.png"
    )
    with says("a.png", "in colour"):
        per_image.open(masks="drivable").read(0)
    (per_image.root / "da_seg_annotations/train/a.png").write_bytes(b"no image")
    with says("a.png", "cannot be decoded"):
        per_image.open(masks="drivable").read(0)
    Image.fromarray(np.zeros((4, 8), np.uint8)).save(per_image.root / "da_seg_annotations/train/a.png")
    with says("a.png' is 8x4", "a.jpg' is 16x9"):
        per_image.open(masks="drivable").read(0)
    with says("masks", "per_image tree has no 'sem_seg'", "drivable, lane"):
        per_image.open(masks="sem_seg")


# --- several kinds of masks


def lanes_of(official: Official) -> None:
    official.mask("labels/lane/masks/train/b.png", 0b000110, 0b001110)


def test_each_kind_is_a_label(official):
    lanes_of(official)
    data = official.open(masks=["drivable", "lane"])
    assert data.kinds == {"det": "detection", "drivable": "semantic", "lane": "semantic"}
    assert data.classes["drivable"] == ("direct", "alternative", "background")
    assert data.classes["lane"] == LANES
    assert data.faults["images without a mask of 'drivable' (not labelled)"] == 1
    assert data.faults["images without a mask of 'lane' (not labelled)"] == 2
    a, b, c = (pickle.loads(pickle.dumps(data)).read(i).labels for i in range(3))
    assert sorted(a) == ["det", "drivable"] and sorted(b) == ["det", "drivable", "lane"] and c == {}
    assert a["drivable"].ravel()[:5].tolist() == [0, 1, 2, IGNORE, 2]
    assert [LANES[v] for v in b["lane"].ravel()[:2]] == ["single white", "background"]
    assert list(official.open(masks=["lane"], boxes=False).classes) == ["lane"]  # not seg


def test_kinds_of_the_per_image_tree(per_image):
    data = per_image.open(masks=["lane", "drivable"])
    labels = data.read(0).labels
    assert data.classes["lane"] == ("background", "lane")
    assert data.classes["drivable"] == ("background", "drivable")
    assert labels["lane"].ravel()[:2].tolist() == [1, 0]
    assert labels["drivable"].ravel()[:4].tolist() == [0, 1, 1, 0]
    with says("masks", "per_image tree has no 'sem_seg'"):
        per_image.open(masks=["lane", "sem_seg"])


def test_only_wanted_masks_are_read(official):
    lanes_of(official)
    data = official.open(masks=["drivable", "lane"])
    (official.root / "labels/lane/masks/train/b.png").write_bytes(b"no image")
    data.wanted = frozenset({"drivable"})
    assert list(data.read(1).labels) == ["drivable"]
    data.wanted = None
    with says("lane/masks/train/b.png", "cannot be decoded"):
        data.read(1)


def test_merges_and_folders_by_kind(official):
    lanes_of(official)
    shutil.move(official.root / "labels/lane/masks/train", official.root / "lines_train")
    merge = {"drivable": {"direct": "road", "alternative": "road"}}
    data = official.open(masks=["drivable", "lane"], seg_merge=merge, mask_files={"lane": "lines_{split}"})
    assert data.classes["drivable"] == ("road", "background") and data.classes["lane"] == LANES
    assert data.read(1).labels["drivable"].ravel()[:3].tolist() == [0, 0, 1] and "lane" in data.read(1).labels
    options = {"masks": ["drivable", "lane"]}
    for option, value, parts in (
        ("seg_merge", {"direct": "road"}, ["seg_merge", "`masks` has no 'direct'", "known: drivable, lane"]),
        ("seg_merge", ["direct"], ["seg_merge", "a mapping by their names", "drivable, lane"]),
        ("seg_merge", {"drivable": {"direkt": "road"}}, ["seg_merge.drivable", "did you mean 'direct'"]),
        ("seg_merge", {"drivable": "road"}, ["seg_merge.drivable", "class name -> class name"]),
        ("mask_files", "lines_{split}", ["mask_files", "a mapping by their names"]),
        ("mask_files", {"lnae": "lines"}, ["mask_files", "no 'lnae'", "did you mean 'lane'"]),
        ("mask_files", {"lane": "none"}, ["mask_files.lane", "none' does not exist"]),
        ("mask_files", {"lane": "images"}, ["mask_files.lane", "none of the images", "'a.jpg' -> 'a.png'"]),
    ):
        with begins(*parts):
            official.open(**options, **{option: value})
    with says("mask_files", "a path is needed"):
        official.open(masks="drivable", mask_files={"drivable": "a"})
    with begins("masks", "'lane' is there twice"):
        official.open(masks=["lane", "lane"])


def test_sem_seg_beside_other_kinds_is_of_the_100k(official):
    official.image("images/10k/train/a.jpg")
    official.image("images/10k/train/z.jpg")
    official.mask("labels/sem_seg/masks/train/z.png", 0, 18)
    with begins("mask_files.sem_seg", "images/100k/train", "images/10k", "`images`"):
        official.open(masks=["drivable", "sem_seg"])
    official.mask("labels/sem_seg/masks/train/a.png", 0, 18)
    data = official.open(masks=["drivable", "sem_seg"])
    assert data.names == ["a.jpg", "b.jpg", "c.jpg"]
    assert sorted(data.read(0).labels) == ["det", "drivable", "sem_seg"]
    assert data.faults["images without a mask of 'sem_seg' (not labelled)"] == 2
    assert official.open(masks=["sem_seg"]).names == ["a.jpg", "z.jpg"]
    of_10k = official.open(masks=["drivable", "sem_seg"], images="images/10k/{split}")
    assert of_10k.names == ["a.jpg", "z.jpg"] and sorted(of_10k.read(1).labels) == ["sem_seg"]


# --- attributes of the image


WEATHER, TIMES = ATTRIBUTES["weather"], ATTRIBUTES["timeofday"]


def test_the_official_values():
    assert WEATHER == ("rainy", "snowy", "clear", "overcast", "partly cloudy", "foggy")
    assert TIMES == ("daytime", "night", "dawn/dusk")
    assert ATTRIBUTES["scene"] == (
        "tunnel", "residential", "parking lot", "city street", "gas stations", "highway"
    )  # fmt: skip


@pytest.mark.parametrize("tree", ["official", "per_image"])
def test_attributes_of_both_trees(tree, request):
    place = request.getfixturevalue(tree)
    place.frames[0]["attributes"] = {"weather": "partly cloudy", "scene": "undefined", "timeofday": "night"}
    place.frames[1]["attributes"] = {"weather": "undefined", "scene": "highway", "timeofday": "dawn/dusk"}
    data = place.open(attributes=["weather", "timeofday"])  # of frames b, a
    assert data.kinds == {"det": "detection", "weather": "classification", "timeofday": "classification"}
    assert data.classes["weather"] == WEATHER and data.classes["timeofday"] == TIMES
    a, b, c = (pickle.loads(pickle.dumps(data)).read(i).labels for i in range(3))
    assert sorted(a) == ["det", "timeofday"] and a["timeofday"] == 2
    assert sorted(b) == ["det", "timeofday", "weather"] and c == {}
    assert (b["weather"], b["timeofday"]) == (4, 1) and type(b["weather"]) is int
    assert data.seen["weather"].tolist() == [0, 0, 0, 0, 1, 0]
    assert data.seen["timeofday"].tolist() == [0, 1, 1]
    assert data.faults["images without 'weather' (not labelled)"] == 2
    assert data.faults["images without 'timeofday' (not labelled)"] == 1
    data.wanted = frozenset({"weather"})
    assert data.read(1).labels == {"weather": 4}


def test_attributes_without_boxes(official):
    official.frames[0]["attributes"] = {"scene": "tunnel"}
    official.frames[1]["labels"][0]["box2d"] = {}  # not looked at
    (official.root / "own").mkdir()
    official.json = "own/labels.json"
    data = official.open(attributes=["scene"], boxes=False, labels="own/labels.json")
    assert list(data.classes) == ["scene"]
    assert data.read(1).labels == {"scene": 0} and data.read(0).labels == {}
    both = official.open(attributes=["scene"], boxes=False, labels="own/labels.json", masks=["drivable"])
    assert sorted(both.read(1).labels) == ["drivable", "scene"]
    official.image("images/100k/train/b.jpg", (18, 32, 3))
    assert data.read(1).labels == {"scene": 0}  # of an image of any size


@pytest.mark.parametrize("tree", ["official", "per_image"])
def test_attributes_that_are_wrong(tree, request):
    place = request.getfixturevalue(tree)
    place.frames[1]["attributes"] = {"weather": "cleer"}
    with begins("labels", "'a' in '", "has weather 'cleer'", "did you mean 'clear'"):
        place.open(attributes=["weather"])
    assert len(place.open().read(0).labels["det"]) == 2  # not asked for
    place.frames[1]["attributes"] = {"weather": ["clear"]}
    with begins("labels", "has weather ['clear']"):
        place.open(attributes=["weather"])
    place.frames[1]["attributes"] = ["clear"]
    with begins("labels", "'attributes' of 'a'", "no mapping"):
        place.open(attributes=["weather"])
    place.frames[1]["attributes"] = {"weather": None}
    with begins("attributes", "says the weather of no image"):
        place.open(attributes=["weather"])


def test_options_of_attributes(official):
    with begins("attributes", "'wheather'", "did you mean 'weather'"):
        official.open(attributes=["wheather"])
    for given in ("weather", None, 5, {"weather": 1}):
        with begins("attributes", "a list of weather, scene, timeofday"):
            official.open(attributes=given)
    with begins("attributes", "'scene' is there twice"):
        official.open(attributes=["scene", "scene"])
    with begins("attributes", "'5' is unknown"):
        official.open(attributes=[5])
    official.frames = [{"name": "z.jpg", "attributes": {"scene": "tunnel"}}]
    with begins("labels", "none of the images", "leave `attributes` out"):
        official.open(attributes=["scene"], boxes=False)
    with begins("boxes", "`labels`", "remove them"):
        official.open(boxes=False, masks="drivable", labels="a.json")


# --- errors at construction


def test_which_tree(official, tmp_path):
    with says("tree", "offical", "did you mean 'official'"):
        official.open(tree="offical")
    (tmp_path / "det_annotations").mkdir()
    with says("tree", "both trees"):
        official.open()
    assert len(official.open(tree="official")) == 3
    (tmp_path / "empty").mkdir()
    with says("tree", "empty", "neither"):
        official.open(root=str(tmp_path / "empty"))
    with says("root", "'nowhere'", "does not exist"):
        official.open(root="nowhere")


def test_folders_of_other_names(per_image):
    boxes, root = per_image.open().read(0).labels["det"].boxes.tolist(), per_image.root
    shutil.move(root / "det_annotations", root / "boxes")
    shutil.move(root / "images", root / "pictures")
    options = {"labels": "boxes/{split}", "images": "pictures/{split}", "tree": "per_image", "masks": "lane"}
    again = Tree.open(per_image, mask_files=str(root / "ll_seg_annotations" / "{split}"), **options)
    assert again.read(0).labels["det"].boxes.tolist() == boxes and again.read(0).labels["seg"].sum() == 1


def test_missing_files_and_folders(official, per_image):
    with says("images", "images/100k/val", "does not exist"):
        official.open(split="val", tree="official")
    with says("labels", "none.json", "does not exist"):
        official.open(labels="none.json", tree="official")
    with says("mask_files", "lane/masks/train", "does not exist"):
        official.open(masks="lane", tree="official")
    (official.root / "labels/lane/masks/train").mkdir(parents=True)
    with says("mask_files", "lane/masks/train", "'a.jpg' -> 'a.png'"):
        official.open(masks="lane", tree="official")
    official.frames = [{"name": "z.jpg", "labels": []}]
    with says("labels", "det_train.json", "'a.jpg'", "`split`"):
        official.open(tree="official")
    with says("labels", "det_annotations/val", "does not exist"):
        Tree.open(per_image, tree="per_image", labels="det_annotations/val")


OFFICIAL_FAULTS = [
    ({"a": 1}, ["not a list of frames"]),
    ([{"labels": []}], ["frame 0", "'name'"]),
    ([5], ["frame 0", "'name'"]),
    ([{"name": "a.jpg", "labels": {}}], ["'labels' of frame 'a.jpg'", "not a list"]),
    ([{"name": "a.jpg", "labels": []}, {"name": "a.jpg", "labels": []}], ["'a.jpg'", "twice"]),
    ([{"name": "a.jpg", "labels": [lane(), {"box2d": {}}]}], ["object 1 of 'a'", "'category'"]),
    ([{"name": "a.jpg", "labels": [5]}], ["object 0 of 'a'", "'category'"]),
    ([{"name": "a.jpg", "labels": [label("car") | {"category": 3}]}], ["object 0 of 'a'", "'category'"]),
    ([{"name": "a.jpg", "labels": [label("car", ("1", 2, 3, 4))]}], ["object 0 of 'a'", "x1, y1, x2, y2"]),
    (
        [{"name": "a.jpg", "labels": [label("car", (1, 2, 3, float("nan")))]}],
        ["object 0 of 'a'", "x1, y1, x2, y2"],
    ),
    (
        [{"name": "a.jpg", "labels": [label("car") | {"box2d": {"x1": 1}}]}],
        ["object 0 of 'a'", "x1, y1, x2, y2"],
    ),
    (
        [{"name": "a.jpg", "labels": [label("car") | {"box2d": lane()}]}],
        ["object 0 of 'a'", "x1, y1, x2, y2"],
    ),
]


@pytest.mark.parametrize(("frames", "parts"), OFFICIAL_FAULTS, ids=lambda value: str(value)[:40])
def test_json_faults_are_named(official, frames, parts):
    official.frames = frames
    with says("labels", "det_train.json", *parts):
        official.open()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{\n]", ["not valid JSON", "line 2"]),
        ("[]", ["frames[0]"]),
        ('{"frames": []}', ["frames[0]"]),
        ('{"frames": [3]}', ["frames[0]"]),
        ('{"frames": [{"objects": 3}]}', ["'objects' of frames[0]", "not a list"]),
    ],
)
def test_damaged_label_files_are_named(per_image, content, parts):
    per_image.open()
    (per_image.root / "det_annotations/train/b.json").write_text(content)
    with says("labels", "b.json", *parts):
        Tree.open(per_image)


def test_options_that_contradict(official):
    with says("masks", "nothing is labelled"):
        official.open(boxes=False)
    with says("masks", "`seg_merge`", "remove them"):
        official.open(seg_merge={"direct": "road"})
    with says("boxes", "`det_classes`", "remove them"):
        official.open(boxes=False, masks="drivable", det_classes=["car"])
    for masks in ("drivabel", ["lane", "drivabel"], [], [["lane"]], 5):
        with says("masks", "no", "drivable, sem_seg, lane"):
            official.open(masks=masks)
    for size in (5, [16], [16.0, 9], [0, 9]):
        with says("size", "whole pixels"):
            official.open(size=size)
    with says("data.boxes", "true or false"):
        LAYOUTS.check("bdd100k", {"root": "a", "boxes": "no"}, "data")


# --- real data


@pytest.mark.real_data
def test_official_label_files_with_real_frames(real, tmp_path):
    """Frames and labels of different scenes, brought together under one name: the files are real, the match
    is not."""
    cases = real("samples/bdd100k_official_testcases")
    frames = sorted(real("samples/bdd100k_images_unlabeled").glob("*.jpg"))
    names = ["00091078-875c1f73-0000166", "00091078-875c1f73-0000167", "fe189115-9981a740"]
    (tmp_path / "images").mkdir()
    for name, frame in zip(names, frames, strict=False):
        (tmp_path / "images" / f"{name}.jpg").symlink_to(frame)
    data = BDD100K(
        root=str(cases), tree="official", images=str(tmp_path / "images"), labels="label/example_ignore_annotation.json",
        masks="lane", mask_files="eval/lane/gts",
    )  # fmt: skip
    ignored, empty, lanes = (data.read(i) for i in range(3))
    people = ignored.labels["det"]
    assert [CLASSES[c] for c in people.classes] == ["pedestrian"] * 2
    assert people.crowd.tolist() == [True, False]
    assert np.allclose(people.boxes[1], [68.0515, 301.7666, 108.7226, 426.2931], atol=1e-3)
    assert len(empty.labels["det"]) == 0 and "det" not in lanes.labels and "seg" not in ignored.labels
    assert {LANES[v] for v in np.unique(lanes.labels["seg"])} == {
        "crosswalk", "road curb", "single white", "single yellow", "background"
    }  # fmt: skip
    assert 0.9 < (lanes.labels["seg"] == LANES.index("background")).mean() < 1
    with says("attributes", "says the weather of no image"):  # these files have none
        BDD100K(
            root=str(cases), tree="official", images=str(tmp_path / "images"), attributes=["weather"],
            labels="label/example_ignore_annotation.json",
        )  # fmt: skip


@pytest.mark.real_data
def test_official_masks_as_labels_of_their_own(real, tmp_path):
    cases = real("samples/bdd100k_official_testcases")
    frames = sorted(real("samples/bdd100k_images_unlabeled").glob("*.jpg"))
    for name, frame in zip(["semseg_mask", "fe189115-9981a740"], frames, strict=False):
        (tmp_path / f"{name}.jpg").symlink_to(frame)
    data = BDD100K(
        root=str(cases), tree="official", images=str(tmp_path), boxes=False, masks=["lane", "sem_seg"],
        mask_files={"lane": "eval/lane/gts", "sem_seg": "label"},
    )  # fmt: skip
    lanes, semantic = (data.read(i).labels for i in range(2))
    assert list(semantic) == ["sem_seg"] and list(lanes) == ["lane"]
    found = {data.classes["sem_seg"][v] for v in np.unique(semantic["sem_seg"]) if v != IGNORE}
    assert semantic["sem_seg"].shape == (720, 1280) and found == {"car"}
    assert "crosswalk" in {LANES[v] for v in np.unique(lanes["lane"])}
