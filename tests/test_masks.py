"""Layouts of images and index masks, ``masks`` and ``coco_stuff``, on sets of a few pixels; real files where
they are present."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from expect import begins, says
from PIL import Image

from multitask_kd.batch import IGNORE
from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.classes import choose, named_indices, occurrences, spans
from multitask_kd.data.layouts.coco_stuff import FORMS, NAMES, UNUSED, USED, CocoStuff
from multitask_kd.data.layouts.masks import Masks


class Folder:
    """images/ and masks/ under ``root``, of 3x2 pixels."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("images", "masks"):
            (root / name).mkdir()
        self.pair("a.jpg", [[0, 1, 1], [7, 8, 255]])
        self.pair("town/b.png", [[1, 1, 1], [1, 1, 0]])

    def pair(self, name: str, indices: list[list[int]]) -> None:
        pixels = np.array(indices, np.uint8)
        path = self.root / "images" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((*pixels.shape, 3), 50, np.uint8)).save(path)
        self.mask(os.path.splitext(name)[0] + ".png", pixels)

    def mask(self, name: str, pixels: np.ndarray) -> None:
        path = self.root / "masks" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)

    def rename(self, ends: dict[str, str]) -> None:
        """Give every file of the folder ``key`` the ending ``value`` in place of its extension."""
        for folder, end in ends.items():
            for path in [p for p in (self.root / folder).rglob("*") if p.is_file()]:
                path.rename(path.with_name(path.stem + end))

    def open(self, kind=Masks, **options):
        plain = {"seg_classes": {0: "road", 1: "car", 7: "car", 8: "sky"}} if kind is Masks else {}
        return kind(**{"root": str(self.root), "images": "images", "masks": "masks"} | plain | options)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --- masks


def test_registered_with_its_options():
    assert LAYOUTS.get("masks", "data") is Masks and LAYOUTS.get("coco_stuff", "data") is CocoStuff
    with says("data: needs masks, seg_classes"):
        LAYOUTS.check("masks", {"images": "a"}, "data")
    LAYOUTS.check("coco_stuff", {"images": "a", "masks": "b", "annotations": "c", "unused": True}, "data")


def test_pairs_with_gaps_and_merged_indices(folder):
    data = folder.open()
    assert [data.name(i) for i in range(len(data))] == ["a.jpg", "town/b.png"]
    assert data.classes == {"seg": ("road", "car", "sky")}
    sample = data.read(0)
    assert sample.labels["seg"].tolist() == [[0, 1, 1], [1, 2, IGNORE]]  # 7 is a car too, 8 the third
    assert list(sample.labels) == ["seg"] and sample.labels["seg"].dtype == np.uint8
    assert sample.image.shape == (2, 3, 3)
    assert data.read(1).labels["seg"].tolist() == [[1, 1, 1], [1, 1, 0]]
    with pytest.raises(IndexError):
        data.read(2)
    assert (pickle.loads(pickle.dumps(data)).read(0).labels["seg"] == sample.labels["seg"]).all()


def test_void_may_come_first(folder):
    data = folder.open(seg_classes=["nothing", "car", "x", "y", "z", "u", "v", "bus", "sky"], void=[0])
    assert data.classes["seg"][:2] == ("car", "x") and len(data.classes["seg"]) == 8
    assert data.read(0).labels["seg"].tolist() == [[IGNORE, 0, 0], [6, 7, IGNORE]]


def test_class_list_from_a_file(folder):
    (folder.root / "names.json").write_text(
        json.dumps({"8": "sky", "1": "car", "7": "bus", "0": "road", "255": "void"})
    )
    data = folder.open(seg_classes="names.json")
    assert data.classes["seg"] == ("road", "car", "bus", "sky")  # by index, not as written
    assert data.read(0).labels["seg"].tolist() == [[0, 1, 1], [2, 3, IGNORE]]


def test_suffixes(folder):
    folder.rename({"images": "_left.png", "masks": "_ids.png"})
    (folder.root / "images" / "readme_right.png").write_bytes(b"")
    data = folder.open(image_suffix="_left.png", mask_suffix="_ids.png")
    assert [data.name(i) for i in range(2)] == ["a_left.png", "town/b_left.png"]
    assert data.read(1).labels["seg"].tolist() == [[1, 1, 1], [1, 1, 0]]
    with says("image_suffix", "'_rihgt.png'", "images"):
        folder.open(image_suffix="_rihgt.png")


def test_images_beside_their_masks(folder):
    for path in (folder.root / "masks").rglob("*.png"):
        path.rename(folder.root / "images" / path.name)
    (folder.root / "images/town/b.png").unlink()
    Image.new("RGB", (3, 2)).save(folder.root / "images" / "b.jpg")
    with says("image_suffix", "'a.jpg' and 'a.png'", "the mask 'a.png'"):
        folder.open(masks="images")
    assert [*map(folder.open(masks="images", image_suffix=".jpg").name, range(2))] == ["a.jpg", "b.jpg"]


def test_index_without_a_name(folder):
    with says("masks/a.png", "index 7", "known are 0 to 1, 8, 255", "`void`", "`seg_classes`"):
        folder.open(seg_classes={0: "road", 1: "car", 8: "sky"}).read(0)
    ignored = folder.open(seg_classes={0: "road", 1: "car", 8: "sky"}, void=[7]).read(0)
    assert ignored.labels["seg"][1].tolist() == [IGNORE, 2, IGNORE]


def test_missing_and_malformed_files(folder):
    with says("masks", "none", "does not exist"):
        folder.open(masks="none")
    with says("images", "none", "does not exist"):
        folder.open(images="none")
    data = folder.open()
    folder.mask("a.png", np.zeros((2, 2), np.uint8))
    with says("masks/a.png' is 2x2", "images/a.jpg' is 3x2"):
        data.read(0)
    folder.mask("a.png", np.zeros((2, 3, 3), np.uint8))
    with says("masks/a.png", "colour image"):
        data.read(0)
    (folder.root / "masks/a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with says("masks/a.png", "cannot be decoded"):
        data.read(0)
    (folder.root / "images/a.jpg").write_bytes(b"")
    with says("images/a.jpg", "cannot be decoded"):
        data.read(0)
    os.unlink(folder.root / "masks/town/b.png")
    with says("masks", "'town/b.png' is missing", "1 of 2", "'a.jpg' is called 'a.png'", "mask_suffix"):
        folder.open()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["a", "a"], "'a' is there twice"),
        ([], "list of class names"),
        (["a", None], "list of class names"),
        ({}, "names of mask indices"),
        ({"a": 0}, "names of mask indices"),
        ({300: "a"}, "names of mask indices"),
        ({0: ["a"]}, "list of class names"),
        (7, "names of mask indices"),
        ("none.json", "does not exist"),
    ],
)
def test_class_lists_that_are_none(folder, given, why):
    with says("seg_classes", why):
        folder.open(seg_classes=given)


def test_options_that_are_wrong(folder, monkeypatch):
    with says("void", "0 to 255"):
        folder.open(void=255)
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    with says("images", "NO_SUCH_PLACE"):
        folder.open(images="$NO_SUCH_PLACE")


def test_cache(folder, monkeypatch):
    data = folder.open(cache=str(folder.root / "cache"))
    first = data.read(0)
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail(f"{path} was decoded again"))
    assert (data.read(0).labels["seg"] == first.labels["seg"]).all()
    assert len(list((folder.root / "cache").iterdir())) == 2


def test_helpers(tmp_path):
    assert spans([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"
    found = np.array([2, 0, -1, 2, 2])
    assert occurrences(found, 4).tolist() == [1, 0, 3, 0] and occurrences(found[:0], 2).tolist() == [0, 0]
    assert occurrences(found, 3, found == 0).tolist() == [0, 0, 3]
    assert named_indices({3: "b", 1: "a", 2: "b", 4: "c"}, [4]) == {"a": [1], "b": [2, 3]}
    assert choose(None, ["a", "b"], "x") == {"a": ("a",), "b": ("b",)}
    assert choose({"all": ["b", "a"], "c": "c"}, ["a", "b", "c"], "x") == {"all": ("b", "a"), "c": ("c",)}
    (tmp_path / "classes.json").write_text('["b"]')
    assert choose("classes.json", ["a", "b"], "x", str(tmp_path)) == {"b": ("b",)}
    for given, why in (
        (["aa"], "did you mean 'a'"),
        (["a", "a"], "twice"),
        ({"x": ["a"], "y": "a"}, "twice"),
        ({"x": []}, "list of class names"),
        ({"x": 3}, "list of class names"),
        (3, "list of class names"),
    ):
        with says("seg_classes", why):
            choose(given, ["a"], "seg_classes")


# --- several labels


SEVERAL = {
    "masks": {"drivable": "masks", "lane": "lanes"},
    "seg_classes": {"drivable": {0: "road", 1: "car", 7: "car", 8: "sky"}, "lane": ["none", "line", "odd"]},
}


@pytest.fixture
def several(folder) -> Folder:
    """The masks, and in lanes/ one for town/b.png alone."""
    (folder.root / "lanes/town").mkdir(parents=True)
    Image.fromarray(np.array([[1, 0, 2], [0, 255, 0]], np.uint8)).save(folder.root / "lanes/town/b.png")
    return folder


def test_each_folder_is_a_label(several):
    data = several.open(**SEVERAL, void={"lane": [2]})
    assert data.classes == {"drivable": ("road", "car", "sky"), "lane": ("none", "line")}
    assert data.kinds == {"drivable": "semantic", "lane": "semantic"}
    assert data.faults == {"images without a mask of 'lane' (not labelled)": 1}
    first, second = pickle.loads(pickle.dumps(data)).read(0), data.read(1)
    assert list(first.labels) == ["drivable"]
    assert first.labels["drivable"].tolist() == [[0, 1, 1], [1, 2, IGNORE]]
    assert second.labels["drivable"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert second.labels["lane"].tolist() == [[1, 0, IGNORE], [0, IGNORE, 0]]


def test_only_wanted_masks_are_read(several):
    data = several.open(**SEVERAL)
    data.wanted = frozenset({"drivable"})
    (several.root / "lanes/town/b.png").write_bytes(b"no image")
    assert list(data.read(1).labels) == ["drivable"]
    data.wanted = None
    with says("lanes/town/b.png", "cannot be decoded"):
        data.read(1)


def test_an_index_without_a_name_is_told_with_its_label(several):
    data = several.open(**SEVERAL | {"seg_classes": SEVERAL["seg_classes"] | {"lane": ["none", "line"]}})
    with says("lanes/town/b.png", "index 2", "`void.lane`", "`seg_classes.lane`"):
        data.read(1)


def test_a_label_without_any_mask(several):
    os.unlink(several.root / "lanes/town/b.png")
    with begins("masks.lane", "none of the 2 images has a mask", "lanes", "'a.jpg' is called 'a.png'"):
        several.open(**SEVERAL)
    with begins("masks.lane", "nowhere' does not exist"):
        several.open(**SEVERAL | {"masks": {"drivable": "masks", "lane": "nowhere"}})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"seg_classes": ["road"]}, ["seg_classes", "a mapping by their names", "drivable, lane"]),
        ({"seg_classes": {"drivable": ["a"]}}, ["seg_classes", "'lane'", "are needed", "add lane: [...]"]),
        ({"seg_classes": {"drivable": ["a"], "lnae": []}}, ["seg_classes", "'lnae'", "did you mean 'lane'"]),
        ({"seg_classes": {"drivable": ["a"], "lane": 5}}, ["seg_classes.lane", "names of mask indices"]),
        ({"seg_classes": {"drivable": ["a"], "lane": "no.json"}}, ["seg_classes.lane", "does not exist"]),
        ({"void": [2]}, ["void", "a mapping by their names", "not [2]"]),
        ({"void": {"drivabel": [2]}}, ["void", "no 'drivabel'", "did you mean 'drivable'"]),
        ({"void": {"lane": 2}}, ["void.lane", "0 to 255"]),
        ({"masks": {}}, ["masks", "from names of labels to folders"]),
        ({"masks": {3: "masks"}}, ["masks", "from names of labels to folders"]),
        ({"masks": {"drivable": "masks", "lane": None}}, ["masks.lane", "a path is needed"]),
    ],
)
def test_options_that_do_not_go_together(several, change, parts):
    with begins(*parts):
        several.open(**SEVERAL | change)


def test_class_lists_in_text_files(several):
    (several.root / "lanes.txt").write_text("none\nline\nodd\n")
    data = several.open(**SEVERAL | {"seg_classes": SEVERAL["seg_classes"] | {"lane": "lanes.txt"}})
    assert data.classes["lane"] == ("none", "line", "odd")
    (several.root / "names.txt").write_text("road\nroad\n")
    with begins("seg_classes ('", "names.txt", "'road' is there twice"):
        several.open(seg_classes="names.txt")


def test_mappings_are_for_several_folders_only(several):
    with says("seg_classes", "names of mask indices"):
        several.open(seg_classes=SEVERAL["seg_classes"])
    with says("void", "a list of mask indices"):
        several.open(void={"seg": [7]})


# --- coco_stuff


def test_numbering():
    """Category ids as the data set publishes them."""
    ids = {
        1: "person",
        12: "street sign",
        13: "stop sign",
        90: "toothbrush",
        92: "banner",
        157: "sky-other",
        182: "wood",
    }
    assert (
        all(NAMES[key - 1] == name for key, name in ids.items())
        and len(set(NAMES)) == 182
        and len(UNUSED) == 11
    )
    assert len(USED) == 171 and USED[11] == "stop sign" and USED[79:81] == ("toothbrush", "banner")
    assert {"hat", "blender", "hair brush", "window"}.isdisjoint(USED) and {"wood", "window-other"} <= set(
        USED
    )
    index = {form: index_of for form, (index_of, _, _) in FORMS.items()}
    assert index["stuffthingmaps"]["sky-other"] == 156 and index["labelTrainIds"]["sky-other"] == 156 - 11
    assert (
        index["pixelmaps"]["banner"] == 92
        and index["pixelmaps"]["other"] == 183
        and len(index["pixelmaps"]) == 92
    )


def test_stuffthingmaps(folder):
    """0 is person (id 1), 1 bicycle, 7 truck, 8 boat."""
    data = folder.open(CocoStuff)
    assert data.classes == {"seg": USED}
    assert data.read(0).labels["seg"].tolist() == [[0, 1, 1], [7, 8, IGNORE]]
    assert list(data.read(0).labels) == ["seg"]
    folder.mask("a.png", np.full((2, 3), 12, np.uint8))  # stop sign, id 13: the first after an unused one
    assert (data.read(0).labels["seg"] == 11).all()
    whole = folder.open(CocoStuff, unused=True)
    assert whole.classes["seg"] == NAMES and (whole.read(0).labels["seg"] == 12).all()
    folder.mask("a.png", np.full((2, 3), 11, np.uint8))
    with says("masks/a.png", "index 11", "known are 0 to 10, 12 to 24", "stuffthingmaps"):
        data.read(0)


def test_classes_are_chosen_and_merged_by_name(folder):
    data = folder.open(CocoStuff, seg_classes={"vehicle": ["truck", "boat"], "person": "person"})
    assert data.classes["seg"] == ("vehicle", "person")
    # bicycles are left out
    assert data.read(0).labels["seg"].tolist() == [[1, IGNORE, IGNORE], [0, 0, IGNORE]]
    with says("seg_classes", "no class of COCO-Stuff is called 'persn'", "did you mean 'person'"):
        folder.open(CocoStuff, seg_classes=["persn"])


def test_other_forms(folder):
    folder.mask("a.png", np.array([[92, 182, 183], [0, 0, 255]], np.uint8))
    data = folder.open(CocoStuff, form="pixelmaps")
    assert len(data.classes["seg"]) == 92 and data.classes["seg"][-1] == "other"
    assert data.read(0).labels["seg"].tolist() == [[0, 90, 91], [IGNORE, IGNORE, IGNORE]]
    with says("index 182", "known are 0 to 10, 12", "91 to 181, 255", "stuffthingmaps"):
        folder.open(CocoStuff).read(0)
    folder.rename({"masks": "_labelTrainIds.png"})
    folder.mask("a_labelTrainIds.png", np.array([[0, 11, 170], [80, 0, 255]], np.uint8))
    mask = folder.open(CocoStuff, form="labelTrainIds").read(0).labels["seg"]
    assert mask.tolist() == [[0, 11, 170], [80, 0, IGNORE]]
    with says("form", "did you mean 'pixelmaps'"):
        folder.open(CocoStuff, form="pixelmap")
    with says("unused", "stuffthingmaps"):
        folder.open(CocoStuff, form="pixelmaps", unused=True)


def test_boxes_from_an_instances_json(folder):
    index = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 3, "height": 2}],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 8, "bbox": [1, 0, 1, 2], "area": 2, "iscrowd": 1}
        ],
        "categories": [{"id": 8, "name": "truck"}, {"id": 1, "name": "person"}],
    }
    (folder.root / "i.json").write_text(json.dumps(index))
    data = folder.open(CocoStuff, annotations="i.json")
    assert len(data) == 1 and data.name(0) == "a.jpg"  # the images that the JSON lists
    assert data.classes["det"] == ("person", "truck") and data.classes["seg"] == USED
    sample = data.read(0)
    found = sample.labels["det"]
    assert found.boxes.tolist() == [[1, 0, 2, 2]]
    assert found.classes.tolist() == [1] and found.crowd.tolist() == [True]
    assert data.kinds == {"seg": "semantic", "det": "detection"}
    assert data.seen["det"].tolist() == [0, 0]  # a crowd alone
    assert sample.labels["seg"].tolist() == [[0, 1, 1], [7, 8, IGNORE]]
    chosen = folder.open(CocoStuff, annotations="i.json", det_classes=["truck"])
    assert chosen.read(0).labels["det"].classes.tolist() == [0]
    for name in ("det", "seg"):
        chosen.wanted = frozenset({name})
        assert list(chosen.read(0).labels) == [name]
    with says("det_classes", "`annotations`"):
        folder.open(CocoStuff, det_classes=["truck"])
    with says("annotations", "none.json"):
        folder.open(CocoStuff, annotations="none.json")
    folder.mask("a.png", np.zeros((2, 2), np.uint8))
    with says("masks/a.png' is 2x2", "images/a.jpg' is 3x2"):
        data.read(0)


# --- real data


@pytest.mark.real_data
def test_coco_stuff_photographs(real):
    """What is to be seen on three of them, larger than a quarter of the picture."""
    root = real("samples/coco_stuff13")
    data = CocoStuff(root=str(root), images="train_img", masks="train_label")
    assert len(data) == 13 and not data.faults
    seen = {
        "000000138805.jpg": {"sky-other", "sea"},
        "000000184101.jpg": {"oven"},
        "000000203744.jpg": {"fog"},
    }
    for index in range(13):
        sample = data.read(index)
        assert sample.labels["seg"].shape == sample.image.shape[:2]
        if data.name(index) in seen:
            counts = np.bincount(sample.labels["seg"].ravel(), minlength=256)[:171]
            large = {USED[c] for c in np.flatnonzero(counts > sample.labels["seg"].size / 4)}
            assert large == seen[data.name(index)]


@pytest.mark.real_data
def test_camvid_by_its_folders(real):
    root = real("camvid")
    data = Masks(
        root=str(root), images="images/val", masks="masks/val", seg_classes="classes.json", void=[11]
    )
    assert len(data) == 101 and len(data.classes["seg"]) == 11 and data.classes["seg"][0] == "Sky"
    assert set(np.unique(data.read(50).labels["seg"])) <= {*range(11), IGNORE}
