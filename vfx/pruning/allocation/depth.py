"""Allocations that look at a layer's place or shape alone."""

from __future__ import annotations

import math
from typing import ClassVar

from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.pruning.allocation.allocation import Allocation, met
from vfx.pruning.scores.score import Subject
from vfx.pruning.targets import find_targets, heads


class Progressive(Allocation):
    """An arithmetic progression from s − ``spread`` at the first layer to s + ``spread`` at the last (2502.14770)."""

    name: ClassVar[str] = "progressive"

    @checked
    def __init__(self, spread: float = 0.05):
        if not 0 <= spread < 1:
            raise ArgumentError(f"spread={spread} lies in [0, 1)")
        self.spread = spread

    def shares(self, subject: Subject, sparsity: float) -> dict[str, float]:
        sizes = {target.name: target.numel for target in subject.targets}
        last = max(len(sizes) - 1, 1)
        return met({name: self.spread * (2 * i / last - 1) for i, name in enumerate(sizes)}, sizes, sparsity)


class ErdosRenyi(Allocation):
    """Densities in proportion to (outputs + inputs + Σ kernel) / (outputs · inputs · Π kernel) (Evci et al. 2020).

    ``head``: the layers behind which no other comes keep all weights where these are at most this share of what the
    network keeps; the others make up for it. Raises ArgumentError.
    """

    name: ClassVar[str] = "erk"

    @checked
    def __init__(self, head: float = 0.0):
        if not 0 <= head < 1:
            raise ArgumentError(f"head={head} lies in [0, 1)")
        self.head = head

    def shares(self, subject: Subject, sparsity: float) -> dict[str, float]:
        sizes = {target.name: target.numel for target in subject.targets}
        density = {target.name: sum(target.shape) / math.prod(target.shape) for target in subject.targets}
        kept = (1 - sparsity) * sum(sizes.values())
        full = self._whole(subject, sizes, kept)  # layers that would be more than dense keep all weights, too
        while True:
            rest = [name for name in sizes if name not in full]
            left = kept - sum(sizes[name] for name in full)
            factor = left / max(sum(density[name] * sizes[name] for name in rest), 1e-300)
            crowded = {name for name in rest if factor * density[name] > 1}
            if not crowded:
                break
            full |= crowded
        wishes = {name: 0.0 if name in full else 1 - factor * density[name] for name in sizes}
        return met(wishes, sizes, sparsity)

    def _whole(self, subject: Subject, sizes: dict[str, int], kept: float) -> set[str]:
        """The layers of the head, where they keep all their weights."""
        found = set(sizes) & heads(find_targets(subject.program)[0]) if self.head else set()
        return found if sum(sizes[name] for name in found) <= self.head * kept else set()
