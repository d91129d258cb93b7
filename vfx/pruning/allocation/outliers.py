"""OWL: layers with more outliers among |w| ‖x‖ keep more weights (Yin et al., ICML 2024)."""

from __future__ import annotations

from typing import ClassVar

from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.pruning.allocation.allocation import Allocation, met
from vfx.pruning.scores.score import Subject
from vfx.pruning.scores.wanda import Wanda


class Outliers(Allocation):
    """Shares within ``spread`` of the network's, falling with a layer's share of outliers (§3.2).

    An outlier's |w| ‖x‖ is more than ``above`` times the mean of its layer.
    """

    name: ClassVar[str] = "owl"
    needs_data: ClassVar[bool] = True

    @checked
    def __init__(self, above: float = 5.0, spread: float = 0.08):
        if above <= 0 or not 0 <= spread < 1:
            raise ArgumentError(f"above={above} must be positive and spread={spread} lie in [0, 1)")
        self.above, self.spread = above, spread

    def shares(self, subject: Subject, sparsity: float) -> dict[str, float]:
        values = Wanda().scores(subject)
        ratios = {name: float((v > self.above * v.mean()).double().mean()) for name, v in values.items()}
        low, high = min(ratios.values()), max(ratios.values())
        wishes = {name: -2 * self.spread * (ratio - low) / max(high - low, 1e-300) for name, ratio in ratios.items()}
        return met(wishes, {target.name: target.numel for target in subject.targets}, sparsity)
