"""SparseGPT and ALPS against literal implementations of their steps, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, network
from torch import Tensor, nn

from vfx.api import prune, trace
from vfx.errors import ArgumentError
from vfx.pruning.scores.alps import ALPS, GROWTH, PATIENCE
from vfx.pruning.scores.once import ScoreOnce
from vfx.pruning.scores.score import Score
from vfx.pruning.scores.sparsegpt import SparseGPT
from vfx.pruning.selection import selection
from vfx.pruning.targets import find_targets

DAMPING = 0.01
EXACT = 1e-8


class Product(nn.Module):
    """A product with a weight that stands inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _columns(x: Tensor, kernel: int, **options: Any) -> Tensor:
    """The windows of a square convolution as rows."""
    return F.unfold(x, kernel, **options).transpose(1, 2).flatten(0, 1)


# name -> network, input, the rows that each group reads, and the weight as (groups, outputs, what an output reads)
Layer = tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], list[Tensor]], Callable[[Tensor], Tensor]]
_draw = torch.Generator().manual_seed(3)
_mix = torch.randn(8, 8, generator=_draw, dtype=torch.float64)
_flat = torch.randn(60, 8, generator=_draw, dtype=torch.float64) @ _mix  # correlated inputs
_pictures = torch.randn(9, 4, 6, 6, generator=_draw, dtype=torch.float64).cumsum(3)
LAYERS: dict[str, Layer] = {
    "linear": (lambda: nn.Linear(8, 6), _flat, lambda x: [x], lambda w: w[None]),
    "product": (Product, _flat, lambda x: [x], lambda w: w.T[None]),
    "convolution": (
        lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False),
        _pictures,
        lambda x: [_columns(x, 3, stride=2, padding=1)],
        lambda w: w.flatten(1)[None],
    ),
    "shared windows": (
        lambda: nn.Conv2d(4, 5, 3, padding=1),
        _pictures,
        lambda x: [_columns(x, 3, padding=1)],
        lambda w: w.flatten(1)[None],
    ),
    "groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        _pictures,
        lambda x: [_columns(part, 3) for part in x.chunk(2, 1)],
        lambda w: w.flatten(1).reshape(2, 3, -1),
    ),
}


def weight_of(module: nn.Module) -> Tensor:
    return next(p for p in module.parameters() if p.ndim > 1).detach()


def hessian(rows: Tensor) -> Tensor:
    gram = rows.T @ rows
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def literal_surgery(weight: Tensor, h: Tensor, block: int, gone: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """Columns from the first to the last, with the inverse Hessian of those that are left written out each time."""
    weight, count = weight.clone(), weight.shape[1]
    for start in range(0, count, block):
        end = min(start + block, count)
        inverses = [torch.linalg.inv(h[c:, c:]) for c in range(start, end)]
        costs = torch.stack([weight[:, c] ** 2 / inverses[c - start][0, 0] for c in range(start, end)], 1)
        removed = gone(costs, start, end)
        for c in range(start, end):
            inverse = inverses[c - start]
            step = torch.where(removed[:, c - start], weight[:, c] / inverse[0, 0], 0.0)
            weight[:, c:] -= step[:, None] * inverse[0][None]
            weight[:, c] = torch.where(removed[:, c - start], 0.0, weight[:, c])
    return weight


def cheapest(costs: Tensor, count: int) -> Tensor:
    """True at the ``count`` lowest of each row."""
    result = torch.zeros_like(costs, dtype=torch.bool)
    return result.scatter(1, costs.argsort(1)[:, :count], True)


@pytest.mark.parametrize("block", [4, 100])
@pytest.mark.parametrize("layer", LAYERS)
def test_sparsegpt_by_rows_is_the_optimal_brain_surgeons_steps(layer: str, block: int) -> None:
    build, x, rows, matrices = LAYERS[layer]
    model = network(build, x)
    result = prune(
        model, x[:2], sparsity=0.5, score=SparseGPT(block=block), scope="row", data=x, protect=(), solve=None,
        normalize=None, progress=False,
    )  # fmt: skip
    for dense, pruned, seen in zip(matrices(weight_of(model)), matrices(weight_of(result.module)), rows(x)):
        total, count = dense.shape[1] // 2, dense.shape[1]
        gone = lambda costs, start, end: cheapest(costs, total * end // count - total * start // count)  # noqa: E731, B023
        close(pruned, literal_surgery(dense, hessian(seen), block, gone), EXACT)
        assert ((pruned == 0).sum(1) == total).all()


@pytest.mark.parametrize("layer", ["linear", "product"])
def test_sparsegpt_by_layers_and_by_patterns(layer: str) -> None:
    build, x, rows, matrices = LAYERS[layer]
    model, options = network(build, x), {"data": x, "protect": (), "solve": None, "normalize": None, "progress": False}
    dense, h = matrices(weight_of(model))[0], hessian(rows(x)[0])
    whole = prune(model, x[:2], sparsity=0.3, score=SparseGPT(block=3), **options)  # type: ignore[arg-type]
    total = int(0.3 * dense.numel())

    def gone(costs: Tensor, start: int, end: int) -> Tensor:
        count = total * end // 8 - total * start // 8
        return cheapest(costs.reshape(1, -1), count).reshape(costs.shape)

    close(matrices(weight_of(whole.module))[0], literal_surgery(dense, h, 3, gone), EXACT)
    pattern = prune(model, x[:2], score="sparsegpt", scope="2:4", **options)  # type: ignore[arg-type]
    expected = literal_surgery(dense, h, 4, lambda costs, start, end: cheapest(costs, 2))
    close(matrices(weight_of(pattern.module))[0], expected, EXACT)


def test_patterns_of_convolutions_run_along_the_inputs_of_one_tap() -> None:
    build, x, rows, _ = LAYERS["convolution"]
    model = network(build, x)
    result = prune(model, x[:2], score="sparsegpt", scope="2:4", data=x, protect=(), solve=None, normalize=None)
    pruned, dense = weight_of(result.module), weight_of(model)
    assert ((pruned == 0).sum(1) == 2).all()  # of the four inputs of each output and tap
    order = torch.arange(36).reshape(4, 9).T.reshape(-1)
    expected = literal_surgery(
        dense.flatten(1)[:, order],
        hessian(rows(x)[0])[order][:, order],
        4,
        lambda costs, start, end: cheapest(costs, 2),
    )
    close(pruned.flatten(1)[:, order], expected, EXACT)


@pytest.mark.parametrize("scope", ["layer", "row", "1:2"])
@pytest.mark.parametrize("layer", LAYERS)
def test_alps_is_its_alternation_and_a_solve_on_the_support(layer: str, scope: str) -> None:
    build, x, rows, matrices = LAYERS[layer]
    model = network(build, x)
    sparsity = None if ":" in scope else 0.5
    result = prune(
        model, x[:2], sparsity=sparsity, score="alps", scope=scope, data=x, protect=(), solve=None, normalize=None,
        progress=False,
    )  # fmt: skip
    found = matrices(weight_of(result.module))
    hessians = [hessian(seen) for seen in rows(x)]
    supports = literal_supports(model, matrices, hessians, scope, sparsity, x)
    for dense, pruned, support, h in zip(matrices(weight_of(model)), found, supports, hessians):
        assert torch.equal(pruned != 0, support)
        for row, wanted, kept in zip(pruned, dense, support):
            close(row[kept], torch.linalg.solve(h[kept][:, kept], (h @ wanted)[kept]), EXACT)


def literal_supports(
    model: nn.Module, matrices: Callable[[Tensor], Tensor], hessians: list[Tensor], scope: str, sparsity: float | None,
    x: Tensor,
) -> Tensor:  # fmt: skip
    """Algorithm 1 of the paper, group by group; scopes reach over all groups."""
    chosen = selection(scope, sparsity)
    targets = find_targets(trace(model, x[:2]))[0]
    weight = weight_of(model)
    position = matrices(torch.arange(weight.numel()).reshape(weight.shape)).reshape(-1)

    def kept(parts: list[Tensor]) -> Tensor:
        scores = torch.zeros(weight.numel(), dtype=torch.float64)
        scores[position] = torch.stack(parts).square().reshape(-1)
        mask = chosen.masks(chosen.budgets(targets), {targets[0].name: scores.reshape(weight.shape)})
        return matrices(mask[targets[0].name])

    scales = [h.diagonal().sqrt() for h in hessians]
    scaled = [h / s[:, None] / s for h, s in zip(hessians, scales)]
    dense = [w * s for w, s in zip(matrices(weight), scales)]
    sparse, dual, rho = list(dense), [torch.zeros_like(w) for w in dense], 0.1
    support = looked = kept(dense)
    for step in range(1, 301):
        free = [
            torch.linalg.solve(h + rho * torch.eye(len(h), dtype=h.dtype), (w @ h - v + rho * d).T).T
            for h, w, v, d in zip(scaled, dense, dual, sparse)
        ]
        support = kept([w + v / rho for w, v in zip(free, dual)])
        sparse = [(w + v / rho) * s for w, v, s in zip(free, dual, support)]
        dual = [v + rho * (w - d) for v, w, d in zip(dual, free, sparse)]
        if step % PATIENCE == 0:
            changed = float((support != looked).sum() / support.sum())
            if changed == 0:
                break
            rho *= next(factor for share, factor in GROWTH if changed >= share)
            looked = support
    return support


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_errors_fall_from_magnitude_to_surgery_to_alps(scope: str) -> None:
    """Of what a layer gives on correlated inputs; magnitude is the control."""
    x = torch.randn(300, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64).cumsum(1)
    model = network(lambda: nn.Linear(30, 20), x)
    errors = []
    for score in ("magnitude", "sparsegpt", "alps"):
        result = prune(
            model, x[:2], sparsity=0.7, score=score, scope=scope, data=x, protect=(), solve=None, normalize=None,
            progress=False,
        )  # fmt: skip
        errors.append(float((result.module(x) - model(x)).detach().square().mean()))
    assert errors[2] < errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("score", ["sparsegpt", "alps"])
def test_steps_keep_what_went_away_and_end_at_the_exact_count(score: str) -> None:
    build, x, *_ = LAYERS["convolution"]
    model = network(lambda: nn.Sequential(build(), nn.ReLU(), nn.Conv2d(5, 3, 3, padding=1)), x)
    result = prune(
        model, x[:2], sparsity=0.6, score=score, scope="layer", data=x, steps=3, protect=(), solve=None, normalize=None,
        progress=False,
    )  # fmt: skip
    for index in (0, 2):
        weight = result.module[index].weight
        assert int((weight == 0).sum()) == int(0.6 * weight.numel())


class Transposed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.ReLU(),
            nn.Flatten(2), nn.Conv1d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv1d(4, 2, 1),
        )  # fmt: skip


@pytest.mark.parametrize("score", ["sparsegpt", "alps"])
def test_transposed_and_depthwise_layers_lose_less_than_by_magnitude(score: str) -> None:
    x = _pictures[:6]
    model = network(Transposed, x)
    errors = []
    for name in (score, "magnitude"):
        result = prune(
            model, x[:2], sparsity=0.5, score=name, scope="layer", data=x, protect=(), solve=None, normalize=None,
            progress=False,
        )  # fmt: skip
        assert result.report.sparsity == pytest.approx(0.5, abs=0.02)
        errors.append(float((result.module(x) - model(x)).detach().square().mean()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("make", [SparseGPT, ALPS])
def test_what_they_refuse(make: type[Score]) -> None:
    build, x, *_ = LAYERS["linear"]
    model = network(build, x)
    with pytest.raises(ArgumentError, match="layer by layer"):
        prune(model, x[:2], sparsity=0.5, score=make(), scope="global", data=x)
    with pytest.raises(ArgumentError, match="give data="):
        prune(model, x[:2], sparsity=0.5, score=make())
    with pytest.raises(ArgumentError, match="how earlier layers are pruned"):
        ScoreOnce(make())
    with pytest.raises(ArgumentError, match="damping"):
        make(damping=0.0)  # type: ignore[call-arg]


def test_inputs_that_never_vary_give_no_nan() -> None:
    x = torch.cat([_flat, torch.zeros(60, 3, dtype=torch.float64), _flat[:, :1]], 1)  # dead and duplicate inputs
    model = network(lambda: nn.Linear(12, 6), x)
    for score in ("sparsegpt", "alps"):
        result = prune(model, x[:2], sparsity=0.5, score=score, data=x, protect=(), solve=None, normalize=None)
        assert result.module.weight.isfinite().all()
        assert int((result.module.weight == 0).sum()) == 36
