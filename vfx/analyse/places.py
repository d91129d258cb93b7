"""Where the channels of each leaf stand along an axis of labels, and where a permuted label is found."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.rows import count_rows, row_ids
from vfx.analyse.store import Rows, Store

Index = NDArray[np.int64]


def places(leaves: Store, rows: Rows) -> dict[int, Index | None]:
    """Leaf -> positions (size, copies) of its channels, copies in the order in which the first channel's stand.

    None where the labels are not closed under the leaf.
    """
    if rows.shape[1] > 2:
        owner = leaves.leaf_of(rows[:, 1:])
        tables = {x: _table(rows, owner == x, leaves.starts[x], leaves.sizes[x]) for x in leaves.free_leaves(rows)}
    elif not leaves.free_leaves(rows):
        return {}
    else:
        tables = _side_by_side(leaves, rows) or _runs(leaves, rows)
    return {x: table if table is None else table[:, np.argsort(table[0])] for x, table in tables.items()}


def _side_by_side(leaves: Store, rows: Rows) -> dict[int, Index | None] | None:
    """The usual labels of one digit, whole leaves one after the other (a concatenation), each in order; else None."""
    tags, elements = rows.T
    owner = leaves.leaf_of(elements)
    ends = (np.diff(elements) != 1) | (tags[1:] != tags[:-1]) | (owner[1:] != owner[:-1])
    bounds = np.concatenate([[0], np.flatnonzero(ends) + 1, [len(rows)]])
    first = bounds[:-1]
    starts: dict[int, list[int]] = {}
    for leaf, start, size in zip(owner[first].tolist(), first.tolist(), np.diff(bounds).tolist()):
        if leaf >= 0 and size != leaves.sizes[leaf]:
            return None
        starts.setdefault(leaf, []).append(start)
    if any(len(set(tags[at].tolist())) < len(at) for leaf, at in starts.items() if leaf >= 0 and len(at) > 1):
        return None
    return {x: np.add.outer(np.arange(leaves.sizes[x]), starts[x]) for x in leaves.free_leaves(rows)}


def _runs(leaves: Store, rows: Rows) -> dict[int, Index | None]:
    """Labels of one digit: sorted by it, each leaf is a run."""
    order = np.lexsort((rows[:, 0], rows[:, 1]))
    tags, elements = rows[order].T
    tables: dict[int, Index | None] = {}
    for leaf in leaves.free_leaves(rows):
        start, size = leaves.starts[leaf], leaves.sizes[leaf]
        first, last = np.searchsorted(elements, (start, start + size))
        run, copies = slice(first, last), (last - first) // size
        if size * copies != last - first:
            tables[leaf] = None
            continue
        tag, element = tags[run].reshape(size, copies), elements[run].reshape(size, copies)
        closed = (tag == tag[0]).all() and (element[:, -1] == element[:, 0]).all() and len(set(tag[0])) == copies
        tables[leaf] = order[run].reshape(size, copies) if closed else None
    return tables


def _table(rows: Rows, mask: NDArray[np.bool_], start: int, size: int) -> Index | None:
    where, column = np.nonzero(mask)
    element = rows[where, 1 + column] - start
    if (where[1:] == where[:-1]).any():  # two digits of one leaf on one position (an outer product with itself)
        keep = np.unique(where, return_index=True)[1]
        where, column, element = where[keep], column[keep], element[keep]
    rest = rows[where]
    rest[np.arange(len(where)), 1 + column] = -1
    table = _grid(where, element, rest, size)
    if table is not None:
        return table
    copy = row_ids(rest)
    copies = int(copy.max()) + 1
    if len(where) != size * copies:
        return None
    table = np.full((size, copies), -1, np.int64)
    table[element, copy] = where
    return table if (table >= 0).all() else None


def _grid(where: Index, element: Index, rest: Rows, size: int) -> Index | None:
    """The usual product: channels at equal steps, over and over; None for any other order."""
    step = int(np.argmax(element != element[0]))
    if not step or len(where) % (step * size):
        return None
    shape = -1, size, step
    others = rest.reshape(*shape, rest.shape[1])
    if (element.reshape(shape) != np.arange(size)[:, None]).any() or (others != others[:, :1]).any():
        return None
    if count_rows(others[:, 0].reshape(-1, rest.shape[1])) * size < len(where):
        return None
    return where.reshape(shape).transpose(1, 0, 2).reshape(size, -1)


def find(labels: Rows, wanted: Rows) -> Index:
    """Position of each wanted label."""
    key = row_ids(np.concatenate([labels, wanted]))
    position = np.full(int(key.max(initial=0)) + 1, -1, np.int64)
    position[key[: len(labels)]] = np.arange(len(labels))
    image = position[key[len(labels) :]]
    assert (image >= 0).all(), "a label has no image: the axis is not closed under its group"
    return image
