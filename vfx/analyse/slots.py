"""Slots: where leaves stand, which slots carry the same map or dual ones, and what their scales must obey.

A union-find forest with a parity on each edge: slots of one tree carry T (parity 0) or T⁻ᵀ (parity 1) for one T, the
map of the tree's *side*. Sides of one leaf that are tied by products alone share its permutation; the logarithms of
their scales obey linear equations over ℚ, their signs the same equations modulo 2, one for each product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from vfx.analyse.classes import Maps

Vector = dict[int, Fraction]  # by side, or by free scale


class Lowering(NamedTuple):
    """A node allows no more than ``maps``."""

    maps: Maps
    node: str


class Product(NamedTuple):
    """Σ exponent · log(scale of slot) = 0; signs obey it too unless ``signs`` is False."""

    terms: tuple[tuple[int, Fraction], ...]
    signs: bool
    node: str


@dataclass
class Scales:
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
    _maps: list[Maps] = field(default_factory=list)  # of roots

    def fresh(self, leaf: int) -> int:
        """A new slot, free of everything."""
        slot = len(self.leaf)
        self.leaf.append(leaf)
        self._parent.append(slot)
        self._dual.append(False)
        self._maps.append(Maps.LINEAR)
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
        return self._maps[side]

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
        self._maps[a] = Maps(self._maps[a] & self._maps[b])
        if b in self.lowered:
            self.lowered.setdefault(a, []).extend(self.lowered.pop(b))

    def lower(self, slot: int, maps: Maps) -> None:
        """A slot's map is of a class; a class and its duals are the same."""
        side = self.find(slot)[0]
        before = self._maps[side]
        if before & maps != before:
            self._maps[side] = Maps(before & maps)
            self.lowered.setdefault(side, []).append(Lowering(maps, self.context))

    def multiply(self, terms: Iterable[tuple[int, Fraction]], signs: bool = True) -> None:
        """The channels of some slots of one leaf, to these powers, multiply to one that no scale moves."""
        product = Product(tuple(terms), signs, self.context)
        for slot, exponent in product.terms:
            self.lower(slot, Maps.MONOMIAL if exponent.denominator == 1 else Maps.POSITIVE_MONOMIAL)
        self.products.setdefault(self.leaf[product.terms[0][0]], []).append(product)

    def solve(self, leaf: int, sides: Sequence[int], alike: Sequence[tuple[int, int]] = ()) -> Scales:
        """The scales of a leaf's sides, all monomial; those of ``alike`` sides, each with ±1, are powers of one."""
        return Scales(*(self._solved(leaf, sides, alike, signs) for signs in (False, True)))

    def _solved(
        self, leaf: int, sides: Sequence[int], alike: Sequence[tuple[int, int]], signs: bool
    ) -> dict[int, Vector]:
        bit = Maps.SIGNED if signs else Maps.POSITIVE_MONOMIAL
        moving = [side for side in sides if self._maps[side] & bit]
        equations = []
        for product in self.products.get(leaf, ()):
            if signs and not product.signs:
                continue
            row: Vector = {}
            for slot, exponent in product.terms:
                side, dual = self.find(slot)
                if self._maps[side] & bit:
                    row[side] = row.get(side, Fraction(0)) + (-exponent if dual and not signs else exponent)
            equations.append(row)
        for (first, one), (other, two) in pairwise(alike):
            row = {first: Fraction(one), other: Fraction(-two)}
            equations.append({side: c for side, c in row.items() if self._maps[side] & bit})
        return nullspace(moving, equations, 2 if signs else 0)


def nullspace(variables: Sequence[int], equations: Iterable[Vector], modulus: int = 0) -> dict[int, Vector]:
    """Each variable in terms of free ones, under equations Σ c x = 0 over ℚ (or modulo a prime).

    Variables that must be 0 have an empty vector; a free one is itself.
    """
    solved: dict[int, Vector] = {}  # variable -> what it equals
    for equation in equations:
        row = _reduced(equation, solved, modulus)
        if not row:
            continue
        pivot = max(row)  # the first slots of a leaf stay free
        own = row.pop(pivot)
        value = {x: _number(-c / own, modulus) for x, c in row.items()}
        solved = {x: _reduced(old, {pivot: value}, modulus) for x, old in solved.items()}
        solved[pivot] = value
    return {x: solved.get(x, {x: Fraction(1)}) for x in variables}


def _reduced(row: Vector, solved: Mapping[int, Vector], modulus: int) -> Vector:
    """A row with solved variables replaced."""
    result: Vector = {}
    for x, coefficient in row.items():
        for y, own in solved.get(x, {x: Fraction(1)}).items():
            result[y] = result.get(y, Fraction(0)) + coefficient * own
    numbers = ((x, _number(c, modulus)) for x, c in result.items())
    return {x: c for x, c in numbers if c}


def _number(value: Fraction, modulus: int) -> Fraction:
    return value % modulus if modulus else value
