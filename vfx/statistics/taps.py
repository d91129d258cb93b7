"""Where a group's features are read: the values that feed a conv or linear layer, else those that a layer makes.

That is behind the activation function (Git Re-Basin §3.1; *Vanishing Feature* App. F.2). Pools, dropout, views and
concatenations between the activation and the layer are walked through, so each feature is read once, where it is made.
A residual stream feeds many layers and so has many taps. Queries and keys feed none: they are read where they are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from vfx.analyse.places import Index
from vfx.analyse.rows import unique_rows
from vfx.analyse.symmetry import Symmetry
from vfx.operators import operator_of
from vfx.program import Value

Standing = tuple[int, bool]  # a side, and whether the dual map is carried


@dataclass(frozen=True, eq=False)
class Tap:
    """One axis of one value and the channels that stand on it.

    ``groups`` are the groups that move them (several for a product such as groups × channels), ``digits`` (n, groups)
    the channel of each group at each feature, ``position`` (n, copies) where the feature stands along the axis,
    ``whole`` whether the features are the axis itself, in order. ``sides`` says for each group on which side of it all
    copies stand, and whether they carry the dual map (None where that is not known): queries and keys that stand side
    by side are two taps, ``part`` 0 and 1. ``beside`` are the groups that move the value's other axes, whose positions
    count as samples.
    """

    node: str
    dim: int
    groups: tuple[int, ...]
    digits: Index
    position: Index
    whole: bool
    sides: tuple[Standing | None, ...] = ()
    part: int = 0
    beside: frozenset[int] = frozenset()

    @property
    def size(self) -> int:
        return len(self.digits)

    @property
    def key(self) -> str:
        return f"{self.node}:{self.dim}:{','.join(map(str, self.groups))}:{self.part}"

    def place(self, twin: Mapping[int, int] | None = None) -> tuple[Any, ...]:
        """What a tap at the same place in another network has alike; ``twin`` gives its groups' numbers there."""
        groups = self.groups if twin is None else [twin[group] for group in self.groups]
        return self.node, self.dim, frozenset(groups), self.part


def feature_taps(symmetry: Symmetry) -> list[Tap]:
    """Taps of every group, in graph order."""
    sources: dict[fx.Node, None] = {}
    layers = {node: value for node in symmetry.program.graph.nodes if (value := _applied_to(node)) is not None}
    for value in layers.values():
        # Heads and their channels only stand side by side in front of the layer.
        sources.update(dict.fromkeys([value] if _has_blocks(symmetry, value) else _sources(value, set())))
    taps = [tap for node in sources for tap in _node_taps(symmetry, node)]
    read = {group for tap in taps for group in tap.groups}
    made = [tap for node in layers for tap in _node_taps(symmetry, node)]
    return taps + [tap for tap in made if not set(tap.groups) <= read]


def _applied_to(node: fx.Node) -> fx.Node | None:
    """The activation that a layer applies its weight to; a product with a weight is a layer too (GPT-2's Conv1D)."""
    if operator_of(node).is_layer:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if not operator_of(node).multiplies:
        return None
    factors = [a for a in node.args if isinstance(a, fx.Node)][-2:]
    activations = [a for a in factors if a.op != "get_attr"]
    return activations[0] if len(activations) == 1 < len(factors) else None


def _has_blocks(symmetry: Symmetry, node: fx.Node) -> bool:
    """Whether channels of a group inside blocks are among a value's features."""
    groups = {g for dim in range(_rank(node)) for g in symmetry.positions(node, dim)}
    return any(symmetry.groups[g].parent is not None for g in groups)


def _node_taps(symmetry: Symmetry, node: fx.Node) -> list[Tap]:
    return [tap for dim in range(_rank(node)) for tap in axis_taps(symmetry, node, dim)]


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return len(value.shape) if isinstance(value, Value) else 0


def _sources(node: fx.Node, seen: set[fx.Node]) -> Iterator[fx.Node]:
    """The values behind pools, views and concatenations."""
    if node in seen or node.op != "call_function":
        return
    seen.add(node)
    if operator_of(node).hands_on:
        for argument in node.all_input_nodes:
            yield from _sources(argument, seen)
    else:
        yield node


def axis_taps(symmetry: Symmetry, node: fx.Node, dim: int) -> list[Tap]:
    """The features along one axis, a tap for each set of groups that moves them and each map that they go through."""
    labels = symmetry.labels(node, dim)
    if labels is None:
        return []
    beside = frozenset(g for other in range(_rank(node)) if other != dim for g in symmetry.positions(node, other))
    taps = []
    for groups, digits, position in symmetry.features(labels):
        for part, (positions, sides) in enumerate(_by_side(symmetry, node, dim, groups, position)):
            whole = positions.shape == (len(labels), 1) and bool((positions[:, 0] == np.arange(len(labels))).all())
            taps.append(Tap(node.name, dim, groups, digits, positions, whole, sides, part, beside))
    return taps


def _by_side(
    symmetry: Symmetry, node: fx.Node, dim: int, groups: tuple[int, ...], position: Index
) -> Iterator[tuple[Index, tuple[Standing | None, ...]]]:
    """The copies of features by the sides that they stand on."""
    keys = np.stack([_standing(symmetry, node, dim, index, position) for index in groups], axis=-1)  # (n, copies, k)
    rows, numbers = unique_rows(keys.reshape(-1, len(groups)))
    unsorted = numbers.reshape(position.shape)
    numbers = np.sort(unsorted, axis=1)
    if (numbers != numbers[0]).any():  # copies that differ from feature to feature
        yield position, (None,) * len(groups)
        return
    order = np.argsort(unsorted, axis=1, kind="stable")
    ordered = np.take_along_axis(position, order, axis=1)
    for number in np.unique(numbers[0]).tolist():
        sides = tuple(None if key < 0 else (key // 2, bool(key % 2)) for key in rows[number].tolist())
        yield ordered[:, numbers[0] == number], sides


def _standing(symmetry: Symmetry, node: fx.Node, dim: int, group: int, position: Index) -> Index:
    """2 · side + dual of a group at some positions of an axis, -1 where it is not known."""
    table = symmetry.positions(node, dim)[group]
    slots = symmetry.classes.slots(node, dim, symmetry.groups[group], table)
    along = np.full(int(position.max()) + 1, -1, np.int64)
    if slots is not None:
        sides, duals = slots
        inside = table < len(along)
        along[table[inside]] = np.broadcast_to(2 * sides + duals, table.shape)[inside]
    return along[position]
