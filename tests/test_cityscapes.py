"""The Cityscapes layout, on files of a few pixels written as the set's own are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from expect import begins
from PIL import Image

from multitask_kd.batch import IGNORE
from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.files import decode_ids
from multitask_kd.data.layouts.cityscapes import (
    LABEL_IDS,
    THINGS,
    Cityscapes,
    _instance_classes,
    instance_boxes,
)

WIDTH, HEIGHT = 12, 8  # of every image here
FIRST, SECOND = "aachen/aachen_000000_000019", "bochum/bochum_000000_000313"


class City:
    """Two images of two towns; the first has a road, two cars that touch, a person in two parts, a group of
    bicycles."""

    def __init__(self, root: Path):
        self.root = root
        ids = np.full((HEIGHT, WIDTH), 7, np.uint16)
        ids[1:3, 0:4] = 26000
        ids[1:4, 4:6] = 26003
        ids[5, 0], ids[7, 2] = 24001, 24001
        ids[6:8, 8:10] = 33
        ids[0, 11] = 33
        ids[4, :] = 4  # static: void
        ids[0, 0:2] = 29000  # a caravan: void, and nothing to detect
        for stem, pixels in ((FIRST, ids), (SECOND, np.full((HEIGHT, WIDTH), 23, np.uint16))):
            image = root / "leftImg8bit/train" / f"{stem}_leftImg8bit.png"
            image.parent.mkdir(parents=True)
            (root / "gtFine/train" / stem).parent.mkdir(parents=True)
            Image.new("RGB", (WIDTH, HEIGHT), (9, 8, 7)).save(image)
            self.write(stem, "instanceIds", pixels)
            self.write(stem, "labelIds", np.where(pixels < 1000, pixels, pixels // 1000).astype(np.uint8))

    def label(self, stem: str, kind: str) -> Path:
        return self.root / "gtFine/train" / f"{stem}_gtFine_{kind}.png"

    def write(self, stem: str, kind: str, pixels: np.ndarray) -> None:
        Image.fromarray(pixels).save(self.label(stem, kind))

    def open(self, **options) -> Cityscapes:
        return Cityscapes(**{"root": str(self.root), "split": "train"} | options)


@pytest.fixture
def city(tmp_path: Path) -> City:
    return City(tmp_path)


# --- what is read


def test_registered_with_its_options():
    assert LAYOUTS.get("cityscapes", "data") is Cityscapes
    LAYOUTS.check(
        "cityscapes", {"root": "a", "split": "val", "labels": "labelTrainIds", "boxes": False}, "data"
    )
    with begins("data", "root, split"):
        LAYOUTS.check("cityscapes", {}, "data")


def test_classes_are_the_training_classes():
    """The numbers are those of the set's own label table."""
    assert len(LABEL_IDS) == 19 and list(LABEL_IDS.values()) == [
        7,
        8,
        11,
        12,
        13,
        17,
        *range(19, 29),
        31,
        32,
        33,
    ]
    assert [list(LABEL_IDS).index(name) for name in THINGS] == list(range(11, 19))


def test_masks_from_label_ids(city):
    data = city.open()
    assert len(data) == 2 and data.name(0) == f"{FIRST}_leftImg8bit.png"
    assert data.classes == {"seg": tuple(LABEL_IDS), "det": THINGS}
    mask = data.read(0).labels["seg"]
    assert mask.dtype == np.uint8 and mask.shape == (HEIGHT, WIDTH)
    assert mask[0].tolist() == [IGNORE, IGNORE, *[0] * 9, 18]  # caravan, road, bicycles
    assert mask[1].tolist() == [13] * 6 + [0] * 6 and (mask[4] == IGNORE).all() and mask[5, 0] == 11
    assert (data.read(1).labels["seg"] == 10).all() and data.read(0).image[0, 0].tolist() == [9, 8, 7]
    with pytest.raises(IndexError):
        data.read(2)


def test_masks_from_train_ids(city):
    pixels = np.full((HEIGHT, WIDTH), 18, np.uint8)
    pixels[0, :2] = 0, IGNORE
    for stem in (FIRST, SECOND):
        city.write(stem, "labelTrainIds", pixels)
    assert (city.open(labels="labelTrainIds").read(0).labels["seg"] == pixels).all()
    pixels[3, 3] = 26
    city.write(FIRST, "labelTrainIds", pixels)
    with begins("mask", f"{FIRST}_gtFine_labelTrainIds.png", "index 26", "0 to 18 and 255"):
        city.open(labels="labelTrainIds").read(0)
    pixels[3, 3] = 34
    city.write(FIRST, "labelIds", pixels)
    with begins("mask", f"{FIRST}_gtFine_labelIds.png", "labelIds are 0 to 33", "correct `labels`"):
        city.open().read(0)


def test_boxes_from_instances(city):
    first, second = (city.open().read(i) for i in range(2))
    first, second = first.labels["det"], second.labels["det"]
    found = sorted(
        zip(*(a.tolist() for a in (first.classes, first.crowd, first.boxes, first.area)), strict=True)
    )
    assert found == [
        (0, False, [0, 5, 3, 8], 2),  # the person: both parts, two pixels
        (2, False, [0, 1, 4, 3], 8),
        (2, False, [4, 1, 6, 4], 6),
        (7, True, [8, 6, 10, 8], 4),  # the group's two regions, each its own
        (7, True, [11, 0, 12, 1], 1),
    ]
    assert [a.dtype for a in (first.boxes, first.classes, first.crowd, first.area)] == [
        np.float32, np.int64, np.bool_, np.float32
    ]  # fmt: skip
    assert second.boxes.shape == (0, 4) and len(second.classes) == len(second.crowd) == len(second.area) == 0


def test_det_classes_select_and_order(city):
    data = city.open(det_classes=["bicycle", "person"])
    assert data.classes["det"] == ("bicycle", "person") and len(data.classes["seg"]) == 19
    assert sorted(data.read(0).labels["det"].classes.tolist()) == [0, 0, 1]
    with begins("det_classes", "'road' has no instances"):
        city.open(det_classes=["road"])
    with begins("det_classes", "did you mean 'person'"):
        city.open(det_classes=["persn"])
    with begins("det_classes", "list of class names"):
        city.open(det_classes="car")


def test_masks_only(city):
    for stem in (FIRST, SECOND):
        city.label(stem, "instanceIds").unlink()
    sample = city.open(boxes=False).read(0)
    assert list(sample.labels) == ["seg"] and sample.labels["seg"][1, 0] == 13
    assert set(city.open(boxes=False).classes) == {"seg"}
    with begins("det_classes", "`boxes`"):
        city.open(boxes=False, det_classes=["car"])
    with begins("boxes", f"{FIRST}_gtFine_instanceIds.png' is missing", "2 of 2", "`boxes: false`"):
        city.open()


def test_boxes_are_those_of_a_plain_search():
    """Against min and max over each instance's pixels, on instances that overlap at random."""
    random = np.random.default_rng(0)
    ids = np.full((90, 160), 7, np.uint16)
    for number in range(60):
        y, x, h, w = (int(v) for v in random.integers((0, 0, 1, 1), (89, 159, 30, 30)))
        ids[y : y + h, x : x + w] = random.choice([24, 25, 26, 33, 30]) * 1000 + number
    boxes, classes, crowd, area = instance_boxes(ids, np.take(_instance_classes(THINGS), ids))
    expected = []
    for key in np.unique(ids[(ids >= 1000) & (ids // 1000 != 30)]):
        y, x = np.nonzero(ids == key)
        label = list(LABEL_IDS.values()).index(key // 1000) - 11
        expected.append([x.min(), y.min(), x.max() + 1, y.max() + 1, label, len(x)])
    assert len(expected) > 20 and not crowd.any()
    assert np.column_stack([boxes, classes, area]).tolist() == expected


def test_cached_and_pickled_the_same(city, monkeypatch):
    cached, plain = city.open(cache=str(city.root / "cache")), city.open().read(0)
    for _ in range(2):
        sample = pickle.loads(pickle.dumps(cached)).read(0)
        assert (sample.labels["det"].boxes == plain.labels["det"].boxes).all()
        assert (sample.labels["seg"] == plain.labels["seg"]).all()
        monkeypatch.setattr(Image, "open", lambda path: pytest.fail(f"{path} was decoded again"))
    stored = [np.load(path) for path in (city.root / "cache").iterdir()]
    assert sorted(str(array.dtype) for array in stored) == ["uint16", "uint8", "uint8"]


# --- depth


def disparity(city: City, stem: str, *values: int, shape=(HEIGHT, WIDTH)) -> Path:
    """The first pixels hold the values, the others the last of them."""
    path = city.root / "disparity/train" / f"{stem}_disparity.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(shape[0] * shape[1], values[-1], np.uint16)
    pixels[: len(values)] = values
    Image.fromarray(pixels.reshape(shape)).save(path)
    return path


def camera(city: City, stem: str, content: object) -> None:
    path = city.root / "camera/train" / f"{stem}_camera.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_depth_from_disparity_and_camera(city):
    """0.2 m * 2000 px = 400: 2 pixels of disparity are 200 m, 0.5 pixels 800 m."""
    disparity(city, FIRST, 0, 1, 513, 129, 25601)
    camera(city, FIRST, {"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": 2000}})
    data = city.open(depth=True)
    assert data.classes["depth"] == ()
    assert data.kinds == {"seg": "semantic", "det": "detection", "depth": "depth"}
    depth = data.read(0).labels["depth"]
    assert depth.dtype == np.float32 and depth.shape == (HEIGHT, WIDTH)
    assert depth[0, :4].tolist() == [0, 0, 200, 800]  # not measured; no disparity; 512 / 256; 128 / 256
    assert (depth.ravel()[4:] == 4).all()  # 25600 / 256 = 100 pixels
    assert sorted(data.read(1).labels) == ["det", "seg"]  # no file: not labelled
    assert data.faults == {"images without a disparity file (not labelled with depth)": 1}
    assert "depth" not in city.open().classes


def test_every_image_has_its_own_camera(city):
    for stem, fx in ((FIRST, 2000), (SECOND, 1000)):
        disparity(city, stem, 513)
        camera(city, stem, {"extrinsic": {"baseline": 0.25}, "intrinsic": {"fx": fx}})
    data = city.open(depth=True)
    assert [data.read(i).labels["depth"][0, 0] for i in range(2)] == [250, 125] and not data.faults


def test_depth_without_cameras(city):
    disparity(city, SECOND, 2561)  # 10 pixels
    depth = city.open(depth=True).read(1).labels["depth"]
    assert np.allclose(depth, 47.357484, rtol=1e-6)  # 0.209313 * 2262.52 = 473.57484


def test_only_wanted_labels_are_read(city):
    path = disparity(city, FIRST, 513)
    data = city.open(depth=True)
    city.label(FIRST, "instanceIds").unlink()
    city.label(FIRST, "labelIds").unlink()
    data.wanted = frozenset({"depth"})
    assert list(data.read(0).labels) == ["depth"]
    path.unlink()
    data.wanted = frozenset()
    assert data.read(0).labels == {}


def test_disparities_are_cached_with_16_bits(city, monkeypatch):
    disparity(city, FIRST, 513)
    data = city.open(depth=True, boxes=False, cache=str(city.root / "cache"))
    first = data.read(0).labels["depth"]
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail(f"{path} was decoded again"))
    assert (pickle.loads(pickle.dumps(data)).read(0).labels["depth"] == first).all()


def test_files_of_depth_that_are_wrong(city):
    with begins("depth", "disparity/train' does not exist", "`depth: false`"):
        city.open(depth=True)
    (city.root / "disparity/train").mkdir(parents=True)
    with begins("depth", f"'{FIRST}_disparity.png' and all others are missing", "`depth: false`"):
        city.open(depth=True)
    path = disparity(city, FIRST, 513, shape=(4, 6))
    with begins("disparity image", f"{FIRST}_disparity.png' is 6x4", f"{FIRST}_leftImg8bit.png' is 12x8"):
        city.open(depth=True).read(0)
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(path)
    with begins("disparity image", "no 16-bit greyscale PNG (L)", "values are lost"):
        city.open(depth=True).read(0)
    (city.root / "camera").mkdir()
    with begins("depth", "camera/train' does not exist"):
        city.open(depth=True)
    (city.root / "camera/train").mkdir()
    with begins("depth", f"'{FIRST}_camera.json' is missing", "1 of 1", "move the folder camera away"):
        city.open(depth=True)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([], "extrinsic.baseline"),
        ({"extrinsic": {"baseline": 0}, "intrinsic": {"fx": 2000}}, "extrinsic.baseline, not 0"),
        ({"extrinsic": {"baseline": 0.2}, "intrinsic": 3}, "intrinsic.fx, not None"),
        ({"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": "2000"}}, "intrinsic.fx, not '2000'"),
        ({"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": float("nan")}}, "intrinsic.fx, not nan"),
    ],
)
def test_cameras_that_are_none(city, content, part):
    disparity(city, FIRST, 513)
    camera(city, FIRST, content)
    with begins("depth", f"{FIRST}_camera.json' needs a positive number at", part):
        city.open(depth=True)


# --- what is wrong


def test_missing_folders_and_files(city):
    with begins("root", "leftImg8bit' does not exist", "gtFine"):
        city.open(root=str(city.root / "gtFine"))
    with begins("split", "'trian'", "did you mean 'train'"):
        city.open(split="trian")
    for none in ("", None, 5):
        with begins("split", "known: train"):
            city.open(split=none)
    (city.root / "leftImg8bit/val").mkdir()
    (city.root / "gtFine/val").mkdir()
    with begins("split", "no images", "val"):
        city.open(split="val")
    with begins(
        "labels", f"{FIRST}_gtFine_labelTrainIds.png' is missing", "2 of 2", "csCreateTrainIdLabelImgs"
    ):
        city.open(labels="labelTrainIds")
    with begins("labels", "'labelIDs'", "did you mean 'labelIds'"):
        city.open(labels="labelIDs")
    city.label(SECOND, "labelIds").unlink()
    with begins("labels", f"{SECOND}_gtFine_labelIds.png' is missing", "1 of 2"):
        city.open()


def test_a_split_without_labels(city):
    (city.root / "leftImg8bit/train").rename(city.root / "leftImg8bit/test")
    with begins("split", "'test' has no labels", "gtFine/test", "train or val", "layout `images`"):
        city.open(split="test")


def test_sizes_that_differ(city):
    city.write(FIRST, "instanceIds", np.zeros((4, 6), np.uint16))
    city.write(SECOND, "labelIds", np.zeros((4, 6), np.uint8))
    data = city.open()
    with begins("id image", f"{FIRST}_gtFine_instanceIds.png' is 6x4", f"{FIRST}_leftImg8bit.png' is 12x8"):
        data.read(0)
    with begins("mask", f"{SECOND}_gtFine_labelIds.png' is 6x4", f"{SECOND}_leftImg8bit.png' is 12x8"):
        data.read(1)


def test_instance_files_that_are_none(city):
    city.write(FIRST, "instanceIds", np.zeros((HEIGHT, WIDTH), np.uint8))
    with begins("id image", "instanceIds.png", "16-bit"):
        city.open().read(0)
    for wrong in (11003, 34, 34000, 65535):  # the first: class 11 is a building, as in files of training ids
        city.write(FIRST, "instanceIds", np.full((HEIGHT, WIDTH), wrong, np.uint16))
        with begins("id image", "instanceIds.png", f"has id {wrong}", "1000 times"):
            city.open().read(0)
    path = city.label(FIRST, "instanceIds")
    path.write_bytes(path.read_bytes()[:45])
    with begins("id image", "instanceIds.png", "cannot be decoded"):
        city.open().read(0)
    path.unlink()
    with begins("id image", "does not exist"):
        decode_ids(str(path))


def test_ids_above_half_of_16_bits_are_kept(tmp_path):
    Image.fromarray(np.array([[33999, 65535, 0]], np.uint16)).save(tmp_path / "ids.png")
    ids = decode_ids(str(tmp_path / "ids.png"))
    assert ids.dtype == np.uint16 and ids.tolist() == [[33999, 65535, 0]]
