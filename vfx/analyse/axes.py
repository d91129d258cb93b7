"""Axis terms and their unification: permutation propagation as type inference.

The permutation action on an axis of n positions is written down position by position. A **leaf** is a variable for a
free symmetric group: its ``size`` elements may be permuted at will. Each position carries a **label**: one element of
each leaf that moves it (its *digits*) and a *tag*, a constant that tells copies apart. So

* ``Leaf``   is n labels with one digit each, in order;
* ``Cat``    is the labels of its parts one after the other, each part with its own tag;
* ``Prod``   is labels with one digit for each factor (C·H·W after flatten: one digit for C, a tag for H·W);
* ``Shuf``   is the same labels in another order;
* a pinned position has a tag and no digit.

A group element σ moves the position labelled (tag, e₁, e₂…) to the one labelled (tag, σ(e₁), σ(e₂)…), which must
exist: labels on an axis are unique and every class of them is a full product of its leaves. Unification makes two axes
carry the same action. It binds a leaf to what it is tied to, splits a leaf into the sets of elements that are used
apart, factors it, or pins it where two structures cannot be reconciled. Each step only ever shrinks the group, so the
result is sound whatever the order.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.rows import classes, count_rows, distinct, row_ids, unique_rows

Rows = NDArray[np.int64]  # (positions, 1 + digits): column 0 the tag, then element ids, -1 where there is none

NO_TAG = 0
MAX_CLASSES = 4096  # more copies than this tied against other copies: pin instead of searching


@dataclass(frozen=True)
class Pin:
    """Why positions cannot move: the rule's reason and the graph node that asked for it."""

    reason: str
    node: str


class Leaves:
    """The store of leaves, their bindings and the tags in use."""

    def __init__(self) -> None:
        self.starts = np.zeros(0, np.int64)
        self.sizes: list[int] = []
        self.bindings: list[Rows | None] = []
        self._is_bound = np.zeros(1, bool)  # by leaf; the last entry answers for "no leaf" (-1)
        self._owner = np.full(1024, -1, np.int64)  # leaf of each element; the last entry answers for "none" (-1)
        self.version = 0
        self._next_element = 0
        self._next_tag = NO_TAG + 1
        self._pairs: dict[tuple[int, int], int] = {}
        self._pins: list[Pin] = []  # one for each pinned block of tags, ascending
        self._pin_starts: list[int] = []
        self._pin_ends: list[int] = []
        self._pin_source: dict[int, int] = {}  # joined tag -> its pinned component
        self._resolved: dict[int, tuple[weakref.ref[Rows], Rows]] = {}
        self.context = ""  # name of the node whose rule is running

    # creation -----------------------------------------------------------------------------------------------------

    def fresh(self, size: int) -> Rows:
        """A new free leaf; an axis of size 1 has nothing to permute."""
        if size == 1:
            return np.full((1, 1), NO_TAG, np.int64)
        leaf = len(self.sizes)
        self.starts = np.append(self.starts, self._next_element)
        self.sizes.append(size)
        self.bindings.append(None)
        self._is_bound = np.append(self._is_bound[:-1], [False, False])
        self._next_element += size
        if self._next_element >= len(self._owner):
            room = np.full(2 * self._next_element - len(self._owner), -1, np.int64)
            self._owner = np.concatenate([self._owner, room])
        self._owner[self.starts[leaf] : self._next_element] = leaf
        return np.stack([np.full(size, NO_TAG), self.starts[leaf] + np.arange(size)], axis=1)

    def pinned(self, size: int, reason: str) -> Rows:
        """``size`` positions that never move."""
        tags = self.tags(size)
        self._pins.append(Pin(reason, self.context))
        self._pin_starts.append(int(tags[0]))
        self._pin_ends.append(self._next_tag)
        return tags[:, None]

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

    def leaf_of(self, elements: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leaf of each element id, -1 where there is none."""
        return self._owner[elements]

    def elements(self, leaf: int) -> NDArray[np.int64]:
        return self.starts[leaf] + np.arange(self.sizes[leaf])

    def free_leaves(self, rows: Rows) -> list[int]:
        """The free leaves that move these (resolved) positions."""
        return distinct(self.leaf_of(rows[:, 1:]))

    def resolve(self, rows: Rows) -> Rows:
        """The labels with every bound leaf replaced by what it is bound to."""
        known = self._resolved.get(id(rows))
        labels = known[1] if known is not None else rows
        while True:
            leaves = self.leaf_of(labels[:, 1:])
            here = self._is_bound[leaves]
            if not here.any():
                break
            labels = self._substitute(labels, leaves, distinct(leaves[here]))
        if known is None or labels is not known[1]:
            labels = self._canonical(labels, leaves)
            self._remember(rows, labels)
        return labels

    def _remember(self, rows: Rows, labels: Rows) -> None:
        """What an array was resolved to last, for as long as it lives: the next time starts from there."""
        key = id(rows)
        self._resolved[key] = weakref.ref(rows, lambda _: self._resolved.pop(key, None)), labels

    @staticmethod
    def _canonical(rows: Rows, leaves: NDArray[np.int64]) -> Rows:
        """Digits ordered by leaf (a leaf's own digits keep their order), without empty columns."""
        digits = rows[:, 1:]
        if digits.shape[1] > 1:
            order = np.argsort(np.where(leaves < 0, np.iinfo(np.int64).max, leaves), axis=1, kind="stable")
            digits = np.take_along_axis(digits, order, axis=1)
        keep = (digits >= 0).any(axis=0)
        return np.concatenate([rows[:, :1], digits[:, keep]], axis=1)

    def _substitute(self, rows: Rows, leaves: NDArray[np.int64], bound: list[int]) -> Rows:
        tag = rows[:, 0]
        columns = []
        for index in range(leaves.shape[1]):
            digits = rows[:, 1 + index : 2 + index]
            for leaf in bound:
                here = leaves[:, index] == leaf
                count = np.count_nonzero(here)
                if not count:
                    continue
                binding = self._compressed(leaf)
                if count == len(here):  # the usual case: one leaf throughout
                    target = binding[rows[:, 1 + index] - self.starts[leaf]]
                    digits, tag = target[:, 1:], self.join(tag, target[:, 0])
                    break
                target = binding[rows[here, 1 + index] - self.starts[leaf]]
                digits = _widen(digits, target.shape[1] - 1)
                digits[here] = -1
                digits[here, : target.shape[1] - 1] = target[:, 1:]
                tag = tag.copy()
                tag[here] = self.join(tag[here], target[:, 0])
            columns.append(digits)
        return np.concatenate([tag[:, None], *columns], axis=1)

    def _compressed(self, leaf: int) -> Rows:
        """A leaf's binding, one level deep or less (path compression)."""
        binding = self.bindings[leaf]
        assert binding is not None
        inner = self.leaf_of(binding[:, 1:])
        if any(self.bindings[x] is not None for x in distinct(inner)):
            binding = self.resolve(binding)
            self.bindings[leaf] = binding
        return binding

    def join(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        """One tag for each pair of tags, the same pair always the same tag."""
        if not right.any():
            return left
        if not left.any():
            return right
        pairs, inverse = unique_rows(np.stack([left, right], axis=1))
        joined = np.empty(len(pairs), np.int64)
        for index, (a, b) in enumerate(pairs.tolist()):
            if a == NO_TAG or b == NO_TAG:
                joined[index] = a or b
                continue
            joined[index] = self._pairs.get((a, b)) or self._join_pair(a, b)
        return joined[inverse]

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
        self._is_bound[leaf] = True
        self.version += 1

    def split(self, leaf: int, parts: NDArray[np.int64]) -> None:
        """Replace a leaf by one new leaf for each set of elements with the same value of ``parts``."""
        rows = np.full((self.sizes[leaf], 2), -1, np.int64)
        labels = np.unique(parts)
        tags = self.tags(len(labels))
        for label, tag in zip(labels, tags):
            here = parts == label
            count = int(here.sum())
            new = self.fresh(count)
            rows[here, 0] = tag if count > 1 else self.pinned(1, "used apart from every other channel")[0]
            rows[here, 1 : new.shape[1]] = new[:, 1:]
        self.bind(leaf, rows)

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

    # unification --------------------------------------------------------------------------------------------------

    def unify(self, left: Rows, right: Rows) -> None:
        """Make two axes of equal length carry the same action."""
        while True:
            left, right = _same_width(self.resolve(left), self.resolve(right))
            if (left[:, 1:] == right[:, 1:]).all() and self._same_copies(left, right):
                return
            if self._bind_whole(left, right) or self._bind_whole(right, left):
                continue
            if not (self._pin_against_pinned(left, right) or self._unify_class(left, right)):
                self.pin(np.concatenate([left, right]), "two structures of one axis cannot be reconciled")

    def _same_copies(self, left: Rows, right: Rows) -> bool:
        """Whether equal digits mean equal actions: what is one copy on the left must not be two on the right."""
        moving = (left[:, 1:] >= 0).any(axis=1)
        copies = row_ids(np.concatenate([left[:, :1], self.leaf_of(left[:, 1:])], axis=1)[moving])
        pairs = np.stack([right[moving, 0], copies], axis=1)
        return not len(copies) or count_rows(pairs) == int(copies.max()) + 1

    def _bind_whole(self, left: Rows, right: Rows) -> bool:
        """The usual case: one side is a leaf that nothing constrains yet, each of its elements once."""
        element = left[:, 1]
        leaf = int(self.leaf_of(element[:1])[0])
        whole = leaf >= 0 and len(left) == self.sizes[leaf] and (left[:, 2:] < 0).all()
        if not whole or not (self.leaf_of(element) == leaf).all() or (self.leaf_of(right[:, 1:]) == leaf).any():
            return False
        rows = np.empty_like(right)
        rows[element - self.starts[leaf]] = right
        self.bind(leaf, rows)
        return True

    def _pin_against_pinned(self, left: Rows, right: Rows) -> bool:
        """Positions that cannot move on one side cannot move on the other."""
        for rows, other in ((left, right), (right, left)):
            stuck = (rows[:, 1:] >= 0).any(axis=1) & (other[:, 1:] < 0).all(axis=1)
            if stuck.any():
                pin = self.pin_of(int(other[stuck][0, 0]))
                self.pin(rows[stuck], pin.reason if pin else "tied to a single position")
                return True
        return False

    def _unify_class(self, left: Rows, right: Rows) -> bool:
        """Reconcile the first class of positions whose two labels still differ; False when none can be."""
        leaves = [self.leaf_of(rows[:, 1:]) for rows in (left, right)]
        signature = np.concatenate([left[:, :1], right[:, :1], *leaves], axis=1)
        found = classes(signature)
        if len(found) > MAX_CLASSES:
            return False
        for members in found:
            version = self.version
            self._reconcile(_digits(left[members]), _digits(right[members]))
            if self.version != version:
                return True
        return False

    def _reconcile(self, left: Rows, right: Rows) -> None:
        """Positions that share leaves and tags on both sides; only digits are given."""
        if self._complete(left) or self._complete(right):
            return
        if left.shape == right.shape and (left == right).all():
            return
        if left.shape[1] == 1 and right.shape[1] == 1:
            self._tie(left[:, 0], right[:, 0])
        elif left.shape[1] == 1:
            self._bind_product(left[:, 0], right)
        elif right.shape[1] == 1:
            self._bind_product(right[:, 0], left)
        else:
            self._match_products(left, right)

    def close(self, rows: Rows) -> None:
        """Shrink the group until it maps this set of labels onto itself."""
        while True:
            rows = self.resolve(rows)
            signature = np.concatenate([rows[:, :1], self.leaf_of(rows[:, 1:])], axis=1)
            if not any(self._complete(_digits(rows[members])) for members in classes(signature)):
                return

    def _complete(self, digits: Rows) -> bool:
        """Split leaves until the labels are a full product of theirs; True if something had to change."""
        if not digits.shape[1]:
            return False
        leaves = [int(self.leaf_of(column)[0]) for column in digits.T]
        for leaf, column in zip(leaves, digits.T):
            used = np.unique(column)
            if len(used) < self.sizes[leaf]:
                self.split(leaf, np.isin(self.elements(leaf), used).astype(np.int64))
                return True
        if len(digits) == int(np.prod([self.sizes[leaf] for leaf in leaves])):
            return False
        for index, leaf in enumerate(leaves):
            patterns = _patterns(digits, index, self.elements(leaf))
            if patterns.max() > 0:
                self.split(leaf, patterns)
                return True
        for leaf in set(leaves):
            self.pin(self.elements_as_rows(self.elements(leaf)), "positions do not form a product of channels")
        return True

    def _tie(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        """One leaf against one leaf: a bijection merges them, a permutation of one leaf onto itself factors it."""
        a, b = int(self.leaf_of(left)[0]), int(self.leaf_of(right)[0])
        if a != b:
            rows = np.empty((self.sizes[b], 2), np.int64)
            rows[:, 0] = NO_TAG
            rows[right - self.starts[b], 1] = left
            self.bind(b, rows)
            return
        image = np.empty(self.sizes[a], np.int64)
        image[left - self.starts[a]] = right - self.starts[a]
        cycle, place, length = _cycles(image)
        if length.min() != length.max():
            self.split(a, length)
            return
        rows = self.fresh(int(cycle.max()) + 1)[cycle]
        rows[:, 0] = self.tags(int(length[0]))[place]
        self.bind(a, rows)

    def _bind_product(self, single: NDArray[np.int64], product: Rows) -> None:
        leaf = int(self.leaf_of(single)[0])
        rows = np.full((self.sizes[leaf], 1 + product.shape[1]), NO_TAG, np.int64)
        rows[single - self.starts[leaf], 1:] = product
        self.bind(leaf, rows)

    def _match_products(self, left: Rows, right: Rows) -> None:
        """Products of the same positions: match, merge or refine one factor."""
        for a, b in np.ndindex(left.shape[1], right.shape[1]):
            pairs = unique_rows(np.stack([left[:, a], right[:, b]], axis=1))[0]
            size_a, size_b = len(np.unique(pairs[:, 0])), len(np.unique(pairs[:, 1]))
            if len(pairs) == size_a == size_b and (pairs[:, 0] != pairs[:, 1]).any():
                self._tie(pairs[:, 0], pairs[:, 1])
                return
            if len(pairs) == size_b > size_a:
                self._refine(pairs[:, 1], pairs[:, 0])
                return
            if len(pairs) == size_a > size_b:
                self._refine(pairs[:, 0], pairs[:, 1])
                return
        for column in (*left.T, *right.T):
            leaf = int(self.leaf_of(column[:1])[0])
            if self.bindings[leaf] is None:
                self.pin(self.elements_as_rows(np.unique(column)), "two product structures of one axis disagree")

    def _refine(self, fine: NDArray[np.int64], coarse: NDArray[np.int64]) -> None:
        """The elements of one leaf fall into equal blocks, one for each element of another: factor it so."""
        leaf = int(self.leaf_of(fine)[0])
        counts = np.unique(coarse, return_counts=True)[1]
        if counts.min() != counts.max():
            self.pin(self.elements_as_rows(fine), "two product structures of one axis disagree")
            return
        order = np.lexsort((fine, coarse))
        rank = np.empty(len(fine), np.int64)
        rank[order] = np.tile(np.arange(counts[0]), len(counts))
        inner = self.fresh(int(counts[0]))[rank]
        rows = np.full((self.sizes[leaf], 3), NO_TAG, np.int64)
        rows[fine - self.starts[leaf], 1] = coarse
        rows[fine - self.starts[leaf], 2] = inner[:, 1]
        self.bind(leaf, rows)


def _widen(digits: Rows, width: int) -> Rows:
    extra = width - digits.shape[1]
    if extra <= 0:
        return digits.copy()
    return np.concatenate([digits, np.full((len(digits), extra), -1, np.int64)], axis=1)


def _same_width(left: Rows, right: Rows) -> tuple[Rows, Rows]:
    width = max(left.shape[1], right.shape[1])
    return _widen(left, width), _widen(right, width)


def _digits(rows: Rows) -> Rows:
    """The digits of positions that all have the same number of them."""
    digits = rows[:, 1:]
    return digits[:, (digits >= 0).all(axis=0)]


def _patterns(digits: Rows, index: int, elements: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each element of one factor, a number for the set of partners it occurs with."""
    others = np.delete(digits, index, axis=1)
    partner = row_ids(others)
    present = np.zeros((len(elements), int(partner.max()) + 1), bool)
    present[digits[:, index] - elements[0], partner] = True
    return np.unique(present, axis=0, return_inverse=True)[1].reshape(-1)  # many columns: rows do not fit a number


def _cycles(image: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each point of a permutation: number of its cycle, its place in it, the cycle's length."""
    cycle = np.full(len(image), -1, np.int64)
    place, length = np.zeros(len(image), np.int64), np.zeros(len(image), np.int64)
    count = 0
    for start in range(len(image)):
        if cycle[start] >= 0:
            continue
        points = [start]
        while (following := int(image[points[-1]])) != start:
            points.append(following)
        cycle[points], place[points], length[points] = count, np.arange(len(points)), len(points)
        count += 1
    return cycle, place, length


def unique_labels(rows: Rows) -> bool:
    """Whether no two positions carry the same label."""
    return count_rows(rows) == len(rows)
