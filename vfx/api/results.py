"""What comes out: a module, its Program and a report of how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from passes.align import Align
from vfx.analyse.cost import cost
from vfx.emit.module import emit
from vfx.program import Program
from vfx.report import Report, Stopwatch
from vfx.rewrite import Pass
from vfx.statistics.collect import Statistics


@dataclass(frozen=True, eq=False)
class Result:
    """A merged network: ``module`` to use, ``program`` to go on with, ``report`` to read, ``statistics`` to keep."""

    module: nn.Module
    program: Program
    report: Any  # Report, PruneReport, ChannelReport
    statistics: Statistics | None = None


def run_passes(program: Program, passes: Iterable[Pass], watch: Stopwatch) -> Program:
    for one in passes:
        with watch(one.name):
            program = one(program)
    return program


def result_of(
    result: Program,
    edges: Program,
    watch: Stopwatch,
    align: Align | None = None,
    statistics: Statistics | None = None,
    scores: Mapping[str, Any] | None = None,
    choices: Mapping[str, Any] | None = None,
    outcome: str = "",
) -> Result:
    with watch("emit"):
        module, reason = emit(result)
    report = Report(
        passes=result.history,
        notes=result.notes,
        matching=align.matching if align is not None else None,
        verify_error=align.error if align is not None and (align.matcher or not align.matching) else None,
        profile=cost(result),
        edge_profile=cost(edges.select(0)),
        own_class=not reason,
        class_reason=reason,
        seconds=watch.seconds,
        choices=choices or {},
        scores=scores or {},
        outcome=outcome,
    )
    return Result(module, result, report, statistics)
