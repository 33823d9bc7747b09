"""A checkpoint -> a file for a device, held against PyTorch before it takes the place of an older one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from .. import build
from ..atomic import replacing
from ..checkpoint import load
from ..data.scenes.draw import scene
from ..data.transforms import letterbox
from ..errors import UserError, as_user_error, did_you_mean
from ..export import decode as decoding
from ..export import describe, onnx, parity, program, quantise
from ..export.module import Exported, as_input
from ..export.needs import needed
from ..registry import check_options, options_of
from ..report.tables import table
from ..tasks.base import Task
from .evaluate import check_data, evaluate, headline, main_score

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
FORMATS = {".onnx": "onnx", ".pt2": "program"}
CALIBRATION = 128  # images
LOSS = 0.5  # points of a task's main metric that INT8 may lose before more stays in float
ENOUGH = 10.0  # points that no INT8 file should lose
BATCHES = (1, 3)  # that the file is held against PyTorch with


@dataclass(frozen=True)
class Export:
    """What to export, and how; None is the default.

    checkpoint, out: files; out ends in .onnx or .pt2. precision: fp32, fp16, int8. decode: ``key=value`` of tasks.det.decode,
    None: raw outputs alone. opset: of ONNX. uint8: the input is bytes. dynamic_size: free height and width. tolerance: of parity,
    in parts of an output's largest value. For int8: images to calibrate on, calibrate: the set they come from, eval_images to
    measure on.
    """

    checkpoint: str
    out: str
    precision: str = "fp32"
    decode: Sequence[str] | None = None
    opset: int | None = None
    uint8: bool = False
    dynamic_size: bool = False
    tolerance: float | None = None
    images: int | None = None
    eval_images: int | None = None
    calibrate: str | None = None

    @property
    def kind(self) -> str:
        return FORMATS[Path(self.out).suffix.lower()]


@dataclass
class Result:
    """What was written: ``description`` as in the file, size in bytes, the largest differences from PyTorch; ``str`` is for people.

    masks: share of pixels whose class differs; detections: (without a counterpart, all); None where the file does not decode.
    """

    path: str
    description: dict[str, Any]
    size: int = 0
    gaps: list[parity.Gap] = field(default_factory=list)
    masks: float | None = None
    detections: tuple[int, int] | None = None

    def __str__(self) -> str:
        found = self.description
        given = found["input"]
        low, high = given["range"]
        sides = " x ".join(map(str, given["shape"]))
        lines = [
            f"{self.path}: {found['precision']}, {self.size / 1e6:.2f} MB, {found['params']} parameters",
            f"input {given['name']}: {given['type']} [{sides}], {given['colour']} in [{low}, {high}]",
            *(f"output {name}: {text}" for name, text in found["outputs"].items()),
        ]
        rows = [{"output": g.output, "absolute": f"{g.absolute:.2e}", "relative": f"{g.relative:.2e}"} for g in self.gaps]
        titles = {"output": "output", "absolute": "largest difference", "relative": "of its largest value"}
        lines += ["", f"against PyTorch, drawn scenes in batches of {' and '.join(map(str, BATCHES))}", table(rows, titles)]
        if self.masks is not None:
            lines.append(f"mask: {100 * self.masks:.3f} % of the pixels have another class")
        if self.detections is not None:
            lines.append("detections: {} of {} without a counterpart".format(*self.detections))
        if accuracy := found.get("accuracy"):
            lines += ["", accuracy_table(accuracy)]
        return "\n".join(lines)


def accuracy_table(accuracy: Mapping[str, Any]) -> str:
    """What INT8 costs: the figures of every form that was measured, in percent."""
    keys = dict.fromkeys(key for row in accuracy["measured"] for key in row["figures"])
    taken = {accuracy["float"]: "this one"}
    rows = [
        {"form": row["precision"], "float": row["float"], **row["figures"], "taken": taken.get(row["float"], "")}
        for row in accuracy["measured"]
    ]
    columns = {"form": "precision", "float": "left in float", **{key: key for key in keys}, "taken": "written"}
    return f"{accuracy['images']} images of data.val, figures in percent\n" + table(rows, columns, digits=2)


def export(plan: Export, config: Any = None) -> Result:
    """Write ``plan.out``. config: of the data, for int8. Raises UserError; the file that was there then stays as it was."""
    check(plan, config)
    content = load(plan.checkpoint, "--checkpoint")
    net, arch = build.from_checkpoint(content, "--checkpoint").eval(), content["arch"]
    tasks, size = build.tasks(arch, net), tuple(arch["input_size"])
    strides = {name: tuple(net.heads[name].strides) for name in arch["tasks"]}
    options = None if plan.decode is None else decode_options(plan.decode, tasks, content, size)
    data = _Data(plan, config, arch) if plan.precision == "int8" else None
    module = Exported(
        net,
        uint8=plan.uint8,
        half=plan.precision == "fp16",
        decode=decoding.decoders(options or {}, size, strides, in_onnx=plan.kind == "onnx"),
    )
    description = describe.describe(
        arch, content["params"], strides, precision=plan.precision, uint8=plan.uint8, decode=options, dynamic=plan.dynamic_size
    )
    made = _made(plan, module, size, description)
    if data:
        made = _quantised(made, description, data)
    Path(plan.out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(plan.out) as file:
        file.write((onnx if plan.kind == "onnx" else program).content(made, description))
        file.flush()
        run = _runner(plan.kind, file.name, description)
        result = compare(net, tasks, run, Result(plan.out, description, file.tell()), pictures(size))
        if plan.dynamic_size:  # another number of cells in height and in width
            step = max(arch["strides"])
            result = compare(net, tasks, run, result, pictures((size[0] + 2 * step, size[1] + step)))
        require(result, plan)
    return result


def check(plan: Export, config: Any) -> None:
    """Everything that can be told before a file is read. Raises UserError."""
    suffix = Path(plan.out).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"--out: '{plan.out}' ends in '{suffix}', which is no format here; {did_you_mean(suffix, FORMATS)}")
    if Path(plan.out).is_dir():
        raise UserError(f"--out: {plan.out} is a folder; give the path of a file")
    if suffix == ".pt2":
        for option, given in (("--int8", plan.precision == "int8"), ("--opset", plan.opset is not None)):
            if given:
                raise UserError(f"{option} is for ONNX; give an --out that ends in .onnx")
    if plan.dynamic_size and plan.decode is not None:
        raise UserError("--dynamic-size: boxes and masks are decoded for one size; leave --decode or --dynamic-size out")
    if plan.tolerance is not None and not plan.tolerance > 0:
        raise UserError(f"--tolerance: {plan.tolerance} is not a number above 0")
    for option in ("images", "eval_images"):
        value = getattr(plan, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')}: {value} is not a number of images; give at least 1")
    if plan.precision != "int8":
        for option, given in (("config", config), *((o, getattr(plan, o)) for o in ("images", "eval_images", "calibrate"))):
            if given is not None:
                raise UserError(f"--{option.replace('_', '-')}: is for --int8, which is not given; leave it out")
    elif config is None:
        raise UserError("--int8: needs --config, whose data.train gives the images it is calibrated on")
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            needed(package)


def decode_options(
    given: Sequence[str], tasks: Mapping[str, Task], content: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """By task, how it is decoded in the file: ``key=value`` over the run's tasks.det.decode. Raises UserError."""
    found: dict[str, dict[str, Any]] = {name: {} for name in tasks if name in describe.DECODED}
    if "det" not in found:
        if given:
            raise UserError(f"--decode: {given[0]}: the network detects nothing, and a mask has no options")
        return found
    task = tasks["det"]
    chosen = {key: parameter.default for key, parameter in options_of(task.decode).items()}
    trained = yaml.safe_load(content.get("config") or "{}") or {}
    chosen |= trained.get("tasks", {}).get("det", {}).get("decode") or {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--decode: '{text}': write it as key=value; keys: {', '.join(chosen)}")
        try:
            chosen[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--decode: '{text}': the value is not YAML") from None
    check_options(task.decode, chosen, "--decode")
    cells = sum(-(-size[0] // s) * -(-size[1] // s) for s in task.strides)
    as_user_error("--decode", task.decode, torch.zeros(1, cells, 5 + len(task.classes)), size, **chosen)
    return found | {"det": chosen}


def _made(plan: Export, module: Exported, size: tuple[int, int], description: Mapping[str, Any]) -> Any:
    free = max(description["arch"]["strides"]) if plan.dynamic_size else None
    if plan.kind == "program":
        return program.to_program(module, size, free=free)
    return onnx.to_onnx(module, size, list(description["outputs"]), opset=plan.opset or onnx.LEAST_OPSET, free=free)


def _runner(kind: str, path: str, description: Mapping[str, Any]) -> Callable[[Tensor], dict[str, Tensor]]:
    if kind == "onnx":
        return onnx.runner(path, CPU)[1]
    return program.runner(path, CPU, list(description["outputs"]))


# --- against PyTorch


def pictures(size: tuple[int, int]) -> Tensor:
    """Drawn street scenes as the network sees images: float [4,3,H,W] in [0,1]."""
    drawn = [letterbox(scene(0, "val", i, (96, 128))[0], size)[0] for i in range(sum(BATCHES))]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous().float() / 255


@torch.no_grad()
def compare(net: Any, tasks: Mapping[str, Task], run: Callable, result: Result, images: Tensor) -> Result:
    """Fill in how far a file is from PyTorch: raw outputs from the network's, decoded ones from what the tasks make of the file's
    raw outputs (so that a rounding of a score does not count as another detection)."""
    size, options, gaps = tuple(images.shape[2:]), result.description["decode"] or {}, []
    wrong, count, pixels = 0, 0, []
    for part in images.split(list(BATCHES)):
        found = run(part)
        gaps += parity.raw_gaps(net, found, part)
        if "seg" in options:
            pixels.append(parity.masks(tasks["seg"].decode(found["seg"], size).argmax(1), found["mask"]))
        if "det" in options:
            expected = tasks["det"].decode(found["det"], size, **options["det"])
            mine = tasks["det"].decode(describe.view(found, result.description).preds["det"], size, **options["det"])
            lacking, all_of_them = parity.detections(expected, mine, parity.TOLERANCE["fp32"])
            wrong, count = wrong + lacking, count + all_of_them
    result.gaps = parity.worst([*result.gaps, *gaps])
    result.masks = max(pixels) if pixels else None
    result.detections = (wrong, count) if "det" in options else None
    return result


def require(result: Result, plan: Export) -> None:
    """Raise UserError where the file does not say what PyTorch says."""
    tolerance = parity.TOLERANCE[plan.precision] if plan.tolerance is None else plan.tolerance
    for gap in result.gaps:
        if not gap.within(tolerance):
            raise UserError(
                f"--out: {plan.out} was not written: its output '{gap.output}' differs from PyTorch's by up to {gap.absolute:.2e} "
                f"({gap.relative:.2e} of the largest value), more than {tolerance:g}: the network does something that cannot be "
                "exported, such as choosing by a value or a batch size; or, where that is good enough, give --tolerance"
            )
    if result.masks is not None and result.masks > parity.MASK_SHARE:
        raise UserError(f"--out: {plan.out} was not written: {100 * result.masks:.2f} % of its mask's pixels are not PyTorch's")
    if result.detections is not None and result.detections[0] > parity.BOX_SHARE * result.detections[1]:
        lacking, count = result.detections
        raise UserError(f"--out: {plan.out} was not written: {lacking} of {count} detections have no counterpart in PyTorch's")


# --- INT8


class _Data:
    """Images to calibrate on and to measure on. Raises UserError for data of other classes, before anything is exported."""

    def __init__(self, plan: Export, config: Any, arch: Mapping[str, Any]):
        build.check(config)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.config, self.size, self.uint8 = config, tuple(arch["input_size"]), plan.uint8
        self.val = build.layout(config, "val", {name: part["classes"] for name, part in arch["tasks"].items()})
        check_data(self.val, arch, f"--checkpoint: {plan.checkpoint}")
        name, self.count = plan.calibrate or "train", plan.eval_images
        sets = config.data.sets("train")
        if name not in ("train", "val", *sets):
            raise UserError(f"--calibrate: unknown set '{name}'; {did_you_mean(name, ['train', 'val', *sets])}")
        self.train = self.val if name == "val" else build.layout(config, "train")
        rows = self.train.rows(name) if name in sets else np.arange(len(self.train))
        self.rows = rows[np.linspace(0, len(rows) - 1, num=min(plan.images or CALIBRATION, len(rows)), dtype=int)]

    def calibration(self) -> Iterator[np.ndarray]:
        """Unaugmented, letterboxed images [1,3,H,W] as the file takes them."""
        read = 0
        for index in self.rows:
            try:
                image, _ = letterbox(self.train.read(int(index)).image, self.size)
            except UserError as error:
                if self.config.data.on_error != "skip":
                    raise
                log.warning("skipped: %s", error)
                continue
            read += 1
            floats = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
            yield as_input(floats, self.uint8).contiguous().numpy()
        if not read:
            raise UserError("--calibrate: none of its images could be read")

    def measure(self, content: bytes, description: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Task]]:
        """The metrics of an ONNX model on data.val."""
        _, run = onnx.runner(content, CPU)
        tasks = describe.tasks(description)
        metrics = evaluate(
            lambda images: describe.view(run(images), description),
            tasks,
            build.val_loader(self.config, self.val, self.size, self.count, CPU),
            CPU,
            decode=build.decode_options(self.config),
            on_skip=lambda message: log.warning("skipped: %s", message),
        )
        return metrics, tasks


def _quantised(model: Any, description: dict[str, Any], data: _Data) -> Any:
    """``model`` in INT8, with what it costs in ``description``.

    As much is quantised as loses at most LOSS points in every task; where nothing does, what loses least on average.
    """
    before, tasks = data.measure(model.SerializeToString(), description)
    measured = [{"precision": "fp32", "float": "everything", "figures": headline(before, tasks)}]
    best, best_score = None, -1.0
    for kept in quantise.FLOAT:
        made = quantise.quantised(model, data.calibration(), kept)
        after, _ = data.measure(made.SerializeToString(), description)
        measured.append({"precision": "int8", "float": kept, "figures": headline(after, tasks)})
        fits = all((before[n][t.main_metric] or 0) - (after[n][t.main_metric] or 0) <= LOSS for n, t in tasks.items())
        if fits or main_score(after, tasks) > best_score:
            best, best_score, chosen = made, main_score(after, tasks), kept
        if fits:
            break
    if (lost := main_score(before, tasks) - best_score) > ENOUGH:
        log.warning("int8 loses %.1f points: calibrate on more images, or on images like those of use", lost)
    description["accuracy"] = {"images": before["images"], "float": chosen, "measured": measured, "calibrated_on": len(data.rows)}
    return best
