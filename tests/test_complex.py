"""Complex parameters are matched, averaged, counted, pruned and written like real ones."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vfx
from vfx.analyse.verify import verify
from vfx.complex_numbers import parts_of
from vfx.elements import act, permuted, random_permutations
from vfx.errors import ArgumentError


class Gate(nn.Module):
    """A complex factor of each channel, and a complex matrix that a product reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(5, 8), nn.Parameter(torch.randn(8, dtype=torch.cdouble))
        self.mix, self.last = nn.Parameter(torch.randn(8, 6, dtype=torch.cdouble)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = (torch.relu(self.first(x)) * self.gate) @ self.mix
        return self.last(torch.tanh(h.real) + torch.tanh(h.imag))


class Layers(nn.Module):
    """Complex linear layers, biases and a ReLU of both parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(i, o, dtype=torch.cdouble) for i, o in ((5, 8), (8, 6)))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.to(torch.cdouble))
        return self.last(self.second(torch.complex(h.real.relu(), h.imag.relu())).abs())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(i, 6, 3, dtype=torch.cdouble) for i in (1, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x[:, None].to(torch.cdouble))
        return self.last(self.second(h * torch.relu(h.abs() - 0.1)).abs().mean(-1))


NETWORKS = [Gate, Layers, Convolutions]
QUIET = {"progress": False}


def built(kind: Callable[[], nn.Module], count: int = 1) -> list[nn.Module]:
    torch.manual_seed(0)
    return [kind().double().eval() for _ in range(count)]


def inputs(count: int = 4) -> Tensor:
    return torch.randn(count, 5, dtype=torch.float64)


def complex_names(model: nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if tensor.is_complex()]


@pytest.mark.parametrize("kind", NETWORKS)
def test_symmetries_act_on_complex_parameters(kind: Callable[[], nn.Module]) -> None:
    (model,) = built(kind)
    facts = vfx.symmetry(model, inputs())
    assert verify(facts) < 1e-12
    moved = [m for group in facts.groups for m in group.members if m.fqn in complex_names(model)]
    assert moved
    assert all(verify(facts, without=(member,)) > 1e-3 for member in moved)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_permuted_copy_is_found_again(kind: Callable[[], nn.Module]) -> None:
    (model,) = built(kind)
    program = vfx.trace(model, inputs())
    facts = vfx.symmetry(program)
    copy = act(facts, permuted(random_permutations(facts.groups, np.random.default_rng(1))), program.weights[0])
    pair = program.with_weights([program.weights[0], copy])
    x = inputs(16)
    for match, limit in (("weight", 1e-10), ("activation", 1e-10)):
        result = vfx.merge(pair, data=[inputs(64)], match=match, solve=None, normalize=None, **QUIET)
        assert (result.module(x) - model(x)).abs().max() < limit
    apart = vfx.merge(pair, match=None, normalize=None, **QUIET)
    assert (apart.module(x) - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", NETWORKS)
def test_direct_interpolation_averages_them_in_the_users_class(kind: Callable[[], nn.Module]) -> None:
    one, other = built(kind, 2)
    merged = vfx.merge([one, other], inputs(), match=None, weights=0.25, **QUIET).module
    assert type(merged) is kind
    for name in complex_names(one):
        torch.testing.assert_close(
            merged.state_dict()[name], 0.75 * one.state_dict()[name] + 0.25 * other.state_dict()[name]
        )


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_profile_counts_each_once(kind: Callable[[], nn.Module]) -> None:
    (model,) = built(kind)
    profile = vfx.profile(model, inputs())
    assert profile.params == sum(parameter.numel() for parameter in model.parameters())
    assert not profile.unknown_ops


def test_a_shared_complex_parameter_is_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(5, 5, bias=False, dtype=torch.cdouble)
            self.two = nn.Linear(5, 5, bias=False, dtype=torch.cdouble)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x.to(torch.cdouble)))).abs()

    (model,) = built(Shared)
    program = vfx.trace(model, inputs())
    assert [name for name in program.names() if program.is_parameter(name)] == ["one.weight"]
    assert vfx.profile(program).params == 25


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", ["remove", "fold"])
def test_channels_of_complex_layers_are_removed(kind: Callable[[], nn.Module], method: str) -> None:
    (model,) = built(kind)
    result = vfx.prune_structured(model, inputs(), sparsity=0.5, method=method, **QUIET)
    assert result.report.error is not None
    assert result.report.error < 1e-10
    assert complex_names(result.module) == complex_names(model)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.module))
    assert after < 0.7 * before
    assert result.report.profile.params == after


def test_masks_leave_complex_matrices_alone_and_say_so() -> None:
    (model,) = built(Layers)
    result = vfx.prune(model, inputs(), sparsity=0.5, protect=(), normalize=None, **QUIET)
    assert result.report.notes == ("not pruned, since they are complex: first.weight, second.weight",)
    for name in complex_names(model):
        assert torch.equal(result.module.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("normalize", ["repair", "rescale"])
def test_normalization_leaves_complex_layers_alone_and_says_so(normalize: str) -> None:
    models = built(Layers, 2)
    result = vfx.merge(models, inputs(), data=[inputs(64)], match="weight", normalize=normalize, **QUIET)
    assert any("first, whose outputs are complex" in note for note in result.report.notes)
    assert torch.isfinite(result.module(inputs())).all()


def test_least_squares_and_the_default_merge_run() -> None:
    models = built(Layers, 2)
    for options in ({}, {"solve": "least_squares"}):
        result = vfx.merge(models, inputs(), data=[inputs(64)], **options, **QUIET)
        assert complex_names(result.module) == complex_names(models[0])


@torch.no_grad()
def test_features_of_complex_layers_are_measured_by_their_length() -> None:
    (model,) = built(Layers)
    x = inputs(64)
    row = vfx.diagnose(model, [model, model], x[:2], data=[x], match=None, **QUIET).rows[0]
    first = model.first(x.to(torch.cdouble))
    zero = model.first(torch.zeros(1, 5, dtype=torch.cdouble))
    activation = lambda h: torch.complex(h.real.relu(), h.imag.relu())  # noqa: E731
    lengths = [float((f(first) - f(zero)).abs().square().sum(1).sqrt().mean()) for f in (activation, lambda h: h)]
    assert min(abs(row.feature - length) for length in lengths) < 1e-6 * row.feature


def test_kept_layers_hold_the_edges_own_complex_parameters() -> None:
    models = built(Layers, 2)
    names = {"weight", "bias"}
    merged = vfx.merge(models, inputs(), match="weight", normalize=None, preserve=1, **QUIET).module
    own = {f"branches.{edge}.first.{name}" for edge in range(2) for name in names}
    assert set(complex_names(merged)) == own | {f"second.{name}" for name in names}
    merged = vfx.merge(models, inputs(), match="weight", normalize=None, heads=2, **QUIET).module
    own = {f"heads.{edge}.second.{name}" for edge in range(2) for name in names}
    assert set(complex_names(merged)) == own | {f"first.{name}" for name in names}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_files_hold_them(kind: Callable[[], nn.Module], suffix: str, tmp_path) -> None:
    (model,) = built(kind)
    exact = copy.deepcopy(model)
    if suffix == ".safetensors":  # which has no complex128
        model = model._apply(lambda t: t.to(torch.complex64 if t.is_complex() else torch.float32))
    path = vfx.export(model, tmp_path / f"m{suffix}", inputs().to(model.last.weight.dtype))
    loaded = vfx.load(path, model) if suffix == ".safetensors" else vfx.load(path)
    assert complex_names(loaded) == complex_names(model)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    if suffix == ".safetensors":
        with pytest.raises(ArgumentError, match="complex128"):
            vfx.export(exact, tmp_path / "exact.safetensors", inputs())


def test_only_a_models_own_complex_parameters_are_joined_again() -> None:
    class Parts(nn.Module):
        """Real parts that the user's own forward makes a complex number of."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Parameter(torch.randn(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.view_as_complex(self.parts)).abs()

    (model,) = built(Parts)
    program = vfx.trace(model, inputs())
    assert all(parts_of(node) is None for node in program.graph.nodes)
    assert program.weights[0]["parts"].shape == (5, 2)
