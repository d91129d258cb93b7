"""Exact streaming moments (Chan, Golub & LeVeque 1979): batches in float32, totals in float64.

Each batch is centred on its own mean before it is squared, so nothing cancels; the variance between batches enters
through the update of the means. The reference implementations average the batches' variances and lose that part.

A complex activation counts by its real and imaginary parts, as two samples of its channel.

Time goes into memory, not arithmetic: centring writes straight into the rows that the matrix product reads, and those
rows are buffers used again (``Workspace``), since a fresh large tensor costs page faults.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vfx.complex_numbers import real_parts

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

    ``cross[i, j]`` is Σ (x_i − μ_i)(x_j − μ_j)ᵀ over all samples, float64 (C, C): for i < j, and for i = j where
    ``within`` asks for it. ``between=False`` leaves out the pairs of different networks. ``channels`` is C, or each
    network's own.
    """

    def __init__(
        self,
        edges: int,
        channels: int | Sequence[int],
        device: Any = None,
        *,
        within: bool = False,
        between: bool = True,
    ):
        sizes = [channels] * edges if isinstance(channels, int) else channels
        self.moments = [Moments(size, device) for size in sizes]
        self.cross = {
            (i, j): torch.zeros(sizes[i], sizes[j], dtype=torch.float64, device=device)
            for i in range(edges)
            for j in range(i, edges)
            if (within if i == j else between)
        }

    def update(self, features: list[Tensor]) -> None:
        """Add a batch: one float matrix (C, samples) for each edge; they are centred in place."""
        means = [x.mean(1) for x in features]
        self._add([x.sub_(mean[:, None]) for x, mean in zip(features, means)], means)

    def read(self, values: list[Tensor], dim: int, workspace: Workspace) -> None:
        """Add a batch: one activation for each edge, its channels along ``dim``; nothing is changed in place."""
        rows, means = zip(*(centred_rows(x, dim, workspace, edge) for edge, x in enumerate(values)))
        self._add(list(rows), list(means))

    def _add(self, rows: list[Tensor], means: list[Tensor]) -> None:
        """Centred rows (C, samples) and the means (C,) that were taken off."""
        before, count = self.moments[0].count, rows[0].shape[1]
        shifts = [
            moments.update(count, mean.double(), torch.linalg.vector_norm(x, dim=1).double() ** 2)
            for moments, x, mean in zip(self.moments, rows, means)
        ]
        weight = before * count / (before + count)
        for (i, j), total in self.cross.items():
            total += rows[i] @ rows[j].T
            if weight:
                total.addr_(shifts[i], shifts[j], alpha=weight)

    def covariance(self, i: int, j: int) -> Tensor:
        """Population covariance (C, C) between the channels of two edges, or of one (where it was asked for)."""
        total = self.cross[i, j] if i <= j else self.cross[j, i].T
        return total / max(self.moments[0].count, 1)

    def correlation(self, i: int, j: int) -> Tensor:
        """Pearson correlation (C, C) between the channels of edges i < j; 0 where a channel is constant."""
        first, second = self.moments[i], self.moments[j]
        scale = torch.outer(first.m2.sqrt(), second.m2.sqrt())
        varies = torch.outer(~first.constant, ~second.constant) & (scale > 0)
        return torch.where(varies, self.cross[i, j] / torch.where(varies, scale, 1.0), 0.0)


def channel_rows(x: Tensor, dim: int) -> Tensor:
    """A fresh matrix (C, samples) of a tensor's channels along ``dim``."""
    rows = real_parts(x).movedim(dim, 0)
    rows = rows.reshape(rows.shape[0], -1)
    return rows.clone() if rows.data_ptr() == x.data_ptr() else rows


class Workspace:
    """Buffers that are used again from tap to tap and from batch to batch; each is as large as its largest use."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def take(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor; it overwrites what the slot held before."""
        key, size = (slot, device, dtype), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


def centred_rows(x: Tensor, dim: int, workspace: Workspace, slot: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix (C, samples) of a tensor's channels along ``dim``, each minus its mean, and the means (C,)."""
    channels = real_parts(x).movedim(dim, 0)
    return _centred(channels, mean := _channel_means(channels), workspace, slot), mean


def _channel_means(channels: Tensor) -> Tensor:
    dtype = torch.promote_types(channels.dtype, torch.float32)
    return channels.mean(list(range(1, channels.ndim)), dtype=dtype) if channels.ndim > 1 else channels.to(dtype)


def _centred(channels: Tensor, mean: Tensor, workspace: Workspace, slot: int) -> Tensor:
    """The transposition, the copy and the centring in one pass over memory."""
    rows = workspace.take(slot, tuple(channels.shape), mean.dtype, mean.device)
    torch.sub(channels, mean.reshape(-1, *[1] * (channels.ndim - 1)), out=rows)
    return rows.view(rows.shape[0], -1)


BLOCK = 1 << 20  # elements that are centred and squared while they are in the cache


def batch_moments(x: Tensor, dim: int) -> tuple[int, Tensor, Tensor]:
    """Samples, mean and squared deviations (C,) of one batch along ``dim``, in float64."""
    if x.ndim < 2:
        raise ValueError("moments need at least one axis besides the channels")
    channels = real_parts(x).movedim(dim, 0)
    mean, workspace = _channel_means(channels), Workspace()
    m2 = torch.zeros(len(mean), dtype=torch.float64, device=x.device)
    size = max(1, BLOCK * channels.shape[1] // max(channels.numel(), 1))
    for block in channels.split(size, 1):
        m2 += torch.linalg.vector_norm(_centred(block, mean, workspace, 0), dim=1).double() ** 2
    return channels[0].numel(), mean.double(), m2
