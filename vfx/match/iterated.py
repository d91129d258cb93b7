"""Iterated activation matching: every edge is matched to the network that the last matching merged.

Activation matching aligns each edge to the first; errors of one layer are never seen by the next, and edges 1…N−1 never
see each other. Here the fixed-point iteration of Git Re-Basin's *MergeMany* (Ainsworth et al. 2022, algorithm 2: match
each model to the mean of the others) runs on features instead of weights. With π the last alignment, one iteration is

1. merge: θ_m = Σ α_i π_i(θ_i), normalized if asked for (RESET where there is BatchNorm, by default);
2. one pass over the data: correlations of the merged network's features with those of every edge, at all taps;
3. the objective of π, J(π) = Σ_i Σ_taps Σ_c corr(feature c of the merged network, feature c of π_i(θ_i));
4. new π_i for every edge, the first too: activation matching of the edge to the merged network.

The first π is pairwise activation matching. J is not monotone (the merged network changes with π), so the iteration
ends when J no longer grows, or after ``iterations``, and the best π is kept: J never falls below pairwise matching's.
The result is given in the first edge's frame. One iteration costs a pass of N + 1 networks, RESET or REPAIR another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vfx.analyse.affines import affines
from vfx.analyse.layer_view import batch_norms
from vfx.analyse.layers import number_layers
from vfx.arguments import checked
from vfx.elements import OnAxis, Permutations, act, order_on, permuted
from vfx.errors import ArgumentError
from vfx.match.activation import ActivationMatching
from vfx.match.ascent import Ascent
from vfx.match.matcher import Matching, Problem
from vfx.match.universe import check_one_shape, mean_weights, to_first
from vfx.normalize.batch_norms import reset_readers
from vfx.program import Goal, Program
from vfx.statistics.collect import collect
from vfx.statistics.data import Batches
from vfx.statistics.frontier import sweep

Rewrite = Callable[[Program], Program]
TOLERANCE = 1e-9


class IteratedMatching:
    """Activation matching to the merged network, again and again while the objective grows.

    ``normalize``: "auto" (RESET where the network has BatchNorm), None, or passes for the merged network in order, e.g.
    ``[vfx.InsertNormalization(), vfx.CalibrateNormalization("repair", loader)]`` (not folded: the graph's nodes must
    keep their names; goals of REPAIR need statistics of the edges' layers).
    """

    needs = frozenset({"features", "data"})
    exact = True

    @checked
    def __init__(self, iterations: int = 10, normalize: str | Sequence[Rewrite] | None = "auto"):
        if isinstance(normalize, str) and normalize != "auto":
            raise ArgumentError(f"normalize={normalize!r}: give 'auto', None or a list of passes")
        if iterations < 1:
            raise ArgumentError(f"iterations must be at least 1, got {iterations}")
        self.iterations, self.normalize = iterations, normalize

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Matching:
        if problem.data is None:
            raise ArgumentError("iterated matching runs the networks: give data= (statistics do not do)")
        check_one_shape(problem.program.weights)
        begin = time.perf_counter()
        elements: Sequence[Permutations] = ActivationMatching(classes="permutation")(problem).permutations
        best, kept, values = 0.0, elements, []
        for _ in range(self.iterations + 1):
            ascents = self._against_merged(problem, elements)
            values.append(sum(ascent.value(element) for ascent, element in zip(ascents, elements)))
            if len(values) > 1 and values[-1] <= best + TOLERANCE * abs(best):
                break
            best, kept = values[-1], elements
            elements = [_matched_anew(ascent, element) for ascent, element in zip(ascents, elements)]
        return Matching(
            elements=to_first(problem.symmetry, [*map(permuted, kept)]),
            objective=(best,),
            sweeps=(len(values) - 1,),
            seconds=time.perf_counter() - begin,
            details={"pairwise_objective": values[0]},
            attempts=tuple((value,) for value in values),
        )

    def _against_merged(self, problem: Problem, elements: Sequence[Permutations]) -> list[Ascent]:
        """Each edge's correlations with the network merged under ``elements``."""
        merged = self._merged(problem, elements)
        neutral = _neutral(merged, set(merged.weights[0]) - set(problem.program.weights[0]))
        both = merged.with_weights([merged.weights[0], *({**w, **neutral} for w in problem.program.weights)])
        crossed = collect(both, problem.symmetry, problem.data, layers=False, progress=problem.progress)
        return [Ascent(problem.symmetry, crossed, edge) for edge in range(1, both.edges)]

    def _merged(self, problem: Problem, elements: Sequence[Permutations]) -> Program:
        aligned = [act(problem.symmetry, permuted(element), w) for w, element in zip(problem.program.weights, elements)]
        merged = problem.program.with_weights([mean_weights(aligned, problem.shares)])
        if self.normalize is None:
            return merged
        if isinstance(self.normalize, str):
            return _reset(merged, Batches(problem.program, problem.data), problem.progress)
        merged = replace(merged, goals=_goals(problem, elements))
        for rewrite in self.normalize:
            merged = rewrite(merged)
        return merged


def _matched_anew(ascent: Ascent, element: Permutations) -> Permutations:
    """The permutations that the features tell now; groups that they do not tell stay as they were."""
    told = {group for unit in ascent.units for group in unit.groups}
    return {index: order if index in told else element[index] for index, order in ascent.run()[0].items()}


def _goals(problem: Problem, elements: Sequence[Permutations]) -> dict[str, Goal]:
    """Statistics of each layer that the merged network should have: the aligned edges', averaged by their shares."""
    assert problem.statistics is not None
    goal_of, nodes = problem.statistics.goals(), problem.program.nodes
    shares = torch.tensor(problem.shares, dtype=torch.float64)
    goals = {}
    for layer in number_layers(problem.program) if goal_of else ():
        moves = [OnAxis(order_on(problem.symmetry, e, nodes[layer.node], layer.channel), None) for e in elements]
        rows = [torch.stack([move(row) for row, move in zip(x, moves)])
                for x in (goal_of[layer.node].mean, goal_of[layer.node].std)]  # fmt: skip
        goals[layer.node] = Goal(*((shares.to(x.device)[:, None] * x).sum(0, keepdim=True) for x in rows))
    return goals


def _reset(program: Program, batches: Batches, progress: bool) -> Program:
    """The network with BatchNorm statistics recomputed, as the pass ResetBatchNorm does."""
    if not batch_norms(program):
        return program
    weights = dict(program.weights[0])
    sweep(program, weights, batches, reset_readers(program, []), progress=progress)
    return program.with_weights([weights])


def _neutral(merged: Program, inserted: set[str]) -> Mapping[str, Tensor]:
    """Weights that make the passes' insertions do nothing to an edge; raises ArgumentError for what is no affine."""
    neutral: dict[str, Tensor] = {}
    for affine in affines(merged):
        neutral[affine.scale] = torch.ones_like(merged.weights[0][affine.scale])
        neutral[affine.shift] = torch.zeros_like(merged.weights[0][affine.shift])
    unknown = sorted(inserted - set(neutral))
    if unknown:
        raise ArgumentError(
            f"normalize= inserted {unknown[0]}, which no edge has; use normalization passes, not folded"
        )
    return {name: neutral[name] for name in inserted}
