"""Smaller inputs to prove on: fewer samples and fewer positions, all channels.

What a resized network changes are channel axes. How many samples there are and how far images or signals extend is the
same in both networks, so the proof loses nothing on inputs that are small there, as long as

- every operator runs (sizes that the graph holds as numbers may forbid it where they cannot be worked out anew),
- every axis that is resized has its whole length,
- no axis of several positions is down to one.

``Extent`` holds a run to this; where it does not hold, the proof takes the example's own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from vfx.operators import arguments, operator_of
from vfx.program import Program, Value, copy_graph
from vfx.resize.operators import put

SAMPLES = 2  # as many as show how an output varies over the batch
PARTS = 4, 2
UNIT, SMALL = 32, 64  # most networks halve an image five times; a side is cut to a multiple of UNIT, SMALL at least


class Unfit(Exception):
    """These inputs leave too few positions somewhere in this network."""


def fewer_samples(program: Program) -> Program:
    """The example inputs with no more samples than a proof needs."""
    return program.with_samples(SAMPLES)


def fewer_positions(program: Program) -> Iterator[Program]:
    """Example inputs of about a quarter of each long side, and of a half."""
    for part in PARTS:
        cut = [_cut(x, part) if isinstance(x, Tensor) and x.is_floating_point() else x for x in program.example_inputs]
        if any(after is not before for after, before in zip(cut, program.example_inputs)):
            yield replace(program, example_inputs=tuple(cut))


def _cut(x: Tensor, part: int) -> Tensor:
    """Axes behind batch and channels, as convolutions have them."""
    for dim in range(2, x.ndim):
        side = max(SMALL, -(-x.shape[dim] // (part * UNIT)) * UNIT)
        if 3 * side <= 2 * x.shape[dim]:
            x = x.narrow(dim, 0, side)
    return x


def written_sizes(node: fx.Node, before: Sequence[Any], after: Sequence[int]) -> tuple[str, dict[int, int]]:
    """Sizes of positions that an operator holds as numbers, for an operand that has other lengths than when captured.

    The argument's name and its new entries by index: interpolation keeps its factor, views keep the axes that stand in
    front of or behind what they take apart.
    """
    a = arguments(node)
    if operator_of(node).interpolates and a.get("output_size"):
        sizes, rank = a["output_size"], len(a["output_size"])
        pairs = zip(sizes, before[-rank:], after[-rank:])
        new = {k: max(1, round(size * now / old)) for k, (size, old, now) in enumerate(pairs) if now != old}
        return "output_size", new
    name = next((name for name in ("size", "shape") if name in a), "")
    if not operator_of(node).is_reshape or not name:
        return "", {}
    sizes = a[name]
    sizes_after = {}
    for steps in (range(min(len(sizes), len(before))), range(-1, -min(len(sizes), len(before)) - 1, -1)):
        for k in steps:
            if isinstance(before[k], int) and sizes[k] != before[k]:
                break
            if isinstance(before[k], int) and after[k] != before[k]:
                sizes_after[k % len(sizes)] = after[k]
    return name, sizes_after


def rewritten(program: Program, sizes: Mapping[str, tuple[str, dict[int, int]]]) -> Program:
    """The Program with some sizes that its graph holds as numbers changed, by node name."""
    if not sizes:
        return program
    graph, _ = copy_graph(program.graph)
    for node in graph.nodes:
        if node.name in sizes:
            name, new = sizes[node.name]
            put(node, name, [new.get(k, size) for k, size in enumerate(arguments(node)[name])])
    return replace(program, graph=graph)


def check_extent(node: fx.Node, value: Any, resized: Sequence[tuple[int, int]] = ()) -> None:
    """Raise Unfit where a value has a single position along an axis of several.

    ``resized``: dimensions with the lengths that they must have; ValueError where they have not.
    """
    foretold = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(foretold, Value) or value.ndim != len(foretold.shape):
        return
    if any(value.shape[dim] != length for dim, length in resized):
        raise ValueError("positions stand on a resized axis")
    if any(isinstance(old, int) and old > 1 and new < 2 for old, new in zip(foretold.shape, value.shape)):
        raise Unfit
