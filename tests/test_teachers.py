"""All teachers of a run: a batch -> one ModelOutput in the student's classes, pixels and cells."""

import math

import pytest
import torch
from torch import nn
from torchvision.ops import batched_nms

from multitask_kd.batch import GREY, PAD, Batch, DensePredictions, ModelOutput, PaddedDetections
from multitask_kd.distill.teacher import Subject, Teacher, Teachers
from multitask_kd.errors import UserError
from multitask_kd.models.class_mapping import UNKNOWN, ClassMapping
from multitask_kd.models.dense_head import cells, decode_boxes
from multitask_kd.tasks.base import Task
from multitask_kd.tasks.classification import Classification
from multitask_kd.tasks.depth import Depth
from multitask_kd.tasks.detection import Detection, Detections
from multitask_kd.tasks.semantic import Semantic

CPU = torch.device("cpu")
SIZE, STRIDES = (24, 40), (8, 16)  # 3 x 5 and 2 x 3 cells
COUNT = 21
SEG, DET = ("road", "car", "tree"), ("cat", "dog")


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(*rows):
    rows = torch.tensor([rows], dtype=torch.float32)
    return PaddedDetections(rows[..., :4], rows[..., 4], rows[..., 5].long())


class Fixed(nn.Module):
    """A network that predicts the same of every batch, and keeps what it was shown."""

    def __init__(self, **preds):
        super().__init__()
        self.preds = preds
        self.bias = nn.Parameter(torch.zeros(()))
        self.tapped = nn.Identity()

    def forward(self, images):
        self.shown = images
        self.tapped(images + self.bias)
        return ModelOutput(
            {
                k: p + self.bias.to(p.dtype) if isinstance(p, torch.Tensor) else p
                for k, p in self.preds.items()
            }
        )


def teacher(size=None, strides=STRIDES, mappings=None, taps=(), **preds):
    tasks = STUDENT | {"det": Detection("det", DET, strides)}
    return Teacher(
        Fixed(**preds), {k: tasks[k] for k in preds}, CPU, None, taps, mappings=mappings, size=size
    )


WEATHER = ("clear", "rain", "snow")
STUDENT = {
    "seg": Semantic("seg", SEG, (8,)),
    "det": Detection("det", DET, STRIDES),
    "weather": Classification("weather", WEATHER, (16,)),
    "depth": Depth("depth", (), (8,)),
}


def teachers(task, *members, form=""):
    members = {f"t{i}": m for i, m in enumerate(members)}
    return Teachers(members, {task: Subject(STUDENT[task], tuple(members), form)}, SIZE)


def batch(images=2, **more):
    return Batch(torch.rand(images, 3, *SIZE, generator=torch.Generator().manual_seed(9)), **more)


def boxes_of(raw):
    return decode_boxes(raw, *cells(SIZE, STRIDES, CPU))


# --- one teacher


def test_a_teacher_of_the_students_size_classes_and_cells_is_taken_as_it_is():
    seg, det = random(2, 3, 3, 5), random(2, COUNT, 7, seed=1)
    one = teacher(seg=seg, det=det, mappings={"seg": ClassMapping(SEG, SEG), "det": ClassMapping(DET, DET)})
    both = Teachers({"a": one}, {task: Subject(STUDENT[task], ["a"]) for task in ("seg", "det")}, SIZE)
    output = both(batch())
    assert (
        torch.equal(output.preds["seg"], seg)
        and torch.equal(output.preds["det"], det)
        and not output.ignore_mask
    )
    assert not output.preds["seg"].requires_grad and not output.preds["det"].requires_grad
    assert one.net.shown is not None and one.net.shown.shape == (2, 3, *SIZE)


def test_a_tasks_classes_are_brought_to_the_students():
    seg = random(1, 2, 3, 5)
    one = teacher(seg=seg, mappings={"seg": ClassMapping(("sky", "car"), SEG)})
    output = teachers("seg", one)(batch(1))
    assert (
        torch.equal(output.preds["seg"][:, 1], seg[:, 1]) and output.preds["seg"][:, [0, 2]].eq(UNKNOWN).all()
    )
    assert torch.equal(output.ignore_mask["seg"], seg[:, 0] > seg[:, 1])
    assert one.known("seg") == (1,) and teachers("seg", one).known("seg") == (1,)
    assert teacher(det=random(1, COUNT, 7)).known("det") == (0, 1)


def test_the_ignore_mask_is_cropped_to_the_images_too():
    seg = random(1, 2, 5, 5)
    one = teacher((80, 80), seg=seg, mappings={"seg": ClassMapping(("sky", "car"), SEG)})
    assert torch.equal(teachers("seg", one)(batch(1)).ignore_mask["seg"], (seg[:, 0] > seg[:, 1])[:, :3])


def test_no_gradient_passes_through_a_teacher():
    one = Teacher(nn.Conv2d(3, 3, 1), {}, CPU)
    one.net.forward = lambda images: ModelOutput({"seg": images * 2})
    assert not one(torch.zeros(1, 3, 2, 2, requires_grad=True)).preds["seg"].requires_grad


def test_a_task_that_is_not_taught_is_left_out():
    one = teacher(seg=random(1, 3, 3, 5), det=random(1, COUNT, 7))
    assert set(teachers("seg", one)(batch(1)).preds) == {"seg"}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twice_the_input_and_twice_the_strides_line_up_cell_for_cell(images, dtype):
    raw = random(images, COUNT, 7, scale=1.0).to(dtype)
    one = teacher((48, 80), (16, 32), det=raw)
    output = teachers("det", one)(batch(images))
    assert one.net.shown.shape == (images, 3, 48, 80)
    pred, raw = output.preds["det"], raw.float()
    assert pred.dtype == torch.float32 and not output.ignore_mask["det"].any()
    assert torch.allclose(pred[..., :4], raw[..., :4], atol=1e-3)
    assert torch.allclose(boxes_of(pred), boxes_of(raw), atol=1e-3)
    score = raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()
    assert torch.allclose(pred[..., 4:5].sigmoid() * pred[..., 5:].sigmoid(), score, atol=3e-4)


def test_a_letterbox_below_is_cut_away():
    """48 x 80 of 80 x 80 are the images: the cells of the rows below belong to no image."""
    count = 5 * 5 + 3 * 3
    raw = random(1, count, 7, scale=1.0)
    one = teacher((80, 80), (16, 32), det=raw, seg=random(1, 3, 5, 5))
    both = Teachers({"a": one}, {task: Subject(STUDENT[task], ["a"]) for task in ("seg", "det")}, SIZE)
    output = both(batch(1))
    grey = GREY / 255
    assert one.net.shown[:, :, 48:].eq(grey).all() and not one.net.shown[:, :, :48].eq(grey).any()
    assert torch.equal(output.preds["seg"], one.net.preds["seg"][:, :, :3])
    kept = [*range(15), *range(25, 31)]  # the upper 3 of 5 rows of 5, the upper 2 of 3 rows of 3
    assert not output.ignore_mask.get("det", torch.zeros(1)).any()
    assert torch.allclose(output.preds["det"][..., :4], raw[:, kept, :4], atol=1e-3)


def test_the_batchs_images_of_its_size_are_shown():
    larger = torch.rand(1, 3, 48, 80)
    one = teacher((48, 80), (16, 32), det=random(1, COUNT, 7))
    all_of_them = teachers("det", one)
    all_of_them(batch(1, teacher_images={(48, 80): larger}))
    assert one.net.shown is larger and all_of_them.sizes() == [(48, 80)]
    assert (
        teachers("det", teacher((12, 20), det=random(1, COUNT, 7)), teacher(det=random(1, COUNT, 7))).sizes()
        == []
    )


def test_other_strides_of_the_same_input_are_brought_by_location():
    raw = random(1, 15, 7, scale=1.0)  # stride 8 alone
    output = teachers("det", teacher(strides=(8,), det=raw))(batch(1))
    assert output.ignore_mask["det"][0].tolist() == [False] * 15 + [True] * 6
    assert output.relocated == {"det": {"t0"}}
    assert torch.allclose(output.preds["det"][:, :15, :4], raw[..., :4], atol=1e-3)
    here = teacher(det=random(1, COUNT, 7))
    assert teachers("det", here)(batch(1)).relocated == {}
    assert teachers("det", here, teacher(strides=(8,), det=raw))(batch(1)).relocated == {"det": {"t1"}}


def test_the_same_strides_of_a_larger_input_are_other_cells():
    raw = random(1, 6 * 10 + 3 * 5, 7)
    output = teachers("det", teacher((48, 80), det=raw))(batch(1))
    # strides 8 and 16 there are 4 and 8 here: both are nearest to the student's 8
    assert (
        output.preds["det"].shape == (1, COUNT, 7)
        and output.ignore_mask["det"][0].tolist() == [False] * 15 + [True] * 6
    )


def test_predictions_of_a_detector_from_elsewhere_are_brought_by_location():
    dense = DensePredictions(
        torch.tensor([[[8.0, 8, 24, 16]]]),
        torch.tensor([[[0.1, 0.6]]]),
        torch.tensor([[20.0, 20]]),
        torch.tensor([16.0]),
    )
    output = teachers("det", teacher((48, 80), det=dense))(batch(1))
    # anchor point (10, 10) of stride 8: row 1, column 1; box (4, 4, 12, 8)
    assert (~output.ignore_mask["det"][0]).nonzero().flatten().tolist() == [6]
    assert torch.allclose(boxes_of(output.preds["det"])[0, 6], torch.tensor([4.0, 4, 12, 8]), atol=1e-4)
    assert output.preds["det"][0, 6, [4, 5]].sigmoid().tolist() == pytest.approx([0.6, 1 / 6], rel=1e-4)


# --- as detections


def test_cells_as_detections_are_decoded_in_the_students_pixels():
    raw = random(2, COUNT, 7)
    same = teachers("det", teacher(det=raw), form="detections")(batch()).preds["det"]
    wide = teachers("det", teacher((48, 80), (16, 32), det=raw), form="detections")(batch()).preds["det"]
    assert isinstance(same, PaddedDetections) and same.boxes.shape[0] == 2
    scores = raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()
    boxes = boxes_of(raw).clamp(min=0).minimum(torch.tensor([40.0, 24, 40, 24]))
    for i in range(2):
        cell, kind = (scores[i] > 0.01).nonzero(as_tuple=True)
        keep = batched_nms(boxes[i, cell], scores[i, cell, kind], kind, 0.6)
        keep = keep[
            (boxes[i, cell][keep, 2:] > boxes[i, cell][keep, :2]).all(1)
        ]  # the others lie outside the image
        there = same.classes[i] >= 0
        assert torch.allclose(same.scores[i][there], scores[i, cell, kind][keep])
        assert torch.allclose(same.boxes[i][there], boxes[i, cell][keep]) and torch.equal(
            same.classes[i][there], kind[keep]
        )
        assert same.scores[i][~there].eq(0).all()
    assert torch.allclose(wide.scores, same.scores, atol=1e-6) and torch.allclose(
        wide.boxes, same.boxes, atol=1e-3
    )


def test_finished_detections_are_moved_to_the_students_classes_and_pixels():
    given = found((8, 8, 24, 16, 0.9, 0), (8, 8, 24, 16, 0.8, 1), (2, 50, 20, 70, 0.7, 0))
    one = teacher((80, 80), det=given, mappings={"det": ClassMapping(("dog", "owl"), DET)})
    output = teachers("det", one, form="detections")(batch(1))
    assert output.preds["det"].classes.tolist() == [
        [1, PAD, PAD]
    ]  # an owl; and a dog in the padding below 48
    assert output.preds["det"].boxes[0, 0].tolist() == [4, 4, 12, 8]
    assert output.preds["det"].scores[0].tolist() == pytest.approx([0.9, 0, 0]) and not output.ignore_mask


def test_no_detections_at_all():
    raw = torch.full((2, COUNT, 7), -30.0)
    output = teachers("det", teacher(det=raw), form="detections")(batch())
    assert output.preds["det"].boxes.shape == (2, 0, 4) and output.preds["det"].classes.shape == (2, 0)
    assert torch.equal(
        STUDENT["det"].select(output.preds["det"], torch.tensor([1])).scores, torch.zeros(1, 0)
    )


def test_padding_by_hand():
    one = Detections(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.5]), torch.tensor([1]))
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    both = PaddedDetections.padded([none, one])
    assert both.boxes.tolist() == [[[0, 0, 0, 0]], [[1, 2, 3, 4]]]
    assert both.scores.tolist() == [[0], [0.5]] and both.classes.tolist() == [[PAD], [1]]


# --- several


def test_several_identical_teachers_predict_what_one_predicts():
    seg, det = random(2, 3, 3, 5), random(2, COUNT, 7, seed=1)
    for task, raw in (("seg", seg), ("det", det)):
        one = teachers(task, teacher(**{task: raw}))(batch())
        three = teachers(task, *(teacher(**{task: raw}) for _ in range(3)))(batch())
        assert three.ignore_mask == {}
        own, other = one.preds[task], three.preds[task]
        own, other = (own.softmax(1), other.softmax(1)) if task == "seg" else (own, other)
        assert torch.allclose(own, other, atol=1e-3)
    # separate objects, so that nothing is merged
    given = found((0, 0, 8, 8, 0.9, 0), (16, 0, 24, 8, 0.8, 1))
    three = teachers("det", *(teacher(det=given) for _ in range(3)), form="detections")(batch(1)).preds["det"]
    assert all(torch.allclose(a.float(), b.float(), atol=1e-3) for a, b in zip(three, given, strict=True))


def test_one_ignores_a_pixel_and_the_other_does_not():
    first, second = random(1, 3, 3, 5), random(1, 3, 3, 5, seed=1)
    mapping = ClassMapping(("road", "car", "sky"), SEG)
    both = teachers("seg", teacher(seg=first, mappings={"seg": mapping}), teacher(seg=second))
    output = both(batch(1))
    ignored = first.argmax(1) == 2
    assert (
        ignored.any()
        and not ignored.all()
        and not output.ignore_mask["seg"].any()
        and both.known("seg") == (0, 1, 2)
    )
    alone = second.softmax(1).movedim(1, -1)[ignored]
    assert torch.allclose(output.preds["seg"].softmax(1).movedim(1, -1)[ignored], alone, atol=1e-5)
    p = first[:, :2].softmax(1)
    mean = torch.stack(
        [p[:, 0] + second.softmax(1)[:, 0], p[:, 1] + second.softmax(1)[:, 1], 2 * second.softmax(1)[:, 2]], 1
    )
    mean = mean / mean.sum(1, keepdim=True)
    assert torch.allclose(
        output.preds["seg"].softmax(1).movedim(1, -1)[~ignored], mean.movedim(1, -1)[~ignored], atol=1e-5
    )


def test_teachers_of_other_classes_and_sizes_are_averaged_over_cells():
    cat, dog = torch.full((1, COUNT, 6), -8.0), torch.full((1, COUNT, 6), -8.0)
    for raw, at in ((cat, 3), (dog, 9)):
        raw[..., :4] = 0
        raw[0, at, 4:] = 3.0
    members = (
        teacher(det=cat, mappings={"det": ClassMapping(("cat",), DET)}),
        teacher((48, 80), (16, 32), det=dog, mappings={"det": ClassMapping(("dog",), DET)}),
    )
    both = teachers("det", *members)
    output = both(batch(1))
    assert both.known("det") == (0, 1)
    p = 1 / (1 + math.exp(-3))
    score = output.preds["det"][..., 4:5].sigmoid() * output.preds["det"][..., 5:].sigmoid()
    assert score[0, 3].tolist() == pytest.approx([p * p, 0], abs=1e-3)
    assert score[0, 9].tolist() == pytest.approx([0, p * p], abs=1e-3)
    assert (score > 0.01).sum() == 2
    found_by_both = teachers("det", *members, form="detections")(batch(1)).preds["det"]
    assert found_by_both.scores[0, :2].tolist() == pytest.approx([p * p, p * p], abs=1e-3)
    assert sorted(found_by_both.classes[0, :2].tolist()) == [0, 1]


# --- tasks of other kinds


def test_a_classification_is_brought_to_the_students_classes_and_averaged():
    first, second = torch.tensor([[2.0, 0, 1], [0, 3, 0]]), torch.tensor([[1.0, 0, 0], [0, 0, 2]])
    one = teacher(
        (80, 80), weather=first, mappings={"weather": ClassMapping(("rain", "fog", "clear"), WEATHER)}
    )
    output = teachers("weather", one)(batch())
    # of the first image the likeliest is rain, of the second the teacher's own fog
    assert output.ignore_mask["weather"].tolist() == [False, True] and one.known("weather") == (0, 1)
    assert output.preds["weather"].tolist() == [[1, 2, UNKNOWN], [0, 0, UNKNOWN]]
    mean = teachers("weather", one, teacher(weather=second))(batch())
    assert not mean.ignore_mask["weather"].any()
    p, q = torch.tensor([1.0, 2]).softmax(0), second.softmax(1)
    by_hand = torch.stack([(p[0] + q[0, 0]) / 2, (p[1] + q[0, 1]) / 2, q[0, 2]])
    assert torch.allclose(mean.preds["weather"][0].softmax(0), by_hand / by_hand.sum(), atol=1e-5)
    assert torch.allclose(
        mean.preds["weather"][1].softmax(0), q[1], atol=1e-5
    )  # where one ignores the image, the other's


def test_a_depth_is_cropped_to_the_images_and_averaged_in_logarithms():
    wide = random(1, 1, 5, 5)
    one, two = teacher((80, 80), depth=wide), teacher(depth=torch.full((1, 1, 3, 5), 4.0))
    assert torch.equal(teachers("depth", one)(batch(1)).preds["depth"], wide[:, :, :3])
    mean = teachers("depth", one, two)(batch(1))
    assert torch.allclose(mean.preds["depth"], (wide[:, :, :3] + 4) / 2, atol=1e-6) and mean.ignore_mask == {}


def test_two_teachers_of_a_kind_that_cannot_average_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(Depth, "average", Task.average)
    both = teachers("depth", *(teacher(depth=random(1, 1, 3, 5)) for _ in range(2)))
    with pytest.raises(
        UserError,
        match=r"tasks\.depth: a task of kind 'depth' cannot average several teachers; let one of them",
    ):
        both(batch(1))


# --- taps


def test_taps_have_the_teachers_name_where_there_are_several():
    a, b = (
        teacher(det=random(1, COUNT, 7), taps=["tapped"]),
        teacher((48, 80), (16, 32), det=random(1, COUNT, 7), taps=["tapped"]),
    )
    one, two = teachers("det", a), teachers("det", a, b)
    assert set(one(batch(1)).taps) == {"tapped"} and one.tap("tapped") == (a, "tapped")
    output = two(batch(1))
    assert {k: tuple(t.shape[2:]) for k, t in output.taps.items()} == {
        "t0:tapped": SIZE,
        "t1:tapped": (48, 80),
    }
    assert (
        two.tap("t1:tapped") == (b, "tapped")
        and two.tap_name("t0", "x") == "t0:x"
        and one.tap_name("t0", "x") == "x"
    )
    assert not any(t.requires_grad for t in output.taps.values())


# --- what of a prediction fits a soft loss


def test_predictions_of_known_locations_and_finished_detections_can_be_told_apart():
    det, dense = STUDENT["det"], DensePredictions(random(1, 4, 4), random(1, 4, 2))
    assert det.why_not(random(1, COUNT, 7), "", "teacher") is None
    assert (
        det.why_not(dense._replace(anchor_points=random(4, 2), strides=torch.ones(4)), "", "teacher") is None
    )
    assert det.why_not(dense, "", "teachers.a") == (
        "teachers.a predicts at unknown locations: give teachers.a.outputs.det.strides, and anchors; or use "
        "det_boxes"
    )
    assert "gives detections after suppression" in det.why_not(found((0, 0, 1, 1, 0.5, 0)), "", "teacher")
    for pred in (random(1, COUNT, 7), dense, found((0, 0, 1, 1, 0.5, 0))):
        assert det.why_not(pred, "detections", "teacher") is None
