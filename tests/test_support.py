"""What ``score="auto"`` stands for: the search of supports where it can be had, magnitude where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import network
from torch import Tensor, nn
from vfx.passes.mask_weights import MaskWeights

from vfx.api import prune, trace
from vfx.pruning import support
from vfx.pruning.allocation.depth import ErdosRenyi
from vfx.pruning.support import AUTO, Support, searchable

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
QUIET: dict[str, Any] = {"solve": None, "normalize": None, "progress": False}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network(mlp, X)


def chosen(result: Any) -> tuple[str, str, str]:
    choices = result.report.choices
    return choices["score"], choices["scope"], choices["allocation"]


def same(one: nn.Module, two: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, two[name]) for name, x in one.state_dict().items())


def test_with_data_supports_are_searched_and_shares_spread(model: nn.Module) -> None:
    found = prune(model, X[:2], sparsity=0.7, data=X, **QUIET)
    assert chosen(found) == ("alps", "layer", "erk")
    program = trace(model, X[:2])
    literal = MaskWeights("alps", 0.7, "layer", allocation=ErdosRenyi(0.25), protect=(), data=X, progress=False)(
        program
    )
    assert same(found.module, dict(literal.weights[0]))
    weights = [p for p in found.module.parameters() if p.ndim > 1]
    assert sum(int((w == 0).sum()) for w in weights) == int(0.7 * sum(w.numel() for w in weights))


def test_without_data_weights_go_by_magnitude(model: nn.Module) -> None:
    found = prune(model, X[:2], sparsity=0.7, **QUIET)
    assert chosen(found) == ("magnitude", "global", "scope")
    assert same(found.module, dict(MaskWeights("magnitude", 0.7)(trace(model, X[:2])).weights[0]))
    searched = prune(model, X[:2], sparsity=0.7, data=X, **QUIET)
    assert not same(found.module, searched.module.state_dict())  # control


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"scope": "global"}, ("magnitude", "global", "scope")),
        ({"scope": "layer"}, ("alps", "layer", "scope")),
        ({"scope": "row"}, ("alps", "row", "scope")),
        ({"allocation": "progressive"}, ("alps", "layer", "progressive")),
        ({"score": "sparsegpt"}, ("sparsegpt", "layer", "scope")),
        ({"sparsity": {"0": 0.5, "*": 0.7}}, ("alps", "layer", "erk")),
    ],
)
def test_what_is_named_is_kept(model: nn.Module, asked: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert chosen(prune(model, X[:2], data=X, **{"sparsity": 0.5, **asked}, **QUIET)) == expected


def test_each_glob_spreads_its_own_share(model: nn.Module) -> None:
    found = prune(model, X[:2], sparsity={"[24]": 0.7, "0": 0.25}, data=X, **QUIET)
    first, *rest = [p for p in found.module.parameters() if p.ndim > 1]
    assert int((first == 0).sum()) == 30
    assert sum(int((w == 0).sum()) for w in rest) == 504
    assert rest[0].count_nonzero() / 600 != rest[1].count_nonzero() / 120


def test_patterns_search_supports_too(model: nn.Module) -> None:
    found = prune(model, X[:2], scope="1:2", data=X, **QUIET)
    assert chosen(found) == ("alps", "1:2", "scope")
    weights = [p for p in found.module.parameters() if p.ndim > 1]
    assert all(int((w != 0).reshape(len(w), -1, 2).sum(2).max()) == 1 for w in weights)


def test_layers_that_are_too_wide_are_left_to_magnitude(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    program = trace(model, X[:2])
    assert searchable(program)
    monkeypatch.setattr(support, "WIDEST", 29)
    assert not searchable(program)
    assert chosen(prune(model, X[:2], sparsity=0.7, data=X, **QUIET)) == ("magnitude", "global", "scope")


def test_what_is_protected_is_kept() -> None:
    assert Support(AUTO, AUTO, AUTO, "head").chosen(True).protect == "head"
    assert Support(AUTO, AUTO, AUTO, AUTO).chosen(True).protect == ()
    assert Support("wanda", AUTO, AUTO, AUTO).chosen(True) == Support("wanda", AUTO, "scope", AUTO)
