"""Layers pruned one after another, each on what the layers pruned before it give it, in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, fx

from vfx.pruning.scores.score import Pruned, Subject
from vfx.pruning.targets import Target, operands
from vfx.statistics.frontier import ValueReader, advance_together, chained

PruneOne = Callable[[Target, Tensor, list[Tensor]], tuple[Tensor, Tensor]]


def one_by_one(subject: Subject, prune_one: PruneOne) -> Pruned:
    """Prune each layer when the data have come up to it.

    ``prune_one`` gets a target, its weight and the layer's inputs in all batches, and returns the mask (True: stays)
    and the weight that the layer goes on with. A weight that serves several calls is pruned for the first.
    """
    weights, masks = dict(subject.program.weights[0]), {}

    def prune(target: Target, values: list[Tensor]) -> None:
        masks[target.name], weights[target.name] = prune_one(target, weights[target.name], values)

    readers: dict[fx.Node, ValueReader] = {}
    for target in subject.targets:
        read_input(subject, readers, target.nodes[0], partial(prune, target))
    advance_together(subject.program, weights, subject.batches(), readers, subject.progress)
    return Pruned(masks, {name: weights[name] for name in masks})


def read_input(subject: Subject, readers: dict[fx.Node, ValueReader], node: fx.Node, read: ValueReader) -> None:
    """Have ``read`` see a layer's input before the layer runs; an input that is a weight is there from the start."""
    source, _ = operands(node)
    if source.op != "get_attr":
        readers[source] = chained(readers.get(source), read)
        return
    first = subject.program.placeholders[0]
    constant = subject.program.weights[0][str(source.target)]
    readers[first] = chained(readers.get(first), lambda values: read([constant for _ in values]))
