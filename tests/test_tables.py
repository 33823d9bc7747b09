"""Tables on the terminal and in Markdown: of any rows, and of an evaluation."""

from types import SimpleNamespace

import numpy as np
import pytest

from multitask_kd import tasks  # noqa: F401  (fills the registry)
from multitask_kd.report.tables import Column, mean_and_spread, metrics_table, spread_text, table
from multitask_kd.tasks.base import build_task


def test_table():
    rows = [
        {"name": "baseline", "miou": 56.34, "size": 152712, "spread": "56.3 +- 1.2"},
        {"name": "kl", "miou": None, "size": 7, "spread": "8.0"},
    ]
    columns = {"name": "method", "miou": "mIoU", "size": "parameters", "spread": "AP", "none": "none"}
    assert table(rows, columns).split("\n") == [
        "method    mIoU  parameters           AP  none",
        "--------  ----  ----------  -----------  ----",
        "baseline  56.3      152712  56.3 +- 1.2     -",
        "kl           -           7          8.0     -",
    ]
    assert table(rows[:1], {"name": "a|b", "miou": "m"}, markdown=True, digits=2).split("\n") == [
        "| a\\|b     |     m |",
        "| -------- | ----: |",
        "| baseline | 56.34 |",
    ]
    assert table([], {"name": "method"}) == "method\n------"
    values = [np.int64(3), np.float32(2.5), True, float("nan"), (1, 2)]
    lines = table([{"v": v} for v in values], {"v": "value"}).split("\n")
    assert [line.strip() for line in lines[2:]] == ["3", "2.5", "yes", "nan", "(1, 2)"]


METRICS = {
    "images": 101,
    "seg": {"mIoU": 56.34, "pixel_accuracy": 88.25, "IoU": {"Sky": 93.12, "Car": 100.0, "Void": None}},
    "det": {
        **{
            "mAP": 23.1,
            "mAP50": 45.2,
            "mAP75": 20.0,
            "mAP_small": None,
            "mAP_medium": 20.1,
            "mAP_large": 40.2,
        },
        **{"AR1": 10.0, "AR10": 30.0, "AR100": 33.3, "AR_small": None, "AR_medium": 25.1, "AR_large": 45.2},
        "AP": {"Car": 23.1, "Person": 5.0},
    },
}


TASKS = {name: build_task(name, None, (), ()) for name in ("seg", "det")}


def test_metrics_table():
    assert metrics_table(METRICS, TASKS).split("\n") == [
        "101 images, figures in percent",
        "",
        "              mIoU  pixel accuracy",
        "------------  ----  --------------",
        "segmentation  56.3            88.2",
        "",
        "               mAP  mAP50  mAP75  small  medium  large",
        "------------  ----  -----  -----  -----  ------  -----",
        "detection     23.1   45.2   20.0      -    20.1   40.2",
        "",
        "               AR1  AR10  AR100  small  medium  large",
        "------------  ----  ----  -----  -----  ------  -----",
        "recall        10.0  30.0   33.3      -    25.1   45.2",
        "",
        "class     IoU    AP",
        "------  -----  ----",
        "Sky      93.1     -",
        "Car     100.0  23.1",
        "Void        -     -",
        "Person      -   5.0",
    ]


def test_the_order_of_the_tasks_in_a_config_does_not_matter():
    assert metrics_table(METRICS, dict(reversed(TASKS.items()))) == metrics_table(METRICS, TASKS)


def test_metrics_table_of_one_task():
    assert metrics_table({"images": 1, "seg": METRICS["seg"]}, TASKS).split("\n") == [
        "1 image, figures in percent",
        "",
        "              mIoU  pixel accuracy",
        "------------  ----  --------------",
        "segmentation  56.3            88.2",
        "",
        "class    IoU",
        "-----  -----",
        "Sky     93.1",
        "Car    100.0",
        "Void       -",
    ]
    only_boxes = metrics_table({"det": {"mAP": None, "AP": {"Car": None}}}, TASKS, markdown=True).split("\n")
    assert only_boxes[0] == "|           | mAP | mAP50 | mAP75 | small | medium | large |"
    assert only_boxes[-1] == "| Car   |   - |"
    assert metrics_table({"images": 0}, TASKS) == "0 images, figures in percent"


def test_digits_may_be_given_by_column():
    lines = table(
        [{"a": 1.234, "b": 5.678, "c": 9.1}], {"a": "a", "b": "b", "c": "c"}, digits={"a": 3, "b": 0}
    )
    assert lines.split("\n")[2].split() == ["1.234", "6", "9.1"]


SEVERAL = {
    **TASKS,
    **{name: build_task(name, "semantic", (), ()) for name in ("drivable", "lane")},
    "signs": build_task("signs", "detection", (), ()),
}


def test_tasks_of_one_kind_are_rows_of_one_table():
    figures = {"mIoU": 50.0, "pixel_accuracy": 75.0}
    found = metrics_table(
        {
            "images": 2,
            "drivable": figures | {"IoU": {"road": 90.0, "other": 10.0}},
            "det": {"mAP": 21.0, "AP": {"car": 21.0, "road": 1.0}},
            "lane": figures | {"mIoU": 7.25, "IoU": {"line": 14.5, "other": 0.0}},
        },
        SEVERAL,
    )
    assert found.split("\n") == [
        "2 images, figures in percent",
        "",
        "           mIoU  pixel accuracy",
        "---------  ----  --------------",
        "drivable   50.0            75.0",
        "lane        7.2            75.0",
        "",
        "            mAP  mAP50  mAP75  small  medium  large",
        "---------  ----  -----  -----  -----  ------  -----",
        "detection  21.0      -      -      -       -      -",
        "",
        "class  drivable IoU  lane IoU    AP",
        "-----  ------------  --------  ----",
        "road           90.0         -   1.0",
        "other          10.0       0.0     -",
        "line              -      14.5     -",
        "car               -         -  21.0",
    ]


def test_a_task_with_two_rows_of_figures_is_called_by_its_name_in_both():
    found = metrics_table({"signs": METRICS["det"]}, SEVERAL).split("\n")
    assert [line.split("  ")[0] for line in found] == [
        *("", "-" * 12, "signs", "", "", "-" * 12, "signs recall", "", "class", "------", "Car", "Person")
    ]
    assert "signs AP" in found[8]


def test_a_figure_that_is_no_percentage_carries_its_unit():
    columns = (
        (
            Column("delta1", "delta<1.25"),
            Column("AbsRel", "AbsRel (ratio)", 3),
            Column("RMSE", "RMSE (m)", 2),
        ),
    )
    task = SimpleNamespace(
        columns=columns, by_class=(), title="depth", row_titles=(), is_map=True, is_default=False, called=str
    )
    assert metrics_table(
        {"images": 1, "z": {"delta1": 91.0, "AbsRel": 0.1234, "RMSE": 3.456}}, {"z": task}
    ).split("\n") == [
        "1 image, figures in percent, where a heading names no unit",
        "",
        "   delta<1.25  AbsRel (ratio)  RMSE (m)",
        "-  ----------  --------------  --------",
        "z        91.0           0.123      3.46",
    ]


@pytest.mark.parametrize("kind", ["semantic", "detection", "classification", "depth"])
def test_every_figure_of_a_kind_has_a_place_in_the_table(kind):
    task = build_task("it", kind, ("a", "b"), (8,))
    figures = task.metric().compute()
    shown = {column.key for row in task.columns for column in row} | set(task.by_class)
    assert set(figures) == shown and {task.main_metric, *task.headline} <= shown
    assert metrics_table({"it": figures}, {"it": task}).count("\nit") == 1 + (len(task.columns) - 1)


def test_tables_are_ascii():
    assert (
        metrics_table(METRICS, TASKS) + metrics_table(METRICS, TASKS, markdown=True) + spread_text([1.0, 2.0])
    ).isascii()


def test_mean_and_spread():
    mean, spread = mean_and_spread([55.1, 56.3, 57.5])
    assert mean == pytest.approx(56.3) and spread == pytest.approx(1.2)  # sqrt((1.44 + 0 + 1.44) / 2)
    assert mean_and_spread(np.array([1.0, 2.0])) == (1.5, pytest.approx(0.5**0.5))
    assert mean_and_spread([3.0]) == (3.0, None)
    assert spread_text([55.1, 56.3, 57.5]) == "56.3 +- 1.2"
    assert spread_text([55.1, 56.3], digits=2) == "55.70 +- 0.85"
    assert spread_text([3.0]) == "3.0"
    assert spread_text([]) == "-"
    assert spread_text([55.1, None]) == "-"
    with pytest.raises(ValueError):
        mean_and_spread([])
