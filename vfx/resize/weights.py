"""Tensors of a resized network: each new position of a parameter holds the channel that was chosen for its slot.

``kept[g]`` has shape (n,): new channel j of group g is old channel kept[g][j], repeats allowed. For a group inside the
blocks of another it may be (blocks, n), row b for *new* block b, which then is old block kept[parent][b].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from vfx.analyse.places import Index
from vfx.analyse.store import Rows
from vfx.analyse.symmetry import Symmetry
from vfx.elements.axes import Ordered, acted
from vfx.resize.layout import Layout

Kept = Mapping[int, Index]  # by group index: the ``index`` of an element


class Gather:
    """Old positions of the new positions of parameters and activations, for one choice of channels."""

    def __init__(self, facts: Symmetry, layout: Layout, kept: Kept):
        self.facts, self.layout, self.kept = facts, layout, kept

    def tensor(self, fqn: str, tensor: Tensor) -> Tensor:
        """A parameter or norm statistic with its new channels; the same object where none of its axes changes."""
        axes = {dim: self._axis(rows) for dim, rows in self.facts.axes_of(fqn) if self.facts.leaves.free_leaves(rows)}
        return acted(tensor, axes)

    def index(self, rows: Rows) -> Index:
        """Old position of each new position of an axis."""
        sources = self._axis(rows).sources()
        return np.arange(len(rows)) if sources is None else sources

    def _axis(self, rows: Rows) -> Ordered:
        return Ordered(self.facts, self.facts.leaves.resolve(rows), self.kept, self.layout.line(rows))
