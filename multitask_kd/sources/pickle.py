"""Whole modules, pickled. Loading one runs code, so the user must allow it with ``trust_pickle``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from . import files
from .base import SOURCES, Source, frozen


@SOURCES.register("pickle")
class Pickle(Source):
    """A whole module written by ``torch.save(model)``; its classes must be importable, from the current
    directory or a package.

    **Loading runs whatever code the file holds**, so ``trust_pickle: true`` is needed; without it the file is
    not opened.
    key: the key under which the file holds the module (``ema``, ``model``: YOLOv5 and Ultralytics write such
    dicts); null: the module is the file's content itself, or stored under ``ema`` or ``model``.

    Half-precision weights become float32.
    """

    may_trust = True

    def __init__(self, path: str | None, trust_pickle: bool, *, key: str | None = None):
        super().__init__(path, trust_pickle)
        self.key = key

    def load(self, device: torch.device) -> nn.Module:
        files.expect(self.path, "torch", "legacy", for_what="module pickled by torch.save")
        if not self.trust_pickle:
            raise UserError(
                f"trust_pickle: loading the pickled module {self.path} runs whatever code is in it, so it "
                f"was not opened. If you "
                "trust whoever made it, set trust_pickle: true; else have its state_dict() saved and use the "
                "source state_dict"
            )
        files.importable()
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=False)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"path: {self.path} needs code that cannot be imported ({files.first_line(error)}); "
                "install its package, of the version it was saved with, or run from the folder that holds "
                "the code"
            ) from error
        except Exception as error:  # whatever the pickled code raises
            raise UserError(
                f"path: {self.path} cannot be read ({files.first_line(error)}); it is damaged or of another "
                f"version"
            ) from error
        net = self._module(content)
        if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            net = net.module
        return frozen(net, device)

    def _module(self, content: Any) -> nn.Module:
        if self.key is not None:
            content = files.at_key(content, self.path, self.key)
        elif isinstance(content, Mapping):
            inner = [content.get(name) for name in ("ema", "model")]
            content = next((net for net in inner if isinstance(net, nn.Module)), content)
        if isinstance(content, nn.Module):
            return content
        if isinstance(content, Mapping):
            held = f"a mapping with {', '.join(map(repr, list(content)[:8]))}"
            raise UserError(
                f"path: {self.path} holds {held}, no module; give options.key, or use the source state_dict "
                f"for weights"
            )
        raise UserError(f"path: {self.path} holds a {type(content).__name__}, not a torch.nn.Module")
