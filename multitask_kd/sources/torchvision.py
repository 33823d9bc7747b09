"""Segmentation and detection networks of torchvision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image

from ..errors import UserError, did_you_mean
from . import files
from .base import SOURCES, Source, State, frozen

BACKGROUND = "__background__"


@SOURCES.register("torchvision")
class Torchvision(Source):
    """A segmentation or detection network of torchvision, with weights from a state dict or, on request,
    torchvision's.

    Nothing in the file runs. Nothing is downloaded unless ``weights`` is given.

    model: its name in ``torchvision.models`` (``deeplabv3_resnet50``, ``fasterrcnn_resnet50_fpn_v2``).
    arguments: further arguments of its function (``min_size: 480``: detectors resize inside).
    ``num_classes``, which counts the background where there is one, is read from the file where it is not
    given.
    weights: a name of torchvision's weights (``COCO_V1``, ``DEFAULT``); **torchvision downloads them** where
    it does not have them yet, and the class names come with them. Without it, ``path`` is needed.
    key: the key under which the file holds the state dict; null: searched among the usual keys.
    background: whether index 0 of a detector's classes is the background, as in torchvision's own weights;
    labels are then shifted so that 0 is the first real class. RetinaNet and FCOS can be trained without a
    background class.
    dense: for RetinaNet, FCOS and SSD, return the scores of every anchor instead of the detections after NMS.

    Segmentation returns ``{"semantic": logits [B,C,h,w]}``. Detection returns ``{"detection": [...]}`` with,
    for each image, ``{"boxes": [n,4] xyxy, "scores": [n], "labels": [n]}``; with ``dense`` it returns
    ``{"detection": {"boxes": [B,A,4] xyxy, "scores": [B,A,C] probabilities, "locations": [1,A,2] anchors'
    centres x, y, "strides": [A]}}``. All are in pixels of the images passed in. Detectors normalise their
    input themselves.
    """

    reads_file = False
    optional_path = True

    def __init__(
        self,
        path: str | None,
        trust_pickle: bool,
        *,
        model: str,
        arguments: Mapping[str, Any] | None = None,
        weights: str | None = None,
        key: str | None = None,
        background: bool = True,
        dense: bool = False,
    ):
        super().__init__(path, trust_pickle)
        detectors = torchvision.models.list_models(module=detection)
        known = [*detectors, *torchvision.models.list_models(module=segmentation)]
        if model not in known:
            raise UserError(
                f"options.model: torchvision has no segmentation or detection network '{model}'; "
                f"{did_you_mean(model, known)}"
            )
        if (path is None) == (weights is None):
            raise UserError(
                "path: give the file of a state dict, or options.weights for torchvision's own weights (a "
                "download)"
                if path is None
                else "options.weights: give it or path, not both"
            )
        if not isinstance(arguments or {}, Mapping):
            raise UserError(
                f"options.arguments: needs a mapping of the function's arguments, not {arguments!r}"
            )
        if lost := [name for name in ("weights", "weights_backbone") if name in (arguments or {})]:
            raise UserError(
                f"options.arguments: {lost[0]} is not to be given here; use path or options.weights"
            )
        self.detects = model in detectors
        if dense and not model.startswith(("retinanet", "ssd", "fcos")):
            raise UserError(
                f"options.dense: only RetinaNet, FCOS and SSD have dense outputs, not {model}; leave it out"
            )
        self.model, self.arguments, self.weights, self.key = model, dict(arguments or {}), weights, key
        self.background, self.dense, self.normalises = background, dense, self.detects
        self._enum = self._weights() if weights else None

    def _weights(self) -> Any:
        family = torchvision.models.get_model_weights(self.model)
        if self.weights not in family.__members__:
            raise UserError(
                f"options.weights: {self.model} has no weights '{self.weights}'; "
                f"{did_you_mean(self.weights, family.__members__)}"
            )
        return family[self.weights]

    def load(self, device: torch.device) -> nn.Module:
        state = None if self.path is None else files.find_state(files.plain(self.path), self.path, self.key)
        arguments = dict(self.arguments)
        if state is not None:
            arguments["weights_backbone"] = None
            if "num_classes" not in arguments and (count := _classes_in(state)):
                arguments["num_classes"] = count
            if (
                not self.detects
                and "aux_loss" not in arguments
                and any("aux_classifier." in k for k in state)
            ):
                arguments["aux_loss"] = True
        try:
            net = torchvision.models.get_model(self.model, weights=self._enum, **arguments)
        except Exception as error:  # torchvision's builders and urllib raise many kinds
            where = "options.weights" if self._enum else "options.arguments"
            raise UserError(
                f"{where}: torchvision cannot build {self.model} with {arguments} ({files.first_line(error)})"
            ) from error
        if state is not None:
            files.load_state(net, state, self.path)
        if self._enum:
            names = list(self._enum.meta["categories"])
            shifted = self.detects and self.background and names[:1] == [BACKGROUND]
            self.classes = {"detection" if self.detects else "semantic": names[1:] if shifted else names}
        if not self.detects:
            self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
            return frozen(_Segmenter(net), device)
        return frozen((_Dense if self.dense else _Detector)(net, int(self.background)), device)


def _classes_in(state: State) -> int | None:
    """``num_classes`` of a state dict's network: its class outputs; for heads with anchors, those divided by
    the anchors."""

    def rows(*ends: str) -> int | None:
        return next((len(v) for end in ends for k, v in state.items() if k.endswith(end)), None)

    if count := rows("roi_heads.box_predictor.cls_score.bias", "low_classifier.bias"):
        return count
    for scores, boxes in (
        ("classification_head.cls_logits.bias", "regression_head.bbox_reg.bias"),
        ("classification_head.module_list.0.bias", "regression_head.module_list.0.bias"),
        ("classification_head.module_list.0.1.bias", "regression_head.module_list.0.1.bias"),
    ):
        if (all_scores := rows(scores)) and (all_boxes := rows(boxes)):
            return all_scores * 4 // all_boxes
    return next((len(v) for k, v in state.items() if re.fullmatch(r"(?:.*\.)?classifier\.4\.bias", k)), None)


class _Segmenter(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"semantic": self.net(images)["out"]}


class _Detector(nn.Module):
    """Detections after NMS, with labels from 0 for the first real class."""

    def __init__(self, net: nn.Module, background: int):
        super().__init__()
        self.net, self.background = net, background

    def forward(self, images: Tensor) -> dict[str, list[dict[str, Tensor]]]:
        found = []
        for one in self.net(list(images)):
            real = one["labels"] >= self.background
            found.append(
                {
                    "boxes": one["boxes"][real],
                    "scores": one["scores"][real],
                    "labels": one["labels"][real] - self.background,
                }
            )
        return {"detection": found}


class _Dense(_Detector):
    """Boxes and probabilities of every anchor of RetinaNet, FCOS or SSD, before thresholds and NMS."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        net = self.net
        inner, _ = net.transform(list(images))
        maps = net.backbone(inner.tensors)
        maps = [maps] if isinstance(maps, Tensor) else list(maps.values())
        head = net.head(maps)
        anchors = net.anchor_generator(inner, maps)[0]  # images of a batch have one size
        scores = head["cls_logits"]
        if isinstance(net, SSD):
            scores = scores.softmax(-1)
        elif isinstance(net, FCOS):
            scores = (scores.sigmoid() * head["bbox_ctrness"].sigmoid()).sqrt()
        else:
            scores = scores.sigmoid()
        decode = net.box_coder.decode if isinstance(net, FCOS) else net.box_coder.decode_single
        offsets = head["bbox_regression"]
        boxes = decode(offsets.flatten(0, 1), anchors.repeat(len(images), 1)).view_as(offsets)
        height, width = inner.image_sizes[0]
        scale = boxes.new_tensor([images.shape[3] / width, images.shape[2] / height])
        per_cell = net.anchor_generator.num_anchors_per_location()
        steps = [  # pixels of the inner image from cell to cell, x and y
            boxes.new_tensor(
                [inner.tensors.shape[3] / m.shape[3], inner.tensors.shape[2] / m.shape[2]]
            ).expand(m.shape[2] * m.shape[3] * n, 2)
            for m, n in zip(maps, per_cell, strict=True)
        ]
        return {
            "detection": {
                "boxes": clip_boxes_to_image(boxes, (height, width)) * scale.repeat(2),
                "scores": scores[..., self.background :],
                "locations": ((anchors[:, :2] + anchors[:, 2:]) / 2 * scale)[None],
                "strides": (torch.cat(steps) * scale).mean(1),
            }
        }
