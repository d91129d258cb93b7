"""Masks that keep N of M along both axes: the best of all by other algorithms, in every layout, behind a solve, too."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import networkx as nx
import pytest
import torch
from conftest import close, network
from scipy.optimize import linear_sum_assignment
from test_layerwise_scores import EXACT, LAYERS, hessian, literal_surgery, weight_of
from torch import Tensor, nn

from vfx.api import prune, trace
from vfx.errors import ArgumentError
from vfx.pruning.selection import selection
from vfx.pruning.targets import find_targets
from vfx.pruning.transposable import transposable

SCOPE = "transposable 2:4"


def _scores(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _best(block: Tensor) -> Tensor:
    """The best 4 × 4 mask of two entries in each row and column: two permutations that never meet, all tried."""
    found, best = torch.zeros(4, 4, dtype=torch.bool), -1.0
    for one, other in product(permutations(range(4)), repeat=2):
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[range(4), one] = True
        mask[range(4), other] = True
        if mask.sum() == 8 and float(block[mask].sum()) > best:
            found, best = mask, float(block[mask].sum())
    return found


def test_blocks_of_four_are_the_best_of_all() -> None:
    scores = _scores(30, 4)
    assert torch.equal(transposable(scores, 2), torch.stack([_best(block) for block in scores]))


@pytest.mark.parametrize("size", [3, 4, 7, 8])
def test_one_entry_in_each_row_is_an_assignment(size: int) -> None:
    """Kept alone, or gone alone."""
    scores = _scores(70 if size == 8 else 9, size)
    wanted = torch.zeros(scores.shape, dtype=torch.bool)
    for block, mask in zip(scores, wanted):
        mask[linear_sum_assignment(block.numpy(), maximize=True)] = True
    assert torch.equal(transposable(scores, 1), wanted)
    assert torch.equal(~transposable(-scores, size - 1), wanted)


def test_larger_blocks_are_flows_of_least_cost() -> None:
    size, keep = 6, 3
    scores = _scores(3, size, seed=2).mul(1000).round()
    for block, mask in zip(scores, transposable(scores, keep)):
        graph = nx.DiGraph()
        for k in range(size):
            graph.add_edge("from", ("row", k), capacity=keep, weight=0)
            graph.add_edge(("column", k), "to", capacity=keep, weight=0)
        for row, column in product(range(size), repeat=2):
            graph.add_edge(("row", row), ("column", column), capacity=1, weight=-int(block[row, column]))
        cost = nx.cost_of_flow(graph, nx.max_flow_min_cost(graph, "from", "to"))
        assert int(block[mask].sum()) == -cost
        assert (mask.sum(0) == keep).all()
        assert (mask.sum(1) == keep).all()


def test_scales_and_shifts_do_not_matter() -> None:
    scores = _scores(20, 8)
    assert torch.equal(transposable(scores, 4), transposable(scores * 1e-12 + 3e-12, 4))
    tied = transposable(torch.zeros(5, 8, 8), 4)
    assert (tied.sum(1) == 4).all()
    assert (tied.sum(2) == 4).all()


# networks -------------------------------------------------------------------------------------------------------------


def _layouts() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 8),
    )  # fmt: skip


def _kept(program: Any, weights: Any) -> list[Tensor]:
    """(taps, outputs, inputs) of each layer's mask."""
    return [target.matrix(weights[target.name] != 0).permute(2, 0, 1) for target in find_targets(program)[0]]


def _runs_along_both(mask: Tensor) -> bool:
    ways = (mask.unfold(1, 4, 4).sum(-1), mask.unfold(2, 4, 4).sum(-1))
    return all(bool((way == 2).all()) for way in ways)


X = torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OPTIONS: dict[str, Any] = {"protect": (), "progress": False}


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("solve", [None, "least_squares"])
def test_masks_run_along_both_axes_of_every_layout(score: str, solve: str | None) -> None:
    model = network(_layouts, X)
    result = prune(model, X[:2], score=score, scope=SCOPE, data=X, solve=solve, normalize=None, **OPTIONS)
    masks = _kept(result.program, result.program.weights[0])
    assert all(map(_runs_along_both, masks))
    assert result.report.sparsity == 0.5
    plain = prune(model, X[:2], score=score, scope="2:4", data=X, solve=None, normalize=None, **OPTIONS)
    assert not all(map(_runs_along_both, _kept(plain.program, plain.program.weights[0])))  # the control


def test_magnitudes_of_a_mask_are_the_best_sum() -> None:
    model = network(_layouts, X)
    result = prune(model, scope=SCOPE, example_inputs=X[:2], normalize=None, **OPTIONS)
    masks = _kept(result.program, result.program.weights[0])
    assert len(masks) > 2
    for target, kept in zip(find_targets(trace(model, X[:2]))[0], masks, strict=True):
        matrix = target.matrix(dict(model.named_parameters())[target.name].detach().abs())
        for tap, outputs, inputs in product(*(range(0, size, step) for size, step in zip(kept.shape, (1, 8, 16)))):
            place = slice(outputs, outputs + 4), slice(inputs, inputs + 4)
            assert torch.equal(kept[tap][place], _best(matrix[*place, tap]))


def test_sparsegpt_chooses_blocks_on_the_weights_as_they_are_then() -> None:
    _, x, rows, matrices = LAYERS["linear"]
    model = network(lambda: nn.Linear(8, 4), x)
    result = prune(model, x[:2], score="sparsegpt", scope=SCOPE, data=x, solve=None, normalize=None, **OPTIONS)
    dense = matrices(weight_of(model))[0]

    def gone(costs: Tensor, start: int, end: int) -> Tensor:
        return ~torch.cat([_best(block) for block in costs.split(4)])

    close(matrices(weight_of(result.module))[0], literal_surgery(dense, hessian(rows(x)[0]), 4, gone), EXACT)


def test_sizes_that_do_not_divide_are_named() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(ArgumentError, match=r"4 does not divide the 6 outputs of '0\.weight'"):
        prune(model, torch.randn(2, 8), scope=SCOPE, **OPTIONS)
    for wrong in ("transposable", "transposable 4:4", "transposed 2:4"):
        with pytest.raises(ArgumentError):
            selection(wrong, None)
    assert (selection(SCOPE, None).keep, selection(SCOPE, None).of) == (2, 4)
