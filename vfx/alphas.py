"""The weight of each edge in a merge."""

from __future__ import annotations

from collections.abc import Sequence

from vfx.errors import ArgumentError


def edge_weights(weights: float | Sequence[float] | None, edges: int) -> list[float]:
    """A weight for each edge: equal by default, (1 − α, α) for one number."""
    if weights is None:
        return [1 / edges] * edges
    if isinstance(weights, (int, float)):
        if edges != 2:
            raise ArgumentError(f"one number as weights means alpha of two edges; there are {edges}: give a list")
        weights = [1 - float(weights), float(weights)]
    values = [float(w) for w in weights]
    if len(values) != edges:
        raise ArgumentError(f"{len(values)} weights for {edges} edges; give one for each")
    if not all(0 <= w <= 1 for w in values):
        raise ArgumentError(f"weights must lie in [0, 1], got {values}")
    if abs(sum(values) - 1) > 1e-6:
        raise ArgumentError(f"weights must sum to 1, got {values} with sum {sum(values):g}")
    return values
