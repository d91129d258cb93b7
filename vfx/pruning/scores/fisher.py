"""Diagonal Fisher: w² F_qq / 2 with F_qq = (1/N) Σ g_n,q², a second-order estimate of the loss that a weight is worth.

The loss around a trained network is ½ δᵀ F δ; removing one weight costs ½ w² F_qq (Theis et al. 2018; *Vanishing
Feature*, App. A.7). A small constant is added to F so that weights without a gradient are ranked by magnitude.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.pruning.gradients import Labels, Loss, SampleGradients
from vfx.pruning.scores.score import Score, Subject


class DiagonalFisher(Score):
    """Half the squared weight times the damped mean of its squared per-sample gradients."""

    name: ClassVar[str] = "fisher"
    needs_data: ClassVar[bool] = True

    @checked
    def __init__(
        self, damping: float = 1e-4, *, loss: Loss | None = None, labels: Labels = "sampled", minibatch: int = 1
    ):
        self.damping, self.loss, self.labels = damping, loss, labels
        self.minibatch = minibatch

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        gradients = SampleGradients(subject, self.loss, self.labels, self.minibatch)
        weights = {target.name: subject.weight(target) for target in subject.targets}
        totals = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        count = 0
        for chunk in gradients.chunks(list(weights), subject.batches()):
            for name, gradient in chunk.items():
                totals[name] += gradient.square().sum(0, dtype=torch.float64)
            count += len(next(iter(chunk.values())))
        return {
            name: weight.double().square() * (totals[name] / count + self.damping) / 2
            for name, weight in weights.items()
        }
