"""The README's picture: accuracy with averaged weights, with corrected statistics, and with solved layers.

Left: the merged pairs of ``benchmarks.solving`` at the size of one edge. Right: VGG16-BN pruned at once, by
``benchmarks.masks``. Reads ``solving.json`` and ``masks.json`` in ``benchmarks/results``; writes ``picture.png``.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.fashion import RESULTS, command
from benchmarks.options import Output
from vfx.files import write_atomic

PAIRS = {"vgg16_w025": "VGG16", "vgg16_bn_w025": "VGG16-BN", "resnet20_bn_w05": "ResNet20-BN"}
COLORS = {"average": "#b0b0b0", "statistics": "#e69f00", "solved": "#0072b2"}
TEXT = {"average": "black", "statistics": "black", "solved": "white"}
SHARES = ("0.8", "0.9", "0.95", "0.98")
OFFSETS = {"average": (0, 6), "statistics": (-95, -6), "solved": (-30, -13)}  # of the curves' names, in points
EDGES = 0.36  # half the width of the line that marks a pair's edges


def _is_normalization(name: str) -> bool:
    return not name.startswith(("edge", "least squares", "none"))


def merged(axes: Axes, solving: dict[str, Any]) -> None:
    """Bars of each pair: aligned and averaged, best normalization, all layers solved; its edges as lines."""
    pairs = {name: solving[name] for name in PAIRS if name in solving}
    for place, pair in enumerate(pairs.values()):
        accuracies = pair["candidates"]
        normalized = max(value for key, value in accuracies.items() if _is_normalization(key))
        bars = {"average": accuracies["none"], "statistics": normalized, "solved": accuracies["least squares"]}
        for step, (kind, height) in enumerate(bars.items()):
            x = place + 0.26 * (step - 1)
            axes.bar(x, height, 0.24, color=COLORS[kind])
            axes.text(x, height - 5, f"{height:.1f}", ha="center", fontsize=7, color=TEXT[kind])
        axes.hlines(pair["edges"], place - EDGES, place + EDGES, color="black", linewidth=0.8)
    axes.text(-EDGES, 94, "lines: the two networks", fontsize=8)
    axes.set_xticks(range(len(pairs)), [PAIRS[name] for name in pairs])
    axes.set_ylim(0, 104)
    axes.set_ylabel("accuracy in %")
    axes.set_title("Two networks merged into one", fontsize=10)


def pruned(axes: Axes, masks: dict[str, Any], name: str = "vgg16_bn_w025") -> None:
    """Curves of one network over the share of weights that go."""
    methods = {
        "none": ("average", "as it is"),
        "RESET / REPAIR": ("statistics", "statistics corrected"),
        "auto": ("solved", "each layer solved"),
    }
    network = masks[name]
    for method, (color, label) in methods.items():
        heights = [network["cells"][f"{method}/{share}"]["accuracy"] for share in SHARES]
        places = [100 * float(share) for share in SHARES]
        axes.plot(places, heights, "o-", color=COLORS[color], markersize=4)
        shift, label_color = OFFSETS[color], COLORS[color]
        axes.annotate(label, (places[1], heights[1]), shift, textcoords="offset points", fontsize=8, color=label_color)
    axes.axhline(network["dense"], color="black", linewidth=0.8)
    axes.text(98, network["dense"] + 1.5, "the network as trained", ha="right", fontsize=8)
    axes.set_xticks([100 * float(share) for share in SHARES])
    axes.set_ylim(0, 104)
    axes.set_xlabel("share of weights removed at once, in %")
    axes.set_title(f"{PAIRS[name]} pruned", fontsize=10)


def main(results: Output = RESULTS) -> None:
    solving = json.loads(Path(results, "solving.json").read_text())
    masks = json.loads(Path(results, "masks.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    merged(left, solving)
    pruned(right, masks)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    names = ["aligned, averaged", "best corrected statistics", "each layer solved"]
    left.legend(handles, names, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    write_atomic(results / "picture.png", buffer.getvalue())


if __name__ == "__main__":
    command(main)
