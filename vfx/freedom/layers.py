"""Rules for operators that sum over the channels, and for norms; see ``transfer``."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import fx

from vfx.freedom.equations import UNIT, combine
from vfx.freedom.values import CONSTANT, lost
from vfx.operators import TRANSPOSED, operator

if TYPE_CHECKING:
    from vfx.freedom.infer import Freedom


# contractions -------------------------------------------------------------------------------------------------------


def linear(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """y = W x + b along the last axis."""
    x, weight = a["input"], a["weight"]
    last = f.rank(x) - 1
    f.absorb(x, last, weight, 1, node)
    _others(f, node, x, {last: None}, a["bias"] is None)
    _written(f, node, f.rank(node) - 1, weight, 0, a["bias"], 0)
    return True


def _others(f: Freedom, node: fx.Node, x: Any, skip: Any, linear: bool) -> None:
    """The other axes of x stand where they stood; a bias that is the same on all their positions allows no map."""
    for dim, group, form in list(f.carried(x)):
        if dim in skip:
            continue
        if linear and dim < f.rank(node) and group in f.groups(node, dim):
            f.put(node, dim, group, form)
        else:
            f.equate(form, UNIT, node, CONSTANT)


def _written(f: Freedom, node: fx.Node, dim: int, weight: Any, out: int, bias: Any, own: int) -> None:
    """A layer's output carries what its weight's output axis does, and so does its bias."""
    for group in f.groups(node, dim):
        form = f.get(weight, out, group)
        if bias is not None:
            f.equate(f.get(bias, own, group), form, node, CONSTANT)
        f.put(node, dim, group, form)
    shown = f.groups(node, dim)
    for value, axis in ((weight, out), (bias, own)):
        for d, group, form in list(f.carried(value)):
            if d == axis and group not in shown:
                f.equate(form, UNIT, node, "mixes or cuts the channels")


def convolution(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """y = W ∗ x + b along the channel axis; a depthwise kernel multiplies channel by channel."""
    x, weight, transposed = a["input"], a["weight"], operator(node) in TRANSPOSED or bool(a.get("transposed"))
    spatial = f.rank(weight) - 2
    channel = f.rank(x) - spatial - 1
    groups = a["groups"]
    f.fix(x, node, "slides over it", set(range(f.rank(x))) - {channel})
    f.fix(weight, node, "slides over it", set(range(2, f.rank(weight))))
    if groups == 1:
        out, inner = (1, 0) if transposed else (0, 1)
        f.absorb(x, channel, weight, inner, node)
        _written(f, node, channel, weight, out, a["bias"], 0)
        return True
    size = f.size(x, channel)
    if groups != size or f.size(weight, 0) != size or f.size(weight, 1) != 1 or f.kind.value == "dense":
        return False
    for group in f.groups(node, channel):
        form = combine(f.get(x, channel, group), f.get(weight, 0, group))
        if a["bias"] is not None:
            f.equate(f.get(a["bias"], 0, group), form, node, CONSTANT)
        f.put(node, channel, group, form)
    for value, axis in ((x, channel), (weight, 0), (a["bias"], 0)):
        for d, group, form in list(f.carried(value)):
            if d == axis and group not in f.groups(node, channel):
                f.equate(form, UNIT, node, "mixes or cuts the channels")
    return True


def matmul(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """x (…, n, k) y (…, k, m) -> (…, n, m)."""
    x, y = (a.get(first, a.get(second)) for first, second in (("self", "batch1"), ("mat2", "other")))
    return _product(f, node, x, y, None)


def addmm(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """b + x y, with a bias (m,) for all rows."""
    if f.rank(a["self"]) != 1:
        return False
    return _product(f, node, a["mat1"], a["mat2"], a["self"])


def _product(f: Freedom, node: fx.Node, x: Any, y: Any, bias: Any) -> bool:
    if not (isinstance(x, fx.Node) and isinstance(y, fx.Node) and min(f.rank(x), f.rank(y)) >= 2):
        return False
    rows, inner, rank = f.rank(x) - 2, f.rank(x) - 1, f.rank(node)
    f.absorb(x, inner, y, f.rank(y) - 2, node)
    f.fix(y, node, "is a batch of products", set(range(f.rank(y) - 2)))
    f.fix(x, node, "is a batch of products", set(range(rows)))
    for dim, group, form in list(f.carried(x)):
        if dim == rows and bias is None and group in f.groups(node, rank - 2):
            f.put(node, rank - 2, group, form)
        elif dim == rows:
            f.equate(form, UNIT, node, CONSTANT)
    _written(f, node, rank - 1, y, f.rank(y) - 1, bias, 0)
    return True


def attention(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """softmax(q kᵀ) v: queries and keys meet each other, values pass."""
    q, k, v = a["query"], a["key"], a["value"]
    last = f.rank(q) - 1
    f.absorb(q, last, k, last, node)
    for value in (q, k, v):
        f.fix(value, node, "mixes positions", set(range(last)))
    for group in f.groups(node, last):
        f.put(node, last, group, f.get(v, last, group))
    if a.get("attn_mask") is not None:
        f.fix(a["attn_mask"], node, "adds it to scores")
    lost(f, node, v)
    return True


def embedding(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    weight, last = a["weight"], f.rank(node) - 1
    f.fix(weight, node, "looks rows up", {0})
    _written(f, node, last, weight, 1, None, 0)
    return True


# norms --------------------------------------------------------------------------------------------------------------


def batch_norm(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """y = γ (x − μ)/σ + β: the output's scale is γ's; the input's would have to go into the variance."""
    x = a["input"]
    f.fix(x, node, "has a variance of its own")
    _gained(f, node, 1, a)
    return True


def layer_norm(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """Scales are lost in the mean and variance; LayerNorm takes centring away, RMSNorm does not."""
    from vfx.freedom.infer import Normed

    x, last = a["input"], f.rank(node) - 1
    single = len(a["normalized_shape"]) == 1
    absorbs = f.kind.value == "dense" and single and operator(node) == "aten.layer_norm"
    for dim, group, form in list(f.carried(x)):
        if absorbs and dim == last and f.copies(x, last, group) == 1:
            f.norms.append(Normed(node, group, form))
        else:
            f.equate(form, UNIT, node, "normalises it")
    if single:
        _gained(f, node, last, a)
    else:
        for name in ("weight", "bias"):
            f.fix(a.get(name), node, "applies it over several axes")
    return True


def _gained(f: Freedom, node: fx.Node, dim: int, a: dict[str, Any]) -> None:
    gain, bias = a.get("weight"), a.get("bias")
    dense = f.kind.value == "dense"
    for value in (gain, bias) if dense else ():
        f.fix(value, node, "multiplies or shifts channel by channel")
    for group in f.groups(node, dim):
        if dense and gain is None and bias is None and operator(node) == "aten.layer_norm":
            f.put(node, dim, group, {("normed", node.name, group): Fraction(1)})
        elif not dense:
            form = f.get(gain, 0, group)
            if bias is not None:
                f.equate(f.get(bias, 0, group), form, node, CONSTANT)
            f.put(node, dim, group, form)
