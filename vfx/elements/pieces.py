"""Pieces of a weight on whose every position the same groups act, read with an axis for each of these groups."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.grids import grid
from vfx.analyse.labelling import Labelling
from vfx.analyse.places import Index
from vfx.analyse.store import Rows

Found = TypeVar("Found")  # an entry, alone or with what is known of it


class Entry(NamedTuple):
    """Positions along one dimension of a weight that the same groups move: (channels of each group…, everything else).

    Where nothing moves there are no ``groups``.
    """

    dim: int
    position: Index
    groups: tuple[int, ...]


class Standing(NamedTuple):
    """A group on a dimension of a weight, and its axis in the piece."""

    group: int
    dim: int
    axis: int


@dataclass(frozen=True)
class Piece:
    """A part of a weight; ``stands`` are the groups that act on it. Read, it has the ``sizes`` of ``read``'s result."""

    fqn: str
    places: tuple[tuple[int, Tensor], ...]  # dimension and positions, where these are not all in order
    sizes: tuple[int, ...]
    stands: tuple[Standing, ...]

    def read(self, tensor: Tensor) -> Tensor:
        """The piece of a weight: for each dimension an axis for each group, and one for all else."""
        for dim, index in self.places:
            tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor.reshape(self.sizes)


def entries(labelling: Labelling, dim: int, labels: Rows, wanted: Collection[int] | None = None) -> list[Entry] | None:
    """A dimension by the groups (of those ``wanted``) that move its positions, and at the end what they leave.

    Empty where they move nothing; None where their channels are no full product.
    """
    axis_entries, left = [], np.ones(len(labels), bool)
    for groups, digits, position in labelling.features(labels):
        chosen = tuple(group for group in groups if wanted is None or group in wanted)
        if not chosen:
            continue
        sizes = [labelling.groups[group].size for group in chosen]
        if len(digits) % int(np.prod(sizes)):
            return None
        axis_entries.append(Entry(dim, grid(groups, digits, position, chosen, sizes), chosen))
        left[position] = False
    if axis_entries and left.any():
        axis_entries.append(Entry(dim, np.flatnonzero(left), ()))
    return axis_entries


def combinations(axes: Sequence[Sequence[Found]]) -> Iterator[tuple[Found, ...]]:
    """One entry of each dimension that has any: those of one piece."""
    return product(*filter(None, axes))


def piece(labelling: Labelling, fqn: str, chosen: Sequence[Entry]) -> Piece:
    """The piece where some entries cross; dimensions without one are whole."""
    shape = labelling.program.weights[0][fqn].shape
    at = {entry.dim: entry for entry in chosen}
    sizes: list[int] = []
    stands: list[Standing] = []
    for dim, size in enumerate(shape):
        entry = at.get(dim)
        if entry is not None:
            stands += [Standing(group, dim, len(sizes) + k) for k, group in enumerate(entry.groups)]
        sizes += (size,) if entry is None else entry.position.shape
    order = {entry.dim: entry.position.reshape(-1) for entry in chosen}
    moved = {d: new for d, new in order.items() if len(new) != shape[d] or (new != np.arange(len(new))).any()}
    places = tuple((dim, torch.from_numpy(index)) for dim, index in moved.items())
    return Piece(fqn, places, tuple(sizes), tuple(stands))
