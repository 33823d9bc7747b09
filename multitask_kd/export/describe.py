"""The description in an exported file: JSON in ONNX's metadata_props, or among the extra files of a .pt2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import __version__
from ..batch import ModelOutput
from ..errors import UserError
from ..tasks.base import Task, build_task

FORMAT = "multitask_kd.export/1"
KEY = "multitask_kd"  # in metadata_props; the extra file is multitask_kd.json
INPUT = "images"
NEEDED = ("arch", "params", "strides", "input", "outputs", "precision", "decode")
AGAIN = "export it again"  # the remedy for a file that cannot be read


def describe(
    arch: Mapping[str, Any],
    params: int,
    tasks: Mapping[str, Task],
    *,
    precision: str,
    uint8: bool,
    decode: Mapping[str, Mapping[str, Any]] | None,
    dynamic: bool = False,
) -> dict[str, Any]:
    """The description of a file, as plain data.

    Args:
        arch, params: as in a checkpoint.
        tasks: of the network, in the order of its outputs.
        precision: fp32, fp16 or int8.
        uint8: whether the input is bytes.
        decode: by task, the options of what is decoded in the file; None where nothing is.
        dynamic: whether height and width are free multiples of the coarsest stride.
    """
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
        "outputs": outputs(tasks, decode),
        "decode": None if decode is None else {name: dict(options) for name, options in decode.items()},
        "strides": {name: list(task.strides) for name, task in tasks.items()},
        "params": params,
        "arch": dict(arch),
    }


def outputs(tasks: Mapping[str, Task], decode: Mapping[str, Any] | None) -> dict[str, str]:
    """By name, what each output of a file is, in the file's order: raw ones, which are called as their task,
    then those that are decoded. Raises UserError where two have one name."""
    found = [(name, task.raw_output) for name, task in tasks.items()]
    for name in decode or ():
        names = tasks[name].output_names()
        found += [(names[own], text) for own, text in tasks[name].decoded_outputs.items()]
    taken = [INPUT, *(name for name, _ in found)]
    if twice := next((name for name in taken if taken.count(name) > 1), None):
        remedy = ("leave --decode out, or " if decode else "") + "train it under another name"
        raise UserError(
            f"tasks.{twice}: with it two inputs or outputs of a file would be called '{twice}'; {remedy}"
        )
    return dict(found)


def read(text: str | bytes | None, path: str, where: str) -> dict[str, Any]:
    """The description in a file; ``where`` names the option that gave the file.

    Raises:
        UserError: the file has none, or one that is damaged or of another version.
    """
    if text is None:
        raise UserError(
            f"{where}: {path} was not written by tools/export.py: it has no description of its outputs; "
            "export a checkpoint with it, or use the file as a teacher (teacher.source)"
        )
    try:
        found = json.loads(text)
        if found.get("format") == FORMAT and not [key for key in NEEDED if key not in found]:
            _check(found, f"{where}: {path}")
            return found
        version = found.get("format")
    except (ValueError, AttributeError):
        version = "nothing that can be read"
    raise UserError(f"{where}: the description in {path} is not '{FORMAT}' but '{version}'; {AGAIN}")


def _check(found: Mapping[str, Any], who: str) -> None:
    """Raise UserError for a description that was altered; from here on nobody looks at the types of its
    parts."""
    arch, decode = _mapping(found["arch"]), found["decode"]
    parts, strides = _mapping(arch.get("tasks")), _mapping(found["strides"])
    sound = {
        "arch.tasks": parts and all(_is_part(_mapping(part)) for part in parts.values()),
        "arch.input_size": _are_sides(arch.get("input_size"), 2),
        "strides": all(_are_sides(strides.get(name)) for name in parts),
        "params": type(found["params"]) is int,
        "precision": isinstance(found["precision"], str),
        "decode": decode is None or (isinstance(decode, dict) and set(decode) <= set(parts)),
    }
    if all(sound.values()):
        try:
            known = tasks(found)
            sound["arch.tasks"] = all(task.classes or not task.has_classes for task in known.values())
            sound["decode"] = all(known[name].decoded_outputs for name in decode or ())
            sound["outputs"] = list(_mapping(found["outputs"])) == list(outputs(known, decode))
        except UserError as error:  # a kind of task that is not known here
            raise UserError(f"{who}: {error}") from None
    if fault := next((part for part, is_sound in sound.items() if not is_sound), None):
        raise UserError(f"{who}: its description is damaged ({fault}); {AGAIN}")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_part(part: Mapping[str, Any]) -> bool:
    """Whether it is a task of an arch: its classes, and its kind where that is not the name's default."""
    classes, kind = part.get("classes"), part.get("kind")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return named and isinstance(kind, str | None)


def _are_sides(values: Any, count: int | None = None) -> bool:
    """Whether they are lengths in pixels, ``count`` of them where that is known."""
    is_list = isinstance(values, list) and count in (None, len(values))
    return is_list and all(type(v) is int and 0 < v < 2**16 for v in values)


def check_outputs(
    found: Mapping[str, Tensor], description: Mapping[str, Any], size: Sequence[int], path: str
) -> None:
    """Raise UserError where a file's outputs for images of ``size`` (H, W) have not the described shapes."""
    known = tasks(description)
    for name in description["outputs"]:
        output = found.get(name)
        lengths = known[name].expected_shape(tuple(size)).items() if name in known else ()
        if output is None or any(output.dim() <= axis or output.shape[axis] != n for axis, n in lengths):
            shape = "is not there" if output is None else f"is {list(output.shape)}"
            raise UserError(
                f"{path}: its output '{name}' {shape}, which is not what it is described as; {AGAIN}"
            )


def tasks(description: Mapping[str, Any]) -> dict[str, Task]:
    """The tasks of an exported network, which decode and score its outputs. Raises UserError for an unknown
    kind."""
    strides = description["strides"]
    return {
        name: build_task(name, part.get("kind"), part["classes"], strides[name], key_path="arch.tasks")
        for name, part in description["arch"]["tasks"].items()
    }


def predictions(found: Mapping[str, Tensor], description: Mapping[str, Any]) -> ModelOutput:
    """The outputs of a file, by name, as a network's predictions; of what it has decoded,
    ``Task.from_decoded``."""
    preds: dict[str, Any] = {}
    for name, task in tasks(description).items():
        if name in (description["decode"] or {}):
            preds[name] = task.from_decoded(decoded_by(task, found))
        else:
            preds[name] = found[name].float()
    return ModelOutput(preds)


def decoded_by(task: Task, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoded outputs of a task among those of a file, by the kind's own names."""
    return {own: found[name] for own, name in task.output_names().items()}


def dumps(description: Mapping[str, Any]) -> str:
    """The description as it stands in a file."""
    return json.dumps(description, separators=(",", ":"))
