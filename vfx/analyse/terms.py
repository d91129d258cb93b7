"""What operators do to one axis: tie it to another, put axes side by side, take positions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from vfx.analyse.axes import Leaves, unique_labels
from vfx.analyse.axis import Axis, Factor, Opaque, factor_size
from vfx.analyse.rows import row_ids
from vfx.analyse.store import NO_TAG, Rows, Store

MAX_ENUMERATED = 1 << 22  # positions: a merged axis longer than this is pinned instead of written out


class Axes:
    """Operations on axes over one store of leaves."""

    def __init__(self) -> None:
        self.leaves = Leaves()
        self.settled = False  # once inference is done, what is blank still is moved by no group

    def fresh(self, size: int) -> Axis:
        """An unconstrained axis."""
        if size > MAX_ENUMERATED:
            return Axis((Opaque(size, "an axis too long to analyse"),))
        return Axis.blank(size, self._leaf)

    def _leaf(self, size: int) -> tuple[Factor]:
        return (Opaque(size, "nothing varies along this axis") if self.settled else self.leaves.fresh(size),)

    def opaque(self, size: int, reason: str) -> Axis:
        """An axis that is pinned without being written out."""
        return Axis((Opaque(size, reason),)) if size != 1 else self.fresh(1)

    def pin(self, axis: Axis, reason: str) -> None:
        if axis.is_blank and axis.size > 1:
            axis.become(Axis((self.leaves.pinned(axis.size, reason),)))
            return
        for factor in axis.factors:
            if not isinstance(factor, Opaque):
                self.leaves.pin(factor, reason)

    def rows(self, axis: Axis) -> Rows | None:
        """The axis written out position by position; None if it is too long for that."""
        axis = axis.root
        if axis.written is not None:
            return axis.written
        if len(axis.factors) == 1 and not isinstance(axis.factors[0], Opaque):
            return axis.factors[0]
        if axis.size > MAX_ENUMERATED:
            return None
        result: Rows | None = None
        for factor in axis.factors:
            rows = self.leaves.pinned(factor.size, factor.reason) if isinstance(factor, Opaque) else factor
            result = rows if result is None else self._outer(result, rows)
        if not axis.opaque:
            axis.written = result
        return result if result is not None else self.leaves.fresh(1)

    def _outer(self, left: Rows, right: Rows) -> Rows:
        """Labels of the row-major product of two axes."""
        grid = np.empty((len(left), len(right), left.shape[1] + right.shape[1] - 1), np.int64)
        grid[:, :, 1 : left.shape[1]] = left[:, None, 1:]
        grid[:, :, left.shape[1] :] = right[:, 1:]
        if left[:, 0].any() and right[:, 0].any():
            tags = np.repeat(left[:, 0], len(right)), np.tile(right[:, 0], len(left))
            grid[:, :, 0] = self.leaves.join(*tags).reshape(grid.shape[:2])
        else:
            grid[:, :, 0] = left[:, :1] + right[:, 0]
        return grid.reshape(-1, grid.shape[2])

    def tie(self, left: Axis, right: Axis) -> Axis:
        """Make two axes of equal size carry the same action and return one of them, which says all that is known."""
        left, right = left.root, right.root
        if left is right:
            return left
        if left.opaque and right.opaque:
            return right if right.part and not left.part else left
        if left.opaque or right.opaque:
            pinned, target = (left, right) if left.opaque else (right, left)
            self.pin(target, pinned.factors[0].reason)  # type: ignore[union-attr]
            return pinned if pinned.part else left
        elif left.is_blank or right.is_blank:
            blank, target = (right, left) if right.is_blank else (left, right)
            blank.become(target)
        else:
            pairs = _aligned(left, right)
            for a, b in pairs:
                (self.tie if len(pairs) > 1 else self._tie_rows)(a, b)
        return left

    def _tie_rows(self, left: Axis, right: Axis) -> None:
        if self._tie_factors(left, right) or self._tie_factors(right, left):
            return
        a, b = self.rows(left), self.rows(right)
        if a is None or b is None:
            for axis in (left, right):
                self.pin(axis, "a merged axis too long to analyse")
            return
        self.leaves.unify(a, b)

    def _tie_factors(self, single: Axis, product: Axis) -> bool:
        """Tie an axis that is a product already to one written as a product, factor by factor."""
        if len(single.factors) != 1 or len(product.factors) < 2:
            return False
        sizes = tuple(map(factor_size, product.factors))
        axes = self._independent(single.factors[0], sizes) if isinstance(single.factors[0], np.ndarray) else None
        for axis, factor in zip(axes or (), product.factors):
            self.tie(axis, Axis((factor,)))
        return axes is not None

    def _independent(self, rows: Rows, sizes: tuple[int, ...]) -> list[Axis] | None:
        """The axes of an array of labels in which each digit (and the tag) depends on one dimension alone."""
        return self.leaves.once(independent, self.leaves.resolve(rows), sizes)

    def concatenate(self, parts: Sequence[Axis]) -> Axis:
        """The axes one after the other; each part gets a tag, so that equal labels stay apart."""
        written = [rows for part in parts if (rows := self.rows(part)) is not None]
        if len(written) < len(parts):
            for part in parts:
                self.pin(part, "a merged axis too long to analyse")
            return self.opaque(sum(part.size for part in parts), "a merged axis too long to analyse")
        joined = np.full((sum(map(len, written)), max(rows.shape[1] for rows in written)), -1, np.int64)
        start = 0
        for rows in written:
            joined[start : start + len(rows), : rows.shape[1]] = rows
            start += len(rows)
        tags = np.repeat(self.leaves.tags(len(parts)), [len(rows) for rows in written])
        joined[:, 0] = self.leaves.join(joined[:, 0], tags)
        return Axis((joined,))

    def take(self, axis: Axis, index: Any) -> Axis:
        """The positions ``index`` (slice or integer array) of an axis, in that order."""
        places = range(axis.size)[index] if isinstance(index, slice) else index
        if _all_in_order(places, axis.size):
            return axis
        if axis.opaque:
            return self.opaque(len(places), axis.factors[0].reason)  # type: ignore[union-attr]
        outer = self._outer_part(axis, places) if isinstance(places, range) else None
        if outer is not None:
            return Axis((*outer.factors, *axis.factors[1:]))
        rows = self.rows(axis)
        if rows is None:
            self.pin(axis, "part of a merged axis too long to analyse")
            return self.opaque(len(places), "part of a merged axis")
        return Axis((self.cut(rows[index]),))

    def _outer_part(self, axis: Axis, places: range) -> Axis | None:
        """A part of the first factor where whole runs of the others are taken (some of the heads), else None."""
        inner = axis.size // factor_size(axis.factors[0])
        if len(axis.factors) == 1 or places.step != 1 or places.start % inner or places.stop % inner:
            return None
        return self.take(Axis(axis.factors[:1]), slice(places.start // inner, places.stop // inner))

    def cut(self, part: Rows) -> Rows:
        """Labels used apart from the rest: leaves are split so that the part is closed under the action."""
        part = self.leaves.resolve(part)
        separate = self.leaves.apart(part)
        if separate is not None:
            return separate
        if not unique_labels(part):
            rank = _occurrence(part)
            part = part.copy()
            part[:, 0] = self.leaves.join(part[:, 0], self.leaves.tags(int(rank.max()) + 1)[rank])
        self.leaves.close(part)
        return part


def _all_in_order(places: Any, size: int) -> bool:
    """Whether places are 0 … size − 1; a range is not written out, for a batch axis is longer than memory."""
    if isinstance(places, range):
        return places == range(size)
    return len(places) == size and bool((places == np.arange(size)).all())


def independent(leaves: Store, rows: Rows, sizes: tuple[int, ...]) -> list[Axis] | None:
    """The axes of resolved labels seen as ``sizes``; None if a digit depends on more than one dimension."""
    if len(sizes) > 1 and leaves.is_leaf(rows):
        return None
    labels = rows.reshape(*sizes, rows.shape[1])
    columns: list[list[Rows]] = [[] for _ in sizes]
    tags: list[Any] = [np.full(size, NO_TAG) for size in sizes]
    for index in range(labels.shape[-1]):
        column = labels[..., index]
        dims = [d for d in range(len(sizes)) if (column != column[(slice(None),) * d + (slice(1),)]).any()]
        if len(dims) > 1:
            return None
        line = column[tuple(slice(None) if [d] == dims else 0 for d in range(len(sizes)))]
        if index == 0:
            if dims:
                tags[dims[0]] = line
            elif (column != NO_TAG).any():
                tags[0] = np.full(sizes[0], column.flat[0])
        elif dims:
            columns[dims[0]].append(line)
        elif column.flat[0] >= 0:
            return None
    return [Axis((np.stack([tag, *cols], axis=1),)) for tag, cols in zip(tags, columns)]


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
