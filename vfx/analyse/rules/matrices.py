"""Functions of matrices, and products of several of them or of the last axes of two tensors."""

from __future__ import annotations

from typing import Any

from torch import fx

from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.einsum import contract
from vfx.analyse.rules.rule import normal
from vfx.analyse.shapes import Shape
from vfx.program import BATCH, Value

ENTRIES = "a function of a matrix's entries"
SEEN = "the operator sees where values stand"


def of_matrix(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """inverses, roots, determinants, decompositions of (…, n, m): rows and columns are pinned, batches pass."""
    (x,) = t.operands(list(a.values()))
    lead = len(x.axes) - 2
    for d in (lead, lead + 1):
        t.pin_dim(x, d, ENTRIES)
    return _results(t, node, x.axes[:lead], ENTRIES)


def pinned(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """What sees the positions of all its operands' axes."""
    for operand in t.operands(node.all_input_nodes):
        for d in range(len(operand.axes)):
            t.pin_dim(operand, d, SEEN)
    return _results(t, node, (), SEEN)


def _results(t: ProgramTerms, node: fx.Node, lead: tuple[Any, ...], reason: str) -> Any:
    """Shapes of one or several results whose axes are opaque behind some that pass."""

    def shape(value: Any) -> Any:
        if isinstance(value, list):
            return [shape(part) for part in value]
        core = value.sizes(BATCH)[len(lead) :] if isinstance(value, Value) else ()
        return Shape((*lead, *(t.opaque(size, reason) for size in core))) if isinstance(value, Value) else None

    return shape(node.meta["val"])


def inner(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """x (…, k), y (…, k) -> the axes of both without the last."""
    first, second = ([f"{name}{d}" for d in range(len(t.shape(a[name]).axes))] for name in ("self", "other"))
    if not first or not second:
        return None
    second[-1] = first[-1]
    return contract(t, [(a["self"], first), (a["other"], second)], [*first[:-1], *second[:-1]])


def vector_products(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """vecdot: x · y summed over one axis."""
    x, y = t.shape(a["x"]), t.shape(a["y"])
    if x.sizes != y.sizes:
        return None
    d = normal(a["dim"], len(x.axes))
    letters = list(range(len(x.axes)))
    return contract(t, [(a["x"], letters), (a["y"], letters)], [k for k in letters if k != d])


def chain(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """multi_dot: matrices one behind the other; the first and the last may be vectors."""
    tensors = a["tensors"] if "tensors" in a else a["matrices"]
    ends = [f"m{k}" for k in range(len(tensors) + 1)]
    terms = [(x, ends[k : k + 2]) for k, x in enumerate(tensors)]
    result = [ends[0], ends[-1]]
    if len(t.shape(tensors[0]).axes) == 1:
        terms[0], result = (tensors[0], ends[1:2]), result[1:]
    if len(t.shape(tensors[-1]).axes) == 1:
        terms[-1], result = (tensors[-1], ends[-2:-1]), result[:-1]
    return contract(t, terms, result)
