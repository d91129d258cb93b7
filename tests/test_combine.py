"""Edges of a common base: every method against its formula, written out as the paper has it, in float64."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, network
from literal import RIDGE, fitted, with_ones
from micro_models import conv, net
from safetensors.torch import save_file
from torch import Tensor, nn
from vfx.passes.combine import Combine

import vfx
from vfx.api import merge, trace
from vfx.combine.catalogue import COMBINERS, combiner, combiner_named
from vfx.combine.combiner import Combiner, combined_names
from vfx.errors import ArchitectureError, ArgumentError, WeightError

X = images(12, 8, dtype=torch.float64)
DATA = [images(10, 8, seed=seed, dtype=torch.float64) for seed in (3, 4, 5)]
TOKENS = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
EXACT = 1e-12
State = Mapping[str, Tensor]


def _small() -> nn.Module:
    return nn.Sequential(
        conv(3, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 6, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4)
    )


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))


def _tied() -> nn.Module:
    """Token embeddings that are the classifier's weight, too."""
    model = net(
        lambda self, x: self.head(torch.tanh(self.inner(self.embed(x)))),
        embed=nn.Embedding(7, 6),
        inner=nn.Linear(6, 6),
        head=nn.Linear(6, 7, bias=False),
    )
    model.head.weight = model.embed.weight
    return model


def fine_tuned(base: nn.Module, count: int = 3, by: float = 0.1) -> list[nn.Module]:
    """Networks near a base, as fine-tuning leaves them: every parameter moved, and buffers, too."""
    found = []
    for seed in range(count):
        generator, model = torch.Generator().manual_seed(20 + seed), copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += by * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
            for name, buffer in model.named_buffers():
                buffer += seed if "num_batches" in name else 0.1 * torch.rand(buffer.shape, generator=generator)
        found.append(model.eval())
    return found


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return network(_small, X)


# the formulas ---------------------------------------------------------------------------------------------------------


def literal_task_arithmetic(start: State, changes: list[State], scale: float) -> dict[str, Tensor]:
    return {name: start[name] + scale * sum(own[name] for own in changes) for name in start}


def literal_ties(start: State, changes: list[State], keep: float, scale: float) -> dict[str, Tensor]:
    """TIES-Merging, algorithm 1, on flat vectors."""
    vectors = torch.stack([torch.cat([own[name].flatten() for name in start]) for own in changes])
    trimmed = torch.zeros_like(vectors)
    for row, vector in enumerate(vectors):
        largest = vector.abs().topk(int(keep * len(vector))).indices
        trimmed[row, largest] = vector[largest]
    merged = torch.zeros_like(vectors[0])
    for entry in range(len(merged)):
        column = trimmed[:, entry]
        sign = torch.sign(column.sum())
        agreeing = column[(torch.sign(column) == sign) & (column != 0)]
        merged[entry] = agreeing.mean() if len(agreeing) else 0.0
    parts = merged.split([tensor.numel() for tensor in start.values()])
    return {name: start[name] + scale * own.reshape(start[name].shape) for name, own in zip(start, parts)}


def literal_dare(start: State, changes: list[State], drop: float, scale: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    thinned = []
    for own in changes:
        masks = {name: torch.rand(own[name].shape, generator=generator) >= drop for name in start}
        thinned.append({name: masks[name] * own[name] / (1 - drop) for name in start})
    return literal_task_arithmetic(start, thinned, scale)


def literal_iso(start: State, changes: list[State], scale: float) -> dict[str, Tensor]:
    """Iso-C; kernels as matrices (outputs, inputs × taps), what is no matrix averaged as in the authors' code."""
    found = {}
    for name in start:
        total = sum(own[name] for own in changes)
        assert isinstance(total, Tensor)
        if total.ndim < 2:
            found[name] = start[name] + scale * total / len(changes)
            continue
        left, values, right = torch.linalg.svd(total.flatten(1), full_matrices=False)
        isotropic = left @ torch.diag(values.mean().expand(len(values))) @ right
        found[name] = start[name] + scale * isotropic.reshape(total.shape)
    return found


def _parameters(models: list[nn.Module]) -> list[dict[str, Tensor]]:
    return [{name: own.detach().clone() for name, own in model.named_parameters()} for model in models]


CASES: dict[str, tuple[Combiner, Callable[[State, list[State]], dict[str, Tensor]]]] = {
    "task_arithmetic": (vfx.TaskArithmetic(0.3), lambda start, own: literal_task_arithmetic(start, own, 0.3)),
    "ties": (vfx.Ties(0.25, 0.8), lambda start, own: literal_ties(start, own, 0.25, 0.8)),
    "dare": (vfx.Dare(0.6, vfx.TaskArithmetic(0.5)), lambda start, own: literal_dare(start, own, 0.6, 0.5, 0)),
    "iso_c": (vfx.IsoC(1.2), lambda start, own: literal_iso(start, own, 1.2)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [2, 3])
def test_a_method_computes_its_formula(name: str, count: int, base: nn.Module) -> None:
    method, literal = CASES[name]
    assert type(method) is COMBINERS[name]
    models = fine_tuned(base, count)
    start, *_ = _parameters([base])
    changes = [{key: own[key] - start[key] for key in start} for own in _parameters(models)]
    merged = merge(models, X[:2], base=base, combine=method, verify=False)
    expected = literal(start, changes)
    found = merged.state_dict()
    for key in start:
        close(found[key], expected[key], EXACT)
    average = merge(models, X[:2], match=None, normalize=None).state_dict()
    assert any((found[key] - average[key]).abs().max() > 1e-3 for key in start), "another network than the average"
    for key, tensor in base.state_dict().items():
        if "running" in key:
            close(found[key], torch.stack([model.state_dict()[key] for model in models]).mean(0), EXACT)
        elif not tensor.is_floating_point():
            assert torch.equal(found[key], models[0].state_dict()[key])
    assert type(merged.module) is nn.Sequential


@pytest.mark.parametrize("name", CASES)
def test_a_tied_weight_counts_once(name: str) -> None:
    method, literal = CASES[name]
    base = _tied().double().eval()
    models = fine_tuned(base, 2)
    start, *_ = _parameters([base])
    assert "head.weight" not in start
    start = {key: start[key] for key in combined_names(trace(base, TOKENS))}  # masks are drawn in the graph's order
    changes = [{key: own[key] - start[key] for key in start} for own in _parameters(models)]
    merged = merge(models, TOKENS, base=base, combine=method, normalize=None).module
    for key, expected in literal(start, changes).items():
        close(merged.state_dict()[key], expected, EXACT)
    assert merged.head.weight is merged.embed.weight


def test_task_arithmetic_with_shares_counts_edges_by_them(base: nn.Module) -> None:
    models = fine_tuned(base)
    start, *_ = _parameters([base])
    shares = [0.5, 0.3, 0.2]
    found = merge(models, X[:2], base=base, combine=vfx.TaskArithmetic(1 / 3), weights=shares).state_dict()
    for key in start:
        close(found[key], sum(share * own[key] for share, own in zip(shares, _parameters(models))), EXACT)


def test_what_is_dropped_depends_on_the_seed_alone(base: nn.Module) -> None:
    models = fine_tuned(base)
    one, two, other = (
        merge(models, X[:2], base=base, combine="dare", seed=seed).state_dict()["0.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_method_behind_it_may_be_named(base: nn.Module) -> None:
    models = fine_tuned(base)
    wanted = merge(models, X[:2], base=base, combine=vfx.Dare(0.5, vfx.Ties(0.3))).state_dict()
    named = combiner_named("dare", drop=0.5, by={"name": "ties", "keep": 0.3})
    plain = combiner_named("dare", drop=0.5, by="ties")
    for combine, same in ((named, True), (plain, False)):
        found = merge(models, X[:2], base=base, combine=combine).state_dict()
        assert torch.equal(found["0.weight"], wanted["0.weight"]) == same
    for by, words in (
        ("tie", "combine='tie' is unknown"),
        ({"keep": 0.3}, "combine=None is unknown"),
        ({"name": "ties", "kep": 0.3}, "takes no such options"),
        ("regmean++", "which RegMeanPlus does not read"),
        (3, "by must be a Combiner"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(words)):
            combiner_named("dare", by=by)


def test_dropping_nothing_leaves_the_method_behind_it(base: nn.Module) -> None:
    models = fine_tuned(base)
    by_ties = merge(models, X[:2], base=base, combine=vfx.Dare(0.0, vfx.Ties(0.3))).state_dict()
    for key, expected in merge(models, X[:2], base=base, combine=vfx.Ties(0.3)).state_dict().items():
        close(by_ties[key], expected, EXACT)


# regressions ----------------------------------------------------------------------------------------------------------


def _reduced(rows: Tensor, by: float) -> Tensor:
    gram = rows.T @ rows
    return by * gram + (1 - by) * torch.diag(gram.diagonal())


def literal_regmean(models: list[nn.Module], data: list[Tensor], by: float, merged_inputs: bool) -> dict[str, Tensor]:
    """W = (Σ G̃ᵢ)⁻¹ Σ G̃ᵢ Wᵢ for the layers of a perceptron, biases averaged."""
    layers, found = (1, 3, 5), {}
    values = [x.flatten(1) for x in data]
    for layer in layers:
        own = [model[layer] for model in models]  # type: ignore[index]
        grams = [_reduced(x, by) for x in values]
        right = sum(gram @ linear.weight.T for gram, linear in zip(grams, own))
        weight = torch.linalg.solve(sum(grams), right).T
        bias = torch.stack([linear.bias for linear in own]).mean(0)
        found |= {f"{layer}.weight": weight.detach(), f"{layer}.bias": bias.detach()}
        used = [(weight, bias)] * len(own) if merged_inputs else [(linear.weight, linear.bias) for linear in own]
        values = [F.relu(F.linear(x, *pair)) for x, pair in zip(values, used)]
    return found


@pytest.mark.parametrize(("kind", "merged_inputs"), [(vfx.RegMean, False), (vfx.RegMeanPlus, True)])
def test_regressions_compute_their_formula(kind: Callable[..., Combiner], merged_inputs: bool) -> None:
    data = [images(220, 8, seed=seed, dtype=torch.float64) for seed in (3, 4)]
    models = fine_tuned(network(_perceptron, X), 2, by=0.5)
    found = merge(models, X[:2], match=None, combine=kind([data[0], [data[1][:100], data[1][100:]]], 0.9)).state_dict()
    for key, expected in literal_regmean(models, data, 0.9, merged_inputs).items():
        close(found[key], expected, 1e-9)
    other = literal_regmean(models, data, 0.9, not merged_inputs)
    assert (found["5.weight"] - other["5.weight"]).abs().max() > 1e-6, "the two read other inputs"


def test_own_outputs_are_the_least_squares_problem_written_out() -> None:
    """Rows are the merged network's inputs on all tasks, goals what each edge itself gives on its own task."""
    data = [images(count, 8, seed=seed, dtype=torch.float64) for seed, count in ((3, 220), (4, 150))]
    models = fine_tuned(network(_perceptron, X), 2, by=0.5)
    found = merge(models, X[:2], match=None, combine=vfx.OwnOutputs(data, ridge=RIDGE)).state_dict()
    merged, own = [x.flatten(1) for x in data], [x.flatten(1) for x in data]
    for layer in (1, 3, 5):
        own = [model[layer](x) for model, x in zip(models, own)]  # type: ignore[index]
        weights = [torch.cat([model[layer].weight, model[layer].bias[:, None]], 1).T for model in models]  # type: ignore
        solution = fitted(with_ones(torch.cat(merged)), torch.cat(own), sum(weights) / 2, RIDGE).detach()  # type: ignore
        close(found[f"{layer}.weight"], solution[:-1].T, 1e-8)
        close(found[f"{layer}.bias"], solution[-1], 1e-8)
        merged, own = [(with_ones(x) @ solution).relu() for x in merged], [x.relu() for x in own]
    mean = merge(models, X[:2], match=None, data=torch.cat(data), solve="least_squares", follow=0).state_dict()
    assert (found["5.weight"] - mean["5.weight"]).abs().max() > 1e-3, "the mean of both edges is another goal"


@torch.no_grad()
def test_own_outputs_learn_each_task_where_edges_disagree(base: nn.Module) -> None:
    """The ridge chosen, BatchNorms solved, heads kept."""
    models = fine_tuned(base, 2, by=1.0)
    data = [images(160, 8, seed=seed, dtype=torch.float64) + 2 * seed for seed in (0, 1)]
    solved, averaged = (
        merge(models, X[:2], match=None, combine=own, heads=1, normalize=None)
        for own in (vfx.OwnOutputs(data), "average")
    )
    errors = [
        [
            float((merged(x)[task] - model(x)).norm() / model(x).norm())
            for task, (model, x) in enumerate(zip(models, data))
        ]
        for merged in (solved, averaged)
    ]
    assert sum(errors[0]) < 0.85 * sum(errors[1]), errors


def test_regression_through_convolutions_norms_and_shared_layers() -> None:
    """Rows written out by unfold; a layer that is called twice adds up what both calls read."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.head(self.twice(self.twice(h).relu()).relu().flatten(1))

    def build() -> nn.Module:
        return net(forward, first=conv(3, 4), twice=conv(4, 4), head=nn.Linear(256, 3))

    models = fine_tuned(network(build, X), 2, by=0.5)
    found = merge(models, X[:2], match=None, combine=vfx.RegMean(DATA[:2], 0.8)).state_dict()
    left, right = 0, 0
    for model, x in zip(models, DATA):
        h = model.first(x).relu()
        inputs = (h, model.twice(h).relu())
        gram = sum(_reduced(F.unfold(v, 3, padding=1).transpose(1, 2).flatten(0, 1), 0.8) for v in inputs)
        left, right = left + gram, right + gram @ model.twice.weight.flatten(1).T
    close(found["twice.weight"].flatten(1).T, torch.linalg.solve(left, right), 1e-9)


def test_what_no_input_tells_stays_averaged() -> None:
    models = fine_tuned(network(_perceptron, X), 2, by=0.5)
    data = [x.clone() for x in DATA[:2]]
    for x in data:
        x[:, 0] = 0
    found = merge(models, X[:2], match=None, combine=vfx.RegMean(data)).state_dict()["1.weight"]
    mean = torch.stack([model[1].weight for model in models]).mean(0)  # type: ignore[index]
    close(found[:, :64], mean[:, :64], 1e-9)
    assert (found[:, 64:] - mean[:, 64:]).abs().max() > 1e-3


def test_regmean_reads_the_data_of_the_merge_where_edges_have_none_of_their_own() -> None:
    models = fine_tuned(network(_perceptron, X), 2, by=0.5)
    asked = {"match": None, "normalize": None}
    common = merge(models, X[:2], data=DATA[0], combine="regmean", **asked).state_dict()
    for key, expected in merge(models, X[:2], combine=vfx.RegMean([DATA[0]] * 2), **asked).state_dict().items():
        close(common[key], expected, EXACT)


# what a base may be, and what it goes with ----------------------------------------------------------------------------


def test_a_base_is_a_network_a_state_dict_or_a_file(base: nn.Module, tmp_path: Path) -> None:
    models = fine_tuned(base)
    save_file({f"module.{name}": own for name, own in base.state_dict().items()}, tmp_path / "base.safetensors")
    given = [base, base.state_dict(), tmp_path / "base.safetensors", str(tmp_path / "base.safetensors")]
    found = [merge(models, X[:2], base=own, combine="ties").state_dict() for own in given]
    assert all(torch.equal(one[key], found[0][key]) for one in found for key in one)


def test_heads_that_differ_stay_each_edges_own(base: nn.Module) -> None:
    models = fine_tuned(base, 2)
    models[1][6] = nn.Linear(384, 3).double()  # type: ignore[index]
    pretrained = copy.deepcopy(base)
    pretrained[6] = nn.Linear(384, 11).double()  # type: ignore[index]
    merged = merge(models, X[:2], base=pretrained, combine=vfx.TaskArithmetic(0.5), heads=1).eval()
    trunk = copy.deepcopy(base)
    for key, own in trunk.named_parameters():
        if not key.startswith("6."):
            own.data = sum(model.state_dict()[key] for model in models) / 2  # λ = 1/N
    for key, own in trunk.named_buffers():
        if own.is_floating_point():
            own.data = sum(model.state_dict()[key] for model in models) / 2
    features = trunk[:6](X)  # type: ignore[index]
    for output, model in zip(merged(X), models):
        close(output, model[6](features), 1e-10)  # type: ignore[index]
    regression = merge(models, X[:2], combine=vfx.RegMeanPlus(DATA[:2]), match=None, heads=1, preserve=1).eval()
    assert [tuple(own.shape) for own in regression(X)] == [(12, 4), (12, 3)]


def test_kept_layers_read_the_edges_as_they_were(base: nn.Module) -> None:
    """Grams behind a join are those of the edges, not of the network with branches."""
    models = fine_tuned(base, 2, by=0.5)
    whole = merge(models, X[:2], combine=vfx.RegMean(DATA[:2]), match=None, normalize=None).state_dict()
    kept = merge(models, X[:2], combine=vfx.RegMean(DATA[:2]), match=None, normalize=None, preserve=1)
    found = {name.rpartition(".")[0]: own for name, own in kept.module.named_parameters() if "6" in name}
    assert found
    close(kept.program.weights[0]["6.weight"], whole["6.weight"], EXACT)


def test_batch_norms_are_reset_where_there_are_data(base: nn.Module) -> None:
    models = fine_tuned(base)
    merged = merge(models, X[:2], base=base, combine="ties", data=X)
    plain = merge(models, X[:2], base=base, combine="ties")
    layer = plain.module[0](X)  # type: ignore[index]
    close(merged.state_dict()["1.running_mean"], layer.mean((0, 2, 3)), 1e-9)
    assert merged.report.choices["normalize"] == "reset"
    assert plain.report.choices["normalize"] is None
    close(merged.state_dict()["3.weight"], plain.state_dict()["3.weight"], EXACT)


def test_layers_are_solved_behind_a_named_combination_where_that_is_asked_for(base: nn.Module) -> None:
    models = fine_tuned(base, 2)
    asked = {"base": base, "combine": "ties", "data": DATA[0], "follow": 0}
    solved = merge(models, X[:2], solve="least_squares", **asked)  # type: ignore[arg-type]
    goal = torch.stack([model(DATA[0]) for model in models]).mean(0)
    named = merge(models, X[:2], base=base, combine="ties", normalize=None)
    assert (solved(DATA[0]) - goal).norm() < 0.5 * (named(DATA[0]) - goal).norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "ties"}, "give base="),
        ({"combine": "tie"}, "unknown; choose one of average, task_arithmetic"),
        ({"combine": "regmean"}, "runs the edges; give data="),
        ({"combine": "regmean++", "data": X}, "is the average of the weights; give each edge its own"),
        ({"combine": "own_outputs", "data": X}, "as many goals as edges"),
        ({"combine": vfx.OwnOutputs([X] * 3), "weights": [0.5, 0.3, 0.2], "match": None}, "edges count by the samples"),
        ({"combine": "ties", "base": 3}, "a network, a state dict or the path"),
        ({"combine": "ties", "base": "own", "match": "weight"}, "stand in one frame"),
        ({"combine": "ties", "base": "own", "prepare": "lift"}, "changes the edges' weights"),
        ({"combine": "ties", "base": "own", "normalize": "rescale_weights"}, "acts on the average"),
        ({"combine": "ties", "base": "own", "budget": {"params": 1.5}, "data": X}, "budget= chooses"),
        ({"combine": "regmean", "match": "zipit", "data": X}, "keep their functions"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], message: str, base: nn.Module) -> None:
    options = {name: base if value == "own" else value for name, value in options.items()}
    with pytest.raises(ArgumentError, match=message):
        merge(fine_tuned(base), X[:2], **options)  # type: ignore[arg-type]


def test_data_of_too_few_tasks_are_refused(base: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="data of 2 tasks for 3 edges"):
        merge(fine_tuned(base), X[:2], match=None, combine=vfx.RegMean(DATA[:2]))


def test_a_base_that_does_not_fit_is_refused_by_name(base: nn.Module) -> None:
    models, state = fine_tuned(base), base.state_dict()
    with pytest.raises(ArchitectureError, match=r"'6.weight' has shape .* in base=; give one of their architecture"):
        merge(models, X[:2], base={**state, "6.weight": state["6.weight"][:3]}, combine="ties")
    with pytest.raises(ArchitectureError, match=r"base= lacks '3.weight'"):
        merge(models, X[:2], base={name: own for name, own in state.items() if name != "3.weight"}, combine="ties")
    with pytest.raises(WeightError, match=r"'3.weight' in base are NaN"):
        merge(models, X[:2], base={**state, "3.weight": state["3.weight"] * float("nan")}, combine="ties")


def test_a_base_of_another_seed_is_noticed(base: nn.Module) -> None:
    foreign = network(_small, X, 9)
    notes = merge(fine_tuned(base), X[:2], base=foreign, combine="ties").report.notes
    assert any("edge 0 differs from base= by more than its own size" in note for note in notes)
    assert not any(
        "own size" in note for note in merge(fine_tuned(base), X[:2], base=base, combine="ties").report.notes
    )


def test_options_that_mean_nothing_are_refused() -> None:
    for wrong in (lambda: vfx.Ties(0.0), lambda: vfx.Dare(1.0), lambda: vfx.RegMean(off_diagonal=2.0)):
        with pytest.raises(ArgumentError):
            wrong()
    with pytest.raises(ArgumentError, match="RegMean does not read"):
        vfx.Dare(0.5, vfx.RegMean())
    assert combiner("average") is None


def test_the_pass_combines_what_a_merge_does(base: nn.Module) -> None:
    models = fine_tuned(base)
    program = trace(models, X[:2])
    before = [{name: own.clone() for name, own in weights.items()} for weights in program.weights]
    found = Combine("ties", base=base)(program)
    merged = merge(models, X[:2], base=base, combine="ties").state_dict()
    assert all(torch.equal(found.weights[0][name], merged[name]) for name in combined_names(program))
    for weights, old in zip(program.weights, before):
        assert all(torch.equal(weights[name], own) for name, own in old.items())


# edges that share a base by themselves --------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [_small, _perceptron])
def test_edges_of_one_base_are_found_and_left_as_they_are(build: Callable[[], nn.Module]) -> None:
    models = fine_tuned(network(build, X), 3, by=0.3)
    result = merge(models, X[:2], normalize=None)
    assert any("the edges share a base" in note for note in result.report.notes)
    assert result.report.matching is None
    for key, expected in merge(models, X[:2], match=None, normalize=None).state_dict().items():
        close(result.state_dict()[key], expected, EXACT)
    other = merge(edges(build, X, 2), X[:2], normalize=None).report
    assert other.matching is not None
    assert not any("share a base" in note for note in other.notes)
