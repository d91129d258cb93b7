"""``solve=`` of merge, prune, prune_structured and repair: what a default call chooses, says and never gives up."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import close, edges, images, lively, transported
from micro_models import conv
from test_matching import concatenated, residual
from torch import Tensor, nn

import vfx
from vfx.api import compare, merge, prune, prune_structured, repair, trace
from vfx.choice import MARGIN, best
from vfx.data import digits
from vfx.errors import ArgumentError
from vfx.judge import EVERY, LIMIT, HeldOutScore, Judge
from vfx.match.partial import PartialMatching
from vfx.match.transport import OptimalTransport
from vfx.models import Training, fit, vgg16_bn
from vfx.statistics.data import Batches, Prepared

X = images(48, 8, dtype=torch.float64)
OTHER = images(9, 8, seed=5, dtype=torch.float64)


def _merge(models: Any, **options: Any) -> Any:
    return merge(models, X[:2], **{"data": X, "progress": False} | options)


def _classifier(seed: int, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    layers = [conv(1, width, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * width, 10))


@cache
def _trained() -> tuple[list[nn.Module], Tensor, Tensor, Tensor, Tensor]:
    """Two small classifiers of real digits, training and test data."""
    train_x, train_y, test_x, test_y = digits(size=8)
    models = [fit(_classifier(seed), train_x, train_y, Training(epochs=25, lr=0.1, seed=seed)) for seed in (0, 1)]
    return [model.eval() for model in models], train_x, train_y, test_x, test_y


@torch.no_grad()
def _accuracy(module: nn.Module) -> float:
    _, _, _, x, y = _trained()
    return float((module(x).argmax(1) == y).double().mean())


# merge ----------------------------------------------------------------------------------------------------------------


def test_the_default_call_is_not_worse_than_its_best_edge_by_the_judge() -> None:
    models, x, *_ = _trained()
    result = merge(models, x[:2], data=x[:600], progress=False)
    scores = result.report.scores
    program = trace(models, x[:2])
    judge = Judge(program, [0.5, 0.5], Batches(program, x[:600]).split(EVERY, LIMIT)[1])
    assert judge(result.program).value <= min(judge(program.select(edge)).value for edge in (0, 1))
    assert {"edge 0", "edge 1", "least squares", "none", "reset"} <= set(scores)
    assert result.report.own_class
    assert type(result.module) is nn.Sequential
    plain = merge(models, x[:2], data=x[:600], solve=None, normalize="reset", progress=False)
    assert _accuracy(result.module) > _accuracy(plain.module) + 0.02


def test_least_squares_beats_the_normalizations_on_trained_networks() -> None:
    models, x, *_ = _trained()
    figures = {
        solve: _accuracy(merge(models, x[:2], data=x[:600], solve=solve, follow=follow, progress=False).module)
        for solve, follow in (("least_squares", 0), (None, "auto"))
    }
    assert figures["least_squares"] > figures[None] + 0.01


def test_where_an_edge_wins_the_report_says_that_nothing_was_merged() -> None:
    models = edges(residual, X)
    result = _merge(models, weights=[1.0, 0.0])  # the ensemble is the first edge
    assert result.report.outcome.startswith("nothing was merged: edge 0")
    assert "outcome" in json.loads(result.report.to_json())
    assert "nothing was merged" in str(result.report)
    close(result.module(OTHER), models[0](OTHER), 1e-12)


@pytest.mark.parametrize("edge", [0, 1])
def test_following_all_layers_gives_the_edge_itself(edge: int) -> None:
    models = edges(residual, X)
    result = _merge(models, follow=6, follow_edge=edge)
    close(result.module(OTHER), models[edge](OTHER), 1e-6)
    assert result.report.choices["follow_edge"] == edge
    part = _merge(models, follow=2, follow_edge=edge)
    assert (part.module(OTHER) - models[edge](OTHER)).abs().max() > 1e-3, "negative control"


class _Tied(nn.Module):
    """Tokens whose table is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.body(self.table(tokens)).relu(), self.table.weight)


def test_layers_behind_what_cannot_follow_are_solved_for_the_edge() -> None:
    """The table is read behind the followed layer, too, and stays the average: the layer reads no edge's values."""
    tokens = torch.randint(0, 11, (60, 4), generator=torch.Generator().manual_seed(0))
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(_Tied().double().eval())
    program = trace(models, tokens[:2])
    average = vfx.Interpolate()(program)
    solved = vfx.Reconstruct(program, [(tokens,)], follow=1, progress=False).run(average)
    assert any(layer.after < 0.9 * layer.before for layer in solved.record)
    weights, edge = (p.weights[0]["body.weight"] for p in (solved.program, program))
    assert (weights - edge).abs().max() > 1e-3, "a copy would read what it was not trained on"


def test_only_references_in_the_network_s_channels_are_followed() -> None:
    program = trace(edges(residual, X), X[:2])
    turned = [vfx.Reference(program.select(edge), 0.5, lambda node, dim: None) for edge in (0, 1)]
    with pytest.raises(ArgumentError, match="as they are"):
        vfx.Reconstruct(turned, X, follow=1, progress=False)(vfx.Interpolate()(program))


def test_a_module_can_be_followed_and_the_report_says_which_layers() -> None:
    models = edges(residual, X)
    program = trace(models, X[:2])
    name = next(iter(vfx.layers(program))).fqn
    result = merge(program, data=X, follow=name, follow_edge=0, progress=False)
    assert "layers 1–1 follow edge 0, layers 2–" in result.report.outcome


@pytest.mark.parametrize(
    "options",
    [
        {"match": "weight"},
        {"match": None},
        {"match": "zipit"},
        {"match": "cca"},
        {"match": OptimalTransport("sinkhorn")},
        {"match": PartialMatching(0.3)},
        {"preserve": 2},
        {"preserve": 2, "follow": 4, "follow_edge": 1},
        {"preserve": 3, "join": "activation"},
        {"heads": 1, "head_output": "mean"},
        {"weights": [0.8, 0.2]},
        {"prepare": "balance"},
    ],
)
@torch.no_grad()
def test_least_squares_stands_beside_any_option(options: dict[str, Any]) -> None:
    """The network solved on the data is nearer to the ensemble there than the plain average."""
    models = edges(residual, X)
    shares = options.get("weights", [0.5, 0.5])
    goal = sum(share * model(X) for share, model in zip(shares, models))
    plain = dict(options) | {"solve": None, "normalize": None}
    for follow in ("follow", "follow_edge"):
        plain.pop(follow, None)
    if isinstance(options.get("match"), PartialMatching):
        plain |= {"match": "activation"}
    solved = _merge(models, **{"solve": "least_squares", "follow": 0} | options)
    average = _merge(models, **plain)
    errors = [float((result.module(X) - goal).square().mean()) for result in (solved, average)]
    assert errors[0] < 0.9 * errors[1]


@torch.no_grad()
def test_more_than_two_edges_are_solved_for_their_mean() -> None:
    models = edges(concatenated, X, 3)
    goal = sum(model(X) for model in models) / 3
    results = [_merge(models, **o) for o in ({"solve": "least_squares", "follow": 0}, {"normalize": None})]
    errors = [float((result.module(X) - goal).square().mean()) for result in results]
    assert errors[0] < 0.5 * errors[1]


@torch.no_grad()
def test_edges_of_other_widths_are_solved_for_their_own_outputs() -> None:
    models = [lively(_wide(width, seed).double(), X, seed) for seed, width in enumerate((8, 11))]
    goal = sum(model(X) for model in models) / 2
    options = {"match": "weight", "classes": "permutation"}
    solved = _merge(models, solve="least_squares", follow=0, **options)
    plain = _merge(models, normalize=None, **options)
    errors = [float((result.module(X) - goal).square().mean()) for result in (solved, plain)]
    assert errors[0] < 0.5 * errors[1]


def _wide(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        conv(3, width), nn.ReLU(), conv(width, width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 4),
    )  # fmt: skip


def test_a_permuted_copy_is_merged_into_the_network_itself() -> None:
    models, x, *_ = _trained()
    twin = transported(models[0].double(), x[:8].double())[0]
    result = merge([models[0], twin], x[:2].double(), data=x[:300].double(), progress=False)
    models[0].float()
    close(result.module.float()(x[:50]), models[0](x[:50]), 1e-4)


def test_a_named_normalization_is_not_overruled() -> None:
    models = edges(residual, X)
    for normalize in (None, "repair"):
        result = _merge(models, normalize=normalize)
        assert result.report.choices["solve"] is None
        assert not any("Reconstruct" in name for name in result.report.passes)
    both = _merge(models, solve="least_squares", follow=0, normalize="repair")
    assert any("Reconstruct" in name for name in both.report.passes)
    assert any("CalibrateNormalization" in name for name in both.report.passes)


def test_the_user_s_own_judge_decides() -> None:
    models = edges(residual, X)
    result = _merge(models, judge=lambda module: -float((module(X) - models[1](X)).abs().sum()))
    assert result.report.choices["edge"] == 1
    close(result.module(OTHER), models[1](OTHER), 1e-12)


def test_a_budget_bounds_the_preserved_layers() -> None:
    models, x, *_ = _trained()
    result = merge(models, x[:2], data=x[:600], budget={"params": 1.3}, progress=False)
    assert result.report.params_ratio <= 1.3
    tried = {name.partition(",")[0] for name in result.report.scores if name.startswith("preserve")}
    assert len(tried) > 1
    with pytest.raises(ArgumentError, match="at least one edge"):
        merge(models, x[:2], data=x[:600], budget={"params": 0.5}, progress=False)
    with pytest.raises(ArgumentError, match="multiples"):
        merge(models, x[:2], data=x[:600], budget={"watts": 2.0}, progress=False)
    with pytest.raises(ArgumentError, match="data="):
        merge(models, x[:2], budget={"params": 1.5}, progress=False)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"solve": "guess"}, "solve"),
        ({"solve": None, "follow": 2}, "solve="),
        ({"follow": 99}, "preserve must be between|between 0 and"),
        ({"follow": 2, "follow_edge": 5}, "follow_edge"),
        ({"judge": "taste"}, "judge"),
        ({"solve": "least_squares", "data": None}, "data="),
        ({"follow": 2, "data": None}, "data="),
        ({"solve": "least_squares", "normalize": "bias_removal"}, "biases"),
        ({"match": "zipit", "follow": 2}, "follow="),
    ],
)
def test_what_is_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ArgumentError, match=cause):
        _merge(edges(residual, X), **options)


# choice ---------------------------------------------------------------------------------------------------------------


def _score(value: float, spread: float = 0.0, count: int = 100) -> HeldOutScore:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(int(1000 * value)), dtype=torch.float64)
    samples = value + spread * (noise - noise.mean())
    return HeldOutScore(value, samples=samples)


def test_a_gain_below_its_standard_error_is_none() -> None:
    sure, unsure = _score(0.9), _score(0.9, spread=5.0)
    assert best({"solved": sure, "edge 0": _score(1.0)}, ["edge 0"], []) == "solved"
    assert best({"solved": unsure, "edge 0": _score(1.0)}, ["edge 0"], []) == "edge 0"
    assert best({"solved": _score(1.1), "edge 0": _score(1.0)}, ["edge 0"], []) == "edge 0"


def test_leaving_the_user_s_class_takes_a_margin() -> None:
    own = _score(1.0)
    assert best({"solved": own, "repair": _score(1.0 - 0.5 * MARGIN)}, [], ["repair"]) == "solved"
    assert best({"solved": own, "repair": _score(1.0 - 2 * MARGIN)}, [], ["repair"]) == "repair"


def test_what_outputs_are_decides_how_they_are_compared() -> None:
    x = images(12, 4, dtype=torch.float64)
    kinds: dict[str, Any] = {
        "logits": lambda y: y,
        "probabilities": lambda y: y.softmax(1),
        "embedding": lambda y: nn.functional.normalize(y, dim=1),
        "multilabel": lambda y: y.sigmoid(),
        "regression": lambda y: y.clamp(0, 1),
    }
    for kind, change in kinds.items():
        models = edges(lambda change=change: _Headed(change), x)
        program = trace(models, x[:2])
        judge = Judge(program, [0.5, 0.5], Prepared(([x],), (None,)))
        assert set(judge.kinds.values()) == {kind}
        same = Judge(program.select(0), [1.0], Prepared(([x],), (None,)))(program.select(0))
        other = judge(program.select(0))
        assert abs(same.divergence) < 1e-6
        assert other.divergence > 1e-4
    with torch.no_grad():
        outputs = [model(x) for model in models]
    goal = (outputs[0] + outputs[1]) / 2
    expected = (outputs[0] - goal).square().flatten(1).mean(1) / goal.var()
    close(other.divergence, float(expected.mean()), 1e-9)


def test_yes_and_no_are_judged_by_their_logits() -> None:
    x = images(12, 4, dtype=torch.float64)
    models = edges(lambda: _Headed(lambda y: (3 * y).sigmoid()), x)
    judge = Judge(trace(models, x[:2]), [0.3, 0.7], Prepared(([x],), (None,)))
    with torch.no_grad():
        logits = [3 * model.body(x.flatten(1)) for model in models]
        p, q = (0.3 * logits[0] + 0.7 * logits[1]).sigmoid(), models[0](x)
        expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    close(judge.score([q]).divergence, float(expected), 1e-9)
    assert abs(judge.score([p]).divergence) < 1e-9
    sure = judge.score([(q > 0.5).double()]).divergence
    assert judge.score([q]).divergence < sure < float("inf")


def test_the_ensemble_of_classifiers_is_that_of_their_logits() -> None:
    x = images(12, 4, dtype=torch.float64)
    models = edges(lambda: _Headed(lambda y: 4 * y), x)
    with torch.no_grad():
        mean = 0.3 * models[0](x) + 0.7 * models[1](x)
        mixed = (0.3 * models[0](x).softmax(1) + 0.7 * models[1](x).softmax(1)).log()
    program = trace(models, x[:2])
    judge = Judge(program, [0.3, 0.7], Prepared(([x],), (None,)))
    assert abs(judge.score([mean]).divergence) < 1e-6
    assert judge.score([mixed]).divergence > 1e-4
    for model in models:
        model.change = lambda y: (4 * y).softmax(1)
    alike = Judge(trace(models, x[:2]), [0.3, 0.7], Prepared(([x],), (None,)))
    assert set(alike.kinds.values()) == {"probabilities"}
    close(next(iter(alike.expected.values())), next(iter(judge.expected.values())), 1e-10)
    assert abs(alike.score([mean.softmax(1)]).divergence) < 1e-9


class _Headed(nn.Module):
    def __init__(self, change: Any):
        super().__init__()
        self.body, self.change = nn.Linear(48, 5), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.body(x.flatten(1)))


# pruning --------------------------------------------------------------------------------------------------------------


def test_pruned_networks_are_solved_within_their_masks() -> None:
    models, x, *_ = _trained()
    results = {
        solve: prune(models[0], x[:2], sparsity=0.9, data=x[:500], solve=solve, progress=False)
        for solve in ("auto", "least_squares", None)
    }
    figures = {solve: _accuracy(result.module) for solve, result in results.items()}
    assert figures["least_squares"] > figures[None] + 0.05
    assert figures["auto"] >= figures["least_squares"] - 0.02
    zeros = [result.report.nonzeros for result in results.values()]
    assert len(set(zeros)) == 1, "solving fills no zero"
    assert results["auto"].report.choices["solve"] == "least_squares"
    assert {"least squares", "none"} <= set(results["auto"].report.scores)
    assert results["auto"].report.own_class


@pytest.mark.parametrize("method", ["remove", "fold"])
def test_smaller_networks_are_solved_for_the_dense_one(method: str) -> None:
    models, x, *_ = _trained()
    figures = {
        solve: _accuracy(
            prune_structured(
                models[0], x[:2], sparsity=0.5, method=method, data=x[:500], solve=solve, progress=False
            ).module
        )
        for solve in ("auto", None)
    }
    assert figures["auto"] > figures[None] + 0.05


@torch.no_grad()
def test_a_network_is_repaired_towards_references_by_least_squares() -> None:
    models = edges(residual, X)
    average = _merge(models, normalize=None)
    goal = sum(model(X) for model in models) / 2
    solved = repair(average, models, data=X, solve="least_squares", match="activation", progress=False)
    normalized = repair(average, models, data=X, solve=None, match="activation", progress=False)
    errors = [float((result.module(X) - goal).square().mean()) for result in (solved, normalized)]
    assert errors[0] < errors[1]


def test_masks_hold_in_layers_that_are_not_solved() -> None:
    program = trace(edges(residual, X), X[:2])
    name = str(next(iter(vfx.layers(program))).fqn) + ".weight"
    mask = torch.rand(program.weights[0][name].shape, generator=torch.Generator().manual_seed(0)) > 0.5
    average = vfx.Interpolate()(program)
    result = vfx.Reconstruct(program, X, follow=1, masks={name: mask}, progress=False)(average)
    assert not result.weights[0][name][~mask].any()
    with pytest.raises(ArgumentError, match="no tensor"):
        vfx.Reconstruct(program, X, masks={"nothing": mask}, progress=False)(average)


# compare --------------------------------------------------------------------------------------------------------------


def test_comparisons_hold_what_they_measure(tmp_path: Path) -> None:
    models, x, _, test_x, test_y = _trained()
    found = compare(
        models,
        x[:2],
        data=x[:300],
        evaluate=[(test_x, test_y)],
        grid={"preserve": [0, 2], "normalize": [None, "reset", "nothing"]},
        progress=False,
    )
    assert [point.name for point in found.points[:3]] == ["edge 0", "edge 1", "ensemble"]
    assert found.target == "labels"
    named = {point.name: point for point in found}
    direct = merge(models, x[:2], data=x[:300], preserve=2, normalize="reset", progress=False)
    assert named["preserve=2, normalize=reset"].accuracy == pytest.approx(_accuracy(direct.module))
    assert named["preserve=2, normalize=reset"].params == pytest.approx(direct.report.params_ratio)
    assert "unknown" in named["preserve=0, normalize=nothing"].error
    costs = [point.params for point in found.frontier()]
    assert costs == sorted(costs)
    assert found.best({"params": 1.0}).params <= 1.0
    written = json.loads(found.to_json(tmp_path / "found.json"))
    assert len(written["points"]) == len(found.points)
    assert found.figure().axes
    assert "edge 0" in str(found)


def test_sparsities_are_compared_too() -> None:
    models, x, _, test_x, test_y = _trained()
    found = compare(
        models[0], x[:2], data=x[:300], evaluate=[(test_x, test_y)], grid={"sparsity": [0.5, 0.9]}, latency=False,
        progress=False,
    )  # fmt: skip
    assert [point.name for point in found.points] == ["dense", "sparsity=0.5", "sparsity=0.9"]
    assert found.points[2].params < found.points[1].params < 1


def test_the_papers_network_merges_by_default() -> None:
    x = images(24, 32)
    models = edges(lambda: vgg16_bn(width=0.0625), x)
    result = merge(models, x[:2], data=x, progress=False)
    assert result.module(x).isfinite().all()
    assert result.report.outcome
