"""Tables, claims and plot of the trained pairs' results."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vfx.files import write_atomic

Results = Mapping[str, Any]
Series = dict[int, dict[str, Any]]

NAMES = {None: "none", "bias_calibration": "Bias Cal.", "repair": "REPAIR", "rescale": "RESCALE", "reset": "RESET"}
MATCHES = {None: "direct", "weight": "weight matching", "activation": "activation matching"}
MARKERS = {"none": "o", "Bias Cal.": "^", "REPAIR": "s", "RESCALE": "D", "RESET": "s"}

# Public implementation of PFM with activation matching, α = 0.5 (README of the checkpoints): cut -> accuracy.
REFERENCE: dict[str, dict[str | None, dict[int, float]]] = {
    "vgg16_w025": {
        None: {0: 19.78, 3: 25.69, 6: 49.78, 8: 68.55, 12: 80.97},
        "bias_calibration": {0: 71.21, 3: 72.03, 6: 72.63, 8: 75.48, 12: 81.01},
        "repair": {0: 71.68, 3: 73.28, 6: 73.70, 8: 75.96, 12: 82.15},
        "rescale": {0: 71.32, 3: 73.32, 6: 73.76, 8: 76.36, 12: 81.45},
    },
    "vgg16_bn_w025": {
        None: {0: 10.00, 3: 10.00, 6: 10.10, 8: 41.76, 12: 91.06},
        "reset": {0: 80.36, 3: 81.35, 6: 83.83, 8: 87.30, 12: 91.32},
    },
    "vgg16_bn_w05": {"reset": {0: 83.78, 6: 87.49, 8: 89.57, 12: 91.38}},
}
TOLERANCE = 1.0


def series(result: Mapping[str, Any], match: str | None, normalize: str | None, join: str) -> Series:
    """Cells by cut; at 0 preserved layers there is one cell for both joins."""
    return {
        cell["preserve"]: cell
        for cell in result["cells"]
        if cell["match"] == match and cell["normalize"] == normalize and (cell["join"] == join or not cell["preserve"])
    }


def matches(result: Mapping[str, Any]) -> dict[str | None, str]:
    """The matches that were measured, with their labels."""
    measured = {cell["match"] for cell in result["cells"]}
    return {match: label for match, label in MATCHES.items() if match in measured}


def normalizations(result: Mapping[str, Any]) -> list[str | None]:
    return list(dict.fromkeys(cell["normalize"] for cell in result["cells"]))


def joins(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["join"] for cell in result["cells"]))


def cuts(result: Mapping[str, Any]) -> list[int]:
    return sorted({cell["preserve"] for cell in result["cells"]})


def markdown(results: Results) -> str:
    """All tables and claims as one document."""
    lines = [
        "# Trained pairs at α = 0.5",
        "",
        "Fashion-MNIST; matching and calibration on the first 2,000 training images in order (batch 128), accuracy in",
        "percent over the test images. Written by `python -m benchmarks.pairs`; every figure is in `pairs.json`.",
        "PFM l/L keeps the first l of L layers for each edge; “pre” joins before norm and activation, “post” behind",
        "them. Seconds are those of `merge` behind statistics that are collected once for each pair.",
        "",
        "![accuracy against parameters](pairs.png)",
        "",
    ]
    for name, result in results.items():
        lines += [f"## {name}", "", _summary(result), ""]
        for match in matches(result):
            lines += [f"**{MATCHES[match]}**", "", *_table(result, match), ""]
        if name in REFERENCE:
            lines += ["**Against the reference implementation** (activation matching, join before the activation)", ""]
            lines += [*_comparison(result, REFERENCE[name]), ""]
    lines += ["## Claims", "", *(f"- {text}" for text in claims(results)), ""]
    return "\n".join(lines)


def _summary(result: Mapping[str, Any]) -> str:
    edges = " / ".join(f"{accuracy:.2f}" for accuracy in result["edges"])
    return (
        f"Edges {edges}, ensemble of logits {result['ensemble_logits']:.2f}, of probabilities "
        f"{result['ensemble_probabilities']:.2f}; statistics in {result['statistics_seconds']:.1f} s."
    )


def _table(result: Mapping[str, Any], match: str | None) -> list[str]:
    columns = [(normalize, join) for normalize in normalizations(result) for join in joins(result)]
    short = {"preactivation": "pre", "activation": "post"}
    head = [f"{NAMES[normalize]} {short[join]}" for normalize, join in columns]
    rows = []
    for cut in cuts(result):
        found = [series(result, match, normalize, join)[cut] for normalize, join in columns]
        seconds = sum(cell["seconds"] for cell in found) / len(found)
        costs = [f"{found[0]['params_ratio']:.3f}", f"{found[0]['flops_ratio']:.3f}", f"{seconds:.2f}"]
        rows.append([f"{cut}/{result['layers']}", *(f"{cell['accuracy']:.2f}" for cell in found), *costs])
    return grid(["PFM", *head, "params ×", "FLOPs ×", "seconds"], rows)


def _comparison(result: Mapping[str, Any], reference: Mapping[str | None, Mapping[int, float]]) -> list[str]:
    rows = []
    for cut in cuts(result):
        row = [f"{cut}/{result['layers']}"]
        for normalize, known in reference.items():
            ours = series(result, "activation", normalize, "preactivation")[cut]["accuracy"]
            row.append(f"{ours:.2f} / {known[cut]:.2f} ({ours - known[cut]:+.2f})" if cut in known else f"{ours:.2f}")
        rows.append(row)
    return grid(["PFM (ours / reference)", *(NAMES[normalize] for normalize in reference)], rows)


def cell(text: str) -> str:
    """A text on one line of a markdown table, at most 300 characters."""
    return " ".join(text.split()).replace("|", "\\|")[:300]


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table."""
    return [_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)]


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def claims(results: Results) -> Iterator[str]:
    """What the papers claim, held against every cell."""
    for name, result in results.items():
        yield _grows(name, result)
        yield _gains(name, result)
        if name in REFERENCE:
            yield _reaches(name, result)


def _grows(name: str, result: Mapping[str, Any]) -> str:
    falls, steps = [], 0
    for match, label in matches(result).items():
        for normalize in normalizations(result):
            for join in joins(result):
                row = series(result, match, normalize, join)
                for low, high in zip(cuts(result), cuts(result)[1:]):
                    steps += 1
                    before, after = row[low]["accuracy"], row[high]["accuracy"]
                    if after < before:
                        where = f"{label}, {NAMES[normalize]}, {join} join, {low}→{high}"
                        falls.append(f"{where}: {before:.2f} → {after:.2f}")
    return _verdict(f"{name}: accuracy grows with l", steps, falls)


def _gains(name: str, result: Mapping[str, Any]) -> str:
    losses, count = [], 0
    for match, label in matches(result).items():
        for normalize in normalizations(result)[1:]:
            for join in joins(result):
                plain, fixed = (series(result, match, n, join) for n in (None, normalize))
                for cut in cuts(result)[:-1]:
                    count += 1
                    before, after = plain[cut]["accuracy"], fixed[cut]["accuracy"]
                    if after <= before:
                        where = f"{label}, {NAMES[normalize]}, {join} join, l = {cut}"
                        losses.append(f"{where}: {before:.2f} → {after:.2f}")
    return _verdict(f"{name}: normalization gains at every l < {cuts(result)[-1]}", count, losses)


def _reaches(name: str, result: Mapping[str, Any]) -> str:
    short, count = [], 0
    for normalize, known in REFERENCE[name].items():
        ours = series(result, "activation", normalize, "preactivation")
        for cut, figure in known.items():
            count += 1
            if ours[cut]["accuracy"] < figure - TOLERANCE:
                short.append(f"{NAMES[normalize]} at l = {cut}: {ours[cut]['accuracy']:.2f} against {figure:.2f}")
    return _verdict(f"{name}: every cell reaches the reference − {TOLERANCE:g} point", count, short)


def _verdict(claim: str, count: int, exceptions: list[str]) -> str:
    if not exceptions:
        return f"{claim}: **holds** in all {count} comparisons."
    return f"{claim}: **fails** in {len(exceptions)} of {count} comparisons ({'; '.join(exceptions)})."


def draw(results: Results, path: Path) -> None:
    """Accuracy against parameters for each pair: activation matching, join before the activation."""
    figure, axes = plt.subplots(1, len(results), figsize=(4.6 * len(results), 4.4), squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items()):
        for normalize in normalizations(result):
            row = series(result, "activation", normalize, "preactivation")
            points = [(row[cut]["params_ratio"], row[cut]["accuracy"]) for cut in cuts(result)]
            label = NAMES[normalize]
            axis.plot(*zip(*points), marker=MARKERS[label], markersize=5, label=label)
        direct = series(result, None, normalizations(result)[-1], "preactivation")
        if direct:
            points = [(direct[cut]["params_ratio"], direct[cut]["accuracy"]) for cut in cuts(result)]
            label = f"no matching, {NAMES[normalizations(result)[-1]]}"
            axis.plot(*zip(*points), marker="x", linestyle=":", color="gray", label=label)
        axis.axhline(max(result["edges"]), color="black", linewidth=0.8, linestyle="--", label="better edge")
        axis.axhline(result["ensemble_logits"], color="black", linewidth=0.8, linestyle="-.", label="ensemble (2×)")
        axis.set(title=name, xlabel="parameters (× an edge)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    axes[0][0].set_ylabel("accuracy (%)")
    figure.suptitle("Activation matching, α = 0.5; points: l preserved layers")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
