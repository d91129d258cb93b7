"""Slots: the places of a group's channels, and which of them can only be kept together.

The channels of a free group are alike, so any of them can be brought to any of the group's places by a permutation that
changes nothing. Removing channels is then removing *slots* (a leaf's elements), and what remains of each tensor must be
a box: a set of positions on one axis times a set of positions on another. Where a view stands for several groups at
once (packed q, k and v seen as (3, heads, dim); a channel shuffle), that ties slots: on each axis of the view, all
slots that stand at one position are kept or removed together. Connected components of these ties are the units of
removal. Components that hold as many slots of each group are alike; all that are make up a ``Bundle``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vfx.analyse.places import Index
from vfx.analyse.rows import count_rows, distinct
from vfx.analyse.shapes import Block, Digit, Shape
from vfx.analyse.symmetry import Symmetry
from vfx.errors import PassError
from vfx.resize.bundle import Bundle
from vfx.resize.implied import implied_blocks, whole_axes
from vfx.resize.least import least_units
from vfx.resize.roles import positions


class RemovalUnits:
    """The units of removal of a network: ``bundles``, in the order of the groups they hold.

    With ``experts`` positions that a router names (``facts.terms.numbered``) may go, too.
    """

    def __init__(self, facts: Symmetry, experts: bool = False):
        self.facts, self.experts = facts, experts
        self.leaves = facts.leaves
        self.leaf_of_group = facts.leaf_of
        self.bundles = self._bundles()

    def elements(self, group: int) -> Index:
        """The slots of one group, as element ids in order."""
        return self.leaves.elements(self.leaf_of_group[group])

    @cached_property
    def least(self) -> list[int]:
        """The fewest units of each bundle with which every operator is defined."""
        return least_units(self.facts, self.bundles, self.multiplicity)

    @cached_property
    def positions(self) -> Mapping[int, str]:
        """The groups that are positions, not channels, with a layer that carries them along."""
        return positions(self.facts)

    @property
    def count(self) -> int:
        """Number of element ids in use."""
        return self.leaves.count

    # ties -----------------------------------------------------------------------------------------------------------

    def _bundles(self) -> tuple[Bundle, ...]:
        stuck = self.count  # one more node: what cannot go
        pairs: list[NDArray[np.int64]] = [np.zeros((0, 2), np.int64)]
        for block in (*_blocks(self.facts.terms.shapes.values()), *implied_blocks(self.facts)):
            pairs += self._ties(block, stuck)
        for rows in whole_axes(self.facts, not self.experts):
            elements = np.unique(rows[:, 1:])
            pairs.append(np.stack([elements[elements >= 0], np.full((elements >= 0).sum(), stuck)], axis=1))
        edges = np.concatenate(pairs)
        matrix = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(stuck + 1, stuck + 1))
        component = connected_components(matrix, directed=False)[1]
        return self._grouped(component, int(component[stuck]))

    def _ties(self, block: Block, stuck: int) -> list[NDArray[np.int64]]:
        """Pairs of slots of one view that are kept or removed together."""
        sizes = block.sizes
        rows = self.leaves.resolve(block.flat)[:, 1:]
        leaves = self.leaves.leaf_of(rows)
        places = np.stack(np.unravel_index(np.arange(len(rows)), sizes), axis=1)
        owner = np.full(rows.shape, -1)
        for leaf in distinct(leaves):
            if leaf in self.facts.group_of:
                where, column = np.nonzero(leaves == leaf)
                owner[where, column] = _owner(places[where], rows[where, column])
        sizes_of = np.array([*self.leaves.sizes, 0])
        pairs: list[NDArray[np.int64]] = []
        for dim in range(len(sizes)):
            rows_on_axis = np.where(owner == dim, rows, -1)
            pairs += _on_axis(rows_on_axis, sizes_of[self.leaves.leaf_of(rows_on_axis)], places[:, dim], stuck)
        return pairs

    def _grouped(self, component: Index, stuck: int) -> tuple[Bundle, ...]:
        """Components with as many slots of each group, side by side."""
        elements = np.concatenate([np.zeros(0, np.int64), *map(self.elements, sorted(self.leaf_of_group))])
        group = np.concatenate(
            [np.zeros(0, np.int64), *(np.full(g.size, g.index) for g in self.facts.groups)]
        )  # in the order of self.elements
        order = np.lexsort((elements, group, component[elements]))
        units = np.split(order, np.flatnonzero(np.diff(component[elements[order]])) + 1) if len(order) else []
        bundles: dict[tuple[bool, tuple[int, ...]], list[Index]] = {}
        for unit in sorted(units, key=lambda unit: int(elements[unit].min())):
            fixed = int(component[elements[unit[0]]]) == stuck
            bundles.setdefault((fixed, tuple(group[unit].tolist())), []).append(elements[unit])
        return tuple(_bundle(fixed, members, slots) for (fixed, members), slots in bundles.items())

    # choices --------------------------------------------------------------------------------------------------------

    def sizes(self, units: Iterable[int]) -> dict[int, int]:
        """Channels of each group when ``units[k]`` of bundle k are kept."""
        totals = dict.fromkeys(sorted(self.leaf_of_group), 0)
        for bundle, count in zip(self.bundles, units, strict=True):
            for group, share in zip(bundle.groups, bundle.share):
                totals[group] += count * share
        return totals

    def units(self, sizes: Mapping[int, int]) -> list[int]:
        """How many units of each bundle give the groups these sizes; groups left out keep theirs.

        Sizes may exceed the groups' own. Raises PassError where groups are tied and these sizes do not go together.
        """
        wanted = {group.index: sizes.get(group.index, group.size) for group in self.facts.groups}
        units = [-1] * len(self.bundles)
        for cluster in self._clusters():
            for index, count in zip(cluster, self._solved(cluster, wanted)):
                units[index] = count
        return units

    def _clusters(self) -> list[list[int]]:
        """Bundles that share groups."""
        if not self.bundles:
            return []
        edges = [(k, group) for k, bundle in enumerate(self.bundles) for group in bundle.groups]
        size, offset = len(self.bundles), len(self.bundles)
        total = offset + len(self.facts.groups)
        rows, columns = [k for k, _ in edges], [offset + g for _, g in edges]
        matrix = coo_array((np.ones(len(edges)), (rows, columns)), shape=(total, total))
        component = connected_components(matrix, directed=False)[1][:size]
        return [np.flatnonzero(component == c).tolist() for c in np.unique(component)]

    def _solved(self, cluster: list[int], wanted: Mapping[int, int]) -> list[int]:
        """Numbers of units that add up to the wanted sizes, as near to the present proportions as may be."""
        bundles = [self.bundles[k] for k in cluster]
        groups = sorted({group for bundle in bundles for group in bundle.groups})
        share = np.array([[dict(zip(b.groups, b.share)).get(g, 0) for b in bundles] for g in groups])
        goal = np.array([wanted[group] for group in groups])
        if len(bundles) == 1:
            count, rest = divmod(int(goal[0]), int(share[0, 0]))
            if bundles[0].fixed or (rest == 0 and (share[:, 0] * count == goal).all()):
                return [self._checked(bundles[0], count)]
        elif (units := _whole(share, goal, bundles)) is not None:
            return [self._checked(bundle, count) for bundle, count in zip(bundles, units)]
        names = ", ".join(f"{self.facts.groups[g].name} ({wanted[g]} of {self.facts.groups[g].size})" for g in groups)
        raise PassError(f"these groups stand side by side in a view, and their new sizes do not fit together: {names}")

    def _checked(self, bundle: Bundle, count: int) -> int:
        if bundle.fixed and count != bundle.units:
            names = ", ".join(self.facts.groups[g].name for g in bundle.groups)
            raise PassError(f"channels of {names} stand beside positions that cannot be removed; keep them all")
        return count

    def multiplicity(self, units: Iterable[int]) -> Index:
        """How often each slot stands in the resized network: 0 removed, 1 kept; the last unit of a bundle grows."""
        times = np.ones(self.count + 1, np.int64)  # the last entry answers for "no element" (-1)
        for bundle, count in zip(self.bundles, units, strict=True):
            times[bundle.slots[count:]] = 0
            if count > bundle.units:
                times[bundle.slots[-1]] = count - bundle.units + 1
        return times


def _bundle(fixed: bool, members: tuple[int, ...], slots: list[Index]) -> Bundle:
    groups = tuple(sorted(set(members)))
    return Bundle(groups, tuple(members.count(g) for g in groups), np.stack(slots), fixed)


def _whole(share: Index, goal: Index, bundles: list[Bundle]) -> list[int] | None:
    """Whole numbers x with share · x = goal, spread evenly over the bundles, or None."""
    sizes = np.array([bundle.units for bundle in bundles], float)
    count = len(bundles)
    # minimise the largest deviation t from one common proportion: |x_k / sizes_k - mean| is linear in x
    mean = np.full((count, count), -1 / count) / sizes + np.diag(1 / sizes)
    sides = np.block([[mean, -np.ones((count, 1))], [-mean, -np.ones((count, 1))]])
    low = np.array([bundle.units if bundle.fixed else 0 for bundle in bundles], float)
    solution = milp(
        np.append(np.zeros(count), 1.0),
        integrality=np.append(np.ones(count), 0),
        bounds=Bounds(np.append(low, 0), np.full(count + 1, np.inf)),
        constraints=[
            LinearConstraint(np.hstack([share, np.zeros((len(share), 1))]), goal, goal),
            LinearConstraint(sides, -np.inf, 0),
        ],
    )
    return np.rint(solution.x[:count]).astype(int).tolist() if solution.x is not None else None


def _blocks(values: Iterable[object]) -> Iterable[Block]:
    """Every view that was not forced into a product, once."""
    seen: dict[int, Block] = {}
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, (list, tuple)):
            stack += value
        elif isinstance(value, Shape):
            seen |= {id(entry.block): entry.block for entry in value.axes if isinstance(entry, Digit)}
    return seen.values()


def _owner(places: Index, element: Index) -> int:
    """The axis of a view along which a group is cut: the one that its channels vary along.

    A group that varies along several is cut along the one that leaves the most units.
    """
    rank = places.shape[1]
    varies = []
    for dim in range(rank):
        rest = np.delete(places, dim, axis=1)
        if count_rows(np.concatenate([rest, element[:, None]], axis=1)) > count_rows(rest) or rank == 1:
            varies.append(dim)
    return max(varies, key=lambda dim: _components(places[:, dim], element), default=0)


def _components(position: Index, element: Index) -> int:
    low = int(element.min())
    size = int(element.max()) - low + 1
    pair = position, element - low + int(position.max()) + 1
    total = int(position.max()) + 1 + size
    matrix = coo_array((np.ones(len(element)), pair), shape=(total, total))
    return int(connected_components(matrix, directed=False)[0])


def _on_axis(rows: Index, size: Index, position: Index, stuck: int) -> Iterable[NDArray[np.int64]]:
    """Ties that make the slots (places, digits) of an axis the same at all places of one position.

    What a place stays for is compared with the first place at its position: slots that stand at both need no tie, the
    others are tied in pairs of groups of one size. Where one side has none left over, the other cannot go.
    """
    first = np.zeros(int(position.max()) + 1, np.int64)
    first[position[::-1]] = np.arange(len(position))[::-1]
    others, other_size = rows[first[position]], size[first[position]]
    here = _left_over(rows, others, size)
    there = _left_over(others, rows, other_size)
    ties = np.stack([here, there], axis=-1)
    missing = (ties < 0).any(axis=-1) & (ties >= 0).any(axis=-1)
    yield ties[(ties >= 0).all(axis=-1)]
    rest = ties[missing].max(axis=-1)
    yield np.stack([rest, np.full(len(rest), stuck)], axis=1)


def _left_over(rows: Index, others: Index, size: Index) -> Index:
    """Slots of each place that the other has not, larger groups first, -1 behind them."""
    alone = np.where((rows[:, :, None] == others[:, None, :]).any(axis=-1), -1, rows)
    order = np.argsort(np.where(alone >= 0, -size, 1), axis=1, kind="stable")
    return np.take_along_axis(alone, order, axis=1)
