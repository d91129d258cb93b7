"""The catalogue of allocations: one line each."""

from __future__ import annotations

from collections.abc import Callable

from vfx.names import made
from vfx.pruning.allocation.allocation import Allocation
from vfx.pruning.allocation.depth import ErdosRenyi, Progressive
from vfx.pruning.allocation.errors import Errors
from vfx.pruning.allocation.outliers import Outliers

SCOPE = "scope"  # the scope alone decides: one share for all layers, or one comparison of all weights
ALLOCATIONS: dict[str, Callable[..., Allocation]] = {
    "progressive": Progressive,
    "erk": ErdosRenyi,
    "owl": Outliers,
    "error": Errors,
}


def allocation_named(allocation: str | Allocation) -> Allocation | None:
    """An allocation by name; None for what the scope alone decides. Raises ArgumentError."""
    if isinstance(allocation, Allocation):
        return allocation
    if allocation == SCOPE:
        return None
    return made("allocation", ALLOCATIONS, allocation, f"{SCOPE}, ", " or an Allocation")
