"""Matchers that bring every edge to the first by itself: several starts, of which the best by the objective is kept."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from vfx.analyse.symmetry import Symmetry
from vfx.elements import Permutations, check_classes, identity, random_permutations
from vfx.match.carry import Carriage, Crossing
from vfx.match.class_descent import beyond_permutations, settled
from vfx.match.matcher import Matching, Problem, Run
from vfx.match.rectangular import Bridge

Starts = Iterable[Permutations | None]
Match = Callable[[int, Starts, np.random.Generator], list[Run]]  # an edge, from each start


class Pairwise(ABC):
    """``restarts`` runs begin from random permutations, one as the edges are; ``classes``: "full" or "permutation"."""

    needs: frozenset[str] = frozenset()
    exact = True
    through_norms = True

    def __init__(self, restarts: int, classes: str):
        self.restarts, self.classes = restarts, check_classes(classes)

    @abstractmethod
    def matched(self, problem: Problem, full: bool) -> Match:
        """What matches an edge with the first, over the full classes or by permutations."""

    @abstractmethod
    def crossed(self, bridge: Bridge, starts: Starts, generator: np.random.Generator) -> list[Run]:
        """The runs between networks of two widths."""

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Matching:
        begin = time.perf_counter()
        symmetry, generator = problem.symmetry, np.random.default_rng(problem.seed)
        match = self.matched(problem, self.classes == "full" and beyond_permutations(symmetry))
        best, attempts = [], []
        for edge in range(1, problem.program.edges):
            runs = match(edge, self._starts(symmetry, generator), generator)
            attempts.append(tuple(objective for _, objective, _ in runs))
            best.append(max(runs, key=lambda run: run[1]))
        return Matching(
            elements=(identity(symmetry), *(settled(symmetry, element) for element, _, _ in best)),
            objective=tuple(objective for _, objective, _ in best),
            sweeps=tuple(sweeps for _, _, sweeps in best),
            seconds=time.perf_counter() - begin,
            attempts=tuple(zip(*attempts)),
        )

    @torch.no_grad()
    def carry(self, crossing: Crossing) -> tuple[Carriage, float]:
        """The best of all runs between networks of two widths (``vfx.match.rectangular``), and its objective."""
        bridge, generator = Bridge(crossing, self.classes == "full"), np.random.default_rng(crossing.seed)
        runs = self.crossed(bridge, self._starts(bridge.facts, generator), generator)
        element, objective, _ = max(runs, key=lambda run: run[1])
        return bridge.carriage(element), objective

    def _starts(self, symmetry: Symmetry, generator: np.random.Generator) -> Iterator[Permutations | None]:
        """One by one: what runs between two starts draws from the same generator."""
        yield None
        for _ in range(self.restarts):
            yield random_permutations(symmetry.groups, generator)
