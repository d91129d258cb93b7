"""Deep linear networks, where the vanishing feature is exact (*Vanishing Feature*, equations 2 and 3, Figure 1).

Pairs of two seeds are trained on scikit-learn's digits: 8 layers of 32, and 5 layers of 32 with residuals on the inner
ones. Each pair is averaged as it is and aligned by its weights (by permutations, and by all invertible maps that a
linear network has), and merged by the default call. The feature g(x) = f(x) − f(0) and the offset h = f(0) behind each
layer come from ``vfx.diagnosis.linear``, in float64, on the test images: the mean of ‖g‖ and ‖h‖ over the edges'. With
residuals, the feature falls apart by the number k of weights that it went through. Checked against the network's own
outputs. Results go to ``benchmarks/results``: linear.json, linear.md and linear.png.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import vfx
from benchmarks.fashion import RESULTS, command
from benchmarks.options import Output, Render
from benchmarks.pairs_report import grid
from vfx.data import digits
from vfx.diagnosis.figures import png
from vfx.diagnosis.linear import decompose, linear_layers
from vfx.files import write_atomic
from vfx.models import Training, accuracy, fit, linear_net

EXACT = 1e-10
PLAIN: dict[str, Any] = {"solve": None, "normalize": None}
MERGES: dict[str, dict[str, Any]] = {
    "averaged": {"match": None, **PLAIN},
    "aligned by permutations": {"match": "weight", "classes": "permutation", **PLAIN},
    "aligned by all maps": {"match": "weight", **PLAIN},
    "default call": {},
}
COLORS = {"averaged": "#b0b0b0", "aligned by permutations": "#e69f00", "aligned by all maps": "#0072b2"}
COLORS |= {"default call": "#2a7f62"}


@dataclass(frozen=True)
class Subject:
    """One architecture and how it is trained."""

    name: str
    depth: int
    residual: bool
    lr: float = 1e-3
    epochs: int = 30

    def edges(self) -> list[nn.Module]:
        """Two networks of two seeds."""
        images, labels, *_ = digits()
        networks = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = linear_net(self.depth, in_features=images[0].numel(), residual=self.residual)
            setting = Training(self.epochs, self.lr, 64, seed=seed, adam=True)
            networks.append(fit(model, images, labels, setting, progress=False).eval())
        return networks


SUBJECTS = (
    Subject("8 layers", 8, residual=False),
    Subject("5 layers, inner ones residual", 5, residual=True),
)


@torch.no_grad()
def anatomy(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Mean ‖g‖ and ‖h‖ behind each layer, and mean ‖feature of order k‖ of the outputs; ``x`` is (N, …)."""
    network = model.double()
    layers = linear_layers(vfx.trace(network, x[:2]))
    inputs = x.flatten(1)
    parts = [decompose(layers[: count + 1], inputs) for count in range(len(layers))]
    outputs = network(x)
    error = (parts[-1].output - outputs).abs().max() / outputs.abs().max()
    if error > EXACT:
        raise ValueError(f"feature and offset differ from the outputs by {float(error):.1e} of the largest")
    return {
        "feature": [float(part.feature.norm(dim=1).mean()) for part in parts],
        "offset": [float(part.offset.norm()) for part in parts],
        "orders": [float(term.norm(dim=1).mean()) for term in parts[-1].features],
        "error": float(error),
    }


def measure(subject: Subject) -> dict[str, Any]:
    """Edges and merged networks: accuracy in percent and anatomy."""
    images, _, tests, truth = digits()
    edges = subject.edges()
    merged = {
        name: vfx.merge(edges, images[:2], data=images, progress=False, **options).module
        for name, options in MERGES.items()
    }
    networks = {"edge 0": edges[0], "edge 1": edges[1], **merged}
    return {
        name: {"accuracy": round(100 * accuracy(network.float(), tests, truth), 2), **anatomy(network, tests.double())}
        for name, network in networks.items()
    }


def shares(result: dict[str, Any], name: str, part: str) -> list[float]:
    """A part of a network behind each layer, over the mean of the edges'."""
    ends = zip(result["edge 0"][part], result["edge 1"][part])
    return [value / (sum(pair) / 2) for value, pair in zip(result[name][part], ends)]


def markdown(results: dict[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    yield from ("# Deep linear networks", "", "`python -m benchmarks.linear`", "")
    yield "Shares are mean ‖g‖ (feature) and ‖h‖ (offset) over the edges'; figures of one pair each, digits."
    yield from ("", "![Feature and offset behind each layer](linear.png)")
    for subject, result in results.items():
        yield from ("", f"## {subject}", "")
        rows = []
        for name in result:
            feature, offset = (shares(result, name, part)[-1] for part in ("feature", "offset"))
            orders = ", ".join(f"{size:.3g}" for size in result[name]["orders"])
            rows.append([name, f"{result[name]['accuracy']:.2f}", f"{feature:.3f}", f"{offset:.3f}", orders])
        yield from grid(["network", "accuracy in %", "feature", "offset", "‖feature‖ by order k"], rows)


def draw(results: dict[str, Any]) -> Figure:
    """Feature (solid) and offset (dashed) behind each layer, as shares of the edges'."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (subject, result) in zip(panels, results.items()):
        _panel(axis, subject, result)
    panels[0].set_ylabel("share of the edges' (feature —, offset - -)")
    return figure


def _panel(axis: Axes, subject: str, result: dict[str, Any]) -> None:
    for name, color in COLORS.items():
        places: Sequence[int] = range(1, len(result[name]["feature"]) + 1)
        label = f"{name}, {result[name]['accuracy']:.1f} %"
        axis.plot(places, shares(result, name, "feature"), "-o", color=color, markersize=3, label=label)
        axis.plot(places, shares(result, name, "offset"), "--", color=color, linewidth=1)
    axis.axhline(1, color="black", linewidth=0.6)
    axis.set(yscale="log", xlabel="layer", title=subject)
    axis.set_xticks(places)
    axis.legend(fontsize=8, loc="lower left")
    axis.grid(alpha=0.25)


def main(output: Output = RESULTS, render: Render = False) -> None:
    """Train, merge, take apart, and write table and figure."""
    file = output / "linear.json"
    if not render:
        results = {subject.name: measure(subject) for subject in SUBJECTS}
        write_atomic(file, json.dumps(results, indent=1) + "\n")
    results = json.loads(file.read_text())
    write_atomic(output / "linear.md", markdown(results))
    write_atomic(output / "linear.png", png(draw(results)))


if __name__ == "__main__":
    command(main)
