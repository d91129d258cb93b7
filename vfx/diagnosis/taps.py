"""Where each conv and linear layer of a network is read: at its output and at the activation behind it.

The output is that of the layer together with what folds into it: a BatchNorm with running statistics and the affines
that normalization inserts. So folding changes no measure. The activation is the first that the output reaches through
norms, adds, pools, dropout and views before any other layer (``vfx.analyse.activations``); of several layers that meet
in an add the last one owns it, shortcuts own none. Layers of two networks are the same if they are the same call of
modules of one name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import fx

from vfx.analyse.activations import activations_reached
from vfx.analyse.affines import affines
from vfx.analyse.layer_view import LayerView
from vfx.analyse.layers import Layer, number_layers
from vfx.operators import is_layer, weight_name
from vfx.program import Program

Key = tuple[str, int]  # a module's name and which call of it

_BRANCH = re.compile(r"^branches(_\d+)?\.\d+\.")  # where PFM keeps the edges' own layers


@dataclass(frozen=True)
class LayerTap:
    """One layer: ``output`` with its channel axis, ``activation`` (or None), and the FQN of its weight."""

    layer: Layer
    output: fx.Node
    activation: fx.Node | None
    weight: str | None
    joined: bool = False

    @property
    def feature(self) -> fx.Node:
        """What the layer hands on."""
        return self.activation if self.activation is not None else self.output


def layer_taps(program: Program, like: Mapping[Key, LayerTap] = MappingProxyType({})) -> dict[Key, LayerTap]:
    """The taps of a network's layers in execution order, those of preserved branches included under their own names.

    A merged network also has one where the pre-activations of its last preserved layers are joined. ``like``: the taps
    of its edges, which say what is a shortcut where a branch hides it.
    """
    nodes = program.nodes
    inserted = {affine.layer: affine for affine in affines(program)}
    layer_of = {key: layer for key, layer in _keyed(program, like) if layer.node in nodes}
    places = [(layer, nodes[layer.node]) for layer in layer_of.values()]
    outputs = {layer.node: LayerView(layer, node, inserted.get(node)).output for layer, node in places}
    owners = _owners(places, outputs)
    taps: dict[Key, LayerTap] = {}
    for key, layer in layer_of.items():
        joined = not is_layer(nodes[layer.node])
        weight = None if joined else weight_name(nodes[layer.node])
        taps[key] = LayerTap(layer, outputs[layer.node], owners.get(layer.node), weight, joined)
    return taps


def _keyed(program: Program, like: Mapping[Key, LayerTap]) -> Iterator[tuple[Key, Layer]]:
    calls: Counter[str] = Counter()
    for layer in program.layers or number_layers(program):
        key = (layer.fqn, calls[layer.fqn])
        calls[layer.fqn] += 1
        yield key, replace(layer, shortcut=like[key].layer.shortcut) if key in like else layer


def preserved(taps: Mapping[Key, LayerTap], program: Program) -> set[str]:
    """Names of the layers that a merged network keeps for each edge."""
    inside = {tap.layer.fqn for tap in taps.values()}
    owners = {name.rpartition(".")[0] for name in program.names()}
    return {_BRANCH.sub("", name) for name in inside | owners if _BRANCH.match(name)}


def _owners(places: list[tuple[Layer, fx.Node]], outputs: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    """The activation of each layer that has one of its own."""
    order = {node: index for index, node in enumerate(places[0][1].graph.nodes)} if places else {}
    owner: dict[fx.Node, str] = {}
    for layer, _ in places:
        reached = [] if layer.shortcut else list(activations_reached(outputs[layer.node]))
        if reached:
            owner[min(reached, key=order.__getitem__)] = layer.node
    return {name: node for node, name in owner.items()}
