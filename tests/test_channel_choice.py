"""Which score removes channels by default: what does better on held-out samples, magnitude where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vfx
from vfx import choice
from vfx.api import prune_structured, removing
from vfx.api.restoring import Restoring
from vfx.choice import Split, contenders
from vfx.errors import ArgumentError
from vfx.judge import HeldOutScore

EXACT, BROKEN = 1e-8, 1e-2


def _half_silent() -> nn.Sequential:
    """Of eight hidden units the four with the largest weights never fire."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    first: Any = model[0]
    with torch.no_grad():
        first.weight[:4] *= 5
        first.bias[:4] = -100.0
    return model


def _samples(count: int = 60) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _error(module: nn.Module, model: nn.Module) -> float:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        return float((module(x) - model(x)).abs().max())


@pytest.mark.parametrize("solve", ["auto", "least_squares", None])
def test_the_score_that_leaves_the_better_network_wins(solve: str | None) -> None:
    model, x = _half_silent(), _samples()
    options: dict[str, Any] = {
        "sparsity": 0.5,
        "allocation": "uniform",
        "data": x,
        "solve": solve,
        "normalize": None,
        "progress": False,
    }
    result = prune_structured(model, x[:2], **options)
    assert result.report.choices["score"] == "activation"
    assert {name.split(":")[0] for name in result.report.scores} == {"magnitude", "activation"}
    assert _error(result.module, model) < EXACT
    named = prune_structured(model, x[:2], score="magnitude", **options)
    assert named.report.choices["score"] == "magnitude"
    assert _error(named.module, model) > BROKEN


def test_the_user_s_figure_decides() -> None:
    model, x = _half_silent(), _samples()
    seen: list[float] = []

    def most_biased(module: nn.Module) -> float:
        seen.append(-float(next(p for name, p in module.named_parameters() if name.endswith("0.bias")).min()))
        return seen[-1]

    result = prune_structured(
        model,
        x[:2],
        sparsity=0.5,
        allocation="uniform",
        data=x,
        solve="least_squares",
        judge=most_biased,
        progress=False,
    )
    assert len(set(seen)) > 1
    assert result.report.choices["score"] == "magnitude"


def test_without_data_or_with_a_name_nothing_is_tried() -> None:
    model, x = _half_silent(), _samples()
    bare = prune_structured(model, x[:2], sparsity=0.5, progress=False)
    named = prune_structured(model, x[:2], sparsity=0.5, score="magnitude", progress=False)
    assert bare.report.choices["score"] == "magnitude"
    assert not bare.report.scores
    for one, other in zip(bare.module.parameters(), named.module.parameters(), strict=True):
        assert torch.equal(one, other)
    folded = prune_structured(model, x[:2], sparsity=0.5, method="fold", data=x, solve="least_squares", progress=False)
    assert folded.report.choices["score"] is None
    assert not folded.report.scores


def test_too_few_samples_to_choose_by_are_refused() -> None:
    model, x = _half_silent(), _samples(2)
    with pytest.raises(ArgumentError, match="score="):
        prune_structured(model, x, sparsity=0.5, data=x, solve="least_squares", progress=False)


def test_close_scores_of_different_channels_are_looked_at_in_all_folds() -> None:
    """Clear scores and ways of one network are not: the paired error leaves out the choice of samples to fit alone."""
    score = lambda value: HeldOutScore(value, samples=torch.full((4,), value))  # noqa: E731
    fits = {"a: solved": "a", "a: none": "a", "b: solved": "b", "b: none": "b"}
    close = {"a: solved": score(1.0), "a: none": score(7.0), "b: solved": score(1.05), "b: none": score(9.0)}
    assert contenders(close, fits) == ["a: solved", "b: solved"]
    assert contenders(close | {"b: solved": score(1.2)}, fits) == []
    assert contenders(close | {"b: solved": score(9.0), "a: none": score(1.01)}, fits) == []


def test_the_second_look_decides_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fold of many samples is enough where scores are clear; close ones are means over all three."""
    model, x = _half_silent(), _samples(300)
    options: dict[str, Any] = {"sparsity": 0.5, "allocation": "uniform", "data": x, "solve": "least_squares"}
    options |= {"progress": False}
    looks: list[bool] = []
    folds = Restoring.folds

    def counted(self: Restoring, more: bool = False) -> list[Split]:
        looks.append(more)
        return folds(self, more)

    monkeypatch.setattr(Restoring, "folds", counted)
    assert prune_structured(model, x[:2], **options).report.choices["score"] == "activation"
    assert looks == [False]
    monkeypatch.setattr(choice, "CLOSE", float("inf"))
    looks.clear()
    assert prune_structured(model, x[:2], **options).report.choices["score"] == "activation"
    assert looks == [False, True]


def test_the_second_look_does_not_forget_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation wins the first fold by 1 and loses the two behind it by a tenth each: over all it wins."""
    values = {"magnitude": [2.0, 1.0], "activation": [1.0, 1.1]}
    looks = iter([("magnitude", 0), ("activation", 0), ("magnitude", 1), ("activation", 1)])

    def scores(self: Restoring, ways: Any, folds: Any) -> dict[str, list[HeldOutScore]]:
        name, look = next(looks)
        value = values[name][look]
        return {way: [HeldOutScore(value, samples=torch.full((100,), value))] * len(folds) for way in ways}

    monkeypatch.setattr(Restoring, "scores", scores)
    monkeypatch.setattr(choice, "CLOSE", float("inf"))
    model, x = _half_silent(), _samples(300)
    options: dict[str, Any] = {"sparsity": 0.5, "allocation": "uniform", "data": x, "solve": "least_squares"}
    result = prune_structured(model, x[:2], progress=False, **options)
    assert next(looks, None) is None
    assert result.report.choices["score"] == "activation"


@pytest.mark.parametrize("gap", [0.0, 0.3])
def test_magnitude_stays_where_activation_is_not_clearly_better(monkeypatch: pytest.MonkeyPatch, gap: float) -> None:
    """Better by less than the standard error is none; by more it is taken."""
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = {"magnitude": noise.abs() + 1 + gap, "activation": noise.flip(0).abs() + 0.999}
    seen = iter(values.values())

    def scores(self: Restoring, ways: Any, folds: Any) -> dict[str, list[HeldOutScore]]:
        samples = next(seen)
        return {way: [HeldOutScore(float(samples.mean()), samples=samples)] for way in ways}

    monkeypatch.setattr(Restoring, "scores", scores)
    monkeypatch.setattr(choice, "CLOSE", 0.0)
    model, x = _half_silent(), _samples()
    options: dict[str, Any] = {"sparsity": 0.5, "allocation": "uniform", "data": x, "solve": "least_squares"}
    result = prune_structured(model, x[:2], progress=False, **options)
    assert result.report.choices["score"] == ("activation" if gap else "magnitude")


def _wide_and_silent() -> nn.Sequential:
    """Twenty of the 24 units of the first layer never fire; all eight of the second count."""
    torch.manual_seed(0)
    layers = (nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        layers[0].bias[:20] = -100.0
        layers[2].bias.fill_(1.0)
    return model


@pytest.mark.parametrize("score", ["auto", "activation"])
def test_the_allocation_that_leaves_the_better_network_wins(score: str) -> None:
    model, x = _wide_and_silent(), _samples()
    options: dict[str, Any] = {"sparsity": 0.5, "score": score, "data": x, "normalize": None, "progress": False}
    chosen = prune_structured(model, x[:2], allocation="auto", **options)
    uniform = prune_structured(model, x[:2], allocation="uniform", **options)
    assert (chosen.report.choices["allocation"], chosen.report.choices["score"]) == ("global", "activation")
    assert chosen.report.profile.params <= uniform.report.profile.params
    assert _error(chosen.module, model) < EXACT
    assert _error(uniform.module, model) > BROKEN  # negative control
    labels = {label.split(":")[0] for label in chosen.report.scores}
    assert labels >= {"activation", "activation, global"} if score == "auto" else labels >= {"global"}


def test_uniform_stays_where_global_is_no_better() -> None:
    """One hidden layer: both remove the same."""
    model, x = _half_silent(), _samples()
    options: dict[str, Any] = {"sparsity": 0.5, "allocation": "auto", "progress": False}
    assert prune_structured(model, x[:2], data=x, **options).report.choices["allocation"] == "uniform"
    assert prune_structured(model, x[:2], **options).report.choices["allocation"] == "uniform"  # nothing to judge by


@pytest.mark.filterwarnings("ignore::vfx.errors.ConfigNote")
def test_several_widths_folding_and_configurations_stay_uniform() -> None:
    model, x = _wide_and_silent(), _samples()
    options: dict[str, Any] = {"sparsity": 0.5, "data": x, "normalize": None, "progress": False}
    family = prune_structured(model, x[:2], **options | {"sparsity": [0.25, 0.5]}).networks  # type: ignore[attr-defined]
    folded = prune_structured(model, x[:2], method="fold", **options)
    assert {result.report.choices["allocation"] for result in (*family.values(), folded)} == {"uniform"}
    configured = _Configured(model)
    assert prune_structured(configured, x[:2], **options).report.choices["allocation"] == "uniform"
    plain = prune_structured(configured.net, x[:2], **options)
    assert plain.report.choices["allocation"] == "global"  # negative control


class _Viewed(nn.Module):
    """Layers of which ``forward`` takes multiples of 12 features alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.half = _wide_and_silent(), 12

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[:2](x)
        if hidden.shape[1] % self.half:
            raise ValueError(f"{hidden.shape[1]} features")
        return self.net[2:](hidden)


class _Grouped(nn.Module):
    """Eight groups of two channels: little can go but whole groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=8)
        self.c, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("size", [{"sparsity": 0.85}, {"budget": {"params": 0.1}}, {"budget": {"flops": 0.1}}])
def test_a_global_network_that_is_too_large_is_no_candidate(
    size: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = _Grouped().double().eval(), torch.randn(60, 1, 6, 6, dtype=torch.float64)
    chosen = prune_structured(model, x[:2], data=x, progress=False, **size)
    uniform = prune_structured(model, x[:2], data=x, allocation="uniform", progress=False, **size)
    assert chosen.report.profile.params <= uniform.report.profile.params
    assert chosen.report.profile.flops <= uniform.report.profile.flops
    assert not any("global" in label for label in chosen.report.scores)
    monkeypatch.setattr(removing, "_is_as_good_a_form", lambda *removals: True)
    larger = prune_structured(model, x[:2], data=x, progress=False, **size)
    assert any("global" in label for label in larger.report.scores), "control: it would be one"


def test_the_user_s_class_is_not_given_up() -> None:
    """Only the uniform network's 12 of 24 features are a multiple of the number that the class reckons with."""
    model, x = _Viewed().double().eval(), _samples()
    options: dict[str, Any] = {"sparsity": 0.5, "data": x, "normalize": None, "progress": False}
    chosen = prune_structured(model, x[:2], **options)
    assert isinstance(chosen.module, _Viewed)
    assert chosen.report.choices["allocation"] == "uniform"
    plain = prune_structured(model.net, x[:2], **options)
    assert plain.report.choices["allocation"] == "global"  # negative control


@pytest.mark.parametrize("wrong", ["absent", "short"])
def test_scores_of_other_groups_are_refused(wrong: str) -> None:
    model, x = _wide_and_silent(), _samples()
    groups = vfx.symmetry(model, x[:2]).groups
    scores = {group.index: np.arange(float(group.size)) for group in groups}
    assert prune_structured(model, x[:2], sparsity=0.5, score=scores, progress=False).report.choices["score"] == "given"
    scores |= {0: scores[0][:1]} if wrong == "short" else {}
    given = scores if wrong == "short" else {1: scores[1]}
    with pytest.raises(ArgumentError, match=r"score= has .* for group 0 \(0.weight\), of shape \(24,\)"):
        prune_structured(model, x[:2], sparsity=0.5, score=given, progress=False)


def test_scores_may_be_tensors() -> None:
    model, x = _wide_and_silent(), _samples()
    groups = vfx.symmetry(model, x[:2]).groups
    arrays = {group.index: np.random.default_rng(group.index).random(group.size) for group in groups}
    tensors = {index: torch.from_numpy(scores).requires_grad_() for index, scores in arrays.items()}
    left = [
        prune_structured(model, x[:2], sparsity=0.5, score=scores, progress=False).program.weights[0]
        for scores in (arrays, tensors, {index: -scores for index, scores in arrays.items()})
    ]
    assert all(torch.equal(left[0][name], left[1][name]) for name in left[0])
    assert any(not torch.equal(left[0][name], left[2][name]) for name in left[0]), "control: other scores"


def test_a_call_that_removes_nothing_says_so() -> None:
    model, x = _wide_and_silent(), _samples()
    nothing, half = (
        prune_structured(model, x[:2], sparsity=0.5, roles=[role], progress=False).report
        for role in ("blocks", "hidden")
    )
    assert any("no channel went" in note for note in nothing.notes)
    assert not any("no channel went" in note for note in half.notes)


class _Sizes:
    """A configuration: one number for all hidden layers."""

    width = 24


class _Configured(nn.Module):
    config_class = _Sizes

    def __init__(self, net: nn.Module):
        super().__init__()
        self.config, self.net = _Sizes(), net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_budget_is_that_of_both_allocations() -> None:
    model, x = _wide_and_silent(), _samples()
    options: dict[str, Any] = {"budget": {"flops": 0.25}, "score": "activation", "data": x, "progress": False}
    chosen = prune_structured(model, x[:2], allocation="auto", **options)
    assert chosen.report.choices["allocation"] == "global"
    whole = vfx.profile(model, x[:2])
    assert chosen.report.profile.flops <= 0.25 * whole.flops
