"""Tables, claims and plot of the normalizations' results."""

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

Results = Mapping[str, Any]
Series = dict[str, dict[int, float]]


def series(cells: Mapping[str, Any]) -> Series:
    """Accuracy by name and by the number that its cell's name ends in."""
    found: Series = {}
    for name, cell in cells.items():
        head, _, number = name.rpartition(" ")
        if number.isdigit():
            found.setdefault(head, {})[int(number)] = cell["accuracy"]
    return found


def markdown(results: Results) -> str:
    """All tables as one document."""
    lines = [
        "# Normalizations of the trained pairs at α = 0.5",
        "",
        "Fashion-MNIST, activation matching; matching and calibration on the first 2,000 training images in order, in",
        "batches of 128; accuracy in percent over the first test images (their number stands with each pair).",
        "Written by `python -m benchmarks.normalization`; every figure and score is in `normalization.json`.",
        "",
        "![normalizations](normalization.png)",
        "",
    ]
    for name, result in results.items():
        studies = result["studies"]
        lines += [f"## {name}", "", _summary(result), ""]
        for study, (title, table) in {
            "methods": ("All methods by preserved layers", lambda c, r: _by_number(c, "method", r["layers"])),
            "sweeps": ("Sweeps (*Rethinking Model Re-Basin*, Table 9), l = 0", lambda c, _: _sweeps(c)),
            "removal": ("Bias removal in k layers (*Vanishing Feature*, Figure 13), l = 0", lambda c, _: _removal(c)),
            "partial": ("Only the first l layers aligned (Figure 4, left)", lambda c, _: _by_number(c, "aligned", 0)),
            "biases": ("Biases removed before matching (*Rethinking Model Re-Basin*, §3.2)", lambda c, _: _biases(c)),
        }.items():
            rows = table(studies.get(study, {}), result)
            if rows:
                lines += [f"**{title}, {result['test_images'][study]:,} test images**", "", *rows, ""]
    lines += ["## Auto against the best single method", "", *(f"- {text}" for text in claims(results)), ""]
    return "\n".join(lines)


def _summary(result: Mapping[str, Any]) -> str:
    figures = {name: f"{cell['accuracy']:.2f}" for name, cell in result["studies"].get("references", {}).items()}
    known = ", ".join(f"{name} {value}" for name, value in figures.items())
    return f"{known} ({result['test_images']['references']:,} test images)."


def _by_number(cells: Mapping[str, Any], what: str, layers: int) -> list[str]:
    table = series(cells)
    if not table:
        return []
    numbers = sorted({n for row in table.values() for n in row})
    head = [what, *(f"{n}/{layers}" if layers else str(n) for n in numbers)]
    rows = [[name, *(f"{row[n]:.2f}" if n in row else "" for n in numbers)] for name, row in table.items()]
    for name in ("auto", "auto with labels"):
        picked = [cells.get(f"{name} {n}", {}) for n in numbers]
        if any(picked):
            rows.append([f"{name} took", *(str(cell.get("normalize") or "none") for cell in picked)])
    return grid(head, rows)


def _sweeps(cells: Mapping[str, Any]) -> list[str]:
    kinds = ("uncorrected", "train", "exact")
    methods = list(dict.fromkeys(name.split()[0] for name in cells))
    rows = [
        [m, *(f"{cells[f'{m} {k}']['accuracy']:.2f}" if f"{m} {k}" in cells else "" for k in kinds)] for m in methods
    ]
    return grid(["method", *kinds], rows) if rows else []


def _removal(cells: Mapping[str, Any]) -> list[str]:
    table = series(cells)
    if not table:
        return []
    numbers = sorted({n for row in table.values() for n in row})
    rows = []
    for direction, row in table.items():
        chosen = cells.get(f"{direction} chosen", {})
        last = f"k = {chosen['count']}: {chosen['accuracy']:.2f}" if chosen else ""
        rows.append([direction, *(f"{row[n]:.2f}" if n in row else "" for n in numbers), last])
    return grid(["from the", *map(str, numbers), "chosen on held-out data"], rows)


def _biases(cells: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind in ("with", "without"):
        own = [cells.get(f"edge {edge} {kind} biases") for edge in (0, 1)]
        if not all(own):
            continue
        edges = [cell["accuracy"] for cell in own if cell]
        row = [f"{kind} biases", " / ".join(f"{x:.2f}" for x in edges)]
        for match in ("direct", "weight", "activation"):
            cell = cells.get(f"{match} {kind} biases")
            row.append(f"{cell['accuracy']:.2f} ({sum(edges) / 2 - cell['accuracy']:.2f})" if cell else "")
        rows.append(row)
    return grid(["", "edges", *(f"{m} (barrier)" for m in ("direct", "weight", "activation"))], rows) if rows else []


def claims(results: Results) -> Iterator[str]:
    """How far "auto" stays behind the best single method on test data, cell by cell."""
    for name, result in results.items():
        table = series(result["studies"].get("methods", {}))
        autos = [key for key in table if key.startswith("auto")]
        for auto in autos:
            single = {key: row for key, row in table.items() if key not in autos and "by batch" not in key}
            gaps = {n: max(row[n] for row in single.values() if n in row) - table[auto][n] for n in table[auto]}
            worst = max(gaps, key=lambda n: gaps[n])
            verdict = "**holds**" if gaps[worst] <= 0.5 else "**fails**"
            yield (
                f"{name}, {auto}: at most 0.5 points below the best single method: {verdict} "
                f"(worst {gaps[worst]:.2f} points, at l = {worst})."
            )


def draw(results: Results, path: Path) -> None:
    """Methods by l, bias removal by k and partial alignment, a row for each pair."""
    shown = {name: result for name, result in results.items() if result["studies"]}
    if not shown:
        return
    figure, axes = plt.subplots(len(shown), 3, figsize=(19, 4.2 * len(shown)), squeeze=False)
    for row, (name, result) in zip(axes, shown.items()):
        studies = (
            ("methods", "preserved layers l"),
            ("removal", "layers without bias k"),
            ("partial", "aligned layers"),
        )
        for axis, (study, label) in zip(row, studies):
            axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
            for method, points in series(result["studies"].get(study, {})).items():
                numbers = sorted(points)
                axis.plot(numbers, [points[n] for n in numbers], marker="o", markersize=3, label=method)
            if not axis.lines:  # a study that this network has no use for
                axis.axis("off")
                continue
            axis.set(title=f"{name}: {study}", xlabel=label, ylabel="accuracy (%)")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
