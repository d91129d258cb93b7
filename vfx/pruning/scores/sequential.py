"""Layers pruned one after another, each on what the layers pruned before it give it, in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, fx

from vfx.checkpointing.journal import section
from vfx.pruning.scores.score import Pruned, Subject
from vfx.pruning.targets import Target, operands
from vfx.statistics.frontier import ValueReader, advance_together, chained

PruneOne = Callable[[Target, Tensor, list[Tensor]], tuple[Tensor, Tensor]]


def one_by_one(subject: Subject, prune_one: PruneOne, resumes: bool = False) -> Pruned:
    """Prune each layer when the data have come up to it.

    ``prune_one`` gets a target, its weight and the layer's inputs in all batches, and returns the mask (True: stays)
    and the weight that the layer goes on with. A weight that serves several calls is pruned for the first.
    ``resumes``: what it returns is all that it does, so that a run that goes on may take that from the one before.
    """
    weights, masks = dict(subject.program.weights[0]), {}
    journal = section("layers pruned", [target.name for target in subject.targets])
    number = {target.name: index for index, target in enumerate(subject.targets)}

    def prune(target: Target, values: list[Tensor]) -> None:
        dense = weights[target.name]

        def make() -> dict[str, Tensor]:
            mask, weight = prune_one(target, dense, values)
            return {"mask": mask, "weight": weight}

        like = {"mask": dense, "weight": dense}
        made = journal.once(number[target.name], make, like) if resumes else make()
        masks[target.name], weights[target.name] = made["mask"], made["weight"]

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
