"""Cutting channels: what goes, what stays, and that the file is a checkpoint like any other."""

import copy
import dataclasses
import sys

import pytest
import torch

from multitask_kd import build, checkpoint
from multitask_kd.compress.graph import Graph, output_layers
from multitask_kd.compress.profile import WHOLE, latencies, macs, parameters
from multitask_kd.compress.prune import Cutter, bites
from multitask_kd.compress.widths import resize, widths
from multitask_kd.engine.evaluate import evaluate_checkpoint
from multitask_kd.engine.prune import Cut, cut_content, prove, prune_checkpoint, report
from multitask_kd.errors import UserError

SIZE = (64, 64)


def arch(encoder="tu-test_resnet", width=16, strides=(4, 8, 16)):
    tasks = {
        "seg": {"classes": ["a", "b", "c"], "head": {}},
        "det": {"classes": ["x", "y"], "head": {"strides": list(strides[1:]), "depth": 1}},
    }
    return {
        "encoder": encoder, "strides": list(strides), "width": width, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2],
        "tasks": tasks, "input_size": list(SIZE),
    }  # fmt: skip


def network(**kwargs):
    torch.manual_seed(0)
    return build.network(arch(**kwargs)).eval()


def content(plan, net):
    count = sum(p.numel() for p in net.parameters())
    rest = {
        "metrics": {"seg": {"mIoU": 1.0}},
        "step": 3,
        "labelled_images": 1,
        "unlabelled_images": 0,
        "config": "",
    }
    return {"arch": plan, "params": count, "model": net.state_dict(), **rest}


def cutter(net, **options):
    return Cutter(net, SIZE, **{"method": "group", "local": True, "round_to": 4} | options)


def flops(net):
    return macs(net, SIZE)[WHOLE]


@pytest.fixture(scope="module")
def net():
    return network()


# --- what a network costs


def test_macs_and_parameters_by_hand(net):
    found = macs(net, SIZE)
    # 16x16 cells at stride 4: a 3x3 convolution 16 -> 16 and the classifier 16 -> 3
    assert found["heads.seg"] == 16 * 16 * (16 * 16 * 9 + 16 * 3)
    # 8x8 and 4x4 cells: two towers of one 3x3 convolution, 4 + 1 + 2 outputs
    assert found["heads.det"] == (8 * 8 + 4 * 4) * (2 * 16 * 16 * 9 + 16 * 7)
    assert found[WHOLE] == sum(count for part, count in found.items() if part != WHOLE)
    own = parameters(net)
    assert own["heads.seg"] == 16 * 16 * 9 + 32 + 16 * 3 + 3
    assert own[WHOLE] == sum(p.numel() for p in net.parameters())


def test_latency_by_part(net):
    found = latencies({"a": net, "b": net}, torch.rand(1, 3, *SIZE), rounds=3, settle=1)
    for by in found.values():
        assert set(by) == {"backbone", "neck", "heads.seg", "heads.det", WHOLE}
        assert all(ms > 0 for ms in by.values())


# --- which channels go


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(("by", "cost"), [("flops", flops), ("parameters", lambda n: parameters(n)[WHOLE])])
def test_ratio_is_reached_and_outputs_keep_their_shape(net, by, cost, local):
    cut, reached = cutter(net, local=local).reach(0.5, cost, 0.05)
    assert reached == pytest.approx(1 - cost(cut) / cost(net)) and abs(reached - 0.5) <= 0.05
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        before, after = net(images).preds, cut(images).preds
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    for part in ("backbone", "neck", "heads.seg"):
        assert parameters(cut)[part] < parameters(net)[part], part


def test_the_network_that_is_cut_is_a_copy(net):
    before = copy.deepcopy(net.state_dict())
    cutter(net).reach(0.3, flops, 0.05)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_output_layers_are_never_in_a_group(net):
    outputs = output_layers(net)
    assert set(outputs) == {
        "heads.seg.classifier",
        "heads.det.box",
        "heads.det.objectness",
        "heads.det.classifier",
    }
    kept = {id(p) for layer in outputs.values() for p in layer.parameters()} | {
        id(net.heads["det"].size_bias)
    }
    groups = Graph(net, SIZE).groups()
    assert groups
    for group in groups:
        assert not [s for s in group.slices if s.kind != "in" and id(s.values) in kept], group.root


@pytest.mark.parametrize("scope", ["backbone", "neck", "heads"])
def test_scope_leaves_the_other_outputs(net, scope):
    cut, _ = cutter(net, scope=(scope,)).reach(0.05, lambda n: parameters(n)[WHOLE], 0.04)
    own = next(iter(getattr(cut, scope).parameters()))
    assert sum(p.numel() for p in getattr(cut, scope).parameters()) < sum(
        p.numel() for p in getattr(net, scope).parameters()
    )
    assert own is not None
    if scope == "heads":
        assert all(
            torch.equal(a, b)
            for a, b in zip(cut.backbone.parameters(), net.backbone.parameters(), strict=True)
        )


@pytest.mark.parametrize("method", ["scale", "group", "magnitude"])
def test_dead_channels_go_first(method):
    """A quarter of every group is made zero in all that makes, scales and reads it: without it the network
    says the same."""
    net, dead = network(), {}
    groups = Graph(net, SIZE).groups()
    for group in groups:
        each = group.count // group.parts
        dead[group.root] = {part * each + place for part in range(group.parts) for place in range(1, each, 4)}
        for piece in group.slices:
            for row, channel in zip(piece.rows.tolist(), piece.channels.tolist(), strict=True):
                if channel in dead[group.root]:
                    piece.values.data.select(piece.dim, row).zero_()
    for group in groups:
        first = bites(group, method, local=True, round_to=1)[: len(dead[group.root]) // group.parts]
        assert {channel for bite in first for channel in bite.channels} == dead[group.root], group.root
    order = cutter(net, round_to=1, method=method, local=False)
    count = sum(1 for bite in order.bites if bite.score[0] == 0)
    assert sum(len(bite.channels) for bite in order.bites[:count]) == sum(map(len, dead.values()))
    cut, images = order.after(count), torch.rand(1, 3, *SIZE)
    with torch.no_grad():  # dead channels count in the statistics of a GroupNorm, so det is another
        assert torch.allclose(net(images).preds["seg"], cut(images).preds["seg"], atol=1e-4)
    assert flops(cut) < 0.75 * flops(net)


def test_bites_by_hand(net):
    group = next(g for g in Graph(net, SIZE).groups() if g.root == "heads.seg.tower.0.0")
    assert (group.count, group.parts) == (16, 1)
    filters = net.heads["seg"].tower[0][0].weight.detach().flatten(1).norm(dim=1)
    order = filters.argsort().tolist()
    found = bites(group, "magnitude", local=True, round_to=8)
    # 16 -> 8 -> 4 channels: the eight weakest, then four more; the shares half way are 1 - 12/16 and 1 - 6/16
    assert [sorted(b.channels) for b in found] == [sorted(order[:8]), sorted(order[8:12])]
    assert [b.score[0] for b in found] == [0.25, 0.625]


def test_groups_of_a_norm_lose_alike():
    net = network(width=32)  # GroupNorm of 8 groups of 4
    cut, _ = cutter(net, scope=("heads",), round_to=1).reach(0.03, lambda n: parameters(n)[WHOLE], 0.02)
    tower = cut.heads["det"].box_tower[0]
    assert tower[1].num_groups == 8 and tower[1].num_channels == tower[0].out_channels < 32
    own = {tuple(row.flatten().tolist()) for row in tower[0].weight}
    old = [tuple(row.flatten().tolist()) for row in net.heads["det"].box_tower[0][0].weight]
    kept = [i for i, row in enumerate(old) if row in own]
    assert len(kept) == tower[0].out_channels
    assert len({sum(1 for i in kept if i // 4 == part) for part in range(8)}) == 1


# --- encoders


ENCODERS = {
    "tu-mobilenetv4_conv_small_035": {},  # runs a stage beyond stride 16, which nothing depends on
    "tu-resnet10t": {},
    "resnet34": {},
    "tu-efficientnet_b0": {},
    "tu-regnety_002": {},  # grouped convolutions, squeeze and excitation
    "tu-test_convnext": {"strides": (4, 8, 16)},  # LayerNorm, layer scales
    "mit_b0": {},  # attention: its residual stream stays
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_family_of_encoders(encoder):
    net = network(encoder=encoder, **ENCODERS[encoder])
    plan = arch(encoder=encoder, **ENCODERS[encoder])
    order = cutter(net, round_to=8, who=encoder)
    cut = order.after(len(order.bites) // 2)
    before, written = content(plan, net), cut_content(content(plan, net), net, cut, {})
    prove(before, written, cut, SIZE, encoder)  # rebuilt from plain data: the same to the bit
    assert written["params"] == sum(v.numel() for k, v in written["model"].items() if not is_buffer(k))
    assert parameters(cut)["backbone"] < 0.95 * parameters(net)["backbone"]


def is_buffer(name):
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_an_encoder_that_cannot_be_followed(net, monkeypatch):
    def stumble(*args, **kwargs):
        raise IndexError("index 256 is out of bounds")

    import torch_pruning

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", stumble)
    with pytest.raises(
        UserError,
        match=r"an-encoder: torch-pruning cannot follow its layers \(IndexError.*--scope neck heads",
    ):
        cutter(net, who="an-encoder")


# --- widths as plain data


def test_widths_of_what_is_not_cut_are_none(net):
    assert widths(net, network()) == {}


def test_resize_by_hand():
    net = network()
    resize(net, {"heads.seg.tower.0.0": {"out_channels": 5}, "heads.seg.tower.0.1": {"num_features": 5}})
    assert net.heads["seg"].tower[0][0].weight.shape == (5, 16, 3, 3) and net.heads["seg"].tower[0][
        1
    ].running_var.shape == (5,)
    assert widths(net, network()) == {
        "heads.seg.tower.0.0": {"out_channels": 5},
        "heads.seg.tower.0.1": {"num_features": 5},
    }
    assert net.heads["seg"].tower[0][0].weight.std() > 0  # new weights, not zeros


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"heads.seg.towr.0.0": {"out_channels": 5}},
            "no module 'heads.seg.towr.0.0'; did you mean 'heads.seg.tower.0.0'",
        ),
        ({"heads.seg.classifier": {"out_chanels": 5}}, "no width 'out_chanels'; did you mean 'out_channels'"),
        ({"heads.seg.classifier": {"in_channels": 0}}, "heads.seg.classifier.in_channels is 0"),
        ({"heads.seg.classifier": {"in_channels": "5"}}, "is '5'"),
        ({"heads.det.box_tower.0.1": {"num_channels": 9}}, "9 channels do not fit 8 groups"),
    ],
)
def test_widths_that_do_not_fit(given, says):
    with pytest.raises(ValueError, match=says):
        resize(network(), given)


# --- the file


@pytest.fixture(scope="module")
def pruned(teacher_run, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    found = prune_checkpoint(
        tiny(folder / "unused"), str(teacher_run / "best.pt"), str(folder / "cut.pt"), Cut(0.5, round_to=4)
    )
    return found


def test_the_file_is_a_checkpoint_without_torch_pruning(pruned, monkeypatch, tiny, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    kept = checkpoint.load(pruned.path, "x")
    loaded = build.from_checkpoint(kept, "x").eval()
    images = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        own, other = pruned.after.eval()(images).preds, loaded(images).preds
    assert all(torch.equal(own[task], other[task]) for task in own)
    assert kept["params"] == parameters(loaded)[WHOLE] < parameters(pruned.before)[WHOLE]
    assert (
        kept["metrics"] == {}
        and kept["pruned"]["ratio"] == 0.5
        and kept["pruned"]["reached"] == pruned.reached
    )
    metrics = evaluate_checkpoint(tiny(tmp_path), pruned.path)
    assert metrics["images"] == 5


def test_a_file_with_other_widths_is_refused(pruned):
    kept = checkpoint.load(pruned.path, "x")
    wrong = copy.deepcopy(kept)
    del wrong["arch"]["widths"]
    with pytest.raises(UserError, match=r"x: 'backbone.* is \[.*the network has"):
        build.from_checkpoint(wrong, "x")
    wrong = copy.deepcopy(kept)
    wrong["arch"]["widths"]["backbone.nothing"] = {"out_channels": 3}
    with pytest.raises(UserError, match="x: widths: the network has no module 'backbone.nothing'"):
        build.from_checkpoint(wrong, "x")


def test_a_cut_network_can_be_cut_again(pruned, tiny, tmp_path):
    again = prune_checkpoint(
        tiny(tmp_path), pruned.path, str(tmp_path / "again.pt"), Cut(0.3, by="parameters", round_to=2)
    )
    assert abs(again.reached - 0.3) <= 0.05
    assert checkpoint.load(again.path, "x")["pruned"]["from"] == pruned.path


def test_the_report(pruned):
    text = report(pruned)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert {"backbone", "neck", "heads.seg", "heads.det", "whole"} <= set(lines)
    assert (
        f"{100 * pruned.reached:.1f} % of the FLOPs taken away (50 % asked)" in text
        and "1 thread, median of 30" in text
    )


def test_latency_can_be_asked_for(net, monkeypatch):
    """The measured share decides; here a clock that counts channels."""
    from multitask_kd.engine import prune as engine

    stopwatch = engine.Stopwatch(net, SIZE, torch.device("cpu"), channels_last=False)
    assert stopwatch.over_whole(net) == 1.0
    monkeypatch.setattr(
        engine,
        "latencies",
        lambda nets, images, rounds: {k: {WHOLE: flops(n) ** 0.5} for k, n in nets.items()},
    )
    cut, reached = cutter(net).reach(0.3, stopwatch.over_whole, 0.05)
    assert abs(reached - (1 - (flops(cut) / flops(net)) ** 0.5)) < 1e-9 and abs(reached - 0.3) <= 0.05


# --- what is refused


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
def test_ratios_that_are_none(ratio):
    with pytest.raises(UserError, match="--ratio: .* is no share; above 0 and below 1"):
        Cut(ratio)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"by": "flop"}, "--by: there is no 'flop'; did you mean 'flops'"),
        ({"method": "scales"}, "--method: there is no 'scales'; did you mean 'scale'"),
        ({"scope": ("bakbone",)}, "--scope: there is no part 'bakbone'; did you mean 'backbone'"),
        ({"scope": ()}, "--scope: names no part"),
        ({"round_to": 0}, "--round-to: 0 channels"),
    ],
)
def test_options_that_are_none(options, says):
    with pytest.raises(UserError, match=says):
        Cut(0.5, **options)
    assert dataclasses.asdict(Cut(0.5))["by"] == "flops"


def test_without_torch_pruning_the_command_is_told(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(
        UserError,
        match=r"needs the package torch-pruning, which is not installed: pip install 'torch-pruning",
    ):
        prune_checkpoint(tiny(tmp_path), "x.pt", str(tmp_path / "y.pt"), Cut(0.5))


def test_files_that_are_refused(teacher_run, tiny, tmp_path):
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(2)}, other)
    with pytest.raises(UserError, match="--checkpoint: .*is not a checkpoint"):
        prune_checkpoint(tiny(tmp_path), str(other), str(tmp_path / "y.pt"), Cut(0.5))
    with pytest.raises(UserError, match="--out: .* is there already"):
        prune_checkpoint(tiny(tmp_path), str(teacher_run / "best.pt"), str(other), Cut(0.5))
    with pytest.raises(
        UserError,
        match="--out: .* a cut network is a checkpoint, as .pt; tools/export.py makes a .onnx of it",
    ):
        prune_checkpoint(tiny(tmp_path), str(teacher_run / "best.pt"), str(tmp_path / "y.onnx"), Cut(0.5))


def test_the_folder_of_the_result_is_made(teacher_run, tiny, tmp_path):
    out = tmp_path / "deep/er/cut.pt"
    prune_checkpoint(tiny(tmp_path), str(teacher_run / "best.pt"), str(out), Cut(0.3, round_to=2))
    assert checkpoint.load(out, "x")["pruned"]["ratio"] == 0.3


def test_a_share_out_of_reach(net):
    with pytest.raises(
        UserError, match=r"--ratio 0.99: the nearest that can be reached is 0\.\d+; ask for that"
    ):
        cutter(net).reach(0.99, flops, 0.005)


def test_the_tool(tool, teacher_run, raw, tmp_path):
    import yaml

    config = tmp_path / "cfg.yaml"
    config.write_text(yaml.safe_dump(raw(tmp_path / "run")), encoding="utf-8")
    out = tmp_path / "cut.pt"
    files = ("--config", config, "--checkpoint", teacher_run / "best.pt", "--out", out)
    status, text, _ = tool(
        "prune", *files, "--ratio", "0.4", "--round-to", "4", "--global", "--scope", "backbone", "neck"
    )
    assert (
        status == 0
        and out.is_file()
        and "of the FLOPs taken away (40 % asked)" in text
        and f"model.start={out}" in text
    )
    status, _, errors = tool("prune", *files, "--ratio", "1")
    assert status == 2 and "--ratio: 1 is no share" in errors
