"""What symmetries are made of: groups of channels, the axes that they move, their classes, and what cannot move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vfx.analyse.classes import Maps
from vfx.analyse.places import Index
from vfx.analyse.slots import FreeScales


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
class Side:
    """A set of places that carry one map T of a leaf, or T⁻ᵀ: its class and what lowered it, its members.

    ``members`` are (FQN, dim, whether it carries T⁻ᵀ); what makes the feature carries T. ``lowered`` has the operators
    that lowered it, in the graph's order, each with the class that it allows.
    """

    index: int
    kind: Maps
    reason: str
    members: tuple[tuple[str, int, bool], ...]
    lowered: tuple[tuple[Maps, str], ...] = ()

    def refusal(self, maps: Maps) -> str:
        """The first operator that does not allow all of some maps; where none does by itself, the side's ``reason``."""
        return next((why for allowed, why in self.lowered if allowed & maps != maps), self.reason)


@dataclass(frozen=True, eq=False)
class Class:
    """The class of a group, what lowered it, and its sides; ``scales`` is what their equations leave free.

    ``slots`` gives for each member (FQN, dim) the side of each copy and whether it carries T⁻ᵀ, both (copies,);
    ``features`` are the sides that make or read the feature; ``running`` those that a running statistic stands on.
    ``scales`` is None where the class mixes channels.
    """

    kind: Maps
    reason: str
    sides: tuple[Side, ...]
    scales: FreeScales | None
    slots: Mapping[tuple[str, int], tuple[Index, Index]]
    features: frozenset[int] = frozenset()
    running: frozenset[int] = frozenset()


class Classified(Protocol):
    """What knows the classes of its groups."""

    @property
    def classes(self) -> Mapping[int, Class]: ...


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
    owner: Sequence[Classified] = field(default=(), repr=False)  # whose classes hold this group's, once known

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
        if not self.owner:
            return Class(Maps.PERMUTATION, "", (), None, {})
        return self.owner[0].classes[self.index]

    @property
    def blocks(self) -> tuple[int, int]:
        return self.outer, self.size

    @property
    def shape(self) -> tuple[int, ...]:
        """That of an array with a number for each channel: (size,), inside another group (blocks, size)."""
        return (self.size,) if self.parent is None else self.blocks

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
