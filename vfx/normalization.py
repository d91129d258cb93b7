"""What normalization passes share: readers that reset BatchNorms, biases."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from vfx.analyse.layer_view import batch_norms
from vfx.analyse.layers import number_layers
from vfx.operators import is_layer, is_product, layer_arguments, weight_name
from vfx.program import Program, Value, Weights
from vfx.statistics.frontier import ChannelMoments, Reader

Direction = Literal["backward", "forward"]


def merged_norms(program: Program, layers: Collection[str] | None = None) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The BatchNorms with running statistics that are not one edge's own, each with the node it reads.

    With ``layers`` (node names) only those behind one of these layers.
    """
    for node in batch_norms(program):
        name = weight_name(node, "running_mean")
        if name is None or name in program.private:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if layers is None or _layer_before(source) in layers:
            yield node, source


def _layer_before(node: fx.Node) -> str:
    """The layer whose output this is, normalised or not; "" where there is none."""
    while not is_layer(node):
        operands = [a for a in node.all_input_nodes if a.op == "call_function"]
        if len(operands) != 1:
            return ""
        node = operands[0]
    return node.name


def reset_readers(
    program: Program, notes: list[str], layers: Collection[str] | None = None
) -> dict[fx.Node, list[Reader]]:
    """For each merged BatchNorm a reader of its input that writes its running statistics."""
    readers: dict[fx.Node, list[Reader]] = {}
    seen: set[str] = set()
    for node, source in merged_norms(program, layers):
        name = str(weight_name(node, "running_mean"))
        if name in seen:
            notes.append(f"reset: {name} serves several calls; its statistics are those of the last one")
        seen.add(name)
        readers.setdefault(source, []).append(_reset(node))
    return readers


def _reset(node: fx.Node) -> Reader:
    mean, var = str(weight_name(node, "running_mean")), str(weight_name(node, "running_var"))

    def write(observed: ChannelMoments, weights: dict[str, Tensor]) -> str:
        weights[mean] = observed.mean.to(weights[mean])
        weights[var] = observed.unbiased.to(weights[var])
        dead = int(observed.constant.sum())
        return f"reset: {dead} constant channels in {node.name}" if dead else ""

    return Reader(1, write)


def removed_biases(program: Program, count: int | None, direction: Direction) -> set[str]:
    """The biases of ``count`` layers (None: all) from the end (backward) or the start, those of branches left out."""
    layers = number_layers(program)
    number = {layer.node: layer.number for layer in layers}
    found = set()
    for node in program.graph.nodes:
        if node.name not in number:
            continue
        depth = number[node.name]
        chosen = count is None or (depth > len(layers) - count if direction == "backward" else depth <= count)
        name = weight_name(node, "bias")
        if chosen and name is not None and name not in program.private:
            found.add(name)
    return found


def without(weights: Weights, names: Collection[str]) -> dict[str, Tensor]:
    """A weight set with some tensors set to zero."""
    return {name: torch.zeros_like(tensor) if name in names else tensor for name, tensor in weights.items()}


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
        bias = graph.create_node("get_attr", name)
    bias.meta = {"val": Value((len(values[0]),), sets[0][name].dtype)}
    own = layer_arguments(layer) | {"bias": bias}
    if not is_product(layer):
        layer.args, layer.kwargs = tuple(own.values()), {}
        return layer
    if len(layer.meta["val"].shape) == 2:
        layer.target = torch.ops.aten.addmm.default
        layer.args, layer.kwargs = (bias, own["input"], own["weight"]), {}
        return layer
    with graph.inserting_after(layer):
        total = graph.create_node("call_function", torch.ops.aten.add.Tensor, (layer, bias))
    total.meta = dict(layer.meta)
    return total
