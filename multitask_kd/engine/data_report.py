"""What is in a data set, before anything is trained on it: counts, classes, sizes, faults, and pictures."""

from __future__ import annotations

import logging
import re
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import build
from ..config import Config
from ..data.base import Layout
from ..data.transforms import fit
from ..errors import UserError
from ..report.colours import is_background
from ..report.pictures import save_png
from ..report.sheet import Labelled, contact_sheet
from ..report.tables import table
from ..tasks.base import DEFAULT_KINDS, KINDS, Tally, Task, kind_of
from ..tasks.tallies import counted
from .pictures import class_names, label_layers, maps_first, missing_text

log = logging.getLogger(__name__)

LISTED = 10  # unreadable files, image sizes: how many are told one by one
NAMED, WIDTH = 40, 120  # names of classes in one list, characters in a line
EVERY = 15.0  # seconds between two words about the progress


@dataclass
class Report:
    """What ``describe`` found in a set; ``str`` of it is for the terminal, ``figures`` for a file.

    name: the set's key path. images, looked: how many it has, and were looked at. input_size: (H, W), pixels.
    kinds, tallies: by label. known: by label, bool [C], classes that are labelled in some image.
    sizes: images by (width, height). unreadable: what was said of each file. readable: indices of the others.
    sheet: the file with the pictures.
    """

    name: str
    images: int
    looked: int
    input_size: tuple[int, int]
    kinds: Mapping[str, type[Task]] = field(default_factory=dict)
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    known: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    faults: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    readable: list[int] = field(default_factory=list)
    sheet: str | None = None

    @property
    def read(self) -> int:
        """Images that could be read."""
        return len(self.readable)

    @property
    def labelled(self) -> dict[str, int]:
        """Labelled images by label."""
        return {label: tally.labelled for label, tally in self.tallies.items()}

    def figures(self) -> dict[str, Any]:
        """Plain data; shares in percent."""
        found: dict[str, Any] = {"images": self.images, "looked_at": self.looked, "read": self.read}
        found |= {
            "labelled": self.labelled,
            "image_sizes": {f"{w}x{h}": n for (w, h), n in self.sizes.most_common()},
        }
        for label, tally in self.tallies.items():
            found[label] = tally.figures()
            if self._not_labelled(label):
                found[label]["labelled_classes"] = self._labelled_classes(label)
        return found | {"faults": self.faults, "unreadable": self.unreadable, "sheet": self.sheet}

    def __str__(self) -> str:
        tables = [self._classes(labels) for labels in self._tables()]
        sections = [
            self._named(label, text) for label, tally in self.tallies.items() for text in tally.sections()
        ]
        return "\n\n".join(filter(None, [self._head(), *tables, *sections, self._faults(), self._sheet()]))

    def _head(self) -> str:
        looked = (
            "" if self.looked == self.images else f", {self.looked} of them looked at, spread over the set"
        )
        broken = f", of which {self.read} can be read" if self.unreadable else ""
        rows = {"images": f"{self.images}{looked}{broken}"}
        for label, tally in self.tallies.items():
            rows[label] = f"{_of(tally.labelled, self.read)} labelled"
            if self.kinds[label].has_classes:
                rest = f"{len(self._labelled_classes(label))} of " if self._not_labelled(label) else ""
                rows[label] += f", {rest}{counted(len(tally.classes), 'class', 'classes')}"
            rows[label] += tally.summary()
        if self.sizes:
            rows["sizes"] = self._sizes()
        width = max(map(len, rows))
        return "\n".join([f"== {self.name}", *(f"{what:{width}}  {text}" for what, text in rows.items())])

    def _sizes(self) -> str:
        """Width x height of the images, the commonest first."""
        common = self.sizes.most_common(4)
        text = ", ".join(f"{w}x{h} ({n})" if len(self.sizes) > 1 else f"{w}x{h}" for (w, h), n in common)
        if rest := len(self.sizes) - len(common):
            widths, heights = zip(*self.sizes, strict=True)
            bounds = f"{min(widths)} to {max(widths)} wide and {min(heights)} to {max(heights)} high"
            typical = 2 * sum(n for _, n in common) > self.read
            text = (
                f"{text} and {rest} more, {bounds}" if typical else f"{len(self.sizes)} different, {bounds}"
            )
        scales = sorted({fit((h, w), self.input_size).content[1] / w for w, h in self.sizes})
        least, most = f"{scales[0]:.2f}", f"{scales[-1]:.2f}"
        by = least if least == most else f"{least} to {most}"
        return f"{text}; scaled by {by} into the input of {self.input_size[1]}x{self.input_size[0]}"

    def _tables(self) -> list[list[str]]:
        """The labels with classes, those in a list that share a table.

        Labels of default names stand in one; another joins the first table that has one of its classes.
        """
        found: list[list[str]] = []
        for label in sorted(self.tallies, key=lambda label: not self._is_default(label)):
            mine = self._foreground(label)
            shares = (
                t for t in found if self._is_default(label) or any(mine & self._foreground(o) for o in t)
            )
            if (joined := next(shares, None)) is not None:
                joined.append(label)
            elif self.kinds[label].has_classes:
                found.append([label])
        return found

    def _foreground(self, label: str) -> set[str]:
        return {name for name in self.tallies[label].classes if not is_background(name)}

    def _classes(self, labels: Sequence[str]) -> str:
        """One row a class that occurs; the others by name underneath."""
        columns, rows = {"": "class"}, {}
        for label in labels:
            tally = self.tallies[label]
            for key, heading in tally.class_columns().items():
                columns[f"{label}.{key}"] = heading if self._is_default(label) else f"{label} {heading}"
            occur = set(tally.classes) - set(tally.never())
            for name in tally.classes:
                row = rows.setdefault(name, {"": name, "occurs": False})
                row |= {f"{label}.{key}": value for key, value in tally.class_row(name).items()}
                row["occurs"] |= name in occur
        shown = [row for row in rows.values() if row["occurs"]]
        parts = [table(shown, columns, digits=2)] if shown else []
        return "\n".join([*parts, *(line for label in labels for line in self._never(label))])

    def _never(self, label: str) -> list[str]:
        """What is said of the classes of a label that are in no image."""
        known, lacking, whole = (
            self._labelled_classes(label),
            self._not_labelled(label),
            self.looked == self.images,
        )
        names = [name for name in self.tallies[label].never() if name in known]
        where = "" if whole else f" in the {self.read} images"
        lines = []
        if names:
            share = f"{_of(len(names), len(known))} classes"
            lines.append(f"NEVER in {self._labels_called(label)}{where}, {share}: {_listed(names)}")
        if names and whole:
            them = "it" if len(names) == 1 else "them"
            key = f"{self.name}.classes.{label}"
            lines.append(f"  if the set does not label {them}, say so: {key}: [the classes it labels]")
        if lacking:
            lines.append(f"not labelled in {self._labels_called(label)} of this set: {_listed(lacking)}")
        return [part for line in lines for part in _wrapped(line)]

    def _labels_called(self, label: str) -> str:
        """ "masks", "boxes"; of a label that has not its kind's default name "lane labels"."""
        word = self.kinds[label].label_word
        return (word if word.endswith("s") else f"{word}s") if self._is_default(label) else f"{label} labels"

    def _labelled_classes(self, label: str) -> list[str]:
        known = self.known.get(label)
        return [n for i, n in enumerate(self.tallies[label].classes) if known is None or known[i]]

    def _not_labelled(self, label: str) -> list[str]:
        """Classes of a label that the set is said not to label."""
        labelled = self._labelled_classes(label)
        return [name for name in self.tallies[label].classes if name not in labelled]

    def _is_default(self, label: str) -> bool:
        return DEFAULT_KINDS.get(label) == self.kinds[label].kind

    def _named(self, label: str, text: str) -> str:
        return text if self._is_default(label) else f"{label}: {text}"

    def _faults(self) -> str:
        lines = [f"{fault}: {count}" for fault, count in self.faults.items()]
        if self.unreadable:
            lines.append(f"{_of(len(self.unreadable), self.looked)} images CANNOT BE READ")
            lines += [f"  {message}" for message in self.unreadable[:LISTED]]
            if (more := len(self.unreadable) - LISTED) > 0:
                lines.append(f"  and {more} more")
        return "\n".join(["faults", *(f"  {line}" for line in lines)]) if lines else "no faults found"

    def _sheet(self) -> str:
        return f"pictures: {self.sheet}" if self.sheet else ""


def describe(
    name: str,
    source: Layout,
    kinds: Mapping[str, type[Task]],
    input_size: Sequence[int],
    *,
    cells: Mapping[str, int | None] | None = None,
    limit: int | None = None,
    workers: int = 0,
) -> Report:
    """Read the images of a set, or ``limit`` of them spread over it, and count what is labelled in them.

    Never stops at a broken file.

    Args:
        name: of the set, as the report calls it: its key path in the config.
        kinds: the labels to describe, and the kind of each.
        input_size: (H, W) of the network's input in pixels.
        cells: by label, the finest stride in pixels that reads it; None or missing where that is not known.
        workers: threads that read.
    """
    indices = _spread(len(source), limit)
    size, cells = (int(input_size[0]), int(input_size[1])), cells or {}
    kinds = {label: kinds[label] for label in maps_first(kinds)}
    tallies = {
        label: kind.Tally(source.classes[label], size, cells.get(label)) for label, kind in kinds.items()
    }
    report = Report(name, len(source), len(indices), size, kinds, tallies)
    told = time.monotonic()
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        looks = pool.map(lambda index: _look(source, tallies, index), indices)
        for done, (index, seen) in enumerate(zip(indices, looks, strict=True)):
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                log.info("%s: %d of %d images read", name, done, len(indices))
            if isinstance(seen, str):
                report.unreadable.append(seen)
            else:
                report.readable.append(index)
                _add(report, seen)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest of the set
    report.faults = {
        fault: int(count) for fault, count in source.faults.items()
    }  # after reading, which may find more
    return report


@dataclass(frozen=True)
class _Seen:
    """What is counted of one image: (h, w); by label what its tally saw and the known classes (None: all)."""

    size: tuple[int, int]
    looked: dict[str, Any]
    known: dict[str, np.ndarray | None]


def _look(source: Layout, tallies: Mapping[str, Tally], index: int) -> _Seen | str:
    """What one image holds; of an image that cannot be read what is wrong with it."""
    try:
        sample = source.read(index)
    except (UserError, OSError) as error:
        message = str(error)
        return message if source.name(index) in message else f"{source.name(index)}: {message}"
    size, given = sample.image.shape[:2], [label for label in tallies if label in sample.labels]
    looked = {label: tallies[label].look(sample.labels[label], size) for label in given}
    return _Seen(size, looked, {label: sample.known.get(label) for label in given})


def _add(report: Report, seen: _Seen) -> None:
    height, width = seen.size
    report.sizes[width, height] += 1
    for label, looked in seen.looked.items():
        report.tallies[label].add(looked)
        known = seen.known[label]
        known = np.ones(len(report.tallies[label].classes), bool) if known is None else known
        report.known[label] = report.known.get(label, known) | known


def draw_sheet(report: Report, source: Layout, count: int) -> np.ndarray:
    """The labels of ``count`` of the images that could be read, spread over the set: uint8 [H,W,3]."""
    tasks = {label: kind(label, source.classes[label], ()) for label, kind in report.kinds.items()}
    shown = []
    for place in _spread(report.read, count):
        index = report.readable[place]
        sample = source.read(index)
        layers = label_layers(tasks, sample)
        shown.append(Labelled(source.name(index), sample.image, layers, missing_text(tasks, layers)))
    return contact_sheet(shown, class_names(tasks))


def layouts_of(config: Config) -> dict[str, Layout]:
    """The sets of a config, by the key that describes them. Raises UserError."""
    build.check(config)
    found = {}
    for split in ("train", "val"):
        sets = build.open_sets(config, split)
        found |= {build.set_key_path(config, split, name): sets.alone(name) for name in sets.members}
    return found


def report_data(config: Config, folder: str | Path, *, pictures: int, limit: int | None) -> Iterator[Report]:
    """A report of each set of the config, its sheet of ``pictures`` images written into ``folder``.

    limit: how many images of each set are read; None: all. Raises UserError.
    """
    for option, value, least in (("--images", pictures, 0), ("--limit", limit, 1)):
        if value is not None and value < least:
            raise UserError(f"{option}: needs a number from {least}, not {value}")
    cells, size, workers = finest_cells(config), config.data.input_size, config.data.workers
    for name, source in layouts_of(config).items():
        report = describe(
            name, source, kinds_of(config, source), size, cells=cells, limit=limit, workers=workers
        )
        if report.readable and pictures:
            path = Path(folder) / (re.sub(r"[^\w.-]", "_", name) + ".png")
            save_png(path, draw_sheet(report, source, pictures))
            report.sheet = str(path)
        yield report


def kinds_of(config: Config, source: Layout) -> dict[str, type[Task]]:
    """The kind of each label of a set: of the config's task of that name, else what the set itself says."""
    given = {name: kind_of(name, task.kind, f"tasks.{name}") for name, task in config.tasks.items()}
    return {label: given.get(label) or KINDS.get(source.kinds[label], label) for label in source.classes}


def finest_cells(config: Config) -> dict[str, int]:
    """By task, the finest stride of its head in pixels."""
    config = build.resolve_init(config).config
    return {
        name: min(task.head.get("strides") or config.model.strides) for name, task in config.tasks.items()
    }


def _spread(count: int, limit: int | None) -> list[int]:
    """``limit`` of ``count`` places, evenly from the first to the last; all when there are no more."""
    if limit is None or limit >= count:
        return list(range(count))
    return np.linspace(0, count - 1, num=limit, dtype=int).tolist()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _of(part: int, whole: int) -> str:
    return f"all {whole}" if part == whole else f"{part} of {whole}"
