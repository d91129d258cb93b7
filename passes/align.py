"""Align: permute every edge but the first so that its channels stand where the first edge's do.

Each permutation is a symmetry of the network, so every edge keeps its function: f(x) = f_π(x) is checked before the
result is used (Git Re-Basin §2; proof by ``vfx.analyse.verify``). The edges' layer statistics, where they are known,
are permuted with the weights: no second pass over the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vfx.alphas import edge_weights
from vfx.analyse.activations import statistics_channels
from vfx.analyse.symmetry import Permutations, Symmetry, symmetry
from vfx.analyse.verify import preserved
from vfx.errors import ArgumentError, PassError, VerificationError
from vfx.match.catalogue import matcher as find_matcher
from vfx.match.maps import Transport
from vfx.match.matcher import Matcher, Matching, Problem
from vfx.program import Goal, Program
from vfx.rewrite import PRESERVED, Pass, require_edges
from vfx.statistics.collect import Statistics, collect


class Align(Pass):
    """Permute edges 1…N−1 to edge 0 with ``match``: a matcher, its name, or None to leave them as they are.

    ``data`` (a loader) or ``statistics`` are needed by matchers that read activations.
    """

    def __init__(
        self,
        match: str | Matcher | None = "weight",
        data: object = None,
        *,
        statistics: Statistics | None = None,
        weights: float | Sequence[float] | None = None,
        facts: Symmetry | None = None,
        seed: int = 0,
        verify: bool = True,
        progress: bool = True,
    ):
        self.matcher = find_matcher(match)
        self.data, self.statistics, self.weights, self.facts = data, statistics, weights, facts
        self.seed, self.verify, self.progress = seed, verify, progress
        self.matching: Matching | None = None
        self.error = 0.0

    def requires(self, program: Program) -> None:
        require_edges(program, single=False, name=self.name)
        if program.private:
            raise PassError("Align acts on the edges' own architecture; run it before DuplicateBranches")

    def apply(self, program: Program) -> Program:
        facts = self.facts or symmetry(program)
        statistics = self.statistics
        if statistics is None and self.data is not None:
            needs = self.matcher.needs if self.matcher is not None else {"features"}
            statistics = collect(
                program,
                facts,
                self.data,
                features="data" not in needs or "features" in needs,
                within="within" in needs or (self.matcher is not None and not self.matcher.exact),
                progress=self.progress,
            )
        if statistics is not None:
            statistics.check(program)
        if self.matcher is None:
            return _with_goals(program, program, facts, statistics, ({},) * program.edges)
        shares = tuple(edge_weights(self.weights, program.edges))
        self.matching = self.matcher(Problem(program, facts, statistics, shares, self.data, self.seed, self.progress))
        permutations = self.matching.permutations
        if self.verify:
            self.error = self._prove(program, facts, permutations)
        weights = [facts.permute(w, p) for w, p in zip(program.weights, permutations)]
        note = f"Align({type(self.matcher).__name__})"
        result = program.with_weights(weights, note)
        result = replace(result, notes=(*result.notes, *self.matching.notes))
        if any(self.matching.maps):
            result = replace(result, transport=Transport(facts, self.matching.maps))
        return _with_goals(program, result, facts, statistics, permutations)

    def _prove(self, program: Program, facts: Symmetry, permutations: tuple[Permutations, ...]) -> float:
        worst = 0.0
        for edge, permutation in enumerate(permutations[1:], start=1):
            error = preserved(facts, program.weights[edge], permutation, self.seed)
            if not error <= PRESERVED:
                raise VerificationError(
                    f"the permutation found for edge {edge} changes its function (relative error {error:.1e} in "
                    "float64); a symmetry rule must be wrong: please report the architecture"
                )
            worst = max(worst, error)
        return worst


def _with_goals(
    program: Program,
    result: Program,
    facts: Symmetry,
    statistics: Statistics | None,
    permutations: tuple[Permutations, ...],
) -> Program:
    """The edges' layer statistics in the aligned channel order, kept on the result.

    Behind a linear map T they are those of T y: mean T μ and variances on the diagonal of T Σ Tᵀ.
    """
    if statistics is None or not statistics.layers:
        return result
    nodes = {node.name: node for node in program.graph.nodes}
    channels = statistics_channels(program)
    goals = {}
    for name, known in statistics.goals().items():
        node, rows = nodes[name], []
        for edge, permutation in enumerate(permutations):
            order = torch.from_numpy(facts.gather(node, channels[name], permutation)).to(known.mean.device)
            mean, std = known.mean[edge][order], known.std[edge][order]
            matrix = result.transport.axis(edge, node, channels[name]) if result.transport is not None else None
            if matrix is not None:
                if name not in statistics.covariances:
                    raise ArgumentError(
                        "behind linear maps the layers' statistics need covariances; collect them with within=True"
                    )
                matrix = matrix.to(mean.device)
                spread = statistics.covariances[name][edge][order][:, order]
                mean = matrix @ mean
                std = torch.einsum("mc,cd,md->m", matrix, spread, matrix).clamp_min(0).sqrt()
            rows.append((mean, std))
        goals[name] = Goal(*(torch.stack(column) for column in zip(*rows)))
    return replace(result, goals=goals)
