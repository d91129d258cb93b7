"""Planes of rotary embeddings (``vfx.analyse.rotary``): the turns that bring one network's to the other's.

With the channels of a plane as complex numbers x, of everything that carries z between balanced networks, the unit z
that maximises Re⟨x₀, z x₁⟩ is the phase of ⟨x₁, x₀⟩, and the maximum is its modulus.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.classes import turning
from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element
from vfx.elements.parts import stacked
from vfx.match.matcher import Gain
from vfx.program import Weights

Numbers = NDArray[np.complex128]


def products(symmetry: Symmetry, group: Group, target: Weights, other: Weights) -> Numbers:
    """⟨x₁, x₀⟩ of each plane (n, n, planes) for each pair of blocks, one of each network; dual members alike."""
    first, second = (_numbers(symmetry, group, weights) for weights in (target, other))
    return np.einsum("ifx,jfx->ijf", first, second.conj(), optimize=True)


def at_best(numbers: Numbers) -> Gain:
    """What turning gains over leaving planes as they are, for each pair of blocks (n, n)."""
    return (np.abs(numbers) - numbers.real).sum(-1)


def turned(numbers: Numbers) -> Element:
    """The best turns (blocks, planes) of pairs of blocks; planes without any product stay."""
    size = np.abs(numbers)
    matrix = turning(np.where(size > 0, numbers / np.where(size > 0, size, 1.0), 1.0))
    return Element(matrix=matrix)


def turns(symmetry: Symmetry, target: Weights, other: Weights) -> dict[int, Element]:
    """The turns of every rotation that bring ``other`` to ``target``, blocks being in the same order."""
    elements = {}
    for group in symmetry.rotations:
        numbers = products(symmetry, group, target, other)
        element = turned(numbers[np.arange(len(numbers)), np.arange(len(numbers))])
        assert element.matrix is not None
        elements[group.index] = element if group.parent is not None else Element(matrix=element.matrix[0])
    return elements


def _numbers(symmetry: Symmetry, group: Group, weights: Weights) -> Numbers:
    """(blocks, planes, everything that carries the map or its dual)."""
    sides = [stacked(symmetry, group, weights, dual) for dual in (False, True)]
    rows = [np.concatenate([side.numpy() for side in block], 1) for block in zip(*sides)]
    return np.stack([row[0::2] + 1j * row[1::2] for row in rows])
