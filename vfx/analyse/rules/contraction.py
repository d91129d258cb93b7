"""Operators that sum over a channel axis: convolutions, linear maps, matrix products, attention, embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from vfx.analyse.axis import Axis
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.rule import normal
from vfx.analyse.shapes import Shape
from vfx.program import BATCH, Value

SLIDES = "a kernel slides over these positions"


def convolution(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """x (N, G·i, …), weight (G·o, i, k…) -> (N, G·o, …)."""
    x, w = t.shape(a["input"]), t.shape(a["weight"])
    if a.get("transposed"):
        return transposed_convolution(t, node, a)
    groups = _groups(a["groups"])
    rank = len(w.axes) - 2
    channel = len(x.axes) - rank - 1
    out, inner_in = t.axis(w, 0), t.axis(w, 1)
    outer_in, i = t.cut_axis(t.axis(x, channel), groups, inner_in.size)
    outer, o = t.cut_axis(out, groups, out.size // groups)
    t.tie(outer, outer_in)
    t.tie(inner_in, i)
    _roles(t, a["weight"], 0, 1, outer, o)
    _bias(t, a.get("bias"), out)
    return _spatial(t, x, w, channel, out, a, t.sizes(node))


def transposed_convolution(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """x (N, G·i, …), weight (G·i, o, k…) -> (N, G·o, …)."""
    x, w = t.shape(a["input"]), t.shape(a["weight"])
    groups = _groups(a["groups"])
    rank = len(w.axes) - 2
    channel = len(x.axes) - rank - 1
    t.tie(t.axis(x, channel), t.axis(w, 0))
    outer, _ = t.cut_axis(t.axis(w, 0), groups, t.axis(w, 0).size // groups)
    o = t.axis(w, 1)
    out = Axis((*outer.factors, *o.factors))
    t.role(a["weight"], 0, "in")
    t.role(a["weight"], 1, "out")
    if groups > 1:
        t.role(a["weight"], 0, "elementwise", outer)
    _bias(t, a.get("bias"), out)
    for d in range(channel + 1, len(x.axes)):
        t.pin_dim(x, d, SLIDES)
        t.pin_dim(w, d - channel + 1, SLIDES)
    spatial = [t.opaque(size, SLIDES) for size in t.sizes(node)[channel + 1 :]]
    return Shape((*x.axes[:channel], out, *spatial))


def _groups(value: Any) -> int:
    """The number of groups; the batch size where each sample has a kernel of its own."""
    return Value((value.meta["val"],), torch.int64).sizes(BATCH)[0] if isinstance(value, fx.Node) else int(value)


def _roles(t: ProgramTerms, weight: Any, out_dim: int, in_dim: int, outer: Axis, o: Axis) -> None:
    """Within a group of channels the weight maps in to out; across groups it is elementwise."""
    t.role(weight, in_dim, "in")
    t.role(weight, out_dim, "elementwise", outer)
    t.role(weight, out_dim, "out", o)


def _bias(t: ProgramTerms, bias: Any, out: Axis) -> None:
    if isinstance(bias, fx.Node):
        shape = t.shape(bias)
        t.tie(out, t.axis(shape, 0))
        t.role(bias, 0, "out")


def _spatial(t: ProgramTerms, x: Shape, w: Shape, channel: int, out: Axis, a: dict[str, Any], sizes: Any) -> Shape:
    """Positions keep their axis under a kernel of one that neither strides nor pads, and are pinned otherwise."""
    axes = []
    steps, border = a.get("stride"), a.get("padding")
    moves = isinstance(border, str) or any(s != 1 for s in steps or ()) or any(border or ())
    for d in range(channel + 1, len(x.axes)):
        kernel = w.axes[d - channel + 1].size
        if kernel == 1 and x.axes[d].size == sizes[d] and not moves:
            axes.append(x.axes[d])
            continue
        t.pin_dim(x, d, SLIDES)
        t.pin_dim(w, d - channel + 1, SLIDES)
        axes.append(t.opaque(sizes[d], SLIDES))
    return Shape((*x.axes[:channel], out, *axes))


def deformable_convolution(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """A convolution that samples at offsets (N, 2·k·k, …), which are the same for all channels (no groups)."""
    x, w = t.shape(a["input"]), t.shape(a["weight"])
    if a["groups"] != 1 or a["offset_groups"] != 1:
        return None
    for operand in (t.shape(a["offset"]), t.shape(a["mask"])):
        for d in range(1, len(operand.axes)):
            t.pin_dim(operand, d, SLIDES)
    for d in (2, 3):
        t.pin_dim(x, d, SLIDES)
        t.pin_dim(w, d, SLIDES)
    t.tie(t.axis(x, 1), t.axis(w, 1))
    out = t.axis(w, 0)
    t.role(a["weight"], 0, "out")
    t.role(a["weight"], 1, "in")
    _bias(t, a["bias"], out)
    return Shape((x.axes[0], out, *(t.opaque(size, SLIDES) for size in t.sizes(node)[2:])))


def linear(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """x (…, i), weight (o, i) -> (…, o)."""
    x, w = t.shape(a["input"]), t.shape(a["weight"])
    t.tie(t.axis(w, 1), t.axis(x, len(x.axes) - 1))
    t.role(a["weight"], 0, "out")
    t.role(a["weight"], 1, "in")
    out = t.axis(w, 0)
    _bias(t, a.get("bias"), out)
    return Shape((*x.axes[:-1], out))


def matmul(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """(…, n, k) @ (…, k, m) -> (…, n, m), batch axes broadcast; either side may be a vector."""
    left, right = (v for v in a.values() if isinstance(v, fx.Node))
    x, y = t.shape(left), t.shape(right)
    k = len(y.axes) - 2 if len(y.axes) > 1 else 0
    t.tie(t.axis(x, len(x.axes) - 1), t.axis(y, k))
    t.role(left, len(x.axes) - 1, "in")
    t.role(right, k, "in")
    if len(y.axes) > 1:
        t.role(right, len(y.axes) - 1, "out")
    rows = [t.axis(x, len(x.axes) - 2)] if len(x.axes) > 1 else []
    columns = [t.axis(y, len(y.axes) - 1)] if len(y.axes) > 1 else []
    sizes = t.sizes(node)
    batch = sizes[: len(sizes) - len(rows) - len(columns)]
    outer = t.broadcast([Shape(x.axes[:-2]), Shape(y.axes[:-2])], batch)
    return Shape((*outer.axes, *rows, *columns))


def addmm(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """bias + left @ right, batched or not."""
    bias, *factors = (v for v in a.values() if isinstance(v, fx.Node))
    product = matmul(t, node, {"left": factors[0], "right": factors[1]})
    result = t.broadcast([product, t.shape(bias)], t.sizes(node))
    t.role(bias, len(t.shape(bias).axes) - 1, "out")
    return result


def embedding(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """weight (tokens, c) read at indices (…) -> (…, c)."""
    w = t.shape(a["weight"])
    t.pin_dim(w, 0, "token ids")
    t.role(a["weight"], 1, "out")
    return Shape((*t.shape(a["indices"]).axes, t.axis(w, 1)))


def attention(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """q (…, h, L, e), k (…, h, S, e), v (…, h, S, d) -> (…, h, L, d)."""
    q, k, v = (t.shape(a[name]) for name in ("query", "key", "value"))
    rank = len(q.axes)
    if a.get("enable_gqa"):
        k, v = (_repeated_heads(t, s, q.axes[rank - 3].size) for s in (k, v))
    leading = [max(column) for column in zip(*(s.sizes[:-2] for s in (q, k, v)))]
    t.tie(t.axis(q, rank - 1), t.axis(k, rank - 1))
    t.tie(t.axis(k, rank - 2), t.axis(v, rank - 2))
    heads = t.broadcast([Shape(s.axes[:-2]) for s in (q, k, v)], leading)
    rows, columns = t.axis(q, rank - 2), t.axis(k, rank - 2)
    mask = a.get("attn_mask") or a.get("attn_bias")
    if isinstance(mask, fx.Node):
        weights = Shape((*heads.axes, rows, columns))
        t.broadcast([weights, t.shape(mask)], weights.sizes)
    if a.get("is_causal"):
        t.pin(rows, "causal mask")
        t.pin(columns, "causal mask")
    return Shape((*heads.axes, rows, t.axis(v, normal(-1, rank))))


def _repeated_heads(t: ProgramTerms, x: Shape, heads: int) -> Shape:
    """Each head of keys or values serves several in a row of queries."""
    d = len(x.axes) - 3
    head = t.axis(x, d)
    copies = t.fresh(heads // head.size)
    return Shape((*x.axes[:d], Axis((*head.factors, *copies.factors)), *x.axes[d + 1 :]))


def fused_attention(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """Backends' own forms of attention give statistics beside the result, which only training reads."""
    if any(user.args[1] != 0 and user.users for user in node.users):
        return None
    result = attention(t, node, a)
    return [result, *[None] * (len(node.meta["val"]) - 1)]
