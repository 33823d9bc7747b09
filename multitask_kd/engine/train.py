"""The loop, what it says, and what it saves."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import build, checkpoint
from ..atomic import write_text
from ..batch import Batch, ModelOutput
from ..build import Run, decode_options, recipe
from ..config import Config, dump
from ..distill.objective import gradient_report
from ..errors import UserError
from ..models.multitask import count_parameters
from ..precision import resolve_amp
from ..report.tables import metrics_table
from .check import LOOK, Proof, check_run, closing_line, require
from .evaluate import evaluate, evaluate_checkpoint, headline, main_score
from .folder import check_folder, clear_folder
from .log import LossMeter, Progress, RunLog, flatten
from .optim import Ema, lr_factor, make_optimizer
from .pictures import draw, draw_taught

log = logging.getLogger(__name__)


Judge = Callable[[int, dict[str, Any]], bool]  # step, metrics of its evaluation -> whether the run is to stop there


def train(config: Config, *, resume: bool = False, overwrite: bool = False, judge: Judge | None = None) -> dict[str, Any] | None:
    """Train as ``config`` says; returns the metrics of best.pt on all validation images, or None when a signal or the
    ``judge``, which sees every evaluation but the last, stopped the run early.

    Writes into ``run.dir``: config.yaml, best.pt, last.pt, metrics.jsonl, metrics.json, tensorboard/.
    Raises UserError for a bad config, bad data, a run folder in use, or a loss that is not finite.
    """
    config = build.resolve_init(config)
    folder = Path(config.run.dir)
    check_folder(folder, dump(config), resume=resume, overwrite=overwrite)
    needs = {f"{place}.path": t.path for place, t in config.named_teachers.items()} | {
        "model.weights": config.model.weights,
        "model.start": config.model.start,
    }
    for key, needed in needs.items():
        if needed and Path(needed).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{key}: {needed} lies in run.dir, where this run would write over it; change one of them")
    run, optimizer = ready(config)
    proof = check_run(run, optimizer) if config.distils and config.train.check else None
    if proof:
        require(proof)
    if not resume:
        clear_folder(folder)  # after all that can be wrong with a config: a typo must not cost the run that is there
    c, o, device, student = config.train, config.train.optimizer, run.device, run.student
    amp = resolve_amp(c.amp, device, "train.amp")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    ema = Ema(student, c.ema, own_average(run)) if c.ema else None
    meter = LossMeter()
    state = State(run, optimizer, scaler, ema, meter, folder)
    step = state.load() if resume else 0
    if step == 0:
        write_text(folder / "config.yaml", dump(config))

    journal = RunLog(folder, step)
    progress = Progress(c.steps, step, folder.name)
    stop = StopSignal()
    batches = iter(run.train_batches(step))
    since, waited, timed = time.perf_counter(), 0.0, 0
    skipped: list[str] = []
    judged = False
    pulls: dict[str, float] = {}  # how hard each loss pulls at the encoder's maps
    announce(run, progress)
    if proof:
        for line in (line for line in proof.lines if line.verdict == LOOK):
            progress.say(f"look: {line.what}: {line.detail}")
        progress.say(closing_line(proof, run))
    if step:
        progress.say(f"resumed at step {step}")
    else:
        journal.text("config", f"```\n{dump(config)}```")
        for name, picture in draw_taught(run, config.eval.pictures).items():
            journal.picture(f"teacher on unlabelled images/{name}", 0, picture)
    run.distiller.train()
    learning = list(run.distiller.parameters())
    try:
        with stop:
            while step < c.steps and not stop.requested:
                for group in optimizer.param_groups:
                    group["lr"] = o.lr * lr_factor(step, c.steps, o.warmup, o.final_lr)
                part = step / max(1, c.steps - 1)
                run.distiller.at(part)
                for part_of_step in range(c.accumulate):
                    before = time.perf_counter()
                    batch, messages = next(batches)
                    waited += time.perf_counter() - before
                    skipped += messages
                    batch = batch.to(device, channels_last=config.run.channels_last)
                    view = run.teachers(batch) if run.teachers else None
                    with torch.autocast(device.type, amp, enabled=amp is not None):
                        losses = run.distiller(batch, view)
                    total, weighted = run.objective(losses, part, run.distiller.shared)
                    if c.log_gradients and part_of_step == 0 and ((step + 1) % c.log_every == 0 or step + 1 == c.steps):
                        pulls = gradient_report(weighted, run.distiller.shared)
                    if run.sparse:
                        total, weighted = run.sparse(total, weighted, part)
                    scaler.scale(total / c.accumulate).backward()
                    meter.add(losses, weighted)
                step, timed = step + 1, timed + 1
                last = step == c.steps
                logs, evaluates = last or step % c.log_every == 0, last or step % (c.eval_every or c.steps) == 0
                saves = evaluates or stop.requested or step % c.save_every == 0
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(learning, c.clip or torch.inf, foreach=True)
                if device.type == "cpu" or logs or saves:  # elsewhere it would make every step wait for the device
                    meter.check_finite(step, None if scaler.is_enabled() else norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if ema:
                    ema.update()
                progress.step()

                if logs:
                    elapsed = time.perf_counter() - since
                    values = meter.summary() | {
                        "train/lr": optimizer.param_groups[0]["lr"],
                        "train/gradient_norm": float(norm),
                        "speed/images_per_second": timed * c.accumulate * c.batch_size / elapsed,
                        "speed/data_wait_percent": 100 * waited / elapsed,
                        "data/skipped": len(skipped),
                        **{f"schedule/{name}": value(part) for name, value in run.schedules.items()},
                        **pulls,
                        **{f"balance/{group}": float(factor) for group, factor in run.objective.factors.items()},
                        **by_set(run, batch, view),
                    }
                    journal.scalars("train", step, values)
                    progress.logged(step, values)
                    meter.reset()
                if evaluates:
                    metrics = run_evaluation(run, state.result(), journal, progress, step)
                    state.keep_best(metrics, step)
                    if run.sparse:
                        journal.histogram("sparse/scales", step, run.sparse.scales())
                    for name, picture in draw(run, state.result(), run.config.eval.pictures).items():
                        journal.picture(f"pictures/{name}", step, picture)
                    judged = bool(judge and not last and judge(step, metrics))
                    stop.requested |= judged
                if saves:
                    state.save(step)
                if logs or evaluates:
                    since, waited, timed = time.perf_counter(), 0.0, 0
            if stop.requested and step < c.steps:
                state.save(step)
                how = f"; go on with --config {folder / 'config.yaml'} --resume" if judge is None else ""
                progress.say(f"stopped at step {step}" + (", not worth more steps" if judged else how))
                return None
    finally:
        progress.close()
        journal.close()
        report_skipped(skipped)
    metrics = final_metrics(config, folder)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(metrics_table(metrics))
    print(f"result: {folder / 'best.pt'}    curves: tensorboard --logdir {folder}")
    return metrics


def ready(config: Config) -> tuple[Run, torch.optim.Optimizer]:
    """A run and its optimizer, as they are before the first step. Raises UserError."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    checkpoint.seed_everything(config.run.seed)
    run = recipe(config)
    if config.run.channels_last:
        run.distiller.to(memory_format=torch.channels_last)
    o = config.train.optimizer
    return run, make_optimizer(run.distiller, name=o.name, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum)


def check(config: Config) -> tuple[Proof, str]:
    """The proof of a run that is not begun, and its closing line. Raises UserError for what stops any run."""
    run, optimizer = ready(config)
    proof = check_run(run, optimizer)
    return proof, closing_line(proof, run)


def own_average(run: Run) -> torch.nn.Module | None:
    """The network of the teacher that is the average of the student's own weights."""
    return next(iter(run.teachers.members.values())).net if run.config.taught_by_average else None


def announce(run: Run, progress: Progress) -> None:
    """What learns from what: a line, and one for every set where there are several."""
    labels = sum(len(p.indices) for p in run.pools if p.labelled)
    rest = sum(len(p.indices) for p in run.pools if not p.labelled)
    members = run.teachers.members if run.teachers else {}
    who = "student" if members else "network"
    line = f"{who} {count_parameters(run.student) / 1e6:.2f} M parameters on {run.device}; {labels} labelled images"
    if rest:
        line += f" and {rest} unlabelled"
    for name, member in members.items():
        count = count_parameters(member.net)
        line += f"; {'teacher' if len(members) == 1 else name}" + (f" {count / 1e6:.2f} M" if count else "")
        line += (
            f" ({', '.join(task for task, s in run.teachers.subjects.items() if name in s.teachers)})" if len(members) > 1 else ""
        )
    progress.say(line)
    if len(run.train_layout.members) > 1:
        for line in sets_lines(run):
            progress.say(line)


@torch.no_grad()
def by_set(run: Run, batch: Batch, view: ModelOutput | None) -> dict[str, float]:
    """Where there are several sets: the hard and soft losses of each set's images in the last batch, before the step."""
    if len(run.train_layout.members) == 1:
        return {}
    found = {}
    names = [run.train_layout.set_of(index) for index in batch.indices.tolist()]
    preds, judged = run.distiller.said
    for name in dict.fromkeys(names):
        rows = torch.tensor([row for row, of in enumerate(names) if of == name], device=run.device)
        part = batch.of(rows)
        targets = {task: target for task, target in part.targets.items() if target["labelled"].any()}
        said = [{task: pred[rows] for task, pred in group.items()} for group in (preds, judged)]
        losses = run.distiller.compare(*said, replace(part, targets=targets), view and view.of(rows))
        found |= {f"set/{name}/{loss}": float(value) for loss, value in losses.items()}
    return found


def sets_lines(run: Run) -> list[str]:
    """By set: its images, what is labelled in them, and its places in every batch."""
    lines = []
    for name in run.train_layout.members:
        own = [p for p in run.pools if run.train_layout.set_of(p.indices[0]) == name]
        what = " and ".join(task for task in run.train_layout.labels(name) if task in run.tasks)
        counts = [f"{len(p.indices)} with {what}" if p.labelled else f"{len(p.indices)} without labels" for p in own]
        places = sum(p.share for p in own)
        lines.append(f"set {name}: " + (f"{', '.join(counts)}; {places} places of every batch" if own else "left out"))
    return lines


def final_metrics(config: Config, folder: Path) -> dict[str, Any]:
    """Of best.pt on all validation images: what tools/eval.py says of the file."""
    if config.eval.images is not None:
        return evaluate_checkpoint(config, str(folder / "best.pt"), "run.dir")
    return checkpoint.load(folder / "best.pt", "run.dir")["metrics"]


def evaluate_run(run: Run, net: torch.nn.Module) -> dict[str, Any]:
    return evaluate(
        net,
        run.tasks,
        run.val_batches(),
        run.device,
        decode=decode_options(run.config),
        channels_last=run.config.run.channels_last,
        on_skip=lambda message: log.warning("skipped: %s", message),
    )


def run_evaluation(run: Run, net: torch.nn.Module, journal: RunLog, progress: Progress, step: int) -> dict[str, Any]:
    """Metrics on the validation set, written to the journal and shown."""
    metrics = evaluate_run(run, net)
    journal.scalars("val", step, flatten(metrics, "val"))
    figures = "  ".join(f"{k} {'-' if v is None else f'{v:.1f}'}" for k, v in headline(metrics, run.tasks).items())
    progress.say(f"step {step}: validation on {metrics['images']} images: {figures}")
    return metrics


def report_skipped(messages: list[str]) -> None:
    broken = sorted(set(messages))
    for message in broken[:10]:
        log.warning("skipped: %s", message)
    if broken:
        log.warning("images that could not be read: %d; replaced %d times", len(broken), len(messages))


class State:
    """All that a run is at a step, on disk and back. The sampler has no state: batch i is a function of i."""

    def __init__(self, run: Run, optimizer: Any, scaler: Any, ema: Ema | None, meter: LossMeter, folder: Path):
        self.run, self.optimizer, self.scaler, self.ema = run, optimizer, scaler, ema
        self.meter, self.folder = meter, folder
        self.best = float("-inf")
        self.teacher, self.start = teachers_digest(run), start_digest(run)
        self.metrics: dict[str, Any] = {}

    def result(self) -> torch.nn.Module:
        """The network that is evaluated and saved: the average of weights where there is one."""
        return self.ema.net if self.ema else self.run.student

    def _content(self, step: int) -> dict[str, Any]:
        return {
            "arch": self.run.arch,
            "params": count_parameters(self.run.student),
            "labelled_images": sum(len(p.indices) for p in self.run.pools if p.labelled),
            "unlabelled_images": sum(len(p.indices) for p in self.run.pools if not p.labelled),
            "model": self.result().state_dict(),
            "metrics": self.metrics,
            "step": step,
            "config": dump(self.run.config),
        }

    def keep_best(self, metrics: dict[str, Any], step: int) -> None:
        """Write best.pt when the mean of the tasks' main metrics is the highest so far."""
        self.metrics = metrics
        score = main_score(metrics, self.run.tasks)
        if score > self.best:
            self.best = score
            checkpoint.save(self.folder / "best.pt", self._content(step))

    def save(self, step: int) -> None:
        resume = {
            "distiller": self.run.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "meter": self.meter.state(),
            "best": self.best,
            "random": checkpoint.random_state(),
            "teacher": self.teacher,
            "start": self.start,
        }
        checkpoint.save(self.folder / "last.pt", self._content(step) | {"resume": resume})

    def load(self) -> int:
        """Restore last.pt; returns its step."""
        path = self.folder / "last.pt"
        content = checkpoint.load(path, "--resume")
        if "resume" not in content:
            raise UserError(f"--resume: {path} holds a network but no state of training")
        resume = content["resume"]
        if resume.get("teacher") != self.teacher:
            files = " or ".join(t.path or t.source for t in self.run.config.named_teachers.values())
            raise UserError(
                f"--resume: {files} holds other weights than when the run began; put the teacher back, or start again with "
                "--overwrite"
            )
        if resume.get("start") != self.start:
            raise UserError(
                f"--resume: {self.run.config.model.start} holds other weights than when the run began; put the file back, or "
                "start again with --overwrite"
            )
        checkpoint.load_weights(self.run.distiller, resume["distiller"], "--resume")
        self.optimizer.load_state_dict(resume["optimizer"])
        self.scaler.load_state_dict(resume["scaler"])
        if self.ema:
            checkpoint.load_weights(self.ema.net, content["model"], "--resume")
            self.ema.updates = resume["ema_updates"]
        self.meter.restore(resume["meter"])
        self.best, self.metrics = resume["best"], content["metrics"]
        checkpoint.restore_random_state(resume["random"])
        return content["step"]


def teachers_digest(run: Run) -> str | None:
    """A fingerprint of what teaches, where it comes from files: of a checkpoint's weights; else of the file, which may hold a
    program besides, and of the weights where it is a folder or none."""
    if run.teachers is None or run.config.taught_by_average:
        return None
    found = []
    for (place, section), member in zip(run.config.named_teachers.items(), run.teachers.members.values(), strict=True):
        whole = section.source != "checkpoint" and section.path is not None and Path(section.path).is_file()
        found.append(checkpoint.file_digest(section.path, place) if whole else checkpoint.digest(member.net))
    return found[0] if len(found) == 1 else ",".join(found)


def start_digest(run: Run) -> str | None:
    """A fingerprint of the weights that training began from, where they are a whole network's."""
    path = run.config.model.start
    return None if path is None else checkpoint.digest_of(checkpoint.load(path, "model.start")["model"])


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop; the second stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
