"""Units of matching: a group with the groups inside its blocks, which can only be matched together.

An inner order is found for each pair of blocks (one of each edge), then the outer assignment on what those give: for
heads × dim, each head of one network is tried against each of the other in its best inner order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.match.matcher import Gain, assign

# inner group -> for each pair of blocks its best order (outer, outer, size), or map (outer, outer, size, size)
PairOrders = dict[int, Any]
Solve = Callable[[Group, Gain], tuple[Any, Gain]]  # the best order or map of each pair of blocks, and what it gives


@dataclass(frozen=True)
class GroupUnit:
    """A group and its inner groups, if any."""

    outer: Group
    inner: tuple[Group, ...] = ()

    @property
    def groups(self) -> frozenset[int]:
        return frozenset(group.index for group in (self.outer, *self.inner))


def units(symmetry: Symmetry) -> list[GroupUnit]:
    """Every group in one unit, in the order of the graph."""
    inner: dict[int, list[Group]] = {}
    for group in symmetry.groups:
        if group.parent is not None:
            inner.setdefault(group.parent, []).append(group)
    outer_units = [GroupUnit(g, tuple(inner.get(g.index, ()))) for g in symmetry.groups if g.parent is None]
    return sorted(outer_units, key=lambda unit: min(unit.groups))


def assign_pairs(group: Group, gains: Gain) -> tuple[Index, Gain]:
    """The best inner order of each pair of blocks (n, n, size), and what it gives (n, n)."""
    count, size = len(gains), gains.shape[2]
    orders, values = np.empty((count, count, size), np.int64), np.empty((count, count))
    for i, j in np.ndindex(count, count):
        orders[i, j], values[i, j] = assign(gains[i, j])
    return orders, values


def assign_unit(
    unit: GroupUnit,
    outer: Gain,
    gain: Callable[[Group, PairOrders], Gain],
    order: Sequence[Group],
    solve: Solve = assign_pairs,
) -> tuple[dict[int, Any], float]:
    """The best element of a unit, and its value.

    ``outer`` (n, n) is what pairs of blocks give whatever their inner order; ``gain`` gives (n, n, size, size) for an
    inner group, those before it in ``order`` being ordered already.
    """
    orders: PairOrders = {}
    total = outer.copy()
    for group in order:
        orders[group.index], values = solve(group, gain(group, orders))
        total += values
    blocks, value = assign(total)
    rows = np.arange(len(blocks))
    return {unit.outer.index: blocks} | {g: pairs[rows, blocks] for g, pairs in orders.items()}, value
