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
    """``owner`` (elements,): leaf of each; ``image`` (elements, 1 + digits): tag and elements in its place."""

    def __init__(self) -> None:
        self.owner = np.full(1024, -1, np.int64)
        self.image = np.full((1024, 2), -1, np.int64)
        self.image[:, 0] = NO_TAG

    def add(self, start: int, stop: int, leaf: int) -> Ints:
        """Elements of a new leaf, standing for themselves."""
        if stop >= len(self.owner):
            self._lengthen(2 * stop - len(self.owner))
        self.owner[start:stop] = leaf
        elements = np.arange(start, stop)
        self.image[start:stop, 1] = elements
        return elements

    def write(self, start: int, rows: Ints) -> None:
        """The elements from ``start`` on stand for these labels."""
        extra = rows.shape[1] - self.image.shape[1]
        if extra > 0:
            self.image = np.pad(self.image, ((0, 0), (0, extra)), constant_values=-1)
        place = self.image[start : start + len(rows)]
        place[:, : rows.shape[1]] = rows
        place[:, rows.shape[1] :] = -1

    def read(self, elements: Ints, width: int) -> Ints:
        """The labels (n, ``width``) in place of elements (n,), whose digits fit in."""
        return self.image.take(elements, axis=0)[:, :width]

    def _lengthen(self, count: int) -> None:
        self.owner = np.pad(self.owner, (0, count), constant_values=-1)
        self.image = np.pad(self.image, ((0, count), (0, 0)), constant_values=-1)
        self.image[-count:, 0] = NO_TAG
