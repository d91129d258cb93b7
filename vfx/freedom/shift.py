"""Which layers read a value that is shifted by a constant for each channel, if nothing else sees the shift.

Copies, views, selections and means of x + β are those of x, shifted alike; zero padding, sums and products are not. A
layer y = W(x + β) + b takes the shift as b + Wβ; a convolution only without padding, since β does not reach its border.
"""

from __future__ import annotations

from torch import fx

from vfx.analyse.rules import HARMLESS
from vfx.freedom.names import CATS, CUTS, KEPT
from vfx.operators import CONVOLUTIONS, TRANSPOSED, arguments, is_layer, layer_arguments, operator


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
    name = operator(node)
    if name in CATS:
        return all(x in shifted for x in node.all_input_nodes)
    bare = name in ("aten.pad", "aten.constant_pad_nd") and not any(arguments(node)["pad"])
    return (bare or name in KEPT or name in CUTS or name == "getitem") and node.args[0] in shifted
