"""DuplicateHeads: partial zipping (ZipIt!, Stoica et al. 2023, §4.3), the mirror image of Preserve-First Merging.

The last layers are kept for each edge under ``heads.i.<fqn>``; what they read of the merged rest is brought back to
each edge's own channels, x ≈ U z: in the weight of the head's first layer if that is a conv or linear layer and nobody
else reads its weight, else as a matrix of its own. Inside a residual stage the stream crosses as well as the branch.
Edges must be aligned first; heads may differ in shape, as those of networks with other classes do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from vfx.alphas import edge_weights
from vfx.analyse.layers import Cut, number_layers
from vfx.arguments import checked
from vfx.errors import ArchitectureError, ArgumentError, PassError
from vfx.operators import arguments, operator_of
from vfx.options import HeadOutput
from vfx.program import Program, Value, copy_node, readers_of
from vfx.rewrite import Pass, PassResult
from vfx.rewrite.copies import Duplicator, weighted_sum
from vfx.rewrite.edges import own_values
from vfx.rewrite.nodes import call


class DuplicateHeads(Pass[None]):
    """Keep the last ``heads`` layers (a number, or from a module on) of each edge.

    ``output`` is "list" (the edges' outputs in a list), "cat" (each output tensor of the edges side by side along its
    channel axis) or "mean" (their average with ``weights``).
    """

    needs = (number_layers,)
    weight_sets = "several"
    carries_maps = True

    @checked
    def __init__(self, heads: int | str, weights: float | Sequence[float] | None = None, output: HeadOutput = "list"):
        self.heads, self.weights, self.output = heads, weights, output

    def requires(self, program: Program) -> None:
        if any(done.startswith(self.name) for done in program.history):
            raise PassError("DuplicateHeads acts once; give all heads= in one call")

    def apply(self, program: Program) -> PassResult[None]:
        layers = number_layers(program)
        cut = layers.heads(self.heads)
        if not cut.branch:
            return PassResult(program)
        count = sum(program.node(layer.node) in cut.branch and not layer.shortcut for layer in layers)
        heads = _Heads(program, cut, edge_weights(self.weights, program.edges), self.output)
        return heads.result(f"DuplicateHeads({count} layers, {self.output})")

    def ensures(self, program: Program, result: PassResult[None]) -> None:
        """What is merged must have one shape in all edges."""
        for name in result.program.names():
            shapes = [tuple(weights[name].shape) for weights in result.program.weights]
            if name not in result.program.private and len(set(shapes)) > 1:
                raise ArchitectureError(
                    f"{name!r} has shapes {', '.join(map(str, shapes))} in the edges and stands in front of the heads; "
                    "keep more layers as heads"
                )


class _Heads(Duplicator):
    """The heads repeated for each edge; ``folded`` are maps of the channels that a head's first layer reads: W U."""

    root, single = "heads", "head"

    def __init__(self, program: Program, cut: Cut, alphas: Sequence[float], output: HeadOutput):
        super().__init__(program, cut, alphas)
        self.output = output
        self.products: dict[tuple[int, fx.Node], fx.Node] = {}
        self.channel = {layer.node: layer.channel for layer in number_layers(program)}

    def build(self) -> None:
        values = [own_values(self.program, edge, self.cut.branch) for edge in range(len(self.alphas))]
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.graph.output(self._outputs(node.args[0]))
            elif node in self.cut.branch:
                for edge, edge_values in enumerate(values):
                    self.copy(node, edge).meta["val"] = edge_values[node]
            else:
                self.rest[node] = copy_node(self.graph, node, self.rest)

    # heads ----------------------------------------------------------------------------------------------------------

    def crossing(self, node: fx.Node, argument: fx.Node, edge: int) -> fx.Node:
        """A value of the rest as one node of a head reads it: in the edge's own channels."""
        maps = self._maps(argument, edge)
        if not maps:
            return self.rest[argument]
        weight = _input_weight(self.program.graph, node, argument, list(maps), self.channel)
        if weight is not None:
            self.folded[self.prefixes[edge] + weight] = (1, next(iter(maps.values())).T)
            return self.rest[argument]
        if (edge, argument) not in self.products:
            value = self.rest[argument]
            for dim, matrix in maps.items():
                value = self.mapped(argument, value, edge, dim, matrix)
            self.products[edge, argument] = value
        return self.products[edge, argument]

    def _maps(self, node: fx.Node, edge: int) -> dict[int, Tensor]:
        """The matrices from the common space to the edge's by axis."""
        transport, value = self.program.transport, node.meta.get("val")
        if transport is None or not isinstance(value, Value) or not value.dtype.is_floating_point:
            return {}
        matrices = {dim: transport.on(edge, node, dim, back=True) for dim in range(len(value.shape))}
        return {dim: matrix for dim, matrix in matrices.items() if matrix is not None}

    # output ---------------------------------------------------------------------------------------------------------

    def _outputs(self, structure: Any) -> Any:
        if self.output == "list":
            return [fx.node.map_arg(structure, partial(self._of_edge, edge)) for edge in range(len(self.copies))]
        return fx.node.map_arg(structure, self._together)

    def _of_edge(self, edge: int, node: fx.Node) -> fx.Node:
        return self.copies[edge][node] if node in self.cut.branch else self.rest[node]

    def _together(self, node: fx.Node) -> fx.Node:
        if node not in self.cut.branch:
            return self.rest[node]
        copies = [copy[node] for copy in self.copies]
        values = [copy.meta["val"] for copy in copies]
        if self.output == "cat":
            dim = self._channel_axis(node)
            shape = list(values[0].shape)
            shape[dim] = sum(value.shape[dim] for value in values)
            return call(self.graph, torch.ops.aten.cat.default, (copies, dim), replace(values[0], shape=tuple(shape)))
        if len({value.shape for value in values}) > 1 or not values[0].dtype.is_floating_point:
            shapes = ", ".join(str(tuple(map(str, value.shape))) for value in values)
            raise ArgumentError(f"the heads' outputs {node.name} cannot be averaged: {values[0].dtype}, {shapes}")
        return weighted_sum(self.graph, copies, self.alphas, values[0])

    def _channel_axis(self, node: fx.Node) -> int:
        """The axis on which the last layer in front of an output puts its channels; the second where there is none."""
        rank = len(node.meta["val"].shape)
        layer = node
        while layer.name not in self.channel and layer.op == "call_function":
            layer = next(iter(layer.all_input_nodes), layer)
            if layer.op != "call_function":
                return min(1, rank - 1)
        same = len(layer.meta["val"].shape) == rank
        return self.channel[layer.name] if same else min(1, rank - 1)


def _input_weight(
    graph: fx.Graph, node: fx.Node, argument: fx.Node, dims: list[int], channel: dict[str, int]
) -> str | None:
    """The weight that can take a map of a layer's input channels, if the layer alone reads it and they alone move."""
    entry = operator_of(node)
    if not entry.is_layer or entry.is_transposed or node.args[0] is not argument or dims != [channel.get(node.name)]:
        return None
    values = arguments(node)
    weight = values["weight"]
    if values.get("groups", 1) != 1 or weight.op != "get_attr":
        return None
    name = str(weight.target)
    return name if len(readers_of(graph)[name]) == 1 else None
