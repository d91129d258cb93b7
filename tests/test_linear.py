"""Equations 2 and 3: decompositions of linear networks against direct evaluation."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

import vfx
from vfx.diagnosis.linear import LinearLayer, decompose, elementary_symmetric, linear_layers
from vfx.errors import ArgumentError
from vfx.models.linear import LinearNet, linear_net

X = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net(residual: bool, seed: int = 0, depth: int = 6) -> LinearNet:
    torch.manual_seed(seed)
    return linear_net(depth, 8, 12, 5, residual).double().eval()


def agree(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth", [2, 3, 8])
@torch.no_grad()
def test_feature_and_offset_are_exact(residual: bool, depth: int) -> None:
    model = net(residual, depth=depth)
    found = decompose(linear_layers(vfx.trace(model, X[:2])), X)
    zero = model(torch.zeros_like(X[:1]))[0]
    agree(found.output, model(X))
    agree(found.feature, model(X) - zero)
    agree(found.offset, zero)
    assert len(found.features) == (depth - 1 if residual and depth > 2 else 1)


@torch.no_grad()
def test_equation_2_term_by_term_on_a_merged_network() -> None:
    """f_α(x) = Π W_α x + Σ_j (W_α^L … W_α^{j+1}) b_α^j."""
    pair = [net(False, seed) for seed in range(2)]
    merged = vfx.compile(pair, X[:2], passes=[vfx.Interpolate(0.3)]).module
    found = decompose(linear_layers(vfx.trace(merged, X[:2])), X)
    weights = [0.7 * a.weight + 0.3 * b.weight for a, b in zip(pair[0].layers, pair[1].layers)]
    biases = [0.7 * a.bias + 0.3 * b.bias for a, b in zip(pair[0].layers, pair[1].layers)]
    product = torch.eye(12, dtype=torch.float64)
    for weight in weights:
        product = weight @ product
    agree(found.features[0], X @ product.T)
    for j, bias in enumerate(biases):
        after = torch.eye(len(bias), dtype=torch.float64)
        for weight in weights[j + 1 :]:
            after = weight @ after
        agree(found.offsets[j][0], after @ bias)
    agree(found.output, merged(X))
    assert not torch.allclose(found.output, pair[0](X), rtol=1e-3)


@torch.no_grad()
def test_equation_3_term_by_term() -> None:
    """f(x) = W_L Σ_k e_k(W_2 … W_{L−1}) (W_1 x + b_1) + W_L Σ_j Σ_k e_k(W_{j+1} … W_{L−1}) b_j + b_L."""
    model = net(True)
    found = decompose(linear_layers(vfx.trace(model, X[:2])), X)
    first, *inner, last = model.layers
    middle = [layer.weight for layer in inner]
    for k in range(len(middle) + 1):
        agree(found.features[k], X @ first.weight.T @ _literal(middle, k).T @ last.weight.T)
        agree(found.offsets[0][k], last.weight @ _literal(middle, k) @ first.bias)
    for j, layer in enumerate(inner, start=1):
        later = middle[j:]
        assert len(found.offsets[j]) == len(later) + 1  # the sum starts at k = 0
        for k in range(len(later) + 1):
            agree(found.offsets[j][k], last.weight @ _literal(later, k) @ layer.bias)
    agree(found.offsets[-1][0], last.bias)


def _literal(matrices: list[Tensor], k: int) -> Tensor:
    """e_k as the sum over all j_1 < … < j_k of M_{j_k} … M_{j_1}."""
    total = torch.zeros(8, 8, dtype=torch.float64)
    for chosen in combinations(matrices, k):
        product = torch.eye(8, dtype=torch.float64)
        for matrix in chosen:
            product = matrix @ product
        total = total + product
    return total


def test_elementary_symmetric_polynomials_keep_the_order() -> None:
    generator = torch.Generator().manual_seed(4)
    matrices = [torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(5)]
    for k, found in enumerate(elementary_symmetric(matrices)):
        agree(found, _literal(matrices, k))
    product = torch.eye(8, dtype=torch.float64)
    for matrix in matrices:
        product = (torch.eye(8, dtype=torch.float64) + matrix) @ product
    agree(torch.stack(elementary_symmetric(matrices)).sum(0), product)
    turned = elementary_symmetric(matrices[::-1])
    assert not torch.allclose(turned[2], _literal(matrices, 2), rtol=1e-3)
    with pytest.raises(ArgumentError, match="at least one"):
        elementary_symmetric([])


class Bent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(12, 12, bias=False), nn.Linear(12, 12), kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "relu":
            return self.b(x.relu())
        if self.kind == "other":
            return self.a(x) + self.b(x)
        return torch.add(x, self.b(x), alpha=2 if self.kind == "alpha" else 1)


@torch.no_grad()
def test_networks_that_are_not_linear_are_refused() -> None:
    model = Bent("sum").double().eval()
    agree(decompose(linear_layers(vfx.trace(model, X[:2])), X).output, model(X))
    for kind in ("relu", "other", "alpha"):
        with pytest.raises(ArgumentError, match="linear"):
            linear_layers(vfx.trace(Bent(kind).double().eval(), X[:2]))
    with pytest.raises(ArgumentError, match="square"):
        decompose([LinearLayer(torch.ones(2, 3), None, True)], torch.ones(1, 3))
    with pytest.raises(ArgumentError, match="at least one layer"):
        decompose([], X)
