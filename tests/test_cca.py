"""CCA merging: the formula, its invariances, and what happens where covariances are singular."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import close
from torch import Tensor

from vfx.analyse.groups import Group
from vfx.errors import ArgumentError
from vfx.match.cca import CCAMerging
from vfx.match.linear import Features
from vfx.statistics.moments import CrossMoments

SIZE, SAMPLES = 7, 60


def _values(edges: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(SIZE, SAMPLES, generator=generator, dtype=torch.float64)
    return [
        torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) @ common
        + torch.randn(SIZE, SAMPLES, generator=generator, dtype=torch.float64)
        for _ in range(edges)
    ]


def _features(values: list[Tensor]) -> Features:
    moments = CrossMoments(len(values), len(values[0]), within=True)
    moments.update([value.clone() for value in values])
    rows = (torch.arange(len(values[0])),) * len(values)
    return Features(Group(0, len(values[0]), ()), (1 / len(values),) * len(values), ((moments, rows),))


@pytest.mark.parametrize("edges", [2, 3])
@pytest.mark.parametrize("gamma", [0.1, 2.0])
def test_maps_are_those_of_the_formula(edges: int, gamma: float) -> None:
    """S_ii ← S_ii + γI, U Σ Vᵀ = svd(S_00^-½ S_0i S_ii^-½), T = S_00^½ U Vᵀ S_ii^-½ (Horoi et al. 2024, §3)."""
    values = _values(edges)
    found = CCAMerging(gamma).solve(_features(values))
    centred = [x.numpy() - x.numpy().mean(1, keepdims=True) for x in values]
    close(found.merge[0], torch.eye(SIZE, dtype=torch.float64), 0)
    for edge in range(1, edges):
        s00, s11 = (centred[e] @ centred[e].T / SAMPLES + gamma * np.eye(SIZE) for e in (0, edge))
        s01 = centred[0] @ centred[edge].T / SAMPLES
        r0, r1 = (scipy.linalg.sqrtm(s).real for s in (s00, s11))
        u, _, vt = np.linalg.svd(np.linalg.inv(r0) @ s01 @ np.linalg.inv(r1))
        close(found.merge[edge], r0 @ u @ vt @ np.linalg.inv(r1), 1e-8)
        close(found.unmerge[edge], np.linalg.inv(r0 @ u @ vt @ np.linalg.inv(r1)), 1e-8)
    assert found.details["condition"] >= 1


def test_a_permuted_edge_gives_its_permutation() -> None:
    x = _values(1)[0]
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    found = CCAMerging().solve(_features([x, x[order]]))
    close(found.merge[1] @ x[order], x, 1e-9)
    close(found.merge[1], torch.eye(SIZE, dtype=torch.float64)[:, order], 1e-9)
    assert (found.merge[1] - torch.eye(SIZE, dtype=torch.float64)).abs().max() > 0.5


def test_a_relative_gamma_does_not_see_the_scale() -> None:
    values = _values(2)
    scaled = [1e-3 * x for x in values]
    close(CCAMerging(relative=True).solve(_features(scaled)).merge[1],
          CCAMerging(relative=True).solve(_features(values)).merge[1], 1e-8)  # fmt: skip
    absolute = [CCAMerging().solve(_features(x)).merge[1] for x in (values, scaled)]
    assert (absolute[0] - absolute[1]).abs().max() > 1e-2


def test_dead_and_dependent_channels_leave_maps_finite() -> None:
    """Dead channels are left out; where features are linearly dependent the permutation decides and is found."""
    x = _values(1)[0]
    x[4], x[5] = 0.0, x[0] + x[1]
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    found = CCAMerging().solve(_features([x, x[order]]))
    close(found.merge[1] @ x[order], x, 1e-6)
    close(found.unmerge[1] @ x, x[order], 1e-6)
    assert not found.merge[1][:, 6].any()
    other = CCAMerging().solve(_features([x, torch.zeros_like(x)]))
    assert torch.isfinite(other.merge[1]).all()
    assert not other.merge[1].any()


def test_gamma_must_be_positive() -> None:
    with pytest.raises(ArgumentError, match="gamma"):
        CCAMerging(0.0)
