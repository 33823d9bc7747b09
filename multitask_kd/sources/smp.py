"""Networks of segmentation-models-pytorch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from ..errors import UserError, did_you_mean
from ..models.backbones import check_encoder
from . import files
from .base import SOURCES, Source, State, frozen

_NAMES = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer DPT"
ARCHS = {
    name.lower(): getattr(smp, name) for name in _NAMES.split() if hasattr(smp, name)
}  # older smp lacks the last ones
_HALF = {"inceptionv4", "inceptionresnetv2", "xception"}  # trained on (x - .5) / .5


@SOURCES.register("smp")
class Smp(Source):
    """A network of segmentation-models-pytorch: a state dict of it, or the folder that its
    ``save_pretrained`` writes.

    Nothing in the file runs, and nothing is downloaded.

    arch: Unet, FPN, DeepLabV3Plus ... as for ``smp.create_model``; not needed for a folder, which names it.
    encoder: as for ``smp.create_model`` (``resnet34``, ``tu-<timm name>``); not needed for a folder.
    classes: number of classes; null: read from the file.
    arguments: further arguments of ``smp.create_model`` with which the network was built.
    key: the key under which the file holds the state dict; null: searched among the usual keys.

    It returns the logits [B,classes,h,w]; where the network has a class head, a pair of these and that head's
    logits.
    """

    def __init__(
        self,
        path: str | None,
        trust_pickle: bool,
        *,
        arch: str | None = None,
        encoder: str | None = None,
        classes: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        key: str | None = None,
    ):
        super().__init__(path, trust_pickle)
        if arch is not None and str(arch).lower() not in ARCHS:
            raise UserError(
                f"options.arch: unknown architecture '{arch}'; "
                f"{did_you_mean(arch, [c.__name__ for c in ARCHS.values()])}"
            )
        if encoder is not None:
            check_encoder(encoder, "options.encoder")
        if not isinstance(arguments or {}, Mapping):
            raise UserError(
                f"options.arguments: needs a mapping of smp.create_model's arguments, not {arguments!r}"
            )
        self.arch, self.encoder, self.count, self.key = arch, encoder, classes, key
        self.arguments = dict(arguments or {})
        for name in ("in_channels", "encoder_weights"):
            if name in self.arguments:
                raise UserError(
                    f"options.arguments: {name} is not to be given; images have 3 channels, and the file has "
                    f"the weights"
                )

    def load(self, device: torch.device) -> nn.Module:
        arguments = dict(self.arguments)
        if Path(self.path).is_dir():
            arch, encoder, saved = self._config(Path(self.path))
            arguments, weights = saved | arguments, Path(self.path) / "model.safetensors"
        else:
            if lacking := [name for name in ("arch", "encoder") if getattr(self, name) is None]:
                raise UserError(
                    f"options.{lacking[0]}: a state dict does not say it; give what the network was made with"
                )
            arch, encoder, weights = self.arch, self.encoder, Path(self.path)
        state = files.find_state(files.plain(str(weights)), str(weights), self.key)
        arguments["classes"] = self.count or arguments.get("classes") or _classes_in(state)
        try:
            net = ARCHS[arch.lower()](encoder_name=encoder, encoder_weights=None, in_channels=3, **arguments)
        except Exception as error:  # smp and timm raise many kinds
            raise UserError(
                f"options: smp cannot build {arch} with {encoder} and {arguments} ({files.first_line(error)})"
            ) from error
        files.load_state(net, state, str(weights))
        self.mean, self.std = _statistics(encoder)
        return frozen(net, device)

    def _config(self, folder: Path) -> tuple[str, str, dict[str, Any]]:
        """Architecture, encoder and arguments of a folder. Names in its config are checked: a library could
        download one."""
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise UserError(
                    f"path: {folder} has no {name}; give a folder written by save_pretrained of smp, or a "
                    f"state dict's file"
                )
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            arch, encoder = config.pop("_model_class"), config.pop("encoder_name")
            known = inspect.signature(ARCHS[arch.lower()].__init__).parameters
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"path: {folder}/config.json is no config of an smp network ({files.first_line(error)})"
            ) from None
        check_encoder(str(encoder), f"path: {folder}/config.json: encoder_name")
        if config.get("in_channels", 3) != 3:
            raise UserError(
                f"path: {folder}: the network takes {config['in_channels']} channels; images have 3"
            )
        config = {k: v for k, v in config.items() if k not in ("encoder_weights", "in_channels")}
        if unknown := [k for k in config if k not in known or k in ("self", "kwargs")]:
            raise UserError(
                f"path: {folder}/config.json: '{unknown[0]}' is no argument of smp's {arch} here; "
                f"{did_you_mean(unknown[0], known)}"
            )
        for mine, theirs, name in ((self.arch, arch, "arch"), (self.encoder, encoder, "encoder")):
            if mine is not None and mine.lower() != theirs.lower():
                raise UserError(
                    f"options.{name}: '{mine}', but {folder} holds '{theirs}'; leave the option out"
                )
        return arch, encoder, config


def _classes_in(state: State) -> int:
    found = [
        v for k, v in state.items() if "segmentation_head." in k and k.endswith(".weight") and v.ndim == 4
    ]
    if not found:
        raise UserError("options.classes: the file does not show the number of classes; give it")
    return len(found[-1])


def _statistics(encoder: str) -> tuple[Any, Any]:
    """Mean and standard deviation that the encoder's weights were trained with, where known without a
    download."""
    if encoder in _HALF:
        return (0.5,) * 3, (0.5,) * 3
    cfg = timm.get_pretrained_cfg(encoder[3:], allow_unregistered=True) if encoder.startswith("tu-") else None
    return (tuple(cfg.mean), tuple(cfg.std)) if cfg is not None else (None, None)
