"""ONNX models, run by onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from . import files
from .base import SOURCES, Source, in_batches

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_OTHERS = (
    "folder", "empty", "html", "lfs", "torch", "legacy", "torchscript", "export", "package", "safetensors", "keras", "numpy",
    "broken zip", "archive", "pickle",
)  # fmt: skip


@SOURCES.register("onnx")
class Onnx(Source):
    """An ONNX model with one image input [B,3,h,w] in float32, float16 or float64. Nothing in the file is
    Python code.

    No options. It runs in onnxruntime (``pip install 'multitask_kd[onnx]'``): on CUDA where that is the
    device and the installed onnxruntime has it, else on the CPU with torch's number of threads. Modules
    inside it cannot be tapped. A model with a fixed batch runs slice by slice. Weights stored in separate
    files must lie beside the model, under the names that it gives. Operators that onnxruntime does not know
    are refused. It returns a dict of tensors by output name, or the tensor itself where the model has one
    output.
    """

    tappable = False

    def load(self, device: torch.device) -> nn.Module:
        return _Session(open_session(self.path, device), str(self.path)).eval()


def open_session(model: str | bytes, device: torch.device) -> Any:
    """A session of onnxruntime for the file of an ONNX model, or for its content. Raises UserError."""
    kind = "onnx" if isinstance(model, bytes) else files.kind_of(model)
    if kind in _OTHERS:
        files.expect(model, "onnx", for_what="ONNX model")
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"source: the source onnx needs onnxruntime ({error}): pip install 'multitask_kd[onnx]', "
            "or on a GPU onnxruntime-gpu in its place"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=providers
        )
    except Exception as error:  # onnxruntime has a class of its own for every status
        name = "the model" if isinstance(model, bytes) else model
        raise UserError(f"path: {name} {_why(str(error), kind)} ({files.first_line(error)})") from None


def _why(error: str, kind: str) -> str:
    if "external data" in error.lower() or "external_data" in error.lower() or ".data" in error:
        return "keeps weights in other files that are not beside it; copy those there too, or save it as one file"
    if "not a registered function/op" in error or "No Op registered" in error or "custom op" in error.lower():
        return "has operators that onnxruntime does not know; export it with operators of the ONNX standard"
    if "opset" in error.lower() or "IR version" in error:
        return "needs a newer onnxruntime"
    if kind != "onnx":
        return f"is no ONNX model: it seems to be {files.KINDS[kind][0]}"
    return "cannot be loaded; it is damaged or truncated"


class _Session(nn.Module):
    """A session of onnxruntime as a module without parameters."""

    def __init__(self, session: Any, path: str):
        super().__init__()
        self.session, self.path = session, path
        inputs = session.get_inputs()
        if (
            len(inputs) != 1
            or len(inputs[0].shape) != 4
            or inputs[0].shape[1] not in (3, None)
            and isinstance(inputs[0].shape[1], int)
        ):
            listed = ", ".join(f"{i.name} {i.shape}" for i in inputs)
            raise UserError(f"path: {path} needs one input of images [B,3,h,w]; it has {listed}")
        if inputs[0].type not in _TYPES:
            raise UserError(
                f"path: the input of {path} is {inputs[0].type}; float32, float16 or float64 is needed: "
                f"export it so"
            )
        self.name, self.dtype = inputs[0].name, _TYPES[inputs[0].type]
        batch, _, *self.size = inputs[0].shape
        self.limits = (batch, batch) if isinstance(batch, int) and batch > 0 else (1, 2**31)
        self.outputs = [output.name for output in session.get_outputs()]

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        check_size(images, self.size, self.path)
        return in_batches(self._run, images, *self.limits)

    def _run(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        array = np.ascontiguousarray(images.detach().float().cpu().numpy(), dtype=self.dtype)
        try:
            found = self.session.run(None, {self.name: array})
        except Exception as error:
            raise UserError(
                f"path: {self.path} fails on images of {list(images.shape)} ({files.first_line(error)}); "
                "was it exported for another size or batch?"
            ) from None
        tensors = [
            _tensor(value, name, self.path).to(images.device)
            for name, value in zip(self.outputs, found, strict=True)
        ]
        return tensors[0] if len(tensors) == 1 else dict(zip(self.outputs, tensors, strict=True))


def check_size(images: Tensor, size: Any, path: str) -> None:
    """Raise UserError where the height or width in ``size`` is a number and not the images'."""
    if any(
        isinstance(want, int) and want > 0 and want != have
        for want, have in zip(size, images.shape[2:], strict=True)
    ):
        raise UserError(
            f"path: {path} was exported for images of {' x '.join(map(str, size))} (height x width), not "
            f"{images.shape[2]} x {images.shape[3]}; set input.size to that, or export it with free sides"
        )


def _tensor(value: Any, name: str, path: str) -> Tensor:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        raise UserError(
            f"path: the output '{name}' of {path} is no tensor of numbers; export the network without it"
        )
    tensor = torch.from_numpy(value)
    return tensor.float() if tensor.is_floating_point() else tensor
