"""Semantic segmentation: a light head on the finest pyramid level, cross-entropy, mIoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import IGNORE
from ..data.labels import Geometry, Spatial
from ..errors import UserError
from ..metrics.miou import MeanIoU
from ..models.decoders import Mask
from ..models.external import pick, shown
from ..models.maps import ignored_by_either, knows, mapped_logits, mask_at, mean_logits, of_classes, resized
from ..report.layers import MaskLayer
from ..report.tables import Column
from .base import KINDS, Comparable, Saved, Task
from .maps import conv_block, letterboxed_map, packed_maps, restored_map
from .tallies import MaskTally


class SegHead(nn.Module):
    """Pyramid levels -> logits [B,classes,H/s,W/s] at the finest stride s.

    depth: 3x3 convolutions before the classifier.
    """

    def __init__(self, width: int, levels: Sequence[int], classes: int, *, depth: int = 1):
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth: {depth} is below 0")
        self.strides = (min(levels),)
        self.tower = nn.Sequential(*(conv_block(width) for _ in range(depth)))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, levels: Mapping[int, Tensor]) -> Tensor:
        return self.classifier(self.tower(levels[self.strides[0]]))


class SemanticOutput:
    """Where a network's segmentation [B,C,h,w] is in what it returns, and in which form.

    at: key or number, or several with a point between (``0.out``); null: the one map that there is.
    form: "logits", "probability" (after softmax), or "binary": one logit, of the second of two classes.
    """

    def __init__(self, *, at: str | int | None = None, form: str = "logits"):
        if form not in ("logits", "probability", "binary"):
            raise ValueError(f"form: '{form}' is none of logits, probability, binary")
        self.at, self.form = at, form

    def read(self, returned: Any, classes: int, size: tuple[int, int]) -> Tensor:
        """Logits [B,C,h,w]. Raises ValueError for anything else."""
        found = pick(returned, self.at, _is_map, "a map [B,C,h,w]", also=("semantic", "out"))
        if not _is_map(found):
            raise ValueError(f"{shown(found)} is no map [B,C,h,w]")
        if self.form == "binary":
            if found.shape[1] != 1:
                raise ValueError(f"binary is one logit, but the network gives {found.shape[1]}; correct form")
            found = torch.cat([torch.zeros_like(found), found], dim=1)
        elif self.form == "probability":
            found = found.float().clamp(min=1e-8).log()  # 1e-8 is 0 in float16
        if found.shape[1] != classes:
            raise ValueError(
                f"the network gives {found.shape[1]} classes, but {classes} are named in `classes`"
            )
        return found

    def fault(self, pred: Tensor) -> str | None:
        """What is wrong with the values of a prediction: probabilities that are called logits, or the other
        way round."""
        pred = pred.float()
        if self.form == "logits" and pred.shape[1] > 1 and bool((pred >= 0).all()) and _add_up(pred, 1e-3):
            return ".form: the network's values are probabilities, which add up to 1; set it to probability"
        if self.form == "probability" and bool((pred > 1e-3).any()):  # logarithms here
            return f".form: the network's values reach {float(pred.max().exp()):.3g}, so they are no probabilities"
        if self.form == "probability" and not _add_up(pred.exp(), 0.02):
            return (
                ".form: the network's values do not add up to 1: they are no probabilities; set it to logits"
            )
        return None


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4


def _add_up(p: Tensor, tolerance: float) -> bool:
    return bool(((p.sum(1) - 1).abs() <= tolerance).all())


def class_counts(mask: Tensor, classes: int, height: int, width: int) -> Tensor:
    """How many pixels of each class lie in each cell: mask long [B,H,W], IGNORE not counted -> float
    [B,classes,height,width]."""
    rows = torch.arange(mask.shape[1], device=mask.device) * height // mask.shape[1]
    columns = torch.arange(mask.shape[2], device=mask.device) * width // mask.shape[2]
    cell = rows[:, None] * width + columns
    kind = mask.masked_fill(mask == IGNORE, classes)
    counts = torch.zeros(len(mask), (classes + 1) * height * width, device=mask.device)
    counts.scatter_add_(
        1,
        (kind * (height * width) + cell).flatten(1),
        torch.ones((), device=mask.device).expand(mask.shape).flatten(1),
    )
    return counts.view(len(mask), classes + 1, height, width)[:, :classes]


@KINDS.register("semantic")
class Semantic(Task):
    """Cross-entropy over labelled pixels, and for thin or rare classes dice.

    resolution: "head" holds every pixel against the logits of the cell it lies in, at the cost of the head's
    stride; "image" upsamples the logits first (tens of times the cost and memory).
    label_smoothing: in [0, 1).
    class_weights: class name -> weight of its pixels in the cross-entropy, 1 where it is not named; the sum
    is divided by the sum of the weights of the counted pixels, as torch.nn.functional.cross_entropy does.
    focal: gamma of the focal loss (Lin et al., RetinaNet, 2017): a pixel's cross-entropy times (1 - p of its
    class)^gamma; 0 is plain.
    dice: weight of the soft dice loss (Milletari et al., V-Net, 2016), 1 - 2 sum(p t) / (sum p + sum t) over
    the batch's labelled pixels, mean over the classes that occur in them; 0 leaves it out.
    """

    Head = SegHead
    Output = SemanticOutput
    Tally = MaskTally
    is_map = True
    label_word = "mask"
    title = "segmentation"
    main_metric = "mIoU"
    headline = ("mIoU",)
    columns = (
        (
            Column("mIoU", "mIoU", 1, 1, "mean intersection over union of the masks"),
            Column("pixel_accuracy", "pixel accuracy", 1, 1, "share of the pixels whose class is right"),
        ),
    )
    by_class = ("IoU",)
    raw_output = "logits [batch, classes, height/stride, width/stride]"
    decoded_outputs = {"mask": "uint8 [batch, height, width], class of every pixel of the input"}

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        strides: Sequence[int],
        *,
        resolution: str = "head",
        label_smoothing: float = 0.0,
        class_weights: dict[str, float] | None = None,
        focal: float = 0.0,
        dice: float = 0.0,
    ):
        super().__init__(name, classes, strides)
        if len(self.classes) > IGNORE:
            raise UserError(
                f"data.classes.{name}: {len(self.classes)} classes are more than the {IGNORE} that a mask of "
                "bytes can tell apart; merge some with rename"
            )
        if resolution not in ("head", "image"):
            raise ValueError(f"resolution: '{resolution}' is neither 'head' nor 'image'")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not in [0, 1)")
        for key, value in (("focal", focal), ("dice", dice)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{key}: {value} is not a number of at least 0")
        self.resolution, self.label_smoothing, self.focal = resolution, label_smoothing, focal
        self.class_weights, self._named = self._class_weights(class_weights), tuple(class_weights or ())
        self.weights = {"ce": 1.0} | ({"dice": dice} if dice else {})

    def _class_weights(self, given: Mapping[str, float] | None) -> list[float] | None:
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise ValueError(f"class_weights: a mapping of class name -> weight is needed, not {given!r}")
        for name, weight in given.items():
            if (
                isinstance(weight, bool)
                or not isinstance(weight, (int, float))
                or not 0 <= weight < float("inf")
            ):
                raise ValueError(
                    f"class_weights.{name}: {weight!r} is no weight; give a number of at least 0"
                )
        weights = [float(given.get(name, 1.0)) for name in self.classes]
        if weights and not any(weights):
            raise ValueError("class_weights: every weight is 0, so nothing would be learnt")
        return weights

    def check_names(self) -> None:
        if unknown := [n for n in self._named if n not in self.classes]:
            raise ValueError(
                f"class_weights.{unknown[0]}: the task has no class '{unknown[0]}'; it has "
                f"{', '.join(self.classes)}"
            )

    # --- labels

    @staticmethod
    def class_table(names: Sequence[str | None], known: Sequence[str]) -> np.ndarray:
        """uint8 [256]: the run's class by the set's; classes left out and all other values are IGNORE."""
        table = np.full(256, IGNORE, dtype=np.uint8)
        table[: len(names)] = [IGNORE if name is None else list(known).index(name) for name in names]
        return table

    @staticmethod
    def renumbered(label: np.ndarray, table: np.ndarray) -> np.ndarray:
        return table[label]

    @staticmethod
    def only_known(label: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Pixels of classes that the set does not label are ignored: they may be of any of those."""
        table = np.full(256, IGNORE, dtype=np.uint8)
        table[np.flatnonzero(known)] = np.flatnonzero(known)
        return table[label]

    @staticmethod
    def to_spatial(label: np.ndarray, geometry: Geometry, size: tuple[int, int]) -> Spatial:
        return Spatial([letterboxed_map(label, geometry, size, IGNORE)])

    @staticmethod
    def from_spatial(moved: Spatial, size: tuple[int, int], min_visible: float) -> np.ndarray:
        return moved.maps[0]

    @staticmethod
    def packed(labels: Sequence[np.ndarray | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """``mask`` uint8 [B,H,W] (IGNORE is not counted), ``labelled`` bool [B]."""
        return packed_maps("mask", labels, np.full(size, IGNORE, np.uint8))

    # --- training and evaluation

    def losses(self, pred: Tensor, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """pred: logits [B,C,h,w]; target: ``mask`` uint8 [B,H,W], ``labelled`` [B]. Zero when nothing is
        labelled."""
        logits = pred.float()
        mask = target["mask"].long().masked_fill(~target["labelled"][:, None, None], IGNORE)
        if self.resolution == "image":
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            if not (self.focal or self.class_weights or "dice" in self.weights):
                total = F.cross_entropy(
                    logits, mask, ignore_index=IGNORE, reduction="sum", label_smoothing=self.label_smoothing
                )
                return {"ce": total / (mask != IGNORE).sum().clamp(min=1)}
        counts = class_counts(mask, logits.shape[1], *logits.shape[2:])
        found = {"ce": self._cross_entropy(logits, counts)}
        if "dice" in self.weights:
            found["dice"] = dice_loss(logits, counts)
        return found

    def _cross_entropy(self, logits: Tensor, counts: Tensor) -> Tensor:
        """counts: pixels of each class in each cell [B,C,h,w]."""
        log_p = F.log_softmax(logits, dim=1)
        if self.class_weights is not None:
            counts = counts * logits.new_tensor(self.class_weights).view(1, -1, 1, 1)
        if self.focal:
            # held above 0: a gamma below 1 has an infinite slope there
            log_p = log_p * (1 - log_p.exp()).clamp(min=1e-6).pow(self.focal)
        pixels = counts.sum(1, keepdim=True)
        targets = (1 - self.label_smoothing) * counts + self.label_smoothing * pixels / logits.shape[1]
        return -(targets * log_p).sum() / pixels.sum().clamp(min=1)

    def decode(self, pred: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [B,C,h,w] -> logits [B,C,H,W]; the class is chosen after ``restore``, at the original size."""
        return F.interpolate(pred.float(), size=size, mode="bilinear", align_corners=False)

    def restore(self, decoded: Tensor, geometry: Geometry) -> Tensor:
        """Logits [C,H,W] of a letterboxed image -> class indices uint8 [h,w] at the original size."""
        logits = restored_map(decoded, geometry)
        return logits.max(0).indices.to(torch.uint8)  # as argmax, four times faster on CPU

    def metric(self) -> MeanIoU:
        return MeanIoU(self.classes)

    def score(self, metric: MeanIoU, prediction: Tensor, truth: Any) -> None:
        if (mask := truth.labels.get(self.name)) is not None:
            metric.update(prediction.cpu().numpy(), mask, truth.known.get(self.name))

    # --- pictures and files

    def label_layer(self, label: np.ndarray) -> MaskLayer:
        return MaskLayer(label, self.classes)

    def prediction_layer(self, prediction: Tensor, least_score: float) -> MaskLayer:
        return MaskLayer(prediction.cpu().numpy(), self.classes)

    def saved(self, prediction: Tensor) -> Saved:
        """The mask as an index image."""
        return Saved(image=prediction.cpu().numpy())

    # --- export

    def decoder(self, size: tuple[int, int], *, in_onnx: bool, options: Mapping[str, Any]) -> nn.Module:
        return Mask(size)

    def from_decoded(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """A mask -> logits of 0 and 1."""
        return F.one_hot(outputs["mask"].long(), len(self.classes)).movedim(-1, 1).float()

    def decoded_gap(
        self, raw: Tensor, outputs: Mapping[str, Tensor], size: tuple[int, int], options: Mapping[str, Any]
    ) -> tuple[int, int, float, str]:
        expected, found = self.decode(raw, size).argmax(1), outputs["mask"]
        if expected.shape != found.shape:
            return expected.numel(), expected.numel(), MASK_SHARE, "pixels have another class"
        return (
            int((expected != found.long()).sum()),
            expected.numel(),
            MASK_SHARE,
            "pixels have another class",
        )

    # --- teachers

    def mapped(self, pred: Tensor, mapping: Any) -> tuple[Tensor, Tensor | None]:
        return mapped_logits(pred, mapping)

    def average(
        self,
        preds: Sequence[Tensor],
        ignore_masks: Sequence[Tensor | None],
        known: Sequence[Sequence[int]],
        form: str,
    ) -> tuple[Tensor, Tensor | None]:
        return mean_logits(preds, ignore_masks, known)

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
        """Logits of the classes that both know, at the student's height and width; pixels labelled as another
        class are left out."""
        _, teacher = resized(student, teacher, "student")
        ignored = None if ignore_mask is None else mask_at(ignore_mask, student.shape[2:])
        if known is not None:
            if target is not None:
                other = self._of_unknown_classes(target, known, student.shape[2:])
                ignored = ignored_by_either(ignored, other)
            student, teacher = of_classes(student, teacher, known)
        return Comparable(student, teacher, None if ignored is None else ~ignored)

    @staticmethod
    def _of_unknown_classes(
        target: Mapping[str, Tensor], known: Sequence[int], size: Sequence[int]
    ) -> Tensor:
        """Cells with a pixel that is labelled as a class that the teachers do not know: bool [B,h,w]."""
        unknown = ~knows(256, [*known, IGNORE], target["mask"])
        return mask_at(unknown[target["mask"].long()] & target["labelled"][:, None, None], size)


MASK_SHARE = 1e-3  # of pixels, where two classes' logits are the same to rounding


def dice_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """1 - 2 sum(p t) / (sum p + sum t), mean over the classes with labelled pixels; counts: pixels by class
    and cell [B,C,h,w]."""
    p, pixels = logits.softmax(1), counts.sum(1, keepdim=True)
    both, each = (p * counts).sum((0, 2, 3)), (p * pixels + counts).sum((0, 2, 3))
    occurs = (counts.sum((0, 2, 3)) > 0).float()
    return ((1 - 2 * both / each.clamp(min=1e-6)) * occurs).sum() / occurs.sum().clamp(min=1)
