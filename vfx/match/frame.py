"""A common frame for two networks of different widths: every group as wide as the wider one has it.

Rectangular matching is square matching there. Let Eᵢ (n, nᵢ), n = max(n₀, n₁), put the channels of edge i among the
frame's, zero elsewhere. A map g of the frame gives T = E₀ᵀ g E₁ (n₀, n₁) between the networks, and

    ⟨W₀, T(W₁)⟩ = ⟨E₀(W₀), g(E₁(W₁))⟩,

whatever T does to the axes of W₁. In each group only one side has added channels, whose gains are zero, so that the
best permutation g is the best semi-permutation T (the rectangular assignment), and the polar factor of the square gain
holds that of the rectangular one: the semi-orthogonal Procrustes solution (*Generalized Linear Mode Connectivity for
Transformers*, Theus et al. 2025). Where g must fix the vector of ones (LayerNorm) Eᵢ sends 1/√nᵢ to 1/√n, so T does.

A frame is the wider network's own; where each is the wider one in some groups, the first one's graph is resized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.classes import Maps, Matrix
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.elements import Element
from vfx.errors import ArchitectureError, PassError
from vfx.match.carry import Carrier, Pairing, Reading
from vfx.match.class_descent import compact
from vfx.match.matcher import Gain
from vfx.program import Weights
from vfx.resize import resize
from vfx.statistics.collect import Statistics
from vfx.statistics.moments import CrossMoments
from vfx.statistics.taps import Tap, feature_taps

Bases = Callable[[Tap], Matrix | None]


class Frame:
    """The frame's symmetries ``facts``, what puts each edge ``into`` it, and what leads ``back`` to the first."""

    def __init__(self, pairing: Pairing):
        self.facts = _widest(pairing)
        self.into = tuple(self._into(facts, pairing.name) for facts in (pairing.one, pairing.other))
        self.back = Carrier(Pairing(pairing.one, self.facts, pairing.name))
        for group, twin in self.back.pairing.twin.items():
            self.back.found[group] = embedding(self._table(twin, pairing.one.groups[group].size).T)

    def _into(self, facts: Symmetry, name: str) -> Carrier:
        carrier = Carrier(Pairing(self.facts, facts, name))
        for group, twin in carrier.pairing.twin.items():
            carrier.found[group] = embedding(self._table(group, facts.groups[twin].size))
        return carrier

    def _table(self, group: int, size: int) -> Gain:
        group_of = self.facts.groups[group]
        return isometry(group_of.size, size, compact(self.facts, group_of) is Maps.ORTHOGONAL_ONES)

    def statistics(self, readings: Sequence[Reading], edge: int, bases: tuple[Bases, Bases]) -> Statistics:
        """What is known of both edges' features, in the frame: edge 0 and edge 1.

        ``bases`` give for a tap of each edge the matrix that its features are seen through, or None.
        """
        features = {}
        in_frame = {twin: group for group, twin in self.into[0].pairing.twin.items()}
        reading_of = {reading[0].place(in_frame): reading for reading in readings}
        taps = [tap for tap in feature_taps(self.facts) if tap.place() in reading_of]
        for tap in taps:
            first_tap, second_tap, moments = reading_of[tap.place()]
            tables = []
            for carrier, its_tap, base in zip(self.into, (first_tap, second_tap), bases):
                table, seen = carrier.between(tap, its_tap), base(its_tap)
                tables.append(table if seen is None else table @ seen)
            features[tap.key] = _seen(moments, edge, tables)
        return Statistics(0, tuple(taps), features, {}, (), frozenset({"features"}))


def embedding(table: Matrix) -> Element:
    """One matrix for all that a group stands on."""
    return Element(matrix=table, dual=table)


def isometry(size: int, own: int, ones: bool = False) -> Matrix:
    """E (size, own) with EᵀE = 1: the first channels, or one that sends the mean direction to the mean direction."""
    first = np.eye(size, own)
    return _to_mean(size) @ first @ _to_mean(own) if ones and own < size else first


def _to_mean(size: int) -> Matrix:
    """The reflection that exchanges the first channel and 1/√size."""
    normal = np.full(size, 1 / np.sqrt(size))
    normal[0] -= 1
    length = normal @ normal
    return np.eye(size) - (np.outer(normal, 2 / length * normal) if length > 0 else 0.0)


def moved_into(carrier: Carrier, weights: Weights) -> dict[str, Tensor]:
    """Every tensor of a weight set, those that hold channels carried."""
    if carrier.pairing.one is carrier.pairing.other and all(map(_still, carrier.found.values())):
        return dict(weights)
    return {name: carrier.tensor(name, tensor) for name, tensor in weights.items()}


def _still(element: Element) -> bool:
    """Whether nothing changes."""
    table = element.matrix
    return table is not None and len(table) == table.shape[1] and np.array_equal(table, np.eye(len(table)))


def _widest(pairing: Pairing) -> Symmetry:
    sizes = {g.index: (g.size, pairing.other.groups[pairing.twin[g.index]].size) for g in pairing.one.groups}
    if all(first >= second for first, second in sizes.values()):
        return pairing.one
    if all(first <= second for first, second in sizes.values()):
        return pairing.other
    kept = {g: np.arange(max(pair)) % pair[0] for g, pair in sizes.items()}
    try:
        return symmetry(resize(pairing.one.program.select(0), pairing.one, kept).program)
    except PassError as error:
        raise ArchitectureError(
            f"edge 0 is the wider one in some layers and {pairing.name} in others, and no network holds both: {error}; "
            "match='ot' does without"
        ) from error


def _seen(moments: CrossMoments, edge: int, tables: Sequence[Gain]) -> CrossMoments:
    """Moments of two edges' features behind a matrix each; of the variances their sum is that of the features."""
    matrices = [torch.from_numpy(np.ascontiguousarray(table)) for table in tables]
    result = CrossMoments(2, [len(m) for m in matrices])
    for new, old, matrix in zip(result.moments, (moments.moments[0], moments.moments[edge]), matrices):
        new.count, new.mean, new.m2 = old.count, matrix @ old.mean.cpu(), matrix**2 @ old.m2.cpu()
    result.cross[0, 1] = matrices[0] @ moments.cross[0, edge].cpu() @ matrices[1].T
    return result
