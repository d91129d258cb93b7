"""Linear maps of a group's channels into a common space, for the methods that find more than permutations.

ZipIt!, CCA merging and optimal transport send the C channels x of an edge to common ones, z = merge · x, and back,
x ≈ unmerge · z. A layer that makes the feature becomes merge · W, one that reads it W · unmerge. The maps stand behind
the nearest permutation, so that what no dense map can act on (depthwise kernels, norm gains, layer scale) is aligned
too and stays as it is. Behind a map the function is kept only as far as activation functions commute with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.elements import Index
from vfx.analyse.grids import grid
from vfx.analyse.store import Rows

if TYPE_CHECKING:
    from vfx.analyse.symmetry import Group, Member, Symmetry
    from vfx.program import Weights


@dataclass(frozen=True, eq=False)
class Map:
    """``merge`` (C, C) into the common space and ``unmerge`` (C, C) back, float64.

    For a group inside blocks (blocks, C, C): one for each block.
    """

    merge: Tensor
    unmerge: Tensor


Maps = Mapping[int, Map]  # by group index


@dataclass(frozen=True, eq=False)
class Transport:
    """The maps of every edge, and the symmetry whose groups they act on."""

    symmetry: Symmetry
    maps: tuple[Maps, ...]

    def weights(self, edge: int, weights: Weights, frozen: frozenset[str] = frozenset()) -> dict[str, Tensor]:
        """One edge's weights with its maps in them; tensors named in ``frozen`` stay as they are."""
        result = dict(weights)
        for index, own in self.maps[edge].items():
            group = self.symmetry.groups[index]
            for member in group.members:
                if member.role == "elementwise" or member.fqn in frozen or member.fqn not in result:
                    continue
                matrix = own.merge if member.role == "out" else own.unmerge.mT
                where = places(self.symmetry, dict(self.symmetry.axes_of(member.fqn))[member.dim], group)
                assert where is not None, f"{member.fqn}[{member.dim}] does not hold the blocks of its group"
                result[member.fqn] = apply_along(result[member.fqn], member.dim, where, matrix)
        return result

    def axis(self, edge: int, node: fx.Node, dim: int, back: bool = False) -> Tensor | None:
        """The matrix (size, size) that maps one axis of an activation, ``back`` from the common space.

        None where nothing acts on it.
        """
        labels = self.symmetry.labels(node, dim)
        matrix = None
        for index, own in self.maps[edge].items() if labels is not None else ():
            assert labels is not None
            where = places(self.symmetry, labels, self.symmetry.groups[index])
            if where is not None:
                matrix = torch.eye(len(labels), dtype=torch.float64) if matrix is None else matrix
                matrix = apply_along(matrix, 0, where, own.unmerge if back else own.merge)
        return matrix


def mappable(symmetry: Symmetry, group: Group) -> bool:
    """Whether a linear map can go through a group: it is made by some layers and read by others, as whole channels.

    Queries and keys meet each other, not a layer; a tensor that both makes and reads a feature (tied embeddings) would
    need the map and its inverse at once; a group with others inside its blocks moves whole blocks.
    """
    roles = {member.role for member in group.members}
    if not {"out", "in"} <= roles or "tied" in roles or any(g.parent == group.index for g in symmetry.groups):
        return False
    return all(_holds_blocks(symmetry, group, member) for member in group.members if member.role != "elementwise")


def _holds_blocks(symmetry: Symmetry, group: Group, member: Member) -> bool:
    return places(symmetry, dict(symmetry.axes_of(member.fqn))[member.dim], group) is not None


def places(symmetry: Symmetry, labels: Rows, group: Group) -> Index | None:
    """Where a group's channels stand along an axis: (blocks, size, copies); None if they, or their blocks, do not."""
    chosen = [group.index] if group.parent is None else [group.parent, group.index]
    sizes = [symmetry.groups[index].size for index in chosen]
    found = [
        grid(groups, digits, position, chosen, sizes)
        for groups, digits, position in symmetry.features(labels)
        if set(chosen) <= set(groups)
    ]
    if not found:
        return None
    return np.concatenate(
        [table.reshape(-1 if len(chosen) == 2 else 1, group.size, table.shape[-1]) for table in found], -1
    )


def apply_along(tensor: Tensor, dim: int, where: Index, matrix: Tensor) -> Tensor:
    """A tensor whose slices at ``where`` (blocks, size, copies) along ``dim`` are mixed by a matrix (…, size, size)."""
    index = torch.from_numpy(where.reshape(-1)).to(tensor.device)
    rows = tensor.index_select(dim, index).movedim(dim, 0)
    flat = rows.reshape(*where.shape, -1).double()
    matrix = matrix.to(flat).expand(len(where), -1, -1)
    mixed = torch.einsum("bmc,bckr->bmkr", matrix, flat).reshape(rows.shape).movedim(0, dim)
    return tensor.index_copy(dim, index, mixed.to(tensor.dtype))
