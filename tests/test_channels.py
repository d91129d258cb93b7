"""Scores, widths and budgets of whole channels; removal, compensation and folding against literal formulas."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import close, images, lively
from micro_models import conv
from sklearn.cluster import KMeans
from test_zoo import vit
from torch import Tensor, nn
from torch.nn import functional as F
from vfx.passes.fold_channels import FoldChannels
from vfx.passes.reconstruct import Reconstruct
from vfx.passes.remove_channels import RemoveChannels

from vfx.analyse.cost import cost
from vfx.analyse.symmetry import symmetry
from vfx.api import prune, prune_structured, trace
from vfx.emit.files import export
from vfx.errors import ArgumentError, DataError
from vfx.models import MODELS
from vfx.program import Goal, Program
from vfx.pruning import choice
from vfx.pruning.groups import channel_scores
from vfx.pruning.isomorphic import structures
from vfx.pruning.roles import group_roles
from vfx.pruning.second_moments import second_moments
from vfx.pruning.widths import Widths, by_mean
from vfx.reconstruct.references import Reference
from vfx.resize import RemovalUnits, resize

EXACT, BROKEN = 1e-9, 1e-3


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()


def _vectors(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _convolutional(normed: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if normed else lambda width: nn.Identity()
    layers = [conv(3, 8, bias=not normed), norm(8), nn.ReLU(), conv(8, 8, bias=not normed), norm(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)).double()
    return lively(model, images(8, 8, dtype=torch.float64))


# scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "power"), [("l1", 1), ("l2", 2), ("magnitude", 2)])
def test_norms_over_all_members(method: str, power: int) -> None:
    model = _mlp()
    program = trace(model, _vectors())
    first = channel_scores(program, symmetry(program), method)[0]
    w, b, v = model[0].weight, model[0].bias, model[2].weight
    wanted = [(w[c].abs() ** power).sum() + b[c].abs() ** power + (v[:, c].abs() ** power).sum() for c in range(8)]
    close(torch.from_numpy(first), torch.stack(wanted).detach() ** (1 / power), EXACT)


def test_flattened_channels_and_running_statistics() -> None:
    model = _convolutional()
    program = trace(model, images(2, 8, dtype=torch.float64))
    second = channel_scores(program, symmetry(program), "l2")[1]
    w, norm, v = model[3].weight, model[4], model[8].weight.view(4, 8, 4)
    wanted = [w[c].square().sum() + norm.weight[c] ** 2 + norm.bias[c] ** 2 + v[:, c].square().sum() for c in range(8)]
    close(torch.from_numpy(second), torch.stack(wanted).detach().sqrt(), EXACT)


def test_groups_of_a_convolution_are_scored_block_by_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 6), conv(6, 8, groups=2), nn.Flatten(), nn.Linear(128, 2)).double().eval()
    program = trace(model, images(2, 4, dtype=torch.float64))
    facts = symmetry(program)
    scores = channel_scores(program, facts, "l1")
    (inner,) = [g for g in facts.groups if g.parent is not None and g.size == 3]
    w, b, v = model[0].weight, model[0].bias, model[1].weight  # v: (2 × 4, 3, 3, 3)
    for block, channel in np.ndindex(2, 3):
        c = 3 * block + channel
        wanted = w[c].abs().sum() + b[c].abs() + v[4 * block : 4 * block + 4, channel].abs().sum()
        close(torch.tensor(scores[inner.index][block, channel]), wanted.detach(), EXACT)


def test_taylor_is_the_squared_gradient_times_weight() -> None:
    model, x = _mlp(), _vectors(6)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    program = trace(model, x)
    score = channel_scores(program, symmetry(program), "taylor", data=[(x[:4], labels[:4]), (x[4:], labels[4:])])[0]
    total = torch.zeros(8, dtype=torch.float64)
    for part, target in ((x[:4], labels[:4]), (x[4:], labels[4:])):
        model.zero_grad()
        F.cross_entropy(model(part), target).backward()
        w, b, v = model[0].weight, model[0].bias, model[2].weight
        product = (w * w.grad).sum(1) + b * b.grad + (v * v.grad).sum(0)
        total += product.detach() ** 2 / 2
    close(torch.from_numpy(score), total, EXACT)


def test_activation_is_the_features_size_times_its_readers() -> None:
    model, x = _mlp(), _vectors(9)
    program = trace(model, x[:2])
    facts = symmetry(program)
    moments = second_moments(program, facts, x.split(4), progress=False)
    score = channel_scores(program, facts, "activation", moments=moments)[0]
    with torch.no_grad():
        features = model[:2](x)
        close(moments.matrix[(0,)], features.T @ features / 9, 1e-6)
        close(torch.from_numpy(score), features.square().mean(0).sqrt() * model[2].weight.norm(dim=0), 1e-6)


def test_random_scores_follow_the_seed() -> None:
    program = trace(_mlp(), _vectors())
    facts = symmetry(program)
    one, same, other = (channel_scores(program, facts, "random", seed=seed)[0] for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


# widths ---------------------------------------------------------------------------------------------------------------


def _sizes(widths: Widths, ratio: float, scores: Any = None) -> list[int]:
    program = trace(_mlp(), _vectors())
    facts = symmetry(program)
    slots = RemovalUnits(facts)
    ranked = by_mean(scores or channel_scores(program, facts))
    found = slots.sizes(widths.at(widths.streams(slots), ranked, ratio))
    return [found[g] for g in sorted(found)]


@pytest.mark.parametrize(
    ("widths", "ratio", "sizes"),
    [
        (Widths(), 0.0, [8, 6]),
        (Widths(), 0.5, [4, 3]),
        (Widths(), 0.99, [1, 1]),
        (Widths(round_to=4), 0.5, [4, 4]),
        (Widths(round_to=7), 0.5, [7, 3]),
        (Widths(protect=("2",)), 0.5, [8, 6]),
        (Widths(protect=("0.bias",)), 0.5, [8, 3]),
    ],
)
def test_uniform_widths(widths: Widths, ratio: float, sizes: list[int]) -> None:
    assert _sizes(widths, ratio) == sizes


def test_global_widths_take_the_lowest_scores_first() -> None:
    scores = {0: np.array([9, 9, 9, 9, 9, 9, 9, 1.0]), 1: np.array([1, 1, 1, 1, 9.0, 9])}
    assert _sizes(Widths("global"), 5 / 14, scores) == [7, 2]
    assert _sizes(Widths("global"), 0.99, scores) == [1, 1]


def test_isomorphic_widths_take_the_lowest_of_each_kind_first() -> None:
    """Convolutions that convolutions read are one kind; what a linear layer reads is another."""
    layers = (nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU())
    program = trace(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3)), images(2, 8, 1))
    facts, generator = symmetry(program), np.random.default_rng(0)
    scores = {g.index: 10.0**g.index * generator.random(g.size) for g in facts.groups}
    assert [g.size for g in facts.groups] == [6, 8, 10]
    slots = RemovalUnits(facts)
    sizes = {
        allocation: slots.sizes(Widths(allocation).at(Widths(allocation).streams(slots), scores, 0.5))
        for allocation in ("isomorphic", "global")
    }
    limit = np.sort(np.concatenate([scores[0], scores[1]]))[7]  # seven of fourteen go
    assert sizes["isomorphic"] == {0: (scores[0] >= limit).sum(), 1: (scores[1] >= limit).sum(), 2: 5}
    assert sizes["isomorphic"][0] < 3 < 4 < sizes["isomorphic"][1]
    assert sizes["global"][2] > 5  # negative control: one ranking of all


def test_isomorphic_kinds_go_by_structure() -> None:
    """The hidden layers of blocks are of one kind, and a stream is none of it; sizes do not count."""
    program = trace(MODELS["resnet20_bn"](width=0.25, in_channels=1), images(2, 32, 1))
    kinds, roles = structures(symmetry(program)), group_roles(symmetry(program))
    hidden = {kinds[g] for g, role in roles.items() if role == "hidden"}
    streams = {kinds[g] for g, role in roles.items() if role == "streams"}
    assert len(hidden) == 1
    assert streams
    assert not hidden & streams


@pytest.mark.parametrize("budget", ["params", "flops"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "isomorphic"])
def test_budgets_are_met_and_not_overdone(budget: str, allocation: str) -> None:
    program = trace(_convolutional(), images(2, 8, dtype=torch.float64))
    facts = symmetry(program)
    small = RemoveChannels(0.4, allocation=allocation, budget=budget).run(program)
    saved = getattr(cost(small.program), budget)
    whole = getattr(cost(program), budget)
    assert saved <= 0.6 * whole
    grown = {g.index: min(small.record.sizes[g.index] + 1, g.size) for g in facts.groups}
    larger = resize(program, facts, {g: np.arange(size) for g, size in grown.items()}).program
    assert getattr(cost(larger), budget) > 0.6 * whole


@pytest.mark.parametrize(("units", "heads", "inner"), [("channels", 3, 8), ("blocks", 2, 16), ("both", 2, 8)])
def test_heads_and_their_insides(units: str, heads: int, inner: int) -> None:
    torch.manual_seed(0)
    program = trace(vit(), images(2, 32))
    removed = RemoveChannels(0.5, units=units).run(program).record
    assert removed.error <= EXACT
    for group in symmetry(program).groups:
        if group.parent is not None:
            assert (removed.sizes[group.parent], removed.sizes[group.index]) == (heads, inner)


# removal --------------------------------------------------------------------------------------------------------------


def test_the_weakest_go_and_the_rest_stay_in_order() -> None:
    model = _mlp()
    program = trace(model, _vectors())
    small = RemoveChannels(0.5).run(program)
    scores = channel_scores(program, symmetry(program))[0]
    strongest = np.sort(np.argsort(scores)[4:])
    assert small.record.kept[0].tolist() == strongest.tolist()
    close(small.program.weights[0]["0.weight"], model[0].weight.detach()[strongest], 0.0)


def test_reconstruction_is_the_least_squares_fit() -> None:
    model, x = _mlp(), _vectors(200)
    program = trace(model, x[:2])
    removed = RemoveChannels(0.5, protect=("4.weight",), progress=False).run(program)
    references = [Reference(program, 1.0, removed.record.carry)]
    small = Reconstruct(references, x, ridge=0.0, progress=False)(removed.program)
    with torch.no_grad():
        features, kept = model[:2](x), torch.from_numpy(removed.record.kept[0])
        target = model[:3](x)
        rows = torch.cat([features[:, kept], torch.ones_like(x[:, :1])], 1)
        exact = torch.linalg.lstsq(rows, target).solution.T
        weight = torch.cat([small.weights[0]["2.weight"], small.weights[0]["2.bias"][:, None]], 1)
        unsolved = torch.cat([model[2].weight[:, kept], model[2].bias[:, None]], 1)
        plain, best = (rows @ w.T - target for w in (unsolved, weight))
    close(weight, exact, 1e-8)
    assert best.square().mean() < 0.5 * plain.square().mean()


def test_reconstruction_of_flattened_maps_helps() -> None:
    torch.manual_seed(0)
    x = images(64, 8, dtype=torch.float64)
    model = _convolutional(normed=False)
    errors = []
    for solve in (None, "least_squares"):
        options: dict[str, Any] = {"solve": solve, "normalize": None, "progress": False}
        result = prune_structured(model, x[:2], sparsity=0.25, score="magnitude", data=x, **options)
        with torch.no_grad():
            errors.append(float((result.module(x) - model(x)).square().mean()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(("normed", "name"), [(True, "ResetBatchNorm"), (False, "CalibrateNormalization(repair)")])
def test_the_statistics_of_kept_channels_are_repaired(normed: bool, name: str) -> None:
    model, x = _convolutional(normed), images(16, 8, dtype=torch.float64)
    result = prune_structured(model, x[:2], sparsity=0.5, score="magnitude", data=x, solve=None, progress=False)
    assert any(note.startswith(name) for note in result.report.passes)
    if not normed:
        kept = [int(i) for i in _kept(model, x)]
        with torch.no_grad():
            wanted = model[0](x).mean((0, 2, 3))[kept]
            weight, bias = result.module.state_dict()["0.weight"], result.module.state_dict()["0.bias"]
            close(F.conv2d(x, weight, bias, padding=1).mean((0, 2, 3)), wanted, 1e-6)


def _kept(model: nn.Module, x: Tensor) -> Any:
    return RemoveChannels(0.5).run(trace(model, x[:2])).record.kept[0]


# folding --------------------------------------------------------------------------------------------------------------


def _doubled(program: Program) -> Program:
    """Each channel of the first groups twice, the copies sharing what they send on: the same function."""
    facts = symmetry(program)
    kept = {g.index: np.repeat(np.arange(g.size), 2) for g in facts.groups}
    grown = resize(program, facts, kept).program
    weights = dict(grown.weights[0])
    for fqn in {m.fqn for g in facts.groups for m in g.members if m.role == "in"}:
        weights[fqn] = weights[fqn] / 2
    return grown.with_weights([weights])


@pytest.mark.parametrize("normed", [True, False])
def test_folding_copies_gives_the_network_back(normed: bool) -> None:
    x = images(4, 8, dtype=torch.float64)
    program = trace(_convolutional(normed), x)
    double = _doubled(program)
    close(double(x), program(x), EXACT)
    folded = FoldChannels(0.5).run(double)
    small = folded.program
    assert folded.record.error <= EXACT
    assert cost(small).params == cost(program).params
    close(small(x), program(x), 1e-6)
    removed = RemoveChannels(0.5, "random")(double)
    assert float((removed(x) - program(x)).detach().abs().max()) > BROKEN


def test_folding_is_k_means_merged_by_role() -> None:
    model = _mlp()
    program = trace(model, _vectors())
    small = FoldChannels(0.5, protect=("4.weight",), variance=False)(program)
    w, b, v = (t.detach() for t in (model[0].weight, model[0].bias, model[2].weight))
    points = torch.cat([w, b[:, None]], 1).float().numpy()
    label = KMeans(4, n_init=4, random_state=0).fit_predict(points)
    order = sorted(range(4), key=lambda c: int(np.flatnonzero(label == c)[0]))
    rows = [torch.from_numpy(label == c) for c in order]
    close(small.weights[0]["0.weight"], torch.stack([w[r].mean(0) for r in rows]), EXACT)
    close(small.weights[0]["0.bias"], torch.stack([b[r].mean() for r in rows]), EXACT)
    close(small.weights[0]["2.weight"], torch.stack([v[:, r].sum(1) for r in rows], 1), EXACT)


def test_the_variances_of_merged_channels_are_right_for_white_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)).double()
    x = torch.randn(20_000, 40, dtype=torch.float64)
    model = lively(model, x)
    with torch.no_grad():
        small = FoldChannels(0.5)(trace(model, x[:2])).weights[0]
        rows = x @ small["0.weight"].T
    close(small["1.running_var"], rows.var(0), 0.05)
    raw = FoldChannels(0.5, variance=False)(trace(model, x[:2])).weights[0]["1.running_var"]
    assert float((raw - rows.var(0)).abs().max() / rows.var(0).max()) > 0.1


def test_goals_of_merged_channels_are_the_means_of_their_clusters() -> None:
    program = trace(_convolutional(False), images(2, 8, dtype=torch.float64))
    node = next(n.name for n in program.graph.nodes if n.name.startswith("conv"))
    goal = Goal(torch.arange(8.0)[None].double(), 1 + torch.arange(8.0)[None].double())
    folded = FoldChannels(0.5).run(replace(program, goals={node: goal}))
    found, clusters = folded.program.goals[node], folded.record.clusters[0]
    wanted = [np.flatnonzero(clusters.label == clusters.label[c]).mean() for c in clusters.kept]
    close(found.mean[0], torch.tensor(wanted, dtype=torch.float64), EXACT)
    close(found.std[0], 1 + torch.tensor(wanted, dtype=torch.float64), EXACT)


def test_blocks_are_removed_not_folded_and_said_so() -> None:
    torch.manual_seed(0)
    result = prune_structured(vit(), images(2, 32), sparsity=0.5, method="fold", progress=False)
    assert result.report.error <= EXACT
    assert any("groups with blocks" in note for note in result.report.notes)


# the whole way --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_smaller_networks_are_modules_that_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vit()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = prune_structured(model, images(2, 32), sparsity=0.5, round_to=4, progress=False)
    for batch in (1, 5):
        assert result.module(images(batch, 32)).shape[0] == batch
    assert copy.deepcopy(result.module)(images(1, 32)).isfinite().all()
    assert result.report.params_ratio < 0.5
    assert result.report.error is not None
    assert "parameters" in str(result.report)
    assert sum(w["after"] for w in result.report.to_dict()["groups"]) > 0
    export(result, tmp_path / "small.onnx")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_latency_is_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.seconds(trace(_mlp(), _vectors())) > 0
    monkeypatch.setattr(choice, "seconds", lambda program: 1 + cost(program).macs)  # a clock that does not waver
    result = prune_structured(_mlp(), _vectors(), budget={"latency": 0.5}, progress=False)
    assert 0.2 < result.report.flops_ratio < 0.5


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.5, "score": "wanda"}, "unknown for channels"),
        ({"sparsity": 0.5, "score": "taylor"}, "data"),
        ({"sparsity": 0.5, "solve": "least_squares"}, "data"),
        ({"sparsity": 0.5, "solve": "guess"}, "solve"),
        ({"budget": {"energy": 0.5}}, "budget"),
        ({"budget": {"flops": 0.0}}, "budget"),
        ({"budget": {"flops": 0.5}, "sparsity": 0.5}, "budget"),
        ({}, "sparsity"),
        ({"sparsity": 0.5, "allocation": "layer"}, "allocation"),
        ({"sparsity": 0.5, "units": "rows"}, "units"),
        ({"sparsity": 0.5, "method": "melt"}, "method"),
        ({"sparsity": 0.5, "round_to": 0}, "round_to"),
        ({"sparsity": 0.5, "protect": ("nothing",)}, "protect"),
        ({"sparsity": 0.5, "normalize": "bias_removal"}, "normalize"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ArgumentError, match=cause):
        prune_structured(_mlp(), _vectors(), progress=False, **options)


def test_a_network_without_groups_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(5, 3)).double()
    result = prune_structured(model, _vectors(), sparsity=0.5, progress=False)
    assert result.report.params_ratio == 1
    close(result.module(_vectors()), model(_vectors()), EXACT)


def test_empty_data() -> None:
    with pytest.raises(DataError):
        prune_structured(_mlp(), _vectors(), sparsity=0.5, data=[], progress=False)


def test_prune_by_groups_removes_channels() -> None:
    result = prune(_mlp(), _vectors(), sparsity=0.5, scope="group", structured={"round_to": 4}, progress=False)
    assert [width.after for width in result.report.widths] == [4, 4]
    assert prune(_mlp(), _vectors(), sparsity=0.5, scope="group", progress=False).report.widths[1].after == 3


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"scope": "row", "structured": {}}, "scope"),
        ({"scope": "group", "masks": "parametrize"}, "masks"),
        ({"scope": "group", "steps": 2}, "steps"),
        ({"scope": "group", "sparsity": {"0": 0.5}}, "sparsity"),
    ],
)
def test_what_only_masks_can_do_is_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ArgumentError, match=cause):
        prune(_mlp(), _vectors(), progress=False, **{"sparsity": 0.5} | options)
