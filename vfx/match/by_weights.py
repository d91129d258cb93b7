"""What features do not tell, by weights, behind the element that they told.

A correlation needs samples of one order. Where another axis of a value carries channels too, each network has these in
an order of its own (a Mixer's hidden tokens stand beside its channels): such features tell nothing, and a group that
stands in no others is matched by weights, all others held. Nor do features tell channels apart that few samples make
active. Of two networks of their own nobody knows what is right there. A copy is known by the norms of its parameters
(``vfx.match.copies``): the search goes on by weights, and its result is taken if it makes the networks one.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from vfx.analyse.symmetry import Symmetry
from vfx.elements import Acting, Element, Elements, act, compose
from vfx.match.copies import SAME, SETTLED, disagreement, weigh_alike
from vfx.match.matcher import Problem
from vfx.match.rectangular import Bridge
from vfx.match.units import units
from vfx.match.universe import scored_names
from vfx.match.weight import Balanced, permuted_runs, runs_between
from vfx.on_read import OnRead
from vfx.program import Weights
from vfx.statistics.collect import Statistics


def untold(symmetry: Symmetry, statistics: Statistics) -> frozenset[int]:
    """The groups of units that stand in no feature on samples of one order."""
    told = {group for tap in statistics.taps if not tap.beside for group in tap.groups}
    return frozenset().union(*(unit.groups for unit in units(symmetry) if not unit.groups & told))


Frames = tuple[Elements, Elements]  # what balances the first network and another one


def decided(
    problem: Problem, edge: int, element: dict[int, Element], groups: frozenset[int], frames: Frames | None,
    generator: np.random.Generator,
) -> dict[int, Element]:  # fmt: skip
    """The element, and behind it what weights say of ``groups``; of a copy what they say of all.

    ``frames`` are None where permutations alone are searched.
    """
    second, full = problem.program.weights[edge], frames is not None
    if _is_copy(problem, second, frames or ({}, {})) and disagreement(problem, element, second) > SETTLED:
        whole = _behind(problem, element, second, None, full, generator)
        if disagreement(problem, whole, second) <= SAME:
            return whole
    return _behind(problem, element, second, groups, full, generator) if groups else element


def _is_copy(problem: Problem, second: Weights, frames: Frames) -> bool:
    """Whether all parameters that are compared weigh the same in the first network and another one, both balanced."""
    symmetry, first = problem.symmetry, problem.program.weights[0]
    named = [name for name in scored_names(symmetry) if name not in problem.apart]
    names = [name for name in named if first[name].shape == second[name].shape]
    balanced = (
        OnRead({name: weights[name] for name in names}, Acting(symmetry, frame))
        for weights, frame in zip((first, second), frames)
    )
    return weigh_alike(symmetry, *balanced)


def decided_between(
    bridge: Bridge, element: dict[int, Element], groups: frozenset[int], generator: np.random.Generator
) -> dict[int, Element]:
    """The same in the frame of two widths, whose networks are no copies."""
    if not groups:
        return element
    moved = act(bridge.facts, element, bridge.weights[1])
    (run,) = runs_between(bridge, moved, [{}], generator, groups)
    return _composed(bridge.facts, element, run[0], groups)


def _behind(
    problem: Problem, element: dict[int, Element], second: Weights, only: Collection[int] | None, full: bool,
    generator: np.random.Generator,
) -> dict[int, Element]:  # fmt: skip
    """The element, and behind it what a descent on weights that begins there finds for some groups, or for all."""
    symmetry, first = problem.symmetry, problem.program.weights[0]
    moved = act(symmetry, element, second)
    if full:
        (run,) = Balanced(problem, first, running=only is None).match(moved, [{}], generator, only)
    else:
        (run,) = permuted_runs(symmetry, first, moved, [{}], generator, problem.heads, only)
    return _composed(symmetry, element, run[0], only)


def _composed(
    symmetry: Symmetry, element: Elements, found: Elements, only: Collection[int] | None
) -> dict[int, Element]:
    relative = {index: part for index, part in found.items() if only is None or index in only}
    return compose(symmetry, element, relative)
