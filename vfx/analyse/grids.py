"""Features of an axis as tables with one axis for each group that moves them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vfx.analyse.places import Index


def grid(groups: Sequence[int], digits: Index, position: Index, chosen: Sequence[int], sizes: Sequence[int]) -> Index:
    """Positions as an array with one axis for each of the ``chosen`` groups, and all else (copies) in the last.

    ``digits`` (n, groups) and ``position`` (n, copies) describe features as ``Labelling.features`` does.
    """
    order = [*(list(groups).index(g) for g in chosen), *(k for k, g in enumerate(groups) if g not in chosen)]
    rank = np.lexsort(digits[:, order[::-1]].T)
    return position[rank].reshape(*sizes, -1)
