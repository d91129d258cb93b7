"""Whether edges stand in one frame as they are, as networks fine-tuned from one checkpoint do.

With A_ij = ⟨W₀, W₁⟩ between channel i of one edge and channel j of the other, contracted over all else, the identity
is a fixed point of weight matching (Git Re-Basin, Ainsworth et al. 2022) where no permutation gives more than Σᵢ A_ii.
None gives more than Σᵢ maxⱼ A_ij, so the assignment is solved only where that leaves it open. All are counted from what
a random permutation gives, Σᵢ meanⱼ A_ij: gains of norms alone give every pair of channels much, and tell nothing.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry
from vfx.elements.parts import parts, rows_of
from vfx.match.matcher import assign
from vfx.match.universe import scored_names
from vfx.program import Weights

SHARE = 0.99  # of what the best permutation of a group could give over a random one, that the identity gives


@torch.no_grad()
def in_one_frame(symmetry: Symmetry, edges: Collection[Weights], apart: frozenset[str] = frozenset()) -> bool:
    """Whether in every group of every edge the identity is the best permutation towards the first edge.

    ``apart`` names parameters that are not compared (heads). False where a network has no groups.
    """
    first, *others = edges
    names = {name for name in scored_names(symmetry) if name not in apart}
    groups = sorted(symmetry.groups, key=lambda group: _size(group, first, names))  # the cheap ones say no as well
    return bool(groups) and all(
        _stays(symmetry, group, first, weights, names) for weights in others for group in groups
    )


def _size(group: Group, weights: Weights, names: set[str]) -> int:
    return group.size * sum(weights[m.fqn].numel() for m in group.members if m.fqn in names)


def _stays(symmetry: Symmetry, group: Group, first: Weights, second: Weights, names: set[str]) -> bool:
    """Whether a group's channels are where they are in the first edge; so are those that no parameter tells apart."""
    gain = torch.zeros(group.size, group.size, dtype=torch.float64)
    for member in group.members:
        if member.fqn not in names or first[member.fqn].shape != second[member.fqn].shape:
            continue
        for part in parts(symmetry, group, member):
            ours, theirs = (rows_of(tensors[member.fqn], member.dim, part).double() for tensors in (first, second))
            gain += (ours @ theirs.T).cpu()
    return _identity_is_best(gain)


def _identity_is_best(gain: Tensor) -> bool:
    random = float(gain.mean(1).sum())
    kept = float(gain.trace()) - random
    return kept >= SHARE * (float(gain.amax(1).sum()) - random) or kept >= SHARE * (assign(gain)[1] - random)
