"""Optimal transport between two sets of channels with uniform marginals: exact, or entropic (Sinkhorn).

A coupling Π (n, m) has rows that sum to 1/n and columns that sum to 1/m; it minimises ⟨Π, cost⟩. Between sets of one
size that is the assignment problem. Between others it is one too, on channels repeated to their common multiple, as all
corners of the transport polytope are then whole; where that multiple is too large it is solved as a linear programme.

Sinkhorn minimises ⟨Π, cost⟩ + ε Σ Π log Π (Cuturi 2013) by scaling rows and columns in turn; where exp(−cost/ε) would
leave the range of float64, on potentials in the log domain, ε falling step by step (Schmitzer 2019). The result is
rounded onto the marginals (Altschuler et al. 2017).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import eye_array, kron, vstack
from scipy.special import logsumexp

from vfx.errors import ArgumentError
from vfx.match.matcher import Gain

LARGEST_ASSIGNMENT = 4096  # channels of an assignment problem with repeated ones
TOLERANCE = 1e-10  # deviation of the marginals, in the sum, at which Sinkhorn stops
ROUGH = 1e-3  # the same, where ε is to fall further
MAX_ITERATIONS = 5_000
SAFE = 300.0  # spread of the costs over ε up to which exp(−cost/ε) and its scalings are far from underflow


def exact(cost: Gain) -> Gain:
    """The cheapest coupling (n, m)."""
    n, m = cost.shape
    common = math.lcm(n, m)
    if common > max(LARGEST_ASSIGNMENT, n, m):
        return _by_programme(cost)
    rows, columns = linear_sum_assignment(cost.repeat(common // n, 0).repeat(common // m, 1))
    coupling = np.zeros((n, m))
    np.add.at(coupling, (rows * n // common, columns * m // common), 1 / common)
    return coupling


def _by_programme(cost: Gain) -> Gain:
    n, m = cost.shape
    sums = vstack([kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))], format="csr")
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    solution = linprog(cost.reshape(-1), A_eq=sums, b_eq=marginals, bounds=(0, None), method="highs")
    if not solution.success:
        raise ArgumentError(f"the transport of {m} channels to {n} has no solution: {solution.message}")
    return _rounded(solution.x.reshape(n, m))


def sinkhorn(cost: Gain, regularization: float) -> Gain:
    """The coupling (n, m) of entropic transport; ``regularization`` ε is in the units of ``cost``."""
    spread = float(cost.max() - cost.min())
    if spread <= SAFE * regularization:
        return _rounded(_by_scaling(cost - cost.min(), regularization))
    row: Gain = np.zeros(len(cost))
    column: Gain = np.zeros(cost.shape[1])
    epsilon = spread
    while epsilon > regularization:
        epsilon = max(regularization, epsilon / 4)
        tolerance = TOLERANCE if epsilon == regularization else ROUGH
        row, column = _in_log_domain(cost, row, column, epsilon, tolerance)
    return _rounded(np.exp((row[:, None] + column - cost) / epsilon))


def _by_scaling(cost: Gain, regularization: float) -> Gain:
    n, m = cost.shape
    kernel = np.exp(-cost / regularization)
    v = np.full(m, 1 / m)
    for iteration in range(MAX_ITERATIONS):
        u = 1 / n / (kernel @ v)
        columns = kernel.T @ u
        if iteration % 10 == 9 and np.abs(columns * v - 1 / m).sum() <= TOLERANCE:
            break
        v = 1 / m / columns
    return u[:, None] * kernel * v


def _in_log_domain(cost: Gain, row: Gain, column: Gain, epsilon: float, tolerance: float) -> tuple[Gain, Gain]:
    """Potentials of both sides, from those of a larger ε."""
    n, m = cost.shape
    for iteration in range(MAX_ITERATIONS):
        row = -epsilon * (math.log(n) + logsumexp((column - cost) / epsilon, axis=1))
        missing = -epsilon * (math.log(m) + logsumexp((row[:, None] - cost) / epsilon, axis=0)) - column
        column = column + missing
        if iteration % 10 == 9 and np.abs(np.expm1(missing / epsilon)).mean() <= tolerance:
            break
    return row, column


def _rounded(coupling: Gain) -> Gain:
    """The nearest coupling whose marginals are uniform."""
    n, m = coupling.shape
    coupling = coupling * np.minimum(1, 1 / n / coupling.sum(1, keepdims=True))
    coupling = coupling * np.minimum(1, 1 / m / coupling.sum(0))
    rows, columns = 1 / n - coupling.sum(1), 1 / m - coupling.sum(0)
    missing = rows.sum()
    return coupling + np.outer(rows, columns) / missing if missing > 0 else coupling
