"""Classification of the whole image: a pooled head on the encoder, cross-entropy, top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.accuracy import Accuracy
from ..models.decoders import Label
from ..models.external import pick, shown
from ..models.maps import ignored_by_either, knows, mapped_logits, mean_logits, of_classes
from ..report.layers import TextLayer
from ..report.tables import Column
from .base import KINDS, Comparable, Saved, Task
from .tallies import ClassTally

UNLABELLED = -100  # cross_entropy's own


class PooledHead(nn.Module):
    """The encoder's coarsest map -> logits [B,classes]: mean over the image, dropout, linear layer.

    dropout: share of the pooled features that are dropped in training.
    """

    reads_encoder = True

    def __init__(
        self, channels: Mapping[int, int], levels: Sequence[int], classes: int, *, dropout: float = 0.0
    ):
        """channels: of the encoder's maps, by stride."""
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is not in [0, 1)")
        self.strides = (max(levels),)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels[self.strides[0]], classes)

    def forward(self, maps: Mapping[int, Tensor]) -> Tensor:
        return self.classifier(self.dropout(maps[self.strides[0]].mean((2, 3))))


class ClassOutput:
    """Where a network's class scores [B,C] are in what it returns, and in which form.

    at: key or number, or several with a point between (``0.logits``); null: the one tensor [B,C] that there
    is.
    form: "logits" or "probability" (after softmax).
    """

    def __init__(self, *, at: str | int | None = None, form: str = "logits"):
        if form not in ("logits", "probability"):
            raise ValueError(f"form: '{form}' is neither logits nor probability")
        self.at, self.form = at, form

    def read(self, returned: Any, classes: int, size: tuple[int, int]) -> Tensor:
        """Logits [B,C]. Raises ValueError for anything else."""
        found = pick(returned, self.at, _is_vector, "class scores [B,C]", also=("logits",))
        if not _is_vector(found):
            raise ValueError(f"{shown(found)} is no [B,C]")
        if found.shape[1] != classes:
            raise ValueError(
                f"the network gives {found.shape[1]} classes, but {classes} are named in `classes`"
            )
        return found.float().clamp(min=1e-8).log() if self.form == "probability" else found

    def fault(self, pred: Tensor) -> str | None:
        """What is wrong with the values of a prediction: probabilities that are called logits, or the other
        way round."""
        pred = pred.float()
        if self.form == "logits" and pred.shape[1] > 1 and bool((pred >= 0).all()) and _add_up(pred, 1e-3):
            return ".form: the network's values are probabilities, which add up to 1; set it to probability"
        if self.form == "probability" and (bool((pred > 1e-3).any()) or not _add_up(pred.exp(), 0.02)):
            return ".form: the network's values are no probabilities that add up to 1; set it to logits"
        return None


def _is_vector(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2


def _add_up(p: Tensor, tolerance: float) -> bool:
    return bool(((p.sum(1) - 1).abs() <= tolerance).all())


@KINDS.register("classification")
class Classification(Task):
    """Cross-entropy over labelled images.

    label_smoothing: in [0, 1).
    """

    Head = PooledHead
    Output = ClassOutput
    Tally = ClassTally
    coloured = False
    label_word = "class"
    title = "classification"
    main_metric = "top1"
    headline = ("top1",)
    columns = (
        (
            Column("top1", "top-1", 1, 1, "share of the images whose likeliest class is right"),
            Column("top5", "top-5", 1, 1, "share of the images whose class is among the five likeliest"),
        ),
    )
    by_class = ("accuracy",)
    raw_output = "logits [batch, classes]"
    decoded_outputs = {
        "label": "int64 [batch], the likeliest class",
        "score": "float32 [batch], its probability",
    }

    def __init__(
        self, name: str, classes: Sequence[str], strides: Sequence[int], *, label_smoothing: float = 0.0
    ):
        super().__init__(name, classes, strides)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not in [0, 1)")
        self.label_smoothing = label_smoothing
        self.weights = {"ce": 1.0}

    # --- labels

    @staticmethod
    def renumbered(label: int, table: np.ndarray) -> int | None:
        index = int(table[label])
        return None if index < 0 else index

    @staticmethod
    def only_known(label: int, known: np.ndarray) -> int | None:
        return label if known[label] else None

    @staticmethod
    def packed(labels: Sequence[int | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """``class`` long [B], ``labelled`` bool [B]."""
        classes = torch.tensor([UNLABELLED if label is None else int(label) for label in labels])
        return {"class": classes, "labelled": classes != UNLABELLED}

    # --- training and evaluation

    def losses(self, pred: Tensor, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """pred: logits [B,C]; target: ``class`` [B], ``labelled`` [B]. Zero when nothing is labelled."""
        classes = target["class"].masked_fill(~target["labelled"], UNLABELLED)
        total = F.cross_entropy(
            pred.float(),
            classes,
            ignore_index=UNLABELLED,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return {"ce": total / target["labelled"].sum().clamp(min=1)}

    def decode(self, pred: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [B,C] -> probabilities [B,C]."""
        return pred.float().softmax(1)

    def metric(self) -> Accuracy:
        return Accuracy(self.classes)

    def score(self, metric: Accuracy, prediction: Tensor, truth: Any) -> None:
        if (label := truth.labels.get(self.name)) is not None:
            metric.update(prediction.cpu().numpy(), label)

    # --- pictures and files

    def label_layer(self, label: int) -> TextLayer:
        return TextLayer(f"{self.name}: {self.classes[label]}")

    def prediction_layer(self, prediction: Tensor, least_score: float) -> TextLayer:
        score, best = prediction.max(0)
        return TextLayer(f"{self.name}: {self.classes[int(best)]} {float(score):.2f}")

    def saved(self, prediction: Tensor) -> Saved:
        """The likeliest class's name and its probability."""
        score, best = prediction.max(0)
        return Saved(value={"class": self.classes[int(best)], "score": float(f"{float(score):.9g}")})

    # --- export

    def decoder(self, size: tuple[int, int], *, in_onnx: bool, options: Mapping[str, Any]) -> nn.Module:
        return Label()

    def from_decoded(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Class and its probability -> logits; the other classes share the rest evenly."""
        label, score = outputs["label"].long(), outputs["score"].float().clamp(1e-6, 1 - 1e-6)
        rest = (1 - score) / max(1, len(self.classes) - 1)
        p = rest[:, None].expand(-1, len(self.classes)).scatter(1, label[:, None], score[:, None])
        return p.log()

    def decoded_gap(
        self, raw: Tensor, outputs: Mapping[str, Tensor], size: tuple[int, int], options: Mapping[str, Any]
    ) -> tuple[int, int, float, str]:
        expected = raw.float().argmax(1)
        return (
            int((expected != outputs["label"].long()).sum()),
            len(expected),
            0.0,
            "images have another class",
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
        """Logits of the classes that both know; images labelled as another class are left out."""
        if known is not None:
            if target is not None:
                unknown = ~knows(len(self.classes), known, student)
                other = unknown[target["class"].clamp(min=0)] & target["labelled"]
                ignore_mask = ignored_by_either(ignore_mask, other)
            student, teacher = of_classes(student, teacher, known)
        return Comparable(student, teacher, None if ignore_mask is None else ~ignore_mask)
