"""Several sets in one run: their classes, their slots in a batch, and what is learnt from each."""

import copy
import math

import cv2
import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from multitask_kd import build, checkpoint
from multitask_kd import config as configs
from multitask_kd.batch import IGNORE
from multitask_kd.data.base import LAYOUTS, Layout, Sample
from multitask_kd.data.labels import BoxLabels
from multitask_kd.data.layouts.scenes import Scenes
from multitask_kd.data.loader import Packing, TrainSet, train_loader
from multitask_kd.data.sampling import BatchStream, Draw, pools, pools_of_set
from multitask_kd.data.sets import Member, Sets, shared_out
from multitask_kd.data.transforms import TrainTransform
from multitask_kd.engine import train as loop
from multitask_kd.engine.announce import by_set, sets_lines
from multitask_kd.engine.data_report import layouts_of
from multitask_kd.engine.folder import differences
from multitask_kd.engine.run import build_run, prepare
from multitask_kd.engine.step import compute_step
from multitask_kd.errors import UserError
from multitask_kd.registry import options_of
from multitask_kd.tasks.base import DEFAULT_KINDS, KINDS

SIZE = (48, 64)
SEG_DET = {name: KINDS.get(kind, "x") for name, kind in DEFAULT_KINDS.items()}


class Pictures(Layout):
    """Images in memory, each of a grey of its own; the mask has every class in a column, box k is of class k.

    Image i has i % (classes + 1) boxes, the last of them a crowd, areas of 100 + k. ``broken`` ones cannot be
    read.
    """

    def __init__(self, *, count=6, seg=("road", "car"), det=("car", "bus"), grey=0, broken=(), faults=0):
        super().__init__()
        for label, names in (("seg", seg), ("det", det)):
            if names:
                self.add_label(label, DEFAULT_KINDS[label], names)
        self.count, self.grey, self.broken = count, grey, tuple(broken)
        if faults:
            self.faults["boxes that are bad (dropped)"] = faults

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{self.grey}/{index}.png"

    def read(self, index):
        if index in self.broken:
            raise UserError(f"{self.name(index)}: cannot be decoded")
        found = Sample(np.full((*SIZE, 3), self.grey + index, np.uint8))
        if "seg" in self.classes:
            found.labels["seg"] = np.full(SIZE, IGNORE, np.uint8)
            found.labels["seg"][:, : len(self.classes["seg"])] = np.arange(len(self.classes["seg"]))
        if "det" in self.classes:
            count = index % (len(self.classes["det"]) + 1)
            boxes = np.array([[4 * k, 4, 4 * k + 20, 30] for k in range(count)], np.float32).reshape(-1, 4)
            area = 100 + np.arange(count, dtype=np.float32)
            found.labels["det"] = BoxLabels(boxes, np.arange(count), np.arange(count) == count - 1, area)
        return found


def member(layout, tasks=None, rename=None, part=(1, 1), key_path="data.train.x"):
    return Member(layout, key_path, list(layout.classes) if tasks is None else tasks, rename or {}, part)


def sets_of(order=None, **members):
    """By name a layout, or (layout, tasks, rename, part)."""
    made = {
        n: member(*(m if isinstance(m, tuple) else (m,)), key_path=f"data.train.{n}")
        for n, m in members.items()
    }
    return Sets(made, order, kinds=SEG_DET)


def recipe(config):
    """A run, built."""
    return build_run(build.resolve_init(config))


def said_of(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return str(error.value)


# --- classes


def test_classes_meet_by_name_in_any_order():
    found = sets_of(
        a=Pictures(count=3), b=Pictures(count=3, seg=("car", "road"), det=("bus", "car"), grey=100)
    )
    assert found.classes == {"seg": ("road", "car"), "det": ("car", "bus")}
    first, second = found.read(2).labels, found.read(5).labels
    assert first["seg"][0, :3].tolist() == [0, 1, IGNORE] and second["seg"][0, :3].tolist() == [1, 0, IGNORE]
    assert first["det"].classes.tolist() == [0, 1] and second["det"].classes.tolist() == [1, 0]
    assert second["seg"].dtype == np.uint8 and second["det"].classes.dtype == np.int64
    assert found.read(5).image[0, 0, 0] == 102 and second["det"].boxes.tolist() == first["det"].boxes.tolist()
    assert found.kinds == {"seg": "semantic", "det": "detection"} and found.read(5).known == {}


def test_the_order_of_the_classes_can_be_that_of_others():
    order = {
        "seg": ("car", "road"),
        "det": ("car", "tram"),
    }  # of det another class: the set's own order stays
    found = sets_of(order, a=Pictures())
    assert found.classes == {"seg": ("car", "road"), "det": ("car", "bus")}
    labels = found.read(2).labels
    assert labels["seg"][0, :2].tolist() == [1, 0] and labels["det"].classes.tolist() == [0, 1]
    assert sets_of({"seg": ("car",)}, a=Pictures()).classes["seg"] == ("road", "car")


def test_renamed_merged_and_left_out():
    rename = {
        "seg": {"street": "road", "auto": "car", "sky": None},
        "det": {"auto": "car", "van": "car", "tree": None},
    }
    other = Pictures(seg=("sky", "auto", "street"), det=("tree", "van", "bus", "auto"))
    found = sets_of(a=Pictures(), b=(other, None, rename))
    assert found.classes == {"seg": ("road", "car"), "det": ("car", "bus")}
    labels = found.read(6 + 4).labels  # image 4 has one box of each class
    assert labels["seg"][0, :4].tolist() == [IGNORE, 1, 0, IGNORE]
    assert labels["det"].classes.tolist() == [0, 1, 0]  # the tree is gone, with all that belongs to it
    assert labels["det"].boxes[:, 0].tolist() == [4, 8, 12] and labels["det"].area.tolist() == [101, 102, 103]
    assert labels["det"].crowd.tolist() == [False, False, True]
    only_tree = found.read(6 + 1).labels["det"]
    assert only_tree.boxes.shape == (
        0,
        4,
    ) and only_tree.classes.shape == only_tree.crowd.shape == only_tree.area.shape == (0,)
    assert found.read(6).labels["det"].boxes.shape == (0, 4)  # labelled, and nothing there


def test_all_classes_may_become_one():
    found = sets_of(a=(Pictures(), ["det"], {"det": {"car": "thing", "bus": "thing"}}))
    assert found.classes == {"det": ("thing",)}
    assert found.read(2).labels["det"].classes.tolist() == [0, 0] and list(found.read(2).labels) == ["det"]


def test_a_renaming_that_swaps_two_names_swaps_their_labels():
    found = sets_of(a=Pictures(), b=(Pictures(), ["seg"], {"seg": {"road": "car", "car": "road"}}))
    assert [found.read(i).labels["seg"][0, :2].tolist() for i in (0, 6)] == [[0, 1], [1, 0]]


def test_only_the_tasks_asked_for():
    found = sets_of(
        a=(Pictures(), ["seg"]), b=(Pictures(), ["det"]), c=(Pictures(), []), d=Pictures(seg=(), det=())
    )
    labels = {name: found.labels(name) for name in "abcd"}
    assert labels == {"a": ("seg",), "b": ("det",), "c": (), "d": ()}
    for start, tasks in zip((0, 6, 12, 18), labels.values(), strict=True):
        assert tuple(found.read(start + 2).labels) == tasks
    assert found.labelled() == {"seg", "det"} and found.offered() == ["seg", "det"]


def test_what_an_image_does_not_label_stays_unlabelled():
    class Half(Pictures):
        def read(self, index):
            sample = super().read(index)
            return Sample(sample.image) if index % 2 else sample

    found = sets_of(a=Pictures(), b=(Half(), None, {"seg": {"road": "car", "car": "road"}}))
    assert list(found.read(6).labels) == ["seg", "det"] and found.read(7).labels == {}


def test_an_untouched_set_is_handed_through_as_it_is():
    class Kept(Pictures):
        def read(self, index):
            self.last = super().read(index)
            return self.last

    kept = Kept()
    alone = sets_of(a=kept)
    assert alone.read(3) is kept.last
    assert sets_of(a=Kept(), b=kept).read(6 + 3) is kept.last
    assert sets_of(a=(kept, ["seg"])).read(3) is not kept.last


@pytest.mark.parametrize(
    ("other", "who", "said", "only"),
    [
        ((Pictures(det=("car",)),), "b", "not those of data.train.a: it lacks ['bus']. ", "[car]"),
        (
            (Pictures(det=("bus", "car", "tram")),),
            "a",
            "not those of data.train.b: it lacks ['tram']. ",
            "[car, bus]",
        ),
        (
            (Pictures(det=("car", "tram")),),
            "a",
            "not those of data.train.b: it lacks ['tram']. ",
            "[car, bus]",
        ),
        (
            (Pictures(), ["seg", "det"], {"det": {"bus": None}}),
            "b",
            "not those of data.train.a: it lacks ['bus']. ",
            "[car]",
        ),
    ],
)
def test_classes_that_differ_are_refused(other, who, said, only):
    message = said_of(sets_of, z=(Pictures(), ["seg"]), a=Pictures(), b=other)
    assert message.startswith(f"data.train.{who}: its classes of 'det' are ") and said in message
    assert message.endswith(
        f"background there: say which classes it labels (data.train.{who}.classes.det: {only}), make them "
        f"the same with "
        "rename, or take 'det' out of the set's tasks"
    )
    assert sets_of(a=Pictures(), b=(other[0], ["seg"], {})).classes["det"] == (
        "car",
        "bus",
    )  # what it says is what helps


@pytest.mark.parametrize(
    ("one", "said"),
    [
        ((Pictures(det=()), ["det"]), "data.train.a.tasks: the set has no 'det'; it labels seg"),
        ((Pictures(seg=(), det=()), ["seg"]), "data.train.a.tasks: the set has no 'seg'; it has no labels"),
        (
            (Pictures(det=()), ["seg"], {"det": {}}),
            "data.train.a.rename: the set has no 'det'; it labels seg",
        ),
        (
            (Pictures(), ["seg"], {"det": {}}),
            "data.train.a.rename.det: 'det' is not among the set's tasks; leave it out",
        ),
        (
            (Pictures(), ["det"], {"det": {"cra": "x"}}),
            "data.train.a.rename.det: the set has no class 'cra'; did you mean 'car'?",
        ),
        (
            (Pictures(), ["det"], {"det": {"car": None, "bus": None}}),
            "data.train.a.rename.det: every class is left out; leave 'det' out of the set's tasks instead",
        ),
        ((Pictures(count=2), [], {}, (3, 3)), "data.train.a.part: 3/3 of 2 images is none; take fewer parts"),
    ],
)
def test_what_a_set_does_not_have(one, said):
    assert said_of(sets_of, a=one) == said


def test_faults_are_summed():
    class Other(Pictures):
        def __init__(self):
            super().__init__()
            self.faults["masks that are bad"] = 1

    found = sets_of(a=Pictures(faults=2), b=Pictures(faults=3), c=Other(), d=Pictures())
    assert found.faults == {"boxes that are bad (dropped)": 5, "masks that are bad": 1}


# --- images


def test_every_image_at_every_border():
    found = sets_of(a=Pictures(count=3), one=Pictures(count=1, grey=50), b=Pictures(count=4, grey=100))
    assert len(found) == 8
    assert [found.set_of(i) for i in range(8)] == ["a"] * 3 + ["one"] + ["b"] * 4
    assert {name: found.rows(name).tolist() for name in found.members} == {
        "a": [0, 1, 2],
        "one": [3],
        "b": [4, 5, 6, 7],
    }
    names = [found.name(i) for i in range(8)]
    assert names == [
        "0/0.png",
        "0/1.png",
        "0/2.png",
        "50/0.png",
        "100/0.png",
        "100/1.png",
        "100/2.png",
        "100/3.png",
    ]
    assert [int(found.read(i).image[0, 0, 0]) for i in range(8)] == [0, 1, 2, 50, 100, 101, 102, 103]
    for beyond in (-1, 8):
        for ask in (found.name, found.read, found.set_of):
            with pytest.raises(IndexError):
                ask(beyond)


@pytest.mark.parametrize(("count", "n"), [(12, 2), (13, 3), (5, 5), (7, 1)])
def test_parts_are_disjoint_and_complete(count, n):
    layout = Pictures(count=count)
    parts = [sets_of(x=Pictures(grey=50), a=(layout, None, None, (k, n))) for k in range(1, n + 1)]
    images = [[int(p.read(i).image[0, 0, 0]) for i in p.rows("a")] for p in parts]
    assert sorted(sum(images, [])) == list(range(count)) and all(own == sorted(own) for own in images)
    assert max(map(len, images)) - min(map(len, images)) <= 1
    again = sets_of(
        a=(Pictures(count=count), ["det"], None, (1, n))
    )  # another run, another set before it or none, other labels
    assert [int(again.read(i).image[0, 0, 0]) for i in range(len(again))] == images[0]
    if n == 2:
        assert images[0] != list(range(6)) and images[0] != list(range(0, 12, 2))  # drawn, not cut


def test_a_set_alone_is_as_it_stands_there():
    found = sets_of(
        a=Pictures(), b=(Pictures(det=("bus", "auto")), ["det"], {"det": {"auto": "car"}}, (2, 3))
    )
    alone = found.alone("b")
    assert alone.classes == {"det": ("car", "bus")} and len(alone) == 2

    def same_boxes(a, b):
        return a.labels["det"].classes.tolist() == b.labels["det"].classes.tolist()

    for own, row in enumerate(found.rows("b")):
        assert alone.name(own) == found.name(row) and same_boxes(alone.read(own), found.read(row))


def test_the_first_images_are_of_every_set():
    found = sets_of(a=Pictures(count=12), b=Pictures(count=6), c=Pictures(count=1))
    assert found.first(None) == found.first(19) == found.first(100) == list(range(19))
    assert found.first(10) == [0, 1, 2, 3, 4, 5, 12, 13, 14, 18]  # 6.3, 3.2 and .5 of 10
    assert found.first(1) == [0, 12, 18]  # at least one of each
    assert sets_of(a=Pictures(count=12)).first(5) == [0, 1, 2, 3, 4]
    assert sets_of(a=Pictures(count=12)).first(1) == [0]


# --- slots in a batch


@pytest.mark.parametrize(
    ("slots", "weights", "expected"),
    [
        (6, [1, 1], [3, 3]),
        (7, [1, 1], [4, 3]),  # 3.5 each: the earlier
        (16, [2, 1, 1], [8, 4, 4]),
        (10, [1, 1, 1], [4, 3, 3]),
        (8, [3, 2, 2], [4, 2, 2]),  # 3.43, 2.29, 2.29: the largest remainder
        (9, [3, 2, 2], [4, 3, 2]),  # 3.86, 2.57, 2.57
        (4, [1, 100], [1, 3]),  # .04 is one all the same
        (4, [1, 1, 1, 97], [1, 1, 1, 1]),
        (5, [1, 1, 1, 97], [1, 1, 1, 2]),
        (10, [0.1, 0.2, 0.7], [1, 2, 7]),
        (3, [5], [3]),
    ],
)
def test_slots_by_weight(slots, weights, expected):
    assert shared_out(slots, weights) == expected


def drawn(sets, batch_size=8, tasks=("seg", "det"), seed=0, unlabelled=True, share=0.5, **draws):
    draws = {name: draws.get(name, Draw()) for name in sets.members}
    return pools(sets, batch_size, tasks=tasks, draws=draws, seed=seed, unlabelled=unlabelled, share=share)


def shape(found):
    return [(p.indices.tolist(), p.share, p.labelled) for p in found]


@pytest.fixture
def three():
    """Twelve images with both labels, six with masks, four without any."""
    return sets_of(a=Pictures(count=12), b=Pictures(count=6, det=()), c=Pictures(count=4, seg=(), det=()))


def test_every_batch_holds_all_sets(three):
    found = drawn(three, a=Draw(2.0))
    a, b, c = list(range(12)), list(range(12, 18)), list(range(18, 22))
    assert shape(found) == [(a, 4, True), (b, 2, True), (c, 2, False)]
    assert shape(drawn(three, unlabelled=False)) == [(a, 4, True), (b, 4, True)]
    assert shape(drawn(three, tasks=["det"])) == [(a, 3, True), (b, 3, False), (c, 2, False)]
    assert shape(drawn(three, tasks=["det"], unlabelled=False)) == [(a, 8, True)]


def test_labelled_images_of_each_set(three):
    (a1, a2, b, c) = drawn(three, a=Draw(2.0, 3))
    assert (len(a1.indices), a1.share, a1.labelled, len(a2.indices), a2.share, a2.labelled) == (
        3,
        2,
        True,
        9,
        2,
        False,
    )
    assert sorted([*a1.indices, *a2.indices]) == list(range(12)) and len(b.indices) == 6
    half = drawn(three, a=Draw(1.0, 0.5), b=Draw(1.0, 0.5))
    assert [(len(p.indices), p.labelled) for p in half] == [
        (6, True),
        (6, False),
        (3, True),
        (3, False),
        (4, False),
    ]
    assert all(12 <= i < 18 for p in half[2:4] for i in p.indices)
    assert [len(p.indices) for p in drawn(three, unlabelled=False, a=Draw(1.0, 3))] == [3, 6]


def test_numbers_that_cannot_be_met(three):
    said = said_of(drawn, three, batch_size=2)
    assert said == "train.batch_size: 2 leaves no slot for each of 3 sets (a, b, c); raise it"
    said = said_of(drawn, three, b=Draw(1.0, 7, "data.train.b.labelled"))
    assert said.startswith("data.train.b.labelled: 7 labelled images asked for, but the training set has 6")
    assert said.endswith("; this is the set 'b' with its 3 of 8 slots")
    said = said_of(drawn, three, batch_size=3, b=Draw(1.0, 2))
    assert "no slot for labelled images; change it or train.batch_size; " in said
    assert said.endswith("; this is the set 'b' with its 1 of 3 slots")
    assert said_of(drawn, sets_of(a=Pictures(count=3)), a=Draw(1.0, 4)).endswith("but the training set has 3")
    bare = sets_of(a=Pictures(), b=Pictures(det=()))
    assert "no labels for a task of this run" in said_of(
        drawn, sets_of(b=Pictures(det=())), tasks=["det"], unlabelled=False
    )
    assert len(drawn(bare, tasks=["det"], batch_size=1, unlabelled=False)) == 1


# --- the config


def scenes(root, split="train", **more):
    return {"layout": "scenes", "size": list(SIZE), "root": str(root), "split": split, "count": 12, **more}


@pytest.fixture(scope="module")
def halves(scenes_root):
    """A third with boxes, a third with masks, a third without labels."""
    set_of = lambda name, tasks, k: scenes(scenes_root, name=name, tasks=tasks, part=f"{k}/3")  # noqa: E731
    return [set_of("boxes", ["det"], 1), set_of("masks", ["seg"], 2), set_of("bare", [], 3)]


@pytest.fixture
def parsed(raw, tmp_path, halves):
    """parsed({"weight": 2}, 1) -> the config with that in the second of three sets."""

    def make(change=(), number=0, split="train"):
        plain = raw(tmp_path / "run")
        plain["data"][split] = copy.deepcopy(halves)
        plain["data"][split][number] |= dict(change)
        return configs.parse(plain, "x.yaml")

    return make


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": 0}, "weight: Input should be greater than 0 (given: 0)"),
        ({"weight": -1}, "weight: Input should be greater than 0 (given: -1)"),
        ({"weight": math.nan}, "weight: Input should be a finite number (given: nan)"),
        ({"name": "masks"}, "name: there are two sets 'masks'; name them apart"),
        ({"name": "my set"}, "name: 'my set' is no name; use letters, digits and _, and a letter first"),
        ({"name": "1"}, "name: '1' is no name; use letters, digits and _, and a letter first"),
        ({"part": "3/2"}, "part: 3/2 is no part; write e.g. 1/2 and 2/2 for the two halves"),
        ({"part": "0/2"}, "part: 0/2 is no part; write e.g. 1/2 and 2/2 for the two halves"),
        ({"part": 0.5}, "part: 0.5 is no part; write e.g. 1/2 and 2/2 for the two halves"),
        ({"tasks": "seg"}, "tasks: Input should be a list (given: 'seg')"),
        ({"rename": {"seg": None}}, "rename.seg: Input should be a mapping (given: None)"),
        (
            {"rename": {"seg": {"road": ""}}},
            "rename.seg.road: String should have at least 1 character (given: '')",
        ),
    ],
)
def test_a_wrong_value_names_the_set_by_number_and_the_key(parsed, change, said):
    number = 2  # the third: of two with one name the later is named
    assert said_of(parsed, change, number) == f"x.yaml: data.train.{number}.{said}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wieght": 2}, "data.train.masks.wieght: no such option; did you mean 'weight'?"),
        ({"taks": ["seg"]}, "data.train.masks.taks: no such option; did you mean 'tasks'?"),
        ({"cuont": 2}, "data.train.masks.cuont: no such option; did you mean 'count'?"),
        ({"layout": "scense"}, "data.train.masks: unknown data layout 'scense'; did you mean 'scenes'?"),
        ({"layout": None}, "data.train.masks: needs layout; known: "),
    ],
)
def test_a_typo_is_told_before_data_is_read(parsed, change, said):
    assert said_of(build.check, parsed(change, 1)).startswith(said)


SCENES = "it labels seg, det, drivable, lane, depth, weather"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ["sge"]}, f"data.train.masks.tasks: the set has no 'sge'; {SCENES}"),
        ({"rename": {"sge": {}}}, f"data.train.masks.rename: the set has no 'sge'; {SCENES}"),
        ({"classes": {"sge": ["car"]}}, f"data.train.masks.classes: the set has no 'sge'; {SCENES}"),
        (
            {"labels": {"sge": "x"}},
            "data.train.masks.labels: the set has no label 'sge'; did you mean 'seg'?",
        ),
    ],
)
def test_a_typo_in_a_label_is_told_before_an_image_is_read(parsed, change, said, monkeypatch):
    """Which labels a set has, only its layout knows."""
    monkeypatch.setattr(Scenes, "read", lambda *_: pytest.fail("an image was read"))
    assert said_of(recipe, parsed(change, 1)) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "data.train: List should have at least 1 item after validation, not 0 (given: [])"),
        ([["a"]], "data.train.0: Input should be a mapping (given: ['a'])"),
        (["scenes"], "data.train.0: Input should be a mapping (given: 'scenes')"),
        ("scenes", "data.train: Input should be a mapping (given: 'scenes')"),
        (None, "data.train: Input should be a mapping (given: None)"),
    ],
)
def test_what_is_no_set(value, said):
    assert said_of(configs.parse, {"data": {"train": value}}, "x.yaml") == f"x.yaml: {said}"


def test_faults_of_several_sets_are_told_at_once(raw, halves):
    sets = [halves[0] | {"weight": 0, "part": "x"}, halves[1] | {"weight": "much"}]
    lines = said_of(configs.parse, {"data": {"train": sets}}, "x.yaml").splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "data.train.0.weight",
        "data.train.0.part",
        "data.train.1.weight",
    ]


def test_what_belongs_to_training_is_refused_in_validation(parsed):
    for key in ("weight", "labelled"):
        said = said_of(parsed, {key: 2}, 1, "val")
        assert said == f"x.yaml: data.val.1.{key}: belongs to training; leave it out of data.val"
    said = said_of(configs.parse, {"data": {"val": {"layout": "scenes", "weight": 2}}}, "x.yaml")
    assert said == "x.yaml: data.val.weight: belongs to training; leave it out of data.val"
    said = said_of(build.check, parsed({"wieght": 2}, 1, "val"))
    assert (
        said.startswith("data.val.masks.wieght: no such option; known: ")
        and "weight" not in said.split("known")[1]
    )


def test_both_forms_and_the_names_of_sets(raw, tmp_path, halves):
    plain = raw(tmp_path / "run")
    found = configs.parse(plain, "x").data.sets("train")
    assert (
        list(found) == ["scenes"]
        and found["scenes"].weight == 1
        and found["scenes"].layout == plain["data"]["train"]
    )
    plain["data"]["train"] = plain["data"]["train"] | {"name": "mine", "tasks": ["seg"], "weight": 3}
    config = configs.parse(plain, "x")
    assert (
        config.data.sets("train")["mine"].tasks == ("seg",)
        and "tasks" not in config.data.sets("train")["mine"].layout
    )
    assert build.set_key_path(config, "train", "mine") == "data.train"
    plain["data"]["train"] = [
        *halves[:2],
        scenes("r"),
        scenes("s"),
        {"layout": "images", "folder": "f", "name": None},
    ]
    config = configs.parse(plain, "x")
    assert list(config.data.sets("train")) == ["boxes", "masks", "scenes2", "scenes3", "images4"]
    assert build.set_key_path(config, "train", "scenes2") == "data.train.scenes2"
    assert list(config.data.sets("val")) == ["scenes"]


def test_no_layout_has_an_option_that_means_something_else_to_a_set():
    for name in LAYOUTS.names():
        shared = set(options_of(LAYOUTS.get(name, ""))) & set(configs.DataSet.model_fields)
        assert shared <= set(configs.SHARED_KEYS)


def test_a_key_of_set_and_layout_is_the_sets_where_it_is_a_mapping():
    for key, text, mapping in (("labels", "labelTrainIds", {"seg": "road"}),):
        given = {"layout": "cityscapes", key: text}
        of_layout, of_set = (
            configs.parse({"data": {"train": given | {key: value}}}, "x") for value in (text, mapping)
        )
        assert of_layout.data.sets("train")["cityscapes"].layout == given
        assert of_set.data.sets("train")["cityscapes"].layout == {"layout": "cityscapes"}
        assert getattr(of_layout.data.sets("train")["cityscapes"], key) == {}
        assert list(getattr(of_set.data.sets("train")["cityscapes"], key)) == list(mapping)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": "drivable"}, "labels: needs a mapping, not 'drivable'; write labels: {<label>: <task>}"),
        ({"labels": None}, "labels: needs a mapping, not None; write labels: {<label>: <task>}"),
    ],
)
def test_what_should_be_a_mapping_by_task(parsed, change, said):
    assert said_of(build.check, parsed(change, 1)) == f"data.train.masks.{said}"


@pytest.fixture
def written(raw, tmp_path, halves):
    plain = raw(tmp_path / "run")
    plain["data"]["train"] = [*copy.deepcopy(halves), scenes("r")]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    return tmp_path / "x.yaml"


def test_overrides_by_name_and_number(written):
    read = lambda *overrides: configs.load(written, overrides).data.sets("train")  # noqa: E731
    for which in ("masks", "1"):
        found = read(f"data.train.{which}.weight=2.5", f"data.train.{which}.count=7")
        assert [s.weight for s in found.values()] == [1, 2.5, 1, 1]
        assert found["masks"].layout["count"] == 7 and found["boxes"].layout["count"] == 12
    assert (
        read("data.train.scenes3.part=1/2")["scenes3"].part == "1/2"
    )  # the name that logs and messages give it
    assert read("data.train.masks.rename.seg.road=street")["masks"].rename == {"seg": {"road": "street"}}
    assert list(read("data.train.0.name=frames")) == ["frames", "masks", "bare", "scenes3"]


def test_a_new_layout_keeps_what_is_said_of_the_set(written):
    found = configs.load(written, ["data.train.masks.rename.seg.road=x", "data.train.masks.weight=2"])
    assert found.data.sets("train")["masks"].rename
    overrides = ["data.train.masks.layout=images", "data.train.masks.folder=f", "data.train.masks.weight=2"]
    masks = configs.load(written, overrides).data.sets("train")["masks"]
    assert (masks.weight, masks.part, masks.tasks, masks.rename) == (2, "2/3", ("seg",), {})
    assert masks.layout == {"layout": "images", "folder": "f"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train.maks.weight=2", "there is no 'maks' in the list; did you mean 'masks'?"),
        ("data.train.4.weight=2", "there is no '4' in the list; known: bare, boxes, masks, scenes3"),
        ("data.train.weight=2", "'train' is a list; write which of it, by name or number, and the key"),
        ("data.train.masks=2", "'train' is a list; write which of it, by name or number, and the key"),
        ("model.strides.0=2", "'strides' is a value, not a section"),
        ("model.strides.0.x=2", "'strides' is a value, not a section"),
    ],
)
def test_overrides_that_meet_no_set(written, override, said):
    assert said_of(configs.load, written, [override]) == f"override '{override}': {said}"


def test_dump_and_load_give_the_same_sets(written, tmp_path):
    found = configs.load(written, ["data.train.masks.weight=2", "data.train.1.rename.seg.road=null"])
    (tmp_path / "again.yaml").write_text(configs.dump(found), encoding="utf-8")
    again = configs.load(tmp_path / "again.yaml")
    assert again == found and configs.dump(again) == configs.dump(found)
    assert again.data.sets("train")["masks"].rename == {"seg": {"road": None}}
    assert differences(configs.dump(found), configs.dump(again)) == ""


def test_base_files(written, tmp_path):
    def top(given):
        (tmp_path / "top.yaml").write_text(
            yaml.safe_dump({"base": "x.yaml", "data": {"train": given}}), encoding="utf-8"
        )
        return configs.load(tmp_path / "top.yaml").data

    assert list(top([scenes("r", name="only")]).sets("train")) == ["only"]  # a list replaces a list
    assert top(scenes("r")).train == scenes("r")  # and one set a list
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump({"data": {"train": scenes("r", tasks=["seg"], weight=2)}}), encoding="utf-8"
    )
    assert top([scenes("s")]).train == [scenes("s")]
    assert top({"count": 3}).train == scenes("r", tasks=["seg"], weight=2) | {"count": 3}
    assert top({"layout": "images", "folder": "f"}).train == {
        "layout": "images",
        "folder": "f",
        "tasks": ["seg"],
        "weight": 2,
    }


# --- a run is built


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setitem(LAYOUTS._entries, "pictures", Pictures)


@pytest.fixture
def recipe_of(raw, tmp_path, pictures):
    """recipe_of([...], {"data.unlabelled": False}) -> the recipe of these training sets."""

    def make(train_sets, changes=(), val=None):
        plain = raw(tmp_path / "run", changes)
        plain["data"]["train"] = train_sets
        plain["data"]["val"] = val or {"layout": "pictures"}
        return recipe(configs.parse(plain, "x.yaml"))

    return make


SEG, DET = {"layout": "pictures", "tasks": ["seg"]}, {"layout": "pictures", "tasks": ["det"]}
BARE = {"layout": "pictures", "tasks": [], "name": "bare"}


def test_errors_of_the_data_name_the_set(recipe_of):
    said = said_of(recipe_of, [SEG, DET | {"det": ["car"], "name": "b"}, DET])
    assert said.startswith(
        "data.train.b: its classes of 'det' are not those of data.train.pictures2: it lacks ['bus']. "
    )
    assert said_of(recipe_of, SEG | {"rename": {"seg": {"raod": "x"}}}).startswith(
        "data.train.rename.seg: the set has no class"
    )
    said = said_of(recipe_of, SEG)
    assert said.startswith(
        "tasks.det: the training data has no labels for it; it has seg. "
    ) and said.endswith("data.classes.det")
    said = said_of(recipe_of, [SEG | {"rename": {"seg": {"road": None}}}, DET])
    assert said == "data.val: the classes of 'seg' differ: has ['road'] besides; rename them as in data.train"
    said = said_of(recipe_of, [SEG | {"labelled": 7}, DET])
    assert said.startswith(
        "data.train.pictures0.labelled: 7 labelled images asked for, but the training set has 6"
    )
    assert said_of(recipe_of, {"layout": "pictures", "labelled": 7}).startswith("data.train.labelled: 7 ")
    said = said_of(recipe_of, {"layout": "pictures"}, {"data.labelled": 7})
    assert said == "data.labelled: 7 labelled images asked for, but the training set has 6"


def test_images_without_labels_need_a_teacher(recipe_of):
    said = said_of(recipe_of, [SEG, DET, BARE])
    assert (
        said
        == "data.unlabelled: without a teacher nothing learns from unlabelled images (the set 'bare'); set it to false"
    )
    run = recipe_of([SEG, DET, BARE], {"data.unlabelled": False})
    assert [p.share for p in run.pools] == [2, 2] and sets_lines(run)[2] == "set bare: left out"
    said = said_of(recipe_of, [SEG, DET, BARE | {"labelled": 2}], {"data.unlabelled": False})
    assert said == "data.train.bare.labelled: the set has no labels for a task of this run; leave it out"
    said = said_of(recipe_of, {"layout": "pictures", "tasks": []}, {"data.unlabelled": False})
    assert said.startswith("tasks.seg: the training data has no labels for it; it has none at all. ")


def test_labelled_for_all_sets_and_for_one(recipe_of):
    run = recipe_of([SEG, DET | {"labelled": 1.0}], {"data.labelled": 2, "data.unlabelled": False})
    assert [len(p.indices) for p in run.pools] == [2, 6]


def test_weights_of_the_config_are_used(recipe_of):
    run = recipe_of([SEG | {"weight": 3}, DET], {"train.batch_size": 8})
    assert [p.share for p in run.pools] == [6, 2]
    lines = [
        "set pictures0: 6 with seg; 6 slots of every batch",
        "set pictures1: 6 with det; 2 slots of every batch",
    ]
    assert sets_lines(run) == lines


def test_validation_is_in_the_classes_of_training(recipe_of):
    run = recipe_of([SEG, DET], val={"layout": "pictures", "seg": ["car", "road"]})
    assert (
        run.val_layout.classes == run.train_layout.classes == {"seg": ("road", "car"), "det": ("car", "bus")}
    )
    assert run.val_layout.read(0).labels["seg"][0, :2].tolist() == [1, 0]


def test_evaluation_while_training_sees_every_validation_set(recipe_of):
    run = recipe_of([SEG, DET], {"eval.images": 3}, val=[SEG, DET])
    seen = [index for batch, _ in run.val_batches() for index in batch.indices.tolist()]
    assert seen == [0, 1, 6]  # 1.5 of each: the earlier has two
    assert [t.index for batch, _ in run.val_batches(2) for t in batch.truths] == [0, 6]


def batches_of(run, stop=3, workers=0):
    return [batch for batch, _ in run._batches(0, stop, workers)]


def assert_same(a, b):
    assert a.images.equal(b.images) and a.indices.equal(b.indices) and a.targets.keys() == b.targets.keys()
    for task in a.targets:
        for key, value in a.targets[task].items():
            assert value.equal(b.targets[task][key]), (task, key)


@pytest.mark.parametrize("labelled", [None, 5])
def test_one_set_gives_the_batches_of_its_layout(raw, tmp_path, scenes_root, distilled, labelled):
    plain = raw(tmp_path / "run", {**distilled, "data.labelled": labelled})
    run = recipe(configs.parse(plain, "x"))
    plain["data"]["train"] = [plain["data"]["train"]]
    listed = recipe(configs.parse(plain, "x"))
    options = {k: v for k, v in plain["data"]["train"][0].items() if k != "layout"}
    chosen = pools_of_set(12, 4, labelled=labelled, seed=0, unlabelled=True, share=0.5)
    transform = TrainTransform(SIZE, SEG_DET, **run.config.data.augment.model_dump())
    data = TrainSet(Scenes(**options), transform, 0, pools=chosen, skip_errors=False)
    packings = {name: Packing(kind, len(run.tasks[name].classes)) for name, kind in SEG_DET.items()}
    by_hand = train_loader(data, BatchStream(chosen, 0, 0, 4), packings, workers=0, pin=False)
    for own, other, (expected, _) in zip(batches_of(run, 4), batches_of(listed, 4), by_hand, strict=True):
        assert_same(own, expected)
        assert_same(other, expected)
    assert listed.student.state_dict().keys() == run.student.state_dict().keys()


def test_a_broken_image_is_replaced_within_its_set(recipe_of):
    broken = [SEG | {"broken": [5], "grey": 0}, DET | {"broken": [0, 5], "grey": 100}]
    run = recipe_of(
        broken,
        {"data.on_error": "skip", "train.batch_size": 12, "data.augment": {"flip": 0, "brightness": 0}},
    )
    ((batch, messages),) = run._batches(0, 1, 0)
    # image 5 of the first set gives way to its image 0, images 0 and 5 of the second to its image 1
    first, second = batch.indices[:6].tolist(), batch.indices[6:].tolist()
    assert (sorted(first), sorted(second)) == ([0, 0, 1, 2, 3, 4], [7, 7, 7, 8, 9, 10])
    assert sorted(messages) == [
        "0/5.png: cannot be decoded",
        "100/0.png: cannot be decoded",
        "100/5.png: cannot be decoded",
    ]
    assert batch.targets["seg"]["labelled"].tolist() == [i < 6 for i in batch.indices.tolist()]


def test_unlabelled_images_are_those_that_lack_what_is_taught(raw, tmp_path, halves, distilled):
    plain = raw(tmp_path / "run", distilled)
    plain["data"]["train"] = halves
    run = recipe(configs.parse(plain, "x"))
    assert run.unlabelled(100) == list(range(12))  # all of them lack one label at least
    assert run.unlabelled(3) == [0, 5, 11]
    plain["tasks"]["det"]["alpha"] = 0
    run = recipe(configs.parse(plain, "x"))
    assert run.unlabelled(100) == [0, 1, 2, 3, 8, 9, 10, 11]  # masks are taught: the second third has them


def test_every_set_is_described_for_itself(parsed):
    found = layouts_of(parsed())
    assert list(found) == ["data.train.boxes", "data.train.masks", "data.train.bare", "data.val"]
    assert [len(layout) for layout in found.values()] == [4, 4, 4, 5]
    assert [list(layout.classes) for layout in found.values()] == [
        ["det"], ["seg"], [], ["seg", "det", "drivable", "lane", "depth", "weather"],
    ]  # fmt: skip


# --- the same augmented image, larger, for teachers


STILL = {
    "flip": 0.0,
    "scale": (1, 1),
    "translate": 0.0,
    "rotate": 0.0,
    "brightness": 0.0,
    "color": 0.0,
    "min_visible": 0.2,
}


@pytest.fixture(scope="module")
def smooth():
    """A picture [96,128,3] without edges: what resampling alone changes of it is below two levels of 255."""
    y, x = np.mgrid[0:96, 0:128] / 20
    waves = [np.sin(x + k) + np.cos(1.3 * y - x / 2 + k) for k in range(3)]
    return (127 + 55 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"flip": 0.5},
        {"scale": (0.6, 1.6)},
        {"translate": 0.2},
        {"rotate": 30.0},
        {"brightness": 0.4, "color": 0.3},
        {
            "flip": 0.5,
            "scale": (0.7, 1.4),
            "translate": 0.1,
            "rotate": 10.0,
            "brightness": 0.25,
            "color": 0.15,
        },
    ],
    ids=["still", "flip", "zoom", "shift", "rotation", "colour", "all"],
)
def test_the_larger_image_is_the_same_picture(smooth, change):
    class One(Pictures):
        def read(self, index):
            boxes = BoxLabels(np.array([[4, 4, 60, 60]], np.float32), np.array([0]))
            return Sample(smooth, {"seg": np.zeros(smooth.shape[:2], np.uint8), "det": boxes})

    sizes = (SIZE, (96, 128), (72, 96))
    small, *large = (TrainTransform(size, SEG_DET, **STILL | change) for size in sizes)
    chosen = pools_of_set(3, 3, labelled=None, seed=0, unlabelled=True, share=0.5)
    data = TrainSet(One(count=3), small, 0, pools=chosen, skip_errors=False, others=large)
    loaded = train_loader(
        data,
        BatchStream(chosen, 0, 0, 4),
        {n: Packing(k, 2) for n, k in SEG_DET.items()},
        workers=0,
        pin=False,
    )
    seen = []
    for batch, _ in loaded:
        assert list(batch.teacher_images) == [(96, 128), (72, 96)]
        for size, others in batch.teacher_images.items():
            assert others.shape == (3, 3, *size) and others.dtype == torch.uint8
            for other, image in zip(others, batch.images, strict=True):
                own = np.ascontiguousarray(image.permute(1, 2, 0).numpy()).astype(float)
                shrunk = cv2.resize(
                    np.ascontiguousarray(other.permute(1, 2, 0).numpy()),
                    SIZE[::-1],
                    interpolation=cv2.INTER_AREA,
                )
                seen.append((np.abs(shrunk - own).mean(), np.abs(shrunk[:, ::-1] - own).mean(), own))
    # 2.5 of 255 levels: resampling, and where a border is grey within one pixel. A shift is in whole pixels
    # of each size, so that the two may be a pixel of the smaller apart: 5. A picture that moved otherwise is
    # off by far more.
    assert max(same for same, _, _ in seen) < (5 if "translate" in change else 2.5)
    assert min(other for _, other, _ in seen) > 20
    apart = max(np.abs(a - b).mean() for _, _, a in seen for _, _, b in seen)
    assert apart > 10 or not change  # and they do move


def test_a_teacher_with_a_larger_input_is_shown_the_larger_image(raw, tmp_path, distilled):
    run = recipe(
        configs.parse(raw(tmp_path / "run", {**distilled, "teacher.input": {"size": [96, 128]}}), "x")
    )
    batch = run.first_batch()
    assert {size: tuple(images.shape) for size, images in batch.teacher_images.items()} == {
        (96, 128): (4, 3, 96, 128)
    }
    shrunk = torch.nn.functional.avg_pool2d(batch.to(run.device).teacher_images[96, 128], 2)
    assert (
        shrunk - batch.to(run.device).images
    ).abs().mean() < 0.02  # the scenes are 48x64: only resampling is between them
    assert not recipe(configs.parse(raw(tmp_path / "run", distilled), "x")).first_batch().teacher_images


# --- training


@pytest.fixture(scope="module")
def mixed(tiny, distilled, halves):
    """mixed(folder, changes, sets): a run on boxes alone, masks alone and images without labels, all taught."""

    def make(folder, changes=(), sets=halves):
        plain = {
            **distilled,
            "train.batch_size": 6,
            "train.log_every": 1,
            "eval.pictures": 0,
            "train.check": False,
        }
        return tiny(folder, {**plain, **dict(changes), "data.train": sets})

    return make


@pytest.fixture
def step(mixed, tmp_path):
    """The first batch and what a step finds in it: (run, batch, StepResult)."""
    run, _ = prepare(build.resolve_init(mixed(tmp_path / "run")))
    run.distiller.train()
    batch = run.first_batch().to(run.device)
    return run, batch, compute_step(run, batch, 0.0)


def rows_of(batch, low, high):
    return torch.tensor([row for row, index in enumerate(batch.indices.tolist()) if low <= index < high])


def test_hard_losses_are_those_of_the_labelled_images(step):
    run, batch, result = step
    preds, losses = result.preds, result.raw
    assert batch.targets["det"]["labelled"].tolist() == [True, True, False, False, False, False]
    assert batch.targets["seg"]["labelled"].tolist() == [False, False, True, True, False, False]
    for task, rows in (("det", rows_of(batch, 0, 4)), ("seg", rows_of(batch, 4, 8))):
        assert len(rows) == 2
        target = {key: value[rows] for key, value in batch.targets[task].items()}
        alone = run.tasks[task].losses(preds[task][rows], target, SIZE)
        for name, value in alone.items():
            assert value > 0
            torch.testing.assert_close(losses[f"{task}.hard.{name}"].detach(), value)
    # whatever is predicted on an image without a label changes nothing
    wrong = {task: pred.clone() for task, pred in preds.items()}
    wrong["det"][2:] = wrong["seg"][[0, 1, 4, 5]] = 9.0
    for task in run.tasks:
        again = run.tasks[task].losses(wrong[task], batch.targets[task], SIZE)
        for name, value in again.items():
            torch.testing.assert_close(losses[f"{task}.hard.{name}"].detach(), value)


def test_unlabelled_images_give_no_hard_gradient(step):
    run, batch, _ = step
    run.distiller.eval()  # normalised by running statistics, images do not touch each other
    labelled = batch.of(torch.arange(4))
    with_bare, without = (compute_step(run, images, 0.0) for images in (batch, labelled))
    for name in (n for n in with_bare.raw if ".hard." in n):
        torch.testing.assert_close(with_bare.raw[name], without.raw[name])
    learnt = with_bare.raw["seg.hard.ce"] + with_bare.raw["det.hard.box"]
    (grad,) = torch.autograd.grad(learnt, with_bare.shared[-1])
    assert grad[4:].abs().sum() == 0 < grad[:4].abs().sum()


def test_losses_by_set_are_those_of_its_images(step):
    run, batch, result = step
    losses = result.raw
    found = by_set(run, batch, result)
    hard = {
        name: {k.split("/")[2] for k in found if k.startswith(f"set/{name}/") and ".hard." in k}
        for name in ("boxes", "masks", "bare")
    }
    assert hard == {
        "boxes": {n for n in losses if n.startswith("det.hard.")},
        "masks": {"seg.hard.ce"},
        "bare": set(),
    }
    for name, rows in (("boxes", range(2)), ("masks", range(2, 4)), ("bare", range(4, 6))):
        rows = torch.tensor(rows)
        # one set labels a task here: its hard losses are the batch's
        assert all(found[f"set/{name}/{k}"] == pytest.approx(losses[k].item(), rel=1e-5) for k in hard[name])
        kl = run.distiller.soft["seg"](result.soft_preds["seg"][rows], result.teacher.preds["seg"][rows])
        assert found[f"set/{name}/seg.soft.kl"] == pytest.approx(kl.item(), rel=1e-5) and kl > 0
        assert found[f"set/{name}/det.soft.det_mse"] > 0
    # kl is a mean over pixels: sets of as many images add up to the batch's
    mean = sum(found[f"set/{name}/seg.soft.kl"] for name in run.train_layout.members) / 3
    assert mean == pytest.approx(losses["seg.soft.kl"].item(), rel=1e-5)
    assert run.student.training and all(not isinstance(v, torch.Tensor) for v in found.values())


@pytest.fixture(scope="module")
def trained(mixed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "run"
    loop.train(
        mixed(folder, {"train.steps": 4, "train.eval_every": 2, "data.workers": 2, "eval.pictures": 2})
    )
    return folder


def test_a_run_logs_losses_by_set(trained, read_lines):
    lines = read_lines(trained, "train")
    names = [{k for k in line if k.startswith("set/")} for line in lines]
    assert len(lines) == 4 and all(own == names[0] for own in names)
    assert {
        "set/boxes/det.hard.box",
        "set/masks/seg.hard.ce",
        "set/bare/seg.soft.kl",
        "set/bare/det.soft.det_mse",
    } <= names[0]
    assert not names[0] & {
        "set/boxes/seg.hard.ce",
        "set/masks/det.hard.box",
        "set/bare/seg.hard.ce",
        "set/bare/det.hard.box",
    }
    for line in lines:  # the meter's mean over the one step since the last line, of the one set with masks
        assert line["set/masks/seg.hard.ce"] == pytest.approx(line["raw/seg.hard.ce"], rel=1e-5)
    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    assert names[0] <= set(board.Tags()["scalars"])
    assert "teacher on unlabelled images/00" in board.Tags()["images"]


def test_one_set_has_no_losses_by_set(tiny, tmp_path, read_lines):
    loop.train(tiny(tmp_path / "run", {"train.steps": 1, "eval.pictures": 0}))
    assert not [k for line in read_lines(tmp_path / "run", "train") for k in line if k.startswith("set/")]


def test_what_a_run_says_of_its_sets(mixed, tmp_path):
    plain = mixed(tmp_path / "run", {"data.labelled": 0.5})
    run = recipe(plain.model_copy(update={"train": plain.train.model_copy(update={"batch_size": 8})}))
    assert sets_lines(run) == [
        "set boxes: 2 with det, 2 without labels; 3 slots of every batch",
        "set masks: 2 with seg, 2 without labels; 3 slots of every batch",
        "set bare: 4 without labels; 2 slots of every batch",
    ]


def test_a_resume_is_exact(mixed, trained, tmp_path, same_weights):
    changes = {
        "train.steps": 4,
        "train.eval_every": 2,
        "data.workers": 0,
        "eval.pictures": 2,
    }  # and without loader processes
    assert loop.train(mixed(tmp_path / "run", changes), judge=lambda step, metrics: True) is None
    torch.manual_seed(99)
    loop.train(mixed(tmp_path / "run", changes), resume=True)
    a, b = (checkpoint.load(folder / "last.pt", "x") for folder in (trained, tmp_path / "run"))
    same_weights(a["model"], b["model"])
    same_weights(a["resume"]["distiller"], b["resume"]["distiller"])
    assert a["metrics"] == b["metrics"] and a["labelled_images"] == 8 and a["unlabelled_images"] == 4


def test_a_resume_with_other_sets_is_refused(mixed, trained, halves):
    other = [halves[0] | {"weight": 2}, *halves[1:]]
    changes = {"train.steps": 4, "train.eval_every": 2, "eval.pictures": 2}
    assert "data.train was" in said_of(loop.train, mixed(trained, changes, other), resume=True)


def test_loader_processes_change_nothing(mixed, tmp_path):
    run = recipe(mixed(tmp_path / "run", {"data.labelled": 0.5, "train.batch_size": 8}))
    for alone, shared in zip(batches_of(run, 4), batches_of(run, 4, workers=2), strict=True):
        assert_same(alone, shared)


def test_each_task_is_measured_on_the_images_that_have_labels_for_it(tiny, tmp_path, scenes_root):
    boxes, masks = (
        scenes(scenes_root, "val", name=n, tasks=[t], part=p)
        for n, t, p in (("b", "det", "1/3"), ("m", "seg", "2/3"))
    )

    def metrics(val):
        torch.manual_seed(0)  # the same random network each time
        run = recipe(tiny(tmp_path / "run", {"data.val": val}))
        return loop.evaluate_run(run, run.student)

    both = metrics([boxes, masks])
    only_boxes = metrics([boxes, masks | {"part": "3/3"}])
    only_masks = metrics([boxes | {"part": "3/3"}, masks])
    whole = metrics(
        [
            scenes(scenes_root, "val", name="b", part="1/3"),
            scenes(scenes_root, "val", name="m", tasks=[], part="2/3"),
        ]
    )
    assert both["images"] == 8 and both["seg"]["mIoU"] > 0
    assert (
        both["det"] == only_boxes["det"] == whole["det"] and both["seg"] == only_masks["seg"] != whole["seg"]
    )
