"""RescaleWeights: each merged layer's weight gets back the magnitude of the edges' (*Vanishing Feature*, Figure 1).

Averaging weights that differ makes them small (magnitude collapse): mean |θ_α| falls below Σ αᵢ mean |θ_i|. Acts before
Interpolate: every edge's weight of a layer is multiplied by the same c = Σ αᵢ mean |θ_i| / mean |Σ αᵢ θ_i|, so that the
average has the edges' mean magnitude. Biases and norms stay. It needs no data and undoes none of the mismatch of
features: the papers show it to say that magnitude is not the cause.
"""

from __future__ import annotations

from collections.abc import Sequence

from vfx.alphas import edge_weights
from vfx.analyse.layers import Choice, number_layers
from vfx.arguments import checked
from vfx.operators import weight_name
from vfx.program import Program
from vfx.rewrite import Pass, PassResult


class RescaleWeights(Pass[None]):
    """Scale the edges' weights of ``layers`` (default: all but shortcuts and heads) for a merge with ``weights``."""

    needs = (number_layers,)
    weight_sets = "several"
    carries_maps = True

    @checked
    def __init__(self, weights: float | Sequence[float] | None = None, layers: Choice = None):
        self.weights, self.layers = weights, layers

    def apply(self, program: Program) -> PassResult[None]:
        alphas = edge_weights(self.weights, program.edges)
        chosen = [weight_name(program.nodes[layer.node]) for layer in number_layers(program).select(self.layers)]
        names = dict.fromkeys(name for name in chosen if name is not None and name not in program.private)
        sets, silent = [dict(weights) for weights in program.weights], []
        for name in names:
            tensors = [weights[name].double() for weights in program.weights]
            wanted = sum(a * float(t.abs().mean()) for a, t in zip(alphas, tensors))
            magnitude = float(sum(a * t for a, t in zip(alphas, tensors)).abs().mean())  # type: ignore[union-attr]
            if not magnitude:
                silent.append(f"weight rescaling: the average of {name} is zero and stays so")
                continue
            for weights in sets:
                weights[name] = weights[name] * (wanted / magnitude)
        result = program.with_weights(sets, f"RescaleWeights({len(names)} layers)")
        return PassResult(result.with_notes(silent))
