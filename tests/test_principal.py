"""Free features in their principal directions: the function stays, and what the last channels carry is least."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vfx.passes.principal_basis import PrincipalBasis

from vfx.analyse.symmetry import symmetry
from vfx.api import prune_structured, trace
from vfx.elements import Element
from vfx.errors import ArgumentError, VerificationError
from vfx.passes import principal_basis
from vfx.program import Program, run
from vfx.pruning import principal
from vfx.pruning.elimination import error_form
from vfx.pruning.second_moments import second_moments

EXACT, CLOSE, HEADS, SIZE = 1e-10, 1e-6, 2, 4


class Attention(nn.Module):
    """Two heads of four channels, and a layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _attention() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    spread = torch.logspace(0, -1.5, 8, dtype=torch.float64)  # inputs of which some directions matter little
    mixed = torch.randn(8, 8, dtype=torch.float64) @ torch.diag(spread) @ torch.randn(8, 8, dtype=torch.float64)
    return Attention().double().eval(), torch.randn(16, 6, 8, dtype=torch.float64) @ mixed


def _forms(program: Program, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """M and R of both groups inside heads."""
    facts = symmetry(program)
    moments = second_moments(program, facts, x.split(4), progress=False)
    inner = {group.name: group for group in facts.groups if group.parent is not None}
    forms = {name: error_form(facts, group, program.weights[0], moments) for name, group in inner.items()}
    return {name: form for name, form in forms.items() if form is not None}


def _heads(matrix: Tensor) -> list[Tensor]:
    return [matrix[SIZE * head : SIZE * (head + 1), SIZE * head : SIZE * (head + 1)] for head in range(HEADS)]


def test_the_function_stays_and_channels_fall() -> None:
    model, x = _attention()
    program = trace(model, x[:2])
    turned = PrincipalBasis(x.split(4), progress=False)(program)
    fresh = torch.randn(3, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        assert float((run(turned.graph, turned.weights[0], [fresh]) - model(fresh)).abs().max()) < EXACT
    assert not torch.equal(turned.weights[0]["v.weight"], program.weights[0]["v.weight"])
    assert turned.weights[0]["o.bias"] is program.weights[0]["o.bias"]


def test_what_is_lost_is_the_least_of_any_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(principal, "DAMPING", 0.0)
    monkeypatch.setattr(principal, "FLOOR", 0.0)
    model, x = _attention()
    program = trace(model, x[:2])
    before = _forms(program, x)
    after = _forms(PrincipalBasis(x.split(4), progress=False)(program), x)
    assert set(before) == {"q.weight", "v.weight"}
    for name, (moment, readers) in before.items():
        for head in range(HEADS):
            first, second = _heads(moment)[head], _heads(readers)[head]
            values = torch.linalg.eigvals(first @ second).real.sort(descending=True).values
            turned, read = (_heads(matrix)[head] for matrix in after[name])
            for matrix in (turned, read):
                wanted = torch.diag(values.sqrt())
                torch.testing.assert_close(matrix, wanted, rtol=CLOSE, atol=CLOSE * float(wanted.max()))
            best_two_channels = min(  # in the basis of before, without what the others make up for
                float((second * first)[rest][:, rest].sum())
                for rest in ([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3])
            )
            assert float(values[2:].sum()) < best_two_channels


def _error(model: nn.Module, x: Tensor, **options: Any) -> tuple[float, tuple[str, ...]]:
    given: dict[str, Any] = {"sparsity": 0.5, "data": x, "solve": None, "normalize": None, "progress": False}
    small = prune_structured(model, x[:2], **given, **options)
    with torch.no_grad():
        return float((small.module(x) - model(x)).square().mean()), small.report.passes


def test_heads_lose_less_in_their_principal_basis() -> None:
    model, x = _attention()
    turned, passes = _error(model, x, score="obs")
    given, plain = _error(model, x, score="obs", basis="given")
    assert "PrincipalBasis(2 groups)" in passes
    assert not any(step.startswith("PrincipalBasis") for step in plain)
    assert turned < 0.5 * given
    assert not any(step.startswith("PrincipalBasis") for step in _error(model, x, score="magnitude")[1])


def test_by_default_the_scores_are_those_of_principal_directions() -> None:
    model, x = _attention()
    options: dict[str, Any] = {"data": x.repeat(4, 1, 1), "sparsity": 0.5, "allocation": "uniform", "progress": False}
    report = prune_structured(model, x[:2], **options).report
    assert {name.split(":")[0] for name in report.scores} == {"activation", "obs"}
    given = prune_structured(model, x[:2], basis="given", **options).report
    assert {name.split(":")[0] for name in given.scores} == {"magnitude", "activation"}


def test_networks_without_free_features_read_no_data() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    program = trace(model, torch.randn(2, 4, dtype=torch.float64))
    assert PrincipalBasis(object())(program) is program


def test_a_map_that_does_not_keep_the_function_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _attention()
    program = trace(model, x[:2])
    maps = principal_basis.principal_elements

    def one_sided(*arguments: Any) -> dict[int, Element]:
        """The way back is left out."""
        return {
            index: Element(matrix=element.matrix, dual=element.matrix) for index, element in maps(*arguments).items()
        }

    monkeypatch.setattr(principal_basis, "principal_elements", one_sided)
    with pytest.raises(VerificationError, match="PrincipalBasis changed the function"):
        PrincipalBasis(x.split(4), progress=False)(program)


def test_what_cannot_be_asked_for() -> None:
    model, x = _attention()
    with pytest.raises(ArgumentError, match="basis='principal' reads data"):
        prune_structured(model, x[:2], sparsity=0.5, basis="principal", progress=False)
    with pytest.raises(ArgumentError, match="basis='turned' is unknown; choose one of auto, principal, given"):
        prune_structured(model, x[:2], sparsity=0.5, basis="turned", data=x, progress=False)
