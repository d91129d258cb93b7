"""OT fusion (Singh & Jaggi 2020) and its form for transformers (Imfeld et al. 2023).

The channels of each edge are transported to the first edge's by optimal transport with uniform marginals, group after
group in the order of the graph (``vfx.match.coupling``). The cost of a pair of channels is the Euclidean distance

* between their activations over the data, each scaled to unit length (from second moments, so no activation is kept);
  a residual stream has one map, from the mean of the costs at its taps (the paper's policy "mean");
* or between the weights that make them, with the layers before already carried over; that needs no data.

Where blocks move as a whole (attention heads), each pair of blocks is tried with the transport of its channels, the
blocks are assigned to each other one to one, and channels are transported inside matched blocks. Queries and keys meet
each other in a product, so they are permuted and not mixed, as is all that no linear map goes through.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vfx.analyse.grids import grid
from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.arguments import checked
from vfx.elements import Element, identity
from vfx.errors import ArgumentError
from vfx.match import coupling
from vfx.match.carry import Carrier, Crossing, Pairing, Reading
from vfx.match.maps import mappable, places
from vfx.match.matcher import Gain, Matching, Problem
from vfx.match.units import GroupUnit, units
from vfx.program import Weights
from vfx.statistics.moments import CrossMoments
from vfx.statistics.taps import Tap

NEARLY = 1e-6  # shares that differ by less count as equal


class OptimalTransport:
    """Transport every edge to the first: ``method`` "exact" or "sinkhorn", ``cost`` "activation" or "weight".

    ``regularization`` is Sinkhorn's ε against costs of order one. Exact transport between edges of one width finds
    permutations and keeps each edge's function; Sinkhorn finds soft maps.
    """

    through_norms = False

    @checked
    def __init__(
        self,
        method: Literal["exact", "sinkhorn"] = "exact",
        cost: Literal["activation", "weight"] = "activation",
        regularization: float = 0.08,
    ):
        if method not in ("exact", "sinkhorn") or cost not in ("activation", "weight"):
            raise ArgumentError(
                f"method={method!r}, cost={cost!r}: choose 'exact' or 'sinkhorn', and 'activation' or 'weight'"
            )
        if not regularization > 0:
            raise ArgumentError(f"regularization must be positive, got {regularization:g}")
        self.method, self.cost, self.regularization = method, cost, regularization
        self.needs = frozenset({"features"} if cost == "activation" else ())
        self.exact = method == "exact"

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Matching:
        start = time.perf_counter()
        facts, weights = problem.symmetry, problem.program.weights
        if self.needs and (problem.statistics is None or "features" not in problem.statistics.reads):
            raise ArgumentError("transport on activations needs data, or statistics collected with features")
        elements, objective = [identity(facts)], []
        for edge in range(1, problem.program.edges):
            readings = []
            if problem.statistics is not None and self.needs:
                features = problem.statistics.features
                readings = [(tap, tap, features[tap.key]) for tap in problem.statistics.taps if not tap.beside]
            crossing = Crossing(Pairing(facts, facts), edge, weights[0], weights[edge], readings)
            carrier, value = self.carry(crossing)
            objective.append(value)
            elements.append(carrier.found)
        return Matching(
            elements=tuple(elements),
            objective=tuple(objective),
            seconds=time.perf_counter() - start,
        )

    def carry(self, crossing: Crossing) -> tuple[Carrier, float]:
        """What carries one edge, and the mean transport cost of a channel, negative."""
        carrier = Carrier(crossing.pairing)
        costs: _Costs = _ActivationCosts(crossing.pairing, crossing.readings, crossing.edge)
        if self.cost == "weight":
            costs = _WeightCosts(carrier, crossing.first, crossing.other)
        return carrier, -_Fusion(self, carrier, costs).run()

    def solve(self, cost: Gain) -> Gain:
        """The coupling (C₀, Cᵢ) of one cost matrix."""
        return coupling.exact(cost) if self.method == "exact" else coupling.sinkhorn(cost, self.regularization)


# costs ----------------------------------------------------------------------------------------------------------------


class _Costs(ABC):
    """What it costs to take a channel of the other edge for one of the first; None where nothing is known."""

    @abstractmethod
    def single(self, group: Group) -> Gain | None:
        """(C₀, Cᵢ) of a group that stands on its own, or of blocks as a whole."""

    @abstractmethod
    def inner(self, outer: Group, group: Group) -> Gain | None:
        """(blocks₀, blocksᵢ, C₀, Cᵢ) of a group inside blocks."""


class _ActivationCosts(_Costs):
    def __init__(self, pairing: Pairing, readings: Sequence[Reading], edge: int):
        self.pairing = pairing
        self.readings = [(tap, twin, distances(moments, edge)) for tap, twin, moments in readings]

    def single(self, group: Group) -> Gain | None:
        inside = {g.index for g in self.pairing.one.groups if g.parent == group.index}
        return self._mean([group], [r for r in self.readings if not inside & set(r[0].groups)])

    def inner(self, outer: Group, group: Group) -> Gain | None:
        return self._mean([outer, group], self.readings)

    def _mean(self, chosen: list[Group], readings: Sequence[tuple[Tap, Tap, Gain]]) -> Gain | None:
        wanted = {g.index for g in chosen}
        costs = [self._channels(chosen, *reading) for reading in readings if wanted <= set(reading[0].groups)]
        return np.mean(costs, axis=0) if costs else None

    def _channels(self, chosen: list[Group], first_tap: Tap, second_tap: Tap, cost: Gain) -> Gain:
        """A tap's costs by channels of the chosen groups; other groups of the tap in their best order."""
        twins = [self.pairing.other.groups[self.pairing.twin[g.index]] for g in chosen]
        rows, columns = (
            grid(
                tap.groups,
                tap.digits,
                np.arange(tap.size)[:, None],
                [g.index for g in groups],
                [g.size for g in groups],
            )
            for tap, groups in ((first_tap, chosen), (second_tap, twins))
        )
        if len(chosen) == 1:
            return _best(cost[rows[:, None, :, None], columns[None, :, None, :]])
        return _best(cost[rows[:, None, :, None, :, None], columns[None, :, None, :, None, :]])


def distances(moments: CrossMoments, edge: int) -> Gain:
    """Euclidean distance (C₀, Cᵢ) between activations of the first edge and of another, each of unit length."""
    first, second = moments.moments[0], moments.moments[edge]
    product = moments.covariance(0, edge) + torch.outer(first.mean, second.mean)
    lengths = [(m.m2 / max(m.count, 1) + m.mean**2).sqrt() for m in (first, second)]
    alive = [(length > 0).double() for length in lengths]
    inverse = [a / torch.where(length > 0, length, 1.0) for a, length in zip(alive, lengths)]
    cosine = product * torch.outer(*inverse)
    return (alive[0][:, None] + alive[1] - 2 * cosine).clamp_min(0).sqrt().cpu().numpy()


def _best(cost: Gain) -> Gain:
    """Costs (…, r, s) of things whose parts may be paired in any order: the mean over the best pairs."""
    if cost.shape[-2:] == (1, 1):
        return cost[..., 0, 0]
    least = np.empty(cost.shape[:-2])
    for at in np.ndindex(*least.shape):
        rows, columns = linear_sum_assignment(cost[at])
        least[at] = cost[at][rows, columns].mean()
    return least


class _WeightCosts(_Costs):
    """Distances between the weights that make a channel; layers before are carried over already."""

    def __init__(self, carrier: Carrier, first: Weights, other: Weights):
        self.carrier, self.weights = carrier, (first, other)

    def single(self, group: Group) -> Gain | None:
        rows = self._rows(group)
        return None if rows is None else _scaled(torch.cdist(rows[0][0], rows[1][0]).numpy())

    def inner(self, outer: Group, group: Group) -> Gain | None:
        rows = self._rows(group)
        if rows is None:
            return None
        cost = torch.cdist(rows[0].flatten(0, 1), rows[1].flatten(0, 1)).reshape(*rows[0].shape[:2], *rows[1].shape[:2])
        return _scaled(cost.permute(0, 2, 1, 3).numpy())

    def _rows(self, group: Group) -> tuple[Tensor, Tensor] | None:
        """What makes the channels in both edges (blocks, C, everything else), from the weights that can be compared."""
        pairing = self.carrier.pairing
        twin = pairing.other.groups[pairing.twin[group.index]]
        stacked: tuple[list[Tensor], list[Tensor]] = [], []
        for member in group.members:
            fqn, dim = member.fqn, member.dim
            trained = pairing.one.program.is_parameter(fqn)
            if member.role not in ("out", "tied") or not trained or not self.carrier.settled(fqn, dim):
                continue
            if self._moved_inside(group, fqn, dim):
                continue
            tensors = self.carrier.comparable(fqn, self.weights[0][fqn], self.weights[1][fqn], dim)
            for rows, facts, its_group, tensor in zip(stacked, (pairing.one, pairing.other), (group, twin), tensors):
                where = places(facts, dict(facts.axes_of(fqn))[dim], its_group)
                if where is None:
                    continue
                index = torch.from_numpy(where.reshape(-1)).to(tensor.device)
                values = tensor.index_select(dim, index).movedim(dim, 0).double().cpu()
                rows.append(values.reshape(*where.shape[:2], -1))
        if not stacked[0]:
            return None
        return torch.cat(stacked[0], -1), torch.cat(stacked[1], -1)

    def _moved_inside(self, group: Group, fqn: str, dim: int) -> bool:
        """Whether groups inside the blocks of this one stand on the axis too: they count block by block."""
        labels = dict(self.carrier.pairing.one.axes_of(fqn))[dim]
        facts = self.carrier.pairing.one
        return any(facts.groups[g].parent == group.index for groups, _, _ in facts.features(labels) for g in groups)


def _scaled(cost: Gain) -> Gain:
    """Costs of order one, whatever the scale of the weights."""
    return cost / cost.max() if cost.size and cost.max() > 0 else cost


# fusion ---------------------------------------------------------------------------------------------------------------


class _Fusion:
    """Transports one edge, unit after unit."""

    def __init__(self, method: OptimalTransport, carrier: Carrier, costs: _Costs):
        self.method, self.carrier, self.costs = method, carrier, costs
        self.pairing = carrier.pairing

    def run(self) -> float:
        """Fill the carrier; returns the mean cost of a channel."""
        spent: list[float] = []
        for unit in units(self.pairing.one):
            if unit.inner:
                self._blocks(unit, spent)
            else:
                self._single(unit.outer, spent)
        return float(np.mean(spent)) if spent else 0.0

    def _size(self, group: Group) -> tuple[int, int]:
        return group.size, self.pairing.other.groups[self.pairing.twin[group.index]].size

    def _single(self, group: Group, spent: list[float]) -> None:
        sizes = self._size(group)
        cost = self.costs.single(group)
        if cost is None:
            self.carrier.found[group.index] = Element(_spread(*sizes))
            return
        plan = self.method.solve(cost)
        spent.append(float((plan * cost).sum()))
        soft = mappable(self.pairing.one, group)
        self.carrier.found[group.index] = self._element(_nearest(plan, cost), plan if soft else None, sizes)

    def _element(self, nearest: Index, plan: Gain | None, sizes: tuple[int, int]) -> Element:
        """C₀ Π for what makes the feature, Cᵢ Π for what reads it; a coupling that is a permutation is no more."""
        if plan is None or (self.method.method == "exact" and sizes[0] == sizes[1]):
            return Element(nearest)
        return Element(nearest, plan * sizes[0], dual=plan * sizes[1])

    def _blocks(self, unit: GroupUnit, spent: list[float]) -> None:
        """Blocks are assigned one to one, on what the transport of their channels costs."""
        counts = self._size(unit.outer)
        outer = self.costs.single(unit.outer)
        total = np.zeros(counts) if outer is None else outer.copy()
        costed = outer is not None
        solved: dict[int, tuple[Gain, Gain]] = {}
        for group in unit.inner:
            cost = self.costs.inner(unit.outer, group)
            if cost is None:
                continue
            costed = True
            couplings = np.stack([[self.method.solve(cost[i, j]) for j in range(counts[1])] for i in range(counts[0])])
            total += (couplings * cost).sum((2, 3))
            solved[group.index] = couplings, cost
        blocks = _assigned(total) if costed else _spread(*counts)
        rows = np.arange(len(blocks))
        if costed:
            spent.append(float(total[rows, blocks].mean()))
        self.carrier.found[unit.outer.index] = Element(blocks)
        for group in unit.inner:
            sizes = self._size(group)
            if group.index not in solved:
                self.carrier.found[group.index] = Element(_all(_spread(*sizes), len(blocks)))
                continue
            plans, cost = (x[rows, blocks] for x in solved[group.index])
            soft = plans if mappable(self.pairing.one, group) else None
            nearest = np.stack([*map(_nearest, plans, cost)])
            self.carrier.found[group.index] = self._element(nearest, soft, sizes)


def _nearest(plan: Gain, cost: Gain) -> Index:
    """The permutation nearest to a coupling, as far as there are channels; what is left takes its largest share.

    Between equal shares the cost decides.
    """
    return _assigned(NEARLY * _scaled(cost) - plan / plan.max())


def _assigned(cost: Gain) -> Index:
    rows, columns = linear_sum_assignment(cost)
    chosen = cost.argmin(1)
    chosen[rows] = columns
    return chosen.astype(np.int64)


def _spread(size: int, other_size: int) -> Index:
    """Channels of which nothing is known, in order."""
    return np.arange(size, dtype=np.int64) * other_size // size


def _all(nearest: Index, blocks: int) -> Index:
    return np.repeat(nearest[None], blocks, axis=0)
