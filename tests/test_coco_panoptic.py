"""The panoptic form of COCO on sets of a few pixels; real files where they are present."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from expect import says
from PIL import Image

from multitask_kd.batch import IGNORE
from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.layouts.coco_panoptic import CocoPanoptic, segment_ids

BIG = 5 + 256 * 7 + 65536 * 200  # red 5, green 7, blue 200


def index() -> dict:
    """Image 7 of 4x2: sky above, below it nothing, a dog, a crowd of people; image 3 has no annotation."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 4, "height": 2} for i in (7, 3)],
        "annotations": [
            {
                "image_id": 7,
                "file_name": "seven.png",
                "segments_info": [
                    {"id": BIG, "category_id": 187, "bbox": [0, 0, 4, 1], "area": 4, "iscrowd": 0},
                    {"id": 9, "category_id": 1, "bbox": [2, 1, 2, 1], "area": 2, "iscrowd": 1},
                    {"id": 300, "category_id": 18, "bbox": [1, 1, 1, 1], "area": 1, "iscrowd": 0},
                ],
            }
        ],
        "categories": [
            {"id": 187, "name": "sky", "isthing": 0},
            {"id": 18, "name": "dog", "isthing": 1},
            {"id": 1, "name": "person", "isthing": 1},
            {"id": 200, "name": "rug", "isthing": 0},
        ],
    }


IDS = np.array([[BIG, BIG, BIG, BIG], [0, 300, 9, 9]])


class Folder:
    """A panoptic set under ``root`` that a test bends before ``open``."""

    def __init__(self, root: Path):
        self.root, self.json = root, index()
        (root / "images").mkdir()
        (root / "masks").mkdir()
        for name in ("7.png", "3.png"):
            Image.new("RGB", (4, 2), (1, 2, 3)).save(root / "images" / name)
        self.mask(IDS)

    def mask(self, ids: np.ndarray) -> None:
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(colours).save(self.root / "masks" / "seven.png")

    def open(self, **options) -> CocoPanoptic:
        (self.root / "index.json").write_text(json.dumps(self.json))
        plain = {"root": str(self.root), "images": "images", "annotations": "index.json", "masks": "masks"}
        return CocoPanoptic(**plain | options)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_ids_are_little_endian_colours():
    assert segment_ids(np.array([[[5, 7, 200], [0, 0, 0], [255, 255, 255]]], np.uint8)).tolist() == [
        [13108997, 0, 16777215]
    ]
    assert BIG == 13108997


def test_mask_and_boxes(folder):
    data = folder.open()
    assert LAYOUTS.get("coco_panoptic", "data") is CocoPanoptic
    assert data.classes == {
        "seg": ("person", "dog", "sky", "rug"),
        "det": ("person", "dog"),
    }  # by id: 1, 18, 187, 200
    sample = data.read(0)
    assert sample.labels["seg"].tolist() == [[2, 2, 2, 2], [IGNORE, 1, 0, 0]]
    found = sample.labels["det"]
    assert found.boxes.tolist() == [[2, 1, 4, 2], [1, 1, 2, 2]] and found.classes.tolist() == [0, 1]
    assert found.crowd.tolist() == [True, False] and found.area.tolist() == [2, 1]
    dtypes = [a.dtype for a in (sample.labels["seg"], found.boxes, found.classes)]
    assert dtypes == [np.uint8, np.float32, np.int64]
    # the crowd of people is no person to detect, and a segment all the same; of rugs there is none
    assert data.seen["det"].tolist() == [0, 1] and data.seen["seg"].tolist() == [1, 1, 1, 0]
    assert (pickle.loads(pickle.dumps(data)).read(0).labels["seg"] == sample.labels["seg"]).all()
    with pytest.raises(IndexError):
        data.read(2)


def test_an_image_without_an_annotation_is_unlabelled(folder):
    data = folder.open()
    sample = data.read(1)
    assert len(data) == 2 and sample.labels == {}
    assert data.faults == {"images without an annotation (used without labels)": 1}


def test_an_annotation_without_segments_is_labelled(folder):
    folder.json["annotations"].append({"image_id": 3, "file_name": "seven.png", "segments_info": []})
    folder.mask(np.zeros((2, 4), int))
    sample = folder.open().read(1)
    assert (sample.labels["seg"] == IGNORE).all() and sample.labels["det"].boxes.shape == (0, 4)


def test_classes_are_chosen_merged_and_ordered(folder):
    data = folder.open(seg_classes={"up": ["sky", "rug"], "dog": "dog"}, det_classes=["dog"])
    assert data.classes == {"seg": ("up", "dog"), "det": ("dog",)}
    sample = data.read(0)
    # the person is left out
    assert sample.labels["seg"].tolist() == [[0, 0, 0, 0], [IGNORE, 1, IGNORE, IGNORE]]
    found = sample.labels["det"]
    assert found.boxes.tolist() == [[1, 1, 2, 2]] and found.classes.tolist() == [0]
    merged = folder.open(det_classes={"animal": ["dog", "person"]})
    assert merged.read(0).labels["det"].classes.tolist() == [0, 0]
    with says("seg_classes", "'dgo'", "did you mean 'dog'"):
        folder.open(seg_classes=["dgo"])
    with says("det_classes", "no thing", "'sky'"):
        folder.open(det_classes=["sky"])


def test_stuff_alone_has_no_boxes(folder):
    folder.json["categories"] = [{**c, "isthing": 0} for c in folder.json["categories"]]
    for segment in folder.json["annotations"][0]["segments_info"]:
        del segment["bbox"]
    data = folder.open()
    sample = data.read(0)
    assert set(data.classes) == set(sample.labels) == {"seg"} and sample.labels["seg"].max() == IGNORE


def test_bad_boxes_are_dropped_and_counted(folder):
    folder.json["annotations"][0]["segments_info"][2]["bbox"] = [9, 9, 2, 2]
    data = folder.open()
    assert data.read(0).labels["det"].classes.tolist() == [0]
    assert data.faults["boxes outside the image (dropped)"] == 1


@pytest.mark.parametrize("wrong", [8, 10, BIG + 1, 299, 1 << 23])
def test_ids_that_the_json_lacks(folder, wrong):
    """Below, between and above the known ones."""
    folder.mask(np.where(IDS == 9, wrong, IDS))
    with says("masks/seven.png", f"segment id {wrong}", "7.png", "index.json"):
        folder.open().read(0)


def test_index_masks_are_not_panoptic(folder):
    Image.fromarray(np.full((2, 4), 9, np.uint8)).save(folder.root / "masks" / "seven.png")
    with says("seven.png", f"segment id {9 * (1 + 256 + 65536)}"):
        folder.open().read(0)


def test_sizes_that_differ_and_damaged_files(folder):
    data = folder.open()
    folder.mask(IDS[:1])
    with says("seven.png' is 4x1", "7.png' is 4x2"):
        data.read(0)
    (folder.root / "masks/seven.png").write_bytes(b"nothing")
    with says("masks/seven.png", "cannot be decoded"):
        data.read(0)
    Image.new("RGB", (2, 4)).save(folder.root / "images" / "7.png")
    with says("images/7.png' is 2x4", "index.json' says 4x2"):
        data.read(0)


def test_missing_files(folder):
    with says("masks", "'seven.png' is missing", "1 of 1", "index.json"):
        folder.open(masks="images")
    with says("images", "'7.png' is missing", "2 of 2"):
        folder.open(images="masks")
    with says("annotations", "none.json", "does not exist"):
        folder.open(annotations="none.json")
    with says("masks", "none", "does not exist"):
        folder.open(masks="none")


SEGMENT = ("annotations", 0, "segments_info", 1)
FAULTY = [
    ((*SEGMENT, "id", BIG), ["segments_info[1] of image id 7", "second time"]),
    ((*SEGMENT, "id", 0), ["segment id 0 of image id 7", "1 to 16777215"]),
    ((*SEGMENT, "id", 1 << 24), ["segment id 16777216", "1 to 16777215"]),
    ((*SEGMENT, "id", "9"), ["segment id 9", "whole numbers"]),
    ((*SEGMENT, "category_id", 44), ["segment id 9 of image id 7", "category_id 44", "'categories'"]),
    ((*SEGMENT, "bbox", [1, 2, 3]), ["segment id 9", "[x, y, width, height]"]),
    ((*SEGMENT, "bbox", None), ["segment id 9", "[x, y, width, height]"]),
    ((*SEGMENT, "iscrowd", 3), ["segment id 9", "iscrowd"]),
    (("annotations", 0, "image_id", 44), ["image id 44", "'images'"]),
    (("annotations", 0, "segments_info", {}), ["segments_info of image id 7", "not a list"]),
    (("annotations", 0, "segments_info", [5]), ["segments_info[0] of image id 7", "no 'id'"]),
    (("annotations", 0, "file_name", 5), ["annotations[0]", "file_name", "strings"]),
    (("categories", 0, "isthing", "no"), ["category 'sky'", "isthing must be 0 or 1"]),
    (("categories", 0, "name", "dog"), ["'dog' is there twice"]),
    (("images", 0, "width", None), ["image id 7", "width and height"]),
]


@pytest.mark.parametrize(("change", "parts"), FAULTY, ids=lambda value: "-".join(map(str, value)))
def test_json_faults_are_named(folder, change, parts):
    node = folder.json
    for key in change[:-2]:
        node = node[key]
    node[change[-2]] = change[-1]
    with says("annotations", "index.json", *parts):
        folder.open()


def test_absent_keys_are_named(folder):
    whole = copy.deepcopy(folder.json)
    del folder.json["annotations"][0]["segments_info"][1]["bbox"]
    with says("segment id 9", "is a thing", "'bbox'"):
        folder.open()
    folder.json = whole
    del folder.json["annotations"][0]["file_name"]
    with says("annotations[0]", "no 'file_name'"):
        folder.open()
    folder.json["annotations"].append(folder.json["annotations"][0] | {"file_name": "seven.png"})
    folder.json["annotations"][0]["file_name"] = "seven.png"
    with says("annotations[1]", "image_id 7 a second time"):
        folder.open()


def test_an_instances_json_is_recognised(folder):
    folder.json["annotations"] = [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "file_name": "seven.png"}
    ]
    with says("no 'segments_info'", "panoptic JSON is needed", "layout coco reads"):
        folder.open()
    for category in folder.json["categories"]:
        del category["isthing"]
    with says("no 'isthing'", "panoptic JSON is needed"):
        folder.open()
    (folder.root / "bad.json").write_text("[1,\n}")
    with says("bad.json", "line 2"):
        folder.open(annotations="bad.json")


def test_too_many_classes(folder):
    folder.json["categories"] += [{"id": 1000 + i, "name": f"c{i}", "isthing": 0} for i in range(252)]
    with says("seg_classes", "256", "at most 255"):
        folder.open()
    assert len(folder.open(seg_classes=["sky"]).classes["seg"]) == 1


def test_cache(folder, monkeypatch):
    data = folder.open(cache=str(folder.root / "cache"))
    first = data.read(0)
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail(f"{path} was decoded again"))
    assert (data.read(0).labels["seg"] == first.labels["seg"]).all()


# --- real data


@pytest.mark.real_data
def test_every_segments_area_and_box_is_that_of_its_pixels(real):
    root = real("samples/coco_panoptic2")
    data = CocoPanoptic(
        root=str(root), images="input_images", annotations="panoptic_examples.json", masks="panoptic_examples"
    )
    given = json.loads((root / "panoptic_examples.json").read_text())
    categories = {c["id"]: c["name"] for c in given["categories"]}
    assert (
        len(data) == 2
        and not data.faults
        and (len(data.classes["seg"]), len(data.classes["det"])) == (133, 80)
    )
    for i, annotation in enumerate(given["annotations"]):
        sample = data.read(i)
        pixels = {}
        for segment in annotation["segments_info"]:
            name = categories[segment["category_id"]]
            pixels[name] = pixels.get(name, 0) + segment["area"]
        for name, count in pixels.items():
            assert (sample.labels["seg"] == data.classes["seg"].index(name)).sum() == count
        assert (sample.labels["seg"] == IGNORE).sum() == sample.labels["seg"].size - sum(pixels.values())
        for box, c in zip(sample.labels["det"].boxes.astype(int), sample.labels["det"].classes, strict=True):
            index = data.classes["seg"].index(data.classes["det"][c])
            inside = sample.labels["seg"][box[1] : box[3], box[0] : box[2]] == index
            assert (
                inside.any(axis=0)[[0, -1]].all() and inside.any(axis=1)[[0, -1]].all()
            )  # it reaches all four sides
    assert data.read(0).labels["det"].crowd.sum() == 1 and data.read(1).labels["det"].crowd.sum() == 2


@pytest.mark.real_data
def test_the_two_channel_form_is_refused(real):
    root = str(real("samples/coco_panoptic2"))
    data = CocoPanoptic(
        root=root,
        images="input_images",
        annotations="panoptic_examples.json",
        masks="panoptic_examples_2ch_format",
    )
    with says("panoptic_examples_2ch_format/000000142238.png", "segment id 1 "):
        data.read(0)
