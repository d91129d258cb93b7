"""Graphs that name their precision: tensors made without a dtype have torch's default one, whatever the network has.

``torch.zeros(batch, 8)`` and an integer divided by two are float32 in a network that is run in float64 for a proof. If
their nodes name the dtype that they had when the network was captured, they follow it (``vfx.program.in_precision``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from vfx.operators import defaults
from vfx.program import Value


def name_dtypes(graph: fx.Graph) -> fx.Graph:
    """The graph, in which every node names its floating dtype unless an operand lends it one; changed in place."""
    for node in list(graph.nodes):
        if not _made_by_default(node):
            continue
        dtype = node.meta["val"].dtype
        if "dtype" in (defaults(node.target) or ()):
            node.kwargs = {**node.kwargs, "dtype": dtype}
            continue
        with graph.inserting_after(node):
            cast = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
        cast.meta = dict(node.meta)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    return graph


def _made_by_default(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Value) or not value.dtype.is_floating_point:
        return False
    if any(isinstance(argument, torch.dtype) for argument in (*node.args, *node.kwargs.values())):
        return False
    return not any(_lends(operand.meta.get("val")) for operand in node.all_input_nodes)


def _lends(value: Any) -> bool:
    return isinstance(value, list) or (
        isinstance(value, Value) and (value.dtype.is_floating_point or value.dtype.is_complex)
    )
