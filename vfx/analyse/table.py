"""What each element stands for: the leaf that owns it and, once that is bound, the label that took its place.

Elements are numbers; one table row answers for each, the last one for "none" (-1). So arrays of labels are read through
the table in one step, however many leaves stand in them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NO_TAG = 0


class Table:
    """``owner`` (elements,): leaf of each; ``image`` (1 + digits, elements): tag and elements in its place."""

    def __init__(self) -> None:
        self.owner = np.full(1 << 14, -1, np.int64)
        self.image = _blank(2, len(self.owner))

    def add(self, start: int, stop: int, leaf: int) -> Ints:
        """Elements of a new leaf, standing for themselves."""
        if stop >= len(self.owner):
            self._lengthen(2 * stop - len(self.owner))
        self.owner[start:stop] = leaf
        elements = self.image[1, start:stop]
        elements[:] = np.arange(start, stop)
        return elements

    def write(self, start: int, rows: Ints) -> None:
        """The elements from ``start`` on stand for these labels."""
        extra = rows.shape[1] - len(self.image)
        if extra > 0:
            self.image = np.concatenate([self.image, np.full((extra, len(self.owner)), -1)])
        place = self.image[:, start : start + len(rows)]
        place[: rows.shape[1]] = rows.T
        place[rows.shape[1] :] = -1

    def read(self, elements: Ints, width: int) -> Ints:
        """The labels (n, ``width``) in place of elements (n,), whose digits fit in."""
        return self.image[:width].take(elements, axis=1).T

    def _lengthen(self, count: int) -> None:
        self.owner = np.concatenate([self.owner, np.full(count, -1)])
        self.image = np.concatenate([self.image, _blank(len(self.image), count)], axis=1)


def _blank(width: int, count: int) -> Ints:
    image = np.full((width, count), -1, np.int64)
    image[0] = NO_TAG
    return image
