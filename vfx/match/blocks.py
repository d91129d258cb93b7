"""Inner products of weights by blocks: what each pair of heads (or groups) gives, for each pair of inner channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements.pieces import Entry, Piece, combinations, entries, piece
from vfx.match.matcher import Gain, best_over_blocks
from vfx.match.solve import SignedOrders, Signs
from vfx.match.units import GroupUnit, PairOrders
from vfx.program import Weights


@dataclass(frozen=True)
class BlockPiece:
    """A piece of a weight that a unit moves, ``outer`` being its group of blocks.

    In a ``quadratic`` piece the unit moves further dimensions, which are left as they are. ``signs`` are the free signs
    whose product an inner group has here.
    """

    piece: Piece
    outer: int
    quadratic: bool = False
    signs: Mapping[int, Signs] = field(default_factory=dict)

    def array(self, weights: Weights, dtype: torch.dtype | None = None) -> Gain:
        """(outer, inner groups…, everything else), in a dtype, or in that of the weights."""
        array = self.piece.read(weights[self.piece.fqn])
        array = array if dtype is None else array.to(dtype)
        order = sorted(self.piece.stands, key=lambda stand: (stand.group != self.outer, stand.group))
        front = [stand.axis for stand in order]
        rest = [axis for axis in range(array.ndim) if axis not in front]
        shape = [array.shape[axis] for axis in front]
        return array.permute(*front, *rest).reshape(*shape, -1).cpu().numpy()

    @property
    def inner(self) -> tuple[int, ...]:
        """Inner groups in the order of ``array``'s axes."""
        return tuple(sorted(stand.group for stand in self.piece.stands if stand.group != self.outer))


Arrays = Sequence[tuple[BlockPiece, Gain, Gain]]  # a part in the first edge and in the other


class BlockGains:
    """Parts of weights by unit, and the gains they add up to.

    ``signs`` gives for groups inside blocks the free signs whose product each side has.
    """

    def __init__(self, symmetry: Symmetry, signs: Mapping[int, Mapping[int, Signs]] | None = None):
        self.symmetry, self.signs = symmetry, signs or {}
        self._parts: dict[tuple[int, str], list[BlockPiece]] = {}

    def parts(self, unit: GroupUnit, fqn: str) -> list[BlockPiece]:
        """The parts of one weight that hold the unit's outer group."""
        key = unit.outer.index, fqn
        if key not in self._parts:
            self._parts[key] = list(self._find(unit, fqn))
        return self._parts[key]

    def _find(self, unit: GroupUnit, fqn: str) -> Iterator[BlockPiece]:
        outer = unit.outer.index
        whole = [entries(self.symmetry, dim, labels, unit.groups) or [] for dim, labels in self.symmetry.axes_of(fqn)]
        axes = [[signed for entry in entries for signed in self._by_signs(fqn, entry)] for entries in whole]
        for chosen in combinations(axes):
            groups = [group for entry, _ in chosen for group in entry.groups]
            if groups.count(outer) == 1 and len(set(groups)) == len(groups):
                signs = {group: sides for _, signed in chosen for group, sides in signed.items()}
                yield BlockPiece(piece(self.symmetry, fqn, [entry for entry, _ in chosen]), outer, signs=signs)
        standing = [signed for entries in axes for signed in entries if outer in signed[0].groups]
        if len({entry.dim for entry, _ in standing}) > 1:
            for entry, signed in standing:
                yield BlockPiece(piece(self.symmetry, fqn, [entry]), outer, quadratic=True, signs=signed)

    def _by_signs(self, fqn: str, entry: Entry) -> Iterator[tuple[Entry, Mapping[int, Signs]]]:
        """The copies of an entry's channels apart where they carry different signs, with these."""
        signed = [group for group in entry.groups if group in self.signs]
        if not signed:
            yield entry, {}
            return
        first = entry.position.reshape(-1, entry.position.shape[-1])[0]
        keys = np.stack([self._sides_along(group, fqn, entry.dim)[first] for group in signed])
        for key in np.unique(keys, axis=1).T:
            copies = np.flatnonzero((keys == key[:, None]).all(0))
            side_signs = {group: self.signs[group].get(side, frozenset()) for group, side in zip(signed, key.tolist())}
            yield entry._replace(position=entry.position[..., copies]), side_signs

    def _sides_along(self, group: int, fqn: str, dim: int) -> Index:
        """The side of a group at each position of a dimension."""
        (member,) = (m for m in self.symmetry.groups[group].members if (m.fqn, m.dim) == (fqn, dim))
        side_of = np.full(int(member.position.max()) + 1, -1)
        side_of[member.position] = self.symmetry.classes[group].slots[fqn, dim][0]
        return side_of

    @staticmethod
    def outer(unit: GroupUnit, arrays: Arrays) -> Gain:
        """What pairs of blocks give whatever their inner order (n, n)."""
        total = np.zeros((unit.outer.size, unit.outer.size))
        for part, first, second in arrays:
            if not part.inner:
                total += first @ second.T
        return total

    @staticmethod
    def inner(unit: GroupUnit, group: Group, orders: PairOrders, arrays: Arrays) -> dict[Signs, Gain]:
        """(n, n, size, size) for one inner group by its signs; those in ``orders`` stand in their order for each pair.

        Where each of its parts has others, too, these count at their best order.
        """
        settled = [a for a in arrays if group.index in a[0].inner and set(a[0].inner) <= {group.index, *orders}]
        chosen = settled or [a for a in arrays if group.index in a[0].inner]
        shape = (unit.outer.size,) * 2 + (group.size,) * 2
        gains: dict[Signs, Gain] = {}
        for part, first_array, second_array in chosen:
            total = gains.setdefault(part.signs.get(group.index, frozenset()), np.zeros(shape))
            axis = 1 + part.inner.index(group.index)
            first = np.moveaxis(first_array, axis, 1)
            rest = [g for g in part.inner if g != group.index]
            if not rest:
                flat = [x.reshape(unit.outer.size, group.size, -1) for x in (first, np.moveaxis(second_array, axis, 1))]
                total += np.einsum("iax,jbx->ijab", *flat, optimize=True)
                continue
            for i, j in np.ndindex(*total.shape[:2]):
                moved = np.moveaxis(second_array[j], axis - 1, 0)
                for k, g in enumerate(rest, start=1):
                    if g in orders:
                        moved = _reordered(moved, orders[g][i, j], k, part.signs.get(g, frozenset()))
                ordered = [k for k, g in enumerate(rest, start=1) if g in orders]
                total[i, j] += _at_best(*(_last(x, ordered, len(rest)) for x in (first[i], moved)))
        return gains or {frozenset(): np.zeros(shape)}


def _last(array: Gain, ordered: Sequence[int], inner: int) -> Gain:
    """(size, whatever has no order yet, everything else): of ``inner`` axes behind the first some are ordered."""
    free = [k for k in range(1, 1 + inner) if k not in ordered]
    turned = array.transpose(0, *free, *ordered, *range(1 + inner, array.ndim))
    return turned.reshape(len(array), int(np.prod([array.shape[k] for k in free])), -1)


def _at_best(first: Gain, second: Gain) -> Gain:
    """⟨one, other⟩ (size, size) of arrays (size, n, rest), each pair at the best order of the n."""
    if first.shape[1] == 1:
        return first[:, 0] @ second[:, 0].T
    return best_over_blocks(np.einsum("amx,bnx->abmn", first, second, optimize=True))


def _reordered(array: Gain, order: Gain | Index | SignedOrders, axis: int, signs: Signs) -> Gain:
    """An axis in a new order (size,), with signs or without, or through a map (size, size)."""
    if isinstance(order, SignedOrders):
        order = order.matrix(signs)
    if order.ndim == 1:
        return np.take(array, order.astype(np.int64), axis=axis)
    return np.moveaxis(np.tensordot(order, array, (1, axis)), 0, axis)
