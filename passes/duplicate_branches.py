"""DuplicateBranches: Preserve-First Merging (*Vanishing Feature* §5.4).

The first l layers are kept for each edge under ``branches.i.<fqn>``; every value that crosses the cut is joined as
Σ αᵢ vᵢ; the rest stays one network that Interpolate merges. Edges must be aligned first: their permutations are then
folded into the branches' last layers, and the join is a plain weighted sum. Inside a residual stage the stream crosses
the cut as well as the branch, and both are joined. Linear maps (ZipIt!, CCA, optimal transport) stand on the join edge:
in the layer that ends the branch if nothing else reads it, else as a matrix of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vfx.alphas import edge_weights
from vfx.analyse.layers import Cut, Join, number_layers
from vfx.arguments import checked
from vfx.duplication import own_weights, prefixes, product, weighted_sum
from vfx.errors import PassError
from vfx.operators import arguments, operator_of
from vfx.program import Program, Value, copy_node
from vfx.rewrite import Pass, PassResult


class DuplicateBranches(Pass[None]):
    """Keep the first ``preserve`` layers (a number, or up to and including a module) of each edge.

    ``join="preactivation"`` averages conv and linear outputs before norm and activation, ``"activation"`` after them.
    """

    needs = (number_layers,)
    weight_sets = "several"
    carries_maps = True

    @checked
    def __init__(
        self, preserve: int | str, weights: float | Sequence[float] | None = None, join: Join = "preactivation"
    ):
        self.preserve, self.weights, self.join = preserve, weights, join

    def requires(self, program: Program) -> None:
        if program.private:
            raise PassError("DuplicateBranches acts once, on edges that share one graph; run it before DuplicateHeads")

    def apply(self, program: Program) -> PassResult[None]:
        alphas = edge_weights(self.weights, program.edges)
        layers = number_layers(program)
        cut = layers.cut(self.preserve, self.join)
        if not cut.branch:
            return PassResult(program)
        names = prefixes(program, "branches")
        duplicator = _Duplicator(program.graph, cut, alphas, names, program.transport)
        graph = duplicator.build()
        weights, private = own_weights(program, graph, names)
        weights = [_with_maps(own, duplicator) for own in weights]
        private |= dict.fromkeys(duplicator.matrices, "")
        buffers = program.buffers | {new for new, old in private.items() if old in program.buffers}
        note = f"DuplicateBranches({layers.number(self.preserve)}/{len(layers)}, {self.join})"
        return PassResult(
            program.with_graph(graph, weights, note, private=frozenset(private), buffers=buffers, layers=layers.layers)
        )


class _Duplicator:
    """Copies the graph with the branch repeated for each edge.

    ``matrices`` collects the maps on the join edges by the FQN under which the graph reads them, ``mapped`` those that
    go into a branch's weight or bias.
    """

    def __init__(self, graph: fx.Graph, cut: Cut, alphas: list[float], prefixes: list[str], transport: Any):
        self.old, self.cut, self.alphas, self.prefixes, self.transport = graph, cut, alphas, prefixes, transport
        self.matrices: dict[str, Tensor] = {}
        self.mapped: dict[str, Tensor] = {}
        self.graph = fx.Graph()
        self.rest: dict[fx.Node, fx.Node] = {}
        self.branches: list[dict[fx.Node, fx.Node]] = [{} for _ in alphas]

    def build(self) -> fx.Graph:
        for node in self.old.nodes:
            if node not in self.cut.branch:
                self.rest[node] = copy_node(self.graph, node, self.rest)
                continue
            copies = [self._copy(node, edge) for edge in range(len(self.alphas))]
            if node in self.cut.joins:
                self.rest[node] = self._join(node, copies)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self.graph

    def _copy(self, node: fx.Node, edge: int) -> fx.Node:
        mapping = self.branches[edge]
        for argument in node.all_input_nodes:
            if argument not in mapping:
                own = argument.op == "get_attr"
                mapping[argument] = self._attribute(argument, edge) if own else self.rest[argument]
        new = copy_node(self.graph, node, mapping)
        new.name = f"branch{edge}_{node.name}"
        mapping[node] = new
        return new

    def _attribute(self, node: fx.Node, edge: int) -> fx.Node:
        new = self.graph.create_node(
            "get_attr", f"{self.prefixes[edge]}{node.target}", name=f"branch{edge}_{node.name}"
        )
        new.meta = dict(node.meta)
        return new

    def _join(self, node: fx.Node, copies: list[fx.Node]) -> fx.Node:
        """Σ αᵢ vᵢ; what is not a floating or complex tensor (a size) is the same in every branch."""
        value = node.meta.get("val")
        if not isinstance(value, Value) or not (value.dtype.is_floating_point or value.dtype.is_complex):
            return copies[0]
        copies = [self._transported(node, copy, edge) for edge, copy in enumerate(copies)]
        total = weighted_sum(self.graph, copies, self.alphas, value)
        total.name = node.name
        return total

    def _transported(self, node: fx.Node, copy: fx.Node, edge: int) -> fx.Node:
        """A branch's value in the common space, axis by axis."""
        rank = len(node.meta["val"].shape)
        for dim in range(rank) if self.transport is not None else ():
            matrix = self.transport.on(edge, node, dim)
            if matrix is None:
                continue
            parameters = self._last_parameters(node)
            if parameters:
                self.mapped |= {self.prefixes[edge] + name: matrix for name in parameters}
                continue
            fqn = f"{self.prefixes[edge]}joins.{node.name}_{dim}"
            self.matrices[fqn] = matrix
            copy = product(self.graph, copy, copy.meta["val"], fqn, dim)
        return copy

    def _last_parameters(self, node: fx.Node) -> list[str]:
        """Weight and bias of the layer that ends the branch, if nothing else there reads them or its output."""
        entry = operator_of(node)
        if not entry.is_layer or entry.is_transposed or any(user in self.cut.branch for user in node.users):
            return []
        values = arguments(node)
        parameters = [values[name] for name in ("weight", "bias") if values[name] is not None]
        if values.get("groups", 1) != 1 or not all(p.op == "get_attr" and self._read_once(p) for p in parameters):
            return []
        return [str(parameter.target) for parameter in parameters]

    def _read_once(self, parameter: fx.Node) -> bool:
        nodes = [n for n in self.old.nodes if n.op == "get_attr" and n.target == parameter.target]
        return sum(user in self.cut.branch for n in nodes for user in n.users) == 1


def _with_maps(weights: dict[str, Tensor], duplicator: _Duplicator) -> dict[str, Tensor]:
    """A weight set with the maps of the join edges: y = T (W x + b)."""
    result = dict(weights)
    for name, matrix in duplicator.mapped.items():
        old = weights[name]
        result[name] = torch.tensordot(matrix.to(old.device), old.double(), 1).to(old.dtype)
    example = next(t for t in weights.values() if t.is_floating_point())
    return result | {name: matrix.to(example) for name, matrix in duplicator.matrices.items()}
