"""Balanced weights: the one form among all that a network's scales and invertible maps lead to.

What a class leaves beyond a compact group (signed permutations, orthogonal maps) can make weights as large or small as
one likes. Of all weight sets on such an orbit the balanced one has the smallest sum of squares. It is where every free
channel's scale has d/dλ Σ W² = 0 (Stock et al., *Equi-normalization of Neural Networks*, 2019, §3; for two layers the
scales of Nagel et al. 2019, §4.1), and where both sides of an invertible map have the same Gram matrix. The sum is
convex along scales and along one-parameter groups of invertible maps, so its minimum is unique up to the compact part:
two networks of one orbit have balanced forms that differ by signed permutations and orthogonal maps alone.

- Scales: ``vfx.analyse.scales``.
- Invertible maps (queries and keys, values and outputs): with X what carries T and Y what carries T⁻ᵀ, of the product
  Xᵀ Y = U S Vᵀ the sides become √S Uᵀ and √S Vᵀ. It is of rank d, the size of a head, so only R₁ R₂ᵀ of the thin
  factors Xᵀ = Q₁R₁, Yᵀ = Q₂R₂ is decomposed; T = S^−½ Vᵀ R₂. Channels stand by falling singular value, each with the
  sign that makes the largest entry of its first side positive: what the basis was does not matter.

Where the other side stays apart (the heads of each edge), what is left gets orthonormal rows. Directions in
which a product all but vanishes (many trained heads have them) are left unequal: raising them would cost the weights
their precision. Where one side has a lower rank than the other no invertible map balances them: the directions that it
lacks could be made ever smaller. For matching (``leaning``) a pair with one side X of full rank gets the T of least
‖T X‖² + ‖T⁻ᵀ Y‖² − c log |det T|². It is convex along the same lines, and what an element adds to it is a constant, so
its minimum is as unique: moved copies differ by a rotation. Where neither side has full rank, no longer convex, that is
done in the span of one; where it does not settle, pairs stay as they are.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.classes import Maps, Matrix, contragredient, turning
from vfx.analyse.groups import Group
from vfx.analyse.scales import NEAR, SWEEPS, Scales, relaxation, tolerance_of
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Acting, Element, Elements, act, compose
from vfx.elements.parts import stacked
from vfx.program import Weights

FEW_SWEEPS = 60  # at most with running statistics, where what settles does so in about ten
ROUNDS, IN_TURN = 200, 5  # of scales and invertible maps in turn, and of sweeps over the scales in each
FLOOR = 1e-4  # of a product's singular values, a share of the largest: smaller ones are not raised to balance
DEFICIENT = 1e-7  # singular values of a map below this share of the largest


def balance(
    symmetry: Symmetry, weights: Weights, apart: Collection[str] = (), leaning: bool = False, running: bool = False
) -> dict[int, Element]:
    """The element that brings a weight set to its balanced form, by positive scales, invertible maps and planes.

    Parameters that stay ``apart`` (heads of one edge alone) do not count. ``leaning`` as in ``in_turn``; ``running``:
    sides on which a running statistic stands are balanced, too.
    """
    scales, paired = Scales(symmetry, apart=apart, running=running), (Maps.LINEAR, Maps.ROTATIONS)
    pairs = [g for g in symmetry.moving if symmetry.classes[g.index].kind in paired]
    moved = {m.fqn for g in symmetry.moving for m in g.members}.difference(apart)
    moved -= symmetry.program.buffers if running else set()
    moving = {n: t for n, t in weights.items() if n in moved and t.is_floating_point()}
    if pairs:
        return in_turn(symmetry, moving, scales, pairs, leaning)
    return scales(moving, FEW_SWEEPS if running else SWEEPS)


def in_turn(
    symmetry: Symmetry, weights: Weights, scales: Scales | None, pairs: Collection[Group], leaning: bool = False
) -> dict[int, Element]:
    """The same by some scales, and the maps of some groups of class LINEAR or rotations.

    With ``leaning`` pairs without a balanced form get the one of ``_leaning`` in its place, where that settles.
    """
    total: dict[int, Element] = {}
    touched = {m.fqn for group in pairs for m in group.members}
    touched |= {place.fqn for places in scales.places.values() for place in places} if scales is not None else set()
    current: Weights = {name: tensor.double().cpu() for name, tensor in weights.items() if name in touched}
    changes, tolerance = [math.inf], tolerance_of(weights)
    for _ in range(ROUNDS):
        step = scales(current, IN_TURN) if scales is not None else {}
        current = act(symmetry, step, current)
        maps, current = _paired(symmetry, pairs, current, leaning, relaxation(changes))
        total = compose(symmetry, compose(symmetry, total, step), maps)
        changes.append(_change([*step.values(), *maps.values()]))
        if changes[-1] <= tolerance:
            return total
    unsettled = leaning and changes[-1] > NEAR
    return in_turn(symmetry, weights, scales, pairs) if unsettled else total


def rewritten(symmetry: Symmetry, weights: Weights, find: Callable[[Weights], Elements]) -> dict[str, Tensor]:
    """A weight set moved by the element that ``find`` gives for it, in float64 and rounded once; the rest is shared."""
    moved = {m.fqn for g in symmetry.moving for m in g.members}
    exact = {n: t.double().cpu() for n, t in weights.items() if n in moved and t.is_floating_point()}
    balanced = act(symmetry, find(exact), exact)
    return {n: t if n not in exact or balanced[n] is exact[n] else balanced[n].to(t) for n, t in weights.items()}


def _change(steps: Iterable[Element]) -> float:
    """How far scales are from one and maps from orthogonal ones: 0 where the sum of squares does not fall any more."""
    changes = [0.0]
    for step in steps:
        changes += [float(np.abs(np.log(scale)).max()) for scale in step.scales.values()]
        if step.matrix is not None:
            changes.append(float(np.abs(np.log(np.linalg.svd(step.matrix, compute_uv=False))).max()))
    return max(changes)


# invertible maps ------------------------------------------------------------------------------------------------------


def _paired(
    symmetry: Symmetry, groups: Iterable[Group], weights: Weights, leaning: bool, over: float
) -> tuple[dict[int, Element], Weights]:
    """The map of each group, found behind those of the groups before it, and the weights behind all of them.

    Found side by side, maps of groups that share tensors can grow without end. Steps are ``over`` times as long as to
    the minimum over one map.
    """
    maps, weights = dict[int, Element](), dict(weights)
    for group in groups:
        paired_maps = _maps(symmetry, group, weights, leaning)
        if any(matrix is not None for matrix in paired_maps):
            matrix = np.stack([np.eye(group.size) if matrix is None else matrix for matrix in paired_maps])
            matrix = _powered(matrix, over / _axes_at_most(group))
            maps[group.index] = Element(matrix=matrix[0] if group.parent is None else matrix)
            moved = Acting(symmetry, {group.index: maps[group.index]})
            names = weights.keys() & {m.fqn for m in group.members}
            weights |= {name: moved(name, weights[name]) for name in names}
    return maps, weights


def _axes_at_most(group: Group) -> int:
    """On how many axes of one tensor the group stands."""
    return max(collections.Counter(member.fqn for member in group.members).values())


def _powered(maps: Matrix, power: float) -> Matrix:
    """U P^power for maps U P, with U orthogonal: a tensor that carries a map on several axes takes a root of it."""
    if power == 1:
        return maps
    u, s, vt = np.linalg.svd(maps)
    return np.asarray(u @ (s[..., None] ** power * vt))


def deficient(symmetry: Symmetry, group: Group, weights: Weights) -> list[int]:
    """The blocks of a group whose pair has no balanced form."""
    return [block for block, matrix in enumerate(_maps(symmetry, group, weights)) if matrix is None]


def _maps(symmetry: Symmetry, group: Group, weights: Weights, leaning: bool = False) -> list[Matrix | None]:
    """What balances each block of a group."""
    sides = [stacked(symmetry, group, weights, dual) for dual in (False, True)]
    if symmetry.classes[group.index].kind is not Maps.LINEAR:
        return [_equal_planes(x, y) for x, y in zip(*sides)]
    maps = [_paired_form(x, y) for x, y in zip(*sides)]
    return [_leaning(x, y) if matrix is None and leaning else matrix for matrix, x, y in zip(maps, *sides)]


def _leaning(first: Tensor, second: Tensor) -> Matrix | None:
    """T (d, d) for (d, n) and (d, m) of different ranks; None where one is zero.

    Where neither has rank d, X = A x stands in a span A, and Y's rows on its complement C lose what they share with
    those on A (T may shear A along C, which X does not see); then x and Aᵀ Y are a pair, and what is left of Cᵀ Y
    stands alone.
    """
    spans = [_used(side).shape[1] for side in (first, second)]
    if not all(spans):
        return None
    if spans[0] == len(first):
        return _leaning_on(first, second)
    if spans[1] == len(second):
        return contragredient(_leaning_on(second, first))
    basis = torch.linalg.svd(first).U
    a, c = basis[:, : spans[0]], basis[:, spans[0] :]
    shared = c.T @ second @ torch.linalg.pinv(a.T @ second)
    left = c.T @ second - shared @ (a.T @ second)
    alone = _orthonormal(left) if bool(left.norm() > DEFICIENT * second.norm()) else None
    lowered = torch.eye(len(left), dtype=c.dtype)
    if alone is not None:
        lowered = math.sqrt(len(first)) * torch.linalg.inv(torch.from_numpy(alone))
    sheared = torch.eye(len(first), dtype=c.dtype) + a @ shared.T @ c.T
    held = _balanced(a.T @ first, a.T @ second)
    held = _leaning_on(a.T @ first, a.T @ second) if held is None else held
    return torch.cat([torch.from_numpy(held) @ a.T, lowered @ c.T]).matmul(sheared).numpy()


def _leaning_on(first: Tensor, second: Tensor) -> Matrix:
    """The T of least ‖T X‖² + ‖T⁻ᵀ Y‖² − c log |det T|² for X (d, n) of rank d, with c = 1/d.

    With X = U a Vᵀ and a Uᵀ Y = E k Fᵀ it is √q Eᵀ a⁻¹ Uᵀ, q = c/2 + √(c²/4 + k²): then T X Xᵀ Tᵀ = q, which for
    c = 0 is the balanced form. Directions that nothing reads get rows of length √c in place of ever smaller ones.
    """
    u, a, _ = torch.linalg.svd(first, full_matrices=False)
    e, k, _ = torch.linalg.svd(a[:, None] * (u.T @ second))
    k = torch.nn.functional.pad(k, (0, len(first) - len(k)))
    half = 0.5 / len(first)
    q = half + (half**2 + k.square()).sqrt()
    return np.asarray(q.sqrt()[:, None] * (e.T / a) @ u.T)


def _paired_form(first: Tensor, second: Tensor) -> Matrix | None:
    """T (d, d) for (d, n) and (d, m), the second of which carries T⁻ᵀ; None where there is none."""
    if not second.shape[1]:
        return _orthonormal(first)
    if not first.shape[1]:
        held = _orthonormal(second)
        return None if held is None else contragredient(held)
    matrix = _balanced(first, second)
    return _balanced_where_used(first, second) if matrix is None else matrix


def _balanced_where_used(first: Tensor, second: Tensor) -> Matrix | None:
    """T for X = A x (d, n) and Y = B y (d, m), both of a rank r below d: heads wider than what they hold.

    With K = AᵀB and the T of x and K y, it is T K⁻ᵀ Bᵀ and, for what X does not use, the complement of A. None where
    there is no such map.
    """
    used = [_used(side) for side in (first, second)]
    rank = used[0].shape[1]
    if rank != used[1].shape[1] or not rank:
        return None
    between = used[0].T @ used[1]
    spread = torch.linalg.svdvals(between)
    inner = _balanced(used[0].T @ first, between @ used[1].T @ second) if spread[-1] > DEFICIENT else None
    if inner is None:
        return None
    rest = torch.linalg.svd(used[0]).U[:, rank:]
    held = torch.from_numpy(inner) @ torch.linalg.solve(between.T, used[1].T)
    return torch.cat([held, rest.T]).numpy()


def _orthonormal(side: Tensor) -> Matrix | None:
    """T (d, d), symmetric, behind which the rows of (d, n) are orthonormal where they differ from zero at all."""
    if not side.numel() or not bool(side.any()):
        return None
    u, s, _ = torch.linalg.svd(side, full_matrices=False)
    held = s > DEFICIENT * s[0]
    u, s = u[:, held], s[held].clamp_min(FLOOR * float(s[0]))
    return np.asarray(torch.eye(len(side), dtype=side.dtype) + u @ torch.diag(1 / s - 1) @ u.T)


def _used(side: Tensor) -> Tensor:
    """An orthonormal basis (d, r) of what the columns of (d, n) span."""
    u, s, _ = torch.linalg.svd(side, full_matrices=False)
    return u[:, s > DEFICIENT * float(s.max())] if s.numel() and float(s.max()) > 0 else u[:, :0]


def _balanced(first: Tensor, second: Tensor) -> Matrix | None:
    """T (d, d) for (d, n) and (d, m), the second of which carries T⁻ᵀ; None where the second has a rank below d."""
    if min(first.shape[1], second.shape[1]) < len(first):
        return None
    r1, r2 = (torch.linalg.qr(side.T, mode="r").R for side in (first, second))
    s, vt = torch.linalg.svd(r1 @ r2.T)[1:]
    if not bool(s[0] > 0):
        return None
    matrix = vt @ r2 / s.clamp_min(FLOOR * float(s[0])).sqrt()[:, None]
    rows = matrix @ first
    matrix = matrix * torch.where(rows.gather(1, rows.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    spread = torch.linalg.svdvals(matrix)
    return matrix.numpy() if bool(spread[-1] > DEFICIENT * spread[0]) else None


def _equal_planes(first: Tensor, second: Tensor) -> np.ndarray:
    """Scales of planes (d, d) for (d, n) and (d, m): both sides get the same sum of squares, unless one is zero."""
    first_norms, second_norms = (side.square().sum(1).reshape(-1, 2).sum(1).numpy() for side in (first, second))
    if not second.shape[1] or not first.shape[1]:
        first_norms, second_norms = (x if x.any() else np.ones_like(x) for x in (first_norms, second_norms))
    ratio = np.where(
        (first_norms > 0) & (second_norms > 0), second_norms / np.where(first_norms > 0, first_norms, 1.0), 1.0
    )
    return turning(ratio**0.25 + 0j)
