"""Activation matching over the full symmetry classes.

Features of two networks are compared where the taps read them. By class of the group

- permutations maximise the sum of correlations, signed ones that of signed correlations (a correlation does not depend
  on scales); a sign that parameters alone absorb (norm gains) is what makes those agree, since no feature sees that
  its flip would cancel them in the average;
- orthogonal maps minimise E‖x₀ − T x₁‖² over all taps: Procrustes on E[x₀ x₁ᵀ], each tap in units of its own size;
- invertible maps (queries and keys, values and outputs) are first rid of their arbitrary part: each network's pair is
  brought to its balanced form (``vfx.analyse.balance``), what is left between two of them is orthogonal. Keys carry the
  dual map;
- rotations of rotary planes, which stand behind no feature that all tokens share, are those of the aligned weights;
- scales are those between the balanced forms. (Ratios of the features' deviations would do for equal networks; where a
  channel is nearly silent in one of two different ones they explode.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vfx.analyse.balance import balance
from vfx.analyse.classes import Maps, Matrix, contragredient
from vfx.analyse.grids import grid
from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element, Elements, Permutations, act, compose, inverse
from vfx.elements.parts import parts, rows_of
from vfx.match import planes
from vfx.match.ascent import Ascent
from vfx.match.class_descent import compact, inside, sign_vectors, solved
from vfx.match.matcher import Gain, Run
from vfx.match.solve import Signs, assign_signed, procrustes
from vfx.match.units import GroupUnit
from vfx.program import Weights
from vfx.statistics.collect import Statistics
from vfx.statistics.moments import CrossMoments
from vfx.statistics.taps import Tap


class Classed:
    """Several networks whose features are matched over their groups' classes.

    ``running``: scales in front of running statistics are matched, too, which those of copies alone have.
    """

    def __init__(
        self, symmetry: Symmetry, statistics: Statistics, weights: Sequence[Weights], apart: Collection[str] = (),
        running: bool = False,
    ):  # fmt: skip
        self.symmetry, self.statistics, self.weights, self.running = symmetry, statistics, weights, running
        self.frames = [balance(symmetry, tensors, apart, running=running) for tensors in weights]

    def match(self, edge: int, starts: Iterable[Permutations | None]) -> list[Run]:
        """From each start the element that brings an edge to the first one, its objective, the number of sweeps."""
        frames = self.frames[0], self.frames[edge]
        weights = self.weights[0], self.weights[edge]
        ascent = ClassAscent(self.symmetry, self.statistics, edge, frames, weights, self.running)
        runs = []
        for start in starts:
            elements, objective, sweeps = ascent.elements(start)
            elements = compose(self.symmetry, frames[1], elements)
            elements = compose(self.symmetry, elements, inverse(self.symmetry, frames[0]))
            runs.append((with_turns(self.symmetry, elements, weights), objective, sweeps))
        return runs


def with_turns(symmetry: Symmetry, found: dict[int, Element], weights: tuple[Weights, Weights]) -> dict[int, Element]:
    """An element and, behind it, the turns of rotary planes that bring the second weight set to the first."""
    if not symmetry.rotations:
        return found
    moved = act(symmetry, found, weights[1])
    return compose(symmetry, found, planes.turns(symmetry, weights[0], moved))


def basis(symmetry: Symmetry, tap: Tap, frame: Elements) -> Matrix:
    """What brings a tap's features to those of balanced pairs."""
    result = np.eye(tap.size)
    for column, index in enumerate(tap.groups):
        matrix = frame.get(index, Element()).matrix
        group, standing = symmetry.groups[index], tap.sides[column]
        if matrix is None or (matrix.ndim > 2 and group.parent not in tap.groups):
            continue
        if standing is not None and standing[1]:
            matrix = contragredient(matrix)
        for block, rows in enumerate(_table(tap, group, symmetry)):
            result[rows[:, None], rows] = matrix if matrix.ndim == 2 else matrix[block % len(matrix)]
    return result


class ClassAscent(Ascent):
    """Matches one edge to the first, each group by its class; ``behind`` is what stands behind the permutations."""

    def __init__(
        self, symmetry: Symmetry, statistics: Statistics, edge: int, frames: tuple[Elements, Elements],
        weights: tuple[Weights, Weights], running: bool = False,
    ):  # fmt: skip
        options = {"common": True, "running": running}
        self.kinds = {group.index: compact(symmetry, group, **options) for group in symmetry.groups}
        self.signs = {group.index: sign_vectors(symmetry, group, **options) for group in symmetry.groups}
        self.frames, self.weights = frames, weights
        self.behind: dict[int, Element] = {}
        super().__init__(symmetry, statistics, edge)

    def _gain(self, tap: Tap, moments: CrossMoments, edge: int) -> Gain:
        if not any(self.kinds[index].mixes for index in tap.groups):
            return super()._gain(tap, moments, edge)
        first_moments, other_moments = moments.moments[0], moments.moments[edge]
        count = max(first_moments.count, 1)
        means = [m.mean.cpu().numpy() for m in (first_moments, other_moments)]
        second = (moments.cross[0, edge] / count).cpu().numpy() + np.outer(*means)
        sizes = [
            float(m.m2.sum()) / count + float(mean @ mean) for m, mean in zip((first_moments, other_moments), means)
        ]
        size = np.sqrt(sizes[0] * sizes[1])
        scale = tap.size / size if size > np.finfo(float).tiny else 0.0  # features that are silent tell nothing
        left, right = (basis(self.symmetry, tap, frame) for frame in self.frames)
        return scale * (left @ second @ right.T)

    def elements(self, start: Permutations | None = None) -> Run:
        """The element found between balanced networks, the objective reached and the number of sweeps."""
        self.behind = {}
        if start is not None:
            start = {index: order for index, order in start.items() if not self.kinds[index].mixes}
        permutations, objective, sweeps = self.run(start)
        elements = {
            index: replace(self.behind.get(index, Element()), index=order) for index, order in permutations.items()
        }
        return elements, objective, sweeps

    def solve(self, group: Group, gains: Gain) -> tuple[Any, Gain]:  # type: ignore[override]
        """Orders, or maps, of each pair of blocks."""
        return solved(group, gains, self.kinds[group.index])

    def _in_turn(self, unit: GroupUnit) -> Sequence[Group]:
        """Maps that mix channels last: they need the others' order, which does not need theirs."""
        return sorted(unit.inner, key=lambda group: self.kinds[group.index].mixes)

    def _at_best(self, group: Group, gains: Gain) -> Gain:
        kind = self.kinds[group.index]
        return super()._at_best(group, gains) if kind is Maps.PERMUTATION else solved(group, gains, kind)[1]

    def _single(self, group: Group, unmatched: Collection[int]) -> tuple[dict[int, Any], float]:
        kind, signs = self.kinds[group.index], self.signs[group.index]
        if not kind.mixes and not any(signs.values()):
            return super()._single(group, unmatched)
        gains: dict[Signs, Gain] = {}
        for tap, gain in self.taps_of[group.index]:
            standing = tap.sides[tap.groups.index(group.index)]
            key = frozenset() if standing is None else signs.get(standing[0], frozenset())
            gains[key] = gains.get(key, 0.0) + self._marginal(tap, gain, group, unmatched)
        if kind.mixes:
            matrix, value = procrustes(sum(gains.values(), np.zeros(1)), kind)
            self.behind[group.index] = Element(matrix=matrix)
            return {group.index: np.arange(group.size)}, float(value)
        permutation, free = assign_signed(self._with_gains(group, gains))
        ones = np.ones(group.size)
        scales = {
            side: np.prod([free.get(x, ones) for x in vector], axis=0) for side, vector in signs.items() if vector
        }
        self.behind[group.index] = Element(scales=scales)
        return {group.index: permutation}, self._signed_value(gains, permutation, free)

    def _with_gains(self, group: Group, gains: Mapping[Signs, Gain]) -> dict[Signs, Gain]:
        """The gains, and whether the signs of elementwise parameters agree, which counts for more than all of them.

        Where they agree by the best sign, all pairs of channels gain alike, and the assignment is that of the features.
        """
        result, more = dict(gains), 1.0 + sum(float(np.abs(gain).max()) for gain in gains.values())
        for side, agree in self._agreement(group).items():
            key = self.signs[group.index][side]
            result[key] = result.get(key, 0.0) + more * agree
        return result

    def _agreement(self, group: Group) -> dict[int, Gain]:
        """sign γ₀ · sign γ₁ between channels (size, size), for the sides that hold elementwise parameters alone."""
        signs = {side: vector for side, vector in self.signs[group.index].items() if vector}
        tables_of: dict[int, list[Gain]] = {side: [] for side in signs}
        for member in group.members:
            for part in parts(self.symmetry, group, member):
                if part.side not in tables_of:
                    continue
                if member.role != "elementwise":
                    del tables_of[part.side]
                    continue
                first, second = (rows_of(tensors[member.fqn], member.dim, part).sign() for tensors in self.weights)
                tables_of[part.side].append((first @ second.T).numpy() / first.shape[1])
        return {side: np.mean(tables, axis=0) for side, tables in tables_of.items() if tables}

    @staticmethod
    def _signed_value(gains: Mapping[Signs, Gain], permutation: Index, free: Mapping[int, Gain]) -> float:
        rows, total = np.arange(len(permutation)), 0.0
        for vector, gain in gains.items():
            sign = np.prod([free[x] for x in vector], axis=0) if vector else 1.0
            total += float((sign * gain[rows, permutation]).sum())
        return total

    def _blocks(self, unit: GroupUnit) -> tuple[dict[int, Any], float]:
        orders, value = super()._blocks(unit)
        for group in unit.inner:
            element = inside(group, orders[group.index], self.kinds[group.index], self.signs[group.index])
            if self.kinds[group.index] is not Maps.PERMUTATION:
                self.behind[group.index] = replace(element, index=None)
            still = np.repeat(np.arange(group.size)[None], group.outer, axis=0)
            orders[group.index] = still if element.index is None else element.index
        return orders, value


def _table(tap: Tap, group: Group, symmetry: Symmetry) -> Index:
    """The features (blocks, size) of a group in a tap, for the channels of other groups one parent after the other."""
    others = [index for index in tap.groups if index not in (group.index, group.parent)]
    outer = [group.parent] if group.parent in tap.groups else []
    chosen = [*others, *outer, group.index]  # type: ignore[list-item]
    sizes = [symmetry.groups[index].size for index in chosen]
    return grid(tap.groups, tap.digits, np.arange(tap.size)[:, None], chosen, sizes).reshape(-1, group.size)
