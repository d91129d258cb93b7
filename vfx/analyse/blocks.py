"""Block axes: where a group may be permuted differently inside each block of another (wreath products).

Inference finds products: heads × dim, groups × channels, with one permutation of dim for all heads. It may differ from
head to head if every operator treats heads one by one wherever dim is in play. Two conditions, both checked on the
final labels (``vfx.analyse.rules.spaces`` says what an operator does to its index space):

* in every tensor, each position that has a channel of the inner group has exactly one of the outer group;
* in every operator, a dimension that holds the inner group stands with one that holds the outer group, in the same
  tensors, and the operator does not mix the latter's positions while the former's are kept apart.

So q and k share an inner permutation for each head, v and the output projection another; a position bias or scale that
heads share ties them again, and GroupNorm's groups are blocks of their channels but not the other way round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vfx.analyse.axis import Axis, Opaque
from vfx.analyse.infer import Inference
from vfx.analyse.rows import unique_rows
from vfx.analyse.rules.spaces import Dim, Spaces, space_of
from vfx.analyse.shapes import Block, Digit, Shape
from vfx.analyse.store import Rows, Store
from vfx.operators import arguments

Signature = tuple[int, ...]  # the leaves that move one position


@dataclass(frozen=True, eq=False)
class Piece:
    """The signatures along one factor of an axis."""

    signatures: frozenset[Signature]

    @cached_property
    def leaves(self) -> frozenset[int]:
        return frozenset(leaf for signature in self.signatures for leaf in signature)

    @cached_property
    def repeated(self) -> frozenset[int]:
        """Leaves that stand twice on one position."""
        return frozenset(leaf for s in self.signatures if len(set(s)) < len(s) for leaf in s if s.count(leaf) > 1)

    @cached_property
    def throughout(self) -> frozenset[int]:
        """Leaves that every position has, once."""
        return frozenset.intersection(*map(frozenset, self.signatures)) - self.repeated

    def beside(self, leaf: int) -> frozenset[int]:
        """Leaves that every position with this one has as well, once."""
        return frozenset.intersection(*(frozenset(s) for s in self.signatures if leaf in s)) - self.repeated


def parents(inference: Inference, free: Iterable[int]) -> dict[int, int]:
    """Inner leaf -> the leaf whose elements are its blocks, one level deep."""
    allowed = _Allowed(inference, frozenset(free)).find()
    found: dict[int, int] = {}
    for leaf in sorted(allowed):
        outer = sorted(parent for parent in allowed[leaf] if parent not in found)
        if outer and leaf not in found.values():
            found[leaf] = outer[0]
    return found


class _Allowed:
    """For each leaf, the leaves that may be its blocks; operators and tensors cross them out."""

    def __init__(self, inference: Inference, free: frozenset[int]):
        self.t, self.free = inference, free
        self.allowed: dict[int, frozenset[int]] = {}
        self._known: dict[Axis, tuple[Piece, ...]] = {}
        self._seen: set[tuple[Any, ...]] = set()  # axes, and pieces

    def find(self) -> dict[int, frozenset[int]]:
        """Only leaves with at least one candidate are listed."""
        parameters = (Shape(axes) for axes in self.t.parameters.values())
        for shape in (*parameters, *self._shapes(self.t.shapes.values())):
            self._tensor(shape)
        if any(self.allowed.values()):
            spaces = Spaces(self.t)
            for node, shape in self.t.shapes.items():
                if node.op == "call_function" and shape is not None:
                    self._operator(space_of(spaces, node, arguments(node)), node)
        return {leaf: outer for leaf, outer in self.allowed.items() if outer}

    def _shapes(self, values: Iterable[object]) -> Iterable[Shape]:
        for value in values:
            if isinstance(value, Shape):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from self._shapes(value)

    # tensors ------------------------------------------------------------------------------------------------------

    def _tensor(self, shape: Shape) -> None:
        pieces = tuple(self._pieces_of(shape.axes)) if shape.axes not in self._seen else ()
        self._seen.add(shape.axes)
        if not pieces or pieces in self._seen:
            return
        self._seen.add(pieces)
        if not any(self.allowed.get(leaf, True) for piece in pieces for leaf in piece.leaves):
            return
        count = Counter(leaf for piece in pieces for leaf in piece.leaves)
        throughout = {h for piece in pieces for h in piece.throughout if count[h] == 1}
        for piece in pieces:
            for leaf in piece.leaves:
                if self.allowed.get(leaf, True):
                    beside = {h for h in piece.beside(leaf) if count[h] == 1} if count[leaf] == 1 else set()
                    once = all(leaf not in own.repeated for own in pieces)
                    self._keep(leaf, (throughout | beside) - {leaf} if once else ())

    def _keep(self, leaf: int, outer: Iterable[int]) -> None:
        found = frozenset(outer) & self.free if leaf in self.free else frozenset()
        self.allowed[leaf] = self.allowed.get(leaf, found) & found

    def _pieces_of(self, entries: Iterable[Axis | Digit]) -> Iterator[Piece]:
        blocks: set[Block] = set()
        for entry in entries:
            if isinstance(entry, Digit):
                if entry.block not in blocks:
                    blocks.add(entry.block)
                    yield self._piece(entry.block.flat)
            else:
                axis = entry.root
                if axis not in self._known:
                    factors = (factor for factor in axis.factors if not isinstance(factor, Opaque))
                    self._known[axis] = tuple(map(self._piece, factors))
                yield from self._known[axis]

    def _piece(self, rows: Rows) -> Piece:
        return self.t.leaves.once(piece_of, self.t.leaves.resolve(rows))

    # operators ----------------------------------------------------------------------------------------------------

    def _operator(self, space: list[Dim] | None, node: object) -> None:
        if space is None:
            touched = self._shapes(self.t.shapes[x] for x in (node, *node.all_input_nodes))  # type: ignore[attr-defined]
            for shape in touched:
                for leaf in {leaf for piece in self._pieces_of(shape.axes) for leaf in piece.leaves}:
                    self._keep(leaf, ())
            return
        count: dict[int, int] = {}
        for dim in space:
            for leaf in dim.leaves:
                count[leaf] = count.get(leaf, 0) + 1
        for dim in space:
            partners = {h for other in space if _together(dim, other) for h in other.leaves if count[h] == 1}
            for leaf in dim.leaves:
                if self.allowed.get(leaf):
                    self._keep(leaf, partners - {leaf})


def piece_of(leaves: Store, rows: Rows) -> Piece:
    """What moves the positions along one array of resolved labels."""
    if rows.shape[1] == 2:
        stuck = [()] if (rows[:, 1] < 0).any() else []
        return Piece(frozenset([*stuck, *((leaf,) for leaf in leaves.free_leaves(rows))]))
    owner = leaves.leaf_of(rows[:, 1:])
    found = owner[:1] if (owner == owner[0]).all() else unique_rows(owner)[0]  # the usual case: one full product
    return Piece(frozenset(tuple(leaf for leaf in row if leaf >= 0) for row in found.tolist()))


def _together(inner: Dim, outer: Dim) -> bool:
    """Whether an operator treats positions of ``outer`` one by one wherever it treats ``inner``."""
    return inner is outer or (inner.tensors <= outer.tensors and (inner.coupled or not outer.coupled))
