"""Axes of a tensor that are acted on one after the other, and those whose blocks stand on another axis block by block.

``Ordered`` is an axis whose new positions hold old ones: permuted, or with channels left out and repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfx.analyse.labelling import Labelling
from vfx.analyse.places import Index, find
from vfx.analyse.store import Rows, Store
from vfx.elements.permutations import Permutations

Digits = list[tuple[int, int, NDArray[np.bool_]]]  # leaf, group, and where its digits stand


class ActedAxis(Protocol):
    """One axis of a tensor and what is done to it."""

    @property
    def parent_apart(self) -> int | None:
        """The parent of a group on this axis whose channels stand on another axis of the tensor."""

    def blocks(self, parent: int) -> Index | None:
        """The channel of a parent at each new position (0 where it does not stand); None where it stands nowhere."""

    def apply(self, tensor: Tensor, dim: int, block: int | None = None) -> Tensor:
        """The tensor with this axis acted on; ``block`` is the parent's new channel where that stands elsewhere."""


def acted(tensor: Tensor, axes: Mapping[int, ActedAxis], standing: Mapping[int, ActedAxis] | None = None) -> Tensor:
    """A tensor whose ``axes``, by dimension, are acted on; blocks may be ``standing`` on others that are not."""
    apart = {dim: parent for dim, axis in axes.items() if (parent := axis.parent_apart) is not None}
    for dim, axis in axes.items():
        if dim not in apart:
            tensor = axis.apply(tensor, dim)
    for dim, parent in apart.items():
        tensor = _in_blocks(tensor, dim, axes[dim], standing or axes, parent)
    return tensor


def _in_blocks(tensor: Tensor, dim: int, acted: ActedAxis, axes: Mapping[int, ActedAxis], parent: int) -> Tensor:
    """Block by block: the parent's axis is acted on already, and says which block each of its positions is."""
    for across, axis in axes.items():
        blocks = axis.blocks(parent) if across != dim else None
        if blocks is None:
            continue
        result: Tensor | None = None
        for block in np.unique(blocks).tolist():
            where = torch.from_numpy(np.flatnonzero(blocks == block)).to(tensor.device)
            part = acted.apply(tensor.index_select(across, where), dim, block)
            if result is None:
                shape = [part.shape[d] if d == dim else size for d, size in enumerate(tensor.shape)]
                result = tensor.new_empty(shape)
            result.index_copy_(across, where, part)
        assert result is not None
        return result
    raise AssertionError(f"group {parent} stands on no other axis")


# order ----------------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """New positions of one axis: the old position (n,) of each, and the new rank (n, digits) of each of its digits."""

    position: Index
    rank: Index


def unresized(labelling: Labelling, labels: Rows) -> Line:
    """The positions of an axis that keeps its size."""
    return labelling.leaves.once(_whole, labels)


def _whole(leaves: Store, labels: Rows) -> Line:
    owner = leaves.leaf_of(labels[:, 1:])
    starts = np.array([*leaves.starts, 0])[owner]  # the last entry answers for "none" (-1)
    return Line(np.arange(len(labels)), np.where(owner >= 0, labels[:, 1:] - starts, -1))


@dataclass(frozen=True, eq=False)
class Ordered:
    """An axis with resolved ``labels`` whose new position p holds the old one that ``index`` names for its digits.

    ``index`` gives for each group new channel → old channel, as an ``Element`` does; groups left out stay.
    """

    labelling: Labelling
    labels: Rows
    index: Permutations
    line: Line

    @property
    def parent_apart(self) -> int | None:
        here = {group for _, group, _ in self.labelling.digits(self.labels)}
        inner = [group for group in here if (index := self.index.get(group)) is not None and index.ndim == 2]
        parents = {self.labelling.groups[group].parent for group in inner} - here
        assert len(parents) <= 1, "blocks of two groups on one axis"
        return next(iter(parents), None)

    def blocks(self, parent: int) -> Index | None:
        for _, group, mask in self.labelling.digits(self.labels[self.line.position]):
            if group == parent:
                return np.where(mask, self.line.rank, 0).sum(axis=1)
        return None

    def apply(self, tensor: Tensor, dim: int, block: int | None = None) -> Tensor:
        index = self.sources(block)
        return tensor if index is None else tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))

    def sources(self, block: int | None = None) -> Index | None:
        """Old position of each new position; None where every one stays."""
        wanted = self.labels[self.line.position]
        digits = self.labelling.digits(wanted)
        for leaf, group, mask in digits:
            index = self.index.get(group)
            if index is None:
                continue
            rank = self.line.rank[mask]
            rank = index[self._block(group, digits, mask, block), rank] if index.ndim == 2 else index[rank]
            wanted[:, 1:][mask] = self.labelling.leaves.starts[leaf] + rank
        if len(wanted) == len(self.labels) and (wanted == self.labels).all():
            return None
        return find(self.labels, wanted)

    def _block(self, group: int, digits: Digits, mask: NDArray[np.bool_], block: int | None) -> Index | int | None:
        """The new channel of a group's parent where the group's digits stand."""
        parent = self.labelling.groups[group].parent
        blocks = next((where for _, group, where in digits if group == parent), None)
        return block if blocks is None else np.where(blocks, self.line.rank, 0).sum(axis=1)[np.nonzero(mask)[0]]
