"""What the linear matching methods share: ZipIt!, CCA merging and optimal transport are each one ``solve``.

A method sees the second moments of one group's features in all edges and gives, for each edge, a map T into common
channels and one U back. The driver runs it for every group that a dense map can go through and brings the result to
one form: common channels in the order of the first edge's nearest permutation, with the permutation nearest to each T
as the element's index. Groups that no dense map can go through (attention heads, queries and keys, tied weights), and
those that share features with another group, take activation matching's permutations. Channels inside blocks (heads ×
dim) are solved for each matched pair of blocks.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.grids import grid
from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element, Elements, identity, permuted
from vfx.errors import ArgumentError
from vfx.match.ascent import Ascent
from vfx.match.maps import mappable
from vfx.match.matcher import Matching, Problem, assign
from vfx.progress import track
from vfx.statistics.collect import Statistics
from vfx.statistics.moments import ROUNDING, CrossMoments
from vfx.statistics.taps import Tap

NEARLY = (
    1e-6  # share of the largest entry of T up to which entries count as equal when the nearest permutation is found
)


@dataclass(frozen=True, eq=False)
class Features:
    """The C features of one group (of one pair of matched blocks, if ``group`` is inside blocks) in N edges.

    All matrices are float64 on the processor, averaged over the group's taps: each tap counts as much as any other,
    whatever its number of samples. ``shares`` are the edges' weights in the merge.
    """

    group: Group
    shares: tuple[float, ...]
    _taps: tuple[tuple[CrossMoments, tuple[Tensor, ...]], ...]  # moments, and each edge's channels among their rows

    @property
    def edges(self) -> int:
        return len(self.shares)

    @property
    def size(self) -> int:
        return self.group.size

    @cached_property
    def covariance(self) -> Tensor:
        """Σ_ij between the channels of edges i and j: (N, N, C, C)."""
        return self._mean([self._pairs(m, rows) for m, rows in self._taps])

    @cached_property
    def mean(self) -> Tensor:
        """Mean (N, C) of each channel."""
        return self._mean([self._means(m, rows) for m, rows in self._taps])

    @cached_property
    def second(self) -> Tensor:
        """E[x_i x_jᵀ], means included: (N, N, C, C)."""
        moments_of = []
        for moments, rows in self._taps:
            mean = self._means(moments, rows)
            moments_of.append(self._pairs(moments, rows) + torch.einsum("ic,jd->ijcd", mean, mean))
        return self._mean(moments_of)

    @cached_property
    def correlation(self) -> Tensor:
        """Pearson correlation between the channels of edges i and j (N, N, C, C); 0 where a channel is constant."""
        return self._mean([self._correlated(m, rows) for m, rows in self._taps])

    @cached_property
    def constant(self) -> Tensor:
        """Channels (N, C) that vary at no tap."""
        constants = [torch.stack([m.constant.cpu()[r] for m, r in zip(x.moments, rows)]) for x, rows in self._taps]
        return torch.stack(constants).all(0)

    @cached_property
    def silent(self) -> Tensor:
        """Channels (N, C) that are zero on all data: what becomes of dead units must not depend on their order."""
        energy = self.second.diagonal(dim1=2, dim2=3)[range(self.edges), range(self.edges)]
        return energy <= ROUNDING**2 * energy.amax(1, keepdim=True)

    def _means(self, moments: CrossMoments, rows: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([m.mean.cpu()[r] for m, r in zip(moments.moments, rows)])

    def _pairs(self, moments: CrossMoments, rows: tuple[Tensor, ...]) -> Tensor:
        result = torch.empty((self.edges,) * 2 + (self.size,) * 2, dtype=torch.float64)
        for i in range(self.edges):
            for j in range(i, self.edges):
                covariance = moments.covariance(i, j).cpu()[rows[i]][:, rows[j]]
                result[i, j] = (covariance + covariance.T) / 2 if i == j else covariance  # symmetric to the last bit
                result[j, i] = result[i, j].T.clone()
        return result

    def _correlated(self, moments: CrossMoments, rows: tuple[Tensor, ...]) -> Tensor:
        std = torch.stack([m.std.cpu()[r] for m, r in zip(moments.moments, rows)])
        constant = torch.stack([m.constant.cpu()[r] for m, r in zip(moments.moments, rows)]) | (std == 0)
        inverse = torch.where(constant, 0.0, 1 / torch.where(constant, 1.0, std))
        result = self._pairs(moments, rows)
        for i, j in np.ndindex(*result.shape[:2]):
            result[i, j] *= torch.outer(inverse[i], inverse[j])
        return result

    @staticmethod
    def _mean(tensors: list[Tensor]) -> Tensor:
        total = tensors[0]
        for tensor in tensors[1:]:
            total = total + tensor
        return total / len(tensors) if len(tensors) > 1 else total


@dataclass(frozen=True, eq=False)
class Solution:
    """For each edge T (``merge``) and U (``unmerge``), (C, C) float64.

    z = Σ αᵢ Tᵢ xᵢ are the common channels, Uᵢ z ≈ xᵢ. Their order is free, the same for all edges. Of ``details`` the
    largest over all groups is reported.
    """

    merge: Sequence[Tensor]
    unmerge: Sequence[Tensor]
    details: Mapping[str, float] = field(default_factory=dict)


class LinearMatching(ABC):
    """A Matcher that finds linear maps, group by group, from second moments.

    ``Matching.objective`` is, for each edge but the first, the share of its features' variance that comes back from the
    common channels, 1 − Σ var(x − U z) / Σ var(x), averaged over the mapped groups.
    """

    needs: frozenset[str] = frozenset({"features", "within"})
    exact: bool = False
    title: ClassVar[str]

    @abstractmethod
    def solve(self, features: Features) -> Solution:
        """The maps of one group; called once for each pair of matched blocks where the group is inside blocks."""

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Matching:
        statistics = problem.statistics
        if statistics is None or not {"features", "within"} <= statistics.reads:
            raise ArgumentError(
                f"{self.title} needs data, or statistics with the features' second moments inside each edge "
                "(vfx.collect(..., within=True))"
            )
        start = time.perf_counter()
        taps = linear_taps(problem.symmetry, statistics)
        run = _Run(self, problem, statistics, taps)
        chosen = [group for group in problem.symmetry.groups if group.index in taps]
        for group in track(chosen, self.title, len(chosen), problem.progress):
            run.add(group)
        return Matching(
            elements=tuple(run.elements),
            objective=tuple(float(np.mean(kept)) if kept else 1.0 for kept in run.kept[1:]),
            seconds=time.perf_counter() - start,
            details=run.details,
        )


def linear_taps(symmetry: Symmetry, statistics: Statistics) -> dict[int, list[Tap]]:
    """The taps of each group that takes a linear map; features that several groups move belong to none of them."""
    taps: dict[int, list[Tap]] = {}
    for tap in statistics.taps:
        for index in tap.groups:
            taps.setdefault(index, []).append(tap)
    taps_of = {}
    for group in symmetry.groups:
        groups = {group.index} | ({group.parent} if group.parent is not None else set())
        alone = all(set(tap.groups) == groups for tap in taps.get(group.index, ()))
        if alone and group.index in taps and mappable(symmetry, group):
            taps_of[group.index] = taps[group.index]
    return taps_of


def _stacked(blocks: Sequence[Element]) -> Element:
    """The elements of blocks as one."""
    index, matrix, dual = (np.stack([getattr(block, x) for block in blocks]) for x in ("index", "matrix", "dual"))
    return Element(index, matrix, dual=dual)


class _Run:
    """One matching: the elements of every edge, filled group after group."""

    def __init__(self, method: LinearMatching, problem: Problem, statistics: Statistics, taps: Mapping[int, list[Tap]]):
        self.method, self.statistics, self.taps = method, statistics, taps
        self.symmetry, self.shares = problem.symmetry, problem.shares
        self.edges = problem.program.edges
        hard = {group.index for group in self.symmetry.groups} - set(taps)
        self.elements = [identity(self.symmetry)]
        for edge in range(1, self.edges):
            self.elements.append(permuted(Ascent(self.symmetry, statistics, edge, hard).run()[0]))
        self.kept: list[list[float]] = [[] for _ in range(self.edges)]
        self.details: dict[str, float] = {}

    def add(self, group: Group) -> None:
        blocks = 1 if group.parent is None else group.outer
        solved = [self._solve(self._features(group, block)) for block in range(blocks)]
        for edge, elements in enumerate(self.elements):
            edge_blocks = [block[edge] for block in solved]
            elements[group.index] = edge_blocks[0] if group.parent is None else _stacked(edge_blocks)

    def _features(self, group: Group, block: int) -> Features:
        """What is known of a group; inside blocks, of the block that each edge's heads were matched to."""
        features = []
        for tap in self.taps[group.index]:
            chosen = [group.index] if group.parent is None else [group.parent, group.index]
            sizes = [self.symmetry.groups[index].size for index in chosen]
            table = grid(tap.groups, tap.digits, np.arange(tap.size)[:, None], chosen, sizes).reshape(-1, group.size)
            old = [
                block if group.parent is None else self._old_block(element, group.parent, block)
                for element in self.elements
            ]
            features.append((self.statistics.features[tap.key], tuple(torch.from_numpy(table[b]) for b in old)))
        return Features(group, self.shares, tuple(features))

    @staticmethod
    def _old_block(elements: Elements, outer: int, block: int) -> int:
        index = elements[outer].index
        assert index is not None, "blocks are permuted"
        return int(index[block])

    def _solve(self, features: Features) -> list[Element]:
        solution = self.method.solve(features)
        for name, value in solution.details.items():
            self.details[name] = max(value, self.details.get(name, -np.inf))
        between, spread = common(features, solution)
        for edge, kept in enumerate(self.kept):
            kept.append(_explained(features.covariance[edge, edge], between[edge], spread, solution.unmerge[edge]))
        return ordered(features, solution, between, spread)


def common(features: Features, solution: Solution) -> tuple[list[Tensor], Tensor]:
    """Covariance (C, C) of the common channels z = Σ αᵢ Tᵢ xᵢ with each edge's, and among themselves."""
    scaled = [share * merge for share, merge in zip(features.shares, solution.merge)]
    edges = range(features.edges)
    between = [sum((scaled[j] @ features.covariance[j, i] for j in edges), torch.zeros(())) for i in edges]
    return between, sum((between[i] @ scaled[i].T for i in edges), torch.zeros(()))


def ordered(features: Features, solution: Solution, between: list[Tensor], spread: Tensor) -> list[Element]:
    """The element of each edge: T and U, and the permutation nearest to T, the first edge's being the identity.

    Where T does not decide (channels left over by a merge), the correlation with the common channels does.
    """
    gains = []
    for edge, merge in enumerate(solution.merge):
        deviations = spread.diagonal().clamp_min(0).sqrt(), features.covariance[edge, edge].diagonal().sqrt()
        scale = torch.outer(*deviations)
        seen = scale > ROUNDING * scale.max()
        correlation = torch.where(seen, between[edge] / torch.where(seen, scale, 1.0), 0.0)
        gains.append(merge + NEARLY * float(merge.abs().max()) * correlation)
    place = np.argsort(assign(gains[0])[0])  # the common channel that stands where each channel of the first edge does
    elements = []
    for gain, merge, unmerge in zip(gains, solution.merge, solution.unmerge):
        nearest = assign(gain[place])[0]
        elements.append(Element(nearest, merge[place].numpy(), dual=unmerge[:, place].T.numpy()))
    return elements


def _explained(spread_before: Tensor, between: Tensor, spread: Tensor, unmerge: Tensor) -> float:
    """1 − Σ var(x − U z) / Σ var(x)."""
    total = float(spread_before.diagonal().sum())
    lost = total - 2 * float((unmerge * between.T).sum()) + float(((unmerge @ spread) * unmerge).sum())
    return 1 - lost / total if total > 0 else 1.0
