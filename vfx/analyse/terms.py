"""Axis terms and what operators do to one axis: tie it to another, put axes side by side, take positions.

An axis is a product of factors: label rows (``vfx.analyse.axes``) or an ``Opaque`` range of positions that never move
(batch, pixels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from vfx.analyse.axes import Leaves, unique_labels
from vfx.analyse.rows import beside, row_ids
from vfx.analyse.store import Rows

MAX_ENUMERATED = 1 << 22  # positions: a merged axis longer than this is pinned instead of written out


@dataclass(frozen=True, eq=False)
class Opaque:
    """A range of positions that never move, not written out (it may be as long as the batch)."""

    size: int
    reason: str


Factor = Opaque | Rows


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis: factors in row-major order."""

    factors: tuple[Factor, ...]

    @cached_property
    def size(self) -> int:
        return prod(map(factor_size, self.factors))

    @cached_property
    def opaque(self) -> bool:
        """Whether every factor is."""
        return all(isinstance(factor, Opaque) for factor in self.factors)


def factor_size(factor: Factor) -> int:
    return factor.size if isinstance(factor, Opaque) else len(factor)


class Axes:
    """Operations on axes over one store of leaves."""

    def __init__(self) -> None:
        self.leaves = Leaves()

    def fresh(self, size: int) -> Axis:
        """An unconstrained axis."""
        if size > MAX_ENUMERATED:
            return Axis((Opaque(size, "an axis too long to analyse"),))
        return Axis((self.leaves.fresh(size),))

    def opaque(self, size: int, reason: str) -> Axis:
        """An axis that is pinned without being written out."""
        return Axis((Opaque(size, reason),)) if size > 1 else self.fresh(1)

    def pin(self, axis: Axis, reason: str) -> None:
        for factor in axis.factors:
            if not isinstance(factor, Opaque):
                self.leaves.pin(factor, reason)

    def rows(self, axis: Axis) -> Rows | None:
        """The axis written out position by position; None if it is too long for that."""
        if len(axis.factors) == 1 and not isinstance(axis.factors[0], Opaque):
            return axis.factors[0]
        if axis.size > MAX_ENUMERATED:
            return None
        result: Rows | None = None
        for factor in axis.factors:
            rows = self.leaves.pinned(factor.size, factor.reason) if isinstance(factor, Opaque) else factor
            result = rows if result is None else self._outer(result, rows)
        return result if result is not None else self.leaves.fresh(1)

    def _outer(self, left: Rows, right: Rows) -> Rows:
        """Labels of the row-major product of two axes."""
        i, j = np.divmod(np.arange(len(left) * len(right)), len(right))
        tag = self.leaves.join(left[i, 0], right[j, 0])
        return beside(tag, left[i, 1:], right[j, 1:])

    def tie(self, left: Axis, right: Axis) -> Axis:
        """Make two axes of equal size carry the same action and return one of them."""
        if left is not right and not (left.opaque and right.opaque):
            for a, b in _aligned(left, right):
                self._tie_group(a, b)
        return left

    def _tie_group(self, left: Axis, right: Axis) -> None:
        if left.opaque and right.opaque:
            return
        if left.opaque or right.opaque:
            pinned, other = (left, right) if left.opaque else (right, left)
            reason = pinned.factors[0].reason  # type: ignore[union-attr]
            self.pin(other, reason)
            return
        a, b = self.rows(left), self.rows(right)
        if a is None or b is None:
            for axis in (left, right):
                self.pin(axis, "a merged axis too long to analyse")
            return
        self.leaves.unify(a, b)

    def concatenate(self, parts: Sequence[Axis]) -> Axis:
        """The axes one after the other; each part gets a tag, so that equal labels stay apart."""
        written = [self.rows(part) for part in parts]
        if any(rows is None for rows in written):
            for part in parts:
                self.pin(part, "a merged axis too long to analyse")
            return self.opaque(sum(part.size for part in parts), "a merged axis too long to analyse")
        tags = self.leaves.tags(len(parts))
        width = max(rows.shape[1] for rows in written if rows is not None)
        tagged = []
        for rows, tag in zip(written, tags):
            assert rows is not None
            wide = np.full((len(rows), width), -1, np.int64)
            wide[:, 1 : rows.shape[1]] = rows[:, 1:]
            wide[:, 0] = self.leaves.join(rows[:, 0], np.full(len(rows), tag))
            tagged.append(wide)
        return Axis((np.concatenate(tagged),))

    def take(self, axis: Axis, index: Any) -> Axis:
        """The positions ``index`` (slice or integer array) of an axis, in that order."""
        chosen = np.arange(axis.size)[index] if axis.size <= MAX_ENUMERATED else None
        if chosen is not None and len(chosen) == axis.size and (chosen == np.arange(axis.size)).all():
            return axis
        if axis.opaque:
            size = len(chosen) if chosen is not None else len(range(*index.indices(axis.size)))
            return self.opaque(size, axis.factors[0].reason)  # type: ignore[union-attr]
        rows = self.rows(axis)
        if rows is None or chosen is None:
            self.pin(axis, "part of a merged axis too long to analyse")
            return self.opaque(len(range(*index.indices(axis.size))), "part of a merged axis")
        return Axis((self._cut(rows[chosen]),))

    def _cut(self, part: Rows) -> Rows:
        """Labels used apart from the rest: leaves are split so that the part is closed under the action."""
        part = self.leaves.resolve(part)
        own = self.leaves.apart(part)
        if own is not None:
            return own
        if not unique_labels(part):
            rank = _occurrence(part)
            part = part.copy()
            part[:, 0] = self.leaves.join(part[:, 0], self.leaves.tags(int(rank.max()) + 1)[rank])
        self.leaves.close(part)
        return part


def _occurrence(rows: Rows) -> Rows:
    """How often each label has occurred before."""
    inverse = row_ids(rows)
    order = np.argsort(inverse, kind="stable")
    ordered = inverse[order]
    first = np.searchsorted(ordered, ordered, side="left")
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows)) - first
    return rank


def _aligned(left: Axis, right: Axis) -> list[tuple[Axis, Axis]]:
    """Matching runs of factors of two axes of equal size."""
    if len(left.factors) == len(right.factors) == 1:
        return [(left, right)]
    a = [f for f in left.factors if factor_size(f) != 1]
    b = [f for f in right.factors if factor_size(f) != 1]
    pairs = []
    while a:
        x, y = [a.pop(0)], [b.pop(0)]
        while (p := prod(map(factor_size, x))) != (q := prod(map(factor_size, y))):
            if p < q:
                x.append(a.pop(0))
            else:
                y.append(b.pop(0))
        pairs.append((Axis(tuple(x)), Axis(tuple(y))))
    return pairs
