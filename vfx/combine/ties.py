"""TIES: trim each task vector, elect a sign for each entry, and average those that have it.

Of each edge's task vector, all parameters together, the share of entries that are largest in size is kept and the
others become zero: τ̂ᵢ. With γ = sgn(Σ τ̂ᵢ) entry by entry, τ is the mean of those τ̂ᵢ ≠ 0 whose sign is γ, and
θ = θ₀ + λ τ (Yadav et al., NeurIPS 2023, algorithm 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.combine.combiner import Combination, Combiner
from vfx.errors import ArgumentError


class Ties(Combiner):
    """Trim, elect signs, and take disjoint means.

    ``keep``: the share (0, 1] of each task vector's entries that stay; ``scale`` λ. Edges count by their ``weights=``
    in the election and in the means. Raises ArgumentError.

    Source: *TIES-Merging* (Yadav et al., NeurIPS 2023), algorithm 1; defaults as there without validation.

    >>> merged = vfx.merge([a, b], x, base=pretrained, combine=vfx.Ties(keep=0.3))
    """

    needs = frozenset({"base"})

    @checked
    def __init__(self, keep: float = 0.2, scale: float = 1.0):
        if not 0 < keep <= 1:
            raise ArgumentError(f"keep is a share of the entries, above 0 and at most 1, got {keep}")
        self.keep, self.scale = keep, scale

    def __call__(self, combination: Combination) -> dict[str, Tensor]:
        least = [self._least(combination, edge) for edge in range(len(combination.shares))]
        return {
            name: combination.of_base(name) + self.scale * self._elected(combination, name, least)
            for name in combination.names
        }

    def _least(self, combination: Combination, edge: int) -> float:
        """The size of the smallest entry of an edge's task vector that is kept."""
        sizes = torch.cat([combination.change(name, edge).abs().flatten() for name in combination.names])
        count = max(1, int(self.keep * len(sizes)))
        return float(sizes.kthvalue(len(sizes) - count + 1).values)

    def _elected(self, combination: Combination, name: str, least: list[float]) -> Tensor:
        """The mean of the trimmed entries that have the elected sign."""
        trimmed = [
            torch.where(change.abs() >= size, change, 0.0) for change, size in zip(combination.changes(name), least)
        ]
        sign = sum(share * change for share, change in zip(combination.shares, trimmed)).sign()  # type: ignore[union-attr]
        total, votes = torch.zeros_like(trimmed[0]), torch.zeros_like(trimmed[0])
        for share, kept_change in zip(combination.shares, trimmed):
            agrees = (kept_change.sign() == sign) & (kept_change != 0)
            total += share * torch.where(agrees, kept_change, 0.0)
            votes += share * agrees.double()
        return torch.where(votes > 0, total / votes, 0.0)
