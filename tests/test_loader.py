import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data._utils.pin_memory import pin_memory

from multitask_kd.batch import CROWD, GREY, IGNORE, PAD, Batch
from multitask_kd.data.base import Layout, Sample
from multitask_kd.data.labels import BoxLabels
from multitask_kd.data.loader import (
    EvalSet,
    Item,
    Packing,
    TrainSet,
    collate_train,
    eval_loader,
    train_loader,
)
from multitask_kd.data.sampling import BatchStream, Pool, Slot, pools_of_set
from multitask_kd.data.transforms import TrainTransform
from multitask_kd.errors import UserError
from multitask_kd.tasks.base import KINDS

SIZE = (32, 48)
AUGMENT = {
    "flip": 0.5, "scale": (0.75, 1.5), "translate": 0.1, "rotate": 5.0, "brightness": 0.25, "color": 0.15, "min_visible": 0.2
}  # fmt: skip
STILL = {
    "flip": 0.0, "scale": (1.0, 1.0), "translate": 0.0, "rotate": 0.0, "brightness": 0.0, "color": 0.0, "min_visible": 0.2
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Got processor for bboxes")


class Pictures(Layout):
    """Images in memory: image i is of grey 10 * i, and has i % 3 boxes. ``broken`` ones cannot be read."""

    def __init__(self, count=11, broken=(), shape=SIZE):
        super().__init__()
        self.add_label("seg", "semantic", ("a", "b"))
        self.add_label("det", "detection", ("x", "y"))
        self.count, self.broken, self.shape = count, set(broken), shape

    def __len__(self):
        return self.count

    def name(self, index):
        return f"image{index}.png"

    def read(self, index):
        if index in self.broken:
            raise UserError(
                f"/data/{self.name(index)}: cannot be decoded\nreplace the file, or set data.on_error=skip"
            )
        boxes = np.array([[4, 4, 24, 20], [20, 10, 44, 30]], np.float32)[: index % 3]
        mask = np.full(self.shape, index % 2, np.uint8)
        count = len(boxes)
        found = BoxLabels(boxes, np.arange(count), np.arange(count) == 1, np.full(count, 320, np.float32))
        return Sample(np.full((*self.shape, 3), 10 * index, np.uint8), {"seg": mask, "det": found})


def packings(**kinds):
    """packings(seg=("semantic", 2)) -> by task, its kind and number of classes."""
    return {name: Packing(KINDS.get(kind, "x"), classes) for name, (kind, classes) in kinds.items()}


SEG_DET = packings(seg=("semantic", 2), det=("detection", 2))


def pools(count=11, batch_size=4, labelled=None, seed=0, unlabelled=True, share=0.5):
    return pools_of_set(count, batch_size, labelled=labelled, seed=seed, unlabelled=unlabelled, share=share)


def images(layout, chosen, skip_errors=False, seed=0, augment=AUGMENT, tasks=SEG_DET):
    kinds = {name: packing.kind for name, packing in tasks.items()}
    transform = TrainTransform(SIZE, kinds, **augment)
    return TrainSet(layout, transform, seed, pools=chosen, skip_errors=skip_errors)


def batches(layout, chosen, *, start=0, stop=4, workers=0, skip_errors=False, tasks=SEG_DET, augment=AUGMENT):
    data = images(layout, chosen, skip_errors, augment=augment, tasks=tasks)
    return train_loader(data, BatchStream(chosen, 0, start, stop), tasks, workers=workers, pin=False)


def assert_same(a, b):
    assert torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices)
    assert a.targets.keys() == b.targets.keys()
    for task in a.targets:
        for key, value in a.targets[task].items():
            assert torch.equal(value, b.targets[task][key]), (task, key)


# --- which images keep their labels


def test_all_labelled_is_one_pool():
    for options in (
        {"labelled": None},
        {"labelled": 11},
        {"labelled": 1.0},
        {"labelled": 1.0, "unlabelled": False},
    ):
        (pool,) = pools(**options)
        assert pool.indices.tolist() == list(range(11)) and pool.share == 4 and pool.labelled


@pytest.mark.parametrize(
    ("labelled", "kept"),
    [
        (3, 3),
        (1, 1),
        (10, 10),
        (0.5, 6),
        (0.25, 3),
        (0.01, 1),
    ],  # .5 of 11 = 5.5 rounds to 6, .25 to 2.75 -> 3; at least one
)
def test_labelled_as_a_number_or_a_fraction(labelled, kept):
    with_labels, without = pools(labelled=labelled)
    assert len(with_labels.indices) == kept and with_labels.labelled
    assert len(without.indices) == 11 - kept and not without.labelled
    assert sorted([*with_labels.indices, *without.indices]) == list(range(11))


@pytest.mark.parametrize(
    ("batch_size", "share", "slots"),
    [(4, 0.5, (2, 2)), (16, 0.25, (4, 12)), (10, 0.9, (9, 1)), (3, 0.4, (1, 2))],
)
def test_share_of_the_batch(batch_size, share, slots):
    assert tuple(p.share for p in pools(labelled=3, batch_size=batch_size, share=share)) == slots


def test_leaving_the_unlabelled_out():
    (pool,) = pools(labelled=3, unlabelled=False)
    assert len(pool.indices) == 3 and pool.share == 4 and pool.labelled
    assert pool.indices.tolist() == pools(labelled=3)[0].indices.tolist()  # the same three


def test_the_choice_hangs_on_the_seed_alone_and_grows_by_adding():
    chosen = {seed: tuple(pools(labelled=4, seed=seed)[0].indices) for seed in range(5)}
    assert chosen[0] == tuple(pools(labelled=4, seed=0, batch_size=8, share=0.25)[0].indices)
    assert len(set(chosen.values())) > 2
    assert set(pools(labelled=2)[0].indices) < set(chosen[0])  # fewer labels are a part of more labels


def test_numbers_that_cannot_be_met():
    with pytest.raises(
        UserError, match="data.labelled: 12 labelled images asked for, but the training set has 11"
    ):
        pools(labelled=12)
    with pytest.raises(
        UserError, match="data.labelled_share: 0.1 of a batch of 4 leaves no slot for labelled images"
    ):
        pools(labelled=3, share=0.1)
    with pytest.raises(
        UserError, match="data.labelled_share: 1.0 of a batch of 4 leaves no slot for unlabelled images"
    ):
        pools(labelled=3, share=1.0)
    with pytest.raises(UserError, match="no slot for .*labelled images; change it or train.batch_size"):
        pools(labelled=3, batch_size=1)


# --- which image goes where


def indices(stream):
    return [[p.index for p in batch] for batch in stream]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 16, 25])
def test_every_image_once_a_pass(batch_size):
    slots = [p for batch in BatchStream(pools(batch_size=batch_size), 0, 0, 44) for p in batch]
    assert len(slots) == 44 * batch_size
    for draw in range(len(slots) // 11):
        one_pass = slots[11 * draw : 11 * (draw + 1)]
        assert sorted(p.index for p in one_pass) == list(range(11))
        assert {p.draw for p in one_pass} == {draw}
    orders = {tuple(p.index for p in slots[i : i + 11]) for i in range(0, 44, 11)}
    assert len(orders) == 4  # a fresh order each time


def test_two_pools_are_passed_over_at_their_own_pace():
    with_labels, without = pools(labelled=3, batch_size=5, share=0.4)
    stream = list(BatchStream([with_labels, without], 0, 0, 24))
    assert all([p.labelled for p in batch] == [True] * 2 + [False] * 3 for batch in stream)
    first = [p for batch in stream for p in batch[:2]]
    second = [p for batch in stream for p in batch[2:]]
    for own, pool in ((first, with_labels), (second, without)):
        size = len(pool.indices)
        for start in range(0, len(own) - size + 1, size):
            assert sorted(p.index for p in own[start : start + size]) == pool.indices.tolist()


@pytest.mark.parametrize("labelled", [None, 3])
def test_a_stream_that_starts_later_goes_on_the_same(labelled):
    chosen = pools(labelled=labelled)
    whole = list(BatchStream(chosen, 7, 0, 30))
    for start in (1, 5, 13, 29):
        assert list(BatchStream(chosen, 7, start, 30)) == whole[start:]
    assert len(BatchStream(chosen, 7, 13, 30)) == 17
    assert list(BatchStream(chosen, 7, 30, 30)) == []


def test_the_order_hangs_on_the_seed():
    assert indices(BatchStream(pools(), 0, 0, 5)) == indices(BatchStream(pools(), 0, 0, 5))
    assert indices(BatchStream(pools(), 0, 0, 5)) != indices(BatchStream(pools(), 1, 0, 5))


# --- batches


def test_batch_by_hand():
    chosen = [Pool(np.array([1, 2]), 2, True)]
    ((batch, messages),) = batches(Pictures(), chosen, stop=1, augment=STILL)
    assert messages == []
    assert batch.images.shape == (2, 3, *SIZE) and batch.images.dtype == torch.uint8
    order = batch.indices.tolist()
    assert sorted(order) == [1, 2]
    for row, index in enumerate(order):
        assert batch.images[row].eq(10 * index).all()
        assert batch.targets["seg"]["mask"][row].eq(index % 2).all()
        # image 1 has one box, image 2 two, of which the second is a crowd
        expected = {1: [0, PAD], 2: [0, CROWD]}[index]
        assert batch.targets["det"]["classes"][row].tolist() == expected
        assert batch.targets["det"]["boxes"][row, 0].tolist() == [4, 4, 24, 20]
        assert batch.targets["det"]["boxes"][row, 1].tolist() == ([0] * 4 if index == 1 else [20, 10, 44, 30])
    assert (
        batch.targets["seg"]["mask"].dtype == torch.uint8
        and batch.targets["det"]["classes"].dtype == torch.long
    )
    assert batch.targets["seg"]["labelled"].all() and batch.targets["det"]["labelled"].all()


def test_only_the_tasks_asked_for():
    ((batch, _),) = batches(Pictures(), pools(), stop=1, tasks=packings(seg=("semantic", 2)))
    assert set(batch.targets) == {"seg"}


def test_unlabelled_slots_carry_no_labels():
    chosen = pools(labelled=3)
    for batch, _ in batches(Pictures(), chosen, stop=12):
        seg, det = batch.targets["seg"], batch.targets["det"]
        assert seg["labelled"].tolist() == det["labelled"].tolist() == [True, True, False, False]
        assert seg["mask"][2:].eq(IGNORE).all()
        assert det["classes"][2:].eq(PAD).all() and det["boxes"][2:].eq(0).all()
        assert set(batch.indices[:2].tolist()) <= set(chosen[0].indices)
        assert not set(batch.indices[2:].tolist()) & set(chosen[0].indices)


@pytest.mark.parametrize("boxes", [None, np.zeros((0, 4), np.float32)])
def test_a_batch_without_any_box(boxes):
    labels = {} if boxes is None else {"det": BoxLabels(boxes, np.zeros(0, np.int64))}
    item = Item(Sample(np.zeros((*SIZE, 3), np.uint8), labels), 0, None)
    batch, _ = collate_train([item, item], SEG_DET)
    assert batch.targets["det"]["boxes"].shape == (2, 0, 4) and batch.targets["det"]["classes"].shape == (
        2,
        0,
    )
    assert batch.targets["det"]["labelled"].tolist() == [boxes is not None] * 2


def test_the_same_image_looks_different_on_its_next_pass_and_in_other_runs():
    chosen = [Pool(np.array([4]), 1, True)]
    first, second = (b for b, _ in batches(Pictures(), chosen, stop=2))
    assert first.indices.equal(second.indices) and not first.images.equal(second.images)
    data = images(Pictures(), chosen, seed=1)
    ((other, _),) = train_loader(data, BatchStream(chosen, 0, 0, 1), SEG_DET, workers=0, pin=False)
    assert not first.images.equal(other.images)


def test_workers_and_a_resume_change_nothing():
    chosen = pools(labelled=6)
    alone = [b for b, _ in batches(Pictures(), chosen, stop=6)]
    shared = [b for b, _ in batches(Pictures(), chosen, stop=6, workers=2)]
    later = [b for b, _ in batches(Pictures(), chosen, start=4, stop=6)]
    assert len(alone) == len(shared) == 6
    for a, b in zip(alone, shared, strict=True):
        assert_same(a, b)
    for a, b in zip(alone[4:], later, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_does_not_draw_from_the_global_random_state(workers):
    # else a resumed run, which opens its loader once more, would go on with other random numbers than the run
    # it resumes
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(batches(Pictures(), pools(), stop=1, workers=workers))
    list(eval_loader(EvalSet(Pictures(), SIZE, range(2), skip_errors=False), 2, workers=workers, pin=False))
    assert torch.equal(torch.get_rng_state(), before)


# --- labels of every kind, and classes that a set does not label

EVERY = packings(
    seg=("semantic", 2),
    lane=("semantic", 3),
    det=("detection", 2),
    weather=("classification", 4),
    metres=("depth", 0),
)


class Named(Pictures):
    """Labels of every kind: seg and det as above, and in image i weather i % 4, in its left half lane 2,
    metres 2.5 * i.

    An image whose number is divisible by 3 has none but det. Of det only x is labelled in odd images.
    """

    def read(self, index):
        sample = super().read(index)
        if index % 2:
            sample.known["det"] = np.array([True, False])
        if index % 3 == 0:
            sample.labels = {"det": sample.labels["det"]}
            return sample
        lane, metres = np.zeros(self.shape, np.uint8), np.zeros(self.shape, np.float32)
        lane[:, :24], metres[:, :24] = 2, 2.5 * index
        sample.labels |= {"lane": lane, "weather": index % 4, "metres": metres}
        return sample


def test_targets_of_every_kind_by_hand():
    ((batch, _),) = batches(
        Named(), [Pool(np.array([5, 6, 10]), 3, True)], stop=1, tasks=EVERY, augment=STILL
    )
    rows = {index: row for row, index in enumerate(batch.indices.tolist())}
    at = [rows[5], rows[6], rows[10]]
    assert list(batch.targets) == list(EVERY)
    labelled = {task: target["labelled"][at].tolist() for task, target in batch.targets.items()}
    assert labelled.pop("det") == [True] * 3 and all(own == [True, False, True] for own in labelled.values())
    lane, metres = batch.targets["lane"]["mask"], batch.targets["metres"]["depth"]
    assert lane.dtype == torch.uint8 and metres.dtype == torch.float32 and metres.shape == (3, *SIZE)
    assert (
        lane[rows[5], :, :24].eq(2).all()
        and lane[rows[5], :, 24:].eq(0).all()
        and lane[rows[6]].eq(IGNORE).all()
    )
    assert (
        metres[rows[10], :, :24].eq(25).all()
        and metres[rows[10], :, 24:].eq(0).all()
        and metres[rows[6]].eq(0).all()
    )
    weather = batch.targets["weather"]["class"]
    assert weather.dtype == torch.long and weather[at].tolist() == [1, -100, 2]
    assert [key for task in batch.targets.values() for key in task] == [
        "mask", "labelled", "mask", "labelled", "boxes", "classes", "labelled", "known", "class", "labelled",
        "depth", "labelled",
    ]  # fmt: skip


def test_classes_that_an_image_does_not_label():
    ((batch, _),) = batches(Named(), [Pool(np.array([1, 2, 4]), 3, True)], stop=1, tasks=EVERY)
    expected = {1: [True, False], 2: [True, True], 4: [True, True]}
    assert batch.targets["det"]["known"].dtype == torch.bool
    assert batch.targets["det"]["known"].tolist() == [expected[index] for index in batch.indices.tolist()]
    assert not any("known" in batch.targets[task] for task in EVERY if task != "det")
    ((batch, _),) = batches(Named(), [Pool(np.array([2, 4]), 2, True)], stop=1, tasks=EVERY)
    assert "known" not in batch.targets["det"]  # every class is labelled in all of them


def test_an_unlabelled_slot_says_nothing_about_classes():
    chosen = [Pool(np.array([1]), 1, True), Pool(np.array([3]), 1, False)]
    ((batch, _),) = batches(Named(), chosen, stop=1, tasks=EVERY)
    assert batch.targets["det"]["labelled"].tolist() == [True, False]
    assert batch.targets["det"]["known"].tolist() == [[True, False], [True, True]]


def test_labels_that_no_task_asks_for_are_left_behind():
    sample = images(Named(), [Pool(np.array([5]), 1, True)], tasks=packings(lane=("semantic", 3)))[
        Slot(0, 5, 0, True)
    ].sample
    assert list(sample.labels) == ["lane"]


@pytest.mark.parametrize("labelled", [None, 6])
def test_labels_of_every_kind_survive_the_processes(labelled):
    chosen = pools(labelled=labelled)
    alone = [b for b, _ in batches(Named(), chosen, stop=6, tasks=EVERY)]
    shared = [b for b, _ in batches(Named(), chosen, stop=6, workers=2, tasks=EVERY)]
    assert any("known" in b.targets["det"] for b in alone)
    for a, b in zip(alone, shared, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluated_labels_of_every_kind_are_as_annotated(workers):
    loaded = eval_loader(EvalSet(Named(), SIZE, [5, 6], skip_errors=False), 2, workers=workers, pin=False)
    five, six = next(iter(loaded))[0].truths
    assert list(five.labels) == ["seg", "det", "lane", "weather", "metres"] and list(six.labels) == ["det"]
    assert (
        five.labels["weather"] == 1
        and five.labels["metres"][0, 0] == 12.5
        and five.labels["lane"].dtype == np.uint8
    )
    assert isinstance(five.labels["det"], BoxLabels) and five.labels["det"].area.tolist() == [320, 320]
    assert five.known["det"].tolist() == [True, False] and six.known == {}


# --- broken files


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_stops_the_run_with_its_own_message(workers):
    with pytest.raises(UserError) as caught:
        list(batches(Pictures(broken=[3]), pools(), workers=workers))
    # no traceback of a loader process round it
    assert (
        str(caught.value)
        == "/data/image3.png: cannot be decoded\nreplace the file, or set data.on_error=skip"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_replaced_and_named(workers):
    chosen = [Pool(np.arange(11), 11, True)]
    for _ in range(2):
        ((batch, messages),) = batches(
            Pictures(broken=[3, 4]), chosen, stop=1, workers=workers, skip_errors=True
        )
        # images 3 and 4 are both replaced by image 5
        assert sorted(batch.indices.tolist()) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10]
        assert len(messages) == 2
        assert {m.partition(":")[0] for m in messages} == {"/data/image3.png", "/data/image4.png"}


def test_the_last_file_is_replaced_by_the_first():
    ((batch, _),) = batches(Pictures(broken=[10, 0]), pools(batch_size=11), stop=1, skip_errors=True)
    assert sorted(batch.indices.tolist()) == [1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_nothing_can_be_read():
    with pytest.raises(UserError, match="none of 11 images can be read; the first error was: /data/image"):
        list(batches(Pictures(broken=range(11)), pools(), skip_errors=True))


def test_a_replacement_comes_from_the_same_pool():
    # image 3 is broken and 4 keeps no label: what replaces 3 must be 5, or a label is used that was to be
    # left out
    chosen = [Pool(np.array([3, 5]), 2, True), Pool(np.array([0, 1, 2, 4, 6, 7, 8, 9, 10]), 2, False)]
    for batch, _ in batches(Pictures(broken=[3]), chosen, stop=6, skip_errors=True):
        assert batch.indices[:2].tolist() == [5, 5]
        assert batch.targets["det"]["labelled"].tolist() == [True, True, False, False]


# --- evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_through_the_set_in_order(workers):
    layout = Pictures(shape=(64, 64))
    loaded = list(
        eval_loader(EvalSet(layout, SIZE, range(11), skip_errors=False), 4, workers=workers, pin=False)
    )
    assert [b.indices.tolist() for b, _ in loaded] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    batch = loaded[0][0]
    assert batch.targets == {} and batch.images.shape == (4, 3, *SIZE)
    truth = batch.truths[2]
    assert truth.index == 2
    assert truth.geometry.original == (64, 64) and truth.geometry.content == (32, 32)
    assert truth.labels["seg"].shape == (64, 64) and truth.known == {}
    assert truth.labels["det"].boxes.tolist() == [[4, 4, 24, 20], [20, 10, 44, 30]]  # as annotated
    assert truth.labels["det"].crowd.tolist() == [False, True]
    assert batch.images[2, :, :, :32].eq(20).all() and batch.images[2, :, :, 32:].eq(GREY).all()


def test_evaluation_of_chosen_images():
    chosen = EvalSet(Pictures(), SIZE, [7, 2], skip_errors=False)
    assert len(chosen) == 2 and [chosen[number][1].index for number in range(2)] == [7, 2]


def test_evaluation_skips_broken_files_or_stops():
    layout = Pictures(broken=[0, 1, 5])
    loaded = list(eval_loader(EvalSet(layout, SIZE, range(11), skip_errors=True), 2, workers=0, pin=False))
    assert loaded[0][0] is None and len(loaded[0][1]) == 2  # a batch of broken files only
    assert [b.indices.tolist() for b, _ in loaded[1:]] == [[2, 3], [4], [6, 7], [8, 9], [10]]
    assert "/data/image5.png" in loaded[2][1][0]
    with pytest.raises(UserError, match="image0.png"):
        list(eval_loader(EvalSet(layout, SIZE, range(11), skip_errors=False), 2, workers=0, pin=False))


# --- to the device


def test_batch_on_a_device():
    ((batch, _),) = batches(Pictures(), [Pool(np.array([5]), 2, True)], stop=1, augment=STILL)
    moved = batch.to(torch.device("cpu"))
    assert moved.images.dtype == torch.float32 and moved.images.unique().tolist() == [pytest.approx(50 / 255)]
    assert moved.targets["det"]["classes"].equal(batch.targets["det"]["classes"])
    assert batch.images.dtype == torch.uint8  # the batch itself is as it was
    assert moved.to(torch.device("cpu")).images.equal(moved.images)  # not divided twice


def test_batch_has_the_memory_format_that_was_asked_for():
    ((batch, _),) = batches(Pictures(), pools(), stop=1)
    last = batch.to(torch.device("cpu"), channels_last=True).images
    first = batch.to(torch.device("cpu"), channels_last=False).images
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()
    assert first.equal(last)
    assert nn.Conv2d(3, 4, 3)(
        first
    ).is_contiguous()  # or the whole network would compute in channels_last after all


def test_the_loader_can_pin_a_batch(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor)
    ((batch, _),) = batches(Pictures(), pools(), stop=1)
    pin_memory(
        (batch, [])
    )  # what the loader's pinning thread calls; it leaves classes that it does not know as they are
    for tensor in (batch.images, *batch.targets["seg"].values(), *batch.targets["det"].values()):
        assert any(tensor is p for p in pinned)


def full_batch():
    """Four images, targets of every kind, classes that some do not label, larger pictures for a teacher."""
    chosen = [Pool(np.array([1, 2, 5, 6]), 4, True)]
    kinds = {name: packing.kind for name, packing in EVERY.items()}
    small, large = (TrainTransform(size, kinds, **STILL) for size in (SIZE, (64, 96)))
    data = TrainSet(Named(), small, 0, pools=chosen, skip_errors=False, others=[large])
    ((batch, _),) = train_loader(data, BatchStream(chosen, 0, 0, 1), EVERY, workers=0, pin=False)
    return batch


def test_chosen_images_of_a_batch():
    batch = full_batch()
    part = batch.of(torch.tensor([3, 1]))
    assert part.indices.tolist() == batch.indices[[3, 1]].tolist() and part.images.equal(batch.images[[3, 1]])
    assert part.targets.keys() == batch.targets.keys() and part.truths is None and part.teacher_images == {}
    for task, target in batch.targets.items():
        assert {key: value.tolist() for key, value in part.targets[task].items()} == {
            key: value[[3, 1]].tolist() for key, value in target.items()
        }
    assert Batch(batch.images).of(torch.tensor([0])).indices is None
    assert batch.of(torch.tensor([], dtype=torch.long)).targets["det"]["known"].shape == (0, 2)


def test_a_batch_travels_between_processes_as_it_is():
    batch = full_batch()
    state = batch.__getstate__()
    assert isinstance(state["targets"]["weather"]["class"], np.ndarray)  # in the message itself
    assert isinstance(
        state["targets"]["metres"]["depth"], torch.Tensor
    )  # 4 * 32 * 48 floats: in shared memory
    found = pickle.loads(pickle.dumps(batch))
    assert_same(batch, found)
    assert (
        found.teacher_images[64, 96].equal(batch.teacher_images[64, 96]) and found.images.dtype == torch.uint8
    )
    assert isinstance(batch.targets["weather"]["class"], torch.Tensor)  # the batch itself is as it was


def test_everything_of_a_batch_is_pinned_and_moved(monkeypatch):
    batch = full_batch()
    tensors = [
        batch.images,
        batch.teacher_images[64, 96],
        *(v for t in batch.targets.values() for v in t.values()),
    ]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor)
    found = batch.pin_memory()
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in pinned}
    assert found.indices is batch.indices  # read on the host alone
    moved = batch.to(torch.device("meta"))
    assert {v.device.type for t in moved.targets.values() for v in t.values()} == {"meta"}
    assert (
        moved.teacher_images[64, 96].dtype == torch.float32
        and moved.targets["metres"]["depth"].dtype == torch.float32
    )
