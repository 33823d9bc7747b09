"""What an exported file says of itself: JSON in ONNX's metadata_props, or among the extra files of a .pt2."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..batch import ModelOutput, PaddedDetections
from ..errors import UserError
from ..tasks.base import TASKS, Task

FORMAT = "multitask_kd.export/1"
KEY = "multitask_kd"  # in metadata_props; the extra file is multitask_kd.json
INPUT = "images"
NEEDED = ("arch", "params", "strides", "input", "outputs", "precision", "decode")

RAW = {
    "seg": "logits [batch, classes, height/stride, width/stride]",
    "det": "raw outputs [batch, cells, 4+1+classes] of the cells of all strides, finest first, row by row: dx, dy of the centre "
    "(in strides, from the cell's centre), log w, log h (in strides, at most 6), objectness logit, class logits",
}
DECODED = {
    "seg": {"mask": "uint8 [batch, height, width], class of every pixel of the input"},
    "det": {
        "boxes": "float32 [batch, detections, 4], x1 y1 x2 y2 in pixels of the input, best first, 0 where there is none",
        "scores": "float32 [batch, detections] in [0, 1], 0 where there is none",
        "classes": "int64 [batch, detections], -1 where there is none",
    },
}


def describe(
    arch: Mapping[str, Any],
    params: int,
    strides: Mapping[str, tuple[int, ...]],
    *,
    precision: str,
    uint8: bool,
    decode: Mapping[str, Mapping[str, Any]] | None,
    dynamic: bool = False,
) -> dict[str, Any]:
    """The description of a file, as plain data.

    arch, params: as in a checkpoint; strides: of every task's head; precision: fp32, fp16 or int8; uint8: whether the input is
    bytes; decode: by task, the options of what is decoded in the file; None where nothing is; dynamic:
    whether height and width are free multiples of the coarsest stride.
    """
    names = output_names(arch["tasks"], decode)
    known = RAW | {name: text for outputs in DECODED.values() for name, text in outputs.items()}
    return {
        "format": FORMAT,
        "version": __version__,
        "precision": precision,
        "input": {
            "name": INPUT,
            "type": "uint8" if uint8 else "float32",
            "shape": ["batch", 3, *(("height", "width") if dynamic else arch["input_size"])],
            "multiple_of": max(arch["strides"]),
            "colour": "RGB",
            "range": [0, 255 if uint8 else 1],
            "fit": "scaled to fit, at the top left, padded with grey 114 of 255 at the right and bottom",
        },
        "outputs": {name: known.get(name, "raw") for name in names},
        "decode": None if decode is None else {task: dict(options) for task, options in decode.items()},
        "strides": {task: list(found) for task, found in strides.items()},
        "params": params,
        "arch": dict(arch),
    }


def output_names(tasks: Mapping[str, Any], decode: Mapping[str, Any] | None) -> list[str]:
    """Raw outputs by task, then those that are decoded, in the file's order."""
    return [*tasks, *(name for task in decode or () for name in DECODED[task])]


def read(text: str | bytes | None, path: str, where: str) -> dict[str, Any]:
    """The description in a file. Raises UserError for a file of others, or one that is damaged or of another version."""
    if text is None:
        raise UserError(
            f"{where}: {path} was not written by tools/export.py: it does not say what its outputs are; export a checkpoint of "
            "ours with it, or use the file as a teacher (teacher.source)"
        )
    try:
        found = json.loads(text)
        if found.get("format") == FORMAT and not [key for key in NEEDED if key not in found]:
            _check(found, f"{where}: {path}")
            return found
        version = found.get("format")
    except (ValueError, AttributeError):
        version = "nothing that can be read"
    raise UserError(f"{where}: what {path} says of itself is not '{FORMAT}' but '{version}'; export it again")


def _check(found: Mapping[str, Any], who: str) -> None:
    """Raise UserError for a description of ours that was altered: its parts are read without a look at their kinds from here on."""

    def whole(values: Any) -> bool:
        return isinstance(values, list) and bool(values) and all(type(v) is int and 0 < v < 2**16 for v in values)

    def names(values: Any) -> bool:
        return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)

    def mapping(value: Any) -> dict[str, Any]:
        return value if isinstance(value, dict) else {}

    arch, decode = mapping(found["arch"]), found["decode"]
    parts, strides = mapping(arch.get("tasks")), mapping(found["strides"])
    sound = {
        "arch.tasks": parts and all(names(mapping(part).get("classes")) for part in parts.values()),
        "arch.input_size": whole(arch.get("input_size")) and len(arch["input_size"]) == 2,
        "strides": all(whole(strides.get(task)) for task in parts),
        "params": type(found["params"]) is int,
        "precision": isinstance(found["precision"], str),
        "decode": decode is None or (isinstance(decode, dict) and set(decode) <= set(DECODED) & set(parts)),
    }
    sound["outputs"] = all(sound.values()) and list(mapping(found["outputs"])) == output_names(parts, decode)
    if fault := next((part for part, is_sound in sound.items() if not is_sound), None):
        raise UserError(f"{who}: what it says of itself is damaged ({fault}); export it again")


def check_outputs(outputs: Mapping[str, Tensor], description: Mapping[str, Any], size: Sequence[int], path: str) -> None:
    """Raise UserError where a file gives, for images of ``size`` (H, W), other classes or cells than it says."""
    for task, part in description["arch"]["tasks"].items():
        count, strides = len(part["classes"]), description["strides"][task]
        cells = [math.prod(-(-n // stride) for n in size) for stride in strides]
        expected = {"seg": {1: count}, "det": {1: sum(cells), 2: 5 + count}}.get(task, {})
        given = outputs.get(task)
        if given is None or any(given.dim() <= axis or given.shape[axis] != n for axis, n in expected.items()):
            shape = "is not there" if given is None else f"is {list(given.shape)}"
            raise UserError(f"{path}: its output '{task}' {shape}, which is not what it says of itself; export it again")


def tasks(description: Mapping[str, Any]) -> dict[str, Task]:
    """The tasks of an exported network, which decode and score its outputs."""
    return {
        name: TASKS.build(name, {}, "arch", part["classes"], description["strides"][name])
        for name, part in description["arch"]["tasks"].items()
    }


def view(outputs: Mapping[str, Tensor], description: Mapping[str, Any]) -> ModelOutput:
    """What a file gave, as a network's predictions. Where it decodes, its decoded outputs: the mask as logits of 0 and 1."""
    preds: dict[str, Any] = {task: outputs[task].float() for task in description["arch"]["tasks"]}
    decoded = description["decode"] or {}
    if "det" in decoded:
        preds["det"] = PaddedDetections(outputs["boxes"].float(), outputs["scores"].float(), outputs["classes"].long())
    if "seg" in decoded:
        count = len(description["arch"]["tasks"]["seg"]["classes"])
        preds["seg"] = F.one_hot(outputs["mask"].long(), count).movedim(-1, 1).float()
    return ModelOutput(preds)


def dumps(description: Mapping[str, Any]) -> str:
    return json.dumps(description, separators=(",", ":"))
