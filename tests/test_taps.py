"""Recording what modules put out, by dotted path."""

import copy

import pytest
import torch
from torch import nn

from multitask_kd.batch import ModelOutput
from multitask_kd.distill.taps import Tapped, bare
from multitask_kd.distill.teacher import Teacher
from multitask_kd.errors import UserError


class Net(nn.Module):
    """A stem, an in-place ReLU behind it, one convolution for two levels, and modules that are never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.shared = nn.Conv2d(4, 4, 1)
        self.neck = nn.ModuleDict({"p3": nn.Identity(), "p4": nn.Identity()})
        self.levels = nn.ModuleList([nn.Conv2d(4, 2, 1)])
        self.pair = Pair()

    def forward(self, images):
        x = self.act(self.stem(images))
        fine, coarse = self.shared(x), self.shared(x[..., ::2, ::2])
        self.pair(fine)
        return self.levels[0](self.neck["p3"](fine)), self.neck["p4"](coarse)


class Pair(nn.Module):
    def forward(self, x):
        return x, x + 1


class FakeDataParallel(nn.Module):
    """The form of torch's wrappers for several devices: the network is ``module``."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class FakeCompiled(nn.Module):
    """The form of torch.compile's: the network is ``_orig_mod``."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *args):
        return self._orig_mod(*args)


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_outputs_are_recorded_by_path():
    net = Net()
    tapped = Tapped(net, ["shared", "neck.p3", "levels.0", "neck.p3"])
    assert tapped.paths == ("shared", "neck.p3", "levels.0")
    with tapped as taps:
        out, coarse = net(IMAGES)
    assert set(taps) == {"shared", "neck.p3", "levels.0"}
    assert taps["levels.0"] is out and out.requires_grad
    x = net.stem(IMAGES).relu()
    assert torch.equal(taps["neck.p3"], net.shared(x))
    assert tapped.calls == {"shared": 2, "neck.p3": 1, "levels.0": 1}


def test_of_a_module_that_is_called_several_times_the_last_output_is_kept():
    net = Net()
    tapped = Tapped(net, ["shared", "neck.p4"])
    with tapped as taps:
        net(IMAGES)
    assert tapped.calls["shared"] == 2
    assert taps["shared"].shape == (2, 4, 4, 4) and torch.equal(taps["shared"], taps["neck.p4"])


def test_a_container_is_never_called():
    net = Net()
    tapped = Tapped(net, ["levels", "neck"])
    with tapped as taps:
        net(IMAGES)
    assert taps == {} and tapped.calls == {"levels": 0, "neck": 0}


def test_what_is_no_tensor_is_recorded_as_it_is():
    net = Net()
    tapped = Tapped(net, ["pair"])
    with tapped as taps:
        net(IMAGES)
    assert isinstance(taps["pair"], tuple) and len(taps["pair"]) == 2
    assert tapped.overwritten() == []


def test_each_pass_records_and_counts_anew():
    net = Net()
    tapped = Tapped(net, ["shared"])
    with tapped as first:
        net(IMAGES)
    with tapped as second:
        net(IMAGES[:1])
    assert first["shared"].shape[0] == 2 and second["shared"].shape[0] == 1
    assert tapped.calls == {"shared": 2}


def test_hooks_are_there_inside_the_context_only():
    net = Net()
    tapped = Tapped(net, ["stem", "neck.p3"])
    assert hooks(net) == 0
    with tapped as taps:
        assert hooks(net) == 2
        net(IMAGES)
    kept = taps["stem"]
    assert hooks(net) == 0
    net(torch.zeros(1, 3, 8, 8))
    assert taps["stem"] is kept and tapped.calls["stem"] == 1


def test_hooks_are_removed_after_an_exception():
    net = Net()
    tapped = Tapped(net, ["stem"])
    with pytest.raises(RuntimeError), tapped:
        net(torch.zeros(1, 5, 8, 8))  # 5 channels where the stem reads 3
    assert hooks(net) == 0
    with tapped as taps:
        net(IMAGES)
    assert hooks(net) == 0 and tapped.calls["stem"] == 1 and "stem" in taps


def test_a_copy_made_outside_has_no_hooks_and_records_nothing():
    net = Net()
    tapped = Tapped(net, ["stem"])
    with tapped as taps:
        net(IMAGES)
    other = copy.deepcopy(net)
    assert hooks(other) == 0
    with tapped as taps:
        other(IMAGES)
    assert taps == {}


def test_an_in_place_module_behind_a_tap_is_noticed_and_the_tap_copied_from_then_on():
    net = Net()
    tapped = Tapped(net, ["stem", "shared"])
    own = net.stem(IMAGES)
    assert own.min() < 0
    with tapped as taps:
        net(IMAGES)
    assert torch.equal(
        taps["stem"], own.relu()
    )  # written over: what is recorded is not what the module put out
    assert tapped.overwritten() == ["stem"] and tapped.copied == {"stem"}
    with tapped as taps:
        net(IMAGES)
    assert torch.equal(taps["stem"], own)
    assert tapped.overwritten() == [] and tapped.copied == {"stem"}
    taps["stem"].sum().backward()  # the copy is part of the graph
    assert net.stem.bias.grad.tolist() == [2 * 64.0] * 4


def test_nothing_is_copied_where_nothing_is_written_over():
    net = Net()
    net.act = nn.ReLU()
    tapped = Tapped(net, ["stem"])
    with tapped as taps:
        net(IMAGES)
    assert tapped.overwritten() == [] and not tapped.copied
    assert torch.equal(taps["stem"], net.stem(IMAGES))


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("neck.p33", "did you mean 'neck.p3'"),
        ("stemm", "did you mean 'stem'"),
        ("", "no module ''"),
        ("zzzzzz", "known: act, "),
    ],
)
def test_a_path_that_is_not_there_is_told_with_the_nearest(path, told):
    with pytest.raises(UserError) as error:
        Tapped(Net(), ["stem", path], "distill.x.student")
    assert str(error.value).startswith(f"distill.x.student: the network has no module '{path}'; ")
    assert told in str(error.value)


@pytest.mark.parametrize(
    "wrap",
    [
        FakeDataParallel,
        FakeCompiled,
        lambda n: FakeCompiled(FakeDataParallel(n)),
        lambda n: FakeDataParallel(FakeCompiled(n)),
    ],
)
def test_wrappers_do_not_change_paths(wrap):
    net = Net()
    wrapped = wrap(net)
    assert bare(wrapped) is net and bare(net) is net
    tapped = Tapped(wrapped, ["neck.p3"])
    with tapped as taps:
        wrapped(IMAGES)
    assert tapped.calls == {"neck.p3": 1} and taps["neck.p3"].shape == (2, 4, 8, 8)


def test_a_network_that_merely_has_a_part_named_module_is_no_wrapper():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    own = Own()
    assert bare(own) is own
    assert Tapped(own, ["module"]).paths == ("module",)


def test_torchs_own_wrapper_is_resolved():
    net = Net()
    assert bare(nn.DataParallel(net)) is net


def test_a_teacher_gives_its_taps_without_gradients():
    class Shown(Net):
        def forward(self, images):
            out, _ = super().forward(images)
            return ModelOutput({"seg": out})

    net = Shown()
    teacher = Teacher(net, {}, torch.device("cpu"), taps=["neck.p3", "stem"])
    output = teacher(IMAGES)
    assert set(output.taps) == {"neck.p3", "stem"} and set(output.preds) == {"seg"}
    assert not any(t.requires_grad for t in output.taps.values())
    assert hooks(net) == 0
    with pytest.raises(
        UserError, match=r"teacher: the network has no module 'nec\.p3'; did you mean 'neck\.p3'\?"
    ):
        Teacher(net, {}, torch.device("cpu"), taps=["nec.p3"])
