"""The first stages of pruning: the dense network, and what is to be done about what it loses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vfx.api.normalizing import uncorrected, usual
from vfx.api.reconstructing import Solving, is_named
from vfx.api.restoring import Restoring, with_goals
from vfx.api.tracing import program_of
from vfx.checks import check_finite
from vfx.errors import ArgumentError
from vfx.normalize.catalogue import METHODS, Normalization, normalization
from vfx.options import PruneOptions, StructuredOptions
from vfx.passes.principal_basis import PrincipalBasis
from vfx.program import Program
from vfx.pruning.groups import NEED_MOMENTS
from vfx.report import Stopwatch
from vfx.statistics.data import Batches

Options = PruneOptions | StructuredOptions
BASES = ("auto", "principal", "given")


@dataclass(frozen=True, eq=False)
class Dense:
    """The network to be pruned, with the statistics that a normalization goes to.

    ``data`` are all calibration data, ``few`` those that the normalization reads. ``solved`` and ``asked`` say what is
    to be done for the pruned network, ``notes`` what is to be said, ``turned`` whether free features stand in their
    principal directions.
    """

    program: Program
    data: Any
    few: Any
    solved: str | None
    asked: Normalization | None
    notes: tuple[str, ...]
    turned: bool = False

    def restoring(self, pruned: Program, options: Options, **own: Any) -> Restoring:
        """What can be done for a pruned network of this one."""
        return Restoring(
            self.program, pruned, self.data, self.few, self.asked, is_named(options.normalize), options.repair_samples,
            options.reading, judge=options.judge, verify=options.verify, notes=self.notes, **own,
        )  # fmt: skip


def capture_dense(model: nn.Module | Program, example_inputs: Any, options: Options, watch: Stopwatch) -> Dense:
    """Capture the network and read its statistics. Raises ArgumentError, WeightError, DataError, CaptureError."""
    with watch("trace"):
        program = program_of(model, example_inputs, **options.capturing)
    check_finite(program.weights[0], "the network", program.masks)
    asked = _normalization(program, options)
    notes = uncorrected(options.data, options.normalize, "pruned", "much of the accuracy may be gone")
    solved = Solving(options.solve, judge=options.judge).resolved(options.normalize, options.data is not None)
    program = program if options.device is None else program.to(options.device)
    given = program
    if isinstance(options, StructuredOptions) and _turns(options):
        with watch("basis"):
            program = PrincipalBasis(options.data, verify=options.verify, **options.reading)(given)
    # the same few samples each time, shuffled or not
    few = None if options.data is None else Batches(program, options.data, options.repair_samples).held()
    with watch("statistics"):
        described = with_goals(program, asked, few, options.repair_samples, options.reading)
    return Dense(described, options.data, few, solved, asked, notes, turned=program is not given)


def _turns(options: StructuredOptions) -> bool:
    """Whether free features go into their principal directions first. Raises ArgumentError."""
    if options.basis not in BASES:
        raise ArgumentError(f"basis={options.basis!r} is unknown; choose one of {', '.join(BASES)}")
    if options.basis != "auto":
        if options.basis == "principal" and options.data is None:
            raise ArgumentError("basis='principal' reads data; give data=")
        return options.basis == "principal"
    by_data = isinstance(options.score, str) and options.score in ("auto", *NEED_MOMENTS)
    channels = options.method == "remove" and options.units not in ("experts", "layers")
    return options.data is not None and by_data and channels


def _normalization(program: Program, options: Options) -> Normalization | None:
    """The repair to run on a pruned network; its goal is one network, so REPAIR needs no care for what is averaged."""
    asked = normalization(options.normalize, options.data is not None)
    if asked is not None and asked.method == "auto":
        method = usual(program)
        return replace(asked, method="repair" if method == "rescale" else method)
    if asked is not None and not METHODS[asked.method].data:
        methods = ", ".join(repr(name) for name, method in METHODS.items() if method.data)
        raise ArgumentError(f"normalize={options.normalize!r}: prune takes 'auto', {methods} or None")
    return asked
