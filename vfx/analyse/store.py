"""The store of leaves: labels, tags, bindings, and what an array of labels stands for once its leaves are bound.

Arrays of labels are values and are never written to. Tied axes resolve to one and the same array object: a leaf bound
as a whole gives way to the array it is bound to, found as in a union-find forest with path compression. So whatever is
worked out about an array (which leaves it holds, where they stand) is worked out once for all axes tied to it.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.rows import beside, distinct, unique_rows
from vfx.analyse.table import NO_TAG, Table

Rows = NDArray[np.int64]  # (positions, 1 + digits): column 0 the tag, then element ids, -1 where there is none

T = TypeVar("T")


@dataclass(frozen=True)
class Pin:
    """Why positions cannot move: the rule's reason and the graph node that asked for it."""

    reason: str
    node: str


class _Entry:
    """What is known of an array: the leaves it holds, the leaf it is (-1 if it is not one), what it resolves to."""

    __slots__ = ("facts", "leaves", "ref", "target", "version", "whole")

    def __init__(self, ref: weakref.ref[Rows], leaves: Sequence[int], whole: int, target: Rows | None):
        self.ref, self.leaves, self.whole, self.target = ref, leaves, whole, target
        self.version = -1  # of the store when the leaves were last seen to be free
        self.facts: dict[Any, Any] = {}


class Store:
    """Leaves, their bindings and the tags in use."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self.bindings: list[Rows | None] = []
        self._bound: set[int] = set()
        self._table = Table()
        self._written: dict[int, Rows] = {}  # what the table says of a bound leaf
        self.version = 0
        self._next_element = 0
        self._next_tag = NO_TAG + 1
        self._pairs: dict[tuple[int, int], int] = {}
        self._pins: list[Pin] = []  # one for each pinned block of tags, ascending
        self._pin_starts: list[int] = []
        self._pin_ends: list[int] = []
        self._pin_source: dict[int, int] = {}  # joined tag -> its pinned component
        self._entries: dict[int, _Entry] = {}  # by the array's id, for as long as the array lives
        self.context = ""  # name of the node whose rule is running

    # creation -----------------------------------------------------------------------------------------------------

    def fresh(self, size: int) -> Rows:
        """A new free leaf; an axis of size 1 has nothing to permute."""
        if size == 1:
            return np.full((1, 1), NO_TAG, np.int64)
        leaf, start = len(self.sizes), self._next_element
        self.starts.append(start)
        self.sizes.append(size)
        self.bindings.append(None)
        self._next_element += size
        rows = np.empty((size, 2), np.int64)
        rows[:, 0] = NO_TAG
        rows[:, 1] = self._table.add(start, self._next_element, leaf)
        self._note(rows, (leaf,), leaf)
        return rows

    def pinned(self, size: int, reason: str) -> Rows:
        """``size`` positions that never move."""
        tags = self.tags(size)
        self._pins.append(Pin(reason, self.context))
        self._pin_starts.append(int(tags[0]))
        self._pin_ends.append(self._next_tag)
        rows = tags[:, None]
        self._note(rows, ())
        return rows

    def tags(self, count: int) -> NDArray[np.int64]:
        """New tags, all different."""
        first = self._next_tag
        self._next_tag += count
        return np.arange(first, first + count)

    def pin_of(self, tag: int) -> Pin | None:
        """The reason recorded for a pinned position's tag, if it was pinned."""
        tag = self._pin_source.get(tag, tag)
        index = bisect_right(self._pin_starts, tag) - 1
        return self._pins[index] if index >= 0 and tag < self._pin_ends[index] else None

    # reading ------------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Number of element ids in use."""
        return self._next_element

    def leaf_of(self, elements: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leaf of each element id, -1 where there is none."""
        return self._table.owner.take(elements)

    def elements(self, leaf: int) -> NDArray[np.int64]:
        return self.starts[leaf] + np.arange(self.sizes[leaf])

    def leaves_on(self, rows: Rows) -> Sequence[int]:
        """The leaves that these labels name, bound or free, ascending."""
        return self._entry(rows).leaves

    def free_leaves(self, rows: Rows) -> Sequence[int]:
        """The free leaves that move these (resolved) positions, ascending."""
        return self._entry(rows).leaves

    def is_leaf(self, rows: Rows) -> bool:
        """Whether these (resolved) positions are the elements of one free leaf, in order and without tags."""
        return self._entry(rows).whole >= 0

    def resolve(self, rows: Rows) -> Rows:
        """The labels with every bound leaf replaced by what it is bound to; tied axes give the same array."""
        trail = []
        while True:
            entry = self._entry(rows)
            if entry.target is None:
                if entry.version == self.version or self._bound.isdisjoint(entry.leaves):
                    entry.version = self.version
                    break
                bound = self.bindings[entry.whole] if entry.whole >= 0 else None
                entry.target = self._substitute(rows, entry.leaves) if bound is None else bound
            trail.append(entry)
            rows = entry.target
        for entry in trail:
            entry.target = rows
        return rows

    def once(self, read: Callable[..., T], rows: Rows, *options: Any) -> T:
        """``read(store, rows, *options)`` of resolved labels, worked out once for as long as the array lives."""
        facts = self._entry(rows).facts
        key = (read, *options)
        if key not in facts:
            facts[key] = read(self, rows, *options)
        return cast(T, facts[key])

    def same(self, left: Rows, right: Rows) -> bool:
        """Whether two resolved axes are labelled alike; if so, they are one array from now on."""
        if left is not right:
            if left.shape != right.shape or not (left == right).all():
                return False
            self._entry(right).target = left
        return True

    def _entry(self, rows: Rows) -> _Entry:
        entry = self._entries.get(id(rows))
        if entry is None:
            owner = self.leaf_of(rows[:, 1:])
            leaves = distinct(owner)
            ordered = self._canonical(rows, owner, leaves)
            entry = self._note(rows, leaves, target=None if ordered is rows else ordered)
        return entry

    def _note(self, rows: Rows, leaves: Sequence[int], whole: int = -1, target: Rows | None = None) -> _Entry:
        key = id(rows)
        ref = weakref.ref(rows, lambda _: self._entries.pop(key, None))
        entry = self._entries[key] = _Entry(ref, leaves, whole, target)
        return entry

    @staticmethod
    def _canonical(rows: Rows, owner: NDArray[np.int64], leaves: Sequence[int]) -> Rows:
        """Digits ordered by leaf (one leaf's keep their order), without empty columns; maybe ``rows`` itself."""
        if rows.shape[1] == 1 or (rows.shape[1] == 2 and leaves):
            return rows
        if (owner >= 0).all() and (owner[:, 1:] >= owner[:, :-1]).all():  # the usual case
            return rows
        digits = rows[:, 1:]
        if digits.shape[1] > 1:
            rank = np.where(owner < 0, np.iinfo(np.int64).max, owner)
            if (rank[:, 1:] < rank[:, :-1]).any():
                order = np.argsort(rank, axis=1, kind="stable")
                digits = np.take_along_axis(digits, order, axis=1)
                rows = beside(rows[:, 0], digits)
        keep = (digits >= 0).any(axis=0)
        return rows if keep.all() else beside(rows[:, 0], digits[:, keep])

    def _substitute(self, rows: Rows, leaves: Sequence[int]) -> Rows:
        """One array with its bound leaves replaced."""
        width = 2
        for leaf in self._bound.intersection(leaves):
            binding = self.resolve(cast(Rows, self.bindings[leaf]))
            width = max(width, binding.shape[1])
            if self._written.get(leaf) is not binding:
                self._table.write(self.starts[leaf], binding)
                self._written[leaf] = binding
        tag, digits = rows[:, 0], []
        for column in rows.T[1:]:
            image = self._table.read(column, width)
            tag = self.join(tag, image[:, 0])
            digits.append(image[:, 1:])
        result = beside(tag, *digits)
        owner = self.leaf_of(result[:, 1:])
        owners = distinct(owner)
        result = self._canonical(result, owner, owners)
        self._note(result, owners)
        return result

    def join(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        """One tag for each pair of tags, the same pair always the same tag."""
        if not right.any():
            return left
        if not left.any():
            return right
        if (left == left[0]).all() and (right == right[0]).all():  # the usual case: one copy throughout
            return np.full(len(left), self._joined(int(left[0]), int(right[0])))
        pairs, inverse = unique_rows(np.stack([left, right], axis=1))
        return np.array([self._joined(a, b) for a, b in pairs.tolist()])[inverse]

    def _joined(self, left: int, right: int) -> int:
        if left == NO_TAG or right == NO_TAG:
            return left or right
        return self._pairs.get((left, right)) or self._join_pair(left, right)

    def _join_pair(self, left: int, right: int) -> int:
        joined = int(self.tags(1)[0])
        self._pairs[left, right] = joined
        for part in (left, right):
            if self.pin_of(part) is not None:
                self._pin_source[joined] = self._pin_source.get(part, part)
        return joined

    # changing -----------------------------------------------------------------------------------------------------

    def bind(self, leaf: int, rows: Rows) -> None:
        """Replace a free leaf by labels, one for each of its elements."""
        assert self.bindings[leaf] is None
        assert len(rows) == self.sizes[leaf]
        self.bindings[leaf] = rows
        self._bound.add(leaf)
        self.version += 1

    def split(self, leaf: int, parts: NDArray[np.int64]) -> list[Rows]:
        """Replace a leaf by one new leaf for each set of elements with the same value of ``parts``; returns these."""
        rows = np.full((self.sizes[leaf], 2), -1, np.int64)
        labels = distinct(parts)
        pieces = []
        for label, tag in zip(labels, self.tags(len(labels))):
            here = np.flatnonzero(parts == label)
            new = self.fresh(len(here))
            rows[here, 0] = tag if len(here) > 1 else self.pinned(1, "used apart from every other channel")[0]
            rows[here, 1 : new.shape[1]] = new[:, 1:]
            pieces.append(new)
        self.bind(leaf, rows)
        return pieces

    def apart(self, rows: Rows) -> Rows | None:
        """The usual cut, some elements of one leaf in order: they become a leaf of their own. None for any other."""
        leaves, (tags, *digits) = self.free_leaves(rows), rows.T
        if len(leaves) != 1 or len(rows) < 2 or len(digits) != 1 or digits[0][0] < 0:
            return None
        if (digits[0][1:] <= digits[0][:-1]).any() or (tags != tags[0]).any():
            return None
        if len(rows) == self.sizes[leaves[0]]:  # they are one already
            return rows
        inside = np.zeros(self.sizes[leaves[0]], np.int64)
        inside[digits[0] - self.starts[leaves[0]]] = 1
        return self.split(leaves[0], inside)[1]

    def pin(self, rows: Rows, reason: str) -> None:
        """No group element may move these positions."""
        digits = self.resolve(rows)[:, 1:]
        leaves = self.leaf_of(digits)
        for leaf in distinct(leaves):
            self._pin_elements(leaf, np.unique(digits[leaves == leaf]), reason)

    def _pin_elements(self, leaf: int, elements: NDArray[np.int64], reason: str) -> None:
        if len(elements) == self.sizes[leaf]:
            self.bind(leaf, self.pinned(self.sizes[leaf], reason))
            return
        inside = np.isin(self.elements(leaf), elements)
        self.split(leaf, inside.astype(np.int64))
        self.pin(self.elements_as_rows(elements), reason)

    @staticmethod
    def elements_as_rows(elements: NDArray[np.int64]) -> Rows:
        return np.stack([np.full(len(elements), NO_TAG), elements], axis=1)


def widen(digits: Rows, width: int) -> Rows:
    """A copy with at least ``width`` columns."""
    extra = width - digits.shape[1]
    if extra <= 0:
        return digits.copy()
    return np.concatenate([digits, np.full((len(digits), extra), -1, np.int64)], axis=1)
