import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from multitask_kd.batch import IGNORE
from multitask_kd.metrics import mean_ap
from multitask_kd.metrics.accuracy import Accuracy
from multitask_kd.metrics.depth import DepthErrors
from multitask_kd.metrics.mean_ap import MeanAP
from multitask_kd.metrics.miou import MeanIoU

# --- mean IoU


def test_miou_by_hand():
    metric = MeanIoU(["a", "b", "c", "absent"])
    truth = np.array([[0, 0, 0, 1], [1, 1, 2, IGNORE]], dtype=np.uint8)
    prediction = np.array([[0, 0, 1, 1], [1, 0, 2, 3]])
    metric.update(prediction, truth)
    # a: 2 right, 1 missed, 1 wrongly found -> 2/4. b: 2 right, 1 missed, 1 wrongly found -> 2/4. c: 1/1.
    # 'absent' was predicted only where the truth does not count. 5 of 7 pixels are right.
    result = metric.compute()
    assert result["IoU"] == {"a": 50.0, "b": 50.0, "c": 100.0, "absent": None}
    assert result["mIoU"] == pytest.approx(200 / 3)
    assert result["pixel_accuracy"] == pytest.approx(500 / 7)
    assert metric.matrix.dtype == np.int64
    assert metric.matrix.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_miou_counts_a_class_that_is_only_predicted():
    metric = MeanIoU(["a", "b"])
    metric.update(np.array([[0, 1]]), np.array([[0, 0]]))
    assert metric.compute()["IoU"] == {"a": 50.0, "b": 0.0}
    assert metric.compute()["mIoU"] == 25.0


def test_miou_is_over_the_set_not_a_mean_of_images():
    first = (np.zeros((1, 4), int), np.array([[0, 0, 0, 1]]))  # a 3/4, b 0/1
    second = (np.ones((1, 4), int), np.array([[1, 1, 1, 1]]))  # b 4/4
    whole, images = MeanIoU(["a", "b"]), []
    for prediction, truth in (first, second):
        whole.update(prediction, truth)
        one = MeanIoU(["a", "b"])
        one.update(prediction, truth)
        images.append(one.compute()["mIoU"])
    assert whole.compute()["mIoU"] == pytest.approx((75 + 80) / 2)  # a 3/4, b 4/5
    assert np.mean(images) == pytest.approx((37.5 + 100) / 2)


def test_miou_batches_tensors_and_single_images_count_the_same():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (3, 6, 7), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    prediction = torch.randint(0, 5, (3, 6, 7), generator=generator)
    batched, single = MeanIoU("abcde"), MeanIoU("abcde")
    batched.update(prediction, truth)
    for p, t in zip(prediction, truth, strict=True):
        single.update(p.numpy().astype(np.uint8), t.to(torch.uint8))
    assert np.array_equal(batched.matrix, single.matrix)
    assert batched.matrix.sum() == int((truth != IGNORE).sum())


def test_miou_perfect_and_empty():
    truth = np.random.default_rng(0).integers(0, 3, (2, 9, 9))
    metric = MeanIoU("abc")
    assert metric.compute() == {
        "mIoU": None,
        "pixel_accuracy": None,
        "IoU": {"a": None, "b": None, "c": None},
    }
    metric.update(np.zeros((2, 2), int), np.full((2, 2), IGNORE))
    assert metric.compute()["mIoU"] is None
    metric.update(truth, truth)
    result = metric.compute()
    assert result["mIoU"] == result["pixel_accuracy"] == 100.0
    assert type(result["mIoU"]) is float and json.dumps(result)


@pytest.mark.parametrize(
    ("prediction", "truth"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int)),
        (np.zeros(4, int), np.zeros(4, int)),
        (np.full((2, 2), 3), np.zeros((2, 2), int)),
        (np.full((2, 2), -1), np.zeros((2, 2), int)),
        (np.full((2, 2), IGNORE), np.full((2, 2), IGNORE)),
        (np.zeros((2, 2), int), np.full((2, 2), 3)),
        (np.zeros((2, 2), int), np.full((2, 2), -1)),
        (np.zeros((2, 2), int), np.full((2, 2), 256)),
        (np.zeros((2, 2)), np.zeros((2, 2), int)),
    ],
)
def test_miou_refuses(prediction, truth):
    metric = MeanIoU("abc")
    with pytest.raises(ValueError):
        metric.update(prediction, truth)
    assert metric.matrix.sum() == 0


# --- mean AP

BOX, FAR = [10.0, 10.0, 60.0, 60.0], [100.0, 10.0, 150.0, 60.0]  # 50x50: medium
KEYS = ["mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large"]
KEYS += ["AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large", "AP"]


@pytest.fixture(params=["pycocotools", "faster"])
def backend(request):
    pytest.importorskip("faster_coco_eval" if request.param == "faster" else "pycocotools")
    return request.param


def detections(*rows):
    """(box, score, class), ..."""
    boxes, scores, classes = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(scores), np.array(classes, int)


def truths(*rows, crowd=()):
    """(box, class), ...; crowd: places of the rows that are crowds."""
    boxes, classes = zip(*rows, strict=True) if rows else ((), ())
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return boxes, np.array(classes, int), np.isin(np.arange(len(boxes)), crowd), area


def test_ap_by_hand(backend):
    metric = MeanAP(["thing"], backend=backend)
    ranked = detections((BOX, 0.9, 0), ([300, 300, 350, 350], 0.8, 0), (FAR, 0.7, 0))
    metric.update(1, (480, 640), ranked, truths((BOX, 0), (FAR, 0)))
    result = metric.compute()
    # Right, wrong, right: precision 1 up to recall 1/2 (51 of COCO's 101 recalls), then 2/3 (the other 50).
    expected = 100 * (51 + 50 * 2 / 3) / 101
    assert list(result) == KEYS
    assert result["mAP"] == result["mAP50"] == result["AP"]["thing"] == pytest.approx(expected, abs=1e-5)
    assert result["AR1"] == 50.0  # the best detection finds one of two
    assert result["AR10"] == result["AR100"] == result["AR_medium"] == 100.0
    assert result["mAP_small"] is None and result["AR_large"] is None


def test_ap_of_a_loose_box(backend):
    metric = MeanAP(["thing"], backend=backend)
    # 50x50 against 50x41 within it: IoU 0.82, which 7 of the 10 thresholds .50, .55, ..., .95 accept.
    metric.update(1, (100, 100), detections(([10, 10, 60, 51], 0.5, 0)), truths((BOX, 0)))
    result = metric.compute()
    assert result["mAP50"] == result["mAP75"] == 100.0
    assert result["mAP"] == result["AR100"] == 70.0


def test_ap_perfect(backend, capfd):
    metric = MeanAP(["a", "b"], backend=backend)
    random = np.random.default_rng(0)
    for image in range(6):
        corner = random.random((5, 2)) * 300
        boxes = np.concatenate([corner, corner + random.choice([20, 60, 150], (5, 1))], axis=1).astype(
            np.float32
        )
        classes = np.arange(5) % 2
        area = (boxes[:, 2] - boxes[:, 0]) ** 2
        metric.update(
            image, (480, 640), (boxes, np.ones(5), classes), (boxes, classes, np.zeros(5, bool), area)
        )
    result = metric.compute()
    for key in ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large", "AR10", "AR100", "AR_small"):
        assert result[key] == 100.0, key
    assert result["AP"] == {"a": 100.0, "b": 100.0}
    assert json.dumps(result)
    assert capfd.readouterr() == ("", "")


def test_ap_crowd_is_neither_right_nor_wrong(backend):
    metric = MeanAP(["thing"], backend=backend)
    crowd = [200.0, 200.0, 400.0, 400.0]
    within = [([210.0, 210.0, 260.0, 260.0], 0.99, 0), ([300.0, 300.0, 350.0, 350.0], 0.98, 0)]
    metric.update(1, (480, 640), detections((BOX, 0.5, 0), *within), truths((BOX, 0), (crowd, 0), crowd=[1]))
    assert metric.compute()["mAP"] == 100.0


def test_ap_size_is_the_given_area(backend):
    metric = MeanAP(["thing"], backend=backend)
    boxes, classes, crowd, _ = truths((BOX, 0))
    metric.update(1, (480, 640), detections((BOX, 0.5, 0)), (boxes, classes, crowd, np.array([900.0])))
    result = metric.compute()
    assert result["mAP_small"] == 100.0 and result["mAP_medium"] is None


def test_ap_empty(backend):
    assert MeanAP(["a"], backend=backend).compute() == {**dict.fromkeys(KEYS), "AP": {"a": None}}
    no_detections = MeanAP(["a", "b"], backend=backend)
    no_detections.update(1, (100, 100), detections(), truths((BOX, 0)))
    result = no_detections.compute()
    assert result["mAP"] == result["AR100"] == 0.0
    assert result["AP"] == {"a": 0.0, "b": None}
    no_truths = MeanAP(["a"], backend=backend)
    no_truths.update(1, (100, 100), detections((BOX, 0.5, 0)), truths())
    assert no_truths.compute() == {**dict.fromkeys(KEYS), "AP": {"a": None}}
    neither = MeanAP(["a"], backend=backend)
    neither.update(1, (100, 100), detections(), truths())
    assert neither.compute()["mAP"] is None


def test_ap_keeps_the_best_hundred():
    metric = MeanAP(["thing"], backend="pycocotools")
    wrong = [([300.0, 300.0, 310.0, 310.0], 0.1, 0)] * 150
    metric.update(1, (480, 640), detections(*wrong, (BOX, 0.9, 0)), truths((BOX, 0)))
    assert metric._detections[0].shape == (100, 6) and metric._detections[0].dtype == np.float32
    assert metric.compute()["mAP"] == 100.0


def test_ap_takes_tensors():
    metric = MeanAP(["thing"])
    found = tuple(torch.as_tensor(part) for part in detections((BOX, 0.9, 0)))
    metric.update(1, (100, 100), found, tuple(torch.as_tensor(part) for part in truths((BOX, 0))))
    assert metric.compute()["mAP"] == 100.0


def test_ap_refuses():
    metric = MeanAP(["thing"])
    good = detections((BOX, 0.5, 0)), truths((BOX, 0))
    metric.update(1, (100, 100), *good)
    with pytest.raises(ValueError, match="image 1 was added twice"):
        metric.update(1, (100, 100), *good)
    with pytest.raises(ValueError, match="classes 1..1, outside 0..0"):
        metric.update(2, (100, 100), detections((BOX, 0.5, 1)), truths())
    with pytest.raises(ValueError, match="truth hold classes -2"):
        metric.update(2, (100, 100), detections(), truths((BOX, -2)))
    with pytest.raises(ValueError, match="differ in length: 1 boxes, 2 scores, 1 classes"):
        metric.update(2, (100, 100), (good[0][0], np.ones(2), np.zeros(1)), truths())
    with pytest.raises(ValueError, match="not finite"):
        metric.update(2, (100, 100), detections((BOX, np.nan, 0)), truths())
    with pytest.raises(ValueError, match="not 2 arrays"):
        metric.update(2, (100, 100), good[0][:2], truths())
    with pytest.raises(ValueError, match="unknown mAP backend"):
        MeanAP(["thing"], backend="other")
    metric.update(2, (100, 100), *good)  # what was refused left nothing behind
    assert metric.compute()["mAP"] == 100.0


def test_ap_without_the_faster_library(monkeypatch):
    monkeypatch.setattr(mean_ap, "faster_coco_eval", None)
    metric = MeanAP(["thing"])
    metric.update(1, (100, 100), detections((BOX, 0.5, 0)), truths((BOX, 0)))
    assert metric.compute()["mAP"] == 100.0
    with pytest.raises(ImportError, match="faster-coco-eval"):
        MeanAP(["thing"], backend="faster")


def random_set(images=40, classes=4):
    """Truths of all sizes, some crowds, and detections near them, some of them missed or wrong."""
    random = np.random.default_rng(3)
    for image in range(images):
        count = int(random.integers(0, 7))
        corner = random.random((count, 2)) * [400, 250]
        boxes = np.concatenate(
            [
                corner,
                corner + random.choice([12, 60, 180], (count, 1)) * random.uniform(0.7, 1.3, (count, 2)),
            ],
            1,
        )
        labels, crowd = random.integers(0, classes, count), random.random(count) < 0.1
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * 0.7
        near = np.repeat(boxes, 3, axis=0) * random.uniform(0.97, 1.03, (count * 3, 4))
        found = np.concatenate([near, random.random((4, 4)) * [200, 200, 50, 50] + [0, 0, 210, 210]]).astype(
            np.float32
        )
        guesses = np.concatenate([np.repeat(labels, 3), random.integers(0, classes, 4)])
        guesses = np.where(
            random.random(len(guesses)) < 0.2, random.integers(0, classes, len(guesses)), guesses
        )
        # Two decimals: equal scores happen, and their order must not matter to agreement.
        scores = random.random(len(found)).round(2).astype(np.float32)
        truth = boxes.astype(np.float32), labels, crowd, area.astype(np.float32)
        yield image * 7 + 1, (480, 640), (found, scores, guesses), truth


def test_ap_backends_agree_with_each_other_and_with_files(tmp_path):
    pytest.importorskip("faster_coco_eval")
    ours = {name: MeanAP("abcd", backend=name) for name in ("pycocotools", "faster")}
    truth_file = {
        "info": {},
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in enumerate("abcd")],
    }
    found_file = []
    for image, size, found, truth in random_set():
        for metric in ours.values():
            metric.update(image, size, found, truth)
        truth_file["images"].append({"id": image, "height": size[0], "width": size[1]})
        for box, label, crowd, area in zip(*truth, strict=True):
            x1, y1, x2, y2 = map(float, box)
            row = {"image_id": image, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            row |= {"id": len(truth_file["annotations"]) + 1, "iscrowd": int(crowd), "area": float(area)}
            truth_file["annotations"].append(row)
        for box, score, label in zip(*found, strict=True):
            x1, y1, x2, y2 = map(float, box)
            bbox = [x1, y1, x2 - x1, y2 - y1]
            found_file.append(
                {"image_id": image, "category_id": int(label), "bbox": bbox, "score": float(score)}
            )
    (tmp_path / "truth.json").write_text(json.dumps(truth_file))
    (tmp_path / "found.json").write_text(json.dumps(found_file))
    coco = COCO(str(tmp_path / "truth.json"))
    reference = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()

    results = {name: metric.compute() for name, metric in ours.items()}
    assert results["pycocotools"] == results["faster"]
    figures = [results["faster"][key] for key in KEYS[:-1]]
    assert figures == pytest.approx(list(100 * reference.stats), abs=1e-5)
    assert 10 < figures[0] < 90 and all(
        figure > 0 for figure in figures
    )  # a set that could tell a difference


# --- accuracy


def test_accuracy_by_hand():
    metric = Accuracy("abcdefg")
    scores = np.array([0.1, 0.9, 0.3, 0.2, 0.5, 0.4, 0.0])  # best first: b, e, f, c, d, a, g
    for truth in (1, 1, 3, 0):
        metric.update(scores, truth)
    found = metric.compute()
    assert found["top1"] == 50.0 and found["top5"] == 75.0
    assert found["accuracy"] == {"a": 0.0, "b": 100.0, "c": None, "d": 0.0, "e": None, "f": None, "g": None}
    assert (
        metric.matrix[1, 1] == 2
        and metric.matrix[3, 1] == metric.matrix[0, 1] == 1
        and metric.matrix.sum() == 4
    )
    assert json.dumps(found)


def test_of_equal_scores_the_first_counts():
    metric = Accuracy("abcdef")
    for truth in range(6):
        metric.update(np.zeros(6), truth)
    assert metric.compute()["top1"] == pytest.approx(100 / 6) and metric.compute()["top5"] == pytest.approx(
        500 / 6
    )


def test_top5_of_five_classes_is_none_and_nothing_without_images():
    metric = Accuracy("abcde")
    assert metric.compute() == {"top1": None, "top5": None, "accuracy": dict.fromkeys("abcde")}
    metric.update(np.arange(5), 4)
    assert metric.compute()["top1"] == 100.0 and metric.compute()["top5"] is None


@pytest.mark.parametrize(
    ("scores", "truth"), [(np.zeros(2), 0), (np.zeros((1, 3)), 0), (np.zeros(3), 3), (np.zeros(3), -1)]
)
def test_accuracy_refuses(scores, truth):
    metric = Accuracy("abc")
    with pytest.raises(ValueError, match="do not fit 3 classes"):
        metric.update(scores, truth)
    assert metric.matrix.sum() == 0
    with pytest.raises(ValueError, match="at least one class"):
        Accuracy([])


# --- depth


def test_depth_errors_by_hand():
    metric = DepthErrors()
    assert metric.compute() == {"delta1": None, "AbsRel": None, "RMSE": None}
    metric.update(
        np.array([[2.4, 1.0, 9.0]]), np.array([[2.0, 4.0, 0.0]])
    )  # factors of 1.2 and 4; the last is not known
    metric.update(np.array([[3.0], [3.0]]), np.array([[3.0], [2.0]]))
    found = metric.compute()
    assert found["AbsRel"] == pytest.approx((0.2 + 0.75 + 0 + 0.5) / 4)
    assert found["RMSE"] == pytest.approx(((0.16 + 9 + 0 + 1) / 4) ** 0.5)
    assert found["delta1"] == 50.0 and json.dumps(found)


def test_a_depth_of_nothing_is_wrong_and_finite():
    metric = DepthErrors()
    metric.update(np.array([[0.0]], np.float32), np.array([[2.0]], np.float32))
    assert metric.compute() == {"delta1": 0.0, "AbsRel": 1.0, "RMSE": 2.0}


def test_depth_errors_are_summed_in_float64():
    metric, many = DepthErrors(), np.full((1000, 1000), 1.0, np.float32)
    metric.update(many * np.float32(1.1), many)
    assert metric.compute()["AbsRel"] == pytest.approx(float(np.float32(1.1)) - 1, rel=1e-9)


def test_depth_errors_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"prediction \[1, 2\] and truth \[2, 1\] must be equal"):
        DepthErrors().update(np.ones((1, 2)), np.ones((2, 1)))
