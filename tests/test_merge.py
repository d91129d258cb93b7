"""merge: the user's own class where it fits, the function that theory demands, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, network, transported
from micro_models import conv, net
from test_matching import concatenated, depthwise, grouped, residual, squeeze_excite
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from vfx.api import Result, collect, compile, merge, trace
from vfx.errors import ArgumentError
from vfx.match.weight import WeightMatching
from vfx.models import resnet20_bn, resnet20_fixup, resnet20_plain, vgg16_bn, vgg16_ln
from vfx.program import Program

X = images(12, 8)
PICTURES = images(8, 32)
BATCHES = (1, 7)


def dropped() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), conv(6, 5), nn.BatchNorm2d(5),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.3), nn.Linear(5 * 64, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual": (residual, X),
    "concatenated": (concatenated, X),
    "depthwise": (depthwise, X),
    "grouped": (grouped, X),
    "squeeze_excite": (squeeze_excite, X),
    "dropped": (dropped, X),
    "vgg16_bn": (lambda: vgg16_bn(width=0.0625), PICTURES),
    "vgg16_ln": (lambda: vgg16_ln(width=0.0625), PICTURES),
    "resnet20_bn": (lambda: resnet20_bn(width=0.25), PICTURES),
    "resnet20_plain": (lambda: resnet20_plain(width=0.25), PICTURES),
    "resnet20_fixup": (lambda: resnet20_fixup(width=0.25), PICTURES),
}


_traced: dict[str, tuple[list[nn.Module], Program]] = {}


def _pair(name: str) -> tuple[list[nn.Module], Program]:
    """Two edges of a network and their Program, traced once: every merge below takes the Program."""
    if name not in _traced:
        build, x = NETWORKS[name]
        models = edges(build, x)
        _traced[name] = models, trace(models, x[:2])
    return _traced[name]


def _run(models: Any, x: Tensor, **options: Any) -> Result:
    return merge(models, None if hasattr(models, "graph") else x[:2], progress=False, **options)


def _same_bits(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


# classes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_users_class_comes_back_when_the_structure_is_unchanged(name: str, data: bool) -> None:
    _, x = NETWORKS[name]
    models, program = _pair(name)
    bias_free = name in ("depthwise", "resnet20_fixup")
    normalize = None if bias_free and not any("BatchNorm" in type(m).__name__ for m in models[0].modules()) else "auto"
    result = _run(program, x, data=x if data else None, normalize=normalize, classes="permutation")
    assert type(result.module) is type(models[0])
    assert result.report.own_class
    assert result.report.class_reason == ""
    assert list(result.module.state_dict()) == list(models[0].state_dict())
    assert [n for n, _ in result.module.named_buffers()] == [n for n, _ in models[0].named_buffers()]
    assert [n for n, _ in result.module.named_parameters()] == [n for n, _ in models[0].named_parameters()]
    assert not any(module.training for module in result.module.modules())
    assert all(parameter.requires_grad for parameter in result.module.parameters())
    with torch.no_grad():
        for batch in BATCHES:
            y = torch.randn(batch, *x.shape[1:], generator=torch.Generator().manual_seed(batch))
            close(result.module(y), result.program(y), 1e-5)


def test_a_graphmodule_comes_back_otherwise_and_says_why() -> None:
    models = edges(residual, X)
    result = _run(models, X, preserve=2)
    assert isinstance(result.module, fx.GraphModule)
    assert not result.report.own_class
    assert result.report.class_reason == "the structure changed"
    assert "GraphModule: the structure changed" in str(result.report)
    assert type(result.module).__name__ == type(models[0]).__name__
    bias_free = edges(lambda: nn.Sequential(conv(3, 4, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)), X)
    result = _run(bias_free, X, data=X, normalize="repair")
    assert isinstance(result.module, fx.GraphModule)
    assert "0.bias" in result.module.state_dict()
    result = _run(bias_free, X, data=X, normalize=None)
    assert type(result.module) is nn.Sequential


# laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", [None, "weight", "activation"])
@pytest.mark.parametrize("name", NETWORKS)
def test_merging_a_network_with_itself_gives_it_back(name: str, match: str | None) -> None:
    _, x = NETWORKS[name]
    (model, _), program = _pair(name)
    program = program.with_weights([program.weights[0], program.weights[0]])
    result = _run(program, x, data=x if match == "activation" else None, match=match, normalize=None)
    if match == "activation":  # a dead channel may change places with another
        with torch.no_grad():
            close(result.module(x), model(x), 1e-5)
    else:
        _same_bits(result.module, model)


# LayerNorm sees channels that the ReLU behind it keeps at zero, and no tap does: their order is not to be found.
RECOVERABLE = [(n, m) for n in NETWORKS for m in ("weight", "activation") if (n, m) != ("vgg16_ln", "activation")]


@pytest.mark.parametrize(("name", "match"), RECOVERABLE)
def test_merging_a_network_with_its_permuted_copy_gives_its_function(name: str, match: str) -> None:
    build, x = NETWORKS[name]
    model = network(build, x)
    moved, facts, _ = transported(model, x, seed=2)
    first, state = facts.program.weights[0], moved.state_dict()
    program = facts.program.with_weights([first, {name: state.get(name, first[name]) for name in first}])
    result = _run(program, x, data=x if match == "activation" else None, match=match, normalize=None)
    with torch.no_grad():
        expected = model(x)
        close(moved(x), expected, 1e-5)
        close(result.module(x), expected, 1e-5)
        direct = _run(program, x, match=None, normalize=None).module(x)
    assert (direct - expected).abs().max() > 1e-3 * expected.abs().max()  # negative control
    assert result.report.verify_error is not None
    assert result.report.verify_error < 1e-9


@pytest.mark.parametrize("normalize", ["repair", "rescale"])
def test_normalizing_what_needs_none_changes_nothing(normalize: str) -> None:
    x = X.double()
    model = network(concatenated, x)
    moved, _, _ = transported(model, x, seed=2)
    result = _run([model, moved], x, data=x, match="weight", normalize=normalize)
    with torch.no_grad():
        close(result.module(x), model(x), 1e-9)


@pytest.mark.parametrize("preserve", [0, 3])
def test_three_edges_with_weights(preserve: int) -> None:
    model = network(residual, X)
    models = [model, *(transported(model, X, seed=seed)[0] for seed in (1, 2))]
    result = _run(models, X, match="weight", weights=[0.2, 0.5, 0.3], preserve=preserve, normalize=None)
    with torch.no_grad():
        close(result.module(X), model(X), 1e-5)
    others = edges(residual, X, 3)
    direct = _run(others, X, match=None, weights=[0.2, 0.5, 0.3], normalize=None).module
    for key, tensor in direct.state_dict().items():
        if tensor.is_floating_point():
            sets = [model.state_dict()[key] for model in others]
            close(tensor, 0.2 * sets[0] + 0.5 * sets[1] + 0.3 * sets[2], 1e-6)


def test_one_number_is_the_weight_of_the_second_edge() -> None:
    models = edges(residual, X)
    first = _run(models, X, match=None, weights=0.3, normalize=None)
    _same_bits(first.module, _run(models, X, match=None, weights=(0.7, 0.3), normalize=None).module)
    close(first.module.stem.weight, 0.7 * models[0].stem.weight + 0.3 * models[1].stem.weight, 1e-6)
    for weights, edge in ((0.0, 0), (1.0, 1), ((1, 0), 0)):
        _same_bits(_run(models, X, match=None, weights=weights, normalize=None).module, models[edge])


# defaults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "normal"), [(residual, "reset"), (concatenated, "rescale")])
def test_auto_chooses_by_data_and_norm(build: Any, normal: str) -> None:
    """Without data nothing is normalised; with data, not solved, what does best on the part that is held out."""
    models = edges(build, X)
    assert list(_run(models, X).report.passes) == ["Align(WeightMatching)", "Interpolate(0.5, 0.5)"]
    result = _run(models, X, data=X, solve=None)
    scores = result.report.scores
    assert {"none", normal, "bias_calibration", "bias_removal"} <= set(scores)
    best = min(scores, key=lambda name: scores[name]["divergence"])
    assert result.report.choices["normalize"] == (None if best == "none" else best)


def test_auto_matches_activations_where_there_are_statistics() -> None:
    models = edges(concatenated, X)
    statistics = collect(models, X[:2], data=X, progress=False)
    result = _run(models, X, statistics=statistics)
    assert list(result.report.passes) == ["Align(ActivationMatching)", "Interpolate(0.5, 0.5)"]


@pytest.mark.parametrize("normalize", [None, "auto", "repair", "rescale", "reset"])
def test_kept_statistics_give_the_same_bits(normalize: str | None) -> None:
    program = trace(edges(residual, X), X[:2])
    statistics = collect(program, data=X.split(5), progress=False)
    for preserve in (0, 2):
        options: dict[str, Any] = {"normalize": normalize, "preserve": preserve, "data": X.split(5)}
        fresh = _run(program, X, match="activation", **options)
        kept = _run(program, X, match="activation", statistics=statistics, **options)
        _same_bits(fresh.module, kept.module)
        again = _run(program, X, match="activation", statistics=fresh.statistics, **options)
        if fresh.statistics is not None and fresh.statistics.features:
            _same_bits(fresh.module, again.module)


def test_statistics_without_what_is_needed_are_refused() -> None:
    models = edges(concatenated, X)
    layers_only = _run(models, X, data=X, match="weight", normalize="repair").statistics
    with pytest.raises(ArgumentError, match="hold no 'features'"):
        _run(models, X, statistics=layers_only, match="activation")
    features_only = _run(models, X, data=X, match="activation", normalize=None).statistics
    with pytest.raises(ArgumentError, match="no layer statistics"):
        _run(models, X, statistics=features_only, data=X, normalize="repair")


@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_one_seed_one_result(name: str) -> None:
    build, x = NETWORKS[name]
    models = edges(build, x)
    for options in ({"match": "weight"}, {"data": x}, {"data": x, "preserve": 2}):
        first, second = (_run(models, x, seed=3, **options) for _ in range(2))
        _same_bits(first.module, second.module)
        with torch.no_grad():
            assert torch.equal(first.module(x), second.module(x))


@pytest.mark.parametrize("preserve", [0, 2])
def test_data_may_be_an_iterator_that_can_be_read_once(preserve: int) -> None:
    models = edges(residual, X)
    options: dict[str, Any] = {"preserve": preserve, "match": "activation"}
    for normalize in ("reset", "repair"):
        once = _run(models, X, data=iter(X.split(5)), normalize=normalize, **options)
        _same_bits(once.module, _run(models, X, data=X.split(5), normalize=normalize, **options).module)


def test_a_loader_with_labels_and_a_tensor_are_the_same_data() -> None:
    models = edges(residual, X)
    loader = DataLoader(TensorDataset(X, torch.arange(len(X))), batch_size=len(X))
    _same_bits(_run(models, X, data=loader).module, _run(models, X, data=X).module)


def test_device_and_max_samples_are_taken() -> None:
    models = edges(residual, X)
    expected = _run(models, X, data=X[:6])
    _same_bits(_run(models, X, data=[X[:6], X[6:]], max_samples=6, device="cpu").module.eval(), expected.module)
    result = _run(models, X, data=X, device=torch.device("cpu"))
    assert all(tensor.device.type == "cpu" for tensor in result.module.state_dict().values())


# side effects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preserve", [0, 2])
def test_the_users_models_and_the_random_state_are_untouched(preserve: int) -> None:
    models = edges(dropped, X)
    models[0].train()
    models[1][0].weight.requires_grad_(False)
    F.cross_entropy(models[1](X), torch.zeros(len(X), dtype=torch.long)).backward()
    snapshots = [copy.deepcopy(model) for model in models]
    versions = [[tensor._version for tensor in model.state_dict().values()] for model in models]
    modes = [[module.training for module in model.modules()] for model in models]
    grads = [[p.grad for p in model.parameters()] for model in models]
    state = torch.random.get_rng_state()
    for options in ({"match": "weight"}, {"data": X}, {"data": X, "normalize": "repair"}):
        result = _run(models, X, preserve=preserve, **options)
        with torch.no_grad():
            for parameter in result.module.parameters():
                parameter.add_(1)  # the result shares no storage
    assert torch.equal(torch.random.get_rng_state(), state)
    for model, before, version, mode, grad in zip(models, snapshots, versions, modes, grads):
        _same_bits(model, before)
        assert [tensor._version for tensor in model.state_dict().values()] == version
        assert [module.training for module in model.modules()] == mode
        assert all(now is then for now, then in zip((p.grad for p in model.parameters()), grad))
        assert not any(module._forward_hooks for module in model.modules())
    assert not models[1][0].weight.requires_grad


# special networks -----------------------------------------------------------------------------------------------------


def _tied() -> nn.Module:
    """An autoencoder whose decoder is the encoder transposed, and a second name for one parameter."""
    model = net(lambda self, x: F.linear(F.relu(self.code(x.flatten(1))), self.code.weight.t(), self.out),
                code=nn.Linear(12, 7), out=nn.Parameter(torch.randn(12)))  # fmt: skip
    model.register_parameter("again", model.out)
    return model


def _shared() -> nn.Module:
    return net(lambda self, x: self.fc(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3))),
               a=conv(3, 6), b=conv(6, 6), fc=nn.Linear(6, 3))  # fmt: skip


def _auxiliary() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.training:
            return self.aux(h.mean((2, 3)))
        return self.fc(F.relu(self.b(h)).mean((2, 3)))

    return net(forward, a=conv(3, 6), b=conv(6, 5), aux=nn.Linear(6, 3), fc=nn.Linear(5, 3))


SPECIAL: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "tied": (_tied, torch.randn(12, 12, generator=torch.Generator().manual_seed(0))),
    "shared": (_shared, X),
    "auxiliary": (_auxiliary, X),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_networks_merge_with_their_permuted_copies(name: str) -> None:
    build, x = SPECIAL[name]
    model = network(build, x)
    moved, facts, _ = transported(model, x, seed=2)
    assert facts.groups
    result = _run([model, moved], x, match="weight", normalize=None)
    assert type(result.module) is type(model)
    with torch.no_grad():
        close(result.module(x), model(x), 1e-5)
    if name == "tied":
        assert result.module.again is result.module.out


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_averaged_where_they_are_stored(norm: Callable[..., nn.Module]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(norm(conv(3, 6)), nn.ReLU(), norm(conv(6, 5)), nn.ReLU(), nn.Flatten(), nn.Linear(320, 3))

    models = edges(build, X)
    result = _run(models, X, match="weight", normalize=None, weights=(0.0, 1.0))
    assert type(result.module) is nn.Sequential
    assert set(result.module.state_dict()) == set(models[0].state_dict())
    with torch.no_grad():
        close(result.module(X), models[1](X), 1e-5)
    result = _run(models, X, match="weight", preserve=1, normalize=None, weights=(0.0, 1.0))
    with torch.no_grad():
        close(result.module(X), models[1](X), 1e-5)


def test_an_unused_head_comes_from_the_first_edge_and_is_named() -> None:
    models = edges(_auxiliary, X)
    result = _run(models, X, match="weight")
    assert torch.equal(result.module.aux.weight, models[0].aux.weight)
    assert any("the graph never reads them: aux.weight, aux.bias" in note for note in result.report.notes)
    assert "aux.weight" in str(result.report)


def test_pfm_of_a_shared_layer_keeps_one_copy_per_branch() -> None:
    models = edges(_shared, X)
    result = _run(models, X, match=None, preserve=2, normalize=None, weights=(0.0, 1.0))
    names = set(result.module.state_dict())
    assert {"branches.0.b.weight", "branches.1.b.weight", "b.weight"} <= names
    with torch.no_grad():
        close(result.module(X), models[1](X), 1e-5)


def test_several_inputs_and_nested_outputs_survive() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
        h = F.relu(self.a(x)) + F.relu(self.b(y))
        return {"logits": self.c(h), "features": (h, [h.sum(1)])}

    def build() -> nn.Module:
        return net(forward, a=nn.Linear(5, 6), b=nn.Linear(4, 6), c=nn.Linear(6, 3))

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 5, generator=generator), torch.randn(9, 4, generator=generator)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(build().eval())
    data = [{"x": x, "y": y}]
    for preserve in (0, 1, 3):
        result = merge(models, (x[:2], y[:2]), data=data, preserve=preserve, progress=False, normalize="repair")
        found = result.module(x, y)
        assert set(found) == {"logits", "features"}
        assert found["logits"].shape == (9, 3)
        hidden, (summed,) = found["features"]
        close(hidden.sum(1), summed, 1e-6)


# the GraphModule ------------------------------------------------------------------------------------------------------


def _graph(**options: Any) -> tuple[nn.Module, list[nn.Module]]:
    models = edges(dropped, X)
    return _run(models, X, match="weight", preserve=1, **options).module, models


def test_a_merged_graphmodule_follows_its_mode() -> None:
    module, _ = _graph()
    assert isinstance(module, fx.GraphModule)
    assert not module.training
    with torch.no_grad():
        still = module(X)
        assert torch.equal(module(X), still)
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        module.train()
        torch.manual_seed(0)
        first, second = module(2 * X + 1), module(2 * X + 1)
        assert not torch.equal(first, second)  # dropout
        for name, buffer in module.named_buffers():
            if name.endswith("num_batches_tracked"):
                assert buffer == before[name] + 2
            else:
                assert not torch.equal(buffer, before[name]), name
        module.eval()
        assert torch.equal(module(X), module(X))
        assert not torch.equal(module(X), still)  # other running statistics
        module.load_state_dict({**module.state_dict(), **before})
        assert torch.equal(module(X), still)


def test_training_mode_equals_the_class_in_training_mode() -> None:
    """BatchNorm with batch statistics: with all weight on one edge the PFM module trains like that edge."""
    models = edges(lambda: nn.Sequential(*[m for m in dropped() if not isinstance(m, nn.Dropout)]), X.double())
    module = _run(models, X.double(), match=None, preserve=1, weights=(1.0, 0.0), normalize=None).module
    module.train()
    twin = copy.deepcopy(models[0]).train()
    with torch.no_grad():
        close(module(X.double()), twin(X.double()), 1e-12)
    close(module.get_buffer("1.running_var"), twin[1].running_var, 1e-12)
    module(X.double()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize("batch", BATCHES)
def test_copies_pickles_compilation_and_export_agree(batch: int) -> None:
    module, _ = _graph()
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = module(x)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        for twin in copies:
            assert torch.equal(twin(x), expected)
            assert list(twin.state_dict()) == list(module.state_dict())
        again = _run(copies, X, match=None, normalize=None)  # traced once more
        close(again.module(x), expected, 1e-5)
        for twin in copies:
            twin.train()
            assert not torch.equal(twin(X), twin(X))
        exported = torch.export.export(
            module, (X[:2],), strict=False, dynamic_shapes=({0: torch.export.Dim("b", min=1)},)
        )
        close(exported.module()(x), expected, 1e-6)


def test_the_result_compiles_without_a_graph_break() -> None:
    module, _ = _graph()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        for batch in BATCHES:
            x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
            close(compiled(x), module(x), 1e-6)


def test_a_merged_network_can_be_merged_again() -> None:
    """PFM of PFM: branches inside branches, by alignment and by hand."""
    models = edges(residual, X.double(), 4)
    left = _run(models[:2], X.double(), match=None, preserve=2, normalize=None).module
    right = _run(models[2:], X.double(), match=None, preserve=2, normalize=None).module
    both = _run([left, right], X.double(), match="weight", weights=(0.0, 1.0), preserve=1, normalize=None)
    with torch.no_grad():
        close(both.module(X.double()), right(X.double()), 1e-9)


# report ---------------------------------------------------------------------------------------------------------------


def test_the_report_tells_what_was_done() -> None:
    result = _run(edges(residual, X), X, data=X, preserve="a2", normalize="repair")
    found = result.report.to_dict()
    assert found["preserve"] == 3
    assert found["normalize"] == "repair"
    assert found["passes"][:2] == ["Align(ActivationMatching)", "DuplicateBranches(3/6, preactivation)"]
    assert found["params_ratio"] > 1
    assert found["params"] == sum(p.numel() for p in result.module.parameters())
    assert set(found["seconds"]) >= {"trace", "statistics", "Align", "emit"}
    assert all(value >= 0 for value in found["seconds"].values())
    assert 0 <= found["verify_error"] < 1e-9
    assert "merge report" in str(result.report)


def test_one_program_serves_many_merges() -> None:
    models = edges(residual, X)
    program = trace(models, X[:2])
    for options in ({"match": None}, {"match": "weight", "preserve": 2}, {"match": WeightMatching(restarts=1)}):
        _same_bits(_run(program, X, **options).module, _run(models, X, **options).module)


def test_compile_runs_on_one_network() -> None:
    from vfx.passes.fold_normalization import FoldNormalization

    model = network(residual, X)
    result = compile(model, X[:2], passes=[FoldNormalization(batch_norm=True)])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.module.modules())
    with torch.no_grad():
        close(result.module(X), model(X), 1e-5)
