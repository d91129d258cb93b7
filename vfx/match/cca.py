"""CCA merging (Horoi et al. 2024, §3): the map into the first edge's channels that is most correlated with them.

S_ii ← S_ii + γI, U Σ Vᵀ = svd(S_00^-½ S_0i S_ii^-½), T_i = S_00^½ U Vᵀ S_ii^-½ and its inverse for each edge i > 0; the
first edge stays as it is. γ is added to covariances in the features' own units, as in the paper and its public code;
``relative=True`` takes it as a share of their mean variance, which does not depend on the scale of a layer.

Canonical directions without correlation can be turned in any way; they follow the assignment that is most correlated.
Dead channels (zero on all data) are left out: their images would depend on their order. T is not orthogonal: layers
need REPAIR afterwards, and no BatchNorm may stand behind a T (``vfx.merge`` folds them first).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.match.linear import Features, LinearMatching, Solution

NULL = 1e-6  # share of the largest canonical correlation below which one is rounding


class CCAMerging(LinearMatching):
    """Canonical correlation analysis with ``gamma`` on the diagonal of the covariances."""

    title: ClassVar[str] = "CCA merging"

    @checked
    def __init__(self, gamma: float = 0.1, relative: bool = False):
        if not gamma > 0:
            raise ArgumentError(f"gamma must be positive, got {gamma}: covariances of dead channels are singular")
        self.gamma, self.relative = gamma, relative

    def solve(self, features: Features) -> Solution:
        alive = ~features.silent
        first = torch.diag(alive[0].double())
        merge, unmerge, worst = [first], [first], 1.0
        root, inverse = self._roots(features.covariance[0, 0])
        for edge in range(1, features.edges):
            live = alive[edge]
            there, back = self._roots(features.covariance[edge, edge][live][:, live])
            coherence = inverse @ features.covariance[0, edge][:, live] @ back
            turn = rotation(coherence, features.correlation[0, edge][:, live])
            merge.append(_columns(root @ turn @ back, live))
            unmerge.append(_columns((there @ turn.T @ inverse).T, live).T)
            worst = max(worst, _norm(merge[-1]) * _norm(unmerge[-1]))
        return Solution(merge, unmerge, {"condition": worst})

    def _roots(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """(S + γI)^½ and its inverse."""
        values, vectors = torch.linalg.eigh(covariance)
        scale = float(covariance.diagonal().mean()) if self.relative else 1.0
        roots = (values.clamp_min(0) + self.gamma * (scale or 1.0)).sqrt()
        return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def rotation(coherence: Tensor, correlation: Tensor) -> Tensor:
    """U Vᵀ of a matrix (C, n), n ≤ C; where it is not determined, what is closest to the most correlated assignment."""
    u, values, vt = torch.linalg.svd(coherence, full_matrices=True)
    rank = int((values > NULL * values.max()).sum()) if len(values) else 0
    turn = u[:, :rank] @ vt[:rank]
    if rank < len(vt):
        nearest = torch.zeros_like(coherence)
        nearest[linear_sum_assignment(correlation.numpy(), maximize=True)] = 1.0
        p, _, qt = torch.linalg.svd(u[:, rank:].T @ nearest @ vt[rank:].T, full_matrices=False)
        turn = turn + u[:, rank:] @ (p @ qt) @ vt[rank:]
    return turn


def _columns(matrix: Tensor, where: Tensor) -> Tensor:
    """(C, C) with the columns of a matrix (C, n) where ``where`` is true."""
    result = matrix.new_zeros(len(matrix), len(where))
    result[:, where] = matrix
    return result


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))
