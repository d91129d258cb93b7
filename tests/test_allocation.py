"""How a sparsity is spread over layers: each allocation against its formula, and exact totals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import close, network
from torch import Tensor, nn

from vfx.api import prune, trace
from vfx.errors import ArgumentError
from vfx.pruning.allocation.allocation import Allocation, met
from vfx.pruning.allocation.catalogue import ALLOCATIONS, allocation_named
from vfx.pruning.allocation.depth import ErdosRenyi, Progressive
from vfx.pruning.allocation.errors import DAMPING, GRID, Errors, curve
from vfx.pruning.allocation.outliers import Outliers
from vfx.pruning.scores.hessian import layer_problem
from vfx.pruning.scores.score import Subject
from vfx.pruning.targets import find_targets

X = torch.randn(80, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
QUIET: dict[str, Any] = {"solve": None, "normalize": None, "progress": False}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network(mlp, X)


def subject(model: nn.Module) -> Subject:
    program = trace(model, X[:2])
    return Subject(program, find_targets(program)[0], data=X, progress=False)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.ndim > 1]


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_the_whole_network_loses_what_was_asked_for(model: nn.Module, name: str, scope: str) -> None:
    result = prune(model, X[:2], sparsity=0.7, scope=scope, allocation=name, data=X, **QUIET)
    gone = sum(int((w == 0).sum()) for w in weights(result.module))
    total = sum(w.numel() for w in weights(model))
    assert result.report.choices["allocation"] == name
    rows = sum(len(w) for w in weights(model))
    assert gone == int(0.7 * total) if scope == "layer" else 0 <= int(0.7 * total) - gone <= rows
    shares = [float((w == 0).double().mean()) for w in weights(result.module)]
    even = prune(model, X[:2], sparsity=0.7, scope=scope, data=X, **QUIET)
    assert max(abs(a - float((w == 0).double().mean())) for a, w in zip(shares, weights(even.module))) > 0.01


def test_progressive_is_an_arithmetic_progression(model: nn.Module) -> None:
    shares = Progressive(spread=0.1).shares(subject(model), 0.5)
    first, second, third = shares.values()
    assert third - second == pytest.approx(0.1, abs=0.02)  # whole weights of small layers
    assert second - first == pytest.approx(0.1, abs=0.02)


def test_erdos_renyi_is_in_proportion_to_the_shape(model: nn.Module) -> None:
    densities = [1 - share for share in ErdosRenyi().shares(subject(model), 0.8).values()]
    wanted = torch.tensor([(o + i) / (o * i) for o, i in ((20, 6), (30, 20), (4, 30))], dtype=torch.float64)
    kept = 0.2 * (120 + 600 + 120)
    sizes = torch.tensor([120.0, 600.0, 120.0], dtype=torch.float64)
    close(torch.tensor(densities, dtype=torch.float64), wanted * kept / float((wanted * sizes).sum()), 0.01)
    crowded = ErdosRenyi().shares(subject(model), 0.2)  # more than dense by the proportion: all of it stays
    assert min(crowded.values()) == 0


def test_owl_gives_layers_with_outliers_more(model: nn.Module) -> None:
    copy = network(mlp, X)
    with torch.no_grad():
        copy[2].weight[::7, ::5] *= 80  # type: ignore[union-attr, index]
    shares = Outliers(above=10, spread=0.08).shares(subject(copy), 0.6)
    inputs = [X, copy[:2](X).detach(), copy[:4](X).detach()]  # type: ignore[index]
    ratios = []
    for w, x in zip(weights(copy), inputs):
        values = w.abs() * x.square().sum(0).sqrt()
        ratios.append(float((values > 10 * values.mean()).double().mean()))
    low, high = min(ratios), max(ratios)
    differences = [-0.16 * (ratio - low) / (high - low) for ratio in ratios]
    found = list(shares.values())
    assert high > low + 0.01
    for index in (0, 2):
        assert found[index] - found[1] == pytest.approx(differences[index] - differences[1], abs=0.02)


def test_curves_are_errors_of_layers_solved_on_their_support(model: nn.Module) -> None:
    own = subject(model)
    target, weight = own.targets[1], weights(model)[1]
    x = model[:2](X).detach()  # type: ignore[index]
    h = x.T @ x
    h = h + DAMPING * h.diagonal().mean() * torch.eye(20, dtype=h.dtype)
    dense = weight.T
    costs = dense.square() * h.diagonal()[:, None]
    for share, error in curve(layer_problem(target, weight, [x])):
        if share not in GRID:
            continue
        gone = torch.zeros(600, dtype=torch.bool)
        gone[costs.reshape(-1).argsort()[: int(share * 600 + 1e-6)]] = True
        solved = torch.zeros_like(dense)
        for column in range(30):
            kept = ~gone.reshape(20, 30)[:, column]
            solved[kept, column] = torch.linalg.solve(h[kept][:, kept], (h @ dense)[kept, column])
        difference = solved - dense
        expected = float((difference * (h @ difference)).sum() / (dense * (h @ dense)).sum())
        assert error == pytest.approx(expected, rel=1e-7, abs=1e-10)


def test_errors_take_from_the_layer_that_loses_least() -> None:
    """A layer of which all outputs read one input goes down to it; the control spreads evenly."""
    copy = network(mlp, X)
    with torch.no_grad():
        copy[2].weight[:, 1:] *= 1e-4  # type: ignore[union-attr, index]
    shares = list(Errors().shares(subject(copy), 0.6).values())
    assert shares[1] > 0.75 > 0.5 > max(shares[0], shares[2])


def test_no_layer_is_lost_and_totals_are_exact() -> None:
    sizes = {"a": 10, "b": 100, "c": 3}
    shares = met({"a": 5.0, "b": 0.0, "c": -5.0}, sizes, 0.5)
    assert {name: round(share * sizes[name]) for name, share in shares.items()} == {"a": 9, "b": 47, "c": 0}
    with pytest.raises(ArgumentError, match="less than one weight"):
        met(dict.fromkeys(sizes, 0.0), sizes, 0.99)


def test_what_is_refused(model: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="choose one of scope, progressive"):
        allocation_named("even")
    for wrong in ({"sparsity": 0.5}, {"scope": "1:2"}):
        with pytest.raises(ArgumentError, match="spreads a sparsity over layers"):
            prune(model, X[:2], allocation="erk", **wrong, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="give data="):
        prune(model, X[:2], sparsity=0.5, scope="layer", allocation="owl", **QUIET)


def test_an_allocation_of_ones_own(model: nn.Module) -> None:
    class Head(Allocation):
        name = "head"

        def shares(self, subject: Subject, sparsity: float) -> dict[str, float]:
            return {target.name: 0.5 if i == 2 else 0.0 for i, target in enumerate(subject.targets)}

    result = prune(model, X[:2], sparsity=0.5, scope="layer", allocation=Head(), **QUIET)
    assert [int((w == 0).sum()) for w in weights(result.module)] == [0, 0, 60]


@pytest.mark.parametrize(("sparsity", "whole"), [(0.7, True), (0.75, False)])
def test_a_head_that_is_a_small_part_stays_whole_and_the_rest_makes_up_for_it(
    model: nn.Module, sparsity: float, whole: bool
) -> None:
    """The head holds 120 of 840 weights: 0.48 of what is kept at 0.7, 0.57 at 0.75."""
    own = subject(model)
    shares = ErdosRenyi(head=0.5).shares(own, sparsity)
    sizes = {target.name: target.numel for target in own.targets}
    assert round(sum(share * sizes[name] for name, share in shares.items())) == int(sparsity * 840 + 1e-6)
    assert (shares["4.weight"] == 0) == whole
    plain = ErdosRenyi().shares(own, sparsity)
    assert (shares == plain) == (not whole)
    part = Subject(own.program, own.targets[:2], data=X, progress=False)  # whose last layer is no head
    assert ErdosRenyi(head=0.5).shares(part, sparsity) == ErdosRenyi().shares(part, sparsity)
