"""ALPS: the support of a layer's weights by ADMM, then the weights on it by least squares (Meng et al., NeurIPS 2024).

With H = XᵀX scaled to a unit diagonal and Ŵ the dense weights in the same scale, the search alternates (Algorithm 1)

    W = (H + ρ I)⁻¹ (H Ŵ − V + ρ D),   D = what a selection keeps of W + V / ρ,   V ← V + ρ (W − D)

and lets ρ grow while the support still changes; every scope of a selection is a projection. The weights on the support
are then solved for exactly, by small Cholesky factors or conjugate gradients (§3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.pruning.scores.hessian import LayerProblem, LayerScore, layer_problem
from vfx.pruning.scores.score import Pruned, Select, Subject
from vfx.pruning.scores.sequential import one_by_one
from vfx.pruning.targets import Target
from vfx.reconstruct.solve import within

PATIENCE = 3  # steps between looks at the support
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the support that changed, and what ρ is multiplied by


class ALPS(LayerScore):
    """Supports found by ADMM and the weights on them solved, each layer on what the pruned layers before it give it.

    ``rho`` is the first penalty, ``steps`` bounds the search, ``damping`` is added to the Hessian's unit diagonal.
    Raises ArgumentError.

    Example: ``vfx.prune(model, x, sparsity=0.7, score=vfx.ALPS(), data=loader)``.
    """

    name: ClassVar[str] = "alps"

    @checked
    def __init__(self, rho: float = 0.1, steps: int = 300, damping: float = 0.01):
        if rho <= 0 or steps < 1 or damping <= 0:
            raise ArgumentError(f"rho={rho} and damping={damping} must be above 0 and steps={steps} at least 1")
        self.rho, self.steps, self.damping = rho, steps, damping

    def layer_scores(self, problem: LayerProblem) -> Tensor:
        """|w| ‖x‖: what the search starts from."""
        return problem.form.weight(problem.weight.abs() * _scale(problem.damped(self.damping)))

    def prune(self, subject: Subject, select: Select) -> Pruned:
        def prune_one(target: Target, weight: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
            problem = layer_problem(target, weight, values)
            before = subject.kept.get(target.name)

            def kept(matrix: Tensor) -> Tensor:
                """The support of the best matrices; what earlier steps removed is selected last."""
                scores = problem.form.weight(matrix.square())
                chosen = scores if before is None else scores.masked_fill(~before, -1)
                return problem.form.matrix(select({target.name: chosen})[target.name])

            damped = problem.damped(self.damping)
            support = self._support(damped, problem.weight, kept)
            solved = within(damped, damped @ problem.weight, support)
            mask = problem.form.weight(support)
            return mask, problem.form.weight(solved).to(weight.dtype).masked_fill(~mask, 0)

        return one_by_one(subject, prune_one, resumes=True)

    def _support(self, hessian: Tensor, weight: Tensor, kept: Callable[[Tensor], Tensor]) -> Tensor:
        """The support (G, K, O) that ADMM ends with."""
        scale = _scale(hessian)
        scaled, dense = hessian / scale / scale.mT, weight * scale
        values, vectors = torch.linalg.eigh(scaled)
        wanted, rho = scaled @ dense, self.rho
        sparse, dual = dense, torch.zeros_like(dense)
        support = looked = kept(dense)
        for step in range(1, self.steps + 1):
            right = wanted - dual + rho * sparse
            free = vectors @ ((vectors.mT @ right) / (values[:, :, None] + rho))
            target = free + dual / rho
            support = kept(target)
            sparse = target * support
            dual = dual + rho * (free - sparse)
            if step % PATIENCE == 0:
                changed = float((support != looked).sum()) / max(int(support.sum()), 1)
                if changed == 0:
                    break
                rho *= next(factor for share, factor in GROWTH if changed >= share)
                looked = support
        return support


def _scale(hessian: Tensor) -> Tensor:
    """The square root of a Hessian's diagonal, (G, K, 1)."""
    return hessian.diagonal(dim1=1, dim2=2).sqrt()[:, :, None]
