"""What a source of teachers gives: a network that says something of images, and what it knows of itself."""

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

    Its keyword-only parameters are its options in YAML (``teacher.options``); a UserError of it begins with the key at fault
    (``path``, ``options.factory``), without the section. Nothing that it opens may run code from the file, except where its
    docstring says so and ``trust_pickle`` allows it.

    ``classes``: class names by task ("seg", "det"), where the file or the library knows them; the config's come before these.
    ``mean``, ``std``: the input's, where known; None: the config's, or those of ImageNet.
    All three are known after ``load``.
    """

    reads_file: bool = True  # whether ``path`` is needed
    optional_path: bool = False  # whether ``path`` may be given though it is not needed
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
        """The network in eval on ``device``. Called with float images [B,3,h,w]; what it returns is read by ``teacher.outputs``.

        Raises UserError for a file that is not what it claims.
        """
        raise NotImplementedError


def frozen(net: nn.Module, device: torch.device) -> nn.Module:
    """``net`` in eval, in fp32, on ``device``, without gradients."""
    net = net.eval().float().to(device)
    for parameter in net.parameters():  # TorchScript has no requires_grad_ for all at once
        parameter.requires_grad_(False)
    return net


def in_batches(run: Callable[[Tensor], Any], images: Tensor, low: int, high: int) -> Any:
    """``run(images)`` for a ``run`` that takes only ``low`` to ``high`` images: in slices, the last one filled up and cut.

    What ``run`` returns is a tensor, or a dict, list or tuple of such. A tensor whose first side is not the slice's number of
    images must be the same for every slice (anchor points, strides). Raises UserError for one that is not.
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
        f"path: the network takes at most {max(ran)} images at once, and an output of shape {list(first.shape)} has no side for "
        "them, so that those of more images cannot be put together; export it with a batch of free size"
    )
