"""ZipIt!'s greedy search gives the merges of its definition, and its maps the weighted means of the clusters."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
import torch
from conftest import close

from vfx.analyse.groups import Group
from vfx.errors import ArgumentError
from vfx.match.linear import Features
from vfx.match.zipit import ZipIt, clusters, merges, similarities
from vfx.statistics.moments import CrossMoments


def literal(similarity: np.ndarray, edges: int, a: float, b: float) -> list[tuple[int, int]]:
    """The definition: before each merge all pairs are looked at, then a row and a column are taken out."""
    total, size = len(similarity), len(similarity) // edges
    table, names = similarity.copy(), list(range(total))
    members = [{feature // size} for feature in range(total)]
    merged, budget, lifted = [False] * total, [int((total - size) / edges * b + 1e-9)] * edges, False
    found = []
    while len(names) > size:
        pairs = []
        for r in range(len(names)):
            for c in range(r + 1, len(names)):
                inside = members[r] == members[c] and len(members[r]) == 1
                spent = inside and budget[next(iter(members[r]))] <= 0 and not lifted
                if not spent and not (a <= 0 and (merged[r] or merged[c])):
                    pairs.append((-table[r, c], r, c))
        if not pairs:
            lifted = True
            continue
        _, r, c = min(pairs)
        if members[r] == members[c] and len(members[r]) == 1:
            budget[next(iter(members[r]))] -= 1
        found.append((names[r], names[c]))
        table[r, :] = table[:, r] = a * np.minimum(table[r], table[c])
        table = np.delete(np.delete(table, c, 0), c, 1)
        members[r], merged[r] = members[r] | members[c], True
        del names[c], members[c], merged[c]
    return found


def _correlations(total: int, samples: int, seed: int) -> np.ndarray:
    found = np.corrcoef(np.random.default_rng(seed).standard_normal((total, samples)))
    return (found + found.T) / 2


# features merged once (a ≤ 0) leave the number that one network has only where there are two
@pytest.mark.parametrize(("edges", "a"), [(2, -1.0), *product([2, 3, 4], [0.05, 0.3, 1.0])])
@pytest.mark.parametrize("b", [0.0, 0.125, 0.5, 1.0])
def test_merges_are_those_of_the_definition(edges: int, a: float, b: float) -> None:
    for seed in range(6):
        size = 1 + 2 * seed
        similarity = _correlations(edges * size, 12, seed)
        if seed % 2:
            similarity = similarity.round(1)  # ties
        assert merges(similarity, edges, a, b) == literal(similarity, edges, a, b)


def test_the_parameters_matter() -> None:
    """Negative control of the test above."""
    similarity = _correlations(24, 6, 0)
    found = merges(similarity, 2, 0.3, 0.5)
    assert found != literal(similarity, 2, 1.0, 0.5)
    assert found != literal(similarity, 2, 0.3, 0.0)


def test_the_search_is_much_faster_than_the_definition() -> None:
    """The literal loop is cubic: at 96 channels it takes over 20 times as long already."""
    similarity = _correlations(192, 40, 0)
    start = time.process_time()
    expected = literal(similarity, 2, 0.3, 0.125)
    middle = time.process_time()
    assert merges(similarity, 2, 0.3, 0.125) == expected
    assert middle - start > 20 * (time.process_time() - middle)


def _features(values: list[torch.Tensor], shares: tuple[float, ...]) -> Features:
    size = len(values[0])
    moments = CrossMoments(len(values), size, within=True)
    moments.update([value.clone() for value in values])
    group = Group(0, size, ())
    return Features(group, shares, ((moments, (torch.arange(size),) * len(values)),))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.5, 0.3)])
def test_a_common_channel_is_the_weighted_mean_of_its_cluster(shares: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(7, 30, generator=generator, dtype=torch.float64) for _ in shares]
    features = _features(values, shares)
    found = ZipIt(a=0.3, b=0.5).solve(features)
    cluster = clusters(similarities(features), len(shares), 0.3, 0.5).reshape(len(shares), 7)
    common = sum(share * merge @ x for share, merge, x in zip(shares, found.merge, values))
    for index in range(7):
        members = [(e, c) for e in range(len(shares)) for c in range(7) if cluster[e, c] == index]
        weight = sum(shares[e] for e, _ in members)
        close(common[index], sum(shares[e] * values[e][c] for e, c in members) / weight, 1e-12)  # type: ignore[index]
        for edge, channel in members:
            close(found.unmerge[edge][channel], torch.eye(7, dtype=torch.float64)[index], 0)
    back = sum(share * merge @ unmerge for share, merge, unmerge in zip(shares, found.merge, found.unmerge))
    close(back, torch.eye(7, dtype=torch.float64), 1e-12)


def test_dead_features_count_for_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(6, 40, generator=generator, dtype=torch.float64) for _ in range(2)]
    values[0][2], values[1][[1, 4]] = 0.0, 0.0
    found = ZipIt().solve(_features(values, (0.5, 0.5)))
    for own, dead in zip(zip(found.merge, found.unmerge), ([2], [1, 4])):
        assert not own[0][:, dead].any()
        assert not own[1][dead].any()
        assert (own[0].sum(0) > 0).sum() == 6 - len(dead)
    assert all(torch.isfinite(matrix).all() for matrix in (*found.merge, *found.unmerge))


def test_an_edge_without_a_share_gives_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(5, 40, generator=generator, dtype=torch.float64) for _ in range(2)]
    found = ZipIt(b=1.0).solve(_features(values, (1.0, 0.0)))
    assert all(torch.isfinite(matrix).all() for matrix in (*found.merge, *found.unmerge))


def test_wrong_parameters_are_refused() -> None:
    for options in ({"b": -0.1}, {"b": 1.5}, {"a": 2.0}):
        with pytest.raises(ArgumentError):
            ZipIt(**options)
    values = [torch.randn(5, 40, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(ArgumentError, match="a > 0"):
        ZipIt(a=0).solve(_features(values, (0.3, 0.3, 0.4)))
