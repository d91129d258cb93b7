"""The lattice of symmetry classes: how large a family of maps the channels of a group may go through.

A permutation is not all that a network lets pass. The n channels of a leaf may go through any invertible T that every
operator on the way commutes with; the layer that makes the feature becomes T W, a layer that reads it W T⁻¹ (seen along
its axis, T⁻ᵀ). *Generalized Linear Mode Connectivity for Transformers* (Theus et al., NeurIPS 2025) has four such
families, worked out by hand; here they form a lattice, ordered by inclusion::

                     linear
                   /        \\
            monomial      orthogonal
           /        \\      /        \\
    positive         signed      orthogonal, 1 fixed
    monomial        permutation       /
           \\          |             /
            ------ permutation ----

The class of an axis is the meet of what its operators allow (orthogonal ∧ monomial = signed permutation).

**On leaves.** Classes are worked out on the leaves that unification left, so a leaf that was split or factored has a
class for each of its parts, and two leaves that were merged have one, the meet of both. What an operator asks is said
of *slots*: one slot is one place where a leaf stands, those of its copies along a tensor that share a tag (q, k and v
of a packed weight are three, the heads of each are one). Two slots carry the same map, or dual ones (T and T⁻ᵀ: the two
operands of a contraction, queries and keys); slots joined so are one *side* of the leaf, with one class. If T and T⁻ᵀ
meet on one slot, T is orthogonal. An operator that multiplies channel by channel (gains, depthwise kernels, gates)
leaves sides apart: the permutation is shared and so all sides are monomial, scales and signs differ and obey the
equation of the product, out = gain · in. So a gain may take one scale in and give another out (BatchNorm needs no
folding: its mean takes the scale in, its gain the ratio, the variance none). The equations of a leaf are solved as
units of measure are (Kennedy, 1997); what they leave free is each side's class.

**In blocks.** A leaf inside the blocks of another (``vfx.analyse.blocks``) has a map of its own in each block, all of
one class: T_b acts on what stands in block b after the blocks were permuted. The outer leaf is only permuted: its
scales would be the inner ones' again, and nothing larger goes through a softmax.

The class of a group, ``Group.kind``, holds the maps T that may stand on all sides that make or read the feature at once
(T where it is made, T⁻ᵀ along the axis where it is read, gains left alone); ``Group.sides`` says which sides have more.
Orthogonal maps that LayerNorm lets pass fix the span of the all-ones vector; here they fix the vector itself: the rest
is one global sign.
"""

from __future__ import annotations

from enum import IntFlag
from functools import reduce

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating]

SPREAD = 0.35  # scales and singular values are drawn from exp(±SPREAD): well-conditioned
_REFLECTIONS = 24


class Maps(IntFlag):
    """Classes of maps on a channel axis; bits are what is free, so that the meet of two is ``&``."""

    PERMUTATION = 0
    SIGNED = 1
    POSITIVE_MONOMIAL = 2
    MONOMIAL = 3
    ORTHOGONAL_ONES = 4
    ORTHOGONAL = 13  # SIGNED | ORTHOGONAL_ONES | 8
    LINEAR = 31
    ROTATIONS = 32  # of planes, which no permutation is part of: beside the lattice (``vfx.analyse.rotary``)

    @property
    def title(self) -> str:
        """The class in words."""
        return TITLES[self]

    @property
    def mixes(self) -> bool:
        """Whether channels are mixed with each other: the class holds more than monomial maps."""
        return bool(self & (Maps.ORTHOGONAL_ONES | Maps.ROTATIONS))


TITLES = {
    Maps.PERMUTATION: "permutation",
    Maps.SIGNED: "signed permutation",
    Maps.POSITIVE_MONOMIAL: "positive monomial",
    Maps.MONOMIAL: "monomial",
    Maps.ORTHOGONAL_ONES: "orthogonal, 1 fixed",
    Maps.ORTHOGONAL: "orthogonal",
    Maps.LINEAR: "linear",
    Maps.ROTATIONS: "rotations of planes",
}


def meet(*maps: Maps) -> Maps:
    """The largest class that all of some classes contain; of none, LINEAR."""
    return reduce(lambda a, b: Maps(a & b), maps, Maps.LINEAR)


def draw(maps: Maps, size: int, generator: np.random.Generator) -> Matrix:
    """A random well-conditioned element (size, size) of a class, with every freedom of the class in use."""
    if maps is Maps.ROTATIONS:
        angles = generator.uniform(-np.pi, np.pi, size // 2)
        return turning(_scales(size // 2, generator) * np.exp(1j * angles))
    if maps is Maps.LINEAR:
        return draw(Maps.ORTHOGONAL, size, generator) * _scales(size, generator) @ reflected(size, generator)
    if maps.mixes:
        fixed = maps is Maps.ORTHOGONAL_ONES
        signs = 1.0 if fixed else _signs(size, generator)
        return reflected(size, generator, fixed)[:, generator.permutation(size)] * signs
    matrix = np.eye(size)[generator.permutation(size)]
    if maps & Maps.SIGNED:
        matrix = matrix * _signs(size, generator)
    return matrix * _scales(size, generator) if maps & Maps.POSITIVE_MONOMIAL else matrix


def reflected(size: int, generator: np.random.Generator, ones: bool = False) -> Matrix:
    """A dense orthogonal matrix: a product of Householder reflections, each leaving the all-ones vector if ``ones``."""
    matrix = np.eye(size)
    for _ in range(min(size, _REFLECTIONS)):
        normal = generator.standard_normal(size)
        normal = normal - normal.mean() if ones else normal
        matrix -= np.outer(matrix @ normal, 2 / (normal @ normal) * normal)
    return matrix


def turning(numbers: NDArray[np.complexfloating]) -> Matrix:
    """Complex numbers (…, planes) as block-diagonal maps (…, 2 · planes, 2 · planes) of blocks [[a, −b], [b, a]]."""
    count = numbers.shape[-1]
    result = np.zeros((*numbers.shape[:-1], 2 * count, 2 * count))
    even, odd = np.arange(0, 2 * count, 2), np.arange(1, 2 * count, 2)
    result[..., even, even] = result[..., odd, odd] = numbers.real
    result[..., odd, even], result[..., even, odd] = numbers.imag, -numbers.imag
    return result


def turns(matrix: Matrix) -> NDArray[np.complex128]:
    """The numbers (…, planes) of the blocks [[a, −b], [b, a]] that are nearest to those of a matrix."""
    even, odd = np.arange(0, matrix.shape[-1], 2), np.arange(1, matrix.shape[-1], 2)
    real = matrix[..., even, even] + matrix[..., odd, odd]
    return np.asarray((real + 1j * (matrix[..., odd, even] - matrix[..., even, odd])) / 2, np.complex128)


def contragredient(matrix: Matrix) -> Matrix:
    """T⁻ᵀ, the map of an axis that is contracted with one that goes through T; stacks of matrices too."""
    return np.asarray(np.linalg.inv(matrix).swapaxes(-1, -2), np.float64)


def contains(maps: Maps, matrix: Matrix, tolerance: float = 1e-9) -> bool:
    """Whether a square matrix, or each of a stack, is an element of a class (up to ``tolerance`` an entry)."""
    if matrix.ndim > 2:
        return all(contains(maps, block, tolerance) for block in matrix)
    if maps is Maps.ROTATIONS:
        numbers = turns(matrix)
        return bool(numbers.all() and np.abs(matrix - turning(numbers)).max() <= tolerance)
    if maps.mixes:
        if maps is Maps.LINEAR:
            return bool(np.isfinite(matrix).all() and np.linalg.matrix_rank(matrix) == len(matrix))
        orthogonal = bool(np.abs(matrix @ matrix.T - np.eye(len(matrix))).max() <= tolerance)
        return orthogonal and (maps is Maps.ORTHOGONAL or bool(np.abs(matrix.sum(1) - 1).max() <= tolerance))
    used = np.abs(matrix) > tolerance
    if (used.sum(0) != 1).any() or (used.sum(1) != 1).any():
        return False
    entries = matrix[used]
    positive = bool(maps & Maps.SIGNED) or bool((entries > 0).all())
    return positive and (bool(maps & Maps.POSITIVE_MONOMIAL) or bool(np.abs(np.abs(entries) - 1).max() <= tolerance))


def _signs(size: int, generator: np.random.Generator) -> Matrix:
    """Signs of both kinds."""
    signs = generator.choice((-1.0, 1.0), size)
    signs[generator.integers(size)] = -1.0
    return signs


def _scales(size: int, generator: np.random.Generator) -> Matrix:
    return np.exp(generator.uniform(-SPREAD, SPREAD, size))
