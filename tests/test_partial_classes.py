"""Sets that label only some classes of a task, tasks without labels, and what layouts call their labels."""

import logging

import numpy as np
import pytest
import torch

from multitask_kd import build, checkpoint
from multitask_kd import config as configs
from multitask_kd.batch import IGNORE
from multitask_kd.build.data import tell_unseen
from multitask_kd.data.base import LAYOUTS, Layout, Sample
from multitask_kd.data.labels import BoxLabels
from multitask_kd.data.loader import EvalSet
from multitask_kd.data.sets import Member, Sets
from multitask_kd.engine.evaluate import evaluate_checkpoint
from multitask_kd.engine.run import build_run
from multitask_kd.engine.step import compute_step
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError
from multitask_kd.tasks.base import KINDS

SIZE = (48, 64)
KIND_OF = {
    "seg": "semantic",
    "lane": "semantic",
    "det": "detection",
    "weather": "classification",
    "metres": "depth",
}


class Labels(Layout):
    """Images in memory, each of a grey of its own, with one object of every class of a label.

    The masks (seg, lane) have every class in a column of 8 pixels, box k of det is of class k and a crowd
    where k is odd, weather is the image's number modulo its classes, metres 3 everywhere. ``never`` are
    classes of det that are in the list of classes alone.
    """

    def __init__(
        self, *, count=4, grey=0, never=(), seg=None, lane=None, det=None, weather=None, metres=None
    ):
        super().__init__()
        self.count, self.grey, self.never = count, grey, tuple(never)
        given = {"seg": seg, "lane": lane, "det": det, "weather": weather, "metres": metres}
        for label, classes in given.items():
            if classes is not None:
                self.add_label(label, KIND_OF[label], classes)
        if "det" in self.classes:
            self.seen["det"] = np.array(
                [0 if name in never else count for name in self.classes["det"]], np.int64
            )

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{self.grey}/{index}.png"

    def read(self, index):
        self._check_index(index)
        makers = {
            "seg": self._mask,
            "lane": self._mask,
            "det": self._boxes,
            "weather": self._value,
            "metres": self._depth,
        }
        labels = {
            label: makers[label](self.classes[label], index) for label in self.classes if self.gives(label)
        }
        return Sample(np.full((*SIZE, 3), self.grey + index, np.uint8), labels)

    def _mask(self, classes, index):
        mask = np.full(SIZE, IGNORE, np.uint8)
        for k in range(len(classes)):
            mask[:, 8 * k : 8 * k + 8] = k
        return mask

    def _boxes(self, classes, index):
        there = np.array([k for k, name in enumerate(classes) if name not in self.never])
        boxes = np.array([[10 * k, 4, 10 * k + 20, 30] for k in there], np.float32)
        return BoxLabels(boxes, there, there % 2 == 1, 100 + there.astype(np.float32))

    def _value(self, classes, index):
        return index % len(classes)

    def _depth(self, classes, index):
        return np.full(SIZE, 3, np.float32)


def member(layout, name="x", *, tasks=None, labels=None, **more):
    labels = labels or {}
    label_of = {task: label for label, task in labels.items()}
    own = [labels.get(label, label) for label in layout.classes] if tasks is None else tasks
    return Member(layout, f"data.train.{name}", own, labels=label_of, **more)


def sets_of(*, order=None, classes=None, kinds=KIND_OF, **members):
    kinds = {task: KINDS.get(kind, "x") for task, kind in kinds.items()}
    made = {name: member(m[0], name, **m[1]) for name, m in members.items()}
    return Sets(made, order, kinds=kinds, classes=classes)


def det(*names, never=(), grey=0):
    return Labels(det=names, never=never, grey=grey)


def only(task="det", *names):
    return {"classes": {task: list(names)}}


def said_of(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return str(error.value)


# --- which classes a set labels


def test_one_set_labels_cars_and_another_persons():
    """Annotation tools write the same list of categories into every file."""
    names = ("car", "person")
    a, b = det(*names, never=["person"]), det(*names, never=["car"], grey=100)
    found = sets_of(a=(a, only("det", "car")), b=(b, only("det", "person")))
    assert found.classes == {"det": ("car", "person")}
    assert found.known("a", "det").tolist() == [True, False] and found.known("b", "det").tolist() == [
        False,
        True,
    ]
    first, second = found.read(0), found.read(4)
    assert first.labels["det"].classes.tolist() == [0] and second.labels["det"].classes.tolist() == [1]
    assert first.known["det"].tolist() == [True, False] and second.known["det"].tolist() == [False, True]
    assert second.image[0, 0, 0] == 100


@pytest.mark.parametrize(
    ("order", "classes", "expected"),
    [
        (None, None, ("car", "bus", "tram", "person")),  # as they come
        ({"det": ("tram", "person", "bus", "car")}, None, ("tram", "person", "bus", "car")),
        (
            {"det": ("tram", "person")},
            None,
            ("car", "bus", "tram", "person"),
        ),  # of other classes: no order of these
        (None, {"det": ("person", "tram", "bus", "car")}, ("person", "tram", "bus", "car")),
        (
            {"det": ("tram", "person", "bus", "car")},
            {"det": ("person", "tram", "bus", "car")},
            ("person", "tram", "bus", "car"),
        ),
    ],
)
def test_the_run_has_all_classes_that_any_set_labels(order, classes, expected):
    found = sets_of(
        order=order,
        classes=classes,
        a=(det("car", "bus"), only("det", "car", "bus")),
        b=(det("tram", "bus", "person"), only("det", "tram", "person")),
    )
    assert found.classes == {"det": expected}
    by_name = lambda sample: [expected[k] for k in sample.labels["det"].classes]  # noqa: E731
    assert by_name(found.read(0)) == ["car", "bus"]
    assert by_name(found.read(4)) == ["tram", "person"]  # its bus is not labelled by what it says
    known = dict(zip(expected, found.known("b", "det").tolist(), strict=True))
    assert known == {"car": False, "bus": False, "tram": True, "person": True}


def test_a_set_that_says_nothing_labels_all_that_it_names():
    found = sets_of(a=(det("car", "person"), only("det", "car")), b=(det("person", "car"), {}))
    assert found.known("a", "det").tolist() == [True, False] and found.known("b", "det") is None
    assert found.read(4).labels["det"].classes.tolist() == [1, 0] and found.read(4).known == {}


def test_a_set_that_lacks_classes_and_does_not_say_so_is_refused():
    three = {
        "a": (det("car", "bus"), {}),
        "b": (det("person"), only("det", "person")),
        "c": (det("bus", "person"), {}),
    }
    assert said_of(sets_of, **three) == (
        "data.train.a: its classes of 'det' are not those of data.train.b and data.train.c together: "
        "it lacks ['person']. What a set does not label would be taught as background there: say which "
        "classes it labels (data.train.a.classes.det: [car, bus]), make them the same with rename, or take "
        "'det' out of the set's tasks"
    )
    three["a"] = (three["a"][0], only("det", "car", "bus"))  # as it says
    said = said_of(sets_of, **three)
    assert said.startswith(
        "data.train.c: its classes of 'det' are not those of data.train.a and data.train.b together"
    )
    assert "it lacks ['car']. " in said and "(data.train.c.classes.det: [bus, person])" in said
    three["c"] = (three["c"][0], only("det", "bus", "person"))
    assert sets_of(**three).classes == {"det": ("car", "bus", "person")}


def test_a_set_with_other_classes_than_the_config_names():
    said = said_of(sets_of, classes={"det": ("car", "person")}, a=(det("car", "tram"), {}))
    assert said.startswith(
        "data.train.a: its classes of 'det' are not the run's (car, person): it lacks ['person']; has ['tram"
    )
    assert "(data.train.a.classes.det: [car])" in said
    found = sets_of(classes={"det": ("car", "person")}, a=(det("car", "tram"), only("det", "car")))
    assert found.classes == {"det": ("car", "person")} and found.read(0).labels["det"].classes.tolist() == [0]
    assert found.read(0).known["det"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            only("det", "car", "cra"),
            "data.train.a.classes.det: the set has no class 'cra'; did you mean 'car'?",
        ),
        (only("det", "tram"), "data.train.a.classes.det: the set has no class 'tram'; known: bus, car"),
        (only("det"), "data.train.a.classes.det: names no class; leave 'det' out of the set's tasks instead"),
        (only("seg", "car"), "data.train.a.classes: the set has no 'seg'; it labels det"),
        (
            only("det", "car") | {"tasks": []},
            "data.train.a.classes.det: 'det' is not among the set's tasks; leave it out",
        ),
        (
            only("det", "bus") | {"rename": {"det": {"bus": None}}},
            "data.train.a.classes.det: the set has no class 'bus'; known: car",
        ),
        (
            only("det", "car") | {"rename": {"det": {"car": "auto"}}},
            "data.train.a.classes.det: the set has no class 'car'; known: auto, bus",
        ),
    ],
)
def test_classes_that_a_set_does_not_have(given, said):
    assert said_of(sets_of, a=(det("car", "bus"), given)) == said


def test_a_class_that_the_config_does_not_name():
    said = said_of(sets_of, classes={"det": ("car",)}, a=(det("car", "bus"), only("det", "car", "bus")))
    assert said == (
        "data.train.a.classes.det: 'bus' is not among the run's classes (car); leave it out, or name all of "
        "them in data.classes.det"
    )


def test_classes_are_named_as_the_run_calls_them():
    rename = {"det": {"auto": "car", "van": "car", "tree": None, "ped": "person"}}
    a = det("auto", "tree", "van", "ped")
    found = sets_of(a=(a, {"rename": rename, "classes": {"det": ["car"]}}), b=(det("car", "person"), {}))
    assert found.classes == {"det": ("car", "person")}
    label = found.read(0).labels["det"]
    assert label.classes.tolist() == [0, 0] and label.boxes[:, 0].tolist() == [0, 20]  # of auto and van
    assert label.area.tolist() == [100, 102] and label.crowd.tolist() == [False, False]
    assert found.read(0).known["det"].tolist() == [True, False]


def test_a_set_that_names_all_its_classes_is_whole():
    class Kept(Labels):
        def read(self, index):
            self.last = super().read(index)
            return self.last

    kept = Kept(det=("car", "bus"))
    found = sets_of(a=(kept, only("det", "bus", "car")), b=(det("bus", "car"), {}))
    assert found.classes == {"det": ("bus", "car")}  # as the first set says them
    assert found.known("a", "det") is None and found.read(0).known == {}
    alone = sets_of(a=(kept, only("det", "car", "bus")))
    assert alone.known("a", "det") is None and alone.read(1) is kept.last


# --- what is left of the labels


def test_pixels_that_a_set_does_not_decide_are_ignored():
    """A pixel that is not labelled as the one class may be of any of those that the set does not label."""
    names = ("sky", "road", "car")
    a, b = (Labels(seg=names), only("seg", "car")), (Labels(seg=names), only("seg", "sky", "road"))
    found = sets_of(classes={"seg": names}, a=a, b=b)
    first, second = found.read(0), found.read(4)
    assert first.labels["seg"][0, ::8].tolist() == [IGNORE, IGNORE, 2] + [IGNORE] * 5
    assert second.labels["seg"][0, ::8].tolist() == [0, 1] + [IGNORE] * 6
    assert first.labels["seg"].dtype == np.uint8
    assert first.known["seg"].tolist() == [False, False, True] and second.known["seg"].tolist() == [
        True,
        True,
        False,
    ]


def test_boxes_and_crowds_of_other_classes_are_dropped():
    names = ("car", "bus", "person", "tram")
    found = sets_of(
        classes={"det": names}, a=(det(*names), only("det", "bus", "person")), b=(det(*names), {})
    )
    label = found.read(0).labels["det"]
    assert label.classes.tolist() == [1, 2] and label.crowd.tolist() == [True, False]
    assert label.boxes[:, 0].tolist() == [10, 20] and label.area.tolist() == [101, 102]
    nothing = sets_of(a=(det(*names, never=["bus"]), only("det", "bus")), b=(det(*names), {})).read(0)
    assert len(nothing.labels["det"]) == 0 and nothing.known["det"].tolist() == [
        True,
        False,
        False,
        False,
    ]  # bus comes first


def test_an_image_of_another_class_is_not_labelled():
    weather = ("dry", "rain", "snow")
    a = (Labels(weather=weather, count=3), only("weather", "rain"))
    found = sets_of(classes={"weather": weather}, a=a, b=(Labels(weather=weather), {}))
    assert [found.read(i).labels.get("weather") for i in range(3)] == [None, 1, None]
    assert [found.read(3 + i).labels["weather"] for i in range(4)] == [0, 1, 2, 0]


def test_a_label_without_classes_passes_through():
    both = Labels(metres=(), det=("car", "bus"))
    found = sets_of(a=(both, only("det", "car")), b=(Labels(metres=()), {}), c=(det("car", "bus"), {}))
    assert found.classes == {"metres": (), "det": ("car", "bus")} and list(found.read(0).known) == ["det"]
    assert (found.read(0).labels["metres"] == 3).all() and (found.read(4).labels["metres"] == 3).all()
    said = said_of(sets_of, a=(Labels(metres=()), only("metres", "far")))
    assert said.startswith("data.train.a.classes.metres: the set has no class 'far'")


def test_each_task_has_its_own_classes():
    a = Labels(seg=("sky", "road"), det=("car", "bus"))
    found = sets_of(a=(a, only("det", "car")), b=(Labels(seg=("road", "sky"), det=("bus", "car")), {}))
    assert list(found.read(0).known) == ["det"] and found.known("a", "seg") is None
    assert [found.read(i).labels["seg"][0, :16:8].tolist() for i in (0, 4)] == [[0, 1], [1, 0]]


def test_a_partial_set_alone_is_as_it_stands_there():
    names = ("car", "bus", "person")
    found = sets_of(
        classes={"det": ("person", "car", "bus")},
        a=(det(*names), only("det", "car")),
        b=(det(*names, grey=100), only("det", "person", "bus") | {"part": (1, 2)}),
    )
    alone = found.alone("b")
    assert alone.classes == {"det": ("person", "car", "bus")} and alone.known("b", "det").tolist() == [
        True,
        False,
        True,
    ]
    assert len(alone) == 2
    for own, row in enumerate(found.rows("b")):
        assert alone.name(own) == found.name(row)
        assert (
            alone.read(own).labels["det"].classes.tolist()
            == found.read(row).labels["det"].classes.tolist()
            == [2, 0]
        )
        assert alone.read(own).known["det"].tolist() == [True, False, True]


def test_truths_say_which_classes_they_are_about():
    found = sets_of(a=(det("car", "bus"), only("det", "car")), b=(det("car", "bus"), {}))
    partial, whole = (EvalSet(found, SIZE, [index], skip_errors=False)[0][1] for index in (0, 4))
    assert partial.known["det"].tolist() == [True, False] and partial.labels["det"].classes.tolist() == [0]
    assert whole.known == {} and whole.labels["det"].classes.tolist() == [0, 1]


# --- classes that never occur


def test_classes_that_never_occur_are_told_with_the_key_that_ends_it():
    names = ("car", "bus", "person")
    a, b = det(*names, never=["bus", "person"]), det(*names, never=["car"])
    found = sets_of(a=(a, {}), b=(b, {}))
    assert found.never() == [
        ("data.train.a.classes.det", ["bus", "person"]),
        ("data.train.b.classes.det", ["car"]),
    ]
    found = sets_of(a=(a, only("det", "car")), b=(b, {}))  # what it says is what helps
    assert found.never() == [("data.train.b.classes.det", ["car"])]
    assert sets_of(a=(a, only("det", "car", "bus")), b=(b, only("det", "bus", "person"))).never() == [
        ("data.train.a.classes.det", ["bus"])
    ]
    assert sets_of(a=(Labels(seg=names), {})).never() == []  # nothing is known without reading


def test_renamed_classes_are_counted_together():
    names = ("auto", "van", "tree", "ped")
    rename = {"det": {"auto": "car", "van": "car", "tree": None, "ped": "person"}}
    assert sets_of(a=(det(*names, never=["auto", "tree"]), {"rename": rename})).never() == []
    found = sets_of(a=(det(*names, never=["auto", "van", "tree"]), {"rename": rename}))
    assert found.never() == [("data.train.a.classes.det", ["car"])]


def test_masks_are_counted_where_the_layout_knows():
    layout = Labels(seg=("sky", "road"), lane=("none", "line"))
    layout.seen |= {"seg": np.array([5, 0]), "lane": np.array([0, 2])}
    ground = (layout, {"labels": {"seg": "ground"}, "tasks": ["ground"]})
    assert sets_of(a=ground, kinds=KIND_OF | {"ground": "semantic"}).never() == [
        ("data.train.a.classes.ground", ["road"])
    ]
    rename = {"seg": {"road": None}}
    assert sets_of(a=(layout, {"rename": rename})).never() == [("data.train.a.classes.lane", ["none"])]


# --- a run


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setitem(LAYOUTS._entries, "listed", Labels)


@pytest.fixture
def config_of(raw, tmp_path, listed):
    """config_of({"train": ..., "val": ...}, {"train.steps": 2}) -> a config of these sets.

    val is like train where it is not given.
    """

    def make(data, changes=(), tasks=None):
        plain = raw(tmp_path / "run", {"train.steps": 2, "eval.pictures": 0, **dict(changes)})
        plain["data"] |= {"val": data["train"], **data}
        if tasks is not None:
            plain["tasks"] = tasks
        return configs.parse(plain, "x.yaml")

    return make


def recipe(config):
    return build_run(build.resolve_init(config))


CARS = {"layout": "listed", "name": "cars", "det": ["car", "person"], "never": ["person"]}
PERSONS = {"layout": "listed", "name": "persons", "det": ["car", "person"], "never": ["car"], "grey": 100}
CARS_ONLY, PERSONS_ONLY = CARS | {"classes": {"det": ["car"]}}, PERSONS | {"classes": {"det": ["person"]}}
DET = {"det": {"head": {"strides": [8, 16], "depth": 1}}}


def test_a_run_warns_of_classes_that_never_occur(config_of, caplog):
    run = recipe(config_of({"train": [CARS, PERSONS]}, tasks=DET))
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert told == [
        f"data.train.{name}.classes.det: {lacking} never occurs in the set, so everything there is taught "
        "not to be it; if the set does not label it, say which classes of 'det' it labels with this key"
        for name, lacking in (("cars", "person"), ("persons", "car"))
    ]
    assert "known" not in run.first_batch().targets["det"]
    caplog.clear()
    recipe(config_of({"train": [CARS_ONLY, PERSONS_ONLY]}, tasks=DET))
    assert not caplog.records


def test_one_set_has_no_name_in_the_warning(config_of, caplog):
    recipe(config_of({"train": CARS}, tasks=DET))
    assert caplog.messages[0].startswith("data.train.classes.det: person never occurs in the set")


def test_a_task_that_the_run_does_not_have_is_not_told(config_of, caplog):
    config = config_of({"train": CARS | {"seg": ["a", "b"]}}, tasks={"seg": {}})
    tell_unseen(build.open_sets(config, "train", only=config.tasks))
    assert not caplog.records


def test_batches_of_partial_sets_say_what_is_labelled(config_of):
    run = recipe(
        config_of(
            {"train": [CARS_ONLY, PERSONS_ONLY]},
            {"data.augment": {"flip": 0.0, "brightness": 0.0}},
            tasks=DET,
        )
    )
    batch = run.first_batch()
    target = batch.targets["det"]
    of_cars = [index < 4 for index in batch.indices.tolist()]
    assert sorted(of_cars) == [False, False, True, True]
    assert target["known"].tolist() == [[cars, not cars] for cars in of_cars]
    assert target["classes"].tolist() == [[0] if cars else [-2] for cars in of_cars]  # the person is a crowd


def test_what_a_set_does_not_label_is_not_learnt(config_of):
    """The class logits of a class that an image's set does not label get no gradient."""
    run = recipe(config_of({"train": [CARS_ONLY, PERSONS_ONLY]}, tasks=DET))
    batch = run.first_batch().to(run.device)
    pred = run.student(batch.images).preds["det"].detach().requires_grad_()
    losses = run.tasks["det"].losses(pred, batch.targets["det"], SIZE)
    (grad,) = torch.autograd.grad(losses["class"], pred)
    for row, index in enumerate(batch.indices.tolist()):
        own, other = (5, 6) if index < 4 else (6, 5)
        assert grad[row, :, other].abs().max() == 0
        assert index >= 4 or grad[row, :, own].abs().max() > 0  # the persons are crowds


def test_partial_sets_train_and_are_measured(config_of, read_lines, tmp_path):
    val = [CARS_ONLY | {"count": 2}, PERSONS_ONLY | {"count": 2}]
    found = train(config_of({"train": [CARS_ONLY, PERSONS_ONLY], "val": val}, {"data.workers": 2}, tasks=DET))
    assert found["images"] == 4 and list(found["det"]["AP"]) == ["car", "person"]
    assert found["det"]["AP"]["car"] is not None
    line = read_lines(tmp_path / "run", "train")[-1]
    assert all(np.isfinite(line[f"raw/det.hard.{name}"]) for name in ("box", "objectness", "class"))


def test_a_validation_set_may_label_fewer_classes(config_of):
    train_set = {"layout": "listed", "det": ["car", "person"], "seg": ["sky", "road"]}
    val = {
        "layout": "listed",
        "det": ["person", "dog"],
        "seg": ["road", "sky"],
        "classes": {"det": ["person"]},
    }
    run = recipe(config_of({"train": train_set, "val": val}))
    assert (
        run.val_layout.classes
        == run.train_layout.classes
        == {"det": ("car", "person"), "seg": ("sky", "road")}
    )
    sample = run.val_layout.read(0)
    assert sample.labels["det"].classes.tolist() == [1] and sample.known["det"].tolist() == [False, True]
    assert sample.labels["seg"][0, :16:8].tolist() == [1, 0]
    undeclared = val | {"classes": {}, "det": ["person"]}
    said = said_of(recipe, config_of({"train": train_set, "val": undeclared}))
    assert said == "data.val: the classes of 'det' differ: lacks ['car']"
    mistaken = val | {"classes": {"det": ["person", "dog"]}}
    said = said_of(recipe, config_of({"train": train_set, "val": mistaken}))
    assert said.startswith("data.val.classes.det: 'dog' is not among the run's classes (car, person); leave ")


def test_only_what_the_run_uses_is_read(config_of):
    whole = {
        "layout": "listed",
        "det": ["car"],
        "seg": ["sky"],
        "lane": ["none"],
        "weather": ["dry"],
        "metres": [],
    }
    run = recipe(config_of({"train": whole}, tasks={"lane": {"kind": "semantic"}}))
    (layout,) = [m.layout for m in run.train_layout.members.values()]
    assert list(layout.read(0).labels) == ["lane"] == list(run.train_layout.read(0).labels)
    assert list(run.val_layout.read(0).labels) == ["lane"] and run.train_layout.classes == {"lane": ("none",)}


# --- what a layout calls its labels


def test_a_label_for_a_task_of_another_name(config_of):
    one = {
        "layout": "listed",
        "name": "a",
        "seg": ["other", "drivable"],
        "det": ["car"],
        "labels": {"seg": "drivable"},
    }
    two = {"layout": "listed", "name": "b", "grey": 100, "seg": ["other", "line"], "labels": {"seg": "lane"}}
    tasks = {"drivable": {"kind": "semantic"}, "lane": {"kind": "semantic"}, **DET}
    run = recipe(config_of({"train": [one, two]}, tasks=tasks))
    assert run.train_layout.classes == {
        "drivable": ("other", "drivable"),
        "det": ("car",),
        "lane": ("other", "line"),
    }
    assert list(run.train_layout.read(0).labels) == ["drivable", "det"] and list(
        run.train_layout.read(4).labels
    ) == ["lane"]
    batch = run.first_batch()
    for row, index in enumerate(batch.indices.tolist()):
        labelled = {task: bool(target["labelled"][row]) for task, target in batch.targets.items()}
        assert labelled == {"drivable": index < 4, "lane": index >= 4, "det": index < 4}
    drivable = one | {
        "tasks": ["drivable"],
        "rename": {"drivable": {"other": "rest"}},
        "classes": {"drivable": ["drivable"]},
    }
    of_both = {"data.classes": {"drivable": ["rest", "drivable"]}}
    run = recipe(config_of({"train": [drivable, two]}, of_both, tasks=tasks | {"det": None}))
    sample = run.train_layout.read(0)
    assert list(sample.labels) == ["drivable"] and sample.known["drivable"].tolist() == [False, True]
    assert sample.labels["drivable"][0, :16:8].tolist() == [IGNORE, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"labels": {"sge": "drivable"}},
            "data.train.labels: the set has no label 'sge'; did you mean 'seg'?",
        ),
        (
            {"labels": {"seg": "det"}},
            "data.train.labels: two labels would become the task 'det'; give one another name",
        ),
        (
            {"labels": {"seg": "drivable"}, "tasks": ["seg"]},
            "data.train.tasks: the set has no 'seg'; it labels drivable, det",
        ),
        (
            {"labels": {"seg": "drivable"}, "rename": {"seg": {"sky": "x"}}},
            "data.train.rename.seg: the set's label 'seg' has another name by `labels`; write "
            "data.train.rename.drivable",
        ),
        (
            {"labels": {"seg": "drivable"}, "classes": {"seg": ["sky"]}},
            "data.train.classes.seg: the set's label 'seg' has another name by `labels`; write "
            "data.train.classes.drivable",
        ),
        (
            {"labels": {"det": "seg", "seg": "det"}},
            "tasks.det.kind: detection, but the label 'seg' of data.train is of kind semantic",
        ),
    ],
)
def test_labels_that_cannot_be(config_of, change, said):
    one = {"layout": "listed", "seg": ["sky", "road"], "det": ["car"]}
    tasks = {"drivable": {"kind": "semantic"}, "seg": {}, **DET}
    assert said_of(recipe, config_of({"train": one | change}, tasks=tasks)) == said


def test_labels_of_two_kinds_for_one_task_are_refused():
    kinds = KIND_OF | {"what": "semantic"}
    both = {
        "a": (Labels(seg=("sky",)), {"labels": {"seg": "what"}}),
        "b": (det("car"), {"labels": {"det": "what"}}),
    }
    assert said_of(sets_of, kinds=kinds, **both) == (
        "data.train.b: its label 'what' is of kind detection, but another set's is semantic; give one of "
        "them another name with `labels`"
    )


# --- tasks without any label


def scenes(root, split="train", **more):
    return {"layout": "scenes", "size": list(SIZE), "root": str(root), "split": split, "count": 8, **more}


@pytest.fixture
def unlabelled_det(raw, tmp_path, scenes_root, distilled):
    """unlabelled_det({...}) -> a config whose sets label seg alone, and whose teacher knows det."""

    def make(changes=(), val=None):
        plain = raw(tmp_path / "run", {**distilled, "train.steps": 2, "eval.pictures": 1, **dict(changes)})
        plain["data"]["train"] = scenes(scenes_root, tasks=["seg"])
        plain["data"]["val"] = val or scenes(scenes_root, "val", count=5, tasks=["seg"])
        return configs.parse(plain, "x.yaml")

    return make


@pytest.fixture
def objects(teacher_run):
    """The teacher's classes of det, in its order."""
    return list(checkpoint.load(teacher_run / "best.pt", "x")["arch"]["tasks"]["det"]["classes"])


def test_a_task_without_labels_needs_its_classes(unlabelled_det):
    said = said_of(recipe, unlabelled_det())
    assert said == (
        "tasks.det: the training data has no labels for it; it has seg. A task that only a teacher knows "
        "needs its class names in data.classes.det"
    )


def test_a_task_without_labels_has_no_hard_loss(unlabelled_det, objects):
    run = recipe(unlabelled_det({"data.classes": {"det": objects[::-1]}}))
    assert run.distiller.loss_names() == ["seg.hard.ce", "seg.soft.kl", "det.soft.det_mse"]
    assert run.arch["tasks"]["det"]["classes"] == objects[::-1] and run.tasks["det"].classes == tuple(
        objects[::-1]
    )
    assert run.objective.weights_at(0.0) == {"seg.hard.ce": 1.0, "seg.soft.kl": 1.0, "det.soft.det_mse": 0.75}
    batch = run.first_batch()
    assert list(batch.targets) == ["seg"] and run.train_layout.labelled() == {"seg"}
    result = compute_step(run, batch.to(run.device), 0.0)
    assert (
        list(result.weighted) == ["seg.hard.ce", "seg.soft.kl", "det.soft.det_mse"]
        and result.raw["det.soft.det_mse"] > 0
    )
    assert run.unlabelled(100) == list(range(8))  # the teacher's boxes are all there is in them


def test_a_task_without_labels_and_without_a_teacher_is_refused(unlabelled_det, objects):
    said = said_of(recipe, unlabelled_det({"data.classes": {"det": objects}, "tasks.det": {"alpha": 0}}))
    assert said == (
        "tasks.det.alpha: 0, but no training image has a label for the task, so nothing would be learnt; "
        "raise it, or give labels"
    )


@pytest.mark.parametrize("check", [True, False])
def test_a_task_without_any_label_trains_and_ends(unlabelled_det, objects, tmp_path, read_lines, check):
    config = unlabelled_det({"data.classes": {"det": objects}, "train.check": check})
    found = train(config)
    assert found["images"] == 5 and found["seg"]["mIoU"] > 0
    assert found["det"]["mAP"] is None and set(found["det"]["AP"].values()) == {None}
    assert evaluate_checkpoint(config, str(tmp_path / "run" / "best.pt")) == found
    line = read_lines(tmp_path / "run", "train")[-1]
    assert line["raw/det.soft.det_mse"] > 0 and not any(key.startswith("raw/det.hard") for key in line)


def test_labels_of_validation_alone_measure_it(unlabelled_det, objects, scenes_root, teacher_run):
    val = scenes(scenes_root, "val", count=5)
    run = recipe(unlabelled_det({"data.classes": {"det": objects[::-1]}}, val=val))
    assert run.val_layout.classes["det"] == tuple(objects[::-1])  # the same, in the run's order
    assert train(unlabelled_det({"data.classes": {"det": objects}}, val=val))["det"]["mAP"] is not None


def test_labels_of_validation_have_the_classes_of_the_config(unlabelled_det, objects, scenes_root):
    val = scenes(scenes_root, "val", count=5)
    said = said_of(recipe, unlabelled_det({"data.classes": {"det": objects[:-1]}}, val=val))
    assert said.startswith(
        f"data.val: its classes of 'det' are not the run's ({', '.join(objects[:-1])}): it has "
    )
    few = val | {"classes": {"det": objects[:-1]}}
    run = recipe(unlabelled_det({"data.classes": {"det": objects[:-1]}}, val=few))
    assert run.val_layout.classes["det"] == tuple(objects[:-1])


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ({"det": []}, "x.yaml: data.classes.det: Tuple should have at least 1 item"),
        ({"det": "car"}, "x.yaml: data.classes.det: Input should be a list"),
        ({"det": ["car", ""]}, "x.yaml: data.classes.det.1: String should have at least 1 character"),
    ],
)
def test_what_is_no_list_of_classes(unlabelled_det, classes, said):
    assert said_of(unlabelled_det, {"data.classes": classes}).startswith(said)


def test_a_background_is_not_among_what_a_set_is_advised_to_declare():
    """The background of a set that labels cars holds the persons."""
    said = said_of(
        sets_of,
        a=(Labels(seg=("background", "car")), {}),
        b=(Labels(seg=("background", "person")), {}),
    )
    assert "(data.train.a.classes.seg: [car])" in said
    assert said.endswith("nothing teaches background then")


def test_a_misspelt_task_of_a_label_is_refused(config_of):
    train = CARS | {"labels": {"det": "cra"}}
    config = config_of({"train": train}, tasks={"car": {"kind": "detection"}})
    assert said_of(build.open_sets, config, "train", only=config.tasks) == (
        "data.train.labels.det: this run has no task 'cra'; did you mean 'car'?"
    )


def test_a_class_is_named_once(config_of):
    with pytest.raises(UserError, match="data.classes.det: 'car' stands there twice"):
        config_of({"train": CARS, "classes": {"det": ["car", "person", "car"]}}, tasks=DET)
