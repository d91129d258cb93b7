"""How many channels each group keeps: a fraction everywhere or the best overall, within a budget.

``uniform`` keeps one fraction of every group, or of every product of groups that channels are made of (nested grouped
convolutions: ``vfx.pruning.shares``); ``global`` removes the channels with the lowest scores wherever they are, scores
divided by their group's mean (Taylor scores are comparable as they are), ``isomorphic`` those that are lowest among all
structures of their kind (``vfx.pruning.isomorphic``). The fraction is that of channels, or the smallest that reaches a
budget in parameters, FLOPs or seconds, found by bisection on the resized network itself. Positions (tokens, latents:
``vfx.resize.roles``) stay. Groups tied by a view go together (``vfx.resize.slots``). Every group keeps at least one
channel, or as many as its operators need (``vfx.resize.least``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.errors import ArgumentError
from vfx.pruning.experts import expert_groups
from vfx.pruning.groups import Scores
from vfx.pruning.isomorphic import quantiles
from vfx.pruning.roles import check_roles, group_roles
from vfx.pruning.shares import Streams
from vfx.resize.slots import Bundle, RemovalUnits

ALLOCATIONS = ("uniform", "global", "isomorphic")
BUDGETS = ("channels", "params", "flops", "latency")
UNITS = ("auto", "channels", "blocks", "both", "experts")
STEPS = 12  # of the bisection: a budget is met to 1/4096 of the channels


def is_protected(tensors: Iterable[str], protect: Iterable[str]) -> bool:
    """Whether one of some tensors, or a module that holds it, is named."""
    names = tuple(f"{name}." for name in protect)
    return any(f"{fqn}.".startswith(names) for fqn in tensors)


def check_protected(protect: Iterable[str], tensors: Collection[str]) -> None:
    """Raise ArgumentError for a protected name that no tensor has."""
    for name in protect:
        if not is_protected(tensors, [name]):
            raise ArgumentError(f"protect={name!r} names no parameter or module of this network")


@dataclass(frozen=True)
class Widths:
    """What may be removed and in what steps.

    ``protect``: FQNs of parameters or modules whose groups stay whole. ``round_to``: kept widths are multiples of this
    where a group has as many. ``units``: of groups inside blocks (heads × dim, groups × channels) remove "channels" in
    each block, whole "blocks", or "both"; "auto" is channels, and blocks where their numbers do not allow the share.
    "experts" are what a router chooses from, and nothing else goes.
    ``allocation``: one of ``ALLOCATIONS``. ``roles``: the kinds of groups that may go (``vfx.pruning.roles``), all if
    none is named.
    """

    allocation: str = "uniform"
    round_to: int = 1
    protect: tuple[str, ...] = ()
    units: str = "auto"
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise ArgumentError(f"allocation={self.allocation!r}: choose one of {', '.join(ALLOCATIONS)} (or auto)")
        if self.units not in UNITS:
            raise ArgumentError(f"units={self.units!r}: choose one of {', '.join(UNITS)}")
        check_roles(self.roles, self.units)
        if self.round_to < 1:
            raise ArgumentError(f"round_to must be at least 1, got {self.round_to}")

    # which ----------------------------------------------------------------------------------------------------------

    def streams(self, slots: RemovalUnits) -> Streams:
        """What the bundles make up of which units may be removed."""
        movable = {k for k, bundle in enumerate(slots.bundles) if not (bundle.fixed or self._stays(slots, bundle))}
        if self.roles:
            known = group_roles(slots.facts)
            movable = {k for k in movable if all(known[g] in self.roles for g in slots.bundles[k].groups)}
        if self.units == "experts":
            chosen = expert_groups(slots.facts)
            return Streams(slots, frozenset(k for k in movable if chosen.issuperset(slots.bundles[k].groups)))
        outer = {group.parent for group in slots.facts.groups}
        blocks = {k for k in movable if outer & set(slots.bundles[k].groups)}
        inside = {k for k in movable if any(slots.facts.groups[g].parent is not None for g in slots.bundles[k].groups)}
        free = movable - {"blocks": inside, "both": set()}.get(self.units, blocks)
        return Streams(slots, frozenset(free), frozenset(blocks - free if self.units == "auto" else ()))

    def _stays(self, slots: RemovalUnits, bundle: Bundle) -> bool:
        """Whether a bundle is of positions or protected."""
        members = [m for g in bundle.groups for m in slots.facts.groups[g].members]
        protected = is_protected((m.fqn for m in members), self.protect)
        return protected or any(g in slots.positions for g in bundle.groups)

    def check(self, facts: Symmetry) -> None:
        """Raise ArgumentError for a protected name that no group has."""
        check_protected(self.protect, {m.fqn for g in facts.groups for m in g.members} | set(facts.program.names()))

    # how many -------------------------------------------------------------------------------------------------------

    def at(self, streams: Streams, scores: Scores, ratio: float) -> list[int]:
        """Units of each bundle that are kept when ``ratio`` of the channels goes."""
        slots = streams.slots
        if self.allocation == "uniform":
            wanted = [b.units * (1 - ratio) for b in slots.bundles]
        else:
            wanted = self._best(streams, scores, ratio)
        units = [
            self._rounded(slots, k, count) if k in streams.free else slots.bundles[k].units
            for k, count in enumerate(wanted)
        ]
        if self.allocation == "uniform":
            return streams.met(units, 1 - ratio, lambda k: self._allowed(slots, k))
        return units

    def _step(self, slots: RemovalUnits, bundle: Bundle) -> int:
        outer = any(other.parent == g for other in slots.facts.groups for g in bundle.groups)
        return 1 if outer or bundle.units < self.round_to else self.round_to

    def _rounded(self, slots: RemovalUnits, index: int, count: float) -> int:
        bundle, least = slots.bundles[index], slots.least[index]
        step = self._step(slots, bundle)
        return min(bundle.units, max(step, least, int(np.floor(count / step + 0.5)) * step))

    def _allowed(self, slots: RemovalUnits, index: int) -> list[int]:
        return sorted({self._rounded(slots, index, count) for count in range(1, slots.bundles[index].units + 1)})

    def _best(self, streams: Streams, scores: Scores, ratio: float) -> list[float]:
        """Lowest scores first, over all bundles, until ``ratio`` of the channels that may go are gone."""
        slots, free = streams.slots, sorted(streams.free)
        facts = slots.facts
        if not free:
            return [float(bundle.units) for bundle in slots.bundles]
        removable = [slots.bundles[k].units - slots.least[k] for k in free]
        parts = [_unit_scores(facts, slots.bundles[k], scores)[:count] for k, count in zip(free, removable)]
        if self.allocation == "isomorphic":
            bundles = [slots.bundles[k] for k in free]
            parts = quantiles(facts, bundles, parts, [_channels(facts, bundle) for bundle in bundles])
        owner = np.repeat(free, removable)
        order = owner[np.argsort(np.concatenate(parts), kind="stable")]
        if streams.products:
            return _until(streams, order, ratio)
        weight = np.array([_channels(facts, slots.bundles[k]) for k in order], float)
        whole = sum(_channels(facts, slots.bundles[k]) * slots.bundles[k].units for k in free)
        gone = order[np.cumsum(weight) <= ratio * whole + 1e-9]
        removed = np.bincount(gone, minlength=len(slots.bundles))
        return [float(bundle.units - count) for bundle, count in zip(slots.bundles, removed)]


def _until(streams: Streams, order: NDArray[np.int64], ratio: float) -> list[float]:
    """One unit after the other until ``ratio`` of the features are gone; a unit takes all that it is a factor of."""
    units = [float(bundle.units) for bundle in streams.slots.bundles]
    features: dict[int, list[tuple[int, ...]]] = {}
    for bundles in streams.counts:
        for k in bundles:
            features.setdefault(k, []).append(bundles)
    count = lambda k: sum(streams.counts[b] * streams.left(b, units) for b in features.get(k, ()))  # noqa: E731
    left = ratio * sum(streams.counts.values()) + 1e-9
    for k in order.tolist():
        before = count(k)
        units[k] -= 1
        left -= before - count(k)
        if left < 0:
            units[k] += 1
            break
    return units


def _channels(facts: Symmetry, bundle: Bundle) -> int:
    """Channels of one unit, in all its blocks."""
    return sum(share * facts.groups[g].outer for g, share in zip(bundle.groups, bundle.share))


def _unit_scores(facts: Symmetry, bundle: Bundle, scores: Scores) -> NDArray[np.float64]:
    """Ascending scores of a bundle's units: of each group the channels that would go next."""
    total = np.zeros(bundle.units)
    for index in bundle.groups:
        rows = np.sort(np.atleast_2d(scores[index]), axis=1).mean(axis=0)  # next channel of every block
        total += rows[(np.arange(bundle.units) * len(rows)) // bundle.units]
    return total / len(bundle.groups)


def by_mean(scores: Scores) -> dict[int, NDArray[np.float64]]:
    """Scores of each group divided by their mean, so that groups can be compared."""
    return {g: s / s.mean() if s.mean() > 0 else s for g, s in scores.items()}


def within(budget: float, cost: Callable[[list[int]], float], at: Callable[[float], list[int]]) -> list[int]:
    """Units at the smallest ratio whose cost is no more than ``budget``; those of the largest ratio if none is."""
    known: dict[tuple[int, ...], float] = {}

    def affordable(ratio: float) -> bool:
        units = tuple(at(ratio))
        if units not in known:
            known[units] = cost(list(units))
        return known[units] <= budget

    low, high = 0.0, 1.0
    if affordable(low):
        return at(low)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if affordable(middle) else (middle, high)
    return at(high)


def strongest(facts: Symmetry, scores: Scores, sizes: Mapping[int, int]) -> dict[int, Index]:
    """The channels with the highest scores, in their old order; for groups inside blocks those of each kept block."""
    kept: dict[int, Index] = {}
    for group in sorted(facts.groups, key=lambda group: group.parent is not None):
        count, own = sizes[group.index], np.asarray(scores[group.index])
        if group.parent is None:
            kept[group.index] = _top(own, count)
        else:
            kept[group.index] = np.stack([_top(own[block], count) for block in kept[group.parent].tolist()])
    return kept


def _top(scores: NDArray[np.float64], count: int) -> Index:
    """Indices of the ``count`` highest scores, ascending; ties go to the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
