"""Rules for views, sums over axes and elementwise operators; see ``transfer``."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import fx

from vfx.analyse.rules.rule import normal
from vfx.freedom.equations import UNIT, Form, combine
from vfx.freedom.gains import shifted_parameter
from vfx.freedom.names import CATS, CUTS
from vfx.operators import operator
from vfx.program import Value

if TYPE_CHECKING:
    from vfx.freedom.infer import Freedom

CONSTANT = "adds what is not multiplied alike"


# values that move or are summed over other axes --------------------------------------------------------------------


def moved(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """Views, copies, cuts, concatenation, and sums over axes: a group's channels stand on one axis before and after."""
    operands = _tensors(a.values())
    along = None
    if operator(node) in CATS:
        along = _cat_dim(f, node, a)
    else:
        operands = operands[:1]  # the others lend a shape, a type or constant indices
    value = node.meta["val"]
    if not isinstance(value, Value) or not value.dtype.is_floating_point:
        return False
    for dim in range(f.rank(node)):
        for group in f.groups(node, dim):
            alone = sum(group in f.groups(node, d) for d in range(f.rank(node))) == 1
            sources = [(operand, _source(f, operand, group)) for operand in operands]
            if not alone or any(len(dims) > 1 for _, dims in sources):
                continue
            forms = [f.get(o, dims[0], group) if dims else UNIT for o, dims in sources if dims or dim != along]
            _same(f, node, dim, group, forms)
    _fixlost(f, node, operands)
    return True


def _source(f: Freedom, operand: fx.Node, group: int) -> list[int]:
    """The axes of a value on which a group stands."""
    return [d for d in range(f.rank(operand)) if group in f.groups(operand, d)]


def _cat_dim(f: Freedom, node: fx.Node, a: dict[str, Any]) -> int | None:
    return normal(int(a["dim"]), f.rank(node)) if isinstance(a.get("dim"), int) else None


def _same(f: Freedom, node: fx.Node, dim: int, group: int, forms: Sequence[Form]) -> None:
    """The result's form is that of all operands."""
    for form in forms[1:]:
        f.equate(forms[0], form, node, CONSTANT)
    if forms:
        f.put(node, dim, group, forms[0])


def _fixlost(f: Freedom, node: fx.Node, operands: Sequence[fx.Node]) -> None:
    """What an operand carries and the result does not show on one axis goes no further."""
    for operand in operands:
        for _, group, form in list(f.carried(operand)):
            if len(_source(f, node, group)) != 1 or len(_source(f, operand, group)) != 1:
                f.equate(form, UNIT, node, "mixes or cuts the channels")


def item(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """One part of a tensor that was cut into several."""
    container = node.args[0]
    assert isinstance(container, fx.Node)
    if operator(container) not in CUTS:
        return True  # a container that is no cut has fixed what it read
    return moved(f, node, {"self": container.args[0]})


def parts(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """Cuts hand their operand on to the items that are taken."""
    return True


def averaged(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """Linear over axes that hold no group's channels (their positions are pinned, or the channels are lost)."""
    return moved(f, node, {"self": next(iter(_tensors(a.values())))})


def extreme(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """max(d·x) = d·max(x) for d > 0."""
    return f.kind.value == "positive" and averaged(f, node, a)


def padded(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    return not (a.get("value") and any(a["pad"])) and averaged(f, node, a)


def uniform(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """The result does not depend on the operand's values."""
    return True


# elementwise --------------------------------------------------------------------------------------------------------


def _tensors(values: Any) -> list[fx.Node]:
    nested = [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]
    return [x for x in nested if isinstance(x, fx.Node) and hasattr(x.meta.get("val"), "shape")]


def _aligned(f: Freedom, node: fx.Node, operand: Any, dim: int) -> int | None:
    """The axis of an operand that stands along an axis of the result; None where it is broadcast."""
    if not isinstance(operand, fx.Node) or not f.rank(operand):
        return None
    own = dim - (f.rank(node) - f.rank(operand))
    return own if own >= 0 and f.size(operand, own) == f.size(node, dim) else None


def lost(f: Freedom, node: fx.Node, operand: Any) -> None:
    """Forms that stand along no axis of the result with the same group."""
    for dim, group, form in list(f.carried(operand)):
        own = dim + f.rank(node) - f.rank(operand)
        if group not in f.groups(node, own):
            f.equate(form, UNIT, node, "mixes the channels with others")


def added(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """d·x + d·y = d·(x + y); a constant that is not zero allows no map."""
    if _is_gain(f, node):
        return True
    operands = [value for value in (a["self"], a["other"]) if isinstance(value, fx.Node) or value != 0]
    for dim in range(f.rank(node)):
        for group in f.groups(node, dim):
            dims = [_aligned(f, node, operand, dim) for operand in operands]
            forms = [UNIT if d is None else f.get(o, d, group) for o, d in zip(operands, dims)]
            _same(f, node, dim, group, forms)
    for operand in operands:
        lost(f, node, operand)
    return True


def _is_gain(f: Freedom, node: fx.Node) -> bool:
    """1 + w, of which w can make any gain; w itself admits no other map."""
    if f.kind.value != "diagonal" or shifted_parameter(node) is None:
        return False
    for operand in node.all_input_nodes:
        f.fix(operand, node, "adds a constant to it")
    for dim in range(f.rank(node)):
        for group in f.groups(node, dim):
            f.put(node, dim, group, {("gain", node.name, dim, group): Fraction(1)})
    return True


def multiplied(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """(d·x)(e·y) = (d e)·(x y) channel by channel; matrices commute with factors that are the same on all channels."""
    sign = -1 if operator(node) == "aten.div" else 1
    if a.get("rounding_mode") is not None:
        return False
    first, second = a["self"], a["other"]
    for dim in range(f.rank(node)):
        for group in f.groups(node, dim):
            left, right = (_aligned(f, node, x, dim) for x in (first, second))
            forms = [UNIT if d is None else f.get(x, d, group) for x, d in ((first, left), (second, right))]
            if f.kind.value == "dense" and right is not None and (left is not None or sign < 0):
                for form in forms:
                    f.equate(form, UNIT, node, "multiplies channel by channel")
                continue
            f.put(node, dim, group, combine(forms[0], forms[1], sign))
    for operand in (first, second):
        lost(f, node, operand)
    return True


def homogeneous(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """g(d·x) = d·g(x) for d > 0."""
    if f.kind.value != "positive":
        return False
    values = [x for x in (a.get("self"), a.get("input"), a.get("other")) if isinstance(x, fx.Node)]
    if isinstance(a.get("weight"), fx.Node):  # PReLU's slopes
        f.fix(a["weight"], node, "takes it as a slope")
    if len(values) == 2:
        return added(f, node, {"self": values[0], "other": values[1]})
    return moved(f, node, {"self": values[0]})


def clamped(f: Freedom, node: fx.Node, a: dict[str, Any]) -> bool:
    """max(x, 0) and min(x, 0)."""
    bounds = [a.get("min"), a.get("max")]
    return all(bound is None or (not isinstance(bound, fx.Node) and bound == 0) for bound in bounds) and homogeneous(
        f, node, {"self": a["self"]}
    )
