"""What a run says: console, TensorBoard, JSON lines. The same numbers in all three."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..errors import UserError


class RunLog:
    """Scalars of a run, in ``metrics.jsonl`` and ``tensorboard/``. A resumed run drops what was written after
    its ``step``."""

    def __init__(self, folder: Path, step: int = 0):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= step] if step else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def _lines(self) -> list[dict[str, Any]]:
        """What an earlier part of the run wrote; a line cut short by a crash is left out."""
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def scalars(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """kind: "train" or "val". Names are TensorBoard tags; None (nothing to measure) is written to the
        JSON alone."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        """picture: uint8 [H,W,3]."""
        self._board.add_image(name, picture, step, dataformats="HWC")

    def histogram(self, name: str, step: int, values: Tensor) -> None:
        """How ``values``, of any shape, are spread; in TensorBoard alone."""
        self._board.add_histogram(name, values, step)

    def text(self, name: str, text: str) -> None:
        self._board.add_text(name, text)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def flatten(metrics: Mapping[str, Any], prefix: str) -> dict[str, float | None]:
    """{"seg": {"mIoU": 1, "IoU": {"car": 2}}} -> {"val/seg/mIoU": 1, "val/seg/IoU/car": 2} for the prefix
    "val"."""
    flat: dict[str, float | None] = {}
    for key, value in metrics.items():
        name = f"{prefix}/{key}"
        flat |= flatten(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


class LossMeter:
    """Means of the losses since the last line, without a transfer from the device at each step."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._raw: dict[str, Tensor] = {}
        self._weighted: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, losses: Mapping[str, Tensor], weighted: Mapping[str, Tensor]) -> None:
        """losses: as the distiller gives them; weighted: as they stand in the total, by the same names and
        maybe more."""
        for sums, values in ((self._raw, losses), (self._weighted, weighted)):
            for name, loss in values.items():
                sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()
        for name in weighted:
            self._counts[name] = self._counts.get(name, 0) + 1

    def state(self) -> dict[str, Any]:
        """What a resumed run needs for its next line to be the unbroken run's."""
        return {"raw": self._raw, "weighted": self._weighted, "counts": self._counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._raw, self._weighted, self._counts = (
            dict(state["raw"]),
            dict(state["weighted"]),
            dict(state["counts"]),
        )

    def check_finite(self, step: int, gradient_norm: Tensor | None = None) -> None:
        """Raise UserError naming the losses that became nan or infinite, or the gradient. Waits for the
        device.

        gradient_norm: None where a loss scaler deals with infinite gradients.
        """
        names = list(self._weighted)
        finite = torch.stack([s.float() for s in self._weighted.values()]).isfinite().tolist()
        if bad := [name for name, ok in zip(names, finite, strict=True) if not ok]:
            raise UserError(
                f"step {step}: the loss {', '.join(bad)} is not finite. The last checkpoint is from before "
                f"it. Lower "
                "train.optimizer.lr or the weight of that loss, or set train.amp to none"
            )
        if gradient_norm is not None and not gradient_norm.isfinite():
            raise UserError(
                f"step {step}: the gradient is not finite though every loss is. The last checkpoint is from "
                f"before it. "
                "Lower train.optimizer.lr, or set train.amp to none"
            )

    def summary(self) -> dict[str, float]:
        """Of every loss: raw, weighted and its share of the total in percent; and the total."""
        mean = {name: float(sum_) / self._counts[name] for name, sum_ in self._weighted.items()}
        total = sum(mean.values())
        out = {"loss/total": total}
        for name, value in mean.items():
            if name in self._raw:
                out[f"raw/{name}"] = float(self._raw[name]) / self._counts[name]
            out[f"weighted/{name}"] = value
            out[f"share/{name}"] = 100 * value / total if total else 0.0
        return out


class Progress:
    """A bar with the time left on a terminal; on a pipe one plain line every time something is logged."""

    def __init__(self, steps: int, start: int, title: str):
        self.steps, self.start, self.began = steps, start, time.perf_counter()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=start, desc=title, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """Show the total loss, the tasks' parts of it, and the speed."""
        parts = " ".join(
            f"{name.removeprefix('weighted/')} {value:.3f}"
            for name, value in values.items()
            if name.startswith("weighted/")
        )
        line = f"loss {values['loss/total']:.3f}"
        if self.bar is not None:
            self.bar.set_postfix_str(line)
            return
        left = (time.perf_counter() - self.began) / max(1, step - self.start) * (self.steps - step)
        speed = f"{values['speed/images_per_second']:.0f} images/s"
        self.say(f"step {step}/{self.steps}  {line}  ({parts})  {speed}  {clock(left)} left")

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
