"""Operators that compare where positions stand along an axis: triangles, diagonals, orders, differences."""

from __future__ import annotations

from typing import Any

from torch import fx

from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.rule import dims_of, normal
from vfx.analyse.shapes import Shape
from vfx.operators import operator_of
from vfx.program import BATCH

TRANSFORMED = "a Fourier transform along these positions"


def triangle(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """tril and triu compare the positions of the last two axes."""
    x = t.shape(a["self"])
    for d in (len(x.axes) - 2, len(x.axes) - 1):
        t.pin_dim(x, d, "a triangle of positions")
    return x


def diagonal(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """The main diagonal of a square moves with both axes; any other pins them. The new axis is the last."""
    x = t.shape(a["self"])
    rank = len(x.axes)
    i, j = normal(a.get("dim1", 0), rank), normal(a.get("dim2", 1), rank)
    kept = [axis for d, axis in enumerate(x.axes) if d not in (i, j)]
    if a.get("offset", 0) == 0 and x.axes[i].size == x.axes[j].size:
        return Shape((*kept, t.tie(t.axis(x, i), t.axis(x, j))))
    for d in (i, j):
        t.pin_dim(x, d, "a diagonal of positions")
    return Shape((*kept, t.opaque(t.sizes(node)[-1], "a diagonal of positions")))


def on_diagonal(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """diag_embed: x (…, n) -> (…, n, n), which moves on both axes as x does."""
    x = t.shape(a["self"])
    rank = len(x.axes) + 1
    i, j = sorted((normal(a.get("dim1", -2), rank), normal(a.get("dim2", -1), rank)))
    diagonal = t.axis(x, len(x.axes) - 1)
    if a.get("offset", 0) != 0:
        t.pin(diagonal, "a diagonal of positions")
        diagonal = t.opaque(t.sizes(node)[i], "a diagonal of positions")
    axes = list(x.axes[:-1])
    axes.insert(i, diagonal)
    axes.insert(j, diagonal)
    return Shape(tuple(axes))


def vector_or_diagonal(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """diag: a vector on the diagonal of a matrix, or a matrix's diagonal."""
    rank, offset = len(t.shape(a["self"]).axes), a.get("diagonal", a.get("offset", 0))
    return (on_diagonal if rank == 1 else diagonal)(t, node, a | {"offset": offset})


def spectrum(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Fourier transforms and their shifts: every position of the transformed axes depends on where the others stand."""
    x = t.shape(a["self"])
    rank = len(x.axes)
    sizes, dims = a.get("s"), a.get("dim")
    dims = range(rank - len(sizes), rank) if sizes and dims is None else dims_of(dims, rank)
    axes = list(x.axes)
    for d in dims:
        t.pin_dim(x, d, TRANSFORMED)
        axes[d] = t.opaque(t.sizes(node)[d], TRANSFORMED)
    return Shape(tuple(axes))


def sorted_values(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """sort, topk: values in order of size do not depend on where they stood; their indices do."""
    x = t.shape(a["self"])
    d = normal(a.get("dim", 0), len(x.axes))  # msort has no argument and sorts along the first
    axis = t.axis(x, d)
    sizes = node.meta["val"][0].sizes(BATCH) if isinstance(node.meta["val"], list) else t.sizes(node)
    values = Shape((*x.axes[:d], t.opaque(sizes[d], "ordered by size"), *x.axes[d + 1 :]))
    if isinstance(node.meta["val"], list):
        read = any(user.args[1] == 1 for user in node.users if user.users)
        return [values, t.numbers(values, axis) if read else values]
    return t.numbers(values, axis) if operator_of(node).gives_positions else values


def differences(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """diff: each position against the one before, those of ``prepend`` and ``append`` among them."""
    x = t.shape(a["self"])
    d = normal(a["dim"], len(x.axes))
    parts = [x, *(t.shape(a[name]) for name in ("prepend", "append") if isinstance(a.get(name), fx.Node))]
    if a.get("n", 1) != 1:
        return None
    for part in parts:
        t.pin_dim(part, d, "differences of neighbours")
    sizes = t.sizes(node)
    others = t.broadcast([Shape(s.axes[:d] + s.axes[d + 1 :]) for s in parts], sizes[:d] + sizes[d + 1 :])
    return Shape((*others.axes[:d], t.opaque(sizes[d], "differences of neighbours"), *others.axes[d:]))


def cross_product(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Three coordinates, each with its own part."""
    result = t.broadcast(t.operands([a["self"], a["other"]]), t.sizes(node))
    if a.get("dim") is None:
        for d in range(len(result.axes)):
            t.pin_dim(result, d, "coordinates of a cross product")
    else:
        t.pin_dim(result, normal(a["dim"], len(result.axes)), "coordinates of a cross product")
    return result


def similarity(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """cosine_similarity and pairwise_distance: two tensors compared along an axis, whose order is not seen."""
    x, y = t.operands([a["x1"], a["x2"]])
    rank = max(len(x.axes), len(y.axes))
    d = normal(a.get("dim", -1), rank)
    padded = [[1] * (rank - len(s.axes)) + list(s.sizes) for s in (x, y)]
    both = t.broadcast([x, y], [max(pair) for pair in zip(*padded)])
    axes = [t.axis(both, k) for k in range(rank)]
    if a.get("keepdim"):
        axes[d] = t.fresh(1)
        return Shape(tuple(axes))
    return Shape((*axes[:d], *axes[d + 1 :]))


def complex_pairs(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """view_as_complex: (…, 2) -> (…)."""
    x = t.shape(a["self"])
    t.pin_dim(x, len(x.axes) - 1, "real and imaginary parts")
    return Shape(tuple(t.axis(x, d) for d in range(len(x.axes) - 1)))


def real_pairs(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """view_as_real: (…) -> (…, 2)."""
    return Shape((*t.shape(a["self"]).axes, t.opaque(2, "real and imaginary parts")))
