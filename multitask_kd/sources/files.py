"""Recognise a file by its first bytes and its members, and read plain weights; nothing here runs code from a
file."""

from __future__ import annotations

import io
import logging
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, did_you_mean
from .base import State

log = logging.getLogger(__name__)

# kind of file -> what it seems to be, and what to do with it
KINDS = {
    "folder": (
        "a folder",
        "give the file inside it; a folder of smp's save_pretrained is read by the source smp",
    ),
    "empty": ("an empty file", "copy it again"),
    "html": (
        "a web page",
        "the download gave a page instead of the file (a login or an error?); download it again",
    ),
    "lfs": ("a pointer of Git LFS", "fetch the file itself with git lfs pull"),
    "torch": ("a file of torch.save", "the source state_dict reads weights, pickle a whole module"),
    "legacy": (
        "a file of torch.save in its old format",
        "the source state_dict reads weights, pickle a whole module",
    ),
    "pickle": (
        "a Python pickle, not written by torch.save",
        "save model.state_dict() with torch.save and use state_dict",
    ),
    "torchscript": ("a TorchScript archive", "use the source torchscript"),
    "export": ("a program of torch.export", "use the source export"),
    "package": (
        "a compiled or packaged model (AOTInductor, torch.package)",
        "save it with torch.export.save or torch.save",
    ),
    "onnx": ("an ONNX model", "use the source onnx"),
    "safetensors": ("a safetensors file", "use the source state_dict"),
    "keras": ("an HDF5 or Keras file", "export the model to ONNX and use the source onnx"),
    "tflite": ("a TensorFlow Lite model", "export the model to ONNX and use the source onnx"),
    "numpy": ("NumPy arrays", "save model.state_dict() with torch.save and use the source state_dict"),
    "broken zip": ("a damaged or truncated zip archive", "copy it again"),
    "zip": ("a zip archive without a model in it", "unpack it and give the file inside"),
    "archive": ("a compressed archive (gzip, tar, 7z)", "unpack it and give the file inside"),
    "text": ("a text", "give the file with the network"),
    "unknown": ("of a format unknown here", "give a file that the source reads"),
}

_STARTS = {
    b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"\x93NUMPY": "numpy", b"\x89HDF": "keras", b"\x1f\x8b": "archive",
    b"7z\xbc\xaf": "archive", b"version https://git-lfs": "lfs",
}  # fmt: skip
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save's magic number as a pickled integer


def kind_of(path: str | Path) -> str:
    """A key of KINDS. Raises UserError for a path that cannot be read."""
    path = Path(path)
    if path.is_dir():
        return "folder"
    if path.exists() and not path.is_file():
        raise UserError(
            f"path: {path} is no file but a device or a pipe; give the path of the teacher's file"
        )
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(
            f"path: {path} cannot be read ({error.strerror or error}); give the path of the teacher's file"
        ) from None
    for magic, kind in _STARTS.items():
        if start.startswith(magic):
            return _kind_of_zip(path) if kind == "zip" else kind
    if not start:
        return "empty"
    if start[:1] == b"\x80" and len(start) > 1 and start[1] <= 5:
        return "legacy" if _LEGACY in start[:32] else "pickle"
    if start[4:8] == b"TFL3":
        return "tflite"
    if start[257:262] == b"ustar":
        return "archive"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    if (
        start[0] == 0x08
        and len(start) > 2
        and start[1] < 0x20
        and start[2] in (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42, 0x72)
    ):
        return "onnx"  # protobuf: the version of the format, then another field of the model
    if re.match(rb"\s*(<!doctype|<html|<\?xml|<head|<!--)", start, re.IGNORECASE):
        return "html"
    return "text" if re.fullmatch(rb"[\x09\x0a\x0d\x20-\x7e\x80-\xff]+", start) else "unknown"


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            first = min((entry.header_offset for entry in archive.infolist()), default=0)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "broken zip"
    if first:  # the end that was found is that of an archive inside
        return "broken zip"
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return "torchscript"
    if any(name.startswith("data/aotinductor/") for name in inner) or ".data/extern_modules" in inner:
        return "package"
    if "serialized_exported_program.json" in names or any(
        re.fullmatch(r"models/.*\.json", name) for name in inner
    ):
        return "export"
    if "data.pkl" in inner:
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "numpy"
    return "keras" if "model.weights.h5" in names else "zip"


def expect(path: str | Path, *kinds: str, for_what: str) -> str:
    """The kind of the file, one of ``kinds``. Raises UserError with what the file seems to be and what to
    do."""
    found = kind_of(path)
    if found not in kinds:
        seems, advice = KINDS[found]
        raise UserError(f"path: {path} is no {for_what}: it seems to be {seems}; {advice}")
    return found


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message, cut to 300 characters."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def plain(path: str) -> Any:
    """Read a file of torch.save or safetensors on the CPU as plain data: code in it is refused, never run.

    Raises UserError.
    """
    kind = expect(path, "torch", "legacy", "safetensors", for_what="file of weights")
    if kind == "torch":
        with zipfile.ZipFile(path) as archive:
            _check_unpacked(path, archive)
    try:
        if kind == "safetensors":
            from safetensors.torch import load_file  # comes with segmentation-models-pytorch

            return load_file(path)
        with open(path, "rb") as file:  # given a path, torch would look at the file's name
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own advice is to run the code
        raise UserError(
            f"path: {path} holds more than plain weights: pickled objects, which would run code and were not "
            f"opened. Where the "
            "model was made, save model.state_dict() with torch.save; or, if you trust whoever made the "
            "file, use the source "
            "pickle with trust_pickle: true"
        ) from None
    except Exception as error:  # torch, zipfile, safetensors and pickle raise many kinds
        raise UserError(
            f"path: {path} cannot be read ({first_line(error)}); it is damaged or truncated: copy it again"
        ) from None


# Keys under which training programs store state dicts; the first one that is there is used.
USUAL = (
    "state_dict", "model_state_dict", "model", "ema", "model_ema", "state_dict_ema", "ema_state_dict", "net", "network",
    "module", "weights", "params_ema", "params",
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "model.")  # which DataParallel, torch.compile and others add


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())
    )


def find_state(content: Any, path: str, key: str | None = None) -> State:
    """The state dict in the content of a file, at ``key`` (``a.b``: key b inside a) or at one of the usual
    keys.

    Raises UserError.
    """
    if key is not None:
        found = at_key(content, path, key)
        if not _is_state(found):
            raise UserError(f"options.key: {path} holds at '{key}' {_described(found)}, not a state dict")
        return dict(found)
    if _is_state(content):
        return dict(content)
    for name in USUAL if isinstance(content, Mapping) else ():
        inner = content.get(name)
        if isinstance(inner, Mapping) and not _is_state(inner):
            inner = inner.get("state_dict")
        if _is_state(inner):
            log.info("%s: the weights under '%s' are used", path, name)
            return dict(inner)
    raise UserError(
        f"path: no state dict was found in {path}, which holds {_described(content)}; give options.key"
    )


def at_key(content: Any, path: str, key: str) -> Any:
    """``content[key]``; where that is not there, ``content[a][b]`` for a key ``a.b``. Raises UserError with
    the nearest key."""
    if isinstance(content, Mapping) and key in content:
        return content[key]
    for part in str(key).split("."):
        if not isinstance(content, Mapping) or part not in content:
            hint = (
                did_you_mean(part, content)
                if isinstance(content, Mapping)
                else f"it holds {_described(content)}"
            )
            raise UserError(f"options.key: {path} has no '{key}'; {hint}")
        content = content[part]
    return content


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        return "a mapping with " + (
            ", ".join(map(repr, list(content)[:8])) + (" ..." if len(content) > 8 else "") or "nothing in it"
        )
    return f"a {type(content).__name__}"


def load_state(net: nn.Module, state: State, path: str) -> None:
    """Load ``state`` strictly: every tensor must be there with its shape and be finite; only BatchNorm's
    counters may be missing. ``PREFIXES`` are removed from the names where these then fit.

    Raises UserError that names the first tensor at fault, with the nearest name.
    """
    own = net.state_dict()
    state = _without_prefixes(state, own)
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    counts = f"({len(missing)} of the network's {len(own)} are missing, {len(unexpected)} are not in it)"
    if missing:
        near = did_you_mean(missing[0], unexpected) if unexpected else "the file has no others"
        raise UserError(f"path: {path} lacks the tensor '{missing[0]}' {counts}; in the file: {near}")
    if unexpected:
        raise UserError(
            f"path: {path} has the tensor '{unexpected[0]}', which is not in the network {counts}; "
            f"in the network: {did_you_mean(unexpected[0], own)}"
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            near = [n for n in own if own[n].shape == value.shape and n != name]
            also = f"; that is the shape of '{near[0]}'" if near else ""
            raise UserError(
                f"path: '{name}' is {list(value.shape)} in {path}, the network has "
                f"{list(own[name].shape)}{also}; "
                "are the arguments of the network those it was trained with?"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"path: '{name}' in {path} holds values that are not finite; the network is of no use"
            )
    net.load_state_dict(state, strict=False)  # missing tensors are checked above


def _without_prefixes(state: State, own: State) -> State:
    best = state
    while True:
        prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in state)), None)
        if prefix is None:
            return best
        state = {k.removeprefix(prefix): v for k, v in state.items()}
        if sum(k in own for k in state) > sum(k in own for k in best):
            best = state


def _check_unpacked(path: str | Path, archive: zipfile.ZipFile) -> None:
    """Raise UserError where an archive would take far more memory than disk; torch writes them uncompressed."""
    size, unpacked = Path(path).stat().st_size, sum(entry.file_size for entry in archive.infolist())
    if unpacked > 4 * size + 2**20:
        raise UserError(
            f"path: {path} has {size / 2**20:.1f} MB, but would be {unpacked / 2**20:.0f} MB unpacked, which "
            f"no exporter writes; "
            "it was tampered with"
        )


def repack(path: str) -> dict[str, bytes]:
    """The members of a zip, without the folder at the top. Raises UserError where it is damaged or has a name
    twice."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_unpacked(path, archive)
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
            tops = {name.partition("/")[0] for name in names}
            skip = len(f"{tops.pop()}/") if len(tops) == 1 else 0
            if len(set(names)) != len(names):
                raise UserError(
                    f"path: {path} has members of the same name, which no exporter writes; it was tampered "
                    f"with"
                )
            return {name[skip:]: archive.read(name) for name in names}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"path: {path} is damaged ({first_line(error)}); copy it again") from None


def zipped(members: Mapping[str, bytes], top: str = "model/") -> io.BytesIO:
    """The members as torch writes an archive: uncompressed, in one folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(top + name, content)
    buffer.seek(0)
    return buffer


def importable() -> None:
    """Make modules in the current directory importable, as under ``python -m``."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
