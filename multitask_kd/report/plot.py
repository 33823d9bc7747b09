"""A scatter plot as inline SVG: it takes its colours from the page's style sheet, so that it follows light,
dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 42
LETTER, LINE = 6.3, 13  # width and height in pixels of a label's letter
DOT = 5


@dataclass(frozen=True)
class Point:
    """x, y: its place; low, high: the spread of x; front: on the Pareto front."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    front: bool = False


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """An <svg> of the points, the front as steps through those that are on it, each with its name where there
    is room.

    x is logarithmic where the largest is more than eight times the smallest.
    """
    across = _Axis(
        [v for p in points for v in (p.x, p.low, p.high) if v is not None], LEFT, WIDTH - RIGHT, zero=True
    )
    up = _Axis([p.y for p in points], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    parts.append(f"<title>{escape(f'{y_label} against {x_label}')}</title>")
    parts += _grid(across, up, x_label + (", logarithmic" if across.log else ""), y_label)
    parts.append(_steps([p for p in points if p.front], across, up))
    places = [(across(p.x), up(p.y)) for p in points]
    for point, (_, y) in zip(points, places, strict=True):
        if point.low is not None and point.high is not None:
            parts.append(
                f'<line class="spread" x1="{across(point.low):.1f}" x2="{across(point.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
    for point, (x, y) in zip(points, places, strict=True):
        kind = "dot front" if point.front else "dot"
        label = escape(f"{point.name}: {point.x:.4g}, {point.y:.1f}")
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{DOT}"><title>{label}</title></circle>'
        )
    spreads = [
        (across(p.low), up(p.y) - 2, across(p.high), up(p.y) + 2)
        for p in points
        if p.low is not None and p.high is not None
    ]
    parts += _labels(points, places, spreads)
    return "".join(parts) + "</svg>"


class _Axis:
    """Values -> pixels between ``start`` and ``end``; ``ticks``: round values."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, zero: bool = False):
        low, high = min(values), max(values)
        self.log = zero and low > 0 and high / low > 8
        self.start, self.end = start, end
        if self.log:
            room = (high / low) ** 0.08
            self.low, self.high = math.log10(low / room), math.log10(high * room)
            self.ticks = _log_ticks(10**self.low, 10**self.high)
            return
        if zero:
            low = 0.0
        room = 0.08 * ((high - low) or abs(high) or 1.0)
        self.low, self.high = low if zero else low - room, high + room
        self.ticks = _ticks(self.low, self.high)

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(f * size for f in (1, 2, 5, 10) if f * size >= rough)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [f * 10**d for d in decades for f in factors if low <= f * 10**d <= high]


def _grid(across: _Axis, up: _Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in up.ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in across.ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:.4g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    centre = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" transform="translate(11 {centre}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return parts


def _steps(front: Sequence[Point], across: _Axis, up: _Axis) -> str:
    """Right of and below the line no network is better than one on it."""
    if not front:
        return ""
    ordered = sorted(front, key=lambda p: p.x)
    path = [f"M{across(ordered[0].x):.1f} {HEIGHT - BOTTOM}"]
    for point in ordered:
        path.append(f"H{across(point.x):.1f}V{up(point.y):.1f}")
    return f'<path class="front-line" d="{"".join(path)}H{WIDTH - RIGHT}"/>'


def _labels(
    points: Sequence[Point],
    places: Sequence[tuple[float, float]],
    taken: Sequence[tuple[float, float, float, float]],
) -> list[str]:
    """Names beside their dots, those on the front first; a name without room is left to the dot's tooltip."""
    taken = [*taken, *((x - DOT, y - DOT, x + DOT, y + DOT) for x, y in places)]
    parts = []
    for i in sorted(range(len(points)), key=lambda i: not points[i].front):
        name = _short(points[i].name)
        width, (x, y) = len(name) * LETTER, places[i]
        for dx, dy in _spots():
            left = x + dx if dx > 0 else x + dx - width
            box = (left, y + dy - LINE / 2, left + width, y + dy + LINE / 2)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if not inside or any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            if abs(dy) > LINE:
                end = left - 2 if dx > 0 else left + width + 2
                parts.append(
                    f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y + dy:.1f}"/>'
                )
            parts.append(f'<text class="name" x="{left:.1f}" y="{y + dy + 4:.1f}">{escape(name)}</text>')
            break
    return parts


def _spots() -> list[tuple[float, float]]:
    """Right and left of the dot, then higher and lower."""
    heights = [0, -10, 10, -20, 20, -30, 30, -42, 42, -54, 54]
    return [(side * (9 if abs(dy) <= LINE else 18), dy) for dy in heights for side in (1, -1)]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 + 1 :]}"
