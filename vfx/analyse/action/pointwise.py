"""Operators that act position by position, and reductions.

The table's column says what a function of one variable lets pass (``vfx.analyse.rules``): a homogeneous one scales, an
odd one signs, a linear one everything. Here are the operators whose arguments decide (a clamp at ±c is odd, one at 0
from below a ReLU), those that multiply channel by channel, and sums of squares, which orthogonal maps leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from torch import fx

from vfx.analyse.action.contraction import multiplied, product, sum_of
from vfx.analyse.action.entries import Entries
from vfx.analyse.action.walk import Walk
from vfx.analyse.classes import Maps
from vfx.analyse.rules import TABLE
from vfx.analyse.rules.rule import dims_of
from vfx.operators import operator

Arguments = dict[str, Any]

_PRODUCTS = {"mul": (1, 1), "div": (1, -1)}
_POWERS = {"square": Fraction(2), "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "reciprocal": Fraction(-1)}
_SUMS = {"mean", "sum"}
_HOMOGENEOUS = {"amax", "amin", "max", "min", "std", "norm", "linalg_vector_norm", "median"}
_CASTS = {"_to_copy", "to", "type_as", "float", "double", "half", "clone", "contiguous"}


def name_of(node: fx.Node) -> str:
    return operator(node).removeprefix("aten.").removesuffix("_")


def pointwise(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    name = name_of(node)
    tensors = _tensors(a)
    if name == "_prelu_kernel":
        return prelu(w, node, a)
    squared = name == "mul" and len(tensors) == 2 and tensors[0] is tensors[1]
    if name in _PRODUCTS and a.get("rounding_mode") is None and not squared:
        return product(w, node, list(zip(tensors, _PRODUCTS[name])))
    if name in _POWERS or name == "pow" or squared:
        return _power(w, node, a, tensors)
    if name == "abs":
        return {key: _even(w, key[0], ids) for key, ids in w.entries(tensors[0]).items()}
    if name in ("where", "masked_fill"):
        return _chosen(w, node, a)
    maps = _allowed(name, a)
    if maps is Maps.PERMUTATION:
        return None
    rank = len(w.sizes(node))
    result = sum_of(w, [(w.entries(x), len(w.sizes(x))) for x in tensors], rank)
    for ids in result.values():
        w.slots.restrict(ids, maps)
    return result


def _tensors(a: Arguments) -> list[fx.Node]:
    nested = [item for value in a.values() for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in nested if isinstance(item, fx.Node) and hasattr(item.meta.get("val"), "dtype")]


def _allowed(name: str, a: Arguments) -> Maps:
    """What the table allows, and the arguments."""
    rule = TABLE.get(f"aten.{name}")
    maps = rule.maps if rule is not None else Maps.PERMUTATION
    if name in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        return _clamped(a.get("min_val", a.get("min")), a.get("max_val", a.get("max")))
    if name in ("add", "sub", "rsub", "lerp"):
        numbers = [a[key] for key in ("other", "weight", "end") if key in a and not isinstance(a[key], fx.Node)]
        if name == "lerp":
            return maps if not isinstance(a.get("weight"), fx.Node) else Maps.PERMUTATION
        return maps if all(number == 0 for number in numbers) else Maps.ORTHOGONAL_ONES
    if name == "mul" or maps is Maps.MONOMIAL:  # a form that is not covered above
        return Maps.PERMUTATION
    return maps


def _clamped(low: Any, high: Any) -> Maps:
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return Maps.PERMUTATION
    if (low, high) in ((0, None), (None, 0)):
        return Maps.POSITIVE_MONOMIAL
    return Maps.SIGNED if low is not None and high is not None and low == -high else Maps.PERMUTATION


def _even(w: Walk, leaf: int, ids: Any) -> Any:
    """|x|: scales pass, signs go."""
    result = multiplied(w, [(ids, 1)], leaf, signs=False)
    w.slots.restrict(result, Maps.POSITIVE_MONOMIAL)
    return result


def _power(w: Walk, node: fx.Node, a: Arguments, tensors: Sequence[fx.Node]) -> Entries | None:
    power = Fraction(2) if name_of(node) in _PRODUCTS else _POWERS.get(name_of(node), a.get("exponent"))
    if len(set(tensors)) != 1 or not isinstance(power, (int, float, Fraction)) or float(power) * 2 % 1:
        return None
    summed = set() if power != 2 else _summed(w, node)
    result: Entries = {}
    for key, ids in w.entries(tensors[0]).items():
        if key in summed:
            w.slots.restrict(ids, Maps.ORTHOGONAL)
            result[key] = np.full_like(ids, -1)
        else:
            result[key] = multiplied(w, [(ids, Fraction(power))], key[0])
            if Fraction(power).denominator > 1:
                w.slots.restrict(result[key], Maps.POSITIVE_MONOMIAL)
    return result


def _summed(w: Walk, square: fx.Node) -> set[Any]:
    """The entries of a square whose leaves its readers only sum over: the length of a vector is what they see."""
    operand = square.all_input_nodes[0]
    readers = _readers(square)
    if not readers or not all(name_of(reader) in _SUMS for reader in readers):
        return set()
    rank = len(w.sizes(square))
    keys = [set(w.on(operand, {d})) for d in range(rank)]
    found = set(w.entries(operand))
    for reader in readers:
        gone = dims_of(_dims(reader), rank)
        found &= set().union(*(keys[d] for d in gone)) - set().union(*(keys[d] for d in range(rank) if d not in gone))
    return found


def _dims(reduction: fx.Node) -> Any:
    from vfx.operators import arguments

    return arguments(reduction).get("dim")


def _readers(node: fx.Node) -> list[fx.Node]:
    return [end for user in node.users for end in (_readers(user) if name_of(user) in _CASTS else [user])]


def _chosen(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    """where and masked_fill: linear in what is chosen from, as long as the choice is one for all channels."""
    condition = a.get("condition", a.get("mask"))
    values = [a[key] for key in ("self", "other", "value") if key in a]
    keys = {leaf for leaf, _ in w.entries(condition)}
    numbers = [value for value in values if not isinstance(value, fx.Node)]
    if keys or any(number != 0 for number in numbers):
        return None
    rank = len(w.sizes(node))
    return sum_of(w, [(w.entries(x), len(w.sizes(x))) for x in values if isinstance(x, fx.Node)], rank)


def same(w: Walk, node: fx.Node, a: Arguments) -> Any:
    shape = w.t.shapes[node]
    entries = w.uniform(shape[0] if isinstance(shape, list) else shape, w.entries(_tensors(a)[0]))
    return _with_others(w, node, entries)


def fill(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    """New values are uniform; written in place they let what stood there be permuted."""
    return None if operator(node).endswith("_") else w.uniform(w.t.shapes[node])


def reduction(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """Sums pass what stands on other axes, extremes and deviations its scales; along an axis: what fixes the ones."""
    name = name_of(node)
    (x, *_) = _tensors(a)
    euclidean = name in ("norm", "linalg_vector_norm") and a.get("p", a.get("ord")) in (2, 2.0, None)
    if name not in _SUMS and name not in _HOMOGENEOUS:
        return None
    rank = len(w.sizes(x))
    gone = dims_of(a.get("dim"), rank)
    over = w.on(x, set(gone))
    result: Entries = {}
    for key, ids in w.entries(x).items():
        if key in over:
            allowed = Maps.ORTHOGONAL_ONES if name in _SUMS else Maps.ORTHOGONAL if euclidean else Maps.PERMUTATION
            w.slots.restrict(ids, allowed)
            continue
        w.slots.restrict(ids, Maps.LINEAR if name in _SUMS else Maps.POSITIVE_MONOMIAL)
        ids = w.slots.collapse(ids, gone)
        axis = key[1]
        if not a.get("keepdim"):
            ids = ids.reshape([size for d, size in enumerate(ids.shape) if d not in gone])
            axis = axis - sum(d < axis for d in gone) if axis >= 0 else axis
        result[key[0], axis] = ids
    return _with_others(w, node, result)


def _with_others(w: Walk, node: fx.Node, result: Entries) -> Any:
    """Masks and indices beside a result are moved, not scaled."""
    shapes = w.t.shapes[node]
    return [result, *(w.permuted(one) for one in shapes[1:])] if isinstance(shapes, (list, tuple)) else result


def windows(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """Averages and interpolation are linear in each channel, extremes positively homogeneous."""
    x = _tensors(a)[0]
    name = name_of(node)
    linear = "avg" in name or "upsample" in name
    rank = len(w.sizes(x))
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in str(node.target)), 2)
    result: Entries = {}
    for key, ids in w.entries(x).items():
        w.slots.restrict(ids, Maps.LINEAR if linear else Maps.POSITIVE_MONOMIAL)
        result[key] = w.slots.collapse(ids, range(rank - spatial, rank))
    return _with_others(w, node, result)


def prelu(w: Walk, node: fx.Node, a: Arguments) -> Entries:
    """The slopes are numbers of their own: no scale moves them; one for all channels leaves them positive scales."""
    for ids in w.entries(a["weight"]).values():
        w.slots.restrict(ids, Maps.PERMUTATION)
    result = w.entries(a["self"])
    for ids in result.values():
        w.slots.restrict(ids, Maps.POSITIVE_MONOMIAL)
    return result
