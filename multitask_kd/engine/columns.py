"""Which figures of their tasks tables about networks show: columns whose names tell the tasks apart, as plain
data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..config import Config
from ..errors import UserError
from ..report.tables import Column
from ..tasks.base import Task, build_task, figure_names, kind_of
from .pictures import maps_first


def tasks_of(config: Config) -> dict[str, Task]:
    """The tasks of a config by name, for what does not depend on their classes. Raises UserError."""
    found = {}
    for name, section in config.tasks.items():
        classes = ("a",) if kind_of(name, section.kind, f"tasks.{name}").has_classes else ()
        found[name] = build_task(name, section.kind, classes, config.model.strides)
    return found


def merged_tasks(owners: Mapping[str, Mapping[str, Task]]) -> dict[str, Task]:
    """The tasks of several networks by name, in the order in which they first occur, those of maps before the
    rest.

    owners: by what the network is called, its tasks. Raises UserError where one name stands for two kinds.
    """
    found: dict[str, tuple[str, Task]] = {}
    for owner, tasks in owners.items():
        for name, task in tasks.items():
            first, known = found.setdefault(name, (owner, task))
            if known.kind != task.kind:
                raise UserError(
                    f"the task '{name}' is {known.kind} in '{first}' and {task.kind} in '{owner}', so their "
                    "figures do not belong in one table; leave one of them out"
                )
    tasks = {name: task for name, (_, task) in found.items()}
    return {name: tasks[name] for name in maps_first(tasks)}


def headline_columns(tasks: Mapping[str, Task]) -> dict[tuple[str, str], Column]:
    """(task, key of its headline) -> its column; the key and the heading have the task's name where another
    has such a figure."""
    return {
        (name, key): _renamed(tasks[name], key, shown) for (name, key), shown in figure_names(tasks).items()
    }


def _renamed(task: Task, key: str, shown: str) -> Column:
    column = next((c for columns in task.columns for c in columns if c.key == key), Column(key, key))
    return _called(column, shown)


def _called(column: Column, shown: str) -> Column:
    """The column under the key ``shown``, which ends in its own."""
    return replace(column, key=shown, heading=shown.removesuffix(column.key) + column.heading)


def comparison_columns(tasks: Mapping[str, Task], confidence: float | None) -> dict[str, Any]:
    """What a comparison shows of these tasks, as plain data for ``report.comparison``.

    confidence: see ``Task.more_columns``. Returns ``columns`` (of a figure a network, with the ``task`` and
    ``figure`` it is), ``by_class`` (likewise, of a figure a class; ``more``: whether it is one of
    ``Task.more_figures``), ``plotted`` (the keys of the columns with the tasks' main metrics) and ``notes``
    (what has to be known to read them).
    """
    headline = headline_columns(tasks)
    more = {name: task.more_columns(confidence) for name, task in tasks.items()}
    named = _more_names(tasks, more)
    columns, by_class = [], []
    for name, task in tasks.items():
        own = [(key, column) for (of, key), column in headline.items() if of == name]
        own += [(column.key, _called(column, named[name, column.key])) for column in more[name]]
        columns += [{"task": name, "figure": key, **asdict(column)} for key, column in own]
        keys = [(key, False) for key in task.by_class] + [(column.key, True) for column in more[name]]
        by_class += [
            {"task": name, "figure": key, "heading": task.called(key), "more": further}
            for key, further in keys
        ]
    return {
        "columns": columns,
        "by_class": by_class,
        "plotted": [
            headline[name, task.main_metric].key
            for name, task in tasks.items()
            if (name, task.main_metric) in headline
        ],
        "notes": list(dict.fromkeys(filter(None, (task.more_note(confidence) for task in tasks.values())))),
    }


def _more_names(
    tasks: Mapping[str, Task], more: Mapping[str, Sequence[Column]]
) -> dict[tuple[str, str], str]:
    """As ``figure_names`` does it: the key alone where no other task has it."""
    keys = [column.key for columns in more.values() for column in columns]
    return {
        (name, c.key): c.key if keys.count(c.key) == 1 or tasks[name].is_default else f"{name} {c.key}"
        for name, columns in more.items()
        for c in columns
    }
