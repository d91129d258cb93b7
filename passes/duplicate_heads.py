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

import numpy as np
import torch
from torch import Tensor, fx

from vfx.alphas import edge_weights
from vfx.analyse.layers import Cut, number_layers
from vfx.arguments import checked
from vfx.duplication import call, own_values, own_weights, prefixes, product, weighted_sum
from vfx.elements.parts import multiplied
from vfx.errors import ArchitectureError, ArgumentError, PassError
from vfx.operators import arguments, operator_of
from vfx.options import HeadOutput
from vfx.program import Program, Value, copy_node, readers_of
from vfx.rewrite import Pass, PassResult


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
        names = prefixes(program, "heads")
        duplicator = _Duplicator(program, cut, edge_weights(self.weights, program.edges), names, self.output)
        graph = duplicator.build()
        weights, private = own_weights(program, graph, names)
        weights = [duplicator.with_maps(own) for own in weights]
        private |= dict.fromkeys(duplicator.matrices, "")
        buffers = program.buffers | {new for new, old in private.items() if old in program.buffers}
        count = sum(program.node(layer.node) in cut.branch and not layer.shortcut for layer in layers)
        return PassResult(
            program.with_graph(
                graph,
                weights,
                f"DuplicateHeads({count} layers, {self.output})",
                private=program.private | frozenset(private),
                buffers=buffers,
                layers=program.layers or layers.layers,
            )
        )

    def ensures(self, program: Program, result: PassResult[None]) -> None:
        """What is merged must have one shape in all edges."""
        for name in result.program.names():
            shapes = [tuple(weights[name].shape) for weights in result.program.weights]
            if name not in result.program.private and len(set(shapes)) > 1:
                raise ArchitectureError(
                    f"{name!r} has shapes {', '.join(map(str, shapes))} in the edges and stands in front of the heads; "
                    "keep more layers as heads"
                )


class _Duplicator:
    """Copies the graph with the heads repeated for each edge.

    ``matrices`` collects maps of their own by FQN, ``folded`` those that go into a weight: its input axis is mixed.
    """

    def __init__(self, program: Program, cut: Cut, alphas: list[float], names: list[str], output: HeadOutput):
        self.program, self.cut, self.alphas, self.names, self.output = program, cut, alphas, names, output
        self.matrices: dict[str, Tensor] = {}
        self.folded: dict[str, Tensor] = {}
        self.graph = fx.Graph()
        self.rest: dict[fx.Node, fx.Node] = {}
        self.heads: list[dict[fx.Node, fx.Node]] = [{} for _ in alphas]
        self.products: dict[tuple[int, fx.Node], fx.Node] = {}
        self.channel = {layer.node: layer.channel for layer in number_layers(program)}

    def build(self) -> fx.Graph:
        values = [own_values(self.program, edge, self.cut.branch) for edge in range(len(self.alphas))]
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.graph.output(self._outputs(node.args[0]))
            elif node in self.cut.branch:
                for edge, own in enumerate(values):
                    self._copy(node, edge).meta["val"] = own[node]
            else:
                self.rest[node] = copy_node(self.graph, node, self.rest)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self.graph

    def with_maps(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A weight set with the maps in front of the heads."""
        result = dict(weights)
        for name, matrix in self.folded.items():
            size = matrix.shape[0]
            result[name] = multiplied(weights[name], 1, np.arange(size)[:, None], matrix.T.numpy())
        example = next(t for t in weights.values() if t.is_floating_point())
        return result | {name: matrix.to(example) for name, matrix in self.matrices.items()}

    # heads ----------------------------------------------------------------------------------------------------------

    def _copy(self, node: fx.Node, edge: int) -> fx.Node:
        mapping = {a: self._argument(node, a, edge) for a in node.all_input_nodes}
        new = copy_node(self.graph, node, mapping)
        new.name = f"head{edge}_{node.name}"
        self.heads[edge][node] = new
        return new

    def _argument(self, node: fx.Node, argument: fx.Node, edge: int) -> fx.Node:
        own = self.heads[edge]
        if argument in own:
            return own[argument]
        if argument.op == "get_attr":
            own[argument] = self.graph.create_node(
                "get_attr", f"{self.names[edge]}{argument.target}", name=f"head{edge}_{argument.name}"
            )
            tensor = self.program.weights[edge][str(argument.target)]
            own[argument].meta = {**argument.meta, "val": Value(tuple(tensor.shape), tensor.dtype)}
            return own[argument]
        return self._crossing(node, argument, edge)

    def _crossing(self, node: fx.Node, argument: fx.Node, edge: int) -> fx.Node:
        """A value of the rest as one node of a head reads it: in the edge's own channels."""
        maps = self._maps(argument, edge)
        if not maps:
            return self.rest[argument]
        weight = _input_weight(self.program.graph, node, argument, list(maps), self.channel)
        if weight is not None:
            self.folded[self.names[edge] + weight] = next(iter(maps.values()))
            return self.rest[argument]
        if (edge, argument) not in self.products:
            value = self.rest[argument]
            for dim, matrix in maps.items():
                fqn = f"{self.names[edge]}joins.{argument.name}_{dim}"
                self.matrices[fqn] = matrix
                value = product(self.graph, value, argument.meta["val"], fqn, dim)
            self.products[edge, argument] = value
        return self.products[edge, argument]

    def _maps(self, node: fx.Node, edge: int) -> dict[int, Tensor]:
        """The matrices from the common space to the edge's by axis."""
        transport, value = self.program.transport, node.meta.get("val")
        if transport is None or not isinstance(value, Value) or not value.dtype.is_floating_point:
            return {}
        found = {dim: transport.on(edge, node, dim, back=True) for dim in range(len(value.shape))}
        return {dim: matrix for dim, matrix in found.items() if matrix is not None}

    # output ---------------------------------------------------------------------------------------------------------

    def _outputs(self, structure: Any) -> Any:
        if self.output == "list":
            return [fx.node.map_arg(structure, partial(self._of_edge, edge)) for edge in range(len(self.heads))]
        return fx.node.map_arg(structure, self._together)

    def _of_edge(self, edge: int, node: fx.Node) -> fx.Node:
        return self.heads[edge][node] if node in self.cut.branch else self.rest[node]

    def _together(self, node: fx.Node) -> fx.Node:
        if node not in self.cut.branch:
            return self.rest[node]
        copies = [own[node] for own in self.heads]
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
