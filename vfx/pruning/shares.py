"""What share of each stream stays: a stream's channels are often products of what several bundles hold.

Channels behind grouped convolutions are (group, inner channel), nested ones (group, …, inner channel): removing half of
each factor would leave an eighth. ``Streams`` knows which bundles stand together, and meets a share of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import networkx as nx
import numpy as np

from vfx.analyse.rows import unique_rows
from vfx.resize.slots import RemovalUnits

NEAR = 0.1  # a share of a stream's channels this far from the one asked for counts as missed


@dataclass(frozen=True, eq=False)
class Streams:
    """The features of a network by the bundles that stand in them, ``free`` those of which units may be removed.

    Of ``blocks`` (heads, groups) units go only where the channels inside cannot meet a share. ``nested``: blocks and
    what is inside them are factors of one share; else each goes by itself.
    """

    slots: RemovalUnits
    free: frozenset[int]
    blocks: frozenset[int] = frozenset()
    nested: bool = False

    @cached_property
    def whole(self) -> Streams:
        """The same with the blocks as factors like any other."""
        return Streams(self.slots, self.free | self.blocks, self.blocks, nested=True) if self.blocks else self

    @cached_property
    def counts(self) -> Mapping[tuple[int, ...], int]:
        """Free bundles that make up a feature together, with the number of such features."""
        owner = np.full(self.slots.count + 1, -1)
        for index in self.free:
            owner[self.slots.bundles[index].slots] = index
        features: set[tuple[int, ...]] = set()
        for rows in self.slots.facts.rows.values():
            digits = np.sort(rows[:, 1:], axis=1)
            digits = digits[(owner[digits] >= 0).any(axis=1)]
            features |= set(map(tuple, (unique_rows(digits)[0] if digits.shape[1] > 1 else digits).tolist()))
        counts: dict[tuple[int, ...], int] = {}
        for feature in features:
            bundles = self._together({int(k) for k in owner[list(feature)] if k >= 0})
            counts[bundles] = counts.get(bundles, 0) + 1
        return counts

    def _together(self, bundles: set[int]) -> tuple[int, ...]:
        """Bundles without the blocks that others stand in: how many of these go is said apart (``units``)."""
        if self.nested:
            return tuple(sorted(bundles))
        parents = {self.slots.facts.groups[g].parent for k in bundles for g in self.slots.bundles[k].groups}
        return tuple(sorted(k for k in bundles if not parents & set(self.slots.bundles[k].groups)))

    def left(self, bundles: tuple[int, ...], units: Sequence[float]) -> float:
        """The share of some features that stays."""
        return prod(units[k] / self.slots.bundles[k].units for k in bundles)

    @cached_property
    def products(self) -> list[list[int]]:
        """Free bundles that stand in features with others, by connected components."""
        graph = nx.Graph()
        for bundles in self.counts:
            graph.add_edges_from((first, second) for first in bundles for second in bundles if first < second)
        return [sorted(component) for component in nx.connected_components(graph)]

    def met(self, units: Sequence[int], share: float, allowed: Callable[[int], Sequence[int]]) -> list[int]:
        """Numbers of units with which ``share`` of each product stays as nearly as may be; ``units`` for all else.

        One bundle after the other is set to the best of what is ``allowed``, from the whole on and from ``units`` on;
        blocks only where a stream would miss the share by more than ``NEAR``.
        """
        result = self._met(units, share, allowed, self.products)
        whole = self.whole
        missed = {k for made_of in whole.missed(result, share) for k in made_of}
        components = [c for c in whole.products if missed & set(c) and self.blocks & set(c)]
        inner_first = [sorted(component, key=lambda k: (k in self.blocks, k)) for component in components]
        return whole._met(result, share, allowed, inner_first)

    def missed(self, units: Sequence[int], share: float) -> list[tuple[int, ...]]:
        """The features of which another share stays than ``share``, those of blocks alone left out."""
        far = [made_of for made_of in self.counts if abs(self.left(made_of, units) - share) > NEAR]
        return [made_of for made_of in far if not set(made_of) <= self.blocks]

    def _met(
        self, units: Sequence[int], share: float, allowed: Callable[[int], Sequence[int]], components: list[list[int]]
    ) -> list[int]:
        result = list(units)
        for component in components:
            features = [bundles for bundles in self.counts if set(bundles) & set(component)]
            full = [b.units if k in component else result[k] for k, b in enumerate(self.slots.bundles)]
            tried = [self._descended(start, component, features, share, allowed) for start in (full, result)]
            result = min(tried, key=lambda chosen: self._miss(features, chosen, share))
        return result

    def _descended(
        self,
        units: Sequence[int],
        component: Sequence[int],
        features: Sequence[tuple[int, ...]],
        share: float,
        allowed: Callable[[int], Sequence[int]],
    ) -> list[int]:
        chosen, before = list(units), float("inf")
        while (miss := self._miss(features, chosen, share)) < before:
            before = miss
            for k in component:
                near = [b for b in features if k in b]
                chosen[k] = min(
                    sorted(allowed(k), reverse=True),
                    key=lambda count: self._miss(near, [*chosen[:k], count, *chosen[k + 1 :]], share),
                )
        return chosen

    def _miss(self, features: Sequence[tuple[int, ...]], units: Sequence[float], share: float) -> float:
        return sum((self.left(bundles, units) - share) ** 2 for bundles in features)
