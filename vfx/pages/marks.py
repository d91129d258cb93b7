"""Small pictures inside a page: a dot on a scale, a bar, lines over layers. SVG as text, with direct labels.

Told apart without colour: what came out is filled, what went in is hollow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

RESULT, GIVEN, RULE = "#0b559f", "#6b6b6b", "#d9d9d9"
COLOURS = (RESULT, "#b35806", GIVEN)
WIDE, HIGH = 860, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 90, 12, 44


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


def lines(series: Mapping[str, Sequence[float | None]], ticks: Sequence[str], unit: str) -> Markup:
    """Lines over layers, each named at its end; ``ticks``: what stands below (first, last, some between)."""
    known = [value for one in series.values() for value in one if value is not None]
    step = _step(max(known) - min(0.0, *known))
    low = step * math.floor(min(0.0, *known) / step)
    high = max(step * math.ceil(max(known) / step), low + step)
    count = len(ticks)
    x = [_LEFT + (WIDE - _LEFT - _RIGHT) * (index / max(count - 1, 1)) for index in range(count)]
    parts = [_grid(low, high, step, unit), _below(ticks, x)]
    ends = []
    for (name, values), colour, dash in zip(series.items(), COLOURS, ("", "6 4", "2 3")):
        points = [(x[i], _height(v, low, high)) for i, v in enumerate(values) if v is not None]
        text = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        ends.append((points[-1][1], name, colour))
    parts += [
        f'<text x="{WIDE - _RIGHT + 10}" y="{at + 4:.1f}" fill="{colour}">{Markup.escape(name)}</text>'
        for at, name, colour in _apart(ends)
    ]
    return Markup(f'<svg class="lines" viewBox="0 0 {WIDE} {HIGH}" role="img">{"".join(parts)}</svg>')


def _height(value: float, low: float, high: float) -> float:
    return HIGH - _BOTTOM - (HIGH - _TOP - _BOTTOM) * (value - low) / (high - low)


def _step(span: float) -> float:
    """The distance of about four rules: 1, 2 or 5 with zeros."""
    size = 10.0 ** math.floor(math.log10(span / 4)) if span > 0 else 0.25
    return next((factor * size for factor in (1, 2, 5) if span / (factor * size) <= 5), 10 * size)


def _grid(low: float, high: float, step: float, unit: str) -> str:
    """Horizontal rules and what they stand for."""
    parts = []
    for index in range(round((high - low) / step) + 1):
        value = low + step * index
        y = _height(value, low, high)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDE - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{RULE}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.4g}{unit}</text>')
    return "".join(parts)


def _below(ticks: Sequence[str], x: Sequence[float]) -> str:
    """Names of at most six layers, first and last among them."""
    step = max(1, math.ceil((len(ticks) - 1) / 5))
    shown = sorted({*range(0, len(ticks), step), len(ticks) - 1})
    if len(shown) > 1 and shown[-1] - shown[-2] < step:
        del shown[-2]
    return "".join(
        f'<text x="{x[i]:.1f}" y="{HIGH - 20}" text-anchor="middle">{Markup.escape(ticks[i])}</text>' for i in shown
    )


def _apart(ends: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels that do not cover each other, in their order from above."""
    found: list[tuple[float, str, str]] = []
    for at, name, colour in sorted(ends):
        found.append((max(at, found[-1][0] + 16) if found else at, name, colour))
    return found
