"""Rows routed to experts: each row is multiplied by the matrix of the expert that it was sorted to.

``grouped_mm`` takes x (rows, k) whose rows stand expert by expert, w (experts, k, n) and where each expert's rows end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.shapes import Shape

BY_EXPERT = "rows stand expert by expert"


def factors(a: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Rows, matrices and ends among the arguments of a grouped product."""
    return a.get("self") or a.get("input"), a.get("mat2") or a.get("weight"), a["offs"]


def grouped_product(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """(rows, k) by (experts, k, n) -> (rows, n); other forms are not covered."""
    ends = factors(a)[2]

    def by_place() -> None:
        for value in factors(a):
            t.pin_dim(t.shape(value), 0, BY_EXPERT)

    return product(t, a, by_place) if isinstance(ends, fx.Node) else None


def product(t: ProgramTerms, a: dict[str, Any], experts: Callable[[], Any]) -> Shape | None:
    """The result of (rows, k) by (experts, k, n); ``experts`` says what holds of their axes."""
    rows, matrices, _ = factors(a)
    x, w = t.shape(rows), t.shape(matrices)
    if (len(x.axes), len(w.axes)) != (2, 3) or a.get("bias") is not None:
        return None
    experts()
    t.tie(t.axis(x, 1), t.axis(w, 1))
    t.role(rows, 1, "in")
    t.role(matrices, 1, "in")
    t.role(matrices, 2, "out")
    return Shape((t.axis(x, 0), t.axis(w, 2)))


def histogram(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """histc: how many values lie in each interval does not depend on where they stand."""
    x = t.shape(a["self"])
    for d in range(len(x.axes)):
        t.axis(x, d)
    return Shape((t.opaque(t.sizes(node)[0], "one position for each interval"),))
