"""The widths of a pruned network's layers as plain data, stored beside the names that the unpruned one is
built from.

``{"backbone.conv1": {"out_channels": 24}, "backbone.bn1": {"num_features": 24},
"backbone.stage": {"gamma": [24]}}``: by module path, the width attributes of a layer that differ from the
network as it is built, or, for a module without width attributes, the shapes of its own parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UserError, did_you_mean

Widths = dict[str, dict[str, Any]]

# by kind of layer: the attributes that are widths
ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.modules.batchnorm._BatchNorm: ("num_features",),
    nn.GroupNorm: ("num_groups", "num_channels"),
    nn.LayerNorm: ("normalized_shape",),
}


def widths(net: nn.Module, built: nn.Module) -> Widths:
    """The widths of ``net`` that differ from those of ``built``, a network of the same modules."""
    found: Widths = {}
    for (path, module), other in zip(net.named_modules(), built.modules(), strict=True):
        own, before = _described(module), _described(other)
        if changed := {key: value for key, value in own.items() if value != before[key]}:
            found[path] = changed
    return found


def resize(net: nn.Module, widths: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the layers of ``net`` these widths, in place, with new weights. Raises ValueError for what the
    network does not have."""
    modules = dict(net.named_modules())
    for path, changes in widths.items():
        if path not in modules:
            raise ValueError(
                f"widths: the network has no module '{path}'; {did_you_mean(path, filter(None, modules))}"
            )
        known = _described(modules[path])
        for key, value in changes.items():
            if key not in known:
                raise ValueError(f"widths: '{path}' has no width '{key}'; {did_you_mean(key, known)}")
            if not _is_width(value, known[key]):
                raise ValueError(
                    f"widths: {path}.{key} is {value!r}; it needs "
                    f"{'sizes' if known[key] is list else 'a size'} above 0"
                )
        _resize(modules[path], changes)


def check_rebuilt(net: nn.Module, rebuilt: nn.Module, images: torch.Tensor, who: str) -> None:
    """Raise UserError unless both networks give bit-identical predictions on ``images``."""
    with torch.no_grad():
        own, other = net.eval()(images).preds, rebuilt.eval()(images).preds
    if any(not torch.equal(own[task], other[task]) for task in own):
        raise UserError(
            f"{who} keeps widths outside of its layers, so that it cannot be written as plain data; choose "
            f"another"
        )


def _kind(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in ATTRIBUTES if isinstance(module, kind)), None)


def _described(module: nn.Module) -> dict[str, Any]:
    """The width attributes of one module; for a module without any, the shapes of its own parameters."""
    kind = _kind(module)
    if kind is None:
        return {name: list(p.shape) for name, p in module.named_parameters(recurse=False)}
    values = {key: getattr(module, key) for key in ATTRIBUTES[kind]}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _is_width(value: Any, known: Any) -> bool:
    one = lambda n: isinstance(n, int) and not isinstance(n, bool) and n > 0  # noqa: E731
    if isinstance(known, list):
        return isinstance(value, list) and len(value) == len(known) and all(map(one, value))
    return one(value)


def _resize(module: nn.Module, changes: Mapping[str, Any]) -> None:
    kind = _kind(module)
    if kind is None:
        for name, shape in changes.items():
            setattr(module, name, nn.Parameter(torch.ones(shape)))
        return
    for key, value in changes.items():
        setattr(module, key, tuple(value) if isinstance(value, list) else value)
    for name, shape in _shapes(module, kind).items():
        _renew(module, name, shape)
    module.reset_parameters()


def _shapes(module: nn.Module, kind: type[nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes that a layer's tensors need for its widths."""
    if kind is nn.Conv2d:
        if module.in_channels % module.groups or module.out_channels % module.groups:
            raise ValueError(
                f"widths: {module.in_channels} to {module.out_channels} channels do not fit {module.groups} "
                f"groups"
            )
        weight = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return {"weight": weight, "bias": weight[:1]}
    if kind is nn.Linear:
        return {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    if kind is nn.LayerNorm:
        return {"weight": module.normalized_shape, "bias": module.normalized_shape}
    if kind is nn.GroupNorm:
        if module.num_channels % module.num_groups:
            raise ValueError(f"widths: {module.num_channels} channels do not fit {module.num_groups} groups")
        return {"weight": (module.num_channels,), "bias": (module.num_channels,)}
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (module.num_features,))


def _renew(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Replace the tensor ``name`` of ``module``, where it has one, by zeros of ``shape``."""
    old = getattr(module, name, None)
    if old is None:
        return
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
