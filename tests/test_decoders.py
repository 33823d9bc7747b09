"""Decoding inside a file: the modules give what the tasks decode, in PyTorch, as a program and in ONNX."""

import math

import pytest
import torch
from torch import nn

from multitask_kd.models import decoders
from multitask_kd.tasks.base import build_task

SIZE = (32, 48)
STRIDES = (8, 16)
CELLS = 4 * 6 + 2 * 3
DECODE = {"score_threshold": 0.05, "nms_iou": 0.6, "max_detections": 10, "before_nms": 60}


def test_suppression_is_within_an_image_and_a_class():
    """Three boxes at one place: of two of one class the better stays; one of another class and the other
    image's stay."""
    box = torch.tensor([10.0, 10, 20, 20])
    boxes, scores = box.expand(2, 3, 4), torch.tensor([[0.9, 0.8, 0.7]]).expand(2, 3)
    kept = decoders.unsuppressed(boxes, torch.tensor([[0, 0, 1], [1, 0, 1]]), scores, 2, 0.6, 65.0)
    assert kept.tolist() == [[True, False, True], [True, True, False]]


def test_the_likeliest_class_and_its_probability():
    logits = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]).log() + 5  # softmax takes the 5 away
    label, score = decoders.Label()(logits)
    assert label.tolist() == [1, 0] and label.dtype == torch.int64
    torch.testing.assert_close(score, torch.tensor([0.5, 0.7]))


def test_a_mask_at_the_images_size():
    """Two cells in a row become four pixels; the logits' difference is 4, 2, -2, -4."""
    logits = torch.tensor([[[[4.0, 0.0]], [[0.0, 4.0]]]])
    (mask,) = decoders.Mask((1, 4))(logits)
    assert mask.tolist() == [[[0, 0, 1, 1]]] and mask.dtype == torch.uint8


def test_depths_are_interpolated_as_logarithms_and_have_limits():
    """Between 1 m and 16 m, at a quarter and three quarters of the way, are 2 m and 8 m."""
    (depth,) = decoders.Depth((1, 4))(torch.tensor([[[[0.0, math.log(16)]]]]))
    torch.testing.assert_close(depth, torch.tensor([[[1.0, 2.0, 8.0, 16.0]]]))
    (depth,) = decoders.Depth((1, 2))(torch.tensor([[[[-100.0, 100.0]]]]))
    torch.testing.assert_close(depth, torch.tensor([[[1e-3, 1e4]]]))


def test_slots_without_a_detection():
    """A cell of two classes, of which one is above the threshold: one detection in three slots."""
    raw = torch.full((1, CELLS, 7), -20.0)
    raw[0, 0] = torch.tensor([0.0, 0, 0, 0, 3, 3, -3])  # the cell at 4, 4 of stride 8: a box of 8 pixels
    options = {"score_threshold": 0.5, "nms_iou": 0.6, "max_detections": 3, "before_nms": 2}
    boxes, scores, classes = decoders.Boxes(SIZE, STRIDES, in_onnx=False, **options)(raw)
    assert boxes.tolist() == [[[0, 0, 8, 8], [0, 0, 0, 0], [0, 0, 0, 0]]] and classes.tolist() == [
        [0, -1, -1]
    ]
    expected = 1 / (1 + math.exp(-3)) ** 2
    assert scores[0].tolist() == pytest.approx([expected, 0, 0])


def tasks_and_raw(batch):
    """By kind: a task whose name is not the default one, its module for ONNX or for a program, and a raw
    output."""
    draw = torch.Generator().manual_seed(batch)
    semantic = build_task("lane", "semantic", ["a", "b", "c"], (8,))
    yield semantic, {}, torch.randn(batch, 3, 4, 6, generator=draw) * 3
    detection = build_task("sign", "detection", ["a", "b"], STRIDES)
    yield detection, DECODE, torch.randn(batch, CELLS, 7, generator=draw)
    classification = build_task("weather", "classification", ["a", "b", "c", "d"], (16,))
    yield classification, {}, torch.randn(batch, 4, generator=draw) * 3
    depth = build_task("distance", "depth", [], (8,))
    yield depth, {}, torch.randn(batch, 1, 4, 6, generator=draw) * 8  # past both limits


def check(task, raw, outputs, options):
    """The outputs are what the task makes of the raw output, and the task says so itself."""
    found = dict(zip(task.decoded_outputs, outputs, strict=True))
    wrong, count, _, what = task.decoded_gap(raw, found, SIZE, options)
    assert (wrong, " " in what) == (0, True) and count >= len(raw), task.kind
    again = task.decode(task.from_decoded(found), SIZE, **options)
    direct = task.decode(raw, SIZE, **options)
    if task.kind == "semantic":
        assert torch.equal(again.argmax(1), direct.argmax(1)) and found["mask"].dtype == torch.uint8
    elif task.kind == "detection":
        for a, b in zip(again, direct, strict=True):
            assert len(a.boxes) > 2 and torch.equal(a.classes, b.classes)
            torch.testing.assert_close(a.boxes, b.boxes, atol=1e-3, rtol=0)
            torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=0)
    elif task.kind == "classification":
        assert torch.equal(again.argmax(1), direct.argmax(1)) and found["label"].dtype == torch.int64
        torch.testing.assert_close(found["score"], direct.amax(1), atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(found["depth"], direct.squeeze(1), atol=0, rtol=1e-4)
        assert float(direct.min()) < 0.01 and float(direct.max()) > 1e3


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_modules_give_what_the_tasks_decode(batch):
    for task, options, raw in tasks_and_raw(batch):
        check(task, raw, task.decoder(SIZE, in_onnx=False, options=options)(raw), options)


@torch.no_grad()
def test_a_difference_is_counted():
    for task, options, raw in tasks_and_raw(2):
        outputs = task.decoder(SIZE, in_onnx=False, options=options)(raw)
        other = {
            name: 1 + value.roll(1, 0) for name, value in zip(task.decoded_outputs, outputs, strict=True)
        }
        wrong, count, allowed, _ = task.decoded_gap(raw, other, SIZE, options)
        assert wrong > allowed * count, task.kind


class Decoding(nn.Module):
    """All decoders at once, of inputs of any batch."""

    def __init__(self, modules):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, a, b, c, d):
        return tuple(out for part, raw in zip(self.parts, (a, b, c, d), strict=True) for out in part(raw))


def split(outputs, tasks):
    outputs = iter(outputs)
    return [[next(outputs) for _ in task.decoded_outputs] for task in tasks]


@torch.no_grad()
@pytest.mark.parametrize("form", ["onnx", "program"])
def test_in_a_file(form, tmp_path):
    tasks, options, _ = zip(*tasks_and_raw(2), strict=True)
    modules = [
        t.decoder(SIZE, in_onnx=form == "onnx", options=o) for t, o in zip(tasks, options, strict=True)
    ]
    example = tuple(raw for _, _, raw in tasks_and_raw(2))
    free = tuple({0: torch.export.Dim("batch", min=1)} for _ in example)
    run = {"onnx": in_onnx, "program": as_program}[form](Decoding(modules).eval(), example, free)
    for batch in (1, 3):
        raws = [raw for _, _, raw in tasks_and_raw(batch)]
        for task, chosen, raw, outputs in zip(tasks, options, raws, split(run(raws), tasks), strict=True):
            check(task, raw, outputs, chosen)


def in_onnx(module, example, free):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime
    import onnxscript

    table = decoders.in_onnx(onnxscript.opset18)
    options = {
        "opset_version": 18,
        "dynamic_shapes": free,
        "custom_translation_table": table,
        "verbose": False,
    }
    model = torch.onnx.export(module, example, dynamo=True, **options).model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda raws: [
        torch.from_numpy(v)
        for v in session.run(None, dict(zip(names, [r.numpy() for r in raws], strict=True)))
    ]


def as_program(module, example, free):
    program = torch.export.export(module, example, dynamic_shapes=free, strict=False).module()
    return lambda raws: program(*raws)
