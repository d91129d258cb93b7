"""In-place operators of a captured graph: made functional, or dropped, where nobody can tell."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from vfx.operators import canonical, is_in_place, operator_of
from vfx.program import is_empty


def own_written(graph: fx.Graph) -> fx.Graph:
    """Inputs and weights that an in-place operator writes to are copied first: running a Program changes neither."""
    base: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, None] = {}
    for node in graph.nodes:
        source = aliased(node)
        base[node] = base[source] if source is not None else node
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False) and isinstance(node.args[0], fx.Node):
            written[base[node.args[0]]] = None
    for node in written:
        if node.op in ("get_attr", "placeholder"):
            with graph.inserting_after(node):
                copied = graph.call_function(torch.ops.aten.clone.default, (node,))
            copied.meta = dict(node.meta)
            node.replace_all_uses_with(copied, lambda user, copy_node=copied: user is not copy_node)  # type: ignore[misc]
    return graph


def functionalise(graph: fx.Graph) -> fx.Graph:
    """In-place operators become functional ones wherever no other view of their target is read later."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    base: dict[fx.Node, fx.Node] = {}
    family: dict[fx.Node, list[fx.Node]] = {}
    for node in list(graph.nodes):
        source = aliased(node)
        base[node] = base[source] if source is not None else node
        family.setdefault(base[node], []).append(node)
        functional = _functional(node)
        if functional is None:
            continue
        target = node.args[0]
        assert isinstance(target, fx.Node)
        owned = base[target].op == "call_function"
        rivals = [x for x in family[base[target]] if x is not node and x is not target]
        if not owned or any(order[user] > order[node] for rival in rivals for user in rival.users):
            continue
        target.replace_all_uses_with(node, lambda user, at=order[node]: order[user] > at)  # type: ignore[misc]
        node.target = functional
        base[node] = node
        family[node] = [node]
    graph.eliminate_dead_code()
    return graph


def without_idle_writes(graph: fx.Graph) -> fx.Graph:
    """In-place operators write to no empty tensor (a slice behind the last channel)."""
    for node in list(graph.nodes):
        target = node.args[0] if node.args else None
        if is_mutable(node) and isinstance(target, fx.Node) and is_empty(target) and is_empty(node):
            node.replace_all_uses_with(target)
            graph.erase_node(node)
    return graph


def without_unread_writes(graph: fx.Graph) -> fx.Graph:
    """In-place operators go whose target no output reads, under whatever view of it."""
    family = {node: members for members in families(graph) for node in members}
    needed: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.is_impure() and not _writes_first_alone(node)]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [*node.all_input_nodes, *filter(is_mutable, family[node])]
    for node in reversed(list(graph.nodes)):
        if node not in needed:
            graph.erase_node(node)
    return graph


def _writes_first_alone(node: fx.Node) -> bool:
    """Whether an operator writes to its first argument, a tensor, and to nothing else."""
    if not is_mutable(node) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return False
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    written = [parameter.alias_info is not None and parameter.alias_info.is_write for parameter in parameters]
    return written[0] and not any(written[1:])


def aliased(node: fx.Node) -> fx.Node | None:
    """The argument whose storage this node's result shares, if any."""
    if node.target is python_operator.getitem:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
    if not shares and not operator_of(node).may_return_input:
        return None
    return next((a for a in node.args if isinstance(a, fx.Node)), None)


def families(graph: fx.Graph) -> list[list[fx.Node]]:
    """Nodes that may share one storage."""
    base: dict[fx.Node, fx.Node] = {}
    storages: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        source = aliased(node)
        base[node] = base[source] if source is not None else node
        storages.setdefault(base[node], []).append(node)
    return list(storages.values())


def is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _functional(node: fx.Node) -> Callable[..., Any] | None:
    """The out-of-place overload of an in-place ATen call, or None."""
    if not is_in_place(node) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    packet = getattr(torch.ops.aten, canonical(node).removeprefix("aten."), None)
    return getattr(packet, str(node.target._overloadname), None) if packet is not None else None  # type: ignore[union-attr]
