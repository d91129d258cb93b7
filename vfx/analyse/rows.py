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
    return key if present.all() else (np.cumsum(present) - 1)[key]


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
    """The distinct numbers ≥ 0 of an array, ascending; meant for numbers ≥ -1 in a short range."""
    if not values.size:
        return []
    low, high = int(values.min()), int(values.max())
    if low == high:  # the usual case
        return [low] if low >= 0 else []
    present = np.bincount(values.reshape(-1) - low) > 0
    return [low + index for index in np.flatnonzero(present).tolist() if low + index >= 0]


def beside(first: NDArray[Any], *others: NDArray[Any]) -> NDArray[Any]:
    """A column (n,) and arrays (n, k) side by side."""
    result = np.empty((len(first), 1 + sum(table.shape[1] for table in others)), np.int64)
    result[:, 0] = first
    start = 1
    for rows in others:
        result[:, start : start + rows.shape[1]] = rows
        start += rows.shape[1]
    return result
