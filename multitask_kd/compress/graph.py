"""Which channels of a network must be pruned together, by torch-pruning's dependency graph.

The method is DepGraph (Fang et al., CVPR 2023). torch-pruning is imported only where it is used: a network
that is already pruned loads and runs without it.
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
    """Import torch-pruning. Raises UserError, with the command that installs it, where it is absent."""
    try:
        import torch_pruning
    except ImportError:
        raise UserError(f"{who} needs the package torch-pruning, which is not installed: {INSTALL}") from None
    return torch_pruning


@dataclass(frozen=True)
class Slice:
    """One parameter of a group: index ``rows[i]`` of ``values`` along ``dim`` belongs to the group's channel
    ``channels[i]``.

    kind: "out" (the filters that make the channels), "in" (the weights that read them) or "scale" (of a
    normalisation).
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
        return torch.zeros(count, dtype=each.dtype, device=each.device).index_add(
            0, self.channels, each[self.rows]
        )


@dataclass(frozen=True)
class Group:
    """Channels that are pruned together in every layer that makes, scales or reads them.

    root: path of the layer that the graph starts from; count: number of channels; parts: number of equal
    parts (the groups of a GroupNorm or of a grouped convolution), each of which loses the same number of
    channels.
    """

    root: str
    count: int
    parts: int
    slices: tuple[Slice, ...]


class Graph:
    """The dependency graph of a network.

    scope: the parts (backbone, neck, heads) whose channels may be pruned. The outputs of the heads are never
    pruned, nor are the inputs and outputs of attention (modules with ``num_heads``): the code around it
    relies on their shapes. Raises UserError where torch-pruning cannot follow the network.
    """

    def __init__(
        self,
        net: MultiTaskNet,
        size: Sequence[int],
        scope: Collection[str] = SCOPES,
        who: str = "the network",
    ):
        self._tp = torch_pruning("pruning")
        self._who, self._net = who, net
        kept = [p for p in net.heads.parameters() if not _belongs_to_layer(net.heads, p)]
        images = torch.zeros(1, 3, *size, device=next(net.parameters()).device)
        training = net.training
        net.eval()
        with self._followed(), _outputs(_idle(net, images)) as more:
            self._graph = self._tp.DependencyGraph().build_dependency(
                net,
                images,
                output_transform=lambda view: [*view.preds.values(), *more],
                ignored_params=kept,
                verbose=False,
            )
        net.train(training)
        self._names = {module: path for path, module in net.named_modules()}
        self._kept = _layers_to_keep(net, scope)

    def _followed(self) -> Any:
        return _Following(self._who)

    def groups(self) -> list[Group]:
        """Every group of channels that may be pruned."""
        with self._followed():
            return [
                made
                for found in self._graph.get_all_groups(ignored_layers=self._kept)
                if (made := self._group(found))
            ]

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
            if (
                not isinstance(layer, nn.Module)
                or getattr(layer, "weight", None) is None
                or None in (channels or [None])
            ):
                continue
            depthwise = (
                isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.in_channels
            )
            if isinstance(layer, NORMS):
                kind, dim = "scale", 0
            elif isinstance(layer, (nn.Conv2d, nn.Linear)):
                kind, dim = ("out", 0) if self._is_out(item.dep) or depthwise else ("in", 1)
            else:
                continue
            if kind == "in" and isinstance(layer, nn.Conv2d) and layer.groups > 1:
                continue  # a row of its weight is read by several channels
            device = layer.weight.device
            yield Slice(
                layer.weight,
                dim,
                torch.tensor(rows, device=device),
                torch.tensor(channels, device=device),
                kind,
            )

    def cut(self, root: str, channels: Sequence[int]) -> None:
        """Remove ``channels`` from the group at ``root``, in place."""
        module = self._net.get_submodule(root)
        with self._followed():
            group = self._graph.get_pruning_group(
                module, self._graph.get_pruner_of_module(module).prune_out_channels, list(channels)
            )
            group.prune()


def _idle(net: MultiTaskNet, images: Tensor) -> list[nn.Module]:
    """Layers that no prediction depends on. Some encoders run a stage past the last one used; its shapes must
    still fit."""
    kinds = (nn.Conv2d, nn.Linear, *NORMS)
    owners = {id(m.weight): m for m in net.modules() if isinstance(m, kinds) and m.weight is not None}
    learning = [p for p in net.parameters() if id(p) in owners]
    with torch.enable_grad():
        total = sum(pred.sum() for pred in net(images).preds.values())
    found = torch.autograd.grad(total, learning, allow_unused=True)
    return [owners[id(p)] for p, gradient in zip(learning, found, strict=True) if gradient is None]


@contextmanager
def _outputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of ``layers`` while the context lasts."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: found.append(output)) for layer in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Following:
    """A context that turns torch-pruning's exceptions into a UserError and silences its warnings."""

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
                f"{self.who}: torch-pruning cannot follow its layers ({type(error).__name__}: {error}); "
                f"leave the backbone "
                "as it is (--scope neck heads), or choose another encoder"
            ) from error


def _belongs_to_layer(root: nn.Module, parameter: nn.Parameter) -> bool:
    layers = (
        m
        for m in root.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
    )
    return any(parameter is own for layer in layers for own in layer.parameters(recurse=False))


def _layers_to_keep(net: MultiTaskNet, scope: Collection[str]) -> list[nn.Module]:
    """Modules whose output channels are not pruned."""
    if unknown := [name for name in scope if name not in SCOPES]:
        raise UserError(f"--scope: there is no part '{unknown[0]}'; {did_you_mean(unknown[0], SCOPES)}")
    kept = [m for name in SCOPES if name not in scope for m in getattr(net, name).modules()]
    kept += [m for attention in net.modules() if hasattr(attention, "num_heads") for m in attention.modules()]
    return kept + list(output_layers(net).values())


def output_layers(net: MultiTaskNet) -> dict[str, nn.Module]:
    """The layers that make the predictions, by path: the direct children of each head, not the layers of its
    towers."""
    found = {}
    for task, head in net.heads.items():
        found |= {
            f"heads.{task}.{name}": child
            for name, child in head.named_children()
            if isinstance(child, (nn.Conv2d, nn.Linear))
        }
    return found


def _equal_parts(layer: Any, out: bool) -> int:
    """The number of equal parts that the channels of a layer form."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    if (
        isinstance(layer, nn.Conv2d)
        and layer.groups > 1
        and not (layer.groups == layer.in_channels == layer.out_channels)
    ):
        return layer.groups
    return 1
