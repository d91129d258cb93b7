"""Operators that move positions without changing values: views, slices, concatenation, shuffles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from vfx.analyse.axis import Axis, Opaque
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules import indexing
from vfx.analyse.rules.rule import dims_of, normal
from vfx.analyse.shapes import Shape
from vfx.analyse.terms import MAX_ENUMERATED
from vfx.operators import operator_of
from vfx.program import BATCH

MAX_COUNTS = 4


def _first(t: ProgramTerms, a: dict[str, Any]) -> Shape:
    return t.operands(list(a.values()))[0]


def view(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    if "dtype" in a:  # the bits read as another type
        return None
    return t.view(_first(t, a), t.sizes(node))


def permute(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    return t.permute(x, dims_of(a["dims"], len(x.axes)))


def transpose(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    order = list(range(len(x.axes)))
    i, j = normal(a["dim0"], len(order)), normal(a["dim1"], len(order))
    order[i], order[j] = order[j], order[i]
    return t.permute(x, order)


def reverse_axes(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """t and T."""
    x = _first(t, a)
    return t.permute(x, list(reversed(range(len(x.axes)))))


def transpose_matrices(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """mT and mH turn the last two axes round."""
    x = _first(t, a)
    rank = len(x.axes)
    return t.permute(x, (*range(rank - 2), rank - 1, rank - 2))


def move_axis(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    source, target = dims_of(a["source"], len(x.axes)), dims_of(a["destination"], len(x.axes))
    order = [d for d in range(len(x.axes)) if d not in source]
    for to, d in sorted(zip(target, source)):
        order.insert(to, d)
    return t.permute(x, order)


def unsqueeze(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    axes = list(x.axes)
    axes.insert(normal(a["dim"], len(axes) + 1), t.fresh(1))
    return Shape(tuple(axes))


def squeeze(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    dims = dims_of(a.get("dim"), len(x.axes))
    return Shape(tuple(axis for d, axis in enumerate(x.axes) if d not in dims or axis.size != 1))


def expand(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    return t.broadcast([_first(t, a)], t.sizes(node))


def repeat(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    sizes = t.sizes(node)
    padded = Shape((*[t.fresh(1)] * (len(sizes) - len(x.axes)), *x.axes))
    axes = list(padded.axes)
    for d, size in enumerate(sizes):
        before = padded.axes[d].size
        if before == 1 and size != 1:
            axes[d] = t.fresh(size)
        elif before != size:  # copies are alike: they may change places
            axes[d] = Axis((*t.fresh(size // before).factors, *t.axis(padded, d).factors))
    return Shape(tuple(axes))


def repeat_interleave(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """Each position several times in a row; copies of one are alike."""
    x = t.shape(a["self"])
    if not isinstance(a["repeats"], int):
        return None
    if a["dim"] is None:
        x = t.view(x, (int(np.prod(x.sizes)),))
    d = normal(a["dim"] or 0, len(x.axes))
    longer = Axis((*t.axis(x, d).factors, *t.fresh(a["repeats"]).factors))
    return Shape((*x.axes[:d], longer, *x.axes[d + 1 :]))


def slice_(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    x = _first(t, a)
    d = normal(a["dim"], len(x.axes))
    if t.is_opaque(x.axes[d]) and t.sizes(node)[d] == x.axes[d].size:
        return Shape(x.axes)
    if t.is_opaque(x.axes[d]):
        return Shape((*x.axes[:d], t.opaque(t.sizes(node)[d], "part of a pinned axis"), *x.axes[d + 1 :]))
    if isinstance(a["start"], fx.Node) or isinstance(a["end"], fx.Node):
        return None
    return t.parts.cut(a["self"], x, d, slice(a["start"], a["end"], a["step"]))


def narrow(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    if isinstance(a["start"], fx.Node):
        return None
    x = _first(t, a)
    return t.parts.cut(a["self"], x, normal(a["dim"], len(x.axes)), slice(a["start"], a["start"] + a["length"]))


def select(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    x = _first(t, a)
    if isinstance(a["index"], fx.Node):
        return None
    return t.select(x, normal(a["dim"], len(x.axes)), a["index"])


def split(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> list[Shape]:
    """split, split_with_sizes, chunk: the sizes are those of the results."""
    x = _first(t, a)
    d = normal(a["dim"], len(x.axes))
    ends = np.cumsum([value.sizes(BATCH)[d] for value in node.meta["val"]])
    sizes = [value.sizes(BATCH)[d] for value in node.meta["val"]]
    return [t.parts.cut(a["self"], x, d, slice(int(end) - size, int(end))) for end, size in zip(ends, sizes)]


def meshgrid(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> list[Shape]:
    """Each tensor varies along its own axis of all results."""
    sizes = node.meta["val"][0].sizes(BATCH)
    turned = {0: 1, 1: 0} if a.get("indexing") == "xy" else {}
    results = []
    for index, shape in enumerate(t.operands(a["tensors"])):
        axes = [t.fresh(size) for size in sizes]
        axes[turned.get(index, index)] = t.axis(shape, 0) if shape.axes else t.fresh(1)
        results.append(Shape(tuple(axes)))
    return results


def broadcast_tensors(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> list[Shape]:
    return [t.broadcast([x], value.sizes(BATCH)) for x, value in zip(t.operands(a["tensors"]), node.meta["val"])]


def stack_columns(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """hstack: along the second axis, or the only one."""
    shapes = t.operands(a["tensors"])
    return _joined(t, shapes, 0 if len(shapes[0].axes) == 1 else 1, t.sizes(node))


def stack_rows(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """vstack: along the first axis of tensors that have at least two."""
    shapes = [Shape((t.fresh(1), *s.axes)) if len(s.axes) == 1 else s for s in t.operands(a["tensors"])]
    return _joined(t, shapes, 0, t.sizes(node))


def stack_depth(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """dstack: along the third axis of tensors that have at least three."""
    return _joined(t, [_padded(t, s, 3) for s in t.operands(a["tensors"])], 2, t.sizes(node))


def stack_vectors(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """column_stack: along the second axis, in which a vector is one column."""
    shapes = [Shape((*s.axes, t.fresh(1))) if len(s.axes) == 1 else s for s in t.operands(a["tensors"])]
    return _joined(t, shapes, 1, t.sizes(node))


def at_least(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """atleast_1d, 2d, 3d: axes of one position where some are missing."""
    rank = operator_of(node).rank
    shapes = [_padded(t, s, rank) for s in t.operands(a["tensors"] if "tensors" in a else [a["self"]])]
    return shapes if isinstance(node.meta["val"], list) else shapes[0]


def _padded(t: ProgramTerms, x: Shape, rank: int) -> Shape:
    """A tensor with at least so many axes: before the last of a vector, and behind them for the third."""
    axes = x.axes
    if len(axes) < 1:
        axes = (t.fresh(1),)
    if len(axes) < 2 <= rank:
        axes = (t.fresh(1), *axes)
    return Shape((*axes, t.fresh(1)) if len(axes) < 3 <= rank else axes)


def block_diagonal(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """block_diag: the rows of all matrices one behind the other, and their columns."""
    shapes = [_padded(t, s, 2) for s in t.operands(a["tensors"])]
    return Shape(tuple(t.concatenate([t.axis(s, d) for s in shapes]) for d in range(2)))


def split_rows(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> list[Shape]:
    """vsplit: the first axis."""
    return split(t, node, a | {"dim": 0})


def split_columns(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> list[Shape]:
    """hsplit: the second axis, or the only one."""
    return split(t, node, a | {"dim": min(1, len(t.shape(a["self"]).axes) - 1)})


def split_depth(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> list[Shape]:
    """dsplit: the third axis."""
    return split(t, node, a | {"dim": 2})


def unbind(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> list[Shape]:
    x = _first(t, a)
    d = normal(a["dim"], len(x.axes))
    return [t.select(x, d, index) for index in range(x.axes[d].size)]


def concatenate(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    shapes = [s for s in t.operands(a["tensors"]) if len(s.axes) == len(t.sizes(node))]
    return _joined(t, shapes, normal(a["dim"], len(shapes[0].axes)), t.sizes(node))


def _joined(t: ProgramTerms, shapes: list[Shape], d: int, sizes: tuple[int, ...]) -> Shape:
    parts = [t.axis(s, d) for s in shapes]
    again = t.parts.together(parts)
    for k, axis in ((k, axis) for s in shapes for k, axis in enumerate(s.axes) if isinstance(axis, Axis)):
        if k != d or again is None:
            t.parts.close(axis)
    if again is not None:
        joined = again
    elif all(t.is_opaque(part) or part.size == 1 for part in parts):  # a class token before pixels: not written out
        reason = next((f.reason for part in parts for f in part.factors if isinstance(f, Opaque)), "side by side")
        joined = t.opaque(sizes[d], reason)
    else:
        joined = t.concatenate(parts)
    others = t.broadcast([Shape(s.axes[:d] + s.axes[d + 1 :]) for s in shapes], sizes[:d] + sizes[d + 1 :])
    return Shape((*others.axes[:d], joined, *others.axes[d:]))


def stack(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    shapes = t.operands(a["tensors"])
    sizes = t.sizes(node)
    d = normal(a["dim"], len(sizes))
    others = t.broadcast(shapes, sizes[:d] + sizes[d + 1 :])
    return Shape((*others.axes[:d], t.opaque(sizes[d], "stacked tensors"), *others.axes[d:]))


def pad(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """Constant padding puts uniform positions around an axis; other modes read positions and pin it."""
    x = _first(t, a)
    axes = list(x.axes)
    amounts = list(a.get("pad") or a.get("padding") or ())
    constant = a.get("mode", "constant") == "constant" and "reflect" not in str(node.target)
    constant = constant and "replic" not in str(node.target) and "circular" not in str(node.target)
    sizes = t.sizes(node)
    for index in range(len(amounts) // 2):
        d = len(axes) - 1 - index
        before, after = amounts[2 * index : 2 * index + 2]
        if before == after == 0:
            continue
        if isinstance(before, fx.Node) or isinstance(after, fx.Node):
            return None
        if not constant or min(before, after) < 0:
            t.pin_dim(x, d, "padding reads positions")
            axes[d] = t.opaque(sizes[d], "padding reads positions")
            continue
        axis = t.axis(x, d)
        if t.is_opaque(axis):
            axes[d] = t.opaque(sizes[d], "padding")
            continue
        axes[d] = t.concatenate([*([t.fresh(before)] if before else []), axis, *([t.fresh(after)] if after else [])])
    return Shape(tuple(axes))


def roll(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    if any(isinstance(shift, fx.Node) for shift in _listed(a["shifts"])):
        for d in dims_of(a["dims"], len(x.axes)):
            t.pin_dim(x, d, "rolled by a computed number of positions")
        return x
    if not a["dims"]:
        flat = t.view(x, (int(np.prod(x.sizes)),))
        return t.view(_rolled(t, flat, [0], a["shifts"]), x.sizes)
    return _rolled(t, x, dims_of(a["dims"], len(x.axes)), a["shifts"])


def _rolled(t: ProgramTerms, x: Shape, dims: list[int], shifts: Any) -> Shape:
    axes = list(x.axes)
    for d, shift in zip(dims, _listed(shifts)):
        if t.is_opaque(axes[d]):
            continue
        if axes[d].size > MAX_ENUMERATED:
            t.pin_dim(x, d, "a merged axis too long to analyse")
            axes[d] = t.opaque(axes[d].size, "a merged axis too long to analyse")
            continue
        axes[d] = t.take(t.axis(x, d), np.roll(np.arange(x.axes[d].size), shift))
    return Shape(tuple(axes))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def flip(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    axes = list(x.axes)
    for d in dims_of(a["dims"], len(axes)):
        axes[d] = t.take(t.axis(x, d), slice(None, None, -1))
    return Shape(tuple(axes))


def flip_columns(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """fliplr: the second axis."""
    return flip(t, node, a | {"dims": [1]})


def flip_rows(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """flipud: the first axis."""
    return flip(t, node, a | {"dims": [0]})


def turn_quarters(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """rot90: k quarter turns from the first of two axes towards the second."""
    x = _first(t, a)
    i, j = dims_of(a["dims"], len(x.axes))
    axes, back = list(x.axes), slice(None, None, -1)
    for _ in range(a["k"] % 4):  # flip the second, then let them change places
        axes[i], axes[j] = t.take(t.axis(Shape(tuple(axes)), j), back), axes[i]
    return Shape(tuple(axes))


def gather_constant(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """index and index_select: constant positions of one axis are taken, computed ones pin what they number."""
    x = _first(t, a)
    if "dim" in a:
        d, index = normal(a["dim"], len(x.axes)), a["index"]
    else:
        given = [d for d, value in enumerate(a["indices"]) if value is not None]
        d, index = given[0], a["indices"][given[0]]
        if len(given) > 1:
            return indexing.index(t, x, a["indices"], t.sizes(node))
    places = _places(t.constant(index))
    if places is None or x.axes[d].size > MAX_ENUMERATED or t.is_opaque(x.axes[d]):
        if "dim" in a:
            return indexing.select_at(t, node, a)
        return indexing.index(t, x, a["indices"], t.sizes(node))
    taken = t.slice(x, d, places.reshape(-1))
    if places.ndim == 1:
        return taken
    inner = t.view(Shape((t.axis(taken, d),)), places.shape)
    return Shape((*taken.axes[:d], *inner.axes, *taken.axes[d + 1 :]))


def _places(index: Tensor | None) -> NDArray[np.int64] | None:
    """Constant positions worth telling apart.

    A table read unequally often (relative positions: offsets between two points) is pinned: each count would be a set
    of its own, and what is read at pairs of positions is pinned by them anyway.
    """
    if index is None or index.dtype in (torch.bool, torch.uint8):
        return None
    places = index.cpu().numpy()
    counts = np.unique(np.unique(places, return_counts=True)[1])
    return None if len(counts) > MAX_COUNTS else places


def channel_shuffle(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    channel, groups = t.axis(x, 1), int(a["groups"])
    cut = t.view(Shape((channel,)), (groups, channel.size // groups))
    turned = t.view(t.permute(cut, (1, 0)), (channel.size,))
    return Shape((x.axes[0], *turned.axes, *x.axes[2:]))


def pixel_shuffle(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """(…, C·r², H, W) -> (…, C, H·r, W·r)."""
    x = _first(t, a)
    r, rank = int(a["upscale_factor"]), len(x.axes)
    c = x.axes[rank - 3].size // (r * r)
    channel, i, j = t.cut_axis(t.axis(x, rank - 3), c, r, r)
    for axis in (i, j):
        t.pin(axis, "pixel shuffle")
    height, width = (Axis((*t.axis(x, d).factors, *axis.factors)) for d, axis in ((rank - 2, i), (rank - 1, j)))
    return Shape((*x.axes[: rank - 3], channel, height, width))


def pixel_unshuffle(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """(…, C, H·r, W·r) -> (…, C·r², H, W)."""
    x = _first(t, a)
    r, rank = int(a["downscale_factor"]), len(x.axes)
    height, i = t.cut_axis(t.axis(x, rank - 2), x.axes[rank - 2].size // r, r)
    width, j = t.cut_axis(t.axis(x, rank - 1), x.axes[rank - 1].size // r, r)
    channel = Axis((*t.axis(x, rank - 3).factors, *i.factors, *j.factors))
    return Shape((*x.axes[: rank - 3], channel, height, width))
