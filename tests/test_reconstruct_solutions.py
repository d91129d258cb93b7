"""Reconstruction: solutions of one layer, masks and the ridge against least squares on written rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import close
from literal import EXACT, close_solutions, drawn, held_errors, literal_solution, squared_error
from torch import Tensor

from vfx.reconstruct import solve as solving
from vfx.reconstruct.solve import RIDGES, START, RidgeProblem, System, bounded, chosen_ridge
from vfx.reconstruct.sums import Sums, sums_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


MASKS = ("none", "unstructured", "rows", "2:4", "empty column", "empty")


def _support(kind: str, groups: int, inputs: int, outputs: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(groups, inputs, outputs, generator=generator) > 0.4
    if kind == "none":
        return None
    if kind == "rows":
        return mask[:, :, :1].expand_as(mask)
    if kind == "2:4":
        scores = torch.rand(groups, inputs // 4, 4, outputs, generator=generator)
        return (scores.argsort(2).argsort(2) < 2).reshape(groups, inputs, outputs)
    if kind == "empty column":
        mask[:, :, 1] = False
    return mask & (kind != "empty")


def _regression(rows: int = 40, inputs: int = 8, outputs: int = 5, groups: int = 2) -> tuple[Tensor, ...]:
    """Rows whose inputs differ in size and hang together, goals, a centre and its bias."""
    x = drawn(groups, rows, inputs) @ (torch.eye(inputs, dtype=torch.float64) + 0.3 * drawn(inputs, inputs, seed=1))
    x = x * torch.linspace(0.3, 3, inputs, dtype=torch.float64) + 0.5
    return x, drawn(groups, rows, outputs, seed=2), drawn(groups, inputs, outputs, seed=3), drawn(groups, outputs)


def _solved(problem: RidgeProblem, sums: Sums, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The solution; its errors, which follow from the equations, are checked against the sums."""
    system = System(problem, sums)
    solution = system.solve(ridge)
    start = problem.centre if problem.support is None else problem.centre * problem.support
    before = float(squared_error(sums, start, problem.bias))
    scale = EXACT * (float(sums.squares.sum()) + before)
    assert abs(system.before - before) <= scale
    assert abs(solution.error - float(squared_error(sums, solution.matrix, solution.bias))) <= scale
    return solution.matrix, solution.bias


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_solutions_are_those_of_written_rows(mask: str, biased: bool, ridge: float) -> None:
    rows, goals, centre, bias = _regression()
    support = _support(mask, *centre.shape)
    if support is not None:
        centre = centre * support
    problem = RidgeProblem(centre, bias if biased else None, support)
    found = _solved(problem, sums_of(rows, goals), ridge)
    close_solutions(found, literal_solution(rows, goals, centre, problem.bias, support, ridge))
    if support is not None:
        assert not found[0][~support].any()
    if ridge and mask != "empty":
        moved = _solved(replace(problem, centre=centre * 0), sums_of(rows, goals), ridge)[0]
        assert (moved - found[0]).abs().max() > 1e-4, "negative control: the ridge draws to the centre"


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", MASKS[1:])
def test_a_centre_outside_the_mask_counts_for_nothing(mask: str, biased: bool) -> None:
    """Only the entries of the mask may differ from zero, whatever the ridge draws to."""
    rows, goals, centre, bias = _regression()
    support = _support(mask, *centre.shape)
    assert support is not None
    problem = RidgeProblem(centre, bias if biased else None, support)
    found = _solved(problem, sums_of(rows, goals), 0.1)
    assert not found[0][~support].any()
    close_solutions(found, literal_solution(rows, goals, centre, problem.bias, support, 0.1))


def _noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways in which masked problems are solved from here on, by name."""
    taken: list[str] = []

    def noting(way: str, solver: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*arguments: Tensor) -> Tensor:
            taken.append(way)
            return solver(*arguments)

        return noted

    for way in ("_small_systems", "_conjugate_gradients"):
        monkeypatch.setattr(solving, way, noting(way, getattr(solving, way)))
    return taken


@pytest.mark.parametrize("price", [0, 10**9])
@pytest.mark.parametrize("mask", MASKS[1:])
def test_both_ways_to_solve_within_a_mask_agree(mask: str, price: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conjugate gradients at a price of zero, small systems one by one at a high one."""
    rows, goals, centre, bias = _regression(120, 24, 5)
    support = _support(mask, *centre.shape)
    assert support is not None
    taken = _noted(monkeypatch)
    monkeypatch.setattr(solving, "GRADIENT_PRICE", price)
    monkeypatch.setattr(solving, "GATHERED", 1)  # one system at a time
    monkeypatch.setattr(solving, "ITERATED", 2 * len(centre[0]))  # two outputs at a time
    found = _solved(RidgeProblem(centre * support, bias, support), sums_of(rows, goals), 1e-3)
    close_solutions(found, literal_solution(rows, goals, centre * support, bias, support, 1e-3))
    assert set(taken) == {"_small_systems" if price else "_conjugate_gradients"}


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _noted(monkeypatch)
    for inputs, share in ((64, 0.9), (400, 0.9), (400, 0.1)):
        mask = torch.rand(1, inputs, 3, generator=torch.Generator().manual_seed(0)) < share
        rows = math.sqrt(inputs) * torch.eye(inputs, dtype=torch.float64)[None]
        System(RidgeProblem(drawn(1, inputs, 3) * mask, None, mask), sums_of(rows, drawn(1, inputs, 3))).solve(0.0)
    assert taken == ["_small_systems", "_conjugate_gradients", "_small_systems"]


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-3])
def test_conjugate_gradients_that_are_cut_off_fit_about_as_well(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs whose Gram matrix has a condition number of a million: more steps than there are."""
    scales = torch.logspace(0, -3, 64, dtype=torch.float64)
    turn = torch.linalg.qr(drawn(64, 64)).Q
    rows, goals = drawn(1, 300, 64, seed=1) @ (turn * scales) @ turn.T, drawn(1, 300, 5, seed=2)
    support = torch.rand(1, 64, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    sums, errors = sums_of(rows, goals), []
    for price in (0, 10**9):
        monkeypatch.setattr(solving, "GRADIENT_PRICE", price)
        solution = System(RidgeProblem(torch.zeros(1, 64, 5).double(), None, support), sums).solve(ridge)
        errors.append(float(squared_error(sums, solution.matrix, None)))
    assert errors[0] <= errors[1] * 1.001
    assert errors[1] < 0.95 * float(sums.squares.sum())


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6, 1e9])
@pytest.mark.parametrize("mask", ["none", "unstructured", "2:4"])
def test_solutions_have_no_unit(mask: str, scale: float) -> None:
    """Inputs in another unit, weights in its inverse."""
    rows, goals, centre, _ = _regression()
    support = _support(mask, *centre.shape)
    centre = centre if support is None else centre * support
    found = _solved(RidgeProblem(centre / scale, None, support), sums_of(rows * scale, goals), 1e-3)[0] * scale
    close(found, literal_solution(rows, goals, centre, None, support, 1e-3)[0], EXACT)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("price", [0, 10**9])
@pytest.mark.parametrize("mask", ["none", "unstructured", "rows", "empty column"])
def test_singular_inputs_change_nothing_that_no_row_tells(
    mask: str, price: int, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A doubled input, two dead ones and a constant one beside the bias."""
    rows, goals, centre, bias = _regression()
    rows[..., 1] = rows[..., 0]
    rows[..., 2] = rows[..., 5] = 0
    rows[..., 3] = 1
    support = _support(mask, *centre.shape)
    centre = centre if support is None else centre * support
    monkeypatch.setattr(solving, "GRADIENT_PRICE", price)
    found = _solved(RidgeProblem(centre, bias, support), sums_of(rows, goals), ridge)
    assert found[1] is not None
    assert found[0].isfinite().all()
    assert found[1].isfinite().all()
    expected = literal_solution(rows, goals, centre, bias, support, ridge)
    close_solutions(found, expected)


def test_no_inputs_that_vary_at_all() -> None:
    uneven = torch.tensor([[[1, 0], [1, 1], [1, 0], [1, 1]]]).bool()
    for support in (None, torch.ones(1, 4, 2, dtype=torch.bool), uneven):
        centre = drawn(1, 4, 2) * (1 if support is None else support)
        found = _solved(
            RidgeProblem(centre, None, support), sums_of(torch.zeros(1, 9, 4).double(), drawn(1, 9, 2)), 0.0
        )
        assert torch.equal(found[0], centre)


@pytest.mark.parametrize(
    ("noise", "away", "best"),
    [(0, 1, 0), (0.01, 1, 1), (0.03, 1, 2), (0.01, 0.3, 3), (0.1, 1, 4), (1, 1, 5), (3, 1, 6)],
)
def test_the_ridge_is_the_one_that_errs_least_on_held_rows(noise: float, away: float, best: int) -> None:
    rows, centre, bias = drawn(1, 100, 20), drawn(1, 20, 5, seed=1), drawn(1, 5, seed=2)
    rows = rows * torch.logspace(0, -2, 20, dtype=torch.float64)
    truth = centre + away * drawn(1, 20, 5, seed=3)
    goals = rows @ truth + bias[:, None] + noise * drawn(1, 100, 5, seed=4)
    parts = [(rows[:, :30], goals[:, :30]), (rows[:, 30:], goals[:, 30:])]
    problem = RidgeProblem(centre, bias)
    errors = held_errors(problem, parts)
    least = errors.index(min(errors))
    assert errors[: least + 1] == sorted(errors[: least + 1], reverse=True)
    assert errors[least:] == sorted(errors[least:])
    assert least == best
    for start in RIDGES:
        assert chosen_ridge(problem, *(sums_of(x, y) for x, y in parts), start).ridge == RIDGES[least]


@pytest.mark.parametrize("count", [40, 400], ids=["as many rows as inputs", "many rows"])
def test_a_ridge_that_served_fewer_rows_well_does_not_let_the_solution_grow(count: int) -> None:
    """A fifth of the rows more makes as many rows as inputs, where the judged ridge fits the noise (double descent)."""
    rows, truth, held = drawn(1, count, 40, seed=13), drawn(1, 40, 5, seed=6), count // 5
    goals = rows @ truth + 0.3 * drawn(1, count, 5, seed=7)
    problem = RidgeProblem(torch.zeros_like(truth), None)
    parts = [sums_of(rows[:, :-held], goals[:, :-held]), sums_of(rows[:, -held:], goals[:, -held:])]
    chosen, system = chosen_ridge(problem, *parts), System(problem, sums_of(rows, goals))
    (solution, ridge), plain = bounded(problem, system, chosen), system.solve(chosen.ridge)
    judged = System(problem, parts[0]).solve(chosen.ridge)
    assert chosen.departure == pytest.approx(float(judged.matrix.square().sum()), rel=1e-12)
    assert float(solution.departure.sum()) == pytest.approx(float(solution.matrix.square().sum()), rel=1e-12)
    errors = [float((layer.matrix - truth).square().sum()) for layer in (solution, plain)]
    if count == 40:
        assert ridge > chosen.ridge
        assert errors[0] < 0.01 * errors[1]
        assert float(system.solve(ridge / 10).departure.sum()) > 2 * chosen.departure
    else:
        assert ridge == chosen.ridge
        assert torch.equal(solution.matrix, plain.matrix)


def test_some_outputs_choose_the_ridge_of_many_masked_ones() -> None:
    """Outputs that are spread evenly; without a mask all are asked."""
    rows, noise = drawn(1, 60, 6), drawn(1, 60, 130, seed=1)
    asked = torch.arange(64) * 130 // 64
    goals = noise * 3
    goals[..., asked] = 0.01 * noise[..., asked] + rows @ drawn(1, 6, 64, seed=2)
    centre = torch.zeros(1, 6, 130, dtype=torch.float64)
    parts = [(rows[:, :20], goals[:, :20]), (rows[:, 20:], goals[:, 20:])]
    found = []
    for mask, columns in ((torch.ones_like(centre).bool(), asked), (None, torch.arange(130))):
        problem = RidgeProblem(centre, centre[:, 0], mask)
        found.append(chosen_ridge(problem, *(sums_of(x, y) for x, y in parts)).ridge)
        own = RidgeProblem(centre[..., columns], centre[:, 0, columns], None)
        errors = held_errors(own, [(x, y[..., columns]) for x, y in parts])
        assert found[-1] == RIDGES[errors.index(min(errors))]
    assert found[0] != found[1]


def test_ridges_that_all_err_alike() -> None:
    problem = RidgeProblem(drawn(1, 4, 2), torch.zeros(1, 2, dtype=torch.float64))
    nothing, something = (
        sums_of(torch.zeros(1, 9, 4).double(), torch.zeros(1, 9, 2).double()),
        sums_of(drawn(1, 9, 4), drawn(1, 9, 2)),
    )
    assert chosen_ridge(problem, nothing, nothing).ridge == RIDGES[START]
    assert chosen_ridge(problem, nothing, something).ridge == RIDGES[START]
    matrix, bias = _solved(problem, nothing, chosen_ridge(problem, nothing, nothing).ridge)
    assert torch.equal(matrix, problem.centre)
    assert bias is not None
    assert bias.isfinite().all()
