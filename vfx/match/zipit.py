"""ZipIt! (Stoica et al. 2023, §4): greedy merging of correlated features, inside a network as well as between networks.

The N·C features of all edges start as clusters of their own. The two most correlated clusters are merged until C are
left; similarities of the merged one are the elementwise minimum of its parts', times ``a`` (a ≤ 0: a merged cluster is
never merged again). Merges of two clusters that both hold features of one and the same edge alone are limited to
int((N − 1) C / N · b) for each edge. A merged channel is the weighted mean of its cluster, and each feature of the
cluster reads it back.

The literal search looks at all (NC)² pairs before each merge. Here each cluster keeps its best partner: a merge changes
one row, and only rows whose best partner was part of it are searched again. The merges are the same, ties included.

The public default a = 0.3 holds back merges of what was merged before; where one feature of an edge has several good
partners that costs accuracy (ResNet20: ``benchmarks/results/methods.md``), so a is 1 here.

The public implementation differs in two points that depend on the order of the edges: a cluster of several edges counts
as one of its first edge's, and an edge may merge inside once even if its budget is zero. Dead features (zero on all
data) are left out of the means, which so do not depend on which of them were merged.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vfx.analyse.places import Index
from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.match.linear import Features, LinearMatching, Solution

Similarity = NDArray[np.float64]
SEVERAL = -1  # owner of a cluster that holds features of more than one edge


class ZipIt(LinearMatching):
    """Merges features by correlation; ``a`` scales down what was merged before, ``b`` limits merges inside an edge."""

    title: ClassVar[str] = "ZipIt!"

    @checked
    def __init__(self, a: float = 1.0, b: float = 0.125):
        if not 0 <= b <= 1:
            raise ArgumentError(f"b must be between 0 and 1, got {b}")
        if not a <= 1:
            raise ArgumentError(f"a must be at most 1, got {a}")
        self.a, self.b = a, b

    def solve(self, features: Features) -> Solution:
        edges, size = features.edges, features.size
        if self.a <= 0 and edges > 2:
            raise ArgumentError(
                f"a = {self.a} merges each feature once: {edges} networks cannot become one; take a > 0"
            )
        cluster = clusters(similarities(features), edges, self.a, self.b)
        unmerge = torch.nn.functional.one_hot(torch.from_numpy(cluster), size).double().reshape(edges, size, size)
        unmerge *= ~features.silent[:, :, None]
        shares = torch.tensor(features.shares, dtype=torch.float64)
        weight = torch.einsum("i,icm->m", shares, unmerge)  # zero for dead features and edges without a share
        scale = torch.where(weight > 0, 1 / torch.where(weight > 0, weight, 1.0), 0.0)
        inside = (unmerge.sum(1) > 1).any(0).double().mean()  # clusters of several features of one edge
        return Solution(
            [scale[:, None] * columns.T for columns in unmerge], list(unmerge), {"merged inside": float(inside)}
        )


def similarities(features: Features) -> Similarity:
    """Correlations of all edges' features (N·C, N·C).

    A constant channel has none. Two of one value (dead ones) are one feature: 1, down to −1 for opposite values; and −1
    with any channel that varies, which would lose its meaning.
    """
    total = features.edges * features.size
    constant, mean = features.constant.reshape(-1), features.mean.reshape(-1)
    similarity = features.correlation.permute(0, 2, 1, 3).reshape(total, total).clone()
    similarity[constant[:, None] != constant] = -1.0
    first, second = torch.meshgrid(mean[constant], mean[constant], indexing="ij")
    scale = first.abs() + second.abs()
    alike = 1 - 2 * (first - second).abs() / torch.where(scale > 0, scale, 1.0)
    where = torch.nonzero(constant)
    similarity[where, where.T] = alike
    return similarity.numpy()


def clusters(similarity: Similarity, edges: int, a: float, b: float) -> Index:
    """The cluster (0 … C−1) of each of the N·C features, from their similarities (N·C, N·C)."""
    total = len(similarity)
    parent = np.arange(total)
    for kept, gone in merges(similarity, edges, a, b):
        parent[parent == gone] = kept
    return np.unique(parent, return_inverse=True)[1]


def merges(similarity: Similarity, edges: int, a: float, b: float) -> list[tuple[int, int]]:
    """The pairs (kept, gone) merged in order; a cluster goes by its first feature. ``similarity`` is symmetric."""
    search = _Search(similarity, edges, a, b)
    return [search.merge() for _ in range(len(similarity) - len(similarity) // edges)]


class _Search:
    """Clusters with the best partner of each."""

    def __init__(self, similarity: Similarity, edges: int, a: float, b: float):
        size = len(similarity) // edges
        self.a, self.budget = a, np.full(edges, int((edges - 1) * size / edges * b + 1e-9))
        self.similarity = similarity.astype(np.float64)
        np.fill_diagonal(self.similarity, -np.inf)
        self.owner = np.repeat(np.arange(edges), size)
        self.barred = np.zeros(len(similarity))  # −inf for clusters that are merged no more
        self.best = np.empty(len(similarity))
        self.partner = np.empty(len(similarity), np.int64)
        self.stale = np.zeros(len(similarity), bool)  # ``best`` is only an upper bound
        self._search(np.arange(len(similarity)))

    def merge(self) -> tuple[int, int]:
        """Merge the most similar pair that may be merged; of equal ones the first."""
        kept, gone = self._first()
        self.stale |= (self.partner == kept) | (self.partner == gone)
        owner = int(self.owner[kept]) if self.owner[kept] == self.owner[gone] else SEVERAL
        if owner != SEVERAL:
            self.budget[owner] -= 1
            if self.budget[owner] <= 0:
                self.stale |= (self.owner == owner) & (self.owner[self.partner] == owner)
        self.owner[kept] = owner
        self._replace(kept, gone)
        if self.barred[kept] == 0:
            self._search([kept])
            self._offer(kept)
        return kept, gone

    def _first(self) -> tuple[int, int]:
        while self.stale[first := int(self.best.argmax())]:
            self._search([first])
        if self.best[first] == -np.inf:  # a ≤ 0 left features of one edge alone: they merge whatever the budget
            self.budget[:] = len(self.best)
            self._search(np.flatnonzero(self.barred == 0))
            return self._first()
        return first, int(self.partner[first])

    def _replace(self, kept: int, gone: int) -> None:
        """The merged cluster in the place of its first part."""
        row = np.minimum(self.similarity[kept], self.similarity[gone])
        row *= abs(self.a) or 1.0  # −inf stays −inf
        self.similarity[kept] = self.similarity[:, kept] = row
        self.similarity[kept, kept] = -np.inf
        merged = [gone] if self.a > 0 else [kept, gone]
        self.barred[merged] = self.best[merged] = -np.inf
        self.stale[merged] = False

    def _offer(self, cluster: int) -> None:
        """Let clusters take a changed one for their partner where it is better than what they have."""
        value = np.where(self._allowed(cluster), self.similarity[cluster] + self.barred, -np.inf)
        more, equal = value > self.best, (value == self.best) & (value > -np.inf)
        better = more | (equal & ~self.stale & (cluster < self.partner))
        self.best[better] = value[better]
        self.partner[better] = cluster
        self.stale[more] = False

    def _allowed(self, cluster: int) -> NDArray[np.bool_]:
        """Clusters that another may be merged with as far as the budgets go."""
        owner = self.owner[cluster]
        if owner == SEVERAL or self.budget[owner] > 0:
            return np.ones(len(self.owner), bool)
        return self.owner != owner

    def _search(self, rows: Index | list[int]) -> None:
        """Find the best partners of some clusters anew."""
        for row in rows:
            values = self.similarity[row] + self.barred
            owner = self.owner[row]
            if owner != SEVERAL and self.budget[owner] <= 0:
                values[self.owner == owner] = -np.inf
            self.partner[row] = values.argmax()
            self.best[row] = values[self.partner[row]]
        self.stale[rows] = False
