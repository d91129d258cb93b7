"""Positions that are looked up or written to by number: the axis that is numbered is pinned, all others tie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from vfx.analyse.axis import Axis
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.rule import normal
from vfx.analyse.shapes import Digit, Shape
from vfx.operators import is_in_place
from vfx.program import BATCH

NUMBERED = "positions are looked up by number"


def index(t: ProgramTerms, x: Shape, indices: Sequence[Any], sizes: Sequence[int] | None = None) -> Shape:
    """x[indices] by tensors of integers or booleans; ``sizes`` is the result's shape where it is known.

    The result has the axes of the (broadcast) indices where the indexed axes were, or in front if those are apart.
    """
    spans = _spans(indices)
    indexed = [d for dims, _ in spans for d in dims]
    for d in indexed:
        t.pin_dim(x, d, NUMBERED)
    kept = [t.axis(x, d) for d in range(len(x.axes)) if d not in indexed]
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    first = indexed[0] if together else 0
    looked_up = _looked_up(t, [node for _, node in spans], sizes, first)
    return Shape((*kept[:first], *looked_up, *kept[first:]))


def _spans(indices: Sequence[Any]) -> list[tuple[list[int], fx.Node]]:
    """The axes that each index tensor numbers; a boolean one covers as many as it has."""
    spans, d = [], 0
    for entry in indices:
        covered = _rank(entry) if isinstance(entry, fx.Node) and _is_mask(entry) else 1
        if entry is not None:
            spans.append((list(range(d, d + covered)), entry))
        d += covered
    return spans


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _is_mask(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def _looked_up(t: ProgramTerms, nodes: list[fx.Node], sizes: Sequence[int] | None, first: int) -> list[Axis | Digit]:
    """Axes of the indices broadcast together; those of a mask count what is true."""
    if any(_is_mask(node) for node in nodes):
        for node in nodes:
            for d in range(_rank(node)):
                t.pin_dim(t.shape(node), d, NUMBERED)
        rank = max(1 if _is_mask(node) else _rank(node) for node in nodes)
        picked = sizes[first : first + rank] if sizes is not None else [0] * rank
        return [t.opaque(size, NUMBERED) for size in picked]
    return list(t.broadcast_together([t.shape(node) for node in nodes]).axes)


def index_put(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """self[indices] = values."""
    x = t.shape(a["self"])
    if any(_is_mask(entry) for entry in a["indices"] if entry is not None):
        return _masked_put(t, x, a)
    target = _written(t, x, a["indices"]) or index(t, x, a["indices"])
    t.broadcast([target, t.shape(a["values"])], target.sizes)
    return x


def _written(t: ProgramTerms, x: Shape, indices: Sequence[Any]) -> Shape | None:
    """The part of x at different constant positions of one axis."""
    given = [(d, t.constant(entry)) for d, entry in enumerate(indices) if entry is not None]
    (d, places), *others = given
    if others or places is None or places.ndim != 1 or len(places.unique()) < len(places) or t.is_opaque(x.axes[d]):
        return None
    return t.slice(x, d, places.cpu().numpy())


def _masked_put(t: ProgramTerms, x: Shape, a: dict[str, Any]) -> Shape | None:
    """A mask over all leading axes and one value for all it marks: where(mask, value, self)."""
    (mask, *others) = a["indices"]
    if others or t.shape(a["values"]).sizes not in ((), (1,)):
        return None
    shape = t.shape(mask)
    missing = len(x.axes) - len(shape.axes)
    t.broadcast([x, Shape((*shape.axes, *(t.fresh(1) for _ in range(missing))))], x.sizes)
    return x


def select_at(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """index_select at computed positions of one axis."""
    x, numbers = t.shape(a["self"]), t.shape(a["index"])
    d = normal(a["dim"], len(x.axes))
    t.pin_dim(x, d, NUMBERED)
    picked = t.axis(numbers, 0) if numbers.axes else t.fresh(1)
    return Shape((*x.axes[:d], picked, *x.axes[d + 1 :]))


def gather(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """out[…, p, …] = x[…, index[…, p, …], …]: all axes but the numbered one tie."""
    x, numbers = t.shape(a["self"]), t.shape(a.get("index") or a["indices"])
    if not numbers.axes:
        return numbers
    if a["dim"] is None or numbers.sizes != t.sizes(node):  # take_along_dim flattens or broadcasts
        return None
    d = normal(a["dim"], len(x.axes))
    t.pin_dim(x, d, NUMBERED)
    tie_others(t, x, numbers, d)
    return numbers


def tie_others(t: ProgramTerms, x: Shape, numbers: Shape, dim: int) -> None:
    """Axes of the index against the leading part of x's."""
    for d, axis in enumerate(numbers.axes):
        if d != dim and x.axes[d].size >= axis.size:
            cut = t.slice(x, d, slice(0, axis.size))
            t.tie(t.axis(cut, d), t.axis(numbers, d))


def scatter(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """self[…, index[…, p, …], …] = src[…, p, …], or a reduction onto it."""
    x, numbers = t.shape(a["self"]), t.shape(a["index"])
    d = normal(a["dim"], len(x.axes))
    t.pin_dim(x, d, NUMBERED)
    if not numbers.axes:
        return x
    tie_others(t, x, numbers, d)
    if isinstance(a.get("src"), fx.Node):
        source = t.shape(a["src"])
        tie_others(t, source, numbers, -1)
    return x


def write_at(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """index_add, index_copy, index_reduce, index_fill: whole slices of one axis at numbered positions."""
    x, numbers = t.shape(a["self"]), t.shape(a["index"])
    d = normal(a["dim"], len(x.axes))
    t.pin_dim(x, d, NUMBERED)
    source = t.shape(a["source"]) if isinstance(a.get("source"), fx.Node) else None
    if source is not None and source.axes and numbers.axes:
        t.tie(t.axis(numbers, 0), t.axis(source, d))
        others = [Shape((*s.axes[:d], *s.axes[d + 1 :])) for s in (x, source)]
        t.broadcast(others, others[0].sizes)
    elif numbers.axes:
        t.pin_dim(numbers, 0, NUMBERED)
    return x


def take(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """x flattened and looked up."""
    x = t.shape(a["self"])
    for d in range(len(x.axes)):
        t.pin_dim(x, d, NUMBERED)
    return t.shape(a["index"])


def embedding_bag(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> list[Shape | None]:
    """weight (tokens, c) read at indices and summed bag by bag -> (bags, c)."""
    w = t.shape(a["weight"])
    for name in ("indices", "offsets", "per_sample_weights"):
        if isinstance(a.get(name), fx.Node):
            for d in range(len(t.shape(a[name]).axes)):
                t.pin_dim(t.shape(a[name]), d, "bags of tokens")
    t.pin_dim(w, 0, "token ids")
    t.role(a["weight"], 1, "out")
    value = node.meta["val"]
    bags = t.opaque(value[0].sizes(BATCH)[0], "bags of tokens")
    return [Shape((bags, t.axis(w, 1))), *(_pinned(t, output) for output in value[1:])]


def data_dependent(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """nonzero, masked_select, unique…: the result's positions say where something was found."""
    for operand in t.operands(list(a.values())):
        for d in range(len(operand.axes)):
            t.pin_dim(operand, d, NUMBERED)
    value = node.meta["val"]
    return [_pinned(t, part) for part in value] if isinstance(value, list) else _pinned(t, value)


def masked_scatter(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Values of ``source`` in their order where a mask is true."""
    x = t.shape(a["self"])
    result = t.broadcast([x, t.shape(a["mask"])], t.sizes(node))
    for shape in (result, t.shape(a["source"])):
        for d in range(len(shape.axes)):
            t.pin_dim(shape, d, NUMBERED)
    return x if is_in_place(node) else result


def buckets(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """bucketize and searchsorted: each value's number among sorted boundaries."""
    bounds: Any = a.get("boundaries") or a["sorted_sequence"]
    values = a["self"]
    if not isinstance(values, fx.Node) or len(t.shape(bounds).axes) != 1:
        return None
    t.pin_dim(t.shape(bounds), 0, "sorted boundaries")
    return t.shape(values)


def one_hot(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = t.shape(a["self"])
    return Shape((*x.axes, t.opaque(t.sizes(node)[-1], "one position for each number")))


def _pinned(t: ProgramTerms, value: Any) -> Shape | None:
    sizes = value.sizes(BATCH) if hasattr(value, "sizes") else None
    return None if sizes is None else Shape(tuple(t.opaque(size, NUMBERED) for size in sizes))
