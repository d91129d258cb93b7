"""The search of activation matching (Li et al. 2015; Git Re-Basin §3.1; *Vanishing Feature* App. F.2).

For each group the Pearson correlation between the features of two edges is summed over the group's taps and maximised
by one linear assignment; a group with others inside its blocks is matched with them (``vfx.match.units``). Where two
other groups share features, the first is matched on the best order of the second for each pair of its channels; then
they are optimised in turn until the sum stops growing. Features whose samples are channels of other groups are left
out: each network has these in an order of its own (``vfx.match.by_weights``). ``vfx.match.class_ascent`` does the same
over larger classes than permutations.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from vfx.analyse.grids import grid
from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Permutations, still_permutations
from vfx.elements.permutations import moved
from vfx.match.matcher import Gain, assign, best_over_blocks
from vfx.match.units import GroupUnit, PairOrders, assign_pairs, assign_unit, units
from vfx.statistics.collect import Statistics
from vfx.statistics.moments import CrossMoments
from vfx.statistics.taps import Tap

MAX_SWEEPS = 100


class Ascent:
    """Matches one edge to the first, unit after unit.

    ``only`` restricts it to units that hold one of these groups; the others stay as they are.
    """

    solve = staticmethod(assign_pairs)  # of the groups inside blocks

    def __init__(self, symmetry: Symmetry, statistics: Statistics, edge: int, only: Collection[int] | None = None):
        self.symmetry = symmetry
        self.found: dict[int, Any] = {}
        self.gains: list[tuple[Tap, Gain]] = []
        self.taps_of: dict[int, list[tuple[Tap, Gain]]] = {}
        taps = [tap for tap in statistics.taps if not tap.beside]
        for tap in taps:
            gain = self._gain(tap, statistics.features[tap.key], edge)
            self.gains.append((tap, gain))
            for group in tap.groups:
                self.taps_of.setdefault(group, []).append((tap, gain))
        tapped = [unit for unit in units(symmetry) if unit.groups & set(self.taps_of)]
        self.units = [unit for unit in tapped if only is None or unit.groups & set(only)]
        owner = {group: k for k, unit in enumerate(self.units) for group in unit.groups}
        self.coupled = any(len({owner[g] for g in tap.groups if g in owner}) > 1 for tap in taps)

    def _gain(self, tap: Tap, moments: CrossMoments, edge: int) -> Gain:
        """What each pair of features gives."""
        return moments.correlation(0, edge).cpu().numpy()

    def run(self, start: Permutations | None = None) -> tuple[dict[int, Any], float, int]:
        """Permutations, the sum of correlations reached, and the number of sweeps.

        Without ``start`` groups that have no order yet count at their best in the first sweep.
        """
        self.found = still_permutations(self.symmetry.groups) | dict(start or {})
        unmatched = {group for unit in self.units for group in unit.groups} if start is None else set()
        total, sweeps = -np.inf, 0
        while sweeps < (MAX_SWEEPS if self.coupled else 1):
            sweeps += 1
            value = 0.0
            for unit in self.units:
                unmatched -= unit.groups
                best, gained = self._blocks(unit) if unit.inner else self._single(unit.outer, unmatched)
                self.found |= best
                value += gained
            if value <= total * (1 + 1e-12):
                break
            total = value
        return self.found, float(total), sweeps

    def value(self, element: Permutations) -> float:
        """Sum of correlations over all taps, each once, under a given group element."""
        self.found = dict(element)
        images = ((gain, self._image(tap, keep=())) for tap, gain in self.gains)
        return float(sum(gain[np.arange(len(image)), image].sum() for gain, image in images))

    def _single(self, group: Group, unmatched: Collection[int]) -> tuple[dict[int, Any], float]:
        gains = [self._marginal(tap, gain, group, unmatched) for tap, gain in self.taps_of[group.index]]
        permutation, value = assign(np.sum(gains, axis=0))
        return {group.index: permutation}, value

    def _blocks(self, unit: GroupUnit) -> tuple[dict[int, Any], float]:
        """What taps of the outer group alone give counts whatever the inner order."""
        outer = np.zeros((unit.outer.size,) * 2)
        for tap, gain in self.taps_of.get(unit.outer.index, ()):
            if not unit.groups & set(tap.groups) - {unit.outer.index}:
                outer += self._by_channel(tap, gain, [unit.outer])
        inner = lambda group, orders: self._inner(unit, group, orders)  # noqa: E731
        return assign_unit(unit, outer, inner, self._in_turn(unit), self.solve)

    def _in_turn(self, unit: GroupUnit) -> Sequence[Group]:
        """The inner groups in the order in which they are solved."""
        return unit.inner

    def _inner(self, unit: GroupUnit, group: Group, orders: PairOrders) -> Gain:
        total = np.zeros((unit.outer.size,) * 2 + (group.size,) * 2)
        for tap, gain in self.taps_of.get(group.index, ()):
            if unit.outer.index not in tap.groups:
                continue
            others = [g for g in unit.inner if g.index in tap.groups and g.index != group.index]
            if others:
                total += self._beside(tap, gain, [unit.outer, group, *others], orders)
            else:
                total += self._by_channel(tap, gain, [unit.outer, group])
        return total

    def _beside(self, tap: Tap, gain: Gain, chosen: list[Group], orders: PairOrders) -> Gain:
        """(n, n, size, size) for an inner group that shares features with others of the same unit.

        These count in their order (or map) for each pair of blocks, or, before they have one, at their best.
        """
        outer, group, *others = chosen
        indices, sizes = [g.index for g in chosen], [g.size for g in chosen]
        positions = np.arange(tap.size), self._image(tap, keep=indices)
        first_grid, second_grid = (
            grid(tap.groups, tap.digits, position[:, None], indices, sizes) for position in positions
        )
        free = [g for g in others if g.index not in orders]
        total = np.empty((outer.size,) * 2 + (group.size,) * 2)
        for i, j in np.ndindex(outer.size, outer.size):
            copies = zip(np.moveaxis(first_grid[i], -1, 0), np.moveaxis(second_grid[j], -1, 0))
            pairs = sum(gain[np.ix_(a.reshape(-1), b.reshape(-1))] for a, b in copies)
            pairs = np.asarray(pairs).reshape(*sizes[1:], *sizes[1:])
            maps = {g.index: _as_map(orders[g.index][i, j]) for g in others if g.index in orders}
            pairs = _through(pairs, [None, *(maps.get(g.index) for g in others)])
            if free:
                number = int(np.prod([g.size for g in free]))
                pairs = pairs.reshape(group.size, number, group.size, number).transpose(0, 2, 1, 3)
                pairs = self._at_best(free[0], pairs) if len(free) == 1 else best_over_blocks(pairs)
            total[i, j] = pairs
        return total

    def _at_best(self, group: Group, gains: Gain) -> Gain:
        """What gains (n, n, size, size) come to at the best order of the last two axes."""
        return np.array([[assign(gain)[1] for gain in row] for row in gains])

    def _by_channel(self, tap: Tap, gain: Gain, chosen: list[Group]) -> Gain:
        """Gain (n…, n…) between channels of the chosen groups: (n, n), or (n, n, size, size) for two."""
        sizes = [group.size for group in chosen]
        indices = [group.index for group in chosen]
        first_grid = grid(tap.groups, tap.digits, np.arange(tap.size)[:, None], indices, sizes)
        second_grid = grid(tap.groups, tap.digits, self._image(tap, keep=indices)[:, None], indices, sizes)
        if len(chosen) == 1:
            return gain[first_grid[:, None], second_grid[None]].sum(-1)
        return gain[first_grid[:, None, :, None], second_grid[None, :, None, :]].sum(-1)

    def _image(self, tap: Tap, keep: Collection[int]) -> Index:
        """The old feature that each new one comes from, the groups in ``keep`` left as they are."""
        element = {g: p for g, p in self.found.items() if g not in keep}
        old = moved(self.symmetry.groups, tap.groups, tap.digits, element)
        row = {tuple(digits): index for index, digits in enumerate(tap.digits.tolist())}
        return np.array([row[tuple(digits)] for digits in old.tolist()])

    def _marginal(self, tap: Tap, gain: Gain, group: Group, unmatched: Collection[int]) -> Gain:
        """Gain (size, size) of one group's channels: the tap's other groups stay as they are, or count in their best
        order if they have none yet."""
        if len(tap.groups) == 1:
            return gain
        if not set(tap.groups) & set(unmatched):
            return self._by_channel(tap, gain, [group])
        features = grid(tap.groups, tap.digits, np.arange(tap.size)[:, None], [group.index], [group.size])
        return best_over_blocks(gain[features[:, None, :, None], features[None, :, None, :]])


def _as_map(order: Gain | Index) -> Gain:
    """An order (n,) as a map (n, n); a map as it is."""
    return np.eye(len(order))[order] if order.ndim == 1 else np.asarray(order, float)


def _through(pairs: Gain, maps: Sequence[Gain | None]) -> Gain:
    """Gains (n…, n…) between features of several digits, those with a map summed over, matched by it."""
    for k, matrix in reversed(list(enumerate(maps))):
        if matrix is not None:
            pairs = np.asarray(np.tensordot(pairs, matrix, ([k, pairs.ndim // 2 + k], [0, 1])), float)
    return pairs
