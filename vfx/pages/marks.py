"""Small pictures inside a page: a dot on a scale, a bar, lines over layers. SVG as text, with direct labels.

Told apart without colour: what came out is filled, what went in is hollow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

RESULT, GIVEN, RULE = "#0b559f", "#6b6b6b", "#d9d9d9"
STYLES = (
    (RESULT, ""),
    ("#b35806", "6 4"),
    (GIVEN, "2 3"),
    ("#00735c", "8 3 2 3"),
    ("#a83279", "1 4"),
    ("#1a1a1a", "12 4"),
)
WIDE, HIGH = 860, 240
LONGEST = 18  # letters of a name below an axis
_LEFT, _TOP, _BOTTOM = 62, 12, 48
_RULES = 6  # horizontal ones of an axis, at most
_SPAN = 1e4  # of values on a logarithmic axis; where they span more, 0 is among them as good as


class Ruler(NamedTuple):
    """A vertical axis: the values of its rules, the lowest and the highest among them; ``log`` is its scale."""

    rules: tuple[float, ...]
    log: bool

    def height(self, value: float) -> float:
        """Where a value stands in the picture."""
        low, high, at = (math.log(x) if self.log else x for x in (self.rules[0], self.rules[-1], value))
        return HIGH - _BOTTOM - (HIGH - _TOP - _BOTTOM) * (at - low) / (high - low)


def dot(share: float, filled: bool) -> Markup:
    """A dot at a share (0 to 1) of a scale."""
    x = 8 + 184 * min(max(share, 0.0), 1.0)
    colour, fill = (RESULT, RESULT) if filled else (GIVEN, "white")
    return Markup(
        f'<svg class="mark" viewBox="0 0 200 16" role="presentation"><line x1="8" x2="192" y1="8" y2="8" '
        f'stroke="{RULE}"/><circle cx="{x:.1f}" cy="8" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/></svg>'
    )


def bar(share: float, filled: bool) -> Markup:
    """A bar of a share (0 to 1) of the full length."""
    fill = RESULT if filled else "white"
    width = max(190 * min(max(share, 0.0), 1.0), 1.0)
    return Markup(
        f'<svg class="mark" viewBox="0 0 200 16" role="presentation"><rect x="5" y="3" width="{width:.1f}" height="10" '
        f'fill="{fill}" stroke="{RESULT if filled else GIVEN}"/></svg>'
    )


def scale_of(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a scale of percent: whole numbers a little outside of the values."""
    low, high = min(values), max(values)
    margin = max(0.15 * (high - low), 0.5)
    return max(math.floor(low - margin), 0), min(math.ceil(high + margin), 100)


def lines(
    series: Mapping[str, Sequence[float | None]], ticks: Sequence[str], unit: str = "", *, log: bool = False,
    below: str = "", mark: tuple[str, int] | None = None, rule: float | None = None,
) -> Markup:  # fmt: skip
    """Lines over layers, each named at its end; ``ticks``: what stands below (first, last, some between).

    Where a value is None a line goes on to the next. ``log``: a logarithmic axis, which does not begin at 0; ``below``
    its name; ``mark``: the point that was chosen; ``rule``: a value that all others are held against. Raises ValueError
    for more lines than can be told apart.
    """
    if len(series) > len(STYLES):
        raise ValueError(f"{len(series)} lines cannot be told apart")
    heights = [value for line in series.values() for value in line if value is not None]
    axis = _logarithmic(heights, rule) if log and 0 < max(heights) <= _SPAN * min(heights) else _linear(heights)
    right = WIDE - 20 - 7 * max(map(len, series))
    x = [_LEFT + (right - _LEFT) * (index / max(len(ticks) - 1, 1)) for index in range(len(ticks))]
    parts = [_grid(axis, right, unit, rule), _below(ticks, x, below)]
    ends = []
    for (name, values), (colour, dash) in zip(series.items(), STYLES):
        points = [(x[i], axis.height(v)) for i, v in enumerate(values) if v is not None]
        text = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        ends.append((points[-1][1], name, colour))
    if mark is not None:
        parts.append(_chosen(x[mark[1]], axis.height(series[mark[0]][mark[1]] or 0.0)))
    parts += [
        f'<text x="{right + 10}" y="{at + 4:.1f}" style="fill:{colour}">{Markup.escape(name)}</text>'
        for at, name, colour in _apart(ends)
    ]
    return Markup(f'<svg class="lines" viewBox="0 0 {WIDE} {HIGH}" role="img">{"".join(parts)}</svg>')


def _chosen(x: float, y: float) -> str:
    """A ring around a point, and its name on the side where there is room."""
    up = y > HIGH / 2
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="{RESULT}" stroke-width="2"/>'
        f'<text x="{x:.1f}" y="{y - 12 if up else y + 22:.1f}" text-anchor="middle" stroke="white" stroke-width="4" '
        'paint-order="stroke">chosen</text>'
    )


def _linear(values: Sequence[float]) -> Ruler:
    """From 0 on, or from below it."""
    step = _step(max(values) - min(0.0, *values))
    low = step * math.floor(min(0.0, *values) / step)
    high = max(step * math.ceil(max(values) / step), low + step)
    return Ruler(tuple(low + step * index for index in range(round((high - low) / step) + 1)), log=False)


def _logarithmic(values: Sequence[float], rule: float | None) -> Ruler:
    """Over the values alone: 1, 2 and 5 with zeros, or powers of ten where these are many."""
    shown = [*values, *([] if rule is None else [rule])]
    decades = range(math.floor(math.log10(min(shown))) - 1, math.ceil(math.log10(max(shown))) + 2)
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1,)):
        rules = sorted(float(f"{factor}e{power}") for power in decades for factor in factors)
        low = max(i for i, value in enumerate(rules) if value <= min(shown))
        high = max(min(i for i, value in enumerate(rules) if value >= max(shown)), low + 1)
        if high - low < _RULES:
            break
    every = math.ceil((high - low) / _RULES)
    return Ruler(tuple(rules[low : high + every : every]), log=True)


def _step(span: float) -> float:
    """The distance of about four rules: 1, 2 or 5 with zeros."""
    size = 10.0 ** math.floor(math.log10(span / 4)) if span > 0 else 0.25
    return next((factor * size for factor in (1, 2, 5) if span / (factor * size) <= 5), 10 * size)


def _grid(axis: Ruler, right: float, unit: str, against: float | None) -> str:
    """Horizontal rules and what they stand for; the one of ``against`` is darker."""
    parts = []
    for value in axis.rules:
        y = axis.height(value)
        colour = GIVEN if value == against else RULE
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>')
        parts.append(f'<text x="{_LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{value:,.4g}{unit}</text>')
    return "".join(parts)


def _below(ticks: Sequence[str], x: Sequence[float], title: str) -> str:
    """Names of at most six layers, first and last among them, and what they are names of."""
    step = max(1, math.ceil((len(ticks) - 1) / 5))
    shown = sorted({*range(0, len(ticks), step), len(ticks) - 1})
    if len(shown) > 1 and shown[-1] - shown[-2] < step:
        del shown[-2]
    parts = [
        f'<text x="{x[i]:.1f}" y="{HIGH - 26}" text-anchor="middle">{Markup.escape(_short(ticks[i]))}</text>'
        for i in shown
    ]
    middle = (x[0] + x[-1]) / 2
    return "".join(
        [*parts, f'<text x="{middle:.1f}" y="{HIGH - 7}" text-anchor="middle">{Markup.escape(title)}</text>']
    )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _apart(ends: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels that do not cover each other, in their order from above."""
    placed: list[tuple[float, str, str]] = []
    for at, name, colour in sorted(ends):
        placed.append((max(at, placed[-1][0] + 16) if placed else at, name, colour))
    return placed
