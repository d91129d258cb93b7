"""Activation matching over the full symmetry classes.

Features of two networks are compared where the taps read them. By class of the group

- permutations maximise the sum of correlations, signed ones that of signed correlations (a correlation does not depend
  on scales);
- orthogonal maps minimise E‖x₀ − T x₁‖² over all taps: Procrustes on E[x₀ x₁ᵀ], each tap in units of its own size;
- invertible maps (queries and keys, values and outputs) are first taken off their arbitrary part: each network's pair
  is brought to its balanced form (``vfx.analyse.balance``), what is left between two of them is orthogonal. Keys carry
  the dual map;
- scales are the ratios of the standard deviations of matched channels, the least-squares solution where several taps
  read one scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vfx.analyse.balance import balance, restrained
from vfx.analyse.classes import Matrix, contragredient
from vfx.analyse.composition import compose, inverse
from vfx.analyse.grids import grid
from vfx.analyse.symmetry import Group, Index, Symmetry
from vfx.analyse.transform import Element, Elements
from vfx.match.ascent import Ascent
from vfx.match.class_descent import compact, mixing, sign_vectors
from vfx.match.matcher import Gain
from vfx.match.solve import Signs, assign_signed, procrustes
from vfx.match.units import Unit, assign_pairs
from vfx.program import Weights
from vfx.statistics.collect import Statistics
from vfx.statistics.moments import CrossMoments
from vfx.statistics.taps import Tap


class Classed:
    """Several networks whose features are matched over their groups' classes."""

    def __init__(self, symmetry: Symmetry, statistics: Statistics, weights: Sequence[Weights]):
        self.symmetry, self.statistics = symmetry, statistics
        self.frames = [_matrices(balance(symmetry, own)) if mixing(symmetry) else {} for own in weights]

    def match(self, edge: int) -> tuple[dict[int, Element], float, int]:
        """The element that brings an edge to the first one, the objective reached and the number of sweeps."""
        frames = self.frames[0], self.frames[edge]
        ascent = ClassAscent(self.symmetry, self.statistics, edge, frames)
        permutations, objective, sweeps = ascent.run()
        behind = ascent.behind
        found = {index: Element(own, *_parts(behind.get(index))) for index, own in permutations.items()}
        found = compose(self.symmetry, frames[1], found)
        found = compose(self.symmetry, found, inverse(self.symmetry, frames[0]))
        scales = Scaling(self.symmetry, self.statistics, edge, permutations).run()
        return compose(self.symmetry, found, scales), objective, sweeps


def _matrices(element: Elements) -> dict[int, Element]:
    """What is left of an element without its scales."""
    return {index: Element(matrix=own.matrix) for index, own in element.items() if own.matrix is not None}


def _parts(element: Element | None) -> tuple[Matrix | None, Mapping[int, Matrix]]:
    return (None, {}) if element is None else (element.matrix, element.scales)


class ClassAscent(Ascent):
    """Matches one edge to the first, each group by its class; ``behind`` is what stands behind the permutations."""

    def __init__(self, symmetry: Symmetry, statistics: Statistics, edge: int, frames: tuple[Elements, Elements]):
        self.kinds = {group.index: compact(symmetry, group) for group in symmetry.groups}
        self.signs = {group.index: sign_vectors(symmetry, group) for group in symmetry.groups}
        self.frames = frames
        self.behind: dict[int, Element] = {}
        super().__init__(symmetry, statistics, edge)

    def _gain(self, tap: Tap, moments: CrossMoments, edge: int) -> Gain:
        if not any(self.kinds[index].mixes for index in tap.groups):
            return super()._gain(tap, moments, edge)
        one, other = moments.moments[0], moments.moments[edge]
        count = max(one.count, 1)
        means = [m.mean.cpu().numpy() for m in (one, other)]
        second = (moments.cross[0, edge] / count).cpu().numpy() + np.outer(*means)
        sizes = [float(m.m2.sum()) / count + float(mean @ mean) for m, mean in zip((one, other), means)]
        scale = tap.size / max(np.sqrt(sizes[0] * sizes[1]), np.finfo(float).tiny)
        left, right = (self._frame(tap, own) for own in self.frames)
        return scale * (left @ second @ right.T)

    def _frame(self, tap: Tap, frame: Elements) -> Matrix:
        """What brings a tap's features to balanced pairs."""
        result = np.eye(tap.size)
        for column, index in enumerate(tap.groups):
            matrix = frame.get(index, Element()).matrix
            if matrix is None:
                continue
            group, standing = self.symmetry.groups[index], tap.sides[column]
            if standing is not None and standing[1]:
                matrix = contragredient(matrix)
            for block, rows in enumerate(_table(tap, group, self.symmetry)):
                result[rows[:, None], rows] = matrix if matrix.ndim == 2 else matrix[block]
        return result

    def solve(self, group: Group, gains: Gain) -> tuple[Any, Gain]:  # type: ignore[override]
        """Orders, or maps, of each pair of blocks."""
        kind = self.kinds[group.index]
        return procrustes(gains, kind) if kind.mixes else assign_pairs(group, gains)

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
        permutation, free = assign_signed(gains)
        ones = np.ones(group.size)
        scales = {side: np.prod([free.get(x, ones) for x in own], axis=0) for side, own in signs.items() if own}
        self.behind[group.index] = Element(scales=scales)
        return {group.index: permutation}, self._signed_value(gains, permutation, free)

    @staticmethod
    def _signed_value(gains: Mapping[Signs, Gain], permutation: Index, free: Mapping[int, Gain]) -> float:
        rows, total = np.arange(len(permutation)), 0.0
        for own, gain in gains.items():
            sign = np.prod([free[x] for x in own], axis=0) if own else 1.0
            total += float((sign * gain[rows, permutation]).sum())
        return total

    def _blocks(self, unit: Unit) -> tuple[dict[int, Any], float]:
        found, value = super()._blocks(unit)
        for group in unit.inner:
            if self.kinds[group.index].mixes:
                self.behind[group.index] = Element(matrix=found[group.index])
                found[group.index] = np.repeat(np.arange(group.size)[None], group.outer, axis=0)
        return found, value


def _table(tap: Tap, group: Group, symmetry: Symmetry) -> Index:
    """The features (blocks, size) of a group in a tap; other groups' channels count as blocks."""
    others = [index for index in tap.groups if index not in (group.index, group.parent)]
    outer = [group.parent] if group.parent in tap.groups else []
    chosen = [*others, *outer, group.index]  # type: ignore[list-item]
    sizes = [symmetry.groups[index].size for index in chosen]
    return grid(tap.groups, tap.digits, np.arange(tap.size)[:, None], chosen, sizes).reshape(-1, group.size)


class Scaling:
    """The positive scales of one edge's channels, given its permutations."""

    def __init__(self, symmetry: Symmetry, statistics: Statistics, edge: int, permutations: Mapping[int, Index]):
        self.symmetry, self.permutations = symmetry, permutations
        self.equations: dict[int, list[tuple[int, Matrix]]] = {}  # by group: side, log-ratios (blocks, size)
        for tap in statistics.taps:
            if len(tap.groups) == 1 or self._parent_beside(tap):
                self._read(tap, statistics.features[tap.key], edge)

    def run(self) -> dict[int, Element]:
        """The scales of each side."""
        found = {}
        for index, equations in self.equations.items():
            scales = self._solved(self.symmetry.groups[index], equations)
            if scales:
                found[index] = Element(scales=scales)
        return found

    def _parent_beside(self, tap: Tap) -> bool:
        parents = {self.symmetry.groups[index].parent for index in tap.groups}
        return len(tap.groups) == 2 and bool(parents & set(tap.groups))

    def _read(self, tap: Tap, moments: CrossMoments, edge: int) -> None:
        for column, index in enumerate(tap.groups):
            group, standing = self.symmetry.groups[index], tap.sides[column]
            own = self.symmetry.classes[index]
            if own.scales is None or standing is None or not own.scales.magnitudes.get(standing[0]):
                continue
            table = _table(tap, group, self.symmetry)
            logs = [_log_std(moments, k) for k in (0, edge)]
            ratio = logs[0][table] - logs[1][self._old(group, table)]
            ratio = ratio * (-1.0 if standing[1] else 1.0)
            self.equations.setdefault(index, []).append((standing[0], ratio))

    def _old(self, group: Group, table: Index) -> Index:
        """Where the other edge has the channels that stand in a table after its permutations."""
        own = self.permutations[group.index]
        if group.parent is None:
            return table[:, own]
        return np.take_along_axis(table[self.permutations[group.parent]], own, axis=1)

    def _solved(self, group: Group, equations: list[tuple[int, Matrix]]) -> dict[int, Matrix]:
        own = self.symmetry.classes[group.index]
        assert own.scales is not None
        vectors = restrained(own.scales.magnitudes, own.running)
        free = sorted({x for vector in vectors.values() for x in vector})
        if not free:
            return {}
        rows = np.array([[float(vectors[side].get(x, 0)) for x in free] for side, _ in equations])
        ratios = np.stack([ratio.reshape(-1) for _, ratio in equations])
        seen = np.isfinite(ratios)  # channels that do not vary at a tap say nothing
        normal = np.einsum("ec,ex,ey->cxy", seen, rows, rows)
        logs = np.einsum("cxy,ey,ec->xc", np.linalg.pinv(normal), rows, np.where(seen, ratios, 0.0))
        shape = (group.size,) if group.parent is None else group.blocks
        found = {}
        for side, vector in vectors.items():
            if vector:
                total = sum(float(c) * logs[free.index(x)] for x, c in vector.items())
                found[side] = np.exp(total).reshape(shape)
        return found


def _log_std(moments: CrossMoments, edge: int) -> Matrix:
    """NaN for channels that do not vary."""
    own = moments.moments[edge]
    std = own.std.cpu().numpy()
    with np.errstate(divide="ignore"):
        return np.where(own.constant.cpu().numpy(), np.nan, np.log(std))
