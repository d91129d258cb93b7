"""Streams that LayerNorms read, who writes them, and who sees their mean.

LN(x) = LN(P x) with P = I − 11ᵀ/n, so a LayerNorm takes centring away. The walk over the classes
(``vfx.analyse.action``) is run with LayerNorms as ends: what stands before one is a side of its own, what stands behind
it another. If no operator lowered the side that LayerNorms read, all of them commute with every invertible map on it,
and by continuity with every matrix: with P in all that writes the side, as long as no weight reads it, which would
carry T⁻ᵀ. Behind a LayerNorm without gain every value is centred, so the layers that read such values alone lose
nothing by being centred too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import fx

from vfx.analyse.action import walked
from vfx.analyse.action.entries import Entries, constant
from vfx.analyse.action.walk import Walk
from vfx.analyse.classes import Maps
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.operators import operator, operator_of


@dataclass(frozen=True, eq=False)
class StreamPlace:
    """A parameter axis and where a feature's channels stand on it, (size, copies)."""

    fqn: str
    dim: int
    position: Index


class _End(NamedTuple):
    """The slots before and behind a LayerNorm."""

    before: int
    behind: int


class StreamNorms:
    """The LayerNorms of a network: ``centred`` those that may go, ``left`` the others, each with the reason.

    ``writers`` make what the centred ones read; ``readers`` see what they make, and nothing else.
    """

    def __init__(self, symmetry: Symmetry):
        self.symmetry = symmetry
        self._ends: dict[str, _End] = {}
        norms = [node for node in symmetry.program.graph.nodes if operator_of(node).norm == "layer"]
        self.walk = walked(symmetry.terms, symmetry.rows, {node.name: self._end for node in norms})
        why = {node: self._reason(node) for node in norms}
        self.left = {node: reason for node, reason in why.items() if reason}
        self.centred = [node for node in norms if not why[node]]
        before, behind = ([self.walk.slots.find(self._ends[n.name][k]) for n in self.centred] for k in (0, 1))
        self.writers = [place for side, dual in dict.fromkeys(before) for place in self._places(side, dual)]
        self.readers = [place for side, dual in dict.fromkeys(behind) for place in self._read(side, dual)]

    # the walk -------------------------------------------------------------------------------------------------------

    def _end(self, w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries | None:
        """A LayerNorm over one whole axis: what it reads ends there, and something new begins."""
        last = len(w.sizes(node)) - 1
        stands = w.stands(a["input"])
        whole = [leaf for leaf in stands[last] if w.t.leaves.sizes[leaf] == w.sizes(node)[last]] if stands else []
        read = w.on(a["input"], {last})
        if len(a["normalized_shape"]) > 1 or len(whole) != 1 or len(stands[last]) > 1 or len(read) != 1:
            return None
        ((key, ids),) = read.items()
        ids = w.slots.collapse(ids, range(ids.ndim))
        for value in (a["weight"], a["bias"]):
            w.hold(value)
        behind = w.slots.fresh(key[0])
        if a["weight"] is not None or a["bias"] is not None:
            w.slots.lower(behind, Maps.PERMUTATION)
        self._ends[node.name] = _End(int(ids.flat[0]), behind)
        others = {place: beside for place, beside in w.entries(a["input"]).items() if place != key}
        for beside in others.values():
            w.slots.restrict(beside, Maps.PERMUTATION)
        return others | {key: constant(behind, last + 1)}

    # what was found -------------------------------------------------------------------------------------------------

    def _reason(self, node: fx.Node) -> str:
        """Why a LayerNorm stays, or nothing."""
        if node.name not in self._ends:
            return "the axis that it normalises is not one free group of channels"
        side, dual = self.walk.slots.find(self._ends[node.name].before)
        if self.walk.slots.maps(side) is not Maps.LINEAR:
            return self._lowered(side)
        against = self._places(side, not dual)
        if against:
            readers = ", ".join(user.name for user in self._users(against[0].fqn))
            return f"{readers} ({against[0].fqn}) reads the mean of its input"
        return ""

    def _lowered(self, side: int) -> str:
        """The first operator on a side that sees the mean, or makes one."""
        removed = {(place.fqn, place.dim) for dual in (False, True) for place in self._places(side, dual)}
        for member in (m for group in self.symmetry.groups for m in group.members if m.role == "tied"):
            if (member.fqn, member.dim) in removed:
                return f"{member.fqn} both writes and reads it"
        nodes_lowered = {lowering.node for lowering in self.walk.slots.lowered[side]}
        nodes = [node for node in self.symmetry.program.graph.nodes if node.name in nodes_lowered]
        return f"{operator(nodes[0])} ({nodes[0].name}) does not let it be centred"

    def _read(self, side: int, dual: bool) -> list[StreamPlace]:
        """The weights that a centred value alone goes through."""
        free = self.walk.slots.maps(side) is Maps.LINEAR and not self._places(side, dual)
        return self._places(side, not dual) if free else []

    def _places(self, side: int, dual: bool) -> list[StreamPlace]:
        """The parameter axes that carry T of a side, or T⁻ᵀ."""
        stream_places = []
        for leaf, index in self.symmetry.group_of.items():
            for member in self.symmetry.groups[index].members:
                slots = self.walk.parameters[member.fqn, member.dim][leaf]
                on_side = [self.walk.slots.find(slot) == (side, dual) for slot in slots.tolist()]
                if any(on_side):
                    stream_places.append(StreamPlace(member.fqn, member.dim, member.position[:, np.array(on_side)]))
        return stream_places

    def _users(self, fqn: str) -> list[fx.Node]:
        nodes = [node for node in self.symmetry.program.graph.nodes if node.op == "get_attr" and node.target == fqn]
        return [user for node in nodes for user in node.users]
