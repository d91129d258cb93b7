"""Tensors of a resized network: each new position of a parameter holds the channel that was chosen for its slot.

``kept[g]`` has shape (n,): new channel j of group g is old channel kept[g][j], repeats allowed. For a group inside the
blocks of another it may be (blocks, n), row b for *new* block b, which then is old block kept[parent][b].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.places import Index
from vfx.analyse.rows import distinct, row_ids
from vfx.analyse.store import Rows
from vfx.analyse.symmetry import Symmetry
from vfx.resize.layout import Layout, Line

Kept = Mapping[int, Index]  # by group index


class Gather:
    """Old positions of the new positions of parameters and activations, for one choice of channels."""

    def __init__(self, facts: Symmetry, layout: Layout, kept: Kept):
        self.facts, self.layout, self.kept = facts, layout, kept
        self.leaves = facts.leaves

    def tensor(self, fqn: str, tensor: Tensor) -> Tensor:
        """A parameter or norm statistic with its new channels; the same object where none of its axes changes."""
        axes = {dim: rows for dim, rows in self.facts.axes_of(fqn) if self._concerned(rows)}
        apart = {dim: parent for dim, rows in axes.items() if (parent := self._parent_apart(rows)) is not None}
        for dim in axes.keys() - apart.keys():
            tensor = _select(tensor, dim, self.index(axes[dim]))
        for dim, parent in apart.items():
            tensor = self._in_blocks(tensor, dim, axes[dim], parent, axes)
        return tensor

    def index(self, rows: Rows, block: int | None = None) -> Index:
        """Old position of each new position of an axis; ``block`` is the parent's new channel, if not on it."""
        line = self.layout.line(rows)
        labels = self.leaves.resolve(rows)
        wanted = labels[line.position].copy()
        leaves = self.leaves.leaf_of(wanted[:, 1:])
        for leaf in distinct(leaves):
            group = self.facts.group_of.get(leaf)
            if group is not None and group in self.kept:
                here = leaves == leaf
                wanted[:, 1:][here] = self.leaves.starts[leaf] + self._channel(group, line, leaves, here, block)
        return _find(labels, wanted)

    def _channel(self, group: int, line: Line, leaves: Index, here: Index, block: int | None) -> Index:
        """Old channel at each new position of a group's digits."""
        rank, kept = line.rank[here], self.kept[group]
        if kept.ndim == 1:
            return kept[rank]
        if block is not None:
            return kept[block, rank]
        parent = self._leaf(self.facts.groups[group].parent or 0)
        outer = np.where(leaves == parent, line.rank, 0).sum(axis=1)
        return kept[outer[np.nonzero(here)[0]], rank]

    def _concerned(self, rows: Rows) -> bool:
        return any(self.facts.group_of.get(leaf) in self.kept for leaf in self.leaves.free_leaves(rows))

    def _leaf(self, group: int) -> int:
        return self.facts.leaf_of[group]

    def _parent_apart(self, rows: Rows) -> int | None:
        """The parent of a group on this axis that stands on another axis of the tensor."""
        here = {self.facts.group_of.get(leaf) for leaf in self.leaves.free_leaves(rows)}
        inner = [g for g in here if g is not None and g in self.kept and self.kept[g].ndim == 2]
        found = {self.facts.groups[g].parent for g in inner} - here
        assert len(found) <= 1, "blocks of two groups on one axis"
        return next(iter(found), None)

    def _in_blocks(self, tensor: Tensor, dim: int, rows: Rows, parent: int, axes: Mapping[int, Rows]) -> Tensor:
        """Block by block: the other axis, already selected, says which block each of its positions is."""
        leaf = self._leaf(parent)
        other = next(d for d, own in axes.items() if d != dim and leaf in self.leaves.free_leaves(own))
        leaves = self.leaves.leaf_of(self.leaves.resolve(axes[other])[self.layout.line(axes[other]).position][:, 1:])
        block = np.where(leaves == leaf, self.layout.line(axes[other]).rank, 0).sum(axis=1)
        parts = [
            _select(tensor.narrow(other, place, 1), dim, self.index(rows, value))
            for place, value in enumerate(block.tolist())
        ]
        return torch.cat(parts, other)


def _select(tensor: Tensor, dim: int, index: Index) -> Tensor:
    if len(index) == tensor.shape[dim] and (index == np.arange(len(index))).all():
        return tensor
    return tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))


def _find(labels: Rows, wanted: Rows) -> Index:
    """Position of each wanted label."""
    key = row_ids(np.concatenate([labels, wanted]))
    position = np.full(int(key.max(initial=0)) + 1, -1, np.int64)
    position[key[: len(labels)]] = np.arange(len(labels))
    found = position[key[len(labels) :]]
    assert (found >= 0).all(), "a label has no image: the axis is not closed under its group"
    return found
