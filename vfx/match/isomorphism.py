"""Invertible maps between two copies of a network, all at once: isomorphisms of representations of a quiver.

W₀ = g W₁ asks for maps T of features such that W₀ = T W₁ S⁻¹ for every layer. Brought to the other side, S is in the
equation as it is: T W₁ = W₀ S, linear in all maps together (Brooksbank and Luks, *Testing isomorphism of modules*,
2008). Of its solutions the one nearest to no map at all is taken. No side needs full rank, so that this finds pairs
that have no balanced form. A tensor with several maps on one side of its equation makes it multilinear: Newton's steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lsqr
from torch import Tensor

from vfx.analyse.classes import Maps
from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element
from vfx.elements.parts import Part, parts
from vfx.program import Weights

STEPS, EXACT = 10, 1e-13  # Newton's steps at most, and the tolerance of the solver in each
ROUNDS = 4  # iterations of the solver for each entry of a map
WORST = 1e6  # condition of a map at most
UNKNOWNS = 1 << 11  # entries of maps that are solved for at most

Equation = tuple[Tensor, Tensor, list[tuple[int, int, Part]]]  # W₁, W₀, and (group, axis, part) of each map


def isomorphism(symmetry: Symmetry, target: Weights, other: Weights) -> dict[int, Element]:
    """The maps of all groups of class LINEAR that bring ``other`` to ``target`` best; {} where they are not to be had.

    Nothing else may be left between the two.
    """
    groups = [g for g in symmetry.groups if symmetry.classes[g.index].kind is Maps.LINEAR]
    names = dict.fromkeys(m.fqn for g in groups for m in g.members if m.fqn in target)
    shapes = {g.index: (g.outer if g.parent is not None else 1, g.size, g.size) for g in groups}
    if not 0 < sum(map(math.prod, shapes.values())) <= UNKNOWNS:
        return {}
    equations = [_equation(symmetry, groups, name, target, other) for name in names]
    start = torch.cat([torch.eye(g.size, dtype=torch.float64).expand(shapes[g.index]).reshape(-1) for g in groups])
    maps_solved = _newton(lambda maps: _residual(equations, _by_group(maps, shapes)), start)
    matrices = {index: matrix.numpy() for index, matrix in _by_group(maps_solved, shapes).items()}
    if not all(np.isfinite(m).all() and (np.linalg.cond(m) < WORST).all() for m in matrices.values()):
        return {}
    return {g.index: Element(matrix=matrices[g.index][0 if g.parent is None else slice(None)]) for g in groups}


def _equation(symmetry: Symmetry, groups: Sequence[Group], name: str, target: Weights, current: Weights) -> Equation:
    where = [
        (group.index, member.dim, part)
        for group in groups
        for member in group.members
        if member.fqn == name
        for part in parts(symmetry, group, member)
    ]
    first, second = (weights[name].double().cpu() for weights in (target, current))
    size = max(float(first.norm()), float(np.finfo(float).tiny))
    return second / size, first / size, where


def _by_group(maps: Tensor, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Tensor]:
    split = maps.split([math.prod(shape) for shape in shapes.values()])
    return {index: flat.reshape(shapes[index]) for index, flat in zip(shapes, split)}


def _residual(equations: Sequence[Equation], maps: Mapping[int, Tensor]) -> Tensor:
    """T W₁ − W₀ S of every tensor."""
    residuals = []
    for current, target, where in equations:
        for group, dim, part in where:
            matrix = maps[group][part.block]
            if part.dual:
                target = _through(target, dim, part, matrix.T)
            else:
                current = _through(current, dim, part, matrix)
        residuals.append((current - target).reshape(-1))
    return torch.cat(residuals)


def _through(tensor: Tensor, dim: int, part: Part, matrix: Tensor) -> Tensor:
    """One part of a tensor multiplied along an axis."""
    if part.elsewhere is not None:
        axis, where = part.elsewhere[0], torch.from_numpy(part.elsewhere[1])
        alone = Part(part.position, part.block, part.side, part.dual)
        return tensor.index_copy(axis, where, _through(tensor.index_select(axis, where), dim, alone, matrix))
    index = torch.from_numpy(part.position.reshape(-1))
    rows = tensor.index_select(dim, index).movedim(dim, 0)
    mixed = matrix @ rows.reshape(len(part.position), -1)
    return tensor.index_copy(dim, index, mixed.reshape(rows.shape).movedim(0, dim))


@torch.enable_grad()
def _newton(residual: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
    """Least squares by Gauss and Newton, each step the smallest that solves the linear equations."""
    least = float(residual(maps).norm())
    for _ in range(STEPS):
        jacobian, value = _linearised(residual, maps)
        step = lsqr(jacobian, -value, atol=EXACT, btol=EXACT, iter_lim=ROUNDS * len(maps))[0]
        ahead = maps + torch.from_numpy(step)
        before, left = least, float(residual(ahead).norm())
        if not left < least:
            break
        maps, least = ahead, left
        if least > 0.5 * before or least < EXACT * math.sqrt(len(value)):
            break
    return maps


def _linearised(residual: Callable[[Tensor], Tensor], maps: Tensor) -> tuple[LinearOperator, NDArray[np.float64]]:
    """The derivative of the residual, and its value."""
    at = maps.clone().requires_grad_()
    value = residual(at)
    weight = torch.zeros_like(value, requires_grad=True)
    (back,) = torch.autograd.grad(
        value, at, weight, create_graph=True
    )  # linear in ``weight``: its derivative goes ahead

    def along(result: Tensor, source: Tensor) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        return lambda vector: torch.autograd.grad(result, source, torch.from_numpy(vector), retain_graph=True)[
            0
        ].numpy()

    shape = len(value), len(at)
    return LinearOperator(shape, along(back, weight), along(value, at), dtype=np.float64), value.detach().numpy()
