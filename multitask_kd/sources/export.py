"""Programs of torch.export (.pt2)."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from . import files
from .base import SOURCES, Source, in_batches
from .onnx import check_size


@SOURCES.register("export")
class Export(Source):
    """A program of ``torch.export.save`` with one input, images [B,3,h,w]. No options; modules inside it
    cannot be tapped.

    torch.export.load unpickles sample inputs, constants and some weights without restriction, evaluates
    expressions and function names of the program as Python, and loads compiled libraries. Where
    ``trust_pickle`` is false none of that happens: pickles are read as plain data and written again, the
    program may consist only of torch's own operators, names and size expressions, and only content that
    passed these checks is given to torch. Anything else is refused.

    A program with a fixed batch runs slice by slice, the last slice padded; one with a fixed height and width
    needs images of that size.
    """

    tappable = False
    may_trust = True

    def load(self, device: torch.device) -> nn.Module:
        files.expect(self.path, "export", for_what="program of torch.export")
        with _readable(self.path):
            return _Program(open_program(self.path, device, self.trust_pickle), str(self.path)).to(device)


def open_program(path: str, device: torch.device, trust_pickle: bool) -> Any:
    """The ExportedProgram in a file, on ``device``.

    Raises UserError for a file from which torch would run code, unless ``trust_pickle`` allows it.
    """
    content = path if trust_pickle else _archive(path)
    with _readable(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(content)
        return _moved(program, device) if device.type != "cpu" else program


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds
        raise UserError(
            f"path: {path} cannot be read as a program of torch.export ({files.first_line(error)}); "
            "it is damaged, or was written by another version of torch: export it again with the one "
            "installed here"
        ) from None


def _archive(path: str) -> io.BytesIO:
    kept = cleaned(path)
    return files.zipped(kept, "" if "serialized_exported_program.json" in kept else "model/")


def _moved(program: Any, device: torch.device) -> Any:
    try:
        from torch.export.passes import move_to_device_pass
    except ImportError:  # older torch: weights move with .to(), devices named in the program do not
        return program
    return move_to_device_pass(program, device)


class _Program(nn.Module):
    """An exported program as a module in eval mode: it has no train mode, and its weights are frozen."""

    def __init__(self, program: Any, path: str):
        super().__init__()
        self.path = path
        names = program.graph_signature.user_inputs
        inputs = [
            node.meta.get("val")
            for node in program.graph.nodes
            if node.op == "placeholder" and node.name in names
        ]
        if len(names) != 1 or len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
            raise UserError(
                f"path: the program in {path} needs one input, images [B,3,h,w]; it has "
                f"{', '.join(map(str, names))}"
            )
        shape, self.dtype = inputs[0].shape, inputs[0].dtype
        if isinstance(shape[1], int) and shape[1] != 3 or not self.dtype.is_floating_point:
            raise UserError(
                f"path: the program in {path} takes {list(shape)} in {self.dtype}; floating-point [B,3,h,w] "
                f"is needed"
            )
        self.size = [side if isinstance(side, int) else "free" for side in shape[2:]]
        self.limits = _limits(shape[0], program.range_constraints)
        self.module = program.module()
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self.training = False

    def train(self, mode: bool = True) -> nn.Module:
        return self

    def forward(self, images: Tensor) -> Any:
        check_size(images, self.size, self.path)
        return in_batches(self._run, images, *self.limits)

    def _run(self, images: Tensor) -> Any:
        try:
            return _single(self.module(images.to(self.dtype)))
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"path: {self.path} fails on images of {list(images.shape)} ({files.first_line(error)}); "
                "was it exported for another size or batch?"
            ) from error


def _single(output: Any) -> Any:
    """Half-precision outputs in float32."""
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, Mapping):
        return {key: _single(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)) and type(output) in (list, tuple):
        return type(output)(_single(value) for value in output)
    return output


def _limits(batch: Any, ranges: Mapping[Any, Any]) -> tuple[int, int]:
    """The least and greatest batch of the program."""
    if isinstance(batch, int):
        return batch, batch
    found = ranges.get(batch.node.expr)
    try:
        low = int(found.lower)
    except Exception:  # none is stated, or infinite
        low = 1
    try:
        high = int(found.upper)
    except Exception:
        high = 2**31
    return max(low, 1), max(min(high, 2**31), 1)


# --- what is accepted from a file that is not trusted

_OPERATOR = re.compile(
    r"torch\.ops\.(?:aten|prims|torchvision|quantized_decomposed)\."
    r"(?!(?:save|load|from_file|_print)\b)(?:_?[a-zA-Z]\w*|__i?(?:and|or|xor|lshift|rshift)__)\.(?!__)\w+"
    r"|torch\.ops\.higher_order\.(?:wrap_with_set_grad_enabled|wrap_with_autocast|cond|while_loop)"
    r"|torch\._?sym_(?:max|min|int|float|not|ite|sum|sqrt)"
    r"|math\.(?:ceil|floor|trunc|sqrt|prod)"
    r"|_operator\.(?:getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|lshift|rshift)",
    re.ASCII,
)
_IDENTIFIER = re.compile(r"(?:[A-Za-z_]\w*)?", re.ASCII)
_PLAIN = re.compile(r"(?!.*\.__)(?!__)[\w.:+\-]*", re.ASCII)  # names of weights, devices, versions
_FREE = (
    "as_string",
    "as_strings",
    "string_value",
    "torch_version",
)  # texts: only ever written into the program by repr()
_FUNCTIONS = {
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "FloorDiv", "ModularIndexing", "CleanDiv",
    "CeilDiv", "CeilToInt", "FloorToInt", "PythonMod", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToInt",
    "TruncToFloat", "RoundToInt", "ToFloat", "Identity", "Where", "Eq", "Ne", "Ge", "Gt", "Le", "Lt", "Equality", "Unequality",
    "GreaterThan", "StrictGreaterThan", "LessThan", "StrictLessThan", "And", "Or", "Not", "Piecewise", "ExprCondPair", "Abs",
    "floor", "ceiling",
}  # fmt: skip
_KEYWORDS = {
    "positive",
    "negative",
    "nonnegative",
    "nonzero",
    "integer",
    "real",
    "finite",
    "extended_real",
    "precision",
    "evaluate",
}
_TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


class _Refused(Exception):
    pass


def cleaned(path: str) -> dict[str, bytes]:
    """The members of a .pt2 that are safe for torch.export.load; pickles are read and written again. Raises
    UserError."""
    members = files.repack(path)
    kept = {}
    try:
        for name, content in members.items():
            if name in (
                "archive_format",
                "archive_version",
                "byteorder",
                "version",
                ".data/version",
                ".format_version",
            ):
                kept[name] = content
            elif re.fullmatch(r"models/\w+\.json|serialized_exported_program\.json", name, re.ASCII):
                kept[name] = _program(json.loads(content))
            elif re.fullmatch(r"data/(?:weights|constants)/\w+_config\.json", name, re.ASCII):
                kept[name] = _payload(json.loads(content), name.rpartition("/")[0], members)
            elif name.endswith(".pt"):
                kept[name] = _rewritten(content, name)
            elif name.startswith("data/aotinductor/"):
                raise _Refused(f"compiled libraries ({name})")
            elif name.startswith(("data/weights/", "data/constants/")):
                kept.setdefault(name, content)
        for name, content in kept.items():  # pickled tensors have no file ending
            if re.fullmatch(r"data/(?:weights|constants)/\w+", name, re.ASCII) and _is_zip(content):
                kept[name] = _rewritten(content, name)
    except _Refused as refused:
        raise UserError(
            f"path: {path} holds {refused}, which torch would run as code; it was not opened. If you trust "
            f"whoever made the "
            "file, set trust_pickle: true; else have the network exported to ONNX or its state_dict() saved"
        ) from None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"path: the program in {path} is damaged ({files.first_line(error)})") from None
    return kept


def _is_zip(content: bytes) -> bool:
    return content[:4] == b"PK\x03\x04"


def _rewritten(content: bytes, name: str) -> bytes:
    """A pickle of torch.save, read as plain data and written again, so that torch unpickles only what was
    written here."""
    if not content:
        return content
    try:
        plain = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:
        raise _Refused(f"pickled objects ({name})") from None
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return buffer.getvalue()


def _payload(config: Any, folder: str, members: Mapping[str, bytes]) -> bytes:
    """The list of weights or constants: tensors, raw or pickled as plain data; no other objects."""
    for entry in config["config"].values():
        if not re.fullmatch(
            r"weight_\d+" if folder.endswith("weights") else r"tensor_\d+", str(entry["path_name"])
        ):
            raise _Refused(f"the pickled object '{entry['path_name']}'")
        name = f"{folder}/{entry['path_name']}"
        if entry.get("use_pickle") and not (name in members and _is_zip(members[name])):
            raise _Refused(f"a pickle in an old format ({name})")
    _strings(config)
    return json.dumps(config).encode()


def _program(program: Any) -> bytes:
    graph_module = program["graph_module"]
    program["guards_code"] = []  # checks of the input, written as Python
    if "metadata" in graph_module:
        graph_module["metadata"] = {}
    for call in graph_module["module_call_graph"]:
        if call.get("signature"):
            call["signature"]["in_spec"] = _tree(call["signature"]["in_spec"])
            call["signature"]["out_spec"] = _tree(call["signature"]["out_spec"])
    _strings(program)
    return json.dumps(program).encode()


def _strings(node: Any, key: str = "") -> None:
    """Refuse a text that torch would evaluate, import or write into Python code as something else than a name
    or a literal."""
    if isinstance(node, dict):
        if isinstance(node.get("target"), str) and "metadata" in node:
            node["metadata"] = {}  # stack traces and names of functions
        if key == "custom_obj_values" and node:
            raise _Refused("custom objects")
        for name, value in node.items():
            if key == "range_constraints":
                _expression(name)
            elif not _PLAIN.fullmatch(name):
                raise _Refused(f"the name {name[:80]!r}")
            if name not in ("in_spec", "out_spec"):  # _tree has checked these
                _strings(value, name)
    elif isinstance(node, list):
        for value in node:
            _strings(value, key)
    elif isinstance(node, str) and key not in _FREE:
        if key == "target":
            if not _OPERATOR.fullmatch(node):
                raise _Refused(f"the function '{node[:80]}'")
        elif key == "expr_str":
            _expression(node)
        elif key in ("name", "as_name", "forward_arg_names", "field_names"):
            if not _IDENTIFIER.fullmatch(node):
                raise _Refused(f"the name {node[:80]!r}")
        elif not _PLAIN.fullmatch(node):
            raise _Refused(f"the text {node[:80]!r}")


def _expression(text: str) -> None:
    """A size such as ``FloorDiv(Symbol('s0', positive=True), Integer(2))``: known functions of symbols and
    numbers."""
    rest = re.sub(r"'[a-z]\w*'|'-?[\d.]+(?:e[+-]?\d+)?'", "1", text, flags=re.ASCII)
    for word in re.finditer(r"[^\W\d]\w*(\s*\()?", rest, re.ASCII):
        name = word.group().rstrip("( \t\n")
        known = name in _FUNCTIONS if word.group(1) else name in _KEYWORDS | {"True", "False", "oo", "int_oo"}
        if not (known or not word.group(1) and re.fullmatch(r"(?:s|u|zuf|zf|f|i)\d+|true|false", name)):
            raise _Refused(f"the expression '{text[:80]}'")
    if not re.fullmatch(r"[\w\s(),=+*/<>-]*(?:\d\.\d[\w\s(),=+*/<>-]*)*", rest, re.ASCII):
        raise _Refused(f"the expression '{text[:80]}'")


def _tree(text: str) -> str:
    """How inputs or outputs are nested, checked: only tuples, lists and dicts with plain keys."""
    if not text:
        return text
    protocol, tree = json.loads(text)

    def check(node: Any) -> None:
        if node["type"] not in _TREES:
            raise _Refused(
                f"outputs in a '{str(node['type'])[:80]}' (tensors, tuples, lists and dicts are read)"
            )
        context = node["context"]
        keys = json.loads(context) if isinstance(context, str) else context
        if not (
            keys is None
            or isinstance(keys, list)
            and all(isinstance(k, int) or _PLAIN.fullmatch(k) for k in keys)
        ):
            raise _Refused(f"the keys {str(context)[:80]}")
        for child in node["children_spec"]:
            check(child)

    check(tree)
    return json.dumps([protocol, tree])
