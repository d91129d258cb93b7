"""Many edges in one space: every edge has one group element that takes it to a common space, the *universe*.

The element that takes edge j to edge i is P_ij = P_i⁻¹ P_j: there is one for each pair, and they are cycle consistent,
P_ij P_jk = P_ik, since P_j cancels (C²M³, Crisostomi et al. 2024, §3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.classes import Matrix
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element, Elements, act, compose, inverse
from vfx.errors import ArgumentError
from vfx.program import Weights


def pairwise(symmetry: Symmetry, elements: Sequence[Elements], i: int, j: int) -> dict[int, Element]:
    """The group element that takes edge j to edge i, both being taken to the universe by their ``elements``."""
    return compose(symmetry, elements[j], inverse(symmetry, elements[i]))


def to_first(symmetry: Symmetry, elements: Sequence[Elements]) -> tuple[dict[int, Element], ...]:
    """The same alignment in the first edge's frame: its own element becomes the identity."""
    return tuple(pairwise(symmetry, elements, 0, j) for j in range(len(elements)))


def cycle_error(symmetry: Symmetry, elements: Sequence[Elements]) -> float:
    """The largest entry by which P_i0 P_0k differs from P_ik, over all i and k; for permutations 0 or 1.

    With i = k it says P_i0 P_0i = 1, so P_ij P_jk = P_i0 (P_0j P_j0) P_0k = P_i0 P_0k = P_ik.
    """
    edges = range(len(elements))
    to_zero, from_zero = ([pairwise(symmetry, elements, *pair) for pair in pairs]
                          for pairs in ([(0, k) for k in edges], [(i, 0) for i in edges]))  # fmt: skip
    return max(
        difference(symmetry, compose(symmetry, to_zero[k], from_zero[i]), pairwise(symmetry, elements, i, k))
        for i in edges
        for k in edges
    )


def difference(symmetry: Symmetry, first: Elements, second: Elements) -> float:
    """The largest entry by which what two elements do to any group's channels differs."""
    largest = 0.0
    for group in symmetry.moving:
        pair = [element.get(group.index, Element()) for element in (first, second)]
        if not any(element.mixes or element.scales for element in pair):
            orders = [np.arange(group.size) if element.index is None else element.index for element in pair]
            largest = max(largest, float((orders[0] != orders[1]).any()))
            continue
        for side in {side for element in pair for side in element.scales} or {-1}:
            tables = [_table(element, side, group.size) for element in pair]
            largest = max(largest, float(np.abs(tables[0] - tables[1]).max(initial=0.0)))
    return largest


def _table(element: Element, side: int, size: int) -> Matrix:
    """D P (…, size, size) on one side of a group."""
    table = np.eye(size) if element.index is None else np.eye(size)[element.index]
    table = table if element.matrix is None else element.matrix @ table
    return table * element.scales[side][..., None] if side in element.scales else table


def check_one_shape(weights: Sequence[Weights]) -> None:
    """Raise ArgumentError where edges' tensors differ in shape (heads of other classes): there is no mean of those."""
    for edge, others in enumerate(weights[1:], 1):
        for name, tensor in weights[0].items():
            if tensor.shape != others[name].shape:
                raise ArgumentError(
                    f"this matching reads the mean of whole networks, and {name!r} has shape {tuple(tensor.shape)} in "
                    f"edge 0 and {tuple(others[name].shape)} in edge {edge}; where heads differ take match='weight', "
                    "'activation', 'zipit', 'cca', 'ot' or 'pleas'"
                )


def mean_weights(weights: Sequence[Weights], shares: Sequence[float]) -> dict[str, Tensor]:
    """Σ shares_i weights_i of aligned weight sets, fresh tensors; integer tensors and masks come from the first."""
    return {
        name: sum((share * w[name] for share, w in zip(shares, weights)), start=torch.zeros_like(tensor))
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.isinf().any()
        else tensor
        for name, tensor in weights[0].items()
    }


def scored_names(symmetry: Symmetry) -> list[str]:
    """Parameters that a group moves: running statistics and other buffers never enter an objective on weights."""
    names = dict.fromkeys(m.fqn for group in symmetry.groups for m in group.members)
    return [name for name in names if symmetry.program.is_parameter(name)]


def pair_objective(symmetry: Symmetry, weights: Sequence[Weights], elements: Sequence[Elements]) -> float:
    """Σ_{p<q} Σ ⟨P_p W_p, P_q W_q⟩ over the parameters that groups move, in float64."""
    total = 0.0
    for name in scored_names(symmetry):
        moved = [act(symmetry, e, {name: w[name]})[name].double() for w, e in zip(weights, elements)]
        whole = torch.stack(moved).sum(0)
        total += 0.5 * sum(float((m * (whole - m)).sum()) for m in moved)
    return total
