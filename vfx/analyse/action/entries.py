"""Entries: which slots stand where in a tensor.

For each leaf of a tensor an array of slot numbers, of the tensor's rank: size 1 along axes on which all positions have
the same slot, -1 where the leaf does not stand. A leaf that stands on several axes of one tensor (a square weight that
reads what it makes) has an entry for each, with the axis in its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.classes import Maps
from vfx.analyse.rows import unique_rows
from vfx.analyse.slots import Slots

Ids = NDArray[np.int64]
Key = tuple[int, int]  # the leaf, and the axis where it stands on several (else -1)
Entries = dict[Key, Ids]
ANY = -1


def constant(slot: int, rank: int) -> Ids:
    """One slot everywhere."""
    return np.full((1,) * rank, slot, np.int64)


def shrunk(ids: Ids) -> Ids:
    """Size 1 along axes on which nothing varies."""
    for d, size in enumerate(ids.shape):
        if size > 1:
            first = ids.take([0], d)
            if (ids == first).all():
                ids = first
    return ids


def padded(ids: Ids, rank: int) -> Ids:
    """Axes of size 1 in front, up to a rank."""
    return ids.reshape((1,) * (rank - ids.ndim) + ids.shape)


def distinct(ids: Ids) -> list[int]:
    """The slots in an array."""
    last = int(ids.max())
    if last < 0:
        return []
    if ids.size == 1 or ((ids == last) | (ids < 0)).all():  # the usual case
        return [last]
    return [slot for slot in np.unique(ids).tolist() if slot >= 0]


def pairs(left: Ids, right: Ids) -> list[tuple[int, int]]:
    """The pairs of slots that stand together in two arrays that broadcast."""
    if left.shape == right.shape:
        a, b = int(left.max()), int(right.max())
        mask = left >= 0
        if (mask == (right >= 0)).all() and (left[mask] == a).all() and (right[mask] == b).all():  # the usual case
            return [(a, b)]
    both = np.broadcast_arrays(left, right)
    distinct, _ = unique_rows(np.stack([ids.reshape(-1) for ids in both], axis=1))
    return [(a, b) for a, b in distinct.tolist()]


class Joint(Slots):
    """Slots, and what is said of whole arrays of them."""

    def restrict(self, ids: Ids, maps: Maps) -> None:
        """All these slots go through maps of a class."""
        if maps is not Maps.LINEAR:
            for slot in distinct(ids):
                self.lower(slot, maps)

    def equal(self, arrays: Sequence[Ids], dual: bool = False) -> Ids:
        """Arrays that broadcast carry the same map position by position (the last the dual one); the common array.

        Where one array has no slot its values are uniform along the leaf: the others' map must keep them so.
        """
        if all(ids.size == 1 for ids in arrays):
            slots = [int(ids.flat[0]) for ids in arrays]
            for slot in slots[1:]:
                self._pair(slots[0], slot, dual)
            return arrays[0]
        result = arrays[0]
        for ids in arrays[1:]:
            for left, right in pairs(result, ids):
                self._pair(left, right, dual)
            result = np.maximum(result, ids)
        return result

    def _pair(self, left: int, right: int, dual: bool) -> None:
        if left >= 0 and right >= 0:
            self.tie(left, right, dual)
        elif left >= 0 or right >= 0:
            self.lower(max(left, right), Maps.PERMUTATION)

    def collapse(self, ids: Ids, dims: Iterable[int]) -> Ids:
        """What stands along these axes goes through one map; the array with size 1 there."""
        for d in dims:
            if ids.shape[d] > 1:
                common = ids.max(d, keepdims=True)
                self.equal([common, ids])
                ids = common
        return ids
