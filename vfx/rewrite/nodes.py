"""New nodes, where the graph inserts: at its end, or inside ``with graph.inserting_before(node):``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from vfx.program import Value


def call(
    graph: fx.Graph, target: Any, args: Any, value: Value, kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> fx.Node:  # fmt: skip
    """A call of an operator that gives ``value``."""
    node = graph.create_node("call_function", target, args, dict(kwargs or {}), name)
    node.meta = {"val": value}
    return node


def parameter(graph: fx.Graph, fqn: str, value: Value, name: str | None = None) -> fx.Node:
    """A reader of the tensor ``fqn``."""
    node = graph.create_node("get_attr", fqn, name=name)
    node.meta = {"val": value}
    return node
