"""What an allocation is: a share for every layer, which together lose what the network has to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from vfx.errors import ArgumentError
from vfx.pruning.scores.score import Subject

STEPS = 100  # of the bisection, more than a float's digits


class Allocation(ABC):
    """``shares`` gives every target the share of its weights that goes."""

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False

    @abstractmethod
    def shares(self, subject: Subject, sparsity: float) -> dict[str, float]:
        """The share of each target's weights that goes, by FQN; all weights together lose ``sparsity`` of them."""


def met(wishes: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Shares that differ as ``wishes`` do, moved alike so that ⌊sparsity · all weights⌋ of them go.

    A share stays in [0, 1) and leaves a layer at least one weight. Raises ArgumentError where that cannot be.
    """
    most = {name: 1 - 1 / sizes[name] for name in wishes}
    total = int(sparsity * sum(sizes.values()) + 1e-6)
    if total > sum(sizes.values()) - len(sizes):
        raise ArgumentError(f"sparsity={sparsity} leaves less than one weight for each of the {len(sizes)} layers")
    low, high = -1.0 - max(wishes.values()), 1.0 - min(wishes.values())
    for _ in range(STEPS):
        offset = (low + high) / 2
        reached = sum(sizes[name] * min(max(wish + offset, 0.0), most[name]) for name, wish in wishes.items())
        low, high = (offset, high) if reached < total else (low, offset)
    exact = {name: sizes[name] * min(max(wish + high, 0.0), most[name]) for name, wish in wishes.items()}
    return {name: count / sizes[name] for name, count in _whole(exact, sizes, total).items()}


def _whole(exact: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole counts of the exact sum: the largest remainders are rounded up."""
    counts = {name: int(count) for name, count in exact.items()}
    order = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    while (left := total - sum(counts.values())) > 0:
        for name in [name for name in order if counts[name] < sizes[name] - 1][:left]:
            counts[name] += 1
    return counts
