"""Activation matching (Li et al. 2015; Git Re-Basin §3.1; *Vanishing Feature* App. F.2).

For each group the Pearson correlation between the features of two edges is summed over the group's taps and maximised
by one linear assignment. Where two groups share features (groups × channels of a grouped convolution), the first is
matched on the best order of the second for each pair of its channels; then they are optimised in turn until the sum
stops growing.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import numpy as np

from vfx.analyse.symmetry import Index, Symmetry
from vfx.errors import ArgumentError
from vfx.match.matcher import Gain, Matching, assign, best_over_blocks, identity
from vfx.program import Program
from vfx.statistics.collect import Statistics
from vfx.statistics.taps import Tap

MAX_SWEEPS = 100


class ActivationMatching:
    """One assignment per group on the correlations of ``statistics``."""

    needs_data = True

    def __call__(self, program: Program, symmetry: Symmetry, statistics: Statistics | None, seed: int = 0) -> Matching:
        if statistics is None or "features" not in statistics.reads:
            raise ArgumentError("activation matching needs data, or statistics collected with features")
        start = time.perf_counter()
        results = [self._match(symmetry, statistics, edge) for edge in range(1, program.edges)]
        return Matching(
            permutations=(identity(symmetry), *(permutations for permutations, _, _ in results)),
            objective=tuple(objective for _, objective, _ in results),
            sweeps=tuple(sweeps for _, _, sweeps in results),
            seconds=time.perf_counter() - start,
        )

    def _match(self, symmetry: Symmetry, statistics: Statistics, edge: int) -> tuple[dict[int, Index], float, int]:
        found = identity(symmetry)
        gains = [(tap, statistics.features[tap.key].correlation(0, edge).cpu().numpy()) for tap in statistics.taps]
        taps_of: dict[int, list[tuple[Tap, Gain]]] = {}
        for tap, gain in gains:
            for group in tap.groups:
                taps_of.setdefault(group, []).append((tap, gain))
        coupled = any(len(tap.groups) > 1 for tap in statistics.taps)
        unmatched = set(taps_of)
        total, sweeps = -np.inf, 0
        while sweeps < (MAX_SWEEPS if coupled else 1):
            sweeps += 1
            value = 0.0
            for group, taps in taps_of.items():
                unmatched.discard(group)
                gain = np.sum([marginal(tap, matrix, group, found, unmatched) for tap, matrix in taps], axis=0)
                found[group], best = assign(gain)
                value += best
            if value <= total * (1 + 1e-12):
                break
            total = value
        return found, float(total), sweeps


def marginal(tap: Tap, gain: Gain, group: int, permutations: dict[int, Index], unmatched: Collection[int] = ()) -> Gain:
    """Gain (size, size) of one group's channels: the tap's other groups stay as they are, or at their best if unknown.

    ``unmatched`` groups have no permutation yet: what shares the axis with one counts in its best order.
    """
    if len(tap.groups) == 1:
        return gain
    column = tap.groups.index(group)
    size = len(permutations[group])
    others = np.delete(tap.digits, column, axis=1)
    combinations, other = np.unique(others, axis=0, return_inverse=True)
    grid = np.empty((size, len(combinations)), np.int64)  # the feature with channel c and combination o of the others
    grid[tap.digits[:, column], other.reshape(-1)] = np.arange(tap.size)
    rest = np.delete(tap.groups, column)
    if any(g in unmatched for g in rest):
        return best_over_blocks(gain[grid[:, None, :, None], grid[None, :, None, :]])
    row = {tuple(digits): index for index, digits in enumerate(combinations.tolist())}
    moved = np.stack([permutations[g][combinations[:, k]] for k, g in enumerate(rest)], axis=1)
    image = np.array([row[tuple(digits)] for digits in moved.tolist()])
    return gain[grid[:, None, :], grid[:, image][None]].sum(-1)
