"""Figures of a diagnosis and of barriers, after those of the papers: layers from left to right, edges beside merged.

========== ====================================================================================
features   E‖g‖ and ‖h‖ of each layer, logarithmic (*Vanishing Feature*: feature against offset)
bound      feature ratio, vanishing bound and its smoothed form, logarithmic
variance   variance ratio, logarithmic, with the bounds of the verdict
activation share of zero activations, and share of active units that merging silences
statistics mean and deviation of outputs and activations
magnitude  mean |θ| against the edges'
logits     mean ± deviation of each output
========== ====================================================================================

Shortcuts are left out: they carry the number of the layer that they meet. Layers that PFM preserved are shaded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

from vfx.diagnosis.curve import Curve
from vfx.diagnosis.logits import Logits
from vfx.diagnosis.point import Point
from vfx.diagnosis.rows import LayerRow, Number
from vfx.diagnosis.verdict import COLLAPSED, EXPLODED, VANISHED
from vfx.extras import needed_for

with needed_for("a figure"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

MERGED = "#c1272d"
EDGES = ("#0b559f", "#6aaed6", "#2a7f62", "#8fc6ac", "#7a5195", "#bc8cbf")
CURVES = ("#444444", "#0b559f", "#2a7f62", "#c1272d", "#7a5195", "#e08214", "#1b9e9e")
WIDTH, HEIGHT = 5.2, 3.5


def figures(rows: Sequence[LayerRow], logits: Logits, edge_logits: Sequence[Logits]) -> dict[str, Figure]:
    """Every figure of a diagnosis that it has data for, by name."""
    chain = [row for row in rows if not row.shortcut]
    drawn = {
        "features": _features(chain),
        "bound": _bound(chain),
        "variance": _variance(chain, len(edge_logits)),
        "activation": _activation(chain),
        "statistics": _statistics(chain),
        "magnitude": _magnitude(chain),
        "logits": _logits(logits, edge_logits),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _layers_axis(axis: Axes, chain: Sequence[LayerRow]) -> None:
    """Layer numbers below, preserved layers shaded."""
    axis.set_xlabel("layer")
    axis.set_xlim(0.5, len(chain) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=14, integer=True, min_n_ticks=1))
    axis.grid(alpha=0.25)
    kept = [row.number for row in chain if row.state == "preserved"]
    if kept:
        axis.axvspan(0.5, max(kept) + 0.5, color="0.92", label="preserved", zorder=0)


def _line(
    axis: Axes, chain: Sequence[LayerRow], values: Sequence[Number], label: str, color: str, **style: object
) -> bool:
    """A line with gaps where a value is not known; whether there is anything to see."""
    shown = [value if value is not None and math.isfinite(value) else math.nan for value in values]
    if all(map(math.isnan, shown)):
        return False
    options = {"marker": "o", "markersize": 3.5, "linewidth": 1.4, **style}
    axis.plot([row.number for row in chain], shown, color=color, label=label, **options)  # type: ignore[arg-type]
    return True


def _compare(axis: Axes, chain: Sequence[LayerRow], field: str, others: str, title: str, log: bool = False) -> bool:
    """One measure of the merged network and of each edge."""
    _layers_axis(axis, chain)
    lines = [
        _line(axis, chain, [getattr(row, others)[edge] for row in chain], f"edge {edge}", EDGES[edge % len(EDGES)])
        for edge in range(len(getattr(chain[0], others)))
    ]
    lines.append(_line(axis, chain, [getattr(row, field) for row in chain], "merged", MERGED))
    if log and any(lines):
        _logarithmic(axis)
    axis.set_ylabel(title)
    return any(lines)


def _logarithmic(axis: Axes) -> None:
    """A logarithmic axis, if it has anything positive to show; plain numbers where it spans little."""
    values = [float(y) for line in axis.get_lines() for y in np.asarray(line.get_ydata(), dtype=float).flat]
    positive = [y for y in values if y > 0 and math.isfinite(y)]
    if not positive:
        return
    axis.set_yscale("log")
    if max(positive) < 50 * min(positive):
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")


def _features(chain: Sequence[LayerRow]) -> Figure:
    figure, (left, right) = _panels(1, 2)
    _compare(left, chain, "feature", "edge_features", "feature  E‖g‖", log=True)
    _compare(right, chain, "offset", "edge_offsets", "offset  ‖h‖", log=True)
    left.legend(fontsize=8)
    return figure


def _bound(chain: Sequence[LayerRow]) -> Figure:
    figure, (axis,) = _panels(1, 1)
    _layers_axis(axis, chain)
    _line(axis, chain, [row.feature_ratio for row in chain], "feature ratio", MERGED, linestyle="none")
    _line(axis, chain, [row.bound for row in chain], "bound ε", "#0b559f", marker="")
    _line(axis, chain, [row.smoothed_bound for row in chain], "smoothed, γ = 1.4", "#6aaed6", marker="", linestyle="--")
    axis.axhline(1, color="0.4", linewidth=0.8)
    axis.axhline(VANISHED, color="0.4", linewidth=0.8, linestyle=":", label=f"vanishing below {VANISHED:g}")
    _logarithmic(axis)
    axis.set_ylabel("feature against the edges' average")
    axis.legend(fontsize=8)
    return figure


def _variance(chain: Sequence[LayerRow], edges: int) -> Figure:
    figure, (axis,) = _panels(1, 1)
    _layers_axis(axis, chain)
    _line(axis, chain, [row.variance_ratio for row in chain], "merged", MERGED)
    axis.axhline(1, color="0.4", linewidth=0.8)
    for bound in (COLLAPSED, EXPLODED):
        axis.axhline(bound, color="0.4", linewidth=0.8, linestyle=":")
    _logarithmic(axis)
    average = " + ".join(f"v{_subscript(edge)}" for edge in range(edges))
    axis.set_ylabel(f"variance ratio  {edges} v / ({average})" if edges <= 3 else "variance ratio")
    axis.set_title("dotted: half and twice the deviation", fontsize=9)
    return figure


def _subscript(number: int) -> str:
    return "₀₁₂₃₄₅₆₇₈₉"[number % 10]


def _activation(chain: Sequence[LayerRow]) -> Figure | None:
    figure, (left, right) = _panels(1, 2)
    if not _compare(left, chain, "zero_share", "edge_zero_shares", "share of zero activations"):
        return None
    left.set_ylim(0, 1)
    left.legend(fontsize=8)
    _layers_axis(right, chain)
    drawn = _line(right, chain, [row.silenced for row in chain], "silenced", MERGED)
    right.set_ylim(0, 1)
    right.set_ylabel("edges' active units silent when merged")
    if not drawn:
        right.text(0.5, 0.5, "not known: the edges are not aligned", transform=right.transAxes, ha="center")
    return figure


def _statistics(chain: Sequence[LayerRow]) -> Figure:
    behind = any(row.activation_mean is not None for row in chain)
    figure, axes = _panels(2 if behind else 1, 2)
    _compare(axes[0], chain, "output_mean", "edge_output_means", "output: mean")
    _compare(axes[1], chain, "output_std", "edge_output_stds", "output: standard deviation", log=True)
    if behind:
        _compare(axes[2], chain, "activation_mean", "edge_activation_means", "activation: mean")
        _compare(axes[3], chain, "activation_std", "edge_activation_stds", "activation: standard deviation", log=True)
    axes[0].legend(fontsize=8)
    return figure


def _magnitude(chain: Sequence[LayerRow]) -> Figure | None:
    figure, (axis,) = _panels(1, 1)
    _layers_axis(axis, chain)
    if not _line(axis, chain, [row.magnitude_ratio for row in chain], "merged", MERGED):
        return None
    axis.axhline(1, color="0.4", linewidth=0.8)
    axis.set_ylim(0, 1.1 * max(1.0, *(row.magnitude_ratio or 0.0 for row in chain)))
    axis.set_ylabel("mean |θ| against the edges' average")
    return figure


def _logits(merged: Logits, edges: Sequence[Logits]) -> Figure | None:
    networks: list[tuple[str, str, Logits]] = [
        *((f"edge {i}", EDGES[i % len(EDGES)], logits) for i, logits in enumerate(edges)),
        ("merged", MERGED, merged),
    ]
    networks = [network for network in networks if network[2].means]
    if not networks:
        return None
    figure, (axis,) = _panels(1, 1)
    if max(len(logits.means) for _, _, logits in networks) > 40:
        _logits_summary(axis, networks)
        return figure
    step = 0.7 / len(networks)
    for index, (label, color, logits) in enumerate(networks):
        places = [k - 0.35 + step * (index + 0.5) for k in range(len(logits.means))]
        axis.errorbar(
            places, logits.means, logits.stds, fmt="o", markersize=3.5, capsize=2, linewidth=1, color=color, label=label
        )
    axis.xaxis.set_major_locator(MaxNLocator(nbins=14, integer=True, min_n_ticks=1))
    axis.axhline(0, color="0.4", linewidth=0.8)
    axis.grid(alpha=0.25, axis="y")
    axis.set(xlabel="output", ylabel="logit: mean ± standard deviation")
    axis.legend(fontsize=8, ncols=min(len(networks), 3), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def _logits_summary(axis: Axes, networks: Sequence[tuple[str, str, Logits]]) -> None:
    """Too many outputs for a bar each: their distribution."""
    for label, color, logits in networks:
        axis.plot(sorted(logits.means), color=color, label=label)
    axis.set(xlabel="outputs, sorted by mean", ylabel="logit: mean")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)


def barrier_figure(curves: Sequence[Curve], target: str) -> Figure:
    """Accuracy (%) and loss against α for every curve; one colour a normalization, dashed before alignment."""
    figure, (left, right) = _panels(1, 2)
    methods = list(dict.fromkeys(curve.normalize for curve in curves))
    for curve in curves:
        color = CURVES[methods.index(curve.normalize) % len(CURVES)]
        style = {"linestyle": "--" if curve.match is None else "-", "marker": "o", "markersize": 3.5, "color": color}
        left.plot(curve.alphas, [100 * x for x in curve.accuracy], label=curve.name, **style)  # type: ignore[arg-type]
        right.plot(curve.alphas, curve.loss, **style)  # type: ignore[arg-type]
    against = "accuracy (%)" if target == "labels" else "agreement with the ensemble (%)"
    left.set(xlabel="α (weight of the second edge)", ylabel=against, ylim=(0, 100))
    right.set(xlabel="α (weight of the second edge)", ylabel="loss (cross-entropy, nats)")
    losses = [x for curve in curves for x in curve.loss if math.isfinite(x)]
    if losses and max(losses) > 20 * max(min(losses), 1e-3):
        right.set_yscale("log")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def comparison_figure(given: Sequence[Point], made: Sequence[Point], front: Sequence[Point], measure: str) -> Figure:
    """Accuracy (%) against parameters, with the frontier as a line and the given networks beside it."""
    figure, (axis,) = _panels(1, 1)
    costs = [point.params for point in (*made, *given)]
    middle = (min(costs, default=0) + max(costs, default=0)) / 2
    for point in made:
        place, best = (point.params, 100 * (point.accuracy or 0)), point in front
        color, size, layer = (MERGED, 5, 4) if best else ("#999999", 3.5, 3)
        axis.plot(*place, "o", markersize=size, color=color, zorder=layer)  # in front of the networks given
        if best:  # names stay inside the axes, those of neighbours above and below the line
            right, above = place[0] > middle, front.index(point) % 2
            offset, side = (-6 if right else 6, 5 if above else -10), "right" if right else "left"
            axis.annotate(point.name, place, fontsize=7, xytext=offset, textcoords="offset points", ha=side)
    axis.margins(y=0.1)
    axis.plot([p.params for p in front], [100 * (p.accuracy or 0) for p in front], color=MERGED, linewidth=1)
    for number, point in enumerate(given):
        color = EDGES[number % len(EDGES)]
        axis.plot(point.params, 100 * (point.accuracy or 0), "s", color=color, label=point.name)
    axis.set(xlabel="parameters (multiples of one network)", ylabel=f"{measure} (%)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False, loc="best")
    return figure


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element for a page: no declaration, no date, the same text for the same figure."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "vfx"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
