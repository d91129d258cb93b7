"""Moments of several processes as one: means are weighted by their counts, deviations are moved to the common mean.

Σ (x − μ)² over all = Σ over processes of [Σ (x − μ_p)² + n_p (μ_p − μ)²], and alike for cross products (Chan, Golub &
LeVeque 1979, as in ``moments.py``): nothing cancels.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vfx.processes import added, count
from vfx.statistics.moments import CrossMoments, Moments

K = TypeVar("K", bound=Hashable)


def number_across(own: int) -> int:
    """The sum of a number over all processes."""
    ((total,),) = added({"number": [torch.tensor(own)]}).values()
    return int(total)


def moments_across(parts: Mapping[K, Sequence[Moments]]) -> dict[K, list[Moments]]:
    """The moments over all processes, under the names of the first process that has them."""
    if count() == 1:
        return {name: list(moments) for name, moments in parts.items()}
    means = _means(parts)
    spread = added({name: [_moved(*pair) for pair in zip(moments, means[name])] for name, moments in parts.items()})
    totals_of: dict[K, list[Moments]] = {}
    for name, totals in means.items():
        totals_of[name] = [Moments(len(total.mean), total.mean.device) for total in totals]
        for part, total, m2 in zip(totals_of[name], totals, spread[name]):
            part.count, part.mean, part.m2 = total.count, total.mean, m2
    return totals_of


def cross_across(parts: Mapping[K, CrossMoments], *, within: bool, between: bool = True) -> dict[K, CrossMoments]:
    """The cross moments over all processes; ``within`` and ``between`` are those with which all were made."""
    if count() == 1:
        return dict(parts)
    moments = moments_across({name: cross.moments for name, cross in parts.items()})
    products = added({name: _products(cross, moments[name]) for name, cross in parts.items()})
    totals_of: dict[K, CrossMoments] = {}
    for name, moments_of in moments.items():
        sizes, device = [len(part.mean) for part in moments_of], moments_of[0].mean.device
        totals_of[name] = CrossMoments(len(moments_of), sizes, device, within=within, between=between)
        totals_of[name].moments = moments_of
        totals_of[name].cross = dict(zip(totals_of[name].cross, products.get(name, ())))
    return totals_of


def _means(parts: Mapping[K, Sequence[Moments]]) -> dict[K, list[Moments]]:
    """Counts and means over all processes."""
    sums = added({
        name: [x for part in part for x in (part.mean.new_tensor([part.count]), part.mean * part.count)]
        for name, part in parts.items()
    })  # fmt: skip
    means: dict[K, list[Moments]] = {}
    for name, tensors in sums.items():
        means[name] = []
        for number, total in zip(tensors[::2], tensors[1::2]):
            means[name].append(Moments(len(total), total.device))
            means[name][-1].count = int(number)
            means[name][-1].mean = total / number.clamp_min(1)
    return means


def _moved(part: Moments, whole: Moments) -> Tensor:
    """Squared deviations from the common mean."""
    return part.m2 + part.count * (part.mean - whole.mean) ** 2


def _products(part: CrossMoments, whole: Sequence[Moments]) -> list[Tensor]:
    shifts = [part.mean - total.mean for part, total in zip(part.moments, whole)]
    weight = part.moments[0].count
    return [torch.addr(total, shifts[i], shifts[j], alpha=weight) for (i, j), total in part.cross.items()]
