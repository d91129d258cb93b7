"""The matrix products inside one call (einsum, tensordot, bilinear, recurrent layers), one by one as torch runs them.

Shapes go in, ``ContractionCost``s come out; what is only multiplied entry by entry, or summed, costs nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Sizes = tuple[int, ...]
Labels = dict[str | int, int]  # sizes by label; ... stands for -n … -1, aligned at the right


class ContractionCost(NamedTuple):
    """Multiply-accumulates of one product, and the elements that come out of it."""

    macs: int
    outputs: int


def einsum(equation: str, shapes: Sequence[Sizes], path: Sequence[int] | None = None) -> Iterator[ContractionCost]:
    """The products of pairs of operands along ``path`` (pairs of places), by default from left to right."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    operands = [_labelled(term, shape) for term, shape in zip(inputs.split(","), shapes)]
    sizes = {label: max(labelled.get(label, 0) for labelled in operands) for labelled in operands for label in labelled}
    operands = [{label: size for label, size in labelled.items() if size == sizes[label]} for labelled in operands]
    asked = _asked(inputs, output, sizes) if "->" in equation else _implied(inputs, sizes)
    steps = iter(path or ())
    while len(operands) > 1:
        places = (next(steps), next(steps)) if path else (0, 1)
        left, right = (operands[place] for place in places)
        operands = [labelled for place, labelled in enumerate(operands) if place not in places]
        later = asked.union(*operands)
        kept = {label: size for label, size in (left | right).items() if label in later}
        summed = [label for label in left if label in right and label not in later]
        if summed:
            outputs = math.prod(kept.values())
            yield ContractionCost(outputs * math.prod(sizes[label] for label in summed), outputs)
        operands.insert(len(operands) if path else 0, kept)


def _labelled(term: str, shape: Sizes) -> Labels:
    before, dots, after = term.partition("...")
    unnamed = len(shape) - len(before) - len(after) if dots else 0
    return dict(zip([*before, *range(-unnamed, 0), *after], shape))


def _asked(inputs: str, output: str, sizes: Labels) -> set[str | int]:
    unnamed = {label for label in sizes if isinstance(label, int)} if "..." in output else set()
    return set(output.replace(".", "")) | unnamed


def _implied(inputs: str, sizes: Labels) -> set[str | int]:
    """Without an arrow: every label that stands once, and all unnamed axes."""
    return {label for label in sizes if isinstance(label, int) or inputs.count(label) == 1}


def tensordot(shape: Sizes, other: Sizes, dims: Iterable[int], other_dims: Iterable[int]) -> Iterator[ContractionCost]:
    summed = math.prod(shape[d] for d in dims)
    outputs = math.prod(shape) * math.prod(other) // max(summed, 1) ** 2
    yield ContractionCost(outputs * summed, outputs)


def bilinear(positions: int, weight: Sizes) -> Iterator[ContractionCost]:
    """x₁ᵀ W x₂ for a weight (out, in₁, in₂): first x₁ᵀ W, then its product with x₂."""
    out, first, second = weight
    yield ContractionCost(positions * out * first * second, positions * out * second)
    yield ContractionCost(positions * out * second, positions * out)


def recurrent(rows: int, parameters: Iterable[Sizes]) -> Iterator[ContractionCost]:
    """Every weight (out, in) of every layer and direction times ``rows``, steps × samples; biases are vectors."""
    for shape in parameters:
        if len(shape) == 2:
            yield ContractionCost(rows * math.prod(shape), rows * shape[0])
