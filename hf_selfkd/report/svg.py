"""
Charts as SVG text for the report: colours come from the page's style sheet, so that one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..markup import safe


WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44
COLOURS = 6  # classes `c0` to `c5` of the style sheet
POINTS = 400  # of a line, at most
LARGEST = 1e30  # what is beyond is drawn there


def line_chart(lines: Mapping[str, np.ndarray], x_label: str, y_label: str = "", from_zero: bool = False) -> str:
    """
    Lines in one chart, with a legend where there are several.

    Args:
        lines (`dict[str, np.ndarray]`): name -> array `[n, 2]` of x and y.
        x_label (`str`), y_label (`str`, *optional*): of the axes.
        from_zero (`bool`, *optional*, defaults to `False`): whether the y axis begins at 0.
    """
    lines = {name: np.clip(line, -LARGEST, LARGEST) for name, line in lines.items()}
    points = np.concatenate([line for line in lines.values() if len(line)])
    frame = _Frame(points, from_zero)
    parts = [frame.axes(x_label, y_label)]
    for place, line in enumerate(lines.values()):
        thinned = line[:: max(1, -(-len(line) // POINTS))]
        thinned = thinned if len(thinned) and (thinned[-1] == line[-1]).all() else np.concatenate((thinned, line[-1:]))
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in thinned)
        parts.append(f'<polyline class="line {_colour(place)}" points="{path}"/>')
    legend = _legend(list(lines)) if len(lines) > 1 else ""
    return _svg("".join(parts), f"{y_label or ', '.join(lines)} by {x_label}") + legend


def bar_chart(edges: Sequence[float], heights: Sequence[float], x_label: str, y_label: str) -> str:
    """
    A histogram.

    Args:
        edges (`Sequence[float]`): of the bins, one more than bins.
        heights (`Sequence[float]`): of the bars.
        x_label, y_label (`str`): of the axes.
    """
    top = max([*heights, 0]) or 1
    frame = _Frame(np.array([[edges[0], 0], [edges[-1], top]], dtype=float), from_zero=True)
    bars = [frame.bar(*pair, 0, height, "bar c0") for pair, height in zip(_pairs(edges), heights, strict=True)]
    return _svg(frame.axes(x_label, y_label) + "".join(bars), f"{y_label} by {x_label}")


def reliability_chart(curve: Mapping[str, Sequence[float]]) -> str:
    """
    Accuracy against confidence in equal bins, with the gap to the confidence and the diagonal of calibration.

    Args:
        curve (`dict`): `count`, `confidence` and `accuracy` of each bin.
    """
    bins = len(curve["count"])
    edges = [i / bins for i in range(bins + 1)]
    frame = _Frame(np.array([[0.0, 0.0], [1.0, 1.0]]), from_zero=True)
    parts = [frame.axes("Confidence", "Accuracy")]
    columns = zip(_pairs(edges), curve["count"], curve["confidence"], curve["accuracy"], strict=True)
    for pair, count, confidence, accuracy in columns:
        if count:
            parts.append(frame.bar(*pair, 0, accuracy, "bar c0"))
            parts.append(frame.bar(*pair, *sorted((accuracy, confidence)), "gap"))
    parts.append(
        f'<line class="diagonal" x1="{frame.x(0)}" y1="{frame.y(0)}" x2="{frame.x(1)}" y2="{frame.y(1):.1f}"/>'
    )
    return _svg("".join(parts), "accuracy by confidence")


def spark_line(values: Sequence[float | None]) -> str:
    """How a probability moved over the epochs, in the size of a word."""
    width, height = 120, 28
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    last = max(len(values) - 1, 1)
    path = " ".join(f"{2 + (width - 4) * p / last:.1f},{height - 2 - (height - 4) * v:.1f}" for p, v in known)
    told = f"probability of the label, epoch by epoch: {', '.join(f'{value:.2f}' for _, value in known)}"
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" role="img" aria-label="{told}">'
        f'<rect class="frame" width="{width}" height="{height}"/><polyline class="line c0" points="{path}"/></svg>'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


class _Frame:
    """Where values stand in a drawing."""

    def __init__(self, points: np.ndarray, from_zero: bool):
        (self.x_low, y_low), (self.x_high, y_high) = points.min(axis=0), points.max(axis=0)
        margin = 0.04 * (y_high - y_low) or 0.5 * abs(y_high) or 1.0
        self.y_low = 0.0 if from_zero else y_low - margin
        self.y_high = y_high + (0 if from_zero and y_high == 1 else margin)
        if self.x_high == self.x_low:
            self.x_high = self.x_low + 1

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y_low) / (self.y_high - self.y_low)

    def bar(self, left: float, right: float, low: float, high: float, kind: str) -> str:
        x, y = self.x(left) + 1, self.y(high)
        width, height = self.x(right) - self.x(left) - 2, self.y(low) - self.y(high)
        return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'

    def axes(self, x_label: str, y_label: str) -> str:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = []
        for value in ticks(self.y_low, self.y_high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
        for value in ticks(self.x_low, self.x_high, 6):
            x = self.x(value)
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_short(value)}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
        middle = (TOP + bottom) / 2
        parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{safe(x_label)}</text>')
        if y_label:
            turned = f'text-anchor="middle" transform="rotate(-90 14 {middle})"'
            parts.append(f'<text x="14" y="{middle}" {turned}>{safe(y_label)}</text>')
        return "".join(parts)


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e5 else f"{value:.4g}"


def _pairs(edges: Sequence[float]) -> zip:
    return zip(edges[:-1], edges[1:], strict=True)


def _colour(place: int) -> str:
    dash = ("", " dashed", " dotted")[place // COLOURS % 3]
    return f"c{place % COLOURS}{dash}"


def _legend(names: Sequence[str]) -> str:
    shown = [f'<span><i class="key {_colour(place)}"></i>{safe(name)}</span>' for place, name in enumerate(names)]
    return f'<div class="legend">{"".join(shown)}</div>'


def _svg(content: str, told: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(told)}">{content}</svg>'
