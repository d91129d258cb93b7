"""Layout: where each position of each axis of a resized network comes from.

A position stays if every slot that its label names stays; positions keep their order. A slot that stands n times (a
group that grows) repeats the run of positions around it n times, so that C·H·W grows by whole maps and heads × dim by
whole heads. ``line`` gives old positions and, for each digit, the rank of the channel among the new ones.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import sympy
from torch import fx

from vfx.analyse.axis import Axis, Opaque, factor_size
from vfx.analyse.meaning import ENDS
from vfx.analyse.places import Index
from vfx.analyse.rows import distinct
from vfx.analyse.shapes import Block, Digit, Shape
from vfx.analyse.store import Rows
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.terms import MAX_ENUMERATED
from vfx.elements.axes import Line
from vfx.errors import PassError
from vfx.program import BATCH, Value


class Layout:
    """Sizes and positions of every axis, given how often each slot stands (``RemovalUnits.multiplicity``)."""

    def __init__(self, facts: Symmetry, times: Index):
        self.facts, self.times = facts, times
        self.leaves = facts.leaves
        self.shapes = facts.terms.shapes
        self._lines: dict[int, tuple[Rows, Line]] = {}
        self._blocks: dict[int, tuple[Block, list[Index]]] = {}
        self._before = np.concatenate([[0], np.cumsum(times[:-1])])

    # axes -----------------------------------------------------------------------------------------------------------

    def line(self, rows: Rows) -> Line:
        """New positions of labels written out; the array is kept, so that its id stays its own."""
        if id(rows) not in self._lines:
            self._lines[id(rows)] = rows, self._line(self.leaves.resolve(rows))
        return self._lines[id(rows)][1]

    def _line(self, labels: Rows) -> Line:
        digits = labels[:, 1:]
        times = self.times[digits]
        position = np.flatnonzero((times > 0).all(axis=1))
        clone = np.zeros((len(position), digits.shape[1]), np.int64)
        for element in np.unique(digits[times > 1]).tolist():
            position, clone = _repeated(position, clone, digits, element, int(self.times[element]))
        rank = self._before[digits[position]] - self._before[self._starts(digits[position])] + clone
        return Line(position, np.where(digits[position] >= 0, rank, -1))

    def _starts(self, digits: Index) -> Index:
        """First element of each digit's leaf."""
        leaves = self.leaves.leaf_of(digits)
        return np.array([*self.leaves.starts, 0])[leaves]  # the last entry answers for "none" (-1)

    def size(self, entry: Axis | Digit) -> int:
        """New size of an axis."""
        if isinstance(entry, Digit):
            return len(self._cut(entry.block)[entry.position])
        return prod(f.size if isinstance(f, Opaque) else len(self.line(f).position) for f in entry.factors)

    def positions(self, entry: Axis | Digit, batch: int = BATCH) -> Index:
        """Old position of each new position of an axis. Raises PassError for an axis too long to write out."""
        if isinstance(entry, Digit):
            return self._cut(entry.block)[entry.position]
        sizes = [factor_size(factor) for factor in entry.factors]
        lengths = [size if size < BATCH else size // BATCH * batch for size in sizes]
        if prod(lengths) > MAX_ENUMERATED:
            raise PassError("an axis too long to write out is cut at positions that move")
        places = np.zeros(1, np.int64)
        for factor, length in zip(entry.factors, lengths):
            position = np.arange(length) if isinstance(factor, Opaque) else self.line(factor).position
            places = (places[:, None] * length + position).reshape(-1)
        return places

    def changed(self, entry: Axis | Digit) -> bool:
        """Whether an axis loses or gains positions."""
        return self.size(entry) != entry.size or self._moved(entry)

    def _moved(self, entry: Axis | Digit) -> bool:
        """An axis of the same size may still lose some positions and gain others."""
        if isinstance(entry, Digit):
            return not np.array_equal(self._cut(entry.block)[entry.position], np.arange(entry.size))
        lines = (self.line(f).position for f in entry.factors if not isinstance(f, Opaque))
        return any(not np.array_equal(line, np.arange(len(line))) for line in lines)

    # views ----------------------------------------------------------------------------------------------------------

    def _cut(self, block: Block) -> list[Index]:
        """Old position of each new position along each axis of a view. Raises PassError where no box is left."""
        if id(block) not in self._blocks:
            self._blocks[id(block)] = block, self._box(block)
        return self._blocks[id(block)][1]

    def _box(self, block: Block) -> list[Index]:
        sizes = block.sizes
        labels = self.leaves.resolve(block.flat).reshape(*sizes, -1)
        times = self.times[labels[..., 1:]].prod(axis=-1)
        least = int(times[times > 0].min())
        kept = np.unravel_index(int((times == least).argmax()), sizes)
        lines, product = [], np.ones(sizes, np.int64)
        for dim in range(len(sizes)):
            at: Any = (*kept[:dim], slice(None), *kept[dim + 1 :])
            lines.append(self._line(_varying(labels[at])).position)
            product = product * times[at].reshape([-1 if d == dim else 1 for d in range(len(sizes))])
        if not (product == times * least ** (len(sizes) - 1)).all():
            names = self._standing(labels)
            raise PassError(f"a view with axes {sizes} would be left ragged: {names} stand side by side")
        return lines

    def _standing(self, labels: Rows) -> str:
        groups = {
            self.facts.group_of[leaf]
            for leaf in distinct(self.leaves.leaf_of(labels[..., 1:]))
            if leaf in self.facts.group_of
        }
        return ", ".join(self.facts.groups[g].name for g in sorted(groups))

    # values ---------------------------------------------------------------------------------------------------------

    def shape(self, node: Any) -> Shape | None:
        """Axis terms of a node's value, where it is a tensor."""
        shape = self.shapes.get(node) if isinstance(node, fx.Node) else None
        return shape if isinstance(shape, Shape) else None

    def value(self, value: Any, shape: Any) -> Any:
        """A node's new meta value: shapes with their new sizes, the batch symbol kept."""
        if isinstance(value, (list, tuple)):
            shapes = shape if isinstance(shape, (list, tuple)) else [None] * len(value)
            return [self.value(v, s) for v, s in zip(value, shapes)]
        if not isinstance(value, Value) or not isinstance(shape, Shape):
            return value
        axes = (shape.meaning.axis,) if shape.meaning is not None and shape.meaning.kind == ENDS else shape.axes
        return Value(tuple(self._scaled(s, entry) for s, entry in zip(value.shape, axes)), value.dtype)

    def _scaled(self, size: Any, entry: Axis | Digit) -> Any:
        new, old = self.size(entry), entry.size
        if new == old:
            return size
        return new if isinstance(size, int) else size * sympy.Rational(new, old)

    def sizes(self, node: fx.Node, batch: int = BATCH) -> tuple[int, ...]:
        """New shape of a node's value."""
        value = self.value(node.meta["val"], self.shapes.get(node))
        return value.sizes(batch) if isinstance(value, Value) else ()


def _varying(line: Rows) -> Rows:
    """Labels along one axis of a view without the digits that stay the same: they do not grow here."""
    return np.where((line == line[:1]).all(axis=0) & (np.arange(line.shape[1]) > 0), -1, line)


def _repeated(position: Index, clone: Index, digits: Rows, element: int, times: int) -> tuple[Index, Index]:
    """Every run of positions with one slot, ``times`` times in a row; ``clone`` counts the copies in its column."""
    hit = (digits[position] == element).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], hit, [False]]).astype(np.int8)))
    pieces, number, start = [], [], 0
    for low, high in edges.reshape(-1, 2).tolist():
        pieces += [np.arange(start, low), np.tile(np.arange(low, high), times)]
        number += [np.zeros(low - start, np.int64), np.repeat(np.arange(times), high - low)]
        start = high
    order = np.concatenate([*pieces, np.arange(start, len(position))])
    counts = np.concatenate([*number, np.zeros(len(position) - start, np.int64)])
    clone = clone[order]
    column = digits[position[order]] == element
    clone += column * counts[:, None]
    return position[order], clone
