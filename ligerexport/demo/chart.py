"""Draw line charts as SVG that grow without flicker, need no script, and suit light and dark backgrounds.

Each line has its own marker and stroke, and its name in a legend, so that lines differ in more than colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 34
MOST = 160
"""Largest number of points in a line; points of longer lines are left out evenly."""
MARKS = 6
"""Number of markers on a line."""
NOTHING = "Nothing is measured yet."

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart; `style`, `ours` or `theirs`, decides its colour and marker."""

    name: str
    style: str
    points: Sequence[Point]


def chart(title: str, x_label: str, lines: Sequence[Line], form: Callable[[float], str], x_range: Point) -> str:
    """Return a chart.

    Args:
        title: Title, with the unit of y.
        x_label: Label of the x axis.
        lines: Lines; they may have no points yet.
        form: Function from a value of y to text.
        x_range: Smallest and largest x; points outside are not drawn.
    """
    low, high = x_range
    top = nice_ceiling(max((y for line in lines for _, y in line.points), default=0.0))

    def place(point: Point) -> Point:
        x, y = (point[0] - low) / max(high - low, 1e-9), point[1] / top
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="lx-title" x="2" y="16">{escape(title)}</text>']
    middle, empty = (LEFT + WIDTH - RIGHT) / 2, not any(line.points for line in lines)
    for i in range(3):
        value = top * i / 2
        _, y = place((low, value))
        parts.append(f'<line class="lx-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        tick = "" if empty else form(value)
        parts.append(f'<text class="lx-tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    if empty:
        parts.append(f'<text class="lx-tick" x="{middle}" y="{HEIGHT / 2 - 8}" text-anchor="middle">{NOTHING}</text>')
    for value, anchor in ((low, "start"), (high, "end")):
        x, _ = place((value, 0))
        parts.append(f'<text class="lx-tick" x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="{anchor}">{value:,.0f}</text>')
    parts.append(f'<text class="lx-tick" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    said = []
    for line in lines:
        points = [place(point) for point in thin([p for p in line.points if low <= p[0] <= high])]
        parts.append(_line(line.style, points))
        if line.points:
            said.append(f"{line.name}: {form(line.points[-1][1])} at {line.points[-1][0]:,.0f}")
    text = f"{title}. " + ("; ".join(said) or NOTHING)
    return (
        f'<svg class="lx-chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(text)}" '
        f'data-points="{sum(len(line.points) for line in lines)}">{"".join(parts)}</svg>'
    )


def legend(lines: Sequence[Line]) -> str:
    """Return the lines' names with their markers."""
    rows = (
        f'<span class="lx-{line.style}"><svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">'
        f'<line class="lx-stroke" x1="1" x2="33" y1="6" y2="6"/>{_mark(line.style, 17, 6)}</svg> '
        f"{escape(line.name)}</span>"
        for line in lines
    )
    return f'<p class="lx-legend">{"".join(rows)}</p>'


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """Leave out points evenly, and keep the last."""
    every = math.ceil(len(points) / MOST)
    return [*points[: -1 : max(every, 1)], points[-1]] if points else []


def nice_ceiling(value: float) -> float:
    """Return the next number that is 1, 2, 4, 6 or 8 times a power of ten, so that the axis seldom changes."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next(step for step in (1, 2, 4, 6, 8, 10) if step * power >= value * 0.999)


def _line(style: str, points: Sequence[Point]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    every = max(1, math.ceil(len(points) / MARKS))
    marks = "".join(_mark(style, x, y) for x, y in [*points[::every], *points[-1:]])
    return f'<g class="lx-{style}"><polyline class="lx-stroke" points="{path}"/>{marks}</g>'


def _mark(style: str, x: float, y: float) -> str:
    """Return a circle for `ours` and a square for `theirs`."""
    if style == "ours":
        return f'<circle class="lx-mark" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    return f'<rect class="lx-mark" x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6"/>'
