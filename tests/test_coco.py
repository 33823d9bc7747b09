"""The COCO layout and the file reading below it, on sets of a few pixels; the real sets where they are
present."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from expect import says
from PIL import Image
from pycocotools import mask as mask_utils

from multitask_kd.batch import IGNORE
from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.files import Files, class_names, decode_image, decode_mask, expand
from multitask_kd.data.layouts.coco import Coco, _rle_length

WIDTH, HEIGHT = 12, 8  # of every image here
NAMES = ["road", "car", "tree"]  # of the mask indices 0, 1, 2


def square(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def thing(key: int, image: int, category: int, bbox: list[float], **more) -> dict:
    outline = [square(*bbox)]
    return {
        "id": key, "image_id": image, "category_id": category, "bbox": bbox,
        "area": bbox[2] * bbox[3] - 1, "iscrowd": 0, "segmentation": outline, **more,
    }  # fmt: skip


def index() -> dict:
    """Image 7: a person of 6x4 with a dog of 2x2 upon it; image 3: nothing; image 9: a crowd of dogs."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (7, 3, 9)],
        "annotations": [
            thing(1, 7, 90, [3, 2, 2, 2]),
            thing(2, 9, 90, [0, 0, 4, 8], iscrowd=1, segmentation={"size": [8, 12], "counts": [0, 32, 64]}),
            thing(3, 7, 18, [1, 1, 6, 4]),
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 18, "name": "person"}],
    }


class Folder:
    """A COCO set under ``root`` that a test bends before ``open``."""

    def __init__(self, root: Path):
        self.root, self.json = root, index()
        (root / "images").mkdir()
        (root / "masks").mkdir()
        for place, entry in enumerate(self.json["images"]):
            self.image(entry["file_name"], np.full((HEIGHT, WIDTH, 3), 10 * place, np.uint8))
            self.mask(
                entry["file_name"], np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
            )

    def image(self, name: str, pixels: np.ndarray) -> Path:
        Image.fromarray(pixels).save(self.root / "images" / name)
        return self.root / "images" / name

    def mask(self, name: str, pixels: np.ndarray) -> Path:
        Image.fromarray(pixels).save(self.root / "masks" / name)
        return self.root / "masks" / name

    def open(self, **options) -> Coco:
        (self.root / "index.json").write_text(json.dumps(self.json))
        return Coco(**{"root": str(self.root), "images": "images", "annotations": "index.json"} | options)

    def open_masks(self, **options) -> Coco:
        return self.open(**{"masks": "masks", "seg_classes": NAMES} | options)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --- what is read


def test_registered_with_its_options():
    assert LAYOUTS.get("coco", "data") is Coco
    LAYOUTS.check(
        "coco", {"images": "a", "annotations": "b", "masks": "c", "void": [11], "cache": "d"}, "data"
    )
    with says("data", "annotations"):
        LAYOUTS.check("coco", {"images": "a"}, "data")


def test_boxes_classes_crowd_and_area(folder):
    data = folder.open()
    assert len(data) == 3 and data.name(1) == "3.png"
    assert data.classes["det"] == ("person", "dog")  # by id: 18, 90
    first, empty, crowd = (data.read(i) for i in range(3))
    found, none = first.labels["det"], empty.labels["det"]
    assert found.boxes.tolist() == [[3, 2, 5, 4], [1, 1, 7, 5]]  # x,y,w,h -> corners
    assert found.classes.tolist() == [1, 0] and found.area.tolist() == [3, 23] and not found.crowd.any()
    assert none.boxes.shape == (0, 4) and len(none.classes) == len(none.crowd) == len(none.area) == 0
    assert crowd.labels["det"].crowd.tolist() == [True]
    arrays = first.image, first.labels["seg"], found.boxes, found.classes, found.crowd, found.area
    assert [a.dtype for a in arrays] == [
        np.uint8, np.uint8, np.float32, np.int64, np.bool_, np.float32
    ]  # fmt: skip
    assert not data.faults
    with pytest.raises(IndexError):
        data.read(3)


def test_what_is_read_is_the_callers_own(folder):
    data = folder.open_masks(cache=str(folder.root / "cache"))
    for _ in range(2):
        sample = data.read(0)
        found = sample.labels["det"]
        for array in (sample.image, sample.labels["seg"], found.boxes, found.area):
            assert array.flags.writeable
            array += 1
    sample = data.read(0)
    assert sample.labels["det"].boxes.tolist() == [[3, 2, 5, 4], [1, 1, 7, 5]] and sample.image.max() == 0


def test_det_classes_select_and_order(folder):
    data = folder.open(det_classes=["dog"])
    assert data.classes == {"det": ("dog",), "seg": ("background", "dog")}
    assert data.read(0).labels["det"].classes.tolist() == [0] and data.read(0).labels["seg"].max() == 1
    assert folder.open(det_classes=["dog", "person"]).read(0).labels["det"].classes.tolist() == [0, 1]


def test_bad_boxes_are_dropped_and_counted(folder):
    folder.json["annotations"] += [
        thing(4, 3, 18, [20, 1, 3, 3]), thing(5, 3, 18, [1, 1, 0, 3]), thing(6, 3, 18, [8, 6, 8, 8])
    ]  # fmt: skip
    del folder.json["annotations"][-1]["area"]
    data = folder.open()
    objects = data.read(1).labels["det"]
    assert objects.boxes.tolist() == [[8, 6, 12, 8]] and objects.area.tolist() == [64]
    assert data.faults == {
        "boxes outside the image (dropped)": 1,
        "boxes of zero or negative size (dropped)": 1,
        "boxes without an area (width x height is used)": 1,
    }


def test_boxes_only(folder):
    for entry in folder.json["annotations"]:
        del entry["segmentation"]
    data = folder.open(segment=False)
    sample = data.read(0)
    assert set(data.classes) == {"det"} and "seg" not in sample.labels and len(sample.labels["det"]) == 2
    with says("no object", "segmentation", "`masks`", "segment: false"):
        folder.open()


def test_pickle_is_small_and_reads_the_same(folder):
    folder.json["info"] = "x" * 100_000
    data = folder.open(cache=str(folder.root / "cache"))
    packed = pickle.dumps(data)
    assert len(packed) < 5_000
    again = pickle.loads(packed)
    assert (again.read(2).labels["seg"] == data.read(2).labels["seg"]).all() and again.classes == data.classes


# --- masks


def test_drawn_small_over_large(folder):
    data = folder.open()
    person = np.zeros((HEIGHT, WIDTH), np.uint8)
    person[1:5, 1:7] = 1
    person[2:4, 3:5] = 2  # the dog stands first in the JSON, and is smaller
    assert data.classes["seg"] == ("background", "person", "dog")
    assert (data.read(0).labels["seg"] == person).all()
    assert not data.read(1).labels["seg"].any()


def test_drawn_from_rle_polygons_and_crowds(folder):
    """[0, 32, 64] in columns of 8: none off, four columns on, the rest off."""
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:, :4] = 2
    packed = mask_utils.encode(np.asfortranarray(expected // 2))
    forms = [{"size": [8, 12], "counts": [0, 32, 64]}, {"size": [8, 12], "counts": packed["counts"].decode()}]
    for outline in [*forms, [square(0, 0, 2, 8), square(2, 0, 2, 8)]]:
        folder.json["annotations"][1]["segmentation"] = outline
        assert (folder.open().read(2).labels["seg"] == expected).all()


def test_drawn_classes_may_be_chosen(folder):
    data = folder.open(seg_classes=["other", "dog"])
    assert data.classes == {"det": ("person", "dog"), "seg": ("other", "dog")}
    assert data.read(0).labels["seg"].sum() == 4  # the dog's 2x2; the person is not drawn
    with says("seg_classes", "'dgo'", "did you mean 'dog'"):
        folder.open(seg_classes=["other", "dgo"])


def test_without_an_outline_the_box_is_ignored(folder):
    folder.json["annotations"][2]["segmentation"] = [
        [1, 1, 3, 3]
    ]  # two points: no polygon, and no box either
    data = folder.open()
    mask = data.read(0).labels["seg"]
    assert (mask == IGNORE).sum() == 6 * 4 - 2 * 2 and (mask == 2).sum() == 4
    assert data.faults == {
        "polygons of fewer than three points (dropped)": 1,
        "objects without an outline (their box is ignored in the mask)": 1,
    }


def test_rle_length_agrees_with_pycocotools():
    random = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (40, 30), (200, 150)):
        for density in (0.0, 0.01, 0.5, 1.0):
            pixels = np.asfortranarray(random.random((height, width)) < density, dtype=np.uint8)
            assert _rle_length(mask_utils.encode(pixels)["counts"].decode()) == height * width
    for damaged in ("", "zzzz", "o", "\x01", "é", None, [3, -1], [0.5], "o" * 40 + "0"):
        assert _rle_length(damaged) == -1


def test_masks_from_files(folder):
    pixels = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
    pixels[0, :2] = 3, 255
    folder.mask("7.png", pixels)
    mask = folder.open_masks(void=[3]).read(0).labels["seg"]
    assert (mask[0, :2] == IGNORE).all() and (mask[1:] == pixels[1:]).all()
    with says("7.png", "index 3", "0 to 2", "`void`", "`seg_classes`"):
        folder.open_masks().read(0)


def test_masks_beside_images_in_subfolders(folder):
    for kind in ("images", "masks"):
        (folder.root / kind / "town").mkdir()
        (folder.root / kind / "7.png").rename(folder.root / kind / "town" / "7.png")
    folder.json["images"][0]["file_name"] = "town/7.png"
    assert folder.open_masks().read(0).labels["seg"].max() == 2


def test_palette_masks_give_their_indices(folder):
    image = Image.new("P", (WIDTH, HEIGHT), 2)
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(folder.root / "masks" / "7.png")
    assert (folder.open_masks().read(0).labels["seg"] == 2).all()


def grey_png(path: Path, bits: int, row: bytes, width: int) -> str:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return str(path)


@pytest.mark.parametrize(
    ("bits", "row", "indices"),
    [
        (1, b"\x50", [0, 1, 0, 1]),
        (2, b"\x1b", [0, 1, 2, 3]),
        (4, b"\x12\xf0", [1, 2, 15, 0]),
        (16, b"\0\1\0\2\0\xff\0\0", [1, 2, 255, 0]),
    ],
)
def test_masks_of_other_depths_keep_their_indices(tmp_path, bits, row, indices):
    assert decode_mask(grey_png(tmp_path / "mask.png", bits, row, 4)).tolist() == [indices]


def test_masks_above_255_are_refused(tmp_path):
    with says("mask.png", "index 256"):
        decode_mask(grey_png(tmp_path / "mask.png", 16, b"\1\0", 1))


def test_class_names_less_void(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"2": "c", "0": "a", "1": "b", "3": "nothing", "255": "void"}))
    assert class_names(str(path), [3]) == ("a", "b", "c")
    assert class_names(["a", "b"], []) == class_names({0: "a", 1: "b"}, []) == ("a", "b")
    for given, void, why in (
        (["a", "b", "c"], [1], "index 1 is void, but 'c' follows"),
        ({"0": "a", "2": "c"}, [], "index 1 has no name"),
        (["a", "a"], [], "'a' is there twice"),
        ({"a": 0}, [], "names by index"),
        ([], [], "list of class names"),
    ):
        with says("seg_classes", why):
            class_names(given, void)


# --- masks of several labels


def test_each_folder_of_masks_is_a_label(folder):
    (folder.root / "lanes").mkdir()
    Image.fromarray(np.full((HEIGHT, WIDTH), 4, np.uint8)).save(folder.root / "lanes/3.png")
    os.unlink(folder.root / "masks/9.png")
    masks, names = {"area": "masks", "lane": "lanes"}, {"area": NAMES, "lane": {0: "none", 4: "line"}}
    data = folder.open(masks=masks, seg_classes=names, void={"area": [1]})
    assert data.classes == {"det": ("person", "dog"), "area": ("road", "tree"), "lane": ("none", "line")}
    assert data.kinds == {"det": "detection", "area": "semantic", "lane": "semantic"}
    assert data.faults == {
        "images without a mask of 'area' (not labelled)": 1,
        "images without a mask of 'lane' (not labelled)": 2,
    }
    given = [sorted(data.read(i).labels) for i in range(3)]
    assert given == [["area", "det"], ["area", "det", "lane"], ["det"]]
    assert data.read(0).labels["area"][0, :3].tolist() == [0, IGNORE, 1]  # stored 0, 1, 2
    assert (data.read(1).labels["lane"] == 1).all() and len(data.read(0).labels["det"]) == 2
    data.wanted = frozenset({"lane"})
    assert [list(data.read(i).labels) for i in range(3)] == [[], ["lane"], []]


def test_options_of_several_labels_that_contradict(folder):
    several = {"masks": {"area": "masks"}, "seg_classes": {"area": NAMES}}
    assert list(folder.open(**several).classes) == ["det", "area"]
    with says("seg_classes", "no 'aera'", "did you mean 'area'"):
        folder.open(**several | {"seg_classes": {"aera": NAMES}})
    with says("seg_classes", "needs the names"):
        folder.open(masks=several["masks"])
    with says("void", "a mapping by their names"):
        folder.open(**several, void=[3])
    with says("segment: false", "remove them"):
        folder.open(**several, segment=False)
    with says("masks", "'det' is what the boxes are called"):
        folder.open(masks={"det": "masks"}, seg_classes={"det": NAMES})
    with says("masks.lane", "none of the 3 images has a mask", "'7.png' -> '7.png'"):
        (folder.root / "lanes").mkdir()
        folder.open(masks={"lane": "lanes"}, seg_classes={"lane": NAMES})
    with says("masks", "a path is needed"):
        folder.open(masks=["masks"], seg_classes=NAMES)


def test_classes_that_never_occur_are_told(folder):
    """An annotation tool lists every category; a crowd is no object to learn from, but it is drawn."""
    folder.json["categories"] += [{"id": 200, "name": "horse"}]
    data = folder.open()
    assert data.classes["det"] == ("person", "dog", "horse")
    assert data.seen["det"].tolist() == [1, 1, 0] and data.seen["det"].dtype == np.int64
    assert data.seen["seg"].tolist() == [3, 1, 2, 0]
    assert folder.open(det_classes=["horse", "dog"]).seen["det"].tolist() == [0, 1]
    assert list(folder.open_masks().seen) == ["det"]  # what mask files hold is not known yet
    folder.json["annotations"][0]["bbox"] = [50, 50, 2, 2]
    assert folder.open().seen["det"].tolist() == [1, 0, 0]  # outside its image


def test_only_wanted_labels_are_read(folder):
    data = folder.open_masks()
    os.unlink(folder.root / "masks/7.png")
    data.wanted = frozenset({"det"})
    assert list(data.read(0).labels) == ["det"]
    drawn = folder.open()
    drawn.wanted = frozenset({"seg"})
    assert list(drawn.read(0).labels) == ["seg"]


# --- images


def test_grey_and_alpha_become_rgb(tmp_path):
    for mode, colour, rgb in (
        ("L", 9, [9, 9, 9]),
        ("RGBA", (1, 2, 3, 0), [1, 2, 3]),
        ("LA", (9, 0), [9, 9, 9]),
    ):
        Image.new(mode, (3, 2), colour).save(tmp_path / "image.png")
        pixels = decode_image(str(tmp_path / "image.png"))
        assert pixels.shape == (2, 3, 3) and pixels.dtype == np.uint8 and pixels[0, 0].tolist() == rgb
    with says("image.png", "8 bits"):
        decode_image(grey_png(tmp_path / "image.png", 16, b"\1\0", 1))


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    Image.new("RGB", (12, 8)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode_image(str(tmp_path / "turned.jpg")).shape == (8, 12, 3)


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_truncated_files_are_named(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with says(f"image '{path}'", "truncated"):
        decode_image(str(path))


def test_damaged_image_and_mask_are_named(folder):
    data = folder.open_masks()
    (folder.root / "masks" / "7.png").write_bytes((folder.root / "masks" / "7.png").read_bytes()[:45])
    (folder.root / "images" / "3.png").write_bytes(b"not an image")
    with says("mask", "masks/7.png", "cannot be decoded"):
        data.read(0)
    with says("image", "images/3.png", "cannot be decoded"):
        data.read(1)
    os.unlink(folder.root / "images" / "9.png")
    with says("images/9.png", "does not exist"):
        data.read(2)


def test_sizes_that_differ(folder):
    folder.mask("7.png", np.zeros((4, 6), np.uint8))
    with says("masks/7.png' is 6x4", "images/7.png' is 12x8"):
        folder.open_masks().read(0)
    folder.image("7.png", np.zeros((WIDTH, HEIGHT, 3), np.uint8))
    with says("images/7.png' is 8x12", "index.json' says 12x8"):
        folder.open_masks().read(0)


def test_colour_masks_are_refused(folder):
    folder.mask("7.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    with says("masks/7.png", "colour image (RGB)", "index PNGs"):
        folder.open_masks().read(0)


# --- errors at construction


def test_missing_files_and_folders(folder):
    with says("annotations", "none.json", "does not exist"):
        folder.open(annotations="none.json")
    with says("images", "pictures", "does not exist"):
        folder.open(images="pictures")
    os.unlink(folder.root / "masks" / "9.png")
    with says("masks", "'9.png' is missing", "1 of 3", "'7.png' -> '7.png'"):
        folder.open_masks()
    os.unlink(folder.root / "images" / "7.png")
    os.unlink(folder.root / "images" / "3.png")
    with says("images", "'7.png' is missing", "2 of 3", "index.json"):
        folder.open()
    folder.json["images"][0]["file_name"] = "town/7.png"
    with says("'town/7.png' is missing"):
        folder.open()


def test_json_that_is_none(folder):
    for content, parts in (
        (b'{"images": [1,\n}', ("not valid JSON", "line 2")),
        (b'"\xff"', ("not valid JSON", "UTF-8")),
        (b"[]", ("no 'images'", "no 'annotations'", "no 'categories'")),
        (b'{"images": {}, "annotations": [], "categories": []}', ("'images'", "not a list")),
        (b'{"images": [], "annotations": [], "categories": []}', ("lists no images",)),
    ):
        (folder.root / "bad.json").write_bytes(content)
        with says("annotations", "bad.json", *parts):
            folder.open(annotations="bad.json")


FAULTY = [
    (("images", 1, "id", 7), ["images[1]", "id 7", "second time"]),
    (("annotations", 1, "id", 1), ["annotations[1]", "id 1", "second time"]),
    (("categories", 1, "id", 90), ["categories[1]", "id 90", "second time"]),
    (("categories", 1, "name", "dog"), ["'dog' is there twice"]),
    (("annotations", 0, "image_id", 44), ["annotation id 1", "image_id 44", "'images'"]),
    (("annotations", 0, "category_id", 44), ["annotation id 1", "category_id 44", "'categories'"]),
    (("annotations", 0, "bbox", [1, 2, 3]), ["annotation id 1", "[x, y, width, height]"]),
    (("annotations", 0, "bbox", ["1", 2, 3, 4]), ["annotation id 1", "[x, y, width, height]"]),
    (("annotations", 0, "iscrowd", "0"), ["annotation id 1", "iscrowd 0 or 1"]),
    (("annotations", 0, "image_id", [7]), ["annotations[0]", "image_id", "numbers or strings"]),
    (("images", 0, "width", "12"), ["image id 7", "width and height"]),
    (("images", 0, "file_name", 7), ["images[0]", "file_name", "names are strings"]),
    (("annotations", 1, "segmentation", {"size": [12, 8], "counts": [96]}), ["annotation id 2", "[12, 8]"]),
    (
        ("annotations", 1, "segmentation", {"size": [8, 12], "counts": [5, 3]}),
        ["annotation id 2", "run lengths"],
    ),
    (
        ("annotations", 1, "segmentation", {"size": [8, 12], "counts": "zz"}),
        ["annotation id 2", "run lengths"],
    ),
    (("annotations", 0, "segmentation", "none"), ["annotation id 1", "polygons"]),
    (("annotations", 0, "segmentation", [[0, 0, 1e9, 0, 5, 5]]), ["annotation id 1", "no pixels"]),
    (("annotations", 0, "segmentation", [[0, 0, float("nan"), 0, 5, 5]]), ["annotation id 1", "no pixels"]),
]


@pytest.mark.parametrize(("change", "parts"), FAULTY, ids=lambda value: "-".join(map(str, value[:3])))
def test_json_faults_are_named(folder, change, parts):
    section, place, key, value = change
    folder.json[section][place][key] = value
    with says("annotations", "index.json", *parts):
        folder.open()


@pytest.mark.parametrize(
    ("section", "key"),
    [("images", "file_name"), ("annotations", "bbox"), ("annotations", "id"), ("categories", "id")],
)
def test_absent_keys_are_named(folder, section, key):
    whole = copy.deepcopy(folder.json)
    del folder.json[section][1][key]
    with says(f"{section}[1]", "index.json", f"no '{key}'"):
        folder.open()
    folder.json = whole
    del folder.json[section]
    with says("index.json", f"no '{section}'"):
        folder.open()


def test_a_panoptic_json_is_recognised(folder):
    folder.json["annotations"] = [{"image_id": 7, "file_name": "7.png", "segments_info": []}]
    with says("panoptic", "instances JSON"):
        folder.open()


def test_options_that_contradict(folder):
    with says("det_classes", "'persn'", "did you mean 'person'"):
        folder.open(det_classes=["persn"])
    with says("det_classes", "list of class names"):
        folder.open(det_classes="person")
    with says("det_classes", "'dog' is there twice"):
        folder.open(det_classes=["dog", "dog"])
    with says("seg_classes", "`masks` needs the names"):
        folder.open(masks="masks")
    with says("det_classes", "list of class names"):
        folder.open(det_classes=5)
    for void in ([300], 255):
        with says("void", "0 to 255"):
            folder.open_masks(void=void)
    with says("void", "drawn from instances"):
        folder.open(void=[3])
    with says("segment: false", "remove them"):
        folder.open_masks(segment=False)


def test_environment_variables_in_paths(folder, monkeypatch):
    monkeypatch.setenv("SETS", str(folder.root))
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    assert len(folder.open(root="${SETS}")) == 3
    assert len(folder.open(root="", images="$SETS/images", annotations="$SETS/index.json")) == 3
    assert expand("$SETS/a", "images", "b") == f"{folder.root}/a"  # absolute: root does not count
    with says("images", "NO_SUCH_PLACE", "not set"):
        folder.open(images="$NO_SUCH_PLACE/images")


# --- decode cache


def test_cache_gives_the_same_without_decoding(folder, monkeypatch):
    cache = folder.root / "cache"
    plain, cached = folder.open_masks(), folder.open_masks(cache=str(cache))
    for data in (plain, cached):
        for i in range(3):
            data.read(i)
    stored = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(stored) == 6 and all(name.endswith(".npy") for name in stored)

    monkeypatch.setattr(Image, "open", lambda path: pytest.fail(f"{path} was decoded again"))
    for i in range(3):
        sample = cached.read(i)
        assert (sample.image == 10 * i).all() and sample.labels["seg"].max() == 2
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == stored


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04rubbish", b"\x93NUMPY\x01\x00\x76\x00{'descr'", None])
def test_damaged_cache_files_are_rewritten(folder, damage):
    files, path = Files(str(folder.root / "cache")), str(folder.root / "images" / "3.png")
    files.image(path)
    [stored] = (folder.root / "cache").iterdir()
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-5] if damage is None else damage)
    assert (files.image(path) == 10).all()
    assert stored.read_bytes() == whole and len(list((folder.root / "cache").iterdir())) == 1


def test_cache_notices_an_edited_file(folder):
    files, path = Files(str(folder.root / "cache")), folder.root / "images" / "3.png"
    assert files.image(str(path)).max() == 10
    folder.image("3.png", np.full((HEIGHT, WIDTH, 3), 77, np.uint8))
    os.utime(path, ns=(1, 1))
    assert files.image(str(path)).max() == 77


def test_cache_that_cannot_be_written(folder, monkeypatch):
    (folder.root / "file").write_text("")
    with says("cache", "cannot be made"):
        folder.open(cache=str(folder.root / "file" / "cache"))
    data = folder.open(cache=str(folder.root / "cache"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with says("cache", "No space left on device"):
        data.read(0)
    assert not list((folder.root / "cache").iterdir())


# --- real data


@pytest.mark.real_data
@pytest.mark.parametrize(("split", "images", "boxes"), [("train", 343, 4312), ("val", 101, 959)])
def test_camvid(real, split, images, boxes):
    data = Coco(
        root=str(real("camvid")), images=f"images/{split}", masks=f"masks/{split}", seg_classes="classes.json",
        annotations=f"annotations/instances_{split}.json", void=[11],
    )  # fmt: skip
    assert len(data) == images and not data.faults
    assert len(data.classes["seg"]) == 11 and data.classes["seg"][10] == "Bicyclist"
    assert data.classes["det"] == ("SignSymbol", "Car", "Pedestrian", "Bicyclist")
    assert len(data._boxes) == boxes
    for i in range(0, images, 20):
        sample = data.read(i)
        assert sample.image.shape == (360, 480, 3)
        assert set(np.unique(sample.labels["seg"])) <= {*range(11), IGNORE}
        for box, c in zip(sample.labels["det"].boxes.astype(int), sample.labels["det"].classes, strict=True):
            index = data.classes["seg"].index(data.classes["det"][c])
            assert (sample.labels["seg"][box[1] : box[3], box[0] : box[2]] == index).any()


@pytest.mark.real_data
@pytest.mark.parametrize(("split", "images", "boxes"), [("train", 130, 320), ("val", 40, 103)])
def test_pennfudan_masks_are_those_it_was_made_from(real, split, images, boxes):
    root = real("pennfudan")
    data = Coco(
        root=str(root), images="PennFudanPed/PNGImages", annotations=f"annotations/instances_{split}.json"
    )
    assert data.classes == {"det": ("person",), "seg": ("background", "person")}
    assert len(data) == images and len(data._boxes) == boxes and not data.faults
    for i in range(0, images, 10):
        original = decode_mask(
            str(root / "PennFudanPed" / "PedMasks" / data.name(i).replace(".png", "_mask.png"))
        )
        assert (data.read(i).labels["seg"] == (original > 0)).all()
