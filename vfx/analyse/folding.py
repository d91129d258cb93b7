"""Which parameter axes take up a gain, and why none can.

A gain γ that multiplies a value channel by channel is a side of its own (``vfx.analyse.classes``): the equations of its
group say along which directions the scales of all sides may move together. γ folds along a direction in which its own
scale falls by one power and every other parameter that moves at all rises by one: then f(γ, θ) = f(1, γ θ). Nothing is
divided; as f is continuous in γ, what holds for all γ ≠ 0 holds for zeros too, and the signs obey their own equations.
A gain that is 1 + w counts as free itself: what w is then does not matter, since it goes.

Gains over several copies of channels (patch merging) fold copy by copy, each along a direction of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from torch import fx

from vfx.analyse.action.entries import Entries
from vfx.analyse.action.walk import Walk
from vfx.analyse.classes import Maps
from vfx.analyse.gains import Gain
from vfx.analyse.groups import Class, Group, Member
from vfx.analyse.kinds import Classes
from vfx.analyse.places import Index
from vfx.analyse.scales import restrained
from vfx.analyse.shapes import Shape
from vfx.analyse.slots import Vector
from vfx.analyse.symmetry import Symmetry
from vfx.elements.parts import Part, parts

Direction = Mapping[int, int | Fraction]  # the power of each side


@dataclass(frozen=True, eq=False)
class GainShare:
    """The positions ``where`` of a parameter's axis are multiplied by the gain's entries ``source``, one for one."""

    fqn: str
    dim: int
    where: Index
    source: Index


@dataclass(frozen=True, eq=False)
class _Copy:
    """One copy of a group's channels on a gain: their positions (size,), block, side, and the sign of its scale."""

    position: Index
    block: int
    side: int
    sign: int


class Refused(Exception):
    """Why a gain does not fold."""


class Folding:
    """What takes up each of some gains of a network."""

    def __init__(self, symmetry: Symmetry, gains: Iterable[Gain]):
        self.symmetry = symmetry
        self.moved = {g.factor.name: g for g in gains if g.factor is not None and g.offset}
        self.classes = Classes(symmetry, dict.fromkeys(self.moved, _freed))
        self.parameters = {str(node.target): node for node in symmetry.program.graph.nodes if node.op == "get_attr"}

    def shares(self, gain: Gain) -> list[GainShare]:
        """All that is multiplied by a gain which then goes; raises Refused."""
        size = self.parameters[str(gain.weight)].meta["val"].shape[gain.dim]
        covered, gain_shares, refusals = np.zeros(size, bool), [], []
        for group, member in self._members(gain):
            if covered[member.position].any():
                continue
            try:
                gain_shares += self._shares(gain, group, member)
            except Refused as reason:
                refusals.append((member.position, str(reason)))
            else:
                covered[member.position] = True
        if not covered.all():
            why = [reason for position, reason in refusals if not covered[position].all()]
            raise Refused(why[0] if why else self._pinned(gain))
        return gain_shares

    def _members(self, gain: Gain) -> Iterator[tuple[Group, Member]]:
        """The groups whose channels stand on a gain; those of blocks have no scales of their own."""
        outer = {group.parent for group in self.symmetry.groups}
        for group in self.symmetry.groups:
            for member in group.members if group.index not in outer else ():
                if (member.fqn, member.dim) == (gain.weight, gain.dim):
                    yield group, member

    def _pinned(self, gain: Gain) -> str:
        pins = [p for p in self.symmetry.pinned if p.fqn == gain.weight and p.dim == gain.dim]
        if pins:
            return f"its axis is pinned: {pins[0].reason} (node {pins[0].node})"
        groups = [g for g in self.symmetry.groups for m in g.members if (m.fqn, m.dim) == (gain.weight, gain.dim)]
        return self.classes[groups[0].index].reason if groups else "its channels are not free"

    # one group ------------------------------------------------------------------------------------------------------

    def _shares(self, gain: Gain, group: Group, member: Member) -> list[GainShare]:
        group_class = self.classes[group.index]
        copies = self._copies(gain, group, member)
        if len({(copy.block, copy.side) for copy in copies}) < len(copies):
            raise Refused("it multiplies several copies of its channels that go through one map")
        others = list(self._others(gain, group, group_class))
        taken: list[GainShare] = []
        for copy in copies:
            still = {sibling.side for sibling in copies if sibling.side != copy.side} | self._made(gain, group)
            direction = self._direction(gain, group, group_class, copy, others, still)
            taken += _taken(copy, direction, others)
        return taken

    def _copies(self, gain: Gain, group: Group, member: Member) -> list[_Copy]:
        """Of the factor that is multiplied by, which stands as its parameter does."""
        sides, duals = self._sides(gain.factor, self._axis(gain, gain.factor), group, member.position)
        blocks = self.symmetry.blocks_of(group, member)
        if isinstance(blocks, tuple):
            raise Refused("its blocks stand on another axis")
        rows = zip(member.position.T, blocks.tolist(), sides, duals)
        return [_Copy(position, block, side, -1 if dual else 1) for position, block, side, dual in rows]

    def _axis(self, gain: Gain, node: Any) -> int:
        """Where the gain's axis stands in a value that it is broadcast to."""
        rank = len(self.parameters[str(gain.weight)].meta["val"].shape)
        return gain.dim + len(node.meta["val"].shape) - rank

    def _sides(self, node: Any, dim: int, group: Group, position: Index) -> tuple[list[int], list[int]]:
        slots = self.classes.slots(node, dim, group, position)
        if slots is None:
            raise Refused(f"{node.name} holds its channels in several ways")
        return slots[0].tolist(), slots[1].tolist()

    def _made(self, gain: Gain, group: Group) -> set[int]:
        """Sides of other gains 1 + w: no weight moves them."""
        sides: set[int] = set()
        for moved_gain in self.moved.values():
            members = (
                [m for g, m in self._members(moved_gain) if g is group] if moved_gain.weight != gain.weight else []
            )
            for member in members:
                sides |= set(
                    self._sides(moved_gain.factor, self._axis(moved_gain, moved_gain.factor), group, member.position)[0]
                )
        return sides

    def _others(self, gain: Gain, group: Group, group_class: Class) -> Iterator[tuple[Member, Part]]:
        """All parameters of a group but the gain and its shift."""
        for member in group.members:
            if member.fqn not in (gain.weight, gain.bias):
                for part in parts(self.symmetry, group, member, group_class):
                    yield member, part

    def _direction(
        self,
        gain: Gain,
        group: Group,
        group_class: Class,
        copy: _Copy,
        others: list[tuple[Member, Part]],
        still: set[int],
    ) -> Direction:
        """The direction along which one copy folds; of several that which moves the fewest parameters."""
        if group_class.scales is None or not group_class.scales.magnitudes.get(copy.side):
            raise Refused(self._reason(gain, group, group_class, copy))
        vectors = restrained(group_class.scales.magnitudes, {*group_class.running, *still, *_both(others)})
        free = vectors.get(copy.side, {})
        reasons = (
            []
            if free
            else [_alike(copy, group_class.scales.magnitudes, others) or self._reason(gain, group, group_class, copy)]
        )
        fits: list[Direction] = []
        for x, power in free.items():
            direction = {side: -copy.sign * Fraction(vector.get(x, 0)) / power for side, vector in vectors.items()}
            reason = _unfit(direction, group_class, copy, others)
            if reason:
                reasons.append(reason)
            else:
                fits.append(direction)
        if not fits:
            raise Refused(reasons[0])
        return min(fits, key=lambda direction: sum(_power(direction, part) != 0 for _, part in others))

    def _reason(self, gain: Gain, group: Group, group_class: Class, copy: _Copy) -> str:
        """What holds the value that it makes, or else its own side."""
        sides = {side.index: side for side in group_class.sides}
        dim = self._axis(gain, gain.node)
        position = self.symmetry.positions(gain.node, dim).get(group.index)
        made = None if position is None else self.classes.slots(gain.node, dim, group, position)
        behind = [sides[index] for index in (() if made is None else made[0].tolist()) if index in sides]
        tied = {(m.fqn, m.dim) for m in group.members if m.role == "tied"}
        both = [fqn for side in behind for fqn, dim, _ in side.members if (fqn, dim) in tied]
        if both:
            return f"{both[0]} both writes and reads the feature"
        held = [side.refusal(Maps.MONOMIAL) for side in behind if side.lowered]
        return next((reason for reason in held if reason), sides[copy.side].reason or group_class.reason)


def _freed(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries | None:
    """A factor that could be anything."""
    for operand in node.all_input_nodes:
        w.hold(operand)
    shape = w.shape(node)
    return w.standing(shape, w.slots.fresh) if isinstance(shape, Shape) else None


def _both(others: Iterable[tuple[Member, Part]]) -> set[int]:
    """Sides that hold both what carries a scale and what carries its inverse."""
    duals_of: dict[int, set[bool]] = {}
    for _, part in others:
        duals_of.setdefault(part.side, set()).add(part.dual)
    return {side for side, duals in duals_of.items() if len(duals) > 1}


def _power(direction: Direction, part: Part) -> int | Fraction:
    power = direction.get(part.side, 0)
    return -power if part.dual else power


def _unfit(direction: Direction, group_class: Class, copy: _Copy, others: Iterable[tuple[Member, Part]]) -> str:
    """Why a direction does not take a gain away, or nothing."""
    taken = False
    for member, part in others:
        power = _power(direction, part)
        if power not in (0, 1):
            return f"{member.fqn} scales the same feature"
        if power and part.elsewhere is not None:
            return f"{member.fqn} holds its channels in blocks on another axis"
        taken |= power == 1 and part.block == copy.block
    if not taken:
        return "no layer reads it"
    return "" if _signed(direction, group_class) else "a sign of it is seen alone"


def _signed(direction: Direction, group_class: Class) -> bool:
    """Whether negative gains move along it as well: powers are whole, and their signs obey the equations of signs."""
    assert group_class.scales is not None
    if any(Fraction(power).denominator != 1 for power in direction.values()):
        return False
    for side in group_class.sides:
        expected = sum(c * direction.get(y, 0) for y, c in group_class.scales.signs.get(side.index, {}).items())
        if (expected - direction.get(side.index, 0)) % 2:
            return False
    return True


def _alike(copy: _Copy, vectors: Mapping[int, Vector], others: Iterable[tuple[Member, Part]]) -> str:
    """A parameter that would have to move with the gain, not against it."""
    for member, part in others:
        shared = vectors.get(part.side, {}).keys() & vectors[copy.side].keys()
        if any(
            vectors[part.side][x] * (-1 if part.dual else 1) * vectors[copy.side][x] * copy.sign > 0 for x in shared
        ):
            return f"{member.fqn} scales the same feature"
    return ""


def _taken(copy: _Copy, direction: Direction, others: Iterable[tuple[Member, Part]]) -> Iterator[GainShare]:
    for member, part in others:
        if _power(direction, part) and part.block == copy.block:
            copies = part.position.shape[1]
            yield GainShare(member.fqn, member.dim, part.position.T.reshape(-1), np.tile(copy.position, copies))
