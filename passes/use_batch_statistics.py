"""UseBatchStatistics: layers normalised by the statistics of the batch at hand (*Vanishing Feature*, App. G.4).

The data-free form of REPAIR, RESCALE and RESET: goals come from statistics recorded while the edges were trained
(``vfx.record``), and instead of being calibrated, the merged network normalises each layer by the mean and deviation of
the batch that it is given. The result depends on the whole batch, needs batches that are large and mixed, and cannot be
folded.

=======  ==============================================
REPAIR   (x − μ_B)/√(σ_B² + ε) · σ̄ + μ̄
RESCALE  x/√(σ_B² + ε) · σ̄
RESET    BatchNorm with μ_B, σ_B for its running values
=======  ==============================================
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx

from vfx.analyse.affines import name
from vfx.analyse.layer_view import layer_views
from vfx.analyse.layers import Choice, Layer, number_layers
from vfx.arguments import checked
from vfx.errors import PassError
from vfx.normalize.batch_norms import merged_norms
from vfx.operators import arguments
from vfx.program import Goal, Program, Value, copy_graph
from vfx.rewrite import Pass, PassResult
from vfx.rewrite.nodes import call, parameter

EPSILON = 1e-5
Kind = Literal["repair", "rescale", "rescale_average", "reset"]
_aten = torch.ops.aten


class UseBatchStatistics(Pass[None]):
    """Normalise ``layers`` (default: all but shortcuts and heads) and every merged BatchNorm by each batch."""

    weight_sets = "one"

    @checked
    def __init__(self, kind: Kind, layers: Choice = None):
        self.kind, self.layers = kind, layers

    def requires(self, program: Program) -> None:
        if self.kind != "reset" and not program.goals and list(_plain_layers(program, self.layers)):
            raise PassError("no goal statistics: record them in training (vfx.record), or give Align data")

    def apply(self, program: Program) -> PassResult[None]:
        graph, _ = copy_graph(program.graph)
        working = replace(program, graph=graph)
        nodes = {node.name: node for node in graph.nodes}
        weights = dict(program.weights[0])
        norms = [node for node, _ in merged_norms(working)]
        count = 0
        if self.kind != "reset":
            for layer in _plain_layers(working, self.layers):
                if layer.node in program.goals:
                    weights |= _normalised(
                        graph, nodes[layer.node], layer.channel, self.kind, program.goals[layer.node]
                    )
                    count += 1
        for node in norms:
            _by_batch(graph, node)
        note = f"UseBatchStatistics({self.kind}, {count + len(norms)} layers)"
        warning = f"{self.kind}: the network normalises by the statistics of each batch; one sample alone has none"
        result = program.rewritten(graph, [weights], note)
        return PassResult(result.with_notes([warning]))


def _plain_layers(program: Program, layers: Choice) -> list[Layer]:
    """The chosen layers that no BatchNorm normalises already."""
    chosen = number_layers(program).select(layers)
    views = layer_views(program)
    return [x for x in chosen if not views[x.node].is_normalized]


def _statistics(graph: fx.Graph, x: fx.Node, channel: int, epsilon: float = EPSILON) -> tuple[fx.Node, fx.Node]:
    """x − μ_B and 1/√(σ_B² + ε), the latter with ones on every axis but the channels'."""
    value = x.meta["val"]
    dims = [d for d in range(len(value.shape)) if d != channel]
    small = Value(tuple(s if d == channel else 1 for d, s in enumerate(value.shape)), value.dtype)
    mean = call(graph, _aten.mean.dim, (x, dims, True), small)
    centred = call(graph, _aten.sub.Tensor, (x, mean), value)
    squared = call(graph, _aten.mul.Tensor, (centred, centred), value)
    variance = call(graph, _aten.mean.dim, (squared, dims, True), small)
    padded = call(graph, _aten.add.Tensor, (variance, epsilon), small)
    return centred, call(graph, _aten.rsqrt.default, (padded,), small)


def _normalised(graph: fx.Graph, node: fx.Node, channel: int, kind: str, goal: Goal) -> dict[str, Tensor]:
    """Put the normalization behind a layer; returns its parameters."""
    value, users = node.meta["val"], list(node.users)
    after = len(value.shape) - 1 - channel
    shape = (value.shape[channel], *[1] * after)
    mean, std = (x[0].to(value.dtype) for x in (goal.mean, goal.std))
    if kind == "rescale_average":
        std = std.mean().expand_as(std)
    parameters = {name(node.name, "goal_std"): std.reshape(shape).clone()}
    small = Value(shape, value.dtype)
    with graph.inserting_before(node.next):
        centred, inverse = _statistics(graph, node, channel)
        wanted = parameter(graph, name(node.name, "goal_std"), small)
        scale = call(graph, _aten.mul.Tensor, (inverse, wanted), inverse.meta["val"])
        result = call(graph, _aten.mul.Tensor, (centred if kind == "repair" else node, scale), value)
        if kind == "repair":
            parameters[name(node.name, "goal_mean")] = mean.reshape(shape).clone()
            offset = parameter(graph, name(node.name, "goal_mean"), small)
            result = call(graph, _aten.add.Tensor, (result, offset), value)
    for user in users:
        user.replace_input_with(node, result)
    return parameters


def _by_batch(graph: fx.Graph, node: fx.Node) -> None:
    """A BatchNorm without running statistics: γ (x − μ_B)/√(σ_B² + ε) + β."""
    a = arguments(node)
    value = node.meta["val"]
    shape = (value.shape[1], *[1] * (len(value.shape) - 2))
    with graph.inserting_before(node):
        centred, inverse = _statistics(graph, a["input"], 1, float(a["eps"]))
        result = call(graph, _aten.mul.Tensor, (centred, inverse), value)
        for key, target in (("weight", _aten.mul.Tensor), ("bias", _aten.add.Tensor)):
            if isinstance(a[key], fx.Node):
                column = call(graph, _aten.view.default, (a[key], list(shape)), Value(shape, value.dtype))
                result = call(graph, target, (result, column), value)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
