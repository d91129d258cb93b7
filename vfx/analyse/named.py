"""Positions that each belong to one position of another axis: rows that were sent to experts.

Rows sorted by the numbers of their experts, and what was looked up by such numbers, have axes that no group moves, yet
each of their positions names an expert. What stands beside them may be ordered differently for each expert, as if the
experts' own axis were there (``vfx.analyse.blocks``). The axes that name a position together are the *parts* of a
naming. A part stands on an axis like a leaf, under a number below zero, for as long as operators leave the positions of
the axis where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from vfx.analyse.axis import Axis, Opaque, factor_size
from vfx.analyse.meaning import Meaning
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.shapes import Digit, Shape
from vfx.operators import operator_of

# kinds of ties whose results have the positions of their operands' axes in place, wherever they have the axis
_IN_PLACE = {"view", "permute", "transpose", "unsqueeze", "squeeze", "expand", "slice", "narrow", "split", "select"}
_IN_PLACE |= {"elementwise", "same", "reduction", "softmax", "layer norm", "gated linear"}
_IN_PLACE |= {"linear", "product", "product and sum", "einsum", "grouped product"}


def axes_by_number(t: ProgramTerms, numbers: Shape, meaning: Meaning) -> tuple[Axis | Digit, ...]:
    """The axes of numbers, which say for each position of what is looked up by them where it comes from.

    They stay as they are where something moves them, or where they have an order that says so already.
    """
    wide = [axis for axis in numbers.axes if axis.size > 1]
    if any(not isinstance(axis, Axis) or not axis.opaque or axis.order is not None for axis in wide):
        return numbers.axes
    factors = [tuple(f for f in axis.factors if factor_size(f) > 1) for axis in wide]  # type: ignore[union-attr]
    flat = [factor for line in factors for factor in line]
    if not wide or len(set(map(id, flat))) < len(flat):  # one axis twice: its positions could change places unseen
        return numbers.axes
    parts = iter(t.naming(meaning.axis, (meaning.source, *factors), len(wide)))
    return tuple(
        axis if axis.size == 1 else Axis((Opaque(axis.size, "looked up by number", part=next(parts)),))
        for axis in numbers.axes
    )


def part_of(axis: Axis | Digit) -> int:
    """The part of a naming that an entry of a shape is; 0 where it is none."""
    return axis.part if isinstance(axis, Axis) else 0


def in_place(t: ProgramTerms, node: fx.Node, result: Any) -> Any:
    """The result of an operator, whose axes name nothing unless their positions have stayed where they were."""
    ties = operator_of(node).ties
    if not t.namings or ties in _IN_PLACE:
        return result
    if ties == "index" and not _names(t.shapes.get(node.args[0])):  # type: ignore[arg-type]
        return result  # in the places of its index
    shapes = [_nameless(tensor) for tensor in (result if isinstance(result, list) else [result])]
    return shapes if isinstance(result, list) else shapes[0]


def _names(shape: Any) -> bool:
    axes = shape.axes if isinstance(shape, Shape) else ()
    return any(isinstance(f, Opaque) and f.part for axis in axes if isinstance(axis, Axis) for f in axis.factors)


def _nameless(shape: Any) -> Any:
    if not _names(shape):
        return shape
    bare = [
        Axis(tuple(replace(f, part=0) if isinstance(f, Opaque) else f for f in axis.factors))
        if isinstance(axis, Axis) and axis.opaque
        else axis
        for axis in shape.axes
    ]
    return replace(shape, axes=tuple(bare))


@dataclass(frozen=True)
class Namings:
    """The namings of a finished inference: the leaf that each names, and its parts."""

    known: Sequence[tuple[int, frozenset[int]]]

    @classmethod
    def of(cls, t: ProgramTerms) -> Namings:
        return cls(tuple(_leaf_and_parts(t)))

    def completed(self, standing: frozenset[int], present: Collection[int]) -> frozenset[int]:
        """Leaves and parts that stand beside something on a tensor, with the leaves that the parts name.

        A leaf that is ``present`` itself or named twice could mean two positions: it is left out.
        """
        named = [leaf for leaf, parts in self.known if parts <= standing]
        once = {leaf for leaf in named if named.count(leaf) == 1 and leaf not in present}
        return (standing - frozenset(named)) | once if named else standing

    def named(self, together: Collection[int], tensors: Sequence[Collection[int]]) -> Iterator[int]:
        """The leaves whose naming an operator keeps ``together`` with something, and which all ``tensors`` have."""
        for leaf, parts in self.known:
            if parts <= set(together) and all(parts <= set(letters) for letters in tensors):
                yield leaf


def _leaf_and_parts(t: ProgramTerms) -> Iterator[tuple[int, frozenset[int]]]:
    for axis, parts in t.namings.values():
        rows = None if axis.opaque else t.rows(axis)
        rows = rows if rows is None else t.leaves.resolve(rows)
        if rows is not None and t.leaves.is_leaf(rows):
            yield t.leaves.free_leaves(rows)[0], frozenset(parts)
