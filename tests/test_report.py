import numpy as np
import pytest
import torch
from PIL import Image

from multitask_kd.batch import IGNORE
from multitask_kd.report.colours import palette, separated_colours
from multitask_kd.report.layers import BoxLayer, MaskLayer
from multitask_kd.report.pictures import HATCH, LONGEST, legend, panel, save_png, side_by_side

NAMES = {"seg": ("background", "road", "car"), "det": ("person", "car")}
GREY = 100


def grey(height=240, width=320):
    return np.full((height, width, 3), GREY, np.uint8)


def seg(mask):
    return MaskLayer(mask, NAMES["seg"])


def det(boxes, classes, scores=None):
    return BoxLayer(boxes, classes, NAMES["det"], scores)


def test_an_image_of_extreme_sides_gives_a_panel_that_can_be_saved():
    boxes = det([[0, 0, 1, 1]], [0], [0.5])
    for height, width in ((1500, 2), (70000, 1), (3, 70000), (1, 1)):
        mask = np.zeros((height, width), np.uint8)
        drawn = panel(grey(height, width), [seg(mask), boxes], class_names=NAMES, max_width=max(320, width))
        assert min(drawn.shape[:2]) >= 1 and max(drawn.shape[:2]) <= LONGEST, (height, width)


def mixed(colour):
    """A colour at half strength over the grey image."""
    return [(GREY + v) / 2 for v in colour]


# --- pictures


def test_a_name_has_one_colour_in_both_tasks():
    colours = palette(NAMES)
    assert list(colours) == ["background", "road", "car", "person"]
    assert len({colours[n] for n in ("road", "car", "person")}) == 3
    assert list(palette(dict(reversed(NAMES.items())))) == [
        "person",
        "car",
        "background",
        "road",
    ]  # their order decides
    assert palette({**NAMES, "depth": ()}) == palette({"depth": (), **NAMES}) == colours
    assert palette(NAMES["seg"]) == {n: colours[n] for n in NAMES["seg"]}


def test_colours_are_distinct_and_the_first_ones_stay():
    many = separated_colours(150)
    assert len(set(many)) == 150
    assert all(separated_colours(n) == many[:n] for n in (0, 1, 5, 6, 7, 30))
    assert len(separated_colours(1000)) == 1000  # more than there are to tell apart: they repeat


def test_mask_colours():
    mask = np.zeros((240, 320), np.uint8)
    mask[:, 100:200], mask[:, 200:] = 2, IGNORE
    picture = panel(grey(), [seg(mask)], class_names=NAMES)
    assert picture.shape == (240, 320, 3) and picture.dtype == np.uint8
    assert (picture[:100, :99] == GREY).all()  # background is left as it is
    np.testing.assert_allclose(
        picture[:200, 102:199], np.broadcast_to(mixed(palette(NAMES)["car"]), (200, 97, 3)), atol=1
    )
    stripes = {tuple(c) for c in picture[:200, 205:].reshape(-1, 3)}
    assert len(stripes) == 2 and (GREY,) * 3 in stripes and min(max(stripes)) > GREY + 0.4 * (HATCH[0] - GREY)


def test_box_colours_and_labels():
    boxes = torch.tensor([[50.0, 60.0, 150.0, 160.0]])
    names = {"det": NAMES["det"]}
    colour = list(palette(names)["car"])
    plain = panel(grey(), [det(boxes, torch.tensor([1]))], class_names=names)
    assert plain[160, 80].tolist() == plain[110, 150].tolist() == colour  # the outline: bottom and right
    assert plain[59 - 3, 51].tolist() == colour  # the ground of the name, above the box
    assert (plain[70:150, 60:140] == GREY).all()  # inside nothing changes
    assert (plain[170:] == GREY).all()  # nothing is said to be missing
    scored = panel(grey(), [det(boxes, torch.tensor([1]), [0.5])], class_names=names)
    assert (scored[40:60] != GREY).sum() > (plain[40:60] != GREY).sum()  # the score is written too


def test_small_images_are_enlarged_and_large_ones_reduced():
    mask = np.zeros((96, 128), np.uint8)
    mask[:, 64:] = 1
    picture = panel(grey(96, 128), [seg(mask), det(np.zeros((0, 4)), [])], class_names=NAMES)
    assert picture.shape == (240, 320, 3)
    assert (picture[:, :159] == GREY).all() and (picture[:, 165:] == picture[0, 170]).all()
    assert panel(grey(960, 1280), class_names=NAMES).shape == (480, 640, 3)
    assert panel(grey(960, 1280), class_names=NAMES, max_width=1280).shape == (960, 1280, 3)
    narrow = panel(grey(96, 128), [det([[64, 48, 96, 72]], [0])], class_names=("person",))
    assert narrow[150, 160].tolist() == list(palette(("person",))["person"])  # boxes grow with the image


def test_missing_labels_are_said():
    corner = np.zeros((240, 320), bool)
    corner[200:, :100] = True
    nothing, no_boxes = (panel(grey(), class_names=NAMES, missing=text) for text in ("no labels", "no boxes"))
    assert all((p[corner] != GREY).any() and (p[~corner] == GREY).all() for p in (nothing, no_boxes))
    assert not np.array_equal(no_boxes, nothing)
    complete = panel(grey(), [seg(np.zeros((240, 320), int)), det([], [])], class_names=NAMES)
    assert (complete == GREY).all()
    assert panel(grey(), class_names=NAMES, missing="no " + "x" * 500).shape == (240, 320, 3)


def test_title_is_a_strip_above():
    plain, titled = panel(grey(), class_names=NAMES), panel(grey(), class_names=NAMES, title="x" * 500)
    assert titled.shape[0] > 240 and titled.shape[1] == 320
    assert np.array_equal(titled[-240:], plain)


def test_boxes_of_an_untrained_model_can_be_drawn():
    boxes = [[np.nan] * 4, [50, 50, 10, 10], [-1e9, -5, 1e9, np.inf], [400, 300, 500, 400], [5, 5, 5, 5]]
    picture = panel(grey(), [det(boxes * 40, [0] * 200, np.linspace(0, 1, 200))], class_names=NAMES)
    assert picture.shape == (240, 320, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": np.zeros((8, 8), np.uint8)},
        {"image": np.zeros((8, 8, 3))},
        {"layers": [seg(np.zeros((9, 8), int))]},
        {"layers": [seg(np.full((8, 8), 3))]},
        {"layers": [seg(np.zeros((8, 8), int)), seg(np.full((8, 8), 3))]},
        {"layers": [det([[0, 0, 4, 4]], None)]},
        {"layers": [det([[0, 0, 4, 4]], [2])]},
        {"layers": [det([[0, 0, 4, 4]], [0, 1])]},
        {"layers": [det([[0, 0, 4, 4]], [0], [0.1, 0.2])]},
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
    for hatched in (False, True):
        with_legend = side_by_side(
            [[red, blue], [blue, red]], ["truth", "student"], class_names=NAMES, hatched=hatched
        )
        assert np.array_equal(with_legend[: len(grid)], grid)
        assert np.array_equal(with_legend[len(grid) :], legend(NAMES, grid.shape[1], hatched=hatched))
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
    plain, hatched = legend(("road",)), legend(("road",), hatched=True)
    shown = [{tuple(c) for c in picture.reshape(-1, 3).tolist()} for picture in (plain, hatched)]
    swatch = {HATCH, (150, 150, 150)}
    assert swatch <= shown[1] and not swatch <= shown[0]


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
