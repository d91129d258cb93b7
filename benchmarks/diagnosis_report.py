"""Tables and plots of the diagnosed pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vfx.diagnosis.figures import png
from vfx.files import write_atomic

Results = Mapping[str, Any]
NAMES = {None: "none", "bias_calibration": "Bias Cal.", "repair": "REPAIR", "rescale": "RESCALE", "reset": "RESET"}
COLORS = {None: "#444444", "bias_calibration": "#e08214", "repair": "#0b559f", "rescale": "#2a7f62", "reset": "#c1272d"}
CUTS = ("#08306b", "#2171b5", "#6baed6", "#c994c7", "#dd1c77")


def markdown(results: Results) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    yield "# Diagnosis of the trained pairs\n"
    yield "`python -m benchmarks.diagnosis` measures this; figures as measured. Matching and calibration read the"
    yield "first 2,000 training images; direct means without alignment.\n"
    for name, result in results.items():
        yield f"## {name}\n"
        for part, write in (("barriers", _barriers), ("layers", _layers), ("data", _data)):
            if part in result:
                yield from write(result[part], result[f"{part}_test_images"])
    yield from _claims(results)


def _label(match: str | None, normalize: str | None) -> str:
    return f"{'direct' if match is None else 'matched'}, {NAMES[normalize]}"


def _barriers(found: Mapping[str, Any], images: int) -> Iterator[str]:
    alphas = found["curves"][0]["alphas"]
    yield f"Accuracy in % along α (weight of the second edge), {images:,} test images; barriers in points and nats:\n"
    yield "| curve | " + " | ".join(f"{a:.1f}" for a in alphas) + " | accuracy barrier | loss barrier |"
    yield "| --- |" + " ---: |" * (len(alphas) + 2)
    for curve in found["curves"]:
        cells = " | ".join(f"{100 * x:.2f}" for x in curve["accuracy"])
        loss = "∞" if curve["loss_barrier"] is None else f"{curve['loss_barrier']:.3f}"
        label = _label(curve["match"], curve["normalize"])
        yield f"| {label} | {cells} | {100 * curve['accuracy_barrier']:.2f} | {loss} |"
    yield ""


def _layers(found: Sequence[Mapping[str, Any]], images: int) -> Iterator[str]:
    yield "Features at α = 0.5 on 512 test images: ratio to the edges' at the last layer, offset share there, smallest"
    yield "variance ratio, units silenced (median over layers), and the verdict with the first layer it names:\n"
    yield "| network | feature ratio | offset share | least variance ratio | silenced | verdict | layer |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | ---: |"
    for row in found:
        least = min(x for x in row["variance_ratio"] if x is not None)
        silenced = sorted(x for x in row["silenced"] if x is not None)
        kept = f", PFM {row['preserve']}" if row["preserve"] else ""
        yield (
            f"| {_label(row['match'], row['normalize'])}{kept} | {_short(row['feature_ratio'][-1])} | "
            f"{_short(row['offset_share'][-1])} | {_short(least)} | "
            f"{_short(silenced[len(silenced) // 2]) if silenced else '–'} | {row['verdict']} | {row['layer'] or ''} |"
        )
    yield ""


def _data(found: Sequence[Mapping[str, Any]], images: int) -> Iterator[str]:
    yield f"5 % of the 20,000 training images: accuracy in % ({images:,} test images) and median variance ratio on"
    yield "1,000 other images; random data behind random matching are three draws, mean and range:\n"
    yield "| matched on | calibrated on | accuracy | variance ratio |"
    yield "| --- | --- | ---: | ---: |"
    for matched in ("random", "easy", "hard"):
        for calibrated in ("random", "easy", "hard"):
            rows = _cells(found, matched, calibrated)
            values = [row["accuracy"] for row in rows]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            ratio = mean(row["variance_ratio"] for row in rows)
            yield f"| {matched} | {calibrated} | {mean(values):.2f}{spread} | {ratio:.3f} |"
    yield ""


def _cells(found: Sequence[Mapping[str, Any]], matched: str, calibrated: str) -> list[Mapping[str, Any]]:
    return [row for row in found if row["matched"] == matched and row["calibrated"].split()[0] == calibrated]


def _claims(results: Results) -> Iterator[str]:
    yield "## Claims of the papers\n"
    for name, result in results.items():
        if "barriers" in result:
            curves = {(c["match"], c["normalize"]): c["accuracy_barrier"] for c in result["barriers"]["curves"]}
            lower = [
                method
                for (match, method) in curves
                if match is None and curves[("activation", method)] < curves[(None, method)]
            ]
            yield f"* {name}: alignment lowers the accuracy barrier for {len(lower)} of {len(curves) // 2} methods."
        if "data" in result:
            random, easy = (
                mean(r["accuracy"] for r in _cells(result["data"], "random", x)) for x in ("random", "easy")
            )
            ratio = mean(r["variance_ratio"] for r in _cells(result["data"], "random", "easy"))
            matched = mean(r["accuracy"] for r in _cells(result["data"], "easy", "random"))
            yield (
                f"* {name}: calibrating on easy instead of random data costs {random - easy:.2f} points (variance "
                f"ratio {ratio:.3f}), matching on easy data {random - matched:.2f}."
            )


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def draw(results: Results, folder: Path) -> None:
    """Layers and barriers of each pair, and the choice of data."""
    shown = [name for name, result in results.items() if "layers" in result or "barriers" in result]
    if shown:
        figure = Figure(figsize=(17, 3.6 * len(shown)), layout="constrained")
        for row, name in zip(figure.subplots(len(shown), 4, squeeze=False), shown):
            _pair(row, name, results[name])
        write_atomic(folder / "diagnosis.png", png(figure, 90))
    subjects = [name for name, result in results.items() if "data" in result]
    if subjects:
        figure = Figure(figsize=(9, 3.2 * len(subjects)), layout="constrained")
        for (left, right), name in zip(figure.subplots(len(subjects), 2, squeeze=False), subjects):
            _subsets(left, right, name, results[name]["data"])
        write_atomic(folder / "diagnosis_data.png", png(figure, 100))


def _pair(axes: Sequence[Axes], name: str, result: Mapping[str, Any]) -> None:
    rows = result.get("layers", ())
    treatments = [row for row in rows if not row["preserve"]]
    for axis, measure, title in zip(
        axes, ("feature_ratio", "offset_share"), ("feature ratio", "offset share ‖h‖/E‖g‖ against the edges")
    ):
        for row in treatments:
            style = "--" if row["match"] is None else "-"
            label = _label(row["match"], row["normalize"])
            _line(axis, row[measure], label, COLORS[row["normalize"]], style)
        _layer_axis(axis, title)
    axes[0].set_title(name)
    if treatments:
        axes[1].legend(fontsize=7, ncols=2)
    cuts = [row for row in rows if row["match"] and row["normalize"] is None]
    for row, color in zip(cuts, CUTS):
        _line(axes[2], row["feature_ratio"], f"PFM {row['preserve']}", color, "-")
    _layer_axis(axes[2], "feature ratio, matched, not normalized")
    if cuts:
        axes[2].legend(fontsize=7)
    _curves(axes[3], result)


def _curves(axis: Axes, result: Mapping[str, Any]) -> None:
    for curve in result.get("barriers", {"curves": ()})["curves"]:
        style = "--" if curve["match"] is None else "-"
        values = [100 * x for x in curve["accuracy"]]
        label = _label(curve["match"], curve["normalize"])
        axis.plot(
            curve["alphas"], values, style, marker="o", markersize=3, color=COLORS[curve["normalize"]], label=label
        )
    axis.set(xlabel="α (weight of the second edge)", ylabel="accuracy (%)", ylim=(0, 100))
    axis.grid(alpha=0.25)
    if axis.get_lines():
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _line(axis: Axes, values: Sequence[float | None], label: str, color: str, style: str) -> None:
    shown = [math.nan if x is None or x <= 0 else x for x in values]
    axis.plot(range(1, len(shown) + 1), shown, style, marker="o", markersize=3, color=color, label=label)


def _layer_axis(axis: Axes, title: str) -> None:
    axis.set(xlabel="layer", ylabel=title)
    axis.set_yscale("log")
    axis.axhline(1, color="0.4", linewidth=0.8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axis.grid(alpha=0.25)


def _subsets(left: Axes, right: Axes, name: str, found: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy and variance ratio by calibration data, a marker for each subset that was matched on."""
    colors = {"random": "#444444", "easy": "#0b559f", "hard": "#c1272d"}
    for index, (matched, color) in enumerate(colors.items()):
        for place, calibrated in enumerate(colors):
            rows = _cells(found, matched, calibrated)
            x = [place + 0.15 * (index - 1)] * len(rows)
            label = f"matched on {matched}" if place == 0 else None
            left.plot(x, [row["accuracy"] for row in rows], "o", markersize=5, color=color, label=label)
            right.plot(x, [row["variance_ratio"] for row in rows], "o", markersize=5, color=color)
    for axis, title in ((left, "accuracy (%)"), (right, "variance ratio (median over layers)")):
        axis.set_xticks(range(3), list(colors))
        axis.set(xlabel="5 % of the data, calibrated on", ylabel=title, xlim=(-0.5, 2.5))
        axis.grid(alpha=0.25)
    right.axhline(1, color="0.4", linewidth=0.8)
    left.set_title(name)
    left.legend(fontsize=7)
