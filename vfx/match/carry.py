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

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.store import Rows
from vfx.analyse.symmetry import Symmetry
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


@dataclass(frozen=True, eq=False)
class Carried:
    """How a group's channels come to the first edge's.

    ``nearest`` (C₀,) and ``coupling`` (C₀, Cᵢ); inside blocks (blocks, …), row b for the first edge's block b and for
    the block of the other edge that the parent's ``nearest`` names.
    """

    nearest: Index
    coupling: Gain | None = None
    size: int = 0  # Cᵢ

    def matrix(self, role: str) -> Gain:
        if role == "elementwise" or role == "tied" or (self.coupling is None and role != "in"):
            return self._selection
        if self.coupling is None:
            chosen = self._selection.sum(-2, keepdims=True)
            return self._selection / np.maximum(chosen, 1)
        return self.coupling * self.coupling.shape[-2 if role == "out" else -1]

    @cached_property
    def _selection(self) -> Gain:
        return np.asarray(self.nearest[..., None] == np.arange(self.size), float)


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
        found = {}
        for group in self.one.groups:
            candidates = places.get(_place(group))
            if not candidates:
                raise ArchitectureError(
                    f"the {group.size} channels of {group.name!r} stand elsewhere in {self.name}; edges may differ in "
                    "the numbers of their channels alone"
                )
            found[group.index] = candidates.pop(0)
        left = next((index for indices in places.values() for index in indices), None)
        if left is not None:
            raise ArchitectureError(f"{self.name} has channels, {self.other.groups[left].name!r}, that edge 0 lacks")
        return found

    def entries(
        self, one: Rows, other: Rows
    ) -> Iterator[tuple[tuple[int, ...], tuple[Index, Index], tuple[Index, Index]]]:
        """Moving positions of an axis in both networks: groups (of the first), digits and positions of each."""
        theirs = {frozenset(groups): (groups, digits, at) for groups, digits, at in self.other.features(other)}
        for groups, digits, position in self.one.features(one):
            twins = [self.twin[g] for g in groups]
            found = theirs.get(frozenset(twins))
            if found is None or found[2].shape[1] != position.shape[1]:
                raise ArchitectureError(
                    f"channels of {self.one.groups[groups[0]].name!r} do not stand in {self.name} as they do in edge 0"
                )
            own, other_digits, other_position = found
            yield groups, (digits, other_digits[:, [own.index(t) for t in twins]]), (position, other_position)


def _place(group: Group) -> tuple[object, ...]:
    return (group.parent is None, *sorted((m.fqn, m.dim, m.role) for m in group.members))


class Carrier:
    """Carries weights of the other network to the first one's shapes.

    ``found`` holds a ``Carried`` by group (or what has a ``matrix`` like it); a matching fills it.
    """

    def __init__(self, pairing: Pairing):
        self.pairing = pairing
        self.found: dict[int, Any] = {}

    def weights(self, first: Weights, other: Weights) -> dict[str, Tensor]:
        """A whole weight set. Raises ArchitectureError where an axis that cannot move differs in size."""
        return fitted(self.pairing, first, other, {n: self.tensor(n, other[n]) for n in first if n in other})

    def tensor(self, fqn: str, tensor: Tensor, without: Collection[int] = ()) -> Tensor:
        """A parameter, all of its axes carried but those ``without``."""
        ours, theirs = dict(self.pairing.one.axes_of(fqn)), dict(self.pairing.other.axes_of(fqn))
        apart = {}
        for dim in ours:
            if dim in without:
                continue
            parent = self._parent_apart(ours[dim])
            if parent is not None:
                apart[dim] = parent
            else:
                tensor = self._axis(tensor, dim, fqn, ours[dim], theirs[dim])
        for dim, parent in apart.items():
            tensor = self._in_blocks(tensor, dim, fqn, parent, ours, theirs)
        return tensor

    def comparable(self, fqn: str, first: Tensor, other: Tensor, free: int) -> tuple[Tensor, Tensor]:
        """A parameter of both edges whose axes agree but the axis ``free``.

        Channels whose blocks stand on the free axis have no order yet: they are sorted by value.
        """
        axes = self.pairing.one.axes_of(fqn)
        unordered = [dim for dim, rows in axes if dim != free and self._parent_apart(rows) is not None]
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
        return self._axis(eye, 0, None, labels[0], labels[1])

    def between(self, one: Tap, other: Tap) -> Gain:
        """(n₀, nᵢ): what brings the features of a tap to those of its twin in the first edge."""
        columns = [other.groups.index(self.pairing.twin[g]) for g in one.groups]
        return self._matrix(one.groups, (one.digits, other.digits[:, columns]), None, one.dim, None)

    def settled(self, fqn: str, without: int) -> bool:
        """Whether all groups on a parameter's axes but one have been found already."""
        axes = [rows for dim, rows in self.pairing.one.axes_of(fqn) if dim != without]
        return all(g in self.found for rows in axes for groups, _, _ in self.pairing.one.features(rows) for g in groups)

    def _axis(
        self, tensor: Tensor, dim: int, fqn: str | None, ours: Rows, theirs: Rows, block: int | None = None
    ) -> Tensor:
        """One axis carried; ``block`` is the first edge's block where the parent stands on another axis."""
        entries = list(self.pairing.entries(ours, theirs))
        if not entries:
            return tensor
        moving = [np.concatenate([at[side].reshape(-1) for _, _, at in entries]) for side in (0, 1)]
        still = [np.setdiff1d(np.arange(len(rows)), own) for rows, own in zip((ours, theirs), moving)]
        if len(still[0]) != len(still[1]):
            raise ArchitectureError(
                f"axis {dim} of {fqn or 'a value'} has {len(still[1])} fixed positions in {self.pairing.name} and "
                f"{len(still[0])} in edge 0"
            )
        shape = list(tensor.shape)
        shape[dim] = len(ours)
        result = tensor.new_empty(shape)
        result.index_copy_(dim, _index(still[0], tensor), tensor.index_select(dim, _index(still[1], tensor)))
        for groups, digits, position in entries:
            matrix = torch.from_numpy(self._matrix(groups, digits, fqn, dim, block)).to(tensor.device)
            rows = tensor.index_select(dim, _index(position[1].reshape(-1), tensor)).movedim(dim, 0)
            mixed = matrix @ rows.reshape(len(position[1]), -1).double()
            mixed = mixed.reshape(-1, *rows.shape[1:]).movedim(0, dim).to(tensor.dtype)
            result.index_copy_(dim, _index(position[0].reshape(-1), tensor), mixed)
        return result

    def _matrix(
        self, groups: tuple[int, ...], digits: tuple[Index, Index], fqn: str | None, dim: int, block: int | None
    ) -> Gain:
        """(n₀, nᵢ) between features: the product of their groups' maps."""
        total = np.ones((len(digits[0]), len(digits[1])))
        for column, index in enumerate(groups):
            role = "out" if fqn is None else self.pairing.roles.get((fqn, dim, index), "elementwise")
            own = self.found[index].matrix(role)
            one, other = digits[0][:, column], digits[1][:, column]
            if own.ndim == 2:
                total *= own[one][:, other]
                continue
            parent = self.pairing.one.groups[index].parent
            at = digits[0][:, groups.index(parent)] if block is None else np.full(len(one), block)  # type: ignore[arg-type]
            total *= own[at[:, None], one[:, None], other[None]]
        return total

    # blocks on another axis -------------------------------------------------------------------------------------------

    def _parent_apart(self, rows: Rows) -> int | None:
        """The parent of a group on this axis that stands on another one."""
        facts = self.pairing.one
        for groups, _, _ in facts.features(rows):
            for index in groups:
                parent = facts.groups[index].parent
                if parent is not None and parent not in groups:
                    return parent
        return None

    def _in_blocks(
        self, tensor: Tensor, dim: int, fqn: str, parent: int, ours: Mapping[int, Rows], theirs: Mapping[int, Rows]
    ) -> Tensor:
        """Block by block of the first edge: the other axis is carried already and says which block is where."""
        for other, rows in ours.items():
            for groups, digits, position in self.pairing.one.features(rows) if other != dim else ():
                if parent not in groups:
                    continue
                block = digits[:, groups.index(parent)].repeat(position.shape[1])
                parts, places = [], []
                for value in np.unique(block).tolist():
                    where = _index(position.reshape(-1)[block == value], tensor)
                    part = tensor.index_select(other, where)
                    parts.append(self._axis(part, dim, fqn, ours[dim], theirs[dim], value))
                    places.append(where)
                shape = list(tensor.shape)
                shape[dim] = parts[0].shape[dim]
                return tensor.new_empty(shape).index_copy_(other, torch.cat(places), torch.cat(parts, other))
        raise AssertionError(f"group {parent} stands on no other axis of {fqn}")


def fitted(pairing: Pairing, first: Weights, other: Weights, carried: Weights) -> dict[str, Tensor]:
    """The carried tensors, all in the first edge's shapes; what does not move is the first edge's where it differs.

    Raises ArchitectureError where an axis that cannot move differs in size.
    """
    result = {}
    for name, target in first.items():
        own = carried.get(name, target)
        if own.shape != target.shape and pairing.one.axes_of(name):
            raise ArchitectureError(
                f"{name!r} has shape {tuple(other[name].shape)} in {pairing.name} and {tuple(target.shape)} "
                "in edge 0, and not all of these axes are free channels; last layers that differ can be kept as heads, "
                "where all else is of one width"
            )
        result[name] = own if own.shape == target.shape else target
    return result


def _index(positions: Index, tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(positions)).to(tensor.device)
