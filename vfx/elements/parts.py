"""Parts: where the channels of one group stand along an axis and go through one map, in one block and on one side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.classes import Matrix
from vfx.analyse.grids import grid
from vfx.analyse.groups import Class, Group, Member
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements.element import Element
from vfx.errors import ArchitectureError
from vfx.program import Weights

Features = tuple[tuple[int, ...], Index, Index]  # groups, digits, positions: see ``Labelling.features``


@dataclass(frozen=True, eq=False)
class Part:
    """Copies of a group's channels along one axis that go through one map: ``position`` (size, copies)."""

    position: Index
    block: int
    side: int
    dual: bool
    elsewhere: tuple[int, Index] | None = None  # where the block stands on another axis: that axis, its positions


def parts(symmetry: Symmetry, group: Group, member: Member, own: Class | None = None) -> Iterator[Part]:
    """The parts of a member: one for each block and map; of the group's class, or another's sides."""
    own = symmetry.classes[group.index] if own is None else own
    yield from _by_block(symmetry, group, member, *own.slots[member.fqn, member.dim])


def _by_block(symmetry: Symmetry, group: Group, member: Member, sides: Index, duals: Index) -> Iterator[Part]:
    copies = np.arange(len(sides))
    blocks = symmetry.blocks_of(group, member)
    if isinstance(blocks, tuple):  # on another axis
        axis, there = blocks
        for block in range(group.outer):
            where = axis, np.flatnonzero(there == block)
            for side, dual, columns in alike(copies, sides, duals):
                yield Part(member.position[:, columns], block, side, dual, where)
        return
    for block in np.unique(blocks).tolist():
        inside = copies[blocks == block]
        for side, dual, columns in alike(inside, sides[inside], duals[inside]):
            yield Part(member.position[:, columns], block, side, dual)


def alike(copies: Index, sides: Index, duals: Index) -> Iterator[tuple[int, bool, Index]]:
    for side, dual in sorted(set(zip(sides.tolist(), duals.tolist()))):
        yield side, bool(dual), copies[(sides == side) & (duals == dual)]


def parts_by_role(symmetry: Symmetry, group: Group, member: Member) -> Iterator[Part]:
    """The parts of a member for a map whose way back is its own: what makes the feature carries T, what reads it not.

    What acts channel by channel carries neither.
    """
    if member.role not in ("out", "in"):
        return
    sides, dual = np.zeros(member.position.shape[1], np.int64), member.role == "in"
    yield from _by_block(symmetry, group, member, sides, np.full_like(sides, dual))


def mapped(
    tensor: Tensor, dim: int, part: Part, element: Element, dual: Matrix | None, in_place: bool = False
) -> Tensor:  # fmt: skip
    """One part of a tensor multiplied along an axis; ``dual`` is ``element.contragredient()``.

    ``in_place``: nobody else reads the tensor, and it may be written to.
    """
    scales = element.scales.get(part.side)
    if element.matrix is not None and dual is not None:
        matrix = _block(dual if part.dual else element.matrix, part.block, 2)
    elif scales is not None:
        factors = _block(scales, part.block, 1)
        matrix = 1 / factors if part.dual else factors
    else:
        return tensor
    if part.elsewhere is None and matrix.ndim == 1:
        return _scaled(tensor, dim, part.position, matrix, in_place)
    copy = tensor.index_copy_ if in_place else tensor.index_copy
    if part.elsewhere is not None:
        axis, where = part.elsewhere
        index = torch.from_numpy(where).to(tensor.device)
        return copy(axis, index, multiplied(tensor.index_select(axis, index), dim, part.position, matrix))
    return multiplied(tensor, dim, part.position, matrix, in_place)


def _scaled(tensor: Tensor, dim: int, position: Index, scale: Matrix, in_place: bool) -> Tensor:
    """Slices at ``position`` (size, copies) along ``dim`` multiplied channel by channel."""
    factor = torch.ones(tensor.shape[dim], dtype=torch.float64)
    factor[torch.from_numpy(position)] = torch.from_numpy(np.ascontiguousarray(scale, np.float64))[:, None]
    factor = factor.to(tensor).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
    return tensor.mul_(factor) if in_place else tensor * factor


def _block(values: Matrix, block: int, rank: int) -> Matrix:
    return values[block] if values.ndim > rank else values


def multiplied(tensor: Tensor, dim: int, position: Index, matrix: Matrix, in_place: bool = False) -> Tensor:
    """Slices at ``position`` (size, copies) along ``dim`` mixed by a matrix, or scaled by a vector."""
    rows = _slices(tensor, dim, position).movedim(dim, 0)
    flat = rows.reshape(len(position), -1).double()
    factor = torch.from_numpy(np.ascontiguousarray(matrix)).to(flat)
    mixed = factor @ flat if factor.ndim == 2 else factor[:, None] * flat
    result = mixed.reshape(rows.shape).movedim(0, dim).to(tensor.dtype)
    if _in_a_row(position):
        moved = tensor if in_place else tensor.clone()
        _slices(moved, dim, position).copy_(result)
        return moved
    copy = tensor.index_copy_ if in_place else tensor.index_copy
    return copy(dim, torch.from_numpy(position.reshape(-1)).to(tensor.device), result)


def _slices(tensor: Tensor, dim: int, position: Index) -> Tensor:
    """The slices at ``position`` (size, copies) along ``dim``, one after the other; a view where they stand so."""
    where = position.reshape(-1)
    if _in_a_row(position):
        return tensor.narrow(dim, int(where[0]), len(where))
    return tensor.index_select(dim, torch.from_numpy(where).to(tensor.device))


def _in_a_row(position: Index) -> bool:
    where = position.reshape(-1)
    return len(where) > 0 and bool((np.diff(where) == 1).all())


def stacked(symmetry: Symmetry, group: Group, weights: Weights, dual: bool) -> list[Tensor]:
    """What carries T (or T⁻ᵀ) of a group, side by side: (size, n) for each of its blocks, float64."""
    blocks: list[list[Tensor]] = [[] for _ in range(group.outer if group.parent is not None else 1)]
    for member in group.members:
        if member.fqn not in weights:
            continue
        for part in parts(symmetry, group, member):
            if part.dual is dual:
                blocks[part.block].append(rows_of(weights[member.fqn], member.dim, part))
    return [torch.cat(rows, 1) if rows else torch.zeros(group.size, 0, dtype=torch.float64) for rows in blocks]


def rows_of(tensor: Tensor, dim: int, part: Part, dtype: torch.dtype = torch.float64) -> Tensor:
    """The slices of a part, (size, everything else), to be read; a view where they can be."""
    if part.elsewhere is not None:
        axis, where = part.elsewhere
        tensor = tensor.index_select(axis, torch.from_numpy(where).to(tensor.device))
    return _slices(tensor, dim, part.position).movedim(dim, 0).reshape(len(part.position), -1).to("cpu", dtype)


def standing(
    symmetry: Symmetry, node: fx.Node, dim: int, group: Group, features: Features, by_role: bool = False
) -> Iterator[Part]:
    """The parts of a group among some features of an activation's axis; ``by_role``: of which all carry T.

    Raises ArchitectureError where the channels go through several maps, as the rest of the tensor says.
    """
    groups, digits, position = features
    sizes = [symmetry.groups[index].size for index in groups]
    chosen = [group.index] if group.parent not in groups else [group.parent, group.index]
    table = grid(groups, digits, position, chosen, [sizes[groups.index(index)] for index in chosen])
    table = table.reshape(-1, group.size, table.shape[-1])
    apart = group.parent is not None and group.parent not in groups
    for block, block_columns in enumerate(table if not (apart and by_role) else ()):
        if by_role:
            yield Part(block_columns, block, 0, False)
            continue
        slots = symmetry.classes.slots(node, dim, group, block_columns)
        if slots is None or apart:
            raise ArchitectureError(f"axis {dim} of {node.name} goes through several maps of group {group.index}")
        for side, dual, columns in alike(np.arange(block_columns.shape[1]), *slots):
            yield Part(block_columns[:, columns], block, side, dual)
