"""Elements: what the channels of a group go through.

An element is made of an ``index`` (new channel j is old channel index[j]: a permutation, or a selection where widths
differ), of ``scales`` (with signs) behind it, one for each side of the group, or of a ``matrix`` T where channels are
mixed. What makes the feature becomes T W; along its axis a member that carries the dual map is multiplied by T⁻ᵀ
(``vfx.analyse.classes``), or by ``dual`` where a method has found another way back. In the blocks of another group
there is a map for each block, acting on what stands in the block after the blocks were permuted.
``vfx.elements.action`` does to tensors what an element says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.classes import SPREAD, Maps, Matrix, contains, contragredient, draw
from vfx.analyse.groups import Class, Group
from vfx.analyse.places import Index
from vfx.analyse.slots import Vector
from vfx.analyse.symmetry import Symmetry
from vfx.elements.permutations import Permutations, random_permutations, still_permutations
from vfx.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Element:
    """What the C channels of one group go through; inside blocks all arrays may have the blocks in front.

    ``index`` (n,): new channel j is old channel index[j]. ``scales`` {side: (n,)} stand behind it, sides left out
    having none. ``matrix`` (n, C) stands in its place where the feature is made and read; what acts channel by channel
    (gains, depthwise kernels) still follows ``index``. ``dual`` (n, C) is what reads the feature goes through, along
    its axis: T⁻ᵀ where it is left out, which keeps the function; any other only comes near it.
    """

    index: Index | None = None
    matrix: Matrix | None = None
    scales: Mapping[int, Matrix] = field(default_factory=dict)
    dual: Matrix | None = None

    @property
    def is_exact(self) -> bool:
        """Whether what reads the feature undoes what makes it, so that the function stays."""
        return self.dual is None

    @property
    def mixes(self) -> bool:
        return self.matrix is not None

    def contragredient(self) -> Matrix | None:
        """What members that carry the dual map are multiplied by along their axis; None without a matrix."""
        return contragredient(self.matrix) if self.dual is None and self.matrix is not None else self.dual

    def table(self, role: str, size: int) -> Matrix:
        """The whole map (n, C), with blocks in front, as a member of a role carries it; ``size`` is C.

        Of a selection it is the dual map that reads a channel which was taken several times as the mean of its copies.
        """
        if self.matrix is not None and role == "in":
            assert self.dual is not None, "the way back of a map between widths is given with it"
            return self.dual
        if self.matrix is not None and (role == "out" or self.index is None):
            return self.matrix
        assert self.index is not None
        chosen = np.asarray(self.index[..., None] == np.arange(size), float)
        return chosen / np.maximum(chosen.sum(-2, keepdims=True), 1) if role == "in" else chosen


Elements = Mapping[int, Element]  # by group index


def permuted(moved: Permutations) -> dict[int, Element]:
    """The element that permutes and does no more."""
    return {index: Element(order) for index, order in moved.items()}


def permutations_of(elements: Elements) -> dict[int, Index]:
    """What an element permutes."""
    return {index: element.index for index, element in elements.items() if element.index is not None}


def identity(symmetry: Symmetry) -> dict[int, Element]:
    """The element that moves nothing."""
    return permuted(still_permutations(symmetry.groups))


def exact_part(elements: Elements) -> dict[int, Element]:
    """What keeps the function: of maps that do not, the permutation nearest to them."""
    return {index: element if element.is_exact else Element(element.index) for index, element in elements.items()}


def behind_exact(elements: Elements) -> dict[int, Element]:
    """What is left of the maps that do not keep the function, once channels stand in the order of ``exact_part``."""
    return {
        index: Element(matrix=_columns(element.matrix, element.index), dual=_columns(element.dual, element.index))
        for index, element in elements.items()
        if element.matrix is not None and element.dual is not None
    }


def _columns(matrix: Matrix, index: Index | None) -> Matrix:
    if index is None:
        return matrix
    return np.take_along_axis(matrix, np.broadcast_to(index[..., None, :], matrix.shape), -1)


def undone(elements: Elements) -> dict[int, Element]:
    """The way back of maps that do not keep the function."""
    return {
        index: Element(matrix=element.dual.mT, dual=element.matrix.mT)
        for index, element in elements.items()
        if element.matrix is not None and element.dual is not None
    }


CLASSES = ("full", "permutation")


def random_element(symmetry: Symmetry, generator: np.random.Generator, classes: str = "full") -> dict[int, Element]:
    """A random element of every group's full class, or of its permutations.

    Raises ArgumentError for another name of classes.
    """
    check_classes(classes)
    moved = random_permutations(symmetry.groups, generator)
    if classes == "permutation":
        return permuted(moved)
    drawn = {}
    for group in symmetry.moving:
        group_class = symmetry.classes[group.index]
        if group_class.kind.mixes and group_class.scales is None:
            drawn[group.index] = Element(matrix=_matrices(group, group_class.kind, generator))
        else:
            drawn[group.index] = Element(moved[group.index], scales=_scales(group, group_class, generator))
    return drawn


def check_classes(classes: str) -> str:
    """The name of what is matched or drawn: "full" or "permutation"; raises ArgumentError for another."""
    if classes not in CLASSES:
        raise ArgumentError(f"classes is one of {', '.join(CLASSES)}, not {classes!r}")
    return classes


def _matrices(group: Group, kind: Maps, generator: np.random.Generator) -> Matrix:
    if group.parent is None:
        return draw(kind, group.size, generator)
    return np.stack([draw(kind, group.size, generator) for _ in range(group.outer)])


def _scales(group: Group, group_class: Class, generator: np.random.Generator) -> dict[int, Matrix]:
    """Free scales are drawn, the sides' follow."""
    if group_class.scales is None:
        return {}
    shape = group.shape
    free = {x for vector in group_class.scales.magnitudes.values() for x in vector}
    logs = {x: generator.uniform(-SPREAD, SPREAD, shape) for x in sorted(free)}
    free = {x for vector in group_class.scales.signs.values() for x in vector}
    signs = {x: generator.integers(0, 2, shape) for x in sorted(free)}
    sides = {
        side.index
        for side in group_class.sides
        if group_class.scales.magnitudes.get(side.index) or group_class.scales.signs.get(side.index)
    }
    log = {side: _sum(group_class.scales.magnitudes.get(side, {}), logs, shape) for side in sides}
    widest = max((np.abs(x).max() for x in log.values()), default=0.0)
    mild = min(1.0, 2 * SPREAD / widest) if widest else 1.0  # the equations are linear
    return {
        side: np.exp(mild * log[side]) * (-1.0) ** _sum(group_class.scales.signs.get(side, {}), signs, shape)
        for side in sides
    }


def _sum(vector: Vector, values: Mapping[int, NDArray[Any]], shape: tuple[int, ...]) -> Matrix:
    return sum((float(c) * values[x] for x, c in vector.items()), np.zeros(shape))


def check_elements(symmetry: Symmetry, elements: Elements) -> Elements:
    """The elements themselves; raises ArgumentError for a map that is not in its group's class."""
    for index, element in elements.items():
        _check(symmetry.group(index), symmetry.classes[index], element)
    return elements


def _check(group: Group, group_class: Class, element: Element) -> None:
    if element.matrix is not None:
        if group_class.scales is not None and not group_class.kind.mixes:
            raise ArgumentError(
                f"group {group.index} ({group.name}) takes {group_class.kind.title} maps ({group_class.reason}): "
                "give a permutation and scales, not a matrix"
            )
        if not contains(group_class.kind, element.matrix):
            raise ArgumentError(f"the matrix for group {group.index} ({group.name}) is not {group_class.kind.title}")
    if element.scales:
        _check_scales(group, group_class, element.scales)


def _check_scales(group: Group, group_class: Class, scales: Mapping[int, Matrix]) -> None:
    """They obey the equations of the sides: given by the free ones."""
    sides = {side.index for side in group_class.sides}
    if group_class.scales is None or not set(scales) <= sides:
        raise ArgumentError(
            f"group {group.index} ({group.name}) has no such sides: its scales stand on {sorted(sides)}"
        )
    for side in sides:
        vector, signs = group_class.scales.magnitudes.get(side, {}), group_class.scales.signs.get(side, {})
        expected: Matrix | float = 1.0
        for x, power in vector.items():
            expected = expected * np.abs(scales.get(x, np.ones(1))) ** float(power)
        for x in signs:
            expected = expected * np.sign(scales.get(x, np.ones(1)))
        if np.abs(scales.get(side, np.ones(1)) / expected - 1).max() > 1e-9:
            raise ArgumentError(
                f"the scales of group {group.index} ({group.name}) do not obey the equations of its sides: "
                f"side {side} must have the product of {dict(vector)}"
            )
