"""CalibrateBias: homogeneous interpolation of biases, b_l ← Σ αᵢ^l b_i, l the depth from 1 (*Vanishing Feature* §5.2).

Acts before Interpolate, which adds the last factor αᵢ: each edge's bias of layer l is scaled by αᵢ^(l−1). Depth counts
conv and linear layers and is absolute: preserved layers count, and keep their own biases. Norms are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from vfx.alphas import edge_weights
from vfx.analyse.layers import Layers, number_layers
from vfx.arguments import checked
from vfx.operators import weight_name
from vfx.program import Program
from vfx.rewrite import Pass, PassResult


class CalibrateBias(Pass[None]):
    """Scale the edges' biases for a merge with ``weights``."""

    needs = (number_layers,)
    weight_sets = "several"
    carries_maps = True

    @checked
    def __init__(self, weights: float | Sequence[float] | None = None):
        self.weights = weights

    def apply(self, program: Program) -> PassResult[None]:
        alphas = edge_weights(self.weights, program.edges)
        depths = bias_depths(program, number_layers(program))
        ambiguous = [name for name, numbers in depths.items() if len(numbers) > 1]
        notes = [f"bias calibration: {name} serves layers of several depths and is averaged" for name in ambiguous]
        sets = [dict(weights) for weights in program.weights]
        for name, numbers in depths.items():
            if name in ambiguous:
                continue
            for alpha, weights in zip(alphas, sets):
                weights[name] = weights[name] * alpha ** (min(numbers) - 1)
        return PassResult(program.with_weights(sets, "CalibrateBias").with_notes(notes))


def bias_depths(program: Program, layers: Layers) -> dict[str, set[int]]:
    """Bias FQN -> depths of the layers it serves, private ones left out."""
    number = {layer.node: layer.number for layer in layers}
    depths: dict[str, set[int]] = {}
    for node in program.graph.nodes:
        name = weight_name(node, "bias") if node.name in number else None
        if name is not None and name not in program.private:
            depths.setdefault(name, set()).add(number[node.name])
    return depths
