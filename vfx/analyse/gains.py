"""The gains of a network: parameters that multiply a value channel by channel, in a norm or behind one.

LayerNorm and RMSNorm carry theirs as arguments; an RMSNorm that is written out (pow, mean, rsqrt, mul), and layer
scale, multiply by a parameter in a node of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from vfx.operators import arguments, is_in_place, operator_of, weight_name
from vfx.program import Program


@dataclass(frozen=True)
class Gain:
    """``node`` multiplies by a parameter ``weight`` (+ ``offset``), along its axis ``dim``; a norm then adds ``bias``.

    ``factor`` is the value that is multiplied by: the parameter, or 1 + the parameter as Gemma writes it.
    """

    node: fx.Node
    weight: str | None
    bias: str | None
    factor: fx.Node | None
    dim: int = 0
    offset: float = 0.0

    @property
    def norm(self) -> bool:
        return operator_of(self.node).is_vector_norm

    @property
    def value(self) -> fx.Node:
        """What is multiplied, where that is a node's own task."""
        return next(x for x in self.node.args if isinstance(x, fx.Node) and x is not self.factor)


def gains(program: Program) -> Iterator[Gain]:
    """Every gain in graph order."""
    for node in program.graph.nodes:
        entry = operator_of(node)
        if entry.is_vector_norm and len(arguments(node)["normalized_shape"]) == 1:
            a = arguments(node)
            weight, bias = weight_name(node), weight_name(node, "bias") if entry.norm == "layer" else None
            if weight is not None or bias is not None:
                yield Gain(node, weight, bias, a["weight"])
        elif entry.name == "aten.mul" and not is_in_place(node):
            yield from _product(program, node)


def _product(program: Program, node: fx.Node) -> Iterator[Gain]:
    """value · parameter, the parameter along one axis of the value."""
    factors = [(x, shifted_parameter(x)) for x in node.args if isinstance(x, fx.Node)]
    trained = [(x, read) for x, read in factors if read is not None and read[0].target not in program.buffers]
    if len(trained) != 1 or len(factors) != 2:
        return
    ((factor, (parameter, offset)),) = trained
    long = [dim for dim, size in enumerate(parameter.meta["val"].shape) if size != 1]
    gain = Gain(node, str(parameter.target), None, factor, long[0] if long else 0, offset)
    if len(long) == 1 and gain.value.meta["val"].shape == node.meta["val"].shape:
        yield gain


def shifted_parameter(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(parameter, c) for a node that is a parameter, or a parameter plus the constant c, casts aside."""
    if node.op == "get_attr":
        return node, 0.0
    entry, first = operator_of(node), node.args[0] if node.args else None
    if entry.is_cast and isinstance(first, fx.Node):
        return shifted_parameter(first)
    if not entry.is_add or is_in_place(node) or len(node.args) != 2 or node.kwargs:
        return None
    numbers = [x for x in node.args if isinstance(x, (int, float))]
    parameters = [shifted_parameter(x) for x in node.args if isinstance(x, fx.Node)]
    if len(numbers) == len(parameters) == 1 and parameters[0] is not None and not parameters[0][1]:
        return parameters[0][0], float(numbers[0])
    return None
