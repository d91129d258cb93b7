"""Numbers of positions: the experts that rows are sent to, and rows that stand in the order of their numbers.

``topk`` (or ``argmax``) gives each row the numbers of its experts. Permuted experts have other numbers; where all that
is done with these is to look something up along the experts' axis, to write there, or to count, the result is the same
and the axis is as free as any other. Rows may be sorted by number: their order then follows the experts', and as long
as operators treat them one by one and an inverse order puts them back, the result does not depend on it. Anything else
that reads numbers, or rows in such an order, pins the axis. (Equal values, between which an operator chooses by
position, are left aside.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from vfx.analyse.axis import Axis, Opaque
from vfx.analyse.meaning import BACK, COUNTS, ENDS, NUMBERS, PLACES, Meaning, Order
from vfx.analyse.named import axes_by_number
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules import indexing, movement, routing
from vfx.analyse.rules.rule import Rule, normal
from vfx.analyse.shapes import Shape
from vfx.operators import arguments, is_in_place, operator_of

READ = "the position of a value is read"

# kinds of ties
_SAME_NUMBERS = {"view", "permute", "transpose", "unsqueeze", "squeeze"}
_SOME_NUMBERS = {"slice", "narrow", "split", "select", "expand"}
_ROW_BY_ROW = _SAME_NUMBERS | _SOME_NUMBERS
_ROW_BY_ROW |= {"elementwise", "same", "reduction", "linear", "layer norm", "index"}


def read(t: ProgramTerms, node: fx.Node) -> Any:
    """The result of an operator that looks up, counts or sorts by number; None for any other."""
    handler = _READERS.get(operator_of(node).ties)
    return handler(t, node, arguments(node)) if handler is not None and touched(t, node) else None


def touched(t: ProgramTerms, node: fx.Node) -> list[Shape]:
    """The operands that hold numbers, or rows in the order of some."""
    return [shape for shape in t.operands(node.all_input_nodes) if shape.meaning is not None or _orders(shape)]


def kept(t: ProgramTerms, node: fx.Node, result: Any) -> Any:
    """The result of another operator, with its meaning; where it sees numbers or rows' order, their axis is pinned."""
    shapes = touched(t, node)
    if not shapes or (operator_of(node).ties == "fill" and not is_in_place(node)):  # reads sizes alone
        return result
    results = result if isinstance(result, list) else [result]
    meanings = [shape.meaning for shape in shapes if shape.meaning is not None and shape.meaning.kind != PLACES]
    carried = _carried(node, meanings[0]) if len(meanings) == len(t.operands(node.all_input_nodes)) == 1 else None
    if (meanings and carried is None) or not _row_by_row(t, node, shapes, results):
        release(t, shapes)
        return result
    if carried is None:
        return result
    carried_shapes = [replace(shape, meaning=carried) if isinstance(shape, Shape) else shape for shape in results]
    return carried_shapes if isinstance(result, list) else carried_shapes[0]


def release(t: ProgramTerms, shapes: Iterable[Shape]) -> None:
    """Pin what the values and rows of some tensors depend on."""
    for shape in shapes:
        if shape.meaning is not None:
            t.pin(shape.meaning.axis, READ)
        for order in _orders(shape):
            t.pin(order.axis, READ)


def _orders(shape: Shape) -> list[Order]:
    return [axis.order for axis in shape.axes if isinstance(axis, Axis) and axis.order is not None]


def _carried(node: fx.Node, meaning: Meaning) -> Meaning | None:
    """What the values still mean behind an operator that moves or casts them."""
    ties = operator_of(node).ties
    if is_in_place(node):
        return None
    if ties == "same" or (meaning.kind == NUMBERS and ties in _SAME_NUMBERS):
        return meaning
    some = meaning.kind == NUMBERS and ties in _SOME_NUMBERS
    return replace(meaning, source=object()) if some else None


def _row_by_row(t: ProgramTerms, node: fx.Node, shapes: list[Shape], results: list[Any]) -> bool:
    """Whether rows in an order are rows of the result, each worked on by itself."""
    ties = operator_of(node).ties
    rows = {id(axis.root): axis.order for s in shapes for axis in s.axes if isinstance(axis, Axis) and axis.order}
    if not rows:
        return True
    if ties not in _ROW_BY_ROW or is_in_place(node) or len({id(order) for order in rows.values()}) > 1:
        return False
    if ties == "elementwise" and not _aligned(t, node):
        return False
    if ties == "layer norm" and any(
        isinstance(axis, Axis) and axis.order for axis in results[0].axes[-len(arguments(node)["normalized_shape"]) :]
    ):
        return False
    if ties == "index" and _orders(t.shape(node.all_input_nodes[0])):
        return False  # rows of the order, looked up by place
    return all(isinstance(shape, Shape) and len(_orders(shape)) == 1 for shape in results)


def _aligned(t: ProgramTerms, node: fx.Node) -> bool:
    """Whether all operands of a pointwise operator that have a dimension have it in one order."""
    shapes = t.operands(node.all_input_nodes)
    rank = max(len(shape.axes) for shape in shapes)
    for back in range(1, rank + 1):
        axes = [shape.axes[-back] for shape in shapes if len(shape.axes) >= back and shape.axes[-back].size != 1]
        if len({id(axis.order) if isinstance(axis, Axis) else None for axis in axes}) > 1:
            return False
    return True


# readers of numbers ---------------------------------------------------------------------------------------------------


def _sorted(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """sort and argsort of numbers, or of the places that these gave."""
    x = t.shape(a["self"])
    meaning = x.meaning
    if len(x.axes) != 1 or meaning is None or operator_of(node).least or a.get("descending"):
        return None
    if meaning.kind == PLACES:
        back = Shape((t.opaque(x.axes[0].size, "rows"),), meaning=replace(meaning, kind=BACK))
        return None if isinstance(node.meta["val"], list) else back
    if meaning.kind != NUMBERS or _orders(x):
        return None
    order = Order(meaning.axis, meaning.source)
    (part,) = t.naming(meaning.axis, (order,), 1)
    rows = Axis((Opaque(x.axes[0].size, "rows sorted by number", order, part),))
    numbers, places = (Shape((rows,), meaning=replace(meaning, kind=kind, order=order)) for kind in (NUMBERS, PLACES))
    return [numbers, places] if isinstance(node.meta["val"], list) else places


def _counted(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """histc with an interval for each number."""
    meaning = t.shape(a["self"]).meaning
    if meaning is None or meaning.kind != NUMBERS:
        return None
    size = meaning.axis.size
    whole = (a["bins"], a["min"], a["max"]) == (size, 0, size - 1)
    return Shape((meaning.axis,), meaning=replace(meaning, kind=COUNTS, order=None)) if whole else None


def _running(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """cumsum of counts: where the rows of each number end."""
    x = t.shape(a["self"])
    if operator_of(node).name != "aten.cumsum" or x.meaning is None or x.meaning.kind != COUNTS:
        return None
    return Shape((t.opaque(x.axes[0].size, "running totals"),), meaning=replace(x.meaning, kind=ENDS))


def _grouped(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """Rows in the order of the numbers, by the matrices that these name."""
    x, w, ends = (t.shape(value) for value in routing.factors(a))
    order = x.axes[0].order if isinstance(x.axes[0], Axis) else None
    if ends.meaning is None or ends.meaning.kind != ENDS or order is None or order.source is not ends.meaning.source:
        return None
    return routing.product(t, a, lambda: t.tie(t.axis(w, 0), ends.meaning.axis))  # type: ignore[union-attr]


def _looked_up(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """index and index_select along one axis by numbers, or of rows in an order by the way back."""
    given = [(d, value) for d, value in enumerate(a["indices"]) if value is not None] if "indices" in a else []
    x = t.shape(a["self"])
    if "index" in a:
        given = [(normal(a["dim"], len(x.axes)), a["index"])]
    if len(given) != 1 or (x.meaning is not None and x.meaning.kind != NUMBERS):
        return None
    ((d, node_of),) = given
    numbers = t.shape(node_of)
    meaning, axes = numbers.meaning, (*x.axes[:d], *numbers.axes, *x.axes[d + 1 :])
    if meaning is None:
        return None
    if x.meaning is not None:  # numbers in the order of their own places
        looked_up = (
            meaning.kind == PLACES and meaning.source is x.meaning.source and len(x.axes) == 1 and not _orders(x)
        )
        return Shape(axes, meaning=replace(x.meaning, order=meaning.order)) if looked_up else None
    if meaning.kind == BACK:
        rows = x.axes[d]
        return Shape(axes) if isinstance(rows, Axis) and rows.order is meaning.order else None
    if meaning.kind != NUMBERS or _orders(x) or x.axes[d].size != meaning.axis.size:
        return None
    t.tie(t.axis(x, d), meaning.axis)
    return Shape((*x.axes[:d], *axes_by_number(t, numbers, meaning), *x.axes[d + 1 :]))


def _gathered(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """gather along an axis by its numbers."""
    x, numbers = t.shape(a["self"]), t.shape(a["index"] if "index" in a else a["indices"])
    meaning = numbers.meaning
    if meaning is None or meaning.kind != NUMBERS or a["dim"] is None or x.meaning is not None or _orders(x):
        return None
    d = normal(a["dim"], len(x.axes))
    if _orders(numbers) or numbers.sizes != t.sizes(node) or x.axes[d].size != meaning.axis.size:
        return None
    t.tie(t.axis(x, d), meaning.axis)
    indexing.tie_others(t, x, numbers, d)
    return replace(numbers, meaning=None)


def _scattered(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """scatter along an axis by its numbers."""
    x, numbers = t.shape(a["self"]), t.shape(a["index"])
    source = t.shape(a["src"]) if isinstance(a.get("src"), fx.Node) else replace(numbers, meaning=None)
    meaning, d = numbers.meaning, normal(a["dim"], len(x.axes))
    if meaning is None or meaning.kind != NUMBERS or x.axes[d].size != meaning.axis.size:
        return None
    if x.meaning is not None or source.meaning is not None or source.sizes != numbers.sizes:
        return None
    if any(map(_orders, (x, numbers, source))):
        return None
    t.tie(t.axis(x, d), meaning.axis)
    indexing.tie_others(t, x, numbers, d)
    indexing.tie_others(t, source, numbers, -1)
    return x


def _side_by_side(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """Numbers of one axis put together."""
    shapes = t.operands(a["tensors"])
    meanings = [shape.meaning for shape in shapes if shape.meaning is not None and shape.meaning.kind == NUMBERS]
    if len(meanings) < len(shapes) or len({m.axis.size for m in meanings}) > 1 or any(map(_orders, shapes)):
        return None
    first, *others = (meaning.axis for meaning in meanings)
    for axis in others:
        t.tie(first, axis)
    join = movement.stack if operator_of(node).ties == "stack" else movement.concatenate
    return replace(join(t, node, a), meaning=Meaning(NUMBERS, first, object()))


def _one_hot(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    x = t.shape(a["self"])
    if x.meaning is None or x.meaning.kind != NUMBERS or t.sizes(node)[-1] != x.meaning.axis.size or _orders(x):
        return None
    return Shape((*x.axes, x.meaning.axis))


def _inverse(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """empty[places] = 0, 1, 2, …: the way back."""
    if len(a["indices"]) != 1 or a.get("accumulate") or is_in_place(node):
        return None
    places, values = t.shape(a["indices"][0]), a["values"]
    if places.meaning is None or places.meaning.kind != PLACES or operator_of(values).name != "aten.arange":
        return None
    steps = arguments(values)
    if steps.get("start") not in (None, 0) or steps.get("step") not in (None, 1) or t.sizes(node) != places.sizes:
        return None
    return Shape((t.opaque(places.axes[0].size, "rows"),), meaning=replace(places.meaning, kind=BACK))


_READERS: dict[str, Rule] = {
    "sorted": _sorted,
    "histogram": _counted,
    "scan": _running,
    "grouped product": _grouped,
    "index": _looked_up,
    "gather": _gathered,
    "scatter": _scattered,
    "concatenate": _side_by_side,
    "stack": _side_by_side,
    "one hot": _one_hot,
    "index put": _inverse,
}
