"""Networks from files, side by side: what each costs and how good it is on the same images."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from json import dumps as to_json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import build
from ..atomic import write_text
from ..data.base import Layout
from ..errors import UserError
from ..precision import resolve_device
from ..report.comparison import csv_text
from ..report.html import page
from .columns import comparison_columns, merged_tasks
from .cost import file_bytes, flops, latencies, peak_memory, software
from .evaluate import check_data, gather_network
from .machine import machine
from .networks import Network, open_network
from .pictures import SHOWN, DrawnNetwork, class_names
from .pictures import compare as panels

log = logging.getLogger(__name__)


def compare(
    config: Any,
    paths: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    confidence: float | None = None,
    images: int | None = None,
    batch: int = 8,
    runs: int = 20,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the networks in ``paths`` on the first ``images`` images of the config's ``data.val``.

    Args:
        names: one a file; else what tells the paths apart.
        confidence: from which score in (0,1] a prediction counts (a detector's precision, recall and F1);
            None: the best for each network.
        batch: images in the second timing.
        runs: timed runs.
        command: of the tool, to be written down.

    Returns plain data, see ``report.comparison``. Raises UserError.
    """
    _check(paths, names, confidence, images=images, batch=batch, runs=runs)
    build.check(config)
    on = resolve_device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    networks = {
        name: open_network(path, "network", on, channels_last=config.run.channels_last)
        for name, path in zip(names or distinct_names(paths), paths, strict=True)
    }
    tasks = merged_tasks({name: network.tasks for name, network in networks.items()})
    found = build.open_sets(config, "val", merged_classes(networks.values()), only=tasks)
    for network in networks.values():
        check_data(found, network.arch, network.path)
    results = []
    for name, network in networks.items():
        log.info("%s: evaluating %s", name, network.path)
        results.append(_describe(name, network) | _evaluate(config, network, found, images, confidence))
    _time(results, networks, config, sorted({1, batch}), runs)
    for row in results:
        log.info("%s: measuring memory", row["name"])
        row["memory_mb"] = peak_memory(
            row["path"], device=on, threads=torch.get_num_threads(), channels_last=config.run.channels_last
        )
    return {
        **_circumstances(command, on),
        "batch": batch,
        "runs": runs,
        "confidence": confidence,
        **comparison_columns(tasks, confidence),
        "decode": build.decode_options(config),
        "data": {"images": results[0]["images"], "skipped": results[0]["skipped"], "of": len(found)},
        "networks": results,
    }


def _circumstances(command: Sequence[str], on: torch.device) -> dict[str, Any]:
    """By what, when and where a comparison was made."""
    return {
        "command": shlex.join(map(printable, command)),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "device": str(on),
        "threads": torch.get_num_threads(),
        "software": software(),
    }


def drawn(config: Any, results: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Labels and the predictions of every network on ``count`` of the images that were evaluated, spread over
    them.

    Returns ``columns`` ("truth", then the networks' names), ``rows``: (the image's name, a panel uint8
    [H,W,3] a column), ``classes``: names by task, ``score``: below which no box is drawn.
    """
    on = resolve_device(config.run.device)
    decode = build.decode_options(config)
    opened = {
        row["name"]: open_network(row["path"], row["name"], on, channels_last=config.run.channels_last)
        for row in results["networks"]
    }
    networks = {name: DrawnNetwork(one.run, one.tasks, one.size, decode) for name, one in opened.items()}
    tasks = merged_tasks({name: network.tasks for name, network in opened.items()})
    found = build.open_sets(config, "val", merged_classes(opened.values()), only=tasks)
    evaluated = results["data"]["images"] + results["data"]["skipped"]
    spread = np.linspace(0, evaluated - 1, num=min(count, evaluated), dtype=int)
    indices = [i for i in spread.tolist() if _readable(found, i)]
    rows = zip(indices, panels(found, indices, networks, on, tasks), strict=True)
    return {
        "columns": ["truth", *networks],
        "rows": [(printable(found.name(i)), row) for i, row in rows],
        "classes": class_names(tasks),
        "score": SHOWN,
    }


def prepare(**outputs: str | None) -> None:
    """Before anything is measured: that the files can be written. Makes their folders. Raises UserError."""
    asked = {option: path for option, path in outputs.items() if path}
    for option, path in asked.items():
        if Path(path).is_dir():
            raise UserError(f"--{option}: {path} is a folder; name a file in it")
        if same := next(
            (o for o, p in asked.items() if o < option and os.path.abspath(p) == os.path.abspath(path)), None
        ):
            raise UserError(f"--{same} and --{option}: both name {path}; give each a file of its own")
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def write(
    config: Any,
    results: Mapping[str, Any],
    *,
    pictures: int,
    csv: str | None,
    json: str | None,
    html: str | None,
) -> list[str]:
    """The files asked for, whole or not at all; returns their paths. pictures: images on the page, none below
    1."""
    texts: dict[str, str] = {}
    if csv:
        texts[csv] = csv_text(results)
    if json:
        texts[json] = to_json(results, indent=2) + "\n"
    if html:
        texts[html] = page(results, drawn(config, results, pictures) if pictures > 0 else None)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _readable(found: Layout, index: int) -> bool:
    try:
        found.read(index)
    except UserError:
        return False
    return True


def _check(
    paths: Sequence[str], names: Sequence[str] | None, confidence: float | None, **numbers: int | None
) -> None:
    if not paths:
        raise UserError("no network was given; name at least one file, e.g. runs/demo/distilled/best.pt")
    if names and len(names) != len(paths):
        raise UserError(
            f"--names: {len(names)} names for {len(paths)} files; give one a file, after the files"
        )
    if names and len(set(names)) < len(names):
        raise UserError("--names: two names are the same; names tell the networks apart")
    if confidence is not None and not 0 < confidence <= 1:
        raise UserError(f"--confidence: {confidence} is not above 0 and at most 1")
    for option, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"--{option}: needs a number from 1, not {number}")


def _describe(name: str, network: Network) -> dict[str, Any]:
    operations = flops(network)
    return {
        "name": printable(name),
        "path": printable(network.path),
        "kind": network.kind,
        "weights": network.precision,
        "decoded": network.decoded,
        "input_size": list(network.size),
        "parameters": network.parameters,
        "flops": operations,
        "macs": None if operations is None else operations // 2,
        "file_bytes": file_bytes(network.path),
    }


def merged_classes(networks: Iterable[Network]) -> dict[str, list[str]]:
    """Class names by task, of the first network that has the task."""
    found: dict[str, list[str]] = {}
    for network in networks:
        found |= {task: names for task, names in network.classes.items() if task not in found}
    return found


def _evaluate(
    config: Any, network: Network, found: Layout, images: int | None, confidence: float | None
) -> dict[str, Any]:
    """By task, in ``figures`` those of tools/eval.py and in ``more`` what only a comparison shows."""
    metrics, evaluated, skipped = gather_network(config, network, found, images)
    return {
        "images": evaluated,
        "skipped": skipped,
        "figures": {name: metric.compute() for name, metric in metrics.items()},
        "more": {
            name: network.tasks[name].more_figures(metric, confidence) for name, metric in metrics.items()
        },
    }


def _time(
    results: list[dict[str, Any]],
    networks: Mapping[str, Network],
    config: Any,
    sizes: Sequence[int],
    runs: int,
) -> None:
    for row in results:
        row["latency_ms"] = {}
    for size in sizes:
        log.info("timing %d networks in turns, batch %d", len(networks), size)
        timed = latencies(networks, size, runs=runs, channels_last=config.run.channels_last)
        for row, times in zip(results, timed.values(), strict=True):
            row["latency_ms"][str(size)] = times


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Of each path the parts that are not in all of them: runs/a/best.pt, runs/b/best.pt -> a, b.

    Paths that begin in different folders have as many of their last parts as tell them apart.
    """
    if len(set(paths)) == 1:
        own = Path(paths[0])
        names = [own.parent.name if own.stem in ("best", "last") and own.parent.name else own.stem] * len(
            paths
        )
    else:
        parts = [
            tuple(part for part in Path(os.path.normpath(path)).parts if part != os.sep) for path in paths
        ]
        front = len(os.path.commonprefix(parts))
        back = len(os.path.commonprefix([own[front:][::-1] for own in parts]))
        names = ["/".join(own[front : len(own) - back]) or own[-back - 1 :][0] for own in parts]
        if not front:
            ends = [own[: len(own) - back] for own in parts]
            names = [_shortest(own, [other for other in ends if other != own]) for own in ends]
    taken: list[str] = []
    for name in map(printable, names):
        again = sum(t == name or t.startswith(f"{name} (") for t in taken)
        taken.append(f"{name} ({again + 1})" if again else name)
    return taken


def _shortest(own: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    """The last parts of a path with which no other ends."""
    count = next(
        (n for n in range(1, len(own)) if all(tuple(o[-n:]) != tuple(own[-n:]) for o in others)), len(own)
    )
    return "/".join(own[-count:])


def printable(text: Any) -> str:
    """A path as text that any file can hold: bytes that are no UTF-8 become U+FFFD."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
