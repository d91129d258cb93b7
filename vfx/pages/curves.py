"""The curves of a merge: how candidates did on the samples held out, and what each layer of the network hands on.

In: the facts that ``report.json`` holds. Out: a caption and an SVG for each curve; none where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from vfx.pages import marks

Score = Mapping[str, Any]
_FAR = 2.0  # times the highest point of the lines, where a normalization is still drawn
_MOST = len(marks.STYLES) - 1  # edges that are drawn beside the normalization


def judged_by(scores: Mapping[str, Score]) -> str | None:
    """The figure that candidates were chosen by."""
    judges = (key for key in ("loss", "divergence") if any(score.get(key) is not None for score in scores.values()))
    return next(judges, None)


def choice_curves(scores: Mapping[str, Score], chosen: str | None) -> dict[str, Markup]:
    """The judge's figure over the layers that follow one edge, and over those that are kept for each edge."""
    key = judged_by(scores)
    drawable = {name: score for name, score in scores.items() if key and _drawable(score.get(key))}
    if key is None or not drawable:
        return {}
    chosen = chosen if chosen in drawable else None
    kept = sorted({score["preserve"] for score in drawable.values()})
    curves = _follow_curve(drawable, key, drawable[chosen]["preserve"] if chosen else kept[0], chosen)
    return curves | (_preserve_curve(drawable, key, kept, chosen) if len(kept) > 1 else {})


def _drawable(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _follow_curve(scores: Mapping[str, Score], key: str, kept: int, chosen: str | None) -> dict[str, Markup]:
    """A line for each edge: from the network solved for the mean alone to the edge as it is."""
    rows = {name: score for name, score in scores.items() if score["preserve"] == kept}
    solved = {name: score for name, score in rows.items() if score["follow"] is not None}
    edges = sorted(
        {score["follow_edge"] for score in solved.values() if score["follow"]}, key=lambda e: _least(solved, key, e)
    )
    count = max((score["follow"] for score in solved.values()), default=0)
    series: dict[str, list[float | None]] = {}
    place = None
    for edge in sorted(edges[:_MOST]):
        line: list[float | None] = [None] * (count + 1)
        for name, score in solved.items():
            if not score["follow"] or score["follow_edge"] == edge:
                line[score["follow"]] = score[key]
                place = (f"edge {edge}", score["follow"]) if name == chosen else place
        series[f"edge {edge}"] = line
    if not any(sum(value is not None for value in line) > 1 for line in series.values()):
        return {}
    others = [score[key] for score in rows.values() if score["follow"] is None]
    highest = max(value for line in series.values() for value in line if value is not None)
    if others and min(others) <= _FAR * highest:  # else the lines would be flat below it; the table has it
        series["normalized"] = [min(others), *[None] * (count - 1), min(others)]
    caption = f"{key.capitalize()} on held-out samples, less is better: the layers up to each point follow one edge, "
    caption += "the others are solved for the mean of all"
    caption += f"; layers 1–{kept} are kept for each edge" if kept else ""
    ticks = [str(number) for number in range(count + 1)]
    return {caption: marks.lines(series, ticks, log=True, below="layers that follow the edge", mark=place)}


def _least(scores: Mapping[str, Score], key: str, edge: int) -> float:
    return min(score[key] for score in scores.values() if score["follow"] and score["follow_edge"] == edge)


def _preserve_curve(
    scores: Mapping[str, Score], key: str, kept: Sequence[int], chosen: str | None
) -> dict[str, Markup]:
    """The best of the candidates for each number of layers kept, beside the best edge as it is."""
    best = {}
    for count in kept:
        rows = [
            score[key] for name, score in scores.items() if score["preserve"] == count and not name.startswith("edge ")
        ]
        best[count] = min(rows) if rows else None
    series: dict[str, list[float | None]] = {"merged": [best.get(count) for count in range(kept[-1] + 1)]}
    given = [score[key] for name, score in scores.items() if name.startswith("edge ")]
    if given:
        series["best edge"] = [min(given), *[None] * (kept[-1] - 1), min(given)]
    place = None
    if chosen and scores[chosen][key] == best[scores[chosen]["preserve"]]:
        place = ("merged", scores[chosen]["preserve"])
    caption = (
        f"{key.capitalize()} on held-out samples of the best candidate for each number of layers kept for each edge"
    )
    ticks = [str(count) for count in range(kept[-1] + 1)]
    return {caption: marks.lines(series, ticks, log=True, below="layers kept for each edge", mark=place)}


def layer_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """Feature and variance of each layer's outputs against the average of the edges'; ``rows`` as of a diagnosis."""
    chain = [row for row in rows if not row["shortcut"]]
    series = {name: [_positive(row[f"{name}_ratio"]) for row in chain] for name in ("feature", "variance")}
    shown = {name: line for name, line in series.items() if sum(value is not None for value in line) > 1}
    if not shown:
        return {}
    caption = "What each layer hands on, against the average of the edges (1×): its part that depends on the input "
    caption += "(feature, E‖f(x) − f(0)‖), and its variance"
    drawn = marks.lines(shown, [row["layer"] for row in chain], "×", log=True, below="layer", rule=1.0)
    return {caption: drawn}


def _positive(value: float | None) -> float | None:
    return value if value is not None and 0 < value < math.inf else None
