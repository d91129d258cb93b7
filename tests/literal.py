"""Literal implementations that reconstruction is compared with: all rows written out, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from conftest import close, images
from torch import Tensor

from vfx.program import Program
from vfx.reconstruct.solve import RIDGES, RidgeProblem
from vfx.reconstruct.sums import Sums

X = images(16, 6, dtype=torch.float64)
VECTORS = torch.randn(24, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
RIDGE = 1e-3
EXACT = 1e-8
THIRDS = [0.5, 0.3, 0.2]


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(rows: Tensor, goals: Tensor, before: Tensor, ridge: float, support: Tensor | None = None) -> Tensor:
    """argmin ‖X W − Y‖² + λ ‖W − W₀‖², output by output on its own inputs; of several solutions the nearest to W₀."""
    strength = (ridge * rows.square().sum(0).mean()).sqrt()
    found = torch.zeros_like(before)
    for output in range(goals.shape[1]):
        own = torch.arange(len(before)) if support is None else support[:, output].nonzero()[:, 0]
        if len(own):
            start = before[own, output]
            above = torch.cat([rows[:, own], strength * torch.eye(len(own), dtype=rows.dtype)])
            right = torch.cat([goals[:, output] - rows[:, own] @ start, torch.zeros_like(start)])
            found[own, output] = start + torch.linalg.lstsq(above, right[:, None], driver="gelsd").solution[:, 0]
    return found


def with_ones(rows: Tensor) -> Tensor:
    """The rows with a one behind them, which reads the bias."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def literal_solution(
    rows: Tensor, goals: Tensor, centre: Tensor, bias: Tensor | None, support: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None]:
    found = []
    for group, (x, y, start) in enumerate(zip(rows, goals, centre)):
        mask = None if support is None else support[group]
        if bias is not None:
            x, start = with_ones(x), torch.cat([start, bias[group][None]])
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:1])])
        found.append(fitted(x, y, start, ridge, mask))
    whole = torch.stack(found)
    return (whole, None) if bias is None else (whole[:, :-1], whole[:, -1])


def close_solutions(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    close(found[0], expected[0], EXACT)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None and expected[1] is not None:
        close(found[1], expected[1], EXACT)


def held_errors(problem: RidgeProblem, parts: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """What the solution of each ridge on the first rows errs on the second."""
    (x, y), (held, wanted) = parts
    errors = []
    for ridge in RIDGES:
        matrix, bias = literal_solution(x, y, problem.centre, problem.bias, problem.support, ridge)
        assert bias is not None
        errors.append(float((held @ matrix + bias[:, None] - wanted).square().sum()))
    return errors


def equal_weights(found: Program, expected: Program) -> None:
    """Bit for bit."""
    assert found.weights[0].keys() == expected.weights[0].keys()
    for name, tensor in expected.weights[0].items():
        assert torch.equal(found.weights[0][name], tensor), name


def squared_error(sums: Sums, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Σ ‖x W + b − y‖² over all rows, groups and outputs."""
    total = ((sums.gram @ matrix - 2 * sums.cross) * matrix).sum() + sums.squares.sum()
    if bias is not None:
        outputs = (sums.inputs[:, None, :] @ matrix)[:, 0]
        total = total + (bias * (2 * outputs + sums.count * bias - 2 * sums.goals)).sum()
    return total
