"""Aligned tables in plain ASCII, the same on a terminal, through a pipe and in a file; and as Markdown."""

from __future__ import annotations

import numbers
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

NUMERIC = re.compile(r"[+-]?\d[\d.,]*(e[+-]?\d+)?%?( \+- \d[\d.]*)?|nan|[+-]?inf|-")
GAP = "  "


@dataclass(frozen=True)
class Column:
    """key: in a row; heading: with its unit; digits: decimals shown; better: +1 more, -1 less, 0 neither;
    hint: what it is."""

    key: str
    heading: str
    digits: int = 1
    better: int = 0
    hint: str = ""


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    *,
    digits: int | Mapping[str, int] = 1,
    markdown: bool = False,
) -> str:
    """Rows under headings, without a final newline.

    A column in which all values are numbers (or read like one, as "56.3 +- 1.2" does) is aligned on the
    right.

    Args:
        columns: from the key in a row to its heading, in the order to show. A key a row lacks is shown like
            None, as "-". digits: decimals of floats, of all or by key (1 where the key is missing); integers
            have none. markdown: as a Markdown table.
    """
    decimals = dict.fromkeys(columns, digits) if isinstance(digits, int) else digits
    cells = [[_text(row.get(key), decimals.get(key, 1)) for key in columns] for row in rows]
    headings = list(columns.values())
    if markdown:
        headings = [_escaped(h) for h in headings]
        cells = [[_escaped(c) for c in line] for line in cells]
    right = [_numeric([line[i] for line in cells]) for i in range(len(headings))]
    widths = [max(len(line[i]) for line in [headings, *cells]) for i in range(len(headings))]
    if markdown:
        widths = [max(3, w) for w in widths]
    lines = [
        [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True)]
        for line in [headings, *cells]
    ]
    rule = ["-" * w for w in widths]
    if markdown:
        lines.insert(1, [f"{dashes[:-1]}:" if r else dashes for dashes, r in zip(rule, right, strict=True)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    lines.insert(1, rule)
    return "\n".join(GAP.join(line).rstrip() for line in lines)


def metrics_table(metrics: Mapping[str, Any], tasks: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result of an evaluation: the figures of each task, then those by class.

    A task with the default name of its kind is called by its ``title``, any other by its name. Tasks with the
    same columns are rows of one table; those of maps come first, as in pictures.

    Args:
        metrics: {"images": n, <task>: {key of a column: figure, key of ``by_class``: {class: figure}}};
            a task may be missing, and any figure None.
        tasks: by name; of each the attributes ``title``, ``columns``, ``row_titles`` (of the rows of
            ``columns`` after the first), ``by_class``, ``is_map``, ``is_default`` and ``called`` of a
            ``Task``.
    """
    ordered = sorted(tasks, key=lambda name: not tasks[name].is_map)
    tasks = {name: tasks[name] for name in ordered if metrics.get(name)}
    parts = []
    if "images" in metrics:
        count = metrics["images"]
        parts.append(f"{count} image{'' if count == 1 else 's'}, {in_percent(_columns_of(tasks))}")
    lines = _figure_lines(metrics, tasks)
    width = max(
        (len(title) for _, title, _ in lines), default=0
    )  # so that figures of all tables stand under one another
    for columns in dict.fromkeys(columns for columns, _, _ in lines):
        rows = [{"": title.ljust(width), **row} for of, title, row in lines if of == columns]
        headings = {"": ""} | {column.key: column.heading for column in columns}
        parts.append(
            table(rows, headings, digits={column.key: column.digits for column in columns}, markdown=markdown)
        )
    if by_class := _class_table(metrics, tasks, markdown=markdown):
        parts.append(by_class)
    return "\n\n".join(parts)


def in_percent(columns: Sequence[Column]) -> str:
    """What the head of a table says of its figures; a heading with a unit in brackets, as in "RMSE (m)", is
    its own."""
    return "figures in percent" + (
        ", where a heading names no unit" if any("(" in c.heading for c in columns) else ""
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1), e.g. over seeds; of one value the latter is None.

    Raises ValueError when there is none.
    """
    if len(values) == 0:
        raise ValueError("no values to average")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread_text(values: Sequence[float | None], digits: int = 1) -> str:
    """ "56.3 +- 1.2": mean and sample standard deviation; only the mean of one value, "-" of none or where
    one was not measured."""
    if len(values) == 0 or None in values:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" if spread is None else f"{mean:.{digits}f} +- {spread:.{digits}f}"


def _columns_of(tasks: Mapping[str, Any]) -> list[Column]:
    return [column for task in tasks.values() for columns in task.columns for column in columns]


def _figure_lines(
    metrics: Mapping[str, Any], tasks: Mapping[str, Any]
) -> list[tuple[tuple[Column, ...], str, Mapping[str, Any]]]:
    """(columns, title of the row, figures); a further row of a task that has none of its figures is left
    out."""
    found = []
    for name, task in tasks.items():
        first, *others = task.columns
        found.append((tuple(first), task.title if task.is_default else name, metrics[name]))
        titles = [task.called(title) for title in task.row_titles]
        for title, columns in zip_longest(titles, others, fillvalue=""):
            if any(column.key in metrics[name] for column in columns):
                found.append((tuple(columns), title, metrics[name]))
    return found


def _class_table(metrics: Mapping[str, Any], tasks: Mapping[str, Any], *, markdown: bool) -> str:
    """One table of all figures by class; a class that several tasks have is one row. Empty where there is
    none."""
    figures = {
        task.called(key): metrics[name][key]
        for name, task in tasks.items()
        for key in task.by_class
        if metrics[name].get(key)
    }
    rows = [
        {"class": name, **{heading: by_class.get(name) for heading, by_class in figures.items()}}
        for name in dict.fromkeys(name for by_class in figures.values() for name in by_class)
    ]
    return table(rows, {key: key for key in ("class", *figures)}, markdown=markdown) if rows else ""


def _text(value: Any, digits: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return str(value)
    try:
        return value if isinstance(value, str) else f"{value:.{digits}f}"
    except (TypeError, ValueError):
        return str(value)


def _numeric(texts: Sequence[str]) -> bool:
    return bool(texts) and all(NUMERIC.fullmatch(text.strip()) for text in texts)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
