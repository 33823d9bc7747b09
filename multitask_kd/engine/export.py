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
from torch import Tensor, nn

from .. import build
from ..atomic import replacing
from ..checkpoint import load
from ..data.scenes.draw import scene
from ..data.transforms import letterbox
from ..errors import UserError, as_user_error, did_you_mean
from ..export import describe, onnx, parity, program, quantise
from ..export.module import Exported, as_input
from ..export.needs import needed
from ..registry import check_options, options_of
from ..report.tables import in_percent, table
from ..tasks.base import Task
from .columns import headline_columns
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

    checkpoint, out: files; out ends in .onnx or .pt2.
    precision: fp32, fp16, int8.
    decode: ``key=value`` or ``task.key=value`` of ``tasks.<name>.decode``; None: raw outputs alone.
    opset: of ONNX. uint8: the input is bytes. dynamic_size: free height and width.
    tolerance: of parity, in parts of an output's largest value.
    For int8: images to calibrate on, calibrate: the set they come from, eval_images to measure on.
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
    """What was written; ``str`` is for people.

    description: as in the file; size: in bytes; gaps: the raw outputs' largest differences from PyTorch;
    decoded: by task, how what the file decodes differs; empty where it does not decode.
    """

    path: str
    description: dict[str, Any]
    size: int = 0
    gaps: list[parity.Gap] = field(default_factory=list)
    decoded: list[parity.DecodedGap] = field(default_factory=list)

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
        lines += ["", f"against PyTorch, drawn scenes in batches of {' and '.join(map(str, BATCHES))}"]
        lines += [self._differences(), *map(str, self.decoded)]
        if accuracy := found.get("accuracy"):
            lines += ["", accuracy_table(accuracy, describe.tasks(found))]
        return "\n".join(lines)

    def _differences(self) -> str:
        """The table of the raw outputs."""
        rows = [
            {"output": gap.output, "absolute": f"{gap.absolute:.2e}", "relative": f"{gap.relative:.2e}"}
            for gap in self.gaps
        ]
        titles = {"output": "output", "absolute": "largest difference", "relative": "of its largest value"}
        return table(rows, titles)


def accuracy_table(accuracy: Mapping[str, Any], tasks: Mapping[str, Task]) -> str:
    """What INT8 costs: the figures of every form that was measured."""
    shown = list(headline_columns(tasks).values())
    taken = {accuracy["float"]: "this one"}
    rows = [
        {"form": r["precision"], "float": r["float"], **r["figures"], "taken": taken.get(r["float"], "")}
        for r in accuracy["measured"]
    ]
    figures = {column.key: column.heading for column in shown}
    columns = {"form": "precision", "float": "left in float", **figures, "taken": "written"}
    digits = {column.key: max(2, column.digits) for column in shown}
    head = f"{accuracy['images']} images of data.val, {in_percent(shown)}"
    return head + "\n" + table(rows, columns, digits=digits)


def export(plan: Export, config: Any = None) -> Result:
    """Write ``plan.out``. config: of the data, for int8.

    Raises:
        UserError: something in ``plan`` or in the checkpoint is wrong, or the file differs from PyTorch; what
        was at
            ``plan.out`` then stays as it was.
    """
    check(plan, config)
    content = load(plan.checkpoint, "--checkpoint")
    net, arch = build.from_checkpoint(content, "--checkpoint").eval(), content["arch"]
    tasks, size = build.tasks(arch, net), tuple(arch["input_size"])
    options = None if plan.decode is None else decode_options(plan.decode, net, tasks, content, size)
    description = describe.describe(
        arch,
        content["params"],
        tasks,
        precision=plan.precision,
        uint8=plan.uint8,
        decode=options,
        dynamic=plan.dynamic_size,
    )
    data = _Data(plan, config, arch) if plan.precision == "int8" else None
    decode = nn.ModuleDict(
        {
            name: tasks[name].decoder(size, in_onnx=plan.kind == "onnx", options=chosen)
            for name, chosen in (options or {}).items()
        }
    )
    module = Exported(net, uint8=plan.uint8, half=plan.precision == "fp16", decode=decode)
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
    """Check everything that needs no file to be read. Raises UserError."""
    suffix = Path(plan.out).suffix.lower()
    if suffix not in FORMATS:
        hint = did_you_mean(suffix, FORMATS)
        raise UserError(f"--out: '{plan.out}' ends in '{suffix}', which is no format here; {hint}")
    if Path(plan.out).is_dir():
        raise UserError(f"--out: {plan.out} is a folder; give the path of a file")
    if suffix == ".pt2":
        for option, given in (("--int8", plan.precision == "int8"), ("--opset", plan.opset is not None)):
            if given:
                raise UserError(f"{option} is for ONNX; give an --out that ends in .onnx")
    if plan.dynamic_size and plan.decode is not None:
        raise UserError(
            "--dynamic-size: outputs are decoded for one size; leave --decode or --dynamic-size out"
        )
    if plan.tolerance is not None and not plan.tolerance > 0:
        raise UserError(f"--tolerance: {plan.tolerance} is not a number above 0")
    _check_int8(plan, config)
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            needed(package)


def _check_int8(plan: Export, config: Any) -> None:
    counts = {"--images": plan.images, "--eval-images": plan.eval_images}
    for option, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{option}: {count} is not a number of images; give at least 1")
    if plan.precision == "int8":
        if config is None:
            raise UserError("--int8: needs --config, whose data.train gives the images it is calibrated on")
        return
    for option, given in {"--config": config, **counts, "--calibrate": plan.calibrate}.items():
        if given is not None:
            raise UserError(f"{option}: is for --int8, which is not given; leave it out")


def decode_options(
    given: Sequence[str],
    net: nn.Module,
    tasks: Mapping[str, Task],
    content: Mapping[str, Any],
    size: tuple[int, int],
) -> dict[str, dict[str, Any]]:
    """By task, how it is decoded in the file: ``given`` over what the run that trained it has in
    ``tasks.<name>.decode``.

    Args:
        given: ``key=value``, or ``task.key=value`` where several tasks have such an option.
        net: the network of ``tasks``.
        content: of its checkpoint.
        size: (H, W) of its input.

    Raises:
        UserError: an option that no task has, or that several have, or a value that cannot be.
    """
    decoded = {name: task for name, task in tasks.items() if task.decoded_outputs}
    trained = (yaml.safe_load(content.get("config") or "{}") or {}).get("tasks", {})
    found: dict[str, dict[str, Any]] = {}
    for name, task in decoded.items():
        defaults = {key: parameter.default for key, parameter in options_of(task.decode).items()}
        found[name] = defaults | (trained.get(name, {}).get("decode") or {})
    for text in given:
        name, key, value = _option(text, found)
        found[name][key] = value
    _check_options(found, net, tasks, size)
    return found


def _option(text: str, known: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, Any]:
    """``key=value`` or ``task.key=value`` -> task, key and value. known: the options by task. Raises
    UserError."""
    owners: dict[str, list[str]] = {}
    for name, options in known.items():
        for key in options:
            owners.setdefault(key, []).append(name)
    if not owners:
        raise UserError(f"--decode: {text}: no task of the network has an option of decoding; leave it out")
    keys = [key if len(names) == 1 else f"{name}.{key}" for key, names in owners.items() for name in names]
    given, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--decode: '{text}': write it as key=value; keys: {', '.join(keys)}")
    name, _, key = given.rpartition(".")
    names = [n for n in owners.get(key, ()) if name in ("", n)]
    if not names:
        raise UserError(f"--decode.{given}: no such option; {did_you_mean(given, keys)}")
    if len(names) > 1:
        choices = " or ".join(f"{n}.{text}" for n in names)
        raise UserError(f"--decode.{given}: the tasks {' and '.join(names)} have it; say which: {choices}")
    try:
        return names[0], key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--decode: '{text}': the value is not YAML") from None


@torch.no_grad()
def _check_options(
    found: Mapping[str, Mapping[str, Any]], net: nn.Module, tasks: Mapping[str, Task], size: tuple[int, int]
) -> None:
    """Raise UserError for options of decoding, by task, that its ``decode`` refuses."""
    preds = net(torch.zeros(1, 3, *size)).preds
    several = sum(map(bool, found.values())) > 1
    for name, options in found.items():
        option = f"--decode.{name}" if several else "--decode"
        check_options(tasks[name].decode, options, option)
        as_user_error(option, tasks[name].decode, preds[name].float(), size, **options)


def _made(plan: Export, module: Exported, size: tuple[int, int], description: Mapping[str, Any]) -> Any:
    free = max(description["arch"]["strides"]) if plan.dynamic_size else None
    if plan.kind == "program":
        return program.to_program(module, size, free=free)
    opset = plan.opset or onnx.LEAST_OPSET
    return onnx.to_onnx(module, size, list(description["outputs"]), opset=opset, free=free)


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
    """Fill in how far a file is from PyTorch: raw outputs from the network's, decoded ones from what the
    tasks make of the file's raw outputs.

    run: images [B,3,H,W] in [0,1] -> the file's outputs by name.
    """
    options, size = result.description["decode"] or {}, tuple(images.shape[2:])
    for part in images.split(list(BATCHES)):
        found = run(part)
        result.gaps += parity.raw_gaps(net, found, part)
        result.decoded += [parity.decoded_gap(tasks[n], found, size, chosen) for n, chosen in options.items()]
    result.gaps, result.decoded = parity.worst(result.gaps), parity.together(result.decoded)
    return result


def require(result: Result, plan: Export) -> None:
    """Raise UserError where the file does not give what PyTorch gives."""
    tolerance = parity.TOLERANCE[plan.precision] if plan.tolerance is None else plan.tolerance
    for gap in result.gaps:
        if not gap.within(tolerance):
            raise UserError(
                f"--out: {plan.out} was not written: its output '{gap.output}' differs from PyTorch's by up "
                f"to {gap.absolute:.2e} ({gap.relative:.2e} of the largest value), more than {tolerance:g}: "
                "the network does what cannot be exported, such as choosing by a value or a batch size; "
                "or, where that is good enough, give --tolerance"
            )
    for gap in result.decoded:
        if not gap.is_close:
            raise UserError(
                f"--out: {plan.out} was not written: its decoding is not PyTorch's: {gap}, more than "
                f"{100 * gap.allowed:g} %; leave --decode out and decode its raw outputs elsewhere"
            )


# --- INT8


class _Data:
    """Images to calibrate on and to measure on. Raises UserError for data of other classes, before anything
    is exported."""

    def __init__(self, plan: Export, config: Any, arch: Mapping[str, Any]):
        build.check(config)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.config, self.size, self.uint8 = config, tuple(arch["input_size"]), plan.uint8
        classes = {name: part["classes"] for name, part in arch["tasks"].items()}
        self.val = build.open_sets(config, "val", classes, only=classes)
        check_data(self.val, arch, f"--checkpoint: {plan.checkpoint}")
        name, self.count = plan.calibrate or "train", plan.eval_images
        sets = config.data.sets("train")
        if name not in ("train", "val", *sets):
            known = ["train", "val", *sets]
            raise UserError(f"--calibrate: unknown set '{name}'; {did_you_mean(name, known)}")
        self.train = self.val if name == "val" else build.open_sets(config, "train", only=())  # images alone
        rows = self.train.rows(name) if name in sets else np.arange(len(self.train))
        count = min(plan.images or CALIBRATION, len(rows))
        self.rows = rows[np.linspace(0, len(rows) - 1, num=count, dtype=int)]

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

    def measure(
        self, content: bytes, description: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Task]]:
        """The metrics of an ONNX model on data.val, and its tasks."""
        _, run = onnx.runner(content, CPU)
        tasks = describe.tasks(description)
        metrics = evaluate(
            lambda images: describe.predictions(run(images), description),
            tasks,
            build.val_loader(self.config, self.val, self.size, self.count, CPU),
            CPU,
            decode=build.decode_options(self.config),
            on_skip=lambda message: log.warning("skipped: %s", message),
        )
        return metrics, tasks


def _quantised(model: Any, description: dict[str, Any], data: _Data) -> Any:
    """``model`` in INT8, with what it costs in ``description``.

    As much is quantised as loses at most LOSS points in every task; where nothing does, what loses least on
    average.
    """
    before, tasks = data.measure(model.SerializeToString(), description)
    measured = [{"precision": "fp32", "float": "everything", "figures": headline(before, tasks)}]
    best, best_score = None, -1.0
    for kept in quantise.FLOAT:
        made = quantise.quantised(model, data.calibration(), kept)
        after, _ = data.measure(made.SerializeToString(), description)
        measured.append({"precision": "int8", "float": kept, "figures": headline(after, tasks)})
        fits = all(_main(before, task) - _main(after, task) <= LOSS for task in tasks.items())
        if fits or main_score(after, tasks) > best_score:
            best, best_score, chosen = made, main_score(after, tasks), kept
        if fits:
            break
    if (lost := main_score(before, tasks) - best_score) > ENOUGH:
        log.warning("int8 loses %.1f points: calibrate on more images, or on images like those of use", lost)
    description["accuracy"] = {
        "images": before["images"],
        "float": chosen,
        "measured": measured,
        "calibrated_on": len(data.rows),
    }
    return best


def _main(metrics: Mapping[str, Any], task: tuple[str, Task]) -> float:
    """The main figure of a task (its name and itself); 0 where there is no truth."""
    return metrics[task[0]][task[1].main_metric] or 0.0
