"""The proof, on one batch, that a run distils what its config says: every line passes or fails.

Nothing of it changes the run: weights, statistics and random states are put back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..batch import Batch, View
from ..build import Recipe, decode_options
from ..build_distill import compared_heads
from ..distill.objective import by_part, gradient_report
from ..distill.term import as_map, resized
from ..errors import UserError
from ..precision import resolve_amp
from .evaluate import evaluate
from .log import clock
from .machine import peak_memory_mb

LITTLE, MUCH = 0.1, 95.0  # percent of the gradient: a loss below or above is worth a look
PASS, LOOK, FAIL = "pass", "look", "FAIL"


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. verdict: "pass", "look" (may be meant, is often a mistake) or "FAIL"."""

    verdict: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict:4}  {self.what:28}  {self.detail}"


@dataclass
class Proof:
    """lines of a check, the seconds that a step takes, and the most memory resident in MB."""

    lines: list[Line]
    step_seconds: float
    memory_mb: int

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if line.verdict == FAIL]


def check_run(run: Recipe, optimizer: torch.optim.Optimizer) -> Proof:
    """Prove ``run`` on its first batch and, where the teacher has a floor, on some validation images.

    Raises UserError only for what stops any training (an image that cannot be read, no memory).
    """
    with _untouched(run):
        batch = run.first_batch().to(run.device, channels_last=run.config.run.channels_last)
        try:
            pass_ = _Pass(run, batch)
        except (UserError, ValueError) as error:
            return Proof([Line(FAIL, "one step", str(error))], 0.0, _memory_mb(run.device))
        lines = [*_taps(run, pass_), *_classes(run), *_teacher(run), *_losses(run, pass_), *_pulls(run, pass_)]
        lines += [*_adapters(run, pass_, optimizer), *_optimizer(run, optimizer), _absent_from_checkpoint(run)]
        return Proof(lines, pass_.seconds(), _memory_mb(run.device))


def require(proof: Proof) -> None:
    """Raise UserError with every line that failed."""
    if proof.failed:
        faults = "\n".join(f"  {line.what}: {line.detail}" for line in proof.failed)
        raise UserError(f"the check of the first batch failed; see tools/check.py. What fails:\n{faults}")


def closing_line(proof: Proof, run: Recipe) -> str:
    """How many lines passed, and what the run will take."""
    passed = sum(line.verdict == PASS for line in proof.lines)
    look = [line for line in proof.lines if line.verdict == LOOK]
    line = f"check: {passed} of {len(proof.lines)} passed" + (f", {len(look)} to look at" if look else "")
    line += f", {len(proof.failed)} FAILED" if proof.failed else ""
    steps = run.config.train.steps
    line += f"; a step takes about {1000 * proof.step_seconds:.0f} ms, {steps} steps about {clock(proof.step_seconds * steps)}"
    return f"{line} without evaluation; {proof.memory_mb} MB at most so far"


@contextmanager
def _untouched(run: Recipe) -> Iterator[None]:
    """Weights, statistics, gradients, modes and random states of the run as they were before."""
    before = {name: value.clone() for name, value in run.distiller.state_dict().items()}
    random, training = checkpoint.random_state(), run.distiller.training
    try:
        run.distiller.train()
        yield
    finally:
        run.distiller.load_state_dict(before)
        run.distiller.train(training)
        run.distiller.zero_grad(set_to_none=True)
        checkpoint.restore_random_state(random)


class _Pass:
    """One forward pass of teacher and student on a batch, and one backward pass of all losses together."""

    def __init__(self, run: Recipe, batch: Batch):
        self.run, self.batch = run, batch
        self.amp = resolve_amp(run.config.train.amp, run.device, "train.amp")
        run.distiller.at(0.0)
        self.view, self.losses = self._forward()
        self.overwritten = self._overwritten()
        if any(self.overwritten.values()):
            self.view, self.losses = self._forward()  # with copies
        self.student_taps = dict(run.distiller.tapped.taps)
        # the weights at the middle of training, because a schedule may begin with 0
        self.total, self.weighted = run.objective(self.losses, 0.5, run.distiller.shared)

    def _forward(self) -> tuple[View | None, dict[str, Tensor]]:
        run = self.run
        view = run.teacher(self.batch.images) if run.teacher else None
        with torch.autocast(run.device.type, self.amp, enabled=self.amp is not None):
            return view, run.distiller(self.batch, view)

    def _overwritten(self) -> dict[str, list[str]]:
        found = {"student": self.run.distiller.tapped.overwritten()}
        return found | ({"teacher": self.run.teacher.tapped.overwritten()} if self.run.teacher else {})

    def tap(self, side: str, path: str) -> tuple[Any, int]:
        """What a module put out, and how often it was called."""
        of_student = side == "student" or self.run.distiller.own_teacher
        tapped = self.run.distiller.tapped if of_student else self.run.teacher.tapped
        taps = self.student_taps if of_student else self.view.taps
        return taps.get(path), tapped.calls.get(path, 0)

    def seconds(self) -> float:
        """Of a whole step without optimizer, when all is warm."""
        self.run.distiller.zero_grad(set_to_none=True)
        began = time.perf_counter()
        _, losses = self._forward()
        self.run.objective(losses, 0.5, self.run.distiller.shared)[0].backward()
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        return (time.perf_counter() - began) * self.run.config.train.accumulate


def _taps(run: Recipe, pass_: _Pass) -> Iterator[Line]:
    """Every tap fired once, on which shapes, and how the two were brought together."""
    size = tuple(pass_.batch.images.shape[2:])
    for name, term in run.distiller.terms.items():
        what = f"distill.{name} taps"
        taps = {"student": pass_.tap("student", term.student), "teacher": pass_.tap("teacher", term.teacher)}
        if silent := [f"{side} {getattr(term, side)}" for side, (_, calls) in taps.items() if calls != 1]:
            counts = ", ".join(f"{getattr(term, side)} fired {calls} times" for side, (_, calls) in taps.items())
            yield Line(FAIL, what, f"a tap has to fire once: {counts} ({' and '.join(silent)})")
            continue
        shown = " and ".join(f"{side} {getattr(term, side)} {list(tap.shape)}" for side, (tap, _) in taps.items())
        yield Line(PASS, what, f"{shown}: {_alignment(term, taps, size)}")
    for side, paths in pass_.overwritten.items():
        for path in paths:
            yield Line(LOOK, "tap", f"{side} {path} is written over by a module after it (in place); it is copied before that")


def _alignment(term: Any, taps: Mapping[str, tuple[Any, int]], size: tuple[int, int]) -> str:
    """How a term brings its taps together, in words."""
    if term.task:
        return "predictions, compared as they are"
    with torch.no_grad():
        own, other = (as_map(tap, size) for tap, _ in taps.values())
        aligned, goal = resized(term.align(own.float()), other.float(), term.size)
    parts = [] if isinstance(term.align, nn.Identity) else [f"1x1 convolution {own.shape[1]} -> {other.shape[1]} channels"]
    for who, before, after in (("student", own, aligned), ("teacher", other, goal)):
        if before.shape[2:] != after.shape[2:]:
            parts.append(f"{who} resampled to {after.shape[2]}x{after.shape[3]}")
    if term.norms is not None:
        parts.append("both normalised")
    return ", ".join(parts) or "as they are"


def _classes(run: Recipe) -> Iterator[Line]:
    """Teacher and student have the same classes, by name and in order, in every task that is taught."""
    if run.teacher is None:
        return
    for name in [name for name in run.tasks if name in run.distiller.soft or name in compared_heads(run.config)]:
        own, other = run.tasks[name].classes, run.teacher.tasks[name].classes
        verdict = PASS if own == other else FAIL
        yield Line(verdict, f"classes of {name}", f"{len(own)}, the same by name" if own == other else f"{own} against {other}")


def _teacher(run: Recipe) -> Iterator[Line]:
    """The teacher is in eval, frozen, and as good as the config asks."""
    if run.teacher is None:
        yield Line(PASS, "teacher", "the student's own deeper layers")
        return
    net = run.teacher.net
    training = [name or "the network" for name, module in net.named_modules() if module.training]
    learning = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    yield Line(FAIL if training else PASS, "teacher in eval", f"{training[0]} is in training mode" if training else "all of it")
    yield Line(FAIL if learning else PASS, "teacher frozen", f"{learning[0]} would learn" if learning else "all of it")
    if run.config.teacher.source == "ema":
        yield Line(PASS, "teacher's own metric", "the average of the student's weights: nothing to measure yet")
        return
    yield from _teacher_metrics(run)


def _teacher_metrics(run: Recipe) -> Iterator[Line]:
    floors = run.config.teacher.floor
    tasks = {name: task for name, task in run.teacher.tasks.items() if name in run.tasks}
    metrics = evaluate(
        run.teacher.net,
        tasks,
        run.val_batches(run.config.teacher.check_images, workers=0),
        run.device,
        decode={name: options for name, options in decode_options(run.config).items() if name in tasks},
        channels_last=run.config.run.channels_last,
    )
    for name, task in tasks.items():
        score = metrics[name][task.main_metric]
        shown = f"{task.main_metric} {'-' if score is None else f'{score:.1f}'} on {metrics['images']} validation images"
        floor = floors.get(name)
        if floor is None:
            yield Line(PASS, f"teacher's {name}", f"{shown}; teacher.floor.{name} sets no least one")
        else:
            good = score is not None and score >= floor
            yield Line(PASS if good else FAIL, f"teacher's {name}", f"{shown}; teacher.floor.{name} asks {floor:g}")


def _losses(run: Recipe, pass_: _Pass) -> Iterator[Line]:
    """No loss is missing, not finite, or exactly 0."""
    for name in run.distiller.loss_names():
        loss = pass_.losses.get(name)
        if loss is None:
            yield Line(FAIL, name, "is missing in the batch: no image of it has labels for the task")
        elif not loss.isfinite():
            yield Line(FAIL, name, f"is {float(loss.detach())}")
        elif float(loss.detach()) == 0:
            hard = ".hard." in name
            yield Line(LOOK if hard else FAIL, name, "is exactly 0" + (": nothing of it in this batch?" if hard else ""))


def _pulls(run: Recipe, pass_: _Pass) -> Iterator[Line]:
    """Each loss's share of the total and of the gradient; a loss that moves nothing in the student fails."""
    total = float(pass_.total.detach())
    if not all(loss.isfinite() for loss in pass_.losses.values()):
        return
    shares = gradient_report(pass_.weighted, run.distiller.shared)
    for group, loss in by_part(pass_.weighted).items():
        part = 100 * float(loss.detach()) / total if total else 0.0
        pull = shares.get(f"gradient/share/{group}", 0.0)
        detail = f"{part:.1f} % of the total, {pull:.1f} % of the gradient at the encoder's maps"
        hard = group.endswith(".hard")
        if not _moves(loss, run.distiller.student):
            yield Line(FAIL, group, f"moves no weight of the student ({detail})")
        elif not hard and (pull < LITTLE or pull > MUCH):
            yield Line(LOOK, group, f"{detail}: {'next to nothing' if pull < LITTLE else 'next to everything'}; see its weight")
        else:
            yield Line(PASS, group, detail)


def _moves(loss: Tensor, student: nn.Module) -> bool:
    if not loss.requires_grad:
        return False
    learning = [p for p in student.parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
    return any(part is not None and bool(part.any()) for part in parts)


def _adapters(run: Recipe, pass_: _Pass, optimizer: torch.optim.Optimizer) -> Iterator[Line]:
    """What learns besides the student gets a gradient and is in the optimizer."""
    pass_.total.backward()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, module in run.distiller.adapters().items():
        named = dict(module.named_parameters())
        outside = [key for key, p in named.items() if id(p) not in held]
        still = [key for key, p in named.items() if p.grad is None or not p.grad.any()]
        if outside:
            yield Line(FAIL, f"{name} learns", f"{outside[0]} is not in the optimizer")
        elif still:
            yield Line(FAIL, f"{name} learns", f"{still[0]} gets no gradient")
        else:
            count = sum(p.numel() for p in named.values())
            yield Line(PASS, f"{name} learns", f"{count} parameters, all in the optimizer and with a gradient")


def _optimizer(run: Recipe, optimizer: torch.optim.Optimizer) -> Iterator[Line]:
    """The optimizer holds all that learns, and nothing of the teacher."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in run.distiller.named_parameters() if p.requires_grad and id(p) not in held]
    yield Line(FAIL if missing else PASS, "optimizer", f"{missing[0]} is not in it" if missing else f"{len(held)} tensors, all")
    if run.teacher is not None:
        foreign = [name for name, p in run.teacher.net.named_parameters() if id(p) in held]
        detail = f"the teacher's {foreign[0]} is in it" if foreign else "apart"
        yield Line(FAIL if foreign else PASS, "optimizer and teacher", detail)


def _absent_from_checkpoint(run: Recipe) -> Line:
    """No tensor of the teacher is among those that a checkpoint saves."""
    saved = {value.data_ptr(): name for name, value in run.distiller.state_dict().items() if value.numel()}
    own = [] if run.teacher is None else [*run.teacher.net.parameters(), *run.teacher.net.buffers()]
    shared = [saved[value.data_ptr()] for value in own if value.numel() and value.data_ptr() in saved]
    detail = f"{shared[0]} is the teacher's" if shared else f"{len(saved)} tensors, none of them the teacher's"
    return Line(FAIL if shared else PASS, "checkpoint", detail)


def _memory_mb(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return peak_memory_mb()["training"]
