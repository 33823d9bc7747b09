"""Wraps a network of another code base: prepares its input, and reads its return value as predictions of
tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import ModelOutput

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std, RGB in [0,1]


class ExternalModel(nn.Module):
    """images float [B,3,h,w], RGB in [0,1] -> ModelOutput of the tasks in ``outputs``, in the network's own
    classes and pixels.

    outputs: by task, the reader of its prediction (``Task.Output``): ``read(returned, classes, size)``.
    scale: the largest pixel value that the network expects; mean, std: of R, G, B in that range, None where
    the network normalises itself; bgr: whether it expects the colours in that order. classes: number of
    classes, by task. Raises ValueError where the network's return value does not fit ``outputs``.
    """

    def __init__(
        self,
        net: nn.Module,
        outputs: Mapping[str, Any],
        classes: Mapping[str, int],
        *,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        bgr: bool = False,
        scale: float = 1.0,
    ):
        super().__init__()
        self.net, self.outputs, self.classes = net, dict(outputs), dict(classes)
        self.bgr, self.scale = bgr, scale
        self.normalised = mean is not None
        if mean is not None:
            self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def _tap_root(self) -> nn.Module:
        """Taps are named by the network's own paths."""
        return self.net

    def forward(self, images: Tensor) -> ModelOutput:
        size = tuple(images.shape[2:])
        if self.scale != 1:
            images = images * self.scale
        if self.normalised:
            images = (images - self.mean) / self.std
        returned = self.net(images.flip(1) if self.bgr else images)
        if isinstance(returned, ModelOutput):
            returned = returned.preds
        self._check_apart(returned)
        return ModelOutput({task: self._read(task, returned, size) for task in self.outputs})

    def _check_apart(self, returned: Any) -> None:
        """Raise ValueError where two tasks would be read from the same part without the user having said so."""
        named = returned if isinstance(returned, Mapping) else {}
        found: dict[type, str] = {}
        for task, reader in self.outputs.items():
            if reader.at is None and task not in named:
                other = found.setdefault(type(reader), task)
                if other != task:
                    raise ValueError(
                        f"{task}: it would be read from the same part of what the network returns "
                        f"({shown(returned)}) as {other}; set at of both"
                    )

    def _read(self, task: str, returned: Any, size: tuple[int, int]) -> Any:
        if isinstance(returned, Mapping) and task in returned and self.outputs[task].at is None:
            returned = returned[task]
        try:
            return self.outputs[task].read(returned, self.classes[task], size)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from None


def pick(
    returned: Any, at: str | int | None, fits: Callable[[Any], bool], what: str, also: Sequence[str] = ()
) -> Any:
    """The part of a network's return value that ``at`` names, else one under a name in ``also``, else the
    only one that ``fits``.

    what: a word for such a part, for messages. Raises ValueError where there is none, or more than one.
    """
    if at is not None:
        found = returned
        for step in str(at).split("."):
            try:
                found = found[step] if isinstance(found, Mapping) else found[int(step)]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(
                    f"there is no '{at}' in what the network returns: {shown(returned)}"
                ) from None
        return found
    if isinstance(returned, Mapping) and (named := [name for name in also if name in returned]):
        return returned[named[0]]
    if fits(returned):
        return returned
    parts = (
        returned.values()
        if isinstance(returned, Mapping)
        else returned
        if isinstance(returned, (list, tuple))
        else ()
    )
    found = [part for part in parts if fits(part)]
    if len(found) != 1:
        which = "several parts" if found else "no part"
        raise ValueError(f"{which} of what the network returns can be {what}: {shown(returned)}; set at")
    return found[0]


def shown(value: Any) -> str:
    """A short description of a network's return value, for messages."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(part)}" for key, part in list(value.items())[:8]) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(shown(part) for part in list(value)[:8]) + ")"
    return type(value).__name__
