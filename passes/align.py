"""Align: bring every edge but the first to where its channels are the first edge's.

What an edge goes through (permutations; scales, signs, orthogonal and invertible maps where its full classes were
matched) is a symmetry of the network, so every edge keeps its function: f(x) = f_g(x) is checked before the result is
used (Git Re-Basin §2; proof by ``vfx.analyse.verify``). The edges' layer statistics, where they are known, go through
the same: no second pass over the data.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from vfx.alphas import edge_weights
from vfx.analyse.layer_view import statistics_channels
from vfx.analyse.layers import Join, number_layers
from vfx.analyse.pins import pin_notes
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import preserved
from vfx.arguments import checked
from vfx.elements import Acting, Elements, OnAxis, Pending, act_on, behind_exact, exact_part
from vfx.errors import ArchitectureError, PassError, VerificationError
from vfx.match.catalogue import maps_layers
from vfx.match.catalogue import matcher as find_matcher
from vfx.match.matcher import Alignment, Matcher, Matching, Problem
from vfx.on_read import OnRead
from vfx.program import Goal, Program, Weights
from vfx.proof import PRESERVED
from vfx.rewrite import Pass, PassResult
from vfx.rewrite.copies import read_only_in
from vfx.statistics.collect import Statistics, collect


class Align(Pass[Alignment]):
    """Bring edges 1…N−1 to edge 0 with ``match``: a matcher, its name, or None to leave them as they are.

    ``data`` (a loader) or ``statistics`` are needed by matchers that read activations; ``classes`` is for "weight" and
    "activation": each group's "full" class, or "permutation". ``preserve`` and ``heads`` say which layers each edge is
    going to keep for itself (``DuplicateBranches`` with its ``join``, ``DuplicateHeads``): no scale is read off those.
    """

    weight_sets = "several"
    needs = (symmetry, number_layers)

    @checked
    def __init__(
        self,
        match: str | Matcher | None = "weight",
        data: object = None,
        *,
        classes: str = "full",
        statistics: Statistics | None = None,
        weights: float | Sequence[float] | None = None,
        preserve: int | str = 0,
        join: Join = "preactivation",
        heads: int | str = 0,
        seed: int = 0,
        verify: bool = True,
        progress: bool = True,
    ):
        self.preserve, self.join, self.heads = preserve, join, heads
        self.matcher = find_matcher(match, classes=classes)
        self.data, self.statistics, self.weights = data, statistics, weights
        self.seed, self.verify, self.progress, self.moves_on_read = seed, verify, progress, False

    def on_read(self) -> Align:
        """The same pass with edges whose tensors are moved when they are read: nothing holds a copy for one reader."""
        late = copy.copy(self)
        late.moves_on_read = True
        return late

    def requires(self, program: Program) -> None:
        if program.private:
            raise PassError("Align acts on the edges' own architecture; run it before DuplicateBranches")

    def apply(self, program: Program) -> PassResult[Alignment]:
        facts = symmetry(program)
        statistics = self._statistics(program, facts)
        if self.matcher is None:
            unmoved = _with_goals(program, program, facts, statistics, Matching(({},) * program.edges))
            return PassResult(unmoved, Alignment(None, 0.0))
        matching = self.matcher(self._problem(program, facts, statistics))
        error = self._prove(program, facts, matching) if self.verify else None
        weights = [self._moved(facts, matching, tensors, edge) for edge, tensors in enumerate(program.weights)]
        result = program.with_weights(weights, f"Align({type(self.matcher).__name__})")
        result = result.with_notes((*pin_notes(facts), *matching.notes))
        if not matching.is_exact:
            result = replace(result, transport=Pending(facts, tuple(map(behind_exact, matching.elements))))
        return PassResult(_with_goals(program, result, facts, statistics, matching), Alignment(matching, error))

    def _moved(self, facts: Symmetry, matching: Matching, tensors: Weights, edge: int) -> Weights:
        """An edge's weights in the first edge's channels."""
        if not self.moves_on_read:
            return matching.aligned(facts, tensors, edge)
        return OnRead(tensors, Acting(facts, exact_part(matching.elements[edge])))

    def _statistics(self, program: Program, facts: Symmetry) -> Statistics | None:
        """Those that were given, or what the matcher reads of the data."""
        statistics = self.statistics
        if statistics is None and self.data is not None:
            needs = self.matcher.needs if self.matcher is not None else {"features"}
            mixed = self.matcher is not None and maps_layers(self.matcher, facts)
            statistics = collect(
                program,
                facts,
                self.data,
                features="data" not in needs or "features" in needs,
                within="within" in needs or (self.matcher is not None and not self.matcher.exact) or mixed,
                progress=self.progress,
            )
        if statistics is not None:
            statistics.check(program)
        return statistics

    def _problem(self, program: Program, facts: Symmetry, statistics: Statistics | None) -> Problem:
        """What there is to match, and what each edge is going to keep for itself."""
        shares = tuple(edge_weights(self.weights, program.edges))
        layers = number_layers(program)
        heads = read_only_in(program, layers.heads(self.heads).branch if self.heads else ())
        branches = read_only_in(program, layers.cut(self.preserve, self.join).branch if self.preserve else ())
        return Problem(program, facts, statistics, shares, self.data, self.seed, self.progress, heads | branches, heads)

    def _prove(self, program: Program, facts: Symmetry, matching: Matching) -> float:
        worst = 0.0
        for edge in range(1, program.edges):
            error = preserved(facts, program.weights[edge], exact_part(matching.elements[edge]), self.seed)
            if not error <= PRESERVED:
                raise VerificationError(
                    f"what was found for edge {edge} changes its function (relative error {error:.1e} in "
                    "float64); a symmetry rule must be wrong: please report the architecture"
                )
            worst = max(worst, error)
        return worst


def _with_goals(
    program: Program, result: Program, facts: Symmetry, statistics: Statistics | None, matching: Matching
) -> Program:
    """The edges' layer statistics (those of an earlier Align, if none are given) in the aligned channels.

    Behind a linear map T they are those of T y: mean T μ and variances on the diagonal of T Σ Tᵀ.
    """
    before = statistics.goals() if statistics is not None and statistics.layers else program.goals
    if not before:
        return result
    covariances = {} if statistics is None else statistics.covariances
    channels = statistics_channels(program)
    goals, unknown = {}, dict[str, None]()
    for name, goal in before.items():
        node, rows = program.nodes[name], []
        for edge, elements in enumerate(matching.elements):
            on, spread = _on(facts, elements, node, channels[name]), covariances.get(name)
            if on is None or (spread is None and on.behind is not None and on.behind.ndim == 2):
                unknown[name] = None
                continue
            rows.append(_through(on, goal.mean[edge], goal.std[edge], None if spread is None else spread[edge]))
        if name not in unknown:
            goals[name] = Goal(*(torch.stack(column) for column in zip(*rows)))
    return replace(result, goals=goals).with_notes(_unknown_notes(unknown))


def _unknown_notes(names: Collection[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{', '.join(names)}: not normalized, since what the edges give behind maps that mix channels is not known; "
        "statistics collected with within=True tell it where one map goes through the whole layer"
    ]


def _on(facts: Symmetry, elements: Elements, node: fx.Node, dim: int) -> OnAxis | None:
    """What a layer's channels go through; None where that is not one map for all of them."""
    try:
        return act_on(facts, elements, node, dim)
    except ArchitectureError:
        return None


def _through(on: OnAxis, mean: Tensor, std: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means and deviations (C,) of channels that go through an element; ``spread`` (C, C) is their covariance."""
    order = replace(on, behind=None)
    mean, std = order(mean), order(std)
    if on.behind is None:
        return mean, std
    behind = on.behind.to(mean.device)
    if behind.ndim == 1 or spread is None:
        return behind * mean, behind.abs() * std
    spread = order(order(spread).T).T
    return behind @ mean, torch.einsum("mc,cd,md->m", behind, spread, behind).clamp_min(0).sqrt()
