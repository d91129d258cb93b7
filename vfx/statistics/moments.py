"""Exact streaming moments (Chan, Golub & LeVeque 1979): batches in float32, totals in float64.

Each batch is centred on its own mean before it is squared, so nothing cancels; the variance between batches enters
through the update of the means. The reference implementations average the batches' variances and lose that part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-6  # a channel whose deviation is below this share of its mean only varies by float32 rounding


class Moments:
    """Running mean and sum of squared deviations of C channels."""

    def __init__(self, channels: int, device: Any = None):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(channels, dtype=torch.float64, device=device)

    def update(self, count: int, mean: Tensor, m2: Tensor) -> Tensor:
        """Add ``count`` samples with their mean and squared deviations (C,); returns the shift of the mean."""
        total = self.count + count
        shift = mean - self.mean
        self.mean += shift * (count / total)
        self.m2 += m2 + shift**2 * (self.count * count / total)
        self.count = total
        return shift

    @property
    def std(self) -> Tensor:
        """Population standard deviation (C,)."""
        return (self.m2 / max(self.count, 1)).clamp_min(0).sqrt()

    @property
    def constant(self) -> Tensor:
        """Channels (C,) that do not vary: rounding of a batch's mean must not pass for a signal."""
        return self.std <= ROUNDING * self.mean.abs()


class CrossMoments:
    """Moments of N networks' features and the cross products between them.

    ``cross[i, j]`` (i < j) is Σ (x_i − μ_i)(x_j − μ_j)ᵀ over all samples, float64 (C, C).
    """

    def __init__(self, edges: int, channels: int, device: Any = None):
        self.moments = [Moments(channels, device) for _ in range(edges)]
        self.cross = {
            (i, j): torch.zeros(channels, channels, dtype=torch.float64, device=device)
            for i in range(edges)
            for j in range(i + 1, edges)
        }

    def update(self, features: list[Tensor]) -> None:
        """Add a batch: one float matrix (C, samples) for each edge; they are centred in place."""
        before, count = self.moments[0].count, features[0].shape[1]
        shifts = []
        for moments, x in zip(self.moments, features):
            mean = x.mean(1)
            x.sub_(mean[:, None])
            m2 = torch.linalg.vector_norm(x, dim=1).double() ** 2
            shifts.append(moments.update(count, mean.double(), m2))
        weight = before * count / (before + count)
        for (i, j), total in self.cross.items():
            total += features[i] @ features[j].T
            if weight:
                total.addr_(shifts[i], shifts[j], alpha=weight)

    def correlation(self, i: int, j: int) -> Tensor:
        """Pearson correlation (C, C) between the channels of edges i < j; 0 where a channel is constant."""
        one, other = self.moments[i], self.moments[j]
        scale = torch.outer(one.m2.sqrt(), other.m2.sqrt())
        varies = torch.outer(~one.constant, ~other.constant) & (scale > 0)
        return torch.where(varies, self.cross[i, j] / torch.where(varies, scale, 1.0), 0.0)


def channel_rows(x: Tensor, dim: int) -> Tensor:
    """A fresh matrix (C, samples) of a tensor's channels along ``dim``."""
    rows = x.movedim(dim, 0)
    rows = rows.reshape(rows.shape[0], -1)
    return rows.clone() if rows.data_ptr() == x.data_ptr() else rows


def batch_moments(x: Tensor, dim: int) -> tuple[int, Tensor, Tensor]:
    """Samples, mean and squared deviations (C,) of one batch along ``dim``, in float64."""
    dims = [d for d in range(x.ndim) if d != dim % x.ndim]
    count = x.numel() // x.shape[dim]
    if not dims:
        raise ValueError("moments need at least one axis besides the channels")
    variance, mean = torch.var_mean(x, dims, correction=0)
    return count, mean.double(), variance.double() * count
