"""Iso-C: the sum of the task matrices with all its singular values made equal.

Σ τᵢ = U S Vᵀ for the matrix of each layer; with σ̄ the mean of S, θ = θ₀ + α σ̄ U Vᵀ. What is no matrix (biases, gains,
embeddings of positions) gets the mean of the task vectors, times α, as in the authors' code (Marczak et al., ICML 2025,
§4.1). Here convolutions' kernels are matrices, too, from all inputs and taps to the outputs, and each group of a
grouped layer has one of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.combine.combiner import Combination, Combiner
from vfx.reconstruct.plan import products_of


class IsoC(Combiner):
    """Add the isotropic sum of the task matrices, times ``scale`` α, to the base.

    Source: *No Task Left Behind: Isotropic Model Merging* (Marczak et al., ICML 2025), eq. 6.

    >>> merged = vfx.merge([a, b], x, base=pretrained, combine="iso_c")
    """

    needs = frozenset({"base"})

    @checked
    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, combination: Combination) -> dict[str, Tensor]:
        products = products_of(combination.program)
        merged = {}
        for name in combination.names:
            change = combination.summed(name)
            if name in products:
                form = products[name][0].form
                change = form.weight(_isotropic(form.matrix(change)))
            elif change.ndim == 2 and min(change.shape) > 1:
                change = _isotropic(change)
            else:
                change = change / len(combination.shares)
            merged[name] = combination.of_base(name) + self.scale * change
        return merged


def _isotropic(matrix: Tensor) -> Tensor:
    """Matrices (…, K, O) with the mean of their singular values in place of each."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return values.mean(-1)[..., None, None] * (left @ right)
