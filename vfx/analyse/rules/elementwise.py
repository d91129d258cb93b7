"""Operators that act position by position, and reductions that do not see the order of what they reduce."""

from __future__ import annotations

from typing import Any

from torch import fx

from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.rule import dims_of, normal
from vfx.analyse.shapes import Shape
from vfx.operators import is_in_place, operator_of
from vfx.program import BATCH


def pointwise(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Any number of operands, broadcast against each other."""
    nested = [item for value in a.values() for item in (value if isinstance(value, (list, tuple)) else [value])]
    if not operator_of(node).is_additive:
        for operand in (item for item in nested if isinstance(item, fx.Node)):
            for dim in range(len(t.shape(operand).origin) if isinstance(t.shapes.get(operand), Shape) else 0):
                t.role(operand, dim, "elementwise")
    return t.broadcast(t.operands(nested), t.sizes(node))


def same(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """The first operand, position by position (copies, casts, dropout and its mask)."""
    x = t.operands(list(a.values()))[0]
    return [x] * len(node.meta["val"]) if isinstance(node.meta["val"], list) else x


def fill(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Uniform values tie nothing; written in place they stand in the axes of what they overwrite."""
    if is_in_place(node):
        return t.shape(a["self"])
    return Shape(tuple(t.fresh(size) for size in t.sizes(node)))


def ordered(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Values that depend on the position (arange, random numbers) pin every axis."""
    if is_in_place(node):
        for dim in range(len(t.shape(a["self"]).axes)):
            t.pin_dim(t.shape(a["self"]), dim, "values depend on the position")
        return t.shape(a["self"])
    for operand in t.operands(list(a.values())):  # tensors of probabilities or bounds
        for dim in range(len(operand.axes)):
            t.pin_dim(operand, dim, "values depend on the position")
    return ordered_like(t, node, a)


def ordered_like(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Random numbers in the shape of an operand, which lends its shape alone."""
    return Shape(tuple(t.opaque(size, "values depend on the position") for size in t.sizes(node)))


def reduction(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """Sums, means, extremes and norms over some axes; where an extreme stands is a number of its axis.

    Among integers and truth values equal ones are common, between which the position decides.
    """
    x = t.operands(list(a.values()))[0]
    rank = len(x.axes)
    dims = dims_of(a.get("dim"), rank)
    kept = [t.axis(x, d) if d not in dims else None for d in range(rank)]
    reduced = [t.axis(x, d) for d in dims]
    reads_order = _reads_indices(node)
    numbers = reads_order and len(reduced) == 1 and node.all_input_nodes[0].meta["val"].dtype.is_floating_point
    for axis in reduced if reads_order and not numbers else ():
        t.pin(axis, "the position of an extreme is read")
    if a.get("keepdim"):
        shape = Shape(tuple(t.fresh(1) if axis is None else axis for axis in kept))
    else:
        shape = Shape(tuple(axis for axis in kept if axis is not None))
    if not isinstance(node.meta["val"], list):
        return t.numbers(shape, reduced[0]) if numbers else shape
    return [shape, t.numbers(shape, reduced[0])] if numbers else [shape] * len(node.meta["val"])


def _reads_indices(node: fx.Node) -> bool:
    """Whether a position along the reduced axes is part of what is used."""
    names = [r.name for r in node.target._schema.returns]  # type: ignore[union-attr]
    if "indices" not in names:
        return operator_of(node).gives_positions
    return any(user.args[1] == names.index("indices") for user in node.users if user.users)


def compared(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Losses and distances of tensors compared entry by entry: each entry, or the sum or mean of all."""
    both = t.broadcast_together(t.operands(list(a.values())))
    whole = Shape(tuple(t.axis(both, d) for d in range(len(both.axes))))
    return whole if len(t.sizes(node)) == len(both.axes) else Shape(())


def scan(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """Cumulative operators see the order of their axis."""
    x = t.shape(a["self"])
    t.pin_dim(x, dims_of(a["dim"], len(x.axes))[0], "cumulative operator")
    return [x, x] if isinstance(node.meta["val"], list) else x


def gated_linear(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """glu: the first half of an axis times the sigmoid of the second."""
    x = t.shape(a["self"])
    d = normal(a["dim"], len(x.axes))
    half = x.axes[d].size // 2
    return t.broadcast([t.slice(x, d, slice(0, half)), t.slice(x, d, slice(half, None))], t.sizes(node))


def cross_channel_window(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """Pools and interpolation: batch and channel axes pass, the windows' positions are pinned."""
    x = t.operands(list(a.values()))[0]
    value = node.meta["val"]
    sizes = (value[0] if isinstance(value, list) else value).sizes(BATCH)
    spatial = operator_of(node).spatial
    first = len(x.axes) - spatial
    for d in range(first, len(x.axes)):
        t.pin_dim(x, d, "a window over positions")
    axes = (*x.axes[:first], *(t.opaque(size, "a window over positions") for size in sizes[first:]))
    return [Shape(axes)] * len(value) if isinstance(value, list) else Shape(axes)
