"""Taps: the outputs of a network's modules during a forward pass, by dotted module path."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import UserError, did_you_mean


def bare(model: nn.Module) -> nn.Module:
    """The module inside wrappers (DistributedDataParallel, torch.compile, ExternalModel), which change module
    paths."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "_tap_root", None)
        inner = inner or (model.module if type(model).__name__.endswith("DataParallel") else None)
        if inner is None:
            return model
        model = inner


class Tapped:
    """A context in which the outputs of modules are recorded: ``with Tapped(net, ["neck.p3"]) as taps:
    net(images)``.

    The hooks exist only inside the context, so that a copy of the network made outside has none. Of a module
    that is called several times (a convolution shared by levels) the last output is kept; ``calls`` counts
    the calls. Raises UserError, with the nearest path, for a path that the network does not have; ``where``
    is its key path.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], where: str = "tap"):
        self.paths = tuple(dict.fromkeys(paths))
        model = bare(model)
        known = dict(model.named_modules())
        for path in self.paths:
            if path not in known or not path:
                raise UserError(
                    f"{where}: the network has no module '{path}'; {did_you_mean(path, filter(None, known))}"
                )
        self._modules = {path: known[path] for path in self.paths}
        self._handles: list[Any] = []
        self._versions: dict[str, int] = {}
        self.copied: set[str] = set()  # taps that a later module overwrites: recorded as copies
        self.taps: dict[str, Any] = {}
        self.calls: dict[str, int] = {}

    def __enter__(self) -> dict[str, Any]:
        self.taps = {}
        self.calls = dict.fromkeys(self.paths, 0)
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(partial(self._record, path)))
        return self.taps

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _record(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            output = output.clone() if path in self.copied else output
            self._versions[path] = output._version
        self.taps[path] = output
        self.calls[path] += 1

    def overwritten(self) -> list[str]:
        """Taps of the last pass that a later module (an in-place ReLU) has overwritten; from now on they are
        copied."""
        changed = [
            p for p, t in self.taps.items() if isinstance(t, Tensor) and t._version != self._versions[p]
        ]
        self.copied |= set(changed)
        return changed
