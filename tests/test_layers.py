"""What is drawn over an image: several masks, boxes, texts and small pictures; colours of depth."""

import numpy as np
import pytest
import torch

from multitask_kd.batch import IGNORE, ModelOutput
from multitask_kd.data.base import Layout, Sample
from multitask_kd.engine.pictures import DrawnNetwork, class_names, compare, missing_text, with_legend
from multitask_kd.errors import UserError
from multitask_kd.report.colours import GREY, depth_colours, palette
from multitask_kd.report.layers import BoxLayer, InsetLayer, MaskLayer, TextLayer
from multitask_kd.report.pictures import inset_frames, panel, text_frames
from multitask_kd.tasks.base import Task, build_task

ROAD, DRIVABLE, LANE, DET = ("background", "road"), ("background", "direct"), ("background", "lane"), ("car",)
NAMES = {"seg": ROAD, "drivable": DRIVABLE, "lane": LANE, "det": DET}
COLOURS = {name: np.array(colour) for name, colour in palette(NAMES).items()}
HEIGHT, WIDTH = 240, 320


def grey():
    return np.full((HEIGHT, WIDTH, 3), 100, np.uint8)


def mask(rows=slice(None), columns=slice(None), value=1):
    found = np.zeros((HEIGHT, WIDTH), np.uint8)
    found[rows, columns] = value
    return found


def nearest(pixels):
    """Of each pixel [...,3] the class whose colour was mixed into the grey, "none" where it is grey."""
    names = ["none", *(n for n in COLOURS if n != "background")]
    hues = np.stack([np.zeros(3), *(COLOURS[n] - 100.0 for n in names[1:])])
    hues[1:] /= np.linalg.norm(hues[1:], axis=1, keepdims=True)
    offset = pixels.astype(float) - 100
    length = np.linalg.norm(offset, axis=-1)
    best = (offset @ hues[1:].T).argmax(axis=-1) + 1
    return np.array(names)[np.where(length < 10, 0, best)]


# --- masks over masks


def test_the_layers_in_any_order_are_drawn_masks_first():
    layers = [MaskLayer(mask(), ROAD), BoxLayer([[50, 60, 150, 160]], [0], DET), TextLayer("weather: rain")]
    one, other = (panel(grey(), given, class_names=NAMES) for given in (layers, layers[::-1]))
    assert np.array_equal(one, other)


def test_a_second_mask_leaves_the_first_one_visible_and_thin_lines_whole():
    area = slice(60, 200), slice(40, 280)
    lane = mask(columns=slice(150, 153))  # three pixels wide
    layers = [MaskLayer(mask(), ROAD), MaskLayer(mask(*area), DRIVABLE), MaskLayer(lane, LANE)]
    picture = panel(grey(), layers, class_names=NAMES)
    first = panel(grey(), layers[:1], class_names=NAMES)
    outside = np.ones((HEIGHT, WIDTH), bool)
    outside[area] = outside[:, 150:153] = False
    assert np.array_equal(picture[outside], first[outside])
    inside = nearest(picture[70:190, 50:140])
    shares = {name: (inside == name).mean() for name in ("road", "direct")}
    assert shares["road"] > 0.5 and 0.1 < shares["direct"] < 0.4 and sum(shares.values()) == 1
    assert (nearest(picture[60:62, 40:140]) == "direct").all()  # its outline
    assert (nearest(picture[:, 150:153]) == "lane").all()  # over both others


def test_a_second_mask_says_nothing_where_it_is_void_or_background():
    first = [MaskLayer(mask(columns=slice(100, 200)), ROAD)]
    plain = panel(grey(), first, class_names=NAMES)
    for value in (0, IGNORE):
        over = [*first, MaskLayer(np.full((HEIGHT, WIDTH), value, np.uint8), LANE)]
        assert np.array_equal(panel(grey(), over, class_names=NAMES), plain)


def test_masks_grow_with_the_image():
    small = np.full((60, 80, 3), 100, np.uint8)
    lane = np.zeros((60, 80), np.uint8)
    lane[:, 40] = 1
    layers = [MaskLayer(np.ones((60, 80), int), ROAD), MaskLayer(lane, LANE)]
    picture = panel(small, layers, class_names=NAMES)
    assert picture.shape == (240, 320, 3)
    assert (nearest(picture[:, 160:164]) == "lane").all() and (nearest(picture[:, :159]) == "road").all()


def test_alpha_holds_for_every_mask():
    layers = [MaskLayer(mask(), ROAD), MaskLayer(mask(columns=slice(100, 200)), DRIVABLE)]
    assert (panel(grey(), layers, class_names=NAMES, alpha=0.0) == 100).all()


def test_a_class_that_the_palette_lacks_is_grey():
    black = np.zeros((240, 320, 3), np.uint8)
    picture = panel(black, [MaskLayer(mask(), ("background", "other"))], class_names=NAMES)
    assert (picture == 64).all()  # half of 128 over black
    picture = panel(grey(), [BoxLayer([[50, 60, 150, 160]], [0], ("other",))], class_names=NAMES)
    assert tuple(picture[110, 150]) == GREY


# --- boxes


def test_crowds_are_called_so_and_names_of_two_tasks_do_not_cover_each_other():
    box = [[50, 60, 150, 160]]
    plain, no_crowd, crowd = (
        panel(grey(), [BoxLayer(box, [0], DET, crowd=crowd)], class_names=NAMES)
        for crowd in (None, np.array([False]), np.array([True]))
    )
    assert np.array_equal(plain, no_crowd)
    assert (crowd != plain).any(axis=2).nonzero()[0].max() < 60  # only its name, above the box
    both = panel(grey(), [BoxLayer(box, [0], DET), BoxLayer(box, [0], DET)], class_names=NAMES)
    assert np.array_equal(both[:59], plain[:59])
    assert (both[163:178, 50:70] != 100).any()  # the other stands below the box


# --- texts and small pictures


def test_texts_stand_below_one_another():
    texts = [TextLayer("weather: rain 0.93"), TextLayer("scene: street")]
    picture = panel(grey(), texts, class_names=NAMES)
    (x1, y1, x2, y2), (_, second, _, bottom) = text_frames(texts, (WIDTH, HEIGHT))
    assert (x1, y1) == (4, 4) and second > y2 - 1 and bottom < 45
    changed = (picture != 100).any(axis=2)
    assert changed[y1:y2, x1:x2].all() and not changed[bottom:].any() and not changed[:, x2 + 60 :].any()
    one = panel(grey(), texts[:1], class_names=NAMES)
    assert np.array_equal(one[:y2], picture[:y2]) and not (one[second:] != 100).any()
    assert panel(grey(), [TextLayer("x" * 400)], class_names=NAMES).shape == (HEIGHT, WIDTH, 3)


def inset(height=60, width=80, colour=(200, 0, 0), title=""):
    return InsetLayer(np.full((height, width, 3), colour, np.uint8), title)


def test_an_inset_lies_in_the_lower_right_corner_in_a_frame():
    picture = panel(grey(), [inset()], class_names=NAMES)
    ((x1, y1, x2, y2),) = inset_frames([inset()], (WIDTH, HEIGHT))
    assert (x2, y2) == (WIDTH - 4, HEIGHT - 4) and (x2 - x1, y2 - y1) == (102, 76)  # 0.32 of 320; 3/4 of that
    assert (picture[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] == (200, 0, 0)).all()
    assert (picture[y1 - 1, x1:x2] == 255).all() and (picture[y1:y2, x1 - 1] == 255).all()
    assert (picture[: y1 - 1] == 100).all() and (picture[:, : x1 - 1] == 100).all()
    titled = panel(grey(), [inset(title="depth")], class_names=NAMES)
    assert (titled[y1 : y1 + 12, x1 : x1 + 20] != (200, 0, 0)).any()
    assert np.array_equal(titled[y1 + 20 :], picture[y1 + 20 :])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(60, 80), (10, 400), (400, 10)])
def test_insets_never_overlap(count, shape):
    frames = inset_frames([inset(*shape)] * count, (640, 480))
    covered = np.zeros((480 * 3, 640), int)  # what has no room in the picture goes above it
    for x1, y1, x2, y2 in frames:
        assert 0 <= x1 < x2 <= 640 and y1 < y2 <= 480
        covered[y1 + 960 : y2 + 960, x1:x2] += 1
    assert covered.max() == 1 and len(frames) == count


def test_what_does_not_fit_is_no_fault():
    pixel, empty = np.zeros((1, 1, 3), np.uint8), MaskLayer(np.zeros((1, 1), int), ROAD)
    layers = [inset(title="depth"), TextLayer("weather: rain"), empty, *[inset()] * 9]
    assert panel(pixel, layers, class_names=NAMES, missing="no boxes").shape == (320, 320, 3)
    for height, width in ((2000, 3), (3, 2000)):
        image = np.zeros((height, width, 3), np.uint8)
        layers = [inset(title="depth")] * 4 + [TextLayer("a")] * 30
        picture = panel(image, layers, class_names=NAMES, missing="no boxes")
        assert min(picture.shape) >= 1


# --- depth


def test_colours_of_depth_grow_darker_and_colder_with_distance():
    metres = np.array([[0.5, 1, 2, 5, 10, 20, 50, 100]])
    colours = depth_colours(metres)
    assert colours.shape == (1, 8, 3) and colours.dtype == np.uint8
    light = colours[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(light) < 0).all()
    warmth = colours[0, :, 0].astype(int) - colours[0, :, 2]
    assert (warmth[:4] > 0).all() and (warmth[-2:] < 0).all() and (np.diff(warmth[1:]) < 0).all()


def test_the_scale_of_depth_is_the_same_in_every_picture():
    near = depth_colours(np.array([[2.0, 3.0]]))
    assert np.array_equal(near[0, 0], depth_colours(np.array([[90.0, 2.0]]))[0, 1])
    ends = depth_colours(np.array([[0.01, 0.5, 100.0, 5000.0]]))[0]
    assert np.array_equal(ends[0], ends[1]) and np.array_equal(ends[2], ends[3])
    assert not np.array_equal(ends[1], ends[2])
    # logarithmic: 1 metre is in the middle between 0.5 and 2, as 10 metres are between 5 and 20
    middle = depth_colours(np.array([[1.0]]), nearest=0.5, farthest=2.0)
    assert np.array_equal(middle, depth_colours(np.array([[10.0]]), nearest=5.0, farthest=20.0))


def test_unknown_depth_is_grey():
    colours = depth_colours(np.array([[0.0, -1.0, np.nan, np.inf, 5.0]], np.float32))[0]
    assert (colours[:4] == GREY).all() and not np.array_equal(colours[4], GREY)
    assert depth_colours(np.zeros((3, 2), np.float32)).shape == (3, 2, 3)


# --- labels and predictions side by side


class Named(Task):
    """A kind of task of which nothing is known: its prediction is a constant map of one class."""

    kind, is_map, label_word = "named", True, "names"

    def decode(self, pred, size):
        return pred

    def label_layer(self, label):
        return MaskLayer(label, self.classes)

    def prediction_layer(self, prediction, least_score):
        return MaskLayer(np.full((HEIGHT, WIDTH), int(prediction)), self.classes)


class Tag(Named):
    is_map, coloured = False, False

    def label_layer(self, label):
        return TextLayer(label)


class Pair(Layout):
    """Two images, the first of which is labelled as road; the second cannot be read."""

    def __init__(self, classes):
        super().__init__()
        self.add_label("ground", "named", classes)

    def __len__(self):
        return 2

    def read(self, index):
        if index:
            raise UserError("image 1 is damaged")
        return Sample(grey(), {"ground": mask(value=self.classes["ground"].index("road"))})


def network(tasks, predicted):
    """A network with 64 x 64 pixels of input that always predicts the class ``predicted``."""
    preds = {name: torch.full((1,), predicted) for name in tasks}
    return DrawnNetwork(lambda images: ModelOutput(preds), tasks, (64, 64), {})


def test_labels_and_predictions_are_drawn_with_their_own_order_of_classes():
    classes = ("background", "road", "sky")
    tasks = {"ground": Named("ground", classes, ())}
    networks = {"student": network(tasks, 2)}
    layouts = Pair(classes), Pair(classes[::-1])
    rows = [compare(layout, [0, 1], networks, torch.device("cpu"), tasks) for layout in layouts]
    assert [len(r) for r in rows] == [1, 1] and len(rows[0][0]) == 2  # what cannot be read has no row
    assert all(np.array_equal(a, b) for a, b in zip(rows[0][0], rows[1][0], strict=True))
    colours = palette(class_names(tasks))
    for picture, name in zip(rows[0][0], ("road", "sky"), strict=True):
        np.testing.assert_allclose(picture[120, 160], (100 + np.array(colours[name])) / 2, atol=1)


def test_a_network_without_a_task_says_so_in_its_picture():
    tasks = {name: Named(name, ("background", "road"), ()) for name in ("ground", "lane")}
    networks = {"a": network(tasks, 0), "b": network({"ground": tasks["ground"]}, 0)}
    ((truth, a, b),) = compare(Pair(("background", "road")), [0], networks, torch.device("cpu"), tasks)
    corner = np.zeros((HEIGHT, WIDTH), bool)
    corner[200:, :100] = True
    assert (a == 100).all() and (b[~corner] == 100).all() and (b[corner] != 100).any()
    assert np.array_equal(b, panel(grey(), class_names=(), missing="no lane"))
    sheet = with_legend([[truth, a, b]], ["truth", "a", "b"], tasks)
    assert sheet.shape[1] == 4 * 8 + 3 * WIDTH and sheet.shape[0] > HEIGHT + 40


def test_what_is_missing():
    tasks = {name: build_task(name, None, (), ()) for name in ("seg", "det")}
    tasks["lane"] = Named("lane", (), ())
    shown = (), ("seg",), ("det", "lane"), tasks
    found = [missing_text(tasks, dict.fromkeys(given, TextLayer(""))) for given in shown]
    assert found == ["no labels", "no boxes, lane", "no mask", ""]
    assert missing_text({"seg": tasks["seg"]}, {}) == "no labels"


def test_maps_choose_their_colours_first():
    tasks = {"weather": Tag("weather", ("rain",), ()), "lane": Named("lane", ("line",), ())}
    tasks["det"] = build_task("det", None, ("car",), ())
    assert class_names(tasks) == {"lane": ("line",), "weather": (), "det": ("car",)}  # a tag has no colours
