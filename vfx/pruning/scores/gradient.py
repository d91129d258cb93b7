"""Gradient × weight: |w · ∂L/∂w|, the first-order change of the mean loss (Molchanov et al. 2017; SNIP, Lee 2019)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vfx.arguments import checked
from vfx.pruning.gradients import Labels, Loss, SampleGradients
from vfx.pruning.scores.score import Score, Subject


class GradientWeight(Score):
    """The weight times the gradient of the mean loss over the data, without its sign."""

    name: ClassVar[str] = "gradient"
    needs_data: ClassVar[bool] = True

    @checked
    def __init__(self, *, loss: Loss | None = None, labels: Labels = "sampled"):
        self.loss, self.labels = loss, labels

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        names = [target.name for target in subject.targets]
        mean = SampleGradients(subject, self.loss, self.labels).mean(names, subject.batches())
        return {target.name: (mean[target.name] * subject.weight(target)).abs() for target in subject.targets}
