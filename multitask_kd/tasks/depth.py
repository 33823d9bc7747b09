"""Monocular depth: a light head on the finest pyramid level, L1 or the scale-invariant log loss, AbsRel, RMSE
and delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import IGNORE
from ..data.labels import Geometry, Spatial
from ..metrics.depth import DepthErrors
from ..models.decoders import Depth as DepthDecoder
from ..models.external import pick, shown
from ..models.maps import ignored_by_all, ignored_places, mask_at, resized
from ..report.colours import depth_colours
from ..report.layers import InsetLayer
from ..report.tables import Column
from .base import KINDS, Comparable, Saved, Task
from .maps import conv_block, letterboxed_map, packed_maps, restored_map
from .tallies import DepthTally

NEAREST, FARTHEST = 1e-3, 1e4  # metres that a prediction may be
STEP = 256  # a saved image counts in 1/256 of a metre, as KITTI's do
TYPICAL = 10.0  # metres that an untrained head predicts


class DepthHead(nn.Module):
    """Pyramid levels -> log of the depth in metres [B,1,H/s,W/s] at the finest stride s.

    depth: 3x3 convolutions before the last layer.
    """

    def __init__(self, width: int, levels: Sequence[int], classes: int, *, depth: int = 1):
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth: {depth} is below 0")
        self.strides = (min(levels),)
        self.tower = nn.Sequential(*(conv_block(width) for _ in range(depth)))
        self.log_depth = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.log_depth.bias, float(np.log(TYPICAL)))

    def forward(self, levels: Mapping[int, Tensor]) -> Tensor:
        return self.log_depth(self.tower(levels[self.strides[0]]))


class DepthOutput:
    """Where a network's depth [B,1,h,w] or [B,h,w] is in what it returns, and in which form.

    at: key or number, or several with a point between; null: the one such map that there is.
    form: "metres", "log" (of metres) or "inverse" (1 / metres). scale: what the values are multiplied by to
    become metres, before the form is undone.
    """

    def __init__(self, *, at: str | int | None = None, form: str = "metres", scale: float = 1.0):
        if form not in ("metres", "log", "inverse"):
            raise ValueError(f"form: '{form}' is none of metres, log, inverse")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale: {scale} is not a number above 0")
        self.at, self.form, self.scale = at, form, scale

    def read(self, returned: Any, classes: int, size: tuple[int, int]) -> Tensor:
        """Log metres [B,1,h,w]. Raises ValueError for anything else."""
        found = pick(
            returned,
            self.at,
            _is_depth,
            "a map of depth [B,1,h,w] or [B,h,w]",
            also=("depth", "predicted_depth"),
        )
        if not _is_depth(found):
            raise ValueError(f"{shown(found)} is no map of depth [B,1,h,w] or [B,h,w]")
        found = (found if found.dim() == 4 else found[:, None]).float() * self.scale
        if self.form == "log":
            return found
        log = (
            found.clamp(NEAREST, FARTHEST).log()
            if self.form == "metres"
            else -found.clamp(1 / FARTHEST, 1 / NEAREST).log()
        )
        return log

    def fault(self, pred: Tensor) -> str | None:
        """What is wrong with the values of a prediction: depths that are no metres of a scene."""
        low, high = float(pred.min().exp()), float(pred.max().exp())
        if pred.numel() and (high > FARTHEST * 0.99 or high < 0.05):
            return (
                f".form: the network's depths go from {low:.3g} to {high:.3g} metres; correct form or scale"
            )
        nearest = float((pred <= np.log(NEAREST)).float().mean())
        if nearest > 0.01 or not bool(torch.isfinite(pred).all()):
            return (
                f".form: {100 * nearest:.0f} % of the network's depths are 0 or below, or some are no numbers; "
                "correct form or scale, or let it say a depth everywhere"
            )
        return None


def _known(label: np.ndarray) -> np.ndarray:
    """Depths that a network here cannot say (above FARTHEST: an error of stereo, or the sky) as unknown, 0."""
    return np.where((label > 0) & (label <= FARTHEST), label, np.float32(0))


def _is_depth(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dim() == 3 or (x.dim() == 4 and x.shape[1] == 1))


@KINDS.register("depth")
class Depth(Task):
    """The error of the log depth over labelled pixels, d = log prediction - log truth.

    loss: "l1" is mean |d|; "silog" the scale-invariant loss mean d^2 - focus * (mean d)^2 (Eigen et al.,
    2014, equation 4); "metres" is mean |prediction - truth| in metres, which far pixels dominate.
    focus: 0 weighs the scale fully, 1 not at all.
    """

    Head = DepthHead
    Output = DepthOutput
    Tally = DepthTally
    has_classes = False
    is_map = True
    label_word = "depth"
    title = "depth"
    main_metric = "delta1"
    headline = ("delta1", "AbsRel")
    columns = (
        (
            Column(
                "delta1",
                "delta<1.25",
                1,
                1,
                "percent of the pixels whose depth is within a factor of 1.25 of the truth",
            ),
            Column("AbsRel", "AbsRel (ratio)", 3, -1, "mean of |prediction - truth| / truth, a ratio"),
            Column("RMSE", "RMSE (m)", 2, -1, "root of the mean squared error in metres"),
        ),
    )
    raw_output = "log of the depth in metres [batch, 1, height/stride, width/stride]"
    decoded_outputs = {"depth": "float32 [batch, height, width], metres"}

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        strides: Sequence[int],
        *,
        loss: str = "l1",
        focus: float = 0.5,
    ):
        super().__init__(name, (), strides)
        if loss not in ("l1", "silog", "metres"):
            raise ValueError(f"loss: '{loss}' is none of l1, silog, metres")
        if not 0 <= focus <= 1:
            raise ValueError(f"focus: {focus} is not in [0, 1]")
        self.loss, self.focus = loss, focus
        self.weights = {loss: 1.0}

    # --- labels: float32 [H,W] in metres, 0 where it is not known

    @staticmethod
    def to_spatial(label: np.ndarray, geometry: Geometry, size: tuple[int, int]) -> Spatial:
        """Negated, so that the 255 of what comes in from outside is no depth."""
        known = np.where(_known(label) > 0, -label, np.float32(IGNORE)).astype(np.float32)
        return Spatial([letterboxed_map(known, geometry, size, IGNORE)])

    @staticmethod
    def from_spatial(moved: Spatial, size: tuple[int, int], min_visible: float) -> np.ndarray:
        return np.where(moved.maps[0] < 0, -moved.maps[0], np.float32(0))

    @staticmethod
    def packed(labels: Sequence[np.ndarray | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """``depth`` float [B,H,W] in metres, 0 where it is not known; ``labelled`` bool [B]."""
        return packed_maps("depth", labels, np.zeros(size, np.float32))

    # --- training and evaluation

    def losses(self, pred: Tensor, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """pred: log metres [B,1,h,w]; target: ``depth`` [B,H,W] in metres, ``labelled`` [B]. Zero when
        nothing is labelled."""
        truth = target["depth"].float()
        known = (truth > 0) & target["labelled"][:, None, None]
        count = known.sum().clamp(min=1)
        log = F.interpolate(pred.float(), size=truth.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        if self.loss == "metres":
            error = log.clamp(max=float(np.log(FARTHEST))).exp() - truth
            return {"metres": (error.abs() * known).sum() / count}
        error = (log - truth.clamp(min=NEAREST).log()) * known
        if self.loss == "l1":
            return {"l1": error.abs().sum() / count}
        return {"silog": error.square().sum() / count - self.focus * (error.sum() / count).square()}

    def decode(self, pred: Tensor, size: tuple[int, int]) -> Tensor:
        """Log metres [B,1,h,w] -> metres [B,1,H,W]."""
        log = F.interpolate(pred.float(), size=size, mode="bilinear", align_corners=False)
        return log.clamp(float(np.log(NEAREST)), float(np.log(FARTHEST))).exp()

    def restore(self, decoded: Tensor, geometry: Geometry) -> Tensor:
        """Metres [1,H,W] of a letterboxed image -> metres [h,w] at the original size."""
        return restored_map(decoded, geometry)[0]

    def metric(self) -> DepthErrors:
        return DepthErrors()

    def score(self, metric: DepthErrors, prediction: Tensor, truth: Any) -> None:
        if (label := truth.labels.get(self.name)) is not None:
            metric.update(prediction.cpu().numpy(), _known(label))

    # --- pictures and files

    def label_layer(self, label: np.ndarray) -> InsetLayer:
        return InsetLayer(depth_colours(label), self.name)

    def prediction_layer(self, prediction: Tensor, least_score: float) -> InsetLayer:
        return InsetLayer(depth_colours(prediction.cpu().numpy()), self.name)

    def saved(self, prediction: Tensor) -> Saved:
        """A 16-bit image in 1/256 of a metre; 65535 is 256 m or more."""
        return Saved(image=(prediction.cpu().numpy() * STEP).round().clip(1, 65535).astype(np.uint16))

    # --- export

    def decoder(self, size: tuple[int, int], *, in_onnx: bool, options: Mapping[str, Any]) -> nn.Module:
        return DepthDecoder(size, nearest=NEAREST, farthest=FARTHEST)

    def from_decoded(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["depth"].float().clamp(NEAREST, FARTHEST).log()[:, None]

    def expected_shape(self, size: tuple[int, int]) -> dict[int, int]:
        return {1: 1}

    def decoded_gap(
        self, raw: Tensor, outputs: Mapping[str, Tensor], size: tuple[int, int], options: Mapping[str, Any]
    ) -> tuple[int, int, float, str]:
        expected, found = self.decode(raw, size)[:, 0], outputs["depth"].float()
        if expected.shape != found.shape:
            return expected.numel(), expected.numel(), 0.0, "pixels have another depth"
        return (
            int(((found / expected - 1).abs() > 1e-3).sum()),
            expected.numel(),
            1e-3,
            "pixels have another depth",
        )

    # --- teachers

    def average(
        self,
        preds: Sequence[Tensor],
        ignore_masks: Sequence[Tensor | None],
        known: Sequence[Sequence[int]],
        form: str,
    ) -> tuple[Tensor, Tensor | None]:
        """The mean of the log depths, at the finest map's height and width, over the teachers that do not
        ignore the pixel."""
        finest = max(preds, key=lambda p: p.shape[2] * p.shape[3])
        preds = [resized(finest, p, "student")[1].float() for p in preds]
        ignored = [ignored_places(m, finest[:, 0]) for m in ignore_masks]
        counts = torch.stack([~q for q in ignored]).float()[:, :, None]
        mean = (torch.stack(preds) * counts).sum(0) / counts.sum(0).clamp(min=1)
        return mean, ignored_by_all(ignore_masks, ignored)

    def comparable(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        ignore_mask: Tensor | None,
        target: Mapping[str, Tensor] | None,
        size: tuple[int, int],
        known: Sequence[int] | None,
        form: str,
    ) -> Comparable:
        """Both at the student's height and width."""
        _, teacher = resized(student, teacher, "student")
        return Comparable(
            student, teacher, None if ignore_mask is None else ~mask_at(ignore_mask, student.shape[2:])
        )
