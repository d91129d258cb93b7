"""The axis terms of every value in a Program's graph: what rules read, and what they note."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from vfx.analyse.axis import Axis
from vfx.analyse.meaning import NUMBERS, Meaning
from vfx.analyse.parts import Parts
from vfx.analyse.shapes import Algebra, Shape
from vfx.program import BATCH, Program, Value

OUT, IN, ELEMENTWISE = "out", "in", "elementwise"


class ProgramTerms(Algebra):
    """Axis terms of every value in a Program's graph.

    ``shapes`` holds them by node (for the nodes that are ``used``), ``parameters`` the axes of each parameter by FQN,
    ``roles`` what each rule said of a parameter's axis, ``unknown`` the operators without a rule (their axes are
    pinned), ``numbered`` the axes whose positions are read, ``namings`` an axis with the parts that name its positions
    (``vfx.analyse.named``), by what tells one naming from another.
    """

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        self.parts = Parts(self)
        self.shapes: dict[fx.Node, Any] = {}
        self.parameters: dict[str, tuple[Axis, ...]] = {}
        self.roles: list[tuple[str, int, Axis, str]] = []
        self.numbered: list[Axis] = []
        self.namings: dict[tuple[object, ...], tuple[Axis, range]] = {}
        self.unknown: dict[str, list[str]] = {}
        self._sizes: dict[fx.Node, tuple[int, ...]] = {}
        self.used = _reachable(program.graph)

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
            fqn, place = source
            self.roles.append((fqn, place, axis or self.parameters[fqn][place], role))

    def numbers(self, shape: Shape, axis: Axis) -> Shape:
        """A tensor whose values are positions along an axis."""
        if axis.opaque:
            return shape
        self.numbered.append(axis)
        return replace(shape, meaning=Meaning(NUMBERS, axis, object()))

    def naming(self, axis: Axis, key: tuple[object, ...], count: int) -> range:
        """The parts, as many as ``count``, by which positions name those of an axis; the same for the same key."""
        if key not in self.namings:
            used = sum(len(parts) for _, parts in self.namings.values())
            self.namings[key] = axis, range(-2 - used, -2 - used - count, -1)  # -1 is no leaf
        return self.namings[key][1]

    def pin_dim(self, shape: Shape, dim: int, reason: str) -> None:
        self.pin(self.axis(shape, dim), reason)

    def constant(self, node: Any) -> Tensor | None:
        """The values of a buffer or constant, which no pass changes."""
        if isinstance(node, fx.Node) and node.op == "get_attr" and node.target in self.program.buffers:
            value = self.program.weights[0][str(node.target)]
            return None if value.is_meta else value
        return None


def _reachable(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output, or an in-place operator, depends on."""
    used: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op == "output" or node in used or node.is_impure():
            used.add(node)
            used.update(node.all_input_nodes)
    return used
