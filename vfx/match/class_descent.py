"""Weight matching over the full symmetry classes.

Both networks are brought to their balanced form (``vfx.analyse.balance``): what is left free between two of them is
compact, a signed permutation or an orthogonal map for each group, so that ⟨W₀, g(W₁)⟩ has a maximum and rises with
every step. The descent is that of weight matching, each group solved by its class (``vfx.match.solve``; *Generalized
Linear Mode Connectivity for Transformers*, Theus et al. 2025, §4). The element found goes back to the first network's
own scales: S₀⁻¹ g S₁. A midpoint does not depend on the common form that two networks are brought to.

Inside the blocks of another group each pair of blocks has the best signs of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.classes import Maps, Matrix
from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.scales import restrained
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Acting, Element, Elements, Permutations, compose, identity, inverse
from vfx.elements.parts import parts, rows_of
from vfx.match import planes
from vfx.match.blocks import BlockGains
from vfx.match.descent import Descent
from vfx.match.isomorphism import isomorphism
from vfx.match.matcher import Gain
from vfx.match.solve import SignedOrders, Signs, assign_signed, assign_signed_pairs, procrustes
from vfx.match.units import GroupUnit, assign_pairs
from vfx.program import Weights

ROUNDED = 1e-5  # of entries, up to which an element counts as the smaller one that is nearest
STILL = 1e-10  # entries of a map that differ from the identity by no more


def compact(symmetry: Symmetry, group: Group, common: bool = False, running: bool = False) -> Maps:
    """What is left of a group's class between two balanced networks; options as of ``sign_vectors``."""
    group_class = symmetry.classes[group.index]
    if group_class.scales is None:
        return group_class.kind if group_class.kind is Maps.ROTATIONS else group_class.kind & Maps.ORTHOGONAL
    return Maps.SIGNED if any(sign_vectors(symmetry, group, common, running).values()) else Maps.PERMUTATION


def sign_vectors(symmetry: Symmetry, group: Group, common: bool = False, running: bool = False) -> dict[int, Signs]:
    """The free signs whose product each side has, those of running statistics being positive unless ``running``.

    With ``common`` only signs that all sides have in common count inside blocks.
    """
    group_class = symmetry.classes[group.index]
    if group_class.scales is None:
        return {}
    still = () if running else group_class.running
    vectors = {side: frozenset(vector) for side, vector in restrained(group_class.scales.signs, still, 2).items()}
    apart = {vectors.get(side.index, frozenset()) for side in group_class.sides if side.members}
    return {} if common and group.parent is not None and len(apart) > 1 else vectors


def solved(group: Group, gains: Gain, kind: Maps) -> tuple[Any, Gain]:
    """The best orders of a group inside blocks, or its maps (n, n, size, size), for each pair of blocks."""
    if kind.mixes:
        return procrustes(gains, kind)
    orders, values = assign_pairs(group, np.abs(gains) if kind is Maps.SIGNED else gains)
    if kind is Maps.PERMUTATION:
        return orders, values
    signs = np.take_along_axis(np.where(gains < 0, -1.0, 1.0), orders[..., None], -1)
    return np.eye(group.size)[orders] * signs, values


def inside(group: Group, found: Any, kind: Maps, vectors: Mapping[int, Signs]) -> Element:
    """The element of a group inside blocks from its orders, or maps, one for each block; its sides' signs given."""
    if isinstance(found, SignedOrders):
        return Element(found.order, scales={side: found.behind(vector) for side, vector in vectors.items() if vector})
    if kind.mixes:
        return Element(matrix=found)
    if kind is Maps.PERMUTATION:
        return Element(found)
    return Element(np.abs(found).argmax(-1), scales={side: found.sum(-1) for side, vector in vectors.items() if vector})


def mixing(symmetry: Symmetry) -> bool:
    """Whether the channels of any group may be mixed."""
    return any(group_class.kind.mixes for group_class in symmetry.classes.values())


def beyond_permutations(symmetry: Symmetry) -> bool:
    """Whether any group takes more than permutations, on any of its sides."""
    return any(side.kind for group_class in symmetry.classes.values() for side in group_class.sides)


def between(symmetry: Symmetry, first: Elements, other: Elements, found: Elements) -> dict[int, Element]:
    """The element that brings the other network to the first as it is, from that between their balanced forms.

    ``first`` and ``other`` are what balances them.
    """
    return compose(symmetry, compose(symmetry, other, found), inverse(symmetry, first))


def in_matrices(symmetry: Symmetry, elements: Elements) -> dict[int, Element]:
    """The same with a matrix for every group whose class mixes channels, where it only permutes them too."""
    mixing_elements = dict(elements)
    for index, element in elements.items():
        group, its_class = symmetry.group(index), symmetry.classes[index]
        if its_class.scales is None and its_class.kind.mixes and element.index is not None:
            order = np.eye(group.size)[element.index]
            mixing_elements[index] = Element(matrix=order if element.matrix is None else element.matrix @ order)
    return mixing_elements


def settled(symmetry: Symmetry, element: Elements) -> dict[int, Element]:
    """An element of every group, without what rounding has left in it."""
    elements = {index: snapped(given) for index, given in element.items()}
    still = identity(symmetry)
    for index, member in elements.items():
        if member.index is not None or index not in still:
            still[index] = member
        else:
            still[index] = replace(member, index=still[index].index)
    return still


def snapped(element: Element) -> Element:
    """An element without what differs from one by rounding: scales of one, matrices that only permute."""
    neutral = all(np.abs(scale - 1).max() <= ROUNDED for scale in element.scales.values())
    scales = {} if neutral else element.scales
    matrix = element.matrix
    if matrix is None or (element.index is not None and not _in_order(element.index)):
        return replace(element, scales=scales)
    permutation = np.abs(matrix).argmax(-1)
    nearest = np.eye(matrix.shape[-1])[permutation]
    if np.abs(matrix - nearest).max() > ROUNDED or (np.sort(permutation, -1) != np.arange(matrix.shape[-1])).any():
        return replace(element, scales=scales)
    return Element(permutation, None, scales)


class ClassDescent(Descent):
    """A coordinate descent over the compact part of every group's class; both networks balanced.

    ``frame`` is what balances the other network where that is not done yet. ``running``: sides on which a running
    statistic stands have signs, too.
    """

    def __init__(
        self, symmetry: Symmetry, target: Weights, other: Weights, frame: Elements | None = None,
        heads: frozenset[str] = frozenset(), running: bool = False,
    ):  # fmt: skip
        self.frame = frame or {}
        self.kinds = {group.index: compact(symmetry, group, running=running) for group in symmetry.moving}
        self.signs = {group.index: sign_vectors(symmetry, group, running=running) for group in symmetry.moving}
        if any(kind.mixes for kind in self.kinds.values()):
            self.dtype = torch.float64
        beyond = {i for i, element in self.frame.items() if element.matrix is not None or element.scales}
        beyond |= {i for i, kind in self.kinds.items() if kind.mixes} | {group.index for group in symmetry.rotations}
        moving = (*symmetry.moving, *symmetry.rotations)
        self._rounded = {m.fqn for group in moving if group.index in beyond for m in group.members}
        super().__init__(symmetry, target, other, heads)
        self.units += [GroupUnit(group) for group in symmetry.rotations if group.parent is None]

    def _held_in(self, name: str, tensor: Tensor) -> torch.dtype:
        """What is only put into another order, or turned round, is exact in its own precision."""
        single = tensor.dtype == torch.float32 and name not in self._rounded
        return torch.float32 if single else self.dtype

    def _groups(self) -> tuple[Group, ...]:
        return (*self.symmetry.groups, *(group for group in self.symmetry.rotations if group.parent is None))

    def permuted(self, permutations: Permutations) -> dict[int, Element]:
        """The element of permutations, those of groups whose channels are mixed left out."""
        return {index: Element(order) for index, order in permutations.items() if not self.kinds[index].mixes}

    def solve(self, group: Group, gains: Any) -> tuple[Any, Gain]:  # type: ignore[override]
        """Orders, or maps, of each pair of blocks."""
        return (
            solved(group, gains, self.kinds[group.index])
            if isinstance(gains, np.ndarray)
            else assign_signed_pairs(gains)
        )

    def _as_asked(self, group: Group, gains: Mapping[Signs, Gain]) -> Any:
        return gains if self.kinds[group.index] is Maps.SIGNED else super()._as_asked(group, gains)

    @cached_property
    def _block_gains(self) -> BlockGains:
        signed = [g for g in self.symmetry.groups if g.parent is not None and self.kinds.get(g.index) is Maps.SIGNED]
        return BlockGains(self.symmetry, {g.index: self.signs[g.index] for g in signed})

    def _best(self, group: Group, settled: set[int] | None) -> dict[int, Any]:
        kind = self.kinds[group.index]
        if not kind.mixes and (kind is Maps.PERMUTATION or (settled is not None and self._shares(group, settled))):
            return {index: Element(order) for index, order in super()._best(group, settled).items()}
        gains = self._gains_by_sign(group, settled)
        if kind.mixes:
            return {group.index: Element(matrix=procrustes(sum(gains.values(), np.zeros(1)), kind)[0])}
        permutation, signs = assign_signed(gains)
        return {group.index: Element(permutation, scales=self._signs_of_sides(group, signs))}

    def _shares(self, group: Group, settled: set[int]) -> bool:
        """Whether the first sweep needs another group's best order for each pair of channels."""
        members = [m for m in group.members if m.fqn in self.target]
        settles = any(self.groups_of[m.fqn] - {group.index} <= settled for m in members)
        return not settles and any(
            self.groups_of[m.fqn] - {group.index} - settled == self._sharing(group, m) for m in members
        )

    def _gains_by_sign(self, group: Group, settled: set[int] | None) -> dict[Signs, Gain]:
        """⟨W₀, W₁⟩ between channels, apart for parts that carry different signs."""
        members = [m for m in group.members if m.fqn in self.target]
        if settled is not None:
            members = [m for m in members if self.groups_of[m.fqn] - {group.index} <= settled] or members
            settled.add(group.index)
        vectors = self.signs[group.index]
        gains: dict[Signs, Gain] = {}
        for member in members:
            pair = self.target[member.fqn], self.current[member.fqn]
            for part in parts(self.symmetry, group, member):
                first, second = (rows_of(tensor, member.dim, part, tensor.dtype) for tensor in pair)
                key = vectors.get(part.side, frozenset())
                gains[key] = gains.get(key, 0.0) + (first @ second.T).double().numpy()
        return gains or {frozenset(): np.zeros((group.size, group.size))}

    def _signs_of_sides(self, group: Group, signs: Mapping[int, Matrix]) -> dict[int, Matrix]:
        vectors = self.signs[group.index]
        ones = np.ones(group.size)
        return {
            side: np.prod([signs.get(x, ones) for x in vector], axis=0) for side, vector in vectors.items() if vector
        }

    def _best_in_blocks(self, unit: GroupUnit, names: set[str], settled: set[int] | None, sweep: int) -> dict[int, Any]:
        if settled is not None:
            names = self._known(unit, names, settled)
        orders = super()._best_in_blocks(unit, names, settled, sweep)
        result = {index: Element(order) for index, order in orders.items()}
        result |= {g.index: inside(g, orders[g.index], self.kinds[g.index], self.signs[g.index]) for g in unit.inner}
        blocks = orders[unit.outer.index]
        for index, numbers in self._planes(unit, names).items():
            result[index] = planes.turned(numbers[np.arange(len(blocks)), blocks])
        return result

    def _in_blocks(self, unit: GroupUnit) -> bool:
        return super()._in_blocks(unit) or any(g.parent == unit.outer.index for g in self.symmetry.rotations)

    def _exact(self, unit: GroupUnit) -> bool:
        """Turned planes stand in parts of their own beside those that are matched."""
        return not any(g.parent == unit.outer.index for g in self.symmetry.rotations)

    def _beside(self, unit: GroupUnit, names: set[str]) -> Gain | float:
        """What the best turns of rotary planes add."""
        return sum((planes.at_best(numbers) for numbers in self._planes(unit, names).values()), 0.0)

    def _planes(self, unit: GroupUnit, names: set[str]) -> dict[int, planes.Numbers]:
        """The products of rotary planes inside a unit's blocks, where all that they stand on counts."""
        inside = [g for g in self.symmetry.rotations if g.parent == unit.outer.index]
        chosen = [g for g in inside if {m.fqn for m in g.members} <= names]
        return {g.index: planes.products(self.symmetry, g, self.target, self.current) for g in chosen}

    # elements -------------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[int, Any]:
        return {}

    def _still(self, relative: dict[int, Any]) -> bool:
        return all(_is_identity(element) for element in relative.values())

    def _placed(self, element: dict[int, Any]) -> Callable[[str, Tensor], Tensor]:
        frame, moved = self._action(dict(self.frame)), self._action(element)
        return lambda name, tensor: moved(name, frame(name, tensor))

    def _action(self, relative: dict[int, Any]) -> Acting:
        return Acting(self.symmetry, relative)

    def nearest_maps(self) -> dict[int, Any]:
        return dict(isomorphism(self.symmetry, self.target, self.current))

    def _disorder(self, permutations: Permutations, generator: np.random.Generator) -> dict[int, Any]:
        drawn = self.permuted(permutations)
        for index, element in drawn.items():
            group = self.symmetry.groups[index]
            shape = (group.size,) if group.parent is None else group.blocks
            free = sorted(set().union(*self.signs[index].values()))
            signs = {x: generator.choice((-1.0, 1.0), shape) for x in free}
            drawn[index] = replace(element, scales=self._signs_of_sides(group, signs))
        return drawn

    def _compose(self, relative: dict[int, Any]) -> None:
        self.element = compose(self.symmetry, self.element, relative)


def _is_identity(element: Element) -> bool:
    if element.index is not None and not _in_order(element.index):
        return False
    if element.matrix is not None and np.abs(element.matrix - np.eye(element.matrix.shape[-1])).max() > STILL:
        return False
    return all((scale == 1).all() for scale in element.scales.values())


def _in_order(permutation: Index) -> bool:
    return bool((permutation == np.arange(permutation.shape[-1])).all())
