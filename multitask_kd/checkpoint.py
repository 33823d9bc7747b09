"""Files of a run: written atomically, read without running code, resumed exactly.

A checkpoint is plain data: ``format``, ``arch`` (what build.network needs; of a pruned network also its
``widths``), ``params`` (number of parameters), ``model`` (the student's weights alone; the averaged ones
where there is an average), ``labelled_images`` and ``unlabelled_images`` (how many it was trained on),
``metrics``, ``step``, ``config``. last.pt also has ``resume``, a pruned network ``pruned``.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .atomic import replacing
from .errors import UserError

FORMAT = "multitask_kd/1"
NEEDED = ("arch", "params", "model", "metrics", "step", "labelled_images", "unlabelled_images")


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` so that a crash at any moment leaves the old file or the new one, never a part."""
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **content}, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        raise UserError(
            f"{path} cannot be written ({error}); free space there, then go on with --resume"
        ) from None


def load(path: str | Path, where: str) -> dict[str, Any]:
    """Read a checkpoint written by this package, on the CPU. Raises UserError for a file that is absent,
    damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{where}: there is no checkpoint {path}; give the path of a best.pt or last.pt of a run"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise many kinds
        if isinstance(error, pickle.UnpicklingError):  # torch's advice is to run the code in it
            raise UserError(
                f"{where}: {path} is no checkpoint: it holds pickled code, which is never run, or is no "
                f"torch file"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = "torch reads it only by running what is in it" if "weights_only" in reason else reason
        raise UserError(
            f"{where}: {path} cannot be read as a checkpoint ({reason}); it is damaged or something else"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        hint = (
            "; weights of another program are a source of their own, state_dict"
            if where.startswith("teacher")
            else ""
        )
        raise UserError(f"{where}: {path} is not a checkpoint written by tools/train.py{hint}")
    if lacking := [key for key in NEEDED if key not in content]:
        raise UserError(
            f"{where}: {path} has no '{lacking[0]}': it is damaged or of another version; train again"
        )
    return content


def load_weights(net: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load ``state`` strictly: every tensor must be there with its shape and be finite. Raises UserError
    naming the first that is not."""
    own = net.state_dict()
    for name in sorted(set(own) | set(state)):
        if name not in own or name not in state:
            raise UserError(
                f"{where}: the tensor '{name}' is {'not in the network' if name in state else 'missing'}"
            )
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{where}: '{name}' is {list(state[name].shape)}, the network has {list(own[name].shape)}"
            )
        if not state[name].isfinite().all():
            raise UserError(
                f"{where}: '{name}' holds values that are not finite; the network is of no use, train it "
                f"again"
            )
    net.load_state_dict(state)


def digest(net: nn.Module) -> str:
    """A fingerprint of a network's weights and buffers."""
    return digest_of(net.state_dict())


def digest_of(state: dict[str, torch.Tensor]) -> str:
    """A fingerprint of the tensors of a state dict."""
    sha = hashlib.sha256()
    for name, value in state.items():
        sha.update(name.encode())
        sha.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if value.numel()
            else b""
        )
    return sha.hexdigest()


def file_digest(path: str | Path, where: str) -> str:
    """A fingerprint of a file. Raises UserError where it cannot be read."""
    sha = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                sha.update(block)
    except OSError as error:
        raise UserError(f"{where}.path: {path} cannot be read: {error.strerror}") from None
    return sha.hexdigest()


def random_state() -> dict[str, Any]:
    """Every global random state of this process, as plain data."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, inner, gauss_next = state["python"]
    random.setstate((version, tuple(inner), gauss_next))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
