"""Attention that scales by the width of a head: what its new width changes goes into the queries' projection.

A resized Program keeps the scale s of the original network; the user's class, which names none, would divide by √d for
the new d. With q' = s √d q it gives the same products. The rows of the projection that are queries are found by
following numbered features through the views between projection and attention; where anything else stands there, the
weights stay and the comparison of the class with the Program says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor, fx

from vfx.operators import arguments, operator_of, weight_name
from vfx.program import Program, Value

_BATCH = 2  # that views are followed at


def with_default_scales(program: Program, edge: int = 0, exact: bool = False) -> dict[str, Tensor]:
    """The weights under which attention without a scale of its own computes what the Program does.

    Those that change for it are rounded to their own precision, unless they are to be ``exact`` (float64).
    """
    weights = dict(program.weights[edge])
    for attention, projection, chain in _queries(program):
        a = arguments(attention)
        factor = a["scale"] * sqrt(a["query"].meta["val"].shape[-1])
        rows = _numbered(projection, chain).unique()
        for name in (weight_name(projection), weight_name(projection, "bias")):
            if name is not None:
                wide = weights[name].double()
                rows = rows.to(wide.device)
                wide = wide.index_copy(0, rows, wide[rows] * factor)
                weights[name] = wide if exact else wide.to(weights[name].dtype)
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


def _numbered(projection: fx.Node, chain: list[fx.Node]) -> Tensor:
    """The numbers of a projection's features behind a chain of views."""
    shape = projection.meta["val"].sizes(_BATCH)
    numbers_of = {projection: torch.arange(shape[-1]).expand(shape)}

    def value(node: fx.Node) -> Any:
        return numbers_of[node] if node in numbers_of else Value((node.meta["val"],), torch.int64).sizes(_BATCH)[0]

    for node in chain:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        numbers_of[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return numbers_of[chain[-1]] if chain else numbers_of[projection]
