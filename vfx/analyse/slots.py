"""Slots: where leaves stand, which slots carry the same map or dual ones, and what their scales must obey.

A union-find forest with a parity on each edge: slots of one tree carry T (parity 0) or T⁻ᵀ (parity 1) for one T, the
map of the tree's *side*. Sides of one leaf that are tied by products alone share its permutation; the logarithms of
their scales obey linear equations over ℚ, their signs the same equations modulo 2, one for each product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from vfx.analyse.classes import Maps

Vector = dict[int, int | Fraction]  # by side, or by free scale


_ALL = Maps.LINEAR.value


class Lowering(NamedTuple):
    """A node allows no more than ``maps``."""

    maps: Maps
    node: str


class Product(NamedTuple):
    """Σ exponent · log(scale of slot) = 0; signs obey it too unless ``signs`` is False."""

    terms: tuple[tuple[int, int | Fraction], ...]
    signs: bool
    node: str


@dataclass
class FreeScales:
    """What the equations of a leaf leave free: for each side its log-scale in terms of free ones, and so for signs."""

    magnitudes: Mapping[int, Vector]
    signs: Mapping[int, Vector]


@dataclass
class Slots:
    """Slots by number; ``leaf[slot]`` is the leaf that stands there."""

    leaf: list[int] = field(default_factory=list)
    context: str = ""
    lowered: dict[int, list[Lowering]] = field(default_factory=dict)  # by root
    products: dict[int, list[Product]] = field(default_factory=dict)  # by leaf
    _parent: list[int] = field(default_factory=list)
    _dual: list[bool] = field(default_factory=list)  # relative to the parent
    _maps: list[int] = field(default_factory=list)  # of roots

    def fresh(self, leaf: int) -> int:
        """A new slot, free of everything."""
        slot = len(self.leaf)
        self.leaf.append(leaf)
        self._parent.append(slot)
        self._dual.append(False)
        self._maps.append(_ALL)
        return slot

    def find(self, slot: int) -> tuple[int, bool]:
        """The side (its root) of a slot, and whether the slot carries the dual of the side's map."""
        path = []
        while self._parent[slot] != slot:
            path.append(slot)
            slot = self._parent[slot]
        dual = False
        for step in reversed(path):
            dual ^= self._dual[step]
            self._parent[step], self._dual[step] = slot, dual
        return slot, dual

    def maps(self, side: int) -> Maps:
        """What the operators on a side allow, its products' equations aside."""
        return Maps(self._maps[side])

    def tie(self, left: int, right: int, dual: bool = False) -> None:
        """Two slots carry the same map, or dual ones."""
        a, on_left = self.find(left)
        b, on_right = self.find(right)
        dual ^= on_left ^ on_right
        if a == b:
            if dual:
                self.lower(a, Maps.ORTHOGONAL)
            return
        self._parent[b], self._dual[b] = a, dual
        self._maps[a] &= self._maps[b]
        if b in self.lowered:
            self.lowered.setdefault(a, []).extend(self.lowered.pop(b))

    def lower(self, slot: int, maps: Maps) -> None:
        """A slot's map is of a class; a class and its duals are the same."""
        side = self.find(slot)[0]
        before, raised = self._maps[side], maps.value
        if before & raised != before:
            self._maps[side] = before & raised
            self.lowered.setdefault(side, []).append(Lowering(maps, self.context))

    def multiply(self, terms: Iterable[tuple[int, int | Fraction]], signs: bool = True) -> None:
        """The channels of some slots of one leaf, to these powers, multiply to one that no scale moves."""
        product = Product(tuple(terms), signs, self.context)
        for slot, exponent in product.terms:
            self.lower(slot, Maps.MONOMIAL if exponent.denominator == 1 else Maps.POSITIVE_MONOMIAL)
        self.products.setdefault(self.leaf[product.terms[0][0]], []).append(product)

    def solve(self, leaf: int, sides: Sequence[int]) -> FreeScales:
        """The scales of a leaf's sides, all monomial."""
        return FreeScales(self._solved(leaf, sides, False), self._solved(leaf, sides, True))

    def _solved(self, leaf: int, sides: Sequence[int], signs: bool) -> dict[int, Vector]:
        bit = (Maps.SIGNED if signs else Maps.POSITIVE_MONOMIAL).value
        moving = {side for side in sides if self._maps[side] & bit}
        equations = []
        for product in self.products.get(leaf, ()):
            if signs and not product.signs:
                continue
            row: Vector = {}
            for slot, exponent in product.terms:
                side, dual = self.find(slot)
                if side in moving:
                    row[side] = row.get(side, 0) + (-exponent if dual and not signs else exponent)
            equations.append(row)
        return nullspace(moving, equations, 2 if signs else 0)


def alike(scales: FreeScales, sides: Sequence[tuple[int, int]]) -> tuple[Vector, Vector]:
    """The log-scale and the sign that some sides, each to the power ±1, may have in common."""
    return _common(scales.magnitudes, sides, 0), _common(scales.signs, [(side, 1) for side, _ in sides], 2)


def _common(vectors: Mapping[int, Vector], sides: Sequence[tuple[int, int]], modulus: int) -> Vector:
    rows = [{x: sign * c for x, c in vectors.get(side, {}).items()} for side, sign in sides]
    equations = ({x: row.get(x, 0) - rows[0].get(x, 0) for x in {**row, **rows[0]}} for row in rows[1:])
    free = {x for row in rows for x in row}
    return _reduced(rows[0], nullspace(free, equations, modulus), modulus) if rows else {}


def nullspace(variables: Iterable[int], equations: Iterable[Vector], modulus: int = 0) -> dict[int, Vector]:
    """Each variable in terms of free ones, under equations Σ c x = 0 over ℚ (or modulo a prime).

    Variables that must be 0 have an empty vector; a free one is itself.
    """
    solved: dict[int, Vector] = {}  # variable -> what it equals, maybe in terms of others that were solved later
    for equation in equations:
        row = _expanded(equation, solved, modulus)
        if row:
            pivot = max(row)  # the first slots of a leaf stay free
            coefficient = row.pop(pivot)
            solved[pivot] = {x: _number(Fraction(-c) / coefficient, modulus) for x, c in row.items()}
    return {x: _expanded({x: 1}, solved, modulus) for x in sorted(variables)}


def _expanded(row: Vector, solved: Mapping[int, Vector], modulus: int) -> Vector:
    """A row with solved variables replaced until none is left."""
    row = {x: c for x, c in ((x, _number(c, modulus)) for x, c in row.items()) if c}
    while any(x in solved for x in row):
        row = _reduced(row, solved, modulus)
    return row


def _reduced(row: Vector, solved: Mapping[int, Vector], modulus: int) -> Vector:
    """A row with solved variables replaced once."""
    result: Vector = {}
    for x, coefficient in row.items():
        for y, replacement in solved[x].items() if x in solved else ((x, 1),):
            result[y] = result.get(y, 0) + coefficient * replacement
    return {x: c for x, c in ((x, _number(c, modulus)) for x, c in result.items()) if c}


def _number(value: int | Fraction, modulus: int) -> int | Fraction:
    """An int where it is one."""
    if modulus:
        return int(value) % modulus
    return value.numerator if value.denominator == 1 else value
