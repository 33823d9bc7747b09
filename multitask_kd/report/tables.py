"""Aligned tables in plain ASCII, the same on a terminal, through a pipe and in a file; and as Markdown."""

from __future__ import annotations

import numbers
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NUMERIC = re.compile(r"[+-]?\d[\d.,]*(e[+-]?\d+)?%?( \+- \d[\d.]*)?|nan|[+-]?inf|-")
GAP = "  "


@dataclass(frozen=True)
class Column:
    """key: in a row; heading: with its unit; digits: decimals shown; better: +1 more, -1 less, 0 neither; hint: what it is."""

    key: str
    heading: str
    digits: int = 1
    better: int = 0
    hint: str = ""


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    *,
    digits: int = 1,
    markdown: bool = False,
) -> str:
    """Rows under headings, without a final newline.

    columns: from the key in a row to its heading, in the order to show. A key a row lacks is shown like None, as "-".
    Floats have ``digits`` decimals, integers none. A column in which all values are numbers (or read like one, as
    "56.3 +- 1.2" does) is aligned on the right. markdown: as a Markdown table.
    """
    cells = [[_text(row.get(key), digits) for key in columns] for row in rows]
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


def metrics_table(metrics: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result of an evaluation: headline figures, then IoU and AP by class. All in percent.

    metrics: {"images": n, "seg": {"mIoU", "pixel_accuracy", "IoU": {class: value}}, "det": {"mAP", ..., "AR1", ...,
    "AP": {class: value}}}; a task may be missing, and any figure None.
    """
    parts = []
    if "images" in metrics:
        parts.append(f"{metrics['images']} image{'' if metrics['images'] == 1 else 's'}, figures in percent")
    parts += [table([row], columns, markdown=markdown) for row, columns in _headlines(metrics)]
    ious, aps = (metrics.get(task, {}).get(key, {}) for task, key in (("seg", "IoU"), ("det", "AP")))
    names = dict.fromkeys([*ious, *aps])
    if names:
        columns = {"class": "class"} | ({"iou": "IoU"} if ious else {}) | ({"ap": "AP"} if aps else {})
        rows = [{"class": name, "iou": ious.get(name), "ap": aps.get(name)} for name in names]
        parts.append(table(rows, columns, markdown=markdown))
    return "\n\n".join(parts)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1), e.g. over seeds; of one value the latter is None.

    Raises ValueError when there is none.
    """
    if len(values) == 0:
        raise ValueError("no values to average")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread_text(values: Sequence[float | None], digits: int = 1) -> str:
    """ "56.3 +- 1.2": mean and sample standard deviation; only the mean of one value, "-" of none or where one was not measured."""
    if len(values) == 0 or None in values:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" if spread is None else f"{mean:.{digits}f} +- {spread:.{digits}f}"


def _headlines(metrics: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """One-row tables: segmentation, then average precision and average recall."""
    found = []
    if seg := metrics.get("seg"):
        found.append(({"": "segmentation", **seg}, {"": "", "mIoU": "mIoU", "pixel_accuracy": "pixel accuracy"}))
    if det := metrics.get("det"):
        sizes = ("small", "medium", "large")
        precision = {key: key for key in ("mAP", "mAP50", "mAP75")} | {f"mAP_{s}": s for s in sizes}
        recall = {key: key for key in ("AR1", "AR10", "AR100")} | {f"AR_{s}": s for s in sizes}
        found.append(({"": "detection", **det}, {"": ""} | precision))
        if any(key in det for key in recall):
            found.append(({"": "recall", **det}, {"": ""} | recall))
    # The same first column in all three, so that their figures stand under one another.
    width = max((len(row[""]) for row, _ in found), default=0)
    return [({**row, "": row[""].ljust(width)}, columns) for row, columns in found]


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
