"""Removed features folded into the kept ones: what a layer would have read of them is predicted from the rest.

With E[x xᵀ] over calibration data, B = E[x_R x_Kᵀ] (E[x_K x_Kᵀ] + λI)⁻¹ is the least-squares prediction of the removed
features R from the kept ones K; a layer that reads x through W gets W_K + W_R B. Kernels are corrected at each of their
positions. Only weights that read features (role ``in``) change; products of features (q·k) have none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.symmetry import Index, Symmetry
from vfx.program import Weights
from vfx.pruning.second_moments import SecondMoments
from vfx.resize.weights import Kept

RIDGE = 1e-4  # λ as a share of the mean second moment of the kept features


def compensated(facts: Symmetry, weights: Weights, kept: Kept, moments: SecondMoments) -> dict[str, Tensor]:
    """The weight set at full size, the columns of kept features corrected for those that will be removed."""
    result, solved = dict(weights), {}
    readers = {(m.fqn, m.dim) for g in facts.groups for m in g.members if m.role == "in"}
    for fqn, dim in sorted(readers):
        if fqn in facts.program.buffers:
            continue
        for groups, digits, position in facts.features(facts._labels[fqn, dim]):
            if groups not in moments.digits or not np.array_equal(moments.digits[groups], digits):
                continue
            if groups not in solved:
                solved[groups] = _prediction(facts, groups, digits, kept, moments)
            stays, prediction = solved[groups]
            if prediction is not None:
                result[fqn] = _corrected(result[fqn], dim, position, stays, prediction)
    return result


def _prediction(
    facts: Symmetry, groups: tuple[int, ...], digits: Index, kept: Kept, moments: SecondMoments
) -> tuple[Index, Tensor | None]:
    """Which features stay (n,), and B (removed, kept)."""
    stays = np.ones(len(digits), bool)
    for column, group in enumerate(groups):
        own = kept[group]
        if own.ndim == 1:
            stays &= np.isin(digits[:, column], own)
            continue
        parent = facts.groups[group].parent
        assert parent is not None
        rows = dict(zip(kept[parent].tolist(), own))
        outer = digits[:, groups.index(parent)] if parent in groups else np.zeros(len(digits), np.int64)
        stays &= np.array([int(d) in rows.get(int(b), ()) for b, d in zip(outer, digits[:, column])], bool)
    if stays.all() or not stays.any():
        return stays, None
    second = moments.matrix[groups]
    k, r = (torch.from_numpy(np.flatnonzero(x)).to(second.device) for x in (stays, ~stays))
    inside = second[k][:, k]
    inside.diagonal().add_(RIDGE * inside.diagonal().mean().clamp_min(1e-12))
    return stays, torch.linalg.solve(inside, second[k][:, r]).T


def _corrected(tensor: Tensor, dim: int, position: Index, stays: Index, prediction: Tensor) -> Tensor:
    """W_K + W_R B along one axis, copy by copy."""
    moved = tensor.detach().clone().movedim(dim, 0)
    b = prediction.to(tensor.device)
    for copy in position.T:
        k, r = (torch.from_numpy(copy[x]).to(tensor.device) for x in (stays, ~stays))
        gone = moved[r].reshape(len(r), -1).double()
        moved[k] += (b.T @ gone).to(tensor).reshape(len(k), *moved.shape[1:])
    return moved.movedim(0, dim).contiguous()
