"""Runs the rules over a graph: every tensor gets a Shape of axis terms, ties fall out of unification."""

from __future__ import annotations

import operator as python_operator
from functools import cached_property
from typing import Any

import torch
from torch import fx

from vfx.analyse.axis import Axis
from vfx.analyse.named import in_place
from vfx.analyse.parts import keeps_parts
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.routed import kept, read, release
from vfx.analyse.rules import rule_of
from vfx.analyse.shapes import Shape
from vfx.capture.outputs import spelled_tensors
from vfx.operators import arguments, operator_of
from vfx.program import BATCH, Program, Value, is_empty

MODEL_INPUT, MODEL_OUTPUT = "model input", "model output"
EMPTY = "an empty tensor is cut from it, or computed with it"


def infer(program: Program) -> ProgramTerms:
    """The axis terms of a Program, with every tie that the operators' rules ask for."""
    terms = ProgramTerms(program)
    inference = _Inference(terms)
    for node in program.graph.nodes:
        if node in terms.used:
            terms.leaves.context = node.name
            terms.shapes[node] = inference.visit(node)
    return terms


class _Inference:
    """One pass over the graph, node by node; ``terms`` takes what is found."""

    def __init__(self, terms: ProgramTerms):
        self.terms = terms

    def visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return Shape(tuple(self.terms.opaque(size, MODEL_INPUT) for size in self.terms.sizes(node)))
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            values = spelled_tensors(node.args[0])
            for name, value in values.items():
                self._pin_all(self.terms.shapes[value], f"{MODEL_OUTPUT} {name}" if len(values) > 1 else MODEL_OUTPUT)
            return None
        if node.target is python_operator.getitem and is_empty(node):
            return self._refused(node.args[0], EMPTY)[int(node.args[1])]  # type: ignore[arg-type]
        if node.target is python_operator.getitem:
            container = self.terms.shapes[node.args[0]]  # type: ignore[index]
            return container[int(node.args[1])] if isinstance(container, (list, tuple)) else None  # type: ignore[arg-type]
        return self._call(node)

    def _call(self, node: fx.Node) -> Any:
        entry = operator_of(node)
        if entry.is_harmless or not isinstance(node.meta.get("val"), (Value, list)):
            if entry.ties != "sizes":  # a value is read
                release(self.terms, self.terms.operands(node.all_input_nodes))
            return None
        if any(map(is_empty, (node, *node.all_input_nodes))):
            return self._refused(node, EMPTY)
        rule = rule_of(node)
        if rule is not None:
            parts = self._parts(node)
            result = read(self.terms, node)
            if result is None:
                result = rule(self.terms, node, arguments(node))
                result = result if result is None else in_place(self.terms, node, kept(self.terms, node, result))
            if result is not None:
                self._check(node, result)
                return self.terms.parts.carried(node, parts, result) if parts else result
        self.terms.unknown.setdefault(str(node.target), []).append(node.name)
        reason = f"no rule for {node.target}" if rule is None else f"{node.target} is not covered in this form"
        return self._refused(node, reason)

    def _refused(self, node: fx.Node, reason: str) -> Any:
        """Nothing that an operator reads or gives may move."""
        for operand in node.all_input_nodes:
            self._pin_all(self.terms.shapes[operand], reason)
        return self._opaque_result(node.meta["val"], reason)

    def _parts(self, node: fx.Node) -> set[Axis]:
        """The open parts that an operator lets through; all others are closed (a concatenation does so itself)."""
        if not self.terms.parts.held or operator_of(node).ties == "concatenate":
            return set()
        return self.terms.parts.opened(node, self.terms.operands(node.all_input_nodes), keeps_parts(node))

    def _check(self, node: fx.Node, result: Any) -> None:
        """A rule that gets a shape wrong is a bug worth hearing of at once."""
        values = node.meta["val"]
        single = isinstance(values, Value)
        sizes = (
            [self.terms.sizes(node)] if single else [v.sizes(BATCH) if isinstance(v, Value) else None for v in values]
        )
        for size, shape in zip(sizes, [result] if single else result):
            if size is not None and shape is not None and size != shape.sizes:
                raise AssertionError(f"rule for {node.target} gave {shape.sizes}, not {size}")

    def _opaque_result(self, value: Any, reason: str) -> Any:
        if isinstance(value, list):
            return [self._opaque_result(item, reason) for item in value]
        return (
            Shape(tuple(self.terms.opaque(s, reason) for s in value.sizes(BATCH))) if isinstance(value, Value) else None
        )

    def _pin_all(self, shape: Any, reason: str) -> None:
        if isinstance(shape, (list, tuple)):
            for item in shape:
                self._pin_all(item, reason)
        elif isinstance(shape, Shape):
            release(self.terms, [shape])
            for dim in range(len(shape.axes)):
                self.terms.pin_dim(shape, dim, reason)

    def _attribute(self, node: fx.Node) -> Shape:
        fqn = str(node.target)
        sizes = self.terms.sizes(node)
        if fqn in self.terms.program.buffers and not all(_is_state(user) for user in self._readers(fqn)):
            return self._buffer(fqn, sizes)
        if fqn not in self.terms.parameters:
            self.terms.parameters[fqn] = tuple(self._axis(fqn, dim, size) for dim, size in enumerate(sizes))
        return Shape(self.terms.parameters[fqn], tuple((fqn, dim) for dim in range(len(sizes))))

    def _axis(self, fqn: str, dim: int, size: int) -> Axis:
        """Free unless the edges differ in size here, as the heads of networks with other classes do."""
        same = all(weights[fqn].shape[dim] == size for weights in self.terms.program.weights if fqn in weights)
        return self.terms.fresh(size) if same else self.terms.opaque(size, "the edges differ in size")

    def _readers(self, fqn: str) -> list[fx.Node]:
        """Every operator that reads a tensor, under whichever node."""
        return [user for node in self._reads[fqn] for user in _uses(node)]

    @cached_property
    def _reads(self) -> dict[str, list[fx.Node]]:
        """The nodes that stand for each tensor."""
        readers: dict[str, list[fx.Node]] = {}
        for node in self.terms.program.graph.nodes:
            if node.op == "get_attr":
                readers.setdefault(str(node.target), []).append(node)
        return readers

    def _buffer(self, fqn: str, sizes: tuple[int, ...]) -> Shape:
        """A constant ties nothing along an axis on which it is uniform (in every edge) and pins every other axis."""
        values = [weights[fqn] for weights in self.terms.program.weights]
        axes = []
        for dim, size in enumerate(sizes):
            uniform = size > 0 and all(
                not v.is_meta and torch.equal(v, v.narrow(dim, 0, 1).expand_as(v)) for v in values
            )
            axes.append(
                self.terms.fresh(size)
                if uniform
                else self.terms.opaque(size, f"buffer {fqn} varies along its axis {dim}")
            )
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
