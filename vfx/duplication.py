"""What passes share that keep a part of the graph for each edge: names, weights, and maps where it meets the rest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from vfx.program import Execution, Program, Value, copy_graph


def prefixes(program: Program, root: str) -> list[str]:
    """``root.i.`` for each edge, or ``root_2.i.`` and so on where the networks have such names themselves."""
    taken = {name.split(".")[0] for name in program.weights[0]}
    names = (root, *(f"{root}_{index}" for index in range(2, len(taken) + 3)))
    free = next(name for name in names if name not in taken)
    return [f"{free}.{edge}." for edge in range(program.edges)]


def read_only_in(program: Program, part: Collection[fx.Node]) -> frozenset[str]:
    """The tensors that no node outside a part of the graph reads."""
    own: dict[str, bool] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            own[name] = own.get(name, True) and all(user in part for user in node.users)
    return frozenset(name for name, inside in own.items() if inside)


def own_weights(program: Program, graph: fx.Graph, names: list[str]) -> tuple[list[dict[str, Tensor]], dict[str, str]]:
    """The edges' weights with, in every set, each edge's own part; and that part's names with the old ones."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    kept = read | (set(program.weights[0]) - set(program.names()))
    private: dict[str, Tensor] = {}
    old: dict[str, str] = {}
    for prefix, weights in zip(names, program.weights):
        own = {name for name in weights if prefix + name in read}
        for name in own | _counters(own, weights):
            private[prefix + name], old[prefix + name] = weights[name], name
    return [{name: t for name, t in weights.items() if name in kept} | private for weights in program.weights], old


def _counters(names: set[str], weights: Any) -> set[str]:
    """``num_batches_tracked`` of the part's norms: no node reads it, training mode counts in it."""
    norms = {name.rpartition(".")[0] for name in names if name.endswith("running_mean")}
    return {name for name in (f"{norm}.num_batches_tracked" for norm in norms) if name in weights}


def product(graph: fx.Graph, node: fx.Node, value: Value, fqn: str, dim: int) -> fx.Node:
    """The square matrix ``fqn`` applied along one axis of a value: y = M x."""
    rank, size = len(value.shape), value.shape[dim]
    weight = graph.create_node("get_attr", fqn, name=fqn.replace(".", "_"))
    weight.meta = {"val": Value((size, size), value.dtype)}
    if dim == rank - 1:
        return call(graph, torch.ops.aten.linear.default, (node, weight), value)
    shape = [s for d, s in enumerate(value.shape) if d != dim]
    last = call(graph, torch.ops.aten.movedim.int, (node, dim, -1), Value((*shape, size), value.dtype))
    mapped = call(graph, torch.ops.aten.linear.default, (last, weight), last.meta["val"])
    return call(graph, torch.ops.aten.movedim.int, (mapped, -1, dim), value)


def weighted_sum(graph: fx.Graph, nodes: list[fx.Node], alphas: list[float], value: Value) -> fx.Node:
    """Σ αᵢ vᵢ."""
    total = call(graph, torch.ops.aten.mul.Tensor, (nodes[0], alphas[0]), value)
    for node, alpha in zip(nodes[1:], alphas[1:]):
        total = call(graph, torch.ops.aten.add.Tensor, (total, node), value, {"alpha": alpha})
    return total


def call(graph: fx.Graph, target: Any, args: Any, value: Value, kwargs: Any = None) -> fx.Node:
    """A new call at the end of the graph."""
    new = graph.call_function(target, args, kwargs or {})
    new.meta = {"val": value}
    return new


def own_values(program: Program, edge: int, part: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """Shapes of one edge's part of the graph: those of the capture, with the sizes that its own weights give."""
    read = {str(a.target) for node in part for a in node.all_input_nodes if a.op == "get_attr"}
    weights = program.weights
    if all(weights[edge][name].shape == weights[0][name].shape for name in read):
        return {node: node.meta.get("val") for node in part}
    run = Execution(program.graph, weights[edge], program.flatten(program.example_inputs))
    found = {}
    with torch.no_grad():
        while run.position < len(run.plan):
            node, value = run.step()
            if node in part:
                found[node] = _resized(node.meta.get("val"), value)
    return found


def edge_alone(program: Program, edge: int) -> Program:
    """The Program of one edge, its shapes those of its own weights where they differ from the first edge's."""
    one = program.select(edge)
    if all(tensor.shape == program.weights[0][name].shape for name, tensor in one.weights[0].items()):
        return one
    values = own_values(program, edge, [node for node in program.graph.nodes if node.op == "call_function"])
    graph, copies = copy_graph(program.graph)
    for node, value in values.items():
        copies[node].meta["val"] = value
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = one.weights[0][str(node.target)]
            node.meta["val"] = Value(tuple(tensor.shape), tensor.dtype)
    return replace(one, graph=graph)


def _resized(value: Any, actual: Any) -> Any:
    """A captured shape with its plain sizes replaced by those of a tensor; symbols (the batch) stay."""
    if isinstance(value, Value) and isinstance(actual, Tensor):
        shape = (now if isinstance(old, int) else old for old, now in zip(value.shape, actual.shape))
        return replace(value, shape=tuple(shape))
    if isinstance(value, (list, tuple)):
        return [_resized(old, now) for old, now in zip(value, actual)]
    return value
