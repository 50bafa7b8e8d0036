"""Line charts as inline SVG: a few curves over one axis, with their numbers as JSON for the page's own script.

Colours are classes (c0, c1, …) of the page's style sheet, so that a chart follows its light and dark modes.
"""

import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

WIDTH, HEIGHT = 560, 300
LEFT, TOP, RIGHT, BOTTOM = 62, 14, WIDTH - 14, HEIGHT - 46  # the edges of the plot, in SVG units
MAX_POINTS = 400  # per curve; a screen shows no more
N_COLOURS = 8
Point = tuple[float, float]
Projection = Callable[[float, float], Point]  # from data coordinates to SVG coordinates


@dataclass(frozen=True)
class Curve:
    """A curve of finite points, sorted by x; `marks` are the x values at which its run was resumed."""

    name: str
    colour: int
    points: Sequence[Point]
    is_faint: bool = False
    marks: Sequence[float] = ()
    is_dotted: bool = False


def line_chart(title: str, x_label: str, curves: Sequence[Curve], from_zero: bool = False) -> str:
    """Return a figure of the curves as HTML, or a note where no curve has points. With `from_zero` the y axis begins at 0."""
    curves = [curve for curve in curves if curve.points]
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    if not curves:
        return f'<figure>{caption}<p class="none">まだ記録がありません</p></figure>'
    drawn, numbers = draw_plot(x_label, curves, from_zero)
    drawn += f'<line class="cursor" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{BOTTOM}"/>'
    data = html.escape(json.dumps(numbers, ensure_ascii=False))
    return (
        f'<figure data-chart="{data}">{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{html.escape(title)}">{drawn}</svg><div class="tip" hidden></div></figure>'
    )


def draw_plot(x_label: str, curves: Sequence[Curve], from_zero: bool = False) -> tuple[str, dict[str, object]]:
    """Return axes and curves as elements of an SVG of WIDTH x HEIGHT, and their numbers; each curve has points."""
    curves = [replace(curve, points=thin(curve.points)) for curve in curves]
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    x_range, y_range = (min(xs), max(xs)), (min(y_ticks[0], *ys), max(y_ticks[-1], *ys))
    if x_range[0] == x_range[1]:
        x_range = (x_ticks[0], x_ticks[-1])

    def to_svg(x: float, y: float) -> Point:
        x_share = (x - x_range[0]) / (x_range[1] - x_range[0])
        y_share = (y - y_range[0]) / (y_range[1] - y_range[0])
        return round(LEFT + x_share * (RIGHT - LEFT), 1), round(BOTTOM - y_share * (BOTTOM - TOP), 1)

    drawn = [_draw_axes(x_label, [x for x in x_ticks if x_range[0] <= x <= x_range[1]], y_ticks, to_svg)]
    for mark, colour in dict.fromkeys((mark, curve.colour) for curve in curves for mark in curve.marks):
        if x_range[0] <= mark <= x_range[1]:
            x, _ = to_svg(mark, y_range[0])
            drawn.append(f'<line class="mark c{colour}" x1="{x}" x2="{x}" y1="{TOP}" y2="{BOTTOM}"/>')
    drawn += [_draw_curve(curve, to_svg) for curve in curves]
    numbers: dict[str, object] = {
        "plot": [WIDTH, LEFT, RIGHT],
        "x": x_range,
        "xLabel": x_label,
        "curves": [{"name": c.name, "colour": c.colour, "faint": c.is_faint, "points": c.points} for c in curves],
    }
    return "".join(drawn), numbers


def _draw_axes(x_label: str, x_ticks: Iterable[float], y_ticks: Sequence[float], to_svg: Projection) -> str:
    parts = []
    for y in y_ticks:
        height = to_svg(0.0, y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4.5}" text-anchor="end">{format_number(y)}</text>')
    for x in x_ticks:
        left = to_svg(x, y_ticks[0])[0]
        parts.append(f'<line class="axis" x1="{left}" x2="{left}" y1="{BOTTOM}" y2="{BOTTOM + 5}"/>')
        parts.append(f'<text x="{left}" y="{BOTTOM + 20}" text-anchor="middle">{format_number(x)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    return "".join(parts)


def _draw_curve(curve: Curve, to_svg: Projection) -> str:
    points = [to_svg(x, y) for x, y in curve.points]
    kind = f"c{curve.colour}{' faint' if curve.is_faint else ''}{' dotted' if curve.is_dotted else ''}"
    if len(points) == 1:
        return f'<circle class="curve dot {kind}" cx="{points[0][0]}" cy="{points[0][1]}" r="3.5"/>'
    return f'<polyline class="curve {kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'


def ticks(low: float, high: float, n_wanted: int = 5) -> list[float]:
    """Return about n_wanted round numbers, evenly spaced, the first at most `low` and the last at least `high`."""
    span = max(high - low or abs(high) or 1.0, 1e-12)  # the logarithm of 0 does not exist
    rough = span / n_wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def format_number(value: float) -> str:
    """Format a number for an axis: 0.002, 3.5, 12,000; 2e-05 where it is very small."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{float(f'{value:.4g}'):g}"


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most about MAX_POINTS of the points: the lowest and the highest of each section, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    chosen = [points[0]]
    n_sections = MAX_POINTS // 2 - 1
    for n in range(n_sections):
        section = points[len(points) * n // n_sections : len(points) * (n + 1) // n_sections]
        ends = {min(section, key=lambda point: point[1]), max(section, key=lambda point: point[1])}
        chosen += sorted(ends)
    return [*chosen, points[-1]]
