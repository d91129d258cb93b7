"""InsertNormalization: an identity affine behind each conv and linear layer, to be calibrated and folded.

Between layer and norm on LayerNorm networks; behind linear layers on transformers. A layer whose output only feeds a
BatchNorm gets none: its BatchNorm is reset instead (on networks with BatchNorm REPAIR becomes RESET, *REPAIR* §3 and
*Vanishing Feature* §5.3). ``site="activation"`` puts the affines behind the layers' activation functions instead
(post-activation REPAIR, *Rethinking Model Re-Basin*, Table 10), whatever these are (``vfx.analyse.activations``);
layers without one of their own are left out, with a note: those whose output meets an add first, and heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from vfx.analyse.activations import Activation
from vfx.analyse.affines import SCALE, SHIFT, name
from vfx.analyse.layer_view import layer_views
from vfx.analyse.layers import Choice, Join, number_layers
from vfx.arguments import checked
from vfx.complex_numbers import is_complex
from vfx.program import Program, Value, copy_graph
from vfx.rewrite import Pass, PassResult
from vfx.rewrite.nodes import call, parameter


class InsertNormalization(Pass[None]):
    """Insert x · 1 + 0 behind ``layers``: numbers, names or globs; default: all but shortcuts and heads.

    Only layers with goal statistics qualify: preserved branches keep their own.
    """

    needs = (number_layers,)
    weight_sets = "one"
    preserves_function = True

    @checked
    def __init__(self, layers: Choice = None, verify: bool = True, site: Join = "preactivation"):
        self.layers, self.verify, self.site = layers, verify, site

    def apply(self, program: Program) -> PassResult[None]:
        notes: list[str] = []
        chosen = [site for site in self._sites(program, notes) if site.node.name in program.goals]
        graph, _ = copy_graph(program.graph)
        nodes = {node.name: node for node in graph.nodes}
        weights = dict(program.weights[0])
        for site in chosen:
            weights |= _insert(graph, nodes[site.node.name], site.channel, weights)
        note = f"InsertNormalization({len(chosen)} {'layers' if self.site == 'preactivation' else 'activations'})"
        return PassResult(program.with_graph(graph, [weights], note).with_notes(notes))

    def _sites(self, program: Program, notes: list[str]) -> Iterator[Activation]:
        """Where affines belong: a layer's own output, or its activation's."""
        views = layer_views(program)
        for layer in number_layers(program).select(self.layers):
            view = views[layer.node]
            node = view.node
            if is_complex(node):
                notes.append(f"not normalised: {layer.fqn}, whose outputs are complex")
                continue
            if self.site == "preactivation":
                if not view.is_normalized:
                    yield Activation(node, layer.channel)
                continue
            activation = view.activation
            if isinstance(activation, Activation):
                yield activation
            else:
                notes.append(f"not normalised behind its activation: {layer.fqn}, since {activation}")


def _insert(graph: fx.Graph, node: fx.Node, channel: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two nodes behind ``node``, and their parameters: ones and zeros that broadcast along its channel axis."""
    value = node.meta["val"]
    size, after = value.shape[channel], len(value.shape) - 1 - channel
    like = next(iter(weights.values()))
    parameters = {
        name(node.name, SCALE): torch.ones(size, *[1] * after, dtype=value.dtype, device=like.device),
        name(node.name, SHIFT): torch.zeros(size, *[1] * after, dtype=value.dtype, device=like.device),
    }
    users = list(node.users)
    small = Value((size, *[1] * after), value.dtype)
    with graph.inserting_before(node.next):
        scale = parameter(graph, name(node.name, SCALE), small, f"{node.name}_scale")
        multiply = call(graph, torch.ops.aten.mul.Tensor, (node, scale), value, name=f"{node.name}_scaled")
        shift = parameter(graph, name(node.name, SHIFT), small, f"{node.name}_shift")
        add = call(graph, torch.ops.aten.add.Tensor, (multiply, shift), value, name=f"{node.name}_shifted")
    for user in users:
        user.replace_input_with(node, add)
    return parameters
