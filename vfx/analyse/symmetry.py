"""Symmetry groups: the free leaves left by inference, with every parameter axis they move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, fx

from vfx.analyse import drawing, elements, listing, transform
from vfx.analyse.axes import Leaves
from vfx.analyse.blocks import parents
from vfx.analyse.classes import Maps
from vfx.analyse.elements import Index, Permutations
from vfx.analyse.infer import BATCH, Inference
from vfx.analyse.kinds import Class, Classes, Side, classes
from vfx.analyse.places import find, places
from vfx.analyse.rotary import rotations
from vfx.analyse.rows import distinct, unique_rows
from vfx.analyse.shapes import Digit, Shape
from vfx.analyse.store import Pin, Rows, Store
from vfx.analyse.transform import Element, Elements
from vfx.garbage import collection_paused
from vfx.program import Program, Weights


@dataclass(frozen=True, eq=False)
class Member:
    """One parameter axis that a group moves.

    ``position`` has shape (size, copies): the indices along ``dim`` at which each channel of the group stands. ``role``
    is ``out`` (produces the feature, adds to it), ``in`` (consumes it), ``elementwise`` (scales it, or belongs to a
    norm) or ``tied`` (both produces and consumes it, as tied embeddings do).
    """

    fqn: str
    dim: int
    role: str
    position: Index


@dataclass(frozen=True, eq=False)
class Group:
    """A free symmetric group: ``size`` channels that may be permuted together wherever its members stand.

    With a ``parent`` (a group's index) they may be permuted differently in each of its channels, e.g. in each attention
    head: ``blocks`` is (outer, inner), the number of such blocks and their size; (1, size) without a parent.
    ``kind`` is the largest class of maps that its channels may go through, permutations being the least.
    """

    index: int
    size: int
    members: tuple[Member, ...]
    parent: int | None = None
    outer: int = 1
    _owner: list[Symmetry] = field(default_factory=list, repr=False)

    @property
    def kind(self) -> Maps:
        """The class of maps that may stand on every side of the group; see ``vfx.analyse.classes``."""
        return self._class.kind

    @property
    def reason(self) -> str:
        """The operator (and its node) that lowered the class to ``kind``; empty where nothing did."""
        return self._class.reason

    @property
    def sides(self) -> tuple[Side, ...]:
        """What carries one map each: sides apart share the permutation, not their scales."""
        return self._class.sides

    @property
    def _class(self) -> Class:
        if not self._owner:
            return Class(Maps.PERMUTATION, "", (), None, {})
        return self._owner[0].classes[self.index]

    @property
    def blocks(self) -> tuple[int, int]:
        return self.outer, self.size

    @property
    def name(self) -> str:
        """FQN of the first parameter that produces the feature."""
        return next((m.fqn for m in self.members if m.role == "out"), self.members[0].fqn)


@dataclass(frozen=True)
class Pinned:
    """A parameter axis (or ``count`` positions of it) that cannot move, with the rule's reason and its node."""

    fqn: str
    dim: int
    count: int
    reason: str
    node: str


@dataclass(frozen=True, eq=False)
class Symmetry:
    """Symmetries of a Program: ``groups`` with their classes, ``pinned`` axes and ``unknown_ops``."""

    program: Program
    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]
    unknown_ops: Mapping[str, tuple[str, ...]]
    _labels: Mapping[tuple[str, int], Rows] = field(repr=False)
    _inference: Inference = field(repr=False)
    _group_of_leaf: Mapping[int, int] = field(repr=False)

    @property
    def channels(self) -> int:
        """Sum of the groups' sizes."""
        return sum(group.size for group in self.groups)

    @cached_property
    def classes(self) -> Classes:
        """The class of each group by index, worked out when it is first asked for; see ``vfx.analyse.classes``."""
        return classes(self)

    @cached_property
    def rotations(self) -> tuple[Group, ...]:
        """Planes of queries and keys that rotary embeddings leave free: indexed behind the groups, never permuted.

        See ``vfx.analyse.rotary``.
        """
        return tuple(group for group, _ in self._rotations)

    @cached_property
    def _rotations(self) -> list[tuple[Group, Class]]:
        return rotations(self)

    @property
    def moving(self) -> tuple[Group, ...]:
        """The groups and the rotations: whatever an element of the full classes moves, in the order of the indices."""
        return (*self.groups, *self.rotations)

    def group(self, index: int) -> Group:
        """The group or rotation of an index."""
        return self.groups[index] if index < len(self.groups) else self.rotations[index - len(self.groups)]

    def verify(self, seed: int = 0, without: tuple[Member, ...] = (), classes: str = "full") -> float:
        """Largest relative output error in float64 over random elements; see ``vfx.analyse.verify``.

        ``classes`` is ``"full"`` (each group's whole class) or ``"permutation"``.
        """
        from vfx.analyse.verify import verify

        return verify(self, seed=seed, without=without, classes=classes)

    def to_networkx(self) -> nx.MultiGraph:
        """The tie graph: groups, weights, an edge for each member; see ``vfx.analyse.drawing``."""
        return drawing.to_networkx(self)

    def draw(self, path: str | Path) -> Path:
        """Write a picture of the tie graph (.png, .svg or .pdf)."""
        return drawing.draw(self, path)

    # the action ---------------------------------------------------------------------------------------------------

    def random(self, generator: np.random.Generator) -> dict[int, Index]:
        """A random group element that moves every group, in each of its blocks."""
        return elements.draw(self.groups, generator)

    def random_maps(self, generator: np.random.Generator, classes: str = "full") -> dict[int, Element]:
        """A random element of every group's full class (or its permutations): matrices, scales and signs."""
        return transform.random(self, generator, classes)

    def transform(self, weights: Weights, chosen: Elements, without: tuple[Member, ...] = ()) -> dict[str, Tensor]:
        """The weight set moved by elements of the groups' classes; see ``vfx.analyse.transform``.

        Raises ArgumentError for a map that is not in its group's class.
        """
        return transform.apply(self, weights, chosen, without)

    def identity(self) -> dict[int, Index]:
        """The group element that moves nothing."""
        return elements.identity(self.groups)

    def inverse(self, element: Permutations) -> dict[int, Index]:
        """The group element that undoes another."""
        return elements.inverse(self.groups, element)

    def compose(self, first: Permutations, then: Permutations) -> dict[int, Index]:
        """The group element that does ``first``, and ``then`` to its result."""
        return elements.compose(self.groups, first, then)

    def permute(
        self, weights: Weights, permutations: Permutations, without: tuple[Member, ...] = ()
    ) -> dict[str, Tensor]:
        """The weight set moved by a group element; tensors that do not move are shared."""
        skipped = [(m.fqn, m.dim, group.index) for group in self.groups for m in group.members if m in without]
        axes: dict[str, dict[int, tuple[Rows, Permutations]]] = {}
        for (fqn, dim), labels in self._labels.items():
            if fqn in weights and labels.shape[1] > 1:
                left = {group for *axis, group in skipped if axis == [fqn, dim]}
                chosen = {group: p for group, p in permutations.items() if group not in left} if left else permutations
                axes.setdefault(fqn, {})[dim] = labels, chosen
        return dict(weights) | {fqn: self._moved(weights[fqn], own) for fqn, own in axes.items()}

    def _moved(self, tensor: Tensor, axes: dict[int, tuple[Rows, Permutations]]) -> Tensor:
        """A tensor whose axes are permuted; where the blocks stand on another axis, block by block."""
        found = {dim: self._parent_apart(labels, chosen) for dim, (labels, chosen) in axes.items()}
        apart = {dim: parent for dim, parent in found.items() if parent is not None}
        for dim, (labels, chosen) in axes.items():
            if dim not in apart:
                index = self._gather(labels, chosen)
                if index is not None:
                    tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        for dim, parent in apart.items():
            tensor = self._moved_in_blocks(tensor, dim, *axes[dim], self._blocks_on(axes, dim, parent))
        return tensor

    def _parent_apart(self, labels: Rows, permutations: Permutations) -> int | None:
        """The parent of a group on this axis whose channels stand on another axis of the tensor."""
        here = {group for _, group, _ in self._digits(labels)}
        outside = {
            self.groups[g].parent for g in here if (p := permutations.get(g)) is not None and p.ndim == 2
        } - here  # fmt: skip
        assert len(outside) <= 1, "blocks of two groups on one axis"
        return next(iter(outside), None)

    def _blocks_on(self, axes: dict[int, tuple[Rows, Permutations]], dim: int, parent: int) -> tuple[int, Index]:
        """The axis on which the parent stands, and the block of each position there."""
        for other, (labels, _) in axes.items():
            for leaf, group, mask in self._digits(labels) if other != dim else ():
                if group == parent:
                    return other, self._channels(labels, leaf, mask)
        raise AssertionError(f"group {parent} stands on no other axis")

    def _moved_in_blocks(
        self, tensor: Tensor, dim: int, labels: Rows, permutations: Permutations, blocks: tuple[int, Index]
    ) -> Tensor:
        other, block = blocks
        result = tensor.clone()
        for value in np.unique(block).tolist():
            where = torch.from_numpy(np.flatnonzero(block == value)).to(tensor.device)
            index = self._gather(labels, permutations, value)
            if index is not None:
                part = tensor.index_select(other, where).index_select(dim, torch.from_numpy(index).to(tensor.device))
                result.index_copy_(other, where, part)
        return result

    def blocks_of(self, group: Group, member: Member) -> Index | tuple[int, Index]:
        """The block of each copy of an inner group along a member's axis (0 without a parent).

        Where its parent stands on another axis of the tensor: that axis, and the block of each position there.
        """
        copies = member.position[0]
        if group.parent is None:
            return np.zeros(len(copies), np.int64)
        for dim, labels in sorted(self.axes_of(member.fqn), key=lambda own: own[0] != member.dim):
            for leaf, index, mask in self._digits(labels):
                if index == group.parent:
                    channels = self._channels(labels, leaf, mask)
                    return channels[copies] if dim == member.dim else (dim, channels)
        raise AssertionError(f"group {group.parent} does not stand on {member.fqn}")

    def gather(self, node: fx.Node, dim: int, permutations: Permutations) -> Index:
        """Old position of each new position along one axis of an activation."""
        labels = self.labels(node, dim)
        size = node.meta["val"].sizes(BATCH)[dim]
        index = self._gather(labels, permutations) if labels is not None else None
        return np.arange(size) if index is None else index

    def _gather(self, labels: Rows, permutations: Permutations, block: int | None = None) -> Index | None:
        """new[p] = old[gather[p]]: the label of position p with every digit sent to its old channel.

        ``block`` is the parent's channel where that stands on another axis.
        """
        old = labels.copy()
        digits = self._digits(labels)
        for leaf, group, mask in digits:
            permutation = permutations.get(group)
            if permutation is None:
                continue
            start = self._leaves.starts[leaf]
            channel = labels[:, 1:][mask] - start
            if permutation.ndim == 2:
                parent = self.groups[group].parent
                own = next(((x, m) for x, g, m in digits if g == parent), None)
                outer = block if own is None else self._channels(labels, *own)[np.nonzero(mask)[0]]
                channel = permutation[outer, channel]
            else:
                channel = permutation[channel]
            old[:, 1:][mask] = start + channel
        if (old == labels).all():
            return None
        return find(labels, old)

    def _channels(self, labels: Rows, leaf: int, mask: NDArray[np.bool_]) -> Index:
        """The channel of one leaf at each position."""
        return np.where(mask, labels[:, 1:], 0).sum(axis=1) - self._leaves.starts[leaf]

    def _digits(self, labels: Rows) -> list[tuple[int, int, NDArray[np.bool_]]]:
        leaves = self._leaves.leaf_of(labels[:, 1:])
        return [(x, self._group_of_leaf[x], leaves == x) for x in distinct(leaves) if x in self._group_of_leaf]

    def axes_of(self, fqn: str) -> list[tuple[int, Rows]]:
        """The axes of a parameter, each with the labels along it."""
        return [(dim, labels) for (name, dim), labels in self._labels.items() if name == fqn]

    @property
    def _leaves(self) -> Leaves:
        return self._inference.leaves

    # activations --------------------------------------------------------------------------------------------------

    def labels(self, node: fx.Node, dim: int) -> Rows | None:
        """Resolved labels along an activation's axis; None where the axis is pinned or shared with others."""
        shape = self._inference.shapes.get(node)
        if shape is None:
            shape = self._by_name.get(node.name)
        if not isinstance(shape, Shape):
            return None
        entry = shape.axes[dim]
        if isinstance(entry, Digit):
            return None
        if all(not isinstance(f, np.ndarray) for f in entry.factors):
            return None
        rows = self._inference.rows(entry)
        return None if rows is None else self._leaves.resolve(rows)

    @cached_property
    def _by_name(self) -> dict[str, Any]:
        """Shapes by node name: copies of the graph keep the names."""
        return {node.name: shape for node, shape in self._inference.shapes.items()}

    def positions(self, node: fx.Node, dim: int) -> dict[int, Index]:
        """Group index -> positions (size, copies) of its channels along an activation's axis."""
        labels = self.labels(node, dim)
        if labels is None:
            return {}
        tables = self._leaves.once(places, labels)
        known = ((self._group_of_leaf[leaf], table) for leaf, table in tables.items() if leaf in self._group_of_leaf)
        return {group: table for group, table in known if table is not None}

    def features(self, labels: Rows) -> list[tuple[tuple[int, ...], Index, Index]]:
        """Moving positions of an axis by the groups that move them: groups, digits (n, groups), position (n, copies).

        Positions whose labels differ in the tag alone are copies of one feature.
        """
        leaves = self._leaves.leaf_of(labels[:, 1:])
        signatures, inverse = unique_rows(leaves)
        found = []
        for index, signature in enumerate(signatures):
            own = [int(leaf) for leaf in signature if leaf >= 0]
            if not own or any(leaf not in self._group_of_leaf for leaf in own):
                continue
            where = np.flatnonzero(inverse == index)
            elements = labels[where][:, 1 : 1 + len(own)]
            digits, feature = unique_rows(elements)
            order = np.argsort(feature, kind="stable")
            groups = tuple(self._group_of_leaf[leaf] for leaf in own)
            starts = np.array([self._leaves.starts[leaf] for leaf in own])
            found.append((groups, digits - starts, where[order].reshape(len(digits), -1)))
        return found

    # reports ------------------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """Groups with their classes and members, for a terminal."""
        return listing.groups_table(self)

    def __str__(self) -> str:
        return listing.listing(self)


def symmetry(program: Program) -> Symmetry:
    """Infer the symmetries of a Program."""
    with collection_paused():
        return _groups(program, Inference(program))


def _groups(program: Program, inference: Inference) -> Symmetry:
    """The free leaves that a finished inference left."""
    leaves = inference.leaves
    labels: dict[tuple[str, int], Rows] = {}
    for fqn, axes in inference.parameters.items():
        for dim, axis in enumerate(axes):
            rows = inference.rows(axis)
            assert rows is not None
            labels[fqn, dim] = leaves.resolve(rows)
    inference.settled = True
    roles = _roles(inference)
    members: dict[int, list[Member]] = {}
    for (fqn, dim), rows in labels.items():
        for leaf, position in leaves.once(places, rows).items():
            assert position is not None, f"labels of {fqn}[{dim}] are not closed under their group"
            role = roles.get((fqn, dim, leaf), "out")
            members.setdefault(leaf, []).append(Member(fqn, dim, role, position))
    index_of = {leaf: index for index, leaf in enumerate(members)}
    outer = parents(inference, members)
    owner: list[Symmetry] = []
    groups = tuple(
        _group(leaf, tuple(found), leaves, index_of, outer.get(leaf), owner) for leaf, found in members.items()
    )
    result = Symmetry(
        program=program,
        groups=groups,
        pinned=_pinned(inference, labels),
        unknown_ops={name: tuple(nodes) for name, nodes in inference.unknown.items()},
        _labels=labels,
        _inference=inference,
        _group_of_leaf=index_of,
    )
    owner.append(result)
    return result


def _group(
    leaf: int,
    members: tuple[Member, ...],
    leaves: Leaves,
    index_of: Mapping[int, int],
    outer: int | None,
    owner: list[Symmetry],
) -> Group:
    if outer is None:
        return Group(index_of[leaf], leaves.sizes[leaf], members, _owner=owner)
    return Group(index_of[leaf], leaves.sizes[leaf], members, index_of[outer], leaves.sizes[outer], owner)


_CONFLICTS = ({"out", "in"}, {"tied", "in"}, {"tied", "out"})


def _roles(inference: Inference) -> dict[tuple[str, int, int], str]:
    """(FQN, dim, leaf) -> role; a factor's own note wins over the whole axis's."""
    roles: dict[tuple[str, int, int], str] = {}
    for fqn, dim, axis, role in inference.roles:
        rows = inference.rows(axis)
        if rows is None:
            continue
        for leaf in inference.leaves.free_leaves(inference.leaves.resolve(rows)):
            before = roles.setdefault((fqn, dim, leaf), role)
            if before != role:
                roles[fqn, dim, leaf] = "tied" if {before, role} in _CONFLICTS else role
    return roles


ALONE = "no other channel is used alike"


def _pinned(inference: Inference, labels: Mapping[tuple[str, int], Rows]) -> tuple[Pinned, ...]:
    """Pinned parameter axes; a channel that is free but alone is named by its parameter."""
    own = {str(node.target): node.name for node in inference.shapes if node.op == "get_attr"}
    return tuple(
        Pinned(fqn, dim, count, pin.reason if pin else ALONE, pin.node if pin else own[fqn])
        for (fqn, dim), rows in labels.items()
        for pin, count in inference.leaves.once(_pins, rows)
        if pin or rows.shape[0] > 1
    )


def _pins(leaves: Store, rows: Rows) -> list[tuple[Pin | None, int]]:
    """Why positions of an axis cannot move, with how many they are; None for those that nothing holds."""
    if leaves.is_leaf(rows):
        return []
    stuck = rows[(rows[:, 1:] < 0).all(axis=1), 0]
    return list(Counter(leaves.pin_of(tag) for tag in stuck.tolist()).items())
