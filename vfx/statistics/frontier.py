"""All calibration batches advance together through one network, so that a layer can be corrected before the next runs.

This is what makes exact layer-by-layer statistics (sequential REPAIR) cost one forward pass: a reader sees a node's
values in every batch, may change weights that later nodes read, and the batches go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from vfx.program import Execution, Program, schedule
from vfx.progress import track
from vfx.statistics.data import Batch
from vfx.statistics.moments import Moments, batch_moments

Reader = Callable[[list[Tensor]], None]


@torch.no_grad()
def advance_together(
    program: Program,
    weights: dict[str, Tensor],
    batches: Iterable[Batch],
    readers: Mapping[fx.Node, Reader],
    progress: bool = True,
) -> None:
    """Run every batch up to the last reader; each reader gets its node's values as soon as they exist."""
    plan = schedule(program.graph)
    runs = [Execution(program.graph, weights, batch, plan) for batch in batches]
    last = max((index for index, step in enumerate(plan) if step.node in readers), default=-1)
    for step in track(plan[: last + 1], "calibration", last + 1, progress):
        values: list[Any] = [run.step()[1] for run in runs]
        if step.node in readers:
            readers[step.node](values)


def moments_of(values: list[Tensor], channel: int) -> Moments:
    """Exact moments of one node's channels over all batches."""
    moments = Moments(values[0].shape[channel], values[0].device)
    for x in values:
        moments.update(*batch_moments(x, channel))
    return moments
