"""Which layers read a value that is shifted by a constant for each channel, if nothing else sees the shift.

Copies, views, selections and means of x + β are those of x, shifted alike; zero padding, sums and products are not. A
layer y = W(x + β) + b takes the shift as b + Wβ; a convolution only without padding, since β does not reach its border.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from vfx.analyse.rules import HARMLESS, TABLE, elementwise, movement
from vfx.operators import CONVOLUTIONS, DROPOUTS, TRANSPOSED, arguments, is_layer, layer_arguments, operator
from vfx.program import Value

_JOINED = {movement.concatenate, movement.stack, movement.stack_rows}
_MEANS = {"aten.mean", *(f"aten.adaptive_avg_pool{rank}d" for rank in (1, 2, 3))}
_NOISY = DROPOUTS | {"aten.native_dropout"}


def shift_readers(source: fx.Node) -> list[fx.Node] | str:
    """The layers that take a shift of ``source`` into their bias, or why it cannot leave its place."""
    shifted, readers = {source}, []
    for node in source.graph.nodes:
        touched = [x for x in node.all_input_nodes if x in shifted]
        if not touched or operator(node) in HARMLESS:
            continue
        if is_layer(node) and _reads(node, touched):
            readers.append(node)
        elif _keeps(node, shifted):
            shifted.add(node)
        else:
            return f"{node.name} ({operator(node) or node.op}) does not pass a shift on"
    return readers


def _reads(node: fx.Node, touched: list[fx.Node]) -> bool:
    a = layer_arguments(node)
    if touched != [a["input"]] or operator(node) not in CONVOLUTIONS:
        return touched == [a["input"]] and operator(node) not in TRANSPOSED
    padding = a["padding"]
    bare = padding == "valid" or (not isinstance(padding, str) and not any(padding))
    return a["groups"] == 1 and bare and not a.get("transposed")


def _keeps(node: fx.Node, shifted: set[fx.Node]) -> bool:
    """Whether a value is a copy, a view, a selection or a mean of shifted ones."""
    name = operator(node)
    rule, value = TABLE.get(name), node.meta.get("val")
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if rule is not None and rule.apply in _JOINED:
        return all(x in shifted for x in node.all_input_nodes)
    if rule is not None and rule.apply is movement.pad:
        a = arguments(node)
        return first in shifted and not any(a.get("pad") or a.get("padding") or ())
    moved = rule is not None and rule.apply.__module__ == movement.__name__
    copied = rule is not None and rule.apply is elementwise.same and name not in _NOISY and _floating(value)
    return (moved or copied or name in _MEANS or name == "getitem") and first in shifted


def _floating(value: Any) -> bool:
    return isinstance(value, Value) and value.dtype.is_floating_point
