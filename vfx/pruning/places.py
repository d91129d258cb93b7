"""Where the channels of a group stand in a parameter, and the weights that read each of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry

Index = NDArray[np.int64]


def channels_along(facts: Symmetry, fqn: str, dim: int, group: int) -> tuple[Index, Index]:
    """Positions of an axis at which a group stands, and its channel there."""
    labels = facts.rows[fqn, dim]
    leaves = facts.leaves.leaf_of(labels[:, 1:])
    leaf = facts.leaf_of[group]
    where, column = np.nonzero(leaves == leaf)
    return where, labels[where, 1 + column] - facts.leaves.starts[leaf]


def blocks_along(facts: Symmetry, fqn: str, dim: int, group: Group) -> tuple[int | None, Index, Index]:
    """The block that an inner group's channels lie in.

    Where the blocks stand on the same axis: None, the positions of ``channels_along`` and the block at each. Else the
    axis on which they stand, the positions there, and the block at each.
    """
    assert group.parent is not None
    where, _ = channels_along(facts, fqn, dim, group.index)
    parents = {axis: channels_along(facts, fqn, axis, group.parent) for axis, _ in facts.axes_of(fqn)}
    block_of = dict(zip(*(x.tolist() for x in parents[dim])))
    if block_of:
        return None, where, np.array([block_of[place] for place in where.tolist()])
    across = next(axis for axis, (places, _) in parents.items() if len(places))
    return across, *parents[across]


def features_along(
    facts: Symmetry, group: Group, fqn: str, dim: int, weight: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The features (block × size + channel) that a weight reads on its axis ``dim``, and its weights on each.

    Features (n,) are distinct in each pair, the weights (n, outputs and taps). Copies of a feature along the axis come
    one after the other.
    """
    where, channel = channels_along(facts, fqn, dim, group.index)
    if group.parent is None:
        yield from _by_copy(weight.movedim(dim, 0)[where], channel)
        return
    across, places, block = blocks_along(facts, fqn, dim, group)
    if across is None:
        yield from _by_copy(weight.movedim(dim, 0)[where], block * group.size + channel)
        return
    for number in np.unique(block):
        rows = weight.movedim((dim, across), (0, 1))[where][:, places[block == number]]
        yield from _by_copy(rows, number * group.size + channel)


def _by_copy(rows: Tensor, feature: Index) -> Iterator[tuple[Tensor, Tensor]]:
    order = np.argsort(feature, kind="stable")
    _, starts = np.unique(feature[order], return_index=True)
    copy = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    for number in np.unique(copy):
        chosen = order[copy == number]
        yield torch.from_numpy(feature[chosen]), rows[chosen].reshape(len(chosen), -1)
