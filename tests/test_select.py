"""EL2N scores against numpy, and the subsets that follow from them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

import vfx
from tests.conftest import edges
from vfx.errors import ArgumentError, DataError

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(90, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 3, (90,), generator=GENERATOR)
BATCHES = list(zip(X.split(20), Y.split(20)))


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def pair() -> list[nn.Module]:
    return edges(build, X)


@torch.no_grad()
def literal(models: list[nn.Module], labels: Tensor) -> np.ndarray[Any, Any]:
    scores = np.zeros(len(X))
    for model in models:
        logits = model(X).numpy()
        exponents = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponents / exponents.sum(1, keepdims=True)
        for i, y in enumerate(labels.tolist()):
            error = probabilities[i].copy()
            error[y] -= 1
            scores[i] += np.sqrt((error**2).sum()) / len(models)
    return scores


def test_el2n_is_the_mean_over_models(pair: list[nn.Module]) -> None:
    before = copy.deepcopy(pair[0].train().state_dict())
    expected = literal(pair, Y)
    for models in (pair, vfx.trace(pair, X[:2])):
        found = vfx.select(BATCHES, 10, "easy", models=models, progress=False)
        np.testing.assert_allclose(found.scores, expected, rtol=1e-10)
    assert pair[0].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair[0].state_dict().items())
    alone = vfx.select(BATCHES, 10, "easy", models=pair[0], progress=False)
    np.testing.assert_allclose(alone.scores, literal(pair[:1], Y), rtol=1e-10)
    assert not np.allclose(alone.scores, expected, rtol=1e-3)


def test_easy_and_hard_are_the_ends_of_the_ranking(pair: list[nn.Module]) -> None:
    ranks = np.argsort(literal(pair, Y), kind="stable")
    easy = vfx.select(BATCHES, 15, "easy", models=pair, progress=False)
    hard = vfx.select(BATCHES, 15, "hard", models=pair, progress=False)
    assert easy.indices.tolist() == sorted(ranks[:15].tolist())
    assert hard.indices.tolist() == sorted(ranks[-15:].tolist())
    middle = vfx.select(BATCHES, 10, models=pair, quantiles=(0.4, 0.6), progress=False)
    assert set(middle.indices.tolist()) <= set(ranks[36:54].tolist())
    with pytest.raises(ArgumentError, match="lie between the quantiles"):
        vfx.select(BATCHES, 40, models=pair, quantiles=(0.4, 0.6), progress=False)


def test_batches_hold_the_chosen_samples_in_the_data_s_own_form(pair: list[nn.Module]) -> None:
    found = vfx.select(BATCHES, 30, "hard", models=pair, progress=False)
    inputs, labels = (torch.cat(parts) for parts in zip(*found))
    assert torch.equal(inputs, X[found.indices])
    assert torch.equal(labels, Y[found.indices])
    assert found.samples == 30
    assert len(found) == len(found.batches)
    dicts = [{"input": x, "labels": y, "epoch": 3} for x, y in BATCHES]
    chosen = vfx.select(dicts, 30, "hard", models=vfx.trace(pair, X[:2]), progress=False)
    assert torch.equal(torch.cat([batch["input"] for batch in chosen]), X[found.indices])
    assert all(batch["epoch"] == 3 for batch in chosen)
    tensor = vfx.select(X, 30, "hard", models=pair, labels=Y, progress=False)
    assert torch.equal(torch.cat(list(tensor)), X[found.indices])
    merged = vfx.merge(pair, X[:2], data=found, normalize="rescale", progress=False)
    by_hand = vfx.merge(pair, X[:2], data=[X[found.indices]], normalize="rescale", progress=False)
    torch.testing.assert_close(merged.module(X), by_hand.module(X), rtol=1e-9, atol=1e-9)


def test_random_is_seeded_and_shares_are_numbers() -> None:
    one, same, other = (vfx.select(BATCHES, 0.1, seed=seed, progress=False) for seed in (1, 1, 2))
    assert one.indices.tolist() == same.indices.tolist() != other.indices.tolist()
    assert one.samples == 9
    assert len(set(one.indices.tolist())) == 9
    assert vfx.select(BATCHES, 1.0).samples == 90
    assert vfx.select(BATCHES, 1).samples == 1


def test_classes_are_balanced_while_they_last(pair: list[nn.Module]) -> None:
    rare = torch.where(torch.arange(90) % 15 == 0, 2, torch.arange(90) % 2)  # six of class 2
    found = vfx.select(X, 30, "balanced", labels=rare)
    assert sorted(torch.bincount(rare[found.indices]).tolist()) == [6, 12, 12]
    even = vfx.select(X, 15, "balanced", labels=rare)
    assert torch.bincount(rare[even.indices]).tolist() == [5, 5, 5]
    hard = vfx.select(X, 15, "hard", labels=rare, models=pair, balanced=True, progress=False)
    scores = literal(pair, rare)
    for label in range(3):
        here = np.flatnonzero(rare.numpy() == label)
        expected = here[np.argsort(scores[here], kind="stable")[-5:]]
        assert sorted(hard.indices[rare[hard.indices] == label].tolist()) == sorted(expected.tolist())


def test_missing_labels_are_refused_with_the_way_out(pair: list[nn.Module]) -> None:
    for strategy in ("easy", "balanced"):
        with pytest.raises(DataError, match="pseudo_labels=True"):
            vfx.select(X, 5, strategy, models=pair, progress=False)
    with torch.no_grad():
        ensemble = torch.stack([model(X).softmax(1) for model in pair]).mean(0).argmax(1)
    found = vfx.select(X, 5, "easy", models=pair, pseudo_labels=True, progress=False)
    assert torch.equal(found.labels, ensemble)
    np.testing.assert_allclose(found.scores, literal(pair, ensemble), rtol=1e-10)
    ignored = vfx.select(BATCHES, 5, "easy", models=pair, pseudo_labels=True, progress=False)
    assert torch.equal(ignored.labels, ensemble)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "nonsense"}, "strategy must be .random., .easy."),
        ({"strategy": "easy"}, "models="),
        ({"n": 0}, "0 samples"),
        ({"n": 91}, "the data hold 90"),
        ({"n": 1.5}, "share"),
        ({"n": "ten"}, "number"),
        ({"quantiles": (0.5, 0.5)}, "quantiles"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        vfx.select(BATCHES, **{"n": 5, **options})


def test_data_are_checked(pair: list[nn.Module]) -> None:
    with pytest.raises(DataError, match="no samples"):
        vfx.select([], 1)
    with pytest.raises(DataError, match="one class for each sample"):
        vfx.select(X, 5, "balanced", labels=Y[:50])
    with pytest.raises(DataError, match="such as 7"):
        vfx.select([(X, Y + 7 - Y.max())], 5, "easy", models=pair, progress=False)
    with pytest.raises(ArgumentError, match="classifiers"):
        vfx.select([(X[:, None], Y)], 5, "easy", models=pair, progress=False)


class Shuffling:
    """A loader with another order in each pass."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(90)
        return iter([(X[order[:45]], Y[order[:45]]), (X[order[45:]], Y[order[45:]])])


def test_the_order_of_the_data_is_fixed_or_refused() -> None:
    dataset = TensorDataset(X, Y)
    expected = vfx.select(BATCHES, 12, "balanced").indices.tolist()
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    found = vfx.select(loader, 12, "balanced")
    assert found.indices.tolist() == expected
    assert torch.equal(torch.cat([x for x, _ in found]), X[found.indices])
    assert vfx.select(iter(BATCHES), 12, "balanced").indices.tolist() == expected
    for other in (
        DataLoader(dataset, sampler=SubsetRandomSampler(range(50))),
        DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 10, True)),
    ):
        with pytest.raises(DataError, match="order"):
            vfx.select(other, 5)
    with pytest.raises(DataError, match="another order"):
        vfx.select(Shuffling(), 5)


def test_a_share_that_is_no_number_is_refused() -> None:
    with pytest.raises(ArgumentError, match="select: n must be a finite number, got nan"):
        vfx.select([torch.randn(16, 4)], float("nan"))


def test_an_endless_generator_ends_at_max_samples(pair: list[nn.Module]) -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from BATCHES

    for options in ({}, {"strategy": "balanced"}, {"strategy": "hard", "models": pair, "progress": False}):
        found = vfx.select(endless(), 12, max_samples=50, **options)
        assert found.indices.tolist() == vfx.select([(X[:50], Y[:50])], 12, **options).indices.tolist()
        assert torch.equal(torch.cat([x for x, _ in found]), X[found.indices])
    with pytest.raises(ArgumentError, match="n=51 means 51 samples; the data hold 50"):
        vfx.select(endless(), 51, max_samples=50)
    with pytest.raises(ArgumentError, match="max_samples must be at least 1"):
        vfx.select(X, 5, max_samples=0)
