"""A checkpoint and a share -> a checkpoint of the same network with narrower layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import build, checkpoint
from ..compress.graph import SCOPES, torch_pruning
from ..compress.profile import WHOLE, latencies, macs, parameters
from ..compress.prune import METHODS, Cutter
from ..compress.widths import check_rebuilt, widths
from ..config import Config
from ..errors import UserError, did_you_mean
from ..models.multitask import MultiTaskNet
from ..precision import resolve_device
from ..report.tables import table

# by what a ratio may speak of: how near it has to be reached
TOLERANCES = {"parameters": 0.05, "flops": 0.05, "latency": 0.08}


@dataclass(frozen=True)
class Cut:
    """What is cut away: ``ratio`` of parameters, FLOPs or measured latency (``by``), of the parts in
    ``scope``.

    method: magnitude, scale or group, what a channel is worth; local: every layer loses the same share, else
    the least important channels go, wherever they are; round_to: layers get multiples of so many channels,
    which processors take in such steps. Raises UserError naming the option.
    """

    ratio: float
    by: str = "flops"
    method: str = "group"
    scope: Sequence[str] = SCOPES
    local: bool = True
    round_to: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:  # also where it is nan
            raise UserError(
                f"--ratio: {self.ratio:g} is no share; above 0 and below 1, e.g. 0.5, is taken away"
            )
        for option, known in (("by", TOLERANCES), ("method", METHODS)):
            if (given := getattr(self, option)) not in known:
                raise UserError(f"--{option}: there is no '{given}'; {did_you_mean(given, known)}")
        if unknown := [part for part in self.scope if part not in SCOPES]:
            raise UserError(f"--scope: there is no part '{unknown[0]}'; {did_you_mean(unknown[0], SCOPES)}")
        if not self.scope:
            raise UserError(f"--scope: names no part; known: {', '.join(SCOPES)}")
        if self.round_to < 1:
            raise UserError(f"--round-to: {self.round_to} channels; at least 1")

    @classmethod
    def of(cls, where: str, ratio: float, **options: Any) -> Cut:
        """A cut of which the options that are None keep their defaults. ``where`` it is asked for begins what
        a UserError says."""
        try:
            return cls(ratio, **{key: value for key, value in options.items() if value is not None})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Pruned:
    """What came of it: the network before and after, the share that is gone, and where it is written."""

    before: MultiTaskNet
    after: MultiTaskNet
    reached: float
    cut: Cut
    costs: dict[
        str, dict[str, dict[str, float]]
    ]  # by "before" and "after", by parameters, macs, latency_ms: by part
    threads: int
    path: str


def prune_checkpoint(config: Config, path: str, out: str, cut: Cut) -> Pruned:
    """Cut the network of the checkpoint ``path`` and write it to ``out``, a checkpoint like any other.

    The config tells the device, threads and memory layout on which latency is measured. Raises UserError for
    a file that is no checkpoint of this package, an ``out`` that is there already, a network that torch-pruning
    cannot follow, or a share out of reach.
    """
    torch_pruning("tools/prune.py")
    if Path(out).suffix.lower() in (".onnx", ".pt2"):
        raise UserError(
            f"--out: {out}: a cut network is a checkpoint, as .pt; tools/export.py makes a "
            f"{Path(out).suffix} of it"
        )
    if Path(out).exists():
        raise UserError(f"--out: {out} is there already; choose another name, or remove it")
    on = resolve_device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    content = checkpoint.load(path, "--checkpoint")
    net, size = build.from_checkpoint(content, "--checkpoint"), tuple(content["arch"]["input_size"])
    who = f"--checkpoint: the network with the encoder '{content['arch']['encoder']}'"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    cutter = Cutter(
        net, size, method=cut.method, scope=cut.scope, local=cut.local, round_to=cut.round_to, who=who
    )
    timed = Stopwatch(net, size, on, channels_last=config.run.channels_last)
    costs: dict[str, Callable[[MultiTaskNet], float]] = {
        "parameters": lambda n: parameters(n)[WHOLE],
        "flops": lambda n: macs(n, size)[WHOLE],
        "latency": timed.over_whole,
    }
    after, reached = cutter.reach(cut.ratio, costs[cut.by], TOLERANCES[cut.by])
    written = cut_content(
        content, net, after, {**asdict(cut), "scope": list(cut.scope), "reached": reached, "from": str(path)}
    )
    prove(content, written, after, size, who)
    checkpoint.save(out, written)
    spent = timed.both(after)
    return Pruned(
        net,
        after,
        reached,
        cut,
        {
            when: {"parameters": parameters(n), "macs": macs(n, size), "latency_ms": spent[when]}
            for when, n in (("before", net), ("after", after))
        },
        torch.get_num_threads(),
        out,
    )


def cut_content(
    content: dict[str, Any], before: MultiTaskNet, after: MultiTaskNet, how: dict[str, Any]
) -> dict[str, Any]:
    """The checkpoint of the cut network: the arch with its widths, its weights, no metrics, and how it was
    cut."""
    plain = {key: value for key, value in content["arch"].items() if key != "widths"}
    arch = plain | {"widths": widths(after, build.network(plain))}
    kept = {key: value for key, value in content.items() if key not in ("resume", "format")}
    state = {name: value.detach().clone() for name, value in after.state_dict().items()}
    return kept | {
        "arch": arch,
        "params": parameters(after)[WHOLE],
        "model": state,
        "metrics": {},
        "pruned": how,
    }


def prove(
    before: dict[str, Any], written: dict[str, Any], after: MultiTaskNet, size: Sequence[int], who: str
) -> None:
    """Raise UserError unless the written network predicts in the old shapes what the cut one in memory does,
    to the bit."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    rebuilt = build.from_checkpoint(written, who)
    check_rebuilt(after, rebuilt, images, who)
    old = build.from_checkpoint(before, who)
    with torch.no_grad():
        shapes, now = (
            {task: list(p.shape) for task, p in n.eval()(images).preds.items()} for n in (old, rebuilt)
        )
    if shapes != now:
        raise UserError(
            f"{who}: its predictions would change their shapes from {shapes} to {now}; leave the heads out "
            f"of --scope"
        )


class Stopwatch:
    """The latency of networks beside the uncut one's, on one image, in turns."""

    def __init__(self, net: MultiTaskNet, size: Sequence[int], device: torch.device, *, channels_last: bool):
        self.device, self.layout = device, torch.channels_last if channels_last else torch.contiguous_format
        self.net = self._placed(net)
        self.images = torch.rand(1, 3, *size).to(device).contiguous(memory_format=self.layout)
        self._whole = net

    def _placed(self, net: MultiTaskNet) -> MultiTaskNet:
        return copy.deepcopy(net).to(self.device).to(memory_format=self.layout)

    def both(self, net: MultiTaskNet, rounds: int = 30) -> dict[str, dict[str, float]]:
        """Milliseconds by part of the uncut network ("before") and of ``net`` ("after")."""
        return latencies({"before": self.net, "after": self._placed(net)}, self.images, rounds=rounds)

    def over_whole(self, net: MultiTaskNet) -> float:
        """The latency of ``net`` over that of the uncut one."""
        if net is self._whole:
            return 1.0
        found = self.both(net, rounds=15)
        return found["after"][WHOLE] / found["before"][WHOLE]


def report(found: Pruned) -> str:
    """The table of the network before and after, by part, and what was reached."""
    keys = {"parameters": "parameters", "macs": "MACs (M)", "latency_ms": "ms"}
    columns, rows = {"part": "part"}, []
    for key, title in keys.items():
        columns |= {f"{key} before": f"{title}", f"{key} after": "cut", f"{key} left": "left"}
    for part in found.costs["before"]["parameters"]:
        row: dict[str, Any] = {"part": part}
        for key in keys:
            before, after = (found.costs[when][key].get(part, 0) for when in ("before", "after"))
            scale = 1e6 if key == "macs" else 1
            row |= {
                f"{key} before": before / scale if scale > 1 else before,
                f"{key} after": after / scale if scale > 1 else after,
            }
            row[f"{key} left"] = f"{100 * after / before:.0f}%" if before else "-"
        rows.append(row)
    what = {"parameters": "of the parameters", "flops": "of the FLOPs", "latency": "of the latency"}[
        found.cut.by
    ]
    asked = f"{100 * found.reached:.1f} % {what} taken away ({100 * found.cut.ratio:g} % asked)"
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    return f"{table(rows, columns, digits=2)}\n\n{asked}; ms of one image, {threads}, median of 30"
