"""Labels of the scenes beside masks and boxes (road, paint, depth, weather); the rest is as before."""

import zlib

import numpy as np
import pytest

from multitask_kd.batch import IGNORE
from multitask_kd.data.layouts.scenes import Scenes
from multitask_kd.data.scenes import background
from multitask_kd.data.scenes.background import (
    BUILDING,
    PAVEMENT,
    ROAD,
    SKY,
    STUFF,
    Background,
    Camera,
    draw_background,
)
from multitask_kd.data.scenes.draw import draw, scene
from multitask_kd.data.scenes.labels import (
    BARE,
    CLEAR,
    DARK,
    FAR_M,
    FIRST_INSTANCE,
    OBJECTS,
    OTHER,
    OVERCAST,
    PAINTED,
    SEG_CLASSES,
    WEATHER,
    depth_map,
    road_map,
    weather,
)
from multitask_kd.data.scenes.objects import SIGN

SIZE = (96, 128)
NAMES = ["seg", "det", "drivable", "lane", "depth", "weather"]

# (split, index, size, seed) -> CRC-32 of image, mask, boxes, classes, area, as drawn before other labels were
BEFORE = {
    ("train", 0, SIZE, 0): (468939683, 4129042202, 4225128116, 2932558504, 2473846863),
    ("train", 45, SIZE, 0): (1188523877, 3528453702, 1974511887, 1689241070, 3781159055),  # dusk, a sign
    ("train", 47, SIZE, 0): (3706926111, 2681700609, 2962903791, 2270623962, 1436154142),  # post, bush, tree
    ("train", 308, SIZE, 0): (1921213506, 561888369, 1977377735, 1163061775, 1860503698),  # night, a sign
    ("train", 347, SIZE, 0): (2140055427, 1679776043, 2696977982, 767742221, 3547387462),  # wall, bush, tree
    ("val", 2, (150, 201), 1): (717201658, 1372279860, 1768191412, 3971697493, 3703777253),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return Scenes(split="train", count=150, root=str(tmp_path_factory.mktemp("scenes")))


@pytest.fixture(scope="module")
def samples(scenes):
    return [scenes.read(i) for i in range(len(scenes))]


@pytest.mark.parametrize("key", BEFORE, ids=lambda key: f"{key[0]}{key[1]}")
def test_images_masks_and_boxes_are_those_of_before(key):
    split, index, size, seed = key
    image, found = scene(seed, split, index, size)
    parts = (image, found.mask, found.boxes, found.classes, found.area)
    assert tuple(zlib.crc32(array.tobytes()) for array in parts) == BEFORE[key]


# -- each label, by hand


def test_a_road_map_tells_visible_paint_from_bare_road():
    """Paint of 9.9 grey levels is not seen, of 10 it is; where something stands there is neither."""
    ids = np.array([[ROAD, ROAD, ROAD, PAVEMENT, FIRST_INSTANCE, IGNORE]], np.uint8)
    paint = np.array([[0, 9.9, 10, 60, 60, 60]], np.float32)
    assert road_map(ids, paint).tolist() == [[BARE, BARE, PAINTED, OTHER, OTHER, OTHER]]


def test_a_depth_map_has_the_foot_of_what_stands_there_and_no_sky():
    ground = np.array([[0, 5, 80, 80.5, 400]], np.float32)
    feet = np.zeros(256, np.float32)
    feet[FIRST_INSTANCE : FIRST_INSTANCE + 3] = 7, 9, 90
    nothing = np.full((1, 5), ROAD, np.uint8)
    assert depth_map(ground, nothing, feet).tolist() == [[0, 5, 80, 0, 0]]
    things = np.uint8([[ROAD, 0, 1, 2, 1]]) + np.uint8([[0, *[FIRST_INSTANCE] * 4]])
    assert depth_map(ground, things, feet).tolist() == [[0, 7, 9, 0, 9]]


@pytest.mark.parametrize(
    ("light", "colour", "pixels", "expected"),
    [
        ("day", (169, 190, 200), 4, CLEAR),  # 31 of 200 are 15.5 %
        ("day", (171, 190, 200), 4, OVERCAST),  # 29 of 200 are 14.5 %
        ("day", (169, 190, 200), 1, CLEAR),
        ("day", (169, 190, 200), 0, IGNORE),
        ("dusk", (169, 190, 200), 4, DARK),
        ("night", (20, 24, 44), 0, DARK),
    ],
)
def test_weather_is_read_off_the_light_and_the_sky(light, colour, pixels, expected):
    """100 pixels, of which ``pixels`` show sky; a bluer wall behind everything else must not count."""
    image = np.full((10, 10, 3), (50, 100, 250), np.uint8)
    ids = np.full((10, 10), BUILDING, np.uint8)
    image[0, :pixels], ids[0, :pixels] = colour, SKY
    blank = np.zeros((10, 10), np.float32)
    assert weather(Background(image, ids, blank, blank, np.zeros(3), 1200.0, light), ids) == expected


# -- the ray caster


def camera(**changes):
    """Eye 1.5 m over the street, focal length 150 px, horizon at row 40."""
    return Camera(**dict(height=96, width=128, focal=150, horizon=40, eye=1.5, roll=0, yaw=0) | changes)


@pytest.mark.parametrize("yaw", [0, 1.2])
def test_the_ground_is_as_deep_as_the_camera_sees_it(yaw):
    """At row 90, 50 below the horizon, the ground is 1.5 m * 150 px / 50 px = 4.5 m ahead at any yaw."""
    back = draw_background(np.random.default_rng(3), camera(yaw=yaw))
    rows, columns = np.nonzero(back.labels == ROAD)
    assert len(rows) > 500 and (rows == 90).any()
    assert np.allclose(back.depth[90, columns[rows == 90]], 4.5, rtol=1e-4)
    assert np.allclose(back.depth[rows, columns], 225 / (rows - 40), rtol=1e-3)
    assert (back.depth[back.labels == SKY] == 0).all() and (back.depth[back.labels != SKY] > 0).all()


def test_a_rolled_camera_rolls_the_depth():
    """Equal depths lie on lines tilted by the roll: a column to the right is sin(0.05) rows higher up."""
    back = draw_background(np.random.default_rng(3), camera(roll=0.05))
    ground = np.isin(back.labels, (ROAD, PAVEMENT)) & (back.depth < 10)
    rows, columns = np.nonzero(ground)
    level = -np.sin(0.05) * (columns - 63.5) + np.cos(0.05) * (rows - 47.5) + 7.5  # rows below the horizon
    assert len(rows) > 500
    assert np.allclose(back.depth[ground], 225 / level, rtol=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_paint_is_where_the_picture_differs_from_a_street_without_any(seed, monkeypatch):
    painted = draw_background(np.random.default_rng(seed), camera(yaw=0.1, roll=0.03))
    marks = background._Street._marks
    monkeypatch.setattr(background._Street, "_marks", lambda *args: marks(*args) & False)  # draws as before
    bare = draw_background(np.random.default_rng(seed), camera(yaw=0.1, roll=0.03))
    change = np.abs(painted.image.astype(float) - bare.image).mean(2)
    assert not bare.paint.any()
    assert not change[painted.paint == 0].any()
    whole = (painted.image.max(2) < 255) & (bare.image.max(2) < 255)  # brighter ones are clipped
    assert np.abs(change - painted.paint)[whole].max() <= 1  # of rounding down
    assert (painted.labels[painted.paint > 0] == ROAD).all()


def test_streets_have_paint():
    found = [(draw_background(np.random.default_rng(seed), camera()).paint > 0).mean() for seed in range(8)]
    assert sum(share > 0.002 for share in found) >= 4


# -- whole scenes


def test_things_stand_at_one_depth_and_nearer_ones_hide_farther_ones():
    """Objects are numbered from far to near."""
    for seed in range(60):
        drawing = draw(np.random.default_rng(seed), SIZE)
        own = [drawing.ids == FIRST_INSTANCE + i for i in range(len(drawing.classes))]
        depths = [np.unique(drawing.depth[pixels]).tolist() for pixels in own if pixels.any()]
        assert all(len(depth) == 1 for depth in depths)
        seen = sum(depths, [])
        assert seen == sorted(seen, reverse=True) and min(seen) > 0 and max(seen) <= FAR_M


def test_a_post_stands_where_its_sign_does():
    """Only a post that something hides, or that is out of the picture, has no pixel at the sign's depth."""
    found = []
    for seed in range(100):
        drawing = draw(np.random.default_rng(seed), SIZE)
        posts = set(drawing.depth[drawing.ids == IGNORE].tolist())
        signs = [FIRST_INSTANCE + i for i, kind in enumerate(drawing.classes) if kind == SIGN]
        depths = [drawing.depth[drawing.ids == sign] for sign in signs]
        found += [float(depth[0]) in posts for depth in depths if len(depth)]
        assert 0 not in posts
    assert len(found) > 20 and np.mean(found) > 0.7


def test_an_object_is_as_deep_as_the_ground_at_its_foot(samples):
    """The ground just below a box is in front of the object's foot; by rounding it may be farther."""
    gaps = []
    for sample in samples:
        seg, depth, det = sample.labels["seg"], sample.labels["depth"], sample.labels["det"]
        for (x1, y1, x2, y2), kind in zip(det.boxes.astype(int), det.classes, strict=True):
            if kind == SIGN or y2 + 2 >= SIZE[0] or y2 - y1 < 12:
                continue
            patch = seg[y1:y2, x1:x2]
            own = depth[y1:y2, x1:x2][patch == len(STUFF) + kind]
            below = depth[y2 + 1, x1:x2][np.isin(seg[y2 + 1, x1:x2], (ROAD, PAVEMENT))]
            if len(below):
                gaps.append(np.median(own) / np.median(below))
    assert len(gaps) > 50
    assert 1 < np.median(gaps) < 1.15
    assert np.quantile(gaps, 0.1) > 0.95


def test_drivable_is_the_road_of_the_mask_and_known_everywhere(samples):
    for sample in samples:
        seg, drivable, lane = (sample.labels[key] for key in ("seg", "drivable", "lane"))
        known = seg != IGNORE
        assert np.array_equal(drivable[known] == 1, seg[known] == ROAD)
        assert set(np.unique(drivable)) <= {0, 1} and set(np.unique(lane)) <= {0, 1}
        assert (drivable[lane == 1] == 1).all()
    unsure = np.concatenate([s.labels["drivable"][s.labels["seg"] == IGNORE] for s in samples])
    assert 0.05 < unsure.mean() < 0.95  # outlines lie on the road, posts do not


def test_every_label_has_enough_of_each_class(samples):
    share = {key: np.mean([s.labels[key].mean() for s in samples]) for key in ("drivable", "lane")}
    assert 0.1 < share["drivable"] < 0.3
    assert 0.004 < share["lane"] < 0.02
    assert np.mean([s.labels["lane"].sum() > 20 for s in samples]) > 0.4
    found = np.bincount([s.labels.get("weather", len(WEATHER)) for s in samples], minlength=len(WEATHER) + 1)
    assert (found[:3] >= 0.06 * len(samples)).all()
    assert 0 < found[3] < 0.15 * len(samples)


def test_a_day_without_sky_has_no_weather(samples):
    bare = [s for s in samples if "weather" not in s.labels]
    assert bare and all((s.labels["seg"] == SKY).mean() < 0.01 for s in bare)


def test_dark_pictures_are_dark_and_clear_skies_blue(samples):
    brightness, blue = {}, {}
    for sample in samples:
        name, sky = sample.labels.get("weather"), sample.image[sample.labels["seg"] == SKY].astype(float)
        brightness.setdefault(name, []).append(sample.image.mean())
        if len(sky):
            blue.setdefault(name, []).append((sky[:, 2] - sky[:, 0]).mean())
    dark, *days = (np.median(brightness[name]) for name in (DARK, CLEAR, OVERCAST))
    assert dark < 0.9 * min(days)
    assert np.quantile(blue[CLEAR], 0.25) > np.quantile(blue[OVERCAST], 0.75)


# -- the layout


def test_the_layout_names_its_labels_and_their_kinds(scenes):
    assert list(scenes.classes) == NAMES  # in the order that a run takes by default
    kinds = ["semantic", "detection", "semantic", "semantic", "depth", "classification"]
    assert scenes.kinds == dict(zip(NAMES, kinds, strict=True))
    classes = [SEG_CLASSES, OBJECTS, ("background", "drivable"), ("background", "lane"), (), WEATHER]
    assert scenes.classes == dict(zip(NAMES, classes, strict=True))
    assert WEATHER == ("clear", "overcast", "dark")


def test_only_what_a_run_wants_is_read(scenes):
    again = Scenes(split="train", count=150, root=str(scenes.folder.parent))
    again.read(0)
    again._arrays.depth = None  # reading it fails
    with pytest.raises(TypeError):
        again.read(0)
    again.wanted = frozenset({"seg", "weather"})
    assert list(again.read(0).labels) == ["seg", "weather"]
    assert np.array_equal(again.read(0).labels["seg"], scenes.read(0).labels["seg"])
    again.wanted = frozenset()
    assert again.read(0).labels == {}


def test_the_cache_keeps_what_was_drawn(scenes):
    for index in (0, 60, 149):
        found, labels = scene(0, "train", index, SIZE)[1], scenes.read(index).labels
        assert np.array_equal(labels["drivable"] == 1, found.road != OTHER)
        assert np.array_equal(labels["lane"] == 1, found.road == PAINTED)
        assert np.allclose(labels["depth"], found.depth, rtol=1 / 2048, atol=0)
        assert labels.get("weather", IGNORE) == found.weather
