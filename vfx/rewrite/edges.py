"""The shapes of one edge's values, where its weights have other sizes than the first edge's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from vfx.program import Execution, Program, Value, copy_graph


def own_values(program: Program, edge: int, part: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """Shapes of one edge's part of the graph: those of the capture, with the sizes that its own weights give."""
    read = {str(a.target) for node in part for a in node.all_input_nodes if a.op == "get_attr"}
    weights = program.weights
    if all(weights[edge][name].shape == weights[0][name].shape for name in read):
        return {node: node.meta.get("val") for node in part}
    run = Execution(program.graph, weights[edge], program.flatten(program.example_inputs))
    values = {}
    with torch.no_grad():
        while run.position < len(run.plan):
            node, value = run.step()
            if node in part:
                values[node] = _resized(node.meta.get("val"), value)
    return values


def edge_alone(program: Program, edge: int) -> Program:
    """The Program of one edge, its shapes those of its own weights where they differ from the first edge's."""
    alone = program.select(edge)
    if all(tensor.shape == program.weights[0][name].shape for name, tensor in alone.weights[0].items()):
        return alone
    values = own_values(program, edge, [node for node in program.graph.nodes if node.op == "call_function"])
    graph, copies = copy_graph(program.graph)
    for node, value in values.items():
        copies[node].meta["val"] = value
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = alone.weights[0][str(node.target)]
            node.meta["val"] = Value(tuple(tensor.shape), tensor.dtype)
    return replace(alone, graph=graph)


def _resized(value: Any, actual: Any) -> Any:
    """A captured shape with its plain sizes replaced by those of a tensor; symbols (the batch) stay."""
    if isinstance(value, Value) and isinstance(actual, Tensor):
        shape = (now if isinstance(old, int) else old for old, now in zip(value.shape, actual.shape))
        return replace(value, shape=tuple(shape))
    if isinstance(value, (list, tuple)):
        return [_resized(old, now) for old, now in zip(value, actual)]
    return value
