"""Sweeps that correct a network's statistics layer by layer: exact, as the reference does it, and uncorrected.

=============  ==================================================================================================
exact          all batches advance together from one reader to the next; a layer is corrected on exact moments of
               all data before anything behind it runs. One forward pass in all. (*Rethinking Model Re-Basin*,
               Table 9, "SEQ")
train          the public implementations: each batch runs through layers normalised by its own statistics, and
               the means and unbiased variances of the batches are averaged for the result
uncorrected    exact moments of the network as it was, in one sweep; every layer is corrected at its end
=============  ==================================================================================================

The first is what is meant; the other two are kept to be compared with. A reader says what to do with the statistics of
one node. Behind a reader only the values that are still needed wait for the other batches; past ``memory_limit`` bytes
they wait in a temporary file (``vfx.statistics.spill``), which changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from vfx.checkpointing.journal import section
from vfx.errors import ArgumentError
from vfx.processes import added, shared
from vfx.program import Execution, Program, Step
from vfx.progress import track
from vfx.statistics.across import moments_across
from vfx.statistics.data import Batch, Batches
from vfx.statistics.moments import ROUNDING, Moments, batch_moments
from vfx.statistics.spill import MEMORY_LIMIT, Spill

Sweep = Literal["exact", "train", "uncorrected"]


@dataclass(frozen=True)
class ChannelMoments:
    """Mean and variance (C,) of a node's channels in float64; ``unbiased`` is the variance that a BatchNorm stores."""

    mean: Tensor
    variance: Tensor
    unbiased: Tensor

    @property
    def std(self) -> Tensor:
        return self.variance.clamp_min(0).sqrt()

    @property
    def constant(self) -> Tensor:
        """Channels (C,) that do not vary: rounding of a mean must not pass for a signal."""
        return self.std <= ROUNDING * self.mean.abs()


@dataclass(frozen=True)
class Reader:
    """What becomes of the statistics along the axis ``channel`` of a node: ``write`` changes weights.

    It gets the statistics and the weights to change, and returns what the report should say, or "".
    """

    channel: int
    write: Callable[[ChannelMoments, dict[str, Tensor]], str]


ValueReader = Callable[[list[Tensor]], None]  # of a node's values in all batches
Readers = Mapping[fx.Node, Sequence[Reader]]


@torch.no_grad()
def sweep(
    program: Program,
    weights: dict[str, Tensor],
    batches: Batches,
    readers: Readers,
    *,
    kind: Sweep = "exact",
    memory_limit: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Run ``batches`` up to the last reader and let the readers correct ``weights``; returns their notes.

    Raises ArgumentError, DataError.
    """
    if kind not in get_args(Sweep):
        raise ArgumentError(f"sweep must be one of {', '.join(map(repr, get_args(Sweep)))}, got {kind!r}")
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    if limit < 0:
        raise ArgumentError(f"memory_limit is a number of bytes and must not be negative, got {limit}")
    plan = program.plan
    stops = [index for index, step in enumerate(plan) if readers.get(step.node)]
    if not stops:
        return []
    if kind == "exact":
        return list(_exact(program, weights, batches, readers, plan, stops, limit, progress))
    shown = track(batches, "calibration", len(batches), progress)
    return list((_train if kind == "train" else _uncorrected)(program, weights, shown, readers, plan, stops))


def _exact(
    program: Program, weights: dict[str, Tensor], batches: Batches, readers: Readers,
    plan: list[Step], stops: list[int], limit: int, progress: bool,
) -> Iterator[str]:  # fmt: skip
    runs: list[Execution] = []
    journal = section("calibration", [plan[stop].node.name for stop in stops])
    with Spill(limit, weights.values()) as spill:
        for stop in track(stops, "calibration", len(stops), progress):
            node = plan[stop].node
            saved = journal.entry(stop, weights)
            if saved is not None and not program.read_before(plan[stop + 1 :], saved.tensors):
                weights.update(saved.tensors)
                yield from saved.values
                continue
            totals: list[Moments] = []
            spill.next_stage()
            for run in list(runs) or _started(program, weights, batches, plan, runs):
                spill.fetch(run)
                value = _advance(run, stop)
                for index, reader in enumerate(readers[node]):
                    if index == len(totals):
                        totals.append(Moments(value.shape[reader.channel], value.device))
                    totals[index].update(*batch_moments(value, reader.channel))
                if stop != stops[-1]:
                    spill.keep(run)
                else:
                    run.values.clear()
            whole, before = moments_across(dict(enumerate([total] for total in totals))), dict(weights)
            said = (
                reader.write(_exactly(moments), weights) for reader, (moments,) in zip(readers[node], whole.values())
            )
            notes = list(filter(None, said))
            if journal.on:
                journal.write(stop, {n: x for n, x in weights.items() if x is not before[n]}, notes)
            yield from notes


def _started(
    program: Program, weights: dict[str, Tensor], batches: Batches, plan: list[Step], runs: list[Execution]
) -> Iterator[Execution]:
    """A new execution for each batch, drawn when it is its turn, so that no more inputs than needed are in memory."""
    for batch in shared(batches, list):
        runs.append(Execution(program.graph, weights, batch, plan))
        yield runs[-1]


def _advance(run: Execution, stop: int) -> Tensor:
    """Run up to and including a position of the plan."""
    while run.position < stop:
        run.step()
    return run.step()[1]


def _exactly(moments: Moments) -> ChannelMoments:
    count = max(moments.count, 1)
    return ChannelMoments(moments.mean, moments.m2 / count, moments.m2 / max(count - 1, 1))


def _uncorrected(
    program: Program, weights: dict[str, Tensor], batches: Iterable[list[Tensor]], readers: Readers,
    plan: list[Step], stops: list[int],
) -> Iterator[str]:  # fmt: skip
    totals: dict[tuple[int, int], Moments] = {}
    for batch in shared(batches, list):
        run = Execution(program.graph, weights, batch, plan)
        for stop in stops:
            value = _advance(run, stop)
            for index, reader in enumerate(readers[plan[stop].node]):
                empty = Moments(value.shape[reader.channel], value.device)
                totals.setdefault((stop, index), empty).update(*batch_moments(value, reader.channel))
    for (stop, index), (moments,) in moments_across({place: [total] for place, total in totals.items()}).items():
        yield from filter(None, [readers[plan[stop].node][index].write(_exactly(moments), weights)])


def _train(
    program: Program, weights: dict[str, Tensor], batches: Iterable[list[Tensor]], readers: Readers,
    plan: list[Step], stops: list[int],
) -> Iterator[str]:  # fmt: skip
    seen: dict[tuple[int, int], list[ChannelMoments]] = {}
    for batch in shared(batches, list):
        tensors = dict(weights)
        run = Execution(program.graph, tensors, batch, plan)
        for stop in stops:
            value = _advance(run, stop)
            for index, reader in enumerate(readers[plan[stop].node]):
                count, mean, m2 = batch_moments(value, reader.channel)
                seen.setdefault((stop, index), []).append(ChannelMoments(mean, m2 / count, m2 / max(count - 1, 1)))
                reader.write(ChannelMoments(mean, m2 / count, m2 / count), tensors)
    sums = added({
        place: [
            torch.tensor(float(len(parts))),
            *(torch.stack(x).sum(0) for x in ([o.mean for o in parts], [o.unbiased for o in parts])),
        ]
        for place, parts in seen.items()
    })  # fmt: skip
    for (stop, index), (number, *totals) in sums.items():
        mean, variance = (total / number.to(total) for total in totals)
        yield from filter(
            None, [readers[plan[stop].node][index].write(ChannelMoments(mean, variance, variance), weights)]
        )


@torch.no_grad()
def advance_together(
    program: Program,
    weights: dict[str, Tensor],
    batches: Iterable[Batch],
    readers: Mapping[fx.Node, ValueReader],
    progress: bool = True,
) -> None:
    """Run every batch up to the last reader; each reader gets its node's values as soon as they exist."""
    plan = program.plan
    runs = [Execution(program.graph, weights, batch, plan) for batch in batches]
    last = max((index for index, step in enumerate(plan) if step.node in readers), default=-1)
    for step in track(plan[: last + 1], "calibration", last + 1, progress):
        values = [run.step()[1] for run in runs]
        if step.node in readers:
            readers[step.node](values)


def moments_of(values: list[Tensor], channel: int) -> Moments:
    """Exact moments of one node's channels over all batches."""
    moments = Moments(values[0].shape[channel], values[0].device)
    for x in values:
        moments.update(*batch_moments(x, channel))
    return moments


def chained(first: ValueReader | None, second: ValueReader) -> ValueReader:
    """Two readers of one node, one after the other."""

    def read(values: list[Tensor]) -> None:
        if first is not None:
            first(values)
        second(values)

    return read
