"""Coordinate descent of weight matching (Git Re-Basin, Ainsworth et al. 2022, algorithm 1).

For group P the gain is A = Σ over its members of ⟨W_0, W_1⟩ contracted over every other axis, W_1 already permuted by
the other groups; tr(PᵀA) is maximised by a linear assignment, group after group, until a sweep gains nothing. A group
with others inside its blocks (heads × dim) is matched with them (``vfx.match.units``). The first sweep goes in
topological order and counts only members whose other axes are settled already: from a random order alone the search
gets stuck on residual networks. Where two unsettled groups share an axis, the first is settled on the best order of
the second for each pair of its channels. Later sweeps are in random order and skip what nothing changed since a step
that saw all of it. A group on both axes of one weight makes the objective quadratic: a step that would lower it is not
taken. Running statistics never enter the gain. ``vfx.match.class_descent`` does the same over larger classes than
permutations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.groups import Group, Member
from vfx.analyse.symmetry import Symmetry
from vfx.elements import (
    Acting,
    Permutations,
    compose_permutations,
    permuted,
    random_permutations,
    still_permutations,
)
from vfx.garbage import give_back
from vfx.match.blocks import BlockGains
from vfx.match.matcher import Gain, assign, best_over_blocks
from vfx.match.solve import Signs
from vfx.match.units import GroupUnit, assign_pairs, assign_unit, units
from vfx.match.universe import scored_names
from vfx.on_read import OnRead
from vfx.program import Weights

MAX_SWEEPS = 100
TOLERANCE = 1e-12


class Descent:
    """One coordinate descent that brings ``other`` to ``target``; ``heads`` are not compared."""

    dtype = torch.float32
    solve = staticmethod(assign_pairs)  # of the groups inside blocks

    def __init__(self, symmetry: Symmetry, target: Weights, other: Weights, heads: frozenset[str] = frozenset()):
        self.symmetry, self.units = symmetry, units(symmetry)
        named = [name for name in scored_names(symmetry) if name not in heads]
        scored = [name for name in named if target[name].shape == other[name].shape]  # not heads for other classes
        self.target, self.original = (self._held(weights, scored) for weights in (target, other))
        self.groups_of: dict[str, set[int]] = {}
        self.stale: set[int] = set()
        self.moved = False  # whether any step of a sweep changed anything
        self.freed = 0  # bytes that steps have read, moved and freed since memory was given back
        self.on_axis: dict[tuple[str, int], list[tuple[int, set[int]]]] = {}
        for group in self._groups():
            for member in group.members:
                self.groups_of.setdefault(member.fqn, set()).add(group.index)
                where = (group.index, set(member.position.reshape(-1).tolist()))
                self.on_axis.setdefault((member.fqn, member.dim), []).append(where)

    def keep_to(self, groups: Collection[int]) -> None:
        """Search only units that hold one of these groups; the others stay as they are."""
        self.units = [unit for unit in self.units if unit.groups & set(groups)]

    def run(
        self,
        generator: np.random.Generator,
        start: Mapping[int, Any] | None = None,
        known: Collection[int] | None = None,
    ) -> tuple[dict[int, Any], float, int]:
        """The element found (permutations), objective Σ⟨W_0, π(W_1)⟩ and the number of sweeps.

        From ``start`` on every step raises the objective; without one the first sweep goes in topological order and
        counts what groups before it tell. With ``known``, groups of the start that are right, it counts what they tell.
        """
        self._place(self._identity() if start is None else dict(start))
        self.stale = {group.index for unit in self.units for group in (unit.outer, *unit.inner)}
        settled = set(known or ()) if start is None or known is not None else None
        objective, sweep = 0.0, 0
        for sweep in range(1, MAX_SWEEPS + 1):
            self.moved = False
            order = range(len(self.units)) if start is None and sweep == 1 else generator.permutation(len(self.units))
            for index in order:
                self._improve(self.units[index], settled, sweep)
            settled = None
            give_back(sum(tensor.nbytes for tensor in self.current.values()))
            if sweep > 1 and not self.moved:
                break
            before, objective = objective, self.objective
            if sweep > 1 and objective - before <= TOLERANCE * abs(objective):
                break
        return self.element, objective, sweep

    def value(self, element: Mapping[int, Any]) -> float:
        """The objective of an element."""
        self._place(dict(element))
        return self.objective

    def _place(self, element: dict[int, Any]) -> None:
        """Begin at an element."""
        self.element, placed = element, self._placed(element)
        self.current = {
            n: t.clone() if (t := placed(n, tensor)) is tensor else t for n, tensor in self.original.items()
        }

    def disordered(self, element: Mapping[int, Any], groups: Collection[int], generator: np.random.Generator) -> Any:
        """An element behind which ``groups`` stand in a random order."""
        self.element = dict(element)
        drawn = random_permutations(self.symmetry.groups, generator)
        self._compose(self._disorder({i: order for i, order in drawn.items() if i in groups}, generator))
        return self.element

    def _held(self, weights: Weights, names: Collection[str]) -> OnRead:
        """Some tensors in the precision of the descent, cast when they are read."""
        held_in = {
            name: self._held_in(name, weights[name]) for name in names
        }  # no reference to self: it must go at once
        return OnRead({name: weights[name] for name in names}, lambda name, tensor: tensor.to(held_in[name]))

    def _held_in(self, name: str, tensor: Tensor) -> torch.dtype:
        """The precision in which a tensor is held and multiplied; what is summed over several has ``dtype``."""
        return self.dtype

    def move(self, maps: Mapping[int, Any]) -> None:
        """The other network through maps behind what it goes through already."""
        self._compose(dict(maps))
        moved = self._action(dict(maps))
        self.current = {name: moved(name, tensor) for name, tensor in self.current.items()}

    def nearest_maps(self) -> dict[int, Any]:
        """The maps without a balanced form that bring the networks nearest as they stand: none among permutations."""
        return {}

    def _improve(self, unit: GroupUnit, settled: set[int] | None, sweep: int) -> None:
        """The best permutation of one unit, all others held; nothing to do if none of its weights changed since."""
        names = {m.fqn for g in (unit.outer, *unit.inner) for m in g.members if m.fqn in self.target}
        if not names or not unit.groups & self.stale:
            return
        inside = self._in_blocks(unit)
        quadratic = any(self._quadratic(group) for group in (unit.outer, *unit.inner))
        exact = self._exact(unit) and not quadratic and not inside
        final = exact or (self._exact(unit) and not quadratic and self._separate(unit, names))
        done = settled is None or (final and all(self.groups_of[name] - unit.groups <= settled for name in names))
        relative = self._best_in_blocks(unit, names, settled, sweep) if inside else self._best(unit.outer, settled)
        if done:
            self.stale -= unit.groups
        if self._still(relative):
            return
        step = OnRead(self.current, self._action(relative))  # a stream stands in most tensors: one is moved at a time
        if settled is None and not exact and self._value(names, step) <= self._value(names, self.current):
            return
        self.moved = True
        self._compose(relative)
        for name in names:  # in place: long-lived tensors between short-lived ones fragment the heap
            self.current[name].copy_(step[name])
        self._given_back(sum(self.current[name].nbytes for name in names))
        neighbours = set().union(*(self.groups_of[name] for name in names))
        self.stale |= neighbours - unit.groups if final else neighbours

    def _given_back(self, size: int) -> None:
        """Count what a step has freed; give it back where it is much."""
        self.freed += size
        if give_back(self.freed):
            self.freed = 0

    def _groups(self) -> tuple[Group, ...]:
        return self.symmetry.groups

    # elements: here permutations -------------------------------------------------------------------------------------

    def _identity(self) -> dict[int, Any]:
        return still_permutations(self.symmetry.groups)

    def _still(self, relative: dict[int, Any]) -> bool:
        return all((p == np.arange(p.shape[-1])).all() for p in relative.values())

    def _placed(self, element: dict[int, Any]) -> Callable[[str, Tensor], Tensor]:
        """What brings the other network's tensors behind an element."""
        return self._action(element)

    def _action(self, relative: dict[int, Any]) -> Acting:
        return Acting(self.symmetry, permuted(relative))

    def _compose(self, relative: dict[int, Any]) -> None:
        self.element = compose_permutations(self.symmetry.groups, self.element, relative)

    def _disorder(self, permutations: Permutations, generator: np.random.Generator) -> dict[int, Any]:
        """A random element of the groups that are permuted."""
        return dict(permutations)

    def _in_blocks(self, unit: GroupUnit) -> bool:
        """Whether anything stands inside the unit's blocks."""
        return bool(unit.inner)

    def _exact(self, unit: GroupUnit) -> bool:
        """Whether a step is at its optimum when it is done, so that no further one is needed."""
        return True

    def _separate(self, unit: GroupUnit, names: set[str]) -> bool:
        """Whether no part of a weight holds two groups inside the unit's blocks: each is at its best for itself."""
        parts = (part for name in names for part in self._block_gains.parts(unit, name))
        return all(len(part.inner) < 2 and not part.quadratic for part in parts)

    def _quadratic(self, group: Group) -> bool:
        """Whether a group stands on two axes of one weight."""
        axes = {(m.fqn, m.dim) for m in group.members if m.fqn in self.target}
        return len(axes) > len({fqn for fqn, _ in axes})

    # a group of its own ---------------------------------------------------------------------------------------------

    def _best(self, group: Group, settled: set[int] | None) -> dict[int, Any]:
        members = [m for m in group.members if m.fqn in self.target]
        gain = self._first_gain(group, members, settled) if settled is not None else self._gain(members, group.size)
        return {group.index: assign(gain)[0]}

    def _first_gain(self, group: Group, members: list[Member], settled: set[int]) -> Gain:
        """The gain from what is known in the first sweep; ``group`` counts as settled afterwards."""
        others = {id(m): self.groups_of[m.fqn] - {group.index} - settled for m in members}
        unshared = [m for m in members if not others[id(m)]]
        shared = [m for m in members if others[id(m)] == self._sharing(group, m) - settled]
        settled.add(group.index)
        if unshared or not shared:
            return self._gain(unshared or members, group.size)
        copies = shared[0].position.shape[1]
        blocks = [self._blocks([m for m in shared if m.position.shape[1] == copies], w, group.size)
                  for w in (self.target, self.current)]  # fmt: skip
        return best_over_blocks(np.einsum("iax,jbx->ijab", *blocks, optimize=True))

    def _sharing(self, group: Group, member: Member) -> set[int]:
        """Other groups that move the same positions of a member's axis."""
        places = set(member.position.reshape(-1).tolist())
        return {g for g, where in self.on_axis[member.fqn, member.dim] if g != group.index and where & places}

    def _blocks(self, members: list[Member], weights: Weights, size: int) -> Gain:
        """(size, copies, everything else) of the members side by side."""
        parts = [_rows(m, weights[m.fqn]).reshape(size, m.position.shape[1], -1).to(self.dtype) for m in members]
        return torch.cat(parts, 2).cpu().numpy()

    def _gain(self, members: list[Member], size: int) -> Gain:
        """⟨W_0, W_1⟩ between any two channels (size, size), contracted over all else."""
        total = np.zeros((size, size))
        for member in members:
            pair = (self.target[member.fqn], self.current[member.fqn])
            rows = [_rows(member, tensor).reshape(size, -1) for tensor in pair]
            total += (rows[0] @ rows[1].T).cpu().numpy()
        return total

    # a group with others inside its blocks --------------------------------------------------------------------------

    @cached_property
    def _block_gains(self) -> BlockGains:
        return BlockGains(self.symmetry)

    def _best_in_blocks(self, unit: GroupUnit, names: set[str], settled: set[int] | None, sweep: int) -> dict[int, Any]:
        """Inner groups take turns in going first: two that share a weight see each other's order."""
        if settled is not None:
            names = self._known(unit, names, settled)
            settled |= unit.groups
        parts = [part for name in sorted(names) for part in self._block_gains.parts(unit, name)]
        if settled is not None:
            parts = [part for part in parts if not part.quadratic] or parts
        order = unit.inner if sweep % 2 else unit.inner[::-1]
        arrays = [(part, part.array(self.target, self.dtype), part.array(self.current, self.dtype)) for part in parts]
        outer = self._block_gains.outer(unit, arrays) + self._beside(unit, names)
        gain = lambda g, orders: self._as_asked(g, self._block_gains.inner(unit, g, orders, arrays))  # noqa: E731
        return assign_unit(unit, outer, gain, order, self.solve)[0]

    def _as_asked(self, group: Group, gains: Mapping[Signs, Gain]) -> Any:
        """Gains of an inner group as ``solve`` takes them."""
        return sum(gains.values())

    def _known(self, unit: GroupUnit, names: set[str], settled: set[int]) -> set[str]:
        """The weights whose other groups are settled; of a group that none of them holds, all weights."""
        settled_names = {n for n in names if self.groups_of[n] - unit.groups <= settled}
        unseen = unit.groups - {group for name in settled_names for group in self.groups_of[name]}
        return settled_names | {n for n in names if self.groups_of[n] & unseen}

    def _beside(self, unit: GroupUnit, names: set[str]) -> Gain | float:
        """What pairs of blocks give beside their parts."""
        return 0.0

    # values ---------------------------------------------------------------------------------------------------------

    def _value(self, names: set[str], weights: Weights) -> float:
        # in an order of its own: that of a set of names differs from process to process, and rounding with it
        return sum(inner_product(self.target[name], weights[name]) for name in sorted(names))

    @property
    def objective(self) -> float:
        """Σ⟨W_0, W_1⟩ as it stands."""
        return self._value(set(self.target), self.current)


def _rows(member: Member, tensor: Tensor) -> Tensor:
    """A weight's slices at the member's positions, channel after channel."""
    front, where = tensor.movedim(member.dim, 0), member.position.reshape(-1)
    if len(where) == len(front) and (where == np.arange(len(front))).all():
        return front
    return front[torch.from_numpy(where).to(tensor.device)]


CHUNK = 1 << 18  # elements that are widened at a time


def inner_product(x: Tensor, y: Tensor) -> float:
    """Σ x y in float64, without float64 copies of large tensors."""
    pairs = zip(x.reshape(-1).split(CHUNK), y.reshape(-1).split(CHUNK))
    return sum(float(torch.dot(a.double(), b.double())) for a, b in pairs)


def squared_distance(x: Tensor, y: Tensor) -> float:
    """Σ (x − y)² in float64, without float64 copies of large tensors."""
    pairs = zip(x.reshape(-1).split(CHUNK), y.reshape(-1).split(CHUNK))
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
