"""``budget=`` of ``vfx.merge``: the cuts of Preserve-First Merging that cost at most a multiple of one edge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfx.analyse.cost import cost
from vfx.errors import ArgumentError
from vfx.passes.duplicate_branches import DuplicateBranches
from vfx.passes.interpolate import Interpolate
from vfx.program import Program

FIGURES = ("params", "flops")


def check_budget(budget: Mapping[str, float], data: Any, preserve: int | str, heads: int | str) -> None:
    """Raise ArgumentError for a budget that is none, or that nothing can be chosen for."""
    if not isinstance(budget, Mapping) or not budget or set(budget) - set(FIGURES):
        raise ArgumentError(
            f"budget={budget!r}: give multiples of one edge, as in {{'params': 1.2}} or {{'flops': 1.5}}"
        )
    for name, limit in budget.items():
        if not limit >= 1:
            raise ArgumentError(
                f"budget={budget!r}: a merged network costs at least one edge, {name} must be 1 or more"
            )
    if data is None or preserve != 0 or heads != 0:
        raise ArgumentError(
            "budget= chooses the preserved layers on held-out data: give data= and no preserve=, heads="
        )


def cuts_within(budget: Mapping[str, float], edges: Program, layers: int) -> list[int]:
    """The deepest cut within a budget, the one half as deep, and none: numbers of preserved layers."""
    whole = cost(edges.select(0))

    def fits(cut: int) -> bool:
        merged = cost(Interpolate()(DuplicateBranches(cut)(edges)))
        return all(merged.ratio(whole)[name] <= limit for name, limit in budget.items())

    low, high = 0, layers  # costs grow with the cut
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return sorted({0, low // 2, low})
