"""One curve of a barrier: what is measured along the line between two edges.

The barrier of a curve m is max_α [(1 − α) m(f_0) + α m(f_1) − m(f_α)] for accuracy, and the same with the sign turned
for loss (Frankle et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vfx.diagnosis.rows import finite


@dataclass(frozen=True)
class Curve:
    """Accuracy (share, 0 to 1) and loss (nats) of the merged network at each α, which weighs the second edge."""

    match: str | None
    normalize: str | None
    alphas: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def name(self) -> str:
        matched = "direct" if self.match is None else f"{self.match} matching"
        return matched if self.normalize is None else f"{matched}, {self.normalize}"

    @property
    def accuracy_barrier(self) -> float:
        """max_α [(1 − α) m(f_0) + α m(f_1) − m(f_α)], at least 0 (at the ends)."""
        return _barrier(self.alphas, self.accuracy, 1.0)

    @property
    def loss_barrier(self) -> float:
        """max_α [m(f_α) − (1 − α) m(f_0) − α m(f_1)], at least 0; infinite if a loss is."""
        return _barrier(self.alphas, self.loss, -1.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "match": self.match,
            "normalize": self.normalize,
            "alphas": list(self.alphas),
            "accuracy": [finite(x) for x in self.accuracy],
            "loss": [finite(x) for x in self.loss],
            "accuracy_barrier": finite(self.accuracy_barrier),
            "loss_barrier": finite(self.loss_barrier),
        }


def _barrier(alphas: Sequence[float], values: Sequence[float], sign: float) -> float:
    gaps = (sign * ((1 - a) * values[0] + a * values[-1] - m) for a, m in zip(alphas, values))
    return max(0.0, *gaps)
