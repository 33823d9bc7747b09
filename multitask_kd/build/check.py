"""Every name and option of a config, before any data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..compress.graph import torch_pruning
from ..config import SET_KEYS, SHARED_KEYS, TRAINING_ONLY, Config, DataSet
from ..data import layouts  # noqa: F401  (fills the registry)
from ..data.base import LAYOUTS
from ..distill.taps import Tapped
from ..errors import UserError, as_user_error, did_you_mean
from ..models.backbones import build_encoder, check_encoder
from ..models.multitask import reads_encoder
from ..registry import check_options, options_of
from ..tasks.base import build_task, kind_of
from .data import set_key_path
from .distill import build_balance, build_soft, soft_loss
from .net import Init, arch, network, resolve_init
from .teacher import check_teachers

FORMS = {
    "labels": "{<label>: <task>}",
    "classes": "{<task>: [<class>, ...]}",
}  # of the keys that a layout may have, too
RESERVED = (
    "images",
    "seconds",
    "skipped",
    "set",
    "sparse",
    "balance",
    "distill",
    "hard",
)  # of tasks: names of other things in logs and files


def check(config: Config, init: Init | None = None) -> None:
    """Every name and option of the config, before data is read. Raises UserError naming the key.

    init: the config's ``model.start``, where it has been read already.
    """
    config = (init or resolve_init(config)).config
    for split in ("train", "val"):
        for name, section in config.data.sets(split).items():
            _check_set(section, set_key_path(config, split, name), split)
    check_encoder(config.model.encoder)
    for name, section in config.tasks.items():
        _check_task(name, section, config)
    check_teachers(config)
    _check_given_classes(config)
    for name, section in config.distill.items():
        if hasattr(nn.ModuleDict(), name):
            raise UserError(f"distill.{name}: PyTorch has its own use of this name; choose another")
        with torch.random.fork_rng(devices=[]):  # the student's start must not depend on its teachers
            soft_loss(section, f"distill.{name}")
    if config.sparse is not None and config.sparse.method == "group":
        torch_pruning("sparse.method: group")
    build_balance(config, [])
    if config.distill:
        _check_paths(config)


def _check_set(section: DataSet, key_path: str, split: str) -> None:
    options = dict(section.layout)
    kind = options.pop("layout", None)
    if not isinstance(kind, str):
        raise UserError(f"{key_path}: needs layout; known: {', '.join(LAYOUTS.names())}")
    _check_shared_keys(options, LAYOUTS.get(kind, key_path), key_path)
    LAYOUTS.check(
        kind, options, key_path, [key for key in SET_KEYS if split == "train" or key not in TRAINING_ONLY]
    )


def _check_shared_keys(options: Mapping[str, Any], layout: type, key_path: str) -> None:
    """Raise UserError for a key of a set that is no mapping, and so taken for an option which its layout does
    not have."""
    for key in (key for key in SHARED_KEYS if key in options and key not in options_of(layout)):
        raise UserError(f"{key_path}.{key}: needs a mapping, not {options[key]!r}; write {key}: {FORMS[key]}")


def _check_given_classes(config: Config) -> None:
    for name in config.data.classes:
        if name not in config.tasks:
            raise UserError(f"data.classes.{name}: there is no such task; {did_you_mean(name, config.tasks)}")
        if not kind_of(name, config.tasks[name].kind, f"tasks.{name}").has_classes:
            raise UserError(
                f"data.classes.{name}: a task of kind '{config.tasks[name].kind}' has no classes; leave it "
                f"out"
            )


def _check_task(name: str, section: Any, config: Config) -> None:
    """Every option of a task, by using it: the head on an image of nothing, its output decoded."""
    key_path = f"tasks.{name}"
    if name in RESERVED or hasattr(nn.ModuleDict(), name):
        raise UserError(f"{key_path}: this name is used for something else; choose another")
    kind = kind_of(name, section.kind, key_path)
    check_options(kind.Head, section.head, f"{key_path}.head")
    check_options(kind.decode, section.decode, f"{key_path}.decode")
    strides = config.model.strides
    channels = (
        _encoder_channels(config) if reads_encoder(kind.Head) else dict.fromkeys(strides, config.model.width)
    )
    given = channels if reads_encoder(kind.Head) else config.model.width
    head = as_user_error(f"{key_path}.head", kind.Head, given, strides, 2, **section.head)
    task = as_user_error(
        f"{key_path}.hard", build_task, name, section.kind, ("a", "b"), head.strides, section.hard
    )
    side = 2 * max(strides)
    with torch.no_grad():
        pred = head.eval()({s: torch.zeros(1, channels[s], side // s, side // s) for s in strides})
    as_user_error(f"{key_path}.decode", task.decode, pred, (side, side), **section.decode)
    if section.soft:
        build_soft(name, section)


def _encoder_channels(config: Config) -> Mapping[int, int]:
    """Channels of the encoder's maps by stride."""
    strides: Sequence[int] = config.model.strides
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(config.model.encoder, max_stride=max(strides))
    return {s: encoder.out_channels[s.bit_length() - 1] for s in strides}


def _check_paths(config: Config) -> None:
    """The modules of the student that ``distill`` names, in a network of its architecture."""
    with torch.random.fork_rng(devices=[]):  # the student's start must not depend on whether this is done
        net = network(arch(Init(config), {name: ("a", "b") for name in config.tasks}))
    for name, section in config.distill.items():
        Tapped(net, [section.student], f"distill.{name}.student")
        if config.teacher and config.teacher.is_own:
            Tapped(net, [section.teacher_path], f"distill.{name}.teacher")
