"""The VOC layout, on development kits of a few pixels; real ones where they are present."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from expect import begins
from PIL import Image

from multitask_kd.batch import IGNORE
from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.files import class_names
from multitask_kd.data.layouts.voc import CLASSES, Voc

WIDTH, HEIGHT = 12, 8  # of every image here
CAR, DOG, PERSON = (CLASSES.index(name) for name in ("car", "dog", "person"))


def thing(name: str, *corners: object, difficult: str = "<difficult>0</difficult>") -> str:
    box = "".join(
        f"<{tag}>{value}</{tag}>"
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object>\n<name>{name}</name><pose>Left</pose>{difficult}\n<bndbox>\n{box}</bndbox>\n</object>\n"


SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>\n"


class Kit:
    """Images 1, 2, 3: a difficult dog and a person; nothing there; no XML and a mask."""

    def __init__(self, root: Path):
        self.root = root
        for folder in (
            "JPEGImages",
            "Annotations",
            "SegmentationClass",
            "ImageSets/Main",
            "ImageSets/Segmentation",
        ):
            (root / folder).mkdir(parents=True)
        for key in "123":
            Image.new("RGB", (WIDTH, HEIGHT), (int(key), 0, 0)).save(root / "JPEGImages" / f"{key}.jpg")
        hard = "<difficult>1</difficult>"
        self.xml("1", thing("dog", 1, 1, 12, 8, difficult=hard) + thing("person", 3, 2, 3, 5))
        self.xml("2", "")
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[2, :3] = 12, 20, 255
        self.mask("3", pixels)
        self.list("Main/train", "1\n3\n")
        self.list("Segmentation/train", "3\n")

    def xml(self, key: str, things: str, size: str = SIZE) -> None:
        text = f"<annotation>\n{size}{things}</annotation>"
        (self.root / "Annotations" / f"{key}.xml").write_text(text)

    def mask(self, key: str, pixels: np.ndarray) -> None:
        image = Image.fromarray(pixels, mode="P")
        image.putpalette([value % 256 for value in range(7, 7 + 768)])  # no colour is its index
        image.save(self.root / "SegmentationClass" / f"{key}.png")

    def list(self, name: str, text: str) -> None:
        (self.root / "ImageSets" / f"{name}.txt").write_text(text)

    def open(self, **options) -> Voc:
        return Voc(**{"root": str(self.root)} | options)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


# --- what is read


def test_registered_with_its_options():
    assert LAYOUTS.get("voc", "data") is Voc
    LAYOUTS.check(
        "voc", {"root": "a", "split": "Main/train", "one_based": False, "difficult": "drop"}, "data"
    )
    with begins("data", "root"):
        LAYOUTS.check("voc", {}, "data")


def test_boxes_are_one_based_and_inclusive(kit):
    data = kit.open()
    assert len(data) == 3 and data.name(0) == "1.jpg" and not data.faults
    assert data.classes == {"det": CLASSES, "seg": ("background", *CLASSES)}
    first = data.read(0)
    # 1..12 of 12 columns: the whole width, 0 to 12; column 3 alone: 2 to 3
    found = first.labels["det"]
    assert found.boxes.tolist() == [[0, 0, 12, 8], [2, 1, 3, 5]]
    assert found.classes.tolist() == [DOG, PERSON] and found.area.tolist() == [96, 4]
    assert [a.dtype for a in (first.image, found.boxes, found.classes, found.crowd, found.area)] == [
        np.uint8, np.float32, np.int64, np.bool_, np.float32
    ]  # fmt: skip
    with pytest.raises(IndexError):
        data.read(3)


def test_zero_based_coordinates_stay(kit):
    kit.xml("1", thing("dog", 0, 1.5, 12.0, 8))
    assert kit.open(one_based=False).read(0).labels["det"].boxes.tolist() == [[0, 1.5, 12, 8]]
    assert kit.open().read(0).labels["det"].boxes.tolist() == [[0, 0.5, 12, 8]]  # -1 is clipped


def test_not_labelled_is_not_empty(kit):
    data = kit.open()
    labelled, empty, neither = (data.read(i) for i in range(3))
    assert "seg" not in labelled.labels and "seg" not in empty.labels and "det" not in neither.labels
    none = empty.labels["det"]
    assert none.boxes.shape == (0, 4) and none.boxes.dtype == np.float32
    assert len(none.classes) == len(none.crowd) == 0
    assert neither.image[0, 0, 0] in (2, 3, 4)


def test_masks_give_palette_indices_and_void(kit):
    mask = kit.open().read(2).labels["seg"]
    assert (
        mask.dtype == np.uint8 and mask[2, :4].tolist() == [12, 20, IGNORE, 0] and mask.sum() == 12 + 20 + 255
    )
    with begins("mask", "3.png", "index 12", "0 to 1", "`seg_classes`"):
        kit.open(seg_classes=["background", "dog"]).read(2)


def test_difficult_objects(kit):
    assert kit.open().read(0).labels["det"].crowd.tolist() == [True, False]
    seen = kit.open().seen["det"]
    assert seen.sum() == seen[PERSON] == 1  # what is ignored does not count
    assert kit.open(difficult="keep").seen["det"][DOG] == 1
    assert kit.open(difficult="keep").read(0).labels["det"].crowd.tolist() == [False, False]
    dropped = kit.open(difficult="drop")
    assert dropped.read(0).labels["det"].classes.tolist() == [PERSON] and not dropped.faults
    for mark in ("", "<difficult/>", "<difficult> </difficult>"):  # labelme leaves it empty
        kit.xml("1", thing("dog", 1, 1, 5, 5, difficult=mark))
        assert kit.open().read(0).labels["det"].crowd.tolist() == [False]


def test_parts_of_objects_are_no_objects(kit):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    kit.xml("1", thing("person", 2, 2, 9, 8).replace("<bndbox>", part + "<bndbox>", 1))
    assert kit.open().read(0).labels["det"].boxes.tolist() == [[1, 1, 9, 8]]


def test_bad_boxes_are_dropped_and_counted(kit):
    kit.xml("1", thing("dog", 5, 5, 4, 8) + thing("dog", 20, 1, 30, 8) + thing("dog", 10, 7, 40, 40))
    data = kit.open()
    assert data.read(0).labels["det"].boxes.tolist() == [[9, 6, 12, 8]]
    assert data.faults == {
        "boxes of zero or negative size (dropped)": 1,
        "boxes outside the image (dropped)": 1,
    }


@pytest.mark.parametrize("size", ["", "<size/>", "<size><width>0</width><height>0</height></size>"])
def test_a_size_the_xml_lacks_is_read_from_the_image(kit, size):
    kit.xml("1", thing("dog", 1, 1, 99, 5), size)
    data = kit.open()
    assert data.read(0).labels["det"].boxes.tolist() == [[0, 0, 12, 5]]
    assert data.faults == {"XMLs without the size of their image (read from the image)": 1}


def test_splits(kit):
    assert kit.open(split="train").names == kit.open(split="Main/train").names == ["1.jpg", "3.jpg"]
    assert kit.open(split="train", boxes=False).names == ["3.jpg"]
    assert kit.open(split="train").read(0).labels["det"].boxes.tolist()[1] == [2, 1, 3, 5]
    assert kit.open(split="train").read(1).labels["seg"][2, 0] == 12
    kit.list("Main/train", "3\r\n\r\n1 \n")
    assert kit.open(split="train").names == ["3.jpg", "1.jpg"]


def test_one_task_alone(kit):
    boxes, masks = kit.open(masks=False), kit.open(boxes=False)
    assert boxes.kinds == {"det": "detection"} and masks.kinds == {"seg": "semantic"}
    assert not boxes.read(2).labels and len(boxes.read(0).labels["det"]) == 2
    assert not masks.read(0).labels and "seg" in masks.read(2).labels
    with begins("masks", "layout `images`"):
        kit.open(boxes=False, masks=False)
    with begins("det_classes", "`boxes`"):
        kit.open(boxes=False, det_classes=["dog"])
    with begins("seg_classes", "`masks`"):
        kit.open(masks=False, seg_classes=["dog"])


def test_classes_of_ones_own(kit):
    data = kit.open(det_classes=["person"])
    person = data.read(0).labels["det"]
    assert person.boxes.tolist() == [[2, 1, 3, 5]] and person.classes.tolist() == [0]
    assert data.faults == {"objects of classes that det_classes does not name (left out)": 1}
    (kit.root / "class_names.txt").write_text("_background_\nperson\ndog\n\n")
    data = kit.open(det_classes="class_names.txt", seg_classes="class_names.txt", masks=True)
    assert data.classes == {"det": ("person", "dog"), "seg": ("background", "person", "dog")}
    assert data.read(0).labels["det"].classes.tolist() == [1, 0]
    with begins("det_classes", "'persn'", "did you mean 'person'"):
        kit.open(det_classes=["persn"])
    with begins("det_classes", "only the background"):
        kit.open(det_classes=["background"])
    with begins("det_classes", "list of class names"):
        kit.open(det_classes=[1, 2])
    kit.xml("1", "\n" + thing("persn", 1, 1, 2, 2))
    with begins("root", "1.xml', line 4", "'persn'", "did you mean 'person'", "`det_classes`"):
        kit.open()


def test_class_names_from_text_files(tmp_path):
    path = tmp_path / "names.TXT"
    path.write_bytes(b"\xef\xbb\xbfroad\r\ntv/monitor\r\n")
    assert class_names(str(path), ()) == ("road", "tv/monitor")
    path.write_text("road\n\ncar\n")
    with begins("seg_classes ('", "names.TXT", "list of class names"):
        class_names(str(path), ())
    path.write_bytes(b"\xff\xfe\x00")
    with begins("det_classes", "names.TXT", "UTF-8"):
        class_names(str(path), (), where="det_classes")
    with begins("det_classes", "none.txt", "does not exist"):
        class_names("none.txt", (), str(tmp_path), "det_classes")


def test_images_of_other_kinds_and_in_subfolders(kit):
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (kit.root / folder / "town").mkdir()
        (kit.root / folder / f"1.{ending}").rename(kit.root / folder / "town" / f"1.{ending}")
    Image.new("RGB", (WIDTH, HEIGHT)).save(kit.root / "JPEGImages" / "4.PNG")
    data = kit.open()
    assert data.names == ["2.jpg", "3.jpg", "4.PNG", "town/1.jpg"] and len(data.read(3).labels["det"]) == 2
    Image.new("RGB", (WIDTH, HEIGHT)).save(kit.root / "JPEGImages" / "2.png")
    with begins("root", "'2.jpg' and '2.png'", "ending"):
        kit.open()


def test_pickled_and_cached_the_same(kit):
    data = kit.open(cache=str(kit.root / "cache"))
    for _ in range(2):
        again = pickle.loads(pickle.dumps(data))
        sample = again.read(0)
        sample.labels["det"].boxes += 1
        sample.image += 1
        assert again.read(0).labels["det"].boxes.tolist() == [[0, 0, 12, 8], [2, 1, 3, 5]]
        assert again.read(2).labels["seg"][2, 0] == 12
    assert len(list((kit.root / "cache").iterdir())) == 3


# --- what is wrong


def test_missing_folders_and_lists(kit):
    with begins("root", "JPEGImages", "VOCdevkit/VOC2012"):
        kit.open(root=str(kit.root / "JPEGImages"))
    with begins("split", "Main/trian.txt", "did you mean 'Main/train'"):
        kit.open(split="trian")
    with begins("split", "Main/train", "not 2012"):
        kit.open(split=2012)
    kit.list("Main/train", "1\n\n1\n")
    with begins("split", "train.txt', line 3", "'1' is in line 1"):
        kit.open(split="train")
    kit.list("Main/train", "1\n2008_000008 -1\n")
    with begins("split", "train.txt', line 2", "'2008_000008 -1'", "a name a line"):
        kit.open(split="train")
    kit.list("Main/train", "\n")
    with begins("split", "lists no images"):
        kit.open(split="train")
    kit.list("Main/train", "2\n")
    with begins("masks", "none of the 1 images", "'2.jpg' -> '2.png'", "`masks: false`"):
        kit.open(split="train")
    for path in (kit.root / "Annotations").iterdir():
        path.unlink()
    with begins("boxes", "no labels (.xml)"):
        kit.open()
    (kit.root / "Annotations").rmdir()
    with begins("boxes", "Annotations' does not exist"):
        kit.open()
    assert kit.open(boxes=False).read(2).labels["seg"][2, 0] == 12


DAMAGED = [
    ("", ["line 1", "not valid XML", "no element found"]),
    ("<annotation>\n<size>\n</annotation>", ["line 3", "mismatched tag"]),
    ("<annotation>\n&a;</annotation>", ["line 2", "undefined entity"]),
    ("\0\0\0", ["line 1", "not valid XML"]),
    ('<?xml version="1.0" encoding="gb2312"?><annotation/>', ["UTF-8"]),
    ('<?xml version="1.0" encoding="none-such"?><annotation/>', ["UTF-8"]),
    ("\n<html></html>", ["line 2", "<annotation> is needed, not <html>"]),
    (f"<annotation>{SIZE}<object><name>dog</name></object></annotation>", ["line 2", "without a <bndbox>"]),
    (f"<annotation>{SIZE}{thing('', 1, 1, 2, 2)}</annotation>", ["line 2", "without a <name>"]),
    (f"<annotation>{SIZE}{thing('dog', 1, 1, 2, '')}</annotation>", ["line 5", "<ymax> is ''"]),
    (f"<annotation>{SIZE}{thing('dog', 'one', 1, 2, 2)}</annotation>", ["line 5", "<xmin> is 'one'"]),
    (f"<annotation>{SIZE}{thing('dog', 1, 'nan', 2, 2)}</annotation>", ["line 5", "<ymin> is 'nan'"]),
    (f"<annotation>{SIZE}{thing('dog', 1, 1, '1e300', 2)}</annotation>", ["line 5", "<xmax> is '1e300'"]),
    (f"<annotation>{SIZE}{thing('dog', 1, 1, 2, 2).replace('xmin', 'x')}</annotation>", ["line 4", "<bndbox> has no <xmin>"]),
    (f"<annotation>{SIZE}{thing('dog', 1, 1, 2, 2, difficult='<difficult>no</difficult>')}</annotation>", ["line 3", "'no'"]),
    ("<annotation>\n<size><width>1.5</width><height>8</height></size></annotation>", ["line 2", "whole numbers"]),
    ("<annotation>\n<size><width>-3</width><height>8</height></size></annotation>", ["line 2", "whole numbers"]),
    ("<annotation>\n<size><width>1e30</width><height>8</height></size></annotation>", ["line 2", "<width> is '1e30'"]),
    ("<a>" * 100_000, ["line 1", "not valid XML"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), DAMAGED, ids=[" ".join(parts) for _, parts in DAMAGED])
def test_xml_faults_are_named_with_their_line(kit, text, parts):
    (kit.root / "Annotations" / "2.xml").write_text(text)
    with begins("root", "2.xml'", *parts):
        kit.open()


def test_entities_are_never_expanded(kit):
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">\n' for i in range(1, 30))
    text = f'<?xml version="1.0"?>\n<!DOCTYPE annotation [<!ENTITY e0 "ha">\n{entities}]>\n<annotation>&e29;</annotation>'
    (kit.root / "Annotations" / "2.xml").write_text(text)
    with begins("root", "2.xml', line 2", "DOCTYPE"):
        kit.open()
    (kit.root / "Annotations" / "2.xml").write_text('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>')
    with begins("root", "2.xml', line 1", "DOCTYPE"):
        kit.open()


def test_other_encodings_are_read(kit):
    text = f"<annotation>{SIZE}{thing('Bär', 1, 1, 2, 2)}</annotation>"
    for encoding in ("utf-8", "utf-16", "latin-1"):
        body = f'<?xml version="1.0" encoding="{encoding}"?>{text}'
        (kit.root / "Annotations" / "2.xml").write_bytes(body.encode(encoding))
        assert kit.open(det_classes=["Bär"]).read(1).labels["det"].boxes.tolist() == [[0, 0, 2, 2]]


def test_a_folder_in_place_of_a_file(kit):
    (kit.root / "Annotations" / "2.xml").unlink()
    (kit.root / "Annotations" / "2.xml").mkdir()
    assert "det" not in kit.open().read(1).labels
    os.symlink("nowhere", kit.root / "Annotations" / "3.xml")
    with begins("root", "3.xml' does not exist"):
        kit.open()


def test_sizes_that_differ(kit):
    kit.mask("3", np.zeros((4, 6), np.uint8))
    with begins("mask", "3.png' is 6x4", "3.jpg' is 12x8"):
        kit.open().read(2)
    kit.xml("2", "", SIZE.replace("12", "8"))
    with begins("image", "2.jpg' is 12x8", "2.xml' says 8x8"):
        kit.open().read(1)


def test_damaged_images_and_masks(kit):
    data = kit.open()
    (kit.root / "JPEGImages/1.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    (kit.root / "SegmentationClass/3.png").write_bytes(b"")
    with begins("image", "1.jpg", "cannot be decoded"):
        data.read(0)
    with begins("mask", "3.png", "cannot be decoded"):
        data.read(2)
    Image.new("RGB", (WIDTH, HEIGHT)).save(kit.root / "SegmentationClass/3.png")
    with begins("mask", "3.png", "colour image"):
        data.read(2)


def test_options_that_are_none(kit):
    with begins("difficult", "'ignored'", "did you mean 'ignore'"):
        kit.open(difficult="ignored")
    many = [str(i) for i in range(300)]
    with begins("seg_classes", "index 255 is void"):
        kit.open(seg_classes=many)
    assert len(kit.open(det_classes=["dog", *many]).classes["det"]) == 301  # of boxes there may be any number
    with begins("root", "a path is needed"):
        kit.open(root="")


# --- real files


@pytest.mark.real_data
def test_files_of_voc_2012(real):
    data = Voc(root=str(real("samples/voc_real") / "VOCdevkit/VOC2012"), split="train")
    assert data.names == ["2007_000063.jpg", "2011_003353.jpg"] and not data.faults
    chair, person = data.read(0), data.read(1)
    assert chair.labels["det"].boxes.tolist() == [[122, 114, 379, 275], [74, 0, 428, 375]]
    assert [CLASSES[c] for c in chair.labels["det"].classes] == ["dog", "chair"]
    assert "seg" not in person.labels and np.allclose(person.labels["det"].boxes, [[129, 44.7, 375, 470]])
    assert set(np.unique(chair.labels["seg"])) == {0, 9, 12, IGNORE}
    rows, columns = np.nonzero(chair.labels["seg"] == 12)  # within its border of void, the dog fills its box
    extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(chair.labels["det"].boxes[0] - extent).max() <= 6


@pytest.mark.real_data
def test_files_of_labelme(real):
    names = "class_names.txt"
    data = Voc(root=str(real("samples/voc_labelme")), det_classes=names, seg_classes=names, one_based=False)
    assert (
        len(data) == 3
        and not data.faults
        and len(data.classes["det"]) == 20
        and len(data.classes["seg"]) == 21
    )
    bus = data.read(2)
    assert [data.classes["det"][c] for c in bus.labels["det"].classes] == ["bus", "bus", "car"]
    for box, c in zip(bus.labels["det"].boxes.astype(int), bus.labels["det"].classes, strict=True):
        assert (bus.labels["seg"][box[1] : box[3], box[0] : box[2]] == c + 1).mean() > 0.5
