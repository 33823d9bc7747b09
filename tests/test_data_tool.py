"""The report on a data set, with figures worked by hand, its contact sheet, and tools/data.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from multitask_kd.batch import IGNORE
from multitask_kd.data.base import Layout, Sample
from multitask_kd.data.labels import BoxLabels
from multitask_kd.engine.data_report import describe, draw_sheet
from multitask_kd.errors import UserError
from multitask_kd.report.layers import BoxLayer, MaskLayer, TextLayer
from multitask_kd.report.sheet import FEW, Labelled, _kept, contact_sheet
from multitask_kd.tasks.base import KINDS, Tally, Task
from multitask_kd.tasks.tallies import BoxTally, ClassTally, DepthTally, MaskTally

SEG, DET = ("background", "car", "sky", "bus"), ("car", "bus", "bike")
CLASS, DEPTH, DETECTION, SEMANTIC = (KINDS.get(name, "") for name in KINDS.names())
BOTH = {"det": DETECTION, "seg": SEMANTIC}


class Five(Layout):
    """Image 0: fully labelled; 1: a mask only; 2: boxes only, of which none; 3: broken; 4: no labels."""

    def __init__(self):
        super().__init__()
        self.add_label("seg", "semantic", SEG)
        self.add_label("det", "detection", DET)
        self.count = 5

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{index}.png"

    def read(self, index):
        if index % 5 == 3:
            raise UserError(f"image '/x/{index}.png' is damaged; replace it")
        image = np.zeros((20, 40, 3) if index == 0 else (10, 40, 3), np.uint8)
        if index == 0:
            mask = np.zeros((20, 40), np.uint8)  # 800 pixels: 200 of a car, 100 void, 500 background
            mask[:5], mask[5:7, :], mask[7, :20] = 1, IGNORE, IGNORE
            boxes = np.array([[0, 0, 16, 4], [0, 0, 36, 9], [4, 4, 5, 5], [0, 0, 40, 20]], np.float32)
            crowd, area = np.array([False, False, False, True]), np.array([60, 2000, 1, 10000], np.float32)
            return Sample(image, {"seg": mask, "det": BoxLabels(boxes, np.array([0, 1, 0, 0]), crowd, area)})
        if index == 1:
            return Sample(image, {"seg": np.full((10, 40), 2, np.uint8)})
        nothing = BoxLabels(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        return Sample(image, {"det": nothing} if index == 2 else {})


@pytest.fixture
def five():
    return Five()


def test_counts_of_images_classes_and_pixels(five):
    five.faults["boxes outside the image (dropped)"] = 2
    assert "  boxes outside the image (dropped): 2" in str(describe("x", five, BOTH, (10, 20))).splitlines()
    report = describe("data.train", five, BOTH, (10, 20), cells={"det": 4})
    assert (report.images, report.looked, report.read, report.readable) == (5, 5, 4, [0, 1, 2, 4])
    assert report.labelled == {"seg": 2, "det": 2}
    assert report.tallies["det"].empty == 1 and report.tallies["seg"].void == 100
    figures = report.figures()
    assert list(figures)[5:7] == ["seg", "det"]  # those of maps first, whatever their order was
    seg = figures["seg"]["classes"].items()
    assert {name: {key: entry[key] for key in ("pixels", "images")} for name, entry in seg} == {
        "background": {"pixels": 500, "images": 1}, "car": {"pixels": 200, "images": 1},
        "sky": {"pixels": 400, "images": 1}, "bus": {"pixels": 0, "images": 0},
    }  # fmt: skip
    assert figures["det"]["classes"] == {
        "car": {"boxes": 2, "crowds": 1, "images": 1}, "bus": {"boxes": 1, "crowds": 0, "images": 1},
        "bike": {"boxes": 0, "crowds": 0, "images": 0},
    }  # fmt: skip
    assert report.sizes == {(40, 20): 1, (40, 10): 3}
    assert report.faults == {"boxes outside the image (dropped)": 2}
    assert report.unreadable == ["image '/x/3.png' is damaged; replace it"]


def test_shares_and_box_sizes(five):
    """40x20 into 20x10: scaled by 1/2. sqrt(16 x 4) = 8 -> 4, sqrt(36 x 9) = 18 -> 9, 1 -> 0.5 pixels; areas
    60, 2000, 1."""
    figures = describe("data.train", five, BOTH, (10, 20), cells={"det": 8, "seg": 4}).figures()
    assert figures["seg"]["void_percent"] == pytest.approx(100 * 100 / 1200, abs=1e-3)
    assert figures["seg"]["classes"]["sky"]["percent"] == pytest.approx(100 * 400 / 1100, abs=1e-3)
    det = figures["det"]
    assert det["boxes"] == 3 and det["images_without_boxes"] == 1
    assert (det["input_px"]["least"], det["input_px"]["half"], det["input_px"]["most"]) == (0.5, 4, 9)
    assert det["below_cell_percent"] == pytest.approx(200 / 3, abs=1e-3)  # 4 and 0.5 are below 8
    assert det["left_out_percent"] == pytest.approx(100 / 3, abs=1e-3)  # 0.5 x 0.5 is below 4
    assert det["coco_percent"] == pytest.approx({"small": 200 / 3, "medium": 100 / 3, "large": 0}, abs=1e-3)
    assert figures["image_sizes"] == {"40x10": 3, "40x20": 1} and json.loads(json.dumps(figures)) == figures


def test_text(five):
    text = str(describe("data.train", five, BOTH, (10, 20), cells={"det": 8}))
    lines = text.splitlines()
    assert lines[0] == "== data.train" and "images  5, of which 4 can be read" in lines
    assert "seg     2 of 4 labelled, 4 classes, 8.3 % of the pixels void" in lines
    assert (
        "det     2 of 4 labelled, 3 classes, 3 boxes and 1 crowd, 1.5 an image, 1 image without any" in lines
    )
    assert "sizes   40x10 (3), 40x20 (1); scaled by 0.50 into the input of 20x10" in lines
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(tuple(SEG + DET))}
    assert rows["car"] == ["18.18", "1", "2", "1", "1"] and rows["sky"] == ["36.36", "1", "-", "-", "-"]
    assert rows["bus"] == ["0.00", "0", "1", "0", "1"] and "bike" not in rows
    never = lines.index("NEVER in masks, 1 of 4 classes: bus")
    advice = "  if the set does not label it, say so: data.train.classes.{}: [the classes it labels]"
    assert lines[never + 1 : never + 4] == [
        advice.format("seg"), "NEVER in boxes, 1 of 3 classes: bike", advice.format("det")
    ]  # fmt: skip
    assert "66.7 % are smaller than the finest detection cell of 8 pixels" in lines
    assert "33.3 % cover less than 4 pixels there and are left out in training" in lines
    assert (
        "  1 of 5 images CANNOT BE READ" in lines and "    image '/x/3.png' is damaged; replace it" in lines
    )


def test_many_unreadable_are_counted(five):
    five.count = 100  # every fifth is broken: 20
    text = str(describe("x", five, BOTH, (10, 20)))
    assert (
        "20 of 100 images CANNOT BE READ" in text
        and text.count("is damaged") == 10
        and "    and 10 more" in text
    )


def test_limit_spreads_over_the_set(five):
    five.count = 101
    report = describe("x", five, BOTH, (10, 20), limit=3)
    assert report.looked == 3 and report.readable == [0, 50, 100]
    assert "images  101, 3 of them looked at, spread over the set" in str(report)
    assert "NEVER in masks in the 3 images" in str(report)
    assert "say so" not in str(report)  # the rest may have them


def test_one_task_nothing_readable_and_no_boxes(five):
    text = str(describe("x", five, {"seg": SEMANTIC}, (10, 20)))
    assert "det" not in text and "boxes" not in text
    five.read = lambda index: (_ for _ in ()).throw(OSError("no disk"))
    report = describe("x", five, BOTH, (10, 20), cells={"det": 4}, workers=3)
    assert report.read == 0 and report.unreadable[0] == "0.png: no disk"
    assert (
        "5 of 5" not in str(report)
        and "all 5 images CANNOT BE READ" in str(report)
        and report.figures()["read"] == 0
    )


def test_threads_find_the_same(five):
    five.count = 40
    plain, threads = (describe("x", five, BOTH, (10, 20), workers=n) for n in (0, 4))
    assert plain.figures() == threads.figures() and plain.readable == threads.readable


# --- labels of any name and kind


class Street(Layout):
    """Two images of 10 x 20 pixels: two masks, an attribute and a depth map; the second lacks lane and depth."""

    def __init__(self):
        super().__init__()
        self.add_label("weather", "classification", ("clear", "rain", "fog"))
        self.add_label("drivable", "semantic", ("background", "direct", "alternative"))
        self.add_label("lane", "semantic", ("background", "lane"))
        self.add_label("depth", "depth")
        self.known = {}

    def __len__(self):
        return 2

    def name(self, index):
        return f"{index}.png"

    def read(self, index):
        drivable, lane = np.zeros((2, 10, 20), np.uint8)
        drivable[5:], lane[:, 3] = 1, 1
        depth = np.zeros((10, 20), np.float32)
        depth[4:] = np.repeat([[2.0], [4.0], [4.0], [8.0], [8.0], [50.0]], 20, axis=1)
        labels = {"weather": index, "drivable": drivable}
        labels |= {} if index else {"lane": lane, "depth": depth}
        return Sample(np.zeros((10, 20, 3), np.uint8), labels, self.known)

    def kind(self):
        return {label: KINDS.get(kind, label) for label, kind in self.kinds.items()}


def test_every_label_has_its_line_and_its_columns():
    street = Street()
    lines = str(describe("data.train.bdd", street, street.kind(), (10, 20))).splitlines()
    assert lines[:7] == [
        "== data.train.bdd",
        "images    2",
        "drivable  all 2 labelled, 3 classes, 0.0 % of the pixels void",
        "lane      1 of 2 labelled, 2 classes, 0.0 % of the pixels void",
        "depth     1 of 2 labelled, 60.0 % of the pixels known",
        "weather   all 2 labelled, 3 classes",
        "sizes     20x10; scaled by 1.00 into the input of 20x10",
    ]
    advice = "  if the set does not label it, say so: data.train.bdd.classes.{}: [the classes it labels]"
    assert lines[7:] == [
        "",
        "class       drivable % of pixels  drivable in masks",
        "----------  --------------------  -----------------",
        "background                 50.00                  2",
        "direct                     50.00                  2",
        "NEVER in drivable labels, 1 of 3 classes: alternative",
        advice.format("drivable"),
        "",
        "class       lane % of pixels  lane in masks",
        "----------  ----------------  -------------",
        "background             95.00              1",
        "lane                    5.00              1",
        "",
        "class  weather images",
        "-----  --------------",
        "clear               1",
        "rain                1",
        "NEVER in weather labels, 1 of 3 classes: fog",
        advice.format("weather"),
        "",
        "depth: metres of the known pixels",
        *["least   5%  25%  half  75%   95%  most", "-----  ---  ---  ----  ---  ----  ----"],
        "  2.0  2.0  4.0   4.0  8.0  50.0  50.0",
        "",
        "no faults found",
    ]


def test_labels_that_share_a_class_share_a_table():
    street = Street()
    street.classes["lane"] = ("background", "direct")
    tables = str(describe("x", street, street.kind(), (10, 20))).split("\n\n")[1:3]
    assert tables[0].splitlines()[0].split("  ")[0] == "class" and "lane in masks" in tables[0]
    assert "lane" not in tables[1] and "weather images" in tables[1]


def test_classes_that_a_set_does_not_label_are_not_missed():
    street = Street()
    street.known = {"drivable": np.array([True, True, False]), "weather": np.array([True, False, False])}
    report = describe("x", street, street.kind(), (10, 20))
    lines = str(report).splitlines()
    assert "drivable  all 2 labelled, 2 of 3 classes, 0.0 % of the pixels void" in lines
    assert "not labelled in drivable labels of this set: alternative" in lines and "NEVER" not in str(report)
    assert "not labelled in weather labels of this set: rain, fog" in lines
    figures = report.figures()
    assert figures["drivable"]["labelled_classes"] == ["background", "direct"]
    assert "labelled_classes" not in figures["lane"] and json.loads(json.dumps(figures)) == figures


def test_a_kind_of_which_nothing_is_known_is_counted():
    """A kind in one file of its own, with the tally of the base class."""

    class Tilt(Task):
        kind, has_classes = "tilt", False

    street = Street()
    street.add_label("tilt", "tilt")
    street.read = lambda index: Sample(np.zeros((10, 20, 3), np.uint8), {"tilt": 0.5} if index else {})
    report = describe("x", street, {"tilt": Tilt}, (10, 20))
    assert report.figures()["tilt"] == {} and report.labelled == {"tilt": 1}
    assert "tilt    1 of 2 labelled" in str(report).splitlines() and Tilt.Tally is Tally


def test_every_kind_is_on_the_sheet():
    street = Street()
    report = describe("x", street, street.kind(), (10, 20))
    sheet = draw_sheet(report, street, 2)
    street.read = lambda index, read=street.read: Sample(read(index).image)
    assert sheet.dtype == np.uint8 and (sheet[:200] != draw_sheet(report, street, 2)[:200]).any()


def of(tally, *labels, size=(10, 20)):
    for label in labels:
        tally.add(tally.look(label, size))
    return tally


def test_pixels_of_masks():
    masks = np.array([[0, 0, 1, 255]], np.uint8), np.array([[1, 1, 1, 1]], np.uint8)
    tally = of(MaskTally(("a", "b", "c"), (4, 4), None), *masks)
    assert tally.labelled == 2 and tally.never() == ["c"] and tally.summary() == ", 12.5 % of the pixels void"
    assert tally.class_row("b") == {"pixels": 5, "images": 2, "percent": 71.429}
    assert tally.class_row("other") == {}
    empty = MaskTally(("a",), (4, 4), None)
    assert empty.summary() == ", 0.0 % of the pixels void" and empty.never() == ["a"]


def test_boxes_at_the_size_of_the_input():
    boxes = np.array([[0, 0, 8, 8], [0, 0, 2, 2], [0, 0, 20, 10]], np.float32)
    tally = BoxTally(("car",), (5, 20), 4)  # 20 x 10 into 20 x 5: scaled by 1/2
    of(tally, BoxLabels(boxes, np.zeros(3, np.int64), np.array([False, False, True])))
    assert tally.figures()["input_px"]["least"] == 1 and tally.figures()["input_px"]["most"] == 4
    assert tally.figures()["below_cell_percent"] == 50 and tally.figures()["left_out_percent"] == 50
    assert tally.class_columns() == {"boxes": "boxes", "crowds": "crowds", "images": "in images"}
    assert "finest detection cell of 4 pixels" in tally.sections()[0]
    no_cell = of(BoxTally(("car",), (5, 20), None), BoxLabels(boxes, np.zeros(3, np.int64)))
    assert "cell" not in no_cell.sections()[0]
    assert BoxTally(("car",), (5, 20), 4).sections() == [] and BoxTally(("car",), (5, 20), 4).summary() == ""


def test_images_by_class():
    tally = of(ClassTally(("clear", "rain"), (4, 4), None), 0, np.int64(0))
    assert tally.figures() == {"classes": {"clear": {"images": 2}, "rain": {"images": 0}}}
    assert tally.never() == ["rain"] and tally.labelled == 2


def test_quantiles_of_depth():
    """1, 2, ..., 100 metres, once each: half are up to 50, a quarter up to 25; to a thousandth of the value."""
    metres = np.arange(1, 101, dtype=np.float32).reshape(10, 10)
    unknown = np.array([[0, -1, np.nan, np.inf]], np.float32)
    tally = of(DepthTally((), (4, 4), None), metres[:5], metres[5:], unknown)
    found = tally.figures()
    assert found["known_percent"] == pytest.approx(100 * 100 / 104, abs=1e-3)
    assert (found["metres"]["least"], found["metres"]["most"]) == (1, 100)
    expected = {"5%": 5, "25%": 25, "half": 50, "75%": 75, "95%": 95}
    assert {key: found["metres"][key] for key in expected} == pytest.approx(expected, rel=0.001, abs=0.005)
    nothing = of(DepthTally((), (4, 4), None), unknown)
    assert nothing.figures() == {"known_percent": 0.0} and nothing.sections() == []


# --- the sheet


def test_sheet_shows_every_kind_of_label(five):
    report = describe("x", five, BOTH, (10, 20))
    sheet = draw_sheet(report, five, 12)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    widths = {count: draw_sheet(report, five, count).shape[1] for count in (1, 2, 3, 12)}
    assert widths[1] < widths[2] < widths[3] == widths[12]  # three in a row
    with pytest.raises(ValueError, match="needs an image"):
        contact_sheet([], {"seg": SEG})


def test_sheet_marks_the_classes_it_was_given():
    """A red-ish mask differs from no mask; a name is written in its middle; the background has neither."""
    image = np.full((60, 60, 3), 128, np.uint8)
    mask = np.zeros((60, 60), np.uint8)
    names = {"seg": ["background", "thing"]}
    bare = contact_sheet([Labelled("a", image, {"seg": MaskLayer(mask, names["seg"])})], names)
    mask[:, 30:] = 1
    shown = contact_sheet([Labelled("a", image, {"seg": MaskLayer(mask, names["seg"])})], names)
    assert bare.shape == shown.shape
    panel = slice(50, 450), slice(10, 428)
    left, right = np.split((bare != shown)[panel].any(axis=2), 2, axis=1)
    assert not left[:, :-3].any() and right[:, 3:].all()
    middle = shown[panel][160:240, 209 + 60 : 209 + 150]
    assert (middle.min(axis=2) > 200).sum() > 20  # the white of the letters


def test_of_many_classes_only_those_on_the_sheet_have_a_colour():
    many = [f"c{i}" for i in range(FEW + 1)]
    kept, table = _kept(many, np.array([3, 20, IGNORE]))
    assert kept == ["c3", "c20"] and (table[3], table[20], table[IGNORE]) == (0, 1, IGNORE)
    few, table = _kept(many[:FEW], np.array([3]))
    assert few == many[:FEW] and table[3] == 3
    image = np.zeros((30, 40, 3), np.uint8)
    boxes = np.array([[2, 2, 20, 20]], np.float32)
    layer = BoxLayer(boxes, np.array([7]), many, crowd=np.array([True]))
    one = Labelled("a", image, {"det": layer})
    assert contact_sheet([one], {"det": many}).shape[1] > 400  # a crowd of class 7 of many: index 7 + 25
    assert one.layers == {"det": layer} and layer.classes.tolist() == [7]  # what was given is left as it is


def test_only_what_is_drawn_in_colours_is_in_the_legend():
    """A legend of one line is lower than one of many."""
    image, mask = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8)
    names = {"seg": ["background", "road"], "weather": [f"weather {i}" for i in range(20)]}
    layers = {"seg": MaskLayer(mask, names["seg"]), "weather": TextLayer("weather: 3")}
    both = contact_sheet([Labelled("a", image, layers)], names)
    alone = contact_sheet([Labelled("a", image, {"seg": layers["seg"]})], {"seg": names["seg"]})
    assert both.shape == alone.shape and (both != alone).any()


def test_names_of_regions_leave_other_masks_and_corners_alone():
    """Two masks over the whole image: their names stand at two places."""
    image, mask = np.full((300, 420, 3), 128, np.uint8), np.ones((300, 420), np.uint8)
    names = {"seg": ["background", "road"], "drivable": ["background", "direct"]}
    layers = {task: MaskLayer(mask, names[task]) for task in names}
    one = contact_sheet([Labelled("", image, {"seg": layers["seg"]})], names)
    bare = contact_sheet([Labelled("", image, {"seg": MaskLayer(0 * mask, names["seg"])})], names)
    both = contact_sheet([Labelled("", image, layers)], names)
    nothing, road, two = ((picture[60:300, 20:410].min(axis=2) > 250) for picture in (bare, one, both))
    assert not nothing.any() and road.any() and not (road & ~two).any()
    assert two.sum() > 1.5 * road.sum()  # "direct" is written too, elsewhere


# --- the tool


@pytest.fixture
def config(raw, tmp_path):
    """config(changes) -> the path of a config on generated scenes, changed."""

    def write(changes=()):
        (tmp_path / "cfg.yaml").write_text(
            yaml.safe_dump(raw(tmp_path / "run", changes), sort_keys=False), encoding="utf-8"
        )
        return tmp_path / "cfg.yaml"

    return write


@pytest.fixture
def pairs(tmp_path):
    """A set of the layout ``masks`` with four images, as a section of a config, and its folder."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(4):
        Image.new("RGB", (40, 20), (50 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(np.full((20, 40), i % 2, np.uint8)).save(tmp_path / f"masks/{i}.png")
    section = {
        "layout": "masks",
        "root": str(tmp_path),
        "images": "images",
        "masks": "masks",
        "seg_classes": ["road", "car"],
    }
    return section, tmp_path


def test_tool(config, tool, tmp_path):
    status, out, err = tool(
        "data", "--config", config(), "--out", tmp_path / "out", "--json", tmp_path / "deep/f.json"
    )
    assert status == 0 and "Traceback" not in err and "no faults found" in out
    assert out.index("== data.train") < out.index("== data.val") and "12" in out
    assert "finest detection cell of 8 pixels" in out  # tasks.det.head.strides, not model.strides
    for name in ("data.train", "data.val"):
        with Image.open(tmp_path / f"out/{name}.png") as picture:
            assert min(picture.size) > 400
    figures = json.loads((tmp_path / "deep/f.json").read_text())
    assert list(figures) == ["data.train", "data.val"]
    assert (figures["data.train"]["images"], figures["data.val"]["read"]) == (12, 5)
    assert figures["data.val"]["sheet"] == str(tmp_path / "out/data.val.png")
    assert not (tmp_path / "run").exists()


def test_tool_limits_and_leaves_pictures_out(config, tool, tmp_path):
    out = tmp_path / "out"
    status, said, _ = tool(
        "data", "--config", config(), "--out", out, "--limit", 3, "--images", 0, "data.val.count=4"
    )
    assert status == 0 and "12, 3 of them looked at" in said and "4, 3 of them looked at" in said
    assert not out.exists() and "pictures:" not in said
    for wrong in (["--limit", 0], ["--images", -1]):
        status, _, err = tool("data", "--config", config(), *wrong)
        assert status == 2 and f"error: {wrong[0]}: needs a number from" in err


def test_tool_names_broken_files_and_goes_on(config, tool, tmp_path, pairs):
    section, root = pairs
    (root / "images/1.png").write_bytes(b"nothing")
    Image.fromarray(np.full((20, 40), 9, np.uint8)).save(root / "masks/2.png")
    path = config({"data.train": section, "data.val": section})
    data = yaml.safe_load(path.read_text())
    data["data"]["train"] = data["data"]["val"] = section
    data["tasks"] = {"seg": {}}
    path.write_text(yaml.safe_dump(data))
    status, out, err = tool("data", "--config", path, "--out", tmp_path / "out")
    assert status == 0 and "Traceback" not in err
    assert (
        "2 of 4 images CANNOT BE READ" in out
        and "images/1.png' cannot be decoded" in out
        and "masks/2.png' has index 9" in out
    )
    assert (tmp_path / "out/data.val.png").is_file()

    for i in (0, 3):
        (root / f"images/{i}.png").write_bytes(b"")
    status, out, err = tool(
        "data", "--config", path, "--out", tmp_path / "none", "--json", tmp_path / "f.json"
    )
    assert status == 2 and "all 4 images CANNOT BE READ" in out and "Traceback" not in err
    assert (
        not (tmp_path / "none").exists()
        and json.loads((tmp_path / "f.json").read_text())["data.val"]["read"] == 0
    )

    (root / "masks/0.png").unlink()
    status, _, err = tool("data", "--config", path)
    assert status == 2 and "error: data.train.masks: '0.png' is missing" in err


def test_tool_tells_faults_of_the_config(config, tool):
    status, _, err = tool("data", "--config", config(), "data.val.layout=mask")
    assert status == 2 and "did you mean 'masks'?" in err and "Traceback" not in err


# --- real data


@pytest.mark.real_data
def test_camvid(real, tool, tmp_path, monkeypatch):
    monkeypatch.setenv("CAMVID", str(real("camvid")))
    config = Path(__file__).parents[1] / "configs/camvid.yaml"
    status, out, err = tool(
        "data", "--config", config, "--out", tmp_path, "--json", tmp_path / "f.json",
        "data.train.cache=null", "data.val.cache=null",
    )  # fmt: skip
    assert status == 0 and "Traceback" not in err
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["data.train"]["det"]["boxes"], figures["data.val"]["det"]["boxes"]) == (4312, 959)
    assert (
        figures["data.train"]["image_sizes"] == {"480x360": 343} and figures["data.val"]["unreadable"] == []
    )
    assert sum(
        entry["percent"] for entry in figures["data.train"]["seg"]["classes"].values()
    ) == pytest.approx(100, abs=0.1)
