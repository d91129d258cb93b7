"""Activation matching: one assignment for each group on the correlations of its features, over its full class.

``classes="permutation"`` restricts it to permutations (``vfx.match.ascent``). With the full classes signs, orthogonal
and invertible maps and scales are matched too (``vfx.match.class_ascent``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from vfx.analyse.symmetry import Symmetry
from vfx.arguments import checked
from vfx.elements import Element, Permutations, check_classes, identity, random_permutations
from vfx.errors import ArgumentError
from vfx.match.ascent import Ascent
from vfx.match.carry import Carriage, Crossing
from vfx.match.class_ascent import ClassAscent, Classed, Run, with_turns
from vfx.match.class_descent import beyond_permutations, settled
from vfx.match.matcher import Matching, Problem
from vfx.match.rectangular import Bridge


class ActivationMatching:
    """One assignment per group on the correlations of ``statistics``; ``restarts`` more from random permutations.

    ``classes``: "full" or "permutation". Where no two groups share features there is one optimum, and no restart.
    """

    needs = frozenset({"features"})
    exact = True
    through_norms = True

    @checked
    def __init__(self, classes: str = "full", restarts: int = 0):
        self.restarts, self.classes = restarts, check_classes(classes)

    def __call__(self, problem: Problem) -> Matching:
        symmetry, statistics = problem.symmetry, problem.statistics
        if statistics is None or "features" not in statistics.reads:
            raise ArgumentError("activation matching needs data, or statistics collected with features")
        begin, generator = time.perf_counter(), np.random.default_rng(problem.seed)
        full = self.classes == "full" and beyond_permutations(symmetry)
        classed = Classed(symmetry, statistics, problem.program.weights, problem.apart) if full else None
        best, attempts = [], []
        for edge in range(1, problem.program.edges):
            starts = self._starts(symmetry, generator)
            runs = classed.match(edge, starts) if classed else _permuted(Ascent(symmetry, statistics, edge), starts)
            attempts.append(tuple(objective for _, objective, _ in runs))
            best.append(max(runs, key=lambda run: run[1]))
        found = [settled(symmetry, element) for element, _, _ in best]
        return Matching(
            elements=(identity(symmetry), *found),
            objective=tuple(objective for _, objective, _ in best),
            sweeps=tuple(sweeps for _, _, sweeps in best),
            seconds=time.perf_counter() - begin,
            attempts=tuple(zip(*attempts)),
        )

    def _starts(self, symmetry: Symmetry, generator: np.random.Generator) -> list[Permutations | None]:
        return [None, *(random_permutations(symmetry.groups, generator) for _ in range(self.restarts))]

    def carry(self, crossing: Crossing) -> tuple[Carriage, float]:
        """The best of all runs between networks of two widths (``vfx.match.rectangular``), and its objective."""
        bridge = Bridge(crossing, self.classes == "full")
        statistics, starts = bridge.statistics(), self._starts(bridge.facts, np.random.default_rng(crossing.seed))
        if bridge.full:
            ascent = ClassAscent(bridge.facts, statistics, 1, ({}, {}), bridge.weights)
            found, value, _ = max((ascent.elements(start) for start in starts), key=lambda run: run[1])
            found = with_turns(bridge.facts, found, bridge.weights)
        else:
            found, value, _ = max(_permuted(Ascent(bridge.facts, statistics, 1), starts), key=lambda run: run[1])
        return bridge.carriage(found), value


def _permuted(ascent: Ascent, starts: Iterable[Permutations | None]) -> list[Run]:
    runs = (ascent.run(start) for start in starts)
    return [({i: Element(own) for i, own in found.items()}, value, sweeps) for found, value, sweeps in runs]
