"""What a matcher is, and the assignment problem that all of them solve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vfx.analyse.symmetry import Index, Permutations, Symmetry
from vfx.program import Program
from vfx.statistics.collect import Statistics

Gain = NDArray[np.floating]


@dataclass(frozen=True)
class Matching:
    """One permutation per group for each edge (the first edge's is the identity), and the objective reached."""

    permutations: tuple[Permutations, ...]
    objective: tuple[float, ...] = ()
    sweeps: tuple[int, ...] = ()
    seconds: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)


class Matcher(Protocol):
    """Finds, for each edge, the group element that brings it closest to the first edge."""

    needs_data: bool

    def __call__(self, program: Program, symmetry: Symmetry, statistics: Statistics | None, seed: int) -> Matching: ...


def assign(gain: Tensor | Gain) -> tuple[Index, float]:
    """p maximising Σ_c gain[c, p[c]], and that sum."""
    matrix = gain.cpu().numpy() if isinstance(gain, Tensor) else gain
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    return columns.astype(np.int64), float(matrix[rows, columns].sum())


def best_over_blocks(gains: Gain) -> Gain:
    """Gain (size, size) between channels that stand for blocks, from those of their elements (size, size, b, b).

    Each pair of blocks counts what its own best assignment of elements gives: the value for any order inside.
    """
    size = len(gains)
    return np.array([[assign(gains[i, j])[1] for j in range(size)] for i in range(size)]).reshape(size, size)
