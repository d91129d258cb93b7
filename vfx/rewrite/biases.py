"""Layers that get a bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from vfx.operators import is_product, layer_arguments, weight_name
from vfx.program import Value
from vfx.rewrite.nodes import parameter


def add_bias(graph: fx.Graph, layer: fx.Node, sets: Sequence[dict[str, Tensor]], values: Sequence[Tensor]) -> fx.Node:
    """Give a layer without a bias one (C,) in each weight set; the node whose value is the layer's with it.

    Products of more than two axes have no form with a bias and are followed by an add, which their readers do not read
    yet.
    """
    weight = weight_name(layer)
    assert weight is not None
    name = weight.removesuffix("weight") + "bias" if weight.endswith("weight") else weight + "_bias"
    for weights, value in zip(sets, values):
        weights[name] = value.to(weights[weight].dtype)
    with graph.inserting_before(layer):
        bias = parameter(graph, name, Value((len(values[0]),), sets[0][name].dtype))
    operands = layer_arguments(layer) | {"bias": bias}
    if not is_product(layer):
        layer.args, layer.kwargs = tuple(operands.values()), {}
        return layer
    if len(layer.meta["val"].shape) == 2:
        layer.target = torch.ops.aten.addmm.default
        layer.args, layer.kwargs = (bias, operands["input"], operands["weight"]), {}
        return layer
    with graph.inserting_after(layer):
        total = graph.create_node("call_function", torch.ops.aten.add.Tensor, (layer, bias))
    total.meta = dict(layer.meta)
    return total
