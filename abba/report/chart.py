"""A line chart as inline SVG: runs over steps, in colours that the page's style sheet defines for light and dark."""

import math
from dataclasses import dataclass

from abba.report.html import Html, join, tag

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 260, 62, 12, 12, 30
MOST_POINTS = 300  # of a line; longer ones are averaged over equal stretches of steps
LOG_FROM = 100  # ratio of largest to smallest value, all of them positive
COLORS = 8  # after these come the same ones dashed
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """Points of one run; `marked` shows each of them, as for a loss that is measured now and then."""

    run: int
    label: str
    points: Points
    marked: bool = False


def chart(lines: list[Line], from_zero: bool) -> Html:
    """SVG of all lines on common axes; the vertical one starts at 0, or is logarithmic where values differ much."""
    lines = [Line(line.run, line.label, averaged(line.points), line.marked) for line in lines if line.points]
    if not lines:
        return tag("p", "not measured in these runs", class_="none")
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    log = not from_zero and min(ys) > 0 and max(ys) / min(ys) >= LOG_FROM
    x_scale = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_scale = Scale(0.0 if from_zero else min(ys), max(ys), HEIGHT - BOTTOM, TOP, log)
    parts = [_axes(x_scale, y_scale), *(_draw(line, x_scale, y_scale) for line in lines)]
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


class Scale:
    """Values low..high to pixels start..stop."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool = False) -> None:
        if high <= low:
            low, high = low - (abs(low) / 2 or 0.5), low + (abs(low) / 2 or 0.5)
        self._log = log
        self._low, self._high = (math.log10(low), math.log10(high)) if log else (low, high)
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        position = math.log10(value) if self._log else value
        share = (position - self._low) / (self._high - self._low)
        return round(self._start + share * (self._stop - self._start), 1)

    def ticks(self) -> list[float]:
        """About five round numbers, or the powers of ten."""
        if self._log:
            return [10.0**power for power in range(math.ceil(self._low), math.floor(self._high) + 1)]
        rough = (self._high - self._low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(unit for unit in (1, 2, 5, 10) if unit * power >= rough)
        return [n * step for n in range(math.ceil(self._low / step), math.floor(self._high / step) + 1)]


def averaged(points: Points) -> Points:
    """At most MOST_POINTS points: means over equal stretches."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def short(value: float) -> str:
    """A number for people: 0.00123, 1.23e-07, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def line_class(run: int) -> str:
    return f"line c{run % COLORS} d{run // COLORS % 4}"


def _axes(x_scale: Scale, y_scale: Scale) -> Html:
    parts = []
    for value in y_scale.ticks():
        y = y_scale(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", short(value), x=LEFT - 6, y=y + 4, text_anchor="end"))
    for value in x_scale.ticks():
        parts.append(tag("text", short(value), x=x_scale(value), y=HEIGHT - 10, text_anchor="middle"))
    return join(parts)


def _draw(line: Line, x_scale: Scale, y_scale: Scale) -> Html:
    at = [(x_scale(x), y_scale(y)) for x, y in line.points]
    path = tag("polyline", points=" ".join(f"{x},{y}" for x, y in at), class_=line_class(line.run))
    if not line.marked and len(at) > 1:
        return tag("g", tag("title", line.label), path)
    dots = [
        tag("circle", tag("title", f"{line.label}: {short(value)} at {short(step)}"), cx=x, cy=y, r=3.5)
        for (x, y), (step, value) in zip(at, line.points, strict=True)
    ]
    return tag("g", path, *dots, class_=f"dots c{line.run % COLORS}")
