"""Linear maps of a group's channels into a common space, for the methods that find more than permutations.

ZipIt!, CCA merging and optimal transport send the C channels x of an edge to common ones, z = merge · x, and back,
x ≈ unmerge · z. A layer that makes the feature becomes merge · W, one that reads it W · unmerge: elements with a way
back of their own. What no dense map can act on (depthwise kernels, norm gains, layer scale) follows the nearest
permutation. Behind a map the function is kept only as far as activation functions commute with it.
"""

from __future__ import annotations

import numpy as np

from vfx.analyse.grids import grid
from vfx.analyse.places import Index
from vfx.analyse.store import Rows
from vfx.analyse.symmetry import Group, Member, Symmetry


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
    tables = [
        grid(groups, digits, position, chosen, sizes)
        for groups, digits, position in symmetry.features(labels)
        if set(chosen) <= set(groups)
    ]
    if not tables:
        return None
    return np.concatenate(
        [table.reshape(-1 if len(chosen) == 2 else 1, group.size, table.shape[-1]) for table in tables], -1
    )
