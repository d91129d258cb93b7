"""The class of every group: what the walk over the graph left of each side, and which operator took the rest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import fx

from vfx.analyse.action import Walk, walked
from vfx.analyse.action.entries import ANY, Ids
from vfx.analyse.action.walk import Handler
from vfx.analyse.classes import Maps, meet
from vfx.analyse.groups import Class, Group, Side
from vfx.analyse.labelling import Labelling
from vfx.analyse.places import Index
from vfx.analyse.slots import FreeScales, Lowering, Product, Slots, Vector, alike, nullspace
from vfx.operators import operator


class Classes(dict[int, Class]):
    """The class of each group and rotation, by index; and the sides on which activations stand.

    With ``special`` handlers for some nodes (``vfx.analyse.action``): what the groups' would be if these did something
    else.
    """

    def __init__(self, labelling: Labelling, special: Mapping[str, Handler] | None = None):
        self._inferred = _Classes(labelling, special)
        super().__init__({group.index: self._inferred.of(group) for group in labelling.groups})

    def slots(self, node: fx.Node, dim: int, group: Group, position: Index) -> tuple[Ids, Ids] | None:
        """The side of each copy (copies,) of a group along an activation's axis, and whether it carries T⁻ᵀ.

        ``position`` (size, copies) is where its channels stand. None where positions apart from this axis differ.
        """
        return self._inferred.standing(node, dim, group, position)

    def on(self, node: fx.Node, dim: int) -> list[int]:
        """The groups, by index, whose channels stand along an activation's axis."""
        return self._inferred.on(node, dim)

    def groups_on(self, node: fx.Node) -> set[int]:
        """The groups whose channels stand anywhere on an activation, as digits of a view too."""
        return self._inferred.groups_on(node)

    def scaled(self, group: Group, given: Mapping[int, float]) -> dict[int, float]:
        """Scales by side where some are given: gains take up the ratio, what makes or reads the feature has no other.

        They obey the equations of the group's products; whether they keep a function is not said.
        """
        return self._inferred.scaled(group, given)


class _Classes:
    def __init__(self, labelling: Labelling, special: Mapping[str, Handler] | None):
        self.walk = walked(labelling.terms, labelling.rows, special)
        self.slots: Slots = self.walk.slots
        self.nodes = {node.name: node for node in labelling.terms.shapes}
        self.buffers = labelling.program.buffers
        self.turned: dict[int, _Members] = {}
        self.order = {name: index for index, name in enumerate(self.nodes)}
        self.leaf_of = labelling.leaf_of
        self.outer = {group.parent for group in labelling.groups}
        self.own: dict[int, list[int]] = {}
        for slot, leaf in enumerate(self.slots.leaf):
            self.own.setdefault(leaf, []).append(slot)
        held = {
            slot for slots_of in self.walk.parameters.values() for slots in slots_of.values() for slot in slots.tolist()
        }
        sides = {self.slots.find(slot)[0] for slot in held}
        sides |= {
            self.slots.find(s)[0] for products in self.slots.products.values() for p in products for s, _ in p.terms
        }
        free = {s for s in range(len(self.slots.leaf)) if self.slots.maps(self.slots.find(s)[0]) is Maps.LINEAR}
        self.idle = {slot for slot in free if self.slots.find(slot)[0] not in sides}  # zeros that nothing is added to

    def of(self, group: Group) -> Class:
        leaf, slots = self.leaf_of[group.index], self.slots
        sides = tuple(dict.fromkeys(slots.find(slot)[0] for slot in self.own[leaf] if slot not in self.idle))
        if group.index in self.outer:
            slots.context = "its channels are the blocks of another group"
            for side in sides:
                slots.lower(side, Maps.PERMUTATION)
        sides = self._joined(leaf, sides)
        members = self.turned[group.index] = _Members(group, leaf, self.walk)
        scales = None if slots.maps(sides[0]).mixes else _turned(slots.solve(leaf, sides), members)
        sides_of = tuple(self._side(side, leaf, scales, members) for side in sides)
        kind = self._kind(sides_of, scales, members)
        running = frozenset(s.index for s in sides_of if any(fqn in self.buffers for fqn, _, _ in s.members))
        why = self._why(kind, sides_of, members)
        return Class(kind, why, sides_of, scales, members.slots, members.features, running)

    def standing(self, node: fx.Node, dim: int, group: Group, position: Index) -> tuple[Ids, Ids] | None:
        entries = self.walk.entries(self.nodes.get(node.name))
        leaf = self.leaf_of[group.index]
        ids = entries.get((leaf, dim), entries.get((leaf, ANY)))
        if ids is None or any(size > 1 for d, size in enumerate(ids.shape) if d != dim):
            return None
        along = np.broadcast_to(ids.reshape(-1), (max(ids.size, int(position.max()) + 1),))
        if (along[position] < 0).any() or (along[position] != along[position[0]]).any():
            return None
        return self.turned[group.index].arrays([self.slots.find(slot) for slot in along[position[0]].tolist()])

    def on(self, node: fx.Node, dim: int) -> list[int]:
        stands = self.walk.stands(self.nodes[node.name])
        return [group for group, leaf in self.leaf_of.items() if stands and leaf in stands[dim]]

    def groups_on(self, node: fx.Node) -> set[int]:
        group_of = {leaf: group for group, leaf in self.leaf_of.items()}
        return {group_of[leaf] for leaf, _ in self.walk.entries(self.nodes.get(node.name)) if leaf in group_of}

    def scaled(self, group: Group, given: Mapping[int, float]) -> dict[int, float]:
        slots, members = self.slots, self.turned[group.index]
        names = {side: -1 - k for k, side in enumerate(given)}  # the first variables stay free
        taking = {side for side in members.of if side not in members.features and side not in given}
        rows: list[Vector] = []
        for product in slots.products.get(self.leaf_of[group.index], ()):
            row: Vector = {}
            for slot, exponent in product.terms:
                side, dual = slots.find(slot)
                name = names.get(side, side)
                row[name] = row.get(name, 0) + (-exponent if dual else exponent)
            rows.append(row)
        still = {side for row in rows for side in row if side >= 0} - taking
        rows += [{side: 1} for side in still]
        solved = nullspace(taking | set(names.values()), rows)
        logs = {names[side]: members.sign(side) * np.log(factor) for side, factor in given.items()}
        result = dict(given)
        for side in taking:
            log = sum(float(c) * logs.get(x, 0.0) for x, c in solved[side].items())
            result[side] = float(np.exp(members.sign(side) * log))
        return result

    def _joined(self, leaf: int, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Sides that nothing but their permutation ties: one map for all where all mix channels, else monomial ones."""
        products = self.slots.products.get(leaf)
        self.slots.context = "its sides share the permutation alone"
        if len(sides) > 1 and not products and all(self.slots.maps(side).mixes for side in sides):
            for side in sides[1:]:
                self.slots.tie(sides[0], side)
            return (self.slots.find(sides[0])[0],)
        for side in sides if len(sides) > 1 or products else ():
            self.slots.lower(side, Maps.MONOMIAL)
        return sides

    def _side(self, side: int, leaf: int, scales: FreeScales | None, members: _Members) -> Side:
        kind = self.slots.maps(side) if scales is None else _free(scales.magnitudes.get(side), scales.signs.get(side))
        lowerings = self._lowered(side)
        lowered = tuple((maps, self._node(node)) for maps, node in lowerings)
        return Side(side, kind, self._reason(side, kind, leaf, lowerings), tuple(members.of.get(side, ())), lowered)

    def _lowered(self, side: int) -> list[Lowering]:
        """In the graph's order."""
        return sorted(self.slots.lowered.get(side, ()), key=lambda x: self.order.get(x.node, len(self.order)))

    def _kind(self, sides: tuple[Side, ...], scales: FreeScales | None, members: _Members) -> Maps:
        """One map on all sides that make or read the feature."""
        if scales is None:
            return sides[0].kind
        features = [side.index for side in sides if side.index in members.features]
        # scales are turned already: sides have the same sign
        return _free(*alike(scales, [(side, 1) for side in features]))

    def _why(self, kind: Maps, sides: tuple[Side, ...], members: _Members) -> str:
        reasons = {side.reason: side.kind for side in sides if side.index in members.features and side.reason}
        return next((why for why, kind_asked in reasons.items() if kind_asked is kind), " ∧ ".join(reasons))

    def _reason(self, side: int, kind: Maps, leaf: int, lowered: list[Lowering]) -> str:
        """The first node behind which no more was left than is left in the end, or the product that took the rest."""
        left = Maps.LINEAR
        for maps, node in lowered if kind is not left else ():
            left = meet(left, maps)
            if left is kind:
                return self._node(node)
        products = self.slots.products.get(leaf, ()) if kind is not Maps.LINEAR else ()
        return next((self._node(product.node) for product in products if self._touches(product, side)), "")

    def _touches(self, product: Product, side: int) -> bool:
        return any(self.slots.find(slot)[0] == side for slot, _ in product.terms)

    def _node(self, name: str) -> str:
        return f"{operator(self.nodes[name])} ({name})" if name in self.nodes else name


class _Members:
    """The sides on which a group's members stand; each is turned so that what makes the feature carries T."""

    def __init__(self, group: Group, leaf: int, walk: Walk):
        sides_at = {
            (m.fqn, m.dim): [walk.slots.find(slot) for slot in walk.parameters[m.fqn, m.dim][leaf].tolist()]
            for m in group.members
        }
        roles = [(m.role, (m.fqn, m.dim)) for m in group.members]
        self._flipped: dict[int, bool] = {}
        for wanted in ("out", "tied", "in", "elementwise"):
            for role, place in roles:
                for side, dual in sides_at[place] if role == wanted else ():
                    self._flipped.setdefault(side, dual ^ (wanted == "in"))
        on_features = {side for role, place in roles if role != "elementwise" for side, _ in sides_at[place]}
        self.features = frozenset(on_features or self._flipped)
        self.slots = {place: self.arrays(pairs) for place, pairs in sides_at.items()}
        self.of: dict[int, dict[tuple[str, int, bool], None]] = {}
        for (fqn, dim), (sides, duals) in self.slots.items():
            for side, flag in set(zip(sides.tolist(), duals.tolist())):
                self.of.setdefault(side, {})[fqn, dim, bool(flag)] = None

    def arrays(self, pairs: list[tuple[int, bool]]) -> tuple[Ids, Ids]:
        """Sides, and whether they carry T⁻ᵀ."""
        sides = [side for side, _ in pairs]
        duals = [dual ^ self._flipped.get(side, False) for side, dual in pairs]
        return np.array(sides, np.int64), np.array(duals, np.int64)

    def sign(self, side: int) -> int:
        """The power of the walk's scale that the turned side has."""
        return -1 if self._flipped.get(side) else 1


def _turned(scales: FreeScales, members: _Members) -> FreeScales:
    """The same with each side's scale as the turned side has it."""
    sign = members.sign
    magnitudes = {s: {x: c * sign(s) * sign(x) for x, c in vector.items()} for s, vector in scales.magnitudes.items()}
    return FreeScales(magnitudes, scales.signs)


def _free(magnitude: Vector | None, sign: Vector | None) -> Maps:
    """The class of a side whose scale and sign depend on these free ones."""
    return Maps((Maps.POSITIVE_MONOMIAL if magnitude else 0) | (Maps.SIGNED if sign else 0))
