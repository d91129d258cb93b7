"""Weights and activations of one edge carried to the channels of the first, whose groups may be of other sizes.

Each group has, for each of the first edge's channels, the nearest channel of the other edge, and where a linear map can
go through it (``vfx.match.maps.mappable``) a coupling Π (C₀, Cᵢ) with uniform marginals. A layer that makes the feature
becomes T W with T = C₀ Π, whose rows sum to 1: each channel of the result is a mean of the other edge's channels. One
that reads it becomes W U with U = Cᵢ Πᵀ, whose rows sum to 1 as well: each old channel is read back as a mean of those
it went to. (OT fusion scales both by C₀; where the widths differ its signals then shrink or grow by Cᵢ/C₀ from layer to
layer.) Without a coupling the nearest channels alone count: T selects, and U reads a channel that was selected k times
as the mean of its copies. What acts channel by channel (depthwise kernels, norms' gains) is the nearest channel's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.store import Rows
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element
from vfx.elements.axes import acted
from vfx.errors import ArchitectureError
from vfx.match.matcher import Gain
from vfx.program import Weights
from vfx.statistics.moments import CrossMoments
from vfx.statistics.taps import Tap

Reading = tuple[Tap, Tap, CrossMoments]  # a tap in the first edge and in the other, and the moments of both


@dataclass(frozen=True, eq=False)
class Crossing:
    """An edge to be carried to the first one's shapes: both weight sets, and what is known of their features.

    ``edge`` is its number among the networks that ``readings`` hold.
    """

    pairing: Pairing
    edge: int
    first: Weights
    other: Weights
    readings: Sequence[Reading] = ()
    seed: int = 0


class Carriage(Protocol):
    """What carries an edge to the first one's shapes."""

    def weights(self, first: Weights, other: Weights) -> dict[str, Tensor]:
        """The whole weight set. Raises ArchitectureError where an axis that cannot move differs in size."""

    def matrix(self, node: fx.Node, other: fx.Node, dim: int) -> Tensor | None:
        """(size₀, sizeᵢ): what brings an activation's axis to the first edge's; None where nothing moves there."""


@runtime_checkable
class AcrossWidths(Protocol):
    """A Matcher that can also carry edges of other widths to the first.

    ``needs`` is a Matcher's; ``through_norms`` says whether the maps it finds may go through BatchNorms (else those are
    folded first).
    """

    needs: frozenset[str]
    through_norms: bool

    def carry(self, crossing: Crossing) -> tuple[Carriage, float]:
        """What carries the edge, and the matching's objective: the larger the better."""


class Pairing:
    """The groups of two networks of one architecture: ``twin[g]`` is the other one's group that stands where g does.

    Raises ArchitectureError where the two do not correspond.
    """

    def __init__(self, one: Symmetry, other: Symmetry, name: str = "the other edge"):
        self.one, self.other, self.name = one, other, name
        self.twin = dict(zip(range(len(one.groups)), range(len(other.groups)))) if one is other else self._twins()
        self.roles = {(m.fqn, m.dim, g.index): m.role for g in one.groups for m in g.members}

    def _twins(self) -> dict[int, int]:
        places: dict[tuple[object, ...], list[int]] = {}
        for group in self.other.groups:
            places.setdefault(_place(group), []).append(group.index)
        twin_of = {}
        for group in self.one.groups:
            candidates = places.get(_place(group))
            if not candidates:
                raise ArchitectureError(
                    f"the {group.size} channels of {group.name!r} stand elsewhere in {self.name}; edges may differ in "
                    "the numbers of their channels alone"
                )
            twin_of[group.index] = candidates.pop(0)
        left = next((index for indices in places.values() for index in indices), None)
        if left is not None:
            raise ArchitectureError(f"{self.name} has channels, {self.other.groups[left].name!r}, that edge 0 lacks")
        return twin_of

    def entries(
        self, one: Rows, other: Rows
    ) -> Iterator[tuple[tuple[int, ...], tuple[Index, Index], tuple[Index, Index]]]:
        """Moving positions of an axis in both networks: groups (of the first), digits and positions of each."""
        theirs = {frozenset(groups): (groups, digits, at) for groups, digits, at in self.other.features(other)}
        for groups, digits, position in self.one.features(one):
            twins = [self.twin[g] for g in groups]
            entry = theirs.get(frozenset(twins))
            if entry is None or entry[2].shape[1] != position.shape[1]:
                raise ArchitectureError(
                    f"channels of {self.one.groups[groups[0]].name!r} do not stand in {self.name} as they do in edge 0"
                )
            their_groups, other_digits, other_position = entry
            yield groups, (digits, other_digits[:, [their_groups.index(t) for t in twins]]), (position, other_position)


def _place(group: Group) -> tuple[object, ...]:
    return (group.parent is None, *sorted((m.fqn, m.dim, m.role) for m in group.members))


class Carrier:
    """Carries weights of the other network to the first one's shapes.

    ``found`` holds an element by group, whose maps lead from the other network's channels to the first's; a matching
    fills it.
    """

    def __init__(self, pairing: Pairing):
        self.pairing = pairing
        self.found: dict[int, Element] = {}

    def weights(self, first: Weights, other: Weights) -> dict[str, Tensor]:
        """A whole weight set. Raises ArchitectureError where an axis that cannot move differs in size."""
        return fitted(self.pairing, first, other, {n: self.tensor(n, other[n]) for n in first if n in other})

    def tensor(self, fqn: str, tensor: Tensor, without: Collection[int] = ()) -> Tensor:
        """A parameter, all of its axes carried but those ``without``."""
        theirs = dict(self.pairing.other.axes_of(fqn))
        axes = {dim: CarriedAxis(self, ours, theirs[dim], fqn) for dim, ours in self.pairing.one.axes_of(fqn)}
        return acted(tensor, {dim: axis for dim, axis in axes.items() if dim not in without}, axes)

    def comparable(self, fqn: str, first: Tensor, other: Tensor, free: int) -> tuple[Tensor, Tensor]:
        """A parameter of both edges whose axes agree but the axis ``free``.

        Channels whose blocks stand on the free axis have no order yet: they are sorted by value.
        """
        axes = self.pairing.one.axes_of(fqn)
        unordered = [
            dim for dim, rows in axes if dim != free and CarriedAxis(self, rows, rows).parent_apart is not None
        ]
        other = self.tensor(fqn, other, (free, *unordered))
        for dim in unordered:
            first, other = first.sort(dim).values, other.sort(dim).values
        return first, other

    def matrix(self, node: fx.Node, other: fx.Node, dim: int) -> Tensor | None:
        """(size₀, sizeᵢ): what brings an activation's axis to the first edge's; None where nothing moves there."""
        labels = self.pairing.one.labels(node, dim), self.pairing.other.labels(other, dim)
        if labels[0] is None or labels[1] is None:
            return None
        eye = torch.eye(len(labels[1]), dtype=torch.float64)
        return CarriedAxis(self, labels[0], labels[1]).apply(eye, 0)

    def between(self, one: Tap, other: Tap) -> Gain:
        """(n₀, nᵢ): what brings the features of a tap to those of its twin in the first edge."""
        columns = [other.groups.index(self.pairing.twin[g]) for g in one.groups]
        return self.between_features(one.groups, (one.digits, other.digits[:, columns]))

    def settled(self, fqn: str, without: int) -> bool:
        """Whether all groups on a parameter's axes but one have been found already."""
        axes = [rows for dim, rows in self.pairing.one.axes_of(fqn) if dim != without]
        return all(g in self.found for rows in axes for groups, _, _ in self.pairing.one.features(rows) for g in groups)

    def between_features(
        self,
        groups: tuple[int, ...],
        digits: tuple[Index, Index],
        place: tuple[str, int] | None = None,
        block: int | None = None,
    ) -> Gain:
        """(n₀, nᵢ) between features: the product of their groups' maps, as a parameter axis carries them.

        ``block`` is the first edge's block where the parent stands on another axis.
        """
        total = np.ones((len(digits[0]), len(digits[1])))
        for column, index in enumerate(groups):
            role = "out" if place is None else self.pairing.roles.get((*place, index), "elementwise")
            table = self.found[index].table(role, self.pairing.other.groups[self.pairing.twin[index]].size)
            rows, columns = digits[0][:, column], digits[1][:, column]
            if table.ndim == 2:
                total *= table[rows][:, columns]
                continue
            parent = self.pairing.one.groups[index].parent
            at = digits[0][:, groups.index(parent)] if block is None else np.full(len(rows), block)  # type: ignore[arg-type]
            total *= table[at[:, None], rows[:, None], columns[None]]
        return total


@dataclass(frozen=True, eq=False)
class CarriedAxis:
    """One axis, with the labels of both networks, carried from the other to the first; ``fqn`` of a parameter."""

    carrier: Carrier
    ours: Rows
    theirs: Rows
    fqn: str | None = None

    @property
    def parent_apart(self) -> int | None:
        facts = self.carrier.pairing.one
        for groups, _, _ in facts.features(self.ours):
            for index in groups:
                parent = facts.groups[index].parent
                if parent is not None and parent not in groups:
                    return parent
        return None

    def blocks(self, parent: int) -> Index | None:
        for groups, digits, position in self.carrier.pairing.one.features(self.ours):
            if parent in groups:
                block_of = np.zeros(len(self.ours), np.int64)
                block_of[position] = digits[:, groups.index(parent)][:, None]
                return block_of
        return None

    def apply(self, tensor: Tensor, dim: int, block: int | None = None) -> Tensor:
        pairing = self.carrier.pairing
        entries = list(pairing.entries(self.ours, self.theirs))
        if not entries:
            return tensor
        moving = [np.concatenate([at[side].reshape(-1) for _, _, at in entries]) for side in (0, 1)]
        still = [np.setdiff1d(np.arange(len(rows)), places) for rows, places in zip((self.ours, self.theirs), moving)]
        if len(still[0]) != len(still[1]):
            raise ArchitectureError(
                f"axis {dim} of {self.fqn or 'a value'} has {len(still[1])} fixed positions in {pairing.name} and "
                f"{len(still[0])} in edge 0"
            )
        shape = list(tensor.shape)
        shape[dim] = len(self.ours)
        result = tensor.new_empty(shape)
        result.index_copy_(dim, _index(still[0], tensor), tensor.index_select(dim, _index(still[1], tensor)))
        place = None if self.fqn is None else (self.fqn, dim)
        for groups, digits, position in entries:
            matrix = torch.from_numpy(self.carrier.between_features(groups, digits, place, block)).to(tensor.device)
            rows = tensor.index_select(dim, _index(position[1].reshape(-1), tensor)).movedim(dim, 0)
            mixed = matrix @ rows.reshape(len(position[1]), -1).double()
            mixed = mixed.reshape(-1, *rows.shape[1:]).movedim(0, dim).to(tensor.dtype)
            result.index_copy_(dim, _index(position[0].reshape(-1), tensor), mixed)
        return result


def fitted(pairing: Pairing, first: Weights, other: Weights, carried: Weights) -> dict[str, Tensor]:
    """The carried tensors, all in the first edge's shapes; what does not move is the first edge's where it differs.

    Raises ArchitectureError where an axis that cannot move differs in size.
    """
    result = {}
    for name, target in first.items():
        moved = carried.get(name, target)
        if moved.shape != target.shape and pairing.one.axes_of(name):
            raise ArchitectureError(
                f"{name!r} has shape {tuple(other[name].shape)} in {pairing.name} and {tuple(target.shape)} "
                "in edge 0, and not all of these axes are free channels; last layers that differ can be kept as heads, "
                "where all else is of one width"
            )
        result[name] = moved if moved.shape == target.shape else target
    return result


def _index(positions: Index, tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(positions)).to(tensor.device)
