"""Weight matching: Git Re-Basin's coordinate descent (Ainsworth et al. 2022, §3.2), over each group's full class.

``classes="permutation"`` restricts it to permutations (``vfx.match.descent``). With the full classes both networks are
balanced first, and scales, signs, orthogonal and invertible maps are matched too (``vfx.match.class_descent``). Where
that ends below what permutations alone come to, by the same objective, it goes on from there instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import numpy as np

from vfx.analyse.balance import balance
from vfx.analyse.classes import Maps
from vfx.analyse.symmetry import Symmetry
from vfx.arguments import checked
from vfx.elements import Element, Elements, act
from vfx.garbage import give_back
from vfx.match.class_descent import ClassDescent, between, in_matrices
from vfx.match.copies import AGREED, SETTLED, again, disagreement, scales_are_measured
from vfx.match.descent import Descent
from vfx.match.matcher import Problem, Run
from vfx.match.pairwise import Match, Pairwise, Starts
from vfx.match.rectangular import Bridge
from vfx.program import Weights

ALIKE = 0.1  # up to which running variances may differ in copies


class WeightMatching(Pairwise):
    """Coordinate descent over groups; ``restarts`` further descents begin from random permutations.

    ``classes``: "full" or "permutation".
    """

    @checked
    def __init__(self, restarts: int = 0, classes: str = "full"):
        super().__init__(restarts, classes)

    def matched(self, problem: Problem, full: bool) -> Match:
        symmetry, heads, (first, *_) = problem.symmetry, problem.heads, problem.program.weights
        if full:
            return _in_classes(problem, first)

        def match(edge: int, starts: Starts, generator: np.random.Generator) -> list[Run]:
            return permuted_runs(symmetry, first, problem.program.weights[edge], starts, generator, heads)

        return match

    def crossed(self, bridge: Bridge, starts: Starts, generator: np.random.Generator) -> list[Run]:
        return runs_between(bridge, bridge.weights[1], starts, generator)


def _in_classes(problem: Problem, first: Weights) -> Match:
    usual, whole = Balanced(problem, first), Balanced(problem, first, running=True)
    measured = scales_are_measured(problem.symmetry)

    def match(edge: int, starts: Starts, generator: np.random.Generator) -> list[Run]:
        second = problem.program.weights[edge]
        runs = usual.match(second, starts, generator)
        copy = whole.copies(second, generator) if measured else None
        best = max(runs, key=lambda run: run[1])[0]
        better = copy is not None and (
            disagreement(problem, copy[0], second) < disagreement(problem, best, second) - SETTLED
        )
        return [copy] * len(runs) if copy is not None and better else runs

    return match


class Balanced:
    """The first network in its balanced form, for others to be matched with it over their full classes.

    What stands in front of a running statistic keeps its size, since merged statistics are measured anew; for copies
    of the first network, which are merged exactly, it is balanced too (``running``).
    """

    def __init__(self, problem: Problem, first: Weights, running: bool = False):
        self.problem, self.first, self.running = problem, first, running

    @cached_property
    def target(self) -> Elements:
        return self._frame(self.first)

    @cached_property
    def balanced(self) -> Weights:
        return act(self.problem.symmetry, self.target, self.first)

    def _frame(self, weights: Weights) -> Elements:
        frame = balance(self.problem.symmetry, weights, self.problem.apart, leaning=True, running=self.running)
        give_back(sum(tensor.nbytes for tensor in weights.values()))
        return frame

    def match(
        self, other: Weights, starts: Starts, generator: np.random.Generator, only: Collection[int] | None = None
    ) -> list[Run]:
        """What brings another network to the first as it is, from each start; ``only`` some groups are searched."""
        symmetry, heads, frame = self.problem.symmetry, self.problem.heads, self._frame(other)
        descent = ClassDescent(symmetry, self.balanced, other, frame, heads, self.running)
        runs = _descended(descent, starts, generator, only)
        if only is None and any(kind is not Maps.PERMUTATION for kind in descent.kinds.values()):
            best = max(range(len(runs)), key=lambda run: runs[run][1])
            runs[best] = self._at_least_permutations(descent, runs[best], other)
        return [(between(symmetry, self.target, frame, element), value, sweeps) for element, value, sweeps in runs]

    def _at_least_permutations(self, descent: ClassDescent, run: Run, other: Weights) -> Run:
        """A run, or the descent from what permutations alone come to where the run ended below that."""
        symmetry, drawing = self.problem.symmetry, np.random.default_rng(self.problem.seed)
        descent.current = {}  # one copy of the weights at a time
        orders, _, _ = Descent(symmetry, self.first, other, self.problem.heads).run(drawing)
        give_back(sum(tensor.nbytes for tensor in other.values()))
        start = in_matrices(symmetry, {index: Element(order) for index, order in orders.items()})
        if descent.value(start) <= run[1]:
            return run
        return max(run, again(descent, descent.run(drawing, start), drawing), key=lambda run: run[1])

    def copies(self, other: Weights, generator: np.random.Generator) -> Run | None:
        """The same if the other network is a copy of the first, or nearly so, else None: they agree when matched.

        No scale moves a running variance: that of a copy has the values of the first one's.
        """
        for name in self._variances:
            first, second = (weights[name].double().flatten().sort().values for weights in (self.first, other))
            if first.shape != second.shape or float((first - second).norm()) > ALIKE * float(first.norm()):
                return None
        (run,) = self.match(other, [None], generator)
        return run if disagreement(self.problem, run[0], other) <= AGREED else None

    @cached_property
    def _variances(self) -> list[str]:
        """Running statistics that no scale moves."""
        symmetry, names = self.problem.symmetry, dict[str, None]()
        for group in symmetry.groups:
            group_class = symmetry.classes[group.index]
            scales = group_class.scales if group_class.running else None
            for member in group.members if scales is not None else ():
                sides = group_class.slots[member.fqn, member.dim][0].tolist()
                moves = any(scales.magnitudes.get(x) or scales.signs.get(x) for x in sides)  # type: ignore[union-attr]
                if member.fqn in symmetry.program.buffers and not moves:
                    names[member.fqn] = None
        return list(names)


def runs_between(
    bridge: Bridge, second: Weights, starts: Starts, generator: np.random.Generator, only: Collection[int] | None = None
) -> list[Run]:
    """A descent in the frame of two widths from each start; ``only`` some groups are searched."""
    if not bridge.full:
        return permuted_runs(bridge.facts, bridge.weights[0], second, starts, generator, only=only)
    return _descended(ClassDescent(bridge.facts, bridge.weights[0], second, {}), starts, generator, only)


def permuted_runs(
    symmetry: Symmetry, first: Weights, second: Weights, starts: Starts, generator: np.random.Generator,
    heads: frozenset[str] = frozenset(), only: Collection[int] | None = None,
) -> list[Run]:  # fmt: skip
    """A descent over permutations from each start. ``heads`` are not compared; ``only`` some groups are searched."""
    runs = _searched(Descent(symmetry, first, second, heads), starts, generator, only)
    return [({i: Element(index) for i, index in orders.items()}, value, sweeps) for orders, value, sweeps in runs]


def _descended(
    descent: ClassDescent, starts: Starts, generator: np.random.Generator, only: Collection[int] | None = None
) -> list[Run]:
    """A descent over the classes from each start."""
    return _searched(descent, (start and descent.permuted(start) for start in starts), generator, only)


def _searched(
    descent: Descent, starts: Iterable[Any], generator: np.random.Generator, only: Collection[int] | None
) -> list[Any]:
    if only is not None:
        descent.keep_to(only)
        return [descent.run(generator, start) for start in starts]
    return [again(descent, descent.run(generator, start), generator) for start in starts]
