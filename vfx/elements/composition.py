"""Elements of the full symmetry class composed and undone.

An element permutes and then goes through the maps behind: D P. With that (D₂ P₂)(D₁ P₁) = D₂ (P₂ D₁ P₂⁻¹) P₂ P₁.
"""

from __future__ import annotations

import numpy as np

from vfx.analyse.classes import Matrix
from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements.element import Element, Elements, permutations_of, permuted
from vfx.elements.permutations import compose_permutations, inverse_permutations


def compose(symmetry: Symmetry, first: Elements, then: Elements) -> dict[int, Element]:
    """The element that does ``first``, and ``then`` to its result."""
    moved = compose_permutations(symmetry.groups, permutations_of(first), permutations_of(then))
    found = {}
    for group in symmetry.moving:
        one, two = _carried(group, first.get(group.index, Element()), then), then.get(group.index, Element())
        if group.index in moved or one.matrix is not None or one.scales or two.matrix is not None or two.scales:
            matrix = _product(two.matrix, one.matrix)
            scales = {side: _times(one.scales.get(side), two.scales.get(side)) for side in {**one.scales, **two.scales}}
            found[group.index] = Element(moved.get(group.index), matrix, scales)
    return found


def inverse(symmetry: Symmetry, element: Elements) -> dict[int, Element]:
    """The element that undoes another: (D P)⁻¹ = (P⁻¹ D⁻¹ P) P⁻¹."""
    back = inverse_permutations(symmetry.groups, permutations_of(element))
    undone = {
        index: Element(
            None,
            None if own.matrix is None else np.linalg.inv(own.matrix),
            {side: 1 / scale for side, scale in own.scales.items()},
        )
        for index, own in element.items()
    }
    return compose(symmetry, undone, permuted(back))


def _carried(group: Group, element: Element, by: Elements) -> Element:
    """P D P⁻¹ for the maps D of one group and the permutations P of an element."""
    own = by.get(group.index, Element()).index
    blocks = None if group.parent is None else by.get(group.parent, Element()).index
    matrix, scales = element.matrix, dict(element.scales)
    if blocks is not None:
        matrix = matrix[blocks] if matrix is not None and matrix.ndim > 2 else matrix
        scales = {side: scale[blocks] if scale.ndim > 1 else scale for side, scale in scales.items()}
    if own is not None:
        assert matrix is None or (own == np.arange(group.size)).all(), "a map that mixes channels is not permuted too"
        scales = {side: _ordered(scale, own) for side, scale in scales.items()}
    return Element(None, matrix, scales)


def _ordered(scale: Matrix, permutation: Index) -> Matrix:
    """Scales (size,) or (blocks, size) in a new order, one for all blocks or one for each."""
    if permutation.ndim == 1:
        return scale[..., permutation]
    return np.take_along_axis(np.broadcast_to(scale, permutation.shape), permutation, axis=1)


def _product(left: Matrix | None, right: Matrix | None) -> Matrix | None:
    return (left if right is None else right) if left is None or right is None else left @ right


def _times(left: Matrix | None, right: Matrix | None) -> Matrix:
    assert left is not None or right is not None
    return left * right if left is not None and right is not None else left if right is None else right  # type: ignore
