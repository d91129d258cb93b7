"""Masks that keep N of every M weights along the inputs and along the outputs, so that Wᵀ has the pattern, too.

Of each M × M block the N entries of each row and each column stay whose scores have the largest sum (Hubara et al.,
NeurIPS 2021, §3, as a flow of least cost). Up to M = 4 all such blocks are tried. Beyond, the sum is a linear program
over 0 ≤ x ≤ 1 with all rows and columns summing to N: its matrix is totally unimodular, so its corners are 0 and 1.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import block_diag, eye_array, kron, vstack
from torch import Tensor

from vfx.errors import PassError

LISTED = 4  # the largest block whose masks are all tried
BLOCKS = 64  # in one linear program


def transposable(scores: Tensor, keep: int) -> Tensor:
    """True where an entry of a block stays, (blocks, M, M), as the scores: ``keep`` in each row and column."""
    size = scores.shape[-1]
    flat = scores.double().flatten(1)
    flat = flat - flat.amin(1, keepdim=True)  # the same sum for all masks
    scaled = flat / flat.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    if size <= LISTED:
        masks = torch.from_numpy(_masks(size, keep)).to(scores.device)
        return masks[(scaled @ masks.double().T).argmax(1)].reshape(scores.shape)
    parts = [_solved(part.cpu().numpy(), size, keep) for part in scaled.split(BLOCKS)]
    return torch.from_numpy(np.concatenate(parts)).to(scores.device).reshape(scores.shape)


@cache
def _masks(size: int, keep: int) -> NDArray[Any]:
    """All blocks with ``keep`` entries in each row and column, (masks, size²)."""
    rows = [[k in chosen for k in range(size)] for chosen in combinations(range(size), keep)]
    masks = [block for block in product(rows, repeat=size) if all(sum(column) == keep for column in zip(*block))]
    return np.array(masks, bool).reshape(len(masks), -1)


def _solved(scores: NDArray[Any], size: int, keep: int) -> NDArray[Any]:
    """The best corners of the blocks' linear programs, (blocks, size²)."""
    eye, line = eye_array(size), np.ones((1, size))
    sums = block_diag([vstack([kron(eye, line), kron(line, eye)])] * len(scores), format="csr")
    wanted = np.full(sums.shape[0], keep)
    solution = linprog(-scores.reshape(-1), A_eq=sums, b_eq=wanted, bounds=(0, 1), method="highs-ds")
    if solution.x is None:
        raise PassError(f"no mask of {keep}:{size} along both axes was found: {solution.message}")
    mask = (solution.x > 0.5).reshape(len(scores), size, size)
    if (mask.sum(1) != keep).any() or (mask.sum(2) != keep).any():
        raise PassError(f"the masks found do not keep {keep} of {size} along both axes; please report the scores")
    return mask.reshape(len(scores), -1)
