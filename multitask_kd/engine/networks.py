"""A network from a file, whatever its kind, ready to predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import build
from ..batch import ModelOutput
from ..checkpoint import load
from ..errors import UserError, as_user_error
from ..export import describe, onnx, program
from ..export.needs import needed
from ..models.multitask import count_parameters
from ..sources.files import kind_of
from ..tasks.base import Task

ENDINGS = {".onnx": "onnx", ".pt2": "program"}
KINDS = {"onnx": "onnx", "export": "program"}  # what a file is by its bytes -> kind of network


@dataclass(frozen=True)
class Network:
    """run: float images [B,3,H,W] in [0,1] on ``device`` -> ModelOutput with the predictions of ``tasks``,
    which ``Task.decode`` takes.

    size: (H, W) of its input in pixels; arch: what it was built from, with the class names; parameters: their
    number; kind: what the file is: "checkpoint", "onnx" or "program" (torch.export); precision: fp32, fp16 or
    int8; decoded: whether ``run`` gives detections and masks that the file itself has decoded, with options
    of its own.
    """

    path: str
    kind: str
    run: Callable
    tasks: Mapping[str, Task]
    size: tuple[int, int]
    arch: Mapping[str, Any]
    parameters: int
    device: torch.device
    precision: str = "fp32"
    decoded: bool = False

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names by task."""
        return {name: list(part["classes"]) for name, part in self.arch["tasks"].items()}


def open_network(path: str, where: str, device: torch.device, *, channels_last: bool = True) -> Network:
    """The network in a checkpoint, or in a file of tools/export.py; in eval on ``device``. No code in a file
    is run.

    ``where`` names the option that gave it. Raises UserError.
    """
    kind = _kind(path, where)
    if kind != "checkpoint":
        return _exported(str(path), kind, where, device)
    content = load(path, where)
    net = build.from_checkpoint(content, where).to(device).eval()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    arch = content["arch"]
    return Network(
        path,
        "checkpoint",
        net,
        build.tasks(arch, net),
        tuple(arch["input_size"]),
        arch,
        count_parameters(net),
        device,
    )


def _kind(path: str, where: str) -> str:
    """What the bytes of a file say, else its name."""
    named = ENDINGS.get(Path(path).suffix.lower(), "checkpoint")
    if Path(path).is_file():
        try:
            return KINDS.get(kind_of(path), named)
        except UserError as error:
            raise UserError(f"{where}: " + str(error).removeprefix("path: ").partition(";")[0]) from None
    if named != "checkpoint":
        raise UserError(f"{where}: there is no file {path}; write one with tools/export.py")
    return named


def _exported(path: str, kind: str, where: str, device: torch.device) -> Network:
    try:
        if kind == "onnx":
            needed("onnxruntime")
            text, run = onnx.runner(path, device)
            description = describe.read(text, path, where)
        else:
            description = describe.read(program.text_in(path), path, where)
            run = program.runner(path, device, list(description["outputs"]))
    except UserError as error:
        raise UserError(f"{where}: " + str(error).removeprefix(f"{where}: ").removeprefix("path: ")) from None
    arch, tasks = (
        description["arch"],
        as_user_error(f"{where}: {path}: its description is damaged", describe.tasks, description),
    )

    def predictions(images: Tensor) -> ModelOutput:
        found = run(images)
        describe.check_outputs(found, description, images.shape[2:], path)
        return describe.predictions(found, description)

    return Network(
        path, kind, predictions, tasks, tuple(arch["input_size"]), arch, description["params"], device,
        precision=description["precision"], decoded=bool(description["decode"]),
    )  # fmt: skip
