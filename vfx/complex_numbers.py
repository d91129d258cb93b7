"""Complex numbers: what of a network is complex, and how a Program holds complex parameters.

A complex parameter (…) is held as its real and imaginary parts (…, 2), which the graph reads through a marked
``view_as_complex``. So whatever averages, matches, scores or proves parameters meets real numbers alone. Modules that
are written back have the complex parameter again.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

_MARK = "complex_parameter"


def real_parts(tensor: Tensor) -> Tensor:
    """The real and imaginary parts (…, 2) of a complex tensor, any other as it is; shares storage."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def restored(tensor: Tensor, like: Tensor) -> Tensor:
    """A held parameter in the form of the module's tensor ``like``."""
    return together(tensor) if like.is_complex() and not tensor.is_complex() else tensor


def together(parts: Tensor) -> Tensor:
    """The complex tensor (…) of these parts (…, 2)."""
    return torch.view_as_complex(parts.contiguous())


def read_as_complex(graph: fx.Graph, parts: fx.Node) -> fx.Node:
    """The node that makes a complex parameter of its parts."""
    new = graph.call_function(torch.ops.aten.view_as_complex.default, (parts,))
    new.meta = {_MARK: True}
    return new


def is_complex(node: fx.Node) -> bool:
    """Whether a node's value is a complex tensor."""
    return bool(node.meta["val"].dtype.is_complex)


def parts_of(node: object) -> fx.Node | None:
    """The parts of the complex parameter that a node stands for, None for any other node."""
    return node.args[0] if isinstance(node, fx.Node) and node.meta.get(_MARK) else None  # type: ignore[return-value]


def with_complex_parameters(graph: fx.Graph) -> set[str]:
    """Let ``graph`` read its complex parameters as such; returns the FQNs that are complex now."""
    views = [node for node in graph.nodes if parts_of(node) is not None]
    attributes = [node for node in graph.nodes if node.op == "get_attr"]
    otherwise = {str(node.target) for node in attributes if any(user not in views for user in node.users)}
    names = {str(view.args[0].target) for view in views} - otherwise
    for view in views:
        if str(view.args[0].target) in names:
            view.replace_all_uses_with(view.args[0])
            graph.erase_node(view)
    return names
