"""Symbolic shapes: an axis term for each axis of a tensor, and what views do to them.

Views are lazy: cutting one axis into several does not factor its leaf. The new axes are *digits* of a block, an array
of labels with one dimension for each; selecting, slicing and transposing cut and turn the array, and undoing the view
gives the axis back. A block is forced into a product only when an operator needs one axis alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

from vfx.analyse.axis import Axis, Factor, Opaque, factor_size
from vfx.analyse.store import Rows
from vfx.analyse.terms import Axes


@dataclass(frozen=True, eq=False)
class Block:
    """Labels of positions indexed by several axes at once, one after the other in row-major order."""

    flat: Rows
    sizes: tuple[int, ...]

    @cached_property
    def labels(self) -> Rows:
        """(sizes…, 1 + digits)"""
        return self.flat.reshape(*self.sizes, -1)


@dataclass(frozen=True, eq=False)
class Digit:
    """One dimension of a block."""

    block: Block
    position: int

    @property
    def size(self) -> int:
        return self.block.sizes[self.position]


@dataclass(frozen=True, eq=False)
class Shape:
    """Axis terms of a tensor. ``origin[d]`` is (FQN, dim) where axis d is a parameter's own, untouched axis.

    ``meaning`` is what integers say of an axis (``vfx.analyse.routed``).
    """

    axes: tuple[Axis | Digit, ...]
    origin: tuple[tuple[str, int] | None, ...] = field(default=())
    meaning: Any = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple([axis.size for axis in self.axes])


class Algebra(Axes):
    """Operations on shapes over one store of leaves."""

    def __init__(self) -> None:
        super().__init__()
        self._forced: dict[Block, list[Axis]] = {}

    @staticmethod
    def is_opaque(axis: Axis | Digit) -> bool:
        """Whether an axis is pinned throughout."""
        return isinstance(axis, Axis) and axis.opaque

    def axis(self, shape: Shape, dim: int) -> Axis:
        """One axis alone; a block that holds it is forced into a product first."""
        return self.alone(shape.axes[dim])

    def alone(self, entry: Axis | Digit) -> Axis:
        """An axis, or a digit of a block that is forced into a product."""
        return entry if isinstance(entry, Axis) else self.force(entry.block)[entry.position]

    def separate(self, entry: Axis | Digit) -> Axis | Digit:
        """A digit's own axis if its block was forced into a product by now."""
        forced = self._forced.get(entry.block) if isinstance(entry, Digit) else None
        return entry if forced is None else forced[entry.position]  # type: ignore[union-attr]

    def force(self, block: Block) -> list[Axis]:
        """Factor a block into independent axes."""
        axes = self._forced.get(block)
        if axes is None:
            axes = self._forced[block] = self._independent(block.flat, block.sizes) or self._factored(block)
        return axes

    def _factored(self, block: Block) -> list[Axis]:
        axes = [self.fresh(size) for size in block.sizes]
        product = self.rows(Axis(tuple(f for axis in axes for f in axis.factors)))
        assert product is not None
        self.leaves.unify(product, block.flat)
        return axes

    def view(self, shape: Shape, sizes: Sequence[int]) -> Shape:
        """Reshape: regroup factors into axes of the given sizes, row-major; axes in front or behind may stay."""
        entries, dims = [axis for axis in shape.axes if axis.size != 1], [size for size in sizes if size != 1]
        front = _unchanged(entries, dims)
        behind = _unchanged(entries[front:][::-1], dims[front:][::-1])
        inside = slice(front, len(entries) - behind)
        result: list[Axis | Digit] = entries[:front]
        for factors, dims_inside in _regroup(self._flat_factors(entries[inside]), dims[front : len(dims) - behind]):
            result += self._distribute(factors, dims_inside)
        axes = iter(result + entries[len(entries) - behind :])
        return Shape(tuple(self.fresh(1) if size == 1 else next(axes) for size in sizes))

    def _flat_factors(self, entries: Sequence[Axis | Digit]) -> list[Factor]:
        factors: list[Factor] = []
        at = 0
        while at < len(entries):
            entry = entries[at]
            if isinstance(entry, Digit) and entry.block not in self._forced:
                rank = len(entry.block.sizes)
                run = entries[at : at + rank]
                if len(run) == rank and all(isinstance(e, Digit) and e.block is entry.block for e in run):
                    factors.append(_turned(entry.block, [e.position for e in run]))  # type: ignore[union-attr]
                    at += rank
                    continue
            factors += [factor for factor in self.alone(entry).factors if factor_size(factor) != 1]
            at += 1
        return factors

    def _distribute(self, factors: list[Factor], dims: list[int]) -> list[Axis | Digit]:
        """Axes of sizes ``dims`` for factors whose product they share."""
        if len(dims) == 1:
            return [Axis(tuple(factors))]
        axis = Axis(tuple(factors))
        if axis.opaque:
            return [self.opaque(size, factors[0].reason) for size in dims]  # type: ignore[union-attr]
        rows = self.rows(axis)
        if rows is not None:
            return self.digits(rows, tuple(dims))
        pieces = self._cut_at(factors, dims)
        if pieces is not None:
            return [entry for group, sizes in _regroup(pieces, dims) for entry in self._distribute(group, sizes)]
        reason = "a view across a merged axis too long to analyse"
        self.pin(axis, reason)
        return [self.opaque(size, reason) for size in dims]

    def _cut_at(self, factors: list[Factor], dims: list[int]) -> list[Factor] | None:
        """Factors cut wherever one of ``dims`` ends inside them (heads move into the batch), or None if none fits."""
        ends = [prod(dims[d:]) for d in range(1, len(dims))]
        pieces: list[Factor] = []
        stride = prod(map(factor_size, factors))
        for factor in factors:
            outer, stride = stride, stride // factor_size(factor)
            inside = [end for end in ends if stride < end < outer]
            if any(end % stride or outer % end for end in inside):
                return None
            bounds = [outer, *inside, stride]
            sizes = [a // b for a, b in pairwise(bounds)]
            if len(sizes) == 1:
                pieces.append(factor)
            elif isinstance(factor, Opaque):
                pieces += [Opaque(size, factor.reason) for size in sizes]
            else:
                pieces += [f for part in self.cut_axis(Axis((factor,)), *sizes) for f in part.factors]
        return None if len(pieces) == len(factors) else pieces

    def cut_axis(self, axis: Axis, *sizes: int) -> list[Axis]:
        """Factor one axis into independent axes of the given sizes."""
        view = self.view(Shape((axis,)), sizes)
        return [self.axis(view, d) for d in range(len(sizes))]

    def digits(self, rows: Rows, sizes: tuple[int, ...]) -> list[Axis | Digit]:
        """An axis cut into several, row-major: independent axes where it is a product already, else digits."""
        if len(sizes) == 1:
            return [Axis((rows,))]
        independent = self._independent(rows, sizes)
        if independent is not None:
            return list(independent)
        block = Block(rows, sizes)
        return [Digit(block, position) for position in range(len(sizes))]

    def permute(self, shape: Shape, order: Sequence[int]) -> Shape:
        origin = shape.origin or (None,) * len(shape.axes)
        return Shape(tuple(shape.axes[d] for d in order), tuple(origin[d] for d in order))

    def slice(self, shape: Shape, dim: int, index: Any) -> Shape:
        """Positions ``index`` (slice or integer array) of one axis."""
        return self._index(shape, dim, index)

    def select(self, shape: Shape, dim: int, index: int) -> Shape:
        """One position of an axis; the axis goes."""
        cut = self._index(shape, dim, slice(index, index + 1) if index != -1 else slice(-1, None))
        return Shape(tuple(axis for d, axis in enumerate(cut.axes) if d != dim))

    def _index(self, shape: Shape, dim: int, index: Any) -> Shape:
        entry = shape.axes[dim]
        axes = list(shape.axes)
        if isinstance(entry, Axis):
            axes[dim] = self.take(entry, index)
            return Shape(tuple(axes))
        where = [d for d, e in enumerate(axes) if isinstance(e, Digit) and e.block is entry.block]
        whole = entry.block.labels
        labels = whole[(slice(None),) * entry.position + (index,)]
        if labels.shape == whole.shape and (labels == whole).all():
            return shape
        flat = self.cut(labels.reshape(-1, labels.shape[-1]))
        kept = [p for p in range(labels.ndim - 1) if labels.shape[p] != 1]
        entries = iter(self.digits(flat, tuple(labels.shape[p] for p in kept)) if kept else ())
        new = {p: next(entries) if p in kept else self.fresh(1) for p in range(labels.ndim - 1)}
        for d in where:
            axes[d] = new[shape.axes[d].position]  # type: ignore[union-attr]
        return Shape(tuple(axes))

    def broadcast_together(self, shapes: Sequence[Shape]) -> Shape:
        """The same to the shape that they have together."""
        rank = max(len(shape.axes) for shape in shapes)
        padded = [[1] * (rank - len(shape.axes)) + list(shape.sizes) for shape in shapes]
        return self.broadcast(shapes, [max(sizes) for sizes in zip(*padded)])

    def broadcast(self, shapes: Sequence[Shape], sizes: Sequence[int]) -> Shape:
        """The shape of an elementwise result: operands' axes tied wherever they are not broadcast."""
        rank = len(sizes)
        grids = [self._pad(shape, sizes) for shape in shapes]
        blocks = {_block_dims(grid, d) for grid in grids for d in range(rank) if isinstance(grid[d], Digit)}
        for dims in blocks:
            whole = all(all(g[d] is None for d in dims) or _block_dims(g, dims[0]) == dims for g in grids)
            digits = [e for g in grids for d in dims if isinstance(e := g[d], Digit)]
            complete = all(len(dims) == len(digit.block.sizes) for digit in digits)
            if not (whole and complete):
                grids = [self._all_forced(grid) for grid in grids]
                break
        result: list[Axis | Digit] = []
        for d in range(rank):
            entries = [grid[d] for grid in grids if grid[d] is not None]
            result.append(self._tied(entries, d, grids) if entries else self.fresh(sizes[d]))
        return Shape(tuple(result))

    def _pad(self, shape: Shape, sizes: Sequence[int]) -> list[Axis | Digit | None]:
        """Axes aligned to the right of the result's; None where the operand is broadcast."""
        missing = len(sizes) - len(shape.axes)
        axes: list[Axis | Digit | None] = [None] * missing + list(shape.axes)
        return [None if a is None or (a.size == 1 and size != 1) else a for a, size in zip(axes, sizes)]

    def _all_forced(self, grid: list[Axis | Digit | None]) -> list[Axis | Digit | None]:
        return [self.force(e.block)[e.position] if isinstance(e, Digit) else e for e in grid]

    def _tied(self, entries: list[Any], dim: int, grids: list[list[Any]]) -> Axis | Digit:
        first = entries[0]
        for entry in entries[1:]:
            if isinstance(first, Axis) and isinstance(entry, Axis):
                first = self.tie(first, entry)
            elif first.position == 0:  # whole blocks, tied once
                a, b = (_turned(x.block, _block_order(grids, x)) for x in (first, entry))
                self.leaves.unify(a, b)
        return first


def _turned(block: Block, order: Sequence[int]) -> Rows:
    """The labels of a block with its axes in another order."""
    if list(order) == sorted(order):
        return block.flat
    return block.labels.transpose(*order, len(order)).reshape(-1, block.flat.shape[1])


def _unchanged(entries: Sequence[Axis | Digit], sizes: Sequence[int]) -> int:
    """How many axes in front a view leaves as they are."""
    count = 0
    for entry, size in zip(entries, sizes):
        if isinstance(entry, Digit) or entry.size != size:
            break
        count += 1
    return count


def _block_dims(grid: Sequence[Any], dim: int) -> tuple[int, ...]:
    """The axes of a tensor that belong to the same block as axis ``dim``."""
    entry = grid[dim]
    if not isinstance(entry, Digit):
        return ()
    return tuple(d for d, e in enumerate(grid) if isinstance(e, Digit) and e.block is entry.block)


def _block_order(grids: list[list[Any]], digit: Digit) -> list[int]:
    """Positions of a block's digits in the order of the tensor's axes."""
    grid = next(g for g in grids if any(e is digit for e in g))
    return [e.position for e in grid if isinstance(e, Digit) and e.block is digit.block]


def _regroup(factors: list[Factor], sizes: list[int]) -> list[tuple[list[Factor], list[int]]]:
    """Smallest groups of consecutive factors and axes with equal products; opaque factors are cut to fit."""
    factors, sizes = list(factors), list(sizes)
    groups: list[tuple[list[Factor], list[int]]] = []
    while factors or sizes:
        group, dims = [factors.pop(0)], [sizes.pop(0)]
        while (have := prod(map(factor_size, group))) != (want := prod(dims)):
            rest = _cut_opaque(group, have, want)
            if rest is not None:
                factors.insert(0, rest)
            elif have < want:
                group.append(factors.pop(0))
            else:
                dims.append(sizes.pop(0))
        groups.append((group, dims))
    return groups


def _cut_opaque(group: list[Factor], have: int, want: int) -> Opaque | None:
    """Shorten the group's last factor, if it is opaque and longer than wanted, and return what is left of it."""
    last = group[-1]
    if not isinstance(last, Opaque) or have < want:
        return None
    before = have // last.size
    if want % before or last.size % (want // before) or want // before == 1:
        return None
    size = want // before
    group[-1] = Opaque(size, last.reason)
    return Opaque(last.size // size, last.reason)
