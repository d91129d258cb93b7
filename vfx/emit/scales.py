"""Attention that scales by the width of a head: what its new width changes goes into the queries' projection.

A resized Program keeps the scale s of the original network; the user's class, which names none, would divide by √d for
the new d. With q' = s √d q it gives the same products. The rows of the projection that are queries are found by
following numbered features through the views between projection and attention; where anything else stands there, the
weights stay and the comparison of the class with the Program says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import torch
from torch import Tensor, fx

from vfx.operators import arguments, operator_of, weight_name
from vfx.program import Execution, Program, Weights


def with_default_scales(program: Program, edge: int = 0) -> dict[str, Tensor]:
    """The weights under which attention without a scale of its own computes what the Program does."""
    weights = dict(program.weights[edge])
    for attention, projection, chain in _queries(program):
        a = arguments(attention)
        rows = _numbered(program, weights, projection, chain)[a["query"]].unique()
        factor = a["scale"] * sqrt(a["query"].meta["val"].shape[-1])
        for name in (weight_name(projection), weight_name(projection, "bias")):
            if name is not None:
                scaled = weights[name].double().index_copy(0, rows, weights[name].double()[rows] * factor)
                weights[name] = scaled.to(weights[name].dtype)
    return weights


def _queries(program: Program) -> Iterator[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """Attention calls, the linear layer that gives the queries, and the views between, from the layer on."""
    for node in program.graph.nodes:
        if "default_scale" not in node.meta:
            continue
        chain, current = [], arguments(node)["query"]
        while operator_of(current).hands_on and isinstance(current.args[0], fx.Node):
            chain.append(current)
            current = current.args[0]
        if operator_of(current).is_linear and weight_name(current) is not None:
            yield node, current, chain[::-1]


def _numbered(program: Program, weights: Weights, projection: fx.Node, chain: list[fx.Node]) -> dict[fx.Node, Tensor]:
    """The numbers of a projection's features where its values go."""
    execution = Execution(program.graph, weights, program.flatten(program.example_inputs))
    found: dict[fx.Node, Tensor] = {}
    sizes: dict[fx.Node, int] = {}
    with torch.no_grad():
        while len(found) <= len(chain):
            node, value = execution.step()
            if node is projection:
                found[node] = torch.arange(value.shape[-1], device=value.device).expand_as(value)
            elif node in chain:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), {**found, **sizes}.__getitem__)
                found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif not isinstance(value, Tensor):
                sizes[node] = value
    return found
