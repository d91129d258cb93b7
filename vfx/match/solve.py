"""The best map of one class on a gain: assignment, signed assignment, Procrustes.

With G = ⟨W₀, W₁⟩ between channels (size, size), the T of a class that maximises ⟨T, G⟩ is

- for permutations a linear assignment;
- for signed ones an assignment on what each pair of channels gives with its best signs (with one side |G|;
  *Signed-Permutation Coordinate Transport*, 2026), each side having a sign of its own;
- for orthogonal maps the polar factor U Vᵀ of G = U S Vᵀ (Procrustes; Schönemann 1966). Directions that G does not see
  are left as they are as far as possible. Maps that fix the vector of ones are found on the space orthogonal to it;
- for rotations of planes the same in each plane alone.

Beyond the compact classes there is no bounded maximum; networks are balanced first (``vfx.analyse.balance``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import numpy as np

from vfx.analyse.classes import Maps, turning, turns
from vfx.analyse.places import Index
from vfx.match.matcher import Gain, assign

ENUMERATED = 8  # free signs that are tried in all combinations
UNSEEN = 1e-13  # share of the largest singular value that the identity counts
Signs = frozenset[int]  # free signs whose product a side has


@dataclass(frozen=True)
class SignedOrders:
    """Orders (…, size) and, by free sign, what stands behind them (…, size)."""

    order: Index
    signs: Mapping[int, Gain]

    def __getitem__(self, where: Any) -> SignedOrders:
        return SignedOrders(self.order[where], {x: sign[where] for x, sign in self.signs.items()})

    def behind(self, signs: Signs) -> Gain:
        """The product (…, size) of some signs."""
        total = np.ones(self.order.shape)
        for x in signs:
            total = total * self.signs.get(x, 1.0)
        return total

    def matrix(self, signs: Signs) -> Gain:
        """The map (…, size, size) of a side with some signs."""
        return np.eye(self.order.shape[-1])[self.order] * self.behind(signs)[..., None]


def procrustes(gain: Gain, kind: Maps = Maps.ORTHOGONAL) -> tuple[Gain, Gain]:
    """T maximising ⟨T, G⟩ and that value, for a gain (…, size, size) or a stack of them."""
    if kind is Maps.ROTATIONS:
        numbers = turns(gain)
        turn = turning(np.where(numbers == 0, 1.0, numbers / np.where(numbers == 0, 1.0, np.abs(numbers))))
        return turn, (turn * gain).sum((-2, -1))
    size = gain.shape[-1]
    scale = np.linalg.norm(gain, axis=(-2, -1), keepdims=True)
    seen = gain + UNSEEN * np.where(scale > 0, scale, 1.0) * np.eye(size)
    if kind is Maps.ORTHOGONAL_ONES:
        ones = np.full((size, size), 1 / size)
        centre = np.eye(size) - ones
        seen = centre @ seen @ centre + ones * np.abs(seen).sum((-2, -1), keepdims=True)
    u, _, vt = np.linalg.svd(seen)
    turn = u @ vt
    return turn, (turn * gain).sum((-2, -1))


def assign_signed(gains: Mapping[Signs, Gain]) -> tuple[Index, dict[int, Gain]]:
    """The permutation, and each free sign by channel, that maximise Σ sign · G[c, p[c]] over the sides' gains.

    ``gains`` (size, size) by the free signs whose product multiplies them.
    """
    total, best = np.zeros_like(next(iter(gains.values()))), dict[int, Gain]()
    for sides in _independent(gains):
        value, signs = _best_signs({side: gains[side] for side in sides})
        total, best = total + value, best | signs
    permutation = assign(total)[0]
    rows = np.arange(len(permutation))
    return permutation, {x: best[x][rows, permutation] for x in sorted(best)}


def _independent(gains: Mapping[Signs, Gain]) -> list[list[Signs]]:
    """The sides apart that have no free sign in common, not even by way of others."""
    apart: list[list[Signs]] = []
    for side in gains:
        joined = [sides for sides in apart if any(side & other for other in sides)]
        apart = [sides for sides in apart if sides not in joined]
        apart.append([*chain.from_iterable(joined), side])
    return apart


def _best_signs(gains: Mapping[Signs, Gain]) -> tuple[Gain, dict[int, Gain]]:
    """What each pair of channels gives with its best signs (size, size), and these."""
    free = sorted(set().union(*gains))
    value = _signed(gains, {x: np.ones_like(next(iter(gains.values()))) for x in free})
    best = {x: np.ones_like(value) for x in free}
    if len(free) > ENUMERATED:
        return _in_turn(gains, best, value), best
    for choice in product((1.0, -1.0), repeat=len(free)):
        signed_value = _signed(gains, dict(zip(free, choice)))
        better = signed_value > value
        value = np.where(better, signed_value, value)
        for x, sign in zip(free, choice):
            best[x] = np.where(better, sign, best[x])
    return value, best


def assign_signed_pairs(gains: Mapping[Signs, Gain]) -> tuple[SignedOrders, Gain]:
    """The same for each pair of blocks, gains (n, n, size, size), and what each pair gives (n, n)."""
    count, _, size, _ = next(iter(gains.values())).shape
    orders, values = np.empty((count, count, size), np.int64), np.empty((count, count))
    signs = {x: np.ones(orders.shape) for x in sorted(set().union(*gains))}
    for i, j in np.ndindex(count, count):
        orders[i, j], signs_at = assign_signed({sides: gain[i, j] for sides, gain in gains.items()})
        for x, sign in signs_at.items():
            signs[x][i, j] = sign
        rows = np.arange(size)
        ones = {x: sign[:, None] for x, sign in signs_at.items()}
        values[i, j] = _signed({sides: gain[i, j] for sides, gain in gains.items()}, ones)[rows, orders[i, j]].sum()
    return SignedOrders(orders, signs), values


def _signed(gains: Mapping[Signs, Gain], signs: Mapping[int, float | Gain]) -> Gain:
    total = np.zeros_like(next(iter(gains.values())))
    for sides, gain in gains.items():
        factor: float | Gain = 1.0
        for x in sides:
            factor = factor * signs[x]
        total = total + factor * gain
    return total


def _in_turn(gains: Mapping[Signs, Gain], best: dict[int, Gain], value: Gain) -> Gain:
    """One sign after the other, while that gains."""
    while True:
        before = value
        for x in best:
            flipped = _signed(gains, best | {x: -best[x]})
            best[x] = np.where(flipped > value, -best[x], best[x])
            value = np.maximum(flipped, value)
        if (value == before).all():
            return value
