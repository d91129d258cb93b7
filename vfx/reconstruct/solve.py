"""Ridge regression from sums: min ‖X W + b − Y‖² + λ ‖[W; b] − [W₀; b₀]‖², free or within a mask.

λ is a share (``ridge``) of the mean of the diagonal of [X 1]ᵀ[X 1], so it has no unit. Only the correction to W₀ is
solved for: what no input tells stays as it was. A mask leaves each output its own inputs S: (G_SS + λI) w_S = r_S, by
Cholesky factors of many small systems at once, or, where those would cost more, by conjugate gradients on all outputs
together with the diagonal as preconditioner (ALPS, Meng et al., NeurIPS 2024, §3.3).

A ridge that is not given is chosen on held-out rows, among a few decades, by walking downhill. The solution on all
rows, which nobody judges, may leave W₀ about as far as the judged one did: where there are as many rows as inputs a
ridge that served fewer rows well lets it grow without bound (double descent), and a larger one is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vfx.reconstruct.sums import Sums

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ASKED, ASKED_WITHIN = 128, 64  # outputs that choose the ridge; within masks each is a system of its own
DEPARTURE = 2.0  # of the judged solution's ‖Δ‖², up to which the solution on all rows is believed
START = 3  # where the search for the ridge starts
SINGULAR = 1e-7  # ratio of the Cholesky factor's pivots below which inputs count as dependent
STEPS, TOLERANCE = 100, 1e-10  # of conjugate gradients: at most so many, to so small a share of the first residual
GRADIENT_PRICE = 60  # products with the Gram matrix that conjugate gradients are reckoned to take
_EPS = 1e-14  # share of a direction's scale below which its curvature is rounding
GATHERED = 1 << 23  # elements of small systems that are held at once
ITERATED = 1 << 22  # elements of a solution that conjugate gradients hold at once, some ten times over


@dataclass(frozen=True)
class RidgeProblem:
    """What there is to solve, beside the sums.

    The ridge draws to ``centre`` (G, K, O) and ``bias`` (G, O), None for a layer without one; only the entries of
    ``support`` (G, K, O) may differ from zero, None for all.
    """

    centre: Tensor
    bias: Tensor | None
    support: Tensor | None = None

    def part(self, outputs: Tensor) -> RidgeProblem:
        """The problem of some outputs."""
        bias = None if self.bias is None else self.bias[:, outputs]
        support = None if self.support is None else self.support[:, :, outputs]
        return RidgeProblem(self.centre[:, :, outputs], bias, support)


@dataclass(frozen=True)
class SolvedLayer:
    """The matrix (G, K, O), the bias (G, O) or None without one, and ‖X W + b − Y‖² that they leave.

    ``departure`` (O,): ‖Δ‖² of each output, over groups.
    """

    matrix: Tensor
    bias: Tensor | None
    error: float
    departure: Tensor


class System:
    """The equations of a problem for the change of its matrix (and bias), whatever the ridge."""

    def __init__(self, problem: RidgeProblem, sums: Sums):
        self.squares = sums.squares.sum()
        self.biased, self.support = problem.bias is not None, problem.support
        if problem.bias is None:
            self.gram, cross, start = sums.gram, sums.cross, problem.centre
        else:
            self.gram, cross = sums.with_ones()
            start = torch.cat([problem.centre, problem.bias[:, None]], 1)
            if self.support is not None:
                self.support = torch.cat([self.support, torch.ones_like(self.support[:, :1])], 1)
        self.start = start if self.support is None else start * self.support
        self.missing = cross - self.gram @ self.start
        self.scale = self.gram.diagonal(dim1=1, dim2=2).mean(1)
        self.before = float(self.squares - (self.start * (cross + self.missing)).sum())  # ‖X W₀ + b₀ − Y‖²

    def inverse(self, ridge: float) -> Callable[[Tensor], Tensor]:
        """What solves (G + λI) Δ = R for Δ."""
        system = self.gram.clone()
        system.diagonal(dim1=1, dim2=2).add_(ridge * self.scale[:, None])
        if self.support is None:
            return _inverse(system)
        support = self.support
        return lambda right: within(system, right, support)

    def solve(self, ridge: float) -> SolvedLayer:
        """The least solution for a ridge."""
        change = self.inverse(ridge)(self.missing)
        # (G + λI) Δ = R wherever Δ is not zero, so ΔᵀGΔ − 2 ΔᵀR takes no product with G.
        gained = (change * (self.missing + ridge * self.scale[:, None, None] * change)).sum()
        solution = self.start + change
        matrix, bias = (solution[:, :-1], solution[:, -1]) if self.biased else (solution, None)
        return SolvedLayer(matrix, bias, self.before - float(gained), change.square().sum((0, 1)))


class JudgedRidge(NamedTuple):
    """A ridge, and ‖Δ‖² of its solution on the rows that were not held out, over the outputs that chose it."""

    ridge: float
    departure: float


def outputs_asked(problem: RidgeProblem) -> Tensor | None:
    """The outputs that choose a ridge, spread evenly; None for all."""
    asked, outputs = ASKED if problem.support is None else ASKED_WITHIN, problem.centre.shape[2]
    return torch.arange(asked, device=problem.centre.device) * outputs // asked if outputs > asked else None


def bounded(problem: RidgeProblem, system: System, chosen: JudgedRidge) -> tuple[SolvedLayer, float]:
    """The solution on all rows (their ``system``), and its ridge: the chosen one, or the next larger one that does not
    leave W₀ much farther than the judged solution.
    """
    asked = outputs_asked(problem)
    for ridge in RIDGES[RIDGES.index(chosen.ridge) :]:
        solution = system.solve(ridge)
        departure = solution.departure if asked is None else solution.departure[asked]
        if chosen.departure == 0 or float(departure.sum()) <= DEPARTURE * chosen.departure:
            break
    return solution, ridge


def chosen_ridge(problem: RidgeProblem, fit: Sums, held: Sums, start: float = RIDGES[START]) -> JudgedRidge:
    """The ridge of ``RIDGES`` whose solution on ``fit`` errs least on ``held``; some outputs, spread evenly, tell.

    The walk begins at ``start``, the way that the error falls there.
    """
    columns = outputs_asked(problem)
    if columns is not None:
        problem, fit, held = problem.part(columns), fit.part(columns), held.part(columns)
    fitted, judged = System(problem, fit), System(problem, held)

    def judge(inverse: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, float]:
        """A ridge's change Δ, the held rows' R − GΔ, and their error apart from what all ridges share."""
        change = inverse(fitted.missing)
        left = judged.missing - judged.gram @ change
        return change, left, -float((change * (judged.missing + left)).sum())

    best = RIDGES.index(start)
    inverse = fitted.inverse(start)
    change, left, least = judge(inverse)
    # dΔ/d log λ = −λ (G + λI)⁻¹ Δ
    falling = float((left * inverse(fitted.scale[:, None, None] * change)).sum()) < 0
    step = 1 if falling else -1
    while 0 <= best + step < len(RIDGES):
        tried, _, error = judge(fitted.inverse(RIDGES[best + step]))
        if not error < least:
            break
        best, least, change = best + step, error, tried
    return JudgedRidge(RIDGES[best], float(change.square().sum()))


def _inverse(system: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives the least solution of symmetric positive systems that may be singular."""
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal(dim1=1, dim2=2)
    if not failed.any() and bool((pivots.amin(1) > SINGULAR * pivots.amax(1)).all()):
        return lambda right: torch.cholesky_solve(right, factor)
    inverse = torch.linalg.pinv(system, hermitian=True, rtol=1e-12)
    return lambda right: inverse @ right


def within(system: Tensor, right: Tensor, support: Tensor) -> Tensor:
    """Each output's solution on its own inputs, zero elsewhere."""
    result = torch.zeros_like(right)
    for group, (a, b, mask) in enumerate(zip(system, right, support)):
        counts = mask.sum(0).double()
        factors = float((counts**3 / 3 + counts**2 * 4).sum())
        if factors <= GRADIENT_PRICE * len(a) ** 2 * b.shape[1]:
            result[group] = _small_systems(a, b, mask)
        else:
            together = max(1, ITERATED // len(a))
            for start in range(0, b.shape[1], together):
                some = slice(start, start + together)
                result[group, :, some] = _conjugate_gradients(a, b[:, some], mask[:, some])
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
        small.masked_fill_(~(inside[:, :, None] & inside[:, None, :]), 0.0)
        small.diagonal(dim1=1, dim2=2).add_(~inside * system.diagonal().mean())
        goals = right[:, columns].T.gather(1, chosen).masked_fill(~inside, 0.0)
        solution = _inverse(small)(goals[:, :, None])[:, :, 0]
        result[:, columns] = torch.zeros_like(right[:, columns]).T.scatter(1, chosen, solution * inside).T
    return result


def _conjugate_gradients(system: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """All outputs at once: one product with the system a step."""
    scale = system.diagonal().clamp_min(torch.finfo(system.dtype).tiny)[:, None]
    residual = right * mask
    direction = preconditioned = residual / scale
    solution, power = torch.zeros_like(right), (residual * preconditioned).sum(0)
    wanted = TOLERANCE**2 * residual.square().sum(0)
    for _ in range(STEPS):
        image = (system @ direction) * mask
        curvature = (direction * image).sum(0)
        # Directions without curvature are those that no row tells; rounding must not pass for one.
        seen = curvature > _EPS * (direction.square() * scale).sum(0)
        step = torch.where(seen, power / curvature.clamp_min(1e-300), 0.0)
        solution = solution + step * direction
        residual = residual - step * image
        if bool((residual.square().sum(0) <= wanted).all()):
            break
        preconditioned = residual / scale
        following = (residual * preconditioned).sum(0)
        direction = preconditioned + torch.where(power > 0, following / power.clamp_min(1e-300), 0.0) * direction
        power = following
    return solution
