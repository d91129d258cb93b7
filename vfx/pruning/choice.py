"""Which widths a smaller network gets: the budget, measured on the resized network itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vfx.analyse.cost import cost
from vfx.analyse.symmetry import Symmetry
from vfx.emit.module import graph_module
from vfx.errors import ArgumentError
from vfx.program import Program
from vfx.pruning.groups import Scores
from vfx.pruning.left import left_alone, shares_missed, total_missed
from vfx.pruning.widths import BUDGETS, Widths, by_mean, within
from vfx.resize import RemovalUnits, resize
from vfx.timing import median_seconds

REPEATS = 7  # timed runs of a network, of which the median counts


def choose_sizes(
    program: Program,
    facts: Symmetry,
    slots: RemovalUnits,
    scores: Scores,
    widths: Widths,
    sparsity: float,
    budget: str = "channels",
    *,
    comparable: bool = False,
) -> tuple[dict[int, int], list[str]]:
    """Channels that each group keeps so that ``sparsity`` of the budget is saved, and notes on what could not go.

    ``comparable`` scores are compared between groups as they are. Raises ArgumentError for a budget that is unknown.
    """
    if budget not in BUDGETS:
        raise ArgumentError(f"budget={budget!r}: choose one of {', '.join(BUDGETS)}")
    if not 0 <= sparsity < 1:
        raise ArgumentError(f"sparsity must lie in [0, 1), got {sparsity}")
    widths.check(facts)
    ranked = scores if comparable else by_mean(scores)
    streams = widths.streams(slots)
    at = lambda ratio: widths.at(streams, ranked, ratio)  # noqa: E731
    notes = left_alone(streams) if sparsity and widths.units != "experts" else []
    if budget == "channels":
        units = at(sparsity)
        missed = shares_missed if widths.allocation == "uniform" else total_missed
        notes += missed(streams, units, 1 - sparsity) if sparsity else []
        return slots.sizes(units), notes
    measure = _measure(program, facts, slots, budget)
    whole = measure([bundle.units for bundle in slots.bundles])
    units = within(whole * (1 - sparsity), measure, at)
    if units == at(1.0) and (left := measure(units) / whole) > 1 - sparsity:
        notes.append(f"budget: {left:.2f} of the {budget} stay instead of {1 - sparsity:.2f}; no more channels can go")
    return slots.sizes(units), notes


def _measure(program: Program, facts: Symmetry, slots: RemovalUnits, budget: str) -> Callable[[list[int]], float]:
    """Parameters, FLOPs or seconds of the network with these units."""
    light = program if budget == "latency" else program.to("meta")

    def measure(units: list[int]) -> float:
        kept = {group: np.arange(size) for group, size in slots.sizes(units).items()}
        small = resize(light, facts, kept, slots=slots, check=False).program
        return seconds(small) if budget == "latency" else float(getattr(cost(small), budget))

    return measure


def seconds(program: Program) -> float:
    """Median time of a forward pass on the example inputs."""
    module, call, inputs = graph_module(program), program.example_call, program.example_inputs
    device = inputs[0].device if inputs else None
    return median_seconds(lambda: module(*call.args, **call.kwargs), device, REPEATS, first=2)
