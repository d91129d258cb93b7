"""Operators that act position by position, and reductions.

What a function of one variable lets pass is its kind in the registry: a homogeneous one scales, an odd one signs, a
linear one everything. Here are the operators whose arguments decide (a clamp at ±c is odd, one at 0 from below a ReLU),
those that multiply channel by channel, and sums of squares, which orthogonal maps leave.
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
from vfx.analyse.rules.rule import dims_of
from vfx.operators import Operator, arguments, is_in_place, operator_of

Arguments = dict[str, Any]

_MAPS = {"linear": Maps.LINEAR, "positive": Maps.POSITIVE_MONOMIAL, "odd": Maps.SIGNED}


def mapped(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    """A function that commutes with some maps: what its operands go through, restricted to these."""
    maps = _allowed(operator_of(node), a)
    if maps is Maps.PERMUTATION:
        return None
    tensors = _tensors(a)
    rank = len(w.sizes(node))
    result = sum_of(w, [(w.entries(x), len(w.sizes(x))) for x in tensors], rank)
    for ids in result.values():
        w.slots.restrict(ids, maps)
    return result


def _tensors(a: Arguments) -> list[fx.Node]:
    nested = [item for value in a.values() for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in nested if isinstance(item, fx.Node) and hasattr(item.meta.get("val"), "dtype")]


def _allowed(entry: Operator, a: Arguments) -> Maps:
    """What an operator's kind and arguments allow."""
    if entry.classes == "clamp":
        return _clamped(a.get("min_val", a.get("min")), a.get("max_val", a.get("max")))
    if entry.classes == "lerp":
        return Maps.LINEAR if not isinstance(a.get("weight"), fx.Node) else Maps.PERMUTATION
    if entry.classes == "sum":
        number = a.get("other", 0)
        return Maps.LINEAR if isinstance(number, fx.Node) or number == 0 else Maps.ORTHOGONAL_ONES
    return _MAPS.get(entry.classes, Maps.PERMUTATION)


def _clamped(low: Any, high: Any) -> Maps:
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return Maps.PERMUTATION
    if (low, high) in ((0, None), (None, 0)):
        return Maps.POSITIVE_MONOMIAL
    return Maps.SIGNED if low is not None and high is not None and low == -high else Maps.PERMUTATION


def absolute(w: Walk, node: fx.Node, a: Arguments) -> Entries:
    """|x|: scales pass, signs go."""
    result: Entries = {}
    for key, ids in w.entries(_tensors(a)[0]).items():
        result[key] = multiplied(w, [(ids, 1)], key[0], signs=False)
        w.slots.restrict(result[key], Maps.POSITIVE_MONOMIAL)
    return result


def multiplied_entries(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    """Products and quotients, channel by channel."""
    tensors, power = _tensors(a), operator_of(node).exponent
    assert power is not None
    if power == 1 and len(tensors) == 2 and tensors[0] is tensors[1]:
        return _power(w, node, Fraction(2), tensors)
    if a.get("rounding_mode") is not None:
        return None
    return product(w, node, list(zip(tensors, (1, int(power)))))


def power(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    exponent = operator_of(node).exponent
    return _power(w, node, a.get("exponent") if exponent is None else exponent, _tensors(a))


def _power(w: Walk, node: fx.Node, power: Any, tensors: Sequence[fx.Node]) -> Entries | None:
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
    if not readers or not all(operator_of(reader).classes == "total" for reader in readers):
        return set()
    rank = len(w.sizes(square))
    keys = [set(w.on(operand, {d})) for d in range(rank)]
    standing = set(w.entries(operand))
    for reader in readers:
        gone = dims_of(arguments(reader).get("dim"), rank)
        standing &= set().union(*(keys[d] for d in gone)) - set().union(
            *(keys[d] for d in range(rank) if d not in gone)
        )
    return standing


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value, or a copy or cast of it."""
    passed = (operator_of(user).is_cast or operator_of(user).is_copy for user in node.users)
    return [end for user, same in zip(node.users, passed) for end in (_readers(user) if same else [user])]


def chosen(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
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
    return None if is_in_place(node) else w.uniform(w.t.shapes[node])


def total(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """Sums and means pass what stands on other axes; along an axis: what fixes the ones."""
    return _reduced(w, node, a, Maps.ORTHOGONAL_ONES, Maps.LINEAR)


def extreme(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """Extremes and deviations pass the scales of what stands on other axes."""
    return _reduced(w, node, a, Maps.PERMUTATION, Maps.POSITIVE_MONOMIAL)


def length(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """Norms pass scales, too; a Euclidean one what leaves lengths."""
    euclidean = a.get("p", a.get("ord")) in (2, 2.0, None)
    return _reduced(w, node, a, Maps.ORTHOGONAL if euclidean else Maps.PERMUTATION, Maps.POSITIVE_MONOMIAL)


def _reduced(w: Walk, node: fx.Node, a: Arguments, along: Maps, beside: Maps) -> Any:
    """A reduction that lets some maps pass on the axes that it is taken over, and others on those that stay."""
    (x, *_) = _tensors(a)
    rank = len(w.sizes(x))
    gone = dims_of(a.get("dim"), rank)
    over = w.on(x, set(gone))
    result: Entries = {}
    for key, ids in w.entries(x).items():
        if key in over:
            w.slots.restrict(ids, along)
            continue
        w.slots.restrict(ids, beside)
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
    return [result, *(w.permuted(sizes) for sizes in shapes[1:])] if isinstance(shapes, (list, tuple)) else result


def average_windows(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """Averages and interpolation are linear in each channel."""
    return _windowed(w, node, a, Maps.LINEAR)


def extreme_windows(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """Extremes are positively homogeneous in each channel."""
    return _windowed(w, node, a, Maps.POSITIVE_MONOMIAL)


def _windowed(w: Walk, node: fx.Node, a: Arguments, maps: Maps) -> Any:
    x = _tensors(a)[0]
    rank = len(w.sizes(x))
    result: Entries = {}
    for key, ids in w.entries(x).items():
        w.slots.restrict(ids, maps)
        result[key] = w.slots.collapse(ids, range(rank - operator_of(node).spatial, rank))
    return _with_others(w, node, result)


def prelu(w: Walk, node: fx.Node, a: Arguments) -> Entries:
    """The slopes are numbers of their own: no scale moves them; one for all channels leaves them positive scales."""
    for ids in w.entries(a["weight"]).values():
        w.slots.restrict(ids, Maps.PERMUTATION)
    result = w.entries(a["self"])
    for ids in result.values():
        w.slots.restrict(ids, Maps.POSITIVE_MONOMIAL)
    return result
