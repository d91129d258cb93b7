"""Activation matching: one assignment for each group on the correlations of its features, over its full class.

``classes="permutation"`` restricts it to permutations (``vfx.match.ascent``). With the full classes signs, orthogonal
and invertible maps and scales are matched too (``vfx.match.class_ascent``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vfx.arguments import checked
from vfx.elements import Element
from vfx.errors import ArgumentError
from vfx.match.ascent import Ascent
from vfx.match.by_weights import Frames, decided, decided_between, untold
from vfx.match.class_ascent import ClassAscent, Classed, with_turns
from vfx.match.copies import AGREED, SETTLED, disagreement, scales_are_measured
from vfx.match.matcher import Problem, Run
from vfx.match.pairwise import Match, Pairwise, Starts
from vfx.match.rectangular import Bridge
from vfx.statistics.collect import Statistics

FramesOf = Callable[[int], Frames | None]  # what balances the first network and an edge


class ActivationMatching(Pairwise):
    """One assignment per group on the correlations of ``statistics``; ``restarts`` more from random permutations.

    ``classes``: "full" or "permutation". Where no two groups share features there is one optimum, and no restart.
    """

    needs = frozenset({"features"})

    @checked
    def __init__(self, classes: str = "full", restarts: int = 0):
        super().__init__(restarts, classes)

    def matched(self, problem: Problem, full: bool) -> Match:
        statistics = problem.statistics
        if statistics is None or "features" not in statistics.reads:
            raise ArgumentError("activation matching needs data, or statistics collected with features")
        search, frames_of = _in_classes(problem, statistics) if full else _by_permutations(problem, statistics)
        groups = untold(problem.symmetry, statistics)

        def match(edge: int, starts: Starts, generator: np.random.Generator) -> list[Run]:
            runs = search(edge, starts, generator)
            best = max(range(len(runs)), key=lambda run: runs[run][1])
            element, value, sweeps = runs[best]
            runs[best] = decided(problem, edge, element, groups, frames_of(edge), generator), value, sweeps
            return runs

        return match

    def crossed(self, bridge: Bridge, starts: Starts, generator: np.random.Generator) -> list[Run]:
        statistics = bridge.statistics()
        if bridge.full:
            ascent = ClassAscent(bridge.facts, statistics, 1, ({}, {}), bridge.weights)
            runs = [ascent.elements(start) for start in starts]
        else:
            runs = _permuted(Ascent(bridge.facts, statistics, 1), starts)
        element, value, sweeps = max(runs, key=lambda run: run[1])
        if bridge.full:
            element = with_turns(bridge.facts, element, bridge.weights)
        return [(decided_between(bridge, element, untold(bridge.facts, statistics), generator), value, sweeps)]


def _in_classes(problem: Problem, statistics: Statistics) -> tuple[Match, FramesOf]:
    """Over the classes; a copy whose scales in front of running statistics say that it is one is brought back whole."""
    weights = problem.program.weights
    usual = Classed(problem.symmetry, statistics, weights, problem.apart)
    if not scales_are_measured(problem.symmetry):
        return lambda edge, starts, _: usual.match(edge, starts), lambda edge: (usual.frames[0], usual.frames[edge])
    whole = Classed(problem.symmetry, statistics, weights, problem.apart, running=True)

    def match(edge: int, starts: Starts, _: np.random.Generator) -> list[Run]:
        starts = list(starts)
        runs, copies = usual.match(edge, starts), whole.match(edge, starts)
        left = [[disagreement(problem, run[0], weights[edge]) for run in found] for found in (runs, copies)]
        better = min(left[1]) <= AGREED and min(left[1]) < min(left[0]) - SETTLED
        return [copies[left[1].index(min(left[1]))]] * len(runs) if better else runs

    return match, lambda edge: (whole.frames[0], whole.frames[edge])


def _by_permutations(problem: Problem, statistics: Statistics) -> tuple[Match, FramesOf]:
    return lambda edge, starts, _: _permuted(Ascent(problem.symmetry, statistics, edge), starts), lambda edge: None


def _permuted(ascent: Ascent, starts: Starts) -> list[Run]:
    runs = (ascent.run(start) for start in starts)
    return [({i: Element(orders) for i, orders in index.items()}, value, sweeps) for index, value, sweeps in runs]
