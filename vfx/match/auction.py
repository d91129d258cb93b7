"""Prices of columns that bring a large linear assignment near to its end before it is solved.

Taking a price p_j off all gains of column j takes Σ p_j off every assignment: the best one stays the best. An auction
raises the prices of columns that several rows want (Bertsekas, *The auction algorithm*, Annals of Operations Research
14, 1988, §1): each row without a column bids for the one that gives it most, as much as that is ahead of its next
best, and ε. All rows bid at once, in float32, and the last few are left: what is found are prices, not the assignment,
and the exact solver goes on from there. Behind them its augmenting paths are a few steps long.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.places import Index

Gain = NDArray[np.floating]
SMALLEST = 512  # rows from which on an auction takes less time than it saves
TINY = 1e-300  # gains up to here are no numbers to divide by
COLUMNS, PARTS = 128, 16  # that a row bids for, and in how many parts rows are searched for them
STEP = 0.01  # ε, a share of how far a row's best column is ahead of its next on average
LEFT, BIDS = 0.001, 20  # the share of rows that may be left without a column, and bids a row at most


def costs(gain: Gain) -> Gain | None:
    """What an assignment of a large square gain (n, n) is to minimise; None where its gain alone does as well."""
    if len(gain) < SMALLEST or gain.shape[0] != gain.shape[1]:
        return None
    largest = max(float(gain.max()), -float(gain.min()))
    if not TINY < largest < np.inf:
        return None
    return largest * _prices(gain, largest).astype(np.float64) - gain


def _prices(gain: Gain, largest: float) -> NDArray[np.float32]:
    """Prices (n,) of the columns of a gain over its ``largest``, by bids for each row's best columns alone.

    A row to which none of these gives more than a column beside them might drops out.
    """
    count = len(gain)
    chosen, values = _best_columns(gain, largest)
    beside = values.min(1)
    prices, owner = np.zeros(count, np.float32), np.full(count, -1)
    free, bids, step = np.arange(count), 0, 0.0
    while len(free) > LEFT * count and bids < BIDS * count:
        bids += len(free)
        columns, net = chosen[free], values[free] - prices[chosen[free]]
        rows, at = np.arange(len(free)), net.argmax(1)
        best, most = columns[rows, at], net[rows, at]
        net[rows, at] = -np.inf
        ahead = most - np.maximum(net.max(1), beside[free])
        bidding = ahead >= 0
        free, best, ahead = free[bidding], best[bidding], ahead[bidding]
        step = step or STEP * float(ahead.mean())
        bid = prices[best] + ahead + step
        rising = np.argsort(bid, kind="stable")  # of several bids for a column the last that is written counts
        before = owner[best]
        prices[best[rising]], owner[best[rising]] = bid[rising], free[rising]
        won = owner[best] == free
        free = np.concatenate([free[~won], before[won & (before >= 0)]])
    return prices


def _best_columns(gain: Gain, largest: float) -> tuple[Index, NDArray[np.float32]]:
    """The columns (n, k) that give each row most, in no order, and what they give, a share of the ``largest``."""
    chosen, values = [], []
    for rows in np.array_split(gain, PARTS):
        scaled = np.divide(rows, largest).astype(np.float32)
        chosen.append(np.argpartition(scaled, -COLUMNS, axis=1)[:, -COLUMNS:])
        values.append(np.take_along_axis(scaled, chosen[-1], 1))
    return np.concatenate(chosen), np.concatenate(values)
