"""The weight of each edge in a merge."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from vfx.errors import ArgumentError


def edge_weights(weights: float | Sequence[float] | None, edges: int) -> list[float]:
    """A weight for each edge: equal by default, (1 − α, α) for one number."""
    if weights is None:
        return [1 / edges] * edges
    values = _numbers(weights, edges)
    if len(values) != edges:
        raise ArgumentError(f"{len(values)} weights for {edges} edges; give one for each")
    if not all(0 <= w <= 1 for w in values):
        raise ArgumentError(f"weights must lie in [0, 1], got {values}")
    if abs(sum(values) - 1) > 1e-6:
        raise ArgumentError(f"weights must sum to 1, got {values} with sum {sum(values):g}")
    return values


def _numbers(weights: float | Sequence[float], edges: int) -> list[float]:
    single = isinstance(weights, Real) or getattr(weights, "ndim", None) == 0  # numpy's and torch's numbers too
    if single and edges != 2:
        raise ArgumentError(f"one number as weights means alpha of two edges; there are {edges}: give a list")
    try:
        return [1 - float(weights), float(weights)] if single else [float(w) for w in weights]  # type: ignore
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"weights must be numbers, got {weights!r}") from error
