"""Axis terms: one axis is a product of factors, in row-major order.

A factor is an array of labels (``vfx.analyse.axes``) or an ``Opaque`` range of positions that never move (batch,
pixels). A *blank* axis is free and of one factor, which is made when it is first read; an axis that is tied to another
before that becomes the other one, so that most parameters never need labels of their own. A *pending* axis has its
factors made when they are first read, too, but it is known already what they will be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from vfx.analyse.store import Rows


@dataclass(frozen=True, eq=False)
class Opaque:
    """A range of positions that never move, not written out (it may be as long as the batch)."""

    size: int
    reason: str
    order: Any = None  # what the order of the positions depends on (``vfx.analyse.routed``)
    part: int = 0  # of a naming of other positions (``vfx.analyse.named``)


Factor = Opaque | Rows


def factor_size(factor: Factor) -> int:
    return factor.size if isinstance(factor, Opaque) else len(factor)


class Axis:
    """One axis of a tensor; ``written`` holds its labels once its product is written out."""

    __slots__ = ("_factors", "_make", "_opaque", "_pending", "_twin", "size", "written")

    def __init__(self, factors: tuple[Factor, ...]):
        self._factors: tuple[Factor, ...] | None = factors
        self._twin: Axis | None = None
        self.size = prod(map(factor_size, factors))
        self._opaque = all(isinstance(factor, Opaque) for factor in factors)
        self._make: Callable[[int], tuple[Factor, ...]] | None = None
        self._pending = False
        self.written: Rows | None = None

    @classmethod
    def blank(cls, size: int, make: Callable[[int], tuple[Factor, ...]]) -> Axis:
        """A free axis; ``make(size)`` gives its factors."""
        axis = cls.__new__(cls)
        axis._factors, axis._twin, axis.size, axis._opaque, axis._make = None, None, size, False, make
        axis.written, axis._pending = None, False
        return axis

    @classmethod
    def pending(cls, size: int, make: Callable[[int], tuple[Factor, ...]]) -> Axis:
        """An axis that is made when it is read."""
        axis = cls.blank(size, make)
        axis._pending = True
        return axis

    @property
    def root(self) -> Axis:
        """The axis that this one has become."""
        axis = self
        while axis._twin is not None:
            axis = axis._twin
        if axis is not self:
            self._twin = axis
        return axis

    @property
    def is_blank(self) -> bool:
        """Whether nothing is known of this axis yet."""
        root = self.root
        return root._factors is None and not root._pending

    @property
    def opaque(self) -> bool:
        """Whether every factor is."""
        return self.root._opaque

    @property
    def order(self) -> Any:
        """What the order of its positions depends on, if anything."""
        factors = self.root._factors or ()
        return next((factor.order for factor in factors if isinstance(factor, Opaque) and factor.order), None)

    @property
    def part(self) -> int:
        """The part of a naming that it is; 0 where it is none, or a product of several axes."""
        wide = [factor for factor in self.root._factors or () if factor_size(factor) > 1]
        return wide[0].part if len(wide) == 1 and isinstance(wide[0], Opaque) else 0

    @property
    def factors(self) -> tuple[Factor, ...]:
        root = self.root
        if root._factors is None:
            assert root._make is not None
            root.become(Axis(root._make(root.size)))
        return root.root._factors  # type: ignore[return-value]

    def become(self, other: Axis) -> None:
        """Stand for another axis of the same size from now on; only for a blank axis."""
        root, other = self.root, other.root
        assert root._factors is None
        assert root.size == other.size
        if root is not other:
            root._twin = other
