"""Block axes: where a group may be permuted differently inside each block of another (wreath products).

Inference finds products: heads × dim, groups × channels, with one permutation of dim for all heads. It may differ from
head to head if every operator treats heads one by one wherever dim is in play. Two conditions, both checked on the
final labels (``vfx.analyse.rules.spaces`` says what an operator does to its index space):

* in every tensor, each position that has a channel of the inner group has exactly one of the outer group. Where the
  inner group stands on several axes (a stream on both axes of a weight), each of them has its blocks on itself;
* in every operator, an axis that holds the inner group holds the outer one as well, or the inner group's dimension
  stands with one that holds the outer group, in the same tensors, and the operator does not mix the latter's positions
  while the former's are kept apart.

So q and k share an inner permutation for each head, v and the output projection another; a position bias or scale that
heads share ties them again, and GroupNorm's groups are blocks of their channels but not the other way round.
Rows that are sent to experts count as standing on the experts' axis (``vfx.analyse.named``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, takewhile
from typing import Any

from torch import fx

from vfx.analyse.axis import Axis, Opaque
from vfx.analyse.named import Namings, part_of
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rows import unique_rows
from vfx.analyse.rules.spaces import Dim, Spaces, space_of
from vfx.analyse.shapes import Block, Digit, Shape
from vfx.analyse.store import Rows, Store

Signature = tuple[int, ...]  # the leaves that move one position


@dataclass(frozen=True, eq=False)
class SignaturePiece:
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


def parents(inference: ProgramTerms, free: Iterable[int]) -> dict[int, int]:
    """Inner leaf -> the leaf whose elements are its blocks, one level deep."""
    allowed = _Allowed(inference, frozenset(free)).find()
    parent_of: dict[int, int] = {}
    for leaf in sorted(allowed):
        outer = sorted(parent for parent in allowed[leaf] if parent not in parent_of)
        if outer and leaf not in parent_of.values():
            parent_of[leaf] = outer[0]
    return parent_of


class _Allowed:
    """For each leaf, the leaves that may be its blocks; tensors and operators cross them out.

    Most leaves are out at once, and what only they move is not looked at again.
    """

    def __init__(self, inference: ProgramTerms, free: frozenset[int]):
        self.t, self.free = inference, free
        self.inner = set(free - _alone(inference))  # leaves that may yet have blocks
        self.allowed: dict[int, frozenset[int]] = {}
        self._known: dict[Axis, tuple[SignaturePiece, ...]] = {}
        self._moving = Moving(inference.leaves)
        self._namings = Namings.of(inference)
        self._seen: set[tuple[Any, ...]] = set()  # axes, and pieces

    def find(self) -> dict[int, frozenset[int]]:
        """Only leaves with at least one candidate are listed."""
        tensors = chain(self.t.parameters.values(), (shape.axes for shape in _flat(self.t.shapes.values())))
        for axes in takewhile(lambda _: self.inner, tensors):
            self._tensor(axes)
        spaces = Spaces(self.t, named=True)
        for node in self._operators() if self.inner else ():
            self._operator(space_of(spaces, node), node)
        return {leaf: self.allowed[leaf] for leaf in self.inner}

    def _operators(self) -> list[fx.Node]:
        """The operators with an operand or a result that a leaf moves that may have blocks."""
        values = self.t.shapes.items()
        moved = {node for node, value in values if any(self._moves(shape.axes) for shape in _flat([value]))}
        called = (node for node, value in values if node.op == "call_function" and value is not None)
        return [node for node in called if node in moved or not moved.isdisjoint(node.all_input_nodes)]

    def _moves(self, axes: tuple[Axis | Digit, ...]) -> bool:
        """Whether a leaf moves a tensor that may have blocks."""
        return not self.inner.isdisjoint(chain.from_iterable(map(self._moving.__getitem__, axes)))

    def _keep(self, leaf: int, outer: Iterable[int]) -> None:
        """Cross out all but these leaves as blocks of one that may have some."""
        self.allowed[leaf] = self.allowed.get(leaf, self.free).intersection(outer)
        if not self.allowed[leaf]:
            self.inner.remove(leaf)

    # tensors ------------------------------------------------------------------------------------------------------

    def _tensor(self, axes: tuple[Axis | Digit, ...]) -> None:
        """Blocks of a leaf stand beside it, once, wherever it stands."""
        if axes in self._seen or not self._moves(axes):
            return
        lines = tuple(map(tuple, self._lines_of(axes)))
        seen = lines in self._seen
        self._seen |= {axes, lines}
        if seen:
            return
        count = Counter(leaf for line in lines for piece in line for leaf in piece.leaves)
        everywhere = _throughout((piece for line in lines for piece in line), count)
        for line in lines:
            along = Counter(leaf for piece in line for leaf in piece.leaves)
            throughout = _throughout(line, along)
            for piece in line:
                for leaf in piece.leaves & self.inner:
                    outer = throughout | {h for h in piece.beside(leaf) if along[h] == 1}
                    if count[leaf] == 1:
                        outer |= everywhere
                    once = along[leaf] == 1 and leaf not in piece.repeated
                    self._keep(leaf, self._namings.completed(outer, count) - {leaf} if once else ())

    def _lines_of(self, entries: Iterable[Axis | Digit]) -> Iterator[Iterable[SignaturePiece]]:
        """The pieces of each axis, or block, of a tensor."""
        blocks: set[Block] = set()
        for entry in map(self.t.separate, entries):
            if isinstance(entry, Digit):
                if entry.block not in blocks:
                    blocks.add(entry.block)
                    yield (self._piece(entry.block.flat),)
            else:
                axis = entry.root
                if axis not in self._known:
                    factors = (factor for factor in axis.factors if not isinstance(factor, Opaque))
                    part = part_of(axis) if self._namings.known else 0
                    named = (SignaturePiece(frozenset([(part,)])),) if part else ()
                    self._known[axis] = named or tuple(map(self._piece, factors))
                yield self._known[axis]

    def _piece(self, rows: Rows) -> SignaturePiece:
        return self.t.leaves.once(piece_of, self.t.leaves.resolve(rows))

    # operators ----------------------------------------------------------------------------------------------------

    def _operator(self, space: list[Dim] | None, node: fx.Node) -> None:
        if space is None:
            for leaf in self.inner & frozenset().union(*self._standing(node)):
                self._keep(leaf, ())
            return
        tensors = self._standing(node) if self._namings.known else []
        count = Counter(chain.from_iterable(dim.leaves for dim in space))
        for dim in space:
            for leaf in dim.leaves & self.inner:
                partners = {
                    h for candidate in space if _together(dim, candidate) for h in candidate.leaves if count[h] == 1
                }
                partners |= set(self._namings.named(partners, [leaves for leaves in tensors if leaf in leaves]))
                self._keep(leaf, (partners | dim.leaves if dim.whole else partners) - {leaf})

    def _standing(self, node: fx.Node) -> list[frozenset[int]]:
        """What stands on each tensor that an operator reads or gives."""
        shapes = _flat(self.t.shapes[value] for value in (node, *node.all_input_nodes))
        lines = (self._lines_of(shape.axes) for shape in shapes)
        return [frozenset().union(*(piece.leaves for line in axis for piece in line)) for axis in lines]


class Moving(dict[Axis | Digit, frozenset[int]]):
    """The free leaves that may move an axis (or the block it is a digit of), without resolving its labels.

    They are what the leaves on it have become: too many where it holds but some of the channels of one.
    """

    def __init__(self, leaves: Store):
        super().__init__()
        self.leaves = leaves
        self._become: dict[int, Sequence[int]] = {}

    def __missing__(self, entry: Axis | Digit) -> frozenset[int]:
        factors = (entry.block.flat,) if isinstance(entry, Digit) else entry.factors
        held = [self.leaves.leaves_on(rows) for rows in factors if not isinstance(rows, Opaque)]
        self[entry] = leaves = frozenset().union(*map(self._ends, chain.from_iterable(held)))
        return leaves

    def _ends(self, leaf: int) -> Sequence[int]:
        if leaf not in self._become:
            rows = self.leaves.bindings[leaf]
            self._become[leaf] = [leaf] if rows is None else self.leaves.free_leaves(self.leaves.resolve(rows))
        return self._become[leaf]


def _throughout(pieces: Iterable[SignaturePiece], count: Mapping[int, int]) -> frozenset[int]:
    """Leaves that every position of some piece has, and that stand in no other."""
    return frozenset(leaf for piece in pieces for leaf in piece.throughout if count[leaf] == 1)


def _alone(inference: ProgramTerms) -> set[int]:
    """Leaves with a vector of parameters on which no other leaf stands beside them: they have no blocks."""
    leaves, vectors = inference.leaves, [axes[0] for axes in inference.parameters.values() if len(axes) == 1]
    labels = [leaves.resolve(rows) for axis in vectors if (rows := inference.rows(axis)) is not None]
    different = {id(rows): rows for rows in labels if rows.shape[1] == 2}
    return {leaf for rows in different.values() for leaf in leaves.free_leaves(rows)}


def _flat(values: Iterable[object]) -> Iterator[Shape]:
    for value in values:
        if isinstance(value, Shape):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


def piece_of(leaves: Store, rows: Rows) -> SignaturePiece:
    """What moves the positions along one array of resolved labels."""
    if rows.shape[1] == 2:
        stuck = [()] if (rows[:, 1] < 0).any() else []
        return SignaturePiece(frozenset([*stuck, *((leaf,) for leaf in leaves.free_leaves(rows))]))
    owner = leaves.leaf_of(rows[:, 1:])
    products = owner[:1] if (owner == owner[0]).all() else unique_rows(owner)[0]  # the usual case: one full product
    return SignaturePiece(frozenset(tuple(leaf for leaf in row if leaf >= 0) for row in products.tolist()))


def _together(inner: Dim, outer: Dim) -> bool:
    """Whether an operator treats positions of ``outer`` one by one wherever it treats ``inner``."""
    return inner is outer or (inner.tensors <= outer.tensors and (inner.coupled or not outer.coupled))
