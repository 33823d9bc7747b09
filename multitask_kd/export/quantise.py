"""Static quantisation to INT8: QDQ nodes, a scale a channel of the weights and a range a tensor, from
calibration images."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..sources import files
from .describe import INPUT
from .needs import needed

# What stays in float, from nothing to all heads; a head's additions, norms and decoding always do: there
# boxes and logits of different ranges lie in one tensor.
FLOAT = ("nothing", "the last layers of the heads", "the heads")
TYPES = (
    "Conv",
    "Relu",
    "Clip",
    "Add",
    "MaxPool",
)  # additions and activations too: else every convolution goes back to float
HEAD = ".heads."  # in the names of the heads' weights


def quantised(model: Any, images: Iterable[np.ndarray], kept: str = FLOAT[0]) -> Any:
    """An onnx.ModelProto with the convolutions, activations and additions of ``model`` (likewise) in INT8.

    images: for calibration, each [1,3,H,W] as the model takes it; kept: one of FLOAT. Raises UserError.
    """
    onnx = needed("onnx")
    needed("onnxruntime")
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder, _quiet():
        given, source, result = (Path(folder, f"{name}.onnx") for name in ("given", "float", "int8"))
        onnx.save(model, given)  # in memory, onnxruntime goes by way of links, which not every folder takes
        try:
            quantization.shape_inference.quant_pre_process(str(given), str(source), skip_symbolic_shape=True)
            prepared = onnx.load(source)
            quantization.quantize_static(
                str(source),
                str(result),
                _reader(quantization, images),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(TYPES),
                nodes_to_exclude=in_float(prepared.graph, kept),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            IndexError,
            NotImplementedError,
        ) as error:
            raise UserError(
                f"--int8: onnxruntime cannot quantise this network ({files.first_line(error)})"
            ) from error
        return onnx.load(result)


def _reader(quantization: Any, images: Iterable[np.ndarray]) -> Any:
    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.rest, None)
            return None if image is None else {INPUT: image}

    return Reader()


def in_float(graph: Any, kept: str) -> list[str]:
    """Names of the nodes of an ONNX graph that are not quantised."""
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def after(node: Any) -> Iterator[Any]:
        for name in node.output:
            yield from readers.get(name, ())

    def downstream(starts: Iterable[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        rest = list(starts)
        while rest:
            node = rest.pop()
            for reader in after(node):
                if reader.name not in found:
                    found[reader.name] = reader
                    rest.append(reader)
        return found

    heads = [node for node in graph.node if node.op_type == "Conv" and HEAD in node.input[1]]
    below = downstream(heads)
    excluded = {name for name, node in below.items() if node.op_type != "Conv"}
    excluded |= {node.name for node in graph.node if node.op_type != "Conv" and INPUT in node.input}
    if kept == FLOAT[1]:
        excluded |= {
            node.name for node in heads if not any(n.op_type == "Conv" for n in downstream([node]).values())
        }
    if kept == FLOAT[2]:
        excluded |= {node.name for node in heads}
    return sorted(excluded)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice to prepare the model, which is done, and its progress."""
    root = logging.getLogger()
    level = root.level
    try:
        root.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
