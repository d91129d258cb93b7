"""A network's outputs over the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vfx.diagnosis.rows import finite, overall
from vfx.statistics.moments import Moments


@dataclass(frozen=True)
class Logits:
    """Mean and standard deviation of a network's outputs over the data: by class, and over all of them."""

    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()
    mean: float | None = None
    std: float | None = None

    @classmethod
    def of(cls, moments: Moments | None) -> Logits:
        if moments is None:
            return cls()
        return cls(tuple(moments.mean.tolist()), tuple(moments.std.tolist()), *overall(moments))

    def to_dict(self) -> dict[str, Any]:
        return {
            "means": [finite(x) for x in self.means],
            "stds": [finite(x) for x in self.stds],
            "mean": finite(self.mean),
            "std": finite(self.std),
        }
