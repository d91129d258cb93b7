"""The basis of a group's features in which what the last channels carry can be lost best.

Where a group goes through any invertible map T (queries and keys of a head, values and its output projection, layers
that follow each other without an activation), the features may be turned before channels go. Of all maps the loss
tr(R E[(x − x̂)(x − x̂)ᵀ]) of what is kept (``vfx.pruning.elimination``) is least for T = S^-¼ Uᵀ R^½, with
R^½ M R^½ = U S Uᵀ and S falling: behind it M and R are both √S, and without the channels behind the k-th the loss is
the sum of S behind k, the least that any k features leave (Eckart & Young 1936). This is the singular value
decomposition that SVD-LLM (Wang et al., ICLR 2025, §3) takes of one weight, of both sides of a pair at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.classes import Maps
from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry
from vfx.elements.element import Element
from vfx.pruning.elimination import error_form
from vfx.pruning.second_moments import SecondMoments

DAMPING = 1e-4  # of the mean of R's eigenvalues: directions that nothing reads keep a map that can be undone
FLOOR = 1e-6  # of the largest of S
SPREAD = 1e6  # condition of T from which a block stays as it is: weights lose their last digits


def principal_elements(facts: Symmetry, weights: Mapping[str, Tensor], moments: SecondMoments) -> dict[int, Element]:
    """The element of each group whose class is linear and whose features are known, one map for each block."""
    elements = {}
    for group in facts.moving:
        if not is_free(group):
            continue
        form = error_form(facts, group, weights, moments)
        if form is not None:
            blocks = [_block(matrix, group.size) for matrix in form]
            maps = np.stack([_principal(moment, readers).numpy() for moment, readers in zip(*blocks)])
            elements[group.index] = Element(matrix=maps if group.parent is not None else maps[0])
    return elements


def is_free(group: Group) -> bool:
    """Whether a group's features may go through any invertible map."""
    return group.kind is Maps.LINEAR


def _block(matrix: Tensor, size: int) -> list[Tensor]:
    """The square blocks on the diagonal."""
    return [matrix[start : start + size, start : start + size] for start in range(0, len(matrix), size)]


def _principal(moment: Tensor, readers: Tensor) -> Tensor:
    """T (n, n) for one block; the identity where there is nothing to tell channels by."""
    still = torch.eye(len(moment), dtype=torch.float64)
    if not (moment.diagonal().sum() > 0 and readers.diagonal().sum() > 0):
        return still
    values, vectors = torch.linalg.eigh(readers)
    root = vectors * (values.clamp_min(0) + DAMPING * values.mean()).sqrt() @ vectors.T
    values, turned = torch.linalg.eigh(root @ moment @ root)
    balance = values.clamp_min(FLOOR * float(values[-1])) ** -0.25
    result = (turned * balance).flip(1).T @ root
    return result if torch.linalg.cond(result) < SPREAD else still
