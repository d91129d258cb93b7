"""The activation function behind a layer, found by rule in the graph.

From the layer's output the walk goes through norms, dropout, pools, casts and transpositions to the first elementwise
function that is not affine. It may consist of several operators (x · sigmoid(x), the tanh form of GELU): they must read
the layer's output, parameters and constants alone, and come together again in one value. A layer has no activation of
its own where its output meets an add or another product first (the last layer of a residual branch, attention's
projections), feeds another layer, or leaves the network. ``activations_reached`` asks for less: it goes on through
sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from vfx.analyse.rules.rule import normal
from vfx.operators import Operator, arguments, is_layer, operator_of
from vfx.program import Value

# kinds of ties: views and turns of one value, and what changes nothing but bits
_TURNS = {"view", "permute", "transpose", "reverse axes", "transpose matrices", "unsqueeze", "squeeze"}
_UNBENT = {"same", "fill"}


@dataclass(frozen=True)
class Activation:
    """The node of an activation's output and the axis of the layer's channels in it."""

    node: fx.Node
    channel: int


def activation_behind(layer: fx.Node, channel: int) -> Activation | str:
    """The activation behind a layer's node, or why there is none."""
    node, dim = layer, channel
    while True:
        if len(node.users) == 1:
            user = next(iter(node.users))
            if user.op == "output":
                return "its output leaves the network"
            if is_layer(user):
                return f"{user.name} reads it without an activation"
            moved = _moved(user, node, dim)
            if moved is not None:
                node, dim = user, moved
                continue
            if operator_of(user).is_affine and len(_operands(user)) > 1:
                return f"it meets {user.name} before an activation"
        function = _function(node)
        if function is None:
            return "no elementwise function is behind it"
        node = function.node
        if function.curved:
            return Activation(node, dim)


def activations_reached(value: fx.Node) -> Iterator[fx.Node]:
    """Where the activation functions end that a value reaches before any other layer, through sums with others too."""
    seen, stack = {value}, [value]
    while stack:
        node = stack.pop()
        function = _function(node) or _function(node, alone=False)
        if function is not None and function.curved:
            yield function.node
            seen |= function.inside
        for user in node.users:
            if user not in seen and _goes_through(user):
                stack.append(user)
            seen.add(user)


def _goes_through(node: fx.Node) -> bool:
    """Whether features go on through a node: sums and maps of one value, not products of two."""
    entry = operator_of(node)
    if _is_passed(entry) or entry.ties in _TURNS or entry.averages or entry.is_add:
        return True
    return entry.is_affine and len(_operands(node)) == 1


def _is_passed(entry: Operator) -> bool:
    """Whether features leave an operator on the axis on which they came."""
    return entry.is_norm or entry.is_pool or entry.ties == "same"


def _operands(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if a.op != "get_attr"]


def _moved(user: fx.Node, node: fx.Node, dim: int) -> int | None:
    """The channel axis behind an operator that is walked through, or None."""
    if _operands(user) != [node]:
        return None
    entry, a = operator_of(user), arguments(user)
    if _is_passed(entry):
        return dim
    rank = len(node.meta["val"].shape)
    if entry.is_reshape:  # GPT-2's layers run on tokens in one row; the last axis is theirs before and after
        before, after = node.meta["val"].shape, user.meta["val"].shape
        return len(after) - 1 if dim == rank - 1 and before[-1] == after[-1] else None
    if entry.ties == "permute":
        return [normal(d, rank) for d in a["dims"]].index(dim)
    if entry.ties == "transpose":
        pair = [normal(a["dim0"], rank), normal(a["dim1"], rank)]
        return pair[1 - pair.index(dim)] if dim in pair else dim
    return None


@dataclass(frozen=True)
class _Function:
    """An elementwise function: where it ends, whether it is more than affine, and the operators that it is made of."""

    node: fx.Node
    curved: bool
    inside: frozenset[fx.Node]


def _function(source: fx.Node, alone: bool = True) -> _Function | None:
    """The function behind a value: it ends where operators on the value alone come together.

    That is the first place behind which the value is bent, and what goes on from there by itself without parameters
    (the division of x · relu6(x + 3) / 6). With ``alone`` nothing else may read the value.
    """
    inside = {source}
    for node in _behind(source):
        if _elementwise(node) and _like(node, source) and inside.issuperset(_operands(node)):
            inside.add(node)
    seen, curved = {source}, False
    curve: _Function | None = None
    for node in (n for n in _behind(source) if n in inside):
        if curve is not None and curve.curved and (not inside.issuperset(curve.node.users) or _scaled(node)):
            break
        seen.add(node)
        curved |= _bends(node)
        ends = seen - {node} if alone else seen - {node, source}
        if _is_value(node) and all(user in seen for end in ends for user in end.users):
            curve = _Function(node, curved, frozenset(seen - {source}))
    return curve


def _behind(source: fx.Node) -> Iterator[fx.Node]:
    """The calls behind a value in the graph's order."""
    started = False
    for node in source.graph.nodes:
        if started and node.op == "call_function" and _operands(node):
            yield node
        started |= node is source


def _like(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value has an entry for each of another's; a gated linear unit has one for each pair."""
    value, origin = (x.meta["val"] for x in (node, source))
    shapes = [getattr(x, "shape", None) for x in (value, origin)]
    return operator_of(node).ties == "gated linear" or (isinstance(value, Value) and shapes[0] == shapes[1])


def _bends(node: fx.Node) -> bool:
    if operator_of(node).ties in _UNBENT:
        return False
    computed = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    return not operator_of(node).is_affine or len(computed) > 1


def _scaled(node: fx.Node) -> bool:
    """Whether an operator reads a tensor of several numbers beside values (a gain, as LayerScale has one)."""
    shapes = (getattr(a.meta.get("val"), "shape", (1,)) for a in node.all_input_nodes if a.op == "get_attr")
    return any(shapes)


def _is_value(node: fx.Node) -> bool:
    """Whether a node computes numbers from what it reads."""
    return node.meta["val"].dtype != torch.bool and operator_of(node).ties not in _UNBENT


def _elementwise(node: fx.Node) -> bool:
    return operator_of(node).ties in _UNBENT | {"elementwise", "gated linear", "prelu"}
