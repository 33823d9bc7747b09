"""Teachers of every source through the config: from the file to what the student learns."""

import copy
import importlib.util
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import yaml
from torch import nn
from torchvision.models import get_model

from multitask_kd import build, checkpoint
from multitask_kd import config as configs
from multitask_kd.batch import ModelOutput, PaddedDetections
from multitask_kd.engine.run import prepare
from multitask_kd.engine.step import compute_step
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError
from multitask_kd.models.dense_head import cells, decode_boxes

MEAN, STD = [124.0, 116.0, 104.0], [58.0, 57.0, 57.5]  # red, green, blue, of 0 to 255
SHORT = {"train.steps": 2, "train.log_every": 1, "eval.images": 1, "eval.pictures": 0, "train.check": False}
BARE = {"mean": [0, 0, 0], "std": [1, 1, 1]}  # of a network that normalises
KL = {"alpha": 0.5, "soft": {"loss": "kl", "options": {"temperature": 2}}}
DET = {"det_soft": {}, "det_mse": {"weighting": "teacher"}, "det_boxes": {"confidence": 0.05, "doubt": 0.01}}
SOURCES = ("state_dict", "pickle", "torchscript", "export", "onnx")
FACTORY = f"{__name__}:make"


class Other(nn.Module):
    """A network of ours in other hands. form: what it returns; seg, det: which of its classes, in which
    order; outer: images come as blue, green, red of 0 to 255, less MEAN, by STD."""

    def __init__(self, arch, form="dict", seg=None, det=None, outer=False):
        super().__init__()
        self.net, self.form, self.outer = build.network(arch), form, outer
        self.seg, self.det = seg, None if det is None else [*range(5), *(5 + k for k in det)]
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        if self.outer:
            images = (images.flip(1) * self.std + self.mean) / 255
        preds = self.net(images).preds
        seg, det = preds["seg"], preds["det"]
        seg = seg if self.seg is None else seg[:, self.seg]
        det = det if self.det is None else det[..., self.det]
        if self.form == "output":
            return ModelOutput({"seg": seg, "det": det})
        return {"seg": seg, "det": det} if self.form == "dict" else (det, seg)


def make(arch, **how):
    return Other(arch, **how)


@pytest.fixture(scope="module")
def own(teacher_run, tmp_path_factory):
    """{path, arch, model, classes} of a checkpoint of ours that finds things."""
    content = checkpoint.load(teacher_run / "best.pt", "x")
    content.pop("format")
    numbers = torch.Generator().manual_seed(3)
    for part in ("objectness", "classifier"):
        weight = content["model"][f"heads.det.{part}.weight"]
        weight += 3 * torch.randn(weight.shape, generator=numbers)
        content["model"][f"heads.det.{part}.bias"] += 2
    path = tmp_path_factory.mktemp("own") / "best.pt"
    checkpoint.save(path, content)
    classes = {name: part["classes"] for name, part in content["arch"]["tasks"].items()}
    return {"path": str(path), "arch": content["arch"], "model": content["model"], "classes": classes}


@pytest.fixture(scope="module")
def written(own, tmp_path_factory):
    """written(source, **how) -> the section of a teacher: the network of ``own`` as ``Other`` in a file of
    that source."""
    folder, done = tmp_path_factory.mktemp("written"), {}

    def write(source, form="dict", **how):
        key = f"{source}-{form}-{sorted(how.items())}"
        net = Other(own["arch"], form, **how)
        net.net.load_state_dict(own["model"])
        net.eval().requires_grad_(False)
        path, images, options = (
            folder / f"{len(done)}.file" if key not in done else done[key],
            torch.rand(2, 3, 48, 64),
            {},
        )
        if key in done:
            pass
        elif source == "state_dict":
            torch.save({"epoch": 3, "model": net.state_dict()}, path)
        elif source == "pickle":
            torch.save(net, path)
        elif source == "torchscript":
            torch.jit.trace(net, images, strict=False).save(path)
        elif source == "export":
            shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
            program = torch.export.export(net, (images,), dynamic_shapes=shapes)
            torch.export.save(program, path.with_suffix(".pt2"))
            path.with_suffix(".pt2").rename(path)
        elif source == "onnx":
            names = ["seg", "det"] if form == "dict" else ["det", "seg"]
            axes = {name: {0: "batch"} for name in ("images", *names)}
            torch.onnx.export(
                net, (images,), path, dynamo=False, input_names=["images"], output_names=names, dynamic_axes=axes
            )  # fmt: skip
        done[key] = path
        if source == "state_dict":
            options = {"factory": FACTORY, "arguments": {"arch": own["arch"], "form": form, **how}}
        section = {
            "source": source,
            "path": str(path),
            "options": options,
            "classes": own["classes"],
            "input": BARE,
            "amp": "none",
        }
        return section | ({"trust_pickle": True} if source == "pickle" else {})

    return write


def teaches(teacher, det="det_soft", **more):
    """Changes for ``tiny``: both tasks taught."""
    return {
        "tasks.seg": KL, "tasks.det": {"alpha": 0.25, "soft": {"loss": det, "options": DET[det]}}, "teacher": teacher, **more,
    }  # fmt: skip


def ready(config):
    """The run of a config, and its optimizer."""
    return prepare(build.resolve_init(config))


@torch.no_grad()
def first_losses(config):
    """Of a run's first batch."""
    run, _ = ready(config)
    return {
        name: float(loss)
        for name, loss in compute_step(run, run.first_batch().to(run.device), 0.0).raw.items()
    }


def losses_of_training(config, read_lines):
    """Of two steps."""
    train(config)
    return [
        {k: v for k, v in line.items() if k.startswith("raw/")}
        for line in read_lines(config.run.dir, "train")
    ]


def away(found, wanted):
    """The largest relative difference of two dicts of losses."""
    assert list(found) == list(wanted) and all(wanted.values())
    return max(abs(found[key] - wanted[key]) / abs(wanted[key]) for key in wanted)


TERM = {"student": "neck.p3", "loss": "cwd"}


@pytest.fixture(scope="module")
def from_checkpoint(own, tiny, tmp_path_factory, read_lines):
    """What the student's losses are with the checkpoint as its teacher: of two steps, with and without a term
    on features, and of the first by each soft loss."""
    folder, teacher = tmp_path_factory.mktemp("reference"), {"path": own["path"], "amp": "none"}
    found = {det: first_losses(tiny(folder, teaches(teacher, det))) for det in DET}
    for name, terms in {"steps": {}, "tapped": {"f": TERM}}.items():
        config = tiny(folder / name, teaches(teacher, **SHORT, distill=terms))
        found[name] = losses_of_training(config, read_lines)
    run, _ = ready(tiny(folder, teaches(teacher, "det_boxes")))
    batch = run.first_batch().to(run.device)
    assert (run.teachers(batch).preds["det"].scores > 0.3).sum() > 4
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_weights_teach_the_same_from_every_file(
    source, written, from_checkpoint, tiny, tmp_path, read_lines
):
    if source == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    teacher, tapped = written(source), source in ("state_dict", "pickle")
    for det in ("det_mse", "det_boxes"):
        assert away(first_losses(tiny(tmp_path, teaches(teacher, det))), from_checkpoint[det]) < 1e-4
    terms = {"f": {**TERM, "teacher": "net.neck.p3"}} if tapped else {}
    steps = losses_of_training(tiny(tmp_path / "run", teaches(teacher, **SHORT, distill=terms)), read_lines)
    for found, wanted in zip(steps, from_checkpoint["tapped" if tapped else "steps"], strict=True):
        assert away(found, wanted) < 1e-4


ORDER = {"seg": [10, *range(10)], "det": [3, 0, 5, 1, 4, 2]}
INPUT = {"mean": MEAN, "std": STD, "scale": 255, "order": "bgr"}


@pytest.mark.parametrize(
    ("source", "how", "section"),
    [
        ("state_dict", {"form": "output"}, {}),
        ("torchscript", {"form": "tuple"}, {}),
        (
            "torchscript",
            {"form": "tuple"},
            {"outputs": {"det": {"at": 0, "form": "cells", "strides": [8, 16]}, "seg": {"at": 1}}},
        ),
        ("torchscript", {"outer": True}, {"input": INPUT}),
        ("onnx", {"outer": True}, {"input": INPUT}),
        ("torchscript", ORDER, {}),
        ("state_dict", ORDER, {"map": True}),
    ],
)
def test_the_same_weights_in_other_forms_teach_the_same(
    source, how, section, written, own, from_checkpoint, tiny, tmp_path
):
    if source == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    teacher = {**written(source, **how), **section}
    if "seg" in how:
        teacher["classes"] = {task: [own["classes"][task][k] for k in how[task]] for task in ORDER}
    if "map" in section:
        teacher["classes"] = {task: [f"the {n}" for n in names] for task, names in teacher["classes"].items()}
        teacher["map"] = {task: {f"the {n}": n for n in names} for task, names in own["classes"].items()}
    for det in ("det_soft", "det_boxes"):
        assert away(first_losses(tiny(tmp_path, teaches(teacher, det))), from_checkpoint[det]) < 1e-4


def test_a_class_that_a_teacher_lacks(own, written, tiny, tmp_path, caplog):
    """The same as a checkpoint without it, whose heads have one channel less."""
    keep = {"seg": [0, 1, 2, 4, 5, 6, 7, 8, 9, 10], "det": [0, 1, 2, 3, 5]}
    content = {
        **checkpoint.load(own["path"], "x"),
        "arch": copy.deepcopy(own["arch"]),
        "model": dict(own["model"]),
    }
    content.pop("format")
    names = {task: [own["classes"][task][k] for k in rows] for task, rows in keep.items()}
    for task, rows in keep.items():
        content["arch"]["tasks"][task]["classes"] = names[task]
        for part in ("weight", "bias"):
            content["model"][f"heads.{task}.classifier.{part}"] = own["model"][
                f"heads.{task}.classifier.{part}"
            ][rows]
    checkpoint.save(tmp_path / "less.pt", content)
    for det in DET:
        found = first_losses(
            tiny(tmp_path, teaches(written("torchscript", **keep) | {"classes": names}, det))
        )
        assert (
            away(
                found,
                first_losses(
                    tiny(tmp_path, teaches({"path": str(tmp_path / "less.pt"), "amp": "none"}, det))
                ),
            )
            < 1e-4
        )
    assert "teacher does not know pavement of 'seg': left to the labels" in caplog.text


@pytest.mark.parametrize("left_out", [False, True])
def test_a_class_of_nearly_the_same_name(left_out, own, written, tiny, tmp_path, caplog):
    """It is proposed for the map, unless the map has it already."""
    names = ["Sky-" if name == "sky" else name for name in own["classes"]["seg"]]
    section = {
        "classes": {**own["classes"], "seg": names},
        "map": {"seg": {"Sky-": None}} if left_out else {},
    }
    ready(tiny(tmp_path, teaches(written("torchscript") | section)))
    assert "teacher does not know sky of 'seg': left to the labels; it has Sky- besides" in caplog.text
    assert ("write teacher.map.seg {Sky-: sky}" in caplog.text) != left_out


def test_half_precision(written, own, from_checkpoint, tiny, tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    net = Other(own["arch"])
    net.net.load_state_dict(own["model"])
    torch.save(net.half().state_dict(), tmp_path / "half.pt")
    path = tmp_path / "half.onnx"
    torch.onnx.export(
        net.eval(), (torch.rand(2, 3, 48, 64).half(),), path, dynamo=False, input_names=["images"], output_names=["seg", "det"]
    )  # fmt: skip
    for teacher in (
        written("onnx") | {"path": str(path)},
        written("state_dict") | {"path": str(tmp_path / "half.pt")},
    ):
        found = first_losses(tiny(tmp_path, teaches(teacher)))  # of a fixed batch of 2, given 4
        assert away(found, from_checkpoint["det_soft"]) < 5e-3


# --- networks of libraries, and detectors of other kinds


@torch.no_grad()
def losses_directly(run, net, read):
    """The student's losses on the first batch: through the source, and by what ``net`` itself returns."""
    batch = run.first_batch().to(run.device)
    outputs = run.teachers(batch), ModelOutput(read(net(batch.images), batch.images))
    return [{k: float(v) for k, v in run.distiller(batch, output).losses.items()} for output in outputs]


class Normalised(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self.net((images - mean) / std)


@pytest.mark.parametrize("library", ["smp", "torchvision"])
def test_segmentation_networks_of_libraries(library, own, tiny, tmp_path):
    torch.manual_seed(0)
    path, count = tmp_path / "net.pt", len(own["classes"]["seg"])
    if library == "smp":
        net = smp.create_model(
            "Unet",
            "resnet18",
            encoder_weights=None,
            classes=count,
            encoder_depth=3,
            decoder_channels=(8, 8, 8),
        )
        net.save_pretrained(tmp_path / "net.pt")
        section, options = {"input": {"size": [48, 64]}}, {}
    else:
        net = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=count)
        torch.save(net.state_dict(), path)
        section, options = {}, {"model": "lraspp_mobilenet_v3_large"}
    teacher = {
        "source": library,
        "path": str(path),
        "options": options,
        "classes": {"seg": own["classes"]["seg"]},
        "amp": "none",
    }
    run, _ = ready(tiny(tmp_path / "run", {"tasks.seg": KL, "teacher": {**teacher, **section}}))
    read = lambda said, images: {"seg": said["out"] if library == "torchvision" else said}  # noqa: E731
    found, wanted = losses_directly(run, Normalised(net.eval()), read)
    assert away(found, wanted) < 1e-5 and wanted["seg.soft.kl"] > 0


@pytest.fixture(scope="module")
def ssd(own, tmp_path_factory):
    """A detector with random weights that finds things, and the section of it."""
    torch.manual_seed(0)
    names, limits = own["classes"]["det"], {"score_thresh": 0.05, "detections_per_img": 20}
    net = get_model(
        "ssdlite320_mobilenet_v3_large",
        weights=None,
        weights_backbone=None,
        num_classes=len(names) + 1,
        **limits,
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "classification_head" in name and name.endswith("1.weight"):
                parameter.mul_(30)
    path = tmp_path_factory.mktemp("ssd") / "ssd.pt"
    torch.save(net.state_dict(), path)
    options = {"model": "ssdlite320_mobilenet_v3_large", "arguments": limits}
    return net.eval(), {
        "source": "torchvision",
        "path": str(path),
        "options": options,
        "classes": {"det": names},
        "amp": "none",
    }


def only_det(teacher, det):
    return {"tasks.det": {"alpha": 0.5, "soft": {"loss": det, "options": DET[det]}}, "teacher": teacher}


def test_detections(ssd, tiny, tmp_path):
    run, _ = ready(tiny(tmp_path, only_det(ssd[1], "det_boxes")))

    def read(said, images):
        real = [{k: v[one["labels"] > 0] for k, v in one.items()} for one in said]
        assert sum(len(one["labels"]) for one in real) > 8
        pad = lambda x, value: nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=value)  # noqa: E731
        boxes, scores = (pad([one[key] for one in real], 0.0) for key in ("boxes", "scores"))
        return {"det": PaddedDetections(boxes, scores, pad([one["labels"] - 1 for one in real], -1))}

    found, wanted = losses_directly(run, lambda images: ssd[0](list(images)), read)
    assert away(found, wanted) < 1e-5


def test_every_anchor_of_a_detector(ssd, tiny, tmp_path):
    """Of the anchors in a cell the best counts; a cell of a level that the detector has gets one."""
    dense = {**ssd[1], "options": {**ssd[1]["options"], "dense": True}}
    for det in ("det_soft", "det_mse"):
        run, _ = ready(tiny(tmp_path, only_det(dense, det)))
        batch = run.first_batch().to(run.device)
        output = run.teachers(batch)
        losses = run.distiller(batch, output).losses
        assert losses[f"det.soft.{det}"] > 0 and losses[f"det.soft.{det}"].isfinite()
    best = run.teachers.members["teacher"](batch.images).preds["det"].scores.amax((1, 2))
    torch.testing.assert_close(output.preds["det"][..., 4].sigmoid().amax(1), best, rtol=0, atol=1e-3)
    assert not output.ignore_mask["det"].all()


class Yolo(nn.Module):
    """What a network of ours finds, as [B,4+C,A] or [B,A,4+C] of centres and sizes, with a second, less sure
    anchor a cell."""

    def __init__(self, net, transposed):
        super().__init__()
        self.net, self.transposed = net, transposed
        self.centres, self.scales = cells((48, 64), (8, 16), torch.device("cpu"))

    def forward(self, images):
        raw = self.net(images)["det"]
        boxes = decode_boxes(raw, self.centres, self.scales)
        boxes = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)
        sure = torch.cat([boxes, raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()], dim=-1)
        other = torch.cat([boxes + 2, sure[..., 4:] / 2], dim=-1)
        found = torch.cat([sure[:, :48], other[:, :48], sure[:, 48:], other[:, 48:]], dim=1)
        return (found.transpose(1, 2) if self.transposed else found), torch.zeros(1)


@pytest.mark.parametrize("transposed", [False, True])
def test_predictions_of_the_yolo_family(transposed, own, tiny, tmp_path):
    net = Other(own["arch"])
    net.net.load_state_dict(own["model"])
    yolo, path = Yolo(net, transposed).eval(), tmp_path / "yolo.pt"
    torch.jit.trace(yolo, torch.rand(2, 3, 48, 64), strict=False).save(path)
    form = {"form": "predictions", "strides": [8, 16], "anchors": 2, "transposed": transposed}
    teacher = {
        "source": "torchscript",
        "path": str(path),
        "classes": {"det": own["classes"]["det"]},
        "input": BARE,
        "amp": "none",
    }
    teacher["outputs"] = {"det": form}
    ours, _ = ready(tiny(tmp_path, only_det({"path": own["path"], "amp": "none"}, "det_soft")))
    batch = ours.first_batch().to(ours.device)
    said = [
        ready(tiny(tmp_path, only_det(t, "det_soft")))[0].teachers(batch).preds["det"]
        for t in (teacher, ours.config.teacher)
    ]
    decoded = [decode_boxes(p, yolo.centres, yolo.scales) for p in said]
    torch.testing.assert_close(decoded[0], decoded[1], rtol=0, atol=0.01)
    scores = [p[..., 4:5].sigmoid() * p[..., 5:].sigmoid() for p in said]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-3)
    assert scores[1].max() > 0.5
    first_losses(tiny(tmp_path, only_det(teacher, "det_boxes")))


# --- sizes, several teachers, runs


@pytest.mark.parametrize("size", [[96, 160], [48, 96], [32, 48]])
def test_a_teacher_with_an_input_of_its_own(size, written, own, tiny, tmp_path):
    found, wanted = (
        first_losses(
            tiny(tmp_path, teaches({**teacher, "input": {**teacher.get("input", {}), "size": size}}))
        )
        for teacher in (written("state_dict"), {"path": own["path"], "amp": "none"})
    )
    assert away(found, wanted) < 1e-4


def test_several_teachers(written, from_checkpoint, tiny, tmp_path):
    a, b = written("torchscript"), written("state_dict")
    for teachers in (
        {"a": {**a, "tasks": ["seg"]}, "b": {**b, "tasks": ["det"]}},
        {"a": {**a, "tasks": ["seg"]}, "b": b},
    ):
        changes = {k: v for k, v in teaches(None).items() if k != "teacher"} | {"teachers": teachers}
        assert away(first_losses(tiny(tmp_path, changes)), from_checkpoint["det_soft"]) < 1e-4
    terms = {"distill": {"f": {**TERM, "teacher": "net.neck.p3", "of": "b"}}, **SHORT, "train.check": True}
    assert train(tiny(tmp_path / "run", {**changes, **terms})) is not None
    alone = {
        **changes,
        "teachers": {"b": b},
        "distill": terms["distill"],
    }  # one of `teachers`, named all the same
    assert "distill.f" in first_losses(tiny(tmp_path, alone))


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 5, 4, 8)

    def forward(self, images):
        return self.body(images).mean((2, 3))


def test_a_teacher_for_its_features_alone(tiny, tmp_path, tool, raw):
    torch.manual_seed(0)
    torch.save(Features().state_dict(), tmp_path / "net.pt")
    teacher = {
        "source": "state_dict",
        "path": str(tmp_path / "net.pt"),
        "options": {"factory": f"{__name__}:Features"},
    }
    changes = {
        "teacher": teacher,
        "distill": {"f": {**TERM, "teacher": "body"}},
        **SHORT,
        "train.check": True,
    }
    assert train(tiny(tmp_path / "run", changes)) is not None


def test_resumed_with_teachers_from_elsewhere(written, own, tiny, tmp_path, same_weights):
    onnx = written("torchscript")
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        onnx = written("onnx")
    teachers = {}
    for name, section in {
        "a": {**onnx, "tasks": ["seg"]},
        "b": {**written("state_dict"), "tasks": ["det"]},
    }.items():
        shutil.copy(section["path"], tmp_path / name)
        teachers[name] = {**section, "path": str(tmp_path / name)}
    changes = {k: v for k, v in teaches(None).items() if k != "teacher"} | {
        "teachers": teachers,
        "eval.pictures": 0,
    }
    changes |= {"train.steps": 4, "train.eval_every": 2, "eval.images": 1}
    whole, broken = tiny(tmp_path / "whole", changes), tiny(tmp_path / "broken", changes)
    assert train(whole) and train(broken, judge=lambda step, metrics: True) is None
    state = torch.load(tmp_path / "b", weights_only=True)
    state["model"]["net.heads.det.box.bias"] += 1e-3
    torch.save(state, tmp_path / "other.pt")
    others = {"b": tmp_path / "other.pt"} | (
        {"a": written("onnx", outer=True)["path"]} if onnx["source"] == "onnx" else {}
    )
    for name, content in others.items():
        kept = (tmp_path / name).read_bytes()
        shutil.copy(content, tmp_path / name)
        with pytest.raises(UserError, match="--resume: .* holds other weights"):
            train(broken, resume=True)
        (tmp_path / name).write_bytes(kept)
    with pytest.raises(UserError, match="--resume: the config is not the run's: teachers.a.amp"):
        train(
            tiny(
                tmp_path / "broken",
                {**changes, "teachers": {**teachers, "a": {**teachers["a"], "amp": "bf16"}}},
            ),
            resume=True,
        )
    assert train(broken, resume=True)
    a, b = (checkpoint.load(folder / "last.pt", "x") for folder in (tmp_path / "whole", tmp_path / "broken"))
    same_weights(a["model"], b["model"])
    same_weights(a["resume"]["distiller"], b["resume"]["distiller"])
    assert a["metrics"] == b["metrics"]


def test_the_check_tells_of_every_teacher(written, raw, tmp_path, tool):
    teachers = {
        "paper": {**written("torchscript"), "tasks": ["seg"], "floor": {"seg": 0}},
        "lab": written("state_dict"),
    }
    teachers["lab"]["map"] = {"seg": {"sky": None}, "det": {"bus": "car"}}
    changes = {k: v for k, v in teaches(None).items() if k != "teacher"} | {"teachers": teachers}
    changes |= {"distill": {"f": {**TERM, "teacher": "net.neck.p3", "of": "lab"}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw(tmp_path / "run", changes)))
    status, out, err = tool("check", "--config", tmp_path / "c.yaml")
    assert status == 0, out + err
    for line in (
        "pass  classes of seg, paper         11, the same names in the same order",
        "look  classes of seg, lab           10 of 11 are known to the teacher; left to the labels: sky; of "
        "no use here: sky",
        "look  classes of det, lab           5 of 6 are known to the teacher; left to the labels: bus",
        "pass  teacher paper in eval", "pass  teacher lab frozen", "pass  paper's seg ", "pass  lab's det ",
        "and teacher lab:net.neck.p3 [4, 16, 6, 8]",
    ):  # fmt: skip
        assert line in out, out


def test_pictures_of_a_teachers_predictions(written, tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = teaches(written("torchscript"), **SHORT, **{"data.labelled": 4})
    train(tiny(tmp_path / "run", {**changes, "eval.pictures": 2}))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0})
    board.Reload()
    drawn = [tag for tag in board.Tags()["images"] if tag.startswith("teacher on unlabelled")]
    assert len(drawn) == 2 and all(
        event.step == 0 and event.width > 0 for tag in drawn for event in board.Images(tag)
    )


# --- careless and hostile users


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


OPTIONS = {
    "state_dict": {"factory": FACTORY}, "smp": {"arch": "Unet", "encoder": "resnet18"},
    "torchvision": {"model": "lraspp_mobilenet_v3_large"},
}  # fmt: skip


@pytest.mark.parametrize("source", ["checkpoint", *SOURCES, "smp", "torchvision"])
def test_a_pickle_runs_as_nobodys_teacher(source, own, tiny, tmp_path):
    if source == "onnx":
        pytest.importorskip("onnxruntime")
    marker, paths = (
        tmp_path / "it_ran",
        [tmp_path / name for name in ("saved.pt", "legacy.pt", "plain.pkl", "within.pt")],
    )
    torch.save(Evil(marker), paths[0])
    torch.save(Evil(marker), paths[1], _use_new_zipfile_serialization=False)
    paths[2].write_bytes(pickle.dumps(Evil(marker)))
    torch.save({"format": checkpoint.FORMAT, "arch": own["arch"], "model": Evil(marker)}, paths[3])
    for path in paths:
        teacher = {
            "source": source,
            "path": str(path),
            "options": OPTIONS.get(source, {}),
            "classes": own["classes"],
        }
        if source == "checkpoint":
            teacher = {"path": str(path)}
        with pytest.raises(UserError) as error:
            train(tiny(tmp_path / "run", teaches(teacher)))
        told = str(error.value)
        assert told.startswith(
            "teacher.trust_pickle: " if source == "pickle" and "plain" not in path.name else "teacher.path: "
        )
        assert str(path) in told and not marker.exists() and not (tmp_path / "run").exists()


FAULTS = {
    "source": ({"source": "onxx"}, "teacher.source: unknown teacher source 'onxx'; did you mean 'onnx'?"),
    "options of another": (
        {"options": {"factory": "a:b"}},
        "teacher.options.factory: no such option; none is available",
    ),
    "trust": (
        {"source": "onnx", "trust_pickle": True},
        "teacher.trust_pickle: the source 'onnx' never runs code from a file",
    ),
    "no file": ({"path": "/nowhere/a.pt"}, "teacher.path: there is no file /nowhere/a.pt"),
    "variable": (
        {"path": "$NOT_SET/a.pt"},
        "x: teacher.path: '$NOT_SET/a.pt' is no path: a variable in it is not set",
    ),
    "device": ({"path": "/dev/zero"}, "teacher.path: /dev/zero is no file but a device or a pipe"),
    "folder": (
        {"path": "/"},
        "teacher.path: / is no TorchScript archive: it seems to be a folder; give the file inside it",
    ),
    "few": (
        {"seg": ["sky", "road"]},
        "teacher.outputs.seg: the network gives 11 classes, but 2 are named in `classes`",
    ),
    "twice": ({"seg": ["sky"] * 11}, "teacher.classes.seg: 'sky' is there twice"),
    "strange": ({"seg": list("abcdefghijk")}, "teacher.classes.seg: none of the teacher's classes (a, b, "),
    "one text": (
        {"seg": "sky"},
        "x: teacher.classes: seg: a list of class names, in the network's order, is needed, not 'sky'",
    ),
    "numbers": ({"seg": [0, 1]}, "x: teacher.classes: seg: 0 is no name; write names, in quotes where"),
    "no such task": (
        {"classes": {"sge": ["a"]}},
        "teacher.classes.sge: there is no such task; did you mean 'seg'?",
    ),
    "no classes": (
        {"classes": {}},
        "teacher.classes: the class names of seg or det, in the network's order, are needed",
    ),
    "seg only": (
        {"classes": {"seg": ["sky"]}},
        "tasks.det.alpha: it is above 0, but no teacher knows 'det'; set it to 0, or add",
    ),
    "left out": (
        {"tasks": ["seg"]},
        "tasks.det.alpha: it is above 0, but no teacher knows 'det'; set it to 0, or add a teacher, or",
    ),
    "map theirs": (
        {"map": {"seg": {"skyy": "sky"}}},
        "teacher.map.seg.skyy: the teacher has no class 'skyy'; did you mean 'sky'",
    ),
    "map ours": (
        {"map": {"seg": {"sky": "skyy"}}},
        "teacher.map.seg.sky: the student has no class 'skyy'; did you mean 'sky'?",
    ),
    "map task": ({"map": {"sgg": {}}}, "x: teacher.map.sgg: there is no such task; did you mean 'seg'?"),
    "map unused": (
        {"map": {"det": {}}, "tasks": ["seg"]},
        "x: teacher.map.det: teacher.tasks leaves 'det' out; change one of them",
    ),
    "tasks": ({"tasks": ["sgg"]}, "x: teacher.tasks.sgg: there is no such task; did you mean 'seg'?"),
    "floor": ({"floor": {"sgg": 1}}, "x: teacher.floor.sgg: there is no such task; did you mean 'seg'?"),
    "too low": ({"floor": {"seg": 100}}, "the check on the first batch failed:\n  teacher's seg: mIoU "),
    "at": (
        {"outputs": {"seg": {"at": "sge"}}},
        "teacher.outputs.seg: there is no 'sge' in what the network returns: {seg: ",
    ),
    "form": (
        {"outputs": {"seg": {"form": "logit"}}},
        "teacher.outputs.seg: form: 'logit' is none of logits, probability, binary",
    ),
    "output": ({"outputs": {"sgg": {}}}, "teacher.outputs.sgg: there is no such task; did you mean 'seg'?"),
    "scores": (
        {"outputs": {"det": {"form": "predictions", "objectness": True}}},
        "teacher.outputs.det: the network's scores go from -",
    ),
    "places": (
        {"outputs": {"det": {"form": "predictions", "objectness": True, "scores": "logit"}}},
        "tasks.det.soft.loss: teacher predicts at unknown locations: give teacher.outputs.det.strides, and "
        "anchors; or",
    ),
    "size": (
        {"input": {"size": [2, 3]}},
        "x: teacher.input.size.0: Input should be greater than or equal to 16 (given: 2)",
    ),
    "one size": ({"input": {"size": 64}}, "x: teacher.input.size: Input should be a list (given: 64)"),
    "range": (
        {"input": {"mean": MEAN, "std": STD}},
        "x: teacher.input: mean: [124.0, 116.0, 104.0] does not fit pixels of 0 to 1",
    ),
    "other range": (
        {"input": {"mean": [0.5] * 3, "std": [0.2] * 3, "scale": 255}},
        "x: teacher.input: mean: [0.5, 0.5, 0.5] is of pixels of 0 to 1, not pixels of 0 to 255",
    ),
    "mean alone": ({"input": {"mean": [0, 0, 0]}}, "x: teacher.input: std: mean is given; give both"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_before_training(fault, written, own, raw, tmp_path):
    change, said = FAULTS[fault]
    teacher = written("torchscript")
    if "seg" in change:
        change = {"classes": {**own["classes"], "seg": change["seg"]}}
    with pytest.raises(UserError) as error:
        train(configs.parse(raw(tmp_path / "run", teaches({**teacher, **change})), "x"))
    assert str(error.value).startswith(said), str(error.value)
    assert not (tmp_path / "run").exists()


PROBABLE = "teacher.outputs.seg.form: the network's values are probabilities, which add up to 1; set it to probability"


class Segments(Other):
    sums_to_one = True

    def forward(self, images):
        seg = super().forward(images)["seg"]
        return seg.softmax(1) if self.sums_to_one else 5 * seg


@pytest.mark.parametrize(
    ("sums_to_one", "wrong", "right", "said"),
    [
        (True, "logits", "probability", PROBABLE),
        (False, "probability", "logits", "teacher.outputs.seg.form: the network's values reach"),
    ],
)
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_probabilities_are_told_from_logits(sums_to_one, wrong, right, said, amp, own, tiny, tmp_path):
    """Whatever the precision of the forward: in bf16 eleven probabilities do not add up to 1."""
    torch.manual_seed(0)
    net = Segments(own["arch"]).eval()
    net.sums_to_one = sums_to_one
    nn.init.normal_(net.net.heads["seg"].classifier.bias, std=9.0)
    torch.jit.trace(net, torch.rand(2, 3, 48, 64), strict=False).save(tmp_path / "net.pt")
    teacher = {
        "source": "torchscript",
        "path": str(tmp_path / "net.pt"),
        "classes": {"seg": own["classes"]["seg"]},
        "amp": amp,
    }
    configs = [
        tiny(tmp_path, {"tasks.seg": KL, "teacher": {**teacher, "outputs": {"seg": {"form": f}}}})
        for f in (wrong, right)
    ]
    with pytest.raises(UserError) as error:
        ready(configs[0])
    assert str(error.value).startswith(said)
    ready(configs[1])


def test_sections_of_teachers(written, own, raw, tmp_path, monkeypatch):
    good = written("torchscript")
    term = {"distill": {"f": {**TERM, "of": "x"}}}
    taught = {k: v for k, v in teaches(None).items() if k != "teacher"}
    (tmp_path / "run").mkdir()
    shutil.copy(good["path"], tmp_path / "run" / "best.pt")
    inside = {**good, "path": str(tmp_path / "run" / "best.pt")}
    for changes, said in (
        ({"teachers": {}}, "x: an alpha is above 0 but there is no teacher: give teacher.path"),
        ({"teachers": None, "teacher": None}, "x: an alpha is above 0 but there is no teacher: give teacher.path"),
        ({"teacher": "a.pt"}, "x: teacher: Input should be a mapping (given: 'a.pt')"),
        ({"teachers": good}, "x: teachers: every teacher has a name of your choice before its keys"),
        ({"teacher": good, "teachers": {"a": good}}, "x: teachers: there is a teacher besides"),
        ({"teachers": {"a": good, "b": good}, "distill": {"f": TERM}}, "x: distill.f.of: which teacher? known: a, b"),
        ({"teachers": {"a": good, "y": good}, **term}, "x: distill.f.of: no teacher 'x'; known: a, y"),
        ({"teacher": good, **term}, "x: distill.f.of: no teacher 'x'; there is only one; leave it out"),
        ({"teacher": good, "distill": {"f": TERM}}, "distill.f.teacher: modules of a teacher from 'torchscript' cannot be tapped"),
        ({"teacher": {"path": good["path"]}}, "teacher.path: " + good["path"] + " is no checkpoint of this package: it seems"),
        ({"teacher": inside}, f"teacher.path: {inside['path']} lies in run.dir"),
        ({"teacher": {**written("state_dict"), "options": {"factory": FACTORY, "key": 3}}}, "teacher.options.key: "),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            train(configs.parse(raw(tmp_path / "run", {**taught, **changes}), "x"), overwrite=True)
        assert str(error.value).startswith(said), str(error.value)
    monkeypatch.setenv("TEACHERS", str(Path(good["path"]).parent))
    config = configs.parse(
        raw(
            tmp_path / "run", {**taught, "teacher": {**good, "path": "$TEACHERS/" + Path(good["path"]).name}}
        ),
        "x",
    )
    assert config.teacher.path == good["path"]


def test_archives_that_unpack_to_more_than_they_are(own, tiny, tmp_path):
    path = tmp_path / "bomb.pt"
    for member, source in {"data/0": "state_dict", "code/a.py": "torchscript"}.items():
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/constants.pkl" if source == "torchscript" else "a/data.pkl", b"")
            archive.writestr(f"a/{member}", bytes(2**24))
        teacher = {
            "source": source,
            "path": str(path),
            "options": OPTIONS.get(source, {}),
            "classes": own["classes"],
        }
        with pytest.raises(UserError, match="teacher.path: .* would be 16 MB unpacked"):
            ready(tiny(tmp_path, teaches(teacher)))
