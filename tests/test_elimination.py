"""Channels that the others can make up for go first: the losses of a greedy elimination, against solving each time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.micro_models import conv
from vfx.analyse.symmetry import symmetry
from vfx.api import prune_structured, trace
from vfx.pruning import elimination
from vfx.pruning.elimination import eliminate
from vfx.pruning.groups import channel_scores
from vfx.pruning.places import features_along
from vfx.pruning.second_moments import second_moments

CLOSE = 1e-6


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "DAMPING", 1e-13)


def _least_squares(x: Tensor, goal: Tensor, kept: list[int]) -> float:
    """The mean squared error (summed over outputs) of the best map from the kept features."""
    if not kept:
        return float(goal.square().sum(1).mean())
    return float((x[:, kept] @ torch.linalg.lstsq(x[:, kept], goal).solution - goal).square().sum(1).mean())


@pytest.mark.usefixtures("undamped")
def test_losses_are_those_of_solving_anew_each_time() -> None:
    x, weight = _random(200, 7) @ _random(7, 7, seed=1), _random(7, 3, seed=2)
    losses = eliminate(x.T @ x / 200, weight @ weight.T, torch.zeros(7, dtype=torch.long))
    left, reached, last = list(range(7)), 0.0, 0.0
    for _ in range(7):
        after = {feature: _least_squares(x, x @ weight, [k for k in left if k != feature]) for feature in left}
        feature = min(after, key=lambda place: after[place])
        reached, last = max(reached, after[feature] - last), after[feature]
        assert float(losses[feature]) == pytest.approx(reached, rel=CLOSE)
        left.remove(feature)
    diagonal = (x.square().mean(0) * weight.square().sum(1)).argsort()  # without what the others make up for
    assert diagonal.tolist() != losses.argsort().tolist()


def test_each_block_loses_as_many_at_every_step() -> None:
    moment = torch.diag(torch.tensor([1.0, 1, 1, 100, 100, 100], dtype=torch.float64))
    losses = eliminate(moment, torch.eye(6, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert losses[:3].max() >= losses[3:].min()  # never falling: the second block's first goes with the first's
    assert losses.isfinite().all()


def _twins() -> nn.Sequential:
    """Eight hidden units, of which the first two are one, and large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    first: Any = model[0]
    with torch.no_grad():
        first.weight[0] *= 3
        first.weight[1], first.bias[1] = first.weight[0], first.bias[0]
    return model


@pytest.mark.parametrize(("score", "low", "high"), [("obs", 0.0, 1e-5), ("activation", 1e-2, 10.0)])
def test_a_channel_that_another_repeats_goes_first(score: str, low: float, high: float) -> None:
    model, x = _twins(), _random(80, 5)
    options: dict[str, Any] = {"sparsity": 0.125, "solve": "least_squares", "normalize": None, "progress": False}
    small = prune_structured(model, x[:2], data=x, score=score, **options)
    fresh = _random(40, 5, seed=3)
    with torch.no_grad():
        error = float((small.module(fresh) - model(fresh)).abs().max())
    assert low <= error < high


def test_readers_of_flattened_channels_and_of_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 8, groups=2), nn.Flatten(), nn.Linear(8 * 16, 2))
    program = trace(model.double().eval(), _random(2, 3, 4, 4))
    facts = symmetry(program)
    grouped = model[2].weight.detach().view(2, 4, 3, 9)
    inner = next(g for g in facts.groups if g.parent is not None and g.size == 3)
    member = next(m for m in inner.members if m.role == "in")
    for block, (features, rows) in enumerate(features_along(facts, inner, member.fqn, member.dim, model[2].weight)):
        assert features.tolist() == [3 * block, 3 * block + 1, 3 * block + 2]
        assert torch.equal(rows, grouped[block].transpose(0, 1).reshape(3, -1))
    last = model[4].weight.detach().view(2, 8, 16)
    outer = next(g for g in facts.groups if any(m.fqn == "4.weight" for m in g.members) and g.parent is not None)
    pairs = list(features_along(facts, outer, "4.weight", 1, model[4].weight.detach()))
    assert len(pairs) == 16
    for copy, (features, rows) in enumerate(pairs):
        assert torch.equal(rows, last[:, features, copy].T)


class Attention(nn.Module):
    """Two heads of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.usefixtures("undamped")
def test_queries_and_keys_stand_for_each_other() -> None:
    torch.manual_seed(0)
    model, x = Attention().double().eval(), _random(12, 5, 6)
    program = trace(model, x[:2])
    facts = symmetry(program)
    group = next(g for g in facts.groups if {m.fqn for m in g.members} >= {"q.weight", "k.weight"} and g.size == 3)
    moments = second_moments(program, facts, x.split(4), progress=False)
    energies, order = (
        channel_scores(program, facts, name, moments=moments)[group.index] for name in ("activation", "obs")
    )
    with torch.no_grad():
        queries, keys = (layer(x).reshape(-1, 2, 3) for layer in (model.q, model.k))
    wanted = (queries.square().mean(0) * keys.square().mean(0)).sqrt().numpy()
    np.testing.assert_allclose(energies, wanted, rtol=CLOSE)
    for head in range(2):
        q, k = queries[:, head], keys[:, head]
        logits = k @ q.T  # between all pairs of tokens; the queries are what is fitted
        losses = [_least_squares(k, logits, [c for c in range(3) if c != channel]) / len(q) for channel in range(3)]
        first = int(np.argmin(order[head]))
        assert first == int(np.argmin(losses))
        assert order[head][first] == pytest.approx(math.sqrt(min(losses)), rel=CLOSE)


def test_too_many_features_go_by_their_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _twins(), _random(80, 5)
    program = trace(model, x[:2])
    facts = symmetry(program)
    moments = second_moments(program, facts, [x], progress=False)
    scores = {name: channel_scores(program, facts, name, moments=moments)[0] for name in ("activation", "obs")}
    assert not np.allclose(scores["activation"], scores["obs"])
    monkeypatch.setattr(elimination, "WIDEST", 7)
    np.testing.assert_array_equal(channel_scores(program, facts, "obs", moments=moments)[0], scores["activation"])
