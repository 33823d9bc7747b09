"""How a teacher with an input size of its own sees a batch, and where what it says lies in the student's images."""

import pytest
import torch
import torch.nn.functional as F

from multitask_kd.batch import PAD, Batch, DensePredictions, PaddedDetections
from multitask_kd.distill.teacher_geometry import GREY, TeacherGeometry


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
def test_the_images_place_in_the_teachers_input(student, own, scale, content):
    sight = TeacherGeometry(student, own)
    assert sight.scale == scale and sight.content == content
    assert sight.same == (student == own) and sight.sharper == (scale > 1)


def test_the_same_size_changes_nothing():
    sight, batch = TeacherGeometry((6, 8), (6, 8)), Batch(random(1, 3, 6, 8))
    assert sight.images(batch) is batch.images
    for said in (random(1, 2, 3, 4), DensePredictions(random(1, 2, 4), random(1, 2, 3))):
        assert sight.back(said) is said
    said = sight.back(found((1, 2, 5, 6, 0.5, 0), (4, -1, 99, 99, 0.5, 1), (8, 0, 9, 6, 0.5, 1)))
    assert said.boxes[0, :2].tolist() == [[1, 2, 5, 6], [4, 0, 8, 6]] and said.classes.tolist() == [[0, 1, PAD]]


def test_the_batchs_own_view_is_shown_with_grey_below_and_to_the_right():
    view = random(2, 3, 12, 16)
    batch = Batch(random(2, 3, 6, 8, seed=1), views={(12, 16): view, (6, 8): random(2, 3, 6, 8, seed=2)})
    assert TeacherGeometry((6, 8), (12, 16)).images(batch) is view
    for own, below, right in (((16, 16), 4, 0), ((12, 20), 0, 4)):
        shown = TeacherGeometry((6, 8), own).images(batch)
        assert shown.shape == (2, 3, *own) and torch.equal(shown[:, :, :12, :16], view)
        padding = torch.cat([shown[:, :, 12:].flatten(), shown[:, :, :, 16:].flatten()])
        assert padding.numel() == 2 * 3 * (below * 16 + right * 12) and padding.eq(GREY).all()


def test_without_a_view_the_students_images_are_resampled():
    batch = Batch(random(1, 3, 6, 8))
    grown = TeacherGeometry((6, 8), (16, 16)).images(batch)
    assert torch.equal(grown[:, :, :12], F.interpolate(batch.images, size=(12, 16), mode="bilinear", align_corners=False))
    # 4 columns become one: averaged, where interpolation alone would see the two in the middle
    stripes = torch.zeros(1, 3, 8, 16)
    stripes[..., ::4] = 1.0
    shrunk = TeacherGeometry((8, 16), (3, 4)).images(Batch(stripes))
    assert shrunk.shape == (1, 3, 3, 4) and shrunk[:, :, :2].sub(0.25).abs().max() < 0.1


def test_a_map_is_cut_to_the_images():
    said = random(2, 5, 4, 4)  # stride 4 of 16 x 16; the images are the upper 12 rows
    assert torch.equal(TeacherGeometry((6, 8), (16, 16)).back(said), said[:, :, :3])
    assert torch.equal(TeacherGeometry((8, 6), (16, 16)).back(said), said[:, :, :, :3])
    assert TeacherGeometry((6, 8), (16, 16)).back(said > 0.5).dtype == torch.bool
    assert TeacherGeometry((1, 8), (16, 16)).back(random(1, 2, 2, 2)).shape == (1, 2, 1, 2)  # a row is always left


def test_boxes_and_places_are_scaled():
    sight = TeacherGeometry((6, 8), (16, 16))
    dense = DensePredictions(torch.tensor([[[2.0, 4, 6, 20]]]), torch.tensor([[[0.5]]]), torch.tensor([[4.0, 10]]), torch.tensor([4.0]))
    back = sight.back(dense)
    assert back.boxes.tolist() == [[[1, 2, 3, 10]]] and back.places.tolist() == [[2, 5]] and back.strides.tolist() == [2]
    assert back.scores is dense.scores
    back = sight.back(DensePredictions(dense.boxes, dense.scores))
    assert back.boxes.tolist() == [[[1, 2, 3, 10]]] and back.places is None and back.strides is None


def test_detections_are_cut_to_the_images_and_those_in_the_padding_alone_are_none():
    # 12 x 16 of 16 x 16 are the images, 6 x 8 for the student
    said = found((2, 4, 6, 8, 0.9, 2), (2, 4, 20, 15, 0.8, 1), (2, 12, 9, 16, 0.7, 0), (-4, -2, 4, 4, 0.6, 0), (0, 0, 0, 0, 0, PAD))
    back = TeacherGeometry((6, 8), (16, 16)).back(said)
    assert back.boxes[0, [0, 1, 3]].tolist() == [[1, 2, 3, 4], [1, 2, 8, 6], [0, 0, 2, 2]]
    assert back.classes.tolist() == [[2, 1, PAD, 0, PAD]]
    assert back.scores[0].tolist() == pytest.approx([0.9, 0.8, 0, 0.6, 0])
    half = TeacherGeometry((6, 8), (16, 16)).back(found((2, 4, 6, 8, 0.9, 2), dtype=torch.bfloat16))
    assert half.boxes.dtype == torch.float32 and half.boxes.tolist() == [[[1, 2, 3, 4]]]
    none = TeacherGeometry((6, 8), (16, 16)).back(PaddedDetections(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.long)))
    assert none.boxes.shape == (2, 0, 4)
