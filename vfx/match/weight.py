"""Weight matching: Git Re-Basin's coordinate descent (Ainsworth et al. 2022, §3.2), over each group's full class.

``classes="permutation"`` restricts it to permutations (``vfx.match.descent``). With the full classes both networks are
balanced first, and scales, signs, orthogonal and invertible maps are matched too (``vfx.match.class_descent``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from vfx.analyse.balance import balance
from vfx.analyse.symmetry import Symmetry
from vfx.arguments import checked
from vfx.elements import Element, Elements, act, check_classes, identity, random_permutations
from vfx.match.carry import Carriage, Crossing
from vfx.match.class_descent import ClassDescent, between, beyond_permutations, settled
from vfx.match.descent import Descent
from vfx.match.matcher import Matching, Problem
from vfx.match.rectangular import Bridge
from vfx.program import Weights

Run = tuple[Elements, float, int]  # what an edge goes through, the objective and the number of sweeps


class WeightMatching:
    """Coordinate descent over groups; ``restarts`` further descents begin from random permutations.

    ``classes``: "full" or "permutation".
    """

    needs: frozenset[str] = frozenset()
    exact = True
    through_norms = True

    @checked
    def __init__(self, restarts: int = 0, classes: str = "full"):
        self.restarts, self.classes = restarts, check_classes(classes)

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Matching:
        begin = time.perf_counter()
        symmetry, generator = problem.symmetry, np.random.default_rng(problem.seed)
        full = self.classes == "full" and beyond_permutations(symmetry)
        match = (_in_classes if full else _permuted)(problem, problem.program.weights[0])
        best, attempts = [], []
        for weights in problem.program.weights[1:]:
            starts = (
                None if attempt == 0 else random_permutations(symmetry.groups, generator)
                for attempt in range(1 + self.restarts)
            )
            runs = match(weights, starts, generator)
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

    @torch.no_grad()
    def carry(self, crossing: Crossing) -> tuple[Carriage, float]:
        """The best of all runs between networks of two widths (``vfx.match.rectangular``), and its objective."""
        bridge = Bridge(crossing, self.classes == "full")
        generator = np.random.default_rng(crossing.seed)
        starts = (
            None if attempt == 0 else random_permutations(bridge.facts.groups, generator)
            for attempt in range(1 + self.restarts)
        )
        runs = _runs(bridge.facts, *bridge.weights, starts, generator, {} if bridge.full else None)
        element, objective, _ = max(runs, key=lambda run: run[1])
        return bridge.carriage(element), objective


def _permuted(problem: Problem, first: Weights) -> Callable[..., list[Run]]:
    symmetry, heads = problem.symmetry, problem.heads
    return lambda other, starts, generator: _runs(symmetry, first, other, starts, generator, None, heads)


def _in_classes(problem: Problem, first: Weights) -> Callable[..., list[Run]]:
    symmetry = problem.symmetry
    target = balance(symmetry, first, problem.apart)
    balanced = act(symmetry, target, first)

    def match(other: Weights, starts: Iterable[Any], generator: np.random.Generator) -> list[Run]:
        frame = balance(symmetry, other, problem.apart)
        runs = _runs(symmetry, balanced, other, starts, generator, frame, problem.heads)
        return [(between(symmetry, target, frame, found), value, sweeps) for found, value, sweeps in runs]

    return match


def _runs(
    symmetry: Symmetry, first: Weights, other: Weights, starts: Iterable[Any], generator: np.random.Generator,
    frame: Elements | None, heads: frozenset[str] = frozenset(),
) -> list[Run]:  # fmt: skip
    """A descent from each start: over the classes, ``frame`` balancing the other network, or over permutations.

    ``heads`` are not compared.
    """
    if frame is not None:
        descent = ClassDescent(symmetry, first, other, frame, heads)
        return [descent.run(generator, start and descent.permuted(start)) for start in starts]
    runs = (Descent(symmetry, first, other, heads).run(generator, start) for start in starts)
    return [({i: Element(own) for i, own in found.items()}, value, sweeps) for found, value, sweeps in runs]
