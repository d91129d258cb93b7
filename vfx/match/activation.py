"""Activation matching: one assignment for each group on the correlations of its features, over its full class.

``classes="permutation"`` restricts it to permutations (``vfx.match.ascent``). With the full classes signs, orthogonal
and invertible maps and scales are matched too (``vfx.match.class_ascent``).
"""

from __future__ import annotations

import time

from vfx.analyse.transform import Element, check_classes
from vfx.errors import ArgumentError
from vfx.match.ascent import Ascent
from vfx.match.carry import Carriage, Crossing
from vfx.match.class_ascent import ClassAscent, Classed, with_turns
from vfx.match.class_descent import beyond_permutations, split
from vfx.match.matcher import Matching, Problem
from vfx.match.rectangular import Bridge


class ActivationMatching:
    """One assignment per group on the correlations of ``statistics``; ``classes``: "full" or "permutation"."""

    needs = frozenset({"features"})
    exact = True
    through_norms = True

    def __init__(self, classes: str = "full"):
        self.classes = check_classes(classes)

    def __call__(self, problem: Problem) -> Matching:
        symmetry, statistics = problem.symmetry, problem.statistics
        if statistics is None or "features" not in statistics.reads:
            raise ArgumentError("activation matching needs data, or statistics collected with features")
        start, edges = time.perf_counter(), range(1, problem.program.edges)
        full = self.classes == "full" and beyond_permutations(symmetry)
        if full:
            classed = Classed(symmetry, statistics, problem.program.weights)
            results = [classed.match(edge) for edge in edges]
        else:
            permuted = [Ascent(symmetry, statistics, edge).run() for edge in edges]
            results = [({i: Element(own) for i, own in found.items()}, value, n) for found, value, n in permuted]
        found = [split(symmetry, element) for element, _, _ in results]
        return Matching(
            permutations=(symmetry.identity(), *(permutations for permutations, _ in found)),
            elements=({}, *(behind for _, behind in found)) if full else (),
            objective=tuple(objective for _, objective, _ in results),
            sweeps=tuple(sweeps for _, _, sweeps in results),
            seconds=time.perf_counter() - start,
        )

    def carry(self, crossing: Crossing) -> tuple[Carriage, float]:
        """What is found between networks of two widths (``vfx.match.rectangular``), and the objective reached."""
        bridge = Bridge(crossing, self.classes == "full")
        statistics = bridge.statistics()
        if bridge.full:
            found, value, _ = ClassAscent(bridge.facts, statistics, 1, ({}, {}), bridge.weights).elements()
            found = with_turns(bridge.facts, found, bridge.weights)
        else:
            permutations, value, _ = Ascent(bridge.facts, statistics, 1).run()
            found = {index: Element(own) for index, own in permutations.items()}
        return bridge.carriage(found), value
