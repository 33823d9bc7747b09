"""A comparison as one HTML page that needs nothing else: styles, plots and pictures are in it, and nothing is
loaded."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .colours import is_background, palette
from .comparison import (
    Row,
    class_tables,
    cost_columns,
    notes,
    pareto,
    plotted_columns,
    quality_columns,
    rows,
    summary,
)
from .plot import Point, scatter
from .tables import Column

TEMPLATE = Path(__file__).with_name("page.html")
# the browser itself refuses whatever would come from elsewhere
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
QUALITY = 88  # of the pictures' JPEG
PLOTTED = (("ms", "ms an image"), ("parameters_m", "million parameters"), ("gmacs", "GMACs an image"))


def page(results: Mapping[str, Any], pictures: Mapping[str, Any] | None = None) -> str:
    """results: of ``engine.compare.compare``; pictures: of its ``drawn``. Every text in them is escaped."""
    lines = rows(results)
    sections = [
        _section(
            "Summary",
            _summary_table(results, lines),
            "Click a heading to sort by it. The best figure of a column is bold.",
        ),
        _section(
            "Accuracy against cost",
            _plots(lines, plotted_columns(results)),
            "Filled dots on the line: no other network is both cheaper and better.",
        ),
        _section("By class, in percent", _class_tables(results)),
    ]
    if pictures and pictures["rows"]:
        sections.append(
            _section("Pictures", _pictures(pictures), f"Boxes with a score above {pictures['score']:g}.")
        )
    sections.append(_section("How this was measured", _method(results)))
    parts = {
        "POLICY": escape(POLICY),
        "TITLE": escape(" · ".join(line["network"] for line in lines)),
        "LEAD": escape(summary(results)),
        "SECTIONS": "\n".join(filter(None, sections)),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    before, *rest = text.split("{{")  # in one pass: what is filled in is not searched for places to fill
    return before + "".join(parts[key] + tail for key, _, tail in (piece.partition("}}") for piece in rest))


def _section(title: str, body: str, lead: str = "") -> str:
    intro = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{body}</section>" if body else ""


def _summary_table(results: Mapping[str, Any], lines: Sequence[Row]) -> str:
    columns = [
        c
        for c in (*cost_columns(results), *quality_columns(results))
        if any(line[c.key] is not None for line in lines)
    ]
    best = {c.key: _best([line[c.key] for line in lines], c.better) for c in columns}
    head = "".join(_heading(c.heading, c.hint) for c in columns)
    body = "".join(
        _row(line["network"], "".join(_cell(line[c.key], c, best[c.key]) for c in columns)) for line in lines
    )
    return _table("summary", _heading("network", "") + head, body)


def _row(name: str, cells: str) -> str:
    return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'


def _heading(text: str, hint: str) -> str:
    title = f' title="{escape(hint)}"' if hint else ""
    return f'<th scope="col"{title}><button type="button">{escape(text)}</button></th>'


def _cell(value: float | None, column: Column, best: float | None) -> str:
    if value is None:
        return "<td>-</td>"
    text, shown = (
        None if v is None else f"{v:.{column.digits}f}" for v in (value, best)
    )  # what reads the same is as good
    return f'<td data-value="{value!r}">{f"<b>{text}</b>" if text == shown else text}</td>'


def _best(values: Sequence[float | None], better: int) -> float | None:
    there = [value for value in values if value is not None]
    if not better or len(there) < 2 or min(there) == max(there):
        return None
    return max(there) if better > 0 else min(there)


def _table(name: str, head: str, body: str) -> str:
    return (
        f'<div class="scroll" tabindex="0"><table id="{name}" class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _plots(lines: Sequence[Row], figures: Sequence[Column]) -> str:
    """Every main metric against every cost, where a network has both."""
    found = []
    for figure in figures:
        for key, label in PLOTTED:
            if shown := [line for line in lines if line[figure.key] is not None and line[key] is not None]:
                found.append(scatter(_points(shown, key, figure.key), label, f"{figure.heading}, percent"))
    return f'<div class="plots">{"".join(found)}</div>' if found else ""


def _points(lines: Sequence[Row], cost: str, figure: str) -> list[Point]:
    front = pareto([(line[cost], line[figure]) for line in lines])
    spread = ("ms_p10", "ms_p90") if cost == "ms" else ()
    return [
        Point(line["network"], line[cost], line[figure], *(line[key] for key in spread), front=i in front)
        for i, line in enumerate(lines)
    ]


def _class_tables(results: Mapping[str, Any]) -> str:
    names = [network["name"] for network in results["networks"]]
    plain = Column("", "", 1, 1)
    parts = []
    for number, part in enumerate(class_tables(results)):
        head = _heading(f"{part.heading}", "") + "".join(_heading(name, "") for name in names)
        body = "".join(
            _row(name, "".join(_cell(v, plain, _best(values, 1)) for v in values))
            for name, values in part.rows
        )
        parts.append(_table(f"classes-{number}", head, body))
    least = 120 + 85 * len(names)  # pixels that a table needs: with many networks fewer stand side by side
    return f'<div class="classes" style="--least: {least}px">{"".join(parts)}</div>' if parts else ""


def _pictures(pictures: Mapping[str, Any]) -> str:
    parts = [_legend(pictures["classes"])]
    for name, row in pictures["rows"]:
        figures = "".join(
            _figure(panel, who, f"{name}, {who}") for who, panel in zip(pictures["columns"], row, strict=True)
        )
        parts.append(f'<h3>{escape(name)}</h3><div class="pictures">{figures}</div>')
    return "".join(parts)


def _figure(panel: np.ndarray, caption: str, description: str) -> str:
    height, width = panel.shape[:2]
    image = f'<img src="{_data(panel)}" width="{width}" height="{height}" alt="{escape(description)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _legend(classes: Mapping[str, Sequence[str]]) -> str:
    """As the pictures have it: the background is in no colour."""
    colours = {name: colour for name, colour in palette(classes).items() if not is_background(name)}
    entries = (
        f'<li><i style="background:rgb{colour}"></i>{escape(name)}</li>' for name, colour in colours.items()
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _data(panel: np.ndarray) -> str:
    """uint8 [H,W,3] as a data URL."""
    file = io.BytesIO()
    Image.fromarray(panel).save(file, format="JPEG", quality=QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _method(results: Mapping[str, Any]) -> str:
    threads = "CPU thread" if results["threads"] == 1 else "CPU threads"
    facts = {
        "date": results["date"],
        "machine": results["machine"],
        "device": f"{results['device']}, {results['threads']} {threads}",
        "software": ", ".join(f"{name} {version}" for name, version in results["software"].items()),
        "decoding": "; ".join(f"{task}: {_options(options)}" for task, options in results["decode"].items())
        or "defaults",
    }
    facts |= {column.heading: column.hint for column in (*cost_columns(results), *quality_columns(results))}
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    files = "".join(
        f"<dt>{escape(line['network'])}</dt><dd>{escape(line['path'])} ({escape(_about(line))})</dd>"
        for line in rows(results)
    )
    read_first = "".join(f"<p>{escape(note)}</p>" for note in notes(results))
    parts = [read_first, f"<pre>{escape(results['command'])}</pre>", "<h3>Files</h3>", f"<dl>{files}</dl>"]
    return "".join([*parts, "<h3>Conditions and columns</h3>", f"<dl>{listed}</dl>"])


def _about(line: Row) -> str:
    return f"{line['kind']}, {line['weights']}, input {line['input']}"


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"
