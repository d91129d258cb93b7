"""Queries of heads that lost channels: fitted to the dense network's attention logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, lively
from torch import Tensor, nn
from vfx.passes.reconstruct import Reconstruct
from vfx.passes.remove_channels import RemoveChannels

from vfx.api import prune_structured, trace
from vfx.program import Execution, Program, schedule
from vfx.pruning.removed import Removed
from vfx.reconstruct.logits import visible
from vfx.reconstruct.references import Reference

HEADS, SIZE, TOKENS = 2, 6, 5
X = torch.randn(40, TOKENS, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Attention(nn.Module):
    """Self-attention of two heads, with or without a mask that hides the last token."""

    def __init__(self, masked: bool = False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(9, HEADS * SIZE) for _ in range(3))
        self.out, self.masked = nn.Linear(HEADS * SIZE, 4), masked

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(-1, TOKENS, HEADS, SIZE).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = torch.tensor([[True] * (TOKENS - 1) + [False]]) if self.masked else None
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def _networks(masked: bool = False) -> tuple[Program, Program, Removed]:
    torch.manual_seed(0)
    dense = trace(lively(Attention(masked).double(), X), X[:2])
    removed = RemoveChannels(0.34).run(dense)
    return dense, removed.program, removed.record


def _operands(program: Program) -> tuple[Tensor, Tensor, float]:
    """Queries, keys and scale at the attention call."""
    run = Execution(
        program.graph, program.weights[0], [X], [s._replace(in_place=None) for s in schedule(program.graph)]
    )
    while "scaled_dot" not in run.plan[run.position].node.name:
        run.step()
    node: Any = run.plan[run.position].node
    q, k = (run.value(a) for a in node.args[:2])
    return q, k, node.kwargs.get("scale") or q.shape[-1] ** -0.5


def _error(small: Program, dense: Program, tokens: int = TOKENS) -> float:
    (q, k, s), (dense_q, dense_k, dense_s) = _operands(small), _operands(dense)
    difference = s * q @ k.mT - dense_s * dense_q @ dense_k.mT
    return float(difference[..., :tokens, :tokens].square().sum())


@torch.no_grad()
def test_queries_are_turned_as_least_squares_on_all_logits_says() -> None:
    dense, small, removed = _networks()
    result = Reconstruct([Reference(dense, 1.0, removed.carry)], X, ridge=1e-9, progress=False)(small)
    q, k, scale = _operands(result)
    dense_q, dense_k, dense_scale = _operands(dense)
    assert q.shape[-1] < SIZE
    for head in range(HEADS):
        rows = torch.einsum("bni,bmk->bnmik", q[:, head], k[:, head]).flatten(3).flatten(0, 2)
        logits = (dense_q[:, head] @ dense_k[:, head].mT).flatten() * dense_scale / scale
        again = torch.linalg.lstsq(rows, logits[:, None], driver="gelsd").solution.reshape(q.shape[-1], -1)
        close(again, torch.eye(q.shape[-1], dtype=torch.float64), 1e-5)  # nothing is left to turn


@torch.no_grad()
def test_logits_come_nearer_to_the_dense_network(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small, removed = _networks()
    references = [Reference(dense, 1.0, removed.carry)]
    fitted = Reconstruct(references, X, progress=False)(small)
    monkeypatch.setattr("vfx.passes.reconstruct.logit_units", lambda *arguments: [])
    plain = Reconstruct(references, X, progress=False)(small)
    assert _error(fitted, dense) < 0.9 * _error(plain, dense)


@torch.no_grad()
def test_hidden_keys_do_not_count() -> None:
    dense, small, removed = _networks(masked=True)
    fitted = Reconstruct([Reference(dense, 1.0, removed.carry)], X, progress=False)(small)
    assert _error(fitted, dense, TOKENS - 1) < 0.9 * _error(small, dense, TOKENS - 1)
    seen = torch.tensor([[True, True, False], [True, False, False]])
    wanted = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    for mask in (seen, torch.where(seen, 0.0, float("-inf")), torch.where(seen, 0.0, torch.finfo(torch.float32).min)):
        assert torch.equal(visible(mask[None, None])[0, 0], wanted)


@torch.no_grad()
def test_whole_heads_are_left_alone() -> None:
    torch.manual_seed(0)
    dense = trace(lively(Attention().double(), X), X[:2])
    result = Reconstruct(dense, X, progress=False)(dense)
    close(result(X), dense(X), 1e-9)


class Packed(nn.Module):
    """torch's attention: queries, keys and values of all heads and samples packed on one axis."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(9, width), nn.Linear(width, 4)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


def _encoder(width: int, heads: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(9, width), layer, nn.Linear(width, 4))


@pytest.mark.parametrize("build", [Packed, _encoder])
@pytest.mark.parametrize(("width", "heads"), [(24, 2), (20, 4)])
def test_packed_heads_are_solved(build: Callable[[int, int], nn.Module], width: int, heads: int) -> None:
    torch.manual_seed(0)
    model = lively(build(width, heads).double(), X).eval()
    options: dict[str, Any] = {"sparsity": 0.5, "allocation": "uniform", "data": X, "normalize": None}
    options |= {"score": "magnitude", "progress": False}
    with torch.no_grad():
        solved, plain = (
            float((prune_structured(model, X[:2], solve=solve, **options).module(X) - model(X)).square().mean())
            for solve in ("least_squares", None)
        )
    assert solved < 0.5 * plain
