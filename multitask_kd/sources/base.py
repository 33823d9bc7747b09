"""What a source of teachers gives: a network that says something of images, and what it knows of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..registry import Registry

SOURCES = Registry("teacher source")


class Source:
    """A way to load a network. A subclass is one file here, registered with ``@SOURCES.register("name")``.

    Its keyword-only parameters are its options in YAML (``teacher.options``); a UserError of it begins with the key at fault
    (``path``, ``options.factory``), without the section. Nothing that it opens may run code from the file, except where its
    docstring says so and ``trust_pickle`` allows it.

    ``classes``: class names by task ("seg", "det"), where the file or the library knows them; the config's come before these.
    ``mean``, ``std``: the input's, where known; None: the config's, or those of ImageNet.
    """

    reads_file: bool = True  # whether ``path`` is needed
    optional_path: bool = False  # whether ``path`` may be given though it is not needed
    tappable: bool = True  # whether the modules inside can be tapped by forward hooks
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


State = dict[str, Any]  # a state dict
