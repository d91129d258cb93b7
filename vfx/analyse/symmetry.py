"""Symmetry groups: the free leaves left by inference, with every parameter axis they move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from vfx.analyse.axes import Leaves
from vfx.analyse.blocks import parents
from vfx.analyse.groups import Class, Group, Member, Pinned
from vfx.analyse.infer import infer
from vfx.analyse.kinds import Classes
from vfx.analyse.labelling import Labelling
from vfx.analyse.left_out import pin_left_out
from vfx.analyse.listing import groups_table, listing
from vfx.analyse.places import places
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rotary import rotations
from vfx.analyse.store import Pin, Rows, Store
from vfx.garbage import collection_paused
from vfx.program import Program


@dataclass(frozen=True, eq=False)
class Symmetry(Labelling):
    """Symmetries of a Program: ``groups`` with their classes, ``pinned`` axes and ``unknown_ops``.

    It is data, and prints as a table; ``vfx.verify`` proves it, ``vfx.draw`` draws it.
    """

    pinned: tuple[Pinned, ...]
    unknown_ops: Mapping[str, tuple[str, ...]]

    @property
    def channels(self) -> int:
        """Sum of the groups' sizes."""
        return sum(group.size for group in self.groups)

    @cached_property
    def classes(self) -> Classes:
        """The class of each group and rotation by index, worked out when first asked for (``vfx.analyse.classes``)."""
        by_group = Classes(self)
        by_group.update({group.index: group_class for group, group_class in self._planes})
        return by_group

    @cached_property
    def rotations(self) -> tuple[Group, ...]:
        """Planes of queries and keys that rotary embeddings leave free: indexed behind the groups, never permuted.

        See ``vfx.analyse.rotary``.
        """
        return tuple(replace(group, owner=[self]) for group, _ in self._planes)

    @cached_property
    def _planes(self) -> list[tuple[Group, Class]]:
        return rotations(self)

    @property
    def moving(self) -> tuple[Group, ...]:
        """The groups and the rotations: whatever an element of the full classes moves, in the order of the indices."""
        return (*self.groups, *self.rotations)

    def group(self, index: int) -> Group:
        """The group or rotation of an index."""
        return self.groups[index] if index < len(self.groups) else self.rotations[index - len(self.groups)]

    def __str__(self) -> str:
        title = f"{len(self.groups)} symmetry groups, {self.channels:,} channels"
        return listing(groups_table(title, self.moving), self.pinned, self.unknown_ops)


def symmetry(program: Program) -> Symmetry:
    """The symmetries of a Program, inferred once for its graph and weight sets."""
    return program.facts.once("symmetry", lambda: _inferred(program), *program.weights)


def _inferred(program: Program) -> Symmetry:
    with collection_paused():
        return _groups(program, infer(program))


def _groups(program: Program, terms: ProgramTerms) -> Symmetry:
    """The free leaves that inference left."""
    leaves = terms.leaves
    written: dict[tuple[str, int], Rows] = {}
    for fqn, axes in terms.parameters.items():
        for dim, axis in enumerate(axes):
            rows = terms.rows(axis)
            assert rows is not None
            written[fqn, dim] = rows
    terms.settled = True
    pin_left_out(terms)
    labels = {place: leaves.resolve(rows) for place, rows in written.items()}
    roles = _roles(terms)
    members: dict[int, list[Member]] = {}
    for (fqn, dim), rows in labels.items():
        for leaf, position in leaves.once(places, rows).items():
            assert position is not None, f"labels of {fqn}[{dim}] are not closed under their group"
            role = roles.get((fqn, dim, leaf), "out")
            members.setdefault(leaf, []).append(Member(fqn, dim, role, position))
    index_of = {leaf: index for index, leaf in enumerate(members)}
    outer = parents(terms, members)
    owner: list[Symmetry] = []
    groups = tuple(
        _group(leaf, tuple(factors), leaves, index_of, outer.get(leaf), owner) for leaf, factors in members.items()
    )
    result = Symmetry(
        program=program,
        groups=groups,
        pinned=_pinned(terms, labels),
        unknown_ops={name: tuple(nodes) for name, nodes in terms.unknown.items()},
        terms=terms,
        rows=labels,
        group_of=index_of,
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
        return Group(index_of[leaf], leaves.sizes[leaf], members, owner=owner)
    return Group(index_of[leaf], leaves.sizes[leaf], members, index_of[outer], leaves.sizes[outer], owner)


_CONFLICTS = ({"out", "in"}, {"tied", "in"}, {"tied", "out"})


def _roles(terms: ProgramTerms) -> dict[tuple[str, int, int], str]:
    """(FQN, dim, leaf) -> role; a factor's own note wins over the whole axis's."""
    roles: dict[tuple[str, int, int], str] = {}
    for fqn, dim, axis, role in terms.roles:
        rows = terms.rows(axis)
        if rows is None:
            continue
        for leaf in terms.leaves.free_leaves(terms.leaves.resolve(rows)):
            before = roles.setdefault((fqn, dim, leaf), role)
            if before != role:
                roles[fqn, dim, leaf] = "tied" if {before, role} in _CONFLICTS else role
    return roles


ALONE = "no other channel is used alike"


def _pinned(terms: ProgramTerms, labels: Mapping[tuple[str, int], Rows]) -> tuple[Pinned, ...]:
    """Pinned parameter axes; a channel that is free but alone is named by its parameter."""
    nodes = {str(node.target): node.name for node in terms.shapes if node.op == "get_attr"}
    return tuple(
        Pinned(fqn, dim, count, pin.reason if pin else ALONE, pin.node if pin else nodes[fqn])
        for (fqn, dim), rows in labels.items()
        for pin, count in terms.leaves.once(_pins, rows)
        if pin or rows.shape[0] > 1
    )


def _pins(leaves: Store, rows: Rows) -> list[tuple[Pin | None, int]]:
    """Why positions of an axis cannot move, with how many they are; None for those that nothing holds."""
    if leaves.is_leaf(rows):
        return []
    stuck = rows[(rows[:, 1:] < 0).all(axis=1), 0]
    return list(Counter(leaves.pin_of(tag) for tag in stuck.tolist()).items())
