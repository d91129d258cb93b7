"""Bias removal: of how many layers, and from which end, decided by held-out calibration data (``vfx.judge``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vfx.judge import HeldOutScore, Judge
from vfx.normalize.biases import Direction, removed_biases, without
from vfx.program import Execution, Program, Step, Weights

FEW = 256  # held-out samples on which "auto" finds the layers of bias removal, one candidate among others


@dataclass(frozen=True)
class BiasRemoval:
    """Bias removal in ``count`` layers from one end, and its score."""

    count: int
    direction: Direction
    score: HeldOutScore


@torch.no_grad()
def removals(
    program: Program, judge: Judge, directions: Sequence[Direction], counts: Sequence[int]
) -> list[BiasRemoval]:
    """Score the removal of the biases of each number of layers, at about half of the price of running each network.

    Networks that differ only behind a layer share what runs before it: one execution advances and leaves a copy at each
    layer. From the end, the copies go on without the biases; from the start, the leading execution has none, and the
    copies go on with theirs.
    """
    plan = [step._replace(in_place=None) for step in program.plan]  # copies share their values
    tried = []
    for direction in directions:
        sets = {count: removed_biases(program, count, direction) for count in counts}
        everything = removed_biases(program, None, direction)
        start = program.weights[0] if direction == "backward" else without(program.weights[0], everything)
        forks = {
            count: (_parting(program, plan, start, weights), weights)
            for count, names in sets.items()
            for weights in [without(program.weights[0], names)]
        }
        outputs: dict[int, list[Any]] = {count: [] for count in counts}
        for batch in judge.held.batches:
            for count, output in _forked(program, plan, start, forks, batch):
                outputs[count].append(output)
        tried += [BiasRemoval(count, direction, judge.score(outputs[count])) for count in counts]
    return tried


def _parting(program: Program, plan: list[Step], first: Weights, second: Weights) -> int:
    """The first position of the plan at which two weight sets differ (other tensors are other objects, or equal)."""
    different = {
        name for name in first if first[name] is not second[name] and not torch.equal(first[name], second[name])
    }
    for position, step in enumerate(plan):
        if any(a.op == "get_attr" and str(a.target) in different for a in step.node.all_input_nodes):
            return position
    return len(plan)


def _forked(
    program: Program, plan: list[Step], start: Weights, forks: Mapping[int, tuple[int, Weights]], batch: list[Tensor]
) -> Iterator[tuple[int, Any]]:
    run = Execution(program.graph, start, batch, plan)
    for count, (position, weights) in sorted(forks.items(), key=lambda item: item[1][0]):
        while run.position < min(position, len(plan)):
            run.step()
        fork = run.fork(plan)
        fork.weights = weights
        yield count, fork.finish()


def best_removal(found: Sequence[BiasRemoval]) -> BiasRemoval:
    """The best score; of equals the fewest layers."""
    return min(found, key=lambda removal: (removal.score.value, removal.count))
