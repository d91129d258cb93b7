"""A family of widths from one ordering of channels: what is read of the dense network and its scores serve them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from vfx.analyse.symmetry import Symmetry
from vfx.api.dense import capture_dense
from vfx.api.removing import Removal, channel_order, removed, removed_result, share_of
from vfx.api.restoring import decide
from vfx.api.results import Result
from vfx.errors import ArgumentError, listed
from vfx.options import StructuredOptions
from vfx.program import Program
from vfx.pruning.removed import Removed
from vfx.report import Stopwatch


@dataclass(frozen=True, eq=False)
class WidthFamily(Result):
    """Networks of several widths by the share that went, the widest first; it stands for the widest.

    The channels (residual blocks) of each are among those of all wider ones.

    >>> family = vfx.prune_structured(model, x, sparsity=[0.25, 0.5, 0.75], data=loader)
    >>> small = family.networks[0.75]
    """

    networks: Mapping[float, Result] = field(default_factory=dict)


def prune_family(model: nn.Module | Program, example_inputs: Any, options: StructuredOptions) -> WidthFamily:
    """The networks of ``prune_structured`` for each of several shares, by one score that is chosen at the middle one.

    Raises what ``prune_structured`` raises.
    """
    each = _several(options)
    shares = [share_of(options_of) for options_of in each]
    watch = Stopwatch(options.progress)
    dense = capture_dense(model, example_inputs, options, watch)
    order = channel_order(dense, options, watch)
    removals_of = [removed(dense, share, wanted, watch, order) for share, wanted in zip(shares, each)]
    middle = len(each) // 2
    first = decide({name: candidate.restoring for name, candidate in removals_of[middle].items()}, dense.solved, watch)
    chosen = [removals[first.candidate] for removals in removals_of]
    networks = {}
    for index, (removal, share, wanted) in enumerate(zip(chosen, shares, each)):
        only = {first.candidate: removal.restoring}
        decision = first if index == middle else decide(only, dense.solved, watch)
        notes = (*decision.notes, *_apart(removal, chosen[:index]))
        restored = removal.restoring(decision.way, watch)
        made = removed_result(removal, share, restored, replace(decision, notes=notes), wanted, watch)
        networks[share.part] = made
    widest = next(iter(networks.values()))
    return WidthFamily(widest.module, widest.program, widest.report, networks=networks)


def _several(options: StructuredOptions) -> list[StructuredOptions]:
    """The options of each width, the widest first."""
    assert isinstance(options.sparsity, Sequence)
    parts = sorted(set(map(float, options.sparsity)))
    if not parts or not all(0 <= part < 1 for part in parts):
        raise ArgumentError(f"sparsity={list(options.sparsity)}: give shares in [0, 1) of the channels that go")
    if options.method != "remove":
        raise ArgumentError("several widths share one ordering of channels, and folding has none; use method='remove'")
    return [replace(options, sparsity=part) for part in parts]


def _apart(narrow: Removal, wider: Sequence[Removal]) -> Iterator[str]:
    """A note on channels that a wider network lacks."""
    names = [name for family in wider[-1:] for name in not_nested(narrow.facts, family.record, narrow.record)]
    if names:
        yield (
            f"{listed(names)}: other channels than the wider network's, since products of groups meet another share "
            "with other factors"
        )


def not_nested(facts: Symmetry, wide: Removed, narrow: Removed) -> Iterator[str]:
    """The names of the groups of which a narrower network has channels that a wider one lacks."""
    for group in facts.groups:
        if group.parent is None or np.ndim(narrow.kept[group.index]) == 1:
            inside = bool(np.isin(narrow.kept[group.index], wide.kept[group.index]).all())
        else:
            rows = dict(zip(wide.kept[group.parent].tolist(), wide.kept[group.index]))
            pairs = zip(narrow.kept[group.parent].tolist(), narrow.kept[group.index])
            inside = all(block in rows and np.isin(row, rows[block]).all() for block, row in pairs)
        if not inside:
            yield group.name
