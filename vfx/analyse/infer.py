"""Runs the rules over a graph: every tensor gets a Shape of axis terms, ties fall out of unification."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from vfx.analyse.axis import Axis
from vfx.analyse.parts import Parts, keeps_parts
from vfx.analyse.routed import NUMBERS, Meaning, kept, read, release
from vfx.analyse.rules import rule_of
from vfx.analyse.shapes import Shape
from vfx.operators import arguments, operator_of
from vfx.outputs import spelled_tensors
from vfx.program import Program, Value, is_empty

BATCH = 1_000_000_007  # a prime: no view can confuse the batch with a product of other sizes

MODEL_INPUT, MODEL_OUTPUT = "model input", "model output"
OUT, IN, ELEMENTWISE = "out", "in", "elementwise"
EMPTY = "an empty tensor is cut from it, or computed with it"


class Inference(Parts):
    """Axis terms of every value in a Program's graph.

    ``parameters`` holds the axes of each parameter by FQN, ``roles`` what each rule said of a parameter's axis,
    ``unknown`` the operators without a rule (their axes are pinned), ``numbered`` the axes whose positions are read.
    """

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        self.shapes: dict[fx.Node, Any] = {}
        self.parameters: dict[str, tuple[Axis, ...]] = {}
        self.roles: list[tuple[str, int, Axis, str]] = []
        self.numbered: list[Axis] = []
        self.unknown: dict[str, list[str]] = {}
        self._sizes: dict[fx.Node, tuple[int, ...]] = {}
        self.used = _reachable(program.graph)
        for node in program.graph.nodes:
            if node in self.used:
                self.leaves.context = node.name
                self.shapes[node] = self._visit(node)

    # for rules ----------------------------------------------------------------------------------------------------

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's value, the batch replaced by a large prime."""
        if node not in self._sizes:
            value = node.meta.get("val")
            self._sizes[node] = value.sizes(BATCH) if isinstance(value, Value) else ()
        return self._sizes[node]

    def shape(self, node: fx.Node) -> Shape:
        return self.shapes[node]

    def operands(self, values: Sequence[Any]) -> list[Shape]:
        """Shapes of the tensors among some arguments."""
        nodes = [v for v in values if isinstance(v, fx.Node)]
        return [self.shapes[v] for v in nodes if isinstance(self.shapes.get(v), Shape)]

    def role(self, node: Any, dim: int, role: str, axis: Axis | None = None) -> None:
        """Note what a parameter's axis does here; ``axis`` restricts it to one factor."""
        origin = self.shapes[node].origin if isinstance(node, fx.Node) else ()
        source = origin[dim] if origin else None
        if source is not None:
            fqn, own = source
            self.roles.append((fqn, own, axis or self.parameters[fqn][own], role))

    def numbers(self, shape: Shape, axis: Axis) -> Shape:
        """A tensor whose values are positions along an axis."""
        if axis.opaque:
            return shape
        self.numbered.append(axis)
        return replace(shape, meaning=Meaning(NUMBERS, axis, object()))

    def pin_dim(self, shape: Shape, dim: int, reason: str) -> None:
        self.pin(self.axis(shape, dim), reason)

    def constant(self, node: Any) -> Tensor | None:
        """The values of a buffer or constant, which no pass changes."""
        if isinstance(node, fx.Node) and node.op == "get_attr" and node.target in self.program.buffers:
            value = self.program.weights[0][str(node.target)]
            return None if value.is_meta else value
        return None

    # traversal ----------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return Shape(tuple(self.opaque(size, MODEL_INPUT) for size in self.sizes(node)))
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            values = spelled_tensors(node.args[0])
            for name, value in values.items():
                self._pin_all(self.shapes[value], f"{MODEL_OUTPUT} {name}" if len(values) > 1 else MODEL_OUTPUT)
            return None
        if node.target is python_operator.getitem and is_empty(node):
            return self._refused(node.args[0], EMPTY)[int(node.args[1])]  # type: ignore[arg-type]
        if node.target is python_operator.getitem:
            container = self.shapes[node.args[0]]  # type: ignore[index]
            return container[int(node.args[1])] if isinstance(container, (list, tuple)) else None  # type: ignore[arg-type]
        return self._call(node)

    def _call(self, node: fx.Node) -> Any:
        entry = operator_of(node)
        if entry.is_harmless or not isinstance(node.meta.get("val"), (Value, list)):
            if entry.ties != "sizes":  # a value is read
                release(self, self.operands(node.all_input_nodes))
            return None
        if any(map(is_empty, (node, *node.all_input_nodes))):
            return self._refused(node, EMPTY)
        rule = rule_of(node)
        if rule is not None:
            parts = self._parts(node)
            result = read(self, node)
            if result is None:
                result = rule(self, node, arguments(node))
                result = result if result is None else kept(self, node, result)
            if result is not None:
                self._check(node, result)
                return self.carried(node, parts, result) if parts else result
        self.unknown.setdefault(str(node.target), []).append(node.name)
        reason = f"no rule for {node.target}" if rule is None else f"{node.target} is not covered in this form"
        return self._refused(node, reason)

    def _refused(self, node: fx.Node, reason: str) -> Any:
        """Nothing that an operator reads or gives may move."""
        for operand in node.all_input_nodes:
            self._pin_all(self.shapes[operand], reason)
        return self._opaque_result(node.meta["val"], reason)

    def _parts(self, node: fx.Node) -> set[Axis]:
        """The open parts that an operator lets through; all others are closed (a concatenation does so itself)."""
        if not self.parts or operator_of(node).ties == "concatenate":
            return set()
        return self.open_parts(node, self.operands(node.all_input_nodes), keeps_parts(node))

    def _check(self, node: fx.Node, result: Any) -> None:
        """A rule that gets a shape wrong is a bug worth hearing of at once."""
        values = node.meta["val"]
        single = isinstance(values, Value)
        sizes = [self.sizes(node)] if single else [v.sizes(BATCH) if isinstance(v, Value) else None for v in values]
        for size, shape in zip(sizes, [result] if single else result):
            if size is not None and shape is not None and size != shape.sizes:
                raise AssertionError(f"rule for {node.target} gave {shape.sizes}, not {size}")

    def _opaque_result(self, value: Any, reason: str) -> Any:
        if isinstance(value, list):
            return [self._opaque_result(item, reason) for item in value]
        return Shape(tuple(self.opaque(s, reason) for s in value.sizes(BATCH))) if isinstance(value, Value) else None

    def _pin_all(self, shape: Any, reason: str) -> None:
        if isinstance(shape, (list, tuple)):
            for item in shape:
                self._pin_all(item, reason)
        elif isinstance(shape, Shape):
            release(self, [shape])
            for dim in range(len(shape.axes)):
                self.pin_dim(shape, dim, reason)

    def _attribute(self, node: fx.Node) -> Shape:
        fqn = str(node.target)
        sizes = self.sizes(node)
        if fqn in self.program.buffers and not all(_is_state(user) for user in self._readers(fqn)):
            return self._buffer(fqn, sizes)
        if fqn not in self.parameters:
            self.parameters[fqn] = tuple(self._axis(fqn, dim, size) for dim, size in enumerate(sizes))
        return Shape(self.parameters[fqn], tuple((fqn, dim) for dim in range(len(sizes))))

    def _axis(self, fqn: str, dim: int, size: int) -> Axis:
        """Free unless the edges differ in size here, as the heads of networks with other classes do."""
        same = all(weights[fqn].shape[dim] == size for weights in self.program.weights if fqn in weights)
        return self.fresh(size) if same else self.opaque(size, "the edges differ in size")

    def _readers(self, fqn: str) -> list[fx.Node]:
        """Every operator that reads a tensor, under whichever node."""
        return [user for node in self._reads[fqn] for user in _uses(node)]

    @cached_property
    def _reads(self) -> dict[str, list[fx.Node]]:
        """The nodes that stand for each tensor."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                found.setdefault(str(node.target), []).append(node)
        return found

    def _buffer(self, fqn: str, sizes: tuple[int, ...]) -> Shape:
        """A constant ties nothing along an axis on which it is uniform (in every edge) and pins every other axis."""
        values = [weights[fqn] for weights in self.program.weights]
        axes = []
        for dim, size in enumerate(sizes):
            uniform = size > 0 and all(
                not v.is_meta and torch.equal(v, v.narrow(dim, 0, 1).expand_as(v)) for v in values
            )
            axes.append(self.fresh(size) if uniform else self.opaque(size, f"buffer {fqn} varies along its axis {dim}"))
        return Shape(tuple(axes))


def _uses(node: fx.Node) -> list[fx.Node]:
    """Operators that read a value, or a copy of it."""
    return [end for user in node.users for end in (_uses(user) if operator_of(user).is_copy else [user])]


def _is_state(reader: fx.Node) -> bool:
    """Whether a buffer read here goes with its module's weights: norm statistics, spectral norm's u and v in u·(Wv)."""
    if _is_matrix_vector(reader):
        return all(operator_of(user).ties == "dot" for user in reader.users)
    if operator_of(reader).ties == "dot":
        return any(map(_is_matrix_vector, reader.all_input_nodes))
    return operator_of(reader).is_norm


def _is_matrix_vector(node: fx.Node) -> bool:
    return operator_of(node).roles.get("weight") == "vec"


def _reachable(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output, or an in-place operator, depends on."""
    used: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op == "output" or node in used or node.is_impure():
            used.add(node)
            used.update(node.all_input_nodes)
    return used
