"""What a rule is: how an operator moves or ties axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from vfx.analyse.program_terms import ProgramTerms

# rule(inference, node, arguments) returns the result's Shape (a list for several), or None to refuse
Rule = Callable[["ProgramTerms", fx.Node, dict[str, Any]], Any]


def normal(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


def dims_of(value: Any, rank: int) -> list[int]:
    """A dimension, several, or all of them, counted from the front."""
    if value is None or value == []:
        return list(range(rank))
    return [normal(d, rank) for d in (value if isinstance(value, (list, tuple)) else [value])]
