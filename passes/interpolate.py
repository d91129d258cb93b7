"""Interpolate: N aligned weight sets become one, θ = Σ αᵢ θᵢ.

Integer buffers are taken from the first edge, as are tensors the graph never reads (heads unused in eval mode): they
were not aligned, so averaging them would only look like merging. Private tensors (preserved branches) stay as they are.
Layer statistics are averaged with the same weights, standard deviations and not variances (REPAIR, eq. 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vfx.alphas import edge_weights
from vfx.arguments import checked
from vfx.program import Goal, Program
from vfx.rewrite import Pass, PassResult


class Interpolate(Pass[None]):
    """Average the weight sets; ``weights`` sum to 1, or one number α: the second of two edges' weight."""

    weight_sets = "several"

    @checked
    def __init__(self, weights: float | Sequence[float] | None = None):
        self.weights = weights

    def apply(self, program: Program) -> PassResult[None]:
        alphas = edge_weights(self.weights, program.edges)
        names = set(program.names()) - program.private
        merged = {
            name: average([weights[name] for weights in program.weights], alphas) if name in names else tensor
            for name, tensor in program.weights[0].items()
        }
        shares = torch.tensor(alphas, dtype=torch.float64)
        goals = {node: Goal(*(mix(x, shares) for x in (goal.mean, goal.std))) for node, goal in program.goals.items()}
        unused = [n for n in program.weights[0] if n not in names | program.private and n not in program.buffers]
        notes = program.notes
        if unused:
            notes = (*notes, f"taken from the first edge, since the graph never reads them: {_some(unused)}")
        result = program.with_weights([merged], f"Interpolate({', '.join(f'{a:g}' for a in alphas)})")
        return PassResult(replace(result, goals=goals, notes=notes))


def average(tensors: list[Tensor], alphas: list[float]) -> Tensor:
    """Σ αᵢ tᵢ; integer tensors, and tensors that all edges share, come from the first, as do infinities (of masks)."""
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()) or all(t is first for t in tensors):
        return first
    total = first * alphas[0]
    for tensor, alpha in zip(tensors[1:], alphas[1:]):
        total = total.add_(tensor.to(total.device), alpha=alpha)
    infinite = first.isinf()
    return torch.where(infinite, first, total) if infinite.any() else total


def mix(rows: Tensor, shares: Tensor) -> Tensor:
    return (rows * shares.to(rows.device)[:, None]).sum(0, keepdim=True)


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
