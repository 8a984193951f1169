"""Small plots as inline SVG, coloured by the page's style sheet: series n has the class `s<n>`, counted around after SERIES."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 320, 200  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 26  # margins
SERIES = 7  # colours that the style sheet has
MAX_POINTS = 1500  # of a scatter plot


@dataclass(frozen=True)
class _Scale:
    """Maps values low..high to pixels from..to."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def line_plot(labels: Sequence[str], series: Sequence[Sequence[float] | None], *, low: float, high: float = 1.0) -> Markup:
    """Return lines over labels spread evenly; values are shares, shown in per cent.

    Args:
        labels: What stands below each point.
        series: One sequence of values for each line, as long as the labels; None keeps a colour free.
        low: Bottom of the axis; values below are drawn there.
        high: Top of the axis.
    """
    x, y = _Scale(0, max(len(labels) - 1, 1), LEFT + 8, WIDTH - RIGHT - 8), _Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_grid_line(y(value), f"{value:.0%}") for value in (low, (low + high) / 2, high)]
    parts += [_text(x(index), HEIGHT - 8, label, "middle") for index, label in enumerate(labels)]
    for number, values in reversed(list(enumerate(series))):  # the first on top
        if values is None:
            continue
        points = [(x(index), y(max(value, low))) for index, value in enumerate(values)]
        line = " ".join(f"{a},{b}" for a, b in points)
        parts.append(Markup('<polyline class="s{}" points="{}"/>').format(number % SERIES, line))
        parts += [
            Markup('<circle class="s{}" cx="{}" cy="{}" r="3"><title>{}: {:.2%}</title></circle>').format(
                number % SERIES, a, b, label, value
            )
            for (a, b), label, value in zip(points, labels, values, strict=True)
        ]
    return _svg(parts)


def scatter_plot(xs: Sequence[float], ys: Sequence[float], *, number: int, x_name: str, y_name: str) -> Markup:
    """Return points against the diagonal; of more than MAX_POINTS a random choice."""
    points = list(zip(xs, ys, strict=True))
    shown = random.Random(0).sample(points, min(len(points), MAX_POINTS))  # noqa: S311 - a fixed choice, nothing secret
    reach = max((abs(value) for point in shown for value in point), default=1.0) * 1.05
    x, y = _Scale(-reach, reach, LEFT, WIDTH - RIGHT), _Scale(-reach, reach, HEIGHT - BOTTOM, TOP)
    parts = [_grid_line(y(value), f"{value:.3g}") for value in (-reach, 0, reach)]
    parts.append(
        Markup('<line class="grid" x1="{0}" y1="{1}" x2="{2}" y2="{3}"/>').format(x(-reach), y(-reach), x(reach), y(reach))
    )
    parts += [Markup('<circle class="dot s{}" cx="{}" cy="{}" r="2"/>').format(number % SERIES, x(a), y(b)) for a, b in shown]
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, f"across: {x_name}, up: {y_name}", "middle"))
    return _svg(parts)


def _grid_line(y: float, label: str) -> Markup:
    line = Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(LEFT, y, WIDTH - RIGHT, y)
    return line + _text(LEFT - 6, y + 4, label, "end")


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, escape(text))


def _svg(parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(WIDTH, HEIGHT, Markup("").join(parts))
