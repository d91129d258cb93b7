"""Numbering of conv and linear layers, and the cut that Preserve-First Merging makes behind one of them.

Layers are numbered 1…L in execution order; shortcut projections are left out and carry the number of the layer they
meet. A shortcut is a projection whose output meets, in an add, a path with more layers from the same value. A product
with a parameter (x W, x W + b) is a linear layer, whatever its weight's layout.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Literal

from rich.table import Table
from torch import fx

from vfx.complex_numbers import parts_of
from vfx.errors import ArgumentError
from vfx.operators import (
    is_layer,
    is_product,
    layer_arguments,
    operator,
    operator_of,
    weight_name,
)
from vfx.program import Program, Value
from vfx.terminal import rendered

Join = Literal["preactivation", "activation"]
Choice = int | str | Collection[int | str] | None  # of layers: numbers, names of modules, globs


@dataclass(frozen=True)
class Layer:
    """A conv or linear call. ``fqn`` is its module's name, ``channel`` the channel axis of its output."""

    number: int
    fqn: str
    node: str
    operator: str
    shortcut: bool
    channel: int


@dataclass(frozen=True)
class Layers:
    """The numbered layers of a Program, shortcuts among them."""

    program: Program
    layers: tuple[Layer, ...]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        """L, the number of layers that count."""
        return max((layer.number for layer in self.layers if not layer.shortcut), default=0)

    def number(self, preserve: int | str) -> int:
        """How many layers a cut keeps: a number 0…L, or all those that run up to the end of a module."""
        if isinstance(preserve, str):
            before = {node.name for node in _up_to_module(self.program, preserve)}
            return max((x.number for x in self.layers if x.node in before and not x.shortcut), default=0)
        if isinstance(preserve, bool) or not isinstance(preserve, Integral) or not 0 <= preserve <= len(self):
            most = f"between 0 and {len(self)} (the number of layers)" if len(self) else _none_to_keep(0)
            raise ArgumentError(f"preserve must be {most}, got {preserve!r}")
        return int(preserve)

    def cut(self, preserve: int | str, join: Join = "preactivation") -> Cut:
        """The values at which edges are joined when the first ``preserve`` layers are kept for each.

        Behind a module the pre-activation join stands at its very end, its own norm and activation included.
        """
        return cut(self, preserve, join)

    def heads(self, keep: int | str) -> Cut:
        """The last ``keep`` layers and all that depends on them, or a module and all behind it; see ``heads``."""
        return heads(self, keep)

    def first(self, count: int | str) -> frozenset[str]:
        """The calls of the first layers (a number, or up to and including a module), norms and activations included."""
        if isinstance(count, str):
            nodes = _up_to_module(self.program, count)
        else:
            number = self.number(count)
            nodes = set(self.program.graph.nodes) - _behind(self, number, "activation") if number else set()
        return frozenset(node.name for node in nodes if node.op == "call_function")

    def select(self, chosen: Choice = None) -> list[Layer]:
        """The layers that are meant by numbers 1…L, names of layers or modules, or globs such as ``features.*``.

        None means every numbered layer but the heads (layers with no other layer behind them) and no shortcuts, as the
        papers do. Layers that a cut keeps for each edge may be named and are left out. Raises ArgumentError.
        """
        if chosen is None:
            heads = _heads(self)
            return [layer for layer in self.layers if not layer.shortcut and layer.node not in heads]
        several = [chosen] if isinstance(chosen, (str, Integral)) else list(chosen)  # type: ignore[arg-type]
        everything = self.program.layers or self.layers
        for wanted in several:
            if not any(_means(wanted, layer) for layer in everything):
                choices = ", ".join(f"{layer.number} {layer.fqn}" for layer in everything if not layer.shortcut)
                raise ArgumentError(f"layers={wanted!r} matches no layer; there are {choices}")
        return [layer for layer in self.layers if any(_means(wanted, layer) for wanted in several)]

    def table(self) -> Table:
        table = Table(title=f"{len(self)} layers")
        for column in ("number", "module", "operator", "joins behind it"):
            table.add_column(column)
        for layer in self.layers:
            joins = "" if layer.shortcut else ", ".join(node.name for node in self.cut(layer.number).joins)
            number = f"({layer.number})" if layer.shortcut else str(layer.number)
            table.add_row(number, layer.fqn, layer.operator + (" shortcut" if layer.shortcut else ""), joins)
        return table

    def __str__(self) -> str:
        return rendered(self.table())


@dataclass(frozen=True)
class Cut:
    """``branch`` nodes are kept for each edge; the values of ``joins`` cross into the merged rest."""

    branch: frozenset[fx.Node]
    joins: tuple[fx.Node, ...]


def number_layers(program: Program) -> Layers:
    """Number the conv and linear calls of a Program in execution order, as before any branch was duplicated."""
    return Layers(program, program.facts.once("layers", lambda: _numbered(program), program.layers))


def _numbered(program: Program) -> tuple[Layer, ...]:
    if program.layers:
        names = {node.name for node in program.graph.nodes if is_layer(node)}
        return tuple(layer for layer in program.layers if layer.node in names)
    nodes = [node for node in program.graph.nodes if is_layer(node) and not _is_constant(program, node)]
    meets = {node: _meeting(node) for node in nodes}
    shortcuts = {node for node, operand in meets.items() if operand is not None}
    numbers: dict[fx.Node, int] = {}
    for node in nodes:
        if node not in shortcuts:
            numbers[node] = len(numbers) + 1
    for node in shortcuts:
        numbers[node] = _last_layer(meets[node], numbers)
    return tuple(_layer(node, numbers[node], node in shortcuts) for node in nodes)


def _is_constant(program: Program, node: fx.Node) -> bool:
    """Whether a product's factor is a buffer: a fixed map that nobody trained."""
    return is_product(node) and weight_name(node) in program.buffers


def _layer(node: fx.Node, number: int, shortcut: bool) -> Layer:
    return Layer(number, _fqn(node), node.name, operator(node), shortcut, channel_axis(node))


def channel_axis(node: fx.Node) -> int:
    """The axis of a layer's output on which its channels stand."""
    value = node.meta["val"]
    assert isinstance(value, Value)
    spatial = len(layer_arguments(node)["weight"].meta["val"].shape) - 2
    return len(value.shape) - 1 - (spatial if operator_of(node).is_convolving else 0)


def _fqn(node: fx.Node) -> str:
    """The module that owns the weight; a product's weight that is a parameter of a larger module stands for itself."""
    name = weight_name(node)
    if name is None:
        return str(node.meta.get("module", node.name))
    return name.removesuffix(".weight") if is_product(node) else name.rpartition(".")[0]


def _means(chosen: int | str, layer: Layer) -> bool:
    """Whether a number or a name means a layer; shortcuts have no number of their own."""
    if isinstance(chosen, str):
        return fnmatchcase(layer.fqn, chosen) or layer.fqn.startswith(chosen + ".")
    return not isinstance(chosen, bool) and chosen == layer.number and not layer.shortcut


def _heads(layers: Layers) -> set[str]:
    """Layers with no other layer behind them."""
    followed: set[fx.Node] = set()
    for node in reversed(layers.program.graph.nodes):
        if any(user in followed or is_layer(user) for user in node.users):
            followed.add(node)
    return {node.name for node in layers.program.graph.nodes if is_layer(node) and node not in followed}


def _meeting(node: fx.Node) -> fx.Node | None:
    """The other operand of the add that makes this projection a shortcut, or None."""
    source = layer_arguments(node)["input"]
    current = node
    while len(current.users) == 1:
        user = next(iter(current.users))
        operands = [a for a in user.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        if operator_of(user).is_add and len(operands) == 2:
            operand = operands[0] if operands[1] is current else operands[1]
            assert isinstance(source, fx.Node)
            return operand if _most_layers(_origin(source), operand) > 1 else None
        if is_layer(user) or len(operands) != 1:
            return None
        current = user
    return None


def _origin(node: fx.Node) -> fx.Node:
    """The value a projection starts from, before pooling or views on its own path."""
    while node.op == "call_function" and len(node.users) == 1 and not is_layer(node):
        operands = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        if len(operands) != 1:
            break
        node = operands[0]
    return node


def _most_layers(source: fx.Node, target: fx.Node) -> int:
    """Most conv and linear layers on any path from ``source`` to ``target``; -1 if there is none."""
    most = {source: 0}
    for node in source.graph.nodes:
        reached = [most[a] for a in node.all_input_nodes if a in most]
        if reached and node is not source:
            most[node] = max(reached) + is_layer(node)
    return most.get(target, -1)


def _last_layer(node: fx.Node | None, numbers: dict[fx.Node, int]) -> int:
    """The highest-numbered layer that a value depends on."""
    assert node is not None
    return max((numbers[n] for n in ancestors([node]) if n in numbers), default=1)


def cut(layers: Layers, preserve: int | str, join: Join = "preactivation") -> Cut:
    """Split the graph behind a layer or a module.

    What depends on no parameter is shared. Every value of the branch that the rest reads is joined: inside a residual
    stage that is the stream as well as the branch.
    """
    if join not in ("preactivation", "activation"):
        raise ArgumentError(f"join must be 'preactivation' or 'activation', got {join!r}")
    number, graph = layers.number(preserve), layers.program.graph
    if isinstance(preserve, str) and join == "preactivation":
        kept = _up_to_module(layers.program, preserve)
    else:
        kept = set(graph.nodes) - _behind(layers, number, join) if number else set()
    computed = descendants({node for node in graph.nodes if node.op == "get_attr"})
    branch = {n for n in graph.nodes if n.op == "call_function" and n in computed and n in kept}
    branch -= {n for n in branch if parts_of(n) is not None and not branch.intersection(n.users)}
    joins = [n for n in graph.nodes if n in branch and any(user not in branch for user in n.users)]
    return Cut(frozenset(branch), tuple(joins))


def heads(layers: Layers, keep: int | str) -> Cut:
    """Split the graph in front of the last ``keep`` layers, or of a module; ``joins`` are the values that they read.

    Norms and activation functions in front of the first layer stay in front of the cut.
    """
    graph = layers.program.graph
    total = max((layer.number for layer in layers.program.layers or layers), default=0)
    if isinstance(keep, str):
        first = _inside(graph, keep, "heads")
        kept, overlap = set(first) | descendants(first), False
    else:
        if isinstance(keep, bool) or not isinstance(keep, Integral) or not 0 <= keep < max(total, 1):
            most = f"between 0 and {total - 1} (one layer at least is merged)" if total > 1 else _none_to_keep(total)
            raise ArgumentError(f"heads must be {most}, got {keep!r}")
        kept = _behind(layers, total - int(keep), "activation") if keep else set()
        here = {layer.node for layer in layers}
        overlap = any(x.number > total - keep and x.node not in here for x in layers.program.layers)
    kept = {n for n in kept if n.op == "call_function" and not _unpacks(n, kept)}
    kept |= {n for n in graph.nodes if parts_of(n) is not None and kept.issuperset(n.users)}
    if overlap or any(_reads_private(layers.program, node) for node in kept):
        raise ArgumentError("preserve and heads overlap: no layer is left to merge between them")
    sources = [a for n in graph.nodes if n in kept for a in n.all_input_nodes if a not in kept and a.op != "get_attr"]
    return Cut(frozenset(kept), tuple(dict.fromkeys(sources)))


def _none_to_keep(layers: int) -> str:
    number = "one convolution or linear layer, which is merged" if layers else "no convolution or linear layers"
    return f"0: the network has {number}"


def _unpacks(node: fx.Node, kept: set[fx.Node]) -> bool:
    """Whether a node takes an item of what several values share in front of the cut: the item itself crosses it."""
    return node.target is python_operator.getitem and node.args[0] not in kept


def _reads_private(program: Program, node: fx.Node) -> bool:
    return any(a.op == "get_attr" and a.target in program.private for a in node.all_input_nodes)


def _behind(layers: Layers, number: int, join: Join) -> set[fx.Node]:
    """What depends on a later layer and, if the join stands before norm and activation, on layer ``number`` itself."""
    node_of = {layer.node: layer for layer in layers}
    numbered = {node: node_of[node.name].number for node in layers.program.graph.nodes if node.name in node_of}
    later = {node for node, n in numbered.items() if n > number}
    rest = later | descendants(later)
    if join == "preactivation":
        rest |= descendants({node for node, n in numbered.items() if n == number})
    return rest


def _up_to_module(program: Program, name: str) -> set[fx.Node]:
    """Everything that runs up to the last operator of a module."""
    nodes = list(program.graph.nodes)
    return set(nodes[: nodes.index(_inside(program.graph, name, "preserve")[-1]) + 1])


def _inside(graph: fx.Graph, name: str, option: str) -> list[fx.Node]:
    """The operators of a module."""
    owners = {node: _owners(node) for node in graph.nodes}
    inside = [node for node, modules in owners.items() if any(x == name or x.startswith(name + ".") for x in modules)]
    if not inside:
        outermost = sorted({x.split(".")[0] for modules in owners.values() for x in modules})
        raise ArgumentError(f"{option}={name!r} names no module that runs; there are {', '.join(outermost)}")
    return inside


def _owners(node: fx.Node) -> set[str]:
    """The modules that call an operator or own its weights (a GraphModule calls activations itself)."""
    if node.op != "call_function":
        return set()
    read = (parts_of(a) or a for a in node.all_input_nodes)
    weights = (str(a.target).rpartition(".")[0] for a in read if a.op == "get_attr")
    return {name for name in (str(node.meta.get("module") or ""), *weights) if name}


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that depends on one of ``nodes``, themselves left out unless one depends on another."""
    return _reached([user for node in nodes for user in node.users], lambda node: node.users)


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and everything they depend on."""
    return _reached(nodes, lambda node: node.all_input_nodes)


def _reached(nodes: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """``nodes`` and all that a walk along their neighbours comes to."""
    reached: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack += neighbours(node)
    return reached
