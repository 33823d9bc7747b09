"""ONNX: written through torch.export, one file, with its description; read by onnxruntime."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..models.decoders import in_onnx
from ..sources import files
from ..sources.onnx import open_session
from . import describe
from .module import Exported, as_input
from .needs import needed

LEAST_OPSET = 18  # torch's exporter writes this one; older ones by conversion, which fails on many networks


def to_onnx(
    module: Exported,
    size: tuple[int, int],
    names: Sequence[str],
    *,
    opset: int = LEAST_OPSET,
    free: int | None = None,
) -> Any:
    """An onnx.ModelProto of ``module`` for images of ``size`` (H, W) in batches of any number. Raises
    UserError.

    names: of the outputs, in the order in which ``module`` gives them; free: height and width may be any
    multiple of it.
    """
    onnx = needed("onnx")
    operators = getattr(needed("onnxscript"), f"opset{LEAST_OPSET}")
    if not LEAST_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise UserError(
            f"--opset: {opset} cannot be written; {LEAST_OPSET} to {onnx.defs.onnx_opset_version()} can with "
            f"the installed onnx"
        )
    with _quiet():
        program = torch.onnx.export(
            module,
            (module.example(size),),
            dynamo=True,
            opset_version=opset,
            input_names=[describe.INPUT],
            output_names=list(names),
            dynamic_shapes=module.free_sides(free),
            custom_translation_table=in_onnx(operators),
            verbose=False,
        )
    return _tidied(program.model_proto)


def _tidied(model: Any) -> Any:
    """Without what torch notes of every node, which holds paths of the machine that exported."""
    for part in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        del part.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.shape.dim and value.type.tensor_type.shape.dim[0].dim_param:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and advice of torch's exporter, which are for those who write networks."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def content(model: Any, description: Mapping[str, Any]) -> bytes:
    """The file: ``model`` with its description."""
    del model.metadata_props[:]
    model.metadata_props.add(key=describe.KEY, value=describe.dumps(description))
    return model.SerializeToString()


def runner(
    model: str | bytes, device: torch.device
) -> tuple[str | None, Callable[[Tensor], dict[str, Tensor]]]:
    """From a file or its content: the description's text (None: it has none), and a function from float
    images [B,3,H,W] in [0,1] to tensors by output name."""
    session = open_session(model, device)
    text = session.get_modelmeta().custom_metadata_map.get(describe.KEY)
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        array = as_input(images.detach().cpu(), inputs[0].type == "tensor(uint8)").numpy()
        try:
            found = session.run(None, {inputs[0].name: np.ascontiguousarray(array)})
        except Exception as error:  # onnxruntime has a class of its own for every status
            raise UserError(
                f"path: the ONNX model takes {inputs[0].shape} and fails on images of {list(images.shape)} "
                f"({files.first_line(error)})"
            ) from None
        return {
            name: torch.from_numpy(value).to(images.device)
            for name, value in zip(outputs, found, strict=True)
        }

    return text, run
