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

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.places import places
from vfx.analyse.rows import classes, count_rows, distinct, row_ids, unique_rows
from vfx.analyse.store import NO_TAG, Rows, Store, widen

MAX_CLASSES = 4096  # more copies than this tied against other copies: pin instead of searching


class Leaves(Store):
    """A store of leaves whose axes can be made to carry the same action."""

    # unification --------------------------------------------------------------------------------------------------

    def unify(self, left: Rows, right: Rows) -> None:
        """Make two axes of equal length carry the same action."""
        while True:
            left, right = self.resolve(left), self.resolve(right)
            if self.same(left, right):
                return
            if self._bind_whole(left, right) or self._bind_whole(right, left):
                continue
            a, b = _same_width(left, right)
            if (a[:, 1:] == b[:, 1:]).all() and self._same_copies(a, b):
                return
            if not (self._pin_against_pinned(a, b) or self._unify_classes(a, b)):
                self.pin(np.concatenate([a, b]), "two structures of one axis cannot be reconciled")

    def _same_copies(self, left: Rows, right: Rows) -> bool:
        """Whether equal digits mean equal actions: what is one copy on the left must not be two on the right."""
        moving = (left[:, 1:] >= 0).any(axis=1)
        copies = row_ids(np.concatenate([left[:, :1], self.leaf_of(left[:, 1:])], axis=1)[moving])
        pairs = np.stack([right[moving, 0], copies], axis=1)
        return not len(copies) or count_rows(pairs) == int(copies.max()) + 1

    def _bind_whole(self, left: Rows, right: Rows) -> bool:
        """The usual case: one side is a leaf that nothing constrains yet, each of its elements once."""
        leaves = self.free_leaves(left)
        if self.is_leaf(left) and leaves[0] not in self.free_leaves(right):
            self.bind(leaves[0], right)
            return True
        if len(leaves) != 1 or left.shape[1] != 2 or leaves[0] in self.free_leaves(right):
            return False
        (leaf,) = leaves
        if len(left) != self.sizes[leaf] or (left[:, 1] < 0).any():
            return False
        rows = np.empty_like(right)
        rows[left[:, 1] - self.starts[leaf]] = right
        self.bind(leaf, rows)
        return True

    def _pin_against_pinned(self, left: Rows, right: Rows) -> bool:
        """Positions that cannot move on one side cannot move on the other."""
        for rows, against in ((left, right), (right, left)):
            stuck = (rows[:, 1:] >= 0).any(axis=1) & (against[:, 1:] < 0).all(axis=1)
            if stuck.any():
                pin = self.pin_of(int(against[stuck][0, 0]))
                self.pin(rows[stuck], pin.reason if pin else "tied to a single position")
                return True
        return False

    def _unify_classes(self, left: Rows, right: Rows) -> bool:
        """Reconcile classes of positions whose two labels still differ; False when none can be."""
        signature = np.concatenate(
            [left[:, :1], right[:, :1], *(self.leaf_of(x[:, 1:]) for x in (left, right))], axis=1
        )
        alike = classes(signature)
        if len(alike) > MAX_CLASSES:
            return False
        version = self.version
        self._split_by_use(left, alike)
        self._split_by_use(self.resolve(right), alike)
        if self.version == version:
            for members in self._untouched(alike, signature[:, 2:]):
                self._reconcile(_digits(left[members]), _digits(right[members]))
        return self.version != version

    def _split_by_use(self, rows: Rows, alike: list[NDArray[np.int64]]) -> None:
        """Split each leaf that some class of positions uses in part, for all classes at once.

        Class by class each split would change the leaf that the next class uses, and so name all positions anew.
        """
        number = np.empty(len(rows), np.int64)
        for index, members in enumerate(alike):
            number[members] = index
        keys = number[:, None] * rows.shape[1] + np.arange(1, rows.shape[1])
        uses = np.stack([rows[:, 1:].reshape(-1), keys.reshape(-1)], axis=1)
        uses = unique_rows(uses[uses[:, 0] >= 0])[0]  # an element and the class and column that use it
        used = np.stack([self.leaf_of(uses[:, 0]), uses[:, 1]], axis=1)
        together, which = unique_rows(used)
        in_part = np.bincount(which, minlength=len(together)) < np.asarray(self.sizes)[together[:, 0]]
        for leaf in distinct(together[in_part, 0]):
            self.split(leaf, _patterns_of_use(uses[used[:, 0] == leaf], self.elements(leaf)))

    def _untouched(self, alike: list[NDArray[np.int64]], leaves: Rows) -> Iterator[NDArray[np.int64]]:
        """Classes of positions in turn, without those a leaf of which has changed: they are resolved first."""
        version = self.version
        for members in alike:
            if self.version == version or self._bound.isdisjoint(leaves[members[0]].tolist()):
                yield members

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
            if rows.shape[1] == 2 and all(factors is not None for factors in self.once(places, rows).values()):
                return
            owner = self.leaf_of(rows[:, 1:])
            alike = classes(np.concatenate([rows[:, :1], owner], axis=1))
            version = self.version
            for members in self._untouched(alike, owner):
                self._complete(_digits(rows[members]))
            if self.version == version:
                return

    def _complete(self, digits: Rows) -> bool:
        """Split leaves until the labels are a full product of theirs; True if something had to change."""
        if not digits.shape[1]:
            return False
        leaves = self.leaf_of(digits[0]).tolist()
        for leaf, column in zip(leaves, digits.T):
            used = np.zeros(self.sizes[leaf], np.int64)
            used[column - self.starts[leaf]] = 1
            if not used.all():
                self.split(leaf, used)
                return True
        if len(digits) == prod([self.sizes[leaf] for leaf in leaves]):
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
        if a > b:  # the older leaf stays: it may be the one that all other classes name
            a, b, left, right = b, a, right, left
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


def _same_width(left: Rows, right: Rows) -> tuple[Rows, Rows]:
    width = max(left.shape[1], right.shape[1])
    return widen(left, width), widen(right, width)


def _digits(rows: Rows) -> Rows:
    """The digits of positions that all have the same leaves."""
    return rows[:, 1:][:, rows[0, 1:] >= 0]


def _patterns_of_use(uses: Rows, elements: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each element a number for the set of what uses it, given sorted pairs of an element and a use."""
    starts = np.searchsorted(uses[:, 0], elements)
    ends = np.searchsorted(uses[:, 0], elements, side="right")
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(uses[i:j, 1].tobytes(), len(numbers)) for i, j in zip(starts, ends)])


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
