"""A part of the graph kept for each edge: names, weights, and maps where it meets the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from vfx.analyse.layers import Cut, number_layers
from vfx.program import Program, Value, Weights, copy_node
from vfx.rewrite.contract import PassResult
from vfx.rewrite.nodes import call, parameter


class Duplicator(ABC):
    """Copies a graph with the part that a cut names repeated for each edge, under ``<root>.i.`` and names of its own.

    ``matrices`` collects maps on the cut by the FQN under which the graph reads them, ``folded`` those that go into a
    weight: the axis, and what multiplies it.
    """

    root: Literal["branches", "heads"]
    single: Literal["branch", "head"]

    def __init__(self, program: Program, cut: Cut, alphas: Sequence[float]):
        self.program, self.cut, self.alphas = program, cut, alphas
        self.prefixes = _prefixes(program, self.root)
        self.matrices: dict[str, Tensor] = {}
        self.folded: dict[str, tuple[int, Tensor]] = {}
        self.graph = fx.Graph()
        self.rest: dict[fx.Node, fx.Node] = {}
        self.copies: list[dict[fx.Node, fx.Node]] = [{} for _ in alphas]

    def result(self, note: str) -> PassResult[None]:
        """The Program with the part repeated."""
        program = self.program
        self.build()
        self.graph.eliminate_dead_code()  # what the edges' own parts read is known then
        weights, private = _own_weights(program, self.graph, self.prefixes)
        weights = [self._with_maps(tensors) for tensors in weights]
        buffers = program.buffers | {new for new, old in private.items() if old in program.buffers}
        changes: dict[str, Any] = {
            "private": program.private | private.keys() | self.matrices.keys(),
            "buffers": buffers,
            "layers": program.layers or number_layers(program).layers,
        }
        return PassResult(program.rewritten(self.graph, weights, note, **changes))

    @abstractmethod
    def build(self) -> None:
        """Fill the graph."""

    def crossing(self, node: fx.Node, argument: fx.Node, edge: int) -> fx.Node:
        """A value of the rest as a node of an edge's part reads it."""
        return self.rest[argument]

    def copy(self, node: fx.Node, edge: int) -> fx.Node:
        """An edge's own copy of a node."""
        new = copy_node(self.graph, node, {a: self._argument(node, a, edge) for a in node.all_input_nodes})
        new.name = f"{self.single}{edge}_{node.name}"
        self.copies[edge][node] = new
        return new

    def _argument(self, node: fx.Node, argument: fx.Node, edge: int) -> fx.Node:
        copies = self.copies[edge]
        if argument not in copies and argument.op != "get_attr":
            return self.crossing(node, argument, edge)
        if argument not in copies:
            tensor = self.program.weights[edge][str(argument.target)]
            copies[argument] = self.graph.create_node(
                "get_attr", f"{self.prefixes[edge]}{argument.target}", name=f"{self.single}{edge}_{argument.name}"
            )
            copies[argument].meta = {**argument.meta, "val": Value(tuple(tensor.shape), tensor.dtype)}
        return copies[argument]

    def mapped(self, node: fx.Node, value: fx.Node, edge: int, dim: int, matrix: Tensor) -> fx.Node:
        """A value of ``node`` behind a matrix of its own along one axis: y = M x."""
        fqn = f"{self.prefixes[edge]}joins.{node.name}_{dim}"
        self.matrices[fqn] = matrix
        return _product(self.graph, value, node.meta["val"], fqn, dim)

    def _with_maps(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A weight set with the maps on the cut."""
        result = dict(weights)
        for name, (axis, matrix) in self.folded.items():
            old = weights[name]
            new = torch.tensordot(matrix.to(old.device), old.double(), ([1], [axis])).movedim(0, axis)
            result[name] = new.contiguous().to(old.dtype)
        example = next(t for t in weights.values() if t.is_floating_point())
        return result | {name: matrix.to(example) for name, matrix in self.matrices.items()}


def _prefixes(program: Program, root: str) -> list[str]:
    """``root.i.`` for each edge, or ``root_2.i.`` and so on where the networks have such names themselves."""
    taken = {name.split(".")[0] for name in program.weights[0]}
    names = (root, *(f"{root}_{index}" for index in range(2, len(taken) + 3)))
    free = next(name for name in names if name not in taken)
    return [f"{free}.{edge}." for edge in range(program.edges)]


def read_only_in(program: Program, part: Collection[fx.Node]) -> frozenset[str]:
    """The tensors that no node outside a part of the graph reads."""
    inside_of: dict[str, bool] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            inside_of[name] = inside_of.get(name, True) and all(user in part for user in node.users)
    return frozenset(name for name, inside in inside_of.items() if inside)


def _own_weights(program: Program, graph: fx.Graph, names: list[str]) -> tuple[list[dict[str, Tensor]], dict[str, str]]:
    """The edges' weights with, in every set, each edge's own part; and that part's names with the old ones."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    private: dict[str, Tensor] = {}
    old: dict[str, str] = {}
    for prefix, weights in zip(names, program.weights):
        owned = {name for name in weights if prefix + name in read}
        for name in owned | _counters(owned, weights):
            private[prefix + name], old[prefix + name] = weights[name], name
    return [{**weights, **private} for weights in program.weights], old


def _counters(names: set[str], weights: Weights) -> set[str]:
    """``num_batches_tracked`` of the part's norms: no node reads it, training mode counts in it."""
    norms = {name.rpartition(".")[0] for name in names if name.endswith("running_mean")}
    return {name for name in (f"{norm}.num_batches_tracked" for norm in norms) if name in weights}


def _product(graph: fx.Graph, node: fx.Node, value: Value, fqn: str, dim: int) -> fx.Node:
    """The square matrix ``fqn`` applied along one axis of a value: y = M x."""
    rank, size = len(value.shape), value.shape[dim]
    weight = parameter(graph, fqn, Value((size, size), value.dtype), fqn.replace(".", "_"))
    if dim == rank - 1:
        return call(graph, torch.ops.aten.linear.default, (node, weight), value)
    shape = [s for d, s in enumerate(value.shape) if d != dim]
    last = call(graph, torch.ops.aten.movedim.int, (node, dim, -1), Value((*shape, size), value.dtype))
    mapped = call(graph, torch.ops.aten.linear.default, (last, weight), last.meta["val"])
    return call(graph, torch.ops.aten.movedim.int, (mapped, -1, dim), value)


def weighted_sum(graph: fx.Graph, nodes: Sequence[fx.Node], alphas: Sequence[float], value: Value) -> fx.Node:
    """Σ αᵢ vᵢ."""
    total = call(graph, torch.ops.aten.mul.Tensor, (nodes[0], alphas[0]), value)
    for node, alpha in zip(nodes[1:], alphas[1:]):
        total = call(graph, torch.ops.aten.add.Tensor, (total, node), value, {"alpha": alpha})
    return total
