"""Steps that are as long in every direction: the polar factor of the gradients' running sum.

A gradient by a map mostly names the few directions that matter most; Adam's step, taken entry by entry, turns by those
alone. With M = U S Vᵀ the step is lr · U Vᵀ, which turns by lr in every direction that M names at all (Muon: Jordan et
al. 2024; steepest descent in the spectral norm: Bernstein and Newhouse, *Old Optimizer, New Norm*, 2024). Polar factors
stay in the tangent spaces of ``vfx.match.chart``: those of skew matrices are skew, those of blocks of planes such
blocks, and what M sends to zero the step does too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

RANK = 1e-10  # share of the largest singular value up to which a direction is rounding


def polar(matrix: Tensor) -> Tensor:
    """U Vᵀ of matrices (…, n, n) over the singular values that are not rounding; zeros stay."""
    left, values, right = torch.linalg.svd(matrix)
    told = (values > RANK * values.amax(-1, keepdim=True)).to(matrix)
    return (left * told[..., None, :]) @ right


class PolarSteps:
    """p ← p − lr · polar(g + momentum · m) with m ← momentum · m + g (Nesterov's momentum)."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.9):
        self.parameters, self.lr, self.momentum = list(parameters), lr, momentum
        self._sums = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, share: float = 1.0) -> None:
        """One step at a share of the rate, by the gradients that the parameters hold."""
        for parameter, total in zip(self.parameters, self._sums):
            if parameter.grad is not None:
                total.mul_(self.momentum).add_(parameter.grad)
                parameter.sub_(share * self.lr * polar(parameter.grad + self.momentum * total))
