"""One view of a layer: its call, its own norm or inserted affine, what it hands on, its activation, its readers.

A layer's *own* BatchNorm stands over the layer's channels and is all that reads its output: then the two are one affine
map, and whatever moves, solves, folds or measures the one has to think of the other. All who ask for it ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from vfx.analyse.activations import Activation, activation_behind
from vfx.analyse.affines import Affine, affines
from vfx.analyse.layers import Layer, number_layers
from vfx.complex_numbers import is_complex
from vfx.operators import arguments, layer_arguments, operator_of, weight_name
from vfx.program import Program, Weights

STATISTICS = ("running_mean", "running_var")
NORM_TENSORS = ("weight", "bias", *STATISTICS)


@dataclass(frozen=True)
class BatchNorm:
    """A call of a BatchNorm; in evaluation y = s (u − m) + β with s = γ/√(v + ε), channel by channel."""

    node: fx.Node

    @cached_property
    def names(self) -> Mapping[str, str]:
        """The FQNs of its tensors by their role: "weight", "bias", "running_mean", "running_var"."""
        name_of = {role: weight_name(self.node, role) for role in NORM_TENSORS}
        return {role: name for role, name in name_of.items() if name is not None}

    @property
    def eps(self) -> float:
        return float(arguments(self.node)["eps"])

    @property
    def is_fixed(self) -> bool:
        """Whether it is an affine map of tensors that it holds, not of statistics of its batch or computed ones."""
        a = arguments(self.node)
        computed = any(isinstance(a[role], fx.Node) and role not in self.names for role in NORM_TENSORS)
        return self.names.keys() >= {*STATISTICS} and not computed and not a.get("training")

    def affine(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) in float64 of a norm that is fixed."""
        mean, variance = (weights[self.names[role]].double() for role in STATISTICS)
        scale = (variance + self.eps).rsqrt()
        if "weight" in self.names:
            scale = scale * weights[self.names["weight"]].double()
        shift = -mean * scale
        return scale, shift + weights[self.names["bias"]].double() if "bias" in self.names else shift


@dataclass(frozen=True)
class LayerView:
    """A numbered layer in its graph; ``node`` is its call, ``inserted`` the affine that normalization put behind it."""

    layer: Layer
    node: fx.Node
    inserted: Affine | None = None

    @property
    def weight(self) -> str | None:
        """FQN of its weight, None where that is computed."""
        return weight_name(self.node)

    @property
    def bias(self) -> str | None:
        return weight_name(self.node, "bias")

    @property
    def readers(self) -> list[fx.Node]:
        """The calls that read its output."""
        return list(self.node.users)

    @property
    def norm(self) -> BatchNorm | None:
        """Its own BatchNorm: over its channels, and nothing else reads its output."""
        first = next(iter(self.node.users), None)
        if first is None or not operator_of(first).is_batch_norm or not_its_own(first, self.node, self.layer.channel):
            return None
        return BatchNorm(first)

    @property
    def is_normalized(self) -> bool:
        """Whether nothing but BatchNorms over its channels reads it."""
        return all(_normalizes(user, self.node, self.layer.channel) for user in self.node.users)

    @property
    def output(self) -> fx.Node:
        """What it hands on together with what folds into it: a BatchNorm that is fixed, or an inserted affine."""
        norm = self.norm
        if norm is not None and norm.is_fixed:
            return norm.node
        return self.node if self.inserted is None else self.inserted.add

    @property
    def activation(self) -> Activation | str:
        """The activation function of its own, or why there is none (``vfx.analyse.activations``)."""
        return activation_behind(self.node, self.layer.channel)


def layer_views(program: Program) -> dict[str, LayerView]:
    """A view of each numbered layer by the name of its node, in execution order."""
    return program.facts.once("layer views", lambda: _views(program, number_layers(program)), program.layers)


def _views(program: Program, layers: Iterable[Layer]) -> dict[str, LayerView]:
    inserted = {affine.layer: affine for affine in affines(program)}
    views = [LayerView(x, program.nodes[x.node], inserted.get(program.nodes[x.node])) for x in layers]
    return {view.layer.node: view for view in views}


def statistics_channels(program: Program, activations: bool = True) -> dict[str, int]:
    """Channel axis of each layer's node and, by default, of each layer's activation; complex ones are left out."""
    views = [view for view in layer_views(program).values() if not is_complex(view.node)]
    channels = {view.node.name: view.layer.channel for view in views}
    if activations:
        views_between = (view.activation for view in views)
        channels |= {
            x.node.name: x.channel for x in views_between if isinstance(x, Activation) and not is_complex(x.node)
        }
    return channels


def batch_norms(program: Program) -> list[fx.Node]:
    """The calls of BatchNorms in the graph's order."""
    return [node for node in program.graph.nodes if operator_of(node).is_batch_norm]


def not_its_own(reader: fx.Node, layer: fx.Node, channel: int) -> str:
    """Why the norm or affine that reads a layer is not the layer's own, "" if it is; ``channel``: the layer's axis."""
    if operator_of(reader).is_batch_norm and not _normalizes(reader, layer, channel):
        return f"{reader.name} scales another axis than the channels of {layer.name}"
    if len(layer.users) > 1:
        return f"the output of {layer.name} has other readers than {reader.name}"
    return ""


def _normalizes(reader: fx.Node, layer: fx.Node, channel: int) -> bool:
    """Whether a BatchNorm stands over a layer's channels; behind a linear layer it may stand over tokens instead."""
    return operator_of(reader).is_batch_norm and reader.args[0] is layer and channel == 1


def not_alone(call: fx.Node, roles: Sequence[str], readers: Mapping[str, Sequence[fx.Node]]) -> str:
    """Why a call's tensors are not its own, "" if they are: one is computed, or read elsewhere too.

    ``readers``: the calls that read each tensor (``vfx.program.readers_of``).
    """
    for role in roles:
        tensor = layer_arguments(call)[role]
        if tensor is None:
            continue
        if not isinstance(tensor, fx.Node) or tensor.op != "get_attr":
            return f"the {role} of {call.name} is computed"
        reading = readers[str(tensor.target)]
        if len(reading) > 1:
            return f"{tensor.target} is used by {', '.join(reader.name for reader in reading)}"
    return ""
