"""Programs of torch.export (.pt2), with their description among the extra files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..sources import files
from ..sources.export import open_program
from . import describe
from .module import Exported, as_input

MEMBER = f"{describe.KEY}.json"


def to_program(module: Exported, size: tuple[int, int], *, free: int | None = None) -> Any:
    """An ExportedProgram of ``module`` for images of ``size`` (H, W) in batches of any number.

    free: height and width may be any multiple of it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module, (module.example(size),), dynamic_shapes=module.free_sides(free), strict=False
        )
    for node in program.graph.nodes:  # stack traces hold paths of the machine that exported
        for key in ("stack_trace", "from_node"):
            node.meta.pop(key, None)
    return program


def content(program: Any, description: Mapping[str, Any]) -> bytes:
    """The file: ``program`` with its description."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer, extra_files={MEMBER: describe.dumps(description)})
    return buffer.getvalue()


def text_in(path: str) -> str | None:
    """The description's text in a file, None where there is none. Raises UserError for a damaged file."""
    for name, member in files.repack(path).items():
        if re.fullmatch(rf"(?:extra|extra_files)/{re.escape(MEMBER)}", name):
            return member.decode("utf-8", errors="replace")
    return None


def runner(path: str, device: torch.device, names: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function from float images [B,3,H,W] in [0,1] on ``device`` to tensors by output name.

    No code in the file is run. Raises UserError for a file of which torch would run some.
    """
    try:
        program = open_program(path, device, False)
    except UserError as error:  # its advice is for teachers
        raise UserError(
            str(error).partition(" If you trust")[0].rstrip(".") + "; export it again with tools/export.py"
        ) from None
    return of_program(program, names, device)


def of_program(
    program: Any, names: Sequence[str], device: torch.device
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Likewise, of a program in memory."""
    module = program.module().to(device)
    uint8 = any(
        node.op == "placeholder"
        and node.name in program.graph_signature.user_inputs
        and node.meta["val"].dtype == torch.uint8
        for node in program.graph.nodes
    )

    @torch.no_grad()
    def run(images: Tensor) -> dict[str, Tensor]:
        try:
            return dict(zip(names, module(as_input(images, uint8).contiguous()), strict=True))
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"path: the program fails on images of {list(images.shape)} ({files.first_line(error)})"
            ) from None

    return run
