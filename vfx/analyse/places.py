"""Where the channels of each leaf stand along an axis of labels, and where a permuted label is found."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.rows import row_ids
from vfx.analyse.store import Rows, Store

Index = NDArray[np.int64]


def places(leaves: Store, rows: Rows) -> dict[int, Index | None]:
    """Leaf -> positions (size, copies) of its channels, copies in the order in which the first channel's stand.

    None where the labels are not closed under the leaf.
    """
    if rows.shape[1] == 2:
        found = _runs(leaves, rows)
    else:
        owner = leaves.leaf_of(rows[:, 1:])
        found = {x: _table(rows, owner == x, leaves.starts[x], leaves.sizes[x]) for x in leaves.free_leaves(rows)}
    return {x: table if table is None else table[:, np.argsort(table[0])] for x, table in found.items()}


def _runs(leaves: Store, rows: Rows) -> dict[int, Index | None]:
    """Labels of one digit: sorted by it, each leaf is a run."""
    order = np.lexsort((rows[:, 0], rows[:, 1]))
    tags, elements = rows[order].T
    found: dict[int, Index | None] = {}
    for leaf in leaves.free_leaves(rows):
        start, size = leaves.starts[leaf], leaves.sizes[leaf]
        first, last = np.searchsorted(elements, (start, start + size))
        run, copies = slice(first, last), (last - first) // size
        if size * copies != last - first:
            found[leaf] = None
            continue
        tag, element = tags[run].reshape(size, copies), elements[run].reshape(size, copies)
        closed = (tag == tag[0]).all() and (element[:, -1] == element[:, 0]).all() and len(set(tag[0])) == copies
        found[leaf] = order[run].reshape(size, copies) if closed else None
    return found


def _table(rows: Rows, mask: NDArray[np.bool_], start: int, size: int) -> Index | None:
    where, column = np.nonzero(mask)
    element = rows[where, 1 + column] - start
    if np.bincount(where).max(initial=0) > 1:  # two digits of one leaf on one position (an outer product with itself)
        keep = np.unique(where, return_index=True)[1]
        where, column, element = where[keep], column[keep], element[keep]
    rest = rows[where].copy()
    rest[np.arange(len(where)), 1 + column] = -1
    copy = row_ids(rest)
    copies = int(copy.max()) + 1
    if len(where) != size * copies:
        return None
    table = np.full((size, copies), -1, np.int64)
    table[element, copy] = where
    return table if (table >= 0).all() else None


def find(labels: Rows, wanted: Rows) -> Index:
    """Position of each wanted label."""
    key = row_ids(np.concatenate([labels, wanted]))
    position = np.full(int(key.max()) + 1, -1, np.int64)
    position[key[: len(labels)]] = np.arange(len(labels))
    found = position[key[len(labels) :]]
    assert (found >= 0).all(), "a label has no image: the axis is not closed under its group"
    return found
