"""Normalizations against literal implementations: every method, every sweep, spilling, recording, batch statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images
from conftest import node_values as values
from test_passes import _statistics
from torch import Tensor, nn
from vfx.passes.calibrate_normalization import CalibrateNormalization
from vfx.passes.insert_normalization import InsertNormalization
from vfx.passes.remove_bias import RemoveBias
from vfx.passes.reset_batchnorm import ResetBatchNorm
from vfx.passes.use_batch_statistics import UseBatchStatistics

from vfx.analyse.activations import Activation
from vfx.analyse.layer_view import layer_views
from vfx.api import collect, layers, merge, record, recorded, repair, symmetry, trace
from vfx.errors import ArgumentError, DataError, PassError
from vfx.match.first_layers import FirstLayers, first_layer_of_groups
from vfx.match.matcher import Problem
from vfx.models import LayerNorm2d
from vfx.normalize.catalogue import Normalization
from vfx.program import Program
from vfx.statistics import spill
from vfx.statistics.data import Batches

X = images(20, 8, dtype=torch.float64)
PARTS = X.split(6)
ALPHAS = (0.3, 0.7)


def conv(inputs: int, outputs: int, **options: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def plain() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.ReLU(), conv(6, 5), nn.GELU(), nn.MaxPool2d(2), conv(5, 4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def normed() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
        nn.Linear(320, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """A stream, a branch, a split value and a transposed view that wait at the readers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = conv(3, 8), conv(8, 8), conv(8, 8)
        self.part, self.fc = conv(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.last(F.relu(self.inner(F.relu(x))))
        one, other = x.chunk(2, 1)
        x = torch.cat([self.part(F.relu(one)), other.transpose(2, 3)], 1)
        return self.fc(x.mean((2, 3)))


class Edges(list[nn.Module]):
    """Networks that no test changes, captured once."""

    @cached_property
    def program(self) -> Program:
        return trace(list(self), X[:2])


@cache
def _edges(build: Callable[[], nn.Module] = plain, count: int = 2) -> Edges:
    return Edges(edges(build, X, count))


def _run(models: Any, normalize: Any, **options: Any) -> Any:
    models = models.program if isinstance(models, Edges) else models
    settings: dict[str, Any] = {"data": PARTS, "match": None, "weights": ALPHAS, "progress": False} | options
    return merge(models, X[:2], normalize=normalize, **settings)


# the methods ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _literal(models: list[nn.Module], to_goal: Callable[..., Tensor], behind: bool = False) -> nn.Module:
    """Layer after layer: the whole merged network is run, its layer's output is replaced by ``to_goal`` of it."""
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    merged.load_state_dict({k: 0.3 * states[0][k] + 0.7 * states[1][k] for k in states[0]})
    sites = [i for i, m in enumerate(merged) if isinstance(m, nn.Conv2d)]  # type: ignore[arg-type]
    for index in sites:
        index += behind

        def output(network: Any, index: int = index) -> Tensor:
            x = X
            for module in list(network)[: index + 1]:
                x = module(x)
            return x

        (m0, s0), (m1, s1) = (_statistics(output(model)) for model in models)
        column = lambda x: x.reshape(-1, 1, 1)  # noqa: E731
        mean, std = (column(x) for x in _statistics(output(merged)))
        std = torch.where(std == 0, 1.0, std)
        function = to_goal(mean, std, column(0.3 * m0 + 0.7 * m1), column(0.3 * s0 + 0.7 * s1))
        merged[index] = _Then(merged[index], function)  # type: ignore[index, operator]
    return merged


class _Then(nn.Module):
    def __init__(self, module: nn.Module, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.module(x))


LITERAL: dict[str, Callable[..., Any]] = {
    "repair": lambda m, s, gm, gs: lambda x: (x - m) / s * gs + gm,
    "rescale": lambda m, s, gm, gs: lambda x: x / s * gs,
    "rescale_average": lambda m, s, gm, gs: lambda x: x / s * gs.mean(),
    "reshift": lambda m, s, gm, gs: lambda x: x - m + gm,
}


@pytest.mark.parametrize("site", ["preactivation", "activation"])
@pytest.mark.parametrize("method", LITERAL)
def test_each_method_is_its_formula_layer_by_layer(method: str, site: Any) -> None:
    models = _edges()
    result = _run(models, Normalization(method, site=site))
    expected = _literal(models, LITERAL[method], behind=site == "activation")
    with torch.no_grad():
        close(result.module(X), expected(X), 1e-8)
        other = _literal(models, LITERAL["repair" if method != "repair" else "rescale"], behind=site == "activation")
        assert (other(X) - expected(X)).abs().max() > 1e-3 * expected(X).abs().max()  # the methods differ
    assert result.report.own_class == (site == "preactivation")
    notes = [note for note in result.report.notes if note.startswith("not folded")]
    assert len(notes) == (0 if site == "preactivation" else 3)


@pytest.mark.parametrize("kind", ["repair", "rescale"])
@pytest.mark.parametrize("how", ["train", "uncorrected"])
def test_the_other_sweeps_are_theirs_and_not_the_exact_one(how: Any, kind: str) -> None:
    """Train mode: each batch normalised by itself, means and unbiased variances averaged. Uncorrected: one look."""
    models = _edges()
    found = _run(models, Normalization(kind, sweep=how)).module
    goals = [_statistics_of_convs(model, [X]) for model in models]
    network = _run(models, None, data=None).module
    expected = copy.deepcopy(network)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with torch.no_grad():
        for batch in PARTS if how == "train" else [X]:
            x = batch
            for name, module in network.named_children():
                x = module(x)
                if not isinstance(module, nn.Conv2d):
                    continue
                flat = x.movedim(1, 0).flatten(1)
                seen.setdefault(name, []).append((flat.mean(1), flat.var(1, correction=how == "train")))
                if how == "train":
                    scale, shift = _affine(kind, flat.mean(1), flat.std(1, correction=0), goals, name)
                    x = x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
        for name, found_ in seen.items():
            mean, var = (torch.stack(part).mean(0) for part in zip(*found_))
            scale, shift = _affine(kind, mean, var.sqrt(), goals, name)
            module = expected.get_submodule(name)
            module.weight.mul_(scale.reshape(-1, 1, 1, 1))
            module.bias.copy_(module.bias * scale + shift)
        close(found(X), expected(X), 1e-9)
        exact = _run(models, kind).module
        assert (exact(X) - expected(X)).abs().max() > 1e-3 * expected(X).abs().max()


def _statistics_of_convs(model: nn.Module, batches: Any) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        x = torch.cat(list(batches))
        for name, module in model.named_children():
            x = module(x)
            if isinstance(module, nn.Conv2d):
                found[name] = _statistics(x)
    return found


def _affine(kind: str, mean: Tensor, std: Tensor, goals: Any, name: str) -> tuple[Tensor, Tensor]:
    (m0, s0), (m1, s1) = (goal[name] for goal in goals)
    scale = (0.3 * s0 + 0.7 * s1) / std
    return scale, 0.3 * m0 + 0.7 * m1 - mean * scale if kind == "repair" else torch.zeros_like(mean)


def test_train_mode_reset_is_torchs_own() -> None:
    """BatchNorm with a cumulative average in training mode, as the public implementations reset it."""
    models = _edges(normed)
    found = _run(models, Normalization("reset", sweep="train")).module
    expected = _run(models, None, data=None).module
    norms = [m for m in expected.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for batch in PARTS:
            expected.train()(batch)
        close(found(X), expected.eval()(X), 1e-9)
        uncorrected = _run(models, Normalization("reset", sweep="uncorrected")).module
        exact = _run(models, "reset").module
        assert not torch.allclose(uncorrected(X), exact(X))
        raw = values(_run(models, None, data=None).program, X)
        for node in ("conv2d", "conv2d_1"):
            index = {"conv2d": "1", "conv2d_1": "4"}[node]
            close(uncorrected.get_submodule(index).running_mean, _statistics(raw[node])[0], 1e-9)


def test_unknown_choices_are_refused() -> None:
    for options in ({"method": "resharpen"}, {"sweep": "twice"}, {"site": "input"}, {"count": -1}, {"memory_limit": -1},
                    {"sweep": "batch"}, {"method": "reset", "site": "activation"}):  # fmt: skip
        with pytest.raises(ArgumentError):
            Normalization(**{"method": "auto", **options})
    program = _edges().program
    with pytest.raises(ArgumentError, match="data="):
        _run(program, "repair", data=None)
    with pytest.raises(ArgumentError, match="prepare"):
        _run(program, None, prepare="polish")
    inserted = InsertNormalization()(program.select(0))
    with pytest.raises(ArgumentError, match="sweep"):
        CalibrateNormalization("repair", X, sweep="twice")(inserted)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="normalize='repair' needs data= or statistics="):
        _run(program, Normalization("repair", sweep="batch"), data=None, match="weight")
    with pytest.raises(PassError, match="no goal statistics"):
        UseBatchStatistics("repair")(program.select(0))


# what cannot be normalised --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["repeated", "single"])
@pytest.mark.parametrize("sweep", ["exact", "train", "uncorrected"])
@pytest.mark.parametrize("method", [*LITERAL, "reset"])
def test_degenerate_statistics_give_no_nan_and_a_note(method: str, sweep: Any, data: str) -> None:
    """One repeated image and a dead layer: linear outputs do not vary, dead channels are constant."""

    def net() -> nn.Module:
        norm = nn.BatchNorm2d(5) if method == "reset" else nn.Identity()
        return nn.Sequential(
            conv(3, 5), norm, nn.ReLU(), conv(5, 5), nn.BatchNorm2d(5) if method == "reset" else nn.Identity(),
            nn.ReLU(), nn.Flatten(), nn.Linear(320, 6), nn.ReLU(), nn.Linear(6, 3),
        )  # fmt: skip

    models = edges(net, X)
    with torch.no_grad():
        for model in models:
            model[0].weight[0] = 0  # a constant channel
            model[0].bias[0] = -5.0  # that the activation kills
            model[3].weight[1] = 0
    batch = X[:1].expand(4, -1, -1, -1) if data == "repeated" else X[:1]
    result = _run(models, Normalization(method, sweep=sweep), data=[batch])
    with torch.no_grad():
        assert result.module(X).isfinite().all()
    assert all(x.isfinite().all() for x in result.module.state_dict().values())
    if method != "reshift":
        assert any("constant channels" in note for note in result.report.notes)


# which layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, {"0", "2", "5"}),
        (2, {"2"}),
        ([1, "5"], {"0", "5"}),
        ("[02]", {"0", "2"}),
        ("*", {"0", "2", "5", "8"}),
        (("8",), {"8"}),
    ],
)
def test_layers_are_named_by_number_name_or_glob(chosen: Any, expected: set[str]) -> None:
    models = _edges()
    before = _run(models, None).module.state_dict()
    after = _run(models, Normalization("repair", layers=chosen)).module.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.allclose(before[key], after[key], rtol=1e-6, atol=0)}
    assert changed == expected


def test_layers_that_match_nothing_are_refused_and_preserved_ones_left_alone() -> None:
    models = _edges()
    with pytest.raises(ArgumentError, match=r"layers must be a whole number, a text, a list of .* or None, got True"):
        Normalization("repair", layers=True)
    for wrong in (7, 0, "conv*", ["0", "nothing"]):
        with pytest.raises(ArgumentError, match=r"matches no layer; there are 1 0, 2 2"):
            _run(models, Normalization("repair", layers=wrong))
    result = _run(models, Normalization("repair", layers="[02]"), preserve=1)
    assert "InsertNormalization(1 layers)" in result.report.passes


def test_layers_choose_batchnorms_too_and_heads_are_all_left_out() -> None:
    models = _edges(normed)
    before, after = (_run(models, n).module.state_dict() for n in (None, Normalization("reset", layers=2)))
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"4.running_mean", "4.running_var"}

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(self.body(x))
            return self.one(x), self.two(x)

    assert [layer.fqn for layer in layers(Heads().eval(), torch.randn(2, 4)).select()] == ["body"]


# activations ----------------------------------------------------------------------------------------------------------


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class TanhGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * torch.pow(x, 3))))


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        return y * y


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "relu": (nn.ReLU, 1), "gelu": (nn.GELU, 1), "prelu": (lambda: nn.PReLU(6), 1), "swish": (Swish, 2),
    "tanh gelu": (TanhGelu, 8), "square": (Square, 2), "hardswish": (nn.Hardswish, 1), "softplus": (nn.Softplus, 1),
    "norm": (lambda: nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(), nn.Tanh()), 3),
    "pool": (lambda: nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_behind_a_layer_is_found(name: str) -> None:
    """Its value in the graph is what the activation module returns."""
    build, _ = ACTIVATIONS[name]
    model = edges(lambda: nn.Sequential(conv(3, 6), build(), conv(6, 2)), X, 1)[0]
    program = trace(model, X[:2])
    first, last = layers(program)
    found = layer_views(program)[first.node].activation
    assert isinstance(found, Activation)
    with torch.no_grad():
        close(values(program, X)[found.node.name], model[1](model[0](X)), 1e-12)  # type: ignore[index]
    assert found.channel == 1
    assert layer_views(program)[last.node].activation == "its output leaves the network"


def test_activations_behind_transpositions_adds_and_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three, self.norm = conv(3, 6), conv(6, 6), conv(6, 6), LayerNorm2d(6)
            self.four, self.fc = conv(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.norm(self.one(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = self.three(self.two(x))
            return self.fc(F.relu(x + self.four(y)).mean((2, 3)))

    program = trace(Net().double().eval(), X[:2])
    found = {view.layer.fqn: view.activation for view in layer_views(program).values()}
    assert isinstance(found["one"], Activation)
    assert found["one"].channel == 3
    assert "without an activation" in str(found["two"])
    assert "no elementwise function" not in str(found["four"])
    assert "meets add" in str(found["four"])
    models = edges(Net, X)
    notes = _run(models, Normalization("repair", site="activation")).report.notes
    assert any("four, since it meets add" in note for note in notes)


# spilling -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The temporary files that were opened."""
    files: list[Any] = []
    original = spill.tempfile.TemporaryFile

    def remember(*args: Any, **kwargs: Any) -> Any:
        files.append(original(*args, **kwargs))
        return files[-1]

    monkeypatch.setattr(spill.tempfile, "TemporaryFile", remember)
    yield files
    assert all(file.closed for file in files)


@pytest.mark.parametrize(
    ("build", "dtype"), [(plain, torch.float32), (plain, torch.bfloat16), (Residual, torch.float64)]
)
def test_spilling_changes_no_bit(build: Any, dtype: Any, opened: list[Any]) -> None:
    data = [part.to(dtype) for part in PARTS]
    program = _edges(build).program.to(dtype=dtype)
    found = [
        merge(program, data=data, match=None, normalize=Normalization("repair", memory_limit=limit), verify=False,
              progress=False).program.weights[0]
        for limit in (None, 0, 20_000)
    ]  # fmt: skip
    assert len(opened) == (2 if dtype == torch.bfloat16 else 4)  # two files take turns; half precision fits 20 kB
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in found[0])


def test_spilled_views_strides_and_weights_come_back_as_they_were() -> None:
    program = _edges(Residual).program.select(0)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    base = torch.randn(6, 8, dtype=torch.float64)
    weight = program.weights[0]["fc.weight"]
    run = spill.Execution(program.graph, program.weights[0], [X])
    kept = (base.T[1:5, ::2], (base, [base[2:4], 7]), weight, torch.randn(3, dtype=torch.complex64).conj())
    run.values = dict(zip(nodes, kept))
    with spill.Spill(0, program.weights[0].values()) as store:
        store.next_stage()
        store.keep(run)
        assert not run.values
        assert store.spilled == base.nbytes + 24
        store.next_stage()
        store.fetch(run)
    one, (whole, (part, seven)), same, conjugate = run.values.values()
    assert torch.equal(one, kept[0])
    assert one.stride() == kept[0].stride()
    assert torch.equal(whole, base)
    assert torch.equal(part, base[2:4])
    assert seven == 7
    assert same is weight
    assert torch.equal(conjugate, kept[3])
    whole.zero_()
    assert not one.any()  # views of one another still


def test_the_temporary_file_goes_on_errors_and_a_full_disk_is_one(
    opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = InsertNormalization(verify=False)(_with_goals(_edges().program))
    reads = 0

    def broken(*args: Any) -> Any:
        nonlocal reads
        reads += 1
        raise RuntimeError("interrupted")

    monkeypatch.setattr(spill.Spill, "_read", broken)
    with pytest.raises(RuntimeError, match="interrupted"):
        CalibrateNormalization("repair", PARTS, memory_limit=0, progress=False)(program)
    assert opened
    assert reads == 1
    assert all(file.closed for file in opened)

    class Full:
        closed = True
        tell = lambda self: 0  # noqa: E731
        close = lambda self: None  # noqa: E731

        def write(self, _: Any) -> int:
            raise OSError("no space left on device")

    monkeypatch.setattr(spill.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(DataError, match="memory_limit"):
        CalibrateNormalization("repair", PARTS, memory_limit=0, progress=False)(program)


def _with_goals(program: Program) -> Program:
    statistics = collect(program, data=X, progress=False)
    from vfx.passes.align import Align
    from vfx.passes.interpolate import Interpolate

    return Interpolate(ALPHAS)(Align(None, statistics=statistics)(program))


def test_memory_is_bounded_by_the_limit() -> None:
    """What waits in memory never exceeds the limit, and the rest is in the file."""
    held: list[int] = []

    class Watched(spill.Spill):
        def keep(self, run: Any) -> None:
            super().keep(run)
            held.append(self.held)

    program = InsertNormalization(verify=False)(_with_goals(_edges().program))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfx.statistics.frontier.Spill", Watched)
        CalibrateNormalization("repair", X.split(2), memory_limit=50_000, progress=False)(program)
    assert 0 < max(held) <= 50_000
    with pytest.MonkeyPatch.context() as patch:
        held.clear()
        patch.setattr("vfx.statistics.frontier.Spill", Watched)
        CalibrateNormalization("repair", X.split(2), progress=False)(program)
    assert max(held) > 50_000  # negative control


# preparation of the edges ---------------------------------------------------------------------------------------------


def test_edges_without_biases_are_matched_and_merged() -> None:
    models = _edges()
    bare = [copy.deepcopy(model) for model in models]
    for model in bare:
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    found = _run(models, "rescale", prepare="remove_bias", match="activation").module
    expected = _run(bare, "rescale", match="activation").module
    with torch.no_grad():
        close(found(X), expected(X), 1e-10)
    assert models[0][0].bias.any()  # type: ignore[index, union-attr]
    program = models.program
    with pytest.raises(PassError, match="before they are aligned"):
        RemoveBias(None)(_aligned(program))


def _aligned(program: Program) -> Program:
    from vfx.passes.align import Align

    return Align(None, X, progress=False)(program)


def test_weights_get_the_edges_magnitude_back() -> None:
    models = _edges()
    found = _run(models, "rescale_weights", data=None).module.state_dict()
    one, other = (model.state_dict() for model in models)
    for key in one:
        average = 0.3 * one[key] + 0.7 * other[key]
        if key in ("0.weight", "2.weight", "5.weight"):
            wanted = 0.3 * one[key].abs().mean() + 0.7 * other[key].abs().mean()
            assert abs(average.abs().mean() / wanted - 1) > 0.05  # negative control
            close(found[key].abs().mean(), wanted, 1e-12)
            close(found[key] / average, (wanted / average.abs().mean()).expand_as(average), 1e-9)
        else:
            close(found[key], average, 1e-12)


@pytest.mark.parametrize("build", [plain, Residual])
def test_only_the_first_layers_are_aligned(build: Any) -> None:
    program = _edges(build).program
    facts, statistics = symmetry(program), collect(program, data=X, progress=False)
    full = FirstLayers("activation", len(layers(program)))(Problem(program, facts, statistics)).permutations[1]
    first = first_layer_of_groups(program, facts.groups)
    assert set(first.values()) >= {1, 2}
    for count in range(len(layers(program)) + 1):
        partial = FirstLayers("activation", count)(Problem(program, facts, statistics)).permutations[1]
        for group, permutation in partial.items():
            kept = full[group] if first[group] <= count else np.arange(len(full[group]))
            assert np.array_equal(permutation, kept)
    result = _run(program, None, match=FirstLayers("activation", 1))
    assert result.report.verify_error is not None  # proved like any other
    with pytest.raises(ArgumentError):
        FirstLayers("activation", -1)


# recorded statistics and batch statistics -----------------------------------------------------------------------------


def test_recording_sees_every_training_batch_and_no_other() -> None:
    model = copy.deepcopy(_edges()[0])
    seen: dict[str, list[Tensor]] = {}
    with record(model) as recorder:

        def remember(module: nn.Module, output: Tensor, name: str) -> None:
            if module.training:
                seen.setdefault(name, []).append(output.detach())

        hooks = [
            m.register_forward_hook(lambda m, _, out, n=n: remember(m, out, n))
            for n, m in model.named_modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))
        ]
        model.train()
        model(X[:3])
        recorder.reset()
        seen.clear()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for batch in PARTS:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        model.eval()
        model(100 * X)
    for hook in hooks:
        hook.remove()
    count = len(seen["0"])
    model.train()(X)
    assert len(PARTS) == count
    assert recorder.samples == len(X)
    for (name, call), moments in recorder.moments.items():
        everything = torch.cat([x.movedim(x.ndim - 1 if x.ndim == 2 else 1, 0).flatten(1) for x in seen[name]], 1)
        assert call == 0
        close(moments.mean, everything.mean(1), 1e-12)
        close(moments.std, everything.std(1, correction=0), 1e-12)


def test_momentum_lets_older_batches_fade() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double().train()
    x = [torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (5, 8, 6)]
    with record(model, momentum=0.25) as recorder:
        for batch in x:
            model(batch)
    out = torch.cat([model(batch) for batch in x]).detach()
    share = torch.tensor([0.75**2] * 5 + [0.75] * 8 + [1.0] * 6, dtype=torch.float64)[:, None]
    mean = (share * out).sum(0) / share.sum()
    moments = recorder.moments["0", 0]
    close(moments.mean, mean, 1e-12)
    close(moments.std**2, (share * (out - mean) ** 2).sum(0) / share.sum(), 1e-12)
    with pytest.raises(ArgumentError):
        record(model, momentum=2)
    with pytest.raises(ArgumentError, match="no convolution"):
        record(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("method", ["repair", "rescale", "rescale_average"])
def test_merging_without_data_uses_recorded_goals_and_each_batchs_statistics(method: str) -> None:
    models = _edges()
    recorders = []
    for model in models:
        with record(model) as recorder:
            model.train()(X)
        model.eval()
        recorders.append(recorder)
    program = models.program
    statistics = recorded(program, recorders)
    asked = Normalization(method, sweep="batch")
    result = merge(program, normalize=asked, match=None, weights=ALPHAS, statistics=statistics)
    expected = _literal(models, LITERAL[method])  # the batch is the calibration data
    with torch.no_grad():
        close(result.module(X), expected(X), 1e-3)  # but for ε
        half = result.module(X[:10])
        assert (half - expected(X[:10])).abs().max() > 1e-3 * half.abs().max()
    assert any("each batch" in note for note in result.report.notes)
    aligned = merge(program, normalize=asked, match="weight", statistics=statistics)
    assert aligned.module(X).isfinite().all()
    with pytest.raises(ArgumentError, match="recorders"):
        recorded(program, recorders[:1])
    with pytest.raises(ArgumentError, match="hold no 'features'"):
        merge(program, normalize=asked, match="activation", statistics=statistics)
    matched = merge(program, normalize=asked, match="activation", statistics=statistics, data=X, progress=False)
    assert matched.statistics is not None
    assert matched.statistics.layers == statistics.layers, "the recorded goals, beside features of the data"
    assert matched.statistics.features
    swapped = trace([models[1], models[0]], X[:2])
    with pytest.raises(DataError, match="another graph or other weights"):
        merge(swapped, normalize=asked, match="activation", statistics=statistics, data=X, progress=False)
    assert matched.module(X).isfinite().all()


def test_batchnorms_by_batch_are_torchs_in_training_mode() -> None:
    models = _edges(normed)
    found = _run(models, Normalization("reset", sweep="batch"), data=None).module
    expected = _run(models, None, data=None).module.train()
    with torch.no_grad():
        close(found(X), expected(X), 1e-9)
        assert not torch.allclose(found(X), expected.eval()(X))


# other references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", [None, "activation"])
def test_an_independent_reference_gives_the_goals(match: Any) -> None:
    models = _edges(count=3)
    result = _run(models[:2], "repair", references=models[2:], match=match)
    after = values(result.program, X)
    aligned = merge([models[0], models[2]], X[:2], data=PARTS, match=match, normalize=None, weights=1.0, progress=False)
    goals = values(aligned.program, X)
    for layer in list(layers(result.program))[:-1]:
        for found, wanted in zip(_statistics(after[layer.node]), _statistics(goals[layer.node])):
            close(found, wanted, 1e-8)


def test_repair_takes_goals_of_another_network() -> None:
    models = _edges(count=2)
    goals = collect(trace([models[1], models[1]], X[:2]), data=X, progress=False)
    fixed = repair(models[0], example_inputs=X[:2], data=X, goals=goals, method="repair", progress=False)
    by_reference = repair(models[0], [models[1]], X[:2], data=X, method="repair", progress=False)
    with torch.no_grad():
        close(fixed.module(X), by_reference.module(X), 1e-9)
    with pytest.raises(ArgumentError, match="either references"):
        repair(models[0], example_inputs=X[:2], data=X)
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    with pytest.raises(ArgumentError, match="of this architecture"):
        repair(other, example_inputs=torch.randn(2, 4).double(), data=X, goals=goals)


def test_reset_of_some_layers_needs_batches_of_the_network() -> None:
    program = _edges(normed).program.select(0)
    with pytest.raises(DataError, match="no samples"):
        ResetBatchNorm([], progress=False)(program)
    assert len(list(Batches(program, X.split(8)))) == 3
