"""Interpolate: N aligned weight sets become one, θ = Σ αᵢ θᵢ (``vfx.rewrite.averaging`` says what of each tensor)."""

from __future__ import annotations

from collections.abc import Sequence

from vfx.alphas import edge_weights
from vfx.arguments import checked
from vfx.program import Program
from vfx.rewrite import Pass, PassResult
from vfx.rewrite.averaging import averaged


class Interpolate(Pass[None]):
    """Average the weight sets; ``weights`` sum to 1, or one number α: the second of two edges' weight."""

    weight_sets = "several"

    @checked
    def __init__(self, weights: float | Sequence[float] | None = None):
        self.weights = weights

    def apply(self, program: Program) -> PassResult[None]:
        alphas = edge_weights(self.weights, program.edges)
        return PassResult(averaged(program, alphas, f"Interpolate({', '.join(f'{a:g}' for a in alphas)})"))
