"""The papers' measures as formulas on numbers that the pass over the data collected.

=====================  ========================================================================================
feature ratio          E‖g_α‖ / mean_i E‖g_i‖ of a layer
vanishing bound        ε(L) = r(L), ε(l) = max(ε(l+1), r(l)) for feature ratios r (*Vanishing Feature* Def. 5.1)
smoothed bound         ε(l) = max(γ ε(l+1) + (1 − γ)(1 − 1/(L + 1 − l)) ε(l+1), r(l)) with γ = 1.4
variance ratio         v_α / mean_i v_i with v the sum of a layer's channel variances: 2 v_α/(v_0 + v_1) for two edges
activation collapse    share of zero activations; share of an edge's active units that the merged network silences
magnitude collapse     mean |θ_α| / mean_i mean |θ_i| of a layer's weight
=====================  ========================================================================================

A ratio to nothing (a layer that is dead in every edge) is not defined: None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

GAMMA = 1.4


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known, or None."""
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def ratio(value: float | None, others: Sequence[float | None]) -> float | None:
    """``value`` over the mean of ``others``; None where one of them is missing, not finite, or that mean is 0."""
    average = mean(others)
    if value is None or average is None or average == 0 or not math.isfinite(value) or not math.isfinite(average):
        return None
    return value / average


def vanishing_bound(norms: Sequence[float | None], gamma: float | None = None) -> list[float | None]:
    """ε(1) … ε(L) from the layers' (normalised) feature norms; ``gamma`` smooths. Unknown norms add nothing."""
    bounds: list[float | None] = []
    after: float | None = None
    for distance, norm in enumerate(reversed(norms)):  # distance = L − l
        decayed = after if after is None or gamma is None else _smoothed(after, gamma, distance)
        terms = [value for value in (decayed, norm) if value is not None]
        after = max(terms) if terms else None
        bounds.append(after)
    return bounds[::-1]


def _smoothed(after: float, gamma: float, distance: int) -> float:
    """γ ε(l+1) + (1 − γ)(1 − 1/(L + 1 − l)) ε(l+1)."""
    return gamma * after + (1 - gamma) * (1 - 1 / (distance + 1)) * after
