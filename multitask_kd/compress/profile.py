"""What a network costs: parameters, multiply-adds and milliseconds, of the whole and by part."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.multitask import MultiTaskNet, count_parameters

WHOLE = "whole"


def parts_of(net: MultiTaskNet) -> dict[str, nn.Module]:
    """backbone, neck and every head, by name."""
    return {
        "backbone": net.backbone,
        "neck": net.neck,
        **{f"heads.{name}": head for name, head in net.heads.items()},
    }


def parameters(net: MultiTaskNet) -> dict[str, int]:
    """Parameters by part, and of the whole."""
    return {name: count_parameters(part) for name, part in parts_of(net).items()} | {
        WHOLE: count_parameters(net)
    }


@torch.no_grad()
def macs(net: MultiTaskNet, size: Sequence[int]) -> dict[str, int]:
    """Multiply-adds of convolutions and matrix products on one image of ``size`` (H, W), by part and of the
    whole."""
    found: dict[str, int] = {}
    images = torch.zeros(1, 3, *size, device=next(net.parameters()).device)
    with FlopCounterMode(display=False) as counter, _in_eval(net):
        with _metered(parts_of(net), lambda name: counter.get_total_flops(), found):
            net(images)
        total = counter.get_total_flops()
    return {name: count // 2 for name, count in found.items()} | {WHOLE: total // 2}


@torch.no_grad()
def latencies(
    nets: Mapping[str, MultiTaskNet], images: Tensor, *, rounds: int = 30, settle: int = 5
) -> dict[str, dict[str, float]]:
    """Milliseconds of one forward pass of each network on ``images`` [B,3,H,W], by part and of the whole.

    They are medians of ``rounds``, measured after ``settle`` rounds that do not count. The networks take
    turns, so that changes of the machine's speed affect all of them alike.
    """

    def now(name: str) -> float:
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter()

    spent: dict[str, dict[str, list[float]]] = {name: {} for name in nets}
    for turn in range(settle + rounds):
        for name, net in nets.items():
            found: dict[str, float] = {}
            with _in_eval(net), _metered(parts_of(net), now, found):
                began = now(WHOLE)
                net(images)
                found[WHOLE] = now(WHOLE) - began
            for part, seconds in found.items() if turn >= settle else ():
                spent[name].setdefault(part, []).append(1000 * seconds)
    return {
        name: {part: statistics.median(times) for part, times in by.items()} for name, by in spent.items()
    }


@contextmanager
def _in_eval(net: nn.Module) -> Iterator[None]:
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


@contextmanager
def _metered(parts: Mapping[str, nn.Module], read: Any, found: dict[str, Any]) -> Iterator[None]:
    """Record in ``found`` by how much the meter ``read(name)`` rises while each part runs."""
    handles = []
    for name, part in parts.items():

        def before(module: nn.Module, inputs: Any, name: str = name) -> None:
            found[name] = -read(name)

        def after(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            found[name] += read(name)

        handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
