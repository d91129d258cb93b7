"""Distinct rows of integer arrays, fast: a row becomes one number, and numbers in a short range need no sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_SHORT = 4  # ranges up to this many times the number of rows are marked off in a table


def row_ids(rows: NDArray[Any]) -> Ints:
    """A number 0, 1, … for each row (n, k): equal rows have the same, and numbers follow the rows' sorted order."""
    key, span = np.zeros(len(rows), np.int64), 1
    if not len(rows):
        return key
    for column in rows.T:
        low, high = int(column.min()), int(column.max())
        if low == high:
            continue
        if span * (high - low + 1) >= 1 << 62:
            key = _ranks(key, span)
            span = int(key.max()) + 1
        key = key * (high - low + 1) + (column - low)
        span *= high - low + 1
    return _ranks(key, span)


def _ranks(key: Ints, span: int) -> Ints:
    if span > _SHORT * len(key) + 1024:
        return np.unique(key, return_inverse=True)[1].reshape(-1)
    present = np.zeros(span, bool)
    present[key] = True
    return (np.cumsum(present) - 1)[key]


def unique_rows(rows: NDArray[Any]) -> tuple[NDArray[Any], Ints]:
    """The distinct rows in sorted order, and the number of each row among them."""
    ids = row_ids(rows)
    values = np.empty((int(ids.max()) + 1 if len(ids) else 0, rows.shape[1]), rows.dtype)
    values[ids] = rows
    return values, ids


def count_rows(rows: NDArray[Any]) -> int:
    """Number of distinct rows."""
    return int(row_ids(rows).max()) + 1 if len(rows) else 0


def classes(rows: NDArray[Any]) -> list[Ints]:
    """Indices of the rows that are equal, class by class in sorted order."""
    ids = row_ids(rows)
    order = np.argsort(ids, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)


def distinct(values: NDArray[Any]) -> list[int]:
    """The distinct numbers ≥ 0 of an array, ascending; meant for numbers in a short range."""
    flat = values.reshape(-1)
    return np.flatnonzero(np.bincount(flat + 1)[1:]).tolist() if flat.size else []
