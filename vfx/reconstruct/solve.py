"""Ridge regression from sums: min ‖X W + b − Y‖² + λ ‖[W; b] − [W₀; b₀]‖², free or within a mask.

λ is a share (``ridge``) of the mean of the diagonal of [X 1]ᵀ[X 1], so it has no unit. Only the correction to W₀ is
solved for: what no input tells stays as it was. A mask leaves each output its own inputs S: (G_SS + λI) w_S = r_S, by
Cholesky factors of many small systems at once, or, where those would cost more, by conjugate gradients on all outputs
together with the diagonal as preconditioner (ALPS, Meng et al., NeurIPS 2024, §3.3).

A ridge that is not given is chosen on held-out rows, among a few decades, by walking downhill from the middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vfx.reconstruct.sums import Sums

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ASKED = 64  # outputs that choose the ridge of masked layers
START = 3  # where the search for the ridge starts
SINGULAR = 1e-7  # ratio of the Cholesky factor's pivots below which inputs count as dependent
STEPS, TOLERANCE = 100, 1e-10  # of conjugate gradients: at most so many, to so small a share of the first residual
GRADIENT_PRICE = 60  # products with the Gram matrix that conjugate gradients are reckoned to take
_EPS = 1e-14  # share of a direction's scale below which its curvature is rounding
GATHERED = 1 << 26  # elements of small systems that are held at once


@dataclass(frozen=True)
class Problem:
    """What there is to solve, beside the sums.

    The ridge draws to ``centre`` (G, K, O) and ``bias`` (G, O), None for a layer without one; only the entries of
    ``support`` (G, K, O) may differ from zero, None for all.
    """

    centre: Tensor
    bias: Tensor | None
    support: Tensor | None = None

    def part(self, outputs: Tensor) -> Problem:
        """The problem of some outputs."""
        bias = None if self.bias is None else self.bias[:, outputs]
        support = None if self.support is None else self.support[:, :, outputs]
        return Problem(self.centre[:, :, outputs], bias, support)


def solve(problem: Problem, sums: Sums, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The matrix (G, K, O) and the bias (G, O), or None without one."""
    if problem.bias is None:
        gram, cross, start, support = sums.gram, sums.cross, problem.centre, problem.support
    else:
        gram, cross = sums.with_ones()
        start = torch.cat([problem.centre, problem.bias[:, None]], 1)
        support = problem.support
        if support is not None:
            support = torch.cat([support, torch.ones_like(support[:, :1])], 1)
    if support is not None:
        start = start * support
    strength = ridge * gram.diagonal(dim1=1, dim2=2).mean(1)
    missing = cross - gram @ start
    system = gram.clone()
    system.diagonal(dim1=1, dim2=2).add_(strength[:, None])
    change = _solved(system, missing) if support is None else within(system, missing, support)
    found = start + change
    return (found, None) if problem.bias is None else (found[:, :-1], found[:, -1])


def chosen_ridge(problem: Problem, fit: Sums, held: Sums) -> float:
    """The ridge of ``RIDGES`` whose solution on ``fit`` errs least on ``held``.

    Within masks each output is a system of its own: some of them, spread evenly, tell enough.
    """
    if problem.support is not None and problem.support.shape[2] > ASKED:
        columns = torch.arange(ASKED, device=fit.gram.device) * problem.support.shape[2] // ASKED
        problem, fit, held = problem.part(columns), fit.part(columns), held.part(columns)
    errors: dict[int, float] = {}

    def error(index: int) -> float:
        if index not in errors:
            errors[index] = float(held.error(*solve(problem, fit, RIDGES[index])))
        return errors[index]

    best = START
    for step in (-1, 1):
        while 0 <= best + step < len(RIDGES) and error(best + step) < error(best):
            best += step
        if best != START:
            break
    return RIDGES[best]


def _solved(system: Tensor, right: Tensor) -> Tensor:
    """The least solution of symmetric positive systems that may be singular."""
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal(dim1=1, dim2=2)
    if not failed.any() and bool((pivots.amin(1) > SINGULAR * pivots.amax(1)).all()):
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(system, hermitian=True, rtol=1e-12) @ right


def within(system: Tensor, right: Tensor, support: Tensor) -> Tensor:
    """Each output's solution on its own inputs, zero elsewhere."""
    result = torch.zeros_like(right)
    for group, (a, b, mask) in enumerate(zip(system, right, support)):
        counts = mask.sum(0).double()
        factors = float((counts**3 / 3 + counts**2 * 4).sum())
        if factors <= GRADIENT_PRICE * len(a) ** 2 * b.shape[1]:
            result[group] = _small_systems(a, b, mask)
        else:
            result[group] = _conjugate_gradients(a, b, mask)
    return result


def _small_systems(system: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """Systems of about equal size side by side, padded by ones on the diagonal."""
    result = torch.zeros_like(right)
    counts = mask.sum(0)
    order, start = torch.argsort(counts, descending=True).tolist(), 0
    while start < len(order) and counts[order[start]] > 0:
        size = int(counts[order[start]])
        columns = order[start : start + max(1, GATHERED // size**2)]
        start += len(columns)
        chosen = torch.argsort(mask[:, columns].int(), dim=0, descending=True, stable=True)[:size].T  # (columns, size)
        inside = mask[:, columns].T.gather(1, chosen)
        small = system[chosen[:, :, None], chosen[:, None, :]]
        small = small.masked_fill(~(inside[:, :, None] & inside[:, None, :]), 0.0)
        small.diagonal(dim1=1, dim2=2).add_(~inside * system.diagonal().mean())
        goals = right[:, columns].T.gather(1, chosen).masked_fill(~inside, 0.0)
        found = _solved(small, goals[:, :, None])[:, :, 0]
        result[:, columns] = torch.zeros_like(right[:, columns]).T.scatter(1, chosen, found * inside).T
    return result


def _conjugate_gradients(system: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """All outputs at once: one product with the system a step."""
    scale = system.diagonal().clamp_min(torch.finfo(system.dtype).tiny)[:, None]
    residual = right * mask
    direction = preconditioned = residual / scale
    found, power = torch.zeros_like(right), (residual * preconditioned).sum(0)
    wanted = TOLERANCE**2 * residual.square().sum(0)
    for _ in range(STEPS):
        image = (system @ direction) * mask
        curvature = (direction * image).sum(0)
        # Directions without curvature are those that no row tells; rounding must not pass for one.
        seen = curvature > _EPS * (direction.square() * scale).sum(0)
        step = torch.where(seen, power / curvature.clamp_min(1e-300), 0.0)
        found = found + step * direction
        residual = residual - step * image
        if bool((residual.square().sum(0) <= wanted).all()):
            break
        preconditioned = residual / scale
        following = (residual * preconditioned).sum(0)
        direction = preconditioned + torch.where(power > 0, following / power.clamp_min(1e-300), 0.0) * direction
        power = following
    return found
