"""Small charts as inline SVG for the report: no script, no request, colours from the page's style sheet.

Written by hand because the page follows the reader's light or dark mode and its charts have to: a plotting
library bakes its colours in and weighs more than the rest of the report. Series differ by dash and marker
too, so they can be told apart without colour. Texts are escaped by Markup.format.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH, _HEIGHT = 440, 260  # a phone's width, so that 12 px letters stay readable there
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 30, 40
_MARKS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-4-4h8v8h-8z", "M0-5L5 4H-5z", "M0-5L5 0L0 5L-5 0z")

_CURVE = Markup('<polyline class="s{}" points="{}"/>')
_POINT = Markup('<path class="m{}" transform="translate({} {})" d="{}"/>')
_SAMPLE = Markup('<path class="s{}" d="M{} 14h22"/>')
_BAR = Markup('<path class="s{} bar" d="M{} {}V{}m-4 0h8M{} {}h8"/>')
_GRID = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
_FIGURE = Markup(
    '<figure><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
)


@dataclass(frozen=True)
class Series:
    """One line: points by x, and an interval [low, high] of y per point where there is one."""

    name: str
    points: list[tuple[float, float]]
    intervals: list[tuple[float, float]] | None = None


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    *,
    description: str,
    x_names: Sequence[str] | None = None,
    from_zero: bool = False,
) -> Markup:
    """A line chart; `x_names` makes the x axis categories 0, 1, 2 ... with markers instead of lines."""
    ys = [y for s in series for _, y in s.points]
    ys += [y for s in series for ends in s.intervals or [] for y in ends]
    xs = [x for s in series for x, _ in s.points]
    y_ticks = _ticks(0.0 if from_zero else min(ys), max(ys))
    x_low, x_high = (-0.4, len(x_names) - 0.6) if x_names else (min(xs), max(xs))
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = []
    for tick in y_ticks:
        _, y = at(x_low, tick)
        parts.append(_GRID.format(_LEFT, _WIDTH - _RIGHT, y, y))
        parts.append(_text(_LEFT - 6, y + 4, number(tick), "end"))
    names = (
        list(enumerate(x_names)) if x_names else [(t, number(t)) for t in _ticks(x_low, x_high) if x_low <= t <= x_high]
    )
    parts += [_text(at(x, y_low)[0], _HEIGHT - _BOTTOM + 17, name, "middle") for x, name in names]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, x_label, "middle"))
    key = _LEFT
    for i, one in enumerate(series):
        # Two models stand beside each other at a dim, so that their intervals do not hide one another.
        shift = (i - (len(series) - 1) / 2) * 10 if x_names else 0
        places = [(x + shift, y) for x, y in (at(*point) for point in one.points)]
        for (x, _), ends in zip(places, one.intervals or [], strict=False):
            (_, low), (_, high) = (at(0, y) for y in ends)
            parts.append(_BAR.format(i, x, low, high, x - 4, low))
        mark = _MARKS[i % len(_MARKS)]
        if not x_names and len(places) > 1:
            parts.append(_CURVE.format(i, " ".join(f"{x},{y}" for x, y in places)))
        else:
            parts += [_POINT.format(i, x, y, mark) for x, y in places]
        if len(series) > 1:
            parts.append(_POINT.format(i, key + 11, 14, mark) if x_names else _SAMPLE.format(i, key))
            parts.append(_text(key + 27, 18, one.name, "start"))
            key += 40 + 7 * len(one.name)
    return _FIGURE.format(title, _WIDTH, _HEIGHT, description, Markup("").join(parts))


def number(value: float) -> str:
    """A number as an axis shows it: 12k, 0.25, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    return f"{value:.4g}"


def _text(x: float, y: float, words: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(round(x, 1), round(y, 1), anchor, words)


def _ticks(low: float, high: float) -> list[float]:
    """4 to 7 round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 5))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 5.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
