"""Shares by what pruning costs each layer: the error of its outputs, measured over a range of shares.

For each layer the weights with the lowest |w| ‖x‖ go, those that stay are solved for on the support, and the squared
error of the outputs is held against their size: one curve for each layer from one Gram matrix. The shares are those of
the least sum of relative errors, found by taking the cheapest step of all layers again and again on the convex hull of
the curves.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vfx.pruning.allocation.allocation import Allocation, met
from vfx.pruning.scores.hessian import LayerProblem, layer_problem
from vfx.pruning.scores.score import Subject
from vfx.pruning.scores.sequential import one_by_one
from vfx.pruning.selection import lowest, pruned_count
from vfx.pruning.targets import Target
from vfx.reconstruct.solve import within

GRID = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
OUTPUTS = 64  # of a layer, spread evenly, that tell its curve
DAMPING = 1e-3
PIECES = 400  # steps in which the sparsity is handed out

Curve = list[tuple[float, float]]  # share that goes, relative error


class Errors(Allocation):
    """The least sum over layers of the relative squared error of their outputs."""

    name: ClassVar[str] = "error"
    needs_data: ClassVar[bool] = True

    def shares(self, subject: Subject, sparsity: float) -> dict[str, float]:
        sizes = {target.name: target.numel for target in subject.targets}
        curves: dict[str, Curve] = {}

        def measure(target: Target, weight: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
            curves[target.name] = _hull(curve(layer_problem(target, weight, values)))
            return torch.ones_like(weight, dtype=torch.bool), weight

        one_by_one(subject, measure)
        return met(_spread(curves, sizes, sparsity * sum(sizes.values())), sizes, sparsity)


def curve(problem: LayerProblem) -> Curve:
    """The relative squared error of a layer's outputs at each share of ``GRID``."""
    weight, hessian = problem.weight, problem.damped(DAMPING)
    if weight.shape[2] > OUTPUTS:
        weight = weight[:, :, torch.arange(OUTPUTS, device=weight.device) * weight.shape[2] // OUTPUTS]
    costs = (weight.square() * hessian.diagonal(dim1=1, dim2=2)[:, :, None]).reshape(1, -1)
    products = hessian @ weight
    size = float((weight * products).sum())
    points = [(0.0, 0.0)]
    for share in GRID[1:]:
        support = ~lowest(costs, pruned_count(costs.shape[1], share)).reshape(weight.shape)
        error = within(hessian, products, support) - weight
        points.append((share, max(float((error * (hessian @ error)).sum()), 0.0) / max(size, 1e-300)))
    return [*points, (1.0, 1.0)]


def _hull(points: Sequence[tuple[float, float]]) -> Curve:
    """The lower convex hull of a curve."""
    hull: Curve = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _spread(curves: dict[str, Curve], sizes: dict[str, int], total: float) -> dict[str, float]:
    """Shares that lose ``total`` weights in steps along the hulls, the least error for a weight first."""
    piece = total / PIECES
    shares, segments = dict.fromkeys(curves, 0.0), dict.fromkeys(curves, 0)
    slopes = {
        name: [(b[1] - a[1]) / (b[0] - a[0]) / sizes[name] for a, b in itertools.pairwise(hull)]
        for name, hull in curves.items()
    }
    queue = [(slopes[name][0], name) for name in curves]
    heapq.heapify(queue)
    left = total
    while left > 1e-9 * total and queue:
        _, name = heapq.heappop(queue)
        end = curves[name][segments[name] + 1][0]
        step = min((end - shares[name]) * sizes[name], piece, left)
        shares[name], left = shares[name] + step / sizes[name], left - step
        if end - shares[name] < 1e-12:
            segments[name] += 1
        if segments[name] < len(slopes[name]):
            heapq.heappush(queue, (slopes[name][segments[name]], name))
    return shares
