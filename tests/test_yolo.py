"""The YOLO layout, on sets of a few pixels; real files where they are present."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from expect import says
from PIL import Image

from multitask_kd.batch import IGNORE
from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.layouts.yolo import Yolo

WIDTH, HEIGHT = 20, 10  # of every image here, so that a normalised .05 is a pixel wide and .1 a pixel high
SQUARE = "1 .2 .2 .6 .2 .6 .8 .2 .8"  # class 1, x 4 to 12, y 2 to 8
SMALL = "0 .3 .4 .4 .4 .4 .6 .3 .6"  # class 0, x 6 to 8, y 4 to 6


class Folder:
    """A YOLO set under ``root`` that a test bends before ``open``. a: two boxes, b: an empty file, c: no
    file."""

    def __init__(self, root: Path):
        self.root = root
        self.yaml: object = {
            "path": ".",
            "train": "images/train",
            "val": "images/train",
            "names": ["dog", "cat", "cow"],
        }
        for name in "abc":
            self.image(f"images/train/{name}.png")
        self.labels("a", "2 .5 .5 .2 .4", "0 .1 .2 .1 .2")
        self.labels("b")

    def image(self, path: str, **save) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(self.root / path, **save)

    def labels(self, name: str, *lines: str, folder: str = "labels/train") -> None:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / folder / f"{name}.txt").write_text("\n".join(lines))

    def open(self, **options) -> Yolo:
        (self.root / "data.yaml").write_text(yaml.safe_dump(self.yaml))
        return Yolo(**{"data": str(self.root / "data.yaml")} | options)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --- boxes


def test_registered_with_its_options():
    assert LAYOUTS.get("yolo", "data") is Yolo
    LAYOUTS.check("yolo", {"data": "a", "segment": True, "missing": "unlabelled", "split": "val"}, "data")
    with says("data", "needs data"):
        LAYOUTS.check("yolo", {}, "data")


def test_boxes_and_classes(folder):
    data = folder.open()
    assert [data.name(i) for i in range(len(data))] == [f"images/train/{name}.png" for name in "abc"]
    assert data.classes == {"det": ("dog", "cat", "cow")}
    a, b, c = (data.read(i) for i in range(3))
    # cx .5, w .2 of 20 pixels: 8 to 12; cy .5, h .4 of 10 pixels: 3 to 7
    found = a.labels["det"]
    assert np.allclose(found.boxes, [[8, 3, 12, 7], [1, 1, 3, 3]], atol=1e-5)
    assert found.classes.tolist() == [2, 0]
    assert found.boxes.dtype == np.float32 and found.classes.dtype == np.int64
    assert np.allclose(found.area, [16, 4], atol=1e-4) and not found.crowd.any() and "seg" not in a.labels
    assert data.kinds == {"det": "detection"} and data.seen["det"].tolist() == [1, 0, 1]
    assert b.labels["det"].boxes.shape == c.labels["det"].boxes.shape == (0, 4)
    assert data.faults == {"images without a label file (taken as background)": 1}
    with pytest.raises(IndexError):
        data.read(3)


def test_missing_label_files_may_mean_unlabelled(folder):
    folder.labels("a", SQUARE)
    data = folder.open(missing="unlabelled")
    assert data.read(2).labels == {}
    assert data.read(1).labels["det"].boxes.shape == (0, 4) and not data.read(1).labels["seg"].any()
    assert not folder.open().read(2).labels["seg"].any()
    with says("missing", "'unlabeled'", "did you mean 'unlabelled'"):
        folder.open(missing="unlabeled")


def test_det_classes_select_and_order(folder):
    folder.labels("a", "2 .5 .5 .2 .4", "0 .1 .2 .1 .2", "1 .1 .2 .1 .2")
    data = folder.open(det_classes=["cow", "dog"])
    assert data.classes["det"] == ("cow", "dog") and data.read(0).labels["det"].classes.tolist() == [0, 1]
    with says("det_classes", "'cwo'", "did you mean 'cow'"):
        folder.open(det_classes=["cwo"])
    with says("det_classes", "'cow' is there twice"):
        folder.open(det_classes=["cow", "cow"])


def test_doubtful_objects_are_counted(folder):
    folder.labels(
        "a", "0 .5 .5 .2 .4", "", "0.0 0.50 .5 .2 .4", "1 .5 .5 .2 .4",  # the second is the first again
        "0 1.005 .5 .2 .4", "0 1.05 .5 .2 .4", "0 .5 .5 0 .4", "0 -.5 .5 .2 .4",
    )  # fmt: skip
    data = folder.open()
    found = data.read(0).labels["det"]
    expected = [[8, 3, 12, 7], [8, 3, 12, 7], [18.1, 3, 20, 7], [19, 3, 20, 7]]
    assert np.allclose(found.boxes, expected, atol=1e-4)
    assert found.classes.tolist() == [0, 1, 0, 0]
    del data.faults["images without a label file (taken as background)"]
    assert data.faults == {
        "objects given twice in one file (dropped)": 1,
        "objects with values outside 0 to 1 (clipped)": 2,
        "boxes of zero or negative size (dropped)": 1,
        "boxes outside the image (dropped)": 1,
    }


def test_images_are_turned_upright(folder):
    """Stored as 20x10 and shown as 10x20, with the stored top left corner at the top right."""
    for orientation, corner in (
        (1, (0, 0)),
        (3, (9, 19)),
        (6, (0, 9)),
        (8, (19, 0)),
        (5, (0, 0)),
        (99, (0, 0)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.new("RGB", (WIDTH, HEIGHT))
        image.putpixel((0, 0), (255, 255, 255))
        image.save(folder.root / "images/train/a.png", exif=exif)
        sample = folder.open(cache=str(folder.root / "cache")).read(0)
        turned = 5 <= orientation <= 8
        assert sample.image.shape == ((WIDTH, HEIGHT, 3) if turned else (HEIGHT, WIDTH, 3))
        assert sample.image[corner].tolist() == [255] * 3 and sample.image.sum() == 3 * 255
        expected = [4, 6, 6, 14] if turned else [8, 3, 12, 7]
        assert np.allclose(sample.labels["det"].boxes[0], expected, atol=1e-5)


def test_pickle_reads_the_same_and_copies(folder):
    data = pickle.loads(pickle.dumps(folder.open()))
    data.read(0).labels["det"].boxes[:] = 7
    assert np.allclose(data.read(0).labels["det"].boxes[0], [8, 3, 12, 7], atol=1e-5)


# --- polygons


def test_polygons_give_boxes_and_masks_small_over_large(folder):
    folder.labels("a", SMALL, SQUARE)
    data = folder.open()
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[2:8, 4:12] = 2
    expected[4:6, 6:8] = 1  # the smaller one stands first in the file
    sample = data.read(0)
    assert data.classes["seg"] == ("background", "dog", "cat", "cow")
    assert (sample.labels["seg"] == expected).all() and sample.labels["seg"].dtype == np.uint8
    found = sample.labels["det"]
    assert np.allclose(found.boxes, [[6, 4, 8, 6], [4, 2, 12, 8]], atol=1e-5)
    assert found.classes.tolist() == [0, 1]
    assert data.seen["seg"].tolist() == [3, 1, 1, 0] and data.seen["det"].tolist() == [1, 1, 0]
    alone = folder.open(segment=False)
    assert alone.classes.keys() == alone.read(0).labels.keys() == {"det"}
    chosen = folder.open(det_classes=["cat"])
    assert chosen.classes["seg"] == ("background", "cat")
    # below the dog is cat: the dog is not drawn
    assert (chosen.read(0).labels["seg"] == (expected > 0)).all()


def test_polygons_beyond_the_image_are_clipped(folder):
    folder.labels("a", "1 .8 .2 1.2 .2 1.2 .8 .8 .8")
    data = folder.open()
    sample = data.read(0)
    assert np.allclose(sample.labels["det"].boxes, [[16, 2, 20, 8]], atol=1e-5)
    assert sample.labels["seg"].sum() == 2 * 4 * 6
    assert data.faults["objects with values outside 0 to 1 (clipped)"] == 1


def test_boxes_among_polygons_are_ignored_in_the_mask(folder):
    folder.labels("a", SMALL, SQUARE, "2 .9 .5 .1 .2")  # x 17 to 19, y 4 to 6
    data = folder.open()
    mask = data.read(0).labels["seg"]
    assert (mask[4:6, 17:19] == IGNORE).all() and (mask == IGNORE).sum() == 4
    assert len(data.read(0).labels["det"]) == 3 and data.seen["seg"].tolist() == [3, 1, 1, 0]
    assert data.faults["objects without a polygon (their box is ignored in the mask)"] == 1
    folder.labels("a", SQUARE, "2 .9 .5 .1 .2", "2 .5 .5 .1 .2")
    assert "seg" not in folder.open().classes  # mostly boxes
    assert "seg" in folder.open(segment=True).classes
    folder.labels("a", "2 .9 .5 .1 .2")
    with says("segment", "labels", "are boxes", "`segment: false`"):
        folder.open(segment=True)
    with says("segment", "'yes'", "true, false"):
        folder.open(segment="yes")


def test_more_classes_than_a_mask_holds(folder):
    folder.yaml["names"] = [f"c{i}" for i in range(255)]
    folder.labels("a", SQUARE)
    with says("det_classes", "255 classes", "254", "`segment: false`"):
        folder.open()
    assert len(folder.open(segment=False).classes["det"]) == 255


# --- data.yaml


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"names": {0: "a", 1: "b", 2: "c"}}, ("a", "b", "c")),
        ({"names": {"2": "c", "1": "b", "0": "a"}, "nc": 3}, ("a", "b", "c")),
        ({"names": ["a", 7, "c"]}, ("a", "7", "c")),
        ({"nc": 3}, ("class_0", "class_1", "class_2")),
    ],
)
def test_names(folder, names, found):
    del folder.yaml["names"]
    folder.yaml |= names
    assert folder.open().classes["det"] == found


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ({"names": {0: "a", 2: "c"}}, ["0, 1, 2", "not 0, 2"]),
        ({"names": ["a", "b"], "nc": 3}, ["2 names", "'nc' is 3"]),
        ({"names": ["a", "a", "b"]}, ["'a' is there twice"]),
        ({"names": "a"}, ["list of class names"]),
        ({"names": [["a"]]}, ["list of class names"]),
        ({}, ["list of class names"]),
    ],
)
def test_names_that_are_none(folder, names, parts):
    del folder.yaml["names"]
    folder.yaml |= names
    with says("data", "data.yaml", *parts):
        folder.open()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"names: [a\ntrain: b", ["not valid YAML", "line 2"]),
        (b"- a", ["no data.yaml"]),
        (b"", ["no data.yaml"]),
        (b"\xff\xfe\x00", ["not UTF-8"]),
        (b"names: !!python/object/apply:os.system [ls]", ["not valid YAML"]),
        (b"when: 2024-99-99", ["not valid YAML"]),
        (b"kpt_shape: [17, 3]\nnames: [a]", ["keypoints"]),
    ],
)
def test_yaml_that_is_none(folder, content, parts):
    (folder.root / "bad.yaml").write_bytes(content)
    with says("data", "bad.yaml", *parts):
        folder.open(data=str(folder.root / "bad.yaml"))


def test_splits(folder):
    folder.image("images/val/d.png")
    folder.labels("d", "0 .5 .5 .2 .4", folder="labels/val")
    folder.yaml |= {"val": ["images/val", "images/train"], "test": None}
    assert len(folder.open(split="val")) == 4
    folder.yaml["validation"] = folder.yaml.pop("val")
    assert len(folder.open(split="val")) == len(folder.open(split="validation")) == 4
    with says("split", "'tran'", "did you mean 'train'"):
        folder.open(split="tran")
    with says("split", "'test'", "a folder, a .txt file"):
        folder.open(split="test")


def test_lists_of_images(folder):
    folder.image("images/train/sub/e.jpg")
    folder.labels("e", "0 .5 .5 .2 .4", folder="labels/train/sub")
    (folder.root / "lists").mkdir()
    lines = [
        "images/train/a.png",
        "",
        "images/train/b.png",
        str(folder.root / "images/train/sub/e.jpg"),
        "notes.md",
    ]
    (folder.root / "lists" / "train.txt").write_text("\n".join(lines))
    folder.yaml["train"] = "lists/train.txt"
    data = folder.open()
    assert [data.name(i) for i in range(3)] == [
        "images/train/a.png",
        "images/train/b.png",
        "images/train/sub/e.jpg",
    ]
    assert [len(data.read(i).labels["det"].boxes) for i in range(3)] == [2, 0, 1]
    assert data.faults == {"lines of a list of images that name none (passed over)": 1}
    (folder.root / "train.txt").write_text("./images/train/a.png\n./images/train/z.png\n")
    folder.yaml["train"] = ["train.txt"]
    with says("data", "z.png' is missing", "1 of 2", "train.txt"):
        folder.open()
    (folder.root / "train.txt").write_text("\n")
    with says("data", "train.txt", "lists no images"):
        folder.open()


def test_labels_beside_the_images(folder):
    folder.image("flat/f.png")
    folder.labels("f", "0 .5 .5 .2 .4", folder="flat")
    folder.yaml["train"] = "flat"
    assert len(folder.open().read(0).labels["det"].boxes) == 1


def test_where_the_set_is(folder, monkeypatch):
    root = folder.root
    for path in (None, ".", str(root), "no/such/folder"):  # the folder of data.yaml is the last resort
        folder.yaml["path"] = path
        assert len(folder.open()) == 3
    folder.yaml["train"] = "../images/train"
    assert len(folder.open()) == 3
    folder.yaml |= {"train": "images/train", "path": "/no/such/folder"}
    assert len(folder.open(root=str(root), data="data.yaml")) == 3
    folder.yaml["path"] = root.name
    assert len(folder.open(root=str(root.parent), data=f"{root.name}/data.yaml")) == 3
    monkeypatch.setenv("SETS", str(root))
    assert len(folder.open(data="$SETS/data.yaml")) == 3
    folder.yaml["train"] = "pictures"
    with says("data", "'pictures'", "'train'", "is in none of", "`root`"):
        folder.open()
    folder.yaml |= {"train": "images/train", "path": 5}
    with says("data", "'path'", "5"):
        folder.open()
    with says("data", "none.yaml", "does not exist"):
        folder.open(data="none.yaml")


def test_no_label_files_at_all(folder):
    (folder.root / "labels").rename(folder.root / "label")
    with says("data", "none of the 3 images", "labels/train/a.txt", "images/train/a.png"):
        folder.open()
    (folder.root / "images/train/a.png").unlink()
    (folder.root / "images/train/b.png").unlink()
    (folder.root / "images/train/c.png").unlink()
    with says("data", "no images", "images/train"):
        folder.open()


# --- label files


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("0 .5 .5 .2", ["3 values", "4 (cx cy w h)"]),
        ("0 .5 .5 .2 .2 .9", ["5 values", "confidence"]),
        ("0 .1 .2 .3 .4 .5 .6 .7", ["7 values", "even number"]),
        ("0", ["0 values"]),
        ("3 .5 .5 .2 .4", ["class 3", "0 to 2"]),
        ("-1 .5 .5 .2 .4", ["class -1"]),
        ("0.5 .5 .5 .2 .4", ["class 0.5"]),
        ("nan .5 .5 .2 .4", ["class nan"]),
        ("dog .5 .5 .2 .4", ["no YOLO label", "'dog'"]),
        ("0,.5,.5,.2,.4", ["no YOLO label"]),
        ("0 320 240 64 48", ["has 320", "divide pixels"]),
        ("0 .5 .5 .2 nan", ["has nan", "0 to 1"]),
        ("0 .5 .5 .2 -3", ["has -3", "0 to 1"]),
    ],
)
def test_wrong_lines_are_named(folder, line, parts):
    folder.labels("a", "2 .5 .5 .2 .4", "", line)
    with says("data", "line 3", "labels/train/a.txt", *parts):
        folder.open()


def test_label_files_that_are_none(folder):
    (folder.root / "labels/train/a.txt").write_bytes(b"\x89PNG\xff")
    with says("data", "a.txt", "not UTF-8"):
        folder.open()
    (folder.root / "labels/train/a.txt").unlink()
    (folder.root / "labels/train/a.txt").mkdir()
    with says("data", "a.txt", "cannot be read"):
        folder.open()


def test_damaged_images_are_named(folder):
    data = folder.open()
    (folder.root / "images/train/a.png").write_bytes(b"no image")
    with says("images/train/a.png", "cannot be decoded"):
        data.read(0)


# --- real data


@pytest.mark.real_data
def test_boxes_and_polygons_of_the_same_photographs(real):
    boxes = Yolo(data="data.yaml", root=str(real("samples/yolo_det_coco5")), split="val")
    polygons = Yolo(data=str(real("samples/yolo_seg_coco5") / "data.yaml"), split="val")
    assert (
        len(boxes) == len(polygons) == 5 and "seg" not in boxes.classes and len(polygons.classes["seg"]) == 81
    )
    for i in range(5):
        by_box, by_polygon = boxes.read(i), polygons.read(i)
        assert (by_box.image == by_polygon.image).all()
        # COCO draws its boxes around its outlines, so each box is found again
        for box, kind in zip(by_box.labels["det"].boxes, by_box.labels["det"].classes, strict=True):
            near = np.abs(by_polygon.labels["det"].boxes - box).max(axis=1) < 2
            assert (near & (by_polygon.labels["det"].classes == kind)).any(), (boxes.name(i), box)
        assert set(np.unique(by_polygon.labels["seg"])) - {0} <= {*(by_polygon.labels["det"].classes + 1)}
