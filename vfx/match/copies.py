"""Copies of one network that a descent left apart, searched again where they still differ.

Coordinate descent ends where no group alone can do better; of two networks of their own nobody knows whether there is
more to find. But a copy can be told: between balanced forms only compact maps are left, which keep the norm of every
parameter, while the norms of networks trained apart differ. Then the maximum is known, ⟨W₀, g W₁⟩ = ‖W₀‖², and so is
what is wrong: the groups of parameters that still differ. They get random orders and signs, and a first sweep over
units in a random order counts what the other groups tell (iterated local search: Lourenço, Martin and Stützle 2003).
Pairs without a balanced form are solved for together (``vfx.match.isomorphism``). What does not make the networks one
in the end is not taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vfx.analyse.classes import Maps
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Acting, Elements
from vfx.match.descent import Descent, inner_product, squared_distance
from vfx.match.matcher import Problem, Run
from vfx.match.universe import scored_names
from vfx.on_read import OnRead
from vfx.program import Weights

SETTLED = 1e-8  # of the squares of all weights: what two copies may differ by when they are matched
AGREED = 0.1  # of the squares of matched weights, up to which networks may be copies, or nearly so
TRIES = 20
EQUAL = 1e-5  # relative difference of norms up to which networks count as copies
SAME = 1e-5  # of a parameter's squares, up to which two copies agree in it


def disagreement(problem: Problem, element: Elements, other: Weights) -> float:
    """Σ ‖W₀ − g W₁‖² over Σ ‖W₀‖², of the first network as it is and another behind an element."""
    first, names = problem.program.weights[0], scored_names(problem.symmetry)
    names = [name for name in names if name not in problem.apart and first[name].shape == other[name].shape]
    moved = OnRead(other, Acting(problem.symmetry, element))
    whole = sum(inner_product(first[name], first[name]) for name in names)
    return sum(squared_distance(first[name], moved[name]) for name in names) / whole if whole else 0.0


def scales_are_measured(symmetry: Symmetry) -> bool:
    """Whether scales stand in front of running statistics, which merged networks get anew: copies alone show them."""
    return any(group_class.running and group_class.scales for group_class in symmetry.classes.values())


@dataclass
class _State:
    run: Run
    apart: frozenset[str]  # parameters that differ
    left: float  # Σ ‖W₀ − g W₁‖² / ‖W₀‖² over parameters


def again(descent: Descent, run: Run, generator: np.random.Generator) -> Run:
    """A descent's result, or what makes the networks one where they are copies that it left apart."""
    if not are_copies(descent) or not _apart(descent):
        return run
    best, (generator,) = _solved(descent, run), generator.spawn(1)
    for _ in range(TRIES):
        if not best.apart:
            break
        wrong = set().union(*(descent.groups_of[name] for name in best.apart))
        start = descent.disordered(best.run[0], wrong, generator)
        right = set().union(*descent.groups_of.values()) - wrong
        again_solved = _solved(descent, descent.run(generator, start, known=right))
        if again_solved.left < best.left:
            best = again_solved
    return run if best.apart else best.run


def are_copies(descent: Descent) -> bool:
    """Whether all parameters weigh the same in both networks (``weigh_alike``), which are balanced."""
    return weigh_alike(descent.symmetry, descent.target, descent.current)


def weigh_alike(symmetry: Symmetry, first: Weights, second: Weights) -> bool:
    """Whether all parameters of two balanced networks weigh the same, as far as no map without a balanced form moves
    them.

    Parameters of one value (new biases and gains) tell nothing.
    """
    open_ended = [g for g in symmetry.groups if symmetry.classes[g.index].kind is Maps.LINEAR]
    moved = {member.fqn for group in open_ended for member in group.members}
    names = [member.fqn for group in (*symmetry.groups, *symmetry.rotations) for member in group.members]
    names = [name for name in dict.fromkeys(names) if name in first and name not in moved]
    sizes = ([float(weights[name].norm()) for weights in (first, second)] for name in names)
    telling = any(bool((first[name] != first[name].flatten()[:1]).any()) for name in names)
    return telling and all(abs(size - other) <= EQUAL * size for size, other in sizes)


def _apart(descent: Descent) -> dict[str, float]:
    """By parameter that differs, by how much of its squares."""
    shares = {}
    for name, target in descent.target.items():
        whole = inner_product(target, target)
        left = squared_distance(target, descent.current[name])
        if left > SAME * whole:
            shares[name] = left / whole if whole else 1.0
    return shares


def _solved(descent: Descent, run: Run) -> _State:
    """A run, and what is left behind the invertible maps that are best after it."""
    apart = _apart(descent)
    state = _State(run, frozenset(apart), sum(apart.values()))
    maps = descent.nearest_maps() if apart else {}
    if not maps:
        return state
    descent.move(maps)
    apart = _apart(descent)
    if sum(apart.values()) >= state.left:
        return state
    return _State((descent.element, descent.objective, run[2]), frozenset(apart), sum(apart.values()))
