"""Elements of the full symmetry class applied to a weight set.

An element of a group is a permutation followed by a map behind it: a matrix T for a group whose class mixes channels,
scales (with signs) of each side for a monomial one. Along its axis a member is multiplied by T, or by T⁻ᵀ where it
carries the dual map (``vfx.analyse.classes``). In the blocks of another group there is a map for each block, acting on
what stands in the block after the blocks were permuted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfx.analyse import elements
from vfx.analyse.classes import SPREAD, Maps, Matrix, contains, contragredient, draw
from vfx.analyse.elements import Index
from vfx.analyse.groups import Class, Group, Member
from vfx.analyse.slots import Vector
from vfx.analyse.symmetry import Symmetry
from vfx.errors import ArgumentError
from vfx.program import Weights


@dataclass(frozen=True, eq=False)
class Element:
    """An element of one group: ``permutation`` as in ``vfx.analyse.elements``, and what stands behind it.

    ``matrix`` (size, size), or (blocks, size, size) for a group inside blocks, belongs to groups whose class mixes
    channels; ``scales`` to monomial ones: {side: (size,) or (blocks, size)}, sides left out having none.
    """

    permutation: Index | None = None
    matrix: Matrix | None = None
    scales: Mapping[int, Matrix] = field(default_factory=dict)


Elements = Mapping[int, Element]  # by group index


CLASSES = ("full", "permutation")


def random_element(symmetry: Symmetry, generator: np.random.Generator, classes: str = "full") -> dict[int, Element]:
    """A random element of every group's full class, or of its permutations.

    Raises ArgumentError for another name of classes.
    """
    check_classes(classes)
    moved = elements.draw(symmetry.groups, generator)
    if classes == "permutation":
        return {index: Element(permutation) for index, permutation in moved.items()}
    found = {}
    for group in symmetry.moving:
        own = symmetry.classes[group.index]
        if own.kind.mixes and own.scales is None:
            found[group.index] = Element(matrix=_matrices(group, own.kind, generator))
        else:
            found[group.index] = Element(moved[group.index], scales=_scales(group, own, generator))
    return found


def check_classes(classes: str) -> str:
    """The name of what is matched or drawn: "full" or "permutation"; raises ArgumentError for another."""
    if classes not in CLASSES:
        raise ArgumentError(f"classes is one of {', '.join(CLASSES)}, not {classes!r}")
    return classes


def _matrices(group: Group, kind: Maps, generator: np.random.Generator) -> Matrix:
    if group.parent is None:
        return draw(kind, group.size, generator)
    return np.stack([draw(kind, group.size, generator) for _ in range(group.outer)])


def _scales(group: Group, own: Class, generator: np.random.Generator) -> dict[int, Matrix]:
    """Free scales are drawn, the sides' follow."""
    if own.scales is None:
        return {}
    shape = (group.size,) if group.parent is None else group.blocks
    free = {x for vector in own.scales.magnitudes.values() for x in vector}
    logs = {x: generator.uniform(-SPREAD, SPREAD, shape) for x in sorted(free)}
    free = {x for vector in own.scales.signs.values() for x in vector}
    signs = {x: generator.integers(0, 2, shape) for x in sorted(free)}
    sides = {
        side.index for side in own.sides if own.scales.magnitudes.get(side.index) or own.scales.signs.get(side.index)
    }
    log = {side: _sum(own.scales.magnitudes.get(side, {}), logs, shape) for side in sides}
    widest = max((np.abs(one).max() for one in log.values()), default=0.0)
    mild = min(1.0, 2 * SPREAD / widest) if widest else 1.0  # the equations are linear
    return {
        side: np.exp(mild * log[side]) * (-1.0) ** _sum(own.scales.signs.get(side, {}), signs, shape) for side in sides
    }


def _sum(vector: Vector, values: Mapping[int, NDArray[Any]], shape: tuple[int, ...]) -> Matrix:
    return sum((float(c) * values[x] for x, c in vector.items()), np.zeros(shape))


def apply(
    symmetry: Symmetry, weights: Weights, chosen: Elements, without: tuple[Member, ...] = (), check: bool = True
) -> dict[str, Tensor]:
    """A weight set moved by elements of the groups' classes; tensors that do not move are shared.

    Raises ArgumentError for a map that is not in its group's class, unless ``check`` is False.
    """
    if check:
        for index, element in chosen.items():
            _checked(symmetry.group(index), symmetry.classes[index], element)
    permutations = {index: e.permutation for index, e in chosen.items() if e.permutation is not None}
    result = symmetry.permute(weights, permutations, without)
    for index, element in chosen.items():
        group = symmetry.group(index)
        dual = None if element.matrix is None else contragredient(element.matrix)
        for member in group.members:
            if member not in without and member.fqn in result:
                for part in parts(symmetry, group, member):
                    result[member.fqn] = mapped(result[member.fqn], member.dim, part, element, dual)
    return result


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
    sides, duals = own.slots[member.fqn, member.dim]
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


def mapped(tensor: Tensor, dim: int, part: Part, element: Element, dual: Matrix | None) -> Tensor:
    """One part of a tensor multiplied along an axis."""
    scales = element.scales.get(part.side)
    if element.matrix is not None and dual is not None:
        matrix = _block(dual if part.dual else element.matrix, part.block, 2)
    elif scales is not None:
        own = _block(scales, part.block, 1)
        matrix = 1 / own if part.dual else own
    else:
        return tensor
    if part.elsewhere is None and matrix.ndim == 1:
        return _scaled(tensor, dim, part.position, matrix)
    if part.elsewhere is not None:
        axis, where = part.elsewhere
        index = torch.from_numpy(where).to(tensor.device)
        return tensor.index_copy(axis, index, _along(tensor.index_select(axis, index), dim, part.position, matrix))
    return _along(tensor, dim, part.position, matrix)


def _scaled(tensor: Tensor, dim: int, position: Index, scale: Matrix) -> Tensor:
    """Slices at ``position`` (size, copies) along ``dim`` multiplied channel by channel."""
    factor = torch.ones(tensor.shape[dim], dtype=torch.float64)
    factor[torch.from_numpy(position)] = torch.from_numpy(np.ascontiguousarray(scale, np.float64))[:, None]
    return tensor * factor.to(tensor).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])


def _block(values: Matrix, block: int, rank: int) -> Matrix:
    return values[block] if values.ndim > rank else values


def _along(tensor: Tensor, dim: int, position: Index, matrix: Matrix) -> Tensor:
    """Slices at ``position`` (size, copies) along ``dim`` mixed by a matrix, or scaled by a vector."""
    index = torch.from_numpy(position.reshape(-1)).to(tensor.device)
    rows = tensor.index_select(dim, index).movedim(dim, 0)
    flat = rows.reshape(len(position), -1).double()
    factor = torch.from_numpy(np.ascontiguousarray(matrix)).to(flat)
    mixed = factor @ flat if factor.ndim == 2 else factor[:, None] * flat
    return tensor.index_copy(dim, index, mixed.reshape(rows.shape).movedim(0, dim).to(tensor.dtype))


def stacked(symmetry: Symmetry, group: Group, weights: Weights, dual: bool) -> list[Tensor]:
    """What carries T (or T⁻ᵀ) of a group, side by side: (size, n) for each of its blocks, float64."""
    found: list[list[Tensor]] = [[] for _ in range(group.outer if group.parent is not None else 1)]
    for member in group.members:
        if member.fqn not in weights:
            continue
        for part in parts(symmetry, group, member):
            if part.dual is dual:
                found[part.block].append(rows_of(weights[member.fqn], member.dim, part))
    return [torch.cat(own, 1) if own else torch.zeros(group.size, 0, dtype=torch.float64) for own in found]


def rows_of(tensor: Tensor, dim: int, part: Part) -> Tensor:
    """The slices of a part, (size, everything else), float64."""
    if part.elsewhere is not None:
        axis, where = part.elsewhere
        tensor = tensor.index_select(axis, torch.from_numpy(where).to(tensor.device))
    index = torch.from_numpy(part.position.reshape(-1)).to(tensor.device)
    return tensor.index_select(dim, index).movedim(dim, 0).reshape(len(part.position), -1).double().cpu()


def _checked(group: Group, own: Class, element: Element) -> None:
    if element.matrix is not None:
        if own.scales is not None and not own.kind.mixes:
            raise ArgumentError(
                f"group {group.index} ({group.name}) takes {own.kind.title} maps ({own.reason}): give a permutation "
                "and scales, not a matrix"
            )
        if not contains(own.kind, element.matrix):
            raise ArgumentError(f"the matrix for group {group.index} ({group.name}) is not {own.kind.title}")
    if element.scales:
        _checked_scales(group, own, element.scales)


def _checked_scales(group: Group, own: Class, scales: Mapping[int, Matrix]) -> None:
    """They obey the equations of the sides: given by the free ones."""
    known = {side.index for side in own.sides}
    if own.scales is None or not set(scales) <= known:
        raise ArgumentError(
            f"group {group.index} ({group.name}) has no such sides: its scales stand on {sorted(known)}"
        )
    for side in known:
        vector, signs = own.scales.magnitudes.get(side, {}), own.scales.signs.get(side, {})
        expected: Matrix | float = 1.0
        for x, power in vector.items():
            expected = expected * np.abs(scales.get(x, np.ones(1))) ** float(power)
        for x in signs:
            expected = expected * np.sign(scales.get(x, np.ones(1)))
        if np.abs(scales.get(side, np.ones(1)) / expected - 1).max() > 1e-9:
            raise ArgumentError(
                f"the scales of group {group.index} ({group.name}) do not obey the equations of its sides: "
                f"side {side} must have the product of {dict(vector)}"
            )
