"""Constants of a captured graph: what depends on neither inputs nor parameters is computed once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from vfx.capture.in_place import families, is_mutable
from vfx.capture.values import as_value
from vfx.errors import CaptureError
from vfx.operators import arguments, operator_of
from vfx.program import Value, Weights

_MAX_FOLDED = 1 << 24  # elements: a constant larger than this is cheaper to compute than to keep
_MAX_ALL_FOLDED = 1 << 27  # elements of all constants: a graph from a file could ask for any number of them
_MAX_WORK = 1 << 34  # multiplications for all constants, about a second
_PER_PART = 1 << 14  # multiplications that take as long as a tensor of its own


def fold_constants(
    graph: fx.Graph, weights: dict[str, Tensor], constants: set[str]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Evaluate what depends on neither inputs nor parameters (masks, position indices) once."""
    constant = _constant_nodes(graph, constants)
    values = _constant_values(graph, constant, weights)
    weights = dict(weights)
    frontier = [n for n in values if n.op == "call_function" and any(u not in constant for u in n.users)]
    for index, node in enumerate(n for n in frontier if isinstance(values[n], Tensor)):
        name = f"_folded_{index}"
        weights[name] = values[node].clone(memory_format=torch.contiguous_format)
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", name)
        new.meta = {"val": as_value(values[node])}
        node.replace_all_uses_with(new)
    for node in reversed(list(graph.nodes)):
        if node in constant and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph, weights


def _constant_nodes(graph: fx.Graph, constants: set[str]) -> set[fx.Node]:
    """Nodes whose final value is known; views of one storage are constant together or not at all."""
    storages = families(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    constant: set[fx.Node] = set()
    kept = work = 0
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants:
            constant.add(node)
        elif (
            _is_foldable(node, constant)
            and kept + _elements(node) <= _MAX_ALL_FOLDED
            and work + _work(node) <= _MAX_WORK
        ):
            constant.add(node)
            kept += _elements(node)
            work += _work(node)
    while True:
        lost = {node for node in constant if node.op == "call_function" and not _is_foldable(node, constant)}
        for members in storages:
            written = [order[node] for node in members if is_mutable(node)]
            readers = [user for node in members for user in node.users if user not in constant]
            if written and (
                any(node not in constant for node in members if is_mutable(node))
                or any(order[user] < max(written) for user in readers)
            ):
                lost.update(constant.intersection(members))
        if not lost:
            return constant
        constant -= lost


def _is_foldable(node: fx.Node, constant: set[fx.Node]) -> bool:
    values = node.meta.get("val")
    if node.op != "call_function" or operator_of(node).name == "aten.empty" or not isinstance(values, (Value, list)):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    for value in values if isinstance(values, list) else [values]:
        if not isinstance(value, Value) or any(not isinstance(size, int) for size in value.shape):
            return False
    if _elements(node) > _MAX_FOLDED:
        return False
    return operator_of(node).fills is not None or all(argument in constant for argument in node.all_input_nodes)


def _work(node: fx.Node) -> int:
    """Multiplications, at most: each value of the output may depend on each of the inputs unless it is known better."""
    if node.op != "call_function" or operator_of(node).fills is not None:
        return 0
    read = sum(_elements(source) for source in node.all_input_nodes if isinstance(source.meta.get("val"), Value))
    if isinstance(node.meta["val"], list):
        return read * _PER_PART
    tags = getattr(node.target, "tags", ())
    linear = torch.Tag.pointwise in tags or torch.Tag.reduction in tags or getattr(node.target, "is_view", False)
    if linear or operator_of(node).linear_time:
        return read + _elements(node)
    return read * _elements(node)


def _elements(node: fx.Node) -> int:
    values = node.meta["val"]
    return sum(math.prod(value.shape) for value in (values if isinstance(values, list) else [values]))


def _constant_values(graph: fx.Graph, constant: set[fx.Node], weights: Weights) -> dict[fx.Node, Any]:
    """The values of constant nodes behind the last in-place operator."""
    device = next((tensor.device for tensor in weights.values()), None)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node not in constant:
                continue
            if node.op == "get_attr":
                values[node] = weights[str(node.target)].clone()
            elif (fills := operator_of(node).fills) is not None:
                fill = arguments(node).get("fill_value", fills)
                value = node.meta["val"]
                values[node] = torch.full(value.shape, fill, dtype=value.dtype, device=device)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                _check_size(node, args, kwargs)
                values[node] = node.target(*args, **kwargs)
    return values


def _check_size(node: fx.Node, args: Any, kwargs: Any) -> None:
    """Nothing is computed whose size is not as declared: a graph from a file could ask for any amount of memory."""
    with FakeTensorMode() as fake:
        args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, (args, kwargs))
        given = as_value(node.target(*args, **kwargs))  # type: ignore[operator]
    if given != node.meta["val"]:
        raise CaptureError(f"node {node.name} gives {given}, where the graph says {node.meta['val']}; export it anew")
