"""What holds for every kind of task."""

import json

import numpy as np
import pytest
import torch
from expect import says
from torch import nn

from multitask_kd.data.labels import BoxLabels, Geometry
from multitask_kd.data.loader import Truth
from multitask_kd.models.multitask import reads_encoder
from multitask_kd.models.teacher_geometry import TeacherGeometry
from multitask_kd.registry import options_of
from multitask_kd.report.layers import Layer
from multitask_kd.tasks.base import DEFAULT_KINDS, KINDS, Tally, Task, build_task, figure_names, kind_of

NAMES = KINDS.names()
CLASSES, SIZE, STRIDES = ("a", "b", "c"), (32, 48), (4, 8)
CHANNELS = {4: 6, 8: 10}  # of the encoder's maps
LABELS = {
    "semantic": np.tile(np.array([0, 1, 2, 255], np.uint8), (32, 12)),
    "detection": BoxLabels(np.array([[4.0, 4, 20, 24], [24, 8, 44, 28]], np.float32), np.array([0, 2])),
    "classification": 1,
    "depth": np.full((32, 48), 4.0, np.float32),
}


def some(kind, name="some", **hard):
    return build_task(
        name, kind, CLASSES if KINDS.get(kind, "x").has_classes else (), head(kind).strides, hard
    )


def head(kind):
    torch.manual_seed(0)
    made = KINDS.get(kind, "x").Head
    width = CHANNELS if reads_encoder(made) else 8
    options = {"prior": 0.3} if "prior" in options_of(made) else {}  # so that something is found
    return made(width, STRIDES, len(CLASSES), **options)


def predicted(kind, images=2, seed=0):
    """What a random head predicts of random features."""
    made, generator = head(kind), torch.Generator().manual_seed(seed)
    widths = CHANNELS if reads_encoder(made) else dict.fromkeys(STRIDES, 8)
    return made({s: torch.randn(images, w, 32 // s, 48 // s, generator=generator) for s, w in widths.items()})


def target(kind, *labels):
    return KINDS.get(kind, "x").packed(labels, SIZE)


@pytest.mark.parametrize("kind", NAMES)
def test_it_is_called_as_it_is_registered_and_has_all_that_a_kind_owns(kind):
    own = some(kind)
    assert (
        own.kind == kind and type(own) is KINDS.get(kind, "x") and own.name == "some" and not own.is_default
    )
    assert issubclass(own.Head, nn.Module) and issubclass(own.Tally, Tally)
    assert own.title and own.label_word and own.raw_output and own.decoded_outputs
    assert all(getattr(type(own), name) is not getattr(Task, name) for name in ("decoder", "average"))
    assert "at" in options_of(own.Output)


@pytest.mark.parametrize("kind", NAMES)
def test_its_figures_are_those_of_its_columns(kind):
    own = some(kind)
    found = own.metric().compute()
    keys = {column.key for columns in own.columns for column in columns}
    assert keys | set(own.by_class) == set(found)
    assert {own.main_metric, *own.headline} <= keys
    assert next(c for columns in own.columns for c in columns if c.key == own.main_metric).better == 1
    assert own.main_score(found) is None  # nothing was scored
    assert all(found[key] is None for key in keys) and all(
        set(found[key]) == set(CLASSES) for key in own.by_class
    )


@pytest.mark.parametrize("kind", NAMES)
def test_an_image_without_a_label_is_neither_learnt_nor_scored(kind):
    own, pred = some(kind), predicted(kind).detach().requires_grad_()
    nothing = own.losses(pred, target(kind, None, None), SIZE)
    assert set(nothing) == set(own.weights) and all(value.item() == 0 for value in nothing.values())
    assert torch.autograd.grad(sum(nothing.values()), pred)[0].eq(0).all()
    labelled = own.losses(pred, target(kind, LABELS[kind], None), SIZE)
    sum(labelled.values()).backward()
    assert pred.grad[0].ne(0).any() and pred.grad[1].eq(0).all()
    alone = own.losses(pred[:1], target(kind, LABELS[kind]), SIZE)
    assert all(alone[name].item() == pytest.approx(labelled[name].item(), rel=1e-5) for name in alone)
    metric = own.metric()
    own.score(
        metric, own.restore(own.decode(pred, SIZE)[0], Geometry(SIZE, SIZE)), Truth(0, Geometry(SIZE, SIZE))
    )
    assert own.main_score(metric.compute()) is None


@pytest.mark.parametrize("kind", NAMES)
def test_an_image_is_decoded_scored_drawn_and_saved(kind):
    own, geometry = some(kind), Geometry((64, 96), SIZE)
    decoded = own.decode(predicted(kind).detach(), SIZE)
    prediction, metric = own.restore(decoded[1], geometry), own.metric()
    large = LABELS[kind]
    if isinstance(large, np.ndarray):
        large = large.repeat(2, 0).repeat(2, 1)
    own.score(metric, prediction, Truth(5, geometry, {"some": large, "other": None}))
    figures = metric.compute()
    assert own.main_score(figures) is not None and json.dumps(figures)
    for layer in (own.label_layer(large), own.prediction_layer(prediction, 0.0)):
        assert isinstance(layer, Layer)
    saved = own.saved(prediction)
    assert sum(part is not None for part in saved) == 1
    assert saved.image is None or saved.image.shape == (64, 96)
    for confidence in (None, 0.5):
        more = own.more_figures(metric, confidence)
        assert {column.key for column in own.more_columns(confidence)} <= set(more) and json.dumps(more)


@pytest.mark.parametrize("kind", NAMES)
def test_what_a_file_decodes_is_what_is_decoded(kind):
    own, pred = some(kind), predicted(kind).detach()
    options = {key: p.default for key, p in options_of(own.decode).items()}
    with torch.no_grad():
        parts = own.decoder(SIZE, in_onnx=False, options=options)(pred)
    outputs = dict(zip(own.decoded_outputs, parts, strict=True))
    differ, count, _, what = own.decoded_gap(pred, outputs, SIZE, options)
    assert count > 0 and differ == 0 and what
    again = own.decode(own.from_decoded(outputs), SIZE)
    assert len(again) == len(pred)
    assert own.expected_shape(SIZE).items() <= dict(enumerate(pred.shape)).items()


@pytest.mark.parametrize("kind", NAMES)
def test_a_label_goes_through_letterbox_and_back_and_into_a_batch(kind):
    made = KINDS.get(kind, "x")
    spatial = made.to_spatial(LABELS[kind], Geometry(SIZE, SIZE), SIZE)
    assert all(one.shape == SIZE for one in spatial.maps) and spatial.points.shape[1:] == (2,)
    back = made.from_spatial(spatial, SIZE, 0.5)
    packed, straight = made.packed([back, None], SIZE), made.packed([LABELS[kind], None], SIZE)
    assert packed["labelled"].tolist() == [True, False] and set(packed) == set(straight)
    assert all(torch.equal(packed[key], straight[key]) and len(packed[key]) == 2 for key in packed)


@pytest.mark.parametrize("kind", NAMES)
def test_teachers_of_the_same_form_are_compared_and_their_images_selected(kind):
    own, pred = some(kind), predicted(kind).detach()
    pair = own.comparable(pred, pred + 1, ignore_mask=None, target=None, size=SIZE, known=None, form="")
    assert pair.student is pred and torch.equal(pair.teacher, pred + 1) and pair.mask is None
    assert torch.equal(own.select(pred, torch.tensor([1])), pred[1:])
    assert own.why_not(pred, "", "teacher") is None
    reader = own.output_reader({"at": "0.head"})
    assert isinstance(reader, own.Output) and reader.at == "0.head"
    assert reader.read([{"head": pred}], len(CLASSES), SIZE).shape == pred.shape


# --- names


def test_names_that_need_no_kind():
    assert DEFAULT_KINDS == {"seg": "semantic", "det": "detection"}
    for name, kind in DEFAULT_KINDS.items():
        own = build_task(name, None, CLASSES, (8,))
        assert (
            own.kind == kind and own.is_default and own.called("mAP") == "mAP" and own.called("x", "_") == "x"
        )
        assert own.output_names() == {key: key for key in own.decoded_outputs}
        assert not build_task(name, "classification", CLASSES, (8,)).is_default
    lane = build_task("lane", "semantic", CLASSES, (8,))
    assert lane.called("mIoU") == "lane mIoU" and lane.called("mask", "_") == "lane_mask"


def test_a_kind_that_is_unknown_or_not_given_is_refused():
    assert (
        kind_of("seg", None, "tasks.seg").kind == "semantic"
        and kind_of("x", "depth", "tasks.x").kind == "depth"
    )
    known = "known: classification, depth, detection, semantic"
    with says(f"tasks.lane: needs kind; {known} (only tasks called seg and det need none)"):
        kind_of("lane", None, "tasks.lane")
    with says("tasks.sge: needs kind", "; did you mean 'seg'?"):
        kind_of("sge", None, "tasks.sge")
    with says("tasks.lane.kind: unknown kind of task 'semantc'; did you mean 'semantic'?"):
        build_task("lane", "semantc", CLASSES, (8,))
    with says("tasks.lane.hard.dicee: no such option; did you mean 'dice'?"):
        build_task("lane", "semantic", CLASSES, (8,), {"dicee": 1.0})


def test_figures_are_named_after_their_task_where_another_has_the_same():
    tasks = {
        name: build_task(name, kind, CLASSES, (8,))
        for name, kind in (("seg", None), ("lane", "semantic"), ("det", None))
    }
    assert figure_names(tasks) == {
        ("seg", "mIoU"): "mIoU",
        ("lane", "mIoU"): "lane mIoU",
        ("det", "mAP"): "mAP",
        ("det", "mAP50"): "mAP50",
    }
    others = {name: build_task(name, "semantic", CLASSES, (8,)) for name in ("drivable", "lane")}
    assert list(figure_names(others).values()) == ["drivable mIoU", "lane mIoU"]
    single = {
        "distance": build_task("distance", "depth", (), (8,)),
        "weather": build_task("weather", "classification", CLASSES, (8,)),
    }
    assert list(figure_names(single).values()) == ["delta1", "AbsRel", "top1"]


def test_an_operation_that_a_kind_does_not_have_is_refused_by_name():
    class Bare(Task):
        kind = "bare"

    bare = Bare("edges", (), (4,))
    for call, what in (
        (lambda: bare.mapped(None, None), "map classes"),
        (lambda: bare.average([], [], [], ""), "average several teachers; let one of them teach it"),
        (lambda: bare.decoder(SIZE, in_onnx=True, options={}), "be decoded inside an exported file"),
    ):
        with says(f"tasks.edges: a task of kind 'bare' cannot {what}"):
            call()


def test_a_kind_that_lacks_something_is_refused_when_it_is_registered():
    class Half(Task):
        """A map without a way to move its label."""

        is_map, Head, Output, headline, columns = True, nn.Identity, dict, (), ()
        main_metric = "x"
        packed = losses = decode = metric = score = saved = lambda self: None

    for name in ("to_spatial", "from_spatial", "label_layer", "prediction_layer"):
        with pytest.raises(TypeError, match=f"kind of task 'half' lacks .*{name}"):
            KINDS.register("half")(Half)
    with pytest.raises(TypeError, match="'bare' lacks Head, Output, main_metric"):
        KINDS.register("bare")(type("Bare", (Task,), {}))
    assert not {"half", "bare"} & set(KINDS.names())


def test_a_map_of_a_kind_loses_its_teachers_padding_and_a_classless_output_has_free_channels():
    class Map(Task):
        """What a kind inherits."""

        is_map, has_classes = True, False

    own = Map("normals", (), (4,))
    geometry = TeacherGeometry((48, 48), (64, 96))  # a third of its width is padding
    pred = torch.arange(16.0 * 24).reshape(1, 1, 16, 24)
    given = own.to_student(pred, pred[:, 0] > 100, geometry, own, "")
    assert torch.equal(given.pred, pred[..., :16])
    assert given.ignore_mask.shape[1:] == given.pred.shape[2:]
    assert own.expected_shape((48, 48)) == {}
