"""The regression of RegMean: W = (Σ αᵢ G̃ᵢ)⁻¹ Σ αᵢ G̃ᵢ Wᵢ from the Gram matrices of each edge's inputs to a layer.

G̃ = β G + (1 − β) diag(G), the mean over the samples (Jin et al., ICLR 2023, §3.3: there the sum, which is the same for
equal numbers of samples). It is the least-squares problem that ``vfx.reconstruct`` solves, with the average as the
start: what no input tells stays averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vfx.combine.combiner import Combination
from vfx.combine.own_data import OwnData
from vfx.errors import ArgumentError
from vfx.reconstruct.plan import ProductCall, products_of
from vfx.reconstruct.solve import RidgeProblem, System
from vfx.reconstruct.sums import Sums


class Regression(OwnData):
    """What RegMean and RegMean++ share: ``data`` of each edge, or of all; ``off_diagonal`` β."""

    def __init__(self, data: Sequence[Any] | None, off_diagonal: float):
        super().__init__(data)
        if not 0 <= off_diagonal <= 1:
            raise ArgumentError(f"off_diagonal is a share, at least 0 and at most 1, got {off_diagonal}")
        self.off_diagonal = off_diagonal

    def products(self, combination: Combination) -> dict[str, list[ProductCall]]:
        """The calls that multiply by each parameter that is solved for."""
        return {name: calls for name, calls in products_of(combination.program).items() if name in combination.names}

    def solved(self, combination: Combination, name: str, product: ProductCall, grams: Sequence[Tensor]) -> Tensor:
        """A parameter from the mean Gram matrix (G, K, K) of each edge's inputs, float64."""
        matrices = [product.form.matrix(tensors[name].double()) for tensors in combination.program.weights]
        reduced = [share * self._reduced(gram) for share, gram in zip(combination.shares, grams)]
        gram = torch.stack(reduced).sum(0)
        cross = torch.stack([part @ matrix for part, matrix in zip(reduced, matrices)]).sum(0)
        none = gram.new_zeros(len(gram), 0)
        sums = Sums(gram, cross, none, none, none, 0)
        centre = product.form.matrix(combination.mean(name))
        return product.form.weight(System(RidgeProblem(centre, None), sums).solve(0.0).matrix)

    def _reduced(self, gram: Tensor) -> Tensor:
        diagonal = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        return self.off_diagonal * gram + (1 - self.off_diagonal) * diagonal


def gram_of(product: ProductCall, values: Callable[[fx.Node], Any]) -> Tensor:
    """Σ rowsᵀ rows of one batch at one call, float64; ``values`` gives the value of a node."""
    return product.form.gram(values(product.source)).double()
