"""The sums that a linear least-squares problem is made of, accumulated in float64.

For rows x (K,) and goals y (O,) of one or several independent groups: Σ x xᵀ, Σ x yᵀ, Σ x, Σ y, Σ y² and their number.
They are all that a solution, its error on the same rows, and the moments of what it gives depend on; they add up over
batches, and over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class Sums:
    """``gram`` (G, K, K), ``cross`` (G, K, O), ``inputs`` (G, K), ``goals`` (G, O), ``squares`` (G, O), ``count``."""

    gram: Tensor
    cross: Tensor
    inputs: Tensor
    goals: Tensor
    squares: Tensor
    count: int

    def __iadd__(self, other: Sums) -> Sums:
        for name in _TENSORS:
            getattr(self, name).add_(getattr(other, name))
        self.count += other.count
        return self

    def __add__(self, other: Sums) -> Sums:
        return self._mapped(other.count, lambda name, tensor: tensor + getattr(other, name))

    def double(self) -> Sums:
        return self._mapped(0, lambda name, tensor: tensor.double())

    def _mapped(self, count: int, change: Callable[[str, Tensor], Tensor]) -> Sums:
        tensors = {name: change(name, getattr(self, name)) for name in _TENSORS}
        return Sums(**tensors, count=self.count + count)

    def tensors(self) -> list[Tensor]:
        """All of them, the number of rows as a tensor; ``of_tensors`` is the way back."""
        return [*(getattr(self, name) for name in _TENSORS), torch.tensor(self.count)]

    @staticmethod
    def of_tensors(tensors: Sequence[Tensor]) -> Sums:
        """What ``tensors`` gave."""
        return Sums(**dict(zip(_TENSORS, tensors)), count=int(tensors[-1]))

    def part(self, outputs: Tensor) -> Sums:
        """The sums of some outputs."""
        return replace(
            self, cross=self.cross[:, :, outputs], goals=self.goals[:, outputs], squares=self.squares[:, outputs]
        )

    def with_ones(self) -> tuple[Tensor, Tensor]:
        """XᵀX and XᵀY of rows with a one behind them, which reads the bias."""
        count = self.inputs.new_full((len(self.inputs), 1, 1), self.count)
        left = torch.cat([self.gram, self.inputs[:, None, :]], 1)
        right = torch.cat([self.inputs[:, :, None], count], 1)
        return torch.cat([left, right], 2), torch.cat([self.cross, self.goals[:, None, :]], 1)

    def moments(self, matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (G, O) of x W + b."""
        count = max(self.count, 1)
        mean = self._products(matrix) / count
        second = (matrix * (self.gram @ matrix)).sum(1) / count
        return mean + bias, (second - mean.square()).clamp_min(0)

    def _products(self, matrix: Tensor) -> Tensor:
        """Σ x W, (G, O)."""
        return (self.inputs[:, None, :] @ matrix)[:, 0]


_TENSORS = tuple(field.name for field in fields(Sums) if field.name != "count")


def sums_of(rows: Tensor, goals: Tensor) -> Sums:
    """The sums of one batch, in its own precision: rows (G, R, K) and goals (G, R, O)."""
    return Sums(
        rows.mT @ rows,
        rows.mT @ goals,
        rows.sum(1, dtype=torch.float64),
        goals.sum(1, dtype=torch.float64),
        torch.linalg.vector_norm(goals, dim=1).double().square(),
        rows.shape[1],
    )
