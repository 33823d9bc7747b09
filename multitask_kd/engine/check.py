"""The proof, on one batch, that a run distils what its config says: every line passes, fails, or asks for a
look.

Nothing of it changes the run: weights, statistics and random states are put back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..batch import Batch
from ..build import decode_options
from ..build.distill import compared_heads, teacher_name
from ..distill.balance import by_part
from ..distill.objective import gradient_report, parts
from ..errors import UserError
from ..losses.det_mse import DetMSE
from ..models.maps import resized
from .evaluate import evaluate
from .log import clock
from .machine import peak_memory_mb
from .run import Run
from .step import StepResult, compute_step

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


def check_run(run: Run, optimizer: torch.optim.Optimizer) -> Proof:
    """Prove ``run`` on its first batch, and its teacher, where that is a file, on some validation images.

    Raises UserError only for what stops any training (an image that cannot be read, no memory).
    """
    with _untouched(run):
        batch = run.first_batch().to(run.device, channels_last=run.config.run.channels_last)
        try:
            pass_ = _Pass(run, batch)
        except (UserError, ValueError) as error:
            return Proof([Line(FAIL, "one step", str(error))], 0.0, _memory_mb(run.device))
        lines = [
            *_taps(run, pass_),
            *_classes(run),
            *_teacher(run),
            *_losses(run, pass_),
            *_pulls(run, pass_),
        ]
        lines += [*_relocated(run, pass_), *_sparse(run, pass_)]
        lines += [
            *_adapters(run, pass_, optimizer),
            *_optimizer(run, optimizer),
            _absent_from_checkpoint(run),
        ]
        return Proof(lines, pass_.seconds(), _memory_mb(run.device))


def require(proof: Proof) -> None:
    """Raise UserError with every line that failed."""
    if proof.failed:
        faults = "\n".join(f"  {line.what}: {line.detail}" for line in proof.failed)
        raise UserError(
            f"the check on the first batch failed:\n{faults}\n"
            "Mend it; tools/check.py shows every line. train.check=false would train all the same"
        )


def closing_line(proof: Proof, run: Run) -> str:
    """How many lines passed, and what the run will take."""
    passed = sum(line.verdict == PASS for line in proof.lines)
    look = [line for line in proof.lines if line.verdict == LOOK]
    line = f"check: {passed} of {len(proof.lines)} passed" + (f", {len(look)} to look at" if look else "")
    line += f", {len(proof.failed)} FAILED" if proof.failed else ""
    steps = run.config.train.steps
    line += f"; a step takes about {1000 * proof.step_seconds:.0f} ms, {steps} steps about {clock(proof.step_seconds * steps)}"
    return f"{line} and the evaluation; {proof.memory_mb} MB at most so far"


@contextmanager
def _untouched(run: Run) -> Iterator[None]:
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
    """One step on a batch with every weight where its schedule is largest, and what its taps gave."""

    def __init__(self, run: Run, batch: Batch):
        self.run, self.batch = run, batch
        at = [run.objective.weights_at(k / 20) for k in range(21)]
        self.largest = {
            name: max(weights[name] for weights in at) for name in at[0]
        }  # a schedule may begin or end with 0
        self.result = self._step()
        self.overwritten = self._overwritten()
        if any(self.overwritten.values()):
            self.result = self._step()  # with copies

    def _step(self) -> StepResult:
        return compute_step(self.run, self.batch, 0.0, weights=self.largest, penalty=False)

    def _overwritten(self) -> dict[str, list[str]]:
        members = self.run.teachers.members if self.run.teachers else {}
        found = {"student": self.run.distiller.tapped.overwritten()}
        return found | {name: member.tapped.overwritten() for name, member in members.items()}

    def tap(self, side: str, path: str) -> tuple[Any, int]:
        """What a module gave, and how often it was called."""
        if side == "student" or self.run.distiller.own_teacher:
            return self.result.taps.get(path), self.run.distiller.tapped.calls.get(path, 0)
        member, inner = self.run.teachers.tap(path)
        return self.result.teacher.taps.get(path), member.tapped.calls.get(inner, 0)

    def seconds(self) -> float:
        """Of a step without data and optimizer, the mean of two."""
        run, times = self.run, 2
        run.distiller.zero_grad(set_to_none=True)
        began = time.perf_counter()
        for _ in range(times):
            compute_step(run, self.batch, 0.0, weights=self.largest).total.backward()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return (time.perf_counter() - began) / times * run.config.train.accumulate


def _taps(run: Run, pass_: _Pass) -> Iterator[Line]:
    """Every tap fired once, on which shapes, and how the two were brought together."""
    size = tuple(pass_.batch.images.shape[2:])
    for name, term in run.distiller.terms.items():
        what = f"distill.{name} taps"
        taps = {"student": pass_.tap("student", term.student), "teacher": pass_.tap("teacher", term.teacher)}
        if any(calls != 1 for _, calls in taps.values()):
            counts = ", ".join(
                f"{side} {getattr(term, side)} fired {calls} times" for side, (_, calls) in taps.items()
            )
            yield Line(
                FAIL, what, f"a tap has to fire once in a step: {counts}; tap a module around or inside it"
            )
            continue
        shown = " and ".join(
            f"{side} {getattr(term, side)} {list(tap.shape)}" for side, (tap, _) in taps.items()
        )
        yield Line(PASS, what, f"{shown}: {_alignment(term, taps, size)}")
    for side, paths in pass_.overwritten.items():
        for path in paths:
            yield Line(
                LOOK,
                "tap",
                f"{side} {path} is written over by a module after it (in place); it is copied before that",
            )


def _alignment(term: Any, taps: Mapping[str, tuple[Any, int]], size: tuple[int, int]) -> str:
    """How a term brings its taps together, in words."""
    if term.task:
        return "predictions, compared as they are"
    with torch.no_grad():
        own, other = term.maps(*(tap for tap, _ in taps.values()), size)
        aligned, goal = resized(term.align(own.float()), other.float(), term.size)
    parts = (
        []
        if isinstance(term.align, nn.Identity)
        else [f"1x1 convolution {own.shape[1]} -> {other.shape[1]} channels"]
    )
    for who, before, after in (("student", own, aligned), ("teacher", other, goal)):
        if before.shape[2:] != after.shape[2:]:
            parts.append(f"{who} resampled to {after.shape[2]}x{after.shape[3]}")
    if term.norms is not None:
        parts.append("both normalised")
    return ", ".join(parts) or "as they are"


def _classes(run: Run) -> Iterator[Line]:
    """How the classes of every teacher meet the student's, by name, in every task that it teaches."""
    if run.teachers is None:
        return
    for task in [
        name for name in run.tasks if name in run.distiller.soft or name in compared_heads(run.config)
    ]:
        who = (
            run.teachers.subjects[task].teachers
            if task in run.teachers.subjects
            else list(run.teachers.members)
        )
        for name in who:
            yield _met(run, task, name, several=len(run.teachers.members) > 1)


def _met(run: Run, task: str, name: str, *, several: bool) -> Line:
    member, own = run.teachers.members[name], run.tasks[task].classes
    what = f"classes of {task}" + (f", {name}" if several else "")
    mapping = member.mappings.get(task)
    if task not in member.tasks:
        return Line(FAIL, what, "the teacher has none")
    if not run.tasks[task].has_classes:
        return Line(PASS, what, f"a task of kind {run.tasks[task].kind} has none")
    if mapping is None or mapping.same:
        return Line(PASS, what, f"{len(own)}, the same names in the same order")
    details = [f"{len(mapping.known)} of {len(own)} are known to the teacher"]
    details += [f"left to the labels: {', '.join(mapping.unknown)}"] if mapping.unknown else []
    details += [f"of no use here: {', '.join(mapping.unused)}"] if mapping.unused else []
    return Line(LOOK if mapping.unknown else PASS, what, "; ".join(details))


def _teacher(run: Run) -> Iterator[Line]:
    """The teachers are in eval, frozen, and as good as the config asks."""
    if run.teachers is None:
        own = run.distiller.own_teacher
        detail = (
            "the student's own deeper layers"
            if own
            else "nothing is distilled: every alpha is 0 and distill has no term"
        )
        yield Line(PASS if own else LOOK, "teacher", detail)
        return
    for name, member in run.teachers.members.items():
        who = "teacher" if len(run.teachers.members) == 1 else f"teacher {name}"
        training = [path or "the network" for path, module in member.net.named_modules() if module.training]
        learning = [path for path, parameter in member.net.named_parameters() if parameter.requires_grad]
        detail = (
            f"{training[0]} is in training mode" if training else "none of its modules is in training mode"
        )
        yield Line(FAIL if training else PASS, f"{who} in eval", detail)
        detail = f"{learning[0]} would learn" if learning else "none of its weights would learn"
        yield Line(FAIL if learning else PASS, f"{who} frozen", detail)
    if run.config.taught_by_average:
        yield Line(
            PASS, "teacher's own metric", "the average of the student's weights: nothing to measure yet"
        )
        return
    for key_path in run.config.named_teachers:
        yield from _teacher_metrics(run, key_path)


def _teacher_metrics(run: Run, key_path: str) -> Iterator[Line]:
    """What a teacher is worth on some validation images, at its own input size, over the classes that it
    knows."""
    section, name = run.config.named_teachers[key_path], teacher_name(key_path)
    member, who = run.teachers.members[name], f"{name}'s"
    tasks = {task: part for task, part in member.tasks.items() if task in run.tasks}
    metrics = evaluate(
        member,
        tasks,
        run.val_batches(section.check_images, workers=0, size=run.teachers.geometries[name].own),
        run.device,
        decode={task: options for task, options in decode_options(run.config).items() if task in tasks},
        channels_last=run.config.run.channels_last,
    )
    for task in section.floor:
        if task not in tasks:
            yield Line(
                FAIL,
                f"{who} {task}",
                "has a floor, but the teacher has no such task with the student's classes",
            )
    for task, part in tasks.items():
        score = part.main_score(metrics[task], member.known(task))
        shown = f"{part.main_metric} {'-' if score is None else f'{score:.1f}'} on {metrics['images']} validation images"
        floor = section.floor.get(task)
        if floor is None:
            yield Line(
                PASS,
                f"{who} {task}",
                f"{shown}; no floor is set ({key_path}.floor.{task}=60 would ask for 60)",
            )
        else:
            good = score is not None and score >= floor
            yield Line(
                PASS if good else FAIL, f"{who} {task}", f"{shown}; {key_path}.floor.{task} asks {floor:g}"
            )


def _losses(run: Run, pass_: _Pass) -> Iterator[Line]:
    """No loss is missing, not finite, or exactly 0."""
    for name in run.distiller.loss_names():
        loss = pass_.result.raw.get(name)
        if loss is None:
            yield Line(FAIL, name, "is missing in the batch: no image of it has labels for the task")
        elif not loss.isfinite():
            yield Line(FAIL, name, f"is {float(loss.detach())}")
        elif float(loss.detach()) == 0:
            if ".hard." in name:
                yield Line(LOOK, name, "is exactly 0: is there nothing of it in this batch?")
            elif run.config.taught_by_average:
                yield Line(LOOK, name, "is exactly 0: the average is still the student itself")
            else:
                yield Line(
                    FAIL, name, "is exactly 0: student and teacher give the same, or one of them is not used"
                )


def _pulls(run: Run, pass_: _Pass) -> Iterator[Line]:
    """Each part's share of the total and of the gradient, with every weight where its schedule is largest;
    one that moves nothing in the student fails."""
    total = float(pass_.result.total.detach())
    if not all(loss.isfinite() for loss in pass_.result.raw.values()):
        return
    if not math.isfinite(total):
        yield Line(FAIL, "total", f"is {total} though every loss is finite: a weight is too large")
        return
    shares = gradient_report(pass_.result.weighted, pass_.result.shared)
    largest: dict[str, float] = {}
    for name, weight in pass_.largest.items():
        largest[by_part(name)] = max(weight, largest.get(by_part(name), 0.0))
    groups = parts(pass_.result.weighted)
    for group, loss in groups.items():
        part = 100 * float(loss.detach()) / total if total else 0.0
        pull = shares.get(f"gradient/share/{group}", 0.0)
        detail = f"{part:.1f} % of the total, {pull:.1f} % of the gradient at the encoder's maps"
        hard = group.endswith(".hard")
        if largest[group] == 0:
            yield Line(LOOK, group, "its weight is 0 from beginning to end (alpha or ratio)")
        elif float(loss.detach()) == 0:
            continue  # _losses says so
        elif not _moves(loss, run.distiller.student):
            yield Line(FAIL, group, f"moves no weight of the student ({detail})")
        elif not hard and pull == 0:
            yield Line(
                LOOK,
                group,
                f"{part:.1f} % of the total; acts before the encoder's maps, where its pull is not measured",
            )
        elif not hard and (pull < LITTLE or pull > MUCH) and len(groups) > 1:
            key = f"{group}.weight" if group.startswith("distill.") else f"tasks.{group}.weight"
            yield Line(
                LOOK,
                group,
                f"{detail}: {'next to nothing' if pull < LITTLE else 'next to everything'}; see {key}",
            )
        else:
            yield Line(PASS, group, detail)


def _relocated(run: Run, pass_: _Pass) -> Iterator[Line]:
    """A loss that counts background cells like others, where the teacher's are made of scores at other
    locations."""
    for task, who in pass_.result.teacher.relocated.items() if pass_.result.teacher else ():
        if task not in run.distiller.soft:
            continue
        loss = run.distiller.soft[task]
        if isinstance(loss, DetMSE) and loss.weighting == "none":
            detail = (
                f"the cells of {' and '.join(sorted(who))} are not the student's: they are matched by "
                f"location, classes in "
                "proportion to a cell's best one, also where nothing is, and such cells count like any "
                "other; see "
                f"tasks.{task}.soft.options.weighting: teacher, or the loss det_soft"
            )
            yield Line(LOOK, f"{task}.soft cells", detail)


def _sparse(run: Run, pass_: _Pass) -> Iterator[Line]:
    """The penalty of sparse training beside the total, its weight where the schedule is largest."""
    if run.sparse is None:
        return
    at = max((k / 20 for k in range(21)), key=run.sparse.weight)
    total, weighted = run.sparse(pass_.result.total, pass_.result.weighted, at)
    share = 100 * float(weighted["sparse"].detach()) / (float(total.detach()) or 1.0)
    detail = f"{share:.1f} % of the total with it, at its largest weight {run.sparse.weight(at):g}"
    if not math.isfinite(share):
        yield Line(FAIL, "sparse", f"the penalty is {float(weighted['sparse'].detach())}")
    elif not LITTLE <= share <= MUCH:
        yield Line(
            LOOK,
            "sparse",
            f"{detail}: {'next to nothing' if share < LITTLE else 'next to everything'}; see sparse.weight",
        )
    else:
        yield Line(PASS, "sparse", detail)


def _moves(loss: Tensor, student: nn.Module) -> bool:
    if not loss.requires_grad:
        return False
    learning = [p for p in student.parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
    return any(part is not None and bool(part.any()) for part in parts)


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    """The identities of the tensors that an optimizer changes."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _adapters(run: Run, pass_: _Pass, optimizer: torch.optim.Optimizer) -> Iterator[Line]:
    """What learns besides the student gets a gradient and is in the optimizer."""
    pass_.result.total.backward()
    held = _held(optimizer)
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
            yield Line(
                PASS, f"{name} learns", f"{count} parameters, all in the optimizer and with a gradient"
            )


def _optimizer(run: Run, optimizer: torch.optim.Optimizer) -> Iterator[Line]:
    """The optimizer holds all that learns, and nothing of the teacher."""
    held = _held(optimizer)
    missing = [name for name, p in run.distiller.named_parameters() if p.requires_grad and id(p) not in held]
    yield Line(
        FAIL if missing else PASS,
        "optimizer",
        f"{missing[0]} is not in it" if missing else f"holds all {len(held)} tensors that learn",
    )
    if run.teachers is not None:
        foreign = [
            name
            for m in run.teachers.members.values()
            for name, p in m.net.named_parameters()
            if id(p) in held
        ]
        detail = f"holds the teacher's {foreign[0]}" if foreign else "holds nothing of the teacher"
        yield Line(FAIL if foreign else PASS, "optimizer and teacher", detail)


def _absent_from_checkpoint(run: Run) -> Line:
    """No tensor of the teacher is among those that a checkpoint saves."""
    saved = {value.data_ptr(): name for name, value in run.distiller.state_dict().items() if value.numel()}
    nets = [member.net for member in run.teachers.members.values()] if run.teachers else []
    own = [value for net in nets for value in (*net.parameters(), *net.buffers())]
    shared = [saved[value.data_ptr()] for value in own if value.numel() and value.data_ptr() in saved]
    detail = (
        f"{shared[0]} is the teacher's" if shared else f"{len(saved)} tensors, none of them the teacher's"
    )
    return Line(FAIL if shared else PASS, "checkpoint", detail)


def _memory_mb(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return peak_memory_mb()["training"]
