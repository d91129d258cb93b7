"""The first stage: networks become Programs, one for all of a shape, and what they were given with is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vfx.alphas import edge_weights
from vfx.api.budgets import check_budget
from vfx.api.normalizing import uncorrected
from vfx.api.reconstructing import Solving
from vfx.api.tracing import program_of
from vfx.checks import check_edges, check_finite, check_same_masks, differ_in_width
from vfx.combine.catalogue import check_needs, combiner
from vfx.combine.combiner import Combiner
from vfx.errors import ArgumentError
from vfx.match.carry import AcrossWidths
from vfx.match.catalogue import matcher
from vfx.normalize.catalogue import Normalization
from vfx.options import MergeOptions
from vfx.program import Program
from vfx.report import Stopwatch
from vfx.statistics.labels import counted
from vfx.wrappers import plain_models


@dataclass(frozen=True, eq=False)
class Captured:
    """Edges to merge: one Program of all, or one for each where their widths differ.

    ``alphas`` are their shares, ``data`` the calibration data as they can be read again, ``notes`` what is to be said,
    ``combiner`` what makes one of them (None: the average).
    """

    programs: tuple[Program, ...]
    alphas: list[float]
    data: Any
    notes: tuple[str, ...]
    combiner: Combiner | None = None

    @property
    def first(self) -> Program:
        """The Program of all edges, or of the first alone where their widths differ."""
        return self.programs[0]


def capture(
    models: Sequence[nn.Module] | Program, example_inputs: Any, options: MergeOptions, watch: Stopwatch
) -> Captured:
    """Capture the edges. Raises ArgumentError, ArchitectureError, WeightError, CaptureError."""
    models, data = plain_models(models), options.data
    Solving.of(options)  # raises before anything takes time
    combining = combined(options)
    if options.budget is not None:
        check_budget(options.budget, data, options.preserve, options.heads)
    if isinstance(models, Program) or options.heads or not differ_in_width(models):
        with watch("trace"):
            programs = [program_of(models, example_inputs, options.heads, **options.capturing)]
    else:
        _check_widths(models, example_inputs, options)
        with watch("trace"):
            programs = [program_of(model, example_inputs, **options.capturing) for model in models]
    if len(programs) == 1:
        check_weights(programs[0])
    elif combining is not None or options.base is not None:
        raise ArgumentError("combine= and base= are for edges of one width, whose channels stand in one frame")
    missed = "features that an average loses leave it with little of its accuracy"
    notes = uncorrected(data, options.normalize, "merged", missed) if combining is None else ()
    data = counted(data, len(programs[0].signature.inputs))
    alphas = edge_weights(options.weights, sum(program.edges for program in programs))
    return Captured(tuple(programs), alphas, data, notes, combining)


def combined(options: MergeOptions) -> Combiner | None:
    """What combines the edges, None for the average. Raises ArgumentError for what it does not go with."""
    combining, normalize = combiner(options.combine), options.normalize
    if options.base is not None and options.match not in ("auto", None):
        raise ArgumentError("edges of a common base= stand in one frame, which match= would leave; drop one of the two")
    if combining is None:
        return None
    check_needs(combining, options.base, options.data)
    if "base" in combining.needs and options.prepare is not None:
        raise ArgumentError(
            f"prepare={options.prepare!r} changes the edges' weights, and base= is what they were before"
        )
    method = normalize.method if isinstance(normalize, Normalization) else normalize
    if method in ("bias_calibration", "rescale_weights"):
        raise ArgumentError(f"normalize={method!r} acts on the average; combine= takes 'repair', 'rescale' or 'reset'")
    if options.budget is not None and options.solve != "least_squares":
        raise ArgumentError("budget= chooses among solutions; a named combine= is kept, unless solve='least_squares'")
    return combining


def check_weights(program: Program) -> None:
    """Raise for fewer than two edges, values that are not finite, and masks that differ."""
    if program.edges < 2:
        raise ArgumentError(f"merging needs at least two models, got {program.edges}")
    for edge, weights in enumerate(program.weights):
        check_finite(weights, f"edge {edge}", program.masks)
    check_same_masks(program)


def _check_widths(models: Sequence[nn.Module], example_inputs: Any, options: MergeOptions) -> None:
    """Different widths are asked for by a matching that carries over: sizes that differ may also be a mistake."""
    finder = None if options.match == "auto" else matcher(options.match, options.restarts, options.classes)
    if not isinstance(finder, AcrossWidths):
        check_edges(models)  # names the tensor
        raise ArgumentError("edges of different widths are merged by match='weight', 'activation' or 'ot'")
    if options.preserve != 0:
        raise ArgumentError(f"preserve={options.preserve!r}: layers can be preserved where the edges are of one width")
    if example_inputs is None:
        raise ArgumentError("example_inputs are needed to capture a model")
