"""What ``engine.compare`` measured, as rows: one source for the terminal, the CSV file and the page."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .tables import Column, in_percent, table

WIDTH = 120  # characters in a line of the terminal

Results = Mapping[str, Any]
Row = dict[str, Any]


def cost_columns(results: Results) -> list[Column]:
    """Size, arithmetic, memory, time."""
    batch = results["batch"]
    columns = [
        Column("parameters_m", "params M", 2, -1, "millions of parameters"),
        Column(
            "gmacs",
            "GMACs",
            3,
            -1,
            "billions of multiply-adds an image, half the FLOPs; convolutions and matrix products",
        ),
        Column("file_mb", "file MB", 1, -1, "size on disk"),
        Column(
            "memory_mb",
            "memory MB",
            0,
            -1,
            "what the network and one prediction add to a process of its own, at the most",
        ),
        Column("ms", "ms", 1, -1, "median time of one image, float image to raw predictions"),
        Column("ms_p10", "p10", 1, 0, "a tenth of the runs are faster"),
        Column("ms_p90", "p90", 1, 0, "a tenth of the runs are slower"),
    ]
    if batch > 1:
        columns.append(
            Column(
                "ms_batch",
                f"ms/image, batch {batch}",
                1,
                -1,
                f"median time of a batch of {batch}, divided by {batch}",
            )
        )
    return columns


def quality_columns(results: Results) -> list[Column]:
    """The figures of the networks' tasks."""
    return [_column(found) for found in results["columns"]]


def plotted_columns(results: Results) -> list[Column]:
    """Of them the tasks' main metrics, in percent."""
    return [column for column in quality_columns(results) if column.key in results["plotted"]]


def _column(found: Mapping[str, Any]) -> Column:
    return Column(**{field.name: found[field.name] for field in fields(Column)})


def rows(results: Results) -> list[Row]:
    """A flat row a network, with the keys of the columns. None: not measured."""
    return [
        _cost_row(network, results["batch"])
        | {found["key"]: _figure(network, found) for found in results["columns"]}
        for network in results["networks"]
    ]


def _figure(network: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    """A figure of one task of a network; None where it has none."""
    task = found["task"]
    return (network["figures"].get(task, {}) | network["more"].get(task, {})).get(found["figure"])


def _cost_row(network: Mapping[str, Any], batch: int) -> Row:
    single, many = network["latency_ms"]["1"], network["latency_ms"][str(batch)]
    return {
        "network": network["name"],
        "path": network["path"],
        "kind": network["kind"],
        "weights": network["weights"],
        "input": "x".join(map(str, network["input_size"][::-1])),
        "parameters_m": network["parameters"] / 1e6,
        "gmacs": None if network["macs"] is None else network["macs"] / 1e9,
        "file_mb": network["file_bytes"] / 2**20,
        "memory_mb": network["memory_mb"],
        "ms": single["median"],
        "ms_p10": single["p10"],
        "ms_p90": single["p90"],
        "ms_batch": many["median"] / batch,
    }


@dataclass(frozen=True)
class ClassTable:
    """One figure by class and network. heading: what it is; rows: (class, a value a network); brief: whether
    it is shown where there is little room."""

    heading: str
    rows: list[tuple[str, list[float | None]]]
    brief: bool = True


def class_tables(results: Results) -> list[ClassTable]:
    """Every figure by class, in percent. Of those that only a comparison has, the last of a task sums the
    others up."""
    found: list[ClassTable] = []
    more: dict[str, int] = {}  # by task: the place of the last such figure
    for wanted in results["by_class"]:
        values = [_by_class(network, wanted) for network in results["networks"]]
        names = list(dict.fromkeys(name for one in values for name in one))
        if not names:
            continue
        if wanted["more"]:
            if (last := more.get(wanted["task"])) is not None:
                found[last] = replace(found[last], brief=False)
            more[wanted["task"]] = len(found)
        found.append(
            ClassTable(wanted["heading"], [(name, [one.get(name) for one in values]) for name in names])
        )
    return found


def _by_class(network: Mapping[str, Any], wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """class -> figure; empty where the network has none."""
    task, key = wanted["task"], wanted["figure"]
    if not wanted["more"]:
        return network["figures"].get(task, {}).get(key) or {}
    classes = network["more"].get(task, {}).get("classes") or {}
    return {name: figures[key] for name, figures in classes.items() if key in figures}


def text(results: Results) -> str:
    """For the terminal: what was measured, cost, quality, and the classes."""
    lines = rows(results)
    parts = [summary(results)]
    for columns in (cost_columns(results), quality_columns(results)):
        # an empty column is of no use; a name comes first in both
        shown = {c.key: c.heading for c in columns if any(line[c.key] is not None for line in lines)}
        digits = {c.key: c.digits for c in columns}
        texts = [
            {k: _shown(line[k], digits[k]) for k in shown} | {"network": line["network"]} for line in lines
        ]
        if shown:
            parts.append(table(texts, {"network": "network", **shown}))
    for part in class_tables(results):
        if not part.brief:  # the files have it
            continue
        names = [network["name"] for network in results["networks"]]
        texts = [{"class": name, **dict(zip(names, values, strict=True))} for name, values in part.rows]
        parts.append(table(texts, {"class": f"{part.heading} by class", **{name: name for name in names}}))
    return "\n\n".join(parts + [textwrap.fill(note, WIDTH) for note in notes(results)])


def summary(results: Results) -> str:
    """One line: images, device, threads, machine."""
    data = results["data"]
    images = (
        f"{data['images']} of {data['of']} images"
        if data["images"] < data["of"]
        else f"{data['images']} images"
    )
    skipped = f" ({data['skipped']} could not be read)" if data["skipped"] else ""
    threads = f"{results['threads']} thread{'' if results['threads'] == 1 else 's'}"
    where = f"{results['device']}, {threads}; {results['machine']}"
    return f"{images}{skipped}, {in_percent(quality_columns(results))}; {where}"


def notes(results: Results) -> list[str]:
    """What has to be known to read the figures."""
    runs = results["runs"]
    found = [
        f"Times are medians of {runs} runs of the network alone, in turns with the others; "
        "p10 to p90 is their spread. "
        "Memory is what the network and one prediction add to a process of its own."
    ]
    if decoded := [network["name"] for network in results["networks"] if network["decoded"]]:
        found.append(
            f"The times of {', '.join(decoded)} have the decoding in them, which is part of the file."
        )
    return found + list(results["notes"])


def csv_text(results: Results) -> str:
    """A line a network: the columns, then every figure by class as "IoU/car". Numbers in full, an empty cell
    where none is."""
    keys = ["network", "path", "kind", "weights", "input"]
    keys += [column.key for column in (*cost_columns(results), *quality_columns(results))]
    lines = [{key: row[key] for key in keys} for row in rows(results)]
    for part in class_tables(results):
        for name, values in part.rows:
            for line, value in zip(lines, values, strict=True):
                line[f"{part.heading}/{name}"] = value
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _inert(value) for key, value in line.items()} for line in lines)
    return file.getvalue()


def _inert(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, with the apostrophe that makes it a text there."""
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of points (cost, quality) those that no other beats in both, by place, the cheapest first."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _shown(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
