"""The activation function behind a layer, found by rule in the graph.

From the layer's output the walk goes through norms, dropout, pools, casts and transpositions to the first elementwise
function that is not affine. It may consist of several operators (x · sigmoid(x), the tanh form of GELU): they must read
the layer's output, parameters and constants alone, and come together again in one value. A layer has no activation of
its own where its output meets an add or another product first (the last layer of a residual branch, attention's
projections), feeds another layer, or leaves the network.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from vfx.analyse.layers import Layer, number_layers
from vfx.analyse.rules import TABLE, elementwise
from vfx.analyse.rules.rule import normal
from vfx.complex_numbers import is_complex
from vfx.operators import DROPOUTS, NORMS, arguments, is_layer, operator
from vfx.program import Program

_POOLS = {f"aten.{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3)}
_PASSED = NORMS | DROPOUTS | _POOLS
_VIEWS = {"aten.view", "aten.reshape", "aten._unsafe_view"}
_AFFINE = {"aten.add", "aten.sub", "aten.rsub", "aten.neg", "aten.mul", "aten.div"}


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
            if operator(user) in _AFFINE and len(_operands(user)) > 1:
                return f"it meets {user.name} before an activation"
        found = _function(node)
        if found is None:
            return "no elementwise function is behind it"
        node, curved = found
        if curved:
            return Activation(node, dim)


def statistics_channels(program: Program, activations: bool = True) -> dict[str, int]:
    """Channel axis of each layer's node and, by default, of each layer's activation; complex ones are left out."""
    layers = [layer for layer in number_layers(program) if not is_complex(program.node(layer.node))]
    channels = {layer.node: layer.channel for layer in layers}
    if activations:
        found = (activation_of(program, layer) for layer in layers)
        channels |= {x.node.name: x.channel for x in found if isinstance(x, Activation) and not is_complex(x.node)}
    return channels


def activation_of(program: Program, layer: Layer) -> Activation | str:
    """``activation_behind`` of a numbered layer."""
    return activation_behind(program.node(layer.node), layer.channel)


def _operands(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if a.op != "get_attr"]


def _moved(user: fx.Node, node: fx.Node, dim: int) -> int | None:
    """The channel axis behind an operator that is walked through, or None."""
    if _operands(user) != [node]:
        return None
    name, a = operator(user), arguments(user)
    if name in _PASSED or _rule(user) is elementwise.same:
        return dim
    rank = len(node.meta["val"].shape)
    if name in _VIEWS:  # GPT-2's layers run on tokens in one row; the last axis is theirs before and after
        before, after = node.meta["val"].shape, user.meta["val"].shape
        return len(after) - 1 if dim == rank - 1 and before[-1] == after[-1] else None
    if name == "aten.permute":
        return [normal(d, rank) for d in a["dims"]].index(dim)
    if name == "aten.transpose":
        pair = [normal(a["dim0"], rank), normal(a["dim1"], rank)]
        return pair[1 - pair.index(dim)] if dim in pair else dim
    return None


def _function(source: fx.Node) -> tuple[fx.Node, bool] | None:
    """Where the elementwise operators behind a value come together first, and whether they are more than affine."""
    inside = {source}
    curved, started = False, False
    for node in source.graph.nodes:
        started |= node is source
        if node is source or not started or not any(a in inside for a in node.all_input_nodes):
            continue
        if not _elementwise(node) or any(a not in inside for a in _operands(node)):
            return None
        inside.add(node)
        curved |= (
            operator(node) not in _AFFINE or sum(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args) > 1
        )
        if all(user in inside for other in inside - {node} for user in other.users):
            return node, curved
    return None


def _elementwise(node: fx.Node) -> bool:
    return operator(node) == "aten.prelu" or _rule(node) in (elementwise.pointwise, elementwise.same)


def _rule(node: fx.Node) -> object:
    found = TABLE.get(operator(node))
    return None if found is None else found.apply
