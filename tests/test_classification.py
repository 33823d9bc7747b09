"""Classification of the whole image."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expect import says

from multitask_kd import build
from multitask_kd.data.labels import Geometry, Spatial
from multitask_kd.data.loader import Truth
from multitask_kd.models.class_mapping import UNKNOWN, ClassMapping
from multitask_kd.report.layers import TextLayer
from multitask_kd.tasks.base import build_task
from multitask_kd.tasks.classification import UNLABELLED, Classification, ClassOutput, PooledHead

CLASSES = ("clear", "rain", "snow")
SIZE = (32, 48)
LN3 = math.log(3)
GEOMETRY = Geometry(SIZE, SIZE)


def task(classes=CLASSES, name="weather", **options):
    return Classification(name, classes, (16,), **options)


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ce(pred, *labels, classes=CLASSES, **options):
    """The loss of images with these labels; None: not labelled."""
    found = task(classes, **options).losses(pred, Classification.packed(labels, SIZE), SIZE)
    assert set(found) == {"ce"}
    return found["ce"]


# --- losses


def test_cross_entropy_by_hand():
    pred = torch.tensor([[LN3, 0.0], [LN3, 0.0], [9.0, 0.0]])  # 3/4, 1/4; the third image is not labelled
    expected = (-math.log(0.75) - math.log(0.25)) / 2
    assert ce(pred, 0, 1, None, classes=("a", "b")).item() == pytest.approx(expected, rel=1e-6)
    # smoothing .2 over 2 classes: .9 of one and .1 of the other; both images together have one of each
    smooth = ce(pred, 0, 1, None, classes=("a", "b"), label_smoothing=0.2)
    assert smooth.item() == pytest.approx(expected, rel=1e-6)
    expected = -0.9 * math.log(0.75) - 0.1 * math.log(0.25)
    assert ce(pred[:1], 0, classes=("a", "b"), label_smoothing=0.2).item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_against_torch(smoothing):
    pred, labels = random(5, 3), [2, 0, 1, 1, 2]
    expected = F.cross_entropy(pred.double(), torch.tensor(labels), label_smoothing=smoothing)
    assert ce(pred, *labels, label_smoothing=smoothing).item() == pytest.approx(expected.item(), rel=1e-6)


def test_unlabelled_images_contribute_nothing():
    pred = random(3, 3).requires_grad_()
    loss = ce(pred, 2, None, 0)
    loss.backward()
    assert pred.grad[1].eq(0).all() and pred.grad[[0, 2]].ne(0).all()
    assert loss.item() == pytest.approx(ce(pred[[0, 2]], 2, 0).item(), rel=1e-6)
    # what is marked as not labelled has no label, whatever number stands there
    target = {"class": torch.tensor([2, 1, 0]), "labelled": torch.tensor([True, False, True])}
    assert task().losses(pred, target, SIZE)["ce"].item() == pytest.approx(loss.item(), rel=1e-6)
    none = ce(pred, None, None, None)
    assert none.item() == 0 and torch.autograd.grad(none, pred)[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits(dtype):
    pred = torch.tensor([[60000.0, 0.0, 0.0]], dtype=dtype).requires_grad_()
    loss = ce(pred, 1)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(pred[0, 0].item())
    assert pred.grad.tolist() == [[1.0, -1.0, 0.0]]


@pytest.mark.parametrize("smoothing", [1.0, -0.1])
def test_bad_options_are_refused(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        task(label_smoothing=smoothing)


def test_an_unknown_option_is_refused():
    with says("tasks.weather.hard.label_smoothin: no such option; did you mean 'label_smoothing'?"):
        build_task("weather", "classification", CLASSES, (16,), {"label_smoothin": 0.1})


# --- labels


def test_labels_are_numbered_anew_and_those_of_other_classes_left_out():
    table = Classification.class_table(["snow", None, "clear"], CLASSES)
    assert [Classification.renumbered(label, table) for label in (0, 1, 2)] == [2, None, 0]
    assert Classification.only_known(1, np.array([False, True, True])) == 1
    assert Classification.only_known(0, np.array([False, True, True])) is None


def test_labels_of_a_set_that_lacks_a_class():
    """A set of rain and clear alone, in its own order: its labels stay; one of another class is none."""
    table, known = Classification.class_table(["rain", "clear"], CLASSES), np.array([True, True, False])
    labels = [Classification.renumbered(label, table) for label in (0, 1)]
    assert [Classification.only_known(label, known) for label in labels] == [1, 0]
    packed = Classification.packed([Classification.only_known(label, known) for label in (2, 0)], SIZE)
    assert packed["labelled"].tolist() == [False, True]


def test_labels_do_not_move_with_the_pixels():
    moved = Classification.to_spatial(2, Geometry((20, 30), SIZE), SIZE)
    assert isinstance(moved, Spatial) and moved.maps == [] and len(moved.points) == 0
    assert Classification.from_spatial(moved, SIZE, 0.5) == 2


def test_labels_are_packed():
    packed = Classification.packed([1, None, 0], SIZE)
    assert packed["class"].tolist() == [1, UNLABELLED, 0] and packed["class"].dtype == torch.long
    assert packed["labelled"].tolist() == [True, False, True]
    assert Classification.packed([np.int64(2)], SIZE)["class"].tolist() == [2]


# --- head


def test_the_head_reads_the_encoders_coarsest_map():
    head = PooledHead({8: 5, 16: 7}, (8, 16), 3)
    assert head.strides == (16,)
    with torch.no_grad():
        head.classifier.weight.zero_()
        head.classifier.bias.copy_(torch.tensor([0.0, 1, 2]))
        head.classifier.weight[0, 6] = 2.0
    maps = {8: random(2, 5, 4, 6), 16: torch.zeros(2, 7, 2, 3)}
    maps[16][1, 6, 0] = 3.0  # half of the places: a mean of 1.5
    assert head(maps).tolist() == [[0, 1, 2], [3, 1, 2]]


def test_dropout_is_in_training_alone():
    head, maps = PooledHead({16: 64}, (16,), 3, dropout=0.5), {16: torch.ones(1, 64, 2, 2)}
    head.train()
    assert not torch.equal(head(maps), head(maps))
    head.eval()
    assert torch.equal(head(maps), head(maps))
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match="dropout"):
            PooledHead({16: 64}, (16,), 3, dropout=share)


def test_in_a_network_it_is_given_the_encoders_maps():
    plan = {
        "encoder": "tu-test_resnet",
        "strides": [4, 8, 16],
        "width": 8,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    }
    plan["tasks"] = {"weather": {"kind": "classification", "classes": list(CLASSES), "head": {}}}
    net = build.network(plan).eval()
    output = net(torch.rand(2, 3, 32, 48))
    assert output.preds["weather"].shape == (2, 3)
    channels = net.backbone.out_channels[4]  # of stride 16
    assert net.heads["weather"].classifier.in_features == channels == output.shared[-1].shape[1]
    pooled = output.shared[-1].mean((2, 3))
    assert torch.allclose(net.heads["weather"].classifier(pooled), output.preds["weather"], atol=1e-6)


# --- evaluation


def scored(*pairs, classes=CLASSES):
    own = task(classes)
    metric = own.metric()
    for index, (logits, label) in enumerate(pairs):
        prediction = own.restore(own.decode(torch.tensor([logits]), SIZE)[0], GEOMETRY)
        own.score(metric, prediction, Truth(index, GEOMETRY, {} if label is None else {"weather": label}))
    return metric.compute()


def test_accuracy_by_hand():
    found = scored(
        ([5.0, 0, 1], 0), ([5.0, 0, 1], 1), ([0, 0, 1.0], 2), ([0, 0.1, 0], 1), ([9.0, 0, 0], None)
    )
    assert found == {"top1": 75.0, "top5": None, "accuracy": {"clear": 100.0, "rain": 50.0, "snow": 100.0}}
    assert json.dumps(found)
    assert scored(([1.0, 0, 0], None)) == {"top1": None, "top5": None, "accuracy": dict.fromkeys(CLASSES)}


def test_top_five_of_seven():
    # class 0 is the likeliest, 6 the least likely
    falling, classes = [float(-i) for i in range(7)], tuple("abcdefg")
    found = scored(*((falling, label) for label in (0, 4, 5, 6)), classes=classes)
    assert found["top1"] == 25.0 and found["top5"] == 50.0
    assert found["accuracy"] == {"a": 100.0, "b": None, "c": None, "d": None, "e": 0.0, "f": 0.0, "g": 0.0}


def test_the_main_score_of_some_classes_is_the_mean_of_theirs():
    figures = {"top1": 75.0, "accuracy": {"clear": 100.0, "rain": 50.0, "snow": None}}
    assert task().main_score(figures) == 75.0
    assert task().main_score(figures, [1]) == 50.0 and task().main_score(figures, [0, 1]) == 75.0
    assert task().main_score(figures, [2]) is None


def test_what_is_drawn_and_saved():
    prediction = task().decode(torch.tensor([[0.0, LN3, -50.0]]), SIZE)[0]
    assert prediction.tolist() == pytest.approx([0.25, 0.75, 0.0], abs=1e-6)
    assert task().prediction_layer(prediction, 0.9) == TextLayer("weather: rain 0.75")
    assert task().label_layer(2) == TextLayer("weather: snow")
    saved = task().saved(prediction)
    assert (
        saved.value == {"class": "rain", "score": pytest.approx(0.75)} and saved.image is saved.boxes is None
    )


def test_what_a_file_decodes_is_a_prediction():
    pred = task().from_decoded({"label": torch.tensor([2, 0]), "score": torch.tensor([0.8, 0.5])})
    assert pred.softmax(1).flatten().tolist() == pytest.approx([0.1, 0.1, 0.8, 0.5, 0.25, 0.25])
    raw = torch.tensor([[0.0, 1, 5], [2, 1, 0]])
    label, score = task().decoder(SIZE, in_onnx=False, options={})(raw)
    assert label.tolist() == [2, 0] and torch.allclose(score, raw.softmax(1).amax(1))
    assert task().decoded_gap(raw, {"label": label}, SIZE, {})[:3] == (0, 2, 0.0)
    assert task().decoded_gap(raw, {"label": torch.tensor([2, 1])}, SIZE, {})[:2] == (1, 2)
    single = task(("only",)).from_decoded({"label": torch.tensor([0]), "score": torch.tensor([1.0])})
    assert single.isfinite().all()


def test_its_names():
    own = build_task("weather", "classification", CLASSES, (16,), {"label_smoothing": 0.1})
    assert isinstance(own, Classification) and own.label_smoothing == 0.1 and own.weights == {"ce": 1.0}
    assert own.output_names() == {"label": "weather_label", "score": "weather_score"}
    assert own.called("accuracy") == "weather accuracy" and own.expected_shape(SIZE) == {1: 3}


# --- teachers


def test_a_teachers_classes_are_mapped():
    theirs, ours = ("fog", "rain", "hail", "clear"), CLASSES
    mapping = ClassMapping(theirs, ours, {"hail": "rain"})
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.1, 0.1]])
    pred, ignored = task().mapped(p.log(), mapping)
    assert pred.shape == (2, 3) and pred[:, 2].eq(UNKNOWN).all()
    assert pred[0].softmax(0).tolist() == pytest.approx([4 / 9, 5 / 9, 0])  # .4 against .2 + .3
    assert ignored.tolist() == [False, True]  # fog, the likeliest, is none of the student's


def test_two_teachers_are_averaged():
    a, b = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.1, 0.6, 0.3]]).log() + 2.0
    mean, ignored = task().average([a, b], [None, None], [(0, 1, 2)] * 2, "")
    assert ignored is None and mean.exp().tolist() == [pytest.approx([0.4, 0.4, 0.2])]
    # the second does not know snow: .7 + .1, .2 + .6 by two, .1 by one, of .9 together
    mean, _ = task().average([a, b], [None, None], [(0, 1, 2), (0, 1)], "")
    assert mean.exp().tolist() == [pytest.approx([4 / 9, 4 / 9, 1 / 9])]
    mean, ignored = task().average([a, b], [torch.tensor([True]), None], [(0, 1, 2)] * 2, "")
    assert ignored.tolist() == [False] and mean.exp().tolist() == [pytest.approx([0.1, 0.6, 0.3])]
    _, ignored = task().average([a, b], [torch.tensor([True])] * 2, [(0, 1, 2)] * 2, "")
    assert ignored.tolist() == [True]


def test_what_is_compared_where_the_teacher_lacks_a_class():
    student, teacher = random(4, 3), random(4, 3, seed=1)
    shared = {"size": SIZE, "form": ""}
    pair = task().comparable(student, teacher, ignore_mask=None, target=None, known=None, **shared)
    assert pair.student is student and pair.teacher is teacher and pair.mask is None
    target = {
        "class": torch.tensor([1, 1, 0, UNLABELLED]),
        "labelled": torch.tensor([True, False, True, False]),
    }
    pair = task().comparable(student, teacher, ignore_mask=None, target=target, known=(0, 2), **shared)
    # the first image is labelled as rain, which the teacher does not know; the second is not labelled
    assert torch.equal(pair.student, student[:, [0, 2]]) and torch.equal(pair.teacher, teacher[:, [0, 2]])
    assert pair.mask.tolist() == [False, True, True, True]
    ignored = torch.tensor([False, False, False, True])
    pair = task().comparable(student, teacher, ignore_mask=ignored, target=target, known=(0, 2), **shared)
    assert pair.mask.tolist() == [False, True, True, False]
    pair = task().comparable(student, teacher, ignore_mask=ignored, target=None, known=(0, 2), **shared)
    assert pair.mask.tolist() == [True, True, True, False]


# --- networks from elsewhere


def test_class_scores_are_found_and_read():
    logits, other = random(2, 3), random(2, 3, 4, 4)
    assert ClassOutput().read(logits, 3, SIZE) is logits
    assert ClassOutput().read({"features": other, "logits": logits, "more": logits}, 3, SIZE) is logits
    assert ClassOutput().read((other, logits), 3, SIZE) is logits
    assert ClassOutput(at="head.1").read({"head": (other, logits)}, 3, SIZE) is logits
    p = torch.tensor([[0.5, 0.5, 0.0]])
    read = ClassOutput(form="probability").read(p.half(), 3, SIZE)
    assert (
        read.dtype == torch.float32
        and torch.allclose(read.softmax(1), p, atol=1e-3)
        and read.isfinite().all()
    )


@pytest.mark.parametrize(
    ("returned", "options", "message"),
    [
        (torch.zeros(2, 3, 4, 4), {}, "no part of what the network returns can be class scores"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {}, "several parts"),
        ({"a": torch.zeros(2, 3)}, {"at": "b"}, "there is no 'b'"),
        ({"a": torch.zeros(2, 3, 1, 1)}, {"at": "a"}, r"\[2, 3, 1, 1\] is no \[B,C\]"),
        (torch.zeros(2, 4), {}, "the network gives 4 classes, but 3 are named"),
    ],
)
def test_what_is_no_class_score_is_refused(returned, options, message):
    with pytest.raises(ValueError, match=message):
        ClassOutput(**options).read(returned, 3, SIZE)


def test_a_wrong_form_is_found_by_its_values():
    logits, p = random(4, 3), random(4, 3).softmax(1)
    assert ClassOutput().fault(logits) is None
    assert "set it to probability" in ClassOutput().fault(p)
    probability = ClassOutput(form="probability")
    assert probability.fault(probability.read(p, 3, SIZE)) is None
    assert "set it to logits" in probability.fault(probability.read(logits, 3, SIZE))
    with pytest.raises(ValueError, match="form: 'softmax' is neither logits nor probability"):
        ClassOutput(form="softmax")
    assert task().output_reader({"form": "probability"}).form == "probability"
