"""PLeaS: least squares against torch.linalg.lstsq on explicit activations, and channels that stay apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, network, transported
from micro_models import net
from test_matching import Attention, concatenated, depthwise, residual
from torch import Tensor, nn
from vfx.passes.reconstruct import Reconstruct

from vfx.api import merge, profile, trace
from vfx.errors import ArgumentError
from vfx.match.matcher import Matching, Problem
from vfx.match.partial import PartialMatching

X = images(16, 8, dtype=torch.float64)


def _merge(models: Any, x: Tensor = X, **options: Any) -> Any:
    options = {"normalize": None, "data": x, "progress": False} | options
    return merge(models, None if hasattr(models, "graph") else x[:2], **options)


def chain() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).flatten(1))

    return net(forward, a=nn.Conv2d(3, 5, 3, 2, 1), b=nn.Conv2d(5, 4, 2, groups=1, dilation=2), fc=nn.Linear(16, 3))


def _lstsq(rows: Tensor, goal: Tensor, weight: Tensor, bias: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """argmin ‖X W − Y‖² + λ ‖W − W̄‖² with all rows written out."""
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    before = torch.cat([weight.flatten(1), bias[:, None]], 1).T
    strength = (ridge * (rows**2).sum(0).mean()).sqrt()
    eye = strength * torch.eye(rows.shape[1], dtype=rows.dtype)
    found = torch.linalg.lstsq(torch.cat([rows, eye]), torch.cat([goal, strength * before]), driver="gelsd").solution.T
    return found[:, :-1].reshape(weight.shape), found[:, -1]


@torch.no_grad()
def test_layers_are_those_of_least_squares_on_explicit_activations() -> None:
    models = edges(chain, X)
    merged = _merge(models, match=PartialMatching(ridge=1e-3)).module
    permuted = _merge(models, match="activation", classes="permutation", weights=1.0).module  # the second edge, aligned
    average = _merge(models, match="activation", classes="permutation").module
    x, ys = X, [X, X]
    for name in ("a", "b", "fc"):
        layers = [model.get_submodule(name) for model in (models[0], permuted)]
        ys = [layer(y) for layer, y in zip(layers, ys)]
        old = average.get_submodule(name)
        if name == "fc":
            rows, goal = x, (ys[0] + ys[1]) / 2
        else:
            rows = F.unfold(x, old.kernel_size, old.dilation, old.padding, old.stride).mT.reshape(
                -1, old.weight[0].numel()
            )
            goal = ((ys[0] + ys[1]) / 2).movedim(1, -1).reshape(-1, len(old.weight))
        weight, bias = _lstsq(rows, goal, old.weight, old.bias, 1e-3)
        solved = merged.get_submodule(name)
        close(solved.weight, weight, 1e-8)
        close(solved.bias, bias, 1e-8)
        if name != "a":  # all read the same pictures there
            assert (old.weight - weight).abs().max() > 1e-3, "negative control: the average is no solution"
        x = solved(x)
        if name != "fc":
            x, ys = F.relu(x), [F.relu(y) for y in ys]
        if name == "b":
            x, ys = x.flatten(1), [y.flatten(1) for y in ys]


def test_a_permuted_copy_comes_back_and_stays_a_fixed_point() -> None:
    for build in (residual, depthwise, Attention):
        model = network(build, X)
        merged = _merge([model, transported(model, X)[0]], match="pleas")
        close(merged.module(X), model(X), 1e-7)


def test_least_squares_brings_the_outputs_nearer_to_the_edges_mean() -> None:
    models = edges(residual, X, 3)
    goal = sum(model(X) for model in models) / 3
    errors = {}
    for name in ("activation", "pleas"):
        errors[name] = (_merge(models, match=name).module(X) - goal).norm().item()
    errors["unsolved"] = (_merge(models, match="pleas", solve=None).module(X) - goal).norm().item()
    assert errors["pleas"] < 0.7 * min(errors["activation"], errors["unsolved"])


def test_permuting_an_edge_first_changes_nothing() -> None:
    models = edges(residual, X)
    for apart in (0.0, 0.4):
        outputs = [
            _merge([models[0], other], match=PartialMatching(apart), normalize="repair").module(X).detach()
            for other in (models[1], transported(models[1], X, 3)[0])
        ]
        close(outputs[1], outputs[0], 1e-5)


# channels apart -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("build", [residual, concatenated, depthwise, chain])
def test_with_all_channels_apart_the_merged_network_is_the_ensemble(build: Any, count: int) -> None:
    """Least squares changes nothing then: the averaged weights solve every layer already."""
    models = edges(build, X, count)
    shares = [0.5, 0.3, 0.2][:count] if count == 3 else [0.6, 0.4]
    result = _merge(models, match=PartialMatching(1.0), weights=shares)
    goal = sum(share * model(X) for share, model in zip(shares, models))
    close(result.module(X), goal, 1e-7)
    assert result.report.params_ratio > 1.5
    other = images(5, 8, seed=9, dtype=torch.float64)
    close(result.module(other), sum(share * model(other) for share, model in zip(shares, models)), 1e-7)


def test_the_share_apart_says_how_far_groups_grow() -> None:
    program = trace(edges(residual, X), X[:2])
    half = _merge(program, match=PartialMatching(0.5), normalize="repair")
    assert half.program.weights[0]["a1.weight"].shape == (7 + 4, 8 + 4, 3, 3)
    one = _merge(program, match=PartialMatching({"a1.weight": 0.3}))
    assert one.program.weights[0]["a1.weight"].shape == (9, 8, 3, 3)
    assert profile(one).params > profile(program).params
    assert half.module(X).isfinite().all()


def test_channels_with_the_worst_partner_stay_apart() -> None:
    """Two channels of the second edge are made noise: they are the ones kept apart."""
    model = network(chain, X)
    twin = network(chain, X)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for channel in (1, 3):
            twin.a.weight[channel] = torch.randn(twin.a.weight[channel].shape, generator=noise)  # type: ignore[union-attr, index, operator]
    result = _merge([model, twin], match=PartialMatching({"a.weight": 0.4}))
    apart = result.report.matching.apart
    assert [index.tolist() for index in apart.values()] == [[1, 3]]


def test_streams_behind_norms_do_not_grow() -> None:
    program = trace(edges(Attention, X), X[:2])
    grown = _merge(program, match=PartialMatching(0.5))
    assert grown.program.weights[0]["up.weight"].shape == (30, 12)
    assert grown.program.weights[0]["head.weight"].shape == (4, 12)
    assert any(
        "keeps no channels apart: layer_norm normalises over its channels" in note for note in grown.report.notes
    )
    assert not any("up.weight keeps no channels apart" in note for note in grown.report.notes)


def test_preserved_layers_and_least_squares() -> None:
    models = edges(residual, X)
    result = _merge(models, match="pleas", preserve=2, normalize="repair")
    assert result.module(X).isfinite().all()
    everything = _merge(models, match="pleas", preserve=6)
    close(everything.module(X), (models[0](X) + models[1](X)) / 2, 1e-9)


def test_a_matching_found_before_is_solved_alike() -> None:
    """What follows a matching is said by the matching, not by who found it."""

    class Found:
        needs = frozenset({"features"})
        exact = True

        def __call__(self, problem: Problem) -> Matching:
            return PartialMatching(0.5)(problem)

    program = trace(edges(chain, X), X[:2])
    own, found = (_merge(program, match=match) for match in (PartialMatching(0.5), Found()))
    assert torch.equal(own.module(X), found.module(X))
    plain = _merge(program, match="activation", classes="permutation")
    assert not torch.equal(own.module(X), plain.module(X))


def test_what_is_refused() -> None:
    program = trace(edges(residual, X), X[:2])
    with pytest.raises(ArgumentError, match="apart"):
        PartialMatching(1.5)
    with pytest.raises(ArgumentError, match="no group"):
        _merge(program, match=PartialMatching({"nothing": 0.5}))
    with pytest.raises(ArgumentError, match="preserve"):
        _merge(program, match=PartialMatching(0.5), preserve=2)
    with pytest.raises(ArgumentError, match="positive"):
        _merge(program, match=PartialMatching(0.5), weights=0.0)
    with pytest.raises(ArgumentError, match="data"):
        _merge(program, match="pleas", data=None)
    with pytest.raises(ArgumentError, match="ridge"):
        Reconstruct(program, X, ridge=-1.0)
    assert np.isfinite(float(PartialMatching().ridge))
