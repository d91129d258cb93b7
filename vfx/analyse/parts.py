"""Parts of an axis that may yet be put together again.

Channels that are used apart are permuted apart: labels cut out of an axis are closed (``Leaves.close``). But where the
same is done to all parts, position by position, and a concatenation then puts them side by side, in any order, the
result is the axis as it was in another order, and its channels still move together. So a cut leaves its part open and
notes the value that it was cut from and what was done to it since; the part is closed as soon as an operator reads it
that does more than that, or a concatenation puts it beside anything else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import fx

from vfx.analyse.axes import unique_labels
from vfx.analyse.axis import Axis, Factor, factor_size
from vfx.analyse.shapes import Algebra, Shape
from vfx.operators import is_in_place, operator_of


class CutPart(NamedTuple):
    """Labels as they were cut, the value they were cut from, and the operators that have acted on them since."""

    factors: tuple[Factor, ...]
    source: fx.Node
    done: tuple[str, ...] = ()


class Parts:
    """The open parts among the axes of an algebra's shapes: ``held``, by axis."""

    def __init__(self, algebra: Algebra) -> None:
        self.algebra = algebra
        self.held: dict[Axis, CutPart] = {}

    def cut(self, source: fx.Node, shape: Shape, dim: int, index: slice) -> Shape:
        """A slice of one axis of a value, left open; where it is empty nothing is said of any axis."""
        entry = shape.axes[dim]
        places = range(entry.size)[index]
        if not places:
            sizes = (*shape.sizes[:dim], 0, *shape.sizes[dim + 1 :])
            return Shape(tuple(self.algebra.opaque(size, "an empty tensor") for size in sizes))
        if not isinstance(entry, Axis) or entry.opaque or len(places) == entry.size:
            return self.algebra.slice(shape, dim, index)
        cut = self.held.get(entry)
        factors = self._some(cut.factors if cut else entry.factors, places)
        if factors is None:
            return self.algebra.slice(shape, dim, index)
        axis = self._open(len(places), cut._replace(factors=factors) if cut else CutPart(factors, _value(source)))
        return Shape((*shape.axes[:dim], axis, *shape.axes[dim + 1 :]))

    def _some(self, factors: tuple[Factor, ...], places: range) -> tuple[Factor, ...] | None:
        """The labels at some places; whole runs of the inner factors leave a product as it is."""
        first, *others = factors
        inner = int(np.prod([factor_size(factor) for factor in others], dtype=object))
        if isinstance(first, np.ndarray) and places.step == 1 and not (places.start % inner or places.stop % inner):
            return (first[places.start // inner : places.stop // inner], *others)
        rows = self.algebra.rows(Axis(factors))
        return None if rows is None else (rows[places.start : places.stop : places.step],)

    def _open(self, size: int, part: CutPart) -> Axis:
        axis = Axis.pending(size, lambda _: self._closed(part.factors))
        self.held[axis] = part
        return axis

    def _closed(self, factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
        first, *others = factors
        assert isinstance(first, np.ndarray)
        return factors if self.algebra.settled else (self.algebra.cut(first), *others)

    def close(self, axis: Axis) -> None:
        """Give up putting a part together with others."""
        if self.held.pop(axis, None) is not None:
            assert axis.factors

    def together(self, axes: list[Any]) -> Axis | None:
        """Parts of one value side by side: an axis, or a larger part; None where they are not."""
        parts = [self.held.get(axis) for axis in axes]
        first, written = parts[0], []
        for part in parts:
            if part is None or first is None or (part.source, part.done) != (first.source, first.done):
                return None
            written.append(self.algebra.rows(Axis(part.factors)))
        if any(rows is None for rows in written) or len({rows.shape[1] for rows in written if rows is not None}) > 1:
            return None
        joined = np.concatenate([rows for rows in written if rows is not None])
        if not unique_labels(self.algebra.leaves.resolve(joined)):
            return None
        assert first is not None
        return self._open(len(joined), first._replace(factors=(joined,)))

    # operators ------------------------------------------------------------------------------------------------------

    def opened(self, node: fx.Node, shapes: list[Shape], keeps: bool) -> set[Axis]:
        """The parts among an operator's operands; closed unless it ``keeps`` them."""
        opened = dict.fromkeys(axis for shape in shapes for axis in shape.axes if axis in self.held)
        if keeps:
            return set(opened)  # type: ignore[arg-type]
        for axis in opened:  # in order: the numbers of groups depend on it
            self.close(axis)  # type: ignore[arg-type]
        return set()

    def carried(self, node: fx.Node, parts: set[Axis], result: Any, number: int = 0) -> Any:
        """The result's shapes, in which the parts that an operator has let through note what it did."""
        if isinstance(result, list):
            return [self.carried(node, parts, shape, index) for index, shape in enumerate(result)]
        if not isinstance(result, Shape) or not any(axis in parts for axis in result.axes):
            return result
        done = f"{node.target} {fx.node.map_arg((node.args, node.kwargs), lambda _: None)} {number}"
        return replace(result, axes=tuple(self._after(axis, done) if axis in parts else axis for axis in result.axes))

    def _after(self, axis: Any, done: str) -> Axis:
        part = self.held[axis]
        return self._open(axis.size, part._replace(done=(*part.done, done)))


def keeps_parts(node: fx.Node) -> bool:
    """Whether a call does the same at every position of an axis, and reads one value alone."""
    return operator_of(node).keeps_parts and len(node.all_input_nodes) == 1 and not is_in_place(node)


def _value(node: fx.Node) -> fx.Node:
    """The value that slices of everything leave as it is."""
    while operator_of(node).ties == "slice" and node.meta["val"] == node.args[0].meta["val"]:  # type: ignore[union-attr]
        node = node.args[0]  # type: ignore[assignment]
    return node
