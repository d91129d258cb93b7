"""FoldNormalization: affines behind a conv or linear layer go into its weight and bias.

y = s · (W x + b) + t = (s W) x + (s b + t), channel by channel. BatchNorm with running statistics is such an affine:
s = γ/√(σ² + ε), t = β − s μ. A layer qualifies if the affine is the only reader of its output, and its weight and bias
are read by nobody else, and if it acts on the layer's channels; what does not qualify stays, with the reason in the
Program's notes. A layer without a bias gets one, and is then no longer of the user's class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from vfx.normalization import affines
from vfx.operators import BATCH_NORMS, LAYERS, LINEARS, TRANSPOSED, arguments, operator, weight_name
from vfx.program import Program, Value, copy_graph
from vfx.rewrite import Pass, require_edges


@dataclass(frozen=True)
class _Foldable:
    """A layer, the nodes that apply an affine to it (in order), and the affine's scale and shift (C,), if it is one."""

    layer: fx.Node
    nodes: tuple[fx.Node, ...]
    scale: Tensor | None
    shift: Tensor | None


class FoldNormalization(Pass):
    """Fold inserted affines, and with ``batch_norm`` every BatchNorm too, into their layers."""

    preserves_function = True

    def __init__(self, batch_norm: bool = False, verify: bool = True):
        self.batch_norm, self.verify = batch_norm, verify

    def requires(self, program: Program) -> None:
        require_edges(program, single=True, name=self.name)

    def apply(self, program: Program) -> Program:
        graph, _ = copy_graph(program.graph)
        weights = dict(program.weights[0])
        working = replace(program, graph=graph)
        notes, count = list(program.notes), 0
        for foldable in [*_inserted(working), *(_batch_norms(working) if self.batch_norm else ())]:
            reason = _refusal(foldable)
            if reason:
                notes.append(f"not folded: {reason}")
                continue
            _fold(graph, foldable, weights)
            count += 1
        graph.eliminate_dead_code()
        graph.lint()
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        gone = set(program.names()) - read
        weights = {name: tensor for name, tensor in weights.items() if name not in gone}
        return replace(program.with_graph(graph, [weights], f"FoldNormalization({count} layers)"), notes=tuple(notes))


def _inserted(program: Program) -> Iterator[_Foldable]:
    weights = program.weights[0]
    for affine in affines(program):
        scale, shift = weights[affine.scale], weights[affine.shift]
        yield _Foldable(affine.layer, (affine.multiply, affine.add), scale.reshape(-1), shift.reshape(-1))


def _batch_norms(program: Program) -> Iterator[_Foldable]:
    weights = program.weights[0]
    for node in program.graph.nodes:
        if operator(node) not in BATCH_NORMS or not isinstance(node.args[0], fx.Node):
            continue
        a = arguments(node)
        if not isinstance(a["running_mean"], fx.Node):  # it normalises with the statistics of its batch
            yield _Foldable(node.args[0], (node,), None, None)
            continue
        mean, var = (weights[str(a[name].target)].double() for name in ("running_mean", "running_var"))
        scale = (var + a["eps"]).rsqrt()
        if isinstance(a["weight"], fx.Node):
            scale = scale * weights[str(a["weight"].target)].double()
        shift = -mean * scale
        if isinstance(a["bias"], fx.Node):
            shift = shift + weights[str(a["bias"].target)].double()
        yield _Foldable(node.args[0], (node,), scale, shift)


def _refusal(foldable: _Foldable) -> str:
    """Why an affine cannot be folded, or nothing."""
    layer, first = foldable.layer, foldable.nodes[0]
    if operator(layer) not in LAYERS:
        return f"{first.name} follows {layer.name}, which is not a conv or linear layer"
    if foldable.scale is None:
        return f"{first.name} has no running statistics"
    if operator(first) in BATCH_NORMS and operator(layer) in LINEARS and len(layer.meta["val"].shape) > 2:
        return f"{first.name} scales another axis than the channels of {layer.name}"
    if len(layer.users) > 1:
        return f"the output of {layer.name} has other readers than {first.name}"
    for name in ("weight", "bias"):
        parameter = arguments(layer)[name]
        if parameter is None:
            continue
        if not isinstance(parameter, fx.Node) or parameter.op != "get_attr":
            return f"the {name} of {layer.name} is computed"
        readers = [u for n in layer.graph.nodes if n.op == "get_attr" and n.target == parameter.target for u in n.users]
        if len(readers) > 1:
            return f"{parameter.target} is used by {', '.join(reader.name for reader in readers)}"
    return ""


def _fold(graph: fx.Graph, foldable: _Foldable, weights: dict[str, Tensor]) -> None:
    layer = foldable.layer
    weight = weight_name(layer)
    assert weight is not None
    tensor = weights[weight]
    assert foldable.scale is not None
    assert foldable.shift is not None
    scale, shift = foldable.scale.double(), foldable.shift.double()
    weights[weight] = _scaled(layer, tensor.double(), scale).to(tensor.dtype)
    bias = weight_name(layer, "bias")
    if bias is None:
        bias = weight.removesuffix("weight") + "bias" if weight.endswith("weight") else weight + "_bias"
        _add_bias(graph, layer, bias, tensor.dtype, len(scale))
        weights[bias] = shift.to(tensor.dtype)
    else:
        weights[bias] = (weights[bias].double() * scale + shift).to(tensor.dtype)
    foldable.nodes[-1].replace_all_uses_with(layer)
    for node in reversed(foldable.nodes):
        graph.erase_node(node)


def _scaled(layer: fx.Node, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight with each output channel scaled; transposed convolutions keep outputs on axis 1, by group."""
    if operator(layer) not in TRANSPOSED:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    groups = int(arguments(layer)["groups"])
    cut = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (cut * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)


def _add_bias(graph: fx.Graph, layer: fx.Node, name: str, dtype: torch.dtype, size: int) -> None:
    with graph.inserting_before(layer):
        node = graph.create_node("get_attr", name)
    node.meta = {"val": Value((size,), dtype)}
    values = arguments(layer)
    values["bias"] = node
    layer.args, layer.kwargs = tuple(values.values()), {}
