"""Random networks of a grammar through every pass: nothing wrong, no raw error, no false alarm, no refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.generated import difference, moved_copy, outcomes
from benchmarks.grammar import network

NETWORKS = 50
# the fewest found of these that hold every kind of block and layout; the benchmark runs a thousand
SAMPLE = (0, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 16, 17, 18, 20, 21, 22, 26, 30, 33, 43, 45, 47, 48, 49)


@pytest.mark.parametrize("seed", SAMPLE)
def test_a_random_network_goes_through_every_pass(seed: int) -> None:
    unfit = [outcome for outcome in outcomes(seed) if outcome.verdict not in ("right", "missed")]
    assert not unfit, network(seed)[0].names()


def test_the_grammar_speaks_every_layout_and_gives_the_same_network_again() -> None:
    models = [network(seed)[0] for seed in range(NETWORKS)]
    assert {model.layout for model in models} == {"vector", "tokens", "words", "line", "image"}
    kinds = {name for model in models for name in model.names()}
    assert len(kinds) > 50
    assert {name for seed in SAMPLE for name in models[seed].names()} == kinds
    assert {models[seed].layout for seed in SAMPLE} == {model.layout for model in models}
    again, x = network(3)
    assert torch.equal(again(x), models[3](x))


def test_a_network_that_is_not_moved_as_a_whole_is_noticed() -> None:
    """Negative control: a copy whose first layer alone is permuted computes something else."""
    model, x = network(1)
    moved = moved_copy(model, x, 1)
    assert not difference(model(x), moved(x))
    broken = copy.deepcopy(model)
    stem = next(module for module in broken.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)))
    stem.weight.data = stem.weight.data.flip(0)
    assert difference(model(x), broken(x))
