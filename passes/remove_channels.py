"""RemoveChannels: whole channels, heads and groups go, and what is left is a smaller network.

Channels are scored over all members of their symmetry group (``vfx.pruning.groups``), widths follow from a fraction or
a budget (``vfx.pruning.widths``), and the Program is resized along the groups (``vfx.resize``). The smaller network is
proved to compute what the full one computes with the removed features at zero. Goals for a later REPAIR are the
statistics of the kept channels; ``carry`` says where the kept channels stand in the dense network, which a
reconstruction (``vfx.passes.reconstruct``) solves for.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vfx.analyse.layers import number_layers
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.arguments import checked
from vfx.errors import ArgumentError, PassError
from vfx.program import Program
from vfx.pruning.choice import choose_sizes
from vfx.pruning.clusters import merged_goals
from vfx.pruning.expert_merging import ExpertClusters, merged_experts
from vfx.pruning.experts import expert_groups, expert_scores
from vfx.pruning.groups import NEED_MOMENTS, GivenScores, Loss, Scores, channel_scores
from vfx.pruning.removed import Removed
from vfx.pruning.second_moments import SecondMoments, second_moments
from vfx.pruning.widths import Widths, strongest
from vfx.resize import RemovalUnits, resize
from vfx.resize.channels import KeptChannels
from vfx.resize.masked import prove
from vfx.resize.weights import Kept
from vfx.rewrite import Pass, PassResult
from vfx.statistics.data import Batches

ROUTER = "router"  # the score of experts
EXPERTS = ("remove", "merge")
NOTHING_WENT = "no channel went: the groups that may go (roles=, units=, protect=) have none to spare for this share"


class RemoveChannels(Pass[Removed]):
    """Remove ``sparsity`` of the channels of each group (or of the ``budget``), those with the lowest ``score``.

    ``score``: "magnitude" (l2), "l1", "l2", "taylor", "activation", "obs", "random", or scores by group index; "router"
    is that of experts: the mean of what they add, as the router weighs it. ``allocation``: "uniform", "global" or
    "isomorphic". ``budget``: what ``sparsity`` is a share of: "channels", "params", "flops", "latency". ``units``:
    inside heads and groups remove "channels", whole "blocks", "both", or "auto" (blocks where channels do not allow
    it); or "experts" that a router chooses from, and nothing else; with ``experts`` "merge" each that goes is averaged
    into the nearest that stays (``vfx.pruning.expert_merging``). ``roles``: the kinds of groups that may go, "streams",
    "hidden", "blocks"; all if none is named. ``protect``: FQNs of modules or parameters. ``data`` feeds the scores that
    need it. The record of ``run`` is a ``Removed``. ``scores(program)`` are the scores alone; ``by(scores)`` is the
    same pass that goes by them.
    """

    weight_sets = "one"
    needs = (symmetry, number_layers)

    @checked
    def __init__(
        self,
        sparsity: float,
        score: str | GivenScores = "magnitude",
        *,
        allocation: str = "uniform",
        budget: str = "channels",
        round_to: int = 1,
        units: str = "auto",
        experts: str = "remove",
        roles: Sequence[str] = (),
        protect: Collection[str] = (),
        data: Any = None,
        loss: Loss | None = None,
        max_samples: int | None = None,
        device: Any = None,
        verify: bool = True,
        seed: int = 0,
        progress: bool = True,
    ):
        if score == ROUTER and (units != "experts" or data is None):
            raise ArgumentError(f"score={ROUTER!r} is of experts and reads data; give units='experts' and data=")
        if experts not in EXPERTS:
            raise ArgumentError(f"experts={experts!r} is unknown; choose 'remove' or 'merge'")
        if experts == "merge" and units != "experts":
            raise ArgumentError("experts='merge' says how experts go; give units='experts' with it")
        self.widths = Widths(allocation, round_to, tuple(protect), units, tuple(roles))
        self.sparsity, self.score, self.budget, self.data = sparsity, score, budget, data
        self.experts = experts
        self.loss, self.max_samples, self.comparable = loss, max_samples, score == "taylor"
        self.device, self.verify, self.seed, self.progress = device, verify, seed, progress

    def apply(self, program: Program) -> PassResult[Removed]:
        facts = symmetry(program)
        slots = RemovalUnits(facts, self.widths.units == "experts")
        if self.widths.units == "experts" and not expert_groups(facts):
            raise PassError(
                "this network has no experts that a router chooses from (by topk or argmax, the choice looked up in "
                "tensors that hold an expert at each position); leave units= out"
            )
        scores = self.scores(program)
        sizes, notes = choose_sizes(
            program, facts, slots, scores, self.widths, self.sparsity, self.budget, comparable=self.comparable
        )
        if self.sparsity and all(sizes[group.index] == group.size for group in facts.groups):
            notes = [*notes, NOTHING_WENT]
        kept = strongest(facts, scores, sizes)
        program, merged = self._merged(program, facts, kept)
        small = resize(program, facts, kept, slots=slots, note=_note(facts, sizes))
        error = prove(program, facts, small, kept, self.seed) if self.verify else None
        carry = KeptChannels(small, facts, {group: clusters.average for group, clusters in merged.items()})
        return PassResult(small.program.with_notes(notes), Removed(sizes, kept, carry, error))

    def _merged(self, program: Program, facts: Symmetry, kept: Kept) -> tuple[Program, Mapping[int, ExpertClusters]]:
        """The network whose kept experts stand for all, where they are merged, and what went where."""
        if self.experts == "remove":
            return program, {}
        batches = None if self.data is None else Batches(program, self.data, self.max_samples, self.device)
        weights, clusters = merged_experts(program, facts, kept, batches)
        goals = merged_goals(program, facts, clusters)
        return replace(program.with_weights([weights]), goals=goals), clusters

    def scores(self, program: Program) -> Scores:
        """The score of each channel, by group index."""
        facts = symmetry(program)
        if not isinstance(self.score, str):
            return _checked(self.score, facts)
        if self.score == ROUTER:
            batches = Batches(program, self.data, self.max_samples, self.device)
            return expert_scores(program, facts, batches)
        return self._scores(program, facts, self._moments(program, facts))

    def by(self, scores: Scores) -> RemoveChannels:
        """The same pass with scores that are known already; what is compared between groups stays as it is."""
        scored = copy.copy(self)
        scored.score = scores
        return scored

    def _moments(self, program: Program, facts: Symmetry) -> SecondMoments | None:
        if self.data is None or self.score not in NEED_MOMENTS:
            return None
        options: dict[str, Any] = {"max_samples": self.max_samples, "device": self.device, "progress": self.progress}
        return second_moments(program, facts, self.data, **options)

    def _scores(self, program: Program, facts: Symmetry, moments: SecondMoments | None) -> Scores:
        return channel_scores(
            program,
            facts,
            str(self.score),
            data=self.data,
            moments=moments,
            loss=self.loss,
            max_samples=self.max_samples,
            seed=self.seed,
        )


def _checked(scores: GivenScores, facts: Symmetry) -> Scores:
    """Scores that were given, one for each channel of each group. Raises ArgumentError."""
    for group in facts.groups:
        shape = tuple(np.shape(scores[group.index])) if group.index in scores else None
        if shape != group.shape:
            given = "has none" if shape is None else f"has the shape {shape}"
            raise ArgumentError(
                f"score= {given} for group {group.index} ({group.name}), of shape {group.shape}; give an array of that "
                "shape by the index of each group (group.index, group.shape of vfx.symmetry(model, x).groups)"
            )
    return {index: torch.as_tensor(values).detach().cpu().double().numpy() for index, values in scores.items()}


def _note(facts: Symmetry, sizes: Mapping[int, int]) -> str:
    groups = {g.index: g for g in facts.groups}
    before = sum(g.outer * g.size for g in groups.values())
    after = sum((sizes[g.parent] if g.parent is not None else 1) * sizes[g.index] for g in groups.values())
    return f"RemoveChannels({before - after:,} of {before:,})"
