"""Encoders of segmentation-models-pytorch and timm (``tu-<timm name>``), by name, and their starting weights."""

from __future__ import annotations

import logging
from pathlib import Path

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from ..errors import UserError, did_you_mean

log = logging.getLogger(__name__)


def check_encoder(name: str, where: str = "model.encoder") -> None:
    """Raise UserError with the nearest known name when no library has the encoder ``name``."""
    own = smp.encoders.get_encoder_names()
    if name in own or (name.startswith("tu-") and timm.is_model(name[3:])):
        return
    known = [*own, *(f"tu-{n}" for n in timm.list_models())]
    raise UserError(f"{where}: unknown encoder '{name}'; {did_you_mean(name, known)}")


def build_encoder(
    name: str, *, max_stride: int, weights: str | None = None, where: str = "model"
) -> nn.Module:
    """An encoder whose ``forward(images)`` returns feature maps of strides 1, 2, 4 ... ``max_stride``.

    weights: None (random), "imagenet" (the library downloads them), or the path of a state dict of this
    encoder or of a checkpoint written by this package (its backbone is used). Its ``out_channels`` lists the
    maps' channels. Raises UserError for an unknown encoder, and for weights that cannot be downloaded or do
    not fit.
    """
    check_encoder(name, f"{where}.encoder")
    depth = max_stride.bit_length() - 1
    try:
        encoder = smp.encoders.get_encoder(
            name, in_channels=3, depth=depth, weights="imagenet" if weights == "imagenet" else None
        )
    except Exception as error:  # timm, huggingface_hub and urllib raise many kinds
        if weights != "imagenet":
            raise UserError(
                f"{where}.encoder: '{name}' cannot give features down to stride {max_stride}: {error}"
            ) from error
        raise UserError(
            f"{where}.weights: the imagenet weights of '{name}' could not be loaded ({type(error).__name__}: "
            f"{error}). "
            "Where this machine has no way to the model hub, save encoder.state_dict() on one that has and "
            "give that "
            f"file's path as {where}.weights, or set it to null to start from random weights"
        ) from error
    if weights not in (None, "imagenet"):
        load_encoder_weights(encoder, Path(weights), f"{where}.weights")
    return encoder


def load_encoder_weights(encoder: nn.Module, path: Path, where: str) -> None:
    """Load a state dict, or the backbone of a checkpoint written by this package. Code in the file is never
    run."""
    if not path.is_file():
        raise UserError(f"{where}: there is no file {path}; use null, imagenet, or the path of a state dict")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{where}: {path} is not a file of plain weights ({type(error).__name__}); save a state_dict()"
        ) from error
    advice = "is it the state dict of another encoder?"
    if isinstance(state, dict) and isinstance(state.get("model"), dict) and "arch" in state:
        if isinstance(state["arch"], dict) and state["arch"].get("widths"):
            advice = f"its network was cut: train on with model.start={path}, and leave {where} out"
        prefix = "backbone."
        state = {k[len(prefix) :]: v for k, v in state["model"].items() if k.startswith(prefix)}
    if not isinstance(state, dict):
        raise UserError(f"{where}: {path} holds a {type(state).__name__}, not a state dict")
    own = encoder.state_dict()
    fits = {k: v for k, v in state.items() if k in own and getattr(v, "shape", None) == own[k].shape}
    missing = [k for k in own if k not in fits and not k.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"{where}: {path} lacks {len(missing)} of {len(own)} tensors of this encoder (first: "
            f"{missing[0]}); {advice}"
        )
    encoder.load_state_dict(fits, strict=False)
    if extra := len(state) - len(fits):
        log.info("%s: %d tensors of %s are not part of the encoder and were left out", where, extra, path)
