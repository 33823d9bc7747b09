"""What a foreign network returns, read as predictions; and foreign detections decoded."""

import math

import pytest
import torch
from torch import nn
from torchvision.ops import batched_nms

from multitask_kd.batch import PAD, DensePredictions, ModelOutput, PaddedDetections
from multitask_kd.data.labels import Geometry
from multitask_kd.models.detection_reader import DetectionOutput
from multitask_kd.models.external import ExternalModel, pick, shown
from multitask_kd.tasks.detection import Detection, Detections
from multitask_kd.tasks.semantic import SemanticOutput

SIZE = (20, 40)  # 3 x 5 cells of stride 8, 2 x 3 of stride 16: 21 in all


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- where it is


def _nothing(part):
    return False


@pytest.mark.parametrize(
    ("returned", "at"),
    [
        ({"aux": 1, "x": [0, {"y": "here"}]}, "x.1.y"),
        (("no", ("no", "here")), "1.1"),
        (("no", "here"), 1),
        (["here", "no"], -2),
        ({"0": "here"}, 0),
    ],
)
def test_a_part_by_name(returned, at):
    assert pick(returned, at, _nothing, "a map") == "here"


@pytest.mark.parametrize("at", ["z", "x.5", "x.y", "x.0.9", 3])
def test_a_part_that_is_not_there(at):
    with pytest.raises(
        ValueError, match=rf"^there is no '{at}' in what the network returns: \{{x: \(\[1, 2\]\)\}}$"
    ):
        pick({"x": [torch.zeros(1, 2)]}, at, _nothing, "a map")


def test_the_one_part_that_fits():
    seg, det = random(1, 3, 2, 2), random(1, 4, 6)
    read = lambda returned: SemanticOutput().read(returned, 3, SIZE)  # noqa: E731
    for returned in (
        seg,
        (det, seg),
        [seg],
        {"out": seg, "aux": seg},
        {"semantic": seg, "aux": seg},
        {"a": det, "b": seg},
    ):
        assert read(returned) is seg
    with pytest.raises(
        ValueError,
        match=r"^several parts of .* can be a map \[B,C,h,w\]: \(\[1, 3, 2, 2\], \[1, 3, 2, 2\]\); set at$",
    ):
        read((seg, seg))
    with pytest.raises(
        ValueError, match=r"^no part of what the network returns can be a map .*: int; set at$"
    ):
        read(3)


def test_a_part_called_as_the_task_is_the_tasks():
    class Named(nn.Module):
        def forward(self, images):
            return {"lane": images, "other": images + 1, "drivable": {"map": images + 2}}

    images, readers = torch.rand(1, 3, 2, 2), {"lane": SemanticOutput(), "drivable": SemanticOutput()}
    found = ExternalModel(Named(), readers, {"lane": 3, "drivable": 3}, mean=None, std=None)(images).preds
    assert torch.equal(found["lane"], images) and torch.equal(found["drivable"], images + 2)
    other = ExternalModel(Named(), {"lane": SemanticOutput(at="other")}, {"lane": 3}, mean=None, std=None)(
        images
    ).preds
    assert torch.equal(other["lane"], images + 1)  # what is pred goes before what it is called
    with pytest.raises(ValueError, match=r"^lane: the network gives 3 classes, but 2 are named"):
        ExternalModel(Named(), {"lane": SemanticOutput()}, {"lane": 2}, mean=None, std=None)(images)


def test_what_was_returned_is_shown_in_a_few_words():
    assert shown({"a": [torch.zeros(2, 3), 1.0], "b": None}) == "{a: ([2, 3], float), b: NoneType}"


# --- maps


def test_forms_of_a_map():
    logits = random(2, 3, 2, 4)
    assert SemanticOutput().read(logits, 3, SIZE) is logits
    p = logits.softmax(1)
    assert torch.allclose(SemanticOutput(form="probability").read(p, 3, SIZE).softmax(1), p, atol=1e-6)
    one = random(2, 1, 2, 4)
    both = SemanticOutput(form="binary").read(one, 2, SIZE)
    assert torch.allclose(both.softmax(1)[:, 1:], one.sigmoid(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_in_half_precision_are_finite(dtype):
    p = torch.tensor([0.0, 1.0, 0.25], dtype=dtype).view(1, 3, 1, 1)
    assert SemanticOutput(form="probability").read(p, 3, SIZE).flatten().tolist() == pytest.approx(
        [math.log(1e-8), 0, math.log(0.25)]
    )


def test_maps_that_are_none_are_refused():
    with pytest.raises(ValueError, match="form: 'prob' is none of logits, probability, binary"):
        SemanticOutput(form="prob")
    with pytest.raises(ValueError, match="^the network gives 3 classes, but 4 are named in `classes`"):
        SemanticOutput().read(random(1, 3, 2, 2), 4, SIZE)
    with pytest.raises(ValueError, match=r"^\[1, 3\] is no map"):
        SemanticOutput(at="x").read({"x": random(1, 3)}, 3, SIZE)


# --- finished detections


def test_rows_of_detections():
    rows = torch.tensor(
        [[[1.0, 2, 3, 4, 0.9, 2], [5, 6, 7, 8, 0.5, 1.0], [0, 0, 0, 0, 0, 0], [9, 9, 9, 9, -1, 3]]]
    )
    for form in ("auto", "detections"):
        pred = DetectionOutput(form=form, first_class=1).read(rows, 3, SIZE)
        assert pred.boxes[0, 0].tolist() == [1, 2, 3, 4] and pred.classes.tolist() == [[1, 0, PAD, PAD]]
        assert pred.scores[0].tolist() == pytest.approx([0.9, 0.5, 0, 0])


def test_a_mapping_an_image_is_padded_best_first():
    one = {
        "boxes": torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3]]),
        "scores": torch.tensor([0.2, 0.7]),
        "labels": torch.tensor([1, 3]),
    }
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    for returned in ([one, none], {"det": [one, none]}, (None, [one, none])):
        pred = DetectionOutput(first_class=1).read(returned, 3, SIZE)
        assert pred.boxes.tolist() == [[[2, 2, 3, 3], [0, 0, 1, 1]], [[0] * 4] * 2]
        assert pred.classes.tolist() == [[2, 0], [PAD, PAD]] and pred.scores[1].tolist() == [0, 0]
        assert pred.scores[0].tolist() == pytest.approx([0.7, 0.2])
    empty = DetectionOutput().read([none, none], 3, SIZE)
    assert (
        empty.boxes.shape == (2, 0, 4) and empty.classes.shape == (2, 0) and empty.classes.dtype == torch.long
    )
    with pytest.raises(ValueError, match=r"there is no 'labels' in \{boxes: \[0, 4\], scores: \[0\]\}"):
        DetectionOutput().read([{k: none[k] for k in ("boxes", "scores")}], 3, SIZE)


@pytest.mark.parametrize(("number", "first"), [(3, 0), (4, 1), (0, 2)])
def test_a_class_that_is_not_named_is_told_by_its_number(number, first):
    rows = torch.tensor([[[1.0, 2, 3, 4, 0.9, first], [1, 2, 3, 4, 0.8, number]]])
    with pytest.raises(
        ValueError, match=rf"found class {number}, but 3 are named in `classes` from {first} on"
    ):
        DetectionOutput(first_class=first).read(rows, 3, SIZE)


def test_background_below_the_first_class_is_nothing():
    assert DetectionOutput(first_class=1).read(
        torch.tensor([[[1.0, 2, 3, 4, 0.9, 0]]]), 3, SIZE
    ).classes.tolist() == [[PAD]]


# --- cells and predictions


def test_cells_of_our_form():
    raw = random(2, 21, 8)
    assert DetectionOutput(strides=[8, 16]).read({"x": raw}, 3, SIZE) is raw
    assert DetectionOutput(strides=[8, 16], form="cells").read(raw, 3, SIZE) is raw
    for wrong in (random(2, 20, 8), random(2, 21, 9)):
        with pytest.raises(
            ValueError, match=r"are not the 21 cells of strides \[8, 16\] with 4 \+ 1 \+ 3 values each"
        ):
            DetectionOutput(strides=[8, 16], form="cells").read(wrong, 3, SIZE)
    with pytest.raises(ValueError, match="may be many things; say which with form$"):
        DetectionOutput(strides=[8, 16]).read(random(2, 20, 8), 3, SIZE)
    with pytest.raises(ValueError, match="the network's cells have 4 classes, but 3 are named"):
        DetectionOutput(strides=[8, 16]).read(random(2, 21, 9), 3, SIZE)


def test_a_binary_map_of_several_channels():
    with pytest.raises(ValueError, match="binary is one logit, but the network gives 3"):
        SemanticOutput(form="binary").read(random(2, 3, 4, 4), 2, SIZE)


def test_predictions_by_hand():
    found = torch.tensor([[[10.0, 20, 4, 6, 0.5, 0.8, 0.1]]])  # centre, size, objectness, two classes
    pred = DetectionOutput(form="predictions", objectness=True).read(found, 2, SIZE)
    assert pred.boxes.tolist() == [[[8, 17, 12, 23]]] and pred.scores[0, 0].tolist() == pytest.approx(
        [0.4, 0.05]
    )
    assert pred.anchor_points is None and pred.strides is None
    pred = DetectionOutput(form="predictions", objectness=True, boxes="xyxy", scores="logit").read(
        found, 2, SIZE
    )
    assert pred.boxes.tolist() == [[[10, 20, 4, 6]]]
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert pred.scores[0, 0].tolist() == pytest.approx(
        [sigmoid(0.5) * sigmoid(0.8), sigmoid(0.5) * sigmoid(0.1)]
    )
    pred = DetectionOutput(form="predictions", transposed=True).read(found.transpose(1, 2), 3, SIZE)
    assert pred.boxes.tolist() == [[[8, 17, 12, 23]]] and pred.scores[0, 0].tolist() == pytest.approx(
        [0.5, 0.8, 0.1]
    )
    assert DetectionOutput(form="predictions").read(found.bfloat16(), 3, SIZE).boxes.dtype == torch.float32


def test_anchor_points_of_predictions_by_stride_anchor_row_and_column():
    pred = DetectionOutput(form="predictions", strides=[16, 8], anchors=3).read(random(2, 63, 6), 2, SIZE)
    points, strides = pred.anchor_points.tolist(), pred.strides.tolist()
    assert strides == [16.0] * 18 + [8.0] * 45
    assert (
        points[:6] == [[8, 8], [24, 8], [40, 8], [8, 24], [24, 24], [40, 24]]
        and points[6:12] == points[:6] == points[12:18]
    )
    assert (
        points[18:24] == [[4, 4], [12, 4], [20, 4], [28, 4], [36, 4], [4, 12]]
        and points[18:33] == points[33:48]
    )
    with pytest.raises(
        ValueError, match=r"63 predictions are not 1 for each of the 21 locations of strides \[16, 8\]"
    ):
        DetectionOutput(form="predictions", strides=[16, 8]).read(random(2, 63, 6), 2, SIZE)
    with pytest.raises(ValueError, match=r"predictions have 6 values, not 4 \+ 1 \+ 2; see objectness"):
        DetectionOutput(form="predictions", objectness=True).read(random(2, 63, 6), 2, SIZE)


def test_dense_predictions_by_name():
    found = {
        "boxes": random(2, 5, 4),
        "scores": random(2, 5, 3).sigmoid(),
        "locations": random(5, 2),
        "strides": torch.ones(5),
    }
    for locations in (
        found["locations"],
        found["locations"].expand(1, 5, 2),
        found["locations"].expand(2, 5, 2),
    ):
        pred = DetectionOutput().read({"det": {**found, "locations": locations}}, 3, SIZE)
        assert (
            isinstance(pred, DensePredictions)
            and pred.boxes is found["boxes"]
            and torch.equal(pred.anchor_points, found["locations"])
        )
    for key, wrong in (
        ("scores", random(2, 5, 4)),
        ("boxes", random(2, 6, 4)),
        ("strides", torch.ones(5, 1)),
        ("locations", random(4, 2)),
    ):
        with pytest.raises(
            ValueError, match=r"are not boxes \[B,A,4\], scores \[B,A,3\], locations \[A,2\], strides \[A\]"
        ):
            DetectionOutput().read({**found, key: wrong}, 3, SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "yolo"}, "form: 'yolo' is none of auto, cells, detections, predictions"),
        ({"boxes": "xywh"}, "boxes: 'xywh' is none of cxcywh, xyxy"),
        ({"scores": "logits"}, "scores: 'logits' is none of"),
        ({"anchors": 0}, "whole numbers above 0"),
        ({"strides": [8, 0]}, "whole numbers above 0"),
        ({"strides": [8, 1.5]}, "whole numbers above 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionOutput(**options)


def test_what_is_no_detection_is_refused():
    with pytest.raises(ValueError, match=r"^\[1, 3\] is neither"):
        DetectionOutput(at="x").read({"x": random(1, 3)}, 3, SIZE)
    with pytest.raises(ValueError, match="^detections are .*; these are"):
        DetectionOutput(form="detections").read(random(1, 4, 7), 3, SIZE)


# --- the network


class Keeps(nn.Module):
    def forward(self, images):
        self.shown = images
        return {"seg": images, "det": torch.zeros(1, 0, 6)}


def test_a_foreign_network_is_shown_what_it_knows():
    images = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    outputs, classes = {"seg": SemanticOutput(), "det": DetectionOutput()}, {"seg": 3, "det": 2}
    plain = ExternalModel(Keeps(), outputs, classes, mean=None, std=None)
    output = plain(images)
    assert (
        plain.net.shown is images
        and isinstance(output, ModelOutput)
        and output.preds["det"].boxes.shape == (1, 0, 4)
    )
    other = ExternalModel(
        Keeps(), outputs, classes, mean=(10.0, 20, 30), std=(2.0, 4, 8), bgr=True, scale=255.0
    )
    other(images)
    red, green, blue = (255 * images[:, i] for i in range(3))
    expected = torch.stack([(blue - 30) / 8, (green - 20) / 4, (red - 10) / 2], 1)
    assert torch.allclose(other.net.shown, expected)
    assert not other.state_dict() and "net" in dict(other.named_modules())


def test_a_network_that_returns_our_own_output():
    class Ours(nn.Module):
        def forward(self, images):
            return ModelOutput({"seg": images, "depth": images})

    images = torch.rand(1, 3, 2, 2)
    assert set(
        ExternalModel(Ours(), {"seg": SemanticOutput()}, {"seg": 3}, mean=None, std=None)(images).preds
    ) == {"seg"}


# --- foreign detections decoded


def task():
    return Detection("det", ("a", "b", "c"), (8,))


def test_dense_predictions_are_suppressed_as_torchvision_does():
    corner = random(2, 40, 2).abs() * 10
    boxes = torch.cat([corner, corner + 3 + 10 * random(2, 40, 2, seed=1).abs()], -1) - 4
    scores = random(2, 40, 3, seed=2).sigmoid()
    found = task().decode(
        DensePredictions(boxes, scores), SIZE, score_threshold=0.4, nms_iou=0.3, max_detections=12
    )
    inside = boxes.clamp(min=0)
    inside = torch.stack(
        [
            inside[..., 0].clamp(max=40),
            inside[..., 1].clamp(max=20),
            inside[..., 2].clamp(max=40),
            inside[..., 3].clamp(max=20),
        ],
        -1,
    )
    for image, box, score in zip(found, inside, scores, strict=True):
        cell, kind = (score > 0.4).nonzero(as_tuple=True)
        keep = batched_nms(box[cell], score[cell, kind], kind, 0.3)
        assert 12 < len(keep) < len(cell)
        keep = keep[:12]
        assert torch.equal(image.boxes, box[cell][keep]) and torch.equal(image.classes, kind[keep])
        assert torch.equal(image.scores, score[cell, kind][keep])


def test_dense_predictions_in_half_precision_are_decoded_in_float32():
    boxes, scores = (
        torch.tensor([[[0.0, 0, 16, 16], [0, 0, 16, 15]]]),
        torch.tensor([[[0.5, 0, 0], [0.75, 0, 0]]]),
    )
    (found,) = task().decode(DensePredictions(boxes.bfloat16(), scores.bfloat16()), SIZE)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.boxes.tolist() == [[0, 0, 16, 15]] and found.scores.tolist() == [0.75]


def test_finished_detections_are_sorted_and_not_suppressed_again():
    boxes = torch.tensor([[[0.0, 0, 8, 8]] * 5, [[1.0, 1, 2, 2]] * 5])
    scores = torch.tensor([[0.3, 0.9, 0.9, 0.5, 0.01], [0.9, 0, 0, 0, 0]])
    classes = torch.tensor([[0, PAD, 2, 1, 1], [PAD] * 5])
    first, second = task().decode(PaddedDetections(boxes.bfloat16(), scores, classes), SIZE)
    assert first.classes.tolist() == [2, 1, 0] and first.scores.tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert first.boxes.dtype == torch.float32 and len(second.scores) == 0
    assert task().decode(PaddedDetections(boxes, scores, classes), SIZE, max_detections=1)[
        0
    ].classes.tolist() == [2]
    assert task().decode(PaddedDetections(boxes, scores, classes), SIZE, score_threshold=0.6)[
        0
    ].classes.tolist() == [2]
    none = PaddedDetections(torch.zeros(1, 0, 4), torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.long))
    assert task().decode(none, SIZE)[0].boxes.shape == (0, 4)


def test_boxes_are_restored_inside_the_original_image():
    boxes = torch.tensor([[-5.0, -2, 10, 10], [10, 5, 60, 30], [-9, 0, -1, 8]])
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 2]))
    back = task().restore(found, Geometry((40, 80), (20, 40)))
    assert back.boxes.tolist() == [[0, 0, 20, 20], [20, 10, 80, 40]] and back.classes.tolist() == [0, 1]


def test_one_part_does_not_teach_two_tasks_unless_that_is_what_was_said():
    class One(nn.Module):
        def forward(self, images):
            return images[:, :2]

    def preds(**readers):
        return ExternalModel(One(), readers, dict.fromkeys(readers, 2), mean=None, std=None)(images).preds

    images = torch.rand(1, 3, 2, 2)
    assert torch.equal(preds(lane=SemanticOutput())["lane"], images[:, :2])
    with pytest.raises(
        ValueError, match=r"^drivable: it would be read from the same part .* as lane; set at"
    ):
        preds(lane=SemanticOutput(), drivable=SemanticOutput())
