"""Second moments E[x xᵀ] of one network's features, where layers read them (``vfx.statistics.taps``).

Features are told apart by the groups that move them; a residual stream has several taps, whose moments are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.program import Program
from vfx.statistics.collect import collect


@dataclass(frozen=True)
class SecondMoments:
    """By the groups that move them: the ``digits`` (n, groups) of n features and E[x xᵀ] (n, n), float64."""

    digits: dict[tuple[int, ...], Index]
    matrix: dict[tuple[int, ...], Tensor]

    def squares(self, group: Group) -> NDArray[np.float64]:
        """E[x²] of each channel of a group, over all features it moves: (size,) or (blocks, size); 1 where unread."""
        result = np.zeros(group.blocks)
        for groups, digits in self.digits.items():
            if group.index in groups:
                channel = digits[:, groups.index(group.index)]
                block = digits[:, groups.index(group.parent)] if group.parent in groups else np.zeros_like(channel)
                np.add.at(result, (block, channel), self.matrix[groups].diagonal().cpu().numpy())
        result = result if result.any() else np.ones(group.blocks)
        return result if group.parent is not None else result[0]


@torch.no_grad()
def second_moments(
    program: Program,
    facts: Symmetry,
    data: Any,
    *,
    max_samples: int | None = None,
    device: Any = None,
    progress: bool = True,
) -> SecondMoments:
    """Read the features of a single network in one pass over ``data``."""
    statistics = collect(
        program, facts, data, max_samples=max_samples, layers=False, within=True, device=device, progress=progress
    )
    digits: dict[tuple[int, ...], Index] = {}
    total: dict[tuple[int, ...], Tensor] = {}
    count: dict[tuple[int, ...], int] = {}
    for tap in statistics.taps:
        if not np.array_equal(digits.setdefault(tap.groups, tap.digits), tap.digits):
            continue  # some of these channels only: their tap says nothing of the others
        cross = statistics.features[tap.key]
        mean, samples = cross.moments[0].mean, cross.moments[0].count
        second = (cross.covariance(0, 0) + torch.outer(mean, mean)) * samples
        total[tap.groups] = total[tap.groups] + second if tap.groups in total else second
        count[tap.groups] = count.get(tap.groups, 0) + samples
    return SecondMoments(digits, {groups: x / max(count[groups], 1) for groups, x in total.items()})
