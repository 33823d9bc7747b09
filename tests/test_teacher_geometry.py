"""How a teacher with an input size of its own is shown a batch, and where its predictions then lie."""

import pytest
import torch
import torch.nn.functional as F

from multitask_kd.batch import GREY, PAD, Batch, DensePredictions, PaddedDetections
from multitask_kd.models.detections import dense_in_student, detections_in_student
from multitask_kd.models.teacher_geometry import TeacherGeometry
from multitask_kd.tasks.base import KINDS, build_task


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def found(*rows, dtype=torch.float32):
    rows = torch.tensor([rows], dtype=torch.float32)
    return PaddedDetections(rows[..., :4].to(dtype), rows[..., 4], rows[..., 5].long())


@pytest.mark.parametrize(
    ("student", "own", "scale", "content"),
    [
        ((48, 64), (48, 64), 1.0, (48, 64)),
        ((48, 64), (96, 128), 2.0, (96, 128)),
        ((48, 64), (128, 128), 2.0, (96, 128)),  # the rest is below
        ((48, 64), (96, 200), 2.0, (96, 128)),  # the rest is to the right
        ((48, 64), (100, 100), 100 / 64, (75, 100)),
        ((50, 64), (100, 100), 100 / 64, (78, 100)),  # 78.125
        ((48, 64), (24, 64), 0.5, (24, 32)),
        ((4, 400), (100, 100), 0.25, (1, 100)),
        ((1, 400), (100, 100), 0.25, (1, 100)),  # never less than a row
    ],
)
def test_where_the_images_lie_in_the_teachers_input(student, own, scale, content):
    geometry = TeacherGeometry(student, own)
    assert geometry.scale == scale and geometry.content == content
    assert geometry.same == (student == own) and geometry.sharper == (scale > 1)


def test_the_same_size_changes_nothing():
    geometry, batch = TeacherGeometry((6, 8), (6, 8)), Batch(random(1, 3, 6, 8))
    assert geometry.images(batch) is batch.images
    maps, dense = random(1, 2, 3, 4), DensePredictions(random(1, 2, 4), random(1, 2, 3))
    assert geometry.cropped(maps) is maps and dense_in_student(dense, geometry) is dense
    clipped = detections_in_student(
        found((1, 2, 5, 6, 0.5, 0), (4, -1, 99, 99, 0.5, 1), (8, 0, 9, 6, 0.5, 1)), geometry
    )
    assert clipped.boxes[0, :2].tolist() == [[1, 2, 5, 6], [4, 0, 8, 6]] and clipped.classes.tolist() == [
        [0, 1, PAD]
    ]


def test_the_batchs_own_images_of_its_size_are_shown_with_grey_below_and_to_the_right():
    larger = random(2, 3, 12, 16)
    others = {(12, 16): larger, (6, 8): random(2, 3, 6, 8, seed=2)}
    batch = Batch(random(2, 3, 6, 8, seed=1), teacher_images=others)
    assert TeacherGeometry((6, 8), (12, 16)).images(batch) is larger
    for own, below, right in (((16, 16), 4, 0), ((12, 20), 0, 4)):
        shown = TeacherGeometry((6, 8), own).images(batch)
        assert shown.shape == (2, 3, *own) and torch.equal(shown[:, :, :12, :16], larger)
        padding = torch.cat([shown[:, :, 12:].flatten(), shown[:, :, :, 16:].flatten()])
        assert padding.numel() == 2 * 3 * (below * 16 + right * 12)
        assert padding.sub(GREY / 255).abs().max() < 1e-6


def test_without_images_of_its_size_the_students_are_resampled():
    batch = Batch(random(1, 3, 6, 8))
    grown = TeacherGeometry((6, 8), (16, 16)).images(batch)
    assert torch.equal(
        grown[:, :, :12], F.interpolate(batch.images, size=(12, 16), mode="bilinear", align_corners=False)
    )
    # 4 columns become one: averaged, where interpolation alone would take the two in the middle
    stripes = torch.zeros(1, 3, 8, 16)
    stripes[..., ::4] = 1.0
    shrunk = TeacherGeometry((8, 16), (3, 4)).images(Batch(stripes))
    assert shrunk.shape == (1, 3, 3, 4) and shrunk[:, :, :2].sub(0.25).abs().max() < 0.1


def test_a_map_is_cropped_to_the_images():
    maps = random(2, 5, 4, 4)  # stride 4 of 16 x 16; the images are the upper 12 rows
    assert torch.equal(TeacherGeometry((6, 8), (16, 16)).cropped(maps), maps[:, :, :3])
    assert torch.equal(TeacherGeometry((8, 6), (16, 16)).cropped(maps), maps[:, :, :, :3])
    assert TeacherGeometry((6, 8), (16, 16)).cropped(maps > 0.5).dtype == torch.bool
    assert TeacherGeometry((1, 8), (16, 16)).cropped(random(1, 2, 2, 2)).shape == (
        1,
        2,
        1,
        2,
    )  # a row is always left


def test_boxes_and_anchor_points_are_scaled():
    geometry, boxes = TeacherGeometry((6, 8), (16, 16)), torch.tensor([[[2.0, 4, 6, 20]]])
    dense = DensePredictions(boxes, torch.tensor([[[0.5]]]), torch.tensor([[4.0, 10]]), torch.tensor([4.0]))
    back = dense_in_student(dense, geometry)
    assert back.boxes.tolist() == [[[1, 2, 3, 10]]] and back.scores is dense.scores
    assert back.anchor_points.tolist() == [[2, 5]] and back.strides.tolist() == [2]
    back = dense_in_student(DensePredictions(dense.boxes, dense.scores), geometry)
    assert back.boxes.tolist() == [[[1, 2, 3, 10]]] and back.anchor_points is None and back.strides is None


def test_detections_are_clipped_to_the_images_and_those_in_the_padding_alone_are_none():
    # 12 x 16 of 16 x 16 are the images, 6 x 8 for the student
    geometry = TeacherGeometry((6, 8), (16, 16))
    rows = [
        (2, 4, 6, 8, 0.9, 2),
        (2, 4, 20, 15, 0.8, 1),
        (2, 12, 9, 16, 0.7, 0),
        (-4, -2, 4, 4, 0.6, 0),
        (0, 0, 0, 0, 0, PAD),
    ]
    back = detections_in_student(found(*rows), geometry)
    assert back.boxes[0, [0, 1, 3]].tolist() == [[1, 2, 3, 4], [1, 2, 8, 6], [0, 0, 2, 2]]
    assert back.classes.tolist() == [[2, 1, PAD, 0, PAD]]
    assert back.scores[0].tolist() == pytest.approx([0.9, 0.8, 0, 0.6, 0])
    half = detections_in_student(found((2, 4, 6, 8, 0.9, 2), dtype=torch.bfloat16), geometry)
    assert half.boxes.dtype == torch.float32 and half.boxes.tolist() == [[[1, 2, 3, 4]]]
    empty = PaddedDetections(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.long))
    assert detections_in_student(empty, geometry).boxes.shape == (2, 0, 4)


@pytest.mark.parametrize("kind", [name for name in KINDS.names() if KINDS.get(name, "x").is_map])
def test_maps_and_where_they_are_ignored_are_cropped_together(kind):
    task, geometry = build_task("some", kind, ("a", "b"), (4,)), TeacherGeometry((6, 8), (16, 16))
    maps, ignored = random(2, 2 if task.has_classes else 1, 4, 4), random(2, 4, 4) > 0.5
    given = task.to_student(maps, ignored, geometry, task, "")
    assert torch.equal(given.pred, maps[:, :, :3]) and torch.equal(given.ignore_mask, ignored[:, :3])
    assert not given.relocated and task.to_student(maps, None, geometry, task, "").ignore_mask is None


def test_the_classes_of_a_whole_image_do_not_depend_on_its_size():
    task, logits = build_task("weather", "classification", ("a", "b"), (16,)), random(2, 2)
    ignored = torch.tensor([True, False])
    given = task.to_student(logits, ignored, TeacherGeometry((6, 8), (16, 16)), task, "")
    assert given.pred is logits and given.ignore_mask is ignored and not given.relocated
