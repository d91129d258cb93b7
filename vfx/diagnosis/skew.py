"""Warnings about calibration data that do not look like the task's (*The Role of Data in Model Merging*).

Two signs: classes that are unevenly filled, and a merged network whose activations vary otherwise than the edges' on
data that did not calibrate it.

* Classes: Pearson's chi-square against equally filled classes at p < 0.001, and the fullest class at least twice the
  size of an even one or the emptiest at most half of it. Fewer than 5 samples a class on average say nothing.
* Variance: the median over the merged layers of 2 v_α/(v_0 + v_1) on held-out batches outside [0.5, 2].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from scipy.stats import chisquare
from torch.utils import _pytree as pytree

from vfx.diagnosis.compare import compare
from vfx.diagnosis.rows import LayerRow
from vfx.program import Program, Value
from vfx.statistics.labels import LabelCount

SIGNIFICANT = 1e-3
UNEVEN = 2.0
EXPECTED = 5
VARIANCE = (0.5, 2.0)


def skew_notes(
    merged: Program, edges: Program, data: Any, held_out: Any = None, device: Any = None, progress: bool = True
) -> list[str]:
    """Warnings for a merge's report: from the labels that passed by in ``data``, and from ``held_out`` batches."""
    candidates = [class_note(data.counts, _classes(edges)) if isinstance(data, LabelCount) else None]
    if held_out is not None:
        seen = compare(merged, edges, held_out, device=device, units=False, progress=progress)
        candidates.append(variance_note(seen.rows))
    return [note for note in candidates if note is not None]


def _classes(program: Program) -> int | None:
    """Outputs of a classifier: the second axis of the first floating output, if that is a matrix (N, C)."""
    for node in _outputs(program):
        value = node.meta.get("val")
        if isinstance(value, Value) and value.dtype.is_floating_point:
            return value.shape[1] if len(value.shape) == 2 and isinstance(value.shape[1], int) else None
    return None


def _outputs(program: Program) -> Iterator[Any]:
    output = next(node for node in program.graph.nodes if node.op == "output")
    return (leaf for leaf in pytree.tree_leaves(output.args[0]) if hasattr(leaf, "meta"))


def class_note(counts: Mapping[int, int], classes: int | None = None) -> str | None:
    """What is wrong with a histogram of class labels, or None. ``classes``: how many there are, empty ones included."""
    number = max(classes or 0, len(counts), max(counts, default=-1) + 1 if classes is None else 0)
    samples = sum(counts.values())
    if number < 2 or samples < EXPECTED * number:
        return None
    filled = sorted(counts.items(), key=lambda item: item[1])
    histogram = [*(count for _, count in filled), *[0] * (number - len(filled))]
    even = samples / number
    if chisquare(histogram).pvalue >= SIGNIFICANT:
        return None
    if max(histogram) < UNEVEN * even and min(histogram) > even / UNEVEN:
        return None
    empty = number - len(filled)
    seen = f"{empty} of {number} classes are empty" if empty else f"class {filled[0][0]} has {filled[0][1]}"
    return (
        f"calibration data look skewed: of {samples} samples class {filled[-1][0]} has {filled[-1][1]} and {seen} "
        f"({even:.0f} each would be even); statistics may be wrong: vfx.select(data, n, strategy='balanced')"
    )


def variance_note(rows: Sequence[LayerRow]) -> str | None:
    """What held-out batches say about the statistics that a merged network was given, or None."""
    ratios = [row.variance_ratio for row in rows if row.measured and row.variance_ratio is not None]
    if not ratios or VARIANCE[0] <= median(ratios) <= VARIANCE[1]:
        return None
    return (
        f"on held-out batches the merged layers' variance is {median(ratios):.2g} times the edges' (median; "
        f"{VARIANCE[0]:g} to {VARIANCE[1]:g} is expected): calibration data may be skewed, or too few"
    )
