"""The interface of a teacher source: it loads a network, with the class names and input statistics that it
knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..registry import Registry

SOURCES = Registry("teacher source")

State = dict[str, Any]  # a state dict


class Source:
    """A way to load a network. A subclass is one file here, registered with ``@SOURCES.register("name")``.

    Its keyword-only parameters are its options in YAML (``teacher.options``); a UserError that it raises
    begins with the key at fault (``path``, ``options.factory``), without the section. It must not run code
    from the file that it opens, except where its docstring documents that and ``trust_pickle`` allows it.

    ``classes``: class names by kind of task ("semantic", "detection"), where the file or the library has
    them; names in the config take precedence. ``mean``, ``std``: statistics of the input, where known; None:
    those of the config, else of ImageNet. All three are final after ``load``.
    """

    reads_file: bool = True  # whether ``path`` is needed
    optional_path: bool = False  # whether ``path`` may be given although it is not needed
    tappable: bool = True  # whether the modules inside can be tapped by forward hooks
    may_trust: bool = False  # whether ``trust_pickle`` changes anything
    normalises: bool = False  # whether the network normalises RGB in [0,1] itself, so that mean and std are not applied for it

    def __init__(self, path: str | None, trust_pickle: bool):
        """path: the file, which exists. trust_pickle: whether code in a pickle may run."""
        self.path, self.trust_pickle = path, trust_pickle
        self.classes: Mapping[str, Sequence[str]] = {}
        self.mean: Sequence[float] | None = None
        self.std: Sequence[float] | None = None

    def load(self, device: torch.device) -> nn.Module:
        """The network in eval mode on ``device``. It is called with float images [B,3,h,w];
        ``teacher.outputs`` defines how its return value is read.

        Raises UserError for a file that is not of the expected format.
        """
        raise NotImplementedError


def frozen(net: nn.Module, device: torch.device) -> nn.Module:
    """``net`` in eval, in fp32, on ``device``, without gradients."""
    net = net.eval().float().to(device)
    for parameter in net.parameters():  # TorchScript has no requires_grad_ for all at once
        parameter.requires_grad_(False)
    return net


def in_batches(run: Callable[[Tensor], Any], images: Tensor, low: int, high: int) -> Any:
    """``run(images)`` for a ``run`` that takes only ``low`` to ``high`` images at once.

    The images are passed in slices; a slice that is too small is padded, and the outputs of the padding are
    dropped. ``run`` returns a tensor, or a dict, list or tuple of tensors. A tensor whose first dimension is
    not the slice's number of images must be equal for every slice (anchor points, strides). Raises UserError
    for one that is not.
    """
    if low <= len(images) <= high:
        return run(images)
    parts = []
    for part in images.split(high):
        lacking = max(0, low - len(part))
        full = torch.cat([part, part[-1:].expand(lacking, -1, -1, -1)]) if lacking else part
        parts.append((run(full), len(part), len(full)))
    return _joined(*zip(*parts, strict=True))


def _joined(outputs: Sequence[Any], kept: Sequence[int], ran: Sequence[int]) -> Any:
    first = outputs[0]
    if isinstance(first, Mapping):
        return {key: _joined([out[key] for out in outputs], kept, ran) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_joined(inner, kept, ran) for inner in zip(*outputs, strict=True))
    if not isinstance(first, Tensor):
        return first
    if all(out.ndim and len(out) == n for out, n in zip(outputs, ran, strict=True)):
        return torch.cat([out[:n] for out, n in zip(outputs, kept, strict=True)])
    if all(out.shape == first.shape and torch.equal(out, first) for out in outputs[1:]):
        return first
    raise UserError(
        f"path: the network takes at most {max(ran)} images at once, and an output of shape "
        f"{list(first.shape)} has no "
        "dimension for them, so that the outputs of more images cannot be joined; export it with a batch of "
        "free size"
    )
