"""Where the channels of each group stand along the axes of parameters and activations.

A position's label names one element of each leaf that moves it (``vfx.analyse.axes``); a group is a free leaf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from vfx.analyse.axes import Leaves
from vfx.analyse.groups import Group, Member
from vfx.analyse.places import Index, places
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rows import distinct, unique_rows
from vfx.analyse.shapes import Digit, Shape
from vfx.analyse.store import Rows
from vfx.program import Program


@dataclass(frozen=True, eq=False)
class Labelling:
    """The groups of a Program, and the labels of every axis: ``rows`` those of parameters, by FQN and dimension.

    ``terms`` are the axis terms of every value, ``group_of`` the group of each free leaf.
    """

    program: Program
    groups: tuple[Group, ...]
    terms: ProgramTerms = field(repr=False)
    rows: Mapping[tuple[str, int], Rows] = field(repr=False)
    group_of: Mapping[int, int] = field(repr=False)

    @property
    def leaves(self) -> Leaves:
        """The store of leaves that labels name."""
        return self.terms.leaves

    @cached_property
    def leaf_of(self) -> Mapping[int, int]:
        """The leaf of each group."""
        return {group: leaf for leaf, group in self.group_of.items()}

    # parameters -----------------------------------------------------------------------------------------------------

    def axes_of(self, fqn: str) -> list[tuple[int, Rows]]:
        """The axes of a parameter, each with the labels along it."""
        return self._axes.get(fqn, [])

    @cached_property
    def _axes(self) -> dict[str, list[tuple[int, Rows]]]:
        labels_of: dict[str, list[tuple[int, Rows]]] = {}
        for (fqn, dim), labels in self.rows.items():
            labels_of.setdefault(fqn, []).append((dim, labels))
        return labels_of

    def blocks_of(self, group: Group, member: Member) -> Index | tuple[int, Index]:
        """The block of each copy of an inner group along a member's axis (0 without a parent).

        Where its parent stands on another axis of the tensor: that axis, and the block of each position there.
        """
        copies = member.position[0]
        if group.parent is None:
            return np.zeros(len(copies), np.int64)
        for dim, labels in sorted(self.axes_of(member.fqn), key=lambda labelled: labelled[0] != member.dim):
            for leaf, index, mask in self.digits(labels):
                if index == group.parent:
                    channels = self.channels_at(labels, leaf, mask)
                    return channels[copies] if dim == member.dim else (dim, channels)
        raise AssertionError(f"group {group.parent} does not stand on {member.fqn}")

    # activations ----------------------------------------------------------------------------------------------------

    def labels(self, node: fx.Node, dim: int) -> Rows | None:
        """Resolved labels along an activation's axis; None where the axis is pinned or shared with others."""
        shape = self.terms.shapes.get(node)
        if shape is None:
            shape = self._by_name.get(node.name)
        if not isinstance(shape, Shape):
            return None
        entry = shape.axes[dim]
        if isinstance(entry, Digit):
            return None
        if all(not isinstance(f, np.ndarray) for f in entry.factors):
            return None
        rows = self.terms.rows(entry)
        return None if rows is None else self.leaves.resolve(rows)

    @cached_property
    def _by_name(self) -> dict[str, Any]:
        """Shapes by node name: copies of the graph keep the names."""
        return {node.name: shape for node, shape in self.terms.shapes.items()}

    def positions(self, node: fx.Node, dim: int) -> dict[int, Index]:
        """Group index -> positions (size, copies) of its channels along an activation's axis."""
        labels = self.labels(node, dim)
        if labels is None:
            return {}
        tables = self.leaves.once(places, labels)
        tabled = ((self.group_of[leaf], table) for leaf, table in tables.items() if leaf in self.group_of)
        return {group: table for group, table in tabled if table is not None}

    def features(self, labels: Rows) -> list[tuple[tuple[int, ...], Index, Index]]:
        """Moving positions of an axis by the groups that move them: groups, digits (n, groups), position (n, copies).

        Positions whose labels differ in the tag alone are copies of one feature.
        """
        leaves = self.leaves.leaf_of(labels[:, 1:])
        signatures, inverse = unique_rows(leaves)
        standing = []
        for index, signature in enumerate(signatures):
            moving = [int(leaf) for leaf in signature if leaf >= 0]
            if not moving or any(leaf not in self.group_of for leaf in moving):
                continue
            where = np.flatnonzero(inverse == index)
            elements = labels[where][:, 1 : 1 + len(moving)]
            digits, feature = unique_rows(elements)
            order = np.argsort(feature, kind="stable")
            groups = tuple(self.group_of[leaf] for leaf in moving)
            starts = np.array([self.leaves.starts[leaf] for leaf in moving])
            standing.append((groups, digits - starts, where[order].reshape(len(digits), -1)))
        return standing

    # labels ---------------------------------------------------------------------------------------------------------

    def channels_at(self, labels: Rows, leaf: int, mask: NDArray[np.bool_]) -> Index:
        """The channel of one leaf at each position."""
        return np.where(mask, labels[:, 1:], 0).sum(axis=1) - self.leaves.starts[leaf]

    def digits(self, labels: Rows) -> list[tuple[int, int, NDArray[np.bool_]]]:
        """The leaves of groups on an axis: leaf, group, and where its digits stand (positions, digits)."""
        leaves = self.leaves.leaf_of(labels[:, 1:])
        return [(x, self.group_of[x], leaves == x) for x in distinct(leaves) if x in self.group_of]
