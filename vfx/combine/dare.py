"""DARE: drop entries of each task vector at random and rescale the rest, then combine by another method.

τ̃ᵢ = mᵢ ⊙ τᵢ / (1 − p) with each entry of mᵢ zero with probability p (Yu et al., ICML 2024, eq. 1): its mean is τᵢ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.combine.combiner import Combination, Combiner
from vfx.combine.task_arithmetic import TaskArithmetic
from vfx.errors import ArgumentError


class Dare(Combiner):
    """Drop a share of each task vector's entries, rescale the others, and combine what is left.

    ``drop`` p: the probability [0, 1) with which an entry goes; ``by``: the method that combines, task arithmetic by
    default. What is drawn depends on ``seed=`` of the merge alone. Raises ArgumentError.

    Source: *Language Models are Super Mario* (Yu et al., ICML 2024), §3.2.

    >>> merged = vfx.merge([a, b], x, base=pretrained, combine=vfx.Dare(drop=0.5, by=vfx.Ties()))
    """

    needs = frozenset({"base"})

    @checked
    def __init__(self, drop: float = 0.9, by: Combiner | None = None):
        if not 0 <= drop < 1:
            raise ArgumentError(f"drop is a probability, at least 0 and below 1, got {drop}")
        if by is not None and by.needs != self.needs:
            raise ArgumentError(f"DARE leaves task vectors, which {type(by).__name__} does not read")
        self.drop, self.by = drop, by or TaskArithmetic()

    def __call__(self, combination: Combination) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(combination.seed)
        weights = [{**tensors, **self._thinned(combination, edge, generator)} for edge, tensors in
                   enumerate(combination.program.weights)]  # fmt: skip
        return self.by(replace(combination, program=combination.program.with_weights(weights)))

    def _thinned(self, combination: Combination, edge: int, generator: torch.Generator) -> dict[str, Tensor]:
        """An edge's parameters with what is left of its task vector, float64."""
        thinned = {}
        for name in combination.names:
            change = combination.change(name, edge)
            stays = torch.rand(change.shape, generator=generator) >= self.drop
            kept = torch.where(stays.to(change.device), change / (1 - self.drop), 0.0)
            thinned[name] = combination.of_base(name) + kept
        return thinned
