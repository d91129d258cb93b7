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
    composed = {}
    for group in symmetry.moving:
        if group.index not in then and group.parent not in then:
            unmoved = first.get(group.index, Element())
            if unmoved.index is not None or unmoved.matrix is not None or unmoved.scales:
                composed[group.index] = unmoved
            continue
        before, after = _carried(group, first.get(group.index, Element()), then), then.get(group.index, Element())
        matrix = _product(after.matrix, before.matrix)
        scales = {s: _times(before.scales.get(s), after.scales.get(s)) for s in {**before.scales, **after.scales}}
        if group.index in moved or matrix is not None or scales:
            composed[group.index] = Element(moved.get(group.index), matrix, scales)
    return composed


def inverse(symmetry: Symmetry, element: Elements) -> dict[int, Element]:
    """The element that undoes another: (D P)⁻¹ = (P⁻¹ D⁻¹ P) P⁻¹."""
    back = inverse_permutations(symmetry.groups, permutations_of(element))
    undone = {
        index: Element(
            None,
            None if inverted.matrix is None else np.linalg.inv(inverted.matrix),
            {side: 1 / scale for side, scale in inverted.scales.items()},
        )
        for index, inverted in element.items()
    }
    return compose(symmetry, undone, permuted(back))


def _carried(group: Group, element: Element, by: Elements) -> Element:
    """P D P⁻¹ for the maps D of one group and the permutations P of an element."""
    index = by.get(group.index, Element()).index
    blocks = None if group.parent is None else by.get(group.parent, Element()).index
    matrix, scales = element.matrix, dict(element.scales)
    if blocks is not None:
        matrix = matrix[blocks] if matrix is not None and matrix.ndim > 2 else matrix
        scales = {side: scale[blocks] if scale.ndim > 1 else scale for side, scale in scales.items()}
    if index is not None:
        assert matrix is None or (index == np.arange(group.size)).all(), "a map that mixes channels is not permuted too"
        scales = {side: _ordered(scale, index) for side, scale in scales.items()}
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
