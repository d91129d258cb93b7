"""What an element of the full symmetry class does to the activations of a network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.classes import contragredient
from vfx.analyse.elements import Index
from vfx.analyse.grids import grid
from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.transform import Element, Elements, Part, alike, mapped, parts
from vfx.errors import ArchitectureError
from vfx.operators import is_layer, output_axis, weight_name


def along(symmetry: Symmetry, node: fx.Node, dim: int, chosen: Elements) -> Tensor | None:
    """What an element does, behind its permutations, to an axis of an activation.

    A matrix (n, n) where channels are mixed, a vector (n,) where they are scaled, None where neither. Raises
    ArchitectureError where the axis goes through several maps (the rest of the tensor says which).
    """
    labels = symmetry.labels(node, dim)
    size = 0 if labels is None else len(labels)
    result: Tensor | None = None
    for groups, digits, position in symmetry.features(labels) if labels is not None else ():
        for index in groups:
            element = chosen.get(index, Element())
            if element.matrix is None and not element.scales:
                continue
            group = symmetry.groups[index]
            for part in _standing(symmetry, node, dim, group, groups, digits, position):
                result = _onto(result, size, part, element)
    for group in symmetry.rotations if any(index >= len(symmetry.groups) for index in chosen) else ():
        for member in group.members if group.index in chosen and is_layer(node) else ():
            if (member.fqn, member.dim) == (weight_name(node), output_axis(node)):
                for part in parts(symmetry, group, member):
                    result = _onto(result, node.meta["val"].sizes(1)[dim], part, chosen[group.index])
    return result


def _standing(
    symmetry: Symmetry, node: fx.Node, dim: int, group: Group, groups: tuple[int, ...], digits: Index, position: Index
) -> Iterator[Part]:
    """The copies of a group among some features of an activation."""
    sizes = [symmetry.groups[index].size for index in groups]
    chosen = [group.index] if group.parent not in groups else [group.parent, group.index]
    table = grid(groups, digits, position, chosen, [sizes[groups.index(index)] for index in chosen])
    table = table.reshape(-1, group.size, table.shape[-1])
    for block, own in enumerate(table):
        found = symmetry.classes.slots(node, dim, group, own)
        if found is None or (group.parent is not None and group.parent not in groups):
            raise ArchitectureError(f"axis {dim} of {node.name} goes through several maps of group {group.index}")
        for side, dual, columns in alike(np.arange(own.shape[1]), *found):
            yield Part(own[:, columns], block, side, dual)


def _onto(result: Tensor | None, size: int, part: Part, element: Element) -> Tensor | None:
    """A map of one part put in front of what an axis goes through already."""
    dual = None if element.matrix is None else contragredient(element.matrix)
    if result is None:
        result = torch.ones(size, dtype=torch.float64)
    if element.matrix is not None and result.ndim == 1:
        result = torch.diag(result)
    return mapped(result, 0, part, element, dual)
