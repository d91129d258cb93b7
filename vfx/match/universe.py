"""Many edges in one space: every edge has one group element that takes it to a common space, the *universe*.

The element that takes edge j to edge i is P_ij = P_i⁻¹ P_j: there is one for each pair, and they are cycle consistent,
P_ij P_jk = P_ik, since P_j cancels (C²M³, Crisostomi et al. 2024, §3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Permutations, act, compose_permutations, inverse_permutations, permuted
from vfx.errors import ArgumentError
from vfx.program import Weights


def pairwise(symmetry: Symmetry, elements: Sequence[Permutations], i: int, j: int) -> dict[int, Index]:
    """The group element that takes edge j to edge i, both being taken to the universe by their ``elements``."""
    return compose_permutations(symmetry.groups, elements[j], inverse_permutations(symmetry.groups, elements[i]))


def to_first(symmetry: Symmetry, elements: Sequence[Permutations]) -> tuple[dict[int, Index], ...]:
    """The same alignment in the first edge's frame: its own element becomes the identity."""
    return tuple(pairwise(symmetry, elements, 0, j) for j in range(len(elements)))


def cycle_error(symmetry: Symmetry, elements: Sequence[Permutations]) -> int:
    """Channels in which P_i0 P_0k differs from P_ik, over all i and k; none means that every cycle closes.

    With i = k it says P_i0 P_0i = 1, so P_ij P_jk = P_i0 (P_0j P_j0) P_0k = P_i0 P_0k = P_ik.
    """
    count, edges = 0, range(len(elements))
    to_zero, from_zero = ([pairwise(symmetry, elements, *pair) for pair in pairs]
                          for pairs in ([(0, k) for k in edges], [(i, 0) for i in edges]))  # fmt: skip
    for i in edges:
        for k in edges:
            around = compose_permutations(symmetry.groups, to_zero[k], from_zero[i])
            straight = pairwise(symmetry, elements, i, k)
            count += sum(int((around[g] != index).sum()) for g, index in straight.items())
    return count


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


def pair_objective(symmetry: Symmetry, weights: Sequence[Weights], elements: Sequence[Permutations]) -> float:
    """Σ_{p<q} Σ ⟨P_p W_p, P_q W_q⟩ over the parameters that groups move, in float64."""
    total = 0.0
    for name in scored_names(symmetry):
        moved = [act(symmetry, permuted(e), {name: w[name]})[name].double() for w, e in zip(weights, elements)]
        whole = torch.stack(moved).sum(0)
        total += 0.5 * sum(float((m * (whole - m)).sum()) for m in moved)
    return total
