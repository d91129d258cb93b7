"""BalanceAttention: queries and keys, values and outputs in the basis of their singular vectors.

Attention sees W_QᵀW_K and W_O W_V of each head, so each pair is free up to an invertible T: W_Q → T W_Q, W_K → T⁻ᵀ
W_K. Its canonical form is balanced: of M = W_Qᵀ W_K = U S Vᵀ the sides become √S Uᵀ and √S Vᵀ, channels by falling
singular value and each channel's sign by the largest entry of its first side. Of all pairs with the same product it
has the smallest sum of squares. Biases are columns of their weights ([W b] acts on [x; 1]) and are carried along. M
is of rank d, the size of a head: with thin factors W_Qᵀ = Q₁R₁ and W_Kᵀ = Q₂R₂ only R₁R₂ᵀ (d × d) is decomposed.
Rotary embeddings and normalised queries or keys do not commute with T; such pairs are left with a note. With grouped
queries one T acts on all the heads that share a key or value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vfx.analyse.symmetry import symmetry
from vfx.freedom.attention import Pair, Side, attention_pairs
from vfx.program import Program
from vfx.rewrite import Pass


class BalanceAttention(Pass):
    """Balance q–k and v–o pairs of every head, in every weight set."""

    preserves_function = True
    changes_values = True

    def __init__(self, verify: bool = True):
        self.verify = verify

    def apply(self, program: Program) -> Program:
        pairs, notes = attention_pairs(symmetry(program))
        sets = [dict(weights) for weights in program.weights]
        for weights in sets:
            for pair in pairs:
                _balance(weights, pair)
        result = program.with_weights(sets, f"BalanceAttention({len(pairs)} pairs)")
        return replace(result, notes=(*program.notes, *notes))


def _balance(weights: dict[str, Tensor], pair: Pair) -> None:
    for head in range(len(pair.first[0].rows)):
        balanced = _balanced(*(_stacked(weights, side, head) for side in (pair.first, pair.second)))
        for side, values in zip((pair.first, pair.second), balanced):
            _write(weights, side, head, values)


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(d, n) and (d, m) to the balanced sides of the same product firstᵀ second."""
    (q1, r1), (q2, r2) = (torch.linalg.qr(side.T) for side in (first, second))
    u, s, vt = torch.linalg.svd(r1 @ r2.T)
    size = len(first)
    found = [torch.zeros_like(side) for side in (first, second)]
    for side, basis in zip(found, ((q1 @ u).T, vt @ q2.T)):
        side[: len(s)] = s.sqrt()[:, None] * basis[: len(s)] if len(s) <= size else basis[:size]
    sign = torch.where(found[0].gather(1, found[0].abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    return found[0] * sign, found[1] * sign


def _stacked(weights: dict[str, Tensor], sides: Sequence[Side], head: int) -> Tensor:
    """The rows of one head in a weight and its bias, with all copies, side by side: (d, n)."""
    parts = [weights[s.fqn].double().cpu().movedim(s.dim, 0)[torch.from_numpy(s.rows[head])] for s in sides]
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def _write(weights: dict[str, Tensor], sides: Sequence[Side], head: int, values: Tensor) -> None:
    start = 0
    for side in sides:
        old = weights[side.fqn]
        moved = old.movedim(side.dim, 0).clone()
        index = torch.from_numpy(side.rows[head]).to(old.device)
        width = moved[0].numel() * index.shape[1]
        moved[index] = values[:, start : start + width].reshape(*index.shape, *moved.shape[1:]).to(moved)
        weights[side.fqn] = moved.movedim(0, side.dim).contiguous()
        start += width
