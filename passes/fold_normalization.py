"""FoldNormalization: affines behind a conv or linear layer go into its weight and bias.

y = s · (W x + b) + t = (s W) x + (s b + t), channel by channel. BatchNorm with running statistics is such an affine:
s = γ/√(σ² + ε), t = β − s μ. A layer qualifies if the affine is the only reader of its output, and its weight and bias
are read by nobody else, and if it acts on the layer's channels; what does not qualify stays, with the reason in the
Program's notes. A layer without a bias gets one, and is then no longer of the user's class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, fx

from vfx.analyse.affines import Affine, affines
from vfx.analyse.layer_view import BatchNorm, batch_norms, not_alone, not_its_own
from vfx.analyse.layers import channel_axis
from vfx.arguments import checked
from vfx.operators import (
    arguments,
    is_layer,
    operator_of,
    output_axis,
    weight_name,
)
from vfx.program import Program, Weights, copy_graph, readers_of
from vfx.rewrite import Pass, PassResult
from vfx.rewrite.biases import add_bias


@dataclass(frozen=True)
class _Foldable:
    """A layer, the nodes that apply an affine to it (in order), and the affine's scale and shift (C,) in a weight set,
    if it is one."""

    layer: fx.Node
    nodes: tuple[fx.Node, ...]
    affine: Callable[[Weights], tuple[Tensor, Tensor]] | None


class FoldNormalization(Pass[None]):
    """Fold inserted affines, and with ``batch_norm`` every BatchNorm too, into their layers, in every weight set."""

    preserves_function = True

    @checked
    def __init__(self, batch_norm: bool = False, verify: bool = True):
        self.batch_norm, self.verify = batch_norm, verify
        # what a layer gives is then what its BatchNorm gave; an inserted affine brings it to its goal
        self.weight_sets, self.changes_values = ("any", True) if batch_norm else ("one", False)

    def apply(self, program: Program) -> PassResult[None]:
        graph, _ = copy_graph(program.graph)
        sets = [dict(weights) for weights in program.weights]
        working = replace(program, graph=graph)
        notes, count = list[str](), 0
        for foldable in [*_inserted(working), *(_batch_norms(working) if self.batch_norm else ())]:
            reason = _refusal(foldable)
            if reason:
                notes.append(f"not folded: {reason}")
                continue
            _fold(graph, foldable, sets)
            count += 1
        result = program.rewritten(graph, sets, f"FoldNormalization({count} layers)")
        return PassResult(result.with_notes(notes))


def _inserted(program: Program) -> Iterator[_Foldable]:
    for affine in affines(program):

        def values(weights: Weights, affine: Affine = affine) -> tuple[Tensor, Tensor]:
            return weights[affine.scale].reshape(-1), weights[affine.shift].reshape(-1)

        yield _Foldable(affine.layer, (affine.multiply, affine.add), values)


def _batch_norms(program: Program) -> Iterator[_Foldable]:
    for node in batch_norms(program):
        norm = BatchNorm(node)
        if isinstance(node.args[0], fx.Node):
            yield _Foldable(node.args[0], (node,), norm.affine if norm.is_fixed else None)


def _refusal(foldable: _Foldable) -> str:
    """Why an affine cannot be folded, or nothing."""
    layer, first = foldable.layer, foldable.nodes[0]
    if not is_layer(layer):
        return f"{first.name} follows {layer.name}, which is not a conv or linear layer"
    if foldable.affine is None:
        return f"{first.name} has no running statistics"
    apart = not_its_own(first, layer, channel_axis(layer))
    return apart or not_alone(layer, ("weight", "bias"), readers_of(layer.graph))


def _fold(graph: fx.Graph, foldable: _Foldable, sets: list[dict[str, Tensor]]) -> None:
    layer, weight, bias = foldable.layer, weight_name(foldable.layer), weight_name(foldable.layer, "bias")
    assert weight is not None
    assert foldable.affine is not None
    shifts = []
    for weights in sets:
        tensor = weights[weight]
        scale, shift = (value.double() for value in foldable.affine(weights))
        weights[weight] = _scaled(layer, tensor.double(), scale).to(tensor.dtype)
        shifts.append(shift if bias is None else weights[bias].double() * scale + shift)
    if bias is None:
        layer = add_bias(graph, layer, sets, shifts)
    else:
        for weights, shift in zip(sets, shifts):
            weights[bias] = shift.to(weights[weight].dtype)
    foldable.nodes[-1].replace_all_uses_with(layer)
    for node in reversed(foldable.nodes):
        graph.erase_node(node)


def _scaled(layer: fx.Node, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight with each output channel scaled; transposed convolutions keep outputs on axis 1, by group."""
    if not operator_of(layer).is_transposed:
        return weight * scale.reshape([-1 if dim == output_axis(layer) else 1 for dim in range(weight.ndim)])
    groups = int(arguments(layer)["groups"])
    cut = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (cut * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
