"""Which layers read a value that is shifted by a constant for each channel, if nothing else sees the shift.

Copies, views, selections and means of x + β are those of x, shifted alike; zero padding, sums and products are not. A
layer y = W(x + β) + b takes the shift as b + Wβ; a convolution only without padding, since β does not reach its border.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from vfx.operators import arguments, is_in_place, is_layer, layer_arguments, operator, operator_of
from vfx.program import Value

_JOINED = {"concatenate", "stack", "stack columns", "stack rows"}  # kinds of ties


def shift_readers(source: fx.Node) -> list[fx.Node] | str:
    """The layers that take a shift of ``source`` into their bias, or why it cannot leave its place."""
    shifted, readers = {source}, []
    for node in source.graph.nodes:
        touched = [x for x in node.all_input_nodes if x in shifted]
        if not touched or operator_of(node).is_harmless:
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
    if touched != [a["input"]] or not operator_of(node).is_convolution:
        return touched == [a["input"]] and not operator_of(node).is_transposed
    padding = a["padding"]
    bare = padding == "valid" or (not isinstance(padding, str) and not any(padding))
    return a["groups"] == 1 and bare and not a.get("transposed")


def _keeps(node: fx.Node, shifted: set[fx.Node]) -> bool:
    """Whether a value is a copy, a view, a selection or a mean of shifted ones."""
    entry, value = operator_of(node), node.meta.get("val")
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if is_in_place(node):
        return False
    if entry.ties in _JOINED:
        return all(x in shifted for x in node.all_input_nodes)
    if entry.ties == "pad":
        a = arguments(node)
        return first in shifted and not any(a.get("pad") or a.get("padding") or ())
    copied = entry.ties == "same" and not entry.is_dropout and _floating(value)
    return (entry.moves or copied or entry.averages or entry.ties == "item") and first in shifted


def _floating(value: Any) -> bool:
    return isinstance(value, Value) and value.dtype.is_floating_point
