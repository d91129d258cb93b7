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
        return {name: list(own) for name, own in parts.items()}
    means = _means(parts)
    spread = added({name: [_moved(*pair) for pair in zip(own, means[name])] for name, own in parts.items()})
    found: dict[K, list[Moments]] = {}
    for name, totals in means.items():
        found[name] = [Moments(len(total.mean), total.mean.device) for total in totals]
        for one, total, m2 in zip(found[name], totals, spread[name]):
            one.count, one.mean, one.m2 = total.count, total.mean, m2
    return found


def cross_across(parts: Mapping[K, CrossMoments], *, within: bool, between: bool = True) -> dict[K, CrossMoments]:
    """The cross moments over all processes; ``within`` and ``between`` are those with which all were made."""
    if count() == 1:
        return dict(parts)
    moments = moments_across({name: own.moments for name, own in parts.items()})
    products = added({name: _products(own, moments[name]) for name, own in parts.items()})
    found: dict[K, CrossMoments] = {}
    for name, own in moments.items():
        sizes, device = [len(one.mean) for one in own], own[0].mean.device
        found[name] = CrossMoments(len(own), sizes, device, within=within, between=between)
        found[name].moments = own
        found[name].cross = dict(zip(found[name].cross, products.get(name, ())))
    return found


def _means(parts: Mapping[K, Sequence[Moments]]) -> dict[K, list[Moments]]:
    """Counts and means over all processes."""
    sums = added({
        name: [x for one in own for x in (one.mean.new_tensor([one.count]), one.mean * one.count)]
        for name, own in parts.items()
    })  # fmt: skip
    found: dict[K, list[Moments]] = {}
    for name, tensors in sums.items():
        found[name] = []
        for number, total in zip(tensors[::2], tensors[1::2]):
            found[name].append(Moments(len(total), total.device))
            found[name][-1].count = int(number)
            found[name][-1].mean = total / number.clamp_min(1)
    return found


def _moved(own: Moments, whole: Moments) -> Tensor:
    """Squared deviations from the common mean."""
    return own.m2 + own.count * (own.mean - whole.mean) ** 2


def _products(own: CrossMoments, whole: Sequence[Moments]) -> list[Tensor]:
    shifts = [one.mean - total.mean for one, total in zip(own.moments, whole)]
    weight = own.moments[0].count
    return [torch.addr(total, shifts[i], shifts[j], alpha=weight) for (i, j), total in own.cross.items()]
