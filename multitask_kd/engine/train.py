"""The loop, and what it reports."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..atomic import write_text
from ..build import decode_options, resolve_init
from ..config import Config, dump
from ..distill.objective import gradient_report
from ..errors import UserError
from ..report.tables import metrics_table
from .announce import announce, by_set, report_skipped
from .check import LOOK, Proof, check_run, closing_line, require
from .evaluate import evaluate, evaluate_checkpoint, headline
from .folder import RESULTS, check_folder, clear_folder
from .log import LossMeter, Progress, RunLog, flatten
from .optim import Ema, lr_factor
from .pictures import draw, draw_taught
from .run import Run, prepare
from .state import State, StopSignal
from .step import compute_step

log = logging.getLogger(__name__)


Judge = Callable[
    [int, dict[str, Any]], bool
]  # step, metrics of its evaluation -> whether the run is to stop there


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, judge: Judge | None = None
) -> dict[str, Any] | None:
    """Train as ``config`` says; returns the metrics of best.pt on all validation images, or None when a
    signal or the ``judge``, which is called with every evaluation but the last, stopped the run early.

    Writes into ``run.dir``: config.yaml, best.pt, last.pt, metrics.jsonl, metrics.json, tensorboard/.
    Raises UserError for a bad config, bad data, a run folder in use, or a loss that is not finite.
    """
    init = resolve_init(config)
    config, folder = init.config, Path(config.run.dir)
    check_folder(folder, dump(config), resume=resume, overwrite=overwrite)
    _require_outside(folder, config)
    run, optimizer = prepare(init)
    proof = check_run(run, optimizer) if config.distils and config.train.check else None
    if proof:
        require(proof)
    if not resume:
        clear_folder(
            folder
        )  # after all that can be wrong with a config: a typo must not cost the run that is there
    c, o, device = config.train, config.train.optimizer, run.device
    scaler = torch.amp.GradScaler(device.type, enabled=run.amp == torch.float16)
    ema = Ema(run.student, c.ema, own_average(run)) if c.ema else None
    meter = LossMeter()
    state = State(run, optimizer, scaler, ema, meter, folder)
    step = state.load() if resume else 0
    if step == 0:
        write_text(folder / "config.yaml", dump(config))

    journal = RunLog(folder, step)
    progress_bar = Progress(c.steps, step, folder.name)
    stop = StopSignal()
    batches = iter(run.train_batches(step))
    since, waited, timed = time.perf_counter(), 0.0, 0
    skipped: list[str] = []
    judged = False
    shares: dict[str, float] = {}  # of each loss in the gradient at the encoder's maps
    _tell_beginning(run, proof, progress_bar, journal, step)
    run.distiller.train()
    learning = list(run.distiller.parameters())
    try:
        with stop:
            while step < c.steps and not stop.requested:
                # --- schedules
                for group in optimizer.param_groups:
                    group["lr"] = o.lr * lr_factor(step, c.steps, o.warmup, o.final_lr)
                progress = step / max(1, c.steps - 1)
                for forward_pass in range(c.accumulate):
                    # --- data
                    before = time.perf_counter()
                    batch, messages = next(batches)
                    waited += time.perf_counter() - before
                    skipped += messages
                    batch = batch.to(device, channels_last=config.run.channels_last)
                    # --- teachers, student, losses
                    result = compute_step(run, batch, progress)
                    if (
                        c.log_gradients
                        and forward_pass == 0
                        and ((step + 1) % c.log_every == 0 or step + 1 == c.steps)
                    ):
                        shares = gradient_report(result.weighted, result.shared)
                    # --- backward
                    scaler.scale(result.total / c.accumulate).backward()
                    meter.add(result.raw, result.weighted)
                # --- clip, update, average of weights
                step, timed = step + 1, timed + 1
                last = step == c.steps
                logs, evaluates = (
                    last or step % c.log_every == 0,
                    last or step % (c.eval_every or c.steps) == 0,
                )
                saves = evaluates or stop.requested or step % c.save_every == 0
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(learning, c.clip or torch.inf, foreach=True)
                if (
                    device.type == "cpu" or logs or saves
                ):  # elsewhere it would make every step wait for the device
                    meter.check_finite(step, None if scaler.is_enabled() else norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if ema:
                    ema.update()
                progress_bar.step()

                # --- log, evaluate, save
                if logs:
                    elapsed = time.perf_counter() - since
                    values = meter.summary() | {
                        "train/lr": optimizer.param_groups[0]["lr"],
                        "train/gradient_norm": float(norm),
                        "speed/images_per_second": timed * c.accumulate * c.batch_size / elapsed,
                        "speed/data_wait_percent": 100 * waited / elapsed,
                        "data/skipped": len(skipped),
                        **{f"schedule/{name}": value(progress) for name, value in run.schedules.items()},
                        **shares,
                        **{f"balance/{group}": float(factor) for group, factor in result.factors.items()},
                        **by_set(run, batch, result),
                    }
                    journal.scalars("train", step, values)
                    progress_bar.logged(step, values)
                    meter.reset()
                if evaluates:
                    metrics = run_evaluation(run, state.result(), journal, progress_bar, step)
                    state.keep_best(metrics, step)
                    _draw(run, state.result(), journal, step)
                    judged = bool(judge and not last and judge(step, metrics))
                    stop.requested |= judged
                if saves:
                    state.save(step)
                if logs or evaluates:
                    since, waited, timed = time.perf_counter(), 0.0, 0
            if stop.requested and step < c.steps:
                state.save(step)
                how = f"; go on with --config {folder / 'config.yaml'} --resume" if judge is None else ""
                progress_bar.say(f"stopped at step {step}" + (", not worth more steps" if judged else how))
                return None
    finally:
        progress_bar.close()
        journal.close()
        report_skipped(skipped)
    metrics = final_metrics(config, folder)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(metrics_table(metrics, run.tasks))
    print(f"result: {folder / 'best.pt'}    curves: tensorboard --logdir {folder}")
    return metrics


def _require_outside(folder: Path, config: Config) -> None:
    """Raise UserError where a file that the run needs lies in its own folder, where it would be written over."""
    needs = {f"{key_path}.path": t.path for key_path, t in config.named_teachers.items()}
    weights = config.model.weights
    needs |= {"model.weights": None if weights == "imagenet" else weights, "model.start": config.model.start}
    written = [folder / name for name in RESULTS]
    for key, needed in needs.items():
        if needed and any(Path(needed).resolve() == path.resolve() for path in written):
            raise UserError(
                f"{key}: {needed} lies in run.dir, where this run would write over it; change one of them"
            )


def _tell_beginning(
    run: Run, proof: Proof | None, progress_bar: Progress, journal: RunLog, step: int
) -> None:
    """What learns from what, what the check found, and the teachers' predictions on images without labels."""
    announce(run, progress_bar)
    if proof:
        for line in (line for line in proof.lines if line.verdict == LOOK):
            progress_bar.say(f"look: {line.what}: {line.detail}")
        progress_bar.say(closing_line(proof, run))
    if step:
        progress_bar.say(f"resumed at step {step}")
        return
    journal.text("config", f"```\n{dump(run.config)}```")
    for name, picture in draw_taught(run, run.config.eval.pictures).items():
        journal.picture(f"teacher on unlabelled images/{name}", 0, picture)


def _draw(run: Run, net: torch.nn.Module, journal: RunLog, step: int) -> None:
    if run.sparse:
        journal.histogram("sparse/scales", step, run.sparse.scales())
    for name, picture in draw(run, net, run.config.eval.pictures).items():
        journal.picture(f"pictures/{name}", step, picture)


def check(config: Config) -> tuple[Proof, str]:
    """The proof of a run that is not begun, and its closing line. Raises UserError for what stops any run."""
    run, optimizer = prepare(resolve_init(config))
    proof = check_run(run, optimizer)
    return proof, closing_line(proof, run)


def own_average(run: Run) -> torch.nn.Module | None:
    """The network of the teacher that is the average of the student's own weights."""
    return next(iter(run.teachers.members.values())).net if run.config.taught_by_average else None


def final_metrics(config: Config, folder: Path) -> dict[str, Any]:
    """Of best.pt on all validation images: what tools/eval.py prints of the file."""
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


def run_evaluation(
    run: Run, net: torch.nn.Module, journal: RunLog, progress_bar: Progress, step: int
) -> dict[str, Any]:
    """Metrics on the validation set, written to the journal and shown."""
    metrics = evaluate_run(run, net)
    journal.scalars("val", step, flatten(metrics, "val"))
    figures = "  ".join(
        f"{k} {'-' if v is None else f'{v:.1f}'}" for k, v in headline(metrics, run.tasks).items()
    )
    progress_bar.say(f"step {step}: validation on {metrics['images']} images: {figures}")
    return metrics
