import contextlib
import copy
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from multitask_kd import build
from multitask_kd.errors import UserError
from multitask_kd.sources.base import SOURCES, in_batches
from multitask_kd.sources.export import cleaned
from multitask_kd.sources.files import KINDS, kind_of

CPU = torch.device("cpu")
ARCH = {
    "encoder": "tu-test_resnet", "strides": [4, 8, 16], "width": 8, "mean": [0.5] * 3, "std": [0.2] * 3,
    "tasks": {
        "seg": {"classes": ["a", "b", "c"], "head": {}},
        "det": {"classes": ["a", "b"], "head": {"strides": [8, 16], "depth": 1}},
    },
}  # fmt: skip
OPTIONS = {
    "state_dict": {"factory": f"{__name__}:make"},
    "smp": {"arch": "Unet", "encoder": "tu-test_resnet"},
    "torchvision": {"model": "lraspp_mobilenet_v3_large"},
}
SOURCE_NAMES = ("state_dict", "pickle", "torchscript", "export", "onnx", "smp", "torchvision")


class Both(nn.Module):
    """One of our networks, giving a dict of tensors."""

    def __init__(self, width=8):
        super().__init__()
        self.net = build.network(ARCH | {"width": width})

    def forward(self, images):
        return dict(self.net(images).preds)


def make(width=8):
    return Both(width)


def not_a_module():
    return 3


class Evil:
    """Pickled, it makes a file when it is read."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Both()
    with torch.no_grad():
        net.train()(torch.rand(4, 3, 64, 64))  # statistics of BatchNorm other than those of a new network
    return net.eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def source(name, path, trust=False, **options):
    return SOURCES.build(
        name,
        {**OPTIONS.get(name, {}), **options},
        "teacher.options",
        None if path is None else str(path),
        trust,
    )


def load(name, path, trust=False, **options):
    net = source(name, path, trust, **options).load(CPU)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    return net


def same(found, wanted, tolerance=1e-5):
    assert list(found) == list(wanted)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=tolerance)


def refused(name, path, *words, trust=False, **options):
    with pytest.raises(UserError) as error:
        source(name, path, trust, **options).load(CPU)
    for word in words:
        assert word in str(error.value), str(error.value)


# --- the same outputs as the network itself


@torch.no_grad()
@pytest.mark.parametrize("content", ["bare", "ema", "lightning", "compiled", "safetensors", "legacy", "half"])
def test_state_dict(net, images, tmp_path, content):
    state, path = net.state_dict(), tmp_path / "net.pt"
    if content == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        holds = {
            "ema": {"epoch": 3, "ema": {f"module.{k}": v for k, v in state.items()}},
            "lightning": {
                "state_dict": {f"model.{k}": v for k, v in state.items()},
                "hyper_parameters": {"lr": 0.1},
            },
            "compiled": {"a": {"b": {f"module._orig_mod.{k}": v for k, v in state.items()}}},
            "half": {k: v.half() for k, v in state.items()},
        }.get(content, state)
        torch.save(holds, path, _use_new_zipfile_serialization=content != "legacy")
    options = {"key": "a.b"} if content == "compiled" else {}
    same(load("state_dict", path, **options)(images), net(images), 0.05 if content == "half" else 1e-5)


def test_state_dict_names_the_first_tensor_at_fault(net, tmp_path):
    path, state = tmp_path / "net.pt", net.state_dict()
    name = "net.neck.lateral.0.weight" if "net.neck.lateral.0.weight" in state else next(iter(state))
    torch.save({k.replace(name, name + "s"): v for k, v in state.items()}, path)
    refused("state_dict", path, f"lacks the tensor '{name}'", f"did you mean '{name}s'")
    torch.save({**state, "extra": torch.zeros(1)}, path)
    refused("state_dict", path, "has the tensor 'extra'", "not in the network")
    torch.save({**state, name: torch.zeros(3, 2)}, path)
    refused("state_dict", path, f"'{name}' is [3, 2]", "the network has")
    torch.save({**state, name: state[name] * float("nan")}, path)
    refused("state_dict", path, "not finite")
    torch.save(state, path)
    refused("state_dict", path, "the network has", arguments={"width": 16})


def test_state_dict_options(net, tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    torch.save({"student": net.state_dict(), "step": 3}, path)
    refused("state_dict", path, "no state dict was found", "'student'", "options.key")
    refused("state_dict", path, "options.key", "did you mean 'student'", key="studnt")
    refused("state_dict", path, "holds at 'step' a int", key="step")
    load("state_dict", path, key="student")
    for factory, word in {
        "nowhere_at_all:make": "cannot be imported", f"{__name__}:mak": "did you mean 'make'",
        f"{__name__}:not_a_module": "returns a int", "no_colon": "package.module:function",
    }.items():  # fmt: skip
        refused("state_dict", path, "options.factory", word, key="student", factory=factory)
    refused("state_dict", path, "options.arguments", key="student", arguments={"wide": 3})
    (tmp_path / "in_this_folder.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n"
    )
    torch.save(nn.Linear(2, 2).state_dict(), path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    assert isinstance(load("state_dict", path, factory="in_this_folder:make"), nn.Linear)


@torch.no_grad()
@pytest.mark.parametrize("content", ["whole", "ema", "half", "parallel", "legacy"])
def test_pickle_where_trusted(net, images, tmp_path, content):
    holds = {
        "whole": net, "legacy": net, "ema": {"ema": None, "model": net, "epoch": 1}, "half": copy.deepcopy(net).half(),
        "parallel": nn.DataParallel(net),
    }[content]  # fmt: skip
    torch.save(holds, tmp_path / "net.pt", _use_new_zipfile_serialization=content != "legacy")
    loaded = load("pickle", tmp_path / "net.pt", trust=True, **({"key": "model"} if content == "ema" else {}))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    same(loaded(images), net(images), 0.05 if content == "half" else 1e-5)


def test_pickle_says_what_is_wrong(net, tmp_path):
    path = tmp_path / "net.pt"
    torch.save(net, path)
    refused("pickle", path, "trust_pickle", "runs whatever code", "state_dict")
    torch.save(net.state_dict(), path)
    refused("pickle", path, "no module", "state_dict", trust=True)
    torch.save([1, 2], path)
    refused("pickle", path, "holds a list", trust=True)
    path.write_bytes(path.read_bytes()[:-200])
    refused("pickle", path, "truncated", trust=True)


@torch.no_grad()
def test_torchscript(net, images, tmp_path):
    torch.jit.trace(net, images, strict=False).save(tmp_path / "net.pt")
    same(load("torchscript", tmp_path / "net.pt")(images), net(images))


@pytest.fixture(scope="module")
def programs(net, tmp_path_factory):
    """{"fixed": a .pt2 of 2 images of 64x64, "free": of any number}"""
    found = {}
    for name, shapes in {"fixed": None, "free": ({0: torch.export.Dim("batch", min=1, max=4)},)}.items():
        found[name] = tmp_path_factory.mktemp("export") / f"{name}.pt2"
        torch.export.save(
            torch.export.export(net, (torch.rand(2, 3, 64, 64),), dynamic_shapes=shapes), found[name]
        )
    return found


@torch.no_grad()
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", ["fixed", "free"])
def test_export_at_any_batch(net, images, programs, name, trust):
    loaded = load("export", programs[name], trust)
    for count in (5, 1, 2):
        same(loaded(images[:count]), net(images[:count]))
    assert loaded.train() is loaded and not loaded.training
    with pytest.raises(UserError, match="exported for images of 64 x 64"):
        loaded(images[..., :32])


@torch.no_grad()
def test_export_in_the_format_of_older_torch(net, images, programs, tmp_path):
    from torch._export.serde import serialize as serde

    program = torch.export.load(programs["fixed"])
    artifact = serde.serialize(program)
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", ".".join(map(str, serde.SCHEMA_VERSION)))
        archive.writestr("serialized_exported_program.json", artifact.exported_program)
        archive.writestr("serialized_state_dict.pt", artifact.state_dict)
        archive.writestr("serialized_constants.pt", artifact.constants)
        archive.writestr("serialized_example_inputs.pt", artifact.example_inputs)
    same(load("export", path)(images), net(images))


@pytest.fixture(scope="module")
def onnx_models(net, tmp_path_factory):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    folder, found = tmp_path_factory.mktemp("onnx"), {}
    for name, axes in {
        "fixed": None,
        "free": {"images": {0: "batch"}, "seg": {0: "batch"}, "det": {0: "batch"}},
    }.items():
        found[name] = folder / f"{name}.onnx"
        torch.onnx.export(
            net, (torch.rand(2, 3, 64, 64),), found[name], dynamo=False, input_names=["images"], output_names=["seg", "det"],
            dynamic_axes=axes,
        )  # fmt: skip
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", ["fixed", "free"])
def test_onnx_at_any_batch(net, images, onnx_models, name):
    loaded = load("onnx", onnx_models[name])
    for count in (5, 2):
        same(loaded(images[:count]), net(images[:count]))
    with pytest.raises(UserError, match="64 x 64"):
        loaded(images[..., :32])


def onnx_of(op, path, domain="", kind=1, second=(), outputs=1):
    """A model of one operator."""
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info
    tensors = [onnx.helper.make_tensor(n, kind, [1], [2.0]) for n in second]
    node = onnx.helper.make_node(op, ["x", *second], ["y"], domain=domain)
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", kind, ["b", 3, 4, 4])], [value("y", kind, None)], tensors
    )
    sets = [onnx.helper.make_opsetid(d, 17) for d in {"", domain}]
    model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=9)
    onnx.save(model, path)
    return model


@torch.no_grad()
def test_onnx_models_of_other_kinds(images, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    path, few = tmp_path / "net.onnx", torch.rand(2, 3, 4, 4)
    onnx_of("Mul", path, kind=10, second=["two"])  # float16
    out = load("onnx", path)(few)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, few * 2, rtol=0, atol=2e-3)
    onnx_of("Mine", path, domain="com.mine")
    refused("onnx", path, "does not know")
    model = onnx_of("Mul", path, second=["two"])
    tensor = model.graph.initializer[0]
    tensor.raw_data = np.float32([2]).tobytes()
    tensor.ClearField("float_data")
    onnx.external_data_helper.set_external_data(tensor, "net.bin")
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    refused("onnx", path, "other files")
    (tmp_path / "net.bin").write_bytes(np.float32([2]).tobytes())
    torch.testing.assert_close(load("onnx", path)(few), few * 2)
    onnx_of("Mul", path, kind=7, second=["two"])
    refused("onnx", path, "float32")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    refused("onnx", path, "multitask_kd[onnx]")


@torch.no_grad()
def test_smp(images, tmp_path):
    torch.manual_seed(0)
    arguments = {"encoder_depth": 3, "decoder_channels": (8, 8, 8)}
    own = smp.create_model("Unet", "tu-test_resnet", encoder_weights=None, classes=3, **arguments).eval()
    torch.save({"state_dict": own.state_dict()}, tmp_path / "unet.pt")
    made = source("smp", tmp_path / "unet.pt", arguments=arguments)
    torch.testing.assert_close(made.load(CPU)(images), own(images), rtol=0, atol=1e-5)
    assert len(made.mean) == 3
    own.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        SOURCES.build("smp", {}, "o", str(tmp_path / "saved"), False).load(CPU)(images),
        own(images),
        rtol=0,
        atol=1e-5,
    )
    refused("smp", tmp_path / "saved", "leave the option out", arch="FPN")
    refused("smp", tmp_path / "unet.pt", "the network has", arguments=arguments, classes=5)
    refused("smp", tmp_path / "unet.pt", "did you mean 'Unet'", arch="Unett")
    refused("smp", tmp_path / "unet.pt", "unknown encoder", encoder="resnet43")
    for change, word in {
        "encoder_name": "tu-hf-hub:evil/net", "checkpoint_path": "/evil.pt", "_model_class": "Model", "in_channels": 4,
    }.items():  # fmt: skip
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        folder = tmp_path / change
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((tmp_path / "saved" / "model.safetensors").read_bytes())
        (folder / "config.json").write_text(json.dumps({**config, change: word}))
        refused(
            "smp", folder, "config.json" if change != "in_channels" else "channels", arch=None, encoder=None
        )


@torch.no_grad()
def test_torchvision_segmentation(images, tmp_path):
    torch.manual_seed(0)
    own = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4).eval()
    torch.save(own.state_dict(), tmp_path / "net.pt")
    made = source("torchvision", tmp_path / "net.pt")
    torch.testing.assert_close(made.load(CPU)(images)["semantic"], own(images)["out"], rtol=0, atol=1e-5)
    assert not made.normalises and made.mean
    refused("torchvision", None, "options.weights")
    refused("torchvision", None, "did you mean", model="deeplabv3_resnet5")
    refused("torchvision", None, "no weights 'COCO'", weights="COCO")
    refused("torchvision", tmp_path / "net.pt", "dense", dense=True)


DETECTORS = {
    "ssdlite320_mobilenet_v3_large": {},
    "retinanet_resnet50_fpn": {"min_size": 96, "max_size": 160},
    "fcos_resnet50_fpn": {"min_size": 96, "max_size": 160},
}


@torch.no_grad()
@pytest.mark.parametrize("model", DETECTORS)
def test_torchvision_detectors(tmp_path, model):
    torch.manual_seed(0)
    limits = {**DETECTORS[model], "score_thresh": 0.0, "detections_per_img": 20}
    own = get_model(model, weights=None, weights_backbone=None, num_classes=4, **limits).eval()
    for name, parameter in own.named_parameters():
        if name.endswith("cls_logits.weight"):  # scores that differ
            parameter.mul_(30)
    torch.save(own.state_dict(), tmp_path / "net.pt")
    pictures = torch.rand(2, 3, 72, 100)
    made = source("torchvision", tmp_path / "net.pt", model=model, arguments=limits)
    assert made.normalises
    for found, wanted in zip(made.load(CPU)(pictures)["detection"], own(list(pictures)), strict=True):
        real = wanted["labels"] > 0
        same(found, {**{k: v[real] for k, v in wanted.items()}, "labels": wanted["labels"][real] - 1})
    dense = load("torchvision", tmp_path / "net.pt", model=model, arguments=limits, dense=True)(pictures)[
        "detection"
    ]
    count = dense["boxes"].shape[1]
    assert (
        dense["scores"].shape == (2, count, 3)
        and dense["locations"].shape == (1, count, 2)
        and dense["strides"].shape == (count,)
    )
    assert dense["scores"].min() >= 0 and dense["scores"].max() <= 1
    inside = (dense["locations"] >= -40) & (dense["locations"] <= torch.tensor([200, 200]))
    assert inside.all() and dense["strides"].min() > 1
    for i, wanted in enumerate(own(list(pictures))):  # every detection is one of the dense ones
        for box, score, label in zip(wanted["boxes"], wanted["scores"], wanted["labels"], strict=True):
            if label > 0:
                away = (dense["boxes"][i] - box).abs().amax(1) + (
                    dense["scores"][i, :, label - 1] - score
                ).abs() * 100
                assert away.min() < 1e-2


def test_torchvision_knows_classes_of_its_own_weights(monkeypatch):
    monkeypatch.setattr(
        "multitask_kd.sources.torchvision.torchvision.models.get_model", lambda *a, **k: nn.Identity()
    )
    made = source("torchvision", None, model="fasterrcnn_resnet50_fpn", weights="COCO_V1")
    made.load(CPU)
    assert made.classes["detection"][:2] == ["person", "bicycle"] and len(made.classes["detection"]) == 90
    made = source("torchvision", None, weights="DEFAULT")
    made.load(CPU)
    assert made.classes["semantic"][0] == "__background__"


def test_slices_of_a_fixed_batch():
    seen = []

    def run(x):
        seen.append(len(x))
        return {"a": x.sum((1, 2, 3)), "points": torch.arange(7), "b": [x[:, :1]]}

    x = torch.rand(5, 3, 2, 2)
    out = in_batches(run, x, 2, 2)
    assert (
        seen == [2, 2, 2]
        and torch.equal(out["points"], torch.arange(7))
        and torch.equal(out["b"][0], x[:, :1])
    )
    torch.testing.assert_close(out["a"], x.sum((1, 2, 3)))
    with pytest.raises(UserError, match="free size"):
        in_batches(lambda x: x.sum()[None].expand(3), x, 2, 2)


# --- files that lie


def test_files_that_are_something_else(tmp_path):
    contents = {
        "empty": b"", "html": b"<!DOCTYPE html><html><body>Sign in</body></html>", "lfs": b"version https://git-lfs.github.com/spec/v1\n",
        "numpy": b"\x93NUMPY\x01\x00v\x00", "keras": b"\x89HDF\r\n\x1a\n", "broken zip": b"PK\x03\x04" + b"\0" * 200,
        "archive": b"\x1f\x8b\x08" + b"\0" * 40, "text": b"hello there", "unknown": bytes(range(1, 200)),
        "onnx": b"\x08\x08\x12\x07pytorch",
        "tflite": b"\x1c\0\0\0TFL3" + b"\0" * 20,
    }  # fmt: skip
    for kind, content in contents.items():
        path = tmp_path / f"{kind}.pt"
        path.write_bytes(content)
        assert kind_of(path) == kind
        for name in SOURCE_NAMES:
            if name != "onnx":
                refused(name, path, str(path), KINDS[kind][0], trust=True)
            elif kind != "unknown":
                pytest.importorskip("onnxruntime")
                refused(name, path, str(path))
    for name in SOURCE_NAMES:
        if name != "smp":
            refused(name, tmp_path, "a folder")
        refused(name, tmp_path / "absent.pt", "absent.pt", "No such file")
    refused("smp", tmp_path, "no config.json")


def test_files_of_another_source(net, programs, tmp_path):
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    torch.jit.trace(net, torch.rand(1, 3, 64, 64), strict=False).save(tmp_path / "script.pt")
    for name in SOURCE_NAMES:
        if name not in ("state_dict", "smp", "torchvision", "pickle"):
            refused(name, tmp_path / "weights.pt", "torch.save", "state_dict")
        if name != "torchscript":
            refused(name, tmp_path / "script.pt", "TorchScript", "torchscript")
        if name != "export":
            refused(name, programs["fixed"], "torch.export", "use the source export")
        cut = tmp_path / "cut.pt2"
        cut.write_bytes(programs["fixed"].read_bytes()[:-3000])
        refused(name, cut, "truncated")


# --- files that would run code


def rewritten(path, target, changes):
    """A copy of an archive with members changed (callable: of their content) or added, in its folder at the
    top."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        top = old.namelist()[0].split("/")[0] + "/"
        for entry in old.infolist():
            change = changes.get(entry.filename.removeprefix(top), old.read(entry))
            new.writestr(entry.filename, change(old.read(entry)) if callable(change) else change)
        for name, content in changes.items():
            if top + name not in old.namelist():
                new.writestr(top + name, content)
    return target


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "it_ran"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("name", SOURCE_NAMES)
@pytest.mark.parametrize(
    "form", ["plain", "protocol 0", "legacy", "zip", "value", "nested", "numpy", "npy", "tensor"]
)
def test_pickles_never_run(name, form, net, marker, tmp_path):
    evil, path = Evil(marker), tmp_path / "evil.pt"
    array = np.array([evil], dtype=object)
    if form == "npy":
        np.save(path.with_suffix(".npy"), array, allow_pickle=True)
        path = path.with_suffix(".npy")
    else:
        tensor = torch.zeros(2)
        tensor.hidden = evil
        path.write_bytes({
            "plain": lambda: pickle.dumps(evil), "protocol 0": lambda: pickle.dumps(evil, 0),
            "legacy": lambda: saved(evil, _use_new_zipfile_serialization=False), "zip": lambda: saved(evil),
            "value": lambda: saved({**net.state_dict(), "net.mean": evil}),
            "nested": lambda: saved({"state_dict": net.state_dict(), "hyper_parameters": {"a": [evil]}}),
            "numpy": lambda: saved({"state_dict": net.state_dict(), "scores": array}),
            "tensor": lambda: saved({"state_dict": {"a": nn.Parameter(tensor)}, "b": tensor}),
        }[form]())  # fmt: skip
    refused(name, path)
    if name in ("state_dict", "pickle", "smp", "torchvision") and form in (
        "zip",
        "legacy",
        "value",
        "nested",
    ):
        refused(name, path, "trust_pickle: true")


def test_the_pickle_would_have_run(tmp_path):
    """The attack of these tests works where nothing stops it."""
    torch.save(Evil(tmp_path / "it_ran"), tmp_path / "evil.pt")
    refused("pickle", tmp_path / "evil.pt", "NoneType", trust=True)
    assert (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl", "code/__torch__.py.debug_pkl"])
def test_torchscript_archives_run_no_pickle(member, net, marker, tmp_path):
    torch.jit.trace(nn.Conv2d(3, 2, 1), torch.rand(1, 3, 4, 4)).save(tmp_path / "net.pt")
    path = rewritten(
        tmp_path / "net.pt", tmp_path / "evil.pt", {member: pickle.dumps(Evil(marker), 2), "extra/a.pkl": b""}
    )
    if member.startswith("code/"):
        load("torchscript", path)  # where the code stood in its source: not even read
    else:
        refused("torchscript", path, "cannot be read as TorchScript")
    refused("state_dict", path, "TorchScript")


class Writes(nn.Module):
    def forward(self, x):
        torch.save(x, "it_ran")
        return x


def test_torchscript_that_writes_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Writes()).save(tmp_path / "evil.pt")
    refused("torchscript", tmp_path / "evil.pt", "'save'", "was not run")
    assert not Path("it_ran").exists()
    load("torchscript", tmp_path / "evil.pt", trust=True)(torch.rand(1))
    assert Path("it_ran").exists()
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "evil.pt", "a") as archive:
        archive.writestr(archive.namelist()[0], b"")
    refused("torchscript", tmp_path / "evil.pt", "same name")


def edited(change):
    """change(program, first node) -> bytes of the program, changed"""

    def edit(content):
        program = json.loads(content)
        change(program, program["graph_module"]["graph"]["nodes"][0])
        return json.dumps(program).encode()

    return {"models/model.json": edit}


def payload(**entry):
    def edit(content):
        config = json.loads(content)
        name = next(iter(config["config"]))
        config["config"][name].update(entry)
        return json.dumps(config).encode()

    return edit


def evil_sizes(text):
    def change(program, node):
        sizes = program["graph_module"]["graph"]["tensor_values"]
        next(v for v in sizes.values() if v["sizes"])["sizes"][0] = {
            "as_expr": {"expr_str": text, "hint": {"as_int": 2}}
        }

    return change


@pytest.fixture
def evil_parts(marker):
    evil, code = pickle.dumps(Evil(marker)), f"__import__('os').mkdir('{marker}')"
    weights = "data/weights/model_weights_config.json"
    tree = json.dumps(
        [
            1,
            {
                "type": "builtins.dict",
                "context": json.dumps({"__enum__": True, "fqn": "evil:A"}),
                "children_spec": [],
            },
        ]
    )
    specs = lambda p: p["graph_module"]["module_call_graph"][0]["signature"]  # noqa: E731
    return {
        "sample inputs": {"data/sample_inputs/model.pt": saved(((Evil(marker),), {}))},
        "sample inputs, plain": {"data/sample_inputs/model.pt": evil},
        "constants of older torch": {"data/constants/model.pt": saved({"a": Evil(marker)})},
        "weights of older torch": {"data/weights/model.pt": saved({"a": Evil(marker)})},
        "a pickled weight": {weights: payload(use_pickle=True), "data/weights/weight_0": saved(Evil(marker))},
        "a pickled weight, plain": {weights: payload(use_pickle=True), "data/weights/weight_0": evil},
        "an object": {
            "data/constants/model_constants_config.json": json.dumps(
                {"config": {"a": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
            ).encode(),
            "data/constants/opaque_obj_0": evil,
        },
        "a weight elsewhere": {weights: payload(use_pickle=True, path_name="../evil"), "data/evil": evil},
        "a library": {"data/aotinductor/model/a.so": b"\x7fELF"},
        "a function": edited(
            lambda p, n: n.update(target="torch.os.mkdir", inputs=[{"name": "", "arg": {"as_string": str(marker)}, "kind": 1}])
        ),
        "an operator on files": edited(lambda p, n: n.update(target="torch.ops.aten.from_file.default")),
        "a hidden attribute": edited(lambda p, n: n.update(target="torch.ops.aten.__class__.mro")),
        "a name": edited(lambda p, n: n.update(name=f"a = {code}")),
        "a name of an input": edited(lambda p, n: p["graph_module"]["graph"]["inputs"][0]["as_tensor"].update(name=f"a={code}")),
        "a size": edited(evil_sizes(code)),
        "a size in a text": edited(evil_sizes(f'Integer("{code}")')),
        "a size by attribute": edited(evil_sizes("Symbol('s0').__class__")),
        "a range": edited(lambda p, n: p["range_constraints"].update({code: {"min_val": 1, "max_val": 4}})),
        "keys of an enum": edited(lambda p, n: specs(p).update(out_spec=tree)),
        "argument names": edited(lambda p, n: specs(p).update(forward_arg_names=[f"x={code}"])),
    }  # fmt: skip


PARTS = (
    "sample inputs", "sample inputs, plain", "constants of older torch", "weights of older torch", "a pickled weight",
    "a pickled weight, plain", "an object", "a weight elsewhere", "a library", "a function", "an operator on files",
    "a hidden attribute", "a name", "a name of an input", "a size", "a size in a text", "a size by attribute", "a range",
    "keys of an enum", "argument names",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_export_archives_run_nothing(part, programs, evil_parts, tmp_path):
    path = rewritten(programs["free"], tmp_path / "evil.pt2", evil_parts[part])
    refused("export", path, str(path), "compiled" if part == "a library" else "trust_pickle: true")


def test_the_program_would_have_run(programs, tmp_path):
    """torch.export.load itself runs what is in the sample inputs."""
    path = rewritten(
        programs["free"],
        tmp_path / "evil.pt2",
        {"data/sample_inputs/model.pt": saved(((Evil(tmp_path / "it_ran"),), {}))},
    )
    with contextlib.suppress(Exception):  # of what it does next; versions differ
        torch.export.load(path)
    assert (tmp_path / "it_ran").exists()


def test_checks_written_as_python_are_dropped(programs, marker, tmp_path):
    guard = f"__import__('os').mkdir('{marker}') is None"
    path = rewritten(
        programs["free"], tmp_path / "evil.pt2", edited(lambda p, n: p.update(guards_code=[guard]))
    )
    assert b"mkdir" not in cleaned(str(path))["models/model.json"]
    with torch.no_grad():
        load("export", path)(torch.rand(2, 3, 64, 64))


def test_smp_folders_run_no_pickle(marker, tmp_path):
    smp.create_model("Unet", "tu-test_resnet", encoder_weights=None, classes=2).save_pretrained(
        tmp_path / "net"
    )
    (tmp_path / "net" / "model.safetensors").write_bytes(saved({"a": Evil(marker)}))
    refused("smp", tmp_path / "net", "pickled objects", arch=None, encoder=None)
    (tmp_path / "net" / "config.json").write_bytes(pickle.dumps(Evil(marker)))
    refused("smp", tmp_path / "net", "no config", arch=None, encoder=None)
