import copy

import pytest
import torch

from multitask_kd import checkpoint
from multitask_kd.errors import UserError
from multitask_kd.models import backbones
from multitask_kd.models.backbones import build_encoder, check_encoder
from multitask_kd.models.dense_head import DenseHead, cells
from multitask_kd.models.multitask import MultiTaskNet, count_parameters, reads_encoder
from multitask_kd.models.necks import Pyramid, level_name
from multitask_kd.tasks.classification import PooledHead
from multitask_kd.tasks.semantic import SegHead

ENCODER = "tu-mobilenetv4_conv_small_035"
STRIDES = (4, 8, 16, 32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_encoder(ENCODER, max_stride=32).eval()


def network(encoder, strides=STRIDES, width=16, mean=MEAN, std=STD, detects_at=None):
    heads = {"seg": SegHead(width, strides, 5), "det": DenseHead(width, strides, 3, strides=detects_at)}
    return MultiTaskNet(copy.deepcopy(encoder), heads, strides, width, mean, std).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("strides", "det"), [(STRIDES, (4, 8, 16, 32)), ((4, 8, 16), (8, 16)), ((8, 32), (8, 32))]
)
def test_shapes_at_strides(encoder, strides, det):
    net = network(encoder, strides, detects_at=det)
    output = net(torch.rand(2, 3, 64, 96))
    assert set(output.preds) == {"seg", "det"}
    assert output.preds["seg"].shape == (2, 5, 64 // strides[0], 96 // strides[0])
    assert output.preds["det"].shape == (2, len(cells((64, 96), det, torch.device("cpu"))[0]), 4 + 1 + 3)
    assert net.heads["seg"].strides == strides[:1] and net.heads["det"].strides == det


@torch.no_grad()
def test_levels_can_be_hooked_by_name(encoder):
    net, shapes = network(encoder), {}
    for name in ("neck.p2", "neck.p3", "neck.p4", "neck.p5", "heads.seg"):
        net.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: shapes.update({name: tuple(o.shape)})
        )
    output = net(torch.rand(1, 3, 64, 96))
    assert shapes == {
        "neck.p2": (1, 16, 16, 24), "neck.p3": (1, 16, 8, 12), "neck.p4": (1, 16, 4, 6), "neck.p5": (1, 16, 2, 3),
        "heads.seg": tuple(output.preds["seg"].shape),
    }  # fmt: skip


@torch.no_grad()
def test_what_a_hook_returns_is_what_the_heads_see(encoder):
    net, images = network(encoder), torch.rand(1, 3, 64, 64)
    before = net(images).preds["seg"]
    handle = net.get_submodule("neck.p2").register_forward_hook(lambda m, i, o: o * 0)
    assert not torch.equal(net(images).preds["seg"], before)
    handle.remove()
    assert torch.equal(net(images).preds["seg"], before)


@torch.no_grad()
def test_a_head_may_read_the_encoder_in_the_place_of_the_pyramid(encoder):
    channels = {s: encoder.out_channels[s.bit_length() - 1] for s in STRIDES}
    heads = {"seg": SegHead(16, STRIDES, 5), "weather": PooledHead(channels, STRIDES, 3)}
    net, images = (
        MultiTaskNet(copy.deepcopy(encoder), heads, STRIDES, 16, MEAN, STD).eval(),
        torch.rand(2, 3, 64, 64),
    )
    assert reads_encoder(heads["weather"]) and reads_encoder(PooledHead) and not reads_encoder(heads["seg"])
    before = net(images)
    assert before.preds["weather"].shape == (2, 3) and net.heads["weather"].strides == (32,)
    by_hand = net.heads["weather"].classifier(before.shared[-1].mean((2, 3)))
    assert torch.equal(by_hand, before.preds["weather"])
    for level in ("neck.p2", "neck.p5"):
        handle = net.get_submodule(level).register_forward_hook(lambda m, i, o: o * 0)
        after = net(images)
        handle.remove()
        assert torch.equal(after.preds["weather"], before.preds["weather"])
        assert torch.equal(after.preds["seg"], before.preds["seg"]) == (level == "neck.p5")


def test_level_names():
    assert [level_name(s) for s in (2, 4, 8, 16, 32, 64)] == ["p1", "p2", "p3", "p4", "p5", "p6"]


def test_pyramid_mixes_from_coarse_to_fine():
    torch.manual_seed(0)
    neck = Pyramid([4, 6], (8, 16), 5).eval()
    fine, coarse = torch.rand(1, 4, 4, 4), torch.rand(1, 6, 2, 2)
    levels = neck([fine, coarse])
    assert list(levels) == [8, 16] and levels[8].shape == (1, 5, 4, 4) and levels[16].shape == (1, 5, 2, 2)
    other = neck([fine + 1, coarse])
    assert torch.equal(other[16], levels[16]) and not torch.equal(other[8], levels[8])
    assert not torch.equal(neck([fine, coarse + 1])[8], levels[8])


@torch.no_grad()
def test_images_are_normalised_inside(encoder):
    images = torch.rand(1, 3, 64, 64)
    plain = network(encoder, mean=(0, 0, 0), std=(1, 1, 1))
    own = network(encoder)
    own.load_state_dict(plain.state_dict())  # the statistics are not weights
    by_hand = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(own(images).preds["seg"], plain(by_hand).preds["seg"], atol=1e-5)
    assert not any(name in ("mean", "std") for name in own.state_dict())


def test_every_parameter_gets_a_gradient(encoder):
    net = network(encoder).train()
    output = net(torch.rand(2, 3, 64, 64))
    (output.preds["seg"].square().mean() + output.preds["det"].square().mean()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_images_of_a_batch_do_not_mix_in_eval(encoder):
    net = network(encoder)
    images = torch.rand(2, 3, 64, 64)
    both, alone = net(images), net(images[1:])
    for task in ("seg", "det"):
        assert torch.allclose(both.preds[task][1:], alone.preds[task], atol=1e-4)


@torch.no_grad()
def test_batch_norm_of_the_head_is_not_shared_across_levels(encoder):
    """The detection branches are shared by levels of other statistics: no running average of either may
    depend on both."""
    head = network(encoder).heads["det"]
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in head.modules())
    levels = {s: torch.rand(1, 16, 64 // s, 64 // s) for s in STRIDES}
    before = head.train()(levels)
    levels[32] = levels[32] * 100
    after = head(levels)
    assert torch.equal(before[:, :-4], after[:, :-4]) and not torch.equal(before[:, -4:], after[:, -4:])


def test_number_of_parameters():
    # 3x3 convolution 16 -> 16 without bias, its norm (2 * 16), and the 1x1 classifier 16 -> 5 with bias
    assert count_parameters(SegHead(16, (4, 8), 5)) == 16 * 16 * 9 + 32 + (16 * 5 + 5)
    # two branches of two blocks; box 4, objectness 1 and classes 3 with bias; one size a level
    block = 16 * 16 * 9 + 32
    assert count_parameters(DenseHead(16, STRIDES, 3)) == 4 * block + 8 * 16 + 8 + 4
    # the convolutions are shared: a level costs one number
    assert count_parameters(DenseHead(16, (8, 16), 3)) == count_parameters(DenseHead(16, STRIDES, 3)) - 2


def test_number_of_parameters_of_the_whole(encoder):
    net = network(encoder)
    parts = [net.backbone, net.neck, net.heads["seg"], net.heads["det"]]
    assert count_parameters(net) == sum(count_parameters(p) for p in parts)
    assert 100_000 < count_parameters(net) < 1_000_000


# --- encoders by name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet81", "resnet18"),
        ("tu-mobilenetv4_conv_smal_035", ENCODER),
        ("TU-MobileNetV4_conv_small_035", ENCODER),
    ],
)
def test_a_typo_names_the_nearest_encoder(name, nearest):
    with pytest.raises(
        UserError, match=rf"model\.encoder: unknown encoder '{name}'; did you mean '{nearest}'\?"
    ):
        check_encoder(name)
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        build_encoder(name, max_stride=32)


def test_known_names_pass():
    for name in ("resnet18", ENCODER, "tu-resnet18.a1_in1k"):
        check_encoder(name)


@torch.no_grad()
@pytest.mark.parametrize("max_stride", [2, 8, 32])
def test_encoder_goes_down_to_the_stride_asked_for(max_stride):
    encoder = build_encoder(ENCODER, max_stride=max_stride).eval()
    features = encoder(torch.rand(1, 3, 64, 64))
    assert [64 // f.shape[-1] for f in features] == [1 << i for i in range(max_stride.bit_length())]
    assert [f.shape[1] for f in features] == list(encoder.out_channels)


def test_encoder_that_cannot_go_so_deep():
    with pytest.raises(
        UserError, match=rf"model.encoder: '{ENCODER}' cannot give features down to stride 64"
    ):
        build_encoder(ENCODER, max_stride=64)


# --- starting weights


def other_weights():
    torch.manual_seed(1)
    return build_encoder(ENCODER, max_stride=32)


def assert_equal_weights(a, b):
    for key, value in a.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, b.state_dict()[key]), key


def test_weights_from_a_state_dict(tmp_path, encoder):
    source = other_weights()
    path = tmp_path / "encoder.pt"
    torch.save({**source.state_dict(), "fc.weight": torch.zeros(3)}, path)  # a tensor more is no harm
    loaded = build_encoder(ENCODER, max_stride=32, weights=str(path))
    assert_equal_weights(loaded, source)
    key = "model.conv_stem.weight"
    assert not torch.equal(loaded.state_dict()[key], encoder.state_dict()[key])


def test_weights_from_a_checkpoint_of_ours(tmp_path):
    source = network(other_weights())
    path = tmp_path / "best.pt"
    checkpoint.save(path, {"arch": {"encoder": ENCODER}, "model": source.state_dict()})
    assert_equal_weights(build_encoder(ENCODER, max_stride=32, weights=str(path)), source.backbone)


def refused(path):
    with pytest.raises(UserError) as caught:
        build_encoder(ENCODER, max_stride=32, weights=str(path))
    assert str(caught.value).startswith("model.weights: ") and str(path) in str(caught.value)
    return str(caught.value)


def test_weights_of_another_encoder(tmp_path):
    path = tmp_path / "other.pt"
    torch.save(build_encoder("tu-mobilenetv4_conv_small_050", max_stride=32).state_dict(), path)
    assert "is it the state dict of another encoder?" in refused(path)


def test_weights_that_are_not_there(tmp_path):
    assert "there is no file" in refused(tmp_path / "none.pt")
    assert "there is no file" in refused(tmp_path)  # a folder


def test_weights_from_a_file_of_something_else(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not weights")
    assert "not a file of plain weights" in refused(path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"arch": {}, "model": 3}])
def test_weights_from_a_file_of_tensors_that_is_no_state_dict(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    refused(path)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a weights file was run')",))


def test_code_in_a_weights_file_is_not_run(tmp_path):
    path = tmp_path / "trap.pt"
    torch.save({"model": Trap()}, path)
    assert "not a file of plain weights" in refused(path)


def test_imagenet_without_a_network_says_what_to_do(monkeypatch):
    def unreachable(*args, **kwargs):
        assert kwargs["weights"] == "imagenet"
        raise OSError("no route to host")

    monkeypatch.setattr(backbones.smp.encoders, "get_encoder", unreachable)
    with pytest.raises(UserError) as caught:
        build_encoder(ENCODER, max_stride=32, weights="imagenet")
    message = str(caught.value)
    assert message.startswith("model.weights: the imagenet weights of") and "no route to host" in message
    assert "encoder.state_dict()" in message and "null" in message


def test_no_weights_asks_no_network(monkeypatch):
    real = backbones.smp.encoders.get_encoder
    asked = []
    monkeypatch.setattr(
        backbones.smp.encoders, "get_encoder", lambda *a, **k: asked.append(k["weights"]) or real(*a, **k)
    )
    build_encoder(ENCODER, max_stride=8)
    assert asked == [None]
