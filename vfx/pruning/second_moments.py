"""Second moments E[x xᵀ] of one network's features, where layers read them (``vfx.statistics.taps``).

Features are told apart by the groups that move them; a residual stream has several taps, whose moments are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.rows import unique_rows
from vfx.analyse.symmetry import Symmetry
from vfx.program import Program
from vfx.statistics.collect import collect

Moments = dict[tuple[int, ...], Tensor]


@dataclass(frozen=True)
class SecondMoments:
    """By the groups that move them: the ``digits`` (n, groups) of n features and E[x xᵀ] (n, n), float64.

    ``unread`` are the groups whose features no weight reads, such as queries and keys; ``each`` holds their moments
    apart, those that carry the dual map last.
    """

    digits: Mapping[tuple[int, ...], Index]
    matrix: Mapping[tuple[int, ...], Tensor]
    each: Mapping[tuple[int, ...], Sequence[Tensor]] = field(default_factory=dict)
    unread: frozenset[int] = frozenset()

    def squares(self, group: Group) -> NDArray[np.float64]:
        """E[x²] of each channel of a group, over all features it moves: (size,) or (blocks, size); 1 where unread."""
        result = np.zeros(group.blocks)
        for groups, digits in self.digits.items():
            if group.index in groups:
                np.add.at(
                    result, _block_and_channel(group, groups, digits), self.matrix[groups].diagonal().cpu().numpy()
                )
        result = result if result.any() else np.ones(group.blocks)
        return result if group.parent is not None else result[0]

    def of(self, group: Group) -> Tensor | None:
        """E[x xᵀ] of a group's features, ordered by block and channel; None where others move them too."""
        alone = {group.index} if group.parent is None else {group.parent, group.index}
        groups = next((groups for groups in self.digits if set(groups) == alone), None)
        if groups is None or len(self.digits[groups]) != np.prod(group.blocks):
            return None
        return _reduced(group, groups, self.digits[groups], self.matrix[groups].cpu())

    def factors(self, group: Group) -> list[Tensor]:
        """E[x xᵀ] of the features that multiply each other, each ordered by block and channel, summed over the rest."""
        return [
            _reduced(group, groups, self.digits[groups], matrix.cpu())
            for groups, matrices in self.each.items()
            if group.index in groups
            for matrix in matrices
        ]

    def products(self, group: Group) -> NDArray[np.float64]:
        """The product of E[x²] over those features: (size,) or (blocks, size)."""
        energies = [factor.diagonal().numpy() for factor in self.factors(group)]
        return np.prod(energies, axis=0).reshape(group.shape)


def _block_and_channel(group: Group, groups: tuple[int, ...], digits: Index) -> tuple[Index, Index]:
    channel = digits[:, groups.index(group.index)]
    return digits[:, groups.index(group.parent)] if group.parent in groups else np.zeros_like(channel), channel


def _reduced(group: Group, groups: tuple[int, ...], digits: Index, matrix: Tensor) -> Tensor:
    """A moment of features that several groups move, summed over where the other groups agree."""
    block, channel = _block_and_channel(group, groups, digits)
    feature = torch.from_numpy(block * group.size + channel)
    rest = [place for place, index in enumerate(groups) if index not in (group.index, group.parent)]
    _, other = unique_rows(digits[:, rest]) if rest else (None, np.zeros(len(digits), dtype=np.int64))
    result = torch.zeros(int(np.prod(group.blocks)), int(np.prod(group.blocks)), dtype=matrix.dtype)
    for number in np.unique(other):
        alike = torch.from_numpy(np.flatnonzero(other == number))
        result.index_put_((feature[alike][:, None], feature[alike]), matrix[alike][:, alike], accumulate=True)
    return result


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
    unread = frozenset(g.index for g in facts.groups if not any(m.role in ("in", "tied") for m in g.members))
    digits: dict[tuple[int, ...], Index] = {}
    total: Moments = {}
    count: dict[tuple[int, ...], int] = {}
    each: dict[tuple[int, ...], list[Tensor]] = {}
    for tap in statistics.taps:
        if not np.array_equal(digits.setdefault(tap.groups, tap.digits), tap.digits):
            continue  # some of these channels only: their tap says nothing of the others
        cross = statistics.features[tap.key]
        mean, samples = cross.moments[0].mean, cross.moments[0].count
        second = (cross.covariance(0, 0) + torch.outer(mean, mean)) * samples
        if not unread.isdisjoint(tap.groups):
            dual = any(standing is not None and standing[1] for standing in tap.sides)
            each.setdefault(tap.groups, []).insert(
                len(each.get(tap.groups, ())) if dual else 0, second / max(samples, 1)
            )
        total[tap.groups] = total[tap.groups] + second if tap.groups in total else second
        count[tap.groups] = count.get(tap.groups, 0) + samples
    return SecondMoments(digits, {groups: x / max(count[groups], 1) for groups, x in total.items()}, each, unread)
