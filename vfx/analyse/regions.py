"""Regions: what stands between layers and a value when only positions move and constants multiply.

Such a value is linear in the layers' outputs. Its region can be run by itself, in float64, on any outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from vfx.analyse.program_terms import ProgramTerms
from vfx.operators import is_in_place, is_layer, operator_of
from vfx.program import Value

_WIDER = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}


@dataclass(frozen=True, eq=False)
class Region:
    """``nodes`` in the order of the graph lead from ``layers`` to ``end``, reading ``constants`` beside them."""

    end: fx.Node
    layers: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    constants: Mapping[fx.Node, Tensor]

    @property
    def multiplies(self) -> bool:
        """Whether constants with a shape of their own multiply: channels are told apart."""
        products = (node for node in self.nodes if operator_of(node).name == "aten.mul")
        return any(x in self.constants and self.constants[x].numel() > 1 for p in products for x in p.all_input_nodes)

    def run(self, outputs: Mapping[fx.Node, Tensor], batch: int) -> dict[fx.Node, Any]:
        """The values of all nodes when the layers give ``outputs`` (float64); a layer left out gives zeros."""
        values: dict[fx.Node, Any] = {x: double(value) for x, value in self.constants.items()}
        for layer in self.layers:
            value = outputs.get(layer)
            values[layer] = torch.zeros(sizes(layer, batch), dtype=torch.float64) if value is None else value
        for node in self.nodes:
            values[node] = call(node, values, batch)
        return values


def region(end: fx.Node, inference: ProgramTerms) -> Region | None:
    """The region of a value; None where other operators, parameters or inputs stand on the way."""
    layers: dict[fx.Node, None] = {}
    inner: set[fx.Node] = set()
    constants: dict[fx.Node, Tensor] = {}
    stack = [end]
    while stack:
        node = stack.pop()
        if node in inner or node in layers or node in constants or is_size(node):
            continue
        if node.op == "get_attr":
            value = _constant(node, inference)
            if value is None:
                return None
            constants[node] = value
        elif is_layer(node):
            layers[node] = None
        elif _linear(node):
            inner.add(node)
            stack += node.all_input_nodes
        else:
            return None
    order = [node for node in end.graph.nodes if node in inner]
    return Region(end, tuple(layers), tuple(order), constants) if layers else None


def call(node: fx.Node, values: Mapping[fx.Node, Any], batch: int) -> Any:
    """One node on values known; KeyError where one is not. Types it names are made float64."""
    look = lambda x: int(sizes_of(x.meta["val"], batch)) if is_size(x) else values[x]  # noqa: E731
    args, kwargs = (map_aggregate(map_arg(x, look), _wider) for x in (node.args, node.kwargs))
    return node.target(*args, **kwargs)  # type: ignore[operator, arg-type]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value."""
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, Tensor):
            yield item


def sizes(node: fx.Node, batch: int) -> tuple[int, ...]:
    """A value's shape."""
    return tuple(node.meta["val"].sizes(batch))


def sizes_of(size: Any, batch: int) -> int:
    """A size in the graph, which may hold the batch's symbol."""
    return Value((size,), torch.int64).sizes(batch)[0]


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a number and no tensor."""
    value = node.meta.get("val")
    return node.op == "call_function" and value is not None and not isinstance(value, (Value, list, tuple))


def double(value: Tensor) -> Tensor:
    """The same in float64 (or complex128)."""
    return value.to(torch.complex128 if value.is_complex() else torch.float64).cpu() if _floats(value) else value.cpu()


def _floats(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _linear(node: fx.Node) -> bool:
    """Whether an operator moves values, or adds and multiplies them."""
    entry = operator_of(node)
    same = entry.is_identity or entry.is_cast or entry.ties in ("item", "complex pairs", "real pairs")
    return (entry.moves or entry.is_affine or same) and not is_in_place(node)


def _constant(node: fx.Node, inference: ProgramTerms) -> Tensor | None:
    """A constant that all edges have in common."""
    value = inference.constant(node)
    others = [weights[str(node.target)] for weights in inference.program.weights[1:]] if value is not None else []
    return value if all(torch.equal(value, constant) for constant in others if value is not None) else None


def _wider(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value
