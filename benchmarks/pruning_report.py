"""Tables, claims and plot of the pruning sweep."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.pairs_report import grid
from vfx.files import write_atomic

Cells = Mapping[str, Mapping[str, Any]]
Curve = dict[float, float]  # sparsity -> accuracy in %
HIGH = 0.8  # from here on a sparsity counts as high
REPAIRS = {"none": "no repair", "64": "repair, 64", "256": "repair, 256", "solved": "solved"}
COLORS = {"none": "#b0b0b0", "64": "#e69f00", "256": "#a06000", "solved": "#0072b2"}


def curves(cells: Cells) -> dict[tuple[str, str], Curve]:
    """Accuracy over sparsity by (method, repair: none, samples of the repair, or solved)."""
    found: dict[tuple[str, str], Curve] = {}
    for name, cell in cells.items():
        score, scope, repair, sparsity = name.split("/")
        found.setdefault((f"{score} {scope}", repair), {})[float(sparsity)] = cell["accuracy"]
    return {method: dict(sorted(curve.items())) for method, curve in sorted(found.items())}


def markdown(results: Mapping[str, Any], preface: str) -> str:
    lines = ["# One-shot pruning", "", preface, "", "![accuracy over sparsity](pruning.png)", ""]
    lines += ["## What the papers claim", "", *(f"* {claim}" for claim in claims(results["networks"])), ""]
    cost = results.get("woodfisher")
    if cost:
        lines += ["## WoodFisher on VGG16-BN ×0.25", "", _cost(cost), ""]
    for name, network in results["networks"].items():
        lines += [f"## {name}", "", *_tables(network), ""]
    return "\n".join(lines)


def _cost(cost: Mapping[str, Any]) -> str:
    return (
        f"{cost['weights']:,} weights, {cost['samples']} samples, scores and update at 90 %: {cost['seconds']} s "
        f"({cost['cpu_seconds']} s of processor time, {cost['threads']} threads), peak memory "
        f"{cost['peak_rss_gib']} GiB ({cost['rss_before_gib']} GiB before). Target: 60 s on two cores, 4 GB."
    )


def _tables(network: Mapping[str, Any]) -> Iterator[str]:
    """Accuracy without repair, with it, and solved; then repairs by their number of samples."""
    found = curves(network["cells"])
    methods = list(dict.fromkeys(method for method, _ in found))
    images = f"{network['test_images']:,} test images"
    yield f"Unpruned: {network['dense']:.2f} % on {images}. Without repair → with it → solved:"
    yield ""
    sparsities = sorted({sparsity for curve in found.values() for sparsity in curve})
    repairs = ("none", "64", "solved")
    cell = lambda method, s: " → ".join(_cell(found.get((method, n), {}).get(s)) for n in repairs)  # noqa: E731
    rows = [[f"{100 * s:g} %", *(cell(method, s) for method in methods)] for s in sparsities]
    yield from grid(["sparsity", *methods], rows)
    repaired = [method for method in methods if (method, "256") in found]
    if repaired:
        yield ""
        yield "Repair with 64 / 128 / 256 samples:"
        yield ""
        three = lambda method, s: " / ".join(  # noqa: E731
            _cell(found.get((method, n), {}).get(s)) for n in ("64", "128", "256")
        )
        measured = sorted({s for (_, samples), curve in found.items() if samples == "256" for s in curve})
        rows = [[f"{100 * s:g} %", *(three(method, s) for method in repaired)] for s in measured]
        yield from grid(["sparsity", *repaired], rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def claims(networks: Mapping[str, Any]) -> Iterator[str]:
    """Where repair gains most, and what more than one batch adds."""
    for name, network in networks.items():
        found = curves(network["cells"])
        gains = {
            (method, sparsity): curve[sparsity] - found[method, "none"][sparsity]
            for (method, samples), curve in found.items()
            if samples == "64"
            for sparsity in curve
            if sparsity in found.get((method, "none"), {})
        }
        if not gains:
            continue
        low = [gain for (_, sparsity), gain in gains.items() if sparsity < HIGH]
        high = [gain for (_, sparsity), gain in gains.items() if sparsity >= HIGH]
        best = max(gains, key=lambda one: gains[one])
        text = f"{name}: repair gains {_mean(low):+.2f} points on average below {100 * HIGH:g} % sparsity"
        text += f", {_mean(high):+.2f} from there on; most with {best[0]} at {100 * best[1]:g} % ({gains[best]:+.2f})"
        worst = min(gains, key=lambda one: gains[one])
        text += f", least with {worst[0]} at {100 * worst[1]:g} % ({gains[worst]:+.2f})."
        more = [
            curve[sparsity] - found[method, "64"][sparsity]
            for (method, samples), curve in found.items()
            if samples == "256"
            for sparsity in curve
            if sparsity in found[method, "64"]
        ]
        text += f" 256 samples instead of 64 add {_mean(more):+.2f} points on average." if more else ""
        yield text + _solved(found)


def _solved(found: Mapping[tuple[str, str], Curve]) -> str:
    """What the solve adds to the repair, and where it falls behind."""
    pairs = [
        (accuracy, found[method, "64"][sparsity])
        for (method, repair), curve in found.items()
        if repair == "solved"
        for sparsity, accuracy in curve.items()
        if sparsity in found.get((method, "64"), {})
    ]
    if not pairs:
        return ""
    behind = sum(solved < repaired for solved, repaired in pairs)
    gain = _mean([solved - repaired for solved, repaired in pairs])
    return f" Solved instead of repaired adds {gain:+.2f} points on average, behind in {behind} of {len(pairs)} cells."


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def draw(networks: Mapping[str, Any], path: Path) -> None:
    """A row of plots for each network, one for each method: without repair, and with it."""
    shown = [(name, network, curves(network["cells"])) for name, network in networks.items()]
    methods = list(dict.fromkeys(method for _, _, found in shown for method, _ in found))
    if not methods:
        return
    size = (2.6 * len(methods), 2.3 * len(shown))
    figure, axes = plt.subplots(len(shown), len(methods), figsize=size, squeeze=False, sharey="row")
    for row, (name, network, found) in zip(axes, shown):
        for axis, method in zip(row, methods):
            for repair, label in REPAIRS.items():
                curve = found.get((method, repair))
                if curve:
                    style = ":" if repair == "256" else "-"
                    points = [100 * s for s in curve], list(curve.values())
                    axis.plot(*points, style, label=label, color=COLORS[repair], linewidth=1.2)
            if not axis.lines:  # not measured
                axis.axis("off")
                continue
            if "dense" in network:
                axis.axhline(network["dense"], color="grey", linewidth=0.6)
            axis.set_title(method, fontsize=7)
            axis.tick_params(labelsize=6)
        row[0].set_ylabel(f"{name}\naccuracy, %", fontsize=6)
        max(row, key=lambda axis: len(axis.lines)).legend(fontsize=5)
    for axis in axes[-1]:
        axis.set_xlabel("sparsity, %", fontsize=6)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
