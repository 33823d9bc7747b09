"""Weights alone, for a network that the user's own code builds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UserError, did_you_mean
from . import files
from .base import SOURCES, Source, frozen


@SOURCES.register("state_dict")
class StateDict(Source):
    """A file of weights (torch.save of a state dict, or safetensors), and the function that builds the
    network for them.

    factory: ``package.module:function``, imported and called; the current directory can be imported from, as
    under ``python -m``. The factory's code runs; no code in the file does.
    arguments: keyword arguments of the factory.
    key: the key under which the file holds the state dict (``ema``, ``trainer.model``); null: searched among
    the usual keys.

    The prefixes ``module.``, ``_orig_mod.`` and ``model.`` are removed from the names where that makes them
    fit. Every tensor must then be there, with its shape.
    """

    def __init__(
        self,
        path: str | None,
        trust_pickle: bool,
        *,
        factory: str,
        arguments: Mapping[str, Any] | None = None,
        key: str | None = None,
    ):
        super().__init__(path, trust_pickle)
        if not isinstance(factory, str) or factory.count(":") != 1 or not all(factory.split(":")):
            raise UserError(f"options.factory: needs 'package.module:function', not {factory!r}")
        if not isinstance(arguments or {}, Mapping):
            raise UserError(
                f"options.arguments: needs a mapping of the factory's keyword arguments, not {arguments!r}"
            )
        self.factory, self.arguments, self.key = factory, dict(arguments or {}), key

    def load(self, device: torch.device) -> nn.Module:
        state = files.find_state(files.plain(self.path), self.path, self.key)
        net = self._built()
        files.load_state(net, state, self.path)
        return frozen(net, device)

    def _built(self) -> nn.Module:
        module_name, _, name = self.factory.partition(":")
        files.importable()
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the user's module does
            raise UserError(
                f"options.factory: '{module_name}' cannot be imported ({files.first_line(error)}); "
                "run from the folder that holds it, or install its package"
            ) from error
        function: Any = module
        for part in name.split("."):
            if not hasattr(function, part):
                raise UserError(
                    f"options.factory: '{module_name}' has no '{name}'; {did_you_mean(part, dir(function))}"
                )
            function = getattr(function, part)
        try:
            net = function(**self.arguments)
        except Exception as error:
            raise UserError(
                f"options.factory: {self.factory} failed with options.arguments ({files.first_line(error)})"
            ) from error
        if not isinstance(net, nn.Module):
            raise UserError(
                f"options.factory: {self.factory} returns a {type(net).__name__}, not a torch.nn.Module"
            )
        return net
