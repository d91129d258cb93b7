"""Operators that move positions without changing values: views, slices, concatenation, shuffles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from vfx.analyse.rules.rule import dims_of, normal
from vfx.analyse.shapes import MAX_ENUMERATED, Axis, Shape

if TYPE_CHECKING:
    from vfx.analyse.infer import Inference

_LAST = 1 << 62  # torch's "to the end" in slices


def _first(t: Inference, a: dict[str, Any]) -> Shape:
    return t.operands(list(a.values()))[0]


def view(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    if "dtype" in a:  # the bits read as another type
        return None
    return t.view(_first(t, a), t.sizes(node))


def permute(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    return t.permute(x, dims_of(a["dims"], len(x.axes)))


def transpose(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    order = list(range(len(x.axes)))
    i, j = normal(a["dim0"], len(order)), normal(a["dim1"], len(order))
    order[i], order[j] = order[j], order[i]
    return t.permute(x, order)


def reverse_axes(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    return t.permute(x, list(reversed(range(len(x.axes)))))


def move_axis(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    source, target = dims_of(a["source"], len(x.axes)), dims_of(a["destination"], len(x.axes))
    order = [d for d in range(len(x.axes)) if d not in source]
    for to, d in sorted(zip(target, source)):
        order.insert(to, d)
    return t.permute(x, order)


def unsqueeze(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    axes = list(x.axes)
    axes.insert(normal(a["dim"], len(axes) + 1), t.fresh(1))
    return Shape(tuple(axes))


def squeeze(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    dims = dims_of(a.get("dim"), len(x.axes))
    return Shape(tuple(axis for d, axis in enumerate(x.axes) if d not in dims or axis.size != 1))


def expand(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    return t.broadcast([_first(t, a)], t.sizes(node))


def repeat(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    sizes = t.sizes(node)
    padded = Shape((*[t.fresh(1)] * (len(sizes) - len(x.axes)), *x.axes))
    axes = list(padded.axes)
    for d, size in enumerate(sizes):
        before = padded.axes[d].size
        if before == 1 and size != 1:
            axes[d] = t.fresh(size)
        elif before != size:
            axes[d] = _copies(t, t.axis(padded, d), size)
    return Shape(tuple(axes))


def _copies(t: Inference, axis: Axis, size: int) -> Axis:
    """An axis written several times in a row."""
    if size > MAX_ENUMERATED:
        t.pin(axis, "a merged axis too long to analyse")
        return t.opaque(size, "a merged axis too long to analyse")
    return t.concatenate([axis] * (size // axis.size))


def slice_(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    x = _first(t, a)
    d = normal(a["dim"], len(x.axes))
    if t.is_opaque(x.axes[d]):
        return Shape((*x.axes[:d], t.opaque(t.sizes(node)[d], "part of a pinned axis"), *x.axes[d + 1 :]))
    if isinstance(a["start"], fx.Node) or isinstance(a["end"], fx.Node):
        return None
    end = None if a["end"] is None or a["end"] >= _LAST else a["end"]
    return t.slice(x, d, slice(a["start"], end, a["step"]))


def narrow(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    if isinstance(a["start"], fx.Node):
        return None
    x = _first(t, a)
    return t.slice(x, normal(a["dim"], len(x.axes)), slice(a["start"], a["start"] + a["length"]))


def select(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    x = _first(t, a)
    if isinstance(a["index"], fx.Node):
        return None
    return t.select(x, normal(a["dim"], len(x.axes)), a["index"])


def split(t: Inference, node: fx.Node, a: dict[str, Any]) -> list[Shape]:
    """split, split_with_sizes, chunk: the sizes are those of the results."""
    from vfx.analyse.infer import BATCH

    x = _first(t, a)
    d = normal(a["dim"], len(x.axes))
    ends = np.cumsum([value.sizes(BATCH)[d] for value in node.meta["val"]])
    return [t.slice(x, d, slice(int(end) - v.sizes(BATCH)[d], int(end))) for end, v in zip(ends, node.meta["val"])]


def unbind(t: Inference, node: fx.Node, a: dict[str, Any]) -> list[Shape]:
    x = _first(t, a)
    d = normal(a["dim"], len(x.axes))
    return [t.select(x, d, index) for index in range(x.axes[d].size)]


def concatenate(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    shapes = [s for s in t.operands(a["tensors"]) if len(s.axes) == len(t.sizes(node))]
    d = normal(a["dim"], len(shapes[0].axes))
    joined = t.concatenate([t.axis(s, d) for s in shapes])
    sizes = t.sizes(node)
    others = t.broadcast([Shape(s.axes[:d] + s.axes[d + 1 :]) for s in shapes], sizes[:d] + sizes[d + 1 :])
    return Shape((*others.axes[:d], joined, *others.axes[d:]))


def stack(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    shapes = t.operands(a["tensors"])
    sizes = t.sizes(node)
    d = normal(a["dim"], len(sizes))
    others = t.broadcast(shapes, sizes[:d] + sizes[d + 1 :])
    return Shape((*others.axes[:d], t.opaque(sizes[d], "stacked tensors"), *others.axes[d:]))


def pad(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape | None:
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


def roll(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    x = _first(t, a)
    if any(isinstance(shift, fx.Node) for shift in _listed(a["shifts"])):
        return None
    if not a["dims"]:
        flat = t.view(x, (int(np.prod(x.sizes)),))
        return t.view(_rolled(t, flat, [0], a["shifts"]), x.sizes)
    return _rolled(t, x, dims_of(a["dims"], len(x.axes)), a["shifts"])


def _rolled(t: Inference, x: Shape, dims: list[int], shifts: Any) -> Shape:
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


def flip(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    axes = list(x.axes)
    for d in dims_of(a["dims"], len(axes)):
        axes[d] = t.take(t.axis(x, d), slice(None, None, -1))
    return Shape(tuple(axes))


def gather_constant(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """index and index_select at constant positions of one axis."""
    x = _first(t, a)
    if "dim" in a:
        d, index = normal(a["dim"], len(x.axes)), a["index"]
    else:
        given = [d for d, value in enumerate(a["indices"]) if value is not None]
        if len(given) != 1:
            return None
        d, index = given[0], a["indices"][given[0]]
    value = t.constant(index)
    if value is None or value.dtype == torch_bool() or x.axes[d].size > 1 << 22:
        return None
    taken = t.slice(x, d, value.reshape(-1).cpu().numpy())
    if value.ndim == 1:
        return taken
    inner = t.view(Shape((t.axis(taken, d),)), tuple(value.shape))
    return Shape((*taken.axes[:d], *inner.axes, *taken.axes[d + 1 :]))


def torch_bool() -> Any:
    import torch

    return torch.bool


def channel_shuffle(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    x = _first(t, a)
    channel, groups = t.axis(x, 1), int(a["groups"])
    cut = t.view(Shape((channel,)), (groups, channel.size // groups))
    turned = t.view(t.permute(cut, (1, 0)), (channel.size,))
    return Shape((x.axes[0], *turned.axes, *x.axes[2:]))


def pixel_shuffle(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    """(…, C·r², H, W) -> (…, C, H·r, W·r)."""
    x = _first(t, a)
    r, rank = int(a["upscale_factor"]), len(x.axes)
    c = x.axes[rank - 3].size // (r * r)
    channel, i, j = t.cut_axis(t.axis(x, rank - 3), c, r, r)
    for axis in (i, j):
        t.pin(axis, "pixel shuffle")
    height, width = (Axis((*t.axis(x, d).factors, *axis.factors)) for d, axis in ((rank - 2, i), (rank - 1, j)))
    return Shape((*x.axes[: rank - 3], channel, height, width))


def pixel_unshuffle(t: Inference, node: fx.Node, a: dict[str, Any]) -> Shape:
    """(…, C, H·r, W·r) -> (…, C·r², H, W)."""
    x = _first(t, a)
    r, rank = int(a["downscale_factor"]), len(x.axes)
    height, i = t.cut_axis(t.axis(x, rank - 2), x.axes[rank - 2].size // r, r)
    width, j = t.cut_axis(t.axis(x, rank - 1), x.axes[rank - 1].size // r, r)
    channel = Axis((*t.axis(x, rank - 3).factors, *i.factors, *j.factors))
    return Shape((*x.axes[: rank - 3], channel, height, width))
