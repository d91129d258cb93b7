"""Table, claims and plot of the transformers' barriers."""

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
Key = tuple[str | None, str, str | None]

MAPS = {
    ("permutation", None): "permutations",
    ("permutation", "lift"): "permutations, lifted",
    ("full", None): "full classes",
    ("full", "lift"): "full classes, lifted",
}
COLOURS = {
    "weight": ("#a6cee3", "#6aaed6", "#2a7fb8", "#08306b"),
    "activation": ("#fdcc8a", "#fc8d59", "#d7301f", "#7f0000"),
    "learned": ("#c7e9c0", "#74c476", "#238b45", "#00441b"),
}
HALF = 0.5


def _key(curve: Mapping[str, Any]) -> Key:
    return curve["match"], curve["classes"], curve["prepare"]


def _label(key: Key) -> str:
    return "no matching" if key[0] is None else f"{key[0]}: {MAPS[key[1:]]}"


def markdown(results: Results) -> str:
    """A table for each pair, and what the full classes gain."""
    lines = [
        "# Transformers from different seeds: loss barriers",
        "",
        "11 values of α, no normalization. A barrier is the most that the merged network's loss lies above (its",
        "accuracy below) the line between the edges'. “Lifted”: norm gains folded and the residual stream centred",
        "before matching, so that the stream's class is orthogonal instead of permutations. Loss in nats on held-out",
        "samples, accuracy in percent (GPT-2: of the next character). “Edge drift”: how far the ends of the curve,",
        "merged at α = 0 and 1, lie from the losses of the edges as trained. Written by",
        "`python -m benchmarks.transformers`.",
        "",
        "![loss against α](transformers.png)",
        "",
    ]
    for result in results.values():
        lines += [f"## {result['title']}", "", *_about(result), "", *_table(result), "", *_verdicts(result), ""]
    return "\n".join(lines)


def _about(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{result['setting']}. {result['parameters']:,} parameters; {result['test_samples']:,} test samples."
    edges = " and ".join(f"{100 * edge['accuracy']:.2f} % (loss {edge['loss']:.4f})" for edge in result["edges"])
    yield f"Edges: {edges}."


def _table(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for curve in result["curves"]:
        ends = (abs(curve["loss"][end] - edge["loss"]) for end, edge in zip((0, -1), result["edges"]))
        middle = len(curve["alphas"]) // 2
        rows.append(
            [
                curve["match"] or "none",
                MAPS[_key(curve)[1:]] if curve["match"] else "",
                f"{curve['loss_barrier']:.4f}",
                f"{100 * curve['accuracy_barrier']:.2f}",
                f"{curve['loss'][middle]:.4f}",
                f"{100 * curve['accuracy'][middle]:.2f}",
                f"{max(ends):.0e}",
                f"{curve['seconds']:.0f}",
            ]
        )
    head = [
        "matching",
        "maps",
        "loss barrier",
        "accuracy barrier",
        "loss at ½",
        "accuracy at ½",
        "edge drift",
        "seconds",
    ]
    return grid(head, rows)


def _verdicts(result: Mapping[str, Any]) -> Iterator[str]:
    """Whether the full classes halve the loss barrier of permutations."""
    barriers = {_key(curve): curve["loss_barrier"] for curve in result["curves"]}
    for match in COLOURS:
        base = barriers.get((match, "permutation", None))
        for prepare in (None, "lift"):
            full = barriers.get((match, "full", prepare))
            if base is None or full is None:
                continue
            share = full / base if base else float("inf")
            verdict = "**at most half**" if full <= HALF * base else "**more than half**"
            name = _label((match, "full", prepare))
            yield f"- {name}: {full:.4f}, {verdict} of permutations alone ({base:.4f}): × {share:.2f}."
    learnt = barriers.get(("learned", "full", "lift"))
    if learnt is not None:
        least = min(own for (match, *_), own in barriers.items() if match != "learned")
        yield f"- {_label(('learned', 'full', 'lift'))}: {learnt:.4f}; the least of the others is {least:.4f}."


def draw(results: Results, path: Path) -> None:
    """Loss against α, a panel for each pair and a colour for each method."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.2 * len(results) + 2.4, 3.8), squeeze=False, layout="constrained"
    )
    shown: dict[str, Any] = {}
    for axis, result in zip(axes[0], results.values()):
        for curve in result["curves"]:
            key = _key(curve)
            style = _style(key)
            shown[_label(key)] = axis.plot(curve["alphas"], curve["loss"], marker="o", markersize=3, **style)[0]
        axis.set(title=result["title"], xlabel="α", ylabel="test loss")
        axis.grid(alpha=0.3)
    figure.legend(shown.values(), shown.keys(), fontsize=8, loc="outside right upper")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def _style(key: Key) -> dict[str, Any]:
    if key[0] is None:
        return {"color": "#777777", "linestyle": ":"}
    return {"color": COLOURS[key[0]][list(MAPS).index(key[1:])], "linestyle": "-" if key[0] == "weight" else "--"}
