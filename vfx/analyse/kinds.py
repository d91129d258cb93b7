"""The class of every group: what the walk over the graph left of each leaf's sides, and which operators took the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfx.analyse.action import Walk
from vfx.analyse.action.entries import Ids
from vfx.analyse.classes import Maps, meet
from vfx.analyse.slots import Product, Scales, Slots
from vfx.operators import operator

if TYPE_CHECKING:
    from vfx.analyse.symmetry import Group, Symmetry

_FEATURES = ("out", "in", "tied")


@dataclass(frozen=True, eq=False)
class Side:
    """A set of places that carry one map T of a leaf, or T⁻ᵀ: its class and what lowered it, its members.

    ``members`` are (FQN, dim, whether it carries T⁻ᵀ).
    """

    index: int
    kind: Maps
    reason: str
    members: tuple[tuple[str, int, bool], ...]


@dataclass(frozen=True, eq=False)
class Class:
    """The class of a group, what lowered it, and its sides; ``scales`` is what their equations leave free.

    ``slots`` gives for each member (FQN, dim) the side of each copy and whether it carries T⁻ᵀ, both (copies,).
    """

    kind: Maps
    reason: str
    sides: tuple[Side, ...]
    scales: Scales | None
    slots: Mapping[tuple[str, int], tuple[Ids, Ids]]


def classes(symmetry: Symmetry) -> dict[int, Class]:
    """The class of each group, by index."""
    return _Classes(symmetry).found


class _Classes:
    def __init__(self, symmetry: Symmetry):
        self.symmetry = symmetry
        self.walk = Walk(symmetry._inference, symmetry._labels).run()
        self.slots: Slots = self.walk.slots
        self.nodes = {node.name: node for node in symmetry._inference.shapes}
        self.order = {name: index for index, name in enumerate(self.nodes)}
        leaf_of = {group: leaf for leaf, group in symmetry._group_of_leaf.items()}
        sides: dict[int, dict[int, None]] = {}
        for slot, leaf in enumerate(self.slots.leaf):
            sides.setdefault(leaf, {})[self.slots.find(slot)[0]] = None
        outer = {group.parent for group in symmetry.groups}
        self.found = {
            group.index: self._class(group, leaf_of[group.index], tuple(sides.get(leaf_of[group.index], ())), outer)
            for group in symmetry.groups
        }

    def _class(self, group: Group, leaf: int, sides: tuple[int, ...], outer: set[int | None]) -> Class:
        slots = self.slots
        slots.context = ""
        if group.index in outer:
            for side in sides:
                slots.lower(side, Maps.PERMUTATION)
        several = len(sides) > 1 or bool(slots.products.get(leaf))
        for side in sides if several else ():
            slots.lower(side, Maps.MONOMIAL)
        monomial = all(not slots.maps(side).mixes for side in sides)
        scales = slots.solve(leaf, sides) if monomial else None
        members = self._members(group, leaf)
        kinds = {side: self._kind(side, scales) for side in sides}
        found = tuple(
            Side(side, kinds[side], self._reason(side, kinds[side], leaf), members.get(side, ())) for side in sides
        )
        roles = {(m.fqn, m.dim): m.role for m in group.members}
        features = [s for s in found if any(roles.get((f, d)) in _FEATURES for f, d, _ in s.members)] or found
        kind = meet(*(side.kind for side in features))
        reason = next((s.reason for s in features if s.kind is kind), "") or " ∧ ".join(
            dict.fromkeys(s.reason for s in features if s.reason)
        )
        return Class(kind, reason, found, scales, self._slots_of(group, leaf))

    def _kind(self, side: int, scales: Scales | None) -> Maps:
        if scales is None:
            return self.slots.maps(side)
        scaled = Maps.POSITIVE_MONOMIAL if scales.magnitudes.get(side) else Maps.PERMUTATION
        return Maps(scaled | (Maps.SIGNED if scales.signs.get(side) else Maps.PERMUTATION))

    def _members(self, group: Group, leaf: int) -> dict[int, tuple[tuple[str, int, bool], ...]]:
        found: dict[int, dict[tuple[str, int, bool], None]] = {}
        for member in group.members:
            for slot in self.walk.parameters[member.fqn, member.dim][leaf].tolist():
                side, dual = self.slots.find(slot)
                found.setdefault(side, {})[member.fqn, member.dim, dual] = None
        return {side: tuple(own) for side, own in found.items()}

    def _slots_of(self, group: Group, leaf: int) -> dict[tuple[str, int], tuple[Ids, Ids]]:
        import numpy as np

        found = {}
        for member in group.members:
            pairs = [self.slots.find(slot) for slot in self.walk.parameters[member.fqn, member.dim][leaf].tolist()]
            found[member.fqn, member.dim] = (
                np.array([side for side, _ in pairs], np.int64),
                np.array([dual for _, dual in pairs], np.int64),
            )
        return found

    def _reason(self, side: int, kind: Maps, leaf: int) -> str:
        """The first node behind which no more was left than is left in the end, or the product that took the rest."""
        if kind is Maps.LINEAR:
            return ""
        left = Maps.LINEAR
        for maps, node in sorted(self.slots.lowered.get(side, ()), key=lambda x: self.order.get(x.node, -1)):
            left = meet(left, maps)
            if left is kind:
                return self._node(node)
        products = [p for p in self.slots.products.get(leaf, ()) if self._touches(p, side)]
        return self._node(products[0].node) if products else ""

    def _touches(self, product: Product, side: int) -> bool:
        return any(self.slots.find(slot)[0] == side for slot, _ in product.terms)

    def _node(self, name: str) -> str:
        return f"{operator(self.nodes[name])} ({name})" if name in self.nodes else "blocks of another group"
