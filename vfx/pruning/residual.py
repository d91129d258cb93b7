"""Residual blocks, found from the graph: branches that are added to a value they were computed from.

A sum s + f(s) is a block where s and f(s) have the shape of the sum, f(s) is computed from s, and parameters serve f
alone. Sums of several terms (attention and MLP side by side, x + a(x) + m(x)) are looked into: each term that is
computed from another one is a branch of its own. Blocks that hold others are left out, so that each branch counts once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import fx

from vfx.analyse.layers import ancestors
from vfx.operators import arguments, operator_of
from vfx.program import Program, copy_graph

OPERANDS = {"self": "other", "other": "self"}


@dataclass(frozen=True)
class ResidualBlock:
    """A branch: operand ``branch`` ("self" or "other") of the add at node ``total``; its ``tensors`` serve it alone."""

    name: str
    total: str
    branch: str
    tensors: frozenset[str]

    @property
    def skip(self) -> str:
        """The other operand."""
        return OPERANDS[self.branch]


def residual_blocks(program: Program) -> list[ResidualBlock]:
    """The innermost blocks of a network in the order of its graph."""
    found = [
        ResidualBlock("", node.name, branch, _tensors(program, node.name, branch))
        for node in program.graph.nodes
        for branch in _branches(node)
    ]
    owners = [block for block in found if any(program.is_parameter(name) for name in block.tensors)]
    inner = [block for block in owners if not any(other.tensors < block.tensors for other in owners)]
    return list(_named(program, inner))


def residual_sums(program: Program) -> list[fx.Node]:
    """The sums that add a branch to a value that it was computed from."""
    return [node for node in program.graph.nodes if any(_branches(node))]


def _branches(node: fx.Node) -> Iterator[str]:
    """The operands of a sum that are computed from another term of it."""
    a = arguments(node) if node.op == "call_function" and operator_of(node).is_add else {}
    operands = [a.get(name) for name in OPERANDS]
    if a.get("alpha", 1) != 1 or not all(isinstance(x, fx.Node) and x.op != "get_attr" for x in operands):
        return
    if any(x.meta.get("val") != node.meta.get("val") for x in operands):  # type: ignore[union-attr]
        return
    for name, other in OPERANDS.items():
        branch, skip = a[name], a[other]
        if branch is not skip and not ancestors([branch]).isdisjoint(_terms(skip)):
            yield name


def _terms(node: fx.Node) -> set[fx.Node]:
    """A value and, where it is a sum that nothing else reads, its terms."""
    found = {node}
    if node.op == "call_function" and operator_of(node).is_add and len(node.users) == 1:
        for x in node.all_input_nodes:
            if x.meta.get("val") == node.meta.get("val"):
                found |= _terms(x)
    return found


def _tensors(program: Program, total: str, branch: str) -> frozenset[str]:
    """What nothing reads any more when a branch is gone."""
    block = ResidualBlock("", total, branch, frozenset())
    return frozenset(program.names()) - frozenset(_names(_cut(program.graph, [block])))


def _named(program: Program, blocks: Sequence[ResidualBlock]) -> Iterator[ResidualBlock]:
    """The blocks under the name of the module that holds their parameters; several of one module with their adds."""
    names = [_common(filter(program.is_parameter, block.tensors)) for block in blocks]
    count = Counter(names)
    for block, name in zip(blocks, names):
        own = f"{name} at {block.total}" if name and count[name] > 1 else name or block.total
        yield replace(block, name=own)


def _common(names: Iterable[str]) -> str:
    """The path of modules that names share."""
    columns = zip(*(name.split(".")[:-1] for name in names))
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


# graphs without branches ----------------------------------------------------------------------------------------------


def without(program: Program, blocks: Sequence[ResidualBlock]) -> Program:
    """The network in which each block hands on what it was given, without what served the branches alone."""
    graph = _cut(program.graph, blocks)
    names, nodes = set(_names(graph)), {node.name for node in graph.nodes}
    weights = [{name: tensor for name, tensor in one.items() if name in names} for one in program.weights]
    goals = {name: goal for name, goal in program.goals.items() if name in nodes}
    note = f"RemoveBlocks({len(blocks)} residual blocks)"
    return program.with_graph(graph, weights, note, goals=goals)


def silenced(program: Program, blocks: Sequence[ResidualBlock]) -> Program:
    """The whole network with zeros in the place of the branches: what ``without`` has to compute."""
    graph, _ = copy_graph(program.graph)
    nodes = {node.name: node for node in graph.nodes}
    for block in blocks:
        total = nodes[block.total]
        branch = arguments(total)[block.branch]
        with graph.inserting_before(total):
            zeros = graph.call_function(torch.ops.aten.zeros_like.default, (branch,))
        zeros.meta = dict(branch.meta)
        _put(total, block.branch, zeros)
    graph.lint()
    return replace(program, graph=graph)


def _cut(graph: fx.Graph, blocks: Sequence[ResidualBlock]) -> fx.Graph:
    """A copy of the graph in which sums are their other operand."""
    graph, _ = copy_graph(graph)
    nodes = {node.name: node for node in graph.nodes}
    for block in blocks:
        total = nodes[block.total]
        total.replace_all_uses_with(arguments(total)[block.skip])
        graph.erase_node(total)
    graph.eliminate_dead_code(_must_run)
    graph.lint()
    return graph


def _must_run(node: fx.Node) -> bool:
    """Whether a node counts though nothing reads it: in- and outputs, and writes (drawing numbers does not)."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(schema is not None and schema.is_mutable)


def _put(node: fx.Node, name: str, value: fx.Node) -> None:
    """One operand of an add."""
    if name in node.kwargs:
        node.kwargs = {**node.kwargs, name: value}
    else:
        node.update_arg(list(OPERANDS).index(name), value)


def _names(graph: fx.Graph) -> Iterator[str]:
    return (str(node.target) for node in graph.nodes if node.op == "get_attr")
