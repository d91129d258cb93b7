"""Networks of different widths, brought to the shapes of the first before they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vfx.analyse.symmetry import symmetry as infer_symmetry
from vfx.api.normalizing import reads_for, without_batch_norm
from vfx.api.preparing import prepared
from vfx.api.tracing import program_of
from vfx.checks import check_edges
from vfx.errors import ArgumentError
from vfx.match.carry import AcrossWidths
from vfx.match.catalogue import matcher
from vfx.match.matcher import Matcher
from vfx.normalize.catalogue import Normalization, normalization
from vfx.report import Stopwatch
from vfx.statistics.labels import counted
from vfx.widths import Carried, to_first_width


@dataclass(frozen=True)
class Wanted:
    """What ``vfx.merge`` was asked for, as far as it concerns edges of different widths."""

    match: str | Matcher | None
    classes: str
    restarts: int
    normalize: str | Normalization | None
    prepare: str | None
    preserve: int | str
    verify: bool
    seed: int
    dynamic_shapes: Any
    outputs: Sequence[int | str] | None


def one_width(
    models: Sequence[nn.Module], example_inputs: Any, data: Any, wanted: Wanted, options: dict[str, Any],
    watch: Stopwatch,
) -> tuple[Carried, Normalization | None]:  # fmt: skip
    """Networks of different widths in the shapes of the first, and the normalization to run."""
    finder = _finder(models, wanted)
    if wanted.preserve != 0:
        raise ArgumentError(f"preserve={wanted.preserve!r}: layers can be preserved where the edges are of one width")
    if example_inputs is None:
        raise ArgumentError("example_inputs are needed to capture a model")
    with watch("trace"):
        kept: dict[str, Any] = {"dynamic_shapes": wanted.dynamic_shapes, "outputs": wanted.outputs}
        captured = [program_of(model, example_inputs, **kept) for model in models]
    asked = normalization(wanted.normalize, data is not None)
    programs = [prepared(program, wanted.prepare, wanted.verify, watch) for program in captured]
    if not finder.through_norms:
        folded = [without_batch_norm(program, asked, wanted.verify) for program in programs]
        programs, asked = [program for program, _ in folded], folded[0][1]
    device = options["device"]
    programs = programs if device is None else [program.to(device) for program in programs]
    data = counted(data, len(programs[0].signature.inputs))
    layers = "layers" in reads_for(asked, None, programs[0])
    with watch("symmetry"):
        facts = [infer_symmetry(program) for program in programs]
    with watch("match"):
        carried = to_first_width(programs, facts, finder, data, layers=layers, seed=wanted.seed, **options)
    return replace(carried, captured=captured[0]), asked


def _finder(models: Sequence[nn.Module], wanted: Wanted) -> AcrossWidths:
    """What was asked for by name: sizes that differ may also be a mistake."""
    finder = None if wanted.match == "auto" else matcher(wanted.match, wanted.restarts, wanted.classes)
    if not isinstance(finder, AcrossWidths):
        check_edges(models)  # names the tensor
        raise ArgumentError("edges of different widths are merged by match='weight', 'activation' or 'ot'")
    return finder
