import numpy as np
import pytest
import torch
from PIL import Image

from multitask_kd.batch import IGNORE
from multitask_kd.report.pictures import HATCH, LONGEST, legend, palette, panel, save_png, separated_colours, side_by_side
from multitask_kd.report.tables import mean_and_spread, metrics_table, spread_text, table

NAMES = {"seg": ("background", "road", "car"), "det": ("person", "car")}
GREY = 100


def grey(height=240, width=320):
    return np.full((height, width, 3), GREY, np.uint8)


def test_an_image_of_extreme_sides_gives_a_panel_that_can_be_saved():
    boxes = {"boxes": [[0, 0, 1, 1]], "classes": [0], "scores": [0.5]}
    for height, width in ((1500, 2), (70000, 1), (3, 70000), (1, 1)):
        mask = np.zeros((height, width), np.uint8)
        drawn = panel(grey(height, width), mask=mask, class_names=NAMES, max_width=max(320, width), **boxes)
        assert min(drawn.shape[:2]) >= 1 and max(drawn.shape[:2]) <= LONGEST, (height, width)


def mixed(colour):
    """A colour at half strength over the grey image."""
    return [(GREY + v) / 2 for v in colour]


# --- pictures


def test_a_name_has_one_colour_in_both_tasks():
    colours = palette(NAMES)
    assert list(colours) == ["background", "road", "car", "person"]
    assert len({colours[n] for n in ("road", "car", "person")}) == 3
    assert palette(dict(reversed(NAMES.items()))) == colours
    assert palette(NAMES["seg"]) == {n: colours[n] for n in NAMES["seg"]}


def test_colours_are_distinct_and_the_first_ones_stay():
    many = separated_colours(150)
    assert len(set(many)) == 150
    assert all(separated_colours(n) == many[:n] for n in (0, 1, 5, 6, 7, 30))
    assert len(separated_colours(1000)) == 1000  # more than there are to tell apart: they repeat


def test_mask_colours():
    mask = np.zeros((240, 320), np.uint8)
    mask[:, 100:200], mask[:, 200:] = 2, IGNORE
    picture = panel(grey(), mask=mask, class_names=NAMES)
    assert picture.shape == (240, 320, 3) and picture.dtype == np.uint8
    assert (picture[:100, :99] == GREY).all()  # background is left as it is
    np.testing.assert_allclose(picture[:200, 102:199], np.broadcast_to(mixed(palette(NAMES)["car"]), (200, 97, 3)), atol=1)
    stripes = {tuple(c) for c in picture[:200, 205:].reshape(-1, 3)}
    assert len(stripes) == 2 and (GREY,) * 3 in stripes and min(max(stripes)) > GREY + 0.4 * (HATCH[0] - GREY)


def test_box_colours_and_labels():
    boxes = torch.tensor([[50.0, 60.0, 150.0, 160.0]])
    arguments = {"boxes": boxes, "classes": torch.tensor([1]), "class_names": {"det": NAMES["det"]}}
    colour = list(palette({"det": NAMES["det"]})["car"])
    plain = panel(grey(), **arguments)
    assert plain[160, 80].tolist() == plain[110, 150].tolist() == colour  # the outline: bottom and right
    assert plain[59 - 3, 51].tolist() == colour  # the ground of the name, above the box
    assert (plain[70:150, 60:140] == GREY).all()  # inside nothing changes
    assert (plain[170:] == GREY).all()  # nothing is said to be missing
    scored = panel(grey(), scores=[0.5], **arguments)
    assert (scored[40:60] != GREY).sum() > (plain[40:60] != GREY).sum()  # the score is written too


def test_small_images_are_enlarged_and_large_ones_reduced():
    mask = np.zeros((96, 128), np.uint8)
    mask[:, 64:] = 1
    picture = panel(grey(96, 128), mask=mask, boxes=np.zeros((0, 4)), classes=[], class_names=NAMES)
    assert picture.shape == (240, 320, 3)
    assert (picture[:, :159] == GREY).all() and (picture[:, 165:] == picture[0, 170]).all()
    assert panel(grey(960, 1280), class_names=NAMES).shape == (480, 640, 3)
    assert panel(grey(960, 1280), class_names=NAMES, max_width=1280).shape == (960, 1280, 3)
    narrow = panel(grey(96, 128), boxes=[[64, 48, 96, 72]], classes=[0], class_names={"det": ("person",)})
    assert narrow[150, 160].tolist() == list(palette(("person",))["person"])  # boxes grow with the image


def test_missing_labels_are_said():
    mask, boxes = np.zeros((240, 320), int), {"boxes": [], "classes": []}
    corner = np.s_[200:, :100]
    nothing = panel(grey(), class_names=NAMES)
    no_boxes, no_mask = panel(grey(), mask=mask, class_names=NAMES), panel(grey(), **boxes, class_names=NAMES)
    assert all((p[corner] != GREY).any() for p in (nothing, no_boxes, no_mask))
    assert not np.array_equal(no_boxes, no_mask) and not np.array_equal(nothing, no_mask)
    complete = panel(grey(), mask=mask, **boxes, class_names=NAMES)
    assert (complete == GREY).all()
    # A task that the set does not have is not missed.
    assert (panel(grey(), mask=mask, class_names={"seg": NAMES["seg"]}) == GREY).all()


def test_title_is_a_strip_above():
    plain, titled = panel(grey(), class_names=NAMES), panel(grey(), class_names=NAMES, title="x" * 500)
    assert titled.shape[0] > 240 and titled.shape[1] == 320
    assert np.array_equal(titled[-240:], plain)


def test_boxes_of_an_untrained_model_can_be_drawn():
    boxes = [[np.nan] * 4, [50, 50, 10, 10], [-1e9, -5, 1e9, np.inf], [400, 300, 500, 400], [5, 5, 5, 5]]
    picture = panel(grey(), boxes=boxes * 40, classes=[0] * 200, scores=np.linspace(0, 1, 200), class_names=NAMES)
    assert picture.shape == (240, 320, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": np.zeros((8, 8), np.uint8)},
        {"image": np.zeros((8, 8, 3))},
        {"mask": np.zeros((9, 8), int)},
        {"mask": np.full((8, 8), 3)},
        {"boxes": [[0, 0, 4, 4]]},
        {"boxes": [[0, 0, 4, 4]], "classes": [2]},
        {"boxes": [[0, 0, 4, 4]], "classes": [0, 1]},
        {"boxes": [[0, 0, 4, 4]], "classes": [0], "scores": [0.1, 0.2]},
    ],
)
def test_panel_refuses(wrong):
    with pytest.raises(ValueError):
        panel(wrong.pop("image", grey(8, 8)), **wrong, class_names=NAMES)


def test_side_by_side():
    red, blue = grey(100, 200), grey(120, 150)
    red[:], blue[:] = (255, 0, 0), (0, 0, 255)
    grid = side_by_side([[red, blue], [blue, red]], ["truth", "student"])
    assert grid.dtype == np.uint8 and grid.shape[1] == 8 + 200 + 8 + 200 + 8
    assert (grid == (255, 0, 0)).all(axis=2).sum() == 2 * red.shape[0] * red.shape[1]
    assert (grid == (0, 0, 255)).all(axis=2).sum() == 2 * blue.shape[0] * blue.shape[1]
    assert (grid[:, :8] == 255).all() and (grid[:20] < 100).any()  # margin; titles
    with_legend = side_by_side([[red, blue], [blue, red]], ["truth", "student"], class_names=NAMES)
    assert np.array_equal(with_legend[: len(grid)], grid)
    assert np.array_equal(with_legend[len(grid) :], legend(NAMES, grid.shape[1]))
    with pytest.raises(ValueError, match="2 titles"):
        side_by_side([[red, blue], [red]], ["truth", "student"])
    with pytest.raises(ValueError):
        side_by_side([], ["truth"])


def test_legend_shows_every_colour():
    names = [f"class {i}" for i in range(30)]
    for width in (640, 60):
        picture = legend(names, width)
        assert picture.shape[1] == width and picture.dtype == np.uint8
        shown = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
        assert set(palette(names).values()) <= shown
    assert legend({"det": ()}).shape[1] == 640


def test_save_png(tmp_path):
    picture = panel(grey(), class_names=NAMES)
    path = tmp_path / "new" / "a.png"
    save_png(path, picture)
    save_png(path, picture)
    assert np.array_equal(np.array(Image.open(path)), picture)
    with pytest.raises(TypeError):
        save_png(path, np.zeros((4, 4, 7), np.uint8))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert np.array_equal(np.array(Image.open(path)), picture)  # a failed write leaves the old file


# --- tables


def test_table():
    rows = [
        {"name": "baseline", "miou": 56.34, "size": 152712, "spread": "56.3 +- 1.2"},
        {"name": "kl", "miou": None, "size": 7, "spread": "8.0"},
    ]
    columns = {"name": "method", "miou": "mIoU", "size": "parameters", "spread": "AP", "none": "none"}
    assert table(rows, columns).split("\n") == [
        "method    mIoU  parameters           AP  none",
        "--------  ----  ----------  -----------  ----",
        "baseline  56.3      152712  56.3 +- 1.2     -",
        "kl           -           7          8.0     -",
    ]
    assert table(rows[:1], {"name": "a|b", "miou": "m"}, markdown=True, digits=2).split("\n") == [
        "| a\\|b     |     m |",
        "| -------- | ----: |",
        "| baseline | 56.34 |",
    ]
    assert table([], {"name": "method"}) == "method\n------"
    values = [np.int64(3), np.float32(2.5), True, float("nan"), (1, 2)]
    lines = table([{"v": v} for v in values], {"v": "value"}).split("\n")
    assert [line.strip() for line in lines[2:]] == ["3", "2.5", "yes", "nan", "(1, 2)"]


METRICS = {
    "images": 101,
    "seg": {"mIoU": 56.34, "pixel_accuracy": 88.25, "IoU": {"Sky": 93.12, "Car": 100.0, "Void": None}},
    "det": {
        **{"mAP": 23.1, "mAP50": 45.2, "mAP75": 20.0, "mAP_small": None, "mAP_medium": 20.1, "mAP_large": 40.2},
        **{"AR1": 10.0, "AR10": 30.0, "AR100": 33.3, "AR_small": None, "AR_medium": 25.1, "AR_large": 45.2},
        "AP": {"Car": 23.1, "Person": 5.0},
    },
}


def test_metrics_table():
    assert metrics_table(METRICS).split("\n") == [
        "101 images, figures in percent",
        "",
        "              mIoU  pixel accuracy",
        "------------  ----  --------------",
        "segmentation  56.3            88.2",
        "",
        "               mAP  mAP50  mAP75  small  medium  large",
        "------------  ----  -----  -----  -----  ------  -----",
        "detection     23.1   45.2   20.0      -    20.1   40.2",
        "",
        "               AR1  AR10  AR100  small  medium  large",
        "------------  ----  ----  -----  -----  ------  -----",
        "recall        10.0  30.0   33.3      -    25.1   45.2",
        "",
        "class     IoU    AP",
        "------  -----  ----",
        "Sky      93.1     -",
        "Car     100.0  23.1",
        "Void        -     -",
        "Person      -   5.0",
    ]


def test_metrics_table_of_one_task():
    assert metrics_table({"images": 1, "seg": METRICS["seg"]}).split("\n") == [
        "1 image, figures in percent",
        "",
        "              mIoU  pixel accuracy",
        "------------  ----  --------------",
        "segmentation  56.3            88.2",
        "",
        "class    IoU",
        "-----  -----",
        "Sky     93.1",
        "Car    100.0",
        "Void       -",
    ]
    only_boxes = metrics_table({"det": {"mAP": None, "AP": {"Car": None}}}, markdown=True).split("\n")
    assert only_boxes[0] == "|           | mAP | mAP50 | mAP75 | small | medium | large |"
    assert only_boxes[-1] == "| Car   |   - |"
    assert metrics_table({"images": 0}) == "0 images, figures in percent"


def test_tables_are_ascii():
    assert (metrics_table(METRICS) + metrics_table(METRICS, markdown=True) + spread_text([1.0, 2.0])).isascii()


def test_mean_and_spread():
    mean, spread = mean_and_spread([55.1, 56.3, 57.5])
    assert mean == pytest.approx(56.3) and spread == pytest.approx(1.2)  # sqrt((1.44 + 0 + 1.44) / 2)
    assert mean_and_spread(np.array([1.0, 2.0])) == (1.5, pytest.approx(0.5**0.5))
    assert mean_and_spread([3.0]) == (3.0, None)
    assert spread_text([55.1, 56.3, 57.5]) == "56.3 +- 1.2"
    assert spread_text([55.1, 56.3], digits=2) == "55.70 +- 0.85"
    assert spread_text([3.0]) == "3.0"
    assert spread_text([]) == "-"
    assert spread_text([55.1, None]) == "-"
    with pytest.raises(ValueError):
        mean_and_spread([])
