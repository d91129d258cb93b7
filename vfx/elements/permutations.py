"""Permutations of the channels of groups: drawn, composed, undone, applied to channels.

A group has one permutation p of shape (size,): new channel j is old channel p[j]. A group inside the blocks of another,
its ``parent``, has one for each block (wreath product), shape (blocks, size): channel j of new block b is channel
p[b, j] of the old block that the parent's permutation puts there. One permutation for all blocks, (size,), is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from vfx.analyse.places import Index

Permutations = Mapping[int, Index]  # by group index


class Permutable(Protocol):
    """What an element needs to know of a group."""

    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def parent(self) -> int | None: ...
    @property
    def blocks(self) -> tuple[int, int]: ...


def still_permutations(groups: Sequence[Permutable]) -> dict[int, Index]:
    """The element that moves nothing."""
    return {g.index: np.arange(g.size) if g.parent is None else _rows(np.arange(g.size), g) for g in groups}


def random_permutations(groups: Sequence[Permutable], generator: np.random.Generator) -> dict[int, Index]:
    """A random element that moves every group, in every block."""
    return {
        g.index: _moving(g.size, generator)
        if g.parent is None
        else np.stack([_moving(g.size, generator) for _ in range(g.blocks[0])])
        for g in groups
    }


def _moving(size: int, generator: np.random.Generator) -> Index:
    """A random permutation other than the identity."""
    while True:
        permutation = generator.permutation(size)
        if size < 2 or (permutation != np.arange(size)).any():
            return permutation


def inverse_permutations(groups: Sequence[Permutable], element: Permutations) -> dict[int, Index]:
    """The element that undoes another."""
    inverses: dict[int, Index] = {}
    for group in groups:
        index = element.get(group.index)
        if index is None:
            continue
        inverses[group.index] = np.argsort(index, axis=-1)
        if index.ndim == 2:  # new block b came from old block outer[b]: there its order is undone
            inverses[group.index] = inverses[group.index][np.argsort(_outer(element, group))]
        elif group.parent is not None:
            inverses[group.index] = _rows(inverses[group.index], group)
    return inverses


def compose_permutations(groups: Sequence[Permutable], first: Permutations, then: Permutations) -> dict[int, Index]:
    """The element that does ``first``, and ``then`` to its result."""
    composed = dict(first)
    for group in groups:
        if group.index not in then and (group.parent is None or group.parent not in then):
            continue
        earlier = first.get(group.index, np.arange(group.size))
        two = then.get(group.index, np.arange(group.size))
        if group.parent is None:
            composed[group.index] = earlier[two]
        else:
            rows = _rows(earlier, group)[_outer(then, group)]
            composed[group.index] = np.take_along_axis(rows, _rows(two, group), axis=1)
    return composed


def moved(groups: Sequence[Permutable], columns: Sequence[int], digits: Index, element: Permutations) -> Index:
    """Old channels (n, k) of new channels ``digits`` (n, k), column k being the channels of group ``columns[k]``."""
    old = digits.copy()
    for k, index in enumerate(columns):
        permutation = element.get(index)
        if permutation is None:
            continue
        if permutation.ndim == 1:
            old[:, k] = permutation[digits[:, k]]
        else:
            parent = groups[index].parent
            assert parent is not None
            old[:, k] = permutation[digits[:, list(columns).index(parent)], digits[:, k]]
    return old


def _outer(element: Permutations, group: Permutable) -> Index:
    assert group.parent is not None
    return element.get(group.parent, np.arange(group.blocks[0]))


def _rows(permutation: Index, group: Permutable) -> Index:
    """One permutation for each block."""
    if permutation.ndim == 2:
        return permutation
    return np.repeat(permutation[None], group.blocks[0], axis=0)
