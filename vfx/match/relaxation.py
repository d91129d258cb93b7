"""Group elements relaxed to doubly stochastic matrices, and their action on weights.

A group of n channels has a matrix P (n, n), P[i, j] = 1 where new channel i is old channel j. A group inside the blocks
of another, whose matrix is O (n, n), has Y (n, n, s, s): Y[i, j] is O[i, j] times a doubly stochastic matrix, which is
the convex hull of the wreath product. Each matrix acts on the axes (or the digits of an axis) where its group stands;
of several inner groups on one weight each acts with its own Y, all on the same pair of blocks. On permutations this is
``vfx.elements.action.act``; in between it is a polynomial in the matrices, of as many factors as a weight has groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Permutations
from vfx.elements.pieces import Piece, Standing, combinations, entries, piece
from vfx.match.matcher import Gain
from vfx.match.units import GroupUnit, assign_unit, units
from vfx.match.universe import scored_names

Point = dict[int, Tensor]  # a relaxed element: group index -> its matrix


class Action(NamedTuple):
    """One unit's action on a piece: the outer group's axis, and the inner groups with theirs."""

    group: int
    axis: int
    inner: tuple[tuple[int, int], ...] = ()

    @property
    def factors(self) -> int:
        return max(len(self.inner), 1)


@dataclass(frozen=True)
class RelaxedPiece:
    """A piece of a weight and how relaxed elements act on it."""

    piece: Piece
    actions: tuple[Action, ...]

    @property
    def degree(self) -> int:
        """Degree of the moved piece as a polynomial in the matrices."""
        return sum(action.factors for action in self.actions)

    def move(self, x: Tensor, point: Point) -> Tensor:
        """The piece moved by a relaxed element; differentiable in its matrices."""
        for action in self.actions:
            x = _blocks(x, action, point) if action.inner else _matrix(x, point[action.group], action.axis)
        return x


def _matrix(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """P along one axis."""
    front = x.movedim(axis, 0)
    return (matrix @ front.reshape(len(front), -1)).reshape(front.shape).movedim(0, axis)


def _blocks(x: Tensor, action: Action, point: Point) -> Tensor:
    """Σ_j over old blocks of what the inner groups' matrices Y[i, j] make of them, one inner group after the other."""
    axes = [chr(ord("A") + k) for k in range(x.ndim)]
    old, new, channel = axes[action.axis], "z", "y"
    *first, (last, at) = action.inner
    for index, (group, axis) in enumerate(first):  # the new blocks i stand on an axis of their own behind all others
        source = axes + [new] * bool(index)
        target = [channel if k == axis else name for k, name in enumerate(axes)] + [new]
        x = torch.einsum(f"{new}{old}{channel}{axes[axis]},{''.join(source)}->{''.join(target)}", point[group], x)
    source = axes + [new] * bool(first)
    target = [{action.axis: new, at: channel}.get(k, name) for k, name in enumerate(axes)]
    return torch.einsum(f"{new}{old}{channel}{axes[at]},{''.join(source)}->{''.join(target)}", point[last], x)


# pieces of weights ----------------------------------------------------------------------------------------------------


def pieces(symmetry: Symmetry) -> tuple[list[RelaxedPiece], list[str]]:
    """The pieces of every parameter that groups move, and the parameters whose action is not a product of matrices."""
    relaxed: list[RelaxedPiece] = []
    left: list[str] = []
    for fqn in scored_names(symmetry):
        pieces = _pieces_of(symmetry, fqn)
        if pieces is None:
            left.append(fqn)
        else:
            relaxed += pieces
    return relaxed, left


def _pieces_of(symmetry: Symmetry, fqn: str) -> list[RelaxedPiece] | None:
    axes = []
    for dim, labels in symmetry.axes_of(fqn):
        axis_entries = entries(symmetry, dim, labels)
        if axis_entries is None:
            return None
        axes.append(axis_entries)
    pieces = []
    for chosen in combinations(axes):
        if any(entry.groups for entry in chosen):
            whole = piece(symmetry, fqn, chosen)
            actions = _actions(symmetry, whole.stands)
            if actions is None:
                return None
            pieces.append(RelaxedPiece(whole, actions))
    return pieces


def _actions(symmetry: Symmetry, stands: Sequence[Standing]) -> tuple[Action, ...] | None:
    """Each inner group acts with the outer one on its own dimension, or else with the one on another."""
    outer = {(g, axis): (dim, []) for g, dim, axis in stands if symmetry.groups[g].parent is None}  # type: ignore[var-annotated]
    for group, dim, axis in stands:
        parent = symmetry.groups[group].parent
        if parent is None:
            continue
        homes = sorted((own_dim != dim, key) for key, (own_dim, _) in outer.items() if key[0] == parent)
        if not homes:
            return None
        outer[homes[0][1]][1].append((group, axis))
    return tuple(Action(g, axis, tuple(inner)) for (g, axis), (_, inner) in outer.items())


# points ---------------------------------------------------------------------------------------------------------------


def vertex(symmetry: Symmetry, element: Permutations, dtype: torch.dtype, device: torch.device) -> Point:
    """The matrices of a group element."""
    point = {}
    for group in symmetry.groups:
        index = torch.from_numpy(np.asarray(element[group.index])).to(device)
        if group.parent is None:
            point[group.index] = torch.nn.functional.one_hot(index, group.size).to(dtype)
        else:
            outer = torch.from_numpy(np.asarray(element[group.parent])).to(device)
            matrix = torch.zeros(len(outer), len(outer), group.size, group.size, dtype=dtype, device=device)
            rows = index if index.ndim == 2 else index.expand(len(outer), -1)
            matrix[torch.arange(len(outer), device=device), outer] = torch.nn.functional.one_hot(rows, group.size).to(
                dtype
            )
            point[group.index] = matrix
    return point


def barycentre(symmetry: Symmetry, dtype: torch.dtype, device: torch.device) -> Point:
    """The mean of all group elements."""
    return {
        g.index: torch.full((g.outer, g.outer, g.size, g.size), 1 / (g.outer * g.size), dtype=dtype, device=device)
        if g.parent is not None
        else torch.full((g.size, g.size), 1 / g.size, dtype=dtype, device=device)
        for g in symmetry.groups
    }


def blend(one: Point, other: Point, share: float) -> Point:
    """(1 − share) · one + share · other."""
    return {g: torch.lerp(matrix, other[g], share) for g, matrix in one.items()}


def best_vertex(symmetry: Symmetry, gain: Point) -> dict[int, Index]:
    """The group element whose matrices have the largest inner product with ``gain``: one exact assignment per unit."""
    element: dict[int, Index] = {}
    arrays: dict[int, Gain] = {g: matrix.detach().double().cpu().numpy() for g, matrix in gain.items()}
    for unit in units(symmetry):
        element |= _best(unit, arrays)
    return element


def _best(unit: GroupUnit, arrays: dict[int, Gain]) -> dict[int, Index]:
    return assign_unit(unit, arrays[unit.outer.index], lambda group, _: arrays[group.index], unit.inner)[0]
