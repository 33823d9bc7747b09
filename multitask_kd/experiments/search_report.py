"""What a search writes: its table, its plot, and the best setting as a config."""

from __future__ import annotations

import io
import itertools
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..atomic import replacing, write_text
from ..config import dump, parse
from ..engine.log import clock
from ..report.tables import table
from .search_config import encode
from .search_space import Plan, short_names, shown
from .search_store import STATES, latest, row_of


def write_results(study: Any, plan: Plan) -> dict[str, Any]:
    """results.json, results.md, plot.png and best.yaml of all trials so far; returns what results.json
    holds."""
    search = plan.search
    folder = Path(search.dir)
    rows = [row_of(trial, search) for trial in latest(study).values()]
    rows.sort(key=lambda row: (STATES.index(row["state"]), -(row["objective"] or 0.0), row["trial"]))
    best = rows[0] if rows and rows[0]["state"] == "complete" else None
    results = {
        **{key: getattr(search, key) for key in ("dir", "method", "objective", "seed")},
        "asked": search.total(),
        "best": best and best["trial"],
        "space": {
            key: axis.model_dump(mode="json", exclude_defaults=True) for key, axis in search.space.items()
        },
        "trials": rows,
    }
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "results.md", report(results, markdown=True) + "\n")
    if best:
        config = yaml.safe_load(latest(study)[best["trial"]].user_attrs["config"])
        config["run"]["dir"] = f"{search.dir}/best"
        write_text(folder / "best.yaml", dump(parse(config, "best.yaml")))
        picture = draw(results)
        with replacing(folder / "plot.png") as file:
            file.write(picture)
    return results


def report(results: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The table of a search, best first; then the keys, what failed, and where the best config is."""
    names = short_names(list(results["space"]))
    figures = dict.fromkeys(key for row in results["trials"] for key in row["metrics"])
    rows = [
        {
            "trial": row["trial"],
            **{f"value {key}": shown(value) for key, value in row["values"].items()},
            "objective": row["objective"],
            **row["metrics"],
            "state": f"pruned at step {row['step']}" if row["state"] == "pruned" else row["state"],
            "time": None if row["seconds"] is None else clock(row["seconds"]),
        }
        for row in results["trials"]
    ]
    columns = {
        "trial": "trial",
        **{f"value {key}": name for key, name in names.items()},
        "objective": results["objective"],
    }
    columns |= {key: key for key in figures} | {"state": "state", "time": "time"}
    done = sum(row["state"] != "interrupted" for row in results["trials"])
    title = f"{results['method']} search in {results['dir']}, {done} of {results['asked']} trials, best first"
    parts = [f"{'## ' if markdown else ''}{title}", table(rows, columns, digits=2, markdown=markdown)]
    bullet = "- " if markdown else ""
    parts.append(
        "\n".join(f"{bullet}{names[key]}: {key}, {_range(axis)}" for key, axis in results["space"].items())
    )
    if errors := [
        f"{bullet}trial {row['trial']}: {row['error']}" for row in results["trials"] if row["error"]
    ]:
        parts.append("\n".join(errors))
    if results["best"] is not None:
        folder = results["dir"]
        parts.append(
            f"best: trial {results['best']}, {folder}/trials/{results['best']:03d}; "
            f"as a config: {folder}/best.yaml"
        )
    return "\n\n".join(parts)


def _range(axis: Mapping[str, Any]) -> str:
    if "values" in axis:
        return " | ".join(shown(value) for value in axis["values"])
    texts = [f"{shown(axis['low'])} to {shown(axis['high'])}"]
    texts += [f"in steps of {shown(axis['step'])}"] if "step" in axis else []
    return " ".join(
        [*texts, *(word for key, word in (("int", "(whole numbers)"), ("log", "(log)")) if axis.get(key))]
    )


def draw(results: Mapping[str, Any]) -> bytes:
    """PNG: the best objective so far over the trials, and the objective against every key. At least one trial
    is complete.

    A pruned trial is a mark at the bottom: what it had reached when it was stopped cannot be compared with a
    whole run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(
        (row for row in results["trials"] if row["state"] in ("complete", "pruned")),
        key=lambda row: row["trial"],
    )
    names = short_names(list(results["space"]))
    columns = min(3, 1 + len(names))
    lines = math.ceil((1 + len(names)) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * lines + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    _draw_progress(panels[0], rows, results["best"])
    for panel, (key, name) in zip(panels[1:], names.items(), strict=False):
        _draw_key(panel, rows, key, results["space"][key], results["best"])
        panel.set_xlabel(name)
    for i, panel in enumerate(panels):
        panel.set_visible(i <= len(names))
        panel.margins(y=0.12)  # room for the marks of pruned trials
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if i % columns == 0:
            panel.set_ylabel(
                results["objective"] if results["objective"] != "mean" else "mean of main metrics"
            )
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9, frameon=False
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


BLUE, GREY, RED = "#1f5fa8", "#8a8a8a", "#d1495b"
Rows = Sequence[Mapping[str, Any]]


def _draw_progress(panel: Any, rows: Rows, best: int) -> None:
    """Every trial by number, and the best complete one so far."""
    numbers = [row["trial"] for row in rows]
    complete = [row for row in rows if row["state"] == "complete"]
    reached = list(itertools.accumulate((row["objective"] for row in complete), max))
    places = [row["trial"] for row in complete]
    panel.step(
        [*places, numbers[-1]],
        [*reached, reached[-1]],
        where="post",
        color=RED,
        linewidth=1.3,
        label="best so far",
        zorder=1,
    )
    _dots(panel, rows, numbers, best)
    panel.set_xlim(0.5, numbers[-1] + 0.5)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("trial")


def _draw_key(panel: Any, rows: Rows, key: str, axis: Mapping[str, Any], best: int) -> None:
    values = [row["values"][key] for row in rows]
    if "values" in axis:
        texts = [encode(value) for value in axis["values"]]
        values = _spread([texts.index(encode(value)) for value in values])
        width = max(6, 48 // len(texts))
        panel.set_xticks(
            range(len(texts)), [_wrapped(shown(value), width) for value in axis["values"]], fontsize=8
        )
        panel.set_xlim(-0.5, len(texts) - 0.5)
    else:
        low, high = axis["low"], axis["high"]
        if axis.get("log"):
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter("{x:g}" if high / low < 10 else "")
            panel.tick_params(axis="x", which="both", labelsize=8)
            margin = (high / low) ** 0.04
            panel.set_xlim(low / margin, high * margin)
        else:
            margin = (high - low) * 0.04
            panel.set_xlim(low - margin, high + margin)
    _dots(panel, rows, values, best)


def _spread(places: Sequence[int]) -> list[float]:
    """Equal places side by side, centred on their tick, so that they do not hide one another."""
    seen: dict[int, int] = {}
    found = []
    for place in places:
        found.append((place, seen.get(place, 0)))
        seen[place] = seen.get(place, 0) + 1
    gap = min(0.06, 0.7 / max(seen.values()))
    return [place + gap * (k - (seen[place] - 1) / 2) for place, k in found]


def _dots(panel: Any, rows: Rows, values: Sequence[float], best: int) -> None:
    complete = [
        (value, row["objective"])
        for value, row in zip(values, rows, strict=True)
        if row["state"] == "complete"
    ]
    panel.plot(*zip(*complete, strict=True), "o", markersize=5, color=BLUE, alpha=0.85, label="complete")
    if pruned := [value for value, row in zip(values, rows, strict=True) if row["state"] == "pruned"]:
        bottom = panel.get_xaxis_transform()
        panel.plot(
            pruned, [0.03] * len(pruned), "x", transform=bottom, markersize=5, color=GREY, label="pruned"
        )
    top = next(i for i, row in enumerate(rows) if row["trial"] == best)
    look = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": RED, "linestyle": "none"}
    panel.plot(values[top], rows[top]["objective"], "o", label="best", **look)


def _wrapped(text: str, width: int) -> str:
    """At most five lines of ``width`` characters; a section without its braces."""
    lines = textwrap.wrap(text.removeprefix("{").removesuffix("}") or text, width)
    return "\n".join(lines if len(lines) <= 5 else [*lines[:4], ".."])
