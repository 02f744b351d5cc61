"""Charts as inline SVG: no script, colours from the page's style sheet, a tooltip (`title`) on every mark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline.report.counts import Bins
from pipeline.report.format import count, number, share
from pipeline.report.html import Html, el

WIDTH, HEIGHT = 360, 150
LEFT, TOP, BASE = 4, 6, 118
STRIP = 7


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `wanted` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((s * power for s in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def histogram(shown: Bins, lines: Sequence[tuple[str, float]] = ()) -> Html:
    """Rows by score, all and kept, over a strip whose shade is the share kept of each bin. `lines`: (label, score)."""
    low, high = float(shown.edges[0]), float(shown.edges[-1])
    span = WIDTH - 2 * LEFT

    def x(value: float) -> float:
        return LEFT + span * min(1.0, max(0.0, (value - low) / (high - low)))

    tallest = float(shown.all.max())
    bars = []
    for start, end, all_, kept in zip(shown.edges, shown.edges[1:], shown.all, shown.kept, strict=False):
        if not all_:
            continue
        left, width = x(float(start)), max(x(float(end)) - x(float(start)) - 0.6, 0.6)
        label = el(
            "title", f"{number(start)} to {number(end)}: {count(all_)} rows, {count(kept)} kept ({share(kept, all_)})"
        )
        bars.append(
            el(
                "g",
                label,
                _bar("all", left, width, all_ / tallest),
                bool(kept) and _bar("kept", left, width, kept / tallest),
            )
        )
        strip = {"x": left, "y": BASE + 3, "width": width, "height": STRIP}
        bars.append(el("rect", label, class_="kept", fill_opacity=float(kept / all_), **strip))
    axis = [el("line", class_="axis", x1=LEFT, x2=LEFT + span, y1=BASE, y2=BASE)]
    for value in ticks(low, high):
        axis.append(
            el(
                "text",
                number(value),
                class_="tick",
                x=x(value),
                y=HEIGHT - 6,
                text_anchor=_anchor(x(value), LEFT, LEFT + span),
            )
        )
        axis.append(el("line", class_="axis", x1=x(value), x2=x(value), y1=BASE + STRIP + 5, y2=BASE + STRIP + 9))
    marks = [
        el(
            "line",
            el("title", f"{label}: {number(value)}"),
            class_="mark",
            x1=x(value),
            x2=x(value),
            y1=TOP,
            y2=BASE + STRIP + 3,
        )
        for label, value in lines
        if low <= value <= high
    ]
    return el("svg", bars, axis, marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="histogram")


def _bar(class_: str, left: float, width: float, height: float) -> Html:
    tall = max(1.0, height * (BASE - TOP))
    return el("rect", class_=class_, x=left, y=BASE - tall, width=width, height=tall)


def _anchor(x: float, low: float, high: float) -> str:
    return "start" if x < low + 14 else "end" if x > high - 14 else "middle"


def concept_scatter(concept: np.ndarray, rows: np.ndarray, kept: np.ndarray, overall: float) -> Html:
    """One point a concept: its rows (log scale) across, the share of them kept upwards; a line at the overall share."""
    shares = kept / np.maximum(rows, 1)
    top_share = min(1.0, 1.1 * max(float(shares.max()), overall))
    width, height, left, right, top, base = 760, 260, 44, 752, 12, 224
    low, high = math.log10(max(1, rows.min())) - 0.05, math.log10(max(1, rows.max())) + 0.05

    def x(value: float) -> float:
        return left + (right - left) * (math.log10(value) - low) / (high - low)

    def y(value: float) -> float:
        return base - (base - top) * value / top_share

    grid = []
    for percent in ticks(0, 100 * top_share):
        level = y(percent / 100)
        grid.append(el("line", class_="grid", x1=left, x2=right, y1=level, y2=level))
        grid.append(el("text", f"{number(percent)} %", class_="tick", x=left - 6, y=level + 4, text_anchor="end"))
    marks = [
        m * 10**e for e in range(math.floor(low), math.ceil(high) + 1) for m in ((1, 2, 5) if high - low < 3 else (1,))
    ]
    for value in (m for m in marks if low <= math.log10(m) <= high):
        grid.append(el("text", count(value), class_="tick", x=x(value), y=base + 18, text_anchor="middle"))
        grid.append(el("line", class_="axis", x1=x(value), x2=x(value), y1=base, y2=base + 4))
    grid.append(el("text", "rows of the concept", class_="tick", x=right, y=base + 33, text_anchor="end"))
    mean = el(
        "line",
        el("title", f"overall {share(overall, 1)}"),
        class_="mark",
        x1=left,
        x2=right,
        y1=y(overall),
        y2=y(overall),
    )
    points = [
        el(
            "circle",
            el("title", f"concept {c}: {count(n)} rows, {count(k)} kept ({share(k, n)})"),
            class_="point",
            cx=x(n),
            cy=y(k / n),
            r=4,
        )
        for c, n, k in zip(concept.tolist(), rows.tolist(), kept.tolist(), strict=True)
        if n
    ]
    drawing = el("svg", grid, mean, points, viewBox=f"0 0 {width} {height}", role="img", class_="scatter")
    return el("div", drawing, class_="scroll")


PLOT = (420, 240, 52, 404, 10, 200)
"""Width, height, and the left, right, top and base of what is drawn."""


def _frame(
    xs: Sequence[float], ys: Sequence[float], across: str, upwards: str
) -> tuple[list[Html], Callable[[float], float], Callable[[float], float]]:
    """Grid and labels of a plot, and where values lie on it."""
    _, _, left, right, top, base = PLOT
    margins = [0.05 * (max(v) - min(v)) or abs(max(v)) * 0.05 or 1.0 for v in (xs, ys)]
    (x0, x1), (y0, y1) = ((min(v) - m, max(v) + m) for v, m in zip((xs, ys), margins, strict=True))

    def x(value: float) -> float:
        return left + (right - left) * (value - x0) / (x1 - x0)

    def y(value: float) -> float:
        return base - (base - top) * (value - y0) / (y1 - y0)

    drawn = []
    for value in ticks(y0, y1, 4):
        drawn.append(el("line", class_="grid", x1=left, x2=right, y1=y(value), y2=y(value)))
        drawn.append(el("text", number(value), class_="tick", x=left - 6, y=y(value) + 4, text_anchor="end"))
    for value in ticks(x0, x1, 4):
        drawn.append(el("text", number(value), class_="tick", x=x(value), y=base + 16, text_anchor="middle"))
    drawn.append(el("line", class_="axis", x1=left, x2=right, y1=base, y2=base))
    drawn.append(el("text", across, class_="tick", x=right, y=base + 34, text_anchor="end"))
    drawn.append(el("text", upwards, class_="tick", x=left, y=top, text_anchor="start"))
    return drawn, x, y


def _hue(i: int, of: int) -> str:
    return f"hsl({round(360 * i / max(1, of))} 65% 45%)"


def curves(series: Mapping[str, Sequence[tuple[float, float]]], across: str, upwards: str) -> Html:
    """A line a series, each of (x, y) points, named at its end."""
    if not series:
        return el("p", "Nothing was trained.", class_="note")
    points = [point for line in series.values() for point in line]
    drawn, x, y = _frame([p[0] for p in points], [p[1] for p in points], across, upwards)
    for i, (name, line) in enumerate(series.items()):
        path = " ".join(f"{'M' if j == 0 else 'L'}{x(a):.1f} {y(b):.1f}" for j, (a, b) in enumerate(line))
        colour = _hue(i, len(series))
        title = el("title", f"{name}: {number(line[0][1])} to {number(line[-1][1])}")
        drawn.append(el("path", title, d=path, fill="none", stroke=colour, stroke_width=1.6))
        end = {"x": min(x(line[-1][0]) + 3, PLOT[3] - 2), "y": y(line[-1][1]) + 4}
        drawn.append(el("text", name, class_="tick", fill=colour, **end))
    return el("svg", drawn, viewBox=f"0 0 {PLOT[0]} {PLOT[1]}", role="img", class_="plot")


def scatter(points: Mapping[str, tuple[float, float]], across: str, upwards: str) -> Html:
    """A named point each, at (x, y)."""
    drawn, x, y = _frame([p[0] for p in points.values()], [p[1] for p in points.values()], across, upwards)
    for i, (name, (a, b)) in enumerate(points.items()):
        title = el("title", f"{name}: {number(a)}, {number(b)}")
        drawn.append(el("circle", title, cx=x(a), cy=y(b), r=4, fill=_hue(i, len(points))))
        drawn.append(el("text", name, class_="tick", x=x(a) + 6, y=y(b) + 4))
    return el("svg", drawn, viewBox=f"0 0 {PLOT[0]} {PLOT[1]}", role="img", class_="plot")
