"""Which channels of a network hang together: torch-pruning's dependency graph (Fang et al., DepGraph, CVPR 2023).

torch-pruning is imported when it is used: a network that is cut needs it no more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, did_you_mean
from ..models.multitask import MultiTaskNet

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
SCOPES = ("backbone", "neck", "heads")
INSTALL = "pip install 'torch-pruning>=1.6,<2'"


def torch_pruning(who: str) -> ModuleType:
    """The library. Raises UserError, with the command that installs it, where it is absent."""
    try:
        import torch_pruning
    except ImportError:
        raise UserError(f"{who} needs the package torch-pruning, which is not installed: {INSTALL}") from None
    return torch_pruning


@dataclass(frozen=True)
class Slice:
    """One tensor of a group: ``values`` [.., n, ..] along ``dim``, of which ``rows`` belong to the group's ``channels`` in turn.

    kind: "out" (the filters that make the channels), "in" (the weights that read them) or "scale" (of a normalisation).
    """

    values: nn.Parameter
    dim: int
    rows: Tensor
    channels: Tensor
    kind: str

    def squares(self, count: int) -> Tensor:
        """The sum of squares of each of the group's ``count`` channels: [count]."""
        flat = self.values if self.dim == 0 else self.values.transpose(0, self.dim)
        each = flat.flatten(1).square().sum(1) if flat.dim() > 1 else flat.square()
        return torch.zeros(count, dtype=each.dtype, device=each.device).index_add(0, self.channels, each[self.rows])


@dataclass(frozen=True)
class Group:
    """Channels that are cut together in every layer that makes, scales or reads them.

    root: path of the layer that the graph starts from; count: channels; parts: equal parts (the groups of a GroupNorm, of a
    grouped convolution) of which each loses as many.
    """

    root: str
    count: int
    parts: int
    slices: tuple[Slice, ...]


class Graph:
    """The dependency graph of a network.

    scope: backbone, neck, heads: whose channels may be cut. The outputs of the heads never are, nor what goes in and out of
    attention (modules with ``num_heads``), whose shapes the code around them counts on.
    Raises UserError where torch-pruning cannot follow the network.
    """

    def __init__(self, net: MultiTaskNet, size: Sequence[int], scope: Collection[str] = SCOPES, who: str = "the network"):
        self._tp = torch_pruning("pruning")
        self._who, self._net = who, net
        kept = [p for p in net.heads.parameters() if not _belongs_to_layer(net.heads, p)]
        images = torch.zeros(1, 3, *size, device=next(net.parameters()).device)
        training = net.training
        net.eval()
        with self._followed(), _outputs(_idle(net, images)) as more:
            self._graph = self._tp.DependencyGraph().build_dependency(
                net, images, output_transform=lambda view: [*view.preds.values(), *more], ignored_params=kept, verbose=False
            )
        net.train(training)
        self._names = {module: path for path, module in net.named_modules()}
        self._kept = _uncut(net, scope)

    def _followed(self) -> Any:
        return _Following(self._who)

    def groups(self) -> list[Group]:
        """Every group of channels that may be cut."""
        with self._followed():
            return [made for found in self._graph.get_all_groups(ignored_layers=self._kept) if (made := self._group(found))]

    def _group(self, found: Any) -> Group | None:
        module = found[0].dep.target.module
        count = self._graph.get_out_channels(module)
        slices = tuple(self._slices(found))
        parts = math.lcm(*(_equal_parts(dep.target.module, self._is_out(dep)) for dep, _ in found))
        if not slices or count % parts or any(len(s.rows) == 0 for s in slices):
            return None
        return Group(self._names[module], count, parts, slices)

    def _is_out(self, dep: Any) -> bool:
        return self._graph.is_out_channel_pruning_fn(dep.handler)

    def _slices(self, found: Any) -> Iterator[Slice]:
        for item in found:
            layer, rows, channels = item.dep.target.module, item.idxs, item.root_idxs
            if not isinstance(layer, nn.Module) or getattr(layer, "weight", None) is None or None in (channels or [None]):
                continue
            depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.in_channels
            if isinstance(layer, NORMS):
                kind, dim = "scale", 0
            elif isinstance(layer, (nn.Conv2d, nn.Linear)):
                kind, dim = ("out", 0) if self._is_out(item.dep) or depthwise else ("in", 1)
            else:
                continue
            if kind == "in" and isinstance(layer, nn.Conv2d) and layer.groups > 1:
                continue  # a row of its weight is read by several channels
            device = layer.weight.device
            yield Slice(layer.weight, dim, torch.tensor(rows, device=device), torch.tensor(channels, device=device), kind)

    def cut(self, root: str, channels: Sequence[int]) -> None:
        """Take ``channels`` out of the group at ``root``, in place."""
        module = self._net.get_submodule(root)
        with self._followed():
            group = self._graph.get_pruning_group(
                module, self._graph.get_pruner_of_module(module).prune_out_channels, list(channels)
            )
            group.prune()


def _idle(net: MultiTaskNet, images: Tensor) -> list[nn.Module]:
    """Layers on which no prediction depends. Some encoders run a stage beyond the last that is used; it has to fit."""
    kinds = (nn.Conv2d, nn.Linear, *NORMS)
    owners = {id(m.weight): m for m in net.modules() if isinstance(m, kinds) and m.weight is not None}
    learning = [p for p in net.parameters() if id(p) in owners]
    with torch.enable_grad():
        said = sum(pred.sum() for pred in net(images).preds.values())
    found = torch.autograd.grad(said, learning, allow_unused=True)
    return [owners[id(p)] for p, gradient in zip(learning, found, strict=True) if gradient is None]


@contextmanager
def _outputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What ``layers`` put out while the context lasts."""
    found: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda module, inputs, output: found.append(output)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Following:
    """A context in which what torch-pruning stumbles over becomes a UserError, and its warnings are silent."""

    def __init__(self, who: str):
        self.who = who

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._warnings.__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, (UserError, MemoryError)):
            raise UserError(
                f"{self.who}: torch-pruning cannot follow its layers ({type(error).__name__}: {error}); leave the backbone "
                "as it is (--scope neck heads), or choose another encoder"
            ) from error


def _belongs_to_layer(root: nn.Module, parameter: nn.Parameter) -> bool:
    layers = (m for m in root.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)))
    return any(parameter is own for layer in layers for own in layer.parameters(recurse=False))


def _uncut(net: MultiTaskNet, scope: Collection[str]) -> list[nn.Module]:
    """Modules whose output channels stay."""
    if unknown := [name for name in scope if name not in SCOPES]:
        raise UserError(f"--scope: there is no part '{unknown[0]}'; {did_you_mean(unknown[0], SCOPES)}")
    kept = [m for name in SCOPES if name not in scope for m in getattr(net, name).modules()]
    kept += [m for attention in net.modules() if hasattr(attention, "num_heads") for m in attention.modules()]
    return kept + list(output_layers(net).values())


def output_layers(net: MultiTaskNet) -> dict[str, nn.Module]:
    """The layers that make the predictions, by path: the layers of a head that stand in no tower."""
    found = {}
    for task, head in net.heads.items():
        found |= {
            f"heads.{task}.{name}": child for name, child in head.named_children() if isinstance(child, (nn.Conv2d, nn.Linear))
        }
    return found


def _equal_parts(layer: Any, out: bool) -> int:
    """Of how many equal parts the channels of a layer are."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    if isinstance(layer, nn.Conv2d) and layer.groups > 1 and not (layer.groups == layer.in_channels == layer.out_channels):
        return layer.groups
    return 1
