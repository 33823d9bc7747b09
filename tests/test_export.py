"""Files for a device: they give what PyTorch gives."""

import io
import json
import os
import re
import zipfile
from pathlib import Path

import pytest
import several_tasks
import torch

from multitask_kd import build, checkpoint
from multitask_kd.batch import PaddedDetections
from multitask_kd.engine import export as exporting
from multitask_kd.engine.evaluate import evaluate_checkpoint
from multitask_kd.engine.export import Export, export
from multitask_kd.engine.networks import open_network
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError
from multitask_kd.export import describe, parity, program, quantise
from multitask_kd.export import onnx as onnx_files
from multitask_kd.export.module import Exported
from multitask_kd.models import decoders
from multitask_kd.tasks.base import build_task
from multitask_kd.tasks.detection import without_counterpart

onnx = pytest.importorskip("onnx")
for _package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(_package)

CPU = torch.device("cpu")
SIZE = (48, 64)
DECODE = ["max_detections=20"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def config(tiny, home):
    """A run whose validation images are its training images, so that it finds something on them."""
    changes = {
        "train.steps": 60,
        "train.ema": 0,
        "train.save_every": 60,
        "data.val": {"split": "train", "count": 12},
    }
    return tiny(
        home / "run",
        {**changes, "model.width": 16, "eval.pictures": 0, "train.optimizer": {"lr": 1e-2, "warmup": 5}},
    )


@pytest.fixture(scope="module")
def trained(config, home):
    train(config)
    return str(home / "run/best.pt")


@pytest.fixture(scope="module")
def net(trained):
    return build.from_checkpoint(checkpoint.load(trained, "x"), "x").eval()


@pytest.fixture(scope="module")
def files(trained, home):
    """files("raw.onnx", decode=..., ...) -> the path of that export, made once."""

    def make(name, config=None, **options):
        path = home / name
        if not path.exists():
            export(Export(trained, str(path), **options), config)
        return str(path)

    return make


def images(count, seed=0):
    return exporting.pictures(SIZE).repeat(2, 1, 1, 1)[seed : seed + count]


@torch.no_grad()
@pytest.mark.parametrize("name", ["raw.onnx", "raw.pt2"])
def test_raw_outputs_are_pytorchs_at_any_batch(net, files, name):
    network = open_network(files(name), "--checkpoint", CPU)
    assert (network.size, network.precision, network.decoded) == (SIZE, "fp32", False)
    assert network.kind == {"raw.onnx": "onnx", "raw.pt2": "program"}[name]
    for count in (1, 3, 7):
        expected, found = net(images(count)).preds, network.run(images(count)).preds
        assert list(found) == ["seg", "det"]
        for task in expected:
            torch.testing.assert_close(found[task], expected[task], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "given"), [("decoded.onnx", []), ("decoded.pt2", DECODE)])
def test_decoded_outputs_are_what_the_tasks_decode(net, files, name, given):
    network = open_network(files(name, decode=given), "--checkpoint", CPU)
    assert network.decoded
    most = 20 if given else 100
    tasks = build.tasks(network.arch, net)
    for count in (1, 3, 7):
        preds, found = net(images(count)).preds, network.run(images(count)).preds
        assert isinstance(found["det"], PaddedDetections) and found["det"].boxes.shape == (count, most, 4)
        expected = tasks["det"].decode(preds["det"], SIZE, max_detections=most)
        assert sum(len(image.scores) for image in expected) >= 3 * count, "nothing to compare"
        for image, boxes, scores, classes in zip(expected, *found["det"], strict=True):
            number = len(image.scores)
            torch.testing.assert_close(boxes[:number], image.boxes, atol=1e-3, rtol=0)
            torch.testing.assert_close(scores[:number], image.scores, atol=1e-5, rtol=0)
            assert torch.equal(classes[:number], image.classes)
            assert (classes[number:] == -1).all() and not boxes[number:].any() and not scores[number:].any()
        mask = tasks["seg"].decode(preds["seg"], SIZE).argmax(1)
        assert (found["seg"].argmax(1) != mask).float().mean() < 1e-3 and len(mask.unique()) > 1


def test_figures_are_those_of_the_checkpoint(trained, config, files):
    expected = evaluate_checkpoint(config, trained)
    assert expected["seg"]["mIoU"] > 15 and expected["det"]["mAP50"] > 1, "nothing to compare"
    for name, options in (("raw.onnx", {}), ("raw.pt2", {}), ("decoded.onnx", {"decode": []})):
        found = evaluate_checkpoint(config, files(name, **options))
        assert found["images"] == expected["images"] == 12
        for task, key in (("seg", "mIoU"), ("det", "mAP"), ("det", "mAP50")):
            assert found[task][key] == pytest.approx(expected[task][key], abs=0.1), (name, key)


@pytest.mark.parametrize("name", ["raw.onnx", "raw.pt2"])
def test_a_file_describes_itself(net, trained, files, name):
    path, content = files(name), checkpoint.load(trained, "x")
    text = onnx_files.runner(path, CPU)[0] if name.endswith("onnx") else program.text_in(path)
    found = json.loads(text)
    assert (
        found["format"] == describe.FORMAT
        and found["arch"] == content["arch"]
        and found["params"] == content["params"]
    )
    assert (
        found["strides"] == {"seg": [4], "det": [8, 16]}
        and found["precision"] == "fp32"
        and found["decode"] is None
    )
    assert found["input"]["shape"] == ["batch", 3, *SIZE] and found["input"]["range"] == [0, 1]
    assert list(found["outputs"]) == ["seg", "det"]
    tasks = open_network(path, "x", CPU).tasks
    assert tasks["det"].classes == tuple(content["arch"]["tasks"]["det"]["classes"]) and tasks[
        "det"
    ].strides == (8, 16)
    assert os.getcwd().encode() not in Path(path).read_bytes(), "paths of the machine that exported"


@torch.no_grad()
@pytest.mark.parametrize("name", ["half.onnx", "half.pt2"])
def test_half_precision_and_bytes(net, files, name):
    path = files(name, precision="fp16", uint8=True)
    network = open_network(path, "x", CPU)
    assert network.precision == "fp16" and os.path.getsize(path) < 0.75 * os.path.getsize(
        files(f"raw.{name[5:]}")
    )
    expected, found = net(images(3)).preds, network.run(images(3)).preds
    for task in expected:
        assert found[task].dtype == torch.float32
        torch.testing.assert_close(
            found[task], expected[task], atol=0.02 * float(expected[task].abs().max()), rtol=0
        )
    assert not torch.equal(found["seg"], expected["seg"])


@torch.no_grad()
def test_free_sides(net, trained, tmp_path):
    path = str(tmp_path / "free.pt2")
    assert "height" in str(export(Export(trained, path, dynamic_size=True)))
    network = open_network(path, "x", CPU)
    for size in ((48, 64), (64, 48), (80, 160)):
        batch = exporting.pictures(size)[:2]
        torch.testing.assert_close(
            network.run(batch).preds["det"], net(batch).preds["det"], atol=1e-4, rtol=1e-4
        )


# several tasks of a kind


NAMES = [
    *several_tasks.TASKS,
    *("mask", "lane_mask"),
    *("boxes", "scores", "classes", "sign_boxes", "sign_scores", "sign_classes"),
    *("weather_label", "weather_score", "distance_depth"),
]


@pytest.fixture(scope="module")
def several(home):
    """The path of a checkpoint with tasks of every kind, and its network."""
    path = str(home / "several.pt")
    return path, several_tasks.write(path, config={"tasks": {"sign": {"decode": {"max_detections": 7}}}})


@torch.no_grad()
@pytest.mark.parametrize("name", ["several.onnx", "several.pt2"])
def test_every_task_is_decoded_under_its_own_name(several, home, name):
    checkpoint_path, net = several
    result = export(Export(checkpoint_path, str(home / name), decode=["det.max_detections=5"]))
    found = result.description
    assert list(found["outputs"]) == NAMES and "float32" in found["outputs"]["distance_depth"]
    assert found["decode"]["det"]["max_detections"] == 5 and found["decode"]["sign"]["max_detections"] == 7
    assert found["decode"]["lane"] == {} and found["strides"]["sign"] == [8]
    assert [gap.task.name for gap in result.decoded] == list(several_tasks.TASKS)
    assert "lane_mask: 0.000 % of the pixels have another class" in str(result)
    assert "\nweather images: 0 of 4 have another class" in str(result)

    network = open_network(str(home / name), "x", CPU)
    assert network.decoded and {n: t.kind for n, t in network.tasks.items()} == {
        n: part["kind"] for n, part in several_tasks.TASKS.items()
    }
    preds, expected = network.run(images(3)).preds, net(images(3)).preds
    for task in network.tasks.values():
        options = found["decode"][task.name]
        decoded, true = (task.decode(p[task.name], SIZE, **options) for p in (preds, expected))
        if task.kind == "detection":
            assert [len(image.scores) for image in decoded] == [options["max_detections"]] * 3
            for one, other in zip(decoded, true, strict=True):
                torch.testing.assert_close(one.boxes, other.boxes, atol=1e-3, rtol=0)
                assert torch.equal(one.classes, other.classes)
        elif task.kind == "depth":
            torch.testing.assert_close(decoded, true, atol=0, rtol=1e-3)
            assert float(true.max()) > 2 * float(true.min()), "nothing to compare"
        else:
            assert (decoded.argmax(1) != true.argmax(1)).float().mean() < 1e-3


@torch.no_grad()
def test_raw_outputs_of_several_tasks(several, home):
    path, net = several
    assert not export(Export(path, str(home / "several_raw.onnx"))).decoded
    network, expected = open_network(str(home / "several_raw.onnx"), "x", CPU), net(images(2)).preds
    found = network.run(images(2)).preds
    assert list(found) == list(several_tasks.TASKS) and not network.decoded
    for task, pred in expected.items():
        assert parity.gap(task, pred, found[task]).within(1e-4), task


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("max_detections=3", "--decode.max_detections: the tasks det and sign have it; say which: "
         "det.max_detections=3 or sign.max_detections=3"),
        ("lane.max_detections=3", "--decode.lane.max_detections: no such option"),
        ("sign.nms=1", "--decode.sign.nms: no such option; did you mean 'sign.nms_iou'?"),
        ("sign.nms_iou=high", "--decode.sign.nms_iou: needs a number"),
        ("det.nms_iou=2", "--decode.det: nms_iou: 2"),
        ("0.3", "--decode: '0.3': write it as key=value; keys: det.score_threshold, sign.score_threshold"),
        ("det.nms_iou=[", "the value is not YAML"),
    ],
)  # fmt: skip
def test_an_option_that_several_tasks_have_names_its_task(several, tmp_path, given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        export(Export(several[0], str(tmp_path / "x.pt2"), decode=[given]))
    assert os.listdir(tmp_path) == []


def test_a_network_without_options_of_decoding(tmp_path):
    tasks = {name: several_tasks.TASKS[name] for name in ("lane", "weather")}
    several_tasks.write(tmp_path / "x.pt", tasks)
    with pytest.raises(
        UserError, match="--decode: nms_iou=0.5: no task of the network has an option of decoding"
    ):
        export(Export(str(tmp_path / "x.pt"), str(tmp_path / "x.pt2"), decode=["nms_iou=0.5"]))


def test_names_that_would_meet_in_a_file():
    def named(**kinds):
        return {name: build_task(name, kind, ["a", "b"], (4,)) for name, kind in kinds.items()}

    met = named(seg="semantic", mask="semantic")
    assert list(describe.outputs(met, None)) == ["seg", "mask"]
    with pytest.raises(
        UserError, match="tasks.mask: .*called 'mask'.*leave --decode out, or train it under another name"
    ):
        describe.outputs(met, {"seg": {}, "mask": {}})
    assert list(describe.outputs(met, {"mask": {}})) == ["seg", "mask", "mask_mask"]
    with pytest.raises(UserError, match="tasks.images: .*called 'images'.*; train it under another name"):
        describe.outputs(named(images="classification"), None)


# INT8


def test_int8_is_smaller_measured_and_runs(config, files, net):
    path = files("int8.onnx", config, precision="int8", images=6, eval_images=8, decode=[])
    assert os.path.getsize(path) < 0.7 * os.path.getsize(files("decoded.onnx", decode=[]))
    graph = onnx.load(path).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights.values()) > 10
    scales = [
        node.input[1]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights
    ]
    assert any(weights[scale].dims and weights[scale].dims[0] > 1 for scale in scales), (
        "one scale for all channels"
    )
    network = open_network(path, "x", CPU)
    seg = [network.run(images(count)).preds["seg"].shape for count in (1, 3)]
    assert network.precision == "int8" and (seg[0][0], seg[1][0]) == (1, 3) and seg[0][1:] == seg[1][1:]
    accuracy = json.loads(onnx_files.runner(path, CPU)[0])["accuracy"]
    assert accuracy["images"] == 8 and accuracy["calibrated_on"] == 6 and accuracy["float"] in quantise.FLOAT
    before, *after = accuracy["measured"]
    assert (before["precision"], after[0]["precision"], after[0]["float"]) == ("fp32", "int8", "nothing")
    taken = next(row for row in after if row["float"] == accuracy["float"])
    again = evaluate_checkpoint(config, path)
    assert again["images"] == 12 and abs(again["seg"]["mIoU"] - taken["figures"]["mIoU"]) < 20


def test_the_table_of_what_int8_costs():
    """Figures under the names of their tasks, errors with the digits of their kind."""
    tasks = {
        "seg": build_task("seg", None, ["a"], (4,)),
        "lane": build_task("lane", "semantic", ["a"], (4,)),
        "distance": build_task("distance", "depth", [], (4,)),
    }
    figures = {"mIoU": 60.0, "lane mIoU": 50.0, "delta1": 91.5, "AbsRel": 0.12345}
    row = {"precision": "int8", "float": "nothing", "figures": figures}
    text = exporting.accuracy_table({"images": 9, "float": "nothing", "measured": [row]}, tasks)
    head, titles, _, line = text.splitlines()
    assert head.startswith("9 images of data.val, figures in percent")
    assert [t.strip() for t in titles.split("  ") if t.strip()][2:4] == [
        "mIoU",
        "lane mIoU",
    ] and "AbsRel" in titles
    assert line.split()[-6:] == ["60.00", "50.00", "91.50", "0.123", "this", "one"]


def test_what_stays_in_float(files):
    graph = onnx.load(files("decoded.onnx", decode=[])).graph
    kinds = {node.name: node.op_type for node in graph.node}
    weights = {node.name: node.input[1] for node in graph.node if node.op_type == "Conv"}
    kept = {level: quantise.in_float(graph, level) for level in quantise.FLOAT}
    nothing, last, heads = (
        [weights[n] for n in kept[level] if kinds[n] == "Conv"] for level in quantise.FLOAT
    )
    assert nothing == [] and {"TopK", "NonMaxSuppression"} <= {kinds[n] for n in kept["nothing"]}
    leaf = {"net.heads.seg.classifier.weight", "net.heads.det.classifier.weight", "net.heads.det.box.weight"}
    assert set(last) == leaf | {"net.heads.det.objectness.weight"}
    assert set(heads) > set(last) and all("heads" in name for name in heads) and len(heads) < len(weights)


def test_int8_keeps_more_in_float_where_that_is_needed(monkeypatch):
    """Losses of 4, 2 and 0.3 points: the third form is taken; of 4, 2 and 3: the second."""
    task = type("T", (), {"main_metric": "mIoU", "headline": ("mIoU",)})()

    def taken(*losses):
        values = iter([60.0, *(60.0 - loss for loss in losses)])
        data = type("D", (), {"rows": [0], "calibration": lambda self: (), "measure": lambda self, *_: (
            {"images": 1, "seg": {"mIoU": next(values)}}, {"seg": task})})()  # fmt: skip
        monkeypatch.setattr(quantise, "quantised", lambda model, images, kept: Form(kept))
        description = {}
        assert exporting._quantised(Form("fp32"), description, data).name == description["accuracy"]["float"]
        return description["accuracy"]["float"], len(description["accuracy"]["measured"]) - 1

    class Form:
        def __init__(self, name):
            self.name = name

        def SerializeToString(self):
            return b""

    assert taken(4, 2, 0.3) == ("the heads", 3)
    assert taken(4, 2, 3) == ("the last layers of the heads", 3)
    assert taken(0.4) == ("nothing", 1)


# what is caught


class Off(Exported):
    """Gives a thousandth more than the network."""

    def forward(self, images):
        raw, *rest = super().forward(images)
        return (raw * 1.001, *rest)


def test_a_file_that_gives_something_else_is_not_kept(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "Exported", Off)
    out = tmp_path / "net.pt2"
    out.write_bytes(b"the old file")
    with pytest.raises(
        UserError, match="was not written: its output 'seg' differs from PyTorch's.*--tolerance"
    ):
        export(Export(trained, str(out)))
    assert out.read_bytes() == b"the old file" and os.listdir(tmp_path) == ["net.pt2"]
    export(Export(trained, str(out), tolerance=0.01))
    assert len(out.read_bytes()) > 1000 and os.listdir(tmp_path) == ["net.pt2"]


def test_decoding_that_gives_something_else_is_not_kept(trained, tmp_path, monkeypatch):
    true = decoders.unsuppressed
    monkeypatch.setattr(decoders, "unsuppressed", lambda *args: true(*args[:4], 0.01, args[5]))
    with pytest.raises(
        UserError, match=r"not PyTorch's: detections: \d+ of \d+ without a counterpart, more than 1 %"
    ):
        export(Export(trained, str(tmp_path / "net.pt2"), decode=DECODE))
    assert os.listdir(tmp_path) == []


def test_gaps():
    a, b = torch.tensor([1.0, -50.0]), torch.tensor([1.001, -50.0])
    found = parity.gap("x", a, b)
    assert found.absolute == pytest.approx(1e-3, rel=1e-3) and found.relative == pytest.approx(2e-5, rel=1e-3)
    assert found.within(1e-4) and not found.within(1e-5)
    small = parity.gap("x", a / 1e3, b / 1e3)  # a part of a small output's value may differ more
    assert small.relative == pytest.approx(2e-5, rel=1e-3) and small.within(1e-4)
    for other in (torch.tensor([float("nan"), 0.0]), torch.zeros(3)):
        assert not parity.gap("x", a, other).within(1e9) and not parity.gap("x", a, other).within(
            float("inf")
        )


def test_a_missing_detection_is_counted():
    class One:
        def __init__(self, boxes, scores, classes):
            self.boxes, self.scores, self.classes = (
                torch.tensor(boxes).view(-1, 4),
                torch.tensor(scores),
                torch.tensor(classes),
            )

    a = One([[0.0, 0, 9, 9], [5.0, 5, 9, 9]], [0.9, 0.5], [0, 1])
    swapped = One([[5.0, 5, 9, 9], [0.0, 0, 9, 9]], [0.5, 0.9], [1, 0])
    assert without_counterpart([a], [swapped], 1e-4) == (0, 4)
    assert without_counterpart([a], [One([[0.0, 0, 9, 9]], [0.9], [0])], 1e-4) == (1, 3)
    assert without_counterpart([a], [One([[0.0, 0, 9, 9], [5.0, 5, 9, 9]], [0.9, 0.5], [0, 0])], 1e-4) == (
        2,
        4,
    )
    assert without_counterpart([a], [One([], [], [])], 1e-4) == (2, 2)


def test_differences_of_decoding_in_words():
    """A share of many things, a number of few; of a task with a name of its own with it; batches are added
    up."""
    seg, det = build_task("seg", None, ["a"], (4,)), build_task("det", None, ["a"], (8,))
    lane, sign = build_task("lane", "semantic", ["a"], (4,)), build_task("sign", "detection", ["a"], (8,))
    gaps = [parity.DecodedGap(task, 3, 20_000, 1e-3, "pixels have another class") for task in (seg, lane)]
    assert str(gaps[0]) == "mask: 0.015 % of the pixels have another class"
    assert str(gaps[1]) == "lane_mask: 0.015 % of the pixels have another class"
    gaps += [
        parity.DecodedGap(task, 1, 40, 1e-2, "detections without a counterpart") for task in (det, sign, sign)
    ]
    assert [g.is_close for g in gaps] == [True, True, False, False, False]
    *masks, one, both = map(str, parity.together(gaps))
    assert len(masks) == 2 and one == "detections: 1 of 40 without a counterpart"
    assert both == "sign detections: 2 of 80 without a counterpart"
    assert (
        parity.DecodedGap(det, 1, 100, 1e-2, "").is_close and parity.DecodedGap(det, 0, 0, 0, "x y").is_close
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"out": "net.onx"},
            "--out: 'net.onx' ends in '.onx', which is no format here; did you mean '.onnx'?",
        ),
        ({"out": "net.pt2", "precision": "int8"}, "--int8 is for ONNX; give an --out that ends in .onnx"),
        ({"out": "net.pt2", "opset": 18}, "--opset is for ONNX"),
        ({"precision": "int8"}, "--int8: needs --config"),
        ({"images": 4}, "--images: is for --int8"),
        ({"eval_images": 0, "precision": "int8"}, "--eval-images: 0 is not a number of images"),
        ({"decode": [], "dynamic_size": True}, "--dynamic-size: outputs are decoded for one size"),
        ({"tolerance": 0.0}, "--tolerance: 0.0 is not a number above 0"),
        (
            {"decode": ["score_treshold=0.3"]},
            "--decode.score_treshold: no such option; did you mean 'score_threshold'?",
        ),
        ({"decode": ["nms_iou=2"]}, "--decode: nms_iou: 2"),
        ({"decode": ["nms_iou=high"]}, "--decode.nms_iou: needs a number"),
        ({"decode": ["0.3"]}, "--decode: '0.3': write it as key=value; keys: score_threshold"),
        ({"opset": 99}, "--opset: 99 cannot be written; 18 to"),
        ({"checkpoint": "none.pt"}, "--checkpoint: there is no checkpoint none.pt"),
    ],
)
def test_faulty_options(trained, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        export(Export(**{"checkpoint": trained, "out": "net.onnx", **options}))
    assert os.listdir(tmp_path) == []


def test_int8_of_other_data_and_sets(trained, config, tiny, tmp_path):
    with pytest.raises(UserError, match="--calibrate: unknown set 'trian'; did you mean 'train'?"):
        export(Export(trained, str(tmp_path / "x.onnx"), precision="int8", calibrate="trian"), config)


def test_the_tool(tool, trained, tmp_path):
    status, out, err = tool(
        "export", "--checkpoint", trained, "--out", tmp_path / "deep/net.pt2", "--decode", "max_detections=3"
    )
    assert status == 0, err
    assert "largest difference" in out and "output boxes" in out and "Traceback" not in err
    assert open_network(str(tmp_path / "deep/net.pt2"), "x", CPU).run(images(1)).preds[
        "det"
    ].scores.shape == (1, 3)
    status, _, err = tool("export", "--checkpoint", trained, "--out", tmp_path / "x.onnx", "run.threads=1")
    assert status == 2 and "key=value changes --config, which is not given" in err
    status, _, err = tool("export", "--checkpoint", trained, "--out", tmp_path / "x.onnx", "--fp16", "--int8")
    assert status == 2 and "not allowed with" in err


def test_packages_that_are_not_installed(trained, files, tmp_path, monkeypatch):
    path = files("raw.onnx")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, name, None)
            with pytest.raises(UserError, match=re.escape("pip install 'multitask_kd[export]'")):
                export(Export(trained, str(tmp_path / "x.onnx")))
            if name == "onnxruntime":
                with pytest.raises(
                    UserError, match=re.escape("--checkpoint: exported files in ONNX need onnxruntime")
                ):
                    open_network(path, "--checkpoint", CPU)


# files of others


def refused(path, message):
    with pytest.raises(UserError, match=message) as error:
        open_network(str(path), "--checkpoint", CPU)
    assert str(error.value).startswith("--checkpoint: ") and "path: " not in str(error.value)


def test_files_of_others(files, tmp_path):
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", 1, ["b", 3, 4, 4])], [value("y", 1, ["b", 3, 4, 4])]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    foreign = tmp_path / "foreign.onnx"
    onnx.save(model, foreign)
    refused(foreign, "was not written by tools/export.py")
    for text, message in (
        ("{}", "not 'multitask_kd.export/1' but 'None'"),
        ("no json", "nothing that can be read"),
        ("[]", "nothing"),
    ):
        del model.metadata_props[:]
        model.metadata_props.add(key=describe.KEY, value=text)
        onnx.save(model, foreign)
        refused(foreign, message)

    torch.export.save(
        torch.export.export(torch.nn.ReLU(), (torch.zeros(2, 3, 4, 4),)), tmp_path / "foreign.pt2"
    )
    refused(tmp_path / "foreign.pt2", "was not written by tools/export.py")
    refused(tmp_path / "none.onnx", "there is no file")
    for name, whole in (("cut.onnx", files("raw.onnx")), ("cut.pt2", files("raw.pt2"))):
        (tmp_path / name).write_bytes(Path(whole).read_bytes()[:2000])
        refused(tmp_path / name, "damaged")
    (tmp_path / "page.onnx").write_bytes(b"<!doctype html><html></html>")
    refused(tmp_path / "page.onnx", "web page")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"arch": []}, "damaged (arch.tasks)"),
        ({"arch": {"tasks": {"seg": {"classes": ["a"]}}}}, "damaged (arch.input_size)"),
        ({"strides": {}}, "damaged (strides)"),
        ({"params": "many"}, "damaged (params)"),
        ({"decode": {"depth": {}}}, "damaged (decode)"),
        ({"decode": ["seg"]}, "damaged (decode)"),
        ({"outputs": {"a": "", "b": ""}}, "damaged (outputs)"),
        ({"strides": {"seg": [4], "det": [4]}}, "its output 'det' is"),  # seen in what it gives
    ],
)
def test_a_description_that_was_altered(files, tmp_path, part, message):
    model, altered = onnx.load(files("raw.onnx")), tmp_path / "altered.onnx"
    model.metadata_props[0].value = json.dumps(json.loads(model.metadata_props[0].value) | part)
    onnx.save(model, altered)
    with pytest.raises(UserError) as error:
        open_network(str(altered), "--checkpoint", CPU).run(images(2))
    assert message in str(error.value) and "export it again" in str(error.value)


def description_in(path):
    return json.loads(onnx.load(path).metadata_props[0].value)


@torch.no_grad()
def test_files_written_before_tasks_had_kinds(files, tmp_path):
    """The kinds of seg and det follow from their names."""
    model, altered = onnx.load(files("decoded.onnx", decode=[])), tmp_path / "old.onnx"
    description = json.loads(model.metadata_props[0].value)
    for part in description["arch"]["tasks"].values():
        part.pop("kind", None)
    model.metadata_props[0].value = json.dumps(description)
    onnx.save(model, altered)
    old, new = (open_network(str(p), "x", CPU) for p in (altered, files("decoded.onnx", decode=[])))
    assert {name: task.kind for name, task in old.tasks.items()} == {"seg": "semantic", "det": "detection"}
    for one, other in zip(old.run(images(1)).preds["det"], new.run(images(1)).preds["det"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"kind": "edges"}, "x: net.onnx: arch.tasks.seg.kind: unknown kind of task 'edges'"),
        ({"kind": 3}, "damaged (arch.tasks)"),
        ({"kind": "semantic", "classes": []}, "damaged (arch.tasks)"),
        ({"kind": "detection"}, None),
    ],
)
def test_kinds_in_a_description(files, part, message):
    description = description_in(files("raw.onnx"))
    description["arch"]["tasks"]["seg"].update(part)
    if message is None:
        found = describe.tasks(describe.read(json.dumps(description), "net.onnx", "x"))
        assert {name: task.kind for name, task in found.items()} == {"seg": "detection", "det": "detection"}
        return
    with pytest.raises(UserError, match=re.escape(message)):
        describe.read(json.dumps(description), "net.onnx", "x")


def test_a_name_that_does_not_say_its_kind(files):
    description = description_in(files("raw.onnx"))
    for parts in (description["arch"]["tasks"], description["strides"], description["outputs"]):
        parts["lane"] = parts.pop("det")
    description["arch"]["tasks"]["lane"].pop("kind", None)
    with pytest.raises(UserError, match="net.onnx: arch.tasks.lane: needs kind; known: .*detection"):
        describe.read(json.dumps(description), "net.onnx", "x")


@torch.no_grad()
def test_an_output_that_is_not_there(files, tmp_path):
    model, altered = onnx.load(files("decoded.onnx", decode=[])), tmp_path / "altered.onnx"
    kept = [output for output in model.graph.output if output.name != "scores"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, altered)
    with pytest.raises(UserError, match="its output 'scores' is not there.*export it again"):
        open_network(str(altered), "--checkpoint", CPU).run(images(1))


def test_other_classes_than_the_file_gives(files, tmp_path):
    model, altered = onnx.load(files("raw.onnx")), tmp_path / "altered.onnx"
    description = json.loads(model.metadata_props[0].value)
    description["arch"]["tasks"]["seg"]["classes"].append("one more")
    model.metadata_props[0].value = json.dumps(description)
    onnx.save(model, altered)
    with pytest.raises(UserError, match="its output 'seg' is .* not what it is described as"):
        open_network(str(altered), "--checkpoint", CPU).run(images(2))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_program_is_never_run(files, tmp_path):
    path, marker, buffer = tmp_path / "net.pt2", tmp_path / "ran", io.BytesIO()
    torch.save(Trap(str(marker)), buffer)
    with zipfile.ZipFile(files("raw.pt2")) as old, zipfile.ZipFile(path, "w") as new:
        traps = 0
        for name in old.namelist():
            trap = name.endswith("sample_inputs/model.pt")
            traps += trap
            new.writestr(name, buffer.getvalue() if trap else old.read(name))
    assert traps == 1
    refused(path, "pickled objects.*not opened")
    assert not marker.exists()


# every network that is shipped


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoder", "det", "kind"),
    [
        ("tu-mobilenetv4_conv_small_035", {"depth": 1, "strides": [8, 16, 32]}, "onnx"),
        ("tu-mobilenetv4_conv_small", {"depth": 0}, "program"),
        ("tu-resnet10t", {"depth": 2, "strides": [8, 16, 32]}, "onnx"),
    ],
)
def test_the_encoders_and_heads_of_the_recipes(encoder, det, kind):
    torch.manual_seed(0)
    tasks = {
        "seg": {"classes": list("abcde"), "head": {"depth": det["depth"]}},
        "det": {"classes": ["x"], "head": det},
    }
    arch = {
        "encoder": encoder,
        "strides": [4, 8, 16, 32],
        "width": 16,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "tasks": tasks,
    }
    net, names = build.network(arch).eval(), ["seg", "det"]
    if kind == "onnx":
        run = onnx_files.runner(onnx_files.to_onnx(Exported(net), (64, 96), names).SerializeToString(), CPU)[
            1
        ]
    else:
        run = program.of_program(program.to_program(Exported(net), (64, 96)), names, CPU)
    for count in (1, 3):
        batch = exporting.pictures((64, 96))[:count]
        for gap in parity.raw_gaps(net, run(batch), batch):
            assert gap.within(1e-4), gap
