"""What a training step costs beyond the arithmetic nobody can avoid, and whether the loader keeps up."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..batch import Batch
from ..build import resolve_init
from ..config import Config
from ..distill.taps import Tapped
from ..errors import UserError
from .machine import machine
from .optim import Ema, make_optimizer
from .run import Run, prepare
from .step import compute_step
from .train import train

SETTLE = 10  # steps of every block that are not timed


def bench(config: Config, *, steps: int = 20, rounds: int = 9) -> dict[str, Any]:
    """Time ``rounds`` times: ``steps`` steps of ``train``, then of the bare loop of the same modules on ready
    batches.

    Returns milliseconds and ratios. ``step_over_bare_loop``: the mean step of the one over the mean step of
    the other, median over rounds, with all of them beside it (many short rounds, because a machine's speed
    drifts from minute to minute); the bare loop is teacher, student, losses, backward and optimizer.
    ``loader_over_student``: images a second of the loader alone over those that the student alone, without
    teacher, trains on. Raises UserError for steps or rounds below 1.
    """
    if steps < 1 or rounds < 1:
        raise UserError(f"--steps {steps} --rounds {rounds}: both must be at least 1")
    endless = config.train.model_copy(update={"steps": 10**6})
    run, _ = prepare(resolve_init(config.model_copy(update={"train": endless})))
    loader = _loader_rate(run)
    batches = _ready(run, 8)
    bare = _BareLoop(run, batches)
    ratios, full, least = [], [], []
    for _ in range(rounds):
        full.append(_train_step(config, steps))
        least.append(_mean_ms(bare.step, steps))
        ratios.append(full[-1] / least[-1])
    alone = _mean_ms(bare.student_step, steps)
    rate = config.train.batch_size / alone * 1000
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "batch_size": config.train.batch_size,
        "input_size": list(config.data.input_size),
        "step_ms": statistics.median(full),
        "bare_loop_ms": statistics.median(least),
        "step_over_bare_loop": statistics.median(ratios),
        "step_over_bare_loop_rounds": ratios,
        "student_step_ms": alone,
        "loader_workers": config.data.workers,
        "loader_images_per_second": loader,
        "student_images_per_second": rate,
        "loader_over_student": loader / rate,
        **bare.tapping(steps, rounds),
        "parts_ms": bare.parts(),
    }


def step_times(configs: Mapping[str, Config], *, steps: int = 10, rounds: int = 5) -> list[dict[str, Any]]:
    """Milliseconds of a bare step of every config, in turns, so that a machine's moods meet them all alike.

    Returns a row a config: ``name``, ``step_ms`` (median over rounds of the mean of ``steps`` steps),
    ``over_first``: that over the first config's of the same round, median. Raises UserError for steps or
    rounds below 1.
    """
    if steps < 1 or rounds < 1:
        raise UserError(f"--steps {steps} --rounds {rounds}: both must be at least 1")
    loops = {}
    for name, config in configs.items():
        run, _ = prepare(resolve_init(config))
        loops[name] = _BareLoop(run, _ready(run, 2))
    spent: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            spent[name].append(_mean_ms(loop.step, steps, settle=3))
    first = next(iter(spent.values()))
    return [
        {
            "name": name,
            "step_ms": statistics.median(times),
            "over_first": statistics.median(a / b for a, b in zip(times, first, strict=True)),
        }
        for name, times in spent.items()
    ]


def _ready(run: Run, count: int) -> list[Batch]:
    """The first batches of the run, on the device."""
    last = run.config.run.channels_last
    found = [b.to(run.device, channels_last=last) for b, _ in itertools.islice(run.train_batches(0), count)]
    return found


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mean_ms(work: Callable[[], Any], times: int, settle: int = SETTLE) -> float:
    for _ in range(settle):
        work()
    began = time.perf_counter()
    for _ in range(times):
        work()
    return 1000 * (time.perf_counter() - began) / times


def _train_step(config: Config, steps: int) -> float:
    """Mean milliseconds of ``steps`` steps of the real loop, from its own log, in a folder that is thrown
    away."""
    settle = -(-SETTLE // steps) * steps  # the log's first lines
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "run": config.run.model_copy(update={"dir": f"{folder}/run"}),
            # one step more, because the last one evaluates
            "train": config.train.model_copy(
                update={"steps": settle + steps + 1, "log_every": steps, "save_every": 10**6, "check": False}
            ),
            "eval": config.eval.model_copy(update={"images": 1, "pictures": 0}),
        }
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(config.model_copy(update=changes))
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    speed = next(
        line["speed/images_per_second"]
        for line in lines
        if line["kind"] == "train" and line["step"] == settle + steps
    )
    return 1000 * config.train.batch_size * config.train.accumulate / speed


def _loader_rate(run: Run, least_s: float = 5.0) -> float:
    """Images a second that the loader delivers when nothing else runs."""
    batches = iter(run.train_batches(0))
    for _ in range(8):  # processes have started and their queues have drained
        next(batches)
    began, images = time.perf_counter(), 0
    for batch, _ in batches:
        images += len(batch.images)
        if time.perf_counter() - began > least_s:
            break
    return images / (time.perf_counter() - began)


class _BareLoop:
    """Teacher, student, losses, backward and optimizer on batches that are ready, and nothing else."""

    def __init__(self, run: Run, batches: Iterable[Batch]):
        self.run, self.batches = run, itertools.cycle(batches)
        o = run.config.train.optimizer
        self.optimizer = make_optimizer(
            run.distiller, name=o.name, lr=1e-5, weight_decay=o.weight_decay, momentum=o.momentum
        )
        run.distiller.train()

    def _update(self, total: torch.Tensor) -> None:
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _sync(self.run.device)

    def step(self) -> None:
        self._update(compute_step(self.run, next(self.batches), 0.0).total)

    def tapping(self, steps: int, rounds: int) -> dict[str, float]:
        """``tapped_step_overhead``: what a step with the terms of ``distill`` takes beyond one without and
        the terms' own arithmetic, as a share of the one without; the median over rounds. Nothing where there
        are no terms."""
        if not self.run.distiller.terms:
            return {}
        found = []
        for _ in range(rounds):
            whole = _mean_ms(self.step, steps)
            with self._without_terms():
                least = _mean_ms(self.step, steps)
            own = sum(self._terms(steps).values())
            found.append((whole - least - own) / least)
        return {"tapped_step_overhead": statistics.median(found), "tapped_step_overhead_rounds": found}

    @contextlib.contextmanager
    def _without_terms(self) -> Iterator[None]:
        """The distiller and the teacher without terms and without their hooks."""
        distiller = self.run.distiller
        members = self.run.teachers.members.values() if self.run.teachers else ()
        before = distiller.terms, distiller.tapped, [member.tapped for member in members]
        distiller.terms = torch.nn.ModuleDict()
        distiller.tapped = Tapped(
            distiller.student, [p for c in distiller.through.values() for p in c.levels.values()]
        )
        for member in members:
            member.tapped = Tapped(member.net, [])
        try:
            yield
        finally:
            distiller.terms, distiller.tapped = before[:2]
            for member, tapped in zip(members, before[2], strict=True):
                member.tapped = tapped

    def _terms(self, times: int) -> dict[str, float]:
        """Milliseconds of each term alone: forward and backward down to the student's tap."""
        run, batch = self.run, next(self.batches)
        result = compute_step(run, batch, 0.0)
        taps = result.teacher.taps if result.teacher else result.taps
        size = tuple(batch.images.shape[2:])
        found = {}
        for name, term in run.distiller.terms.items():
            leaf = result.taps[term.student].detach().requires_grad_()
            target = batch.targets.get(term.task) if term.task else None
            work = lambda t=term, x=leaf, y=target: t(x, taps[t.teacher], size, y).backward()  # noqa: E731
            found[f"distill.{name}"] = self._timed(work, times)
        return found

    def student_step(self) -> None:
        """The hard losses alone."""
        run, batch = self.run, next(self.batches)
        with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
            preds = run.student(batch.images).preds
            size = tuple(batch.images.shape[2:])
            hard = [
                value
                for name, task in run.tasks.items()
                if name in batch.targets
                for value in task.losses(preds[name], batch.targets[name], size).values()
            ]
            if not hard:  # no task has labels: something of the predictions, for the way back
                hard = [pred.float().mean() for pred in preds.values()]
        self._update(sum(hard))

    def parts(self, times: int = 20) -> dict[str, float]:
        """Milliseconds of each part alone; a loss is its forward and its backward down to the predictions."""
        run, batch = self.run, next(self.batches)
        preds = run.student(batch.images).preds
        size = tuple(batch.images.shape[2:])
        found: dict[str, float] = {}
        taught = run.teachers(batch) if run.teachers else None
        if run.teachers:
            found["teacher forward"] = self._timed(lambda: run.teachers(batch), times)
        found["student forward"] = self._timed(lambda: run.student(batch.images), times)
        leaves = {k: p.detach().requires_grad_() for k, p in preds.items()}
        for name, task in run.tasks.items():
            if name in batch.targets:

                def hard(n=name, t=task) -> None:
                    sum(t.losses(leaves[n], batch.targets[n], size).values()).backward()

                found[f"{name}.hard"] = self._timed(hard, times)
            if name in run.distiller.soft and name not in run.distiller.through:
                soft = lambda n=name: run.distiller.soft_loss(n, leaves[n], taught, batch).backward()  # noqa: E731
                found[f"{name}.soft.{run.distiller.soft_names[name]}"] = self._timed(soft, times)
        found |= self._terms(times)
        compute_step(run, batch, 0.0).total.backward()
        found["optimizer"] = self._timed(self.optimizer.step, times)
        if run.config.train.ema:
            found["average of weights"] = self._timed(Ema(run.student, run.config.train.ema).update, times)
        return found

    def _timed(self, work: Callable[[], Any], times: int) -> float:
        def whole() -> None:
            work()
            _sync(self.run.device)

        return _mean_ms(whole, times)
