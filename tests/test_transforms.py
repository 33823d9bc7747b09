import hashlib

import numpy as np
import pytest
import torch

from multitask_kd.batch import CROWD, GREY, IGNORE
from multitask_kd.data.base import Sample, clean_boxes
from multitask_kd.data.labels import BoxLabels
from multitask_kd.data.transforms import TrainTransform, fit, letterbox
from multitask_kd.tasks.base import KINDS
from multitask_kd.tasks.detection import Detection, Detections

SIZE = (96, 128)
STILL = {
    "flip": 0.0, "scale": (1.0, 1.0), "translate": 0.0, "rotate": 0.0, "brightness": 0.0, "color": 0.0, "min_visible": 0.2
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Got processor for bboxes")


def kinds(**names):
    """kinds(lane="semantic") -> by label, the kind that moves it."""
    return {name: KINDS.get(kind, "x") for name, kind in names.items()}


SEG_DET = kinds(seg="semantic", det="detection")


def transform(size=SIZE, moves=SEG_DET, **options):
    return TrainTransform(size, moves, **(STILL | options))


def of_boxes(image, boxes, classes, crowd=None, area=None, mask=None):
    labels = {} if mask is None else {"seg": mask}
    return Sample(
        image,
        labels
        | {"det": BoxLabels(np.array(boxes, np.float32).reshape(-1, 4), np.array(classes), crowd, area)},
    )


def rectangle(height, width, box, *, inside=1, crowd=False, labelled=True):
    """A sample whose mask (seg), image and box (det) show one filled rectangle x1,y1,x2,y2 (whole pixels)."""
    x1, y1, x2, y2 = box
    image = np.full((height, width, 3), 40, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    image[y1:y2, x1:x2], mask[y1:y2, x1:x2] = 200, inside
    if not labelled:
        return Sample(image)
    area = np.array([(x2 - x1) * (y2 - y1)], np.float32)
    return of_boxes(image, [box], [0], np.array([crowd]), area, mask)


def extent(where):
    """x1, y1, x2, y2 round the true pixels."""
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


# --- letterbox


@pytest.mark.parametrize(
    ("original", "size", "content"),
    [
        ((480, 640), (96, 128), (96, 128)),  # the same shape: all of it
        ((100, 400), (96, 128), (32, 128)),  # wide: 128 / 400 = .32
        ((400, 100), (96, 128), (96, 24)),  # tall: 96 / 400 = .24
        ((48, 32), (96, 128), (96, 64)),  # small images grow
        ((1000, 2), (96, 128), (96, 1)),  # at least one pixel
        ((96, 128), (96, 128), (96, 128)),
    ],
)
def test_letterbox_geometry(original, size, content):
    assert fit(original, size).content == content
    image, geometry = letterbox(np.full((*original, 3), 250, np.uint8), size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert (geometry.original, geometry.content) == (original, content)
    assert (image[: content[0], : content[1]] == 250).all()
    padding = np.ones(size, bool)
    padding[: content[0], : content[1]] = False
    assert (image[padding] == GREY).all()
    assert image.flags.c_contiguous


def test_letterbox_keeps_the_shape_to_a_pixel():
    for height in range(30, 300, 37):
        for width in range(30, 300, 41):
            geometry = fit((height, width), SIZE)
            scale = min(SIZE[0] / height, SIZE[1] / width)
            assert abs(geometry.content[0] - height * scale) <= 0.5
            assert abs(geometry.content[1] - width * scale) <= 0.5
            assert geometry.content[0] == SIZE[0] or geometry.content[1] == SIZE[1]


@pytest.mark.parametrize("original", [(480, 640), (100, 400), (401, 99), (50, 37)])
def test_letterbox_round_trip_of_boxes(original):
    box = [original[1] // 5, original[0] // 4, original[1] // 2, original[0] // 2]
    sample = rectangle(*original, box)
    moved = transform()(sample, 0)
    found = Detections(
        torch.from_numpy(moved.labels["det"].boxes), torch.ones(1), torch.zeros(1, dtype=torch.long)
    )
    back = Detection("det", ("a",), (8,)).restore(found, fit(original, SIZE))
    assert back.boxes[0].tolist() == pytest.approx(box, abs=1e-2)
    assert np.abs(extent(moved.labels["seg"] == 1) - moved.labels["det"].boxes[0]).max() <= 1
    assert np.abs(extent((moved.image > 150).all(-1)) - moved.labels["det"].boxes[0]).max() <= 1


# --- augmentation

SPATIAL = {"flip": 0.5, "scale": (0.6, 1.6), "translate": 0.2}


@pytest.mark.parametrize(
    ("original", "box"),
    [
        (SIZE, (50, 30, 82, 60)),
        ((240, 320), (30, 60, 150, 200)),
        ((150, 260), (100, 20, 240, 90)),
        ((200, 90), (10, 50, 70, 150)),
    ],
)
def test_image_mask_and_box_move_together(original, box):
    sample, together = rectangle(*original, box), transform(**SPATIAL)
    kept = flipped = 0
    widths = set()
    for seed in range(200):
        moved = together(sample, seed)
        inside = moved.labels["seg"] == 1
        assert len(moved.labels["det"].boxes) == len(moved.labels["det"].classes) <= 1
        if not len(moved.labels["det"].boxes):
            assert inside.mean() < 0.2  # hidden, or nearly
            continue
        kept += 1
        x1, y1, x2, y2 = moved.labels["det"].boxes[0]
        assert 0 <= x1 < x2 <= SIZE[1] and 0 <= y1 < y2 <= SIZE[0]
        # cut off at the border or not, the box is what is left of the rectangle
        assert np.abs(extent(inside) - moved.labels["det"].boxes[0]).max() <= 1.5, seed
        assert np.abs(extent((moved.image > 120).all(-1)) - moved.labels["det"].boxes[0]).max() <= 1.5, seed
        widths.add(round(float(x2 - x1)))
        flipped += moved.labels["det"].boxes[0, 0] + moved.labels["det"].boxes[0, 2] < SIZE[1]
    assert kept > 150
    assert len(widths) > 10 and flipped > 20  # it does zoom and move


def test_flip_by_hand():
    moved = transform(flip=1.0)(rectangle(*SIZE, (10, 20, 40, 60)), 3)
    assert moved.labels["det"].boxes.tolist() == [[88, 20, 118, 60]]  # 128 - 40, 128 - 10
    assert extent(moved.labels["seg"] == 1).tolist() == [88, 20, 118, 60]
    assert extent((moved.image > 120).all(-1)).tolist() == [88, 20, 118, 60]


def test_zoom_is_the_same_in_both_directions():
    sample, zoom = rectangle(*SIZE, (44, 32, 84, 64)), transform(scale=(0.5, 1.4))
    factors = []
    for seed in range(50):
        x1, y1, x2, y2 = zoom(sample, seed).labels["det"].boxes[0]
        factors.append((x2 - x1) / 40)
        assert (y2 - y1) / 32 == pytest.approx((x2 - x1) / 40, rel=0.02), seed
    assert 0.49 < min(factors) < 0.6 and 1.2 < max(factors) < 1.41


def test_rotation_keeps_the_rectangle_inside_its_box():
    sample, turn = rectangle(*SIZE, (44, 32, 84, 64)), transform(rotate=30.0)
    grown = 0
    for seed in range(50):
        moved = turn(sample, seed)
        around = extent(moved.labels["seg"] == 1)
        box = moved.labels["det"].boxes[0]
        assert (box[:2] <= around[:2] + 1.5).all() and (box[2:] >= around[2:] - 1.5).all()
        assert np.abs(around - box).max() <= 2  # and no larger than it must be
        grown += (box[2] - box[0]) > 45
    assert grown > 10


def test_what_comes_in_from_outside_is_padding():
    sample = rectangle(*SIZE, (50, 30, 82, 60))
    moved = transform(scale=(0.5, 0.5))(sample, 0)  # 48x64 in the middle: rows 24..72, columns 32..96
    outside = np.ones(SIZE, bool)
    outside[23:73, 31:97] = False
    assert (moved.labels["seg"][outside] == IGNORE).all()
    assert (moved.image[outside] == GREY).all()
    assert (moved.labels["seg"][26:70, 34:94] != IGNORE).all()


def test_padding_of_the_letterbox_is_ignored_too():
    moved = transform()(rectangle(100, 400, (100, 20, 200, 60)), 0)  # content is 32x128
    assert (moved.labels["seg"][32:] == IGNORE).all() and (moved.labels["seg"][:32] != IGNORE).all()
    assert set(np.unique(moved.labels["seg"])) == {0, 1, IGNORE}


def test_masks_hold_no_class_that_was_not_there():
    sample = rectangle(150, 260, (100, 20, 240, 90), inside=7)
    sample.labels["seg"][:20] = IGNORE
    for seed in range(20):
        assert set(np.unique(transform(**SPATIAL, rotate=20.0)(sample, seed).labels["seg"])) <= {0, 7, IGNORE}


def test_min_visible_decides_by_the_visible_share():
    sample, shift = rectangle(*SIZE, (44, 33, 84, 63)), transform(translate=0.9, min_visible=0.5)
    kept = dropped = 0
    for seed in range(300):
        moved = shift(sample, seed)
        share = (moved.labels["seg"] == 1).sum() / 1200
        if share > 0.56:
            assert len(moved.labels["det"].boxes) == 1, seed
            kept += share < 0.99
        elif share < 0.44:
            assert len(moved.labels["det"].boxes) == 0, seed
            dropped += share > 0.01
    assert kept > 5 and dropped > 5  # of those that are cut at all


FULL = SPATIAL | {"rotate": 10.0, "brightness": 0.4, "color": 0.4}


def parts(sample):
    """Everything of a sample, by name."""
    found = {"image": sample.image} | {name: label for name, label in sample.labels.items() if name != "det"}
    if "det" in sample.labels:
        found |= {f"det.{key}": value for key, value in vars(sample.labels["det"]).items()}
    return found


def same(a, b):
    a, b = parts(a), parts(b)
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_the_same_seed_gives_the_same_sample_whatever_went_before():
    sample = rectangle(150, 260, (100, 20, 240, 90))
    first = transform(**FULL)
    expected = [first(sample, seed) for seed in range(5)]
    second = transform(**FULL)
    np.random.seed(4)
    for seed in (3, 0, 4, 1, 2, 3):
        assert same(second(sample, seed), expected[seed])
    for a in range(5):
        for b in range(a):
            assert not np.array_equal(expected[a].image, expected[b].image)


def test_an_image_is_changed_in_the_same_way_with_its_labels_and_without():
    labelled, bare, augment = (
        rectangle(150, 260, (100, 20, 240, 90)),
        rectangle(150, 260, (100, 20, 240, 90)),
        transform(**FULL),
    )
    bare.labels.clear()
    images = [augment(labelled, seed).image for seed in range(5)]
    assert all(np.array_equal(augment(bare, seed).image, images[seed]) for seed in range(5))


def test_global_random_states_are_left_alone():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    transform(**FULL)(rectangle(*SIZE, (50, 30, 82, 60)), 0)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_colour_leaves_labels_alone_and_changes_the_image():
    sample, colour = rectangle(*SIZE, (50, 30, 82, 60)), transform(brightness=0.4, color=0.4)
    changed = 0
    for seed in range(10):
        moved = colour(sample, seed)
        assert np.array_equal(moved.labels["seg"], sample.labels["seg"])
        assert moved.labels["det"].boxes.tolist() == [[50, 30, 82, 60]]
        changed += not np.array_equal(moved.image, sample.image)
    assert changed > 5


def test_the_sample_itself_is_left_as_it_was():
    sample = rectangle(*SIZE, (50, 30, 82, 60))
    before = {key: value.copy() for key, value in parts(sample).items()}
    assert list(before) == ["image", "seg", "det.boxes", "det.classes", "det.crowd", "det.area"]
    transform(**FULL)(sample, 1)
    assert all(np.array_equal(value, parts(sample)[key]) for key, value in before.items())


@pytest.mark.parametrize("options", [{}, FULL])
def test_what_is_not_labelled_stays_so(options):
    moved = transform(**options)(rectangle(*SIZE, (50, 30, 82, 60), labelled=False), 0)
    assert moved.labels == {}
    assert moved.image.shape == (*SIZE, 3)


@pytest.mark.parametrize("options", [{}, FULL])
def test_labelled_without_an_object_stays_labelled(options):
    sample = rectangle(*SIZE, (50, 30, 82, 60))
    sample.labels["det"] = BoxLabels(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    moved = transform(**options)(sample, 0)
    assert moved.labels["det"].boxes.shape == (0, 4) and moved.labels["det"].boxes.dtype == np.float32
    assert moved.labels["det"].classes.shape == (0,) and moved.labels["det"].classes.dtype == np.int64


def test_classes_stay_with_their_boxes_and_crowds_are_marked():
    image = np.zeros((*SIZE, 3), np.uint8)
    boxes = [[10, 10, 30, 30], [50, 40, 70, 60], [90, 60, 110, 80]]
    sample = of_boxes(image, boxes, [5, 1, 3], np.array([False, True, False]), np.full(3, 400, np.float32))
    moved = transform(flip=1.0)(sample, 0)
    label = moved.labels["det"]
    found = {int(c): b.tolist() for c, b in zip(label.classes, label.boxes, strict=True)}
    assert found == {5: [98, 10, 118, 30], CROWD: [58, 40, 78, 60], 3: [18, 60, 38, 80]}
    assert list(moved.labels) == ["det"] and label.crowd.tolist() == [c == CROWD for c in label.classes]


def test_boxes_over_the_edge_and_slivers_do_no_harm():
    # what rounding leaves of boxes at the border, and one of almost no width
    boxes = [[0, 0, 640.001, 480.001], [500, 100, 500.00003, 180], [639.9999, 0, 640, 480]]
    sample = of_boxes(
        np.zeros((480, 640, 3), np.uint8), boxes, [0, 1, 2], np.zeros(3, bool), np.ones(3, np.float32)
    )
    for options in ({}, {"flip": 1.0}, FULL):
        moved = transform(**options)(sample, 0)
        assert 0 in moved.labels["det"].classes and 1 not in moved.labels["det"].classes
    assert transform()(sample, 0).labels["det"].boxes[0].tolist() == [0, 0, 128, 96]


# --- labels of any name and kind

NAMED = kinds(
    seg="semantic",
    lane="semantic",
    metres="depth",
    det="detection",
    sign="detection",
    weather="classification",
)


def named(height=150, width=260, box=(100, 20, 240, 90)):
    """One rectangle in every label: class 1 and 2 of two masks, 7.5 of 300 m, a box of det, two of sign."""
    sample = rectangle(height, width, box)
    x1, y1, x2, y2 = box
    lane, metres = np.zeros((height, width), np.uint8), np.full((height, width), 300, np.float32)
    lane[y1:y2, x1:x2], metres[y1:y2, x1:x2] = 2, 7.5
    sign = BoxLabels(np.array([box, box], np.float32), np.array([4, 9]), np.array([False, True]))
    sample.labels |= {"lane": lane, "metres": metres, "sign": sign, "weather": 3, "spare": "not of this run"}
    sample.known["sign"] = np.array([True, False])
    return sample


def test_every_label_moves_with_the_image():
    sample, together, cut = named(), transform(moves=NAMED, **SPATIAL, rotate=20.0), 0
    for seed in range(60):
        moved = together(sample, seed)
        assert list(moved.labels) == ["seg", "det", "lane", "metres", "sign", "weather"]
        seg, lane, metres = (moved.labels[name] for name in ("seg", "lane", "metres"))
        assert (seg.dtype, lane.dtype, metres.dtype) == (np.uint8, np.uint8, np.float32)
        assert np.array_equal(seg == 1, lane == 2) and np.array_equal(seg == 1, metres == 7.5), seed
        assert np.array_equal(seg == 0, lane == 0) and np.array_equal(seg == 0, metres == 300), seed
        assert np.array_equal(seg == IGNORE, metres == 0), seed  # what came in from outside has no depth
        det, sign = moved.labels["det"], moved.labels["sign"]
        assert np.array_equal(np.repeat(det.boxes, 2, axis=0), sign.boxes)
        assert sign.classes.tolist() == [4, CROWD] * len(det) and moved.labels["weather"] == 3
        cut += (seg == IGNORE).any()
    assert cut > 40
    assert moved.known is sample.known


def test_other_labels_change_nothing_of_the_first_ones():
    """A run with more tasks sees the same images, masks and boxes as one with fewer."""
    few, many, every = transform(**FULL), transform(moves=NAMED, **FULL), named()
    for seed in range(8):
        own, all_of_them = parts(few(every, seed)), parts(many(every, seed))
        assert list(own) == ["image", "seg", "det.boxes", "det.classes", "det.crowd", "det.area"]
        assert all(np.array_equal(value, all_of_them[key]) for key, value in own.items())


def test_depth_by_hand():
    metres = np.array([[0, 1, 2, 3], [4, 255, 300, 7]], np.float32)
    sample = Sample(np.zeros((2, 4, 3), np.uint8), {"metres": metres})
    flipped = transform((2, 4), NAMED, flip=1.0)(sample, 0).labels["metres"]
    assert flipped.tolist() == [[3, 2, 1, 0], [7, 300, 255, 4]] and flipped.dtype == np.float32
    padded = transform((4, 4), NAMED)(sample, 0).labels["metres"]
    assert padded.tolist() == [*metres.tolist(), [0] * 4, [0] * 4]
    assert metres.tolist() == [[0, 1, 2, 3], [4, 255, 300, 7]]  # as it was
    half = transform((1, 2), NAMED)(sample, 0).labels["metres"]
    assert set(half.flatten()) <= set(metres.flatten())  # the nearest, never a mean of two depths


def test_depth_that_no_number_says_is_not_known():
    metres = np.array([[np.nan, -1, 5, 2]], np.float32)
    found = transform((1, 4), NAMED)(Sample(np.zeros((1, 4, 3), np.uint8), {"metres": metres}), 0)
    assert found.labels["metres"].tolist() == [[0, 0, 5, 2]]


def picture():
    """A picture [150,260,3], its mask and eight boxes, one a crowd; the same on every machine."""
    y, x = np.mgrid[0:150, 0:260]
    image = np.stack([(3 * x + y) % 256, (x + 2 * y) % 256, (x * y) // 64 % 256], -1).astype(np.uint8)
    mask = ((x // 20 + y // 30) % 7).astype(np.uint8)
    mask[140:] = IGNORE
    boxes = [[10 * k, 8 * k, 10 * k + 40, 8 * k + 60] for k in range(8)]
    return of_boxes(image, boxes, range(8), np.arange(8) == 5, np.ones(8, np.float32), mask)


def test_what_a_seed_draws_is_what_it_always_drew():
    """Runs of earlier versions can be repeated: masks, and boxes to a tenth of a pixel, have this checksum."""
    seen, sample, mean = hashlib.sha256(), picture(), []
    for options in (
        FULL,
        FULL | {"rotate": 0.0},
        FULL | {"scale": (1.0, 1.0), "translate": 0.0, "rotate": 0.0},
    ):
        for size in ((96, 128), (48, 64)):
            change = transform(size, **options)
            for seed in range(20):
                moved = change(sample, seed)
                seen.update(moved.labels["seg"].tobytes())
                seen.update(np.round(moved.labels["det"].boxes * 10).astype(np.int64).tobytes())
                seen.update(moved.labels["det"].classes.astype(np.int64).tobytes())
                mean.append(moved.image.mean())
    assert seen.hexdigest() == "c1d9851c96a751ac09e00cbd8aa2804db361fa2eb3e0fe65dafb4744501e5481"
    assert np.mean(mean) == pytest.approx(99.53181875723381, abs=0.05)  # of 255: colours


# --- boxes


def test_boxes_alone_are_no_crowds_and_have_their_own_area():
    label = BoxLabels(np.array([[1, 2, 4, 8]], np.float32), np.array([0]))
    assert label.crowd.tolist() == [False] and label.area.tolist() == [18] and len(label) == 1


def test_clean_boxes():
    boxes = np.array(
        [
            [-5, -5, 10, 10],
            [5, 5, 5, 9],
            [9, 5, 4, 9],
            [200, 0, 210, 5],
            [0, 0, np.nan, 5],
            [90, 90, 120, 130],
        ]
    )
    clipped, keep, faults = clean_boxes(boxes, 100, 100)
    assert keep.tolist() == [True, False, False, False, False, True]
    assert clipped[keep].tolist() == [[0, 0, 10, 10], [90, 90, 100, 100]]
    assert faults == {"boxes of zero or negative size (dropped)": 3, "boxes outside the image (dropped)": 1}
    assert clean_boxes(np.zeros((0, 4)), 10, 10)[0].shape == (0, 4)
