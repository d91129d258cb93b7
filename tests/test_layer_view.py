"""The view of a layer: its own norm, what it hands on, its activation; what is shared is not its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import close, edges, images, network
from micro_models import conv, net
from torch import Tensor, nn
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.insert_normalization import InsertNormalization
from vfx.passes.interpolate import Interpolate

from vfx.analyse.activations import Activation
from vfx.analyse.layer_view import BatchNorm, LayerView, layer_views, not_alone
from vfx.api import merge, trace
from vfx.program import Goal, readers_of
from vfx.pruning.clusters import pairs

X = images(8, 6, dtype=torch.float64)


def _views(build: Callable[[], nn.Module], x: Tensor = X) -> list[LayerView]:
    return list(layer_views(trace(network(build, x), x)).values())


def _normed(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(conv(3, 5), norm(5), nn.Tanh(), conv(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def _read_twice() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last((self.norm(h) + h).relu().flatten(1))

    return net(forward, first=conv(3, 5), norm=nn.BatchNorm2d(5), last=nn.Linear(180, 2))


def _over_tokens() -> nn.Module:
    """A linear layer on (N, tokens, features) with a BatchNorm over the tokens."""
    return nn.Sequential(nn.Flatten(2), nn.Linear(36, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2))


def test_a_layer_sees_its_norm_its_output_and_its_activation() -> None:
    first, second, last = _views(_normed)
    assert first.norm is not None
    assert first.norm.is_fixed
    assert set(first.norm.names) == {"weight", "bias", "running_mean", "running_var"}
    assert first.output is first.norm.node
    assert first.readers == [first.norm.node]
    assert first.is_normalized
    assert isinstance(first.activation, Activation)
    assert first.activation.node.name == "tanh"
    assert second.norm is None
    assert not second.is_normalized
    assert second.output is second.node
    assert (second.weight, second.bias) == ("3.weight", "3.bias")
    assert last.activation == "its output leaves the network"


@pytest.mark.parametrize("build", [_read_twice, _over_tokens])
def test_a_norm_that_is_not_the_layers_own_is_none(build: Callable[[], nn.Module]) -> None:
    first = _views(build)[0]
    assert first.norm is None
    assert not first.is_normalized
    assert first.output is first.node
    program = trace(network(build, X), X)
    (note,) = FoldNormalization(batch_norm=True)(program).notes
    assert ("other readers" if build is _read_twice else "another axis") in note


def test_a_norm_without_statistics_is_the_layers_own_and_not_fixed() -> None:
    first = _views(lambda: _normed(lambda size: nn.BatchNorm2d(size, track_running_stats=False)))[0]
    assert first.norm is not None
    assert not first.norm.is_fixed
    assert first.output is first.node


def test_a_norm_of_computed_gains_is_not_fixed_and_stays() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.first(x)
        h = nn.functional.batch_norm(h, self.mean, self.var, self.gain.square(), None)
        return self.last(h.relu().flatten(1))

    def build() -> nn.Module:
        own = {"mean": torch.randn(5), "var": torch.rand(5) + 0.5, "gain": nn.Parameter(torch.rand(5) + 0.5)}
        return net(forward, first=conv(3, 5), last=nn.Linear(180, 2), **own)

    model = network(build, X)
    program = trace(model, X)
    first = next(iter(layer_views(program).values()))
    assert first.norm is not None
    assert not first.norm.is_fixed
    kept = FoldNormalization(batch_norm=True)(program)
    assert len(kept.notes) == 1
    close(kept(X), model(X), 1e-12)


def test_the_affine_of_a_norm_is_what_it_computes() -> None:
    program = trace(network(_normed, X), X)
    norm = next(node for node in program.graph.nodes if node.name.startswith("batch_norm"))
    scale, shift = BatchNorm(norm).affine(program.weights[0])
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    values = {role: program.weights[0][name] for role, name in BatchNorm(norm).names.items()}
    wanted = nn.functional.batch_norm(x, **values, eps=BatchNorm(norm).eps)
    close(x * scale[:, None, None] + shift[:, None, None], wanted, 1e-12)


def test_an_inserted_affine_is_part_of_what_a_layer_hands_on() -> None:
    program = Interpolate()(trace(edges(_normed, X), X))
    goals = {name: Goal(torch.ones(1, 1), torch.ones(1, 1)) for name in layer_views(program)}
    first, second, _ = layer_views(InsertNormalization()(replace(program, goals=goals))).values()
    assert first.inserted is None
    assert second.inserted is not None
    assert second.output is second.inserted.add
    assert second.inserted.layer is second.node


def test_tensors_that_others_read_are_not_a_layers_own() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4), nn.Flatten())
        model[3].bias = model[0].bias
        return nn.Sequential(*model, nn.Linear(144, 2))

    program = trace(network(build, X), X)
    first = next(iter(layer_views(program).values()))
    assert "is used by" in not_alone(first.node, ("weight", "bias"), readers_of(program.graph))
    assert not not_alone(first.node, ("weight",), readers_of(program.graph))
    assert pairs(program) == [], "a bias of two layers is not scaled for one of them"


def test_layers_without_a_number_may_stand_before_a_norm() -> None:
    """An einsum has no weight argument of its own; a BatchNorm behind it is no layer's."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = torch.einsum("nc,cd->nd", x.flatten(1), self.w)
        return self.last(self.norm(h).relu())

    def build() -> nn.Module:
        return net(forward, w=nn.Parameter(torch.randn(108, 6)), norm=nn.BatchNorm1d(6), last=nn.Linear(6, 2))

    result = merge(edges(build, X), X, data=X, solve="least_squares", normalize=None, progress=False)
    assert any("Reconstruct" in name for name in result.report.passes)
