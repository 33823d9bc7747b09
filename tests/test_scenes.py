"""The procedural scenes: labels that agree with each other, streams that depend on the seed alone, a cache
that heals."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from multitask_kd.batch import IGNORE
from multitask_kd.data.base import LAYOUTS
from multitask_kd.data.labels import BoxLabels
from multitask_kd.data.layouts.scenes import Scenes
from multitask_kd.data.scenes import cache as scenes_cache
from multitask_kd.data.scenes import objects as scenes_objects
from multitask_kd.data.scenes.background import STUFF
from multitask_kd.data.scenes.draw import draw, scene
from multitask_kd.data.scenes.labels import FIRST_INSTANCE, OBJECTS, SEG_CLASSES, WEATHER, Drawing, label
from multitask_kd.errors import UserError

SIZE = (96, 128)
ROWS = ("boxes", "classes", "crowd", "area")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def scenes(root):
    return Scenes(split="train", count=150, root=str(root))


def arrays(sample):
    """All that a sample holds, by name."""
    found = {"image": sample.image, **sample.labels}
    det = found.pop("det")
    return found | {field: getattr(det, field) for field in ROWS}


def same(a, b):
    a, b = arrays(a), arrays(b)
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def drawing(ids, classes, whole):
    """A drawing of these objects alone, on nothing."""
    image, road, depth = (
        np.zeros((*ids.shape, *rest), kind) for rest, kind in (((3,), "u1"), ((), "u1"), ((), "f4"))
    )
    return Drawing(image, ids, classes, np.array(whole), road, depth, weather=0)


def modified(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# -- what a sample is


def test_a_sample_has_the_promised_shapes_and_types(scenes):
    sample = scenes.read(0)
    count = len(sample.labels["det"])
    expected = {
        "image": ((*SIZE, 3), np.uint8), "seg": (SIZE, np.uint8), "drivable": (SIZE, np.uint8),
        "lane": (SIZE, np.uint8), "depth": (SIZE, np.float32), "boxes": ((count, 4), np.float32),
        "classes": ((count,), np.int64), "crowd": ((count,), bool), "area": ((count,), np.float32),
    }  # fmt: skip
    found = arrays(sample)
    weather = found.pop("weather")
    assert {key: (array.shape, array.dtype) for key, array in found.items()} == {
        key: (shape, np.dtype(dtype)) for key, (shape, dtype) in expected.items()
    }
    assert type(weather) is int and weather in range(len(WEATHER))
    assert isinstance(sample.labels["det"], BoxLabels) and not sample.labels["det"].crowd.any()
    assert SEG_CLASSES[len(STUFF) :] == OBJECTS
    assert scenes_objects.IGNORE == IGNORE
    assert LAYOUTS.get("scenes", "data") is Scenes
    for array in found.values():  # the caller's own copies
        array[:] = 0
    again = arrays(scenes.read(0))
    assert all(again[key].any() for key in ("image", "seg", "drivable", "lane", "depth", "boxes", "area"))
    assert len({scenes.name(i) for i in range(150)}) == 150
    with pytest.raises(IndexError):
        scenes.read(150)


def test_masks_and_boxes_agree(scenes):
    """Object pixels of a class lie in its boxes, and each box touches such pixels on all four sides."""
    for i in range(len(scenes)):
        labels = scenes.read(i).labels
        det = labels["det"]
        for kind in range(len(OBJECTS)):
            pixels = labels["seg"] == len(STUFF) + kind
            inside = np.zeros(SIZE, bool)
            for x1, y1, x2, y2 in det.boxes[det.classes == kind].astype(int):
                patch = pixels[y1:y2, x1:x2]
                inside[y1:y2, x1:x2] = True
                assert patch.shape == (y2 - y1, x2 - x1) and min(patch.shape) >= 4
                assert patch[0].any() and patch[-1].any() and patch[:, 0].any() and patch[:, -1].any()
            assert not (pixels & ~inside).any()
            assert det.area[det.classes == kind].sum() == pixels.sum()


def test_a_box_is_the_tight_frame_of_what_can_be_seen():
    """A 10 x 8 object (80 pixels) of which another hides the right 5 columns: 40 pixels, half of it, x from
    20 to 25."""
    ids = np.zeros(SIZE, np.uint8)
    ids[30:38, 20:25] = FIRST_INSTANCE
    ids[20:60, 25:45] = FIRST_INSTANCE + 1
    labels = label(np.random.default_rng(0), drawing(ids, [2, 0], [80, 800]))
    assert labels.boxes.tolist() == [[20, 30, 25, 38], [25, 20, 45, 60]]
    assert labels.classes.tolist() == [2, 0]
    assert labels.area.tolist() == [40, 800]
    assert (labels.mask == len(STUFF) + 2).sum() == 40


@pytest.mark.parametrize(("width", "whole"), [(5, 130), (3, 24)], ids=["hidden", "narrow"])
def test_hidden_and_tiny_objects_are_ignored_not_background(width, whole):
    """40 of 130 pixels are 31 %, below 35 %; 3 pixels are below 4."""
    ids = np.zeros(SIZE, np.uint8)
    ids[30:38, 20 : 20 + width] = FIRST_INSTANCE
    labels = label(np.random.default_rng(0), drawing(ids, [0], [whole]))
    assert len(labels.boxes) == 0
    assert (labels.mask[30:38, 20 : 20 + width] == IGNORE).all()
    assert (labels.mask == IGNORE).sum() == 8 * width


# -- what the set is like


def test_every_class_is_common_and_little_is_ignored(scenes):
    samples = [scenes.read(i) for i in range(len(scenes))]
    pixels = np.stack([np.bincount(s.labels["seg"].ravel(), minlength=256) for s in samples])
    assert set(np.flatnonzero(pixels.sum(0))) == {*range(len(SEG_CLASSES)), IGNORE}
    in_scenes = (pixels > 0).mean(0)
    assert (in_scenes[: len(STUFF)] > 0.7).all()
    assert (in_scenes[len(STUFF) : len(SEG_CLASSES)] > 0.13).all()
    share = pixels.sum(0) / pixels.sum()
    assert 0.002 < share[IGNORE] < 0.1
    assert (share[: len(SEG_CLASSES)] < 0.4).all()
    count = np.array([len(s.labels["det"]) for s in samples])
    assert 2 < count.mean() < 6 and (count > 0).mean() > 0.95


def test_objects_span_a_wide_range_of_sizes(scenes):
    boxes = np.concatenate([scenes.read(i).labels["det"].boxes for i in range(len(scenes))])
    heights = boxes[:, 3] - boxes[:, 1]
    assert (heights > SIZE[0] / 2).mean() > 0.1
    assert (heights < SIZE[0] / 4).mean() > 0.1
    assert (heights < 6).mean() < 0.05


def test_scenes_are_lit_and_coloured_differently(scenes):
    """Light alone must not tell the class: the mean grey of buildings and of roads span ranges that overlap."""
    greys = {kind: [] for kind in ("building", "road")}
    for sample in map(scenes.read, range(len(scenes))):
        for kind, values in greys.items():
            pixels = sample.image[sample.labels["seg"] == STUFF.index(kind)]
            if len(pixels) > 100:
                values.append(pixels.mean())
    low, high = (np.array([np.quantile(values, q) for values in greys.values()]) for q in (0.1, 0.9))
    assert (high - low > 40).all()
    assert high.min() - low.max() > 10


# -- the streams


def test_scenes_depend_on_seed_split_and_index_alone(root, scenes, tmp_path):
    fewer = Scenes(split="train", count=4, root=str(tmp_path))
    assert all(same(fewer.read(i), scenes.read(i)) for i in range(4))
    image, labels = scene(0, "train", 100, SIZE)  # a worker's share, out of order
    assert np.array_equal(image, scenes.read(100).image)
    assert np.array_equal(labels.boxes, scenes.read(100).labels["det"].boxes)
    others = [("val", 0), ("train", 1)]
    first = {
        scene(seed, split, i, SIZE)[0].tobytes() for split, seed in [("train", 0), *others] for i in range(5)
    }
    assert len(first) == 15


def test_other_sizes_are_drawn(tmp_path):
    for size in ([48, 64], [64, 48], [150, 201]):
        sample = Scenes(split="val", count=2, size=size, root=str(tmp_path)).read(1)
        assert sample.image.shape == (*size, 3)
        assert {sample.labels[key].shape for key in ("seg", "drivable", "lane", "depth")} == {tuple(size)}
        assert (sample.labels["det"].boxes[:, 2:] <= [size[1], size[0]]).all()


def test_every_scene_shows_something_to_find():
    """Objects are asked for until one stands."""
    assert all(draw(np.random.default_rng(i), SIZE).classes for i in range(60))


# -- the cache


def test_a_cache_serves_again_and_serves_smaller_sets(root, scenes):
    before = modified(scenes.folder)
    again, fewer = (
        Scenes(split="train", count=150, root=str(root)),
        Scenes(split="train", count=20, root=str(root)),
    )
    assert again.folder == fewer.folder == scenes.folder
    assert len(fewer) == 20
    assert same(fewer.read(19), scenes.read(19))
    assert modified(scenes.folder) == before


def test_another_version_of_the_generator_does_not_use_the_cache(tmp_path, monkeypatch):
    old = Scenes(split="val", count=2, root=str(tmp_path))
    monkeypatch.setattr(scenes_cache, "VERSION", scenes_cache.VERSION + 1)
    assert Scenes(split="val", count=2, root=str(tmp_path)).folder != old.folder


def flip_a_byte(path):
    with open(path, "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))


DAMAGE = {
    "cut short": lambda folder: os.truncate(folder / "masks.npy", 1000),
    "a byte of an image changed": lambda folder: flip_a_byte(folder / "images.npy"),
    "a byte of a road changed": lambda folder: flip_a_byte(folder / "road.npy"),
    "a byte of a depth changed": lambda folder: flip_a_byte(folder / "depth.npy"),
    "a file gone": lambda folder: (folder / "rows.npz").unlink(),
    "no meta": lambda folder: (folder / "meta.json").write_text("{"),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_cache_is_generated_again(tmp_path, caplog, damage):
    scenes = Scenes(split="val", count=3, root=str(tmp_path))
    intact = [scenes.read(i) for i in range(3)]
    damage(scenes.folder)
    with caplog.at_level(logging.WARNING):
        again = Scenes(split="val", count=3, root=str(tmp_path))
    assert "damaged" in caplog.text
    assert all(same(again.read(i), intact[i]) for i in range(3))
    assert [path.name for path in tmp_path.iterdir()] == [again.folder.name]


def test_nothing_is_left_behind_when_generating_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_cache, "draw_span", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Scenes(split="val", count=2, root=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_workers_and_one_process_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_cache, "SCENES_A_WORKER", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    started = []
    start = scenes_cache._start
    monkeypatch.setattr(scenes_cache, "_start", lambda *args: started.append(start(*args)) or started[-1])
    shared = Scenes(split="val", count=5, root=str(tmp_path / "shared"))
    assert [helper.returncode for helper in started] == [0]
    monkeypatch.setattr(
        subprocess, "Popen", lambda *_, **__: (_ for _ in ()).throw(OSError("no more processes"))
    )
    alone = Scenes(split="val", count=5, root=str(tmp_path / "alone"))
    assert len(started) == 2 and started[1] is None
    assert all(same(shared.read(i), alone.read(i)) for i in range(5))


def test_processes_may_generate_the_same_set_at_once(tmp_path):
    package = str(Path(scenes_cache.__file__).parents[2])
    code = scenes_cache.WORKER.replace("import worker", "import Path, ensure").replace(
        "worker(*sys.argv[2:])", "print(ensure(Path(sys.argv[2]), 0, 'val', (96, 128), 6))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, package, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    folders = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert folders == {str(path) for path in tmp_path.iterdir()}
    assert scenes_cache.find_fault(Path(folders.pop()), SIZE) is None


def test_a_set_that_another_process_finished_first_is_used(tmp_path):
    first = Scenes(split="val", count=2, root=str(tmp_path))
    before = modified(first.folder)
    stem = first.folder.name.rpartition("-n")[0]
    assert scenes_cache._generate(tmp_path, stem, 0, "val", SIZE, 2) == first.folder
    assert modified(first.folder) == before
    (first.folder / "masks.npy").unlink()
    scenes_cache._generate(tmp_path, stem, 0, "val", SIZE, 2)
    assert scenes_cache.find_fault(first.folder, SIZE) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_pickling_leaves_the_open_arrays_behind(scenes):
    sample = scenes.read(7)
    data = pickle.dumps(scenes)
    assert len(data) < 2000
    assert same(pickle.loads(data).read(7), sample)


# -- options


@pytest.mark.parametrize(
    ("options", "key", "advice"),
    [
        ({"split": "trian"}, "split", "did you mean 'train'?"),
        ({"count": 0}, "count", "at least 1"),
        ({"count": 2.5}, "count", "2.5"),
        ({"seed": -1}, "seed", "at least 0"),
        ({"size": (40, 128)}, "size", "48 to 1024"),
        ({"size": (96, 2000)}, "size", "48 to 1024"),
        ({"size": 96}, "size", "[height, width]"),
        ({"size": (96, 128.0)}, "size", "whole"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, key, advice):
    with pytest.raises(UserError) as caught:
        Scenes(**{"split": "train", "count": 1, "root": str(tmp_path)} | options)
    assert str(caught.value).startswith(f"{key}: ")
    assert advice in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="root: cannot keep scenes in .*file"):
        Scenes(split="train", count=1, root=str(tmp_path / "file" / "cache"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room on disk")
def test_a_full_disk_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(scenes_cache, "draw_span", lambda *args: pytest.fail("drawn"))
    with pytest.raises(UserError, match="root: cannot keep scenes in .*No space left"):
        Scenes(split="val", count=2, root=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
