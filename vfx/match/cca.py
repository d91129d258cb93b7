"""CCA merging (Horoi et al. 2024, §3): the map into the first edge's channels that is most correlated with them.

S_ii ← S_ii + γI, U Σ Vᵀ = svd(S_00^-½ S_0i S_ii^-½), T_i = S_00^½ U Vᵀ S_ii^-½ and its inverse for each edge i > 0; the
first edge stays as it is. γ is added to covariances in the features' own units, as in the paper and its public code;
``relative=True`` takes it as a share of their mean variance, which does not depend on the scale of a layer.

Canonical directions that carry no correlation (dead channels) can be turned in any way; they follow the permutation
that is most correlated. T is not orthogonal: layers need REPAIR afterwards, and no BatchNorm may stand behind a T
(``vfx.merge`` folds them first).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vfx.errors import ArgumentError
from vfx.match.linear import Features, LinearMatching, Solution
from vfx.match.matcher import assign

NULL = 1e-6  # share of the largest canonical correlation below which one is rounding


class CCAMerging(LinearMatching):
    """Canonical correlation analysis with ``gamma`` on the diagonal of the covariances."""

    title: ClassVar[str] = "CCA merging"

    def __init__(self, gamma: float = 0.1, relative: bool = False):
        if not gamma > 0:
            raise ArgumentError(f"gamma must be positive, got {gamma}: covariances of dead channels are singular")
        self.gamma, self.relative = gamma, relative

    def solve(self, features: Features) -> Solution:
        roots = [self._roots(features.covariance[i, i]) for i in range(features.edges)]
        eye = torch.eye(features.size, dtype=torch.float64)
        merge, unmerge = [eye], [eye]
        worst = 1.0
        root, inverse = roots[0]
        for edge in range(1, features.edges):
            own, own_inverse = roots[edge]
            turn = rotation(inverse @ features.covariance[0, edge] @ own_inverse, features.correlation[0, edge])
            merge.append(root @ turn @ own_inverse)
            unmerge.append(own @ turn.T @ inverse)
            worst = max(worst, float(torch.linalg.matrix_norm(merge[-1], 2) * torch.linalg.matrix_norm(unmerge[-1], 2)))
        return Solution(merge, unmerge, {"condition": worst})

    def _roots(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """(S + γI)^½ and its inverse."""
        values, vectors = torch.linalg.eigh(covariance)
        scale = float(covariance.diagonal().mean()) if self.relative else 1.0
        roots = (values.clamp_min(0) + self.gamma * (scale or 1.0)).sqrt()
        return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def rotation(coherence: Tensor, correlation: Tensor) -> Tensor:
    """U Vᵀ (C, C) of a matrix; on its null space the rotation closest to the most correlated permutation."""
    u, values, vt = torch.linalg.svd(coherence)
    rank = int((values > NULL * values[0]).sum())
    if rank == len(values):
        return u @ vt
    nearest = torch.eye(len(values), dtype=u.dtype)[assign(correlation)[0]]
    p, _, qt = torch.linalg.svd(u[:, rank:].T @ nearest @ vt[rank:].T)
    return u[:, :rank] @ vt[:rank] + u[:, rank:] @ (p @ qt) @ vt[rank:]
