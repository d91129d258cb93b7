"""What comes out: a module, its Program and a report of how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from vfx.analyse.cost import cost
from vfx.api.merge_report import MergeReport
from vfx.emit.files import export
from vfx.emit.module import emit
from vfx.emit.taking import Taking
from vfx.match.matcher import Alignment
from vfx.program import Facts, Program, Weights
from vfx.report import Stopwatch
from vfx.rewrite import Pass, PassResult
from vfx.statistics.collect import Statistics

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Result:
    """A merged, pruned or repaired network: ``module`` to use, ``program`` to go on with, ``report`` to read.

    ``program`` reads the module's own tensors. ``statistics`` are those that were measured, to be used again. The
    Result can stand where its module stands:

    >>> result = vfx.merge([a, b], x, data=batches)
    >>> result(x).shape == a(x).shape
    True
    """

    module: nn.Module
    program: Program
    report: Any  # a vfx.report.Report: MergeReport, PruneReport or ChannelReport
    statistics: Statistics | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs."""
        return self.module(*args, **kwargs)

    def state_dict(self) -> dict[str, Tensor]:
        """The module's parameters and buffers by name."""
        return self.module.state_dict()

    def eval(self) -> Result:
        """Set the module to evaluation mode and give the Result back."""
        self.module.eval()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Result:
        """Move the module to a device or a dtype, as ``nn.Module.to`` does, and give the Result back."""
        self.module.to(*args, **kwargs)
        return self

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the network in the format of ``path``'s suffix; ``options`` are those of ``vfx.export``."""
        return export(self, path, **options)

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        lines = [f"Result({type(self.module).__name__} of {parameters:,} parameters)"]
        outcome = getattr(self.report, "outcome", "")
        notes = getattr(self.report, "notes", ())
        lines += [f"  {line}" for line in (outcome, *notes) if line]
        if len(lines) > _REPR_LINES:
            lines[_REPR_LINES - 1 :] = [f"  and {len(lines) - _REPR_LINES + 1} more notes: print(result.report)"]
        return "\n".join(lines)


_REPR_LINES = 10


def run_passes(program: Program, passes: Iterable[Pass[Any]], watch: Stopwatch) -> Program:
    """Run passes one behind another."""
    for step in passes:
        program = run_pass(program, step, watch).program
    return program


def run_pass(program: Program, one: Pass[R], watch: Stopwatch) -> PassResult[R]:
    """Run a pass whose record counts."""
    with watch(one.name):
        return one.run(program)


def result_of(
    result: Program,
    edges: Program,
    watch: Stopwatch,
    alignment: Alignment | None = None,
    statistics: Statistics | None = None,
    chosen: Mapping[str, Any] | None = None,
    held: Iterable[Weights] | None = None,
    verify: bool = True,
) -> Result:
    """The last stage: the network of a Program, and the report. ``chosen``: choices, scores and outcome of it.

    ``held`` and ``verify`` as for ``emitted``.
    """
    module, program, facts = emitted(result, edges.select(0), watch, held=held, verify=verify)
    alignment = alignment or Alignment()
    alignment_facts: dict[str, Any] = {"matching": alignment.matching, "verify_error": alignment.error}
    return Result(module, program, MergeReport(**facts, **alignment_facts, **(chosen or {})), statistics)


def emitted(
    result: Program, given: Program, watch: Stopwatch, notes: Iterable[str] = (),
    held: Iterable[Weights] | None = None, verify: bool = True, opened: Program | None = None,
) -> tuple[nn.Module, Program, dict[str, Any]]:  # fmt: skip
    """The module of a Program, the Program with the module's tensors, and what reports say of it against the ``given``.

    The module takes the tensors that are in none of the weight sets ``held``; all are copied where that is None.
    Without ``verify`` the user's own class is not compared with the Program if its structure is unchanged. ``opened``
    as for ``emit``.
    """
    taking = Taking(held)
    with watch("emit"):
        module, reason = emit(result, taking=taking, verify=verify, opened=opened)
    program = replace(
        taking.shared(result), facts=Facts(result.graph)
    )  # what was found of the edges holds their weights
    return (
        module,
        program,
        {
            "passes": result.history,
            "notes": (*result.notes, *notes),
            "profile": cost(result),
            "given_profile": cost(given),
            "own_class": not reason,
            "class_reason": reason,
            "seconds": watch.seconds,
        },
    )
