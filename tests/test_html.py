import csv
import io
import json
import re
from pathlib import Path

import browser
import numpy as np
import pytest

from multitask_kd import tasks as kinds  # noqa: F401  (fills the registry)
from multitask_kd.engine.columns import comparison_columns, merged_tasks
from multitask_kd.errors import UserError
from multitask_kd.report import plot
from multitask_kd.report.comparison import class_tables, csv_text, notes, quality_columns, rows, text
from multitask_kd.report.html import TEMPLATE, page
from multitask_kd.tasks.base import build_task

NASTY = "</script><script>alert(\"x\")</script> & 'é' {{SECTIONS}}"


def network(name, **changes):
    """One of ``engine.compare``'s results, made up."""
    counts = {"precision": 60.0, "recall": None, "F1": 55.5, "right": 5, "wrong": 3, "missed": 2}
    made = {
        "name": name, "path": f"runs/{name}/best.pt", "kind": "checkpoint", "weights": "fp32", "decoded": False,
        "input_size": [96, 128], "parameters": 1_250_000, "macs": 70_000_000, "flops": 140_000_000, "file_bytes": 5_000_000,
        "memory_mb": 40.0,
        "latency_ms": {"1": {"median": 10.0, "p10": 9.0, "p90": 14.0}, "8": {"median": 40.0, "p10": 1, "p90": 2}},
        "images": 7, "skipped": 1,
        "figures": {
            "seg": {"mIoU": 51.23, "pixel_accuracy": 80.0, "IoU": {"road": 70.0, NASTY: None}},
            "det": {"mAP": 21.0, "mAP50": 40.0, "AP": {"car": 30.0, NASTY: 12.0}},
        },
        "more": {
            "det": {
                **counts, "confidence": 0.31, "classes": {"car": counts, NASTY: counts},
                "best_F1": 55.5, "best_confidence": 0.31,
            },
        },
    }  # fmt: skip
    figures = made["figures"] | changes.pop("figures", {})
    return made | changes | {"figures": {task: values for task, values in figures.items() if values}}


BOTH = {name: build_task(name, None, ("a",), (8,)) for name in ("seg", "det")}


def results(*networks, tasks=BOTH, confidence=None):
    return {**comparison_columns(tasks, confidence),
        "command": "python tools/compare.py 'a b.pt' " + NASTY, "date": "2020-01-01 00:00 UTC", "machine": "x86_64, 2 cores",
        "device": "cpu", "threads": 1, "software": {"torch": "2"}, "batch": 8, "runs": 20, "confidence": confidence,
        "decode": {"det": {}}, "data": {"images": 7, "skipped": 1, "of": 8}, "networks": list(networks),
    }  # fmt: skip


@pytest.fixture(scope="module")
def made():
    """Six networks, one of them slow and unmeasured in part, one with a name that would be markup."""
    times = {"1": {"median": 95.0, "p10": 90.0, "p90": 120.0}, "8": {"median": 400.0, "p10": 1, "p90": 2}}
    networks = [
        network(f"n{i}", figures={"seg": {"mIoU": 50.0 + i, "IoU": {"road": 50.0 + i}}}) for i in range(3)
    ]
    networks += [
        network(
            "a-rather-long-name-without-any-space-in-it/seed0", latency_ms=times, macs=None, memory_mb=None
        )
    ]
    networks += [network(NASTY, parameters=9_000_000), network("boxes only", figures={"seg": None})]
    shade = np.full((60, 320, 3), 90, np.uint8)
    drawn = {
        "columns": ["truth", *(n["name"] for n in networks)], "rows": [(NASTY, [shade] * 7)],
        "classes": {"seg": ("road", NASTY), "det": ("car", NASTY)}, "score": 0.3,
    }  # fmt: skip
    found = results(*networks)
    return found, page(found, drawn)


def test_nothing_is_loaded_and_everything_is_escaped(made):
    _, text = made
    assert (
        not re.findall(r"""(?:src|href)=["'](?!data:)[^"']*""", text)
        and "url(" not in text
        and "@import" not in text
    )
    assert "default-src" in text and text.count("<script") == 1 and "alert(&quot;x&quot;)" in text
    assert "&lt;/script&gt;" in text and "{{SECTIONS}}" in text  # a name is not taken for a place to fill
    assert not re.search(r"\{\{(?!SECTIONS)", text)
    assert set(re.findall(r"\{\{(\w+)\}\}", TEMPLATE.read_text(encoding="utf-8"))) == {
        "POLICY",
        "TITLE",
        "LEAD",
        "SECTIONS",
    }


def test_a_name_is_no_formula_in_a_spreadsheet():
    found = list(
        csv.DictReader(
            io.StringIO(csv_text(results(network("=HYPERLINK(1)"), network("-a", path="@b"), network("c=d"))))
        )
    )
    assert [row["network"] for row in found] == ["'=HYPERLINK(1)", "'-a", "c=d"] and found[1]["path"] == "'@b"
    assert found[0]["ms"] == "10.0"


def test_the_columns_of_a_segmenting_detector():
    found = results(network("n"))
    assert [(c.key, c.heading, c.digits, c.better) for c in quality_columns(found)] == [
        ("mIoU", "mIoU", 1, 1), ("mAP", "mAP", 1, 1), ("mAP50", "mAP50", 1, 1), ("precision", "precision", 1, 1),
        ("recall", "recall", 1, 1), ("F1", "F1", 1, 1), ("confidence", "at conf.", 3, 0),
    ]  # fmt: skip
    more = [c.key for c in quality_columns(results(network("n"), confidence=0.2))]
    assert more[-3:] == ["confidence", "best_F1", "best_confidence"]
    (row,) = rows(found)
    assert [row[key] for key in ("mIoU", "mAP", "mAP50", "precision", "recall", "F1", "confidence")] == [
        51.23, 21.0, 40.0, 60.0, None, 55.5, 0.31
    ]  # fmt: skip
    assert [part.heading for part in class_tables(found)] == ["IoU", "AP", "precision", "recall", "F1"]
    shown = text(found)  # of precision, recall and F1 by class the last, which sums the others up
    assert "F1 by class" in shown and "precision by class" not in shown and "recall by class" not in shown
    best = "the confidence at which the network's F1 is highest; it was chosen on these same images."
    assert notes(found)[-1] == f"Precision, recall and F1: boxes matched at IoU 0.5, at {best}"
    assert notes(results(network("n"), confidence=0.2))[-1].endswith("IoU 0.5, at a confidence of 0.2.")
    assert text(json.loads(json.dumps(found))) == shown  # the JSON alone can be drawn again


def made_up(kind, name):
    """A task, its figures in percent from 10 on, and the rest 0.125."""
    task = build_task(name, kind, ("a", "b"), (8,))
    figures, number = {}, 10.0
    for columns in task.columns:
        for column in columns:
            figures[column.key], number = (number, number + 1) if column.better > 0 else (0.125, number)
    return task, figures | {key: {"a": 1.0, "b": None} for key in task.by_class}


def test_several_tasks_of_a_kind_are_told_apart_by_their_names():
    given = {
        "lane": "semantic",
        "drivable": "semantic",
        "signs": "detection",
        "weather": "classification",
        "z": "depth",
    }
    tasks, figures = {}, {}
    for name, kind in given.items():
        tasks[name], figures[name] = made_up(kind, name)
    one = network("n", more={}) | {"figures": figures}
    found = results(one, tasks=tasks)
    keys = [column.key for column in quality_columns(found)]
    assert keys[:4] == ["lane mIoU", "drivable mIoU", "mAP", "mAP50"] and "top1" in keys and "delta1" in keys
    assert rows(found)[0]["lane mIoU"] == 10.0 and rows(found)[0]["delta1"] == 10.0
    assert [part.heading for part in class_tables(found)] == [
        "lane IoU",
        "drivable IoU",
        "signs AP",
        "weather accuracy",
    ]
    assert page(found).count('<svg class="plot"') == 3 * 5  # the main metric of each task against each cost
    assert "lane IoU/a" in csv_text(found) and "lane mIoU, percent" in page(found)


def test_a_network_without_a_task_has_no_figure_of_it():
    lane, figures = made_up("semantic", "lane")
    other = network("other", more={}) | {"figures": {"lane": figures}}
    found = results(network("n"), other, tasks=BOTH | {"lane": lane})
    assert [row["mIoU"] for row in rows(found)] == [51.23, None]
    assert [row["lane mIoU"] for row in rows(found)] == [None, 10.0]
    by_class = {part.heading: dict(part.rows) for part in class_tables(found)}
    assert by_class["lane IoU"]["a"] == [None, 1.0] and by_class["IoU"]["road"] == [70.0, None]


def test_one_name_for_two_kinds_is_refused():
    a, b = build_task("it", "semantic", ("a",), (8,)), build_task("it", "depth", (), (8,))
    with pytest.raises(UserError, match="'it' is semantic in 'one' and depth in 'two'"):
        merged_tasks({"one": {"it": a}, "two": {"it": b}})
    det, seg = BOTH["det"], BOTH["seg"]
    assert list(merged_tasks({"one": {"det": det}, "two": {"it": a, "seg": seg, "det": det}})) == [
        "it",
        "seg",
        "det",
    ]


def test_the_template_travels_with_the_package():
    setup = (Path(__file__).parents[1] / "setup.cfg").read_text(encoding="utf-8")
    assert "multitask_kd = report/*.html" in setup


def test_a_page_without_pictures_and_with_one_network():
    text = page(results(network("one")))
    assert (
        "<h2>Pictures</h2>" not in text and "<b>" not in text.split("<script>")[0]
    )  # nothing is best among one


def test_axes_and_marks_of_a_plot():
    points = [
        plot.Point("a", 1, 50, front=True),
        plot.Point("b", 100, 60, 90, 130, front=True),
        plot.Point("c & d", 50, 40),
    ]
    svg = plot.scatter(points, "ms", "mIoU")
    assert (
        svg.count("<circle") == 3 and svg.count('class="dot front"') == 2 and svg.count('class="spread"') == 1
    )
    assert "ms, logarithmic" in svg and ">c &amp; d</text>" in svg
    xs = {name: float(x) for x, name in re.findall(r'cx="([\d.]+)"[^>]*><title>(\w)', svg)}
    assert plot.LEFT < xs["a"] < xs["c"] < xs["b"] < plot.WIDTH
    alone = plot.scatter([plot.Point("a", 0, 0)], "ms", "mIoU")  # neither axis has an extent
    assert "nan" not in alone and "inf" not in alone
    crowd = plot.scatter(
        [plot.Point(f"network {i}", 5 + i * 1e-3, 50 + i * 1e-3) for i in range(40)], "ms", "mIoU"
    )
    assert (
        crowd.count("<circle") == 40 and 0 < crowd.count('class="name"') < 40
    )  # the others would lie upon one another


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    program = browser.find()
    if not program:
        pytest.skip("no Chromium or Chrome on this machine; install one, or set MTKD_BROWSER to its path")
    with browser.Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser(made, window, tmp_path, width):
    found, text = made
    (tmp_path / "p.html").write_text(text, encoding="utf-8")
    window.errors.clear()
    window.requests.clear()
    window.open(tmp_path / "p.html", width, dark=width == 400)
    assert window.run("document.documentElement.scrollWidth") <= width
    shown = window.run(
        "[...document.querySelectorAll('#summary tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert [line[0] for line in shown] == [line["network"] for line in rows(found)]
    heads = window.run("[...document.querySelectorAll('#summary thead th')].map(c => c.textContent)")
    assert [line[heads.index("mIoU")] for line in shown] == ["50.0", "51.0", "52.0", "51.2", "51.2", "-"]
    assert window.run("document.querySelectorAll('svg.plot').length") == 6
    cut = (
        "[...document.querySelectorAll('svg.plot text')].filter(t => { const a = t.getBoundingClientRect(), "
    )
    cut += "b = t.ownerSVGElement.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1 }).length"
    assert window.run(cut) == 0
    assert window.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert (
        window.errors == []
        and [url for url in window.requests if not url.startswith(("data:", "file:"))] == []
    )
    assert window.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 24, 28)" if width == 400 else "rgb(255, 255, 255)"
    )


def test_a_click_sorts_and_what_was_not_measured_comes_last(made, window, tmp_path):
    (tmp_path / "p.html").write_text(made[1], encoding="utf-8")
    window.open(tmp_path / "p.html")
    click = "[...document.querySelectorAll('#summary th button')].find(b => b.textContent === '{}').click()"
    names = "[...document.querySelectorAll('#summary tbody tr')].map(r => r.cells[0].textContent)"
    window.run(click.format("mIoU"))
    first = window.run(names)
    assert first[0] == "n2" and first[-1] == "boxes only"
    window.run(click.format("mIoU"))
    again = window.run(names)
    assert again[0] == "n0" and again[-1] == "boxes only"
    window.run(click.format("network"))
    assert (
        window.run(names)[-1] == "n2"
        and window.run("document.querySelectorAll('#summary [aria-sort]').length") == 1
    )
