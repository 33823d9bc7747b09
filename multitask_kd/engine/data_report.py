"""What is in a data set, before anything is trained on it: counts, classes, sizes, faults, and a sheet of pictures."""

from __future__ import annotations

import logging
import re
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..batch import IGNORE
from ..build import check, layout, resolve_init, set_place
from ..config import Config
from ..data.base import Layout, Sample
from ..data.transforms import MIN_AREA_PX, fit
from ..errors import UserError
from ..report.pictures import save_png
from ..report.sheet import Labelled, contact_sheet
from ..report.tables import table

log = logging.getLogger(__name__)

QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "half": 0.5, "75%": 0.75, "95%": 0.95, "most": 1.0}
COCO_SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": np.inf}  # pixels of area below which COCO's evaluation says so
LISTED = 10  # unreadable files, image sizes: how many are told one by one
NAMED, WIDTH = 40, 120  # names of classes in one list, characters in a line
EVERY = 15.0  # seconds between two words about the progress


@dataclass
class Report:
    """What ``describe`` found in a set; ``str`` of it is for the terminal, ``figures`` for a file.

    images, read: in the set; those that could be read. labelled: images by task. unreadable: what was said of each file.
    sizes: images by (width, height). classes: by task and name, in index order; seg: "pixels" and "images" with some,
    det: "boxes", "crowds" and "images" with either. void: pixels that do not count. box_px: [M] square root of every
    box's area in pixels of the network's input, crowds left out. areas: [M] of the same in pixels of the original.
    empty: labelled images without a box. cell: finest stride that detects, in pixels. readable: their indices.
    """

    name: str
    images: int
    looked: int
    input_size: tuple[int, int]
    cell: int | None
    labelled: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    void: int = 0
    empty: int = 0
    box_px: np.ndarray = field(default_factory=lambda: np.zeros(0))
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0))
    faults: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    readable: list[int] = field(default_factory=list)
    sheet: str | None = None

    @property
    def read(self) -> int:
        return len(self.readable)

    def figures(self) -> dict[str, Any]:
        """Plain data; shares in percent."""
        found: dict[str, Any] = {"images": self.images, "looked_at": self.looked, "read": self.read, "labelled": self.labelled}
        found["image_sizes"] = {f"{w}x{h}": n for (w, h), n in self.sizes.most_common()}
        if seg := self.classes.get("seg"):
            counted = sum(entry["pixels"] for entry in seg.values())
            shares = {name: entry | {"percent": _percent(entry["pixels"], counted)} for name, entry in seg.items()}
            found["seg"] = {"void_percent": _percent(self.void, counted + self.void), "classes": shares}
        if det := self.classes.get("det"):
            found["det"] = {"boxes": len(self.box_px), "images_without_boxes": self.empty, "classes": det}
            if len(self.box_px):
                spread = np.quantile(self.box_px, list(QUANTILES.values())).round(2).tolist()
                found["det"] |= {
                    "input_px": dict(zip(QUANTILES, spread, strict=True)),
                    "below_cell_percent": _percent((self.box_px < self.cell).sum(), len(self.box_px)) if self.cell else None,
                    "left_out_percent": _percent((self.box_px**2 < MIN_AREA_PX).sum(), len(self.box_px)),
                    "coco_percent": dict(zip(COCO_SIZES, _bins(self.areas), strict=True)),
                }
        return found | {"faults": self.faults, "unreadable": self.unreadable, "sheet": self.sheet}

    def __str__(self) -> str:
        return "\n\n".join(filter(None, [self._head(), self._classes(), self._boxes(), self._faults(), self._sheet()]))

    def _head(self) -> str:
        looked = "" if self.looked == self.images else f", {self.looked} of them looked at, spread over the set"
        broken = f", of which {self.read} can be read" if self.unreadable else ""
        rows = [{"what": "images", "text": f"{self.images}{looked}{broken}"}]
        for task, names in sorted(self.classes.items(), key=lambda item: item[0] != "seg"):
            text = f"{_of(self.labelled[task], self.read)} labelled, {_count(len(names), 'class', 'classes')}"
            if task == "seg":
                counted = sum(entry["pixels"] for entry in names.values())
                text += f", {_percent(self.void, counted + self.void):.1f} % of the pixels void"
            if task == "det" and self.labelled[task]:
                boxes, crowds = len(self.box_px), sum(entry["crowds"] for entry in names.values())
                text += f", {_count(boxes, 'box', 'boxes')}" + (f" and {_count(crowds, 'crowd')}" if crowds else "")
                text += f", {boxes / self.labelled[task]:.1f} an image"
                text += f", {_count(self.empty, 'image')} without any" if self.empty else ""
            rows.append({"what": task, "text": text})
        if self.sizes:
            rows.append({"what": "sizes", "text": self._sizes()})
        width = max(len(row["what"]) for row in rows)
        return "\n".join([f"== {self.name}", *(f"{row['what']:{width}}  {row['text']}" for row in rows)])

    def _sizes(self) -> str:
        """Width x height of the images, the commonest first."""
        common = self.sizes.most_common(4)
        text = ", ".join(f"{w}x{h} ({n})" if len(self.sizes) > 1 else f"{w}x{h}" for (w, h), n in common)
        if rest := len(self.sizes) - len(common):
            widths, heights = zip(*self.sizes, strict=True)
            bounds = f"{min(widths)} to {max(widths)} wide and {min(heights)} to {max(heights)} high"
            typical = 2 * sum(n for _, n in common) > self.read
            text = f"{text} and {rest} more, {bounds}" if typical else f"{len(self.sizes)} different, {bounds}"
        scales = sorted({fit((h, w), self.input_size).content[1] / w for w, h in self.sizes})
        by = f"{scales[0]:.2f}" + (f" to {scales[-1]:.2f}" if f"{scales[-1]:.2f}" != f"{scales[0]:.2f}" else "")
        return f"{text}; scaled by {by} into the input of {self.input_size[1]}x{self.input_size[0]}"

    def _classes(self) -> str:
        """One row a class that occurs; the others by name underneath."""
        seg, det = self.classes.get("seg", {}), self.classes.get("det", {})
        counted = sum(entry["pixels"] for entry in seg.values())
        columns, rows, never = {"name": "class"}, [], []
        if seg:
            columns |= {"percent": "% of pixels", "seg": "in masks"}
            never.append(("masks", [name for name, entry in seg.items() if not entry["images"]], seg))
        if det:
            columns |= {"boxes": "boxes", "crowds": "crowds", "det": "in images"}
            if not any(entry["crowds"] for entry in det.values()):
                del columns["crowds"]
            never.append(("boxes", [name for name, entry in det.items() if not entry["images"]], det))
        for name in dict.fromkeys([*seg, *det]):
            row: dict[str, Any] = {"name": name}
            if mine := seg.get(name):
                row |= {"percent": _percent(mine["pixels"], counted), "seg": mine["images"]}
            if mine := det.get(name):
                row |= {"boxes": mine["boxes"], "crowds": mine["crowds"], "det": mine["images"]}
            if row.get("seg") or row.get("det"):
                rows.append(row)
        parts = [table(rows, columns, digits=2)] if rows else []
        where = "" if self.looked == self.images else f" in the {self.read} images"
        for kind, names, known in never:
            if names:
                share = f"{_of(len(names), len(known))} classes"
                rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                text = f"NEVER in {kind}{where}, {share}: {', '.join(names[:NAMED])}{rest}"
                parts += textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(parts)

    def _boxes(self) -> str:
        if not len(self.box_px):
            return ""
        det = self.figures()["det"]
        lines = [f"box size, sqrt(width x height) in pixels of the input of {self.input_size[1]}x{self.input_size[0]}"]
        lines.append(table([det["input_px"]], {key: key for key in QUANTILES}))
        if self.cell:
            lines.append(f"{det['below_cell_percent']:.1f} % are smaller than the finest detection cell of {self.cell} pixels")
        if det["left_out_percent"]:
            lines.append(f"{det['left_out_percent']:.1f} % cover less than {MIN_AREA_PX} pixels there and are left out in training")
        shares = ", ".join(f"{share:.1f} % {name}" for name, share in det["coco_percent"].items())
        return "\n".join([*lines, f"by COCO's areas, in original pixels: {shares}"])

    def _faults(self) -> str:
        lines = [f"{fault}: {count}" for fault, count in self.faults.items()]
        if self.unreadable:
            lines.append(f"{_of(len(self.unreadable), self.looked)} images CANNOT BE READ")
            lines += [f"  {said}" for said in self.unreadable[:LISTED]]
            if (more := len(self.unreadable) - LISTED) > 0:
                lines.append(f"  and {more} more")
        return "\n".join(["faults", *(f"  {line}" for line in lines)]) if lines else "no faults found"

    def _sheet(self) -> str:
        return f"pictures: {self.sheet}" if self.sheet else ""


def describe(
    name: str, source: Layout, input_size: Sequence[int], *, cell: int | None = None, limit: int | None = None, workers: int = 0
) -> Report:
    """Read the images of a set, or ``limit`` of them spread over it, and count what is there. Never stops at a broken file.

    input_size: (H, W) of the network's input in pixels. cell: the finest stride that detects. workers: threads that read.
    """
    indices = _spread(len(source), limit)
    report = Report(name, len(source), len(indices), (int(input_size[0]), int(input_size[1])), cell)
    report.labelled = dict.fromkeys(source.classes, 0)
    seg, det = np.zeros((2, IGNORE + 1), np.int64), np.zeros((3, len(source.classes.get("det", ()))), np.int64)
    sizes, areas = [report.box_px], [report.areas]
    told = time.monotonic()
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        looks = pool.map(lambda index: _look(source, index), indices)
        for done, (index, seen) in enumerate(zip(indices, looks, strict=True)):
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                log.info("%s: %d of %d images read", name, done, len(indices))
            if isinstance(seen, str):
                report.unreadable.append(seen)
                continue
            report.readable.append(index)
            (height, width), pixels, boxes = seen
            report.sizes[width, height] += 1
            if pixels is not None:
                report.labelled["seg"] += 1
                seg += pixels, pixels > 0
            if boxes is not None:
                report.labelled["det"] += 1
                counts, original = boxes
                det += [*counts, counts.sum(axis=0) > 0]
                report.empty += not counts.any()
                scale = min(n / o for n, o in zip(report.input_size, (height, width), strict=True))
                sizes.append(scale * original[0])
                areas.append(original[1])
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest of the set
    report.void = int(seg[0, IGNORE])
    rows = {"seg": (("pixels", "images"), seg), "det": (("boxes", "crowds", "images"), det)}
    for task, names in source.classes.items():
        keys, counts = rows[task]
        report.classes[task] = {one: dict(zip(keys, map(int, counts[:, index]), strict=True)) for index, one in enumerate(names)}
    report.box_px, report.areas = np.concatenate(sizes), np.concatenate(areas)
    report.faults = {fault: int(count) for fault, count in source.faults.items()}  # after reading, which may find more
    return report


def _look(source: Layout, index: int) -> tuple[tuple[int, int], np.ndarray | None, Any] | str:
    """Size (h, w), pixels by mask value [256], and of the boxes (boxes and crowds by class [2,C], sqrt and area [2,M]).

    Of an image that cannot be read what is wrong with it.
    """
    try:
        sample = source.read(index)
    except (UserError, OSError) as error:
        said = str(error)
        return said if source.name(index) in said else f"{source.name(index)}: {said}"
    pixels = boxes = None
    if sample.mask is not None and "seg" in source.classes:
        pixels = np.bincount(sample.mask.ravel(), minlength=IGNORE + 1)
    if sample.boxes is not None and "det" in source.classes:
        boxes = _count_boxes(sample, len(source.classes["det"]))
    return sample.image.shape[:2], pixels, boxes


def _count_boxes(sample: Sample, classes: int) -> tuple[np.ndarray, np.ndarray]:
    counts = np.stack([np.bincount(sample.classes[sample.crowd == crowd], minlength=classes) for crowd in (False, True)])
    sides = (sample.boxes[~sample.crowd, 2:] - sample.boxes[~sample.crowd, :2]).astype(np.float64)
    return counts, np.stack([np.sqrt(sides.prod(axis=1)), sample.area[~sample.crowd]])


def draw_sheet(report: Report, source: Layout, count: int) -> np.ndarray:
    """The truth on ``count`` of the images that could be read, spread over the set: uint8 [H,W,3]."""
    shown = []
    for place in _spread(report.read, count):
        index = report.readable[place]
        sample = source.read(index)
        shown.append(Labelled(source.name(index), sample.image, sample.mask, sample.boxes, sample.classes, sample.crowd))
    return contact_sheet(shown, source.classes)


def layouts_of(config: Config) -> dict[str, Layout]:
    """The sets of a config, by the key that describes them. Raises UserError."""
    check(config)
    found = {}
    for split in ("train", "val"):
        sets = layout(config, split)
        found |= {set_place(config, split, name): sets.alone(name) for name in sets.members}
    return found


def report_data(config: Config, folder: str | Path, *, pictures: int, limit: int | None) -> Iterator[Report]:
    """A report of each set of the config, its sheet of ``pictures`` images written into ``folder``. Raises UserError."""
    for option, value, least in (("--images", pictures, 0), ("--limit", limit, 1)):
        if value is not None and value < least:
            raise UserError(f"{option}: needs a number from {least}, not {value}")
    cell = finest_cell(config)
    for name, source in layouts_of(config).items():
        report = describe(name, source, config.data.input_size, cell=cell, limit=limit, workers=config.data.workers)
        if report.readable and pictures:
            path = Path(folder) / (re.sub(r"[^\w.-]", "_", name) + ".png")
            save_png(path, draw_sheet(report, source, pictures))
            report.sheet = str(path)
        yield report


def finest_cell(config: Config) -> int | None:
    """The finest stride at which the config's network detects, in pixels; None where it does not."""
    if "det" not in config.tasks:
        return None
    config = resolve_init(config)
    strides = config.tasks["det"].head.get("strides") or config.model.strides
    return min(strides)


def _spread(count: int, limit: int | None) -> list[int]:
    """``limit`` of ``count`` places, evenly from the first to the last; all when there are no more."""
    if limit is None or limit >= count:
        return list(range(count))
    return np.linspace(0, count - 1, num=limit, dtype=int).tolist()


def _bins(areas: np.ndarray) -> list[float]:
    """Percent of the areas in each of COCO's sizes."""
    found = np.searchsorted(list(COCO_SIZES.values()), areas, side="right").clip(max=len(COCO_SIZES) - 1)
    return [_percent(n, len(areas)) for n in np.bincount(found, minlength=len(COCO_SIZES))]


def _percent(part: int, whole: int) -> float:
    return round(100 * float(part) / float(whole), 3) if whole else 0.0


def _of(part: int, whole: int) -> str:
    return f"all {whole}" if part == whole else f"{part} of {whole}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
