"""Sparse training: the penalties by hand, and what they do to a run."""

import sys

import pytest
import torch
from test_prune import SIZE, network
from torch import nn

from multitask_kd import build, checkpoint
from multitask_kd import config as configs
from multitask_kd.compress.graph import Group, Slice
from multitask_kd.compress.sparse import Sparse, group_penalty, norm_scales, scale_penalty
from multitask_kd.engine import log
from multitask_kd.engine import train as loop
from multitask_kd.engine.run import build_run
from multitask_kd.engine.train import train
from multitask_kd.errors import UserError


def built(config):
    """The run of a config."""
    return build_run(build.resolve_init(config))


def test_scale_penalty_by_hand():
    scales = [nn.Parameter(torch.tensor([0.5, -2.0])), nn.Parameter(torch.tensor([0.0]))]
    loss = scale_penalty(scales)
    assert loss == 0.5 + 2.0
    loss.backward()
    assert scales[0].grad.tolist() == [1, -1] and scales[1].grad.tolist() == [0]


def test_group_penalty_by_hand():
    # two channels: made by filters [3, 0] and [0, 1], scaled by 4 and 0: |w|^2 = 9 + 16 = 25 and 1, |w| = 5
    # and 1
    made = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    scale = nn.Parameter(torch.tensor([4.0, 0.0]))
    rows = torch.tensor([0, 1])
    group = Group("x", 2, 1, (Slice(made, 0, rows, rows, "out"), Slice(scale, 0, rows, rows, "scale")))
    # gamma = 2^0 for the strongest, 2^4 for the weakest: (1 * 25 + 16 * 1) / 2
    assert group_penalty(group).item() == pytest.approx((25 + 16) / 2)
    group_penalty(group).backward()
    assert torch.allclose(made.grad, torch.tensor([[3.0, 0.0], [0.0, 16.0]]))  # gamma * w
    # as the weights that read the channels, the columns count: 9 and 1; |w| 3 and 1
    reads = Group("x", 2, 1, (Slice(made, 1, rows, rows, "in"),))
    assert group_penalty(reads).item() == pytest.approx((9 + 16) / 2)


def test_all_norms_are_held_down():
    net = network()
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    assert len(norm_scales(net)) == len(norms) and any(isinstance(m, nn.GroupNorm) for m in norms)
    sparse = Sparse(net, SIZE, method="scale", weight=lambda progress: 0.5 * progress)
    count = sum(len(m.weight) for m in norms)
    with torch.no_grad():
        for m in norms:
            m.weight.fill_(-2.0)
    total, weighted = sparse(torch.tensor(1.0), {"seg.hard.ce": torch.tensor(1.0)}, 0.5)
    assert (
        weighted["sparse"] == 0.25 * 2 * count
        and total == 1 + weighted["sparse"]
        and "seg.hard.ce" in weighted
    )
    assert sparse.scales().shape == (count,) and (sparse.scales() == 2).all()


def test_group_reaches_what_scale_does_not():
    net = network()
    Sparse(net, SIZE, method="group", weight=lambda progress: 1.0).penalty().backward()
    assert net.heads["seg"].tower[0][0].weight.grad.any() and net.heads["seg"].classifier.weight.grad.any()


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Folders of the same run, plain and under a strong penalty of either kind, and the histograms that they
    wrote."""
    folder = tmp_path_factory.mktemp("sparse")
    seen = []
    before = log.RunLog.histogram
    log.RunLog.histogram = lambda self, *args: seen.append(args) or before(self, *args)
    try:
        for name, more in {
            "plain": {},
            "scale": {"sparse": {"weight": {"schedule": "linear", "start": 0.01, "end": 0.02}}},
            "group": {"sparse": {"method": "group", "weight": 0.01}},
        }.items():
            train(tiny(folder / name, {"train.ema": 0, "eval.pictures": 0, "train.eval_every": 2, **more}))
    finally:
        log.RunLog.histogram = before
    return folder, seen


def weights(folder):
    return checkpoint.load(folder / "last.pt", "x")["model"]


def test_penalties_shrink_what_they_act_on(runs):
    folder, _ = runs
    norms = [name for name in weights(folder / "plain") if name.endswith("bn1.weight")]
    size = lambda run: sum(weights(folder / run)[name].abs().sum() for name in norms)  # noqa: E731
    assert norms and size("scale") < size("plain") and size("group") < size("plain")


def test_what_a_run_logs(runs, read_lines):
    folder, seen = runs
    assert [(name, step) for name, step, _ in seen] == [("sparse/scales", 2), ("sparse/scales", 4)] * 2
    line = read_lines(folder / "scale", "train")[0]
    assert (
        line["weighted/sparse"] > 0
        and "share/sparse" in line
        and line["schedule/sparse.weight"] == pytest.approx(0.01 + 0.01 / 3)
    )
    assert not [key for key in read_lines(folder / "plain", "train")[0] if "sparse" in key]


def test_off_is_the_loop_as_it_was(tiny, runs, tmp_path, monkeypatch, same_weights):
    """Without the section nothing is built and the objective's own total goes backward."""
    totals = []
    before = loop.LossMeter.add
    monkeypatch.setattr(
        loop.LossMeter,
        "add",
        lambda self, losses, weighted: totals.append(set(weighted)) or before(self, losses, weighted),
    )
    train(tiny(tmp_path / "again", {"train.ema": 0, "eval.pictures": 0, "train.eval_every": 2}))
    assert all("sparse" not in names for names in totals)
    same_weights(weights(runs[0] / "plain"), weights(tmp_path / "again"))
    assert built(tiny(tmp_path / "x")).sparse is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "scales"}, "sparse.method: .*'scale' or 'group'"),
        ({"wieght": 1}, "sparse.wieght: unknown key; did you mean 'weight'"),
        ({"weight": -1}, "sparse.weight: -1.0 is below 0"),
        ({"weight": 0}, "sparse.weight: 0 from beginning to end"),
    ],
)
def test_sections_that_are_refused(raw, tmp_path, given, says):
    with pytest.raises(UserError, match=says):
        configs.parse(raw(tmp_path, {"sparse": given}), "cfg.yaml")


def test_group_without_torch_pruning_is_told_before_data_is_read(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setattr(build, "open_sets", lambda *args: pytest.fail("data was read"))
    with pytest.raises(UserError, match="sparse.method: group needs the package torch-pruning"):
        built(tiny(tmp_path, {"sparse": {"method": "group"}}))
    build.check(tiny(tmp_path, {"sparse": {"method": "scale"}}))


def test_a_network_without_norms():
    with pytest.raises(UserError, match="sparse.method: the network has no BatchNorm"):
        Sparse(nn.Linear(2, 2), SIZE, method="scale", weight=lambda progress: 1.0)
