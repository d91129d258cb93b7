"""InsertNormalization: an identity affine behind each conv and linear layer, to be calibrated and folded.

Between layer and norm on LayerNorm networks. A layer whose output only feeds a BatchNorm gets none: its BatchNorm is
reset instead (on networks with BatchNorm REPAIR becomes RESET, *REPAIR* §3 and *Vanishing Feature* §5.3).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx

from vfx.analyse.layers import Layer, number_layers
from vfx.normalization import SCALE, SHIFT, name
from vfx.operators import BATCH_NORMS, operator
from vfx.program import Program, copy_graph
from vfx.rewrite import Pass, require_edges


class InsertNormalization(Pass):
    """Insert x · 1 + 0 behind ``layers`` (FQNs; default: every numbered layer but the last, no shortcuts).

    Only layers with goal statistics qualify: preserved branches keep their own.
    """

    preserves_function = True

    def __init__(self, layers: Collection[str] | None = None, verify: bool = True):
        self.layers, self.verify = layers, verify

    def requires(self, program: Program) -> None:
        require_edges(program, single=True, name=self.name)

    def apply(self, program: Program) -> Program:
        chosen = [layer for layer in self._chosen(program) if layer.node in program.goals]
        graph, _ = copy_graph(program.graph)
        nodes = {node.name: node for node in graph.nodes}
        weights = dict(program.weights[0])
        count = 0
        for layer in chosen:
            node = nodes[layer.node]
            if all(operator(user) in BATCH_NORMS for user in node.users):
                continue
            weights |= _insert(graph, node, layer.channel, weights)
            count += 1
        return program.with_graph(graph, [weights], f"InsertNormalization({count} layers)")

    def _chosen(self, program: Program) -> list[Layer]:
        layers = list(number_layers(program))
        if self.layers is not None:
            return [layer for layer in layers if layer.fqn in self.layers]
        last = max((layer.number for layer in program.layers or layers), default=0)
        return [layer for layer in layers if not layer.shortcut and layer.number != last]


def _insert(graph: fx.Graph, node: fx.Node, channel: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two nodes behind ``node``, and their parameters: ones and zeros that broadcast along its channel axis."""
    value = node.meta["val"]
    size, after = value.shape[channel], len(value.shape) - 1 - channel
    like = weights[str(node.args[1].target)] if isinstance(node.args[1], fx.Node) else next(iter(weights.values()))  # type: ignore[union-attr]
    parameters = {
        name(node.name, SCALE): torch.ones(size, *[1] * after, dtype=value.dtype, device=like.device),
        name(node.name, SHIFT): torch.zeros(size, *[1] * after, dtype=value.dtype, device=like.device),
    }
    users = list(node.users)
    with graph.inserting_after(node):
        scale = graph.create_node("get_attr", name(node.name, SCALE), name=f"{node.name}_scale")
    with graph.inserting_after(scale):
        multiply = graph.create_node(
            "call_function", torch.ops.aten.mul.Tensor, (node, scale), name=f"{node.name}_scaled"
        )
    with graph.inserting_after(multiply):
        shift = graph.create_node("get_attr", name(node.name, SHIFT), name=f"{node.name}_shift")
    with graph.inserting_after(shift):
        add = graph.create_node(
            "call_function", torch.ops.aten.add.Tensor, (multiply, shift), name=f"{node.name}_shifted"
        )
    for new in (multiply, add):
        new.meta = {"val": value}
    for user in users:
        user.replace_input_with(node, add)
    return parameters
